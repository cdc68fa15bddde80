"""Data only: the small encoder and autoencoder that need no download. How they were made: `docs/starter-kit.md`."""
