"""Data sets: how they are read, kept and cut into tasks."""
