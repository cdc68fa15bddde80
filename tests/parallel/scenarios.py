"""What torchrun runs in `test_parallel.py`: several jobs in one start, since starting takes most of the time."""

from __future__ import annotations

import json
import sys

from reglue import cli


def main() -> None:
    """Each argument is a job's command line, as a JSON list; they run one after another in the same processes."""
    for text in sys.argv[1:]:
        options = cli.parse(json.loads(text))
        cli.job_of(options)(options)


if __name__ == "__main__":
    main()
