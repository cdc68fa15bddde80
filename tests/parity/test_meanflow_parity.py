"""MeanFlow against the numbers of its published implementation, through the importer that users use."""

from __future__ import annotations

import pytest
import torch
from golden_files import Golden, assert_close
from torch import Tensor

from reglue.diffusion.embeddings import SPAN
from reglue.diffusion.guidance import Guidance, guided_velocity
from reglue.diffusion.modalities import LATENT
from reglue.diffusion.objective import TrainingSample, loss_terms
from reglue.diffusion.paths import LINEAR
from reglue.diffusion.samplers import mean_velocity, uniform_times
from reglue.diffusion.students import Lesson, MeanFlow, adaptive, derivative, evaluate, interval_of
from reglue.published.weights import export_official
from solving import solve

OMEGA, KAPPA, HIGHEST = 0.2, 0.92, 0.8
STUDENTS = {
    "plain": MeanFlow(Guidance(), share=1.0),
    "cfg": MeanFlow(Guidance(OMEGA / (1 - KAPPA), interval=(0.0, HIGHEST)), share=1.0, mix=KAPPA),
}


@pytest.fixture(scope="module")
def golden(golden_of: type[Golden]) -> Golden:
    return golden_of("meanflow")


def lesson_of(golden: Golden, case: str) -> tuple[Lesson, Tensor]:
    """The samples, and the numbers of those whose step has a length."""
    labels, t, r = golden["input.y"].clone(), golden["loss.t"], golden["loss.r"]
    if (dropped := golden.get(f"loss.{case}.dropped")) is not None:
        labels[dropped] = golden.about["num_classes"]
    noisy, velocity = LINEAR.interpolate({LATENT: golden["loss.x"]}, {LATENT: golden["loss.noise"]}, t)
    return Lesson(noisy, velocity, t, t - r, {"class": labels}, {}), (t > r).nonzero().squeeze(1)


@torch.no_grad()
def test_forward_pass(golden: Golden) -> None:
    t, span = golden["input.t"], golden["input.t"] - golden["input.r"]
    velocity = evaluate(golden.denoiser(), {LATENT: golden["input.x"]}, t, span, golden.condition)
    assert_close(velocity[LATENT], golden["forward.velocity"])


@pytest.mark.parametrize("case", STUDENTS)
def test_the_loss_and_its_parts(golden: Golden, case: str) -> None:
    denoiser, student = golden.denoiser(), STUDENTS[case]
    lesson, spanning = lesson_of(golden, case)
    target = student.target(denoiser, denoiser, lesson, spanning)[LATENT]
    assert_close(target, golden[f"loss.{case}.target"])
    velocity = student.guided(denoiser, lesson, student.mix)
    with torch.no_grad():
        slope = derivative(denoiser, Lesson(**{**vars(lesson), "velocity": velocity}))[LATENT]
    assert_close(slope, golden[f"loss.{case}.dudt"])

    predicted = evaluate(denoiser, lesson.noisy, lesson.time, lesson.span, lesson.condition)[LATENT]
    assert_close(predicted, golden[f"loss.{case}.prediction"])
    squared = (predicted - target).square().flatten(1).sum(1)
    assert_close(squared, golden[f"loss.{case}.squared_sum"])
    # The published code weighs the square of the sum of squares; the paper, and `weighed`, the sum itself.
    published = adaptive(squared.square(), golden.about["adaptive_p"])
    assert_close(published, golden[f"loss.{case}.adaptive"])
    bias = denoiser.velocity.bias
    for loss, key in (squared, "grad"), (published, "adaptive_grad"):
        (gradient,) = torch.autograd.grad(loss.mean(), bias, retain_graph=True)
        assert_close(gradient, golden[f"loss.{case}.{key}_final_bias"])


@pytest.mark.parametrize("case", STUDENTS)
def test_what_training_calls_has_the_gradient_of_the_paper(golden: Golden, case: str) -> None:
    denoiser, (lesson, spanning) = golden.denoiser(), lesson_of(golden, case)
    time = {LATENT: lesson.time, SPAN: lesson.span}
    sample = TrainingSample(
        {LATENT: golden["loss.x"]}, {LATENT: golden["loss.noise"]}, time, lesson.condition, spanning=spanning
    )
    bias = denoiser.velocity.bias
    loss = loss_terms(denoiser, LINEAR, sample, student=STUDENTS[case])[LATENT]
    assert_close(loss, golden[f"loss.{case}.squared_sum"].mean() / golden["loss.x"][0].numel())
    predicted = evaluate(denoiser, lesson.noisy, lesson.time, lesson.span, lesson.condition)[LATENT]
    squared = (predicted - golden[f"loss.{case}.target"]).square().flatten(1).sum(1)
    (expected,) = torch.autograd.grad((squared / (squared.detach() + 1e-3)).mean(), bias)
    assert_close(torch.autograd.grad(loss, bias)[0], expected)


def test_times(golden: Golden) -> None:
    share = golden.about.get("ratio_r_not_equal_t", 0.25)
    first, second = golden["time.normal"].unbind(1)
    r, t = interval_of(first, second, golden["time.uniform"], share)
    assert_close(r, golden["time.r"])
    assert_close(t, golden["time.t"])


@torch.no_grad()
def test_sampling(golden: Golden) -> None:
    denoiser = golden.denoiser()
    cases = {key.split(".")[1] for key in golden.tensors if key.startswith("sample.") and key.endswith(".out")}
    assert cases
    for case in cases:
        _, steps, *guided = case.split("_")
        velocity = guided_velocity(
            denoiser, golden.condition, denoiser.config.modalities, Guidance(2.0 if guided else 1.0)
        )
        start = {LATENT: golden["sample.x_init"].double()}
        result = solve(mean_velocity, velocity, start, uniform_times(int(steps)))
        assert_close(result[LATENT], golden[f"sample.{case}.out"])


def test_the_file_is_recognised_and_given_back(golden: Golden) -> None:
    official = golden.official()
    assert official.family == "meanflow"
    assert official.config.span
    published = export_official(official.family, official.config, official.weights)
    assert published.keys() == golden.published.keys()
    for name, value in golden.published.items():
        assert_close(published[name], value)
