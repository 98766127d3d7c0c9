"""One task's curvature: its two forms, how they are estimated, and how good the estimate is."""
