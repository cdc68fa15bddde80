"""Every backbone with every recipe, and the page that says what runs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers import TINY_RECIPE, mistake
from reglue.cli import parse
from reglue.commands.edit import edit
from reglue.commands.train import Losses, train
from reglue.data.batches import TrainingData, student_of
from reglue.data.store import Store
from reglue.diffusion.backbones import BACKBONES
from reglue.diffusion.denoiser import ConvolutionalProjector, Denoiser
from reglue.diffusion.objective import weighted_sum
from reglue.diffusion.paths import PATHS
from reglue.diffusion.specs import OWN_PARTS
from reglue.papers import RECIPES
from reglue.pipeline import ImageModel
from reglue.run import RunRecord, decoder
from reglue.training import checkpoints

PAGE = Path(__file__).parents[2] / "docs" / "backbones.md"
OWN = OWN_PARTS["backbones.BACKBONES"]
CPU = torch.device("cpu")


def table() -> dict[tuple[str, str], str]:
    """Of the page: what it says of (recipe, backbone)."""
    rows = [
        [cell.strip(" `") for cell in line.strip("| \n").split("|")]
        for line in PAGE.read_text().splitlines()
        if line.startswith("|")
    ]
    heads = next(row for row in rows if row[0] == "recipe")
    cells = [row for row in rows if row[0] in RECIPES]
    return {(row[0], head): cell for row in cells for head, cell in zip(heads[1:], row[1:], strict=True)}


def test_the_page_has_all_recipes_and_backbones() -> None:
    assert {*OWN} <= BACKBONES.keys()
    assert table().keys() == {(recipe, backbone) for recipe in RECIPES for backbone in OWN}
    for (recipe, backbone), cell in table().items():
        assert cell == ("published" if RECIPES[recipe].backbone == backbone else "✓")


@pytest.mark.parametrize(("name", "backbone"), [(recipe, backbone) for recipe in RECIPES for backbone in OWN])
def test_every_recipe_trains_and_samples_on_every_backbone(name: str, backbone: str, tiny_store: Path) -> None:
    published = RECIPES[name]
    local = replace(published.local, compressor="pca-4" if name == "redi" else "conv-4")
    alignment = replace(published.alignment, hidden=32)
    recipe = replace(published, model="2x32x4/2", backbone=backbone, local=local, alignment=alignment)
    store = Store.open(tiny_store)
    record = RunRecord.of(store, recipe, 0)
    model, data = Denoiser(record.denoiser), TrainingData(store, recipe, record.denoiser, 0)
    losses = Losses(model, PATHS[recipe.path], recipe.cosine.present, student_of(recipe))
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(2):
        optimiser.zero_grad()
        weighted_sum(losses(data.sample(range(4 * step, 4 * step + 4))), recipe.loss_weights(step)).backward()
        assert all(parameter.grad is not None for parameter in model.parameters()), "processes wait for all gradients"
        optimiser.step()
    images = ImageModel(record, model, decoder(record, CPU)).generate(0, count=1, output="tensor", steps=2)
    assert images.shape == (1, 3, 16, 16)


def test_spatially_normalised_targets_and_a_convolutional_projector(tiny_store: Path) -> None:
    alignment = replace(RECIPES["reg"].alignment, projector="convolution", spatial_norm=0.6)
    recipe = replace(RECIPES["reg"], model="2x32x4/2", alignment=alignment)
    store = Store.open(tiny_store)
    plain, normalised = (
        TrainingData(store, each, RunRecord.of(store, each, 0).denoiser, 0).sample(range(3))
        for each in (replace(recipe, alignment=replace(alignment, spatial_norm=None)), recipe)
    )
    ours, theirs = normalised.alignment_target, plain.alignment_target
    assert ours is not None
    assert theirs is not None
    assert torch.equal(ours[:, 0], theirs[:, 0])  # the class token
    patches = theirs[:, 1:]
    expected = patches - 0.6 * patches.mean(1, keepdim=True)
    cosines = torch.nn.functional.cosine_similarity(ours[:, 1:], expected / expected.std(1, keepdim=True), dim=-1)
    torch.testing.assert_close(cosines, torch.ones_like(cosines))
    model = Denoiser(RunRecord.of(store, recipe, 0).denoiser)
    assert isinstance(model.projector, ConvolutionalProjector)
    terms = Losses(model, PATHS[recipe.path])(normalised)
    terms["alignment"].backward()
    assert model.projector.weight.grad is not None


def arguments(store: Path, out: Path, backbone: str, *more: str) -> list[str]:
    sizes = ["--model=4x32x4/2", "--optimisation.steps=4", "--checkpoint-every=2", f"--backbone={backbone}"]
    return ["train", "reglue", "--store", str(store), "--out", str(out), *TINY_RECIPE, *sizes, *more]


@pytest.mark.parametrize("backbone", ["lightning", "uvit"])
def test_a_run_resumes_with_the_same_bits_and_edits(
    backbone: str, tiny_store: Path, tiny_images: Path, tmp_path: Path
) -> None:
    run = train(parse(arguments(tiny_store, tmp_path / "run", backbone, "--optimisation.checkpoint-blocks=1")))
    broken = Path(shutil.copytree(run, tmp_path / "broken"))
    shutil.rmtree(broken / "checkpoints" / "00000004")
    train(parse(arguments(tiny_store, broken, backbone, "--optimisation.checkpoint-blocks=1")))
    ours, theirs = (checkpoints.read_weights(checkpoints.find(folder) / checkpoints.MODEL) for folder in (run, broken))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    line = ["edit", str(run), str(tiny_images / "circle" / "000.png"), "--out", str(tmp_path / "edits")]
    edit(parse([*line, "--keep=local", "--count=2", "--steps=3", "--device=cpu"]))
    assert len(list((tmp_path / "edits").rglob("*.png"))) >= 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--backbone=uvit", "--blocks.no-shift"], "--blocks.shift is a part of sit and lightning"),
        (["--blocks.time-mlp"], "--blocks.time-mlp is a part of uvit"),
        (["--blocks.rope", "--model=2x36x6/2"], "rotary positions need heads whose width divides by 4"),
        (["--backbone=lightning", "--model=2x36x6/2"], "rotary positions need heads whose width divides by 4"),
    ],
)
def test_parts_that_a_backbone_has_not_are_refused(
    options: list[str], said: str, tiny_store: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    line = ["train", "sit", "--store", tiny_store, "--out", tmp_path / "run", *options, "--device=cpu"]
    assert said in mistake(capsys, monkeypatch, *line)
    assert not (tmp_path / "run").exists()
