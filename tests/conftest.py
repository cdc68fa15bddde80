"""Small real artifacts on disk: images, networks of timm, diffusers and torch-fidelity, a store, a run on it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from hypothesis import HealthCheck, settings
from safetensors.torch import save_file

from helpers import TINY_RECIPE, draw_images
from reglue.commands.compress import Compress, compress
from reglue.commands.prepare import Prepare, prepare

# The tests run side by side, one thread each: more of them would only wait for each other. So do the processes that
# tests start, which may keep their byte code, since compiling takes most of their time.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# On a machine that does other work a test may take its time.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # As for whatever a script starts in the background; the processes that tests interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What needs a GPU is skipped without one, before any fixture is made."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU")


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("images") / "shapes", per_class=8)


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A ViT of five blocks on 8×8 patches, in timm's folder layout."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 5, "num_heads": 2}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)
    save_file(network.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": "vit_tiny_patch16_224",
        "model_args": sizes,
        "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
        "reglue_input": {"image_pixels_per_patch": 4, "minimum_input": 16},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="session")
def random_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Inception network with random weights: as large as the real one, since FID has no smaller."""
    from reglue.metrics.inception_network import InceptionNetwork

    file = tmp_path_factory.mktemp("inception") / "random.safetensors"
    torch.manual_seed(0)
    save_file(InceptionNetwork().state_dict(), file)
    return file


@pytest.fixture(scope="session")
def random_lpips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VGG16 and the layers of LPIPS with random weights: as large as the real ones."""
    from reglue.metrics.perceptual import Lpips

    file = tmp_path_factory.mktemp("lpips") / "random.safetensors"
    torch.manual_seed(0)
    lpips = Lpips()
    for name, weights in lpips.named_parameters():
        with torch.no_grad():
            weights.uniform_(0, 1) if name.startswith("layers") else weights.normal_(0, 0.03)
    save_file(lpips.state_dict(), file)
    return file


@pytest.fixture(scope="session")
def tiny_autoencoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A KL autoencoder of three latent channels at half the size, in diffusers' folder layout."""
    folder = tmp_path_factory.mktemp("autoencoder")
    torch.manual_seed(0)
    network = AutoencoderKL(
        block_out_channels=(8, 8),  # type: ignore[reportArgumentType], annotated there as tuples of one
        down_block_types=("DownEncoderBlock2D",) * 2,  # type: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 2,  # type: ignore[reportArgumentType]
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=4,
        sample_size=16,
        mid_block_add_attention=False,
    )
    network.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_store(
    tmp_path_factory: pytest.TempPathFactory, tiny_images: Path, tiny_encoder: str, tiny_autoencoder: str
) -> Path:
    """24 images of 16 px: latents 3×8×8, features 64×4×4, compressors conv-4 and pca-4."""
    folder = tmp_path_factory.mktemp("store") / "store"
    prepare(
        Prepare(
            tiny_images,
            folder,
            16,
            tiny_autoencoder,
            tiny_encoder,
            features=True,
            workers=0,
            shard_size=10,
            device="cpu",
        )
    )
    compress(Compress(folder, "conv", channels=4, hidden=8, epochs=1, device="cpu"))
    compress(Compress(folder, "pca", channels=4, device="cpu"))
    return folder


@pytest.fixture(scope="session")
def dropping_run(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Path:
    """The same, as if it had been trained with some local maps dropped."""
    from reglue.run import RunRecord

    run = Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("dropping") / "run"))
    record = RunRecord.read(run)
    recipe = replace(record.recipe, local=replace(record.recipe.local, dropout=0.2))
    replace(record, recipe=recipe).write(run)
    return run


@pytest.fixture(autouse=True)
def shared_stay_as_they_are() -> Iterator[None]:
    """No test leaves anything in, or takes anything from, the folders that all share."""
    before = {folder: sorted(folder.rglob("*")) for folder in SHARED}
    yield
    for folder, content in before.items():
        changed = {*content} ^ {*folder.rglob("*")}
        assert not changed, f"the test works on a folder that others share, not on a copy: {min(changed)}"


SHARED: list[Path] = []
"""Folders of this session that are made once."""


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path) -> Path:
    """A REGLUE run of six steps."""
    from reglue.cli import parse
    from reglue.commands.train import train

    run = tmp_path_factory.mktemp("run") / "run"
    arguments = ["--store", str(tiny_store), "--out", str(run), *TINY_RECIPE, "--optimisation.steps=6"]
    train(parse(["train", "reglue", *arguments]))
    SHARED.extend((run, tiny_store))
    return run
