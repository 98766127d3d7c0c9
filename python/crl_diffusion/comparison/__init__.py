"""Many runs, methods x seeds, each in a process of its own."""
