"""The command line: one subcommand per job, and nothing else.

A job is imported when it is asked for: `reglue --help` need not wait for PyTorch.
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, make_dataclass
from functools import reduce
from importlib import import_module
from operator import or_
from typing import Annotated, Any

import tyro
from tyro import MISSING

from reglue.errors import Stopped, UserError

DESCRIPTION = "Latent diffusion transformers that learn images together with their semantics."


@dataclass(frozen=True)
class Command:
    """A subcommand: where its options and its function are, and its line of help."""

    options: str
    """MODULE:NAME of the dataclass of options; the function has the module's name."""
    description: str

    def load(self) -> type:
        """The dataclass of options."""
        module, _, name = self.options.partition(":")
        return getattr(import_module(module), name)


COMMANDS = {
    "prepare": Command("reglue.commands.prepare:Prepare", "Images to a store of latents and features."),
    "reencode": Command("reglue.commands.reencode:Reencode", "A store once more, in another latent space."),
    "compress": Command("reglue.commands.compress:Compress", "Fit a compressor to a store's features."),
    "autoencode": Command(
        "reglue.commands.autoencode:Autoencode", "Train an autoencoder aligned with a vision encoder (ReaLS)."
    ),
    "train": Command("reglue.commands.train:Train", "Train a recipe on a store, or continue a run."),
    "sample": Command("reglue.commands.sample:Sample", "Draw images from a run."),
    "evaluate": Command("reglue.commands.evaluate:Evaluate", "Compare images with a reference."),
    "probe": Command("reglue.commands.probe:Probe", "Measure what features and their codes still say."),
    "head": Command("reglue.commands.train_head:TrainHead", "Train a head that segments or tells depth."),
    "perceive": Command("reglue.commands.perceive:Perceive", "Tell from latents what generated images show."),
    "import": Command("reglue.commands.import_run:ImportRun", "A published checkpoint to a run."),
    "export": Command("reglue.commands.export_run:ExportRun", "A run to a published checkpoint."),
    "verify": Command("reglue.commands.verify:Verify", "Whether a store's or a run's files are as they were written."),
    "demo": Command("reglue.commands.demo:Demo", "All of it on handwritten digits, in minutes."),
}


def main() -> None:
    """Run a subcommand. A user's mistake ends with one line and exit code 2, an interruption with 130.

    A job that was asked to stop, and has in good order, ends with 143. Anything else that goes wrong shows where, and
    ends a process among others at once too.
    """
    try:
        options = parse(sys.argv[1:])
        job_of(options)(options)
        from reglue.training import distributed  # loaded by now; not for `--help`

        distributed.leave()
    except UserError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or 'a file'}: {error.strerror or error}")
    except Stopped as request:
        fail(str(request), 128 + signal.SIGTERM)
    except KeyboardInterrupt:
        fail("interrupted; run the same command again, which keeps what was finished", 130)
    except Exception:
        from reglue.training import distributed

        if not distributed.are_many():
            raise
        traceback.print_exc()
        distributed.end(1)


def fail(message: str, code: int = 2) -> None:
    """Print one line and exit."""
    from reglue.training import distributed

    print(f"reglue: {message}", file=sys.stderr)
    distributed.end(code)


def job_of(options: Any) -> Callable[[Any], object]:
    """The function that takes these options: it has the name of the module that they are declared in."""
    module = type(options).__module__
    return getattr(import_module(module), module.rpartition(".")[2])


def parse(arguments: list[str]) -> Any:
    """The options of the job that the arguments name. Prints what is wrong and exits with code 2 if they do not fit."""
    asked = arguments[0] if arguments else ""
    # Completions for a shell are of every option; all else needs the options of one job at most.
    everything = asked.startswith("--tyro")
    return tyro.cli(
        any_of([subcommand(name, everything or name == asked) for name in COMMANDS]),
        prog="reglue",
        description=DESCRIPTION,
        args=arguments,
        config=(
            tyro.conf.ConsolidateSubcommandArgs,
            tyro.conf.AvoidSubcommands,
            tyro.conf.PositionalMetavarFromFieldName,
        ),
    )


def subcommand(name: str, with_options: bool) -> Any:
    """The type that tyro makes a subcommand of; without options it is a line of help alone."""
    command = COMMANDS[name]
    if not with_options:
        kind = make_dataclass(name, [])
    elif name == "train":
        kind = recipes(command.load())
    else:
        kind = command.load()
    return Annotated[kind, tyro.conf.subcommand(name, description=command.description)]


def recipes(train: type) -> Any:
    """One subcommand of `train` per published recipe, whose values are the defaults of its options."""
    from reglue.papers import PAPERS

    return any_of(
        [
            Annotated[
                train,
                tyro.conf.subcommand(name, default=train(paper.recipe, MISSING, MISSING), description=paper.title),
            ]
            for name, paper in PAPERS.items()
        ]
    )


def any_of(kinds: list[Any]) -> Any:
    """The union of types."""
    return reduce(or_, kinds)
