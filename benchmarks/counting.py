"""What sizes cost on paper, for machines that are not at hand: parameters, FLOPs and memory.

    python benchmarks/counting.py

Weights are those of the real denoiser, FLOPs are PyTorch's count of matrix products, convolutions and attention (a
multiplication and an addition are two), activations are what autograd keeps. All of it is found on tensors without
content: nothing is computed. Times are counts divided by the rates below, which are assumed and not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from common import CPU, Benchmark, report, run
from reglue.diffusion.backbones import attention
from reglue.diffusion.conditions import CONDITIONS
from reglue.diffusion.denoiser import Denoiser, DenoiserConfig
from reglue.training.precision import autocast
from workloads import Workload

H200_FLOPS = 790e12
"""FLOP/s of large bfloat16 matrix products on an H200: four fifths of the 989e12 of its data sheet."""
H200_BANDWIDTH = 4.0e12
"""Bytes per second of its memory: five sixths of the data sheet's."""
REACHED = 0.5
"""Share of that rate which training is to reach."""
STATE_BYTES = 5 * 4
"""Of a weight in float32, with its gradient, two moments and moving average."""
OPTIMISER_BYTES = 4 * (7 + 3 + 3) + 6
"""Moved per weight and step: AdamW reads four numbers and writes three, clipping and averaging touch three each, and a
weight is read for its copy in bfloat16."""


@dataclass(frozen=True)
class Counting(Benchmark):
    """Two tables: models, and resolutions of `--model`."""

    models: tuple[str, ...] = ("S/2", "B/2", "L/2", "XL/2", "32x2304x18/2")
    """The published sizes, and one of three billion weights."""
    model: str = "B/2"
    resolutions: tuple[tuple[int, int], ...] = ((64, 64), (128, 128), (256, 256), (512, 512), (512, 768), (1024, 1024))
    """Heights and widths in pixels, with the SD-VAE and DINOv2-B."""


def weights_in(module: torch.nn.Module) -> int:
    """How many weights a module has."""
    return sum(parameter.numel() for parameter in module.parameters())


def parameters(config: DenoiserConfig) -> int:
    """How many weights a denoiser has, the projector included."""
    with torch.device("meta"):
        return weights_in(Denoiser(config))


def random_inputs(config: DenoiserConfig, images: int) -> tuple[Any, ...]:
    """State, time and condition for a denoiser, on the default device."""
    state = {name: torch.randn(images, *shape) for name, shape in config.shapes().items()}
    condition = {name: CONDITIONS[name].null(size, images) for name, size in config.conditions.items()}
    return state, torch.rand(images), condition


def outputs(model: Denoiser, images: int) -> Tensor:
    """The sum of all that a loss looks at for random inputs: velocities, and tokens to align where there are."""
    prediction = model(*random_inputs(model.config, images))
    aligned = [] if prediction.tap is None else [model.projector(prediction.tap)]
    return torch.stack([output.float().sum() for output in (*prediction.velocity.values(), *aligned)]).sum()


def forward_flops(config: DenoiserConfig) -> int:
    """FLOPs of an image's forward pass, as in sampling: without the projector."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        Denoiser(config)(*random_inputs(config, 1))
    return counter.get_total_flops()


def training_flops(config: DenoiserConfig) -> int:
    """FLOPs of an image's forward and backward pass, the projector included."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        outputs(Denoiser(config), 1).backward()
    return counter.get_total_flops()


def activation_bytes(config: DenoiserConfig) -> int:
    """Bytes that autograd keeps of each image in bfloat16 for the backward pass, without recomputation.

    By the operators of a CPU, but with attention as on a GPU.
    """
    # The difference, since weights in lower precision are kept too, once for all images.
    return kept_bytes(config, 2) - kept_bytes(config, 1)


def kept_bytes(config: DenoiserConfig, images: int) -> int:
    """Bytes of what autograd keeps of a forward pass in bfloat16, each storage counted once."""
    kept: dict[int, torch.UntypedStorage] = {}  # They stay alive, or another one could get the same address.

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with FakeTensorMode(), patch.object(attention, "FEW_TOKENS", 0):
        model = Denoiser(config)
        with saved_tensors_hooks(keep, lambda tensor: tensor), autocast(CPU, "bfloat16"):
            outputs(model, images)
    return sum(storage.nbytes() for storage in kept.values())


def held_bytes(config: DenoiserConfig, shards: int) -> float:
    """Of the weights and what goes with them, on one of so many GPUs that share a copy of the model.

    Autocast keeps whole weights in bfloat16 too. With shards there are, besides, the gathered block and the next one in
    bfloat16, a block's gradients in float32, and what is outside the blocks whole, with its gradients.
    """
    with torch.device("meta"):
        model = Denoiser(config)
    weights, blocks = weights_in(model), [weights_in(block) for block in model.backbone.blocks]
    state = STATE_BYTES * weights / shards
    if shards == 1:
        return state + 2 * weights
    return state + max(blocks) * (2 * 2 + 4) + (weights - sum(blocks)) * (4 + 4 + 2)


def costs(config: DenoiserConfig) -> dict[str, float]:
    """The cells that both tables have, of one image."""
    return {
        "forward, GFLOP": forward_flops(config) / 1e9,
        "training, GFLOP": training_flops(config) / 1e9,
        "activations, MiB": activation_bytes(config) / 2**20,
    }


def of_model(name: str) -> dict[str, Any]:
    """A row of the table of models. The rate is an H200's with nothing but products and the optimiser's bytes."""
    config, batch = Workload.of("imagenet", name).config, 256
    weights, counted = parameters(config), costs(config)
    seconds = batch * 1e9 * counted["training, GFLOP"] / H200_FLOPS + OPTIMISER_BYTES * weights / H200_BANDWIDTH
    held = {f"{where}, GiB": held_bytes(config, n) / 2**30 for where, n in (("whole", 1), ("8 shards", 8))}
    return {"model": name, "weights, M": weights / 1e6, **counted, **held, "images/s at most": batch / seconds}


def of_resolution(size: tuple[int, int], model: str) -> dict[str, Any]:
    """A row of the table of resolutions. The rate is an H200's at half of its matrix rate."""
    config = Workload.of("imagenet", model, size=size).config
    counted, grid = costs(config), config.token_grid
    return {
        "pixels": "×".join(map(str, size)),
        "tokens": f"{prod(grid)} ({'×'.join(map(str, grid))})",
        **counted,
        "images/s of an H200": round(H200_FLOPS * REACHED / (1e9 * counted["training, GFLOP"])),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print rows as a table in Markdown."""
    lines = [[f"{cell:,.1f}" if isinstance(cell, float) else str(cell) for cell in row.values()] for row in rows]
    for line in (list(rows[0]), ["---"] * len(rows[0]), *lines):
        print(f"| {' | '.join(line)} |")
    print()


def main(options: Counting) -> str:
    """Print the tables, and then the line of JSON. Returns it."""
    tables = {
        "models": [of_model(name) for name in options.models],
        "resolutions": [of_resolution(size, options.model) for size in options.resolutions],
    }
    for rows in tables.values():
        show(rows)
    return report(options, tables)


if __name__ == "__main__":
    run(Counting, main, __doc__)
