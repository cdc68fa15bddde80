from collections.abc import Iterator
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import pytest

from reglue.config import Alignment, ClassToken, LocalSemantics, OtherModality, Part, Recipe, model_size
from reglue.diffusion.denoiser import Denoiser
from reglue.diffusion.modalities import Modality
from reglue.diffusion.samplers import SAMPLERS
from reglue.errors import UserError
from reglue.overrides import field_docstrings
from reglue.papers import PAPERS, RECIPES
from reglue.reals.config import Adversary, AutoencoderRecipe, Kl, LatentAlignment, Perceptual
from reglue.sampling import Sampling, SamplingOverrides


def parts_of(recipe: type) -> Iterator[tuple[str, type[Part]]]:
    """The parts of a kind of recipe, of every type that one of its fields may have."""
    for name, hint in get_type_hints(recipe).items():
        for kind in (hint, *get_args(hint)):
            if isinstance(kind, type) and issubclass(kind, Part) and kind is not OtherModality:
                yield f"{recipe.__name__}.{name}", kind


def modalities(recipe: Recipe, **channels: int) -> tuple[Modality, ...]:
    return tuple(part.as_modality(channels[part.modality]) for part in recipe.learned_parts)


@pytest.mark.parametrize(
    ("name", "model", "with_projector", "without"),
    [
        ("sit", "B/2", 130_512_416, 130_512_416),
        ("sit", "XL/2", 675_129_632, 675_129_632),
        ("dit", "S/2", 32_963_360, 32_963_360),
        ("dit", "L/2", 458_102_816, 458_102_816),
        ("dit", "12x768x12/4", 130_475_648, 130_475_648),
        ("repa", "B/2", 137_845_008, 130_500_112),
        ("repa", "XL/2", 683_242_512, 675_111_184),
        ("redi", "B/2", 130_549_296, 130_549_296),
        ("redi", "XL/2", 675_184_944, 675_184_944),
        ("reg", "B/2", 139_028_496, 131_683_600),
        ("reg", "XL/2", 685_017_360, 676_886_032),
        ("reglue", "B/2", 139_126_864, 131_781_968),
        ("reglue", "XL/2", 685_164_880, 677_033_552),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, model: str, with_projector: int, without: int) -> None:
    from dataclasses import replace

    import torch

    recipe = replace(RECIPES[name], model=model)
    config = recipe.denoiser_config(
        modalities(recipe, latent=4, local=8 if name == "redi" else 16, cls=768), (32, 32), {"class": 1000}, 768
    )
    with torch.device("meta"):
        denoiser = Denoiser(config)
    # The published counts include the fixed position embedding.
    sizes = {key: p.numel() for key, p in (*denoiser.named_parameters(), *denoiser.named_buffers())}
    assert sum(sizes.values()) == with_projector
    assert sum(size for key, size in sizes.items() if not key.startswith("projector")) == without


def test_a_part_with_weight_zero_is_absent() -> None:
    recipe = Recipe("plain")
    config = recipe.denoiser_config(modalities(recipe, latent=4, local=16, cls=32), (8, 8), {"class": 0}, 32)
    assert set(config.shapes()) == {"latent"}
    assert config.alignment_width == 0
    assert set(recipe.loss_weights(0)) == {"latent"}


PARTS = {name: kind for kind in (Recipe, AutoencoderRecipe) for name, kind in parts_of(kind)}


@pytest.mark.parametrize("kind", [*PARTS.values()], ids=[*PARTS])
def test_a_schedule_makes_a_part_present(kind: type[Part]) -> None:
    """Every part with a weight: what counts is whether it has one at any step."""
    more: dict[str, Any] = {"class_weight": 0.0} if kind is LatentAlignment else {}
    assert not kind(0.0, **more).present
    assert not kind(0.0, ((10, 0.0),), **more).present
    assert not kind(1.0, ((0, 0.0),), **more).present
    assert kind(0.0, ((10, 0.5),), **more).present
    assert kind(1.0, ((10, 0.0),), **more).present
    assert [kind(0.0, ((10, 0.5),), **more).weight_at(step) for step in (0, 9, 10, 11)] == [0, 0, 0.5, 0.5]


def test_a_part_that_comes_later_is_learned_from_the_start_with_weight_zero() -> None:
    later = ((10, 0.5),)
    recipe = Recipe(
        "later",
        local=LocalSemantics(0.0, later),
        class_token=ClassToken(0.0, later),
        others=(OtherModality(0.0, later, "depth", source="depth"),),
        alignment=Alignment(0.0, later),
    )
    assert [part.modality for part in recipe.learned_parts] == ["latent", "local", "cls", "depth"]
    assert recipe.loss_weights(9) == {"latent": 1, "local": 0, "cls": 0, "depth": 0, "alignment": 0}
    assert recipe.loss_weights(10) == {"latent": 1, "local": 0.5, "cls": 0.5, "depth": 0.5, "alignment": 0.5}
    autoencoder = AutoencoderRecipe(
        perceptual=Perceptual(0.0, later), kl=Kl(0.0, later), alignment=LatentAlignment(0.0, later, 0.0),
        adversary=Adversary(0.0, later, start=5),
    )  # fmt: skip
    assert autoencoder.loss_weights(4).keys() == {"reconstruction", "perceptual", "kl", "alignment", "class_alignment"}
    assert [autoencoder.loss_weights(step)["adversary"] for step in (5, 9, 10)] == [0, 0, 0.5]
    assert [autoencoder.loss_weights(step)["kl"] for step in (9, 10)] == [0, 0.5]


@pytest.mark.parametrize("name", ["tiny", "small", "evening"])
def test_models_named_by_their_time_are_sizes_like_others(name: str) -> None:
    size = model_size(name)
    assert size == model_size(f"{size.depth}x{size.width}x{size.heads}/{size.patch}")
    assert size.width // size.heads == 64  # as the published ones have it


def test_weights_follow_their_schedule() -> None:
    part = Part(1.0, ((250, 0.5), (500, 0.25)))
    assert [part.weight_at(step) for step in (0, 249, 250, 499, 500, 10_000)] == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("name", ["B/3", "b/2", "", "8x192/2", "8x0x6/2"])
def test_an_unknown_model_lists_the_known_ones(name: str) -> None:
    with pytest.raises(UserError, match="S/2, B/2, L/2, XL/2"):
        model_size(name)


@pytest.mark.parametrize("grid", [(7, 8), (8, 9)])
def test_a_grid_that_does_not_fit_the_patches_is_refused(grid: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="patches of 2"):
        Recipe("plain").denoiser_config(modalities(Recipe("plain"), latent=4), grid, {"class": 0})


def test_a_descending_schedule_is_refused() -> None:
    with pytest.raises(UserError, match="ascend"):
        LocalSemantics(1.0, ((500, 0.5), (250, 0.25)))


def test_every_paper_names_its_command() -> None:
    for name, paper in PAPERS.items():
        assert paper.command.startswith(f"reglue train {name} ")


def test_sampling_is_changed_by_what_is_given() -> None:
    sampling = Sampling("heun", 20, guidance_scale=1.5, local_scale=1.0)
    assert sampling.changed(steps=5, guidance_scale=None) == Sampling("heun", 5, guidance_scale=1.5, local_scale=1.0)
    assert sampling.guidance.scale_of("local") == 1.0
    assert sampling.guidance.scale_of("cls") == 1.5
    assert sampling.changed(other_scales={"depth": 3.0}).guidance.scale_of("depth") == 3.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "midpoint"}, f"sampler midpoint: choose {', '.join(SAMPLERS)}"),
        ({"rounding": "up"}, "rounding up: choose truncate, round"),
        ({"guiders": {"mine": 1.0}}, "guider mine: none is registered"),
        ({"guiders": {"auto": 2.0}}, "guider auto: none is registered"),
        ({"other_scales": {"local": 2.0}}, "other_scales local: use local_scale"),
        ({"other_scales": {"depth": float("nan")}}, "other_scales depth nan: choose a finite number"),
        ({"guidance_interval": (0.5, 0.1)}, "choose 0 ≤ lowest ≤ highest ≤ 1"),
        ({"steps": 0}, "steps 0: choose at least 1"),
        ({"guided_channels": 0}, "guided_channels 0: choose at least 1"),
    ],
)
def test_sampling_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling().changed(**change)


def test_overrides_have_every_option_of_sampling_with_its_help() -> None:
    documented = field_docstrings(Sampling)
    for part in fields(Sampling):
        (override,) = (f for f in fields(SamplingOverrides) if f.name == part.name)
        assert override.default is None
        assert override.kw_only
        assert documented[part.name]
        assert f"{part.name}: {documented[part.name]}" in SamplingOverrides.__doc__
