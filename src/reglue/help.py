"""What `reglue COMMAND --help` prints: the options of a command in groups, from the dataclass that declares them."""

from __future__ import annotations

import inspect
import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from shutil import get_terminal_size
from textwrap import wrap
from types import NoneType
from typing import Annotated, Any, Literal, cast, get_args, get_origin, get_type_hints

import tyro
from tyro.conf import Positional

from reglue.overrides import field_docstrings

GROUPS = {
    "data": """images store file folder reference protocol masks depth validation validation-masks labels no-labels
        class-level class-names image-column label-column configuration split streaming resolution flips share
        per-class strict statistics-images validation-images held-out selection columns looks prototypes.seed
        prepare.seed prepare.count evaluate.count probe.images head.images perceive.images runs info.path""",
    "model": """run model backbone blocks path prediction times conditions learn-sigma position-grid latent local
        class-token alignment variance cosine architecture autoencoder encoder layers final-norm kind column channels
        hidden conv head from from-step from-weights step weights fitted compressor statistics heads family
        times-options one-mean student""",
    "optimisation": """optimisation perceptual kl adversary kl-weight epochs cosine-epochs patience micro-batch
        learning-rate final-learning-rate seed steps batch-size compare few-steps""",
    "editing": """edit.keep until mask feather strength local-from cls-from features-from paste box at mirror scale
        paint edit.prototypes edit.head edit.by loss-scale flow-edit source-class resample studio.prototypes""",
    "sampling": """sampling count classes sampler time-shift diffusion guidance-scale local-scale cls-scale
        guidance-interval other-scales representation-scale auto-scale auto-scales unconditional weaker-run
        guided-channels guiders state-precision relative-tolerance absolute-tolerance rounding tile samples-per-class
        sample.steps sample.seed sample.labels edit.steps edit.seed edit.labels perceive.steps perceive.seed
        perceive.labels synthesise.steps synthesise.seed synthesise.labels report.steps report.seed""",
    "metrics": """feature-network resamples kernel-subsets kernel-subset-size measure-lpips measure-inception
        flat-limit evaluate.features evaluate.seed""",
    "output": """out to batch name format agreement objects features features-dtype dtype shard-size log-every
        evaluate-every checkpoint-every keep preview-every preview-count preview-steps track list.sort""",
    "machine": """device workers precision compile deterministic shards prepare.batch-size reencode.batch-size
        sample.batch-size edit.batch-size evaluate.batch-size perceive.batch-size synthesise.batch-size
        report.batch-size host port password browser""",
}
"""Title of a group → options, or the part before their dot; COMMAND.OPTION where commands mean different things."""
_TITLES = {name: title for title, names in GROUPS.items() for name in names.split()}
_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}


@dataclass(frozen=True)
class Option:
    """One option, as its dataclass declares it."""

    name: str
    """As it is typed, without the dashes in front."""
    type: Any
    default: Any
    """MISSING where it must be given."""
    explanation: str
    positional: bool
    path: tuple[str, ...] = ()
    """The names of the fields that lead to it."""

    @property
    def required(self) -> bool:
        """Whether the command does nothing without it."""
        return self.default is MISSING or self.default is tyro.MISSING

    @property
    def flags(self) -> tuple[str, ...]:
        """What is typed: `--flips`; with its opposite where it is on by default."""
        if self.positional:
            return (self.name.upper(),)
        before, dot, last = self.name.rpartition(".")
        return (f"--{self.name}", f"--{before}{dot}no-{last}") if self.default is True else (f"--{self.name}",)

    @property
    def metavar(self) -> str:
        """Its values; `None` is one of them only where it changes the default."""
        return _metavar(self.type, optional=self.default is not None)

    @property
    def help(self) -> str:
        """The explanation, and the default where there is one to show."""
        if self.required:
            return self.explanation if self.positional else f"{self.explanation} (required)"
        if self.default is False or self.default in (None, (), {}):
            return self.explanation
        shown = "on" if self.default is True else " ".join(map(str, _flat(self.default)))
        return f"{self.explanation} (default: {shown})".strip()

    def title(self, command: str) -> str:
        """The group that it stands in. Raises KeyError where `GROUPS` does not say."""
        own = f"{command}.{self.name}"
        return _TITLES[own if own in _TITLES else self.name.partition(".")[0]]


