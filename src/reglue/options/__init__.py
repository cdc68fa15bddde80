"""What the commands are asked for: a frozen dataclass each, read and refused before PyTorch is imported."""
