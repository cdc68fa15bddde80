"""The study of latent spaces at toy size: a store for each autoencoder, and the figures over the weight of KL."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_convergence import TINY

import spaces
from reglue.commands.autoencode import Autoencode, autoencode
from reglue.config import OptimiserConfig
from reglue.data.store import Store
from reglue.reals.config import Architecture, AutoencoderRecipe, Kl, LatentAlignment, Perceptual


def made(images: Path, out: Path, encoder: str, kl_weight: float, alignment: float) -> Path:
    recipe = AutoencoderRecipe(
        architecture=Architecture((4, 8), 2, 1, norm_groups=4, attention=False),
        perceptual=Perceptual(0.0),
        kl=Kl(kl_weight),
        alignment=LatentAlignment(alignment, class_weight=alignment, hidden=8),
        optimisation=OptimiserConfig(steps=1, batch_size=2),
    )
    options = Autoencode(
        images, out, recipe, resolution=32, encoder=encoder, validation=images, workers=0, device="cpu"
    )
    return autoencode(options)


@pytest.fixture(scope="module")
def autoencoders(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path, tiny_encoder: str) -> list[str]:
    folder = tmp_path_factory.mktemp("autoencoders")
    arms = (("plain", 1e-5, 0.0), ("aligned", 1e-5, 0.5), ("more-kl", 1e-2, 0.5))
    return [str(made(tiny_images, folder / name, tiny_encoder, *weights)) for name, *weights in arms]


def test_each_method_is_trained_in_each_space(
    autoencoders: list[str], tmp_path: Path, tiny_store: Path, tiny_images: Path
) -> None:
    out = tmp_path / "spaces"
    arguments = [str(tiny_store), "--reference", str(tiny_images), "--out", str(out), *TINY, "--guidance", "1"]
    arguments += ["--checkpoints", "1", "--decoding-workers", "0", "--arms", "sit", "reglue", "--autoencoders"]
    spaces.main([*arguments, *autoencoders[:2]])
    spaces.main([*arguments, *autoencoders])  # adds the third
    results = json.loads((out / "results.json").read_text())["arms"]
    names = [f"{method}-in-{space}-seed-0" for space in ("plain", "aligned", "more-kl") for method in ("sit", "reglue")]
    assert sorted(results) == sorted(names)
    assert all(arm["steps"]["4"]["encoder"]["frechet_distance"]["value"] > 0 for arm in results.values())
    channels = {Store.open(store).manifest.autoencoder.latent_channels for store in (out / "stores").iterdir()}
    assert channels == {2}
    assert (out / "kl-weight.png").stat().st_size > 10_000
    # Elsewhere, each space is decoded by its own autoencoder, where it is now.
    moved = [shutil.copytree(folder, tmp_path / "moved" / Path(folder).name) for folder in autoencoders]
    for trained in ("sit-in-plain-seed-0", "sit-in-aligned-seed-0"):
        shutil.rmtree(out / trained / "step-00000004")
        (out / trained / "step-00000004.encoder.json").unlink()
    spaces.main([*arguments, *map(str, moved)])
    for space in ("plain", "aligned"):
        protocol = json.loads((out / f"sit-in-{space}-seed-0/step-00000004/samples.json").read_text())
        assert protocol["decoder"] == str(tmp_path / "moved" / space)


def test_points_of_the_plot(autoencoders: list[str], tmp_path: Path, tiny_store: Path) -> None:
    plain, aligned, more_kl = (spaces.Space(Path(folder)) for folder in autoencoders)
    assert [space.aligned for space in (plain, aligned, more_kl)] == [False, True, True]
    assert [space.kl_weight for space in (plain, aligned, more_kl)] == [1e-5, 1e-5, 1e-2]
    assert all((space.reconstruction_distance or 0) > 0 for space in (plain, aligned, more_kl))
    options = spaces.Spaces(store=tiny_store, reference=tiny_store, out=tmp_path, steps=4, autoencoders=())
    arms = {"sit-in-aligned-seed-0": {"steps": {"4": {"encoder": {"frechet_distance": {"value": 7.0}}}}}}
    assert spaces.generated(aligned, "sit", options, arms) == 7
    assert spaces.generated(plain, "sit", options, arms) is None


@pytest.mark.parametrize("problem", ["has no training.json", "have the same name"])
def test_folders_that_do_not_do(problem: str, autoencoders: list[str], tmp_path: Path, tiny_store: Path) -> None:
    folders = [autoencoders[0], autoencoders[0] if "same" in problem else str(tmp_path)]
    arguments = [str(tiny_store), "--reference", str(tiny_store), "--out", str(tmp_path / "out"), "--autoencoders"]
    with pytest.raises(SystemExit, match=problem):
        spaces.main([*arguments, *folders])