COMMON = (
    Option("quiet", bool, False, "shows no progress, but warnings and results alone", positional=False),
    Option("config", Path, None, "takes options from a YAML file, where the command line has none", positional=False),
    Option("save-config", Path, None, "writes such a file, which repeats the command", positional=False),
)
"""What every command takes; the command line itself reads them."""
RECIPE = Option("recipe", str, MISSING, "Recipe to begin with.", positional=True)
"""What `train` takes before tyro reads the rest."""


def command_help(command: list[str], options: type, example: str, default: Any = MISSING) -> str:
    """The help of a command: usage, what it does, its options in groups, an example.

    `command` is its name, for `train` with the recipe's; `default` is an instance of `options` with defaults to show.
    """
    found = list(declared(options, default))
    words = [option.name.upper() for option in found if option.positional]
    words += [f"{option.flags[0]} {option.metavar}" for option in found if option.required and not option.positional]
    width = min(get_terminal_size().columns, 120)
    paragraphs = (inspect.getdoc(options) or "").split("\n\n")
    paragraphs.append(" ".join(f"{option.flags[0]} {option.explanation}." for option in COMMON))
    lines = [line for paragraph in paragraphs for line in (*wrap(paragraph, width), "")]
    parser = ArgumentParser(
        usage=" ".join(["reglue", *command, *words, "[options]"]),
        description="\n".join(lines),
        epilog=f"example:\n  reglue {example}",
        formatter_class=partial(_Formatter, max_help_position=30, width=width),
        add_help=False,
    )
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    for option in found:
        values: dict[str, Any] = {"action": "store_true"} if option.type is bool else {"metavar": option.metavar}
        if option.positional:
            values = {}
        title, explanation = option.title(command[0]), option.help.replace("%", "%%")
        groups[title].add_argument(*option.flags, help=explanation, **values)
    return parser.format_help()


class _Formatter(RawDescriptionHelpFormatter):
    """Keeps names of options on one line."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrap(text, width, break_on_hyphens=False)


def declared(options: type, default: Any = MISSING, prefix: str = "", above: tuple[str, ...] = ()) -> Iterator[Option]:
    """Every option of a dataclass and of the dataclasses in it, as they are declared.

    `prefix` is of their names, and `above` the fields that lead to the dataclass.
    """
    types, explanations = get_type_hints(options, include_extras=True), _explanations(options)
    for field in fields(options):
        annotated = get_origin(types[field.name]) is Annotated
        kind, *marks = get_args(types[field.name]) if annotated else [types[field.name]]
        given = [mark.name for mark in marks if getattr(mark, "name", None) is not None]
        name, path = prefix + (given[0] if given else field.name).replace("_", "-"), (*above, field.name)
        if default is not MISSING:
            value = getattr(default, field.name)
        else:
            value = field.default if field.default_factory is MISSING else field.default_factory()
        if any(map(is_dataclass, get_args(kind))):
            continue  # values of Python alone, such as modalities of one's own
        if is_dataclass(kind):
            yield from declared(cast(type, kind), value, f"{name}." if name else "", path)
        else:
            yield Option(name, kind, value, explanations.get(field.name, ""), Positional in marks, path)


@cache
def _explanations(options: type) -> dict[str, str]:
    """What is said of each field of a dataclass, inherited ones included."""
    found: dict[str, str] = {}
    for kind in [kind for kind in reversed(options.__mro__) if is_dataclass(kind)]:
        made = dict(re.findall(r"^    (\w+): (.+)$", (kind.__doc__ or "").partition("Args:\n")[2], re.MULTILINE))
        said = made or field_docstrings(cast(type, kind))
        found |= {name: text for name, text in said.items() if text}
    return found


def _metavar(kind: Any, optional: bool = False) -> str:
    """The values of a type: `INT`, `INT INT`, `{a,b}`."""
    parts: tuple[Any, ...] = get_args(kind)
    if get_origin(kind) is Literal:
        choices = ",".join(map(str, parts))
        return f"{{{choices}}}" if len(parts) > 1 else choices
    if get_origin(kind) is tuple:
        items = " ".join(_metavar(part) for part in parts if part is not ...)
        return f"{items} ..." if ... in parts else items
    if get_origin(kind) is Mapping:
        return f"{_metavar(parts[0])} {_metavar(parts[1])} ..."
    if parts:  # a union
        return " | ".join(_metavar(part) for part in parts if part is not NoneType) + " | None" * (
            optional and NoneType in parts
        )
    return _METAVARS[kind]


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for item in value:
            yield from _flat(item)
    else:
        yield value
