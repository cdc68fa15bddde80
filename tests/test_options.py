"""Values of options: what cannot be is refused before anything is done, in a line that names the option."""

from __future__ import annotations

import ast
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import mistake
from reglue import cli
from reglue.cli import parse
from reglue.commands.autoencode import Autoencode
from reglue.commands.compress import Compress
from reglue.commands.prepare import Prepare
from reglue.commands.sample import Sample
from reglue.commands.train_head import TrainHead, train_head
from reglue.config import Alignment, OptimiserConfig
from reglue.diffusion.conditions import CONDITIONS, ClassLabel
from reglue.diffusion.guidance import GUIDERS
from reglue.errors import UserError, command_line, option, require
from reglue.help import Option, declared
from reglue.sampling import Sampling

TRAIN = ("train", "reglue", "--store=s", "--out=r")
JOBS = {
    "train": TRAIN,
    "sample": ("sample", "run", "--out=o"),
    "evaluate": ("evaluate", "images"),
    "head": ("head", "store", "--out=o"),
    "probe": ("probe", "store", "--out=o"),
    "compress": ("compress", "store"),
    "autoencode": ("autoencode", "images", "out"),
    "prepare": ("prepare", "images", "out"),
    "demo": ("demo",),
    "reencode": ("reencode", "store", "other", "--autoencoder=a"),
    "perceive": ("perceive", "run", "--head=h", "--out=o"),
    "edit": ("edit", "run", "image.png", "--keep=local", "--out=o"),
    "synthesise": ("synthesise", "run", "--head=h", "--out=o"),
    "prototypes": ("prototypes", "store", "--masks=m", "--out=o"),
    "import": ("import", "file", "--out=o"),
    "export": ("export", "run", "--out=o.pt"),
    "report": ("report", "run"),
    "info": ("info", "run"),
    "list": ("list",),
    "studio": ("studio",),
}


@dataclass(frozen=True)
class Holder:
    some_number: float | tuple[float, ...] | dict[str, float] | None


@given(
    numbers=st.lists(st.floats() | st.integers(-5, 5), max_size=3),
    bounds=st.dictionaries(st.sampled_from(["at_least", "more_than", "at_most", "less_than"]), st.integers(-3, 3)),
)
def test_all_numbers_must_be_finite_and_in_bounds(numbers: list[float], bounds: dict[str, Any]) -> None:
    def fits(number: float) -> bool:
        return math.isfinite(number) and not (
            ("at_least" in bounds and number < bounds["at_least"])
            or ("more_than" in bounds and number <= bounds["more_than"])
            or ("at_most" in bounds and number > bounds["at_most"])
            or ("less_than" in bounds and number >= bounds["less_than"])
        )

    require(Holder(None), "some_number", **bounds)
    if all(map(fits, numbers)):
        require(Holder(dict(zip("abc", numbers, strict=False))), "some_number", **bounds)
    for value in (tuple(numbers), *numbers):
        if all(map(fits, value if isinstance(value, tuple) else (value,))):
            require(Holder(value), "some_number", **bounds)
        else:
            with pytest.raises(UserError, match=r"^some_number .*: choose "):
                require(Holder(value), "some_number", **bounds)


def test_the_message_says_what_was_given_and_what_to_choose() -> None:
    with pytest.raises(UserError, match=r"^part\.some_number 0\.5 1\.5: choose at least 0 and less than 1$"):
        require(Holder((0.5, 1.5)), "some_number", prefix="part.", at_least=0, less_than=1)
    with pytest.raises(UserError, match=r"^some_number nan: choose a finite number$"):
        require(Holder(math.nan), "some_number")
    with pytest.raises(UserError, match=r"^some_number inf: choose a finite number, at least 0$"):
        require(Holder(math.inf), "some_number", at_least=0)
    with pytest.raises(UserError, match=r"^some_number a 1 b -1: choose at least 0$"):
        require(Holder({"a": 1, "b": -1}), "some_number", at_least=0)


