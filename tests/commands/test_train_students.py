"""Students from the command line: trained from a run, resumed, sampled in few steps, edited, and what they refuse."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from helpers import mistake
from reglue import cli
from reglue.commands.sample import Sample, sample
from reglue.commands.train import train
from reglue.data.batches import TrainingData
from reglue.data.store import Store
from reglue.diffusion.embeddings import SPAN
from reglue.diffusion.students import STUDENTS
from reglue.errors import UserError
from reglue.pipeline import ImageModel, load
from reglue.run import RunRecord
from reglue.training import checkpoints


def options(teacher: Path, store: Path, out: Path, *more: str):
    """Without a recipe, that of the teacher is taken."""
    arguments = ["train", "--from", teacher, "--store", store, "--out", out, "--keep=0", "--preview-every=0", *more]
    return cli.parse([str(word) for word in arguments])


@pytest.fixture(scope="module", params=STUDENTS)
def student(request: pytest.FixtureRequest, tiny_run: Path, tiny_store: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("students") / request.param
    more = ("--optimisation.steps=4", "--optimisation.accumulate=2", "--checkpoint-every=2", "--device=cpu")
    return train(options(tiny_run, tiny_store, out, "--student", request.param, *more))


@pytest.fixture(scope="module")
def model(student: Path) -> ImageModel:
    return load(student, device="cpu")


def test_a_student_is_the_teacher_s_recipe_with_guidance_inside_and_few_steps(student: Path, tiny_run: Path) -> None:
    record, teacher = RunRecord.read(student), RunRecord.read(tiny_run)
    recipe, sampling = record.recipe, teacher.recipe.sampling
    assert (recipe.student, recipe.model, recipe.local) == (student.name, teacher.recipe.model, teacher.recipe.local)
    assert record.denoiser.span
    assert (recipe.sampling.sampler, recipe.sampling.steps, recipe.sampling.guidance_scale) == ("mean-velocity", 4, 1.0)
    learned = recipe.few_steps
    assert (learned.guidance_scale, learned.guidance_interval) == (sampling.guidance_scale, sampling.guidance_interval)
    start, source = (checkpoints.read_weights(checkpoints.find(run, step) / checkpoints.EMA)
                     for run, step in ((student, 0), (tiny_run, None)))  # fmt: skip
    assert all(torch.equal(start[name], value) for name, value in source.items())
    assert not start[f"time_offsets.{SPAN}.2.weight"].any(), "it begins as the flow"


def test_a_student_resumes_with_the_same_bits(student: Path, tiny_run: Path, tiny_store: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(student, tmp_path / student.name))
    shutil.rmtree(checkpoints.find(broken, 4))
    more = ("--optimisation.steps=4", "--optimisation.accumulate=2", "--checkpoint-every=2", "--device=cpu")
    train(options(tiny_run, tiny_store, broken, "--student", student.name, *more))
    for name in (checkpoints.MODEL, checkpoints.EMA):
        whole, resumed = (checkpoints.read_weights(checkpoints.find(run, 4) / name) for run in (student, broken))
        assert all(torch.equal(resumed[key], value) for key, value in whole.items())
        assert whole[f"time_offsets.{SPAN}.2.weight"].any(), "and learns what a step is"


def test_samples_of_a_student_are_a_function_of_seed_and_index(
    student: Path, model: ImageModel, tmp_path: Path
) -> None:
    sample(Sample(student, tmp_path / "samples", count=3, device="cpu"))
    assert '"mean-velocity"' in (tmp_path / "samples" / "samples.json").read_text()
    by_steps = {steps: model.generate([0, 1], steps=steps, output="tensor") for steps in (1, 4)}
    assert torch.equal(model.generate([1, 1], steps=4, output="tensor", batch_size=1)[1], by_steps[4][1])
    assert not torch.equal(by_steps[1], by_steps[4])


def test_a_student_is_sampled_otherwise_too(model: ImageModel) -> None:
    images = {sampler: model.generate([0], sampler=sampler, steps=4, output="tensor")
              for sampler in ("euler", "heun", "euler-maruyama")}  # fmt: skip
    assert not torch.equal(images["euler"], images["heun"])


def test_edits_of_a_student_hold_what_they_are_told_to(model: ImageModel, tiny_images: Path) -> None:
    image = next(tiny_images.rglob("*.png"))
    assert len(model.edit(image, keep=("local",), count=2)) == 2
    assert len(model.edit(image, strength=0.6, resample=1)) == 1
    with pytest.raises(UserError, match="flow_edit has no place for the long steps of mean-velocity; choose sampler"):
        model.edit(image, flow_edit=True, classes=0)
    assert len(model.edit(image, flow_edit=True, classes=0, sampler="euler")) == 1


def test_guidance_is_not_applied_twice(model: ImageModel, tiny_run: Path) -> None:
    with pytest.raises(UserError, match=r"guidance_scale 2: .* no unguided branch \(it has learned guidance 2.8\)"):
        model.generate([0], guidance_scale=2)
    with pytest.raises(UserError, match="sampler mean-velocity is for students, and this run is none; choose euler"):
        load(tiny_run, device="cpu").generate([0], sampler="mean-velocity")


def test_the_samples_of_a_step_are_cut_in_any_way(student: Path, tiny_store: Path) -> None:
    record = RunRecord.read(student)
    data = TrainingData(Store.open(tiny_store), record.recipe, record.denoiser, seed=3)
    whole, parts = data.sample(range(12)), [data.sample(range(start, start + 4)) for start in (0, 4, 8)]
    assert isinstance(whole.time, dict)
    for name, times in whole.time.items():
        assert torch.equal(times, torch.cat([part.time[name] for part in parts]))  # type: ignore[index]
    assert whole.spanning is not None
    assert 0 < len(whole.spanning) < 12
    numbers = [part.spanning + start for part, start in zip(parts, (0, 4, 8), strict=True)]  # type: ignore[operator]
    assert torch.equal(whole.spanning, torch.cat(numbers))


def test_a_student_from_scratch_and_one_without_guidance(tiny_store: Path, tmp_path: Path) -> None:
    tiny = ["--model=2x32x2/2", "--optimisation.batch-size=8", "--optimisation.steps=1", "--optimisation.compile=no"]
    arguments = ["--store", str(tiny_store), "--out", str(tmp_path / "run"), "--device=cpu", "--preview-every=0"]
    run = train(cli.parse(["train", "meanflow", *arguments, *tiny, "--few-steps.guidance-scale=1"]))
    recipe = RunRecord.read(run).recipe
    assert (recipe.name, recipe.student, recipe.sampling.steps) == ("meanflow", "meanflow", 1)
    assert len(load(run, device="cpu").generate([0], guidance_scale=2)) == 1


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--student=consistency"], "--student consistency: choose meanflow, shortcut"),
        (["--student=meanflow", "--prediction=noise"], "--student meanflow predicts mean velocities: choose"),
        (["--student=meanflow", "--optimisation.compile=model"], "choose --optimisation.compile blocks"),
        (["--student=shortcut", "--few-steps.share=2"], "--few-steps.share 2.0: choose at least 0 and at most 1"),
        (["--student=shortcut", "--few-steps.guidance-interval", "1", "0"], "--few-steps.guidance-interval 1.0 0.0"),
        (["--student=meanflow", "--optimisation.label-dropout=0", "--few-steps.guidance-scale=2"],
         "--optimisation.label-dropout 0 does not train: choose 1"),
    ],
)  # fmt: skip
def test_mistakes(
    more: list[str], line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert line in mistake(capsys, monkeypatch, "train", "sit", "--store", "a", "--out", "b", *more)


def test_a_run_that_is_not_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    line = mistake(capsys, monkeypatch, "train", "--from=nowhere", "--store", "a", "--out", "b")
    assert "nowhere is not a run" in line
