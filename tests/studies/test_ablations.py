"""Ablations at toy size, and packed stores."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_convergence import TINY

import ablations
from pack import Pack, pack, split_large
from reglue.commands.compress import Compress, compress
from reglue.commands.prepare import Prepare, prepare
from reglue.config import LocalSemantics
from reglue.data.store import Store
from reglue.errors import UserError
from reglue.run import RunRecord
from unpack import unpack

OWN = ("--compressor", "conv-4", "--compressor-epochs", "1", "--compressor-hidden", "8", "--checkpoints", "1")
SHARED = tuple(
    argument
    for pair in zip(TINY[::2], TINY[1::2], strict=True)
    for argument in pair
    if not pair[0].startswith(("--redi", "--reglue", "--checkpoints"))
)


SCALES = {
    "reglue": ("conv-4", False),
    "reglue-unit-variance": ("conv-4", True),
    "reglue-pca-4-unit-variance": ("pca-4", True),
    "local-alignment-last-layer-unit-variance": ("conv-4-last", True),
    "local-alignment-unit-variance": ("conv-4", True),
}
"""Arms of a question: their codes, and whether these get one scale."""


def without_codes(store: Path, folder: Path) -> Path:
    pack(Pack(store, folder, ("latent", "cls", "features")))
    return folder


def test_each_question_gets_a_table_and_shared_arms_are_trained_once(
    tmp_path: Path, tiny_store: Path, tiny_images: Path
) -> None:
    store = without_codes(tiny_store, tmp_path / "store")
    out = tmp_path / "ablations"
    arguments = ["--questions", "kl", "layers", "data", "guidance", "--guidance-scales", "1.5", *SHARED, *OWN]
    ablations.main([str(store), "--reference", str(tiny_images), "--out", str(out), *arguments])
    results = json.loads((out / "results.json").read_text())
    assert {
        *("reglue-seed-0", "local-alignment-seed-0", "local-alignment-last-layer-seed-0", "reglue-20-percent-seed-0"),
        *("local-alignment-last-layer-kl-seed-0", "guided-latents-seed-0", "guided-all-by-1.5-seed-0"),
    } <= set(results["arms"])
    compressors = Store.open(store).manifest.compressors
    assert {name: spec.layers for name, spec in compressors.items()} == {
        "conv-4": (1, 2, 3, 4),
        "conv-4-last": (4,),
        "conv-4-last-kl": (4,),
    }
    assert [name for name, spec in compressors.items() if spec.variational] == ["conv-4-last-kl"]
    assert not (out / "guided-latents-seed-0" / "run").exists()
    protocol = json.loads((out / "guided-latents-seed-0" / "guided-00000004" / "samples.json").read_text())
    assert protocol["sampling"]["guidance"]["local_scale"] == protocol["sampling"]["guidance"]["cls_scale"] == 1
    assert "with KL 17.2" in (out / "tables" / "kl.md").read_text()
    guided = (out / "tables" / "guidance.md").read_text()
    assert guided.count("4, guided") == 8
    assert guided.count("here scale 2 on [0, 0.9]") == guided.count("here scale 1.5 on [0, 0.9]") == 4
    assert "compare orders and ratios" in guided
    assert "for 80 epochs" in (out / "tables" / "data.md").read_text()
    protocol = json.loads((out / "guided-all-by-1.5-seed-0" / "guided-00000004" / "samples.json").read_text())
    assert protocol["sampling"]["guidance"]["scale"] == 1.5
    assert len(Store.open(out / "data" / "20%")) == 6  # two of each of three classes, rounded up


def test_a_plan_makes_nothing_and_counts_the_compressors(
    tmp_path: Path, tiny_store: Path, tiny_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, out = without_codes(tiny_store, tmp_path / "store"), tmp_path / "ablations"
    before = files_of(tmp_path)
    arguments = ["--questions", "data", "layers", "compressors", "--plan", "--minutes", "60", *SHARED, *OWN]
    ablations.main([str(store), "--reference", str(tiny_images), "--out", str(out), *arguments])
    assert files_of(tmp_path).keys() - before.keys() == {"ablations-plan.json", "ablations-plan.md"}
    assert {name: files_of(tmp_path)[name] for name in before} == before
    planned = json.loads((tmp_path / "ablations-plan.json").read_text())
    assert {"conv-4", "conv-4-last", "pca-8", "conv-32"} <= planned["compressors"].keys()
    assert all(seconds > 0 for seconds in planned["compressors"].values())
    assert "reglue-20-percent-seed-0" in [line["name"] for line in planned["arms"]]
    assert planned["seconds"] > sum(planned["compressors"].values())
    assert planned["steps_within_minutes"] > 4
    assert capsys.readouterr().out.endswith((tmp_path / "ablations-plan.md").read_text())


def test_shares_of_mirror_images_are_refused_before_anything_is_made(
    tmp_path: Path, tiny_images: Path, tiny_encoder: str, tiny_autoencoder: str
) -> None:
    store, names = tmp_path / "store", (tiny_autoencoder, tiny_encoder)
    prepare(Prepare(tiny_images, store, 16, *names, features=True, flips=True, workers=0, device="cpu"))
    arguments = ["--reference", str(tiny_images), "--out", str(tmp_path / "out"), "--questions", "data"]
    with pytest.raises(SystemExit, match="a store without mirror images"):
        ablations.main([str(store), *arguments])
    assert not (store / "compressors").exists()


def test_codes_of_one_scale_are_told_from_those_as_they_are(
    tmp_path: Path, tiny_store: Path, tiny_images: Path
) -> None:
    out = tmp_path / "ablations"
    arguments = ["--questions", "scale", *SHARED, *OWN]
    ablations.main([str(tiny_store), "--reference", str(tiny_images), "--out", str(out), *arguments])
    trained = {arm: RunRecord.read(out / f"{arm}-seed-0" / "run").recipe.local for arm in SCALES}
    assert trained == {
        arm: LocalSemantics(weight=1.0, compressor=codes, unit_variance=scaled)
        for arm, (codes, scaled) in SCALES.items()
    }
    assert "a standard deviation of 1" in (out / "tables" / "scale.md").read_text()


def test_targets_of_every_kind_are_compared(
    tmp_path: Path, tiny_store: Path, tiny_images: Path, tiny_encoder: str, tiny_autoencoder: str
) -> None:
    out, eight_bits = tmp_path / "ablations", tmp_path / "int8"
    names = (tiny_autoencoder, tiny_encoder)
    prepare(Prepare(tiny_images, eight_bits, 16, *names, features=True, features_dtype="int8", workers=0, device="cpu"))
    compress(Compress(eight_bits, fitted=tiny_store / "compressors" / "conv-4", device="cpu"))
    arguments = ["--questions", "targets", "--int8-store", str(eight_bits), "--guidance", "1", *SHARED, *OWN]
    ablations.main([str(tiny_store), "--reference", str(tiny_images), "--out", str(out), *arguments])
    table = (out / "tables" / "targets.md").read_text()
    for arm in ("reglue", "targets-cached-int8", "targets-decoded", "targets-online"):
        assert f"| {arm}, seed 0 |" in table


def test_an_unknown_question_is_refused(tmp_path: Path, tiny_store: Path, tiny_images: Path) -> None:
    arguments = ["--reference", str(tiny_images), "--out", str(tmp_path), "--questions", "depth"]
    with pytest.raises(SystemExit, match="--questions depth: choose of parts"):
        ablations.main([str(tiny_store), *arguments])


def test_a_packed_store_holds_the_same_bits_in_smaller_files(tmp_path: Path, tiny_store: Path) -> None:
    whole = Store.open(tiny_store)
    packed = pack(Pack(tiny_store, tmp_path / "packed", ("latent", "cls", "features", "local.conv-4"), last_layer=True))
    rows = torch.arange(len(whole))
    for column in ("label", "latent", "cls", "local.conv-4"):
        for name, tensor in whole.read(column, rows).items():
            assert torch.equal(packed.read(column, rows)[name], tensor)
        assert packed.manifest.statistics.get(column) == whole.manifest.statistics.get(column)
    width = whole.manifest.encoder.width if whole.manifest.encoder else 0
    last = whole.read("features", rows)["features"][:, -width:]
    assert torch.equal(packed.read("features", rows)["features"], last)
    assert packed.manifest.statistics["features"].mean == whole.manifest.statistics["features"].mean[-width:]
    assert packed.names(rows) == whole.names(rows)
    assert list(packed.manifest.compressors) == ["conv-4"]
    assert "local.pca-4" not in packed.manifest.columns


def test_features_travel_in_8_bits(tmp_path: Path, tiny_store: Path) -> None:
    packed = pack(Pack(tiny_store, tmp_path / "packed", ("features", "local.conv-4"), eight_bits=True))
    whole, rows = Store.open(tiny_store), torch.arange(len(packed))
    original, read = (store.read("features", rows)["features"].float() for store in (whole, packed))
    assert packed.read_stored("features", rows)["features"].dtype == torch.int8
    assert not torch.equal(original, read)
    # Half a step of 127 to the largest value of each channel of an image, and float16's rounding of that step.
    assert bool(((original - read).abs() <= original.abs().amax((2, 3), keepdim=True) * (0.5 / 127 + 1e-3)).all())
    assert packed.manifest.statistics["features"].mean != whole.manifest.statistics["features"].mean
    assert packed.manifest.statistics["features"].mean == pytest.approx(read.mean((0, 2, 3)).tolist(), abs=1e-4)


def files_of(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("columns", [(), ("cls",), ("label",)])
def test_packing_keeps_files_below_the_limit(columns: tuple[str, ...], tmp_path: Path, tiny_store: Path) -> None:
    # A megabyte is more than all of the tiny store, so repeat its rows: narrow columns are mostly names of images.
    many = torch.arange(len(Store.open(tiny_store))).repeat(200 if not columns else 2000)
    packed = pack(Pack(tiny_store, tmp_path / "packed", columns, megabytes=1), many)
    sizes = [size for name, size in files_of(tmp_path / "packed").items() if name.endswith(".safetensors")]
    assert max(sizes) <= 1_000_000
    assert max(sizes) > 900_000  # Nor are there more files than need be.
    assert len(packed.manifest.columns["label"].shards) > 1
    assert len(packed) == len(many)


def test_an_image_beyond_the_limit_is_refused(tmp_path: Path, tiny_store: Path) -> None:
    with pytest.raises(UserError, match="one image of column label takes 8 bytes"):
        pack(Pack(tiny_store, tmp_path / "packed", ("latent",), megabytes=0))
    assert not (tmp_path / "packed").exists()


def test_large_files_travel_in_parts(tmp_path: Path, tiny_store: Path, tiny_encoder: str) -> None:
    network, references = tmp_path / "judge.safetensors", tmp_path / "references"
    network.write_bytes(torch.arange(300_000).numpy().tobytes())
    references.mkdir()
    (references / "held-out.json").write_text("{}")
    options = Pack(tiny_store, tmp_path / "packed", ("cls",), networks=(network, Path(tiny_encoder)), megabytes=1)
    pack(replace(options, references=references))
    sizes = files_of(tmp_path / "packed")
    assert max(sizes.values()) <= 1_000_000
    assert {"references/held-out.json", "networks/judge.safetensors.part-002"} <= sizes.keys()
    Store.open(tmp_path / "packed")
    unpack(tmp_path / "packed")
    sizes = files_of(tmp_path / "packed")
    assert not [name for name in sizes if "part" in name]
    assert (tmp_path / "packed/networks/judge.safetensors").read_bytes() == network.read_bytes()
    assert f"networks/{Path(tiny_encoder).name}/config.json" in sizes


@pytest.mark.parametrize(("problem", "message"), [("lost", "part-001 is missing"), ("changed", "were damaged")])
def test_parts_that_are_not_what_they_were(problem: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "judge.safetensors"
    file.write_bytes(bytes(10))
    assert split_large(tmp_path, 4) == ["judge.safetensors"]
    part = tmp_path / "judge.safetensors.part-001"
    part.unlink() if problem == "lost" else part.write_bytes(b"1234")
    with pytest.raises(UserError, match=message):
        unpack(tmp_path)
    assert not file.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"networks": ("nowhere",)}, "nowhere is to be packed, but is not there"),
        ({"networks": ("a/same", "b/same")}, "have the same name"),
        ({"references": "a", "share": 0.5}, "--references are of all images"),
    ],
)
def test_what_cannot_come_along_is_refused(
    changes: dict, message: str, tmp_path: Path, tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/same", "b/same"):
        Path(name).mkdir(parents=True)
    paths = {**changes, "networks": tuple(map(Path, changes.get("networks", ())))}
    with pytest.raises(UserError, match=message):
        pack(Pack(tiny_store, tmp_path / "packed", ("cls",), **paths))
    assert not (tmp_path / "packed").exists()


def test_a_column_that_is_not_there_is_refused(tmp_path: Path, tiny_store: Path) -> None:
    with pytest.raises(UserError, match=r"--columns local\.conv-99"):
        pack(Pack(tiny_store, tmp_path / "packed", ("local.conv-99",)))
    assert not (tmp_path / "packed").exists()
