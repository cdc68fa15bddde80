import pytest

from reglue.config import LocalSemantics, Part, Recipe, model_size
from reglue.diffusion.denoiser import Denoiser
from reglue.errors import UserError
from reglue.papers import PAPERS, RECIPES


@pytest.mark.parametrize(
    ("name", "model", "with_projector", "without"),
    [
        ("sit", "B/2", 130_512_416, 130_512_416),
        ("sit", "XL/2", 675_129_632, 675_129_632),
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

    config = replace(RECIPES[name], model=model).denoiser_config(
        latent_channels=4, grid=(32, 32), classes=1000, local_channels=8 if name == "redi" else 16, token_width=768
    )
    with torch.device("meta"):
        denoiser = Denoiser(config)
    # The published counts include the fixed position embedding.
    sizes = {key: p.numel() for key, p in (*denoiser.named_parameters(), *denoiser.named_buffers())}
    assert sum(sizes.values()) == with_projector
    assert sum(size for key, size in sizes.items() if not key.startswith("projector")) == without


def test_a_part_with_weight_zero_is_absent() -> None:
    recipe = Recipe("plain")
    config = recipe.denoiser_config(latent_channels=4, grid=(8, 8), classes=0, local_channels=16, token_width=32)
    assert set(config.shape.shapes()) == {"latent"}
    assert config.alignment_width == 0
    assert set(recipe.loss_weights(0)) == {"latent"}


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
        Recipe("plain").denoiser_config(latent_channels=4, classes=0, grid=grid)


def test_a_descending_schedule_is_refused() -> None:
    with pytest.raises(UserError, match="ascend"):
        LocalSemantics(1.0, ((500, 0.5), (250, 0.25)))


def test_every_paper_names_its_command() -> None:
    for name, paper in PAPERS.items():
        assert paper.command.startswith(f"reglue train {name} ")
