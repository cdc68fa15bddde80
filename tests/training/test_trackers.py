"""Trackers of other projects: their real libraries write to disk, and what they wrote is read back."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers import mistake
from reglue.commands.evaluate import Evaluate, evaluate
from reglue.commands.sample import Sample, sample
from reglue.errors import UserError
from reglue.training.trackers import IDENTITY, configuration, flat, identity
from reglue.training.tracking import TRACKERS, Trackers, check_trackers, read

ALL = ("tensorboard", "wandb", "trackio")
FIGURES = {"loss": 2.0, "latent": 1.5, "gradient_norm": 0.7, "learning_rate": 1e-4, "images_per_second": 900.0}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> tuple[Path, Path]:
    """A run of four steps that was continued to eight, with all trackers, and where Trackio keeps its own."""
    folder = tmp_path_factory.mktemp("tracked")
    run = Path(shutil.copytree(tiny_run, folder / "run"))
    (run / "metrics.jsonl").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        patch.setenv("WANDB_MODE", "offline")
        for begun in (0, 4):
            trackers = Trackers(run, ALL, begun or -1)
            assert trackers.others.keys() == {*ALL}
            for step in (begun + 2, begun + 4):
                trackers.log(step, {**FIGURES, "loss": 2 / step})
            trackers.image(step, "previews", Image.new("RGB", (8, 8), "teal"))
            trackers.close()
            assert trackers.others.keys() == {*ALL}
    return run, folder / "trackio"


def logged(run: Path, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in read(run)]


def test_tensorboard(tracked: tuple[Path, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = tracked
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {*FIGURES}
    for name in ("loss", "learning_rate", "gradient_norm"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [2, 4, 6, 8]
        assert [value for _, value in found] == pytest.approx([value for _, value in logged(run, name)], rel=1e-6)
    assert [event.step for event in events.Images("previews")] == [4, 8]
    text = events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"model": "2x32x2/2"' in text


def test_tensorboard_forgets_work_that_was_lost(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "run.json").write_text('{"recipe": {}}')
    for after, value in ((-1, 1.0), (2, 5.0)):
        tracker = TRACKERS["tensorboard"](tmp_path, after)
        for step in range(after + 1, 5):
            tracker.log(step, {"loss": value})
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 1), (1, 1), (2, 1), (3, 5), (4, 5)]


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of an offline run: a log of blocks of 32 KiB, as LevelDB's."""
    from wandb.proto import wandb_internal_pb2

    content, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if (room := 32768 - position % 32768) < 7:
            position += room
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()  # type: ignore[reportAttributeAccessIssue]
            record.ParseFromString(parts)
            parts = b""
            yield record


def test_wandb(tracked: tuple[Path, Path]) -> None:
    run, _ = tracked
    files = sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
    assert len(files) == 2
    records = [record for file in files for record in wandb_records(file)]
    assert {record.run.run_id for record in records if record.HasField("run")} == {identity(run)}
    lines = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert [(line["_step"], line["loss"]) for line in lines] == logged(run, "loss")
    assert [line["_step"] for line in lines if any(name.startswith("previews") for name in line)] == [4, 8]
    assert set(lines[0]) >= {*FIGURES}
    config = {item.key: item.value_json for record in records for item in record.run.config.update}
    assert json.loads(config["recipe"])["model"] == "2x32x2/2"


def test_trackio(tracked: tuple[Path, Path]) -> None:
    run, place = tracked
    program = """
import json, sys
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_run_records("reglue")
config = SQLiteStorage.get_run_config("reglue", run["name"])
print(json.dumps([run["name"], SQLiteStorage.get_logs("reglue", run["name"]), config["recipe"]["model"]], default=str))
"""
    environment = {**os.environ, "TRACKIO_DIR": str(place)}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    name, lines, model = json.loads(result.stdout.splitlines()[-1])
    assert (name, model) == (f"run-{identity(run)}", "2x32x2/2")
    assert [(line["step"], line["loss"]) for line in lines if "loss" in line] == logged(run, "loss")
    assert [line["step"] for line in lines if "previews" in line] == [4, 8]


