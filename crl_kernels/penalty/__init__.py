"""All past tasks of a model, and the ways to apply their penalty: value, gradient, decoupled step, hooks."""
