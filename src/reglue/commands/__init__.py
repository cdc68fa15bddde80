"""The commands: one file each, with its options and its function, and nothing else."""
