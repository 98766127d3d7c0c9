"""A user's model: parameter names, the binding to parameters, flat buffers, and restoring the model's state."""
