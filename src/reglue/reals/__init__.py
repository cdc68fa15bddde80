"""Training of autoencoders whose latents are aligned with a vision encoder (ReaLS, arXiv 2502.00359)."""
