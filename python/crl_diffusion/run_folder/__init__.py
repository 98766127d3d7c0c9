"""What a run leaves on disk: records, checkpoints, and how they are read again."""
