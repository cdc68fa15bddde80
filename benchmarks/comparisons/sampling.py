"""Sampling: Euler–Maruyama with guidance on an interval, ours and the published sampler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn

from common import Comparison, alternate, ratio, report
from comparisons.official import Official, official_samples
from counting import forward_flops
from reglue.diffusion.denoiser import Denoiser
from reglue.diffusion.guidance import Guidance, guided_velocity
from reglue.diffusion.modalities import CLS, LATENT, LOCAL, State
from reglue.diffusion.samplers import euler_maruyama, stochastic_times
from reglue.jobs.train import compile_parts
from reglue.recipe import Compile
from reglue.runs import ranks
from reglue.runs.official import export_official, import_official
from reglue.runs.ranks import Precision
from workloads import Data, Workload

AGREEMENT = 1e-4
"""Largest difference of a sample, as a share of the largest value, in float32."""


@dataclass(frozen=True)
class Sampling:
    """Time Euler–Maruyama sampling in latent space (no decoding), guided on an interval.

    Both draw the same samples from the same weights and noise first. Theirs runs as their generate.py: float32 with
    TF32 on a GPU, attention not fused, the state in float64.
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
    compile: tuple[Compile, ...] = ("no",)
    """Ways to compile our model, each of which is timed: no, blocks, model."""


class Counted(nn.Module):
    """A model that counts how many samples it is asked about: one that is guided counts twice."""

    def __init__(self, inside: nn.Module) -> None:
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


@torch.no_grad()
def our_samples(
    model: Any,
    start: State,
    labels: Tensor,
    options: Sampling,
    steps: int,
    precision: Precision,
    noise: Iterator[State],
) -> State:
    """The sampler as `ImageModel.draw` runs it, the state in float64."""
    velocity = guided_velocity(model, labels, Guidance(options.scale, interval=options.interval))
    with ranks.autocast(labels.device, precision):
        return euler_maruyama(velocity, {name: x.double() for name, x in start.items()}, stochastic_times(steps), noise)


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
        figures["sample_difference"] = sample_difference(official, theirs, ours, start, labels, options)
        assert figures["sample_difference"] < AGREEMENT, figures
        counters["theirs"] = counted = Counted(theirs)

        def draw_theirs(counted: nn.Module = counted) -> None:
            torch.backends.cuda.matmul.allow_tf32 = True
            official_samples(official, counted, start, labels, steps, options.scale, options.interval)
            torch.backends.cuda.matmul.allow_tf32 = False

        contestants["theirs float32"] = draw_theirs

    for precision in options.precision:
        for compile in options.compile:
            name = f"ours {precision}{'' if compile == 'no' else f' compiled {compile}'}"
            model = Denoiser(config).to(device).eval()
            model.load_state_dict(ours.state_dict())
            compile_parts(model, model.transformer.blocks, compile)
            counters[name] = counted = Counted(model)

            def draw_ours(counted: nn.Module = counted, precision: Precision = precision) -> None:
                our_samples(counted, start, labels, options, steps, precision, drawn(start))

            contestants[name] = draw_ours

    timed = alternate(contestants, conditions.repeats, device)
    calls = conditions.repeats + 1  # one to warm up
    figures |= {
        "batch_size": batch,
        "steps": steps,
        "seconds_per_call": timed,
        "network_evaluations_per_image": {name: c.evaluated / calls / batch for name, c in counters.items()},
        "flops_per_evaluation": forward_flops(config),
        "times_faster": {
            name: ratio(timed["theirs float32"], timing, device)
            for name, timing in timed.items()
            if name.startswith("ours") and "theirs float32" in timed
        },
    }
    return report("sample", options, figures, device)


def sample_difference(
    official: Official, theirs: nn.Module, ours: Denoiser, start: State, labels: Tensor, options: Sampling
) -> float:
    """The largest difference of a sample of four steps between ours and theirs, as a share of the largest value."""
    first = {name: x[:2] for name, x in start.items()}
    torch.manual_seed(3)
    expected = official_samples(official, theirs, first, labels[:2], 4, options.scale, options.interval)
    torch.manual_seed(3)
    state = our_samples(ours, first, labels[:2], options, 4, "float32", drawn(first))
    found = torch.cat([state[LATENT], state[LOCAL]], dim=1)
    return float((found - expected).abs().max() / expected.abs().max())
