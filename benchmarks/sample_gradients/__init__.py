"""Per-sample gradient statistics of one batch: this library and peers, against one plain backward pass."""
