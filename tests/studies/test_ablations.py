"""Ablations at toy size, and packed stores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_convergence import TINY

import ablations
from pack import Pack, pack
from reglue.data.store import Store
from reglue.errors import UserError
from reglue.jobs.compress import Compress, compress
from reglue.jobs.prepare import Prepare, prepare

OWN = ("--compressor", "conv-4", "--compressor-epochs", "1", "--compressor-hidden", "8", "--checkpoints", "1")
SHARED = tuple(
    argument
    for pair in zip(TINY[::2], TINY[1::2], strict=True)
    for argument in pair
    if not pair[0].startswith(("--redi", "--reglue", "--checkpoints"))
)


def test_each_question_gets_a_table_and_shared_arms_are_trained_once(
    tmp_path: Path, tiny_store: Path, tiny_images: Path
) -> None:
    store = Path(shutil.copytree(tiny_store, tmp_path / "store"))
    out = tmp_path / "ablations"
    arguments = ["--questions", "kl", "data", "guidance", *SHARED, *OWN]
    ablations.main([str(store), "--reference", str(tiny_images), "--out", str(out), *arguments])
    results = json.loads((out / "results.json").read_text())
    assert {"reglue-seed-0", "reglue-conv-16-kl-seed-0", "reglue-20-percent-seed-0", "guided-latents-seed-0"} <= set(
        results["arms"]
    )
    assert not (out / "guided-latents-seed-0" / "run").exists()
    protocol = json.loads((out / "guided-latents-seed-0" / "guided-00000004" / "samples.json").read_text())
    assert protocol["sampling"]["guidance"]["local_scale"] == protocol["sampling"]["guidance"]["cls_scale"] == 1
    assert "with KL 17.2" in (out / "tables" / "kl.md").read_text()
    guided = (out / "tables" / "guidance.md").read_text()
    assert guided.count("4, guided") == 4
    assert "compare orders and ratios" in guided
    assert len(Store.open(out / "data" / "20%")) == 6  # two of each of three classes, rounded up


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


def test_packing_keeps_files_below_the_limit(tmp_path: Path, tiny_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A megabyte is more than all of the tiny store, so repeat its rows.
    import pack as module

    many = torch.arange(len(Store.open(tiny_store))).repeat(100)
    monkeypatch.setattr(module, "rows_of", lambda store, options: many)
    packed = pack(Pack(tiny_store, tmp_path / "packed", megabytes=1))
    sizes = [shard.bytes for column in packed.manifest.columns.values() for shard in column.shards]
    assert max(sizes) <= 1_100_000
    assert len(packed.manifest.columns["features"].shards) > 1
    assert len(packed) == len(many)


def test_a_column_that_is_not_there_is_refused(tmp_path: Path, tiny_store: Path) -> None:
    with pytest.raises(UserError, match=r"--columns local\.conv-99"):
        pack(Pack(tiny_store, tmp_path / "packed", ("local.conv-99",)))
    assert not (tmp_path / "packed").exists()
