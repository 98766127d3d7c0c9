"""One run: its loop, state, steps, snapshots, and how long it will take."""
