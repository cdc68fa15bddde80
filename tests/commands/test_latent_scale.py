"""The scale of latents, from the autoencoder's folder or the store's statistics, through training to the image."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import reglue
from helpers import TINY_RECIPE
from reglue.cli import parse
from reglue.commands.prepare import Prepare, prepare
from reglue.commands.train import train
from reglue.config import Latent, Recipe
from reglue.data.batches import modalities
from reglue.data.store import Store
from reglue.errors import UserError
from reglue.run import RunRecord

Trained = Callable[..., Path]


@pytest.fixture
def autoencoder(tiny_autoencoder: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_autoencoder, tmp_path / "autoencoder"))


@pytest.fixture
def trained(autoencoder: Path, tiny_images: Path, tmp_path: Path) -> Trained:
    """Prepares a store of latents alone, then makes one training step."""

    def run(*options: str) -> Path:
        prepare(Prepare(tiny_images, tmp_path / "store", 16, str(autoencoder), "none", workers=0, device="cpu"))
        where = ["--store", str(tmp_path / "store"), "--out", str(tmp_path / "run")]
        train(parse(["train", "sit", *where, *TINY_RECIPE, "--optimisation.steps=1", *options]))
        return tmp_path / "run"

    return run


def test_mean_and_std_of_the_folder_are_used_and_checked(trained: Trained, autoencoder: Path):
    mean_std = autoencoder / "mean_std.json"
    mean_std.write_text('{"mean": 0.25, "std": [2, 4, 8]}')
    run = trained()
    scaled = RunRecord.read(run).denoiser.modalities[0].normalisation
    assert scaled
    assert (scaled.shift, scaled.scale) == ((0.25,) * 3, (0.5, 0.25, 0.125))
    model = reglue.load(run, device="cpu")
    state = {"latent": torch.randn(1, 3, 8, 8)}
    raw = state["latent"] * torch.tensor([2.0, 4.0, 8.0]).view(1, 3, 1, 1) + 0.25
    torch.testing.assert_close(model.raw(state, "latent"), raw)

    mean_std.write_text('{"mean": 0.25, "std": [2, 4, 7]}')
    with pytest.raises(UserError, match=f"autoencoder {autoencoder} is not .* trained with, scale differ"):
        reglue.load(run, device="cpu")
    mean_std.unlink()
    with pytest.raises(UserError, match=r"shift, scale differ: put the old one back"):
        reglue.load(run, device="cpu")


def test_a_store_is_not_continued_with_another_mean_and_std(autoencoder: Path, tiny_images: Path, tmp_path: Path):
    options = Prepare(tiny_images, tmp_path / "store", 16, str(autoencoder), "none", workers=0, device="cpu")
    prepare(options)
    (autoencoder / "mean_std.json").write_text('{"mean": 0.25, "std": 1}')
    with pytest.raises(UserError, match=r"autoencoder\.shift"):
        prepare(options)


def test_one_scale_makes_all_latents_together_of_unit_variance(tiny_store: Path):
    store = Store.open(tiny_store)
    one, each = (
        modalities(store, Recipe("sit", latent=Latent(unit_variance=True, one_scale=one)))[0].normalisation
        for one in (True, False)
    )
    assert one
    assert each
    assert len(set(one.shift)) == len(set(one.scale)) == 1
    assert len(set(each.scale)) == 3
    # What a model is given is drawn from the moments: its variance is that of the means and, within, the stds'.
    moments = {name: tensor.double() for name, tensor in store.read("latent", torch.arange(len(store))).items()}
    expected_std = (moments["mean"].var(correction=0) + moments["std"].square().mean()).sqrt()
    assert one.shift[0] == pytest.approx(float(moments["mean"].mean()))
    assert 1 / one.scale[0] == pytest.approx(float(expected_std))


def test_one_scale_is_kept_with_the_run(trained: Trained):
    run = trained("--latent.unit-variance", "--latent.one-scale")
    record = RunRecord.read(run)
    assert record.recipe.latent.one_scale
    assert record.denoiser.modalities[0].normalisation
    assert len(set(record.denoiser.modalities[0].normalisation.scale)) == 1
    assert reglue.load(run, device="cpu").generate([0], seed=1)[0].size == (16, 16)


def test_one_scale_alone_is_refused():
    with pytest.raises(UserError, match=r"latent\.one_scale .* add latent\.unit_variance"):
        Latent(one_scale=True)


def test_a_replacement_must_make_images_of_the_same_size(trained: Trained, autoencoder: Path, tmp_path: Path):
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    run = trained()
    widths, blocks = (8, 8, 8), (1, 1, 1)
    AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
        latent_channels=3,
    ).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"^autoencoder .*other has 4 pixels of a latent along a side, the run has 2"):
        reglue.load(run, device="cpu", autoencoder=str(tmp_path / "other"))
    assert reglue.load(run, device="cpu", autoencoder=str(autoencoder))
