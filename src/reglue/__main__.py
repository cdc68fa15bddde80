"""`reglue` and `python -m reglue`: Ctrl-C is understood before anything else is imported."""

from reglue.training import stopping


def main() -> None:
    """Run a command: see `cli.main`."""
    stopping.listen()
    from reglue import cli

    cli.main()


if __name__ == "__main__":
    main()
