"""What samplers evaluate: weights in their precision once, compiled for as few shapes as can be."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reglue.diffusion.conditions import Condition
from reglue.diffusion.controls import Progress
from reglue.diffusion.modalities import State
from reglue.pipeline import ImageModel, load
from reglue.sampling import Sampling
from reglue.training.precision import SamplingNetwork, autocast, compiled_for_shapes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> ImageModel:
    return load(tiny_run, device="cpu")


def inputs(model: ImageModel, batch: int = 3) -> tuple[State, Tensor, Condition]:
    generator = torch.Generator().manual_seed(0)
    shapes = model.record.denoiser.shapes()
    state = {name: torch.randn(batch, *shape, generator=generator) for name, shape in shapes.items()}
    return state, torch.full((batch,), 0.6), {"class": torch.arange(batch) % 3}


@torch.no_grad()
def test_bfloat16_weights_are_what_autocast_would_make_of_them(model: ImageModel) -> None:
    ours = SamplingNetwork(model.denoiser, "bfloat16")(*inputs(model)).velocity
    with autocast(CPU, "bfloat16"):
        expected = model.denoiser(*inputs(model)).velocity
    for name, velocity in expected.items():
        assert torch.equal(ours[name], velocity)
        assert velocity.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.denoiser.parameters()} == {torch.float32}


@torch.no_grad()
def test_hidden_tokens_are_kept_for_gradients_alone(model: ImageModel) -> None:
    tap, network = model.denoiser(*inputs(model)).tap, SamplingNetwork(model.denoiser, "float32")
    assert tap is not None
    with torch.no_grad():
        assert network(*inputs(model)).tap is None
    with torch.enable_grad():
        kept = network(*inputs(model)).tap
    assert kept is not None
    assert torch.equal(kept, tap)


class Graph:
    """Stands for a captured CUDA graph: every call of one shape writes its results over those of the last one."""

    def __init__(self, function: Callable[..., State]) -> None:
        self.function, self.buffers = function, dict[tuple[int, ...], State]()

    def __call__(self, state: State, time: Tensor, condition: Condition) -> State:
        result = self.function(state, time, condition)
        buffer = self.buffers.setdefault(tuple(time.shape), {name: x.clone() for name, x in result.items()})
        for name, x in result.items():
            buffer[name].copy_(x)
        return buffer


@pytest.mark.parametrize("sampler", ["euler", "heun", "euler-maruyama", "adams-bashforth"])
def test_results_may_lie_in_memory_that_the_next_call_overwrites(
    tiny_run: Path, model: ImageModel, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(sampler, 5, guidance_scale=2.0, guidance_interval=(0.3, 0.8), state_precision="float32")
    expected = model.draw(range(3), model.condition([0, 1, 2]), 0, sampling)
    monkeypatch.setattr(torch, "compile", lambda function, **_: Graph(function))
    captured = load(tiny_run, device="cpu", compile=True).draw(range(3), model.condition([0, 1, 2]), 0, sampling)
    for name, value in expected.items():
        assert torch.equal(captured[name], value)


def test_one_shape_for_every_batch_compiled(tiny_run: Path, model: ImageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        compiled.append(1)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    sampling = Sampling("adams-bashforth", 4)
    fast = load(tiny_run, device="cpu", compile=True)
    ours = fast.generate([0, 1, 2, 1, 0], batch_size=2, sampling=sampling, output="tensor")
    assert len(compiled) == 1
    expected = model.generate([0, 1, 2, 1, 0], batch_size=2, sampling=sampling, output="tensor")
    assert (ours.int() - expected.int()).abs().max() <= 1
    # With an interval there are two: with and without the second branch.
    guided = Sampling("adams-bashforth", 4, guidance_scale=2.0, guidance_interval=(0.3, 0.8))
    fast.generate([0, 1, 2, 1, 0], batch_size=2, sampling=guided)
    assert len(compiled) == 2


def test_a_gpu_gets_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    def note(function: Callable[..., State], **options: object) -> Callable[..., State]:
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", note)
    for name in ("cpu", "cuda"):
        compiled_for_shapes(lambda: {}, torch.device(name))
    assert [each["mode"] for each in asked] == [None, "reduce-overhead"]
    assert all(each["dynamic"] is False for each in asked)


def test_state_precision_as_published_unless_told_otherwise(model: ImageModel) -> None:
    def dtype(sampling: Sampling) -> torch.dtype:
        return model.draw([0], model.condition([0]), 0, sampling)["latent"].dtype

    assert dtype(Sampling("euler", 1)) == dtype(Sampling("heun", 1)) == dtype(Sampling(steps=1)) == torch.float64
    assert dtype(Sampling("adams-bashforth", 1)) == torch.float32
    assert dtype(Sampling("adams-bashforth", 1, state_precision="float64")) == torch.float64
    assert dtype(Sampling(steps=1, state_precision="float32")) == torch.float32


def test_the_states_precision_is_beneath_a_pixel(model: ImageModel) -> None:
    for sampler in ("euler-maruyama", "adams-bashforth"):
        images = [
            model.generate([0, 1], sampler=sampler, steps=50, state_precision=precision, output="tensor")
            for precision in ("float32", "float64")
        ]
        assert (images[0].int() - images[1].int()).abs().max() <= 1


def test_bfloat16_evaluations_are_asked_for(model: ImageModel) -> None:
    plain, coarse = (
        model.draw([0], model.condition([0]), 0, Sampling("heun", 3, precision=p)) for p in ("float32", "bfloat16")
    )
    difference = (plain["latent"] - coarse["latent"]).abs().max()
    assert 0 < difference < 0.1


def test_dopri5_does_not_depend_on_the_batch(model: ImageModel) -> None:
    pytest.importorskip("torchdiffeq")
    sampling = Sampling("dopri5", guidance_scale=2.0, guidance_interval=(0.2, 0.8))
    counted: list[int] = []
    together = model.draw(
        [0, 1, 2], model.condition([0, 1, 2]), 0, sampling, controls=[Progress(lambda: counted.append(1))]
    )
    for i in range(3):
        alone = model.draw([i], model.condition([i]), 0, sampling)
        for name, value in alone.items():
            assert torch.equal(value[0], together[name][i]), name
    assert len(counted) > 3 * 6 * 3  # each image takes its own steps, at least one in each of three pieces
    exact = model.draw([0, 1, 2], model.condition([0, 1, 2]), 0, sampling.changed(sampler="adams-bashforth", steps=400))
    for name, value in exact.items():
        torch.testing.assert_close(together[name], value, rtol=1e-2, atol=1e-2)
