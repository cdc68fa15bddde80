"""What `import reglue` offers: every command, quickly, under names that stay; and generating images from Python."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image

import reglue
from reglue.cli import COMMANDS
from reglue.diffusion.samplers import SAMPLERS
from reglue.errors import UserError
from reglue.pipeline import GenerateOptions, ImageModel
from reglue.sampling import Sampling, SamplingChanges


def test_every_command_is_a_function_away() -> None:
    for command in COMMANDS.values():
        options = command.load()
        function = command.options.partition(":")[0].rpartition(".")[2]
        assert getattr(reglue, options.__name__) is options
        assert callable(getattr(reglue, function))
        assert {options.__name__, function} <= set(reglue.__all__)


def test_every_public_name_is_there() -> None:
    assert len(set(reglue.__all__)) == len(reglue.__all__)
    for name in reglue.__all__:
        assert getattr(reglue, name) is not None
    assert set(reglue.__all__) <= set(dir(reglue))
    published = {"sit", "dit", "repa", "redi", "reg", "reglue", "uvit", "lightningdit", "sfd", "meanflow"}
    assert set(reglue.recipes) == published
    with pytest.raises(AttributeError, match="'trian'"):
        reglue.trian  # type: ignore[attr-defined]  # noqa: B018
    assert not hasattr(reglue, "functions_of_others")


def test_importing_does_not_wait_for_torch() -> None:
    program = "import reglue, sys; assert reglue.__version__; print([m for m in ('torch', 'tyro') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_star_import_brings_every_name() -> None:
    names: dict[str, Any] = {}
    exec("from reglue import *", names)
    assert set(reglue.__all__) <= names.keys()


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> reglue.ImageModel:
    return reglue.load(tiny_run, device="cpu")


def test_single_options_change_the_models_own_sampling(dropping_run: Path) -> None:
    model = reglue.load(dropping_run, device="cpu")
    scales: dict[str, Any] = {"guidance_scale": 1.5, "local_scale": 1.2, "cls_scale": 1.1, "representation_scale": 1.3}
    sampling = Sampling("heun", 3, guidance_interval=(0.1, 0.8), rounding="round", **scales)
    at_once = model.generate([1, 2], seed=4, sampling=sampling, output="tensor")
    one_by_one = model.generate(
        [1, 2],
        seed=4,
        sampler="heun",
        steps=3,
        guidance_scale=1.5,
        local_scale=1.2,
        cls_scale=1.1,
        guidance_interval=(0.1, 0.8),
        representation_scale=1.3,
        rounding="round",
        output="tensor",
    )
    assert torch.equal(at_once, one_by_one)
    both = model.generate([1, 2], seed=4, sampling=Sampling("heun", 3), guidance_scale=2.0, output="tensor")
    assert torch.equal(
        both, model.generate([1, 2], seed=4, sampling=Sampling("heun", 3, guidance_scale=2.0), output="tensor")
    )
    assert not torch.equal(at_once, both)


def test_pictures_and_tensors_are_the_same_images(model: reglue.ImageModel) -> None:
    pictures = model.generate([0, "square", 2], steps=2)
    tensor = model.generate([0, "square", 2], steps=2, output="tensor", batch_size=2)
    assert all(isinstance(picture, Image.Image) for picture in pictures)
    assert (tensor.dtype, tensor.shape, tensor.device.type) == (torch.uint8, (3, 3, 16, 16), "cpu")
    for picture, image in zip(pictures, tensor, strict=True):
        assert abs(np.asarray(picture, int) - image.permute(1, 2, 0).numpy().astype(int)).max() <= 1


def test_ways_to_ask_for_classes(model: reglue.ImageModel) -> None:
    options: dict[str, Any] = {"steps": 2, "output": "tensor"}
    expected = model.generate([1, 1, 1], **options)
    assert torch.equal(model.generate("square", count=3, **options), expected)
    assert torch.equal(model.generate(classes=1, count=3, **options), expected)
    assert torch.equal(model.generate(np.array([1, 1, 1]), **options), expected)  # type: ignore[arg-type]
    assert torch.equal(model.generate(1, **options), expected[:1])
    assert torch.equal(model.generate(np.int64(1), **options), expected[:1])  # type: ignore[arg-type]
    assert model.generate(count=2, **options).shape == (2, 3, 16, 16)
    assert model.generate([], **options).shape == (0, 3, 16, 16)
    assert model.generate([]) == []


def test_numbers_are_indices_and_text_is_a_name_first(model: reglue.ImageModel) -> None:
    digits = replace(model, record=replace(model.record, class_names=("0", "1", "10", "2")))
    assert [digits.label(name) for name in ("2", 2, np.int64(2), torch.tensor(2))] == [3, 2, 2, 2]  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"class 3: choose a name \(0, 1, 10, 2\)"):
        digits.label("3")  # Among numbers for names another number is a mistake.
    with pytest.raises(UserError, match="class 10: choose 0 to 3"):
        digits.label(np.int64(10))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["triangle"]}, "class triangle"),
        ({"classes": [3]}, "choose 0 to 2"),
        ({"classes": [0, 1], "count": 3}, "count 3, but 2 classes"),
        ({"count": -1}, "count -1"),
        ({"classes": 0, "sampler": "dopri"}, f"choose {', '.join(SAMPLERS)}"),
        ({"classes": 0, "state_precision": "float16"}, "state_precision float16: choose float32, float64"),
        ({"classes": 0, "precision": "int8"}, "precision int8: choose auto, float32, tf32, bfloat16"),
        ({"classes": 0, "time_shift": -1.0}, "time_shift -1.0: choose more than 0"),
        ({"classes": 0, "rounding": "up"}, "choose truncate, round"),
        ({"classes": 0, "steps": 0}, "steps 0: choose at least 1"),
        ({"classes": 0, "batch_size": 0}, "batch_size must be at least 1"),
        ({"classes": 0, "seed": -1}, "seed -1: choose 0 or more"),
        ({"classes": [1.5]}, "class 1.5: choose 0 to 2"),
        ({"classes": 0, "guidance_scale": float("inf")}, "guidance_scale inf: choose a finite number"),
        ({"classes": 0, "guided_channels": 0}, "guided_channels 0: choose at least 1"),
        ({"classes": 0, "guidance_interval": (0.5, 0.1)}, "guidance_interval"),
        ({"classes": 0, "output": "jpeg"}, "choose 'pil' or 'tensor'"),
    ],
)
def test_mistakes_say_what_to_change(model: reglue.ImageModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        model.generate(**options)


def test_an_unknown_option_is_a_type_error(model: reglue.ImageModel) -> None:
    takes = r"takes classes, count, .*output, .*sampling, .*guidance_scale, .*rounding, .*absolute_tolerance$"
    with pytest.raises(TypeError, match=rf"^generate\(\) takes no guidance_scal; it {takes}"):
        model.generate(0, guidance_scal=2.0)  # type: ignore[call-overload]


def test_autoguidance_needs_a_weaker_model(model: reglue.ImageModel) -> None:
    with pytest.raises(UserError, match=r"auto_scale 2\.0: autoguidance needs a weaker model"):
        model.generate(0, auto_scale=2.0)


def test_progress_is_shown_when_asked_for(
    model: reglue.ImageModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reglue.progress.EVERY", 0.0)
    model.generate(0, steps=2)
    assert capsys.readouterr().err == ""
    model.generate([0, 1, 2], steps=2, batch_size=2, progress=True)
    assert "4/4" in capsys.readouterr().err


def test_a_model_can_be_moved(model: reglue.ImageModel) -> None:
    assert model.to("cpu") is model
    assert model.device.type == "cpu"


def test_options_take_text_for_paths(tiny_images: Path, tiny_run: Path, tmp_path: Path) -> None:
    images, store, run, out = (str(path) for path in (tiny_images, tmp_path / "store", tiny_run, tmp_path / "samples"))
    prepare: Any = reglue.Prepare
    assert len(reglue.prepare(prepare(images, store, 16, "starter", "none", workers=0))) == 24
    sample: Any = reglue.Sample
    assert reglue.sample(sample(run, out, 1, steps=1)) == Path(out)
    assert sample(run, out, autoencoder="starter").autoencoder == "starter"


def test_editors_know_the_keywords_of_generate() -> None:
    types = get_type_hints(Sampling)
    assert get_type_hints(SamplingChanges) == {name: kind | None for name, kind in types.items()}
    own = {name for name in signature(ImageModel.generate).parameters if name not in types}
    assert own - {"self", "classes", "output"} == {*get_type_hints(GenerateOptions)} - {*types}


def test_a_model_says_what_it_is_in_a_line(model: ImageModel) -> None:
    assert len(repr(model)) < 200
    assert repr(model).startswith("ImageModel(reglue 2x32x2/2, 16×16, 3 classes, step 6, from ")
