"""The alignment network: shapes, resampling, cosines, and its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from reglue.encoders.alignment import (
    AlignmentNetwork,
    AlignmentSpec,
    LatentSemantics,
    cosine_similarities,
    load_alignment,
    save_alignment,
    similarity_maps,
)
from reglue.errors import UserError

SPEC = AlignmentSpec(latent_channels=3, hidden=8, width=6, grid=(4, 5), encoder={"name": "some", "layers": [1, 2]})


@settings(max_examples=25)
@given(height=st.integers(1, 12), width=st.integers(1, 12))
def test_any_latent_grid_gives_the_encoders_grid(height: int, width: int) -> None:
    """Resampling before the last layer is what resampling its output would be."""
    torch.manual_seed(height * 100 + width)
    network = AlignmentNetwork(SPEC)
    latents = torch.randn(2, 3, height, width)
    patches, class_token = network(latents)
    assert patches.shape == (2, 6, 4, 5)
    assert class_token.shape == (2, 6)
    everywhere = network.to_patches(network.body(latents))
    expected = F.interpolate(everywhere, (4, 5), mode="bilinear", antialias=True)
    torch.testing.assert_close(patches, expected, atol=1e-5, rtol=1e-4)


def test_it_resamples_under_autocast_to_bfloat16() -> None:
    """What torch itself cannot do on a CPU."""
    with torch.autocast("cpu", torch.bfloat16):
        patches, _ = AlignmentNetwork(SPEC)(torch.randn(1, 3, 8, 10))
    assert patches.shape == (1, 6, 4, 5)
    assert patches.dtype == torch.bfloat16


def test_a_latent_position_speaks_for_its_own_place_alone() -> None:
    network = AlignmentNetwork(SPEC)
    latents = torch.randn(1, 3, 4, 5)
    changed = latents.clone()
    changed[..., 2, 3] += 1
    before, after = network(latents), network(changed)
    moved = (before.patches != after.patches).any(1)[0]
    assert moved.nonzero().tolist() == [[2, 3]]
    assert (before.class_token != after.class_token).all()


def test_other_latents_are_refused() -> None:
    with pytest.raises(ValueError, match="3 channels"):
        AlignmentNetwork(SPEC)(torch.randn(1, 4, 8, 8))


def test_cosines_do_not_see_lengths() -> None:
    patches, class_token = torch.randn(2, 6, 4, 5), torch.randn(2, 6)
    same = cosine_similarities(LatentSemantics(patches * 3, class_token * 0.1), patches, class_token)
    torch.testing.assert_close(same, (torch.ones(2), torch.ones(2)))
    opposite = cosine_similarities(LatentSemantics(-patches, -class_token), patches, class_token)
    torch.testing.assert_close(opposite, (-torch.ones(2), -torch.ones(2)))


def test_a_similarity_map_is_one_at_its_reference() -> None:
    features = torch.randn(2, 6, 3, 5)
    maps = similarity_maps(features, (1.0, 0.0))
    assert maps.shape == (2, 3, 5)
    torch.testing.assert_close(maps[:, 2, 0], torch.ones(2))
    expected = F.cosine_similarity(features[0, :, 1, 4], features[0, :, 2, 0], dim=0)
    torch.testing.assert_close(maps[0, 1, 4], expected)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    network = AlignmentNetwork(SPEC)
    save_alignment(network, tmp_path / "alignment.safetensors")
    loaded = load_alignment(tmp_path)
    assert loaded.spec == SPEC
    assert not loaded.training
    latents = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(loaded(latents), network(latents), rtol=0, atol=0)


@pytest.mark.parametrize("damage", ["absent", "cut", "no metadata", "other weights"])
def test_a_file_that_is_none_is_named(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "alignment.safetensors"
    save_alignment(AlignmentNetwork(SPEC), file)
    match damage:
        case "absent":
            file.unlink()
        case "cut":
            file.write_bytes(file.read_bytes()[:-10])
        case "no metadata":
            save_file(load_file(file), file)
        case _:
            save_alignment(AlignmentNetwork(SPEC), file)
            content = file.read_bytes().replace(b'\\"hidden\\": 8', b'\\"hidden\\": 9')
            assert content != file.read_bytes()
            file.write_bytes(content)
    with pytest.raises(UserError, match=r"alignment\.safetensors") as caught:
        load_alignment(tmp_path)
    assert "\n" not in str(caught.value)
