"""What a run keeps: checkpoints, official imports, tracking; ranks and seeds."""
