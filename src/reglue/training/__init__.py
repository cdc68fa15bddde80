"""Training: the loop, checkpoints, processes and devices, precision, tracking."""
