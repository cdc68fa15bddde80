"""Sampling: Euler–Maruyama with guidance on an interval, ours and the published sampler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn

from common import Comparison, Timing, alternate, ratio, report
from comparisons.official import Official, official_samples
from counting import forward_flops
from reglue import config
from reglue.config import Precision
from reglue.data.picture_writer import PictureWriter
from reglue.diffusion.denoiser import Denoiser
from reglue.diffusion.guidance import Guidance, guided_velocity
from reglue.diffusion.modalities import CLS, LATENT, LOCAL, State
from reglue.diffusion.paths import PATHS
from reglue.pipeline import follow, from_noise, to_pixels
from reglue.published.weights import export_official, import_official
from reglue.training.precision import SamplingNetwork
from workloads import Data, Workload, autoencoder_of

AGREEMENT = 1e-4
"""Largest difference of a sample, as a share of the largest value, in float32."""


@dataclass(frozen=True)
class Sampling:
    """Time Euler–Maruyama sampling in latent space, guided on an interval; decoding and writing by themselves.

    Both draw the same samples from the same weights and noise first. Then ours runs as `reglue sample` does, its own
    noise included, and theirs as their generate.py: float32 with TF32 on a GPU, attention not fused, the state in
    float64.
    """

    conditions: Annotated[Comparison, tyro.conf.arg(name="")] = field(default_factory=Comparison)
    data: Data = "imagenet"
    model: str | None = None
    """B/2, XL/2, …; default: B/2, or the demo's own."""
    batch_size: int = 64
    """Images at once; their script has 64."""
    steps: int = 250
    scale: float = 2.3
    """Of classifier-free guidance, of all modalities."""
    interval: tuple[float, float] = (0.0, 0.9)
    precision: tuple[Precision, ...] = ("bfloat16",)
    """Of our matrix products."""
    compile: tuple[Literal["no", "model"], ...] = ("no",)
    """Without and with `reglue sample --compile`, each of which is timed."""
    pictures: int = 16
    """Images that are decoded and written, at most a batch."""


class Counted(nn.Module):
    """A model that counts how many samples it is asked about: one that is guided counts twice."""

    def __init__(self, inside: nn.Module | SamplingNetwork) -> None:
        super().__init__()
        self.inside, self.evaluated = inside, 0

    def forward(self, x: Any, *rest: Any, **named: Any) -> Any:
        """As the model inside."""
        self.evaluated += len(x[LATENT] if isinstance(x, dict) else x)
        return self.inside(x, *rest, **named)

    @property
    def null_label(self) -> int:
        """As the model inside."""
        return self.inside.null_label  # type: ignore[return-value]


def of_job(options: Sampling, steps: int) -> config.Sampling:
    """The way to sample, as `reglue sample` has it."""
    guidance = Guidance(options.scale, interval=options.interval)
    return config.Sampling("euler-maruyama", steps, guidance, state_precision="float64")


@torch.no_grad()
def our_samples(network: Any, workload: Workload, labels: Tensor, how: config.Sampling) -> State:
    """Samples as `ImageModel.draw` makes them: its noise, its loop."""
    velocity = guided_velocity(network, labels, how.guidance)
    shapes, path = workload.config.shape.shapes(), PATHS[workload.recipe.path]
    return from_noise(velocity, 0, range(len(labels)), shapes, how, path, labels.device)


def drawn(start: State) -> Iterator[State]:
    """Noise for a state from PyTorch's generator, in the order in which the published sampler draws it."""
    channels = start[LATENT].shape[1]
    while True:
        maps = torch.randn_like(torch.cat([start[LATENT], start[LOCAL]], dim=1), dtype=torch.float64)
        yield {
            LATENT: maps[:, :channels],
            LOCAL: maps[:, channels:],
            CLS: torch.randn_like(start[CLS], dtype=torch.float64),
        }


