"""`fit` on a toy task: what happens when, and that it does not matter where a training is cut."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from reglue.config import EmaWarmup, OptimiserConfig
from reglue.errors import Stopped, UserError
from reglue.papers import RECIPES
from reglue.training import checkpoints, stopping
from reglue.training.loop import Means, Task, adamw, fit, learning_rate, part_size
from reglue.training.tracking import TRACKERS, JsonLines, read

CONFIG = OptimiserConfig(
    steps=7, batch_size=4, accumulate=2, learning_rate=0.1, warmup=2, decay="cosine", ema=0.5, clip=1.0
)


class KilledError(Exception):
    pass


class Line(Task[Tensor]):
    """A line through points of which position decides everything, with dropout of weights by a buffer."""

    name, remedy = "line", "use a ruler"

    def __init__(self, optimisation: OptimiserConfig = CONFIG, killed_at: int | None = None) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        ema = {name: value.clone() for name, value in model[0].state_dict().items()}
        part = part_size(optimisation, 1)
        optimiser = adamw(model.parameters(), optimisation)
        super().__init__(optimisation, torch.device("cpu"), part, model, optimiser, model[0], ema)
        self.killed_at = killed_at
        self.events: list[tuple[str, int]] = []

    def read(self, positions: range) -> Tensor:
        points = torch.tensor([*positions], dtype=torch.float32)
        return torch.stack([points.sin(), points.cos()], dim=1)

    def backward(self, batch: Tensor, step: int, last_part: bool) -> dict[str, Tensor]:
        if step == self.killed_at:
            raise KilledError
        loss = (self.model(batch).flatten() - batch.sum(1)).square().mean()
        (loss / self.optimisation.accumulate).backward()
        return {"loss": loss, **({"late": loss} if step >= 3 else {})}

    def check(self, step: int, saved: int | None) -> None:
        self.events.append(("check", step))

    def evaluate(self, step: int) -> dict[str, Any]:
        self.events.append(("evaluate", step))
        return {"validation": {"bias": float(self.ema["bias"].sum())}}

    def preview(self, step: int) -> Image.Image:
        self.events.append(("preview", step))
        return Image.new("L", (1, 1), step)


def train(task: Task[Any], run: Path, **changed: Any) -> Path:
    how: dict[str, Any] = {"log_every": 2, "checkpoint_every": 3, "evaluate_every": 3, "preview_every": 4, "keep": 0}
    run.mkdir(exist_ok=True)
    fit(task, run, **{**how, **changed})
    return run


def lines(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in read(run)]


def tensors(run: Path) -> dict[str, Tensor]:
    files = sorted((run / "checkpoints").rglob("*.safetensors"))
    return {
        f"{file.parent.name} {file.stem} {name}": value for file in files for name, value in load_file(file).items()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(Line(), tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize("killed_at", range(7))
@pytest.mark.parametrize("workers", [0, 2])
def test_wherever_it_is_killed_it_ends_with_the_same_bits(
    killed_at: int, workers: int, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(KilledError):
        train(Line(killed_at=killed_at), run, workers=workers)
    train(Line(), run, workers=workers)
    expected, found = tensors(whole), tensors(run)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert lines(run) == lines(whole)


def test_what_is_done_when(tmp_path: Path) -> None:
    task = Line()
    run = train(task, tmp_path / "run", evaluate_first=True)
    assert checkpoints.steps(run) == [3, 6, 7]
    assert [(line["step"], "validation" in line) for line in lines(run)] == [
        (0, True), (2, False), (3, False), (3, True), (4, False), (6, False), (6, True), (7, False), (7, True)
    ]  # fmt: skip
    of_last_step = [event for event, step in task.events if step == 7]
    assert of_last_step == ["check", "evaluate", "preview", "check"]
    assert sorted(picture.name for picture in (run / "previews").iterdir()) == [
        "00000000.png", "00000004.png", "00000007.png",
    ]  # fmt: skip


def test_a_measurement_that_fails_leaves_the_checkpoint_before_and_a_picture_that_does_the_one_now(
    tmp_path: Path,
) -> None:
    for broken, kept in (("evaluate", [3]), ("preview", [3, 6])):
        task = Line()

        def fail(step: int, result: Any = {"evaluate": {}, "preview": None}[broken]) -> Any:
            if step == 6:
                raise KilledError
            return result

        setattr(task, broken, fail)
        with pytest.raises(KilledError):
            train(task, tmp_path / broken, preview_every=3)
        assert checkpoints.steps(tmp_path / broken) == kept


def test_logged_values_are_means_over_the_steps_in_which_there_are_any(tmp_path: Path) -> None:
    single = read(train(Line(), tmp_path / "single", log_every=1, evaluate_every=0, preview_every=0))
    together = read(train(Line(), tmp_path / "all", log_every=7, checkpoint_every=7, evaluate_every=0, preview_every=0))
    (line,) = together
    for name, first in (("loss", 0), ("late", 3), ("gradient_norm", 0)):
        values = [each[name] for each in single[first:]]
        assert line[name] == pytest.approx(sum(values) / len(values), rel=1e-6)
    assert "late" not in single[2]
    assert [each["learning_rate"] for each in single] == [learning_rate(CONFIG, step) for step in range(7)]


def test_parts_of_any_size_count_by_their_samples() -> None:
    means = Means()
    means.add({"loss": torch.tensor(1.0)}, 3)
    means.add({"loss": torch.tensor(2.0)}, 1)
    assert means.over_processes(False) == ({"loss": 1.25}, False)


def test_averages_follow_the_part_that_is_averaged(whole: Path) -> None:
    ema = Line().ema["bias"].clone()
    for step in (3, 6, 7):
        assert tensors(whole).keys() >= {f"{step:08d} ema bias", f"{step:08d} model 1.running_mean"}
    assert not torch.equal(tensors(whole)["00000007 ema bias"], ema)
    warmed = OptimiserConfig(ema=0.9, ema_warmup="yes")
    assert [warmed.ema_at(step) for step in (0, 8, 10**6)] == [1 / 10, 9 / 18, 0.9]


@settings(max_examples=50)
@given(
    ema=st.sampled_from([0.0, 0.5, 0.99, 0.999, 0.9999]),
    warmup=st.sampled_from(["yes", "no"]),
    steps=st.integers(0, 3000),
)
def test_the_share_of_the_initial_weights_is_what_the_average_has_left_of_them(
    ema: float, warmup: EmaWarmup, steps: int
) -> None:
    optimisation = OptimiserConfig(ema=ema, ema_warmup=warmup)
    average = torch.ones((), dtype=torch.float64)  # of weights that were 1 at first and are 0 from then on
    for step in range(steps):
        average.lerp_(torch.zeros_like(average), 1 - optimisation.ema_at(step))
    assert optimisation.initial_share(steps) == pytest.approx(average.item(), rel=1e-9, abs=1e-6)


def test_published_recipes_at_published_lengths_average_as_published_and_short_ones_warm_up() -> None:
    for recipe in RECIPES.values():
        for steps in (50_000, 400_000, 7_000_000):
            settled = replace(recipe.optimisation, steps=steps).settled()
            assert settled.ema_warmup == "no"
            assert [settled.ema_at(step) for step in (0, steps - 1)] == [0.9999, 0.9999]
            assert settled.initial_share(steps) < 0.01
        short = replace(recipe.optimisation, steps=300)
        assert short.initial_share(300) == pytest.approx(0.97, abs=0.001)  # as it was, without a word
        assert short.settled().initial_share(300) < 1e-6
        # What has been decided stays, however long the run becomes.
        long = replace(recipe.optimisation, steps=10**6)
        assert long.settled(short.settled()).ema_warmup == "yes"
        assert short.settled(long.settled()).ema_warmup == "no"
        assert replace(short, ema_warmup="no").settled().ema_warmup == "no"


def test_an_average_that_stays_too_young_is_said_before_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(Line(replace(CONFIG, ema=0.9)), tmp_path / "young")
    says = (
        "warning: after 7 steps 48% of the averaged weights will be those that training began with; choose "
        "optimisation.ema_warmup yes, or a lower optimisation.ema\n"
    )
    assert says in capsys.readouterr().err
    train(Line(replace(CONFIG, ema=0.9, ema_warmup="yes")), tmp_path / "warmed")
    assert "warning" not in capsys.readouterr().err


@given(
    warmup=st.integers(0, 30),
    decaying=st.integers(2, 60),
    rate=st.floats(1e-5, 1),
    decay=st.sampled_from(["constant", "cosine"]),
)
def test_the_learning_rate_begins_peaks_and_ends_where_it_is_said_to(
    warmup: int, decaying: int, rate: float, decay: Any
) -> None:
    steps = warmup + decaying
    config = OptimiserConfig(steps=steps, learning_rate=rate, warmup=warmup, decay=decay)
    rates = [learning_rate(config, step) for step in range(steps)]
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == [rate * (step + 1) / warmup for step in range(warmup)]
    assert falling[0] == rate
    if decay == "constant":
        assert set(falling) == {rate}
        return
    assert falling[-1] == 0
    assert all(a > b for a, b in pairwise(falling))
    assert [a + b for a, b in zip(falling, reversed(falling), strict=True)] == pytest.approx([rate] * decaying)


@pytest.mark.parametrize("without", ["average", "previews"])
def test_a_task_may_do_without(without: str, tmp_path: Path) -> None:
    task = Line()
    if without == "average":
        task.averaged, task.ema = None, {}
    run = train(task, tmp_path / "run", evaluate_every=0, preview_every=0)
    assert not (run / "previews").exists()
    assert (run / "checkpoints" / "00000007" / "ema.safetensors").exists() == (without != "average")
    train(task, run, evaluate_every=0, preview_every=0)


def test_a_request_to_stop_is_met_after_the_step(tmp_path: Path, whole: Path) -> None:
    class Interrupted(Line):
        def before_update(self, step: int) -> dict[str, Tensor]:
            if step == 4:
                signal.raise_signal(signal.SIGTERM)
            return super().before_update(step)

    with stopping.deferred(), pytest.raises(Stopped, match="stopped after step 5, with a checkpoint"):
        train(Interrupted(), tmp_path / "run")
    assert checkpoints.steps(tmp_path / "run") == [3, 5]
    train(Line(), tmp_path / "run")
    expected, found = tensors(whole), tensors(tmp_path / "run")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_loss_that_is_not_finite_says_what_to_do(tmp_path: Path) -> None:
    task = Line()
    with torch.no_grad():
        next(task.model.parameters()).fill_(torch.inf)
    says = r"not finite between steps 0 and 2 \(loss, gradient_norm\); use a ruler; the last checkpoint is untouched"
    with pytest.raises(UserError, match=says):
        train(task, tmp_path / "run")
    assert read(tmp_path / "run") == []


def test_a_batch_that_does_not_divide_is_refused() -> None:
    assert part_size(CONFIG, 2) == 1
    for processes in (3, 4):
        with pytest.raises(UserError, match=rf"of 4 does not divide into {processes} processes × 2 accumulated parts"):
            part_size(CONFIG, processes)


class Notes:
    """A tracker that raises in one of its methods, if asked to."""

    made: list[Notes] = []  # noqa: RUF012
    broken = ""

    def __init__(self, run: Path, after_step: int) -> None:
        self.after_step, self.steps, self.pictures, self.closed = after_step, [], [], False
        self.made.append(self)
        self._meet("made")

    def log(self, step: int, values: dict[str, Any]) -> None:
        self.steps.append((step, sorted(values)))
        self._meet("log")

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        self.pictures.append((step, name, picture.getpixel((0, 0))))
        self._meet("image")

    def close(self) -> None:
        self.closed = True
        self._meet("close")

    def _meet(self, method: str) -> None:
        if self.broken == method:
            raise ConnectionError("the network\nis down")


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> type[Notes]:
    monkeypatch.setitem(TRACKERS, "notes", Notes)
    monkeypatch.setattr(Notes, "made", [])
    return Notes


def test_a_strangers_tracker_gets_what_the_log_gets(notes: type[Notes], tmp_path: Path, whole: Path) -> None:
    with pytest.raises(KilledError):
        train(Line(killed_at=4), tmp_path / "run", track=("notes", "jsonl", "notes"))
    train(Line(), tmp_path / "run", track=("notes",))
    first, second = notes.made
    assert (first.after_step, second.after_step) == (-1, 3)
    assert first.closed
    assert second.closed
    kept = [(line["step"], sorted(line.keys() - {"step"})) for line in read(tmp_path / "run")]
    assert second.steps == [(step, names) for step, names in kept if step > 3]
    assert second.pictures == [(4, "previews", 4), (7, "previews", 7)]
    assert lines(tmp_path / "run") == lines(whole)


@pytest.mark.parametrize("method", ["made", "log", "image", "close"])
def test_a_tracker_that_raises_is_one_warning(
    method: str, notes: type[Notes], tmp_path: Path, whole: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(notes, "broken", method)
    train(Line(), tmp_path / "run", track=("notes",))
    warnings = [line for line in capsys.readouterr().err.splitlines() if "tracker notes" in line]
    assert len(warnings) == 1
    assert "ConnectionError: the network is down" in warnings[0]
    assert lines(tmp_path / "run") == lines(whole)


def test_a_line_that_was_cut_short_is_written_again(tmp_path: Path, whole: Path) -> None:
    with pytest.raises(KilledError):
        train(Line(killed_at=4), tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "loss": 1.0})[:-5])
    train(Line(), tmp_path / "run")
    assert lines(tmp_path / "run") == lines(whole)


@pytest.mark.parametrize("step", ['"x"', "null", "[1]", "1.5", "true", None])
def test_a_line_without_a_step_is_named(step: str | None, tmp_path: Path) -> None:
    line = "{}" if step is None else f'{{"step": {step}}}'
    content = f'{{"step": 1}}\n{line}\n{{"step": 2}}\n'
    (tmp_path / "metrics.jsonl").write_text(content)
    for use in (read, lambda run: JsonLines(run, 5)):
        with pytest.raises(UserError, match=r"metrics\.jsonl is damaged \(line 2: its step is no whole number\); fix"):
            use(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == content


def test_figures_that_are_not_finite_are_left_out_of_the_log(tmp_path: Path) -> None:
    record = JsonLines(tmp_path, -1)
    record.log(3, {"loss": 0.5, "rate": float("inf"), "validation": {"distance": float("nan"), "psnr": 20.0}})
    assert read(tmp_path) == [{"step": 3, "loss": 0.5, "validation": {"psnr": 20.0}}]
