"""What a method does in a step: what it replays and what it penalises."""
