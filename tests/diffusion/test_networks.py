"""What backbones have in common, and what is theirs alone, whatever the weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reglue.diffusion.backbones import BACKBONES, UViT
from reglue.diffusion.backbones.parts import rotated
from reglue.diffusion.denoiser import ConvolutionalProjector, Denoiser, DenoiserConfig
from reglue.diffusion.embeddings import rotation_of
from reglue.diffusion.modalities import Modality, State
from reglue.diffusion.specs import ALWAYS, OWN_PARTS, Blocks

OWN = OWN_PARTS["backbones.BACKBONES"]
ANYWHERE = ("rms_norm", "qk_norm", "rope", "swiglu", "convolution")
"""The parts that every backbone can have."""


def config(backbone: str, **changes: Any) -> DenoiserConfig:
    modalities = (Modality("latent", "map", 3), Modality("local", "map", 2), Modality("cls", "token", 5))
    sizes = {"grid": (4, 6), "conditions": {"class": 3}, "depth": 4, "width": 32, "heads": 4, "alignment_depth": 2}
    sizes |= {"alignment_width": 7, "alignment_hidden": 8}
    return DenoiserConfig(modalities=modalities, backbone=backbone, **{**sizes, **changes})


def awake(of: DenoiserConfig) -> Denoiser:
    """A model of which every weight has a say."""
    denoiser, drawn = Denoiser(of), torch.Generator().manual_seed(0)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=drawn)
    return denoiser


def state(of: DenoiserConfig, batch: int = 2) -> State:
    drawn = torch.Generator().manual_seed(1)
    return {name: torch.randn(batch, *size, generator=drawn) for name, size in of.shapes().items()}


def outputs(denoiser: Denoiser, x: State, t: Tensor | None = None) -> list[Tensor]:
    batch = len(x["latent"])
    labels = torch.arange(batch) % 3
    prediction = denoiser(x, torch.linspace(0.2, 0.9, batch) if t is None else t, {"class": labels})
    assert prediction.tap is not None
    return [*prediction.velocity.values(), prediction.tap]


@pytest.mark.parametrize("backbone", OWN)
@settings(max_examples=15)
@given(
    rows=st.integers(1, 3), columns=st.integers(1, 3), depth=st.integers(1, 4),
    parts=st.fixed_dictionaries({name: st.booleans() for name in ANYWHERE}),
)  # fmt: skip
def test_any_size_and_any_parts(backbone: str, rows: int, columns: int, depth: int, parts: dict[str, bool]) -> None:
    of = config(backbone, grid=(2 * rows, 2 * columns), depth=depth, blocks=Blocks(**parts), alignment_depth=1)
    x = state(of)
    latent, local, cls, tap = outputs(Denoiser(of), x)
    assert (latent.shape, local.shape, cls.shape) == (x["latent"].shape, x["local"].shape, x["cls"].shape)
    assert tap.shape == (2, rows * columns, 32)  # the token is none that alignment knows
    assert not latent.any(), "outputs begin at zero"


def parts_of(backbone: str) -> list[str]:
    """What can be asked for or left out besides what the backbone always has."""
    own, always = ("time_mlp",) if backbone == "uvit" else ("shift",), ALWAYS.get(backbone, Blocks())
    return [*own, *(name for name in ANYWHERE if not getattr(always, name))]


@pytest.mark.parametrize(("backbone", "part"), [(backbone, part) for backbone in OWN for part in parts_of(backbone)])
def test_every_part_changes_what_is_computed(backbone: str, part: str) -> None:
    of = config(backbone)
    plain, changed = awake(of), awake(replace(of, blocks=replace(of.blocks, **{part: not getattr(of.blocks, part)})))
    weights = plain.state_dict()
    shared = {n: v for n, v in changed.state_dict().items() if n in weights and v.shape == weights[n].shape}
    plain.load_state_dict({**weights, **shared})
    with torch.no_grad():
        ours, theirs = (outputs(denoiser, state(of))[0] for denoiser in (plain, changed))
    assert not torch.allclose(ours, theirs, atol=1e-3)


@pytest.mark.parametrize("backbone", OWN)
def test_blocks_that_compute_again_give_the_same_gradients(backbone: str) -> None:
    of = config(backbone)
    denoiser, x = awake(of), state(of)
    found: list[list[Tensor]] = []
    for recomputed in (0, 2, len(denoiser.backbone.blocks)):
        denoiser.zero_grad()
        denoiser.backbone.recomputed_blocks = recomputed
        torch.stack([part.square().mean() for part in outputs(denoiser, x)]).sum().backward()
        found.append([p.grad for p in denoiser.parameters() if p.grad is not None])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("backbone", OWN)
def test_time_and_condition_are_seen(backbone: str) -> None:
    of = config(backbone)
    denoiser, x = awake(of), {name: value[:1].expand(2, *value.shape[1:]) for name, value in state(of).items()}
    with torch.no_grad():
        at = denoiser(x, torch.tensor([0.4, 0.5]), {"class": torch.tensor([1, 1])}).velocity["latent"]
        of_class = denoiser(x, torch.tensor([0.4, 0.4]), {"class": torch.tensor([1, 2])}).velocity["latent"]
    for first, second in (at, of_class):
        assert (first - second).norm() / first.norm() > 1e-3


def test_the_tokens_of_time_and_condition_stand_behind_the_class_token_and_are_not_taken_for_patches() -> None:
    of = config("uvit")
    backbone = awake(of).backbone
    assert isinstance(backbone, UViT)
    seen: list[Tensor] = []
    backbone.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tokens, time, condition = (
        torch.full(size, value) for size, value in (((1, 7, 32), 1.0), ((1, 32), 2.0), ((1, 32), 3.0))
    )
    result, tap = backbone(tokens, time, condition, 2)
    placed = (seen[0] - backbone.positions.weight)[0].mean(1)
    torch.testing.assert_close(placed, torch.tensor([1.0, 3, 2, 1, 1, 1, 1, 1, 1]))
    assert tap is not None
    assert result.shape == tap.shape == tokens.shape


def test_long_skips_join_the_first_block_to_the_last() -> None:
    of = config("uvit", alignment_depth=0, alignment_width=0)
    backbone = awake(of).backbone
    given: dict[int, Tensor] = {}
    made: dict[int, Tensor] = {}

    def note(number: int, _: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        given[number], made[number] = inputs[-1], output

    for number, block in enumerate(backbone.blocks):
        block.register_forward_hook(partial(note, number))
    backbone(torch.randn(1, 7, 32), torch.randn(1, 32), torch.randn(1, 32))
    assert len(made) == 5
    assert given[3] is made[1]
    assert given[4] is made[0]


def test_a_model_without_conditions_has_no_token_for_them() -> None:
    with_condition, without = (config("uvit", conditions=conditions) for conditions in ({"class": 0}, {}))
    places = [Denoiser(of).state_dict()["backbone.positions.weight"].shape[0] for of in (with_condition, without)]
    assert places == [1 + 2 + 6, 1 + 1 + 6]


def test_rotations_depend_on_distances_alone() -> None:
    rotation = rotation_of((5, 7), 8, leading=1)
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    products = rotated(q.expand(36, 8), rotation) @ rotated(k.expand(36, 8), rotation).T
    patches = products[1:, 1:].view(5, 7, 5, 7)
    torch.testing.assert_close(patches[1, 2, 3, 5], patches[0, 0, 2, 3])
    torch.testing.assert_close(patches[4, 1, 2, 3], patches[3, 0, 1, 2])
    assert abs(patches[0, 0, 0, 1] - patches[0, 0, 1, 0]) > 1e-3
    assert torch.equal(rotated(q, rotation[:, 0]), q), "the class token is not turned"


def test_positions_of_a_finer_grid_lie_between() -> None:
    coarse, fine = rotation_of((2, 3), 8), rotation_of((4, 6), 8, counted_in=(2, 3))
    assert torch.equal(fine.view(2, 4, 6, 4)[:, ::2, ::2], coarse.view(2, 2, 3, 4))


def test_the_convolutional_projector_sees_neighbours_and_the_class_token_alone() -> None:
    projector = ConvolutionalProjector(6, 5, (3, 4))
    tokens = torch.randn(2, 1 + 12, 6, generator=torch.Generator().manual_seed(0))
    result = projector(tokens)
    assert result.shape == (2, 13, 5)
    image = tokens[:, 1:].transpose(1, 2).unflatten(2, (3, 4))
    expected = torch.nn.functional.conv2d(image, projector.weight, projector.bias, padding=1)
    torch.testing.assert_close(result[:, 1:], expected.flatten(2).transpose(1, 2))
    alone = projector(torch.cat([tokens[:, :1], 0 * tokens[:, 1:]], dim=1))
    torch.testing.assert_close(alone[:, 0], result[:, 0])


def test_every_backbone_is_registered() -> None:
    assert {*OWN} <= BACKBONES.keys()
