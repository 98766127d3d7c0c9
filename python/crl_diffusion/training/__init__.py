"""One run: its loop, state, steps and snapshots."""
