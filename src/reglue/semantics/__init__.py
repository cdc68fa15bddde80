"""Frozen vision encoders, and compressors of their features."""
