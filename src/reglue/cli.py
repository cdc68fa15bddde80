"""The command line: the commands, their help, and how they end.

Options are read and refused, and help is printed, before PyTorch is imported: a command is, when it is run.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import reduce
from importlib import import_module
from io import StringIO, TextIOWrapper
from operator import or_
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

from reglue import __version__
from reglue.errors import Stopped, UserError, command_line, printable, refused_by_system
from reglue.extras import remedy
from reglue.training import stopping

DESCRIPTION = "Latent diffusion transformers that learn images together with their semantics."
DISTRIBUTED = "reglue.training.distributed"
QUIET, CONFIG, SAVE_CONFIG = "--quiet", "--config", "--save-config"
"""What every command takes: see `help.COMMON`."""
FIRST = {
    "demo": "the whole pipeline on handwritten digits, in minutes",
    "sample starter --out clothes": "images from the small model in this package",
    "prepare photos store": "your own images: first a store of their latents,",
    "train sit --store store --out run": "then a model (`reglue train --help` lists the recipes)",
}
"""What a newcomer needs: command line → what comes of it."""


@dataclass(frozen=True)
class Command:
    """A command: where its options and its function are, and its line in the overview."""

    options: str
    """MODULE:NAME of the dataclass of options."""
    description: str
    example: str
    """A command line that works, without `reglue`; {recipe} stands for the recipe's name."""
    heading: str = ""
    """What stands above it and those that follow."""

    def load(self) -> type:
        """The dataclass of options."""
        module, _, name = self.options.partition(":")
        return getattr(import_module(module), name)


COMMANDS = {
    "prepare": Command(
        "reglue.options.prepare:Prepare",
        "Encode images into a store of latents and features.",
        "prepare photos store --resolution 256 --features",
        heading="from images to a report, in this order",
    ),
    "compress": Command(
        "reglue.options.compress:Compress",
        "Fit a compressor to a store's features.",
        "compress store --kind conv --channels 16",
    ),
    "train": Command(
        "reglue.options.train:Train",
        "Train a recipe on a store, or resume a run.",
        "train {recipe} --model B/2 --store store --out run",
    ),
    "sample": Command(
        "reglue.options.sample:Sample",
        "Draw images from a run.",
        "sample run --out samples --count 50 --guidance-scale 2",
    ),
    "evaluate": Command(
        "reglue.options.evaluate:Evaluate",
        "Compare images with a reference: FID and other metrics.",
        "evaluate samples --reference store --out report.json",
    ),
    "edit": Command(
        "reglue.options.edit:Edit",
        "Edit images: keep, redraw, inpaint, recombine what a run sees in them.",
        "edit run photo.png --out edits --keep local --count 8",
        heading="images that are there",
    ),
    "prototypes": Command(
        "reglue.options.prototypes:MakePrototypes",
        "Find what the classes of masks look like in a store's codes, to paint with.",
        "prototypes store --masks masks --out prototypes",
    ),
    "autoencode": Command(
        "reglue.options.autoencode:Autoencode",
        "Train an autoencoder aligned with a vision encoder (ReaLS).",
        "autoencode photos autoencoder --from sd-vae-ft-mse",
        heading="autoencoders",
    ),
    "reencode": Command(
        "reglue.options.reencode:Reencode",
        "Encode a store's images into another latent space.",
        "reencode store other-store --autoencoder autoencoder",
    ),
    "probe": Command(
        "reglue.options.probe:Probe",
        "Measure what features, codes and latents reveal about classes or masks.",
        "probe store --out probe",
        heading="semantics in features and latents",
    ),
    "head": Command(
        "reglue.options.train_head:TrainHead",
        "Train a head for segmentation, class maps or depth on features.",
        "head store --masks masks --out head",
    ),
    "perceive": Command(
        "reglue.options.perceive:Perceive",
        "Apply heads to generated latents, beside the decoded images.",
        "perceive run --head head --out seen",
    ),
    "synthesise": Command(
        "reglue.options.synthesise:Synthesise",
        "Draw images with masks and boxes: a data set for others to learn from.",
        "synthesise run --head head --out dataset --count 1000 --format coco",
    ),
    "import": Command(
        "reglue.options.import_run:ImportRun",
        "Turn a published checkpoint into a run.",
        "import REGLUE-B-2.pt --out official",
        heading="published checkpoints",
    ),
    "export": Command(
        "reglue.options.export_run:ExportRun",
        "Write a run for the published code, or for other programs.",
        "export run --out weights.safetensors",
    ),
    "report": Command(
        "reglue.options.report:Report",
        "Write a page about a run, or several beside each other.",
        "report run other-run --out report.html",
        heading="what there is",
    ),
    "info": Command(
        "reglue.options.info:Info",
        "Say what a folder or file is, and show some of it.",
        "info store --out store.png",
    ),
    "list": Command(
        "reglue.options.list_runs:ListRuns",
        "List the runs, stores and autoencoders below a folder.",
        "list experiments --sort loss",
    ),
    "verify": Command(
        "reglue.options.verify:Verify",
        "Check all that the other commands write against its hashes.",
        "verify store",
    ),
    "studio": Command(
        "reglue.options.studio:Studio",
        "Draw, edit, see and watch in the browser.",
        "studio starter",
    ),
    "demo": Command(
        "reglue.options.demo:Demo",
        "Train, sample and evaluate on handwritten digits, in minutes.",
        "demo --out demo-output",
        heading="and",
    ),
}


