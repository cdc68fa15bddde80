"""`python -m reglue` is `reglue`."""

from reglue.cli import main

main()
