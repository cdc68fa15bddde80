"""Values of options: what cannot be is refused before anything is done, in a line that names the option."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import mistake
from reglue.cli import parse
from reglue.commands.autoencode import Autoencode
from reglue.commands.compress import Compress
from reglue.commands.prepare import Prepare
from reglue.commands.sample import Sample
from reglue.commands.train_head import TrainHead, train_head
from reglue.errors import UserError, require

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
}


@dataclass(frozen=True)
class Holder:
    some_number: float | tuple[float, ...] | None


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
    for value in (tuple(numbers), *numbers):
        if all(map(fits, value if isinstance(value, tuple) else (value,))):
            require(Holder(value), "some_number", **bounds)
        else:
            with pytest.raises(UserError, match=r"^--some-number .*: choose "):
                require(Holder(value), "some_number", **bounds)


def test_the_message_says_what_was_given_and_what_to_choose() -> None:
    with pytest.raises(UserError, match=r"^--part\.some-number 0\.5 1\.5: choose at least 0 and less than 1$"):
        require(Holder((0.5, 1.5)), "some_number", prefix="--part.", at_least=0, less_than=1)
    with pytest.raises(UserError, match=r"^--some-number nan: choose a finite number$"):
        require(Holder(math.nan), "some_number")


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
    ],
)
def test_a_value_that_cannot_be_is_refused(job: str, option: str, value: str) -> None:
    with pytest.raises(UserError) as raised:
        parse([*JOBS[job], option, *value.split()])
    told = str(raised.value)
    # Sampling is asked for by `train`, `sample` and in Python, so its messages have no dashes and no prefix.
    assert told.startswith(f"{option.removeprefix('--sampling.')} {value}: choose ")
    assert len(told.splitlines()) == 1


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


def test_a_head_looks_at_its_folder_before_its_training(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files; choose a new or an empty folder for --out"):
        train_head(TrainHead(Path("no-store"), tmp_path, device="cpu"))
