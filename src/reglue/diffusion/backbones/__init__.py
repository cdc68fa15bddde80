"""Backbones: from tokens and what conditions them to tokens."""