@pytest.mark.parametrize(
    ("job", "option", "value"),
    [
        ("train", "--keep", "-1"),
        ("train", "--seed", "-1"),
        ("train", "--log-every", "0"),
        ("train", "--checkpoint-every", "0"),
        ("train", "--preview-every", "-1"),
        ("train", "--preview-count", "0"),
        ("train", "--preview-steps", "0"),
        ("train", "--workers", "-1"),
        ("train", "--optimisation.steps", "0"),
        ("train", "--optimisation.clip", "-1.0"),
        ("train", "--optimisation.betas", "1.5 0.9"),
        ("train", "--optimisation.warmup", "-5"),
        ("train", "--optimisation.weight-decay", "-0.1"),
        ("train", "--optimisation.learning-rate", "nan"),
        ("train", "--optimisation.ema", "1.0"),
        ("train", "--optimisation.label-dropout", "1.0"),
        ("train", "--optimisation.checkpoint-blocks", "1.5"),
        ("train", "--latent.weight", "-1.0"),
        ("train", "--local.weight", "-1.0"),
        ("train", "--local.dropout", "1.5"),
        ("train", "--class-token.weight", "inf"),
        ("train", "--alignment.after-block", "-1"),
        ("train", "--alignment.after-block", "0"),
        ("train", "--alignment.hidden", "0"),
        ("train", "--sampling.steps", "0"),
        ("train", "--sampling.guided-channels", "0"),
        ("train", "--sampling.guidance-interval", "0.9 0.1"),
        ("sample", "--seed", "-1"),
        ("sample", "--count", "0"),
        ("sample", "--batch-size", "0"),
        ("evaluate", "--seed", "-1"),
        ("evaluate", "--resolution", "0"),
        ("evaluate", "--kernel-subset-size", "1"),
        ("head", "--images", "-5"),
        ("head", "--images", "3"),
        ("head", "--learning-rate", "0.0"),
        ("probe", "--learning-rate", "0.0"),
        ("compress", "--learning-rate", "-1.0"),
        ("compress", "--kl-weight", "inf"),
        ("autoencode", "--optimisation.clip", "-1.0"),
        ("autoencode", "--keep", "-1"),
        ("autoencode", "--resolution", "0"),
        ("autoencode", "--kl.weight", "-1.0"),
        ("autoencode", "--alignment.class-weight", "-1.0"),
        ("autoencode", "--adversary.layers", "0"),
        ("autoencode", "--architecture.widths", "0 8"),
        ("prepare", "--resolution", "0"),
        ("prepare", "--share", "1.5"),
        ("demo", "--samples-per-class", "0"),
        ("studio", "--port", "0"),
        ("studio", "--port", "65536"),
    ],
)
def test_a_value_that_cannot_be_is_refused(job: str, option: str, value: str) -> None:
    with command_line(), pytest.raises(UserError) as raised:
        parse([*JOBS[job], option, *value.split()])
    told = str(raised.value)
    # Sampling is asked for by `train`, `sample` and in Python, so its messages have no prefix.
    assert told.startswith(f"{option.replace('--sampling.', '--')} {value}: choose ")
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("in_python", "on_command_line", "told", "told_on_command_line"),
    [
        (
            lambda: OptimiserConfig(learning_rate=0.0),
            ("--optimisation.learning-rate", "0.0"),
            "optimisation.learning_rate 0.0: choose more than 0",
            "--optimisation.learning-rate 0.0: choose more than 0",
        ),
        (
            lambda: Alignment(compressor="a_b", targets="online"),
            ("--alignment.compressor", "a_b", "--alignment.targets", "online"),
            "alignment.compressor a_b is for alignment.targets decoded alone; leave it out",
            "--alignment.compressor a_b is for --alignment.targets decoded alone; leave it out",
        ),
        (
            lambda: Sampling(guidance_interval=(0.9, 0.1)),
            ("--sampling.guidance-interval", "0.9", "0.1"),
            "guidance_interval 0.9 0.1: choose 0 ≤ lowest ≤ highest ≤ 1",
            "--guidance-interval 0.9 0.1: choose 0 ≤ lowest ≤ highest ≤ 1",
        ),
    ],
)
def test_a_message_spells_options_as_whoever_made_the_mistake_does(
    in_python: Callable[[], object], on_command_line: tuple[str, ...], told: str, told_on_command_line: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert mistake(capsys, monkeypatch, *TRAIN, *on_command_line) == f"reglue: {told_on_command_line}"
    with pytest.raises(UserError) as raised:  # afterwards: the command line has left nothing behind
        in_python()
    assert str(raised.value) == told


def test_options_are_spelt_in_threads_as_outside_and_may_have_another_name_on_the_command_line() -> None:
    def seen() -> list[str]:
        with ThreadPoolExecutor(1) as thread:
            return [thread.submit(option, *names).result() for names in (("a.b_c",), ("start_step", "from-step"))]

    assert seen() == ["a.b_c", "start_step"]
    with command_line():
        with command_line():
            assert seen() == ["--a.b-c", "--from-step"]
        assert seen() == ["--a.b-c", "--from-step"]
    assert seen() == ["a.b_c", "start_step"]


BOUNDLESS = {"layers", "guiders"}
"""Options whose numbers need not be above 0: layers are known once the encoder is, and guiders by whoever made them."""


def numbers_of(kind: Any) -> set[type]:
    """int and float, as far as an option's type has them."""
    if get_origin(kind) is Literal:
        return set()
    return {kind} & {int, float} | {number for part in get_args(kind) for number in numbers_of(part)}


def numeric_options() -> Iterator[tuple[str, Option]]:
    for job, command in cli.COMMANDS.items():
        yield from ((job, option) for option in declared(command.load()) if numbers_of(option.type))


def words_around(option: Option, value: str) -> list[str]:
    """What is typed to give an option a value, for one number of several where it takes more."""
    if option.name.endswith("schedule"):
        return ["5", value]
    if (last := option.name.rpartition(".")[2]) in NAMES:
        return [NAMES[last], value]
    pairs = {"betas": 2, "guidance-interval": 2, "position-grid": 2, "box": 4, "at": 2}
    return [value] * pairs.get(option.name.rpartition(".")[2], 1)


NAMES = {
    "conditions": "mine",
    "guiders": "mine",
    "other-scales": "latent",
    "auto-scales": "latent",
    "times-options": "delta",
}
"""Options of names and numbers, and a name that each knows."""
NEEDED = {"from-step": ["--from=other"], "times-options": ["--times=lead"]}
"""What an option needs beside it."""


def test_every_number_of_every_command_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """None takes NaN, infinity or what is below 0 (all of them that this version has, and those to come)."""
    monkeypatch.setitem(CONDITIONS, "mine", ClassLabel())
    monkeypatch.setitem(GUIDERS, "mine", lambda guidance, model: None)
    accepted, seen = [], 0
    with command_line():
        for job, numeric in numeric_options():
            wrong = ["nan", "inf"] if float in numbers_of(numeric.type) else []
            wrong += ["-1"] if numeric.name.rpartition(".")[2] not in BOUNDLESS else []
            for value in wrong:
                flag, seen = numeric.flags[0], seen + 1
                more = NEEDED.get(numeric.name, [])
                try:
                    parse([*JOBS[job], *more, flag, *words_around(numeric, value)])
                    accepted.append(f"{job} {flag} {value}: taken")
                except UserError as error:
                    if not str(error).startswith(flag.replace("--sampling.", "--")) or value not in str(error):
                        accepted.append(f"{job} {flag} {value}: {error}")
    assert not accepted, "\n".join(accepted)
    assert seen > 150


# machine.py has options of git.
SPELT_BY_THE_COMMAND_LINE = ("commands", "options", "cli.py", "help.py", "papers.py", "machine.py")


def messages(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every string that is neither a docstring nor has a whole command (`reglue …`) in it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue
        text = ast.unparse(child) if isinstance(child, ast.JoinedStr) else getattr(child, "value", None)
        if not isinstance(text, str):
            yield from messages(child)
        elif "reglue " not in text:
            yield child.lineno, text  # type: ignore[reportAttributeAccessIssue]


def test_only_commands_spell_options_as_the_command_line_does() -> None:
    package = Path(cli.__file__).parent
    found = [
        f"{file.relative_to(package.parent)}:{line}: {text}"
        for file in sorted(package.rglob("*.py"))
        if file.relative_to(package).parts[0] not in SPELT_BY_THE_COMMAND_LINE
        for line, text in messages(ast.parse(file.read_text()))
        if re.search("--[a-z]", text)
    ]
    assert not found, "spell these by `errors.option`:\n" + "\n".join(found)


def test_values_given_in_python_become_those_of_the_command_line() -> None:
    prepared: dict[str, Any] = {"resolution": [32, 64], "layers": [1, 2], "device": "cpu"}
    assert Prepare("images", "out", **prepared) == parse(  # type: ignore[reportArgumentType]
        ["prepare", "images", "out", "--resolution", "32", "64", "--layers", "1", "2", "--device", "cpu"]
    )
    assert Compress(Path("s"), layers=[5]).layers == (5,)  # type: ignore[reportArgumentType]
    assert Compress(Path("s"), layers="last").layers == "last"
    assert Sample(Path("r"), Path("o"), classes=["church"]).classes == ("church",)  # type: ignore[reportArgumentType]
    assert Sample(Path("r"), Path("o"), guided_channels=3).guided_channels == 3
    assert Sample(Path("r"), Path("o"), precision=None).precision is None
    files: Any = ["a.safetensors", Path("b")]
    assert Autoencode(Path("i"), Path("o"), measure_lpips=files).measure_lpips == (Path("a.safetensors"), Path("b"))
    assert Autoencode(Path("i"), Path("o"), validation="others").validation == Path("others")  # type: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("options", "field", "value", "choose"),
    [
        (Sample, "labels", "foo", "'balanced' or 'random'"),
        (Sample, "labels", None, "'balanced' or 'random'"),
        (Sample, "classes", "church", "a list"),
        (Sample, "guided_channels", "some", "'all' or a number"),
        (Sample, "state_precision", "bfloat16", "'float32' or 'float64'"),
        (Prepare, "dtype", "bfloat16", "'float32' or 'float16'"),
        (Prepare, "dtype", torch.float16, "'float32' or 'float16'"),
        (Prepare, "resolution", "256", "a number or a list"),
        (Compress, "kind", "foo", "'conv' or 'pca' or 'mlp'"),
        (Compress, "layers", "first", "'last' or a list"),
    ],
)
def test_what_is_no_choice_is_refused_in_python(options: Any, field: str, value: Any, choose: str) -> None:
    places = {part.name: part.name for part in fields(options) if part.default is part.default_factory is MISSING}
    with pytest.raises(UserError) as raised:
        options(**{**places, field: value})
    assert str(raised.value) == f"{options.__name__}({field}={value!r}): give {choose}"


def test_types_of_options_are_not_looked_up_on_import() -> None:
    program = (
        "from reglue.cli import COMMANDS; import reglue.files; [command.load() for command in COMMANDS.values()];"
        "print(reglue.files._kinds.cache_info().misses)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "0"


def test_schedules_hold_weights(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    told = mistake(capsys, monkeypatch, *TRAIN, "--local.schedule", "5", "-0.5")
    assert told == "reglue: --local.schedule -0.5: choose weights of at least 0"
    told = mistake(capsys, monkeypatch, *TRAIN, "--local.schedule", "-5", "0.5")
    assert told == "reglue: --local.schedule -5: choose steps of at least 0"
    for again in ("3", "5"):
        told = mistake(capsys, monkeypatch, *TRAIN, "--local.schedule", "5", "0.5", again, "1")
        assert told == f"reglue: --local.schedule 5 0.5 {again} 1.0: give the steps in ascending order, each once"


def test_a_head_looks_at_its_folder_before_its_training(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files \(notes.txt\); choose a new or an empty folder$"):
        train_head(TrainHead(Path("no-store"), tmp_path, device="cpu"))
