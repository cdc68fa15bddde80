"""DiT from end to end: it trains, resumes, samples, edits, and its official files come in and go out."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_files import Golden, assert_close
from PIL import Image

from helpers import OF_ANY_RUN, TINY_RECIPE
from reglue import generation
from reglue.cli import parse
from reglue.commands.export_run import ExportRun, export_run
from reglue.commands.import_run import ImportRun, import_run
from reglue.commands.train import train
from reglue.diffusion.modalities import LATENT
from reglue.errors import UserError
from reglue.pipeline import load
from reglue.published.containers import read_official
from reglue.run import RunRecord
from reglue.training import checkpoints


def trained(store: Path, out: Path, *more: str, recipe: str = "dit") -> Path:
    return train(parse(["train", recipe, "--store", str(store), "--out", str(out), *TINY_RECIPE, *more]))


@pytest.fixture(scope="module")
def run(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tiny_store, tmp_path_factory.mktemp("dit") / "run", "--optimisation.steps=10")


def lines_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_variance_is_a_term_of_the_loss(run: Path) -> None:
    for line in lines_of(run):
        assert line["loss"] == pytest.approx(line["latent"] + line["variance"], rel=1e-5)
    recipe = RunRecord.read(run).recipe
    assert recipe.loss_weights(0) == {"latent": 1, "variance": 1}


@pytest.mark.trains
def test_the_variance_is_learned(tiny_store: Path, tmp_path: Path) -> None:
    lines = lines_of(trained(tiny_store, tmp_path / "run", "--optimisation.steps=80"))
    assert lines[-1]["latent"] < lines[0]["latent"]
    weights = checkpoints.read_weights(checkpoints.find(tmp_path / "run") / checkpoints.MODEL)
    assert weights["velocity.weight"].unflatten(0, (4, -1))[:, 3:].abs().max() > 1e-3


def test_a_variance_of_no_weight_is_not(tiny_store: Path, tmp_path: Path) -> None:
    run = trained(tiny_store, tmp_path / "run", "--optimisation.steps=5", "--variance.weight=0")
    weights = checkpoints.read_weights(checkpoints.find(run) / checkpoints.MODEL)
    assert not weights["velocity.weight"].unflatten(0, (4, -1))[:, 3:].any()
    assert weights["velocity.weight"].any()


def test_resumed_training_gives_the_same_bits(run: Path, tiny_store: Path, tmp_path: Path) -> None:
    out = trained(tiny_store, tmp_path / "run", "--optimisation.steps=5")
    trained(tiny_store, out, "--optimisation.steps=10")
    for name in (checkpoints.EMA, checkpoints.MODEL):
        whole, resumed = (checkpoints.read_weights(checkpoints.find(each) / name) for each in (run, out))
        assert all(torch.equal(resumed[key], value) for key, value in whole.items())


@pytest.mark.parametrize("sampler", OF_ANY_RUN)
def test_every_sampler_draws_from_it(run: Path, sampler: str) -> None:
    model = load(run, device="cpu")
    assert model.default_sampling.sampler == "ddpm"
    sampling = replace(model.default_sampling, sampler=sampler, steps=6, guidance_interval=(0.2, 0.9))
    one, two = (model.draw([i], model.condition([i]), 0, sampling)[LATENT] for i in (0, 1))
    both = model.draw([0, 1], model.condition([0, 1]), 0, sampling)[LATENT]
    assert both.isfinite().all()
    torch.testing.assert_close(torch.cat([one, two]), both, rtol=1e-3, atol=1e-4)


def test_more_steps_than_the_chain_has_are_refused(run: Path) -> None:
    model = load(run, device="cpu")
    with pytest.raises(
        UserError, match="steps 1001: ddpm goes along the 1000 steps of the model's training; choose 1000"
    ):
        model.generate(0, steps=1001)
    assert len(model.generate(0, steps=1)) == 1


def test_it_edits(run: Path, tmp_path: Path) -> None:
    model = load(run, device="cpu")
    picture, mask = Image.new("RGB", (16, 16), (200, 40, 40)), Image.new("L", (16, 16))
    mask.paste(255, (8, 0, 16, 16))
    for sampler in ("ddpm", "ddim"):
        (outside,) = model.edit(picture, mask=mask, classes=1, sampler=sampler, steps=4)
        assert outside.size == (16, 16)
        (varied,) = model.edit(picture, strength=0.5, classes=1, sampler=sampler, steps=4)
        assert varied.tobytes() != outside.tobytes()


@pytest.mark.parametrize("changes", [["--prediction=noise"], ["--prediction=noise", "--learn-sigma"]])
def test_a_joint_model_may_predict_noise(changes: list[str], tiny_store: Path, tmp_path: Path) -> None:
    """Maps have learned variances; a token, which has none, takes that of DDPM."""
    run = trained(tiny_store, tmp_path / "run", "--optimisation.steps=5", *changes, recipe="reglue")
    assert ("variance" in lines_of(run)[0]) == (len(changes) == 2)
    model = load(run, device="cpu")
    for sampler in ("ddpm", "ddim"):
        state = model.draw(
            [0, 1], model.condition([0, 1]), 0, replace(model.default_sampling, sampler=sampler, steps=4)
        )
        assert {name: bool(x.isfinite().all()) for name, x in state.items()} == dict.fromkeys(state, True)
    with pytest.raises(UserError, match=r"no published code has a model with prediction noise \(DiT\) and"):
        export_run(ExportRun(run, tmp_path / "out.pt"))


# ---- official files


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as DiT's training writes it."""
    golden, file = Golden("dit"), tmp_path_factory.mktemp("official") / "0400000.pt"
    other = {name: value + 1 for name, value in golden.published.items()}
    about = argparse.Namespace(model="DiT-XL/2", image_size=64, num_classes=1000, vae="ema")
    torch.save({"model": other, "ema": golden.published, "opt": {"state": {}}, "args": about}, file)
    return file


