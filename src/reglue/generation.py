"""From noise to data, by a way to sample, and from data to pixels: what every image that is drawn goes through."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from reglue.diffusion.controls import Control, Controlled
from reglue.diffusion.guidance import Velocity, tensor_times
from reglue.diffusion.modalities import State
from reglue.diffusion.noise import drawn_ahead
from reglue.diffusion.samplers import (
    SAMPLERS,
    Start,
    StatePrecision,
    aligned,
    begin_at,
    integrate,
    respaced_times,
    returning,
    uniform_times,
)
from reglue.diffusion.schedules import SCHEDULES, Schedule
from reglue.sampling import Rounding, Sampling
from reglue.seeds import Index

RETURNS = 10
"""Parts of a grid that resampling goes over one by one."""
STATE_PRECISIONS: dict[StatePrecision, torch.dtype] = {"float32": torch.float32, "float64": torch.float64}


def from_noise(
    velocity: Velocity,
    seed: int,
    indices: Sequence[Index],
    shapes: Mapping[str, Sequence[int]],
    sampling: Sampling,
    device: torch.device,
    schedule: Schedule = SCHEDULES["shared"],
    controls: Sequence[Control] = (),
    start: Start | None = None,
    repeats: int = 0,
) -> State:
    """The states of the images `indices` of a seed, from their noise to data, by a way to sample that is `resolved`.

    See `ImageModel.draw` for `start` and `repeats`.
    """
    assert sampling.state_precision is not None
    sampler, dtype = SAMPLERS[sampling.sampler], STATE_PRECISIONS[sampling.state_precision]
    begin = min(start.time if start else 1.0, velocity.latest)
    jumps = {clock for t in Controlled(velocity, controls).discontinuities for clock in schedule.clocks_at(t, shapes)}
    grid = times_of(sampling, jumps, schedule.edges, begin, repeats, velocity.known_times)
    times = [{n: min(t, velocity.latest) for n, t in schedule.times(clock, shapes).items()} for clock in grid]
    # The start, every return, and every step that does not end in data.
    draws = 1 + sum(b > a or (sampler.stochastic and b > 0) for a, b in pairwise(grid))
    with drawn_ahead(seed, indices, shapes, device, dtype, draws) as noise:
        drawn = state = next(noise)
        if velocity.latest < 1:  # There, states have the variance of the path, for data of variance 1.
            latest = velocity.path.coefficients(torch.tensor(velocity.latest, dtype=torch.float64))
            state = {name: latest.norm * x for name, x in state.items()}
        if start:
            data = {name: value.to(state[name]) for name, value in start.data.items()}
            state = state | velocity.path.interpolate(data, drawn, tensor_times(times[0], state))[0]
        return integrate(sampler.configured(vars(sampling)), velocity, state, times, controls, noise)


def times_of(
    sampling: Sampling,
    discontinuities: Iterable[float],
    edges: Sequence[float],
    start: float,
    repeats: int,
    known: Sequence[float] = (),
) -> list[float]:
    """The clock's times of a way to sample, from `start` to 0; with returns, each over a tenth of the steps.

    Samplers that heed discontinuities of the velocity have them on their grid, and all have the schedule's edges.
    `known` are the times of the chain that the network was trained on.
    """
    sampler = SAMPLERS[sampling.sampler]
    if sampler.respaced and known:
        grid = respaced_times(known, sampling.steps, sampling.time_shift)
    else:
        grid = sampler.grid(sampling.steps, sampling.time_shift, sorted({*discontinuities, *edges}))
    grid = aligned(grid, edges)
    if repeats and sampler.adaptive:  # It would have nothing to return to.
        grid = sorted({*grid, *uniform_times(RETURNS)}, reverse=True)
    if start < 1:
        grid = begin_at(grid, start)
    return returning(grid, repeats, max(1, round(len(grid) / RETURNS))) if repeats else grid


def evaluations(sampling: Sampling, count: int = 1, batch_size: int = 1) -> int | None:
    """How often a sampler evaluates the velocity for `count` images; None where nobody knows beforehand."""
    per_batch = SAMPLERS[sampling.sampler].evaluations(sampling.steps)
    return None if per_batch is None else -(-count // batch_size) * per_batch


def to_pixels(images: Tensor, rounding: Rounding) -> Tensor:
    """Images (B, 3, H, W) in [−1, 1] to uint8 (B, H, W, 3); values outside are clamped."""
    scaled = 127.5 * images + 128 if rounding == "round" else 255 * (images + 1) / 2
    return scaled.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
