"""Per-sample gradients of a batch's losses, and statistics of them, in one backward pass."""
