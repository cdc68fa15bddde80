"""The sampling loop of `reglue sample`, beside the published one.

    python benchmarks/sample_speed.py --official PUBLISHED --model B/2 --compile no model

First both have to draw the same from the same weights and noise. Ours is then `ImageModel.draw`, its own noise
included; theirs is the sampler of their generate.py: float32, TF32 on a GPU, attention not fused. Neither decodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor

import official
from common import alternate, report, run, speedups
from counting import forward_flops
from official import CLS, LOCAL
from reglue.diffusion.conditions import CLASS
from reglue.diffusion.guidance import Velocity, guided_velocity
from reglue.diffusion.modalities import LATENT, State
from reglue.diffusion.samplers import SAMPLERS, integrate, stochastic_times
from reglue.encoders.autoencoders import load_autoencoder
from reglue.pipeline import ImageModel
from reglue.run import RunRecord
from reglue.sampling import Sampling
from reglue.training.precision import SamplingNetwork, matmul_precision
from workloads import CLASSES, OfModel

AGREEMENT = 1e-4
"""Largest difference of a sample, as a share of the largest value, in float32."""
SCALE, INTERVAL = 2.3, (0.0, 0.9)
"""Of the guidance."""


@dataclass(frozen=True)
class SampleSpeed(OfModel):
    """Euler–Maruyama with all modalities guided on an interval: seconds of a batch."""

    batch_size: int = 64
    steps: int = 250
    compile: tuple[Literal["no", "model"], ...] = ("no",)
    """Without and with `reglue sample --compile`."""


def main(options: SampleSpeed) -> str:
    """Check that both draw the same, then time both. Returns the line of JSON."""
    device = options.begin()
    steps, batch = (5, 2) if options.toy else (options.steps, options.batch_size)
    workload = options.workload()
    sampling = Sampling("euler-maruyama", steps, guidance_scale=SCALE, guidance_interval=INTERVAL)
    denoiser = workload.random_model().to(device).eval()
    label = torch.arange(batch, device=device) % CLASSES
    start = {name: torch.randn(batch, *shape, device=device) for name, shape in workload.config.shapes().items()}
    figures: dict[str, Any] = {"batch_size": batch, "steps": steps}
    contestants: dict[str, Callable[[], object]] = {}
    if options.official:
        theirs = official.model(options.official, denoiser, fused_attention=False).to(device).eval()
        draw_theirs = partial(official.samples, options.official, theirs, scale=SCALE, interval=INTERVAL)
        two, condition = {name: x[:2] for name, x in start.items()}, {CLASS: label[:2]}
        network = SamplingNetwork(denoiser, "float32")
        velocity = guided_velocity(network, condition, workload.config.modalities, sampling.guidance)
        torch.manual_seed(3)
        expected = draw_theirs(two, label[:2], steps=4)
        torch.manual_seed(3)
        found = our_samples(velocity, two, 4)
        figures["sample_difference"] = ((found - expected).abs().max() / expected.abs().max()).item()
        assert figures["sample_difference"] < AGREEMENT, figures

        def call_theirs() -> None:
            with matmul_precision(device, "tf32"):
                draw_theirs(start, label, steps=steps)

        contestants["theirs float32"] = call_theirs

    with TemporaryDirectory() as store:
        record = RunRecord.of(workload.random_store(Path(store), 4), workload.recipe, 0)
    autoencoder = load_autoencoder("starter", device)  # Asked for, and not used.
    for precision, compile in product(options.precision, options.compile):
        name = f"ours {precision}" + ("" if compile == "no" else ", compiled")
        image_model = ImageModel(record, denoiser, autoencoder, compile=compile == "model")
        ways = sampling.changed(precision=precision)
        contestants[name] = partial(image_model.draw, range(batch), {CLASS: label}, 0, ways)
    measured = alternate(contestants, options.repeats, device)
    figures |= {
        "seconds_per_batch": measured,
        "times_faster": speedups(measured),
        "flops_per_evaluation": forward_flops(workload.config),
    }
    return report(options, figures, device)


@torch.no_grad()
def our_samples(velocity: Velocity, start: State, steps: int) -> Tensor:
    """Latents and map (B, C + K, H, W) by our sampler, with noise in the order in which the published one draws it."""
    channels = start[LATENT].shape[1]

    def noise() -> Iterator[State]:
        while True:
            maps = torch.randn_like(torch.cat([start[LATENT], start[LOCAL]], dim=1), dtype=torch.float64)
            cls = torch.randn_like(start[CLS], dtype=torch.float64)
            yield {LATENT: maps[:, :channels], LOCAL: maps[:, channels:], CLS: cls}

    times = [dict.fromkeys(start, time) for time in stochastic_times(steps)]
    exact = {name: x.double() for name, x in start.items()}
    state = integrate(SAMPLERS["euler-maruyama"].step, velocity, exact, times, noise=noise())
    return torch.cat([state[LATENT], state[LOCAL]], dim=1)


if __name__ == "__main__":
    run(SampleSpeed, main, __doc__)