def sampling(options: Sampling) -> str:
    """Check that both draw the same, then time both."""
    conditions = options.conditions
    device = conditions.begin()
    workload = Workload.of("toy" if conditions.toy else options.data, None if conditions.toy else options.model)
    steps, batch = (5, 2) if conditions.toy else (options.steps, options.batch_size)
    config = workload.config
    random = workload.random_model()
    labels = (torch.arange(batch) % config.classes).to(device)
    torch.manual_seed(2)
    start = {name: torch.randn(batch, *shape, device=device) for name, shape in config.shape.shapes().items()}
    figures: dict[str, Any] = {}

    ours, contestants, counters = random.to(device).eval(), {}, {}
    if conditions.official:
        official = Official.load(conditions.official, "models.sit", "samplers")
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = False  # for the comparison; their generate.py has it on
        theirs = official.model(config, fused_attention=False)
        theirs.load_state_dict(export_official("reglue", config, random.state_dict()))
        theirs = theirs.to(device).eval()
        imported = import_official(theirs.state_dict(), heads=config.heads, alignment_depth=config.alignment_depth)
        ours = imported.denoiser().to(device)
        figures["sample_difference"] = sample_difference(official, theirs, ours, workload, start, labels, options)
        assert figures["sample_difference"] < AGREEMENT, figures
        counters["theirs"] = counted = Counted(theirs)

        def draw_theirs(counted: nn.Module = counted) -> None:
            torch.backends.cuda.matmul.allow_tf32 = True
            official_samples(official, counted, start, labels, steps, options.scale, options.interval)
            torch.backends.cuda.matmul.allow_tf32 = False

        contestants["theirs float32"] = draw_theirs

    for precision in options.precision:
        for compile in options.compile:
            name = f"ours {precision}{'' if compile == 'no' else ' compiled'}"
            counters[name] = counted = Counted(SamplingNetwork(ours, precision, compiled=compile == "model"))

            def draw_ours(counted: nn.Module = counted) -> None:
                our_samples(counted, workload, labels, of_job(options, steps))

            contestants[name] = draw_ours

    timed = alternate(contestants, conditions.repeats, device)
    calls = conditions.repeats + 1  # one to warm up
    figures |= {
        "batch_size": batch,
        "steps": steps,
        "seconds_per_call": timed,
        "pictures": (pictures := min(options.pictures, batch)),
        "seconds_of_pictures": finishing(workload, {name: x[:pictures] for name, x in start.items()}, conditions),
        "network_evaluations_per_image": {name: c.evaluated / calls / batch for name, c in counters.items()},
        "flops_per_evaluation": forward_flops(config),
        "times_faster": {
            name: ratio(timed["theirs float32"], timing, device)
            for name, timing in timed.items()
            if name.startswith("ours") and "theirs float32" in timed
        },
    }
    return report("sample", options, figures, device)


def finishing(workload: Workload, state: State, conditions: Comparison) -> dict[str, Timing]:
    """The time to decode states, and to write their images as `reglue sample` does."""
    device = state[LATENT].device
    autoencoder = autoencoder_of(workload, device)

    @torch.no_grad()
    def decode() -> Tensor:
        return to_pixels(autoencoder.decode(state[LATENT]), "truncate")

    pixels = decode()
    with TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.png" for i in range(len(pixels))]

        def write() -> None:
            with PictureWriter() as writer:
                writer.write(files, pixels)

        return alternate({"decode": decode, "write": write}, conditions.repeats, device)


@torch.no_grad()
def sample_difference(
    official: Official,
    theirs: nn.Module,
    ours: Denoiser,
    workload: Workload,
    start: State,
    labels: Tensor,
    options: Sampling,
) -> float:
    """The largest difference of a sample of four steps between ours and theirs, as a share of the largest value.

    Both meet the same noise, from PyTorch's generator.
    """
    first = {name: x[:2] for name, x in start.items()}
    torch.manual_seed(3)
    expected = official_samples(official, theirs, first, labels[:2], 4, options.scale, options.interval)
    torch.manual_seed(3)
    how = of_job(options, 4)
    velocity = guided_velocity(SamplingNetwork(ours, "float32"), labels[:2], how.guidance)
    exact = {name: x.double() for name, x in first.items()}
    state = follow(velocity, exact, drawn(first), how, PATHS[workload.recipe.path])
    found = torch.cat([state[LATENT], state[LOCAL]], dim=1)
    return float((found - expected).abs().max() / expected.abs().max())
