"""Ours and the published REGLUE code side by side, in one run, on the same machine and tensors.

    python benchmarks/against_official.py train --official PATH --model B/2

Each command ends with one line of JSON: figures, conditions, hardware, versions, commits, date. `--official` names a
checkout of the published code; without it ours is measured alone.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import tyro

from comparisons.checkpointing import Checkpointing, checkpointing
from comparisons.compressing import Compressing, compressing
from comparisons.preparing import Preparing, preparing
from comparisons.sampling import Sampling, sampling
from comparisons.starting import Starting, starting
from comparisons.training import Training, training
from reglue.errors import UserError

COMMANDS = {
    "train": (Training, training),
    "sample": (Sampling, sampling),
    "prepare": (Preparing, preparing),
    "compressor": (Compressing, compressing),
    "checkpoint": (Checkpointing, checkpointing),
    "startup": (Starting, starting),
}


def main(arguments: list[str] | None = None) -> str:
    """Run the benchmark that is named. Returns its line of JSON."""
    kinds: Any = None
    for name, (kind, _) in COMMANDS.items():
        command = Annotated[kind, tyro.conf.subcommand(name)]
        kinds = command if kinds is None else kinds | command
    options: Any = tyro.cli(  # type: ignore[reportCallIssue], a union made at run time
        Annotated[kinds, tyro.conf.arg(name="")],  # type: ignore[reportArgumentType]
        prog="against_official.py",
        description=__doc__,
        args=arguments,
        config=(tyro.conf.ConsolidateSubcommandArgs, tyro.conf.AvoidSubcommands),
    )
    return next(run for kind, run in COMMANDS.values() if isinstance(options, kind))(options)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"against_official: {error}", file=sys.stderr)
        sys.exit(2)
