"""One task's curvature: its two forms, their estimation, and statistics of the estimate."""
