"""Runs as pipelines of diffusers: the real library loads them, and what they draw is what `reglue sample` draws."""

from __future__ import annotations

import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from golden_files import Golden
from PIL import Image

import reglue
from helpers import TINY_RECIPE
from reglue.cli import parse
from reglue.commands.export_run import export_run
from reglue.commands.import_run import import_run
from reglue.commands.sample import sample
from reglue.commands.train import train
from reglue.encoders.autoencoders import Taef2Autoencoder
from reglue.encoders.known import STARTER
from reglue.errors import UserError
from reglue.files import seal_of
from reglue.options.import_run import ImportRun
from reglue.papers import PAPERS
from reglue.portable import INDEX
from reglue.portable.diffusers import RegluePipeline

QUICK = ("dit", "redi", "sfd")
"""A chain and no semantics, no class token, and a time of each modality."""
OTHERS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in PAPERS
    if name not in ("reglue", "reals")
]


def exported(run: Path | str, folder: Path) -> Path:
    return export_run(parse(["export", str(run), "--to", "diffusers", "--out", str(folder)]))


def loaded(folder: Path, **options: Any) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module", autouse=True)
def own_modules(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """diffusers copies a folder's code before it runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Path:
    return exported(tiny_run, tmp_path_factory.mktemp("exported") / "pipeline")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return loaded(folder)


def test_the_same_seed_is_the_same_pixels(pipeline: Any, tiny_run: Path, tmp_path: Path) -> None:
    options = ["--count=5", "--seed=3", "--steps=3", "--guidance-scale=2", "--batch-size=2", "--device=cpu"]
    sample(parse(["sample", str(tiny_run), "--out", str(tmp_path / "out"), *options]))
    expected = np.stack([np.asarray(Image.open(file)) for file in sorted((tmp_path / "out").glob("*.png"))])
    asked: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 2.0, "seed": 3}
    labels = [0, "square", 2, 0, 1]
    drawn = pipeline.to("cpu")(labels, **asked).images
    assert np.abs(np.stack([np.asarray(image) for image in drawn]).astype(int) - expected.astype(int)).max() <= 1
    (array,) = pipeline(labels, output_type="np", return_dict=False, **asked)
    assert array.dtype == np.float32
    assert np.array_equal((255 * array).round(), [np.asarray(image) for image in drawn])
    tensor = pipeline(labels, output_type="pt", **asked).images
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    latents = pipeline(labels, output_type="latent", rounding="round", **asked).images
    decoded = 127.5 * pipeline.vae.decode(latents).sample + 128
    rounded = pipeline(labels, output_type="np", rounding="round", **asked).images
    assert np.array_equal(decoded.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy(), (255 * rounded).round())


@pytest.mark.parametrize("recipe", OTHERS)
def test_runs_of_every_recipe(recipe: str, tiny_store: Path, tmp_path: Path) -> None:
    line = ["train", recipe, "--store", str(tiny_store), "--out", str(tmp_path / "run"), *TINY_RECIPE]
    ignored = [] if PAPERS[recipe].recipe.local.present else ["--local.compressor=conv-4"]
    run = train(parse([word for word in [*line, "--optimisation.steps=1"] if word not in ignored]))
    ours = reglue.load(run, device="cpu").generate([0, 2], steps=2, seed=1, output="tensor")
    theirs = loaded(exported(run, tmp_path / "out"))([0, 2], num_inference_steps=2, seed=1, output_type="pt").images
    assert torch.equal((255 * theirs).round().to(torch.uint8), ours)


def test_a_published_model_without_classes(autoencoder: str, tmp_path: Path) -> None:
    weights = dict(Golden("uvit").published)
    weights.pop("label_emb.weight")
    weights["pos_embed"] = weights["pos_embed"][:, 1:]
    torch.save(weights, tmp_path / "nnet_ema.pth")
    run = import_run(ImportRun(tmp_path / "nnet_ema.pth", tmp_path / "run", autoencoder=autoencoder, heads=4))
    pipeline = loaded(exported(run, tmp_path / "out"))
    ours = reglue.load(run, device="cpu").generate(count=2, steps=4, seed=1, output="tensor")
    theirs = pipeline(batch_size=2, num_inference_steps=4, seed=1, output_type="pt").images
    assert torch.equal((255 * theirs).round().to(torch.uint8), ours)


def test_a_generator_stands_for_its_seed_until_it_has_drawn(pipeline: Any) -> None:
    def drawn(**options: Any) -> torch.Tensor:
        return pipeline([0, 1], num_inference_steps=2, output_type="pt", **options).images

    of_seed, generator = drawn(seed=7), torch.Generator().manual_seed(7)
    assert torch.equal(drawn(generator=generator), of_seed)
    second = drawn(generator=generator)
    assert not torch.equal(second, of_seed)
    again = torch.Generator().manual_seed(7)
    assert torch.equal([drawn(generator=again) for _ in range(2)][1], second)
    several = drawn(generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)])
    torch.testing.assert_close(several[0], of_seed[0], rtol=0, atol=1 / 255)
    with pytest.raises(UserError, match="1 generators for 2 images"):
        drawn(generator=[again])
    torch.manual_seed(0)
    first = drawn()
    assert not torch.equal(drawn(), first)
    torch.manual_seed(0)
    assert torch.equal(drawn(), first)


def test_progress_is_diffusers_own(pipeline: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.set_progress_bar_config(disable=False)
    pipeline("circle", batch_size=3, num_inference_steps=4, sampler="euler")
    pipeline.set_progress_bar_config(disable=True)
    assert "4/4" in capsys.readouterr().err


def test_it_is_saved_and_loaded_again(folder: Path, pipeline: Any, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "again")
    files = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    assert files == sorted(f.relative_to(tmp_path / "again") for f in (tmp_path / "again").rglob("*") if f.is_file())
    for file in files:
        assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file
    assert all(len({*seal_of(file)}) == 1 for file in folder.rglob("*.safetensors"))
    half = loaded(tmp_path / "again", custom_pipeline=str(tmp_path / "again"), torch_dtype=torch.float16)
    asked: dict[str, Any] = {"num_inference_steps": 2, "seed": 0, "output_type": "np"}
    assert np.abs(half([0], **asked).images - pipeline([0], **asked).images).max() < 0.05
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(folder)


def test_nothing_of_this_machine_goes_along(folder: Path, tiny_run: Path, tiny_autoencoder: str) -> None:
    for file in folder.rglob("*"):
        for place in (str(tiny_run.parent), tiny_autoencoder, str(folder.parent)):
            assert not file.is_file() or place.encode() not in file.read_bytes(), file


def test_mistakes_are_one_line(
    folder: Path, pipeline: Any, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="class dog: choose 0 to 2"):
        pipeline("dog")
    with pytest.raises(UserError, match="steps 0: choose at least 1"):
        pipeline(0, num_inference_steps=0)
    with pytest.raises(UserError, match="output_type numpy: choose pil, np, pt or latent"):
        pipeline(0, output_type="numpy")
    with pytest.raises(UserError, match="pipeline holds other files"):
        exported(STARTER, folder)
    tiny = reglue.load(tiny_run, device="cpu")
    spec = replace(tiny.autoencoder.spec, kind="TAEF2")
    tiny.autoencoder = Taef2Autoencoder(torch.nn.Identity(), torch.nn.Identity(), spec)
    with pytest.raises(UserError, match="diffusers has no class for the autoencoder TAEF2"):
        RegluePipeline.of(tiny)
    stranger = Path(shutil.copytree(folder, tmp_path / "stranger"))
    (stranger / INDEX).write_text('{"_class_name": "DiTPipeline", "vae": ["diffusers", "AutoencoderKL"]}')
    with pytest.raises(UserError, match="is a pipeline of diffusers that was made of no run"):
        reglue.info(reglue.Info(stranger))
    monkeypatch.setitem(sys.modules, "reglue.portable.diffusers", None)
    with pytest.raises(ImportError, match=r"this pipeline needs the package reglue \(pip install reglue\)"):
        runpy.run_path(str(folder / "pipeline.py"))
