"""What a history costs as tasks accumulate, and how far its bounded forms are from the exact penalty."""
