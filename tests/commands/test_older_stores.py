"""Stores that were written before a field was added to what describes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import reglue.data.store
from reglue.commands.prepare import Prepare, prepare
from reglue.data.store import Store
from reglue.errors import UserError

LATER = {
    "encoder": ["steps", "final_norm", "pooling", "prefix_tokens", "registers"],
    None: ["features_dtype", "precision"],
}
"""Fields of the manifest, or of a part of it, that came after its format was fixed."""


@pytest.fixture
def older_store(tiny_store: Path, tmp_path: Path) -> Path:
    """The tiny store as an earlier version of the program left it, hash and all."""
    folder = Path(shutil.copytree(tiny_store, tmp_path / "older"))
    manifest = json.loads((folder / "manifest.json").read_text())
    for part, names in LATER.items():
        for name in names:
            del (manifest[part] if part else manifest)[name]
    manifest["hash"] = reglue.data.store._hash(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def command(older_store: Path, tiny_images: Path, tiny_encoder: str, tiny_autoencoder: str) -> dict:
    """The options of the tiny store."""
    options = {"images": tiny_images, "out": older_store, "resolution": 16, "autoencoder": tiny_autoencoder}
    return {**options, "encoder": tiny_encoder, "features": True, "workers": 0, "shard_size": 10, "device": "cpu"}


def test_an_older_store_opens_and_means_the_same(older_store: Path, tiny_store: Path):
    older, store = Store.open(older_store), Store.open(tiny_store)
    assert older.manifest.encoder == store.manifest.encoder
    assert older.manifest.autoencoder == store.manifest.autoencoder


def test_the_same_command_again_finds_an_older_store_complete(command: dict, capsys: pytest.CaptureFixture[str]):
    before = (command["out"] / "manifest.json").read_bytes()
    prepare(Prepare(**command))
    assert "complete already" in capsys.readouterr().out
    assert (command["out"] / "manifest.json").read_bytes() == before


def test_what_an_older_store_could_not_have_is_refused(command: dict):
    with pytest.raises(UserError, match=r"encoder\.final_norm True .*, not False"):
        prepare(Prepare(**command, final_norm=False))
    with pytest.raises(UserError, match="precision float32, not bfloat16"):
        prepare(Prepare(**command, precision="bfloat16"))
