"""Large images are decoded in tiles: as whole, but for what a tile cannot see, and in the memory of a tile."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from encoders.test_autoencoders import (
    drawn_digit,
    random_images,
    write_asymmetric,
    write_dc,
    write_flux2,
    write_kl,
    write_taef2,
    write_tiny,
    write_vq,
)
from helpers import run_reglue
from reglue.encoders import tiling
from reglue.encoders.autoencoders import Autoencoder, AutoencoderSpec, Moments, RaeAutoencoder, load_autoencoder
from reglue.graphs import GraphAutoencoder
from reglue.sampling import Sampling


class Enlarging(Autoencoder):
    """Every latent pixel becomes a square of its value."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.spec = AutoencoderSpec("enlarging", "none", None, 3, factor, (0.0,) * 3, (1.0,) * 3)

    def encode(self, images: Tensor) -> Moments:
        return Moments(images[:, :, :: self.spec.downsampling, :: self.spec.downsampling], None)

    def decode(self, latents: Tensor) -> Tensor:
        factor = self.spec.downsampling
        return latents.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def sizes_decoded(autoencoder: Autoencoder) -> list[tuple[int, ...]]:
    """The shapes of all that the autoencoder decodes from now on."""
    found, whole = list[tuple[int, ...]](), autoencoder.decode

    def decode(latents: Tensor) -> Tensor:
        found.append(tuple(latents.shape))
        return whole(latents)

    autoencoder.decode = decode  # type: ignore[method-assign]
    return found


@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 8]), st.integers(1, 100))
def test_tiles_cover_images_of_any_size(count: int, height: int, width: int, factor: int, tile: int) -> None:
    autoencoder, latents = Enlarging(factor), torch.rand(count, 3, height, width) * 2 - 1
    whole = autoencoder.decode(latents)
    sizes = sizes_decoded(autoencoder)
    torch.testing.assert_close(tiling.decode(autoencoder, latents, tile), whole, rtol=0, atol=1e-6)
    side = max(tile // factor, tiling.SMALLEST)
    large = max(height, width) > side
    assert {(b, min(h, side), min(w, side)) for b, _, h, w in sizes} == {
        (1 if large else count, min(height, side), min(width, side))
    }


KINDS = {
    write_kl: 0.5,
    write_asymmetric: 0.5,
    write_vq: 0.6,
    write_flux2: 0.35,
    write_tiny: 0.05,
    write_dc: 0.1,
    write_taef2: 0.2,
}
"""How far tiles may be from the whole, in standard deviations: noise, through random networks of which all but three
attend to the whole image."""


@pytest.mark.parametrize("write", KINDS, ids=lambda write: write.__name__.removeprefix("write_"))
def test_every_kind_of_autoencoder_decodes_in_tiles(write: Callable[[Path], Any], tmp_path: Path) -> None:
    write(tmp_path)
    autoencoder = load_autoencoder(str(tmp_path))
    factor = autoencoder.spec.downsampling
    latents = autoencoder.encode(random_images(16 * factor, 24 * factor)).mean
    whole = autoencoder.decode(latents)
    assert torch.equal(tiling.decode(autoencoder, latents, 24 * factor), whole), "as large as a tile"
    assert torch.equal(tiling.decode(autoencoder, latents, 0), whole)
    sizes = sizes_decoded(autoencoder)
    tiled = tiling.decode(autoencoder, latents, 12 * factor)
    assert {size[2:] for size in sizes} == {(12, 12)}
    assert tiled.shape == whole.shape
    assert ((tiled - whole).square().mean() / whole.var()).sqrt() < KINDS[write]
    del autoencoder.decode
    assert torch.equal(autoencoder.decode(latents), whole), "nothing is left behind"


def test_a_picture_has_no_seams() -> None:
    autoencoder = load_autoencoder("starter")
    latents = autoencoder.encode(drawn_digit(128)[:, :, 16:112]).mean
    whole, tiled = autoencoder.decode(latents), tiling.decode(autoencoder, latents, 64)
    error = ((tiled - whole) / 2).square().mean()
    assert -10 * error.log10() > 45, "the autoencoder itself is 25 to 30 dB from the picture"
    jumps = [(image[..., 1:] - image[..., :-1]).abs().max() for image in (whole, tiled)]
    assert jumps[1] < 1.1 * jumps[0]


def test_threads_share_a_decoder() -> None:
    autoencoder = load_autoencoder("starter")
    pictures = [torch.randn(1, 4, 12, 20, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    alone = [tiling.decode(autoencoder, latents, 32) for latents in pictures]
    with ThreadPoolExecutor(4) as threads:
        together = [*threads.map(lambda latents: tiling.decode(autoencoder, latents, 32), pictures)]
    assert all(map(torch.equal, together, alone))


def test_what_knows_one_size_is_left_whole() -> None:
    assert RaeAutoencoder.of_one_size
    assert GraphAutoencoder.of_one_size
    autoencoder, latents = Enlarging(2), torch.rand(1, 3, 64, 64)
    autoencoder.of_one_size = True
    sizes = sizes_decoded(autoencoder)
    tiling.decode(autoencoder, latents, 8)
    assert sizes == [(1, 3, 64, 64)]


def test_sample_decodes_in_tiles_and_says_so(tiny_run: Path, tmp_path: Path) -> None:
    drawn = {}
    for tile in ("8", "0", str(Sampling.tile)):
        out = tmp_path / tile
        run_reglue("sample", tiny_run, "--out", out, "--count=2", "--steps=2", "--device=cpu", f"--tile={tile}")
        assert json.loads((out / "samples.json").read_text())["sampling"]["tile"] == int(tile)
        drawn[tile] = np.stack([np.asarray(Image.open(file)).astype(int) for file in sorted(out.glob("*.png"))])
    assert (drawn["0"] == drawn[str(Sampling.tile)]).all()
    assert 0 < abs(drawn["8"] - drawn["0"]).mean() < 20