def main() -> None:
    """Run a command, say what it has written, and exit.

    | exit code | |
    |---|---|
    | 0 | done |
    | 1 | a defect, with a traceback |
    | 2 | a mistake that the user can fix, in one line |
    | 130, 143 | ended by Ctrl-C (SIGINT), by SIGTERM, with or without a checkpoint |
    | 141 | whoever read the output has gone: `| head` |
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # Names of files may hold what no terminal can show.
    try:
        with command_line():
            arguments = [word for word in sys.argv[1:] if word != QUIET]  # Every command takes it.
            options = parse(arguments)
            command = function_of(type(options))  # imports PyTorch
            from reglue.progress import quiet, stage

            stopping.answers(tell)
            with stopping.at_work(), stage(arguments[0]), quiet() if QUIET in sys.argv else nullcontext():
                with saving(options, arguments):
                    command(options)
                say_what_follows(options)
    except SystemExit:
        raise
    except BaseException as error:
        end(error)


def tell() -> None:
    """Write what this process is doing, whoever has asked."""
    from reglue.machine import memory_told
    from reglue.progress import Bar, state

    # In one piece: the process may end at any moment.
    Bar.write(f"reglue: {printable(state())}, {memory_told()}\n", file=sys.stderr, end="")


@contextmanager
def saving(options: Any, arguments: list[str]) -> Iterator[None]:
    """Write the options to the file of `--save-config`, if there is one, by one process for all.

    That is done before the command in the block, or, in the folder that the command makes and wants empty, when it has
    ended or was stopped. Raises UserError if the file is a folder, or where the output goes.
    """
    name, *rest = arguments
    given, _ = taken(SAVE_CONFIG, rest)
    if not given:
        yield
        return
    from reglue import config_files
    from reglue.training import distributed

    def save() -> None:
        if distributed.is_first():
            words, _, default = begin(name, rest, use_file=False)
            config_files.save(file, words, options, default)

    file, out = Path(given), getattr(options, "out", None)
    if file.is_dir() or (out and out.resolve().is_relative_to(file.resolve())):
        raise UserError(f"{SAVE_CONFIG} {file}: a folder or the output is there; choose another file, say {name}.yaml")
    later = out and file.resolve().is_relative_to(out.resolve())
    if not later:
        save()
    try:
        yield
    except Stopped:
        if later:
            save()
        raise
    if later:
        save()


def say_what_follows(options: Any) -> None:
    """Print what the command has written and what may come next, once for all processes, which part."""
    from reglue.progress import is_quiet
    from reglue.training import distributed

    if distributed.is_first() and options.written and not is_quiet():
        print(options.written)
    sys.stdout.flush()
    distributed.leave()


def end(error: BaseException) -> NoReturn:
    """End with the line and the exit code of an error, or with its traceback if it is a defect."""
    if stopping.interrupted() and not isinstance(error, UserError | Stopped):
        fail(stopping.line(), stopping.exit_code())
    match error:
        case Stopped():
            fail(str(error), stopping.exit_code())
        case KeyboardInterrupt():
            fail(stopping.line(), 128 + signal.SIGINT)
        case UserError():
            fail(str(error))
        case BrokenPipeError():
            leave(128 + signal.SIGPIPE)
        case ModuleNotFoundError() if needed := remedy(error.name or ""):
            fail(f"this needs {needed}")
        case OSError():
            fail(refused_by_system(error))
    if not _among_others():
        raise error
    traceback.print_exception(error)
    leave(1)


def fail(message: str, code: int = 2) -> NoReturn:
    """Print one line and exit."""
    with suppress(BrokenPipeError):
        print(f"reglue: {printable(message)}", file=sys.stderr, flush=True)
    leave(code)


def leave(code: int) -> NoReturn:
    """Exit, and wait for nobody where others wait for this process or the user for its end."""
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    if code in (1, 2):
        if _among_others():
            sys.modules[DISTRIBUTED].end(code)
        sys.exit(code)
    if "multiprocessing" in sys.modules:
        for process in sys.modules["multiprocessing"].active_children():
            process.kill()
    os._exit(code)


def _among_others() -> bool:
    """Whether this process has joined others; without PyTorch, which may not be imported yet, it has not."""
    return DISTRIBUTED in sys.modules and sys.modules[DISTRIBUTED].are_many()


def execute(options: Any) -> Any:
    """Run the command that takes these options. Returns what its function returns."""
    return function_of(type(options))(options)


def function_of(options: type) -> Callable[[Any], Any]:
    """The function that takes these options: `options.NAME` declares what `commands.NAME` does, in a function NAME."""
    name = options.__module__.rpartition(".")[2]
    return getattr(import_module(f"reglue.commands.{name}"), name)


def parse(arguments: list[str]) -> Any:
    """The options of the command that the arguments name.

    Prints what is asked for and exits with code 0 (`--help`, `--version`). Raises UserError for an unknown command or
    recipe, and for options that do not fit.
    """
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        show(overview())
    if name == "--version":
        show(f"reglue {__version__}")
    if name.startswith("--tyro"):
        return completions(arguments)
    words, rest, default = begin(name, rest)
    command = COMMANDS[name]
    if asks_for_help(rest):
        from reglue.help import command_help

        show(command_help(words, command.load(), command.example.replace("{recipe}", words[-1]), default))
    try:
        with redirect_stderr(StringIO()):  # tyro explains itself in boxes.
            return tyro.cli(command.load(), prog=" ".join(["reglue", *words]), args=rest, default=default)
    except SystemExit:
        from reglue.help import COMMON, declared
        from reglue.mistakes import mistake

        raise UserError(mistake(words, [*declared(command.load(), default), *COMMON], rest)) from None


def begin(name: str, rest: list[str], use_file: bool = True) -> tuple[list[str], list[str], Any]:
    """What is known of a command before tyro reads the rest of its arguments.

    Its name, for `train` with the recipe's; what tyro is to read; and the options as they are without that, with those
    of the file of `--config` if it is to be used.
    """
    from reglue.config_files import read, unchecked, with_values
    from reglue.help import RECIPE, declared

    options = COMMANDS[known(name, COMMANDS, "command")].load()
    file, rest = taken(CONFIG, rest)
    _, rest = taken(SAVE_CONFIG, rest)
    trains = name == "train"
    values = read(Path(file), [*declared(options), *([RECIPE] if trains else [])]) if file else {}
    words, begun_with = [name], {}
    if trains:
        from reglue.papers import PAPERS

        recipe, *rest = rest if rest and not rest[0].startswith("-") else [values.get(RECIPE.name, ""), *rest]
        if not recipe and asks_for_help(rest):
            show(recipes({recipe: paper.title for recipe, paper in PAPERS.items()}))
        start, out = (taken(f"--{name}", rest)[0] or str(values.get(name, "")) for name in ("from", "out"))
        if not recipe and start:
            from reglue.run import FILE, RunRecord, find_run  # imports PyTorch

            resumed = (Path(out) / FILE).is_file()  # Then the other run may be gone.
            begun_with = {"recipe": RunRecord.read(Path(out) if resumed else find_run(start)).recipe}
        else:
            words.append(known(recipe, PAPERS, "recipe"))
            begun_with = {"recipe": PAPERS[recipe].recipe}
    default = unchecked(options, begun_with)
    return words, rest, with_values(default, values) if use_file else default


def asks_for_help(arguments: list[str]) -> bool:
    """Whether a command is asked about itself."""
    return not {"-h", "--help"}.isdisjoint(arguments)


def taken(flag: str, arguments: list[str]) -> tuple[str, list[str]]:
    """The value of an option before tyro reads it, nothing if it is not there; and the other arguments."""
    value, others, words = "", list[str](), iter(arguments)
    for word in words:
        name, equals, joined = word.partition("=")
        if name.replace("_", "-") != flag:
            others.append(word)
        elif not (value := joined if equals else next(words, "")):
            raise UserError(f"{flag}: give a path")
    return value, others


def known(name: str, names: Iterable[str], what: str) -> str:
    """The name, if it is one of the names. Raises UserError with the closest one otherwise."""
    if name not in names:
        problem = f"unknown {what} {name}" if name else f"no {what} given"
        close = "".join(f" did you mean {near}?" for near in get_close_matches(name, names, 1))
        raise UserError(f"{problem};{close} choose from {', '.join(names)}")
    return name


def show(text: str) -> NoReturn:
    """Print what was asked for and exit."""
    print(text.rstrip(), flush=True)
    sys.exit()


def overview() -> str:
    """The help of `reglue` itself."""
    lines = ["usage: reglue COMMAND [options]", "", DESCRIPTION, "", "start here:"]
    lines += [f"  reglue {line:<36}{what}" for line, what in FIRST.items()]
    for name, command in COMMANDS.items():
        lines += ["", f"{command.heading}:"] if command.heading else []
        lines.append(f"  {name:<13}{command.description}")
    lines += [
        *("", "`reglue COMMAND --help` lists a command's options, `reglue --version` the version."),
        f"Every command takes {QUIET}: no progress, but warnings and results alone.",
        f"{SAVE_CONFIG} FILE.yaml keeps a command's options in a file, and {CONFIG} FILE.yaml takes them from there.",
    ]
    return "\n".join(lines)


def recipes(titles: dict[str, str]) -> str:
    """The help of `reglue train` without a recipe."""
    width = max(map(len, titles)) + 2
    lines = [f"  {name:<{width}}{title}" for name, title in titles.items()]
    example = COMMANDS["train"].example.replace("{recipe}", "reglue")
    return "\n".join(
        [
            "usage: reglue train RECIPE --store PATH --out PATH [options]",
            *["", "recipes:", *lines, "", "example:", f"  reglue {example}", ""],
            "`reglue train RECIPE --help` lists the options, with the recipe's values as defaults. Instead of RECIPE,",
            "`--from RUN` alone takes the recipe of a run that is trained already.",
        ]
    )


def completions(arguments: list[str]) -> Any:
    """Print or write the completions for a shell, which are of every option of every command, and exit."""
    kinds: list[Any] = [
        Annotated[command.load(), tyro.conf.subcommand(name, description=command.description)]
        for name, command in COMMANDS.items()
    ]
    return tyro.cli(reduce(or_, kinds), prog="reglue", args=arguments, config=(tyro.conf.ConsolidateSubcommandArgs,))
