"""Latent spaces: autoencoders behind one interface."""
