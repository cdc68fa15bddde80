"""Training samples: a function of seed and position, and what is dropped from them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reglue.data.batches import TrainingData, denoiser_config
from reglue.data.store import Store
from reglue.diffusion.denoiser import Denoiser
from reglue.diffusion.objective import loss_terms
from reglue.diffusion.paths import PATHS
from reglue.errors import UserError
from reglue.jobs.compress import Compress, compress
from reglue.papers import RECIPES
from reglue.recipe import Recipe
from reglue.runs.record import RunRecord


def tiny(name: str) -> Recipe:
    recipe = RECIPES[name]
    return replace(recipe, model="2x32x2/2", local=replace(recipe.local, compressor="conv-4"))


def data(store: Store, recipe: Recipe, seed: int = 0) -> TrainingData:
    return TrainingData(store, recipe, denoiser_config(store, recipe), seed)


def test_a_sample_depends_on_seed_and_position_alone(tiny_store: Path) -> None:
    store = Store.open(tiny_store)
    whole = data(store, tiny("reglue")).sample(range(40, 60))
    alone = data(store, tiny("reglue")).sample(range(47, 48))
    for kind in ("data", "noise"):
        for name, value in getattr(alone, kind).items():
            assert torch.equal(value[0], getattr(whole, kind)[name][7]), (kind, name)
    for kind in ("time", "label", "alignment_target"):
        assert torch.equal(getattr(alone, kind)[0], getattr(whole, kind)[7]), kind
    other = data(store, tiny("reglue"), seed=1).sample(range(47, 48))
    assert not torch.equal(other.noise["latent"], alone.noise["latent"])


def test_every_epoch_shows_each_image_once_in_an_order_of_its_own(tiny_store: Path) -> None:
    store = Store.open(tiny_store)
    epochs = [data(store, tiny("sit")).rows(range(n * len(store), (n + 1) * len(store))).tolist() for n in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(len(store)))
    assert epochs[0] != epochs[1]


def test_labels_and_maps_are_dropped_as_often_as_asked(tiny_store: Path) -> None:
    recipe = tiny("redi")
    sample = data(Store.open(tiny_store), recipe).sample(range(2000))
    assert (sample.label == 3).float().mean().item() == pytest.approx(0.1, abs=0.03)
    assert sample.keep_local is not None
    assert sample.keep_local.float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert sample.time.min() >= 0
    assert sample.time.max() <= 1
    assert sample.time.mean().item() == pytest.approx(0.5, abs=0.03)


def test_unit_variance_is_what_it_says(tiny_store: Path) -> None:
    store = Store.open(tiny_store)
    recipe = tiny("reglue")
    recipe = replace(
        recipe,
        latent=replace(recipe.latent, unit_variance=True),
        class_token=replace(recipe.class_token, unit_variance=True),
        local=replace(recipe.local, unit_variance=True),
    )
    # The grid of the encoder, so that resizing does not smooth the map.
    state = data(store, recipe).sample(range(len(store))).data
    for name in ("latent", "cls"):
        values = state[name].transpose(0, 1).flatten(1)
        assert values.mean(1).abs().max() < 0.1, name
        assert (values.std(1) - 1).abs().max() < 0.1, name
    plain = data(store, tiny("reglue")).sample(range(len(store))).data
    assert plain["local"].shape == state["local"].shape == (24, 4, 8, 8)
    assert not torch.equal(plain["local"], state["local"])


def test_targets_are_the_encoders_last_layer_on_the_models_tokens(tiny_store: Path) -> None:
    store = Store.open(tiny_store)
    trained = data(store, tiny("reglue"))
    sample, rows = trained.sample(range(4)), trained.rows(range(4))
    assert sample.alignment_target is not None
    assert sample.alignment_target.shape == (4, 1 + 16, 16)
    assert torch.equal(sample.alignment_target[:, 0], store.read("cls", rows)["cls"])
    patches = store.read("features", rows)["features"][:, -16:].float().flatten(2).transpose(1, 2)
    assert torch.equal(sample.alignment_target[:, 1:], patches)
    without_token = data(store, tiny("repa")).sample(range(4)).alignment_target
    assert without_token is not None
    assert torch.equal(without_token, patches)


def test_a_recipe_may_learn_codes_of_the_class_token_and_align_with_the_token_itself(
    tiny_store: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_store, tmp_path / "store"))
    recipe = tiny("reglue")
    chosen = replace(recipe, class_token=replace(recipe.class_token, compressor="pca-3"))
    with pytest.raises(
        UserError, match=r"needs column cls.pca-3.*reglue compress .* --column cls --kind pca --channels 3`"
    ):
        RunRecord.of(Store.open(folder), chosen, seed=0)

    store = compress(Compress(folder, "pca", "cls", channels=3, device="cpu"))
    record = RunRecord.of(store, chosen, seed=0)
    assert record.denoiser.shape.class_token_width == 3
    assert record.denoiser.alignment_width == 16
    assert record.class_token_compressor == store.manifest.compressors["cls.pca-3"]
    trained, plain = data(store, chosen), data(store, recipe)
    sample = trained.sample(range(4))
    assert torch.equal(sample.data["cls"], store.read("cls.pca-3", trained.rows(range(4)))["cls"])
    target, same = sample.alignment_target, plain.sample(range(4)).alignment_target
    assert target is not None
    assert same is not None
    assert torch.equal(target, same)

    scaled = replace(chosen, class_token=replace(chosen.class_token, unit_variance=True))
    assert len(RunRecord.of(store, scaled, seed=0).normalisation["cls"].scale) == 3
    assert record.store_hash != RunRecord.of(store, recipe, seed=0).store_hash
    assert RunRecord.of(store, recipe, seed=0) == RunRecord.of(Store.open(tiny_store), recipe, seed=0)
    loss = loss_terms(Denoiser(record.denoiser), PATHS[chosen.path], sample)
    assert all(value.isfinite() for value in loss.values())


@pytest.mark.parametrize(
    ("recipe", "column", "remedy"), [("reglue", "conv-16", "compress"), ("repa", "features", "--features")]
)
def test_what_the_store_lacks_is_named(
    recipe: str, column: str, remedy: str, tiny_images: Path, tiny_encoder: str, tiny_autoencoder: str, tmp_path: Path
) -> None:
    from reglue.jobs.prepare import Prepare, prepare

    store = prepare(Prepare(tiny_images, tmp_path / "s", 16, tiny_autoencoder, tiny_encoder, workers=0, device="cpu"))
    with pytest.raises(UserError, match=rf"{column}.*{remedy}"):
        denoiser_config(store, RECIPES[recipe])
