"""Files of the published code bases: containers, old names, and what is refused."""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import re
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from reglue.diffusion.denoiser import Denoiser, DenoiserConfig
from reglue.diffusion.modalities import Modality
from reglue.errors import UserError
from reglue.published.containers import read_official
from reglue.published.families import Family, family_of, refuse_unpublished
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


# ---- what the published classes can be built with


def published_shapes(
    *, channels: int, depth: int, width: int, patch: int, side: int, rows: int, z_dims: tuple[int, ...],
    hidden: int, with_token: bool, sigma: bool, projector: str,
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """The state dict of the published classes, from what they are built with. A class token is as wide as `z_dims`'s
    first, and there is always one side of patches."""

    def linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, side**2 + with_token, width),
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "y_embedder.embedding_table.weight": (rows, width),
        **linear("t_embedder.mlp.0", width, 256),
        **linear("t_embedder.mlp.2", width, width),
        **linear("final_layer.linear", patch**2 * channels * (1 + sigma), width),
        **linear("final_layer.adaLN_modulation.1", 2 * width, width),
    }
    for i in range(depth):
        shapes |= linear(f"blocks.{i}.attn.qkv", 3 * width, width) | linear(f"blocks.{i}.attn.proj", width, width)
        shapes |= linear(f"blocks.{i}.mlp.fc1", 4 * width, width) | linear(f"blocks.{i}.mlp.fc2", width, 4 * width)
        shapes |= linear(f"blocks.{i}.adaLN_modulation.1", 6 * width, width)
    for name, target in zip((projector, "projectors.1"), z_dims, strict=False):
        shapes |= linear(f"{name}.0", hidden, width) | linear(f"{name}.2", hidden, hidden)
        shapes |= linear(f"{name}.4", target, hidden)
    if with_token:
        shapes |= linear("final_layer.linear_cls", z_dims[0], width) | linear("cls_projectors2", width, z_dims[0])
        shapes |= {"wg_norm.weight": (width,), "wg_norm.bias": (width,)}
    return shapes


def exportable(config: DenoiserConfig) -> Family:
    family = family_of(config)
    refuse_unpublished(config)
    return family


@settings(max_examples=150)
@given(
    grid=st.sampled_from([(4, 4), (8, 8), (4, 8), (8, 4)]),
    channels=st.tuples(st.sampled_from([3, 4]), st.sampled_from([0, 5]), st.sampled_from([0, 16, 8])),
    aligned=st.sampled_from([0, 16]),
    patch=st.sampled_from([1, 2]),
    learn_sigma=st.booleans(),
    classes=st.sampled_from([0, 3]),
    has_null=st.booleans(),
    position_grid=st.sampled_from([None, (2, 2)]),
)
def test_what_is_exported_fits_a_published_class(
    grid: tuple[int, int], channels: tuple[int, int, int], aligned: int, patch: int, learn_sigma: bool, classes: int,
    has_null: bool, position_grid: tuple[int, int] | None,
) -> None:  # fmt: skip
    """Or it is refused by name."""
    latents, local, token = channels
    parts = [("latent", "map", latents), ("local", "map", local), ("cls", "token", token)]
    config = DenoiserConfig(
        modalities=tuple(
            Modality(n, kind, size, is_class_token=n == "cls")  # type: ignore[arg-type]
            for n, kind, size in parts
            if size
        ),
        grid=grid, conditions={"class": classes}, depth=2, width=32, heads=2, patch=patch, learn_sigma=learn_sigma,
        alignment_depth=1 if aligned else 0, alignment_width=aligned, alignment_hidden=24, position_grid=position_grid,
    )  # fmt: skip
    has_null = has_null or not classes
    sound = grid[0] == grid[1] and token in (0, aligned) and not (learn_sigma and (local or token or aligned))
    if not sound:
        with pytest.raises(UserError, match="publish"):
            exportable(config)
        return
    family = exportable(config)
    published = export_official(family, config, Denoiser(config).state_dict(), has_null=has_null)
    assert {name: tuple(value.shape) for name, value in published.items()} == published_shapes(
        channels=latents + local, depth=2, width=32, patch=patch, side=grid[0] // patch, rows=classes + has_null,
        z_dims=(aligned,) if aligned else (), hidden=24, with_token=token > 0, sigma=learn_sigma,
        projector="projector" if family == "redi" else "projectors.0",
    )  # fmt: skip
    back = import_official(published, latent_channels=latents, heads=2, classes=classes, alignment_depth=1)
    assert (back.config.classes, back.has_null) == (classes, has_null)


@settings(max_examples=40)
@given(method=st.sampled_from(["sit", "repa", "redi", "reg", "reglue"]), data=st.data())
def test_any_weights_are_a_model_or_refused(method: str, data: st.DataObject) -> None:
    weights = published(method)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(weights)))
        value = weights.pop(name)
        match data.draw(st.sampled_from(["rename", "number", "reshape", "drop", "type"])):
            case "rename":
                weights[name.replace(data.draw(st.sampled_from(name.split("."))), data.draw(st.text(max_size=6)))] = (
                    value
                )
            case "number":
                number = data.draw(st.sampled_from(["7", "999999999", "9" * 5000, "²", "-1"]))
                weights[re.sub(r"\d+", number, name)] = value
                weights[re.sub(r"(decoder_)?blocks\.\d+", f"decoder_blocks.{number}", name)] = value
            case "reshape":
                shape = data.draw(st.lists(st.integers(0, 5), max_size=5))
                weights[name] = torch.zeros(shape)
            case "type":
                weights[name] = value.to(data.draw(st.sampled_from([torch.int8, torch.bool, torch.float64])))
            case _:
                pass
    start = time.process_time()
    with contextlib.suppress(UserError):
        import_official(weights, heads=4, classes=data.draw(st.sampled_from([None, 0, 1000, 1001, -1])))
    assert time.process_time() - start < 3
