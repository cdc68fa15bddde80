"""What tests of several commands need."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL


@pytest.fixture(scope="session")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A KL autoencoder of the published four channels, at half the size."""
    folder = tmp_path_factory.mktemp("autoencoder")
    torch.manual_seed(1)
    network = AutoencoderKL(
        block_out_channels=(8, 8),  # type: ignore[reportArgumentType], annotated there as tuples of one
        down_block_types=("DownEncoderBlock2D",) * 2,  # type: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 2,  # type: ignore[reportArgumentType]
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    network.save_pretrained(folder)
    return str(folder)
