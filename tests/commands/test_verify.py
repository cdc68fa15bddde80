"""`verify`: damage that no size tells is found, named in full, and told apart from another store."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers import run_reglue
from reglue.commands.prepare import Prepare, prepare
from reglue.commands.verify import Verify, verify
from reglue.errors import UserError
from reglue.training import checkpoints


def flip_last_byte(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.fixture
def store(tiny_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_store, tmp_path / "store"))


def test_a_copy_is_as_it_was_written(store: Path) -> None:
    result = run_reglue("verify", store)
    shards = list(store.glob("*.safetensors"))
    compressors = list(store.glob("compressors/*"))
    size = sum(file.stat().st_size for file in (*shards, *store.glob("compressors/*/*")) if file.is_file())
    parts = len(shards) + len(compressors)
    assert f"{store}: {parts} parts of {size:,} bytes in all are as they were written" in result.stdout


def test_every_damaged_file_is_named(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip_last_byte(store / "latent-00001.safetensors")
    (store / "cls-00000.safetensors").unlink()
    with pytest.raises(UserError, match=r"2 of .* parts are missing or damaged") as raised:
        verify(Verify(store))
    assert len(str(raised.value).splitlines()) == 1
    told = capsys.readouterr().err
    for name in ("latent-00001", "cls-00000"):
        assert f"{name}.safetensors is missing or damaged" in told


def test_a_damaged_compressor_is_named(store: Path) -> None:
    flip_last_byte(store / "compressors" / "conv-4" / "compressor.safetensors")
    with pytest.raises(UserError, match=r"1 of .*first: .*compressors/conv-4"):
        verify(Verify(store))


def test_a_run_is_read_and_its_store_verified(
    tiny_run: Path,
    store: Path,
    tiny_images: Path,
    tiny_autoencoder: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    record = json.loads((run / "run.json").read_text())

    def of_store(**changes: str) -> Path:
        (run / "run.json").write_text(json.dumps(record | changes))
        return run

    assert verify(Verify(of_store(store=str(store)))) == run
    shown = capsys.readouterr().out
    assert "checkpoints 6 are as they were written" in shown
    with pytest.raises(UserError, match="not the store that"):
        verify(Verify(of_store(store=str(store), store_hash="0" * 64)))
    another = tmp_path / "another"
    prepare(Prepare(tiny_images, another, 16, tiny_autoencoder, "none", workers=0, device="cpu"))
    with pytest.raises(UserError, match="another is whole, but not the store that"):
        verify(Verify(of_store(store=str(another))))
    flip_last_byte(store / "latent-00000.safetensors")
    with pytest.raises(UserError, match="parts are missing or damaged"):
        verify(Verify(of_store(store=str(store))))
    verify(Verify(of_store(store=str(tmp_path / "gone"))))
    assert "is not there (any more), and was not verified" in capsys.readouterr().out
    weights = run / "checkpoints" / "00000006" / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"ema\.safetensors is damaged"):
        verify(Verify(run))


@pytest.mark.parametrize("content", ['{"step": 5}', '{"step": 0}', '{"step": -6}', '{"step": "6"}', "{}", None])
def test_a_checkpoint_is_of_the_step_that_its_folder_says(content: str | None, tiny_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    progress = run / checkpoints.FOLDER / "00000006" / checkpoints.PROGRESS
    progress.write_text(content) if content else progress.unlink()
    layer = nn.Linear(1, 1)
    for read in (
        lambda: verify(Verify(run)),
        lambda: checkpoints.restore(progress.parent, layer, {}, torch.optim.AdamW(layer.parameters())),
    ):
        with pytest.raises(UserError, match=r"00000006/progress\.json is (damaged|missing)"):
            read()
