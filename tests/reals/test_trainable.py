"""Autoencoders in training: their posterior, and which can be trained further."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from torch.distributions import Normal, kl_divergence

from reglue.encoders.autoencoders import load_autoencoder
from reglue.errors import UserError
from reglue.reals.config import Adversary, Architecture, AutoencoderRecipe, Kl, LatentAlignment, Perceptual
from reglue.reals.trainable import AlignedAutoencoder, network_of, new_network

SMALL = Architecture(widths=(4, 8, 8), latent_channels=5, layers_per_block=1, norm_groups=2, attention=False)


def test_a_new_network_has_the_sizes_asked_for() -> None:
    model = AlignedAutoencoder(new_network(SMALL, (16, 24)), None)
    out = model(torch.randn(2, 3, 16, 24), torch.randn(2, 5, 4, 6))
    assert out.images.shape == (2, 3, 16, 24)
    assert out.latents.shape == (2, 5, 4, 6)
    assert out.semantics is None
    assert SMALL.downsampling == 4


def test_divergence_and_draw_are_those_of_the_posterior() -> None:
    model = AlignedAutoencoder(new_network(SMALL, (16, 16)), None)
    noise = torch.randn(3, 5, 4, 4)
    out = model(torch.randn(3, 3, 16, 16), noise)
    posterior = Normal(out.mean, (out.log_variance / 2).exp())
    expected = kl_divergence(posterior, Normal(0.0, 1.0)).mean((1, 2, 3))
    torch.testing.assert_close(out.kl(), expected)
    torch.testing.assert_close(out.latents, posterior.mean + posterior.stddev * noise)


def test_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=3,
    ).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(UserError, match="is an AutoencoderTiny; give an AutoencoderKL"):
        network_of(load_autoencoder(str(tmp_path)))


def test_an_autoencoder_of_grey_images_is_refused(tiny_autoencoder: str, tmp_path: Path) -> None:
    config = json.loads((Path(tiny_autoencoder) / "config.json").read_text())
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    grey: Any = AutoencoderKL.from_config({**config, "in_channels": 1, "out_channels": 1})
    grey.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="takes images of 1 channel and gives 1; give one of RGB images"):
        network_of(load_autoencoder(str(tmp_path)))


def test_parts_without_weight_have_no_term() -> None:
    recipe = AutoencoderRecipe(
        perceptual=Perceptual(0),
        kl=Kl(0),
        alignment=LatentAlignment(0, class_weight=0),
        adversary=Adversary(0.5, start=7),
    )
    assert recipe.loss_weights(6) == {"reconstruction": 1}
    assert recipe.loss_weights(7) == {"reconstruction": 1, "adversary": 0.5}
    assert not recipe.alignment.present
    assert LatentAlignment(0, class_weight=0.1).present
    scheduled = AutoencoderRecipe(kl=Kl(1.0, schedule=((5, 2.0),)))
    assert [scheduled.loss_weights(step)["kl"] for step in (4, 5)] == [1, 2]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: Architecture(widths=(6, 9), norm_groups=3) and Architecture(widths=(6, 8), norm_groups=3),
            "8 is not a mul",
        ),
        (lambda: Architecture(widths=()), "give at least one"),
        (lambda: Architecture(latent_channels=0), "architecture.latent_channels 0"),
        (lambda: Adversary(layers=0), "adversary.layers 0"),
        (lambda: LatentAlignment(hidden=0), "alignment.hidden 0"),
        (lambda: Perceptual(network=()), "perceptual.network"),
        (lambda: AutoencoderRecipe(kl=Kl(-1)), "kl.weight -1"),
        (lambda: AutoencoderRecipe(alignment=LatentAlignment(class_weight=-1)), "alignment.class_weight -1"),
        (lambda: AutoencoderRecipe(kl=Kl(1, schedule=((5, -2.0),))), "kl.schedule -2"),
    ],
)
def test_impossible_values_are_named(make, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make()
