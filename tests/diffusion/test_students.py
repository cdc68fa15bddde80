"""Students: what their targets are made of, on functions whose mean velocities are known and on small networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from reglue.diffusion.conditions import Condition
from reglue.diffusion.denoiser import Denoiser, DenoiserConfig, Prediction
from reglue.diffusion.embeddings import SPAN
from reglue.diffusion.guidance import GuidedVelocity
from reglue.diffusion.modalities import LATENT, Modality, State, TensorTimes, expand_as
from reglue.diffusion.objective import TrainingSample, loss_terms
from reglue.diffusion.paths import LINEAR
from reglue.diffusion.samplers import euler, mean_velocity, uniform_times
from reglue.diffusion.specs import Guidance
from reglue.diffusion.students import SHORTEST, STUDENTS, Lesson, MeanFlow, Shortcut, Student, derivative, evaluate
from solving import solve

LABELS: Condition = {"class": torch.tensor([0, 1, 2, 2])}
NULL = 2
TIME = torch.tensor([0.9, 0.5, 0.7, 1.0], dtype=torch.float64)
SPANS = torch.tensor([0.5, 0.25, 0.0, 2 * SHORTEST], dtype=torch.float64)
SPANNING = torch.tensor([0, 1, 3])
NO_GUIDANCE = Guidance()


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Known:
    """A function of (x, t, d, labels) in place of a network."""

    velocity: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    def null(self, batch: int) -> Condition:
        return {"class": torch.full((batch,), NULL)}

    def __call__(self, state: State, time: Tensor | TensorTimes, condition: Condition) -> Prediction:
        times = {LATENT: time, SPAN: torch.zeros_like(time)} if isinstance(time, Tensor) else time
        span = times.get(SPAN, torch.zeros_like(times[LATENT]))
        label = condition["class"]
        return Prediction({n: self.velocity(x, *(expand_as(v, x) for v in (times[LATENT], span, label)))
                           for n, x in state.items()}, None)  # fmt: skip


def lesson() -> Lesson:
    noise = {LATENT: normal(4, 2, 3, 3, seed=1), "cls": normal(4, 5, seed=2)}
    noisy, velocity = LINEAR.interpolate({name: torch.zeros_like(x) for name, x in noise.items()}, noise, TIME)
    return Lesson(noisy, velocity, TIME, SPANS, LABELS, {})


ALL_DATA_IS_ZERO = Known(lambda x, t, d, y: x / t)  # on every path, whatever the length of the step
DATA_IS_NORMAL = Known(lambda x, t, d, y: x * (1 - size(t - d) / size(t)) / d.clamp(min=1e-9))


def size(t: Tensor) -> Tensor:
    """Of x_t, along whose paths x_t / √((1−t)² + t²) stays."""
    return ((1 - t) ** 2 + t**2).sqrt()


@pytest.mark.parametrize("student", [kind(NO_GUIDANCE) for kind in STUDENTS.values()], ids=[*STUDENTS])
def test_what_is_right_is_its_own_target(student: Student) -> None:
    target = student.target(ALL_DATA_IS_ZERO, ALL_DATA_IS_ZERO, lesson(), SPANNING)
    for name, v in lesson().velocity.items():
        torch.testing.assert_close(target[name], v)


def test_mean_velocities_of_a_normal_distribution_are_fixed_points_too() -> None:
    """There the path's own velocities are not those of the flow; what agrees with itself is."""
    x, t, d = normal(4, 3, seed=3), torch.tensor([0.9, 0.7, 0.6, 1.0], dtype=torch.float64), torch.tensor([0.25] * 4)
    marginal = ((2 * t - 1) / size(t) ** 2).unsqueeze(1) * x
    each = Lesson({LATENT: x}, {LATENT: marginal}, t, d.double(), LABELS, {})
    right = evaluate(DATA_IS_NORMAL, each.noisy, t, each.span, LABELS)[LATENT]
    for student in (MeanFlow(NO_GUIDANCE), Shortcut(NO_GUIDANCE)):
        target = student.target(DATA_IS_NORMAL, DATA_IS_NORMAL, each, torch.arange(4))
        torch.testing.assert_close(target[LATENT], right)
    for steps in (1, 2, 4):
        velocity = GuidedVelocity(DATA_IS_NORMAL, LABELS, dtype=torch.float64)
        end = solve(mean_velocity, velocity, {LATENT: x}, uniform_times(steps))
        torch.testing.assert_close(end[LATENT], x)  # at t = 0 and t = 1 the size is the same


