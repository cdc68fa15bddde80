"""What torchrun runs in `test_parallel.py`: several jobs in one start, since starting takes most of the time."""

from __future__ import annotations

import json
import sys
from functools import partialmethod

import torch

from reglue import cli


def main() -> None:
    """Each argument is a job's command line, as a JSON list; they run one after another in the same processes.

    What they compile becomes one graph, but no code, which would take minutes.
    """
    torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend="aot_eager")  # type: ignore[reportAttributeAccessIssue]
    for text in sys.argv[1:]:
        options = cli.parse(json.loads(text))
        cli.execute(options)


if __name__ == "__main__":
    main()
