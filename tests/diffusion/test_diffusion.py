"""Properties of paths, samplers and guidance that hold whatever the network."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reglue.diffusion.conditions import Condition
from reglue.diffusion.controls import Control, Previews, Progress
from reglue.diffusion.denoiser import Denoiser, DenoiserConfig, Prediction
from reglue.diffusion.guidance import Guidance, GuidedVelocity, guided_velocity, hidden_modalities
from reglue.diffusion.modalities import Modality, State, TensorTimes, Times
from reglue.diffusion.objective import TrainingSample, loss_terms
from reglue.diffusion.paths import PATHS
from reglue.diffusion.samplers import euler, euler_maruyama, heun, integrate, stochastic_times, uniform_times
from solving import Following, at, solve

LATENT = Modality("latent", "map", 3)
LOCAL = Modality("local", "map", 5)
CLS = Modality("cls", "token", 7, is_class_token=True)


def config(*modalities: Modality, **sizes: Any) -> DenoiserConfig:
    """Of a small model, with all three modalities if none are given."""
    return DenoiserConfig(
        modalities=modalities or (LATENT, LOCAL, CLS),
        **{"grid": (4, 6), "conditions": {"class": 3}, "depth": 2, "width": 16, "heads": 2, **sizes},
    )


def random_state(batch: int = 2, seed: int = 0, of: DenoiserConfig | None = None) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(batch, *size, generator=generator, dtype=torch.float64)
        for name, size in (of or config()).shapes().items()
    }


@pytest.mark.parametrize("name", PATHS)
@given(t=st.floats(0.01, 0.99))
def test_velocity_is_the_derivative_of_the_path(name: str, t: float) -> None:
    path, data, noise = PATHS[name], random_state(seed=1), random_state(seed=2)  # type: ignore[index]
    at = torch.full((2,), t, dtype=torch.float64)
    _, velocity = path.interpolate(data, noise, at)
    after, before = path.interpolate(data, noise, at + 1e-5)[0], path.interpolate(data, noise, at - 1e-5)[0]
    for key, v in velocity.items():
        torch.testing.assert_close((after[key] - before[key]) / 2e-5, v, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PATHS)
@given(t=st.floats(0.05, 0.95))
def test_score_of_a_gaussian_is_exact(name: str, t: float) -> None:
    # Data N(0, s²): x_t is N(0, α²s² + σ²), and the velocity is E[α'x₀ + σ'ε | x_t], linear in x_t.
    path, s = PATHS[name], 0.7  # type: ignore[index]
    now = torch.tensor(t, dtype=torch.float64)
    alpha, sigma, d_alpha, d_sigma = path.coefficients(now)
    variance = alpha**2 * s**2 + sigma**2
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    velocity = (d_alpha * alpha * s**2 + d_sigma * sigma) / variance * x
    torch.testing.assert_close(path.velocity_to_score(velocity, x, now), -x / variance)


def gaussian_velocity(state: State, time: float, decided_at: float | None = None) -> State:
    """The exact velocity for data N(0, 0.5²) on the linear path."""
    variance = (1 - time) ** 2 * 0.25 + time**2
    factor = (-(1 - time) * 0.25 + time) / variance
    return {name: factor * x for name, x in state.items()}


def test_samplers_reach_the_gaussian_they_follow() -> None:
    start = {"latent": torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
    noise = torch.Generator().manual_seed(1)
    draws = iter(lambda: {"latent": torch.randn(20_000, 1, generator=noise, dtype=torch.float64)}, None)
    results = {
        "euler": solve(euler, gaussian_velocity, start, uniform_times(200)),
        "heun": solve(heun, gaussian_velocity, start, uniform_times(50)),
        "euler-maruyama": solve(euler_maruyama, gaussian_velocity, start, stochastic_times(250), draws),
    }
    for name, result in results.items():
        assert result["latent"].std().item() == pytest.approx(0.5, rel=0.03), name
        assert result["latent"].mean().item() == pytest.approx(0, abs=0.02), name


def test_heun_is_of_second_order() -> None:
    start = {"latent": torch.ones(1, 1, dtype=torch.float64)}
    exact = solve(heun, gaussian_velocity, start, uniform_times(4000))["latent"].item()
    errors = [abs(solve(heun, gaussian_velocity, start, uniform_times(n))["latent"].item() - exact) for n in (20, 40)]
    assert errors[0] / errors[1] > 3


@given(steps=st.integers(1, 300))
def test_time_grids_run_from_noise_to_data(steps: int) -> None:
    for times, intervals in ((uniform_times(steps), steps), (stochastic_times(steps), steps)):
        assert len(times) == intervals + 1
        assert times[0] == 1
        assert times[-1] == 0
        assert times == sorted(times, reverse=True)


@dataclass
class Recorder:
    """A denoiser that notes what it is asked, and answers with the class, 9 for none."""

    asked: list[int] = field(default_factory=list)

    def null(self, batch: int) -> Condition:
        return {"class": torch.full((batch,), 9)}

    def __call__(self, state: State, time: Tensor | TensorTimes, condition: Condition) -> Prediction:
        label = condition["class"]
        self.asked.append(len(label))
        return Prediction(
            {name: x * 0 + label.view(-1, *[1] * (x.ndim - 1)).to(x.dtype) for name, x in state.items()}, None
        )


def guided(guidance: Guidance, denoiser: Recorder | None = None) -> GuidedVelocity:
    condition = {"class": torch.tensor([1, 2])}
    return guided_velocity(denoiser or Recorder(), condition, (LATENT, LOCAL, CLS), guidance)


def times(t: float) -> Times:
    return dict.fromkeys(("latent", "local", "cls"), t)


def test_no_branch_is_evaluated_that_guidance_does_not_use() -> None:
    cases = [
        (Guidance(), 0.5, 2),
        (Guidance(2.0), 0.5, 4),
        (Guidance(2.0, interval=(0.0, 0.4)), 0.5, 2),
        (Guidance(2.0, interval=(0.0, 0.5)), 0.5, 4),
        (Guidance(1.0, {"local": 2.0}), 0.5, 4),
        (Guidance(2.0, representation_scale=1.5), 0.5, 6),
        (Guidance(2.0, representation_scale=1.5, interval=(0.6, 1.0)), 0.5, 2),
    ]
    for guidance, time, evaluated in cases:
        denoiser = Recorder()
        guided(guidance, denoiser)(random_state(), times(time))
        assert denoiser.asked == [evaluated], guidance


def test_each_modality_has_its_own_scale() -> None:
    state = random_state()
    velocity = guided(Guidance(3.0, {"local": 1.0, "cls": 2.0}))(state, times(0.5))
    for name, scale in (("latent", 3.0), ("local", 1.0), ("cls", 2.0)):
        expected = 9 + scale * (torch.tensor([1.0, 2.0], dtype=torch.float64) - 9)
        assert torch.equal(velocity[name].flatten(1)[:, 0], expected), name
        assert velocity[name].dtype == state[name].dtype


def test_a_step_is_guided_as_a_whole() -> None:
    velocity = guided(Guidance(2.0, interval=(0.0, 0.5)))
    inside = velocity(random_state(), times(0.6), decided_at=times(0.5))["cls"][0, 0]
    assert inside != velocity(random_state(), times(0.6))["cls"][0, 0]


def test_where_guidance_is_not_continuous() -> None:
    assert guided(Guidance(2.0, interval=(0.1, 0.9))).discontinuities == (0.1, 0.9)
    assert guided(Guidance(2.0, interval=(0.0, 0.9))).discontinuities == (0.9,)
    assert guided(Guidance(representation_scale=2.0, interval=(0.4, 0.4))).discontinuities == (0.4,)
    assert guided(Guidance(1.0, interval=(0.1, 0.9))).discontinuities == ()


def test_representation_guidance_hides_what_training_dropped() -> None:
    assert hidden_modalities((LATENT, LOCAL, CLS)) == ["local"]
    assert hidden_modalities((LATENT, LOCAL, replace(CLS, dropout=0.1))) == ["cls"]
    assert hidden_modalities((LATENT, CLS)) == []


def test_an_unknown_guider_is_refused() -> None:
    with pytest.raises(ValueError, match="guider mine is unknown; registered are classifier-free"):
        guided(Guidance(others={"mine": 2.0}))


def test_controls_see_each_step_and_each_evaluation() -> None:
    class Watching(Control):
        def __init__(self) -> None:
            self.seen: list[tuple[str, float]] = []

        def before(self, state: State, times: Times) -> State:
            self.seen.append(("before", times["latent"]))
            return state

        def velocity(self, velocity: State, state: State, times: Times) -> State:
            self.seen.append(("velocity", times["latent"]))
            return {name: 0 * v for name, v in velocity.items()}

        def after(self, state: State, times: Times) -> State:
            self.seen.append(("after", times["latent"]))
            return {name: x + 1 for name, x in state.items()}

    control, counted = Watching(), list[int]()
    start = {"latent": torch.zeros(1, 1, dtype=torch.float64)}
    controls = [control, Progress(lambda: counted.append(1))]
    result = integrate(heun, Following(gaussian_velocity), start, at([1.0, 0.5, 0.0], start), controls)
    assert result["latent"].item() == 2  # Nothing moves but by `after`.
    assert control.seen == [
        *(("before", 1.0), ("velocity", 1.0), ("velocity", 0.5), ("after", 0.5)),
        *(("before", 0.5), ("velocity", 0.5), ("after", 0.0)),
    ]
    assert len(counted) == 3


def test_previews_show_the_data_that_a_velocity_points_to() -> None:
    shown: list[State] = []
    data = torch.tensor([[0.7, -0.2]], dtype=torch.float64)
    start = {"latent": torch.ones(1, 2, dtype=torch.float64)}

    def to_the_data(state: State, time: float, decided_at: float | None = None) -> State:
        return {"latent": (state["latent"] - data) / time}

    previews = Previews(lambda predicted, times: shown.append(predicted), every=2)
    integrate(euler, Following(to_the_data), start, at(uniform_times(6), start), [previews])
    assert len(shown) == 3
    for predicted in shown:
        torch.testing.assert_close(predicted["latent"], data)


def tiny_denoiser() -> Denoiser:
    torch.manual_seed(0)
    denoiser = Denoiser(config(alignment_depth=1, alignment_width=6, alignment_hidden=8))
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return denoiser


@given(
    rows=st.integers(1, 3), columns=st.integers(1, 3), patch=st.integers(1, 3), local=st.sampled_from([0, 2]),
    token=st.sampled_from([0, 5]), classes=st.sampled_from([0, 1, 10]),
)  # fmt: skip
def test_any_size_goes_through(rows: int, columns: int, patch: int, local: int, token: int, classes: int) -> None:
    parts = (LATENT, replace(LOCAL, channels=local), replace(CLS, channels=token))
    sizes = config(
        *(part for part in parts if part.channels),
        grid=(rows * patch, columns * patch), conditions={"class": classes}, depth=1, width=8, patch=patch,
    )  # fmt: skip
    denoiser = Denoiser(sizes)
    state = {name: x.float() for name, x in random_state(2, of=sizes).items()}
    velocity = denoiser(state, torch.rand(2), denoiser.null(2)).velocity
    assert {name: v.shape for name, v in velocity.items()} == {name: x.shape for name, x in state.items()}


def test_a_hidden_local_map_is_neither_seen_nor_asked_for() -> None:
    denoiser = tiny_denoiser()
    data, noise = ({k: v.float() for k, v in random_state(seed=s).items()} for s in (1, 2))
    common: dict[str, Any] = {"time": torch.tensor([0.3, 0.6]), "condition": {"class": torch.tensor([0, 1])}}
    hidden = TrainingSample(data, noise, **common, keep={"local": torch.tensor([False, True])})
    changed = {**data, "local": data["local"] + torch.tensor([5.0, 0.0]).view(2, 1, 1, 1)}
    other = TrainingSample(changed, noise, **common, keep={"local": torch.tensor([False, True])})
    a, b = (loss_terms(denoiser, PATHS["linear"], sample) for sample in (hidden, other))
    assert {k: v.item() for k, v in a.items()} == {k: v.item() for k, v in b.items()}
    shown = loss_terms(denoiser, PATHS["linear"], TrainingSample(data, noise, **common))
    assert shown["local"] != a["local"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 5}, "patches of 5"),
        ({"heads": 3}, "heads"),
        ({"alignment_depth": 9}, "only 2 blocks"),
        ({"backbone": "unet"}, "backbone unet is unknown; registered are sit"),
        ({"conditions": {"text": 4}}, "condition text is unknown; registered are class"),
        ({"modalities": (LOCAL,)}, "the first must be 'latent'"),
        ({"modalities": (LATENT, CLS, CLS)}, "need different names"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config(), **change)


def weights(seed: int = 0, *, semantic: bool = False, aligned: bool = False) -> dict[str, Tensor]:
    """Of a freshly made model; `semantic`, it has a local map and a class token."""
    sizes: dict[str, Any] = {"alignment_depth": 1, "alignment_width": 9, "alignment_hidden": 8} if aligned else {}
    parts = (replace(LATENT, channels=4), *([LOCAL, CLS] if semantic else []))
    made = config(*parts, grid=(8, 8), conditions={"class": 10}, width=64, heads=4, **sizes)
    return Denoiser(made, seed).state_dict()


def test_models_of_one_seed_share_the_initial_weights_of_what_they_share() -> None:
    sit, repa = weights(), weights(aligned=True)
    assert sit.keys() < repa.keys()
    assert all(torch.equal(repa[name], weight) for name, weight in sit.items())
    reglue = weights(semantic=True, aligned=True)
    differing = {name for name in sit if sit[name].shape != reglue[name].shape}
    assert differing == {"patches.weight", "velocity.weight", "velocity.bias"}
    assert all(torch.equal(reglue[name], sit[name]) for name in sit.keys() - differing)
    assert torch.equal(repa["projector.0.weight"], reglue["projector.0.weight"])


def test_initial_weights_are_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = weights(semantic=True, aligned=True)
    torch.manual_seed(2)
    again = weights(semantic=True, aligned=True)
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = weights(seed=1, semantic=True, aligned=True)
    drawn = [name for name, weight in first.items() if weight.ndim > 1 and weight.any()]
    assert len(drawn) == 3 + 1 + 1 + 3 + 2 * 4  # conditions, patches, class token, projector, and four of each block
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    # No two layers are alike.
    assert len({tuple(first[name].flatten()[:8].tolist()) for name in drawn}) == len(drawn)


def test_initial_weights_have_the_published_distributions() -> None:
    found = weights(semantic=True, aligned=True)
    width, patch_inputs = 64, 4 * (4 + 5)
    for name in ("conditions.class", "time_embedding.0", "time_embedding.2"):
        assert found[f"{name}.weight"].std() == pytest.approx(0.02, rel=0.1)
    sizes = {
        "patches": patch_inputs + width,  # as if it were Linear
        "backbone.blocks.1.attention.qkv": 4 * width,
        "backbone.blocks.0.mlp.2": 5 * width,
        "projector.4": 8 + 9,
        "tokens.cls.linear": 7 + width,
    }
    for name, fan in sizes.items():
        bound = (6 / fan) ** 0.5
        assert found[f"{name}.weight"].abs().max() <= bound
        assert found[f"{name}.weight"].std() == pytest.approx(bound / 3**0.5, rel=0.15)
    zero = {name for name, weight in found.items() if not weight.any()}
    assert {name for name in zero if name.endswith("weight")} == {
        *("velocity.weight", "token_velocities.cls.weight", "backbone.modulation.weight"),
        *(f"backbone.blocks.{i}.modulation.weight" for i in range(2)),
    }
    assert {name for name in found if name.endswith("bias")} - zero == set()


def test_names_and_shapes_can_be_had_without_memory() -> None:
    with torch.device("meta"):
        model = Denoiser(config())
    assert all(weight.is_meta for weight in model.parameters())