def test_guidance_is_in_the_target_of_what_has_a_condition_in_the_interval() -> None:
    by_label = Known(lambda x, t, d, y: torch.zeros_like(x) + 10.0 * y + d)
    guidance = Guidance(3.0, {"cls": 1.0}, (0.0, 0.8))
    found = MeanFlow(guidance, mix=0.5).guided(by_label, lesson(), 0.5)
    v, moved = lesson().velocity[LATENT], found[LATENT]
    assert torch.equal(moved[[0, 2, 3]], v[[0, 2, 3]]), "outside of the interval, and twice without a label"
    # ω = w·(1 − κ) = 1.5: ω·v + κ·u(1) + (1 − ω − κ)·u(∅)
    torch.testing.assert_close(moved[1], 1.5 * v[1] + 0.5 * 10 + (1 - 1.5 - 0.5) * 20)


def test_a_shortcut_is_two_averaged_steps_and_guided_in_the_shortest() -> None:
    told = Known(lambda x, t, d, y: torch.zeros_like(x) + t + 100 * d + 1000 * y)
    network = Known(lambda x, t, d, y: x * math.nan)
    start = lesson()
    target = Shortcut(Guidance(2.0)).target(network, told, start, SPANNING)[LATENT]
    assert torch.equal(target[2], start.velocity[LATENT][2]), "a sample without a length keeps the path's velocity"
    torch.testing.assert_close(target[0], torch.full_like(target[0], (0.9 + 0.65) / 2 + 25))
    torch.testing.assert_close(target[1], torch.full_like(target[1], (0.5 + 0.375) / 2 + 12.5 + 1000))
    # The shortest step is taken for the velocity: d = 0. This sample has no label to guide with.
    torch.testing.assert_close(target[3], torch.full_like(target[3], 1 - SHORTEST / 2 + 2000))
    labelled = replace(start, condition={"class": torch.tensor([0, 1, 2, 0])})
    target = Shortcut(Guidance(2.0)).target(network, told, labelled, SPANNING)[LATENT]
    torch.testing.assert_close(target[3], torch.full_like(target[3], 1 - SHORTEST / 2 - 2000))


