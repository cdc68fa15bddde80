"""One file per job: each reads top to bottom."""
