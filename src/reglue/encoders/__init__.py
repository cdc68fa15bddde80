"""Frozen networks around the diffusion model: vision encoders, autoencoders, compressors."""