@pytest.mark.parametrize("name", STUDENTS)
def test_times(name: str) -> None:
    draws = torch.rand(3, 20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, d = STUDENTS[name](NO_GUIDANCE, share=0.25).times(draws.unbind(), lambda t: t)
    assert (d > 0).double().mean().item() == pytest.approx(0.25, abs=0.01)
    assert ((d >= 0) & (t > 0) & (t <= 1) & (t - d >= 0)).all()
    long, t = d[d > 0], t[d > 0]
    if name == "shortcut":
        lengths, counts = long.unique(return_counts=True)
        assert lengths.tolist() == [2.0**-k for k in range(6, -1, -1)]
        assert counts.min() > 0.8 * len(long) / 7
        assert torch.equal(t % long, torch.zeros_like(t)), "t − d is on the grid of steps too"
    else:
        assert torch.logit(torch.cat([t, t - long])).mean().item() == pytest.approx(-0.4, abs=0.03)


# ---- networks

CONFIG = DenoiserConfig(
    modalities=(
        Modality(LATENT, "map", 2), Modality("local", "map", 2), Modality("cls", "token", 5, is_class_token=True),
    ),
    grid=(4, 6), conditions={"class": NULL}, depth=2, width=16, heads=2, span=True, alignment_depth=1,
    alignment_width=8, alignment_hidden=16,
)  # fmt: skip


def awake() -> Denoiser:
    denoiser = Denoiser(CONFIG)
    with torch.no_grad():
        for number, weight in enumerate(denoiser.parameters()):
            weight.copy_(normal(*weight.shape, seed=number) / 5)
    return denoiser


def sample(keep: Tensor | None = None) -> TrainingSample:
    data, noise = (
        {name: normal(4, *shape, seed=seed + len(name)).float() for name, shape in CONFIG.shapes().items()}
        for seed in (10, 20)
    )
    time = {**dict.fromkeys(data, TIME.float()), SPAN: SPANS.float()}
    tokens = normal(4, 7, 8, seed=5).float()
    kept = {} if keep is None else {"local": keep}
    return TrainingSample(data, noise, time, LABELS, tokens, kept, spanning=SPANNING)


def test_the_derivative_is_that_of_finite_differences() -> None:
    denoiser = awake()
    noise = {name: normal(4, *shape, seed=len(name)).float() for name, shape in CONFIG.shapes().items()}
    velocity = {name: normal(*x.shape, seed=7).float() for name, x in noise.items()}
    at = Lesson(noise, velocity, TIME.float(), SPANS.float(), LABELS, {})
    step = 1e-3

    def moved(by: float) -> State:
        noisy = {name: x + by * velocity[name] for name, x in at.noisy.items()}
        return evaluate(denoiser, noisy, at.time + by, at.span + by, LABELS)

    with torch.no_grad():
        slope, ahead, behind = derivative(denoiser, at), moved(step), moved(-step)
    for name, exact in slope.items():
        torch.testing.assert_close(exact, (ahead[name] - behind[name]) / (2 * step), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STUDENTS)
def test_targets_leave_gradients_as_they_are(
    name: str, precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those towards a fixed target, of every weight, in half precision too."""
    kind = STUDENTS[name]
    student, make = kind(Guidance(2.0), mix=0.5), kind.target
    made: list[State] = []
    gradients: list[dict[str, Tensor | None]] = []
    for target in (lambda *given: made.append(make(*given)) or made[-1], lambda *given: made[-1]):
        monkeypatch.setattr(kind, "target", target)
        denoiser = awake()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            terms = loss_terms(denoiser, LINEAR, sample(), student=student)
        torch.stack(list(terms.values())).sum().backward()
        gradients.append({weight: p.grad for weight, p in denoiser.named_parameters()})
    assert len(made) == 1
    for weight, gradient in gradients[0].items():
        assert gradient is not None
        assert gradient.any(), weight
        torch.testing.assert_close(gradient, gradients[1][weight], rtol=0, atol=0, msg=weight)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_hidden_modality_is_neither_asked_for_nor_seen(name: str) -> None:
    student = STUDENTS[name](Guidance(2.0), mix=0.5)
    hidden = torch.tensor([True, False, True, False])
    given = sample(hidden)
    other = dict(given.data)
    other["local"] = given.data["local"] + expand_as(~hidden, given.data["local"])
    denoiser = awake()
    with torch.no_grad():
        terms = [
            loss_terms(denoiser, LINEAR, replace(given, data=data), student=student) for data in (given.data, other)
        ]
    assert all(torch.equal(terms[0][term], terms[1][term]) for term in terms[0])


def test_a_student_without_a_length_of_step_is_the_velocity() -> None:
    denoiser = awake()
    state = {name: normal(4, *shape, seed=1).float() for name, shape in CONFIG.shapes().items()}
    with torch.no_grad():
        plain = denoiser(state, TIME.float(), LABELS).velocity
        told = evaluate(denoiser, state, TIME.float(), torch.zeros(4), LABELS)
        one, other = (
            solve(step, GuidedVelocity(denoiser, LABELS), state, uniform_times(1)) for step in (euler, mean_velocity)
        )
    assert all(torch.equal(plain[name], v) for name, v in told.items())
    assert not torch.equal(one[LATENT], other[LATENT])
