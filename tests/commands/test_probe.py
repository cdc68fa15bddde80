"""`probe`: what it finds in a store, how it continues, and what it writes."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reglue import cli
from reglue.commands import probe as command
from reglue.commands.compress import Compress, compress
from reglue.commands.prepare import Prepare, prepare
from reglue.commands.probe import Probe, probe
from reglue.data.store import Store
from reglue.errors import UserError
from reglue.perception import probing
from reglue.perception.labelled import Parts


@pytest.fixture
def store(tiny_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_store, tmp_path / "store"))


@pytest.fixture(autouse=True)
def quick_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "TIMED_SECONDS", 0.01)


def options(store: Path, out: Path, **changes) -> Probe:
    return Probe(**{"store": store, "out": out, "steps": 5, "hidden": 4, "device": "cpu", **changes})


def scores(report) -> dict[tuple[str, str], float]:
    return {(one.input, one.probe): one.score for one in report.results}


def test_everything_in_a_store_is_probed(store: Path, tmp_path: Path):
    compress(Compress(store, "pca", "cls", channels=3, device="cpu"))
    report = probe(options(store, tmp_path / "out"))
    kinds = ["linear, pooled", "linear, flat", "conv"]
    maps = ["features", "features.last", "local.conv-4", "local.pca-4", "latent"]
    vectors = ["cls", "cls.pca-3"]
    assert set(scores(report)) == {(name, kind) for name in maps for kind in kinds} | {
        (name, "linear, pooled") for name in vectors
    }
    assert [*dict.fromkeys(one.input for one in report.results)] == [*maps[:4], *vectors, "latent"]
    assert (report.metric, report.classes) == ("accuracy", 3)
    assert (report.fitted + report.selected + report.measured, report.measured) == (24, 5)
    by_input = {one.input: one for one in report.results}
    assert by_input["local.pca-4"].compression_ratio == 16
    assert by_input["features.last"].compression_ratio == 4
    assert by_input["cls.pca-3"].compression_ratio == 16 / 3
    measured = json.loads((store / "compressors/pca-4/metrics.jsonl").read_text())
    assert by_input["local.pca-4"].mse == measured["validation_mse"]
    assert by_input["local.pca-4"].explained_variance == measured["explained_variance"]
    assert (by_input["local.conv-4"].encoded_per_second or 0) > 0
    assert by_input["latent"].encoded_per_second is None
    assert by_input["latent"].compression_ratio is None
    assert by_input["features.last"].cknna is None
    assert all(-1 <= (by_input[name].cknna or 0) <= 1 for name in by_input)
    assert sum(one.cknna is not None for one in by_input.values()) == len(by_input) - 1
    assert json.loads((tmp_path / "out/report.json").read_text())["results"][0]["score"] == report.results[0].score
    table = (tmp_path / "out/report.md").read_text()
    assert "| local.pca-4 | linear, flat |" in table
    assert "16×" in table
    with Image.open(tmp_path / "out/figure.png") as figure:
        assert figure.width > 400


def test_a_score_that_is_a_lower_bound_is_said_to_be(store: Path, tmp_path: Path):
    report = probe(options(store, tmp_path / "out", conv=False, columns=("local.pca-4",)))
    first, *others = (replace(one, at_end=False) for one in report.results)
    assert "lower bound" not in probing.probe_table(replace(report, results=(first, *others)))
    shown = probing.probe_table(replace(report, results=(replace(first, at_end=True, chosen=1000.0), *others)))
    assert shown.splitlines()[-1].startswith("The best penalty for local.pca-4 (linear, pooled) was 1000, at the end")


def test_a_wide_input_is_not_probed_flat_and_conv_can_be_left_out(store: Path, tmp_path: Path):
    report = probe(options(store, tmp_path / "out", conv=False, flat_limit=64, columns=("features", "local.pca-4")))
    assert set(scores(report)) == {
        ("features", "linear, pooled"),
        ("local.pca-4", "linear, pooled"),
        ("local.pca-4", "linear, flat"),
    }


def test_an_interrupted_run_continues_and_a_new_column_is_added(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = probe(options(store, tmp_path / "whole"))
    measured, calls = command.run_probe, []

    def counting(read, kind, *rest):
        calls.append((read.name, kind))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measured(read, kind, *rest)

    monkeypatch.setattr(command, "run_probe", counting)
    with pytest.raises(KeyboardInterrupt):
        probe(options(store, tmp_path / "out"))
    assert len(json.loads((tmp_path / "out/report.json").read_text())["results"]) == 3
    assert scores(probe(options(store, tmp_path / "out"))) == scores(whole)
    assert len(calls) == len(whole.results) + 1

    compress(Compress(store, "pca", channels=2, device="cpu"))
    calls.clear()
    calls += [("", "")] * 4  # No more interruptions.
    added = probe(options(store, tmp_path / "out", columns=("local.pca-2",)))
    assert calls[4:] == [("local.pca-2", kind) for kind in ("linear, pooled", "linear, flat", "conv")]
    assert scores(added).items() > scores(whole).items()


def test_a_result_of_other_codes_is_made_anew(store: Path, tmp_path: Path):
    first = probe(options(store, tmp_path / "out", conv=False))
    path = tmp_path / "out/report.json"
    content = json.loads(path.read_text())
    stale = next(result for result in content["results"] if result["input"] == "local.pca-4")
    stale |= {"data": "of a store that is gone", "score": 2.0}
    path.write_text(json.dumps(content))
    assert scores(probe(options(store, tmp_path / "out", conv=False))) == scores(first)


def test_mirror_images_take_no_part(tmp_path: Path, tiny_images: Path, tiny_encoder: str, tiny_autoencoder: str):
    folder = tmp_path / "store"
    flipped = prepare(
        Prepare(tiny_images, folder, 16, tiny_autoencoder, tiny_encoder, flips=True, workers=0, device="cpu")
    )
    masks = draw_masks(tmp_path / "masks", tiny_images)
    for changes, images in (({}, 24), ({"masks": masks}, 19)):
        rows = torch.cat([part.rows for part in parts_of(options(folder, tmp_path / "out", **changes))])
        assert len(rows) == images
        assert set(rows.tolist()) <= set(flipped.originals.tolist())


def parts_of(given: Probe) -> Parts:
    return command.parts_of(given, command.labelled_images(given, Store.open(given.store)))


def test_images_are_measured_that_no_probe_was_fitted_to(store: Path, tmp_path: Path):
    parts = parts_of(options(store, tmp_path))
    rows = [set(part.rows.tolist()) for part in parts]
    assert set.union(*rows) == set(range(24))
    assert sum(map(len, rows)) == 24
    assert set(parts_of(options(store, tmp_path, seed=1)).measured.rows.tolist()) != rows[2]
    assert sum(map(len, parts_of(options(store, tmp_path, images=12)))) == 12


def test_a_second_store_is_measured_on_with_the_first_ones_compressors(
    store: Path, tmp_path: Path, tiny_images: Path, tiny_encoder: str, tiny_autoencoder: str
):
    second = tmp_path / "second"
    models = (16, tiny_autoencoder, tiny_encoder)
    prepare(Prepare(tiny_images, second, *models, features=True, workers=0, device="cpu"))
    compress(Compress(store, "pca", "cls", channels=3, device="cpu"))
    report = probe(options(store, tmp_path / "out", validation=second, conv=False))
    assert (report.fitted + report.selected, report.measured) == (24, 24)
    # The same images: what is computed from their features equals what the first store has.
    compress(Compress(second, "pca", channels=4, seed=3, validation=0.4, device="cpu"))  # Another one of that name.
    same = probe(options(store, tmp_path / "same", validation=store, conv=False))
    assert scores(report) == scores(same)
    again = probe(options(store, tmp_path / "again", validation=second, conv=False))
    assert scores(again) == scores(same)

    other = tmp_path / "other"
    prepare(Prepare(tiny_images, other, 16, tiny_autoencoder, "none", workers=0, device="cpu"))
    with pytest.raises(UserError, match="another encoder"):
        probe(options(store, tmp_path / "no", validation=other))


def draw_masks(folder: Path, images: Path) -> Path:
    """Foreground where a shape's colour is; every fifth image has no mask."""
    for index, path in enumerate(sorted(images.rglob("*.png"))):
        pixels = np.asarray(Image.open(path)).astype(int)
        mask = (abs(pixels - pixels[0, 0]).sum(2) > 0).astype(np.uint8)
        mask[0] = 255
        if index % 5:
            (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(folder / path.parent.name / path.name)
    return folder


@pytest.mark.trains
def test_masks_are_told_from_maps_alone(store: Path, tmp_path: Path, tiny_images: Path):
    masks = draw_masks(tmp_path / "masks", tiny_images)
    report = probe(options(store, tmp_path / "out", masks=masks, steps=60, learning_rate=3e-2))
    assert (report.metric, report.classes, report.without_mask) == ("mIoU", 2, 5)
    assert report.fitted + report.selected + report.measured == 19
    assert {one.probe for one in report.results} == {"linear", "conv"}
    assert {one.input for one in report.results} == {
        "features", "features.last", "local.conv-4", "local.pca-4", "latent",
    }  # fmt: skip
    assert max(scores(report).values()) > report.chance + 0.1
    assert all(0 < (one.pixel_accuracy or 0) <= 1 for one in report.results)
    with pytest.raises(UserError, match="--columns cls"):
        probe(options(store, tmp_path / "no", masks=masks, columns=("cls",)))
    next(masks.rglob("*.png")).unlink()
    with pytest.raises(UserError, match="masks-sha256"):
        probe(options(store, tmp_path / "out", masks=masks, steps=60, learning_rate=3e-2))


def test_other_settings_and_other_files_are_refused(store: Path, tmp_path: Path):
    probe(options(store, tmp_path / "out", conv=False, columns=("cls",)))
    with pytest.raises(UserError, match="seed 0, not 1"):
        probe(options(store, tmp_path / "out", conv=False, seed=1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(UserError, match="holds other files"):
        probe(options(store, tmp_path / "mine"))
    (tmp_path / "out/report.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        probe(options(store, tmp_path / "out"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"held_out": 1.0}, "held_out 1.0"),
        ({"selection": 0.0}, "selection 0.0"),
        ({"steps": 0}, "steps 0"),
        ({"images": 3}, "images 3"),
        ({"seed": -1}, "seed -1"),
        ({"validation_masks": Path("masks")}, "--validation-masks belongs"),
        ({"columns": ("local.conv-99",)}, "--columns local.conv-99: choose from features, features.last, local.conv-4"),
        ({"store": Path("nowhere")}, "nowhere is not a store"),
        ({"masks": Path("nowhere")}, "nowhere: no such folder"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tiny_store: Path, tmp_path: Path, changes, says: str):
    with pytest.raises(UserError, match=says) as caught:
        probe(options(**{"store": tiny_store, "out": tmp_path / "out", **changes}))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_command_prints_a_table(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    arguments = ["probe", tiny_store, "--out", tmp_path / "out", "--no-conv", "--columns", "cls", "local.pca-4"]
    monkeypatch.setattr(sys, "argv", ["reglue", *map(str, arguments), "--steps", "5", "--device", "cpu"])
    cli.main()
    printed = capsys.readouterr().out
    assert "| cls | linear, pooled |" in printed
    assert "chance" in printed


def test_codes_of_one_layer_are_probed_too(store: Path, tmp_path: Path, tiny_store: Path):
    compress(Compress(store, "pca", layers="last", channels=4, device="cpu"))
    # On a second store without these codes they are computed, from that layer.
    report = probe(options(store, tmp_path / "out", columns=("local.pca-4-last",), validation=tiny_store))
    assert {one.input for one in report.results} == {"local.pca-4-last"}
    assert {one.compression_ratio for one in report.results} == {4}  # of the one layer, whatever else is stored
    assert all(one.encoded_per_second for one in report.results)
