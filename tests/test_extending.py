"""The examples of docs/extending.md: parts defined outside the package train, resume, sample, save and load."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import reglue
from helpers import OF_ANY_RUN
from reglue.config import Optimisation, OtherModality, Recipe
from reglue.data.store_writer import add_column
from reglue.diffusion.backbones import BACKBONES
from reglue.diffusion.conditions import CONDITIONS
from reglue.diffusion.controls import Previews
from reglue.diffusion.guidance import GUIDERS
from reglue.diffusion.samplers import SAMPLERS
from reglue.diffusion.schedules import SCHEDULES
from reglue.errors import UserError
from reglue.run import RunRecord
from reglue.sampling import Sampling
from reglue.training import checkpoints
from reglue.training.tracking import TRACKERS

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
TABLES: tuple[dict[str, Any], ...] = (SAMPLERS, CONDITIONS, BACKBONES, GUIDERS, SCHEDULES, TRACKERS)
MOST_LINES = 30


def examples() -> dict[str, str]:
    """The first block of Python under each heading."""
    sections = re.split(r"(?m)^## ", PAGE.read_text())[1:]
    blocks = {text.splitlines()[0]: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for text in sections}
    return {heading: found[0] for heading, found in blocks.items() if found}


@pytest.fixture(scope="module")
def parts() -> Iterator[dict[str, types.ModuleType]]:
    """Every example as a module of its own, registered as long as these tests run."""
    before = [dict(table) for table in TABLES]
    modules: dict[str, types.ModuleType] = {}
    for heading, source in examples().items():
        module = types.ModuleType(f"example_{len(modules)}")
        sys.modules[module.__name__] = module
        exec(compile(source, f"{PAGE}: {heading}", "exec"), module.__dict__)
        modules[heading] = module
    yield modules
    for table, content in zip(TABLES, before, strict=True):
        table.clear()
        table.update(content)
    for module in modules.values():
        del sys.modules[module.__name__]


def tiny(**changes: Any) -> Recipe:
    recipe = reglue.recipes["reglue"]
    optimisation = Optimisation(
        steps=2, batch_size=8, learning_rate=1e-2, ema=0.5, ema_warmup="yes", precision="float32"
    )
    sampling = recipe.sampling.changed(steps=3)
    common = {"model": "2x32x2/2", "optimisation": optimisation, "sampling": sampling}
    local, alignment = replace(recipe.local, compressor="conv-4"), replace(recipe.alignment, hidden=32)
    return replace(recipe, **common, local=local, alignment=alignment, **changes)


def train(recipe: Recipe, store: Path, out: Path, **options: Any) -> Path:
    common: dict[str, Any] = {"checkpoint_every": 1, "log_every": 1, "preview_every": 0, "device": "cpu"}
    return reglue.train(reglue.Train(recipe, store, out, **{**common, **options}))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints.find(run, 2) / checkpoints.EMA)


def awake(model: reglue.ImageModel) -> None:
    """Give it weights with which everything matters: after a few steps, hardly anything does."""
    for number, weight in enumerate(model.denoiser.parameters()):
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)) / 10)


def test_every_example_is_short() -> None:
    found = examples()
    assert len(found) == 8
    assert {
        heading: len(source.splitlines()) for heading, source in found.items() if source.count("\n") >= MOST_LINES
    } == {}


CHANGES: dict[str, dict[str, Any]] = {
    "A backbone": {"backbone": "plain"},
    "A condition": {"conditions": {"brightness": 0.5}},
    "A modality": {},
    "A time schedule": {"times": "squared"},
}


@pytest.mark.parametrize("heading", [*CHANGES, "all"])
def test_what_is_trained_resumes_samples_saves_and_loads(
    heading: str, parts: dict[str, types.ModuleType], tiny_store: Path, tmp_path: Path
) -> None:
    changes = {
        name: value for part, each in CHANGES.items() if heading in (part, "all") for name, value in each.items()
    }
    recipe = tiny(**changes)
    if heading in ("A modality", "all"):
        recipe = parts["A modality"].with_components(recipe)
    run = train(recipe, tiny_store, tmp_path / "run")

    # Stopped after a step and begun again, it ends in the same bits.
    short = replace(recipe, optimisation=replace(recipe.optimisation, steps=1))
    train(short, tiny_store, tmp_path / "resumed")
    resumed = train(recipe, tiny_store, tmp_path / "resumed")
    assert all(torch.equal(weights(resumed)[name], value) for name, value in weights(run).items())

    model = reglue.load(run, device="cpu")
    images = model.generate([0, 2], seed=1, output="tensor")
    assert images.shape == (2, 3, 16, 16)
    saved = reglue.load(model.save(tmp_path / "saved"), device="cpu")
    assert torch.equal(saved.generate([0, 2], seed=1, output="tensor"), images)
    assert saved.record.recipe == recipe
    if heading == "all":
        drawn = model.draw([0, 1], model.condition([0, 2]), 1, model.default_sampling)
        assert list(drawn) == ["latent", "local", "cls", "components"]
        assert drawn["components"].shape == (2, 4, 8, 8)


def test_a_backbone_of_its_own_is_initialised_by_the_seed_alone(parts: object, tiny_store: Path) -> None:
    from reglue.data.batches import denoiser_config
    from reglue.diffusion.denoiser import Denoiser

    config = denoiser_config(reglue.Store.open(tiny_store), tiny(backbone="plain"))
    torch.manual_seed(1)
    first = Denoiser(config, 5).state_dict()
    torch.manual_seed(2)
    assert all(torch.equal(value, first[name]) for name, value in Denoiser(config, 5).state_dict().items())


def test_a_condition_steers_what_is_drawn(parts: object, tiny_store: Path, tmp_path: Path) -> None:
    run = train(tiny(conditions={"brightness": 0.5}), tiny_store, tmp_path / "run")
    model = reglue.load(run, device="cpu")
    awake(model)
    asked = torch.tensor([[3.0, 1.0], [-3.0, 1.0], [0.0, 0.0]])
    draws = [
        model.generate([0] * 3, seed=1, batch_size=size, condition={"brightness": asked}, output="tensor").int()
        for size in (3, 2)
    ]
    assert (draws[0] - draws[1]).abs().max() <= 1
    unconditional = model.generate([0] * 3, seed=1, output="tensor").int()
    assert (draws[0][2] - unconditional[2]).abs().max() <= 1, "zeros are the null"
    assert (draws[0][:2] - unconditional[:2]).abs().max() > 1
    with pytest.raises(UserError, match=r"condition tone: this model has class, brightness"):
        model.generate([0], condition={"tone": asked[:1]})
    with pytest.raises(UserError, match=r"brightness has values of the shape \(3, 2\); 1 images need \(1, 2\)"):
        model.generate([0], condition={"brightness": asked})


def test_a_modality_has_a_guidance_scale_of_its_own(
    parts: dict[str, types.ModuleType], tiny_store: Path, tmp_path: Path
) -> None:
    run = train(parts["A modality"].with_components(tiny()), tiny_store, tmp_path / "run")
    first_line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert {"latent", "local", "cls", "components", "alignment", "loss"} <= first_line.keys()
    record = RunRecord.read(run)
    assert record.compressors.keys() == {"local", "components"}
    assert (run / "compressors" / "components" / "compressor.json").is_file()
    model = reglue.load(run, device="cpu")
    plain, guided = (
        model.draw([0], model.condition([0]), 1, model.default_sampling.changed(**scales))
        for scales in ({"guidance_scale": 1.0}, {"guidance_scale": 1.0, "other_scales": {"components": 3.0}})
    )
    assert not torch.equal(plain["components"], guided["components"])
    with pytest.raises(UserError, match=r"other_scales depth: this model learns latent, local, cls, components"):
        model.generate([0], other_scales={"depth": 2.0})
    raw = model.raw(plain, "components")
    assert not torch.equal(raw, plain["components"].float()), "it is learned at unit variance"


def test_a_column_of_ones_own_is_learned(tiny_store: Path, tmp_path: Path) -> None:
    store = reglue.Store.open(shutil.copytree(tiny_store, tmp_path / "store"))
    brightness = store.read("latent", torch.arange(len(store)))["mean"].float().mean((1, 2, 3))[:, None]
    store = add_column(store, "brightness", brightness.split(store.shard_rows))
    token = OtherModality(0.1, modality="brightness", kind="token", source="brightness", unit_variance=True)
    run = train(tiny(others=(token,)), store.folder, tmp_path / "run")
    model = reglue.load(run, device="cpu")
    assert model.draw([0], model.condition([0]), 0, model.default_sampling)["brightness"].shape == (1, 1)
    with pytest.raises(ValueError, match=r"shard 0 of .* has 10 rows, and column other 9"):
        add_column(store, "other", [brightness[:9], brightness[9:19], brightness[19:]])
    with pytest.raises(UserError, match="needs column depth"):
        train(tiny(others=(replace(token, source="depth"),)), store.folder, tmp_path / "depth")


def test_a_sampler_and_guidance_draw_alike_by_name(parts: object, tiny_run: Path, tmp_path: Path) -> None:
    model = reglue.load(tiny_run, device="cpu")
    how: dict[str, Any] = {"sampler": "midpoint", "steps": 4, "guiders": {"token": 1.5}, "guidance_scale": 2.0}
    images = model.generate([0, 1], seed=3, output="tensor", **how)
    options = reglue.Sample(tiny_run, tmp_path / "out", count=2, seed=3, classes=("0", "1"), device="cpu", **how)
    drawn = reglue.sample(options)
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    for i, image in enumerate(images):
        assert torch.equal(pil_to_tensor(Image.open(drawn / f"{i:06d}.png")), image)
    awake(model)
    sampling = model.default_sampling.changed(**how)
    guided, without = (
        model.draw([0], model.condition([0]), 3, each) for each in (sampling, replace(sampling, guiders={}))
    )
    assert not torch.equal(guided["latent"], without["latent"])
    exact = model.draw([0], model.condition([0]), 0, model.default_sampling.changed(sampler="heun", steps=200))
    ours = model.draw([0], model.condition([0]), 0, model.default_sampling.changed(sampler="midpoint", steps=200))
    torch.testing.assert_close(ours["latent"].float(), exact["latent"].float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("sampler", OF_ANY_RUN)
def test_a_control_holds_a_modality_with_every_sampler(
    sampler: str, parts: dict[str, types.ModuleType], tiny_run: Path
) -> None:
    model = reglue.load(tiny_run, device="cpu")
    known = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    control = parts["A control"].hold(local=known)
    sampling = model.default_sampling.changed(sampler=sampler, steps=5)
    held, free = (
        model.draw([0, 1], model.condition([0, 1]), 1, sampling, controls=controls) for controls in ([control], [])
    )
    torch.testing.assert_close(held["local"].float(), known, rtol=1e-4, atol=1e-4)
    assert not torch.equal(held["latent"], free["latent"]), "the rest follows what is held"
    # It holds the same images to the same values, whatever the batches are.
    one, two = (
        model.generate([0, 1], seed=1, sampling=sampling, batch_size=size, controls=[control], output="tensor").int()
        for size in (1, 2)
    )
    assert (one - two).abs().max() <= 1


def test_a_tracker_records_and_never_stops_a_training(parts: object, tiny_store: Path, tmp_path: Path) -> None:
    run = train(tiny(), tiny_store, tmp_path / "run", track=("csv",), preview_every=2, preview_count=1)
    assert len((run / "losses.csv").read_text().splitlines()) == 2
    assert (run / "losses.csv.previews.png").is_file()
    with pytest.raises(UserError, match="csvv"):
        train(tiny(), tiny_store, tmp_path / "other", track=("csvv",))


def test_parts_work_on_the_command_line(tiny_store: Path, tmp_path: Path) -> None:
    script = tmp_path / "my_parts.py"
    script.write_text(examples()["A backbone"] + "\nfrom reglue.cli import main\n\nmain()\n")
    words: list[Any] = [
        "train",
        "sit",
        "--backbone",
        "plain",
        "--model=1x16x2/2",
        "--optimisation.steps=1",
        "--device=cpu",
    ]
    more = [
        "--optimisation.batch-size=4",
        "--preview-every=0",
        "--store",
        str(tiny_store),
        "--out",
        str(tmp_path / "run"),
    ]
    done = subprocess.run([sys.executable, script, *words, *more], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert '"backbone": "plain"' in (tmp_path / "run" / "run.json").read_text()


def test_without_a_class_a_sample_has_no_other_condition(parts: object, tiny_store: Path) -> None:
    """The unconditional branch of guidance is without all of them, so it is trained."""
    from reglue.data.batches import TrainingData, denoiser_config

    store, recipe = reglue.Store.open(tiny_store), tiny(conditions={"brightness": 0.3})
    sample = TrainingData(store, recipe, denoiser_config(store, recipe), 0).sample(range(2000))
    without_class, without = sample.condition["class"] == 3, ~sample.condition["brightness"].any(1)
    assert without_class.float().mean().item() == pytest.approx(0.1, abs=0.03)
    assert without[without_class].all()
    assert without.float().mean().item() == pytest.approx(0.1 + 0.9 * 0.3, abs=0.04)


def test_a_run_names_the_part_that_is_not_registered(parts: object, tiny_store: Path, tmp_path: Path) -> None:
    run = train(tiny(backbone="plain"), tiny_store, tmp_path / "run")
    plain = BACKBONES.pop("plain")
    try:
        with pytest.raises(UserError, match=r"not here: backbone plain: choose sit, lightning, uvit; import"):
            reglue.load(run, device="cpu")
    finally:
        BACKBONES["plain"] = plain
    with pytest.raises(UserError, match="no published code has a model with backbone plain"):
        reglue.export_run(reglue.ExportRun(run, tmp_path / "out.pt"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modality": "loss"}, "modality 'loss': choose a name of small letters, digits and _, and none of alignment"),
        ({"modality": "my.map"}, "modality 'my.map': choose a name"),
        ({"modality": "latent"}, "modalities latent, local, cls, latent: all need different names"),
        ({"source": ""}, r"modality components needs a column of the store \(source\)"),
        (
            {"kind": "token"},
            r"components is a token, and column local.pca-4 of .* holds \(4, 4, 4\) per image",
        ),
    ],
)
def test_a_modality_that_cannot_be_is_refused(
    changes: dict[str, Any], message: str, tiny_store: Path, tmp_path: Path
) -> None:
    good: dict[str, Any] = {"modality": "components", "kind": "map", "source": "local.pca-4"}
    with pytest.raises(UserError, match=message):
        train(tiny(others=(OtherModality(0.5, **{**good, **changes}),)), tiny_store, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditions": {"class": 0.5}}, "conditions class 0.5: use optimisation.label_dropout"),
        ({"conditions": {"brightness": 1.5}}, "conditions brightness 1.5: choose at least 0, below 1"),
        ({"sampling": Sampling(other_scales={"depth": 2.0})}, "sampling.other_scales depth: this recipe learns latent"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(parts: object, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(reglue.recipes["reglue"], **changes)


def test_previews_are_counted_for_each_batch(tiny_run: Path) -> None:
    shown: list[float] = []
    previews = Previews(lambda predicted, times: shown.append(round(times["latent"], 2)), every=2)
    model = reglue.load(tiny_run, device="cpu")
    model.generate([0, 1], batch_size=1, sampler="euler", steps=3, controls=[previews])
    assert shown == [0.33, 0.33]


@pytest.mark.parametrize(
    ("field", "name", "message"),
    [("backbone", "unet", "backbone unet: choose sit"), ("conditions", {"text": 0.1}, "condition text: choose class")],
)
def test_what_is_not_registered_is_named(field: str, name: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny(**{field: name})
