"""Ours beside the published REGLUE code: the parts of `against_official.py`, one file per command."""
