"""What is known of a user's model: names of parameters, which ones are bound, what an estimate must not change."""