def test_progress_is_a_picture_beside_the_previews(tracked: tuple[Path, Path]) -> None:
    run, _ = tracked
    with Image.open(run / "progress.png") as picture, Image.open(run / "previews" / "00000008.png") as preview:
        assert picture.width > 3 * preview.width
    assert not [file for file in run.rglob("*") if "reglue-tmp" in file.name]


def test_figures_of_an_evaluation_follow_the_curve(
    tracked: tuple[Path, Path], tiny_store: Path, tiny_encoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = tracked
    lines = (run / "metrics.jsonl").read_bytes()
    samples = sample(Sample(run, run.parent / "samples", 8, steps=1, device="cpu"))
    options = Evaluate(samples, tiny_store, feature_network=tiny_encoder, resamples=0, device="cpu")
    evaluate(replace(options, track=("tensorboard",)))
    assert "warning: tracker" not in capsys.readouterr().err
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    names = {name for name in events.Tags()["scalars"] if name.startswith("evaluation/")}
    assert {"evaluation/precision", "evaluation/recall"} < names
    assert [event.step for event in events.Scalars("evaluation/precision")] == [6]
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6, 8]
    assert (run / "metrics.jsonl").read_bytes() == lines


class Failing:
    def __init__(self, run: Path, after_step: int) -> None:
        raise SystemExit(1)


@pytest.mark.parametrize("where", ["import", "start", "middle", "exit"])
def test_a_tracker_that_fails_is_one_warning(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.json").write_text('{"recipe": {}}')
    if where == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    elif where == "start":
        (tmp_path / "tensorboard").write_text("a file")
    name = {"import": "wandb", "exit": "failing"}.get(where, "tensorboard")
    monkeypatch.setitem(TRACKERS, "failing", Failing)
    trackers = Trackers(tmp_path, [name], after_step=-1)
    if where == "middle":
        monkeypatch.setattr(trackers.others[name].writer, "add_scalar", lambda *_: 1 / 0)  # type: ignore[attr-defined]
    for step in (1, 2):
        trackers.log(step, {"loss": 1.0})
    trackers.image(2, "previews", Image.new("RGB", (4, 4)))
    trackers.close()
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert f"tracker {name} failed and is left out" in warnings[0]
    assert [line["step"] for line in read(tmp_path)] == [1, 2]


def test_a_package_that_is_missing_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    told = mistake(capsys, monkeypatch, "train", "sit", "--store", "s", "--out", tmp_path / "r", "--track", "wandb")
    assert told == "reglue: --track wandb needs wandb: run `pip install 'reglue[track]'`"
    with pytest.raises(UserError, match=r"no such tracker; choose from jsonl, tensorboard, trackio, wandb"):
        check_trackers(["tensorbord"])
    assert not list(tmp_path.iterdir())


def test_wandb_stays_offline_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "init", lambda **options: asked.append(options) or wandb)
    (tmp_path / "run.json").write_text('{"recipe": {"name": "sit"}}')
    for mode, expected in ((None, "offline"), ("online", None)):
        monkeypatch.delenv("WANDB_MODE", raising=False)
        if mode:
            monkeypatch.setenv("WANDB_MODE", mode)
        TRACKERS["wandb"](tmp_path, -1)
        assert asked[-1]["mode"] == expected
    assert asked[0]["id"] == asked[1]["id"]
    assert asked[0]["config"] == {"recipe": {"name": "sit"}}


def test_what_trackers_are_told(tmp_path: Path) -> None:
    values = {"loss": 1, "epoch": 0.5, "text": "no", "validation": {"psnr": 20.0}}
    assert dict(flat(values)) == {"loss": 1.0, "epoch": 0.5, "validation/psnr": 20.0}
    first = identity(tmp_path)
    assert identity(tmp_path) == first
    (tmp_path / IDENTITY).write_text("../../elsewhere")
    assert identity(tmp_path) != first
    (tmp_path / "training.json").write_text('{"recipe": 1}')
    assert configuration(tmp_path) == {"recipe": 1}
