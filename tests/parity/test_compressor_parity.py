"""The compressor against the numbers of its published implementation (REGLUE_GOLDEN names another folder of them)."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from reglue.encoders.compressors import conv_compressor_from_published, resize

TOLERANCE = 2e-5  # ‖ours − golden‖ / ‖golden‖


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    folder = Path(os.environ.get("REGLUE_GOLDEN", Path(__file__).parent / "golden"))
    return load_file(folder / "reglue.safetensors")


def distance(ours: Tensor, expected: Tensor) -> float:
    assert ours.shape == expected.shape
    return float((ours - expected).norm() / expected.norm())


@torch.no_grad()
def test_published_compressor_gives_the_golden_numbers(golden):
    published = {key.removeprefix("compressor."): t for key, t in golden.items() if key.startswith("compressor.")}
    expected = {key.removeprefix("compressor_io."): t for key, t in golden.items() if key.startswith("compressor_io.")}
    compressor = conv_compressor_from_published(published, expected["mean"], expected["std"])

    code = compressor.encode(expected["features"])

    assert distance(code, expected["code"]) < TOLERANCE
    assert distance(compressor.expand(code), expected["reconstruction"]) < TOLERANCE
    local = expected["local"]
    assert distance(resize(code, (local.shape[2], local.shape[3])), local) < TOLERANCE


@torch.no_grad()
def test_keys_without_module_prefix_are_the_same_compressor(golden):
    published = {key.removeprefix("compressor."): t for key, t in golden.items() if key.startswith("compressor.")}
    bare = {key.removeprefix("module."): t for key, t in published.items()}
    mean, std = golden["compressor_io.mean"], golden["compressor_io.std"]
    assert (
        conv_compressor_from_published(published, mean, std).weights_sha256()
        == conv_compressor_from_published(bare, mean, std).weights_sha256()
    )
