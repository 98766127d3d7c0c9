"""Many runs, methods x seeds, each in a process of its own, on this machine or as a job of Slurm."""
