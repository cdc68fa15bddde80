"""Memory, operations and messages of a training step on many GPUs, on paper: `python benchmarks/scaling.py`.

Weights are counted on the real Denoiser, operations by PyTorch's counter, and activations are what autograd keeps; all
of it without computing anything. Times are counts divided by assumed rates, all of which are options. Prints markdown
tables and one line of JSON.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated

import torch
import tyro

import counting
from common import Conditions, report
from reglue.config import MODEL_SIZES, ModelSize
from reglue.diffusion.denoiser import Denoiser, DenoiserConfig
from reglue.diffusion.modalities import StateShape
from reglue.papers import RECIPES

GIB, GIGA = 2**30, 1e9
SIZES = {**MODEL_SIZES, "3B/2": ModelSize(32, 2304, 18, 2, 11)}
"""The published sizes, and one of three billion weights."""


@dataclass(frozen=True)
class Scaling:
    """Assumptions. The defaults describe nodes of eight H200 and REGLUE at 256 px; none of them is a measurement."""

    conditions: Annotated[Conditions, tyro.conf.arg(name="")] = field(default_factory=Conditions)
    gpus: tuple[int, ...] = (8, 32, 128, 512)
    per_gpu: int = 32
    """Images per GPU and step."""
    peak: float = 989e12
    """Dense bfloat16 operations per second of one GPU (data sheet)."""
    efficiency: float = 0.4
    """Share of the peak that a step reaches."""
    inside: float = 450e9
    """Bytes per second that a GPU sends to others of its node (NVLink, one direction, data sheet)."""
    between: float = 50e9
    """Bytes per second that a GPU sends to other nodes (one 400 Gb/s adapter per GPU)."""
    network_efficiency: float = 0.7
    """Share of those rates that large messages reach."""
    node: int = 8
    """GPUs per node."""
    latent_channels: int = 4
    grid: int = 32
    """Side of the latents."""
    local_channels: int = 16
    token_width: int = 768
    """Width of the vision encoder's tokens."""
    classes: int = 1000


@dataclass(frozen=True)
class Count:
    """What one model costs."""

    name: str
    weights: int
    in_blocks: int
    largest_block: int
    """Weights of one block."""
    operations: int
    """Of forward and backward for one image; a multiplication and an addition are two."""
    activations: int
    """Bytes that autograd keeps of one image in bfloat16, without activation checkpointing."""


def config_of(size: ModelSize, options: Scaling) -> DenoiserConfig:
    """REGLUE's denoiser: latents, local map, class token and alignment."""
    return DenoiserConfig(
        shape=StateShape(
            options.latent_channels, (options.grid, options.grid), options.local_channels, options.token_width
        ),
        classes=options.classes,
        depth=size.depth,
        width=size.width,
        heads=size.heads,
        patch=size.patch,
        alignment_depth=size.alignment_depth,
        alignment_width=options.token_width,
        alignment_hidden=RECIPES["reglue"].alignment.hidden,
    )


def count(name: str, options: Scaling) -> Count:
    """Count one size."""
    config = config_of(SIZES[name], options)
    with torch.device("meta"):
        model = Denoiser(config)
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.transformer.blocks]
    weights = sum(p.numel() for p in model.parameters())
    operations, activations = counting.training_flops(config), counting.activation_bytes(config, "bfloat16")
    return Count(name, weights, sum(blocks), max(blocks), operations, activations)


def resident_bytes(model: Count, shards: int) -> float:
    """Weights, gradients, two moments and the moving average in float32, spread over the shards, and what is not.

    Autocast keeps a copy of whole weights in bfloat16. With shards there are one gathered block and the next one in
    bfloat16, gradients of a block in float32, and all that is outside of the blocks, whole, with its gradients.
    """
    state = 5 * 4 * model.weights / shards
    if shards == 1:
        return state + 2 * model.weights
    return state + model.largest_block * (2 * 2 + 4) + (model.weights - model.in_blocks) * (4 + 4 + 2)


def sent_bytes(model: Count, gpus: int, shards: int) -> tuple[float, float]:
    """Bytes that a GPU sends per step: among those that share a copy, and among copies.

    In rings, (n − 1)/n of a tensor to gather it or to reduce and scatter it. Shards gather weights twice (forward and
    backward; in bfloat16 inside of the blocks, outside once and in float32), and reduce and scatter float32 gradients.
    Copies reduce their rows of the gradients and gather the sums.
    """
    copies, outside = gpus // shards, model.weights - model.in_blocks
    within = (shards - 1) / shards * (2 * 2 * model.in_blocks + 4 * outside + 4 * model.weights)
    return within, (copies - 1) / copies * 2 * 4 * model.weights / shards


def seconds(model: Count, gpus: int, shards: int, options: Scaling) -> tuple[float, float]:
    """(computing, sending) per step.

    A ring through whole nodes crosses from one to the next over all of its adapters, since NCCL makes several rings and
    sends each through another adapter. A ring through one GPU of each node has that GPU's adapter alone.
    """
    computing = options.per_gpu * model.operations / (options.peak * options.efficiency)
    within, among = sent_bytes(model, gpus, shards)
    through_nodes = min(options.inside, options.between * options.node)
    within_rate = options.inside if shards <= options.node else through_nodes
    if gpus <= options.node:
        among_rate = options.inside
    else:
        among_rate = min(options.inside, options.between * options.node / shards)
    return computing, (within / within_rate + among / among_rate) / options.network_efficiency


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main(options: Scaling) -> None:
    """Print the tables."""
    counts = [count(name, options) for name in SIZES]
    print(f"### One model\n\nActivations are for {options.per_gpu} images per GPU, without activation checkpointing.\n")
    print(
        table(
            [
                "model",
                "weights, millions",
                "operations per image, 10⁹",
                "weights and what goes with them, GiB",
                "activations, GiB",
            ],
            [
                [
                    c.name,
                    f"{c.weights / 1e6:,.1f}",
                    f"{c.operations / GIGA:,.0f}",
                    f"{resident_bytes(c, 1) / GIB:.1f}",
                    f"{options.per_gpu * c.activations / GIB:.1f}",
                ]
                for c in counts
            ],
        )
    )
    steps = []
    for gpus in options.gpus:
        rows = []
        for c in counts:
            for shards in sorted({1, options.node, gpus}):
                held = resident_bytes(c, shards) + options.per_gpu * c.activations
                computing, sending = seconds(c, gpus, shards, options)
                slowest, step = max(computing, sending), computing + sending
                sent = sum(sent_bytes(c, gpus, shards))
                rows.append(
                    [
                        c.name,
                        str(shards),
                        f"{held / GIB:.1f}",
                        f"{sent / GIGA:.2f}",
                        f"{1e3 * computing:.0f}",
                        f"{1e3 * sending:.0f}",
                        f"{computing / slowest:.0%} to {computing / step:.0%}",
                    ]
                )
                steps.append(
                    {
                        "model": c.name,
                        "gpus": gpus,
                        "shards": shards,
                        "bytes_held": round(held),
                        "bytes_sent": round(sent),
                        "seconds_computing": computing,
                        "seconds_sending": sending,
                    }
                )
        print(f"### {gpus} GPUs, {gpus * options.per_gpu:,} images per step\n")
        header = ["model", "shards", "held per GPU, GiB", "sent per GPU, GB", "computing, ms", "sending, ms"]
        print(table([*header, "computing, of a step"], rows))
    figures = {"models": [asdict(c) for c in counts], "steps": steps}
    report("scaling", options, figures, torch.device("cpu"))


if __name__ == "__main__":
    main(tyro.cli(Scaling, description=__doc__))
