"""The command line: one subcommand per job, and nothing else."""

from __future__ import annotations

import sys
from functools import reduce
from operator import or_
from typing import Annotated, Any

import tyro
from tyro import MISSING

from reglue.errors import UserError
from reglue.jobs.autoencode import Autoencode, autoencode
from reglue.jobs.compress import Compress, compress
from reglue.jobs.demo import Demo, demo
from reglue.jobs.evaluate import Evaluate, evaluate
from reglue.jobs.export_run import ExportRun, export_run
from reglue.jobs.import_run import ImportRun, import_run
from reglue.jobs.prepare import Prepare, prepare
from reglue.jobs.probe import Probe, probe
from reglue.jobs.sample import Sample, sample
from reglue.jobs.train import Train, train
from reglue.papers import PAPERS
from reglue.runs import ranks

DESCRIPTION = "Latent diffusion transformers that learn images together with their semantics."

JOBS = {
    Prepare: prepare,
    Compress: compress,
    Autoencode: autoencode,
    Train: train,
    Sample: sample,
    Evaluate: evaluate,
    Probe: probe,
    ImportRun: import_run,
    ExportRun: export_run,
    Demo: demo,
}


def main() -> None:
    """Run a subcommand. A user's mistake ends with one line and exit code 2, an interruption with 130."""
    try:
        options = parse(sys.argv[1:])
        JOBS[type(options)](options)
        ranks.leave()
    except UserError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or 'a file'}: {error.strerror or error}")
    except KeyboardInterrupt:
        print("reglue: interrupted; the same command continues where it stopped", file=sys.stderr)
        ranks.end(130)


def fail(message: str) -> None:
    """Print one line and exit with code 2."""
    print(f"reglue: {message}", file=sys.stderr)
    ranks.end(2)


def parse(arguments: list[str]) -> Any:
    """The options of the job that the arguments name. Prints what is wrong and exits with code 2 if they do not fit."""
    recipes = [
        Annotated[
            Train,
            # The recipe's values are the defaults of its options.
            tyro.conf.subcommand(name, default=Train(paper.recipe, MISSING, MISSING), description=paper.title),
        ]
        for name, paper in PAPERS.items()
    ]
    jobs = [
        Annotated[Prepare, tyro.conf.subcommand("prepare", description="Images to a store of latents and features.")],
        Annotated[Compress, tyro.conf.subcommand("compress", description="Fit a compressor to a store's features.")],
        Annotated[
            Autoencode,
            tyro.conf.subcommand(
                "autoencode", description="Train an autoencoder aligned with a vision encoder (ReaLS)."
            ),
        ],
        Annotated[
            any_of(recipes), tyro.conf.subcommand("train", description="Train a recipe on a store, or continue a run.")
        ],
        Annotated[Sample, tyro.conf.subcommand("sample", description="Draw images from a run.")],
        Annotated[Evaluate, tyro.conf.subcommand("evaluate", description="Compare images with a reference.")],
        Annotated[Probe, tyro.conf.subcommand("probe", description="Measure what features and their codes still say.")],
        Annotated[ImportRun, tyro.conf.subcommand("import", description="A published checkpoint to a run.")],
        Annotated[ExportRun, tyro.conf.subcommand("export", description="A run to a published checkpoint.")],
        Annotated[Demo, tyro.conf.subcommand("demo", description="All of it on handwritten digits, in minutes.")],
    ]
    return tyro.cli(
        any_of(jobs),
        prog="reglue",
        description=DESCRIPTION,
        args=arguments,
        config=(tyro.conf.ConsolidateSubcommandArgs, tyro.conf.AvoidSubcommands),
    )


def any_of(kinds: list[Any]) -> Any:
    """The union of types."""
    return reduce(or_, kinds)
