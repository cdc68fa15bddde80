"""Latent diffusion transformers that learn images together with their semantics."""

__version__ = "0.1.0"
