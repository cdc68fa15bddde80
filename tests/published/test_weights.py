"""Files of the published code bases: containers, old names, and what is refused."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reglue.diffusion.denoiser import Denoiser, DenoiserConfig
from reglue.diffusion.modalities import Modality
from reglue.errors import UserError
from reglue.published.containers import read_official
from reglue.published.families import family_of
from reglue.published.weights import export_official, import_official, reverse_time

GOLDEN = Path(__file__).parent.parent / "parity" / "golden"


def published(method: str) -> dict[str, Tensor]:
    tensors = load_file(GOLDEN / f"{method}.safetensors")
    return {name.removeprefix("weights."): value for name, value in tensors.items() if name.startswith("weights.")}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("container", ["bare", "ema", "wrapped", "safetensors"])
def test_every_container_gives_the_averaged_weights(container: str, tmp_path: Path) -> None:
    weights = published("repa")
    file = tmp_path / ("model.safetensors" if container == "safetensors" else "0400000.pt")
    if container == "safetensors":
        save_file(weights, file)
    elif container == "bare":
        torch.save(weights, file)
    elif container == "wrapped":
        torch.save({f"module.{name}": value for name, value in weights.items()}, file)
    else:
        other = {name: value + 1 for name, value in weights.items()}
        arguments = argparse.Namespace(model="SiT-XL/2", encoder_depth=8)
        torch.save({"model": other, "ema": weights, "opt": {"state": {}}, "args": arguments, "steps": 400_000}, file)
    ours = import_official(read_official(file).weights, heads=4, alignment_depth=2)
    assert ours.family == "repa"
    assert_equal(ours.weights, import_official(weights, heads=4, alignment_depth=2).weights)


class Malicious:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['REGLUE_TEST_TOUCHED']}",)


@pytest.mark.parametrize("protocol", ["torch", "plain"])
def test_a_malicious_pickle_executes_nothing(protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touched = tmp_path / "touched"
    monkeypatch.setenv("REGLUE_TEST_TOUCHED", str(touched))
    file = tmp_path / "innocent.pt"
    if protocol == "torch":
        torch.save({"ema": published("sit"), "args": Malicious()}, file)
    else:
        file.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(UserError, match="innocent"):
        read_official(file)
    assert not touched.exists()
    # The file is as dangerous as it is meant to be.
    with pytest.raises(Exception):  # noqa: B017, PT011
        torch.load(file, weights_only=True)


def test_old_repa_names_of_late_blocks() -> None:
    weights = published("repa")
    old = {
        name.replace("blocks.2.", "decoder_blocks.0.") if name.startswith("blocks.2.") else name: value
        for name, value in weights.items()
    }
    assert old.keys() != weights.keys()
    assert_equal(
        import_official(old, heads=4, alignment_depth=2).weights,
        import_official(weights, heads=4, alignment_depth=2).weights,
    )


def test_redis_projector_is_singular() -> None:
    weights = published("repa")
    renamed = {name.replace("projectors.0.", "projector."): value for name, value in weights.items()}
    assert import_official(renamed, heads=4, alignment_depth=2).config.alignment_width == 20


def test_reversing_time_twice_changes_nothing() -> None:
    weights = import_official(published("reglue"), heads=4, alignment_depth=2).weights
    once = reverse_time(weights)
    assert not torch.equal(once["velocity.weight"], weights["velocity.weight"])
    for name, value in reverse_time(once).items():
        torch.testing.assert_close(value, weights[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("final_layer.linear.weight"), "no final_layer.linear.weight"),
        (lambda w: w.pop("blocks.1.attn.qkv.bias"), "blocks.1.attention.qkv.bias"),
        (lambda w: w.pop("t_embedder.mlp.0.weight"), "time_embedding.0.weight"),
        (lambda w: w.update({"t_embedder.mlp.0.weight": torch.zeros(48, 9)}), "time_embedding.0.weight"),
        (lambda w: w.update({"x_embedder.proj.weight": torch.zeros(48)}), r"x_embedder.proj.weight has shape \(48,\)"),
        (lambda w: [w.pop(name) for name in list(w) if name.startswith("blocks.")], "blocks"),
        (lambda w: w.update({"something.else": torch.zeros(1)}), "unknown weight something.else"),
        (lambda w: w.update({"final_layer.linear.weight": torch.zeros(17, 48)}), "17 rows"),
        (lambda w: w.update({"pos_embed": torch.zeros(1, 16, 40)}), "positions"),
        (lambda w: w.update({"pos_embed": torch.zeros(1, 15, 48)}), "not a square grid"),
    ],
)
def test_anything_else_is_refused_with_what_was_found(change, message: str) -> None:
    weights = published("sit")
    change(weights)
    with pytest.raises(UserError, match=message):
        import_official(weights, heads=4)


def test_unknown_width_asks_for_the_heads() -> None:
    with pytest.raises(UserError, match=r"give the number of attention heads with heads$"):
        import_official(published("sit"))


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_official(tmp_path / "gone.pt")
    for name in ("broken.pt", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"not a checkpoint at all")
        with pytest.raises(UserError, match=name):
            read_official(tmp_path / name)


def test_positions_counted_in_the_grid_of_another_run_are_published_as_they_are() -> None:
    """A model that was fine-tuned to another resolution."""
    latents = (Modality("latent", "map", 4),)
    config = DenoiserConfig(
        modalities=latents, grid=(8, 8), conditions={"class": 3}, depth=2, width=32, heads=2, position_grid=(2, 2)
    )
    denoiser = Denoiser(config)
    published = export_official(family_of(config), config, denoiser.state_dict())
    assert torch.equal(published["pos_embed"], denoiser.positions)
    back = import_official(published, heads=2).denoiser()
    assert torch.equal(back.positions, denoiser.positions)