def imported(file: Path, out: Path, golden: Golden, **more: Any) -> Path:
    return import_run(ImportRun(file, out, heads=golden.about["num_heads"], **more))


@pytest.mark.parametrize("case", ["ddpm", "ddpm_cfg", "ddim"])
def test_an_imported_file_samples_as_its_code_does(
    case: str, official: Path, autoencoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    golden = Golden("dit")
    run = imported(official, tmp_path / "run", golden, autoencoder=autoencoder)
    assert "By its shapes it is SiT or DiT: DiT, since its options name the model DiT-XL/2." in capsys.readouterr().out
    images = len(golden["input.y"])
    draws = [golden["sample.x_init"], *golden[f"sample.{case}.noise"][:, :images]]
    given = iter([{LATENT: draw.double()} for draw in draws])
    monkeypatch.setattr(generation, "drawn_ahead", lambda *_: nullcontext(given))
    model = load(run, device="cpu")
    assert (model.step, model.default_sampling.sampler, model.default_sampling.steps) == (400_000, "ddpm", 250)
    sampling = replace(model.default_sampling, sampler=case.partition("_")[0], steps=6)
    if not case.endswith("cfg"):
        sampling = replace(sampling, guidance_scale=1.0)
    state = model.draw(range(images), model.condition(golden["input.y"].tolist()), 0, sampling)
    assert_close(state[LATENT], golden[f"sample.{case}.out"])


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_what_is_imported_is_exported_again(official: Path, ending: str, tmp_path: Path) -> None:
    golden = Golden("dit")
    run = imported(official, tmp_path / "run", golden)
    out = export_run(ExportRun(run, tmp_path / f"out{ending}"))
    again = read_official(out)
    assert again.weights.keys() == golden.published.keys()
    assert all(torch.equal(again.weights[n], w) for n, w in golden.published.items() if n != "pos_embed")
    assert not {"prediction", "path_type"} & again.arguments.keys(), "DiT's code has no such options"
    assert again.step == 400_000
    back = import_run(ImportRun(out, tmp_path / "back"))
    records = [RunRecord.read(each) for each in (run, back)]
    assert replace(records[0], origin="", versions={}) == replace(records[1], origin="", versions={})


def test_a_trained_run_is_exported(run: Path, tmp_path: Path) -> None:
    back = import_run(ImportRun(export_run(ExportRun(run, tmp_path / "out.pt")), tmp_path / "back"))
    mine, theirs = load(run, device="cpu"), load(back, device="cpu")
    changes: dict[str, Any] = {"seed": 3, "steps": 5, "output": "tensor"}
    drawn = [model.generate([0, 1], **changes, precision="float32") for model in (mine, theirs)]
    assert torch.equal(*drawn)
