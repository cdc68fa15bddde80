"""Runs with a time for each modality: trained, resumed, drawn from by every sampler, edited, perceived."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import reglue
from helpers import OF_ANY_RUN, TINY_RECIPE, draw_masks
from reglue.cli import parse
from reglue.commands.perceive import perceive
from reglue.commands.train import train
from reglue.commands.train_head import TrainHead, train_head
from reglue.data.batches import TrainingData, denoiser_config
from reglue.data.store import Store
from reglue.diffusion.samplers import uniform_times
from reglue.editing.editor import Editing
from reglue.errors import UserError
from reglue.options.perceive import Perceive
from reglue.training import checkpoints

SCHEDULES = {
    "independent": ["--times=independent"],
    "lead": ["--times=lead", "--times-options", "delta", "0.5"],
    "cascade": ["--times=cascade"],
}


def trained(store: Path, run: Path, recipe: str, steps: int, *more: str) -> Path:
    arguments = ["--store", str(store), "--out", str(run), *TINY_RECIPE, f"--optimisation.steps={steps}", *more]
    return train(parse(["train", recipe, *arguments]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    runs = {name: trained(tiny_store, folder / name, "reglue", 4, *more) for name, more in SCHEDULES.items()}
    return {**runs, "sfd": trained(tiny_store, folder / "sfd", "sfd", 4)}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoints.read_weights(checkpoints.find(run) / checkpoints.MODEL)


@pytest.mark.parametrize("kind", [*SCHEDULES, "sfd"])
def test_a_run_that_stops_goes_on_with_the_same_bits(
    kind: str, runs: dict[str, Path], tiny_store: Path, tmp_path: Path
) -> None:
    recipe, more = ("sfd", []) if kind == "sfd" else ("reglue", SCHEDULES[kind])
    for steps in (2, 4):
        trained(tiny_store, tmp_path / "run", recipe, steps, *more)
    once, twice = weights(runs[kind]), weights(tmp_path / "run")
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)
    offsets = [value for name, value in once.items() if name.startswith("time_offsets")]
    assert offsets
    assert all(value.any() for value in offsets)  # They are zero at the start, and are learned.


@pytest.mark.parametrize("sampler", OF_ANY_RUN)
@pytest.mark.parametrize("kind", [*SCHEDULES, "sfd"])
def test_every_sampler_draws(kind: str, sampler: str, runs: dict[str, Path]) -> None:
    model = reglue.load(runs[kind], weights="model", device="cpu")
    images = model.generate([0, 1], sampler=sampler, steps=4, guidance_scale=1.5, guidance_interval=(0.2, 0.9))
    again = model.generate(
        [0, 1], sampler=sampler, steps=4, guidance_scale=1.5, guidance_interval=(0.2, 0.9), batch_size=1
    )
    assert len(images) == 2
    for one, other in zip(images, again, strict=True):
        difference = torch.tensor(list(one.tobytes())).int() - torch.tensor(list(other.tobytes())).int()
        assert difference.abs().max() <= 1


def test_what_is_kept_is_data_all_along(
    runs: dict[str, Path], tiny_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = reglue.load(runs["independent"], weights="model", device="cpu")
    with Image.open(next(tiny_images.rglob("*.png"))) as image:
        picture = image.convert("RGB")
    seen: list[tuple[float, ...]] = []
    forward = type(model.denoiser).forward

    def noting(self, state, time, condition):  # type: ignore[no-untyped-def]
        seen.append(tuple(time[name][0].item() for name in ("latent", "local", "cls")))
        assert torch.equal(state["local"], own["local"].to(state["local"]).expand_as(state["local"]))
        return forward(self, state, time, condition)

    own = model.encode(picture)
    monkeypatch.setattr(type(model.denoiser), "forward", noting)
    edits = model.edit(picture, keep=("local",), count=2, steps=3, sampler="euler")
    assert seen == [(t, 0.0, t) for t in uniform_times(3)[:3]]
    assert edits[0] != edits[1]
    # Image to image, and what is let go or masked, are held by noise as before.
    seen.clear()
    model.edit(picture, keep=("local",), strength=0.5, steps=4, sampler="euler")
    assert seen[0] == (0.5, 0.0, 0.5)
    monkeypatch.undo()
    let_go = Editing(keep=("local",), until=0.5)
    subjects, sampling = [model.subject(picture, let_go)], model.resolved(model.sampling_for(False))
    controls, start, schedule = model.controls_for(subjects, [(0, 0)], let_go, sampling, 0)
    assert (len(controls), start, schedule) == (1, None, None)


def test_the_rest_of_a_state_is_drawn_by_models_that_know_how(runs: dict[str, Path], tiny_images: Path) -> None:
    model = reglue.load(runs["independent"], weights="model", device="cpu")
    with Image.open(next(tiny_images.rglob("*.png"))) as image:
        known = {"latent": model.encode(image.convert("RGB"))["latent"]}
    state = model.complete(known, steps=3)
    assert state.keys() == {"latent", "local", "cls"}
    assert torch.equal(state["latent"].float(), known["latent"])
    assert not torch.equal(model.complete(known, steps=3, seed=1)["local"], state["local"])
    for kind, what in (("lead", known), ("cascade", known), ("independent", {**state})):
        other = reglue.load(runs[kind], weights="model", device="cpu")
        with pytest.raises(UserError, match=r"cannot draw .* from latent.*: train one with times independent"):
            other.complete(what)
    with pytest.raises(UserError, match="unconditional everything: this model does not know semantics as noise"):
        reglue.load(runs["lead"], weights="model", device="cpu").generate(0, steps=2, unconditional="everything")
    assert model.generate(0, steps=2, guidance_scale=2.0, unconditional="everything")
    assert model.generate(0, steps=2, representation_scale=2.0)


def test_a_model_of_independent_times_is_a_segmenter(
    runs: dict[str, Path], tiny_store: Path, tiny_images: Path, tmp_path: Path
) -> None:
    masks = draw_masks(tmp_path / "masks", tiny_images)
    head, names = tmp_path / "head", ("left", "right")
    train_head(TrainHead(tiny_store, head, masks=masks, class_names=names, steps=5, device="cpu"))
    options = {"head": (head,), "images": tiny_images, "count": 3, "device": "cpu", "weights": "model"}
    report = perceive(Perceive(runs["independent"], tmp_path / "seen", sources=("drawn",), steps=3, **options))
    assert {one.view for one in report.agreement} == {"drawn", "original"}
    assert report.protocol["steps"] == 3
    assert len([*(tmp_path / "seen" / "maps").rglob("drawn/*.png")]) == 3
    with pytest.raises(UserError, match=r"--from drawn: .* has no such features: with --images, runs"):
        perceive(Perceive(runs["lead"], tmp_path / "none", sources=("drawn",), **options))


def test_what_is_known_already_is_not_asked_for(tiny_store: Path) -> None:
    for more, clean in ((["--optimisation.clean-loss"], True), ([], False)):
        recipe = parse(["train", "sfd", "--store", str(tiny_store), "--out", "run", *TINY_RECIPE, *more,
                        *([] if clean else ["--optimisation.no-clean-loss"])]).recipe  # fmt: skip
        store = Store.open(tiny_store)
        sample = TrainingData(store, recipe, denoiser_config(store, recipe), 0).sample(range(64))
        assert isinstance(sample.time, dict)
        clean_maps = sample.time["local"] == 0
        assert clean_maps.any()
        assert bool(sample.learned) != clean
        if not clean:
            assert torch.equal(sample.learned["local"], ~clean_maps)
            assert sample.learned["latent"].all()
