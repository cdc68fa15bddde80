"""What sizes cost on paper, for machines that are not at hand: parameters, FLOPs, memory, and messages between GPUs.

    python benchmarks/counting.py

Weights are those of the real denoiser, FLOPs are PyTorch's count of matrix products, convolutions and attention (a
multiplication and an addition are two), activations are what autograd keeps. All of it is found on tensors without
content: nothing is computed. Times are counts divided by the rates below, which are assumed and not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from common import Benchmark, report, run
from reglue.config import Precision
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
NVLINK, NETWORK, MESSAGES = 450e9, 50e9, 0.7
"""Bytes per second that a GPU sends inside a node and between nodes (one 400 Gb/s adapter per GPU), by data sheets, and
the share of it that large messages reach."""
NODE = 8
"""GPUs of a node."""
STATE_BYTES = 5 * 4
"""Of a weight in float32, with its gradient, two moments and moving average."""
OPTIMISER_BYTES = 4 * (7 + 3 + 3) + 6
"""Moved per weight and step: AdamW reads four numbers and writes three, clipping and averaging touch three each, and a
weight is read for its copy in bfloat16."""


@dataclass(frozen=True)
class Counting(Benchmark):
    """Three tables: models, resolutions of `--model`, and models on many GPUs."""

    recipe: str = "reglue"
    models: tuple[str, ...] = ("S/2", "B/2", "L/2", "XL/2", "32x2304x18/2")
    """The published sizes, and one of three billion weights."""
    model: str = "B/2"
    resolutions: tuple[tuple[int, int], ...] = ((64, 64), (128, 128), (256, 256), (512, 512), (512, 768), (1024, 1024))
    """Heights and widths in pixels, with the SD-VAE and DINOv2-B."""
    gpus: tuple[int, ...] = (8, 128)
    per_gpu: int = 32
    """Images per GPU and step."""


def random_outputs(model: Denoiser, images: int) -> Tensor:
    """The sum of all that a loss looks at for random inputs: velocities, and tokens to align where there are."""
    prediction = model(*random_inputs(model.config, images))
    outputs = list(prediction.velocity.values())
    if prediction.tap is not None:
        outputs.append(model.projector(prediction.tap))
    return torch.stack([output.float().sum() for output in outputs]).sum()


def random_inputs(config: DenoiserConfig, images: int) -> tuple[Any, ...]:
    """State, time and condition for a denoiser, on the default device."""
    state = {name: torch.randn(images, *shape) for name, shape in config.shapes().items()}
    condition = {name: CONDITIONS[name].null(size, images) for name, size in config.conditions.items()}
    return state, torch.rand(images), condition


def parameters(config: DenoiserConfig) -> int:
    """How many weights a denoiser has, the projector included."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Denoiser(config).parameters())


def forward_flops(config: DenoiserConfig) -> int:
    """FLOPs of an image's forward pass, as in sampling: without the projector."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        Denoiser(config)(*random_inputs(config, 1))
    return counter.get_total_flops()


def training_flops(config: DenoiserConfig) -> int:
    """FLOPs of an image's forward and backward pass, the projector included."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        random_outputs(Denoiser(config), 1).backward()
    return counter.get_total_flops()


def activation_bytes(config: DenoiserConfig, precision: Precision = "bfloat16") -> int:
    """Bytes that autograd keeps of each image for the backward pass on a CPU, without recomputation."""
    # The difference, since weights in lower precision are kept too, once for all images.
    return kept_bytes(config, precision, 2) - kept_bytes(config, precision, 1)


def kept_bytes(config: DenoiserConfig, precision: Precision, images: int) -> int:
    """Bytes of what autograd keeps of a forward pass, each storage counted once."""
    kept: dict[int, torch.UntypedStorage] = {}  # They stay alive, or another one could get the same address.

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with FakeTensorMode():
        model = Denoiser(config)
        with saved_tensors_hooks(keep, lambda tensor: tensor), autocast(torch.device("cpu"), precision):
            random_outputs(model, images)
    return sum(storage.nbytes() for storage in kept.values())


@dataclass(frozen=True)
class Cost:
    """What a model costs."""

    name: str
    weights: int
    weights_in_blocks: int
    weights_of_a_block: int
    forward_flops: int
    training_flops: int
    activation_bytes: int
    """Of an image."""

    @staticmethod
    def of(name: str, workload: Workload) -> Cost:
        """Count one model."""
        config = workload.config
        with torch.device("meta"):
            blocks = [sum(p.numel() for p in block.parameters()) for block in Denoiser(config).backbone.blocks]
        return Cost(
            name,
            parameters(config),
            sum(blocks),
            max(blocks),
            forward_flops(config),
            training_flops(config),
            activation_bytes(config),
        )

    def held_bytes(self, shards: int) -> float:
        """Of the weights and what goes with them, on one of so many GPUs that share a copy of the model.

        Autocast keeps whole weights in bfloat16 too. With shards there are, besides, the gathered block and the next
        one in bfloat16, a block's gradients in float32, and what is outside the blocks whole, with its gradients.
        """
        state = STATE_BYTES * self.weights / shards
        if shards == 1:
            return state + 2 * self.weights
        return state + self.weights_of_a_block * (2 * 2 + 4) + (self.weights - self.weights_in_blocks) * (4 + 4 + 2)

    def sent_bytes(self, gpus: int, shards: int) -> tuple[float, float]:
        """Bytes that a GPU sends per step, among those that share a copy, and among copies.

        In rings, (n − 1)/n of a tensor to gather it, or to reduce and scatter it. Shards gather weights twice (in
        bfloat16 inside the blocks; outside once, in float32), and reduce and scatter float32 gradients. Copies reduce
        their rows of the gradients and gather the sums.
        """
        copies, outside = gpus // shards, self.weights - self.weights_in_blocks
        within = (shards - 1) / shards * (2 * 2 * self.weights_in_blocks + 4 * outside + 4 * self.weights)
        return within, (copies - 1) / copies * 2 * 4 * self.weights / shards

    def sending_seconds(self, gpus: int, shards: int) -> float:
        """Per step. A ring through whole nodes uses all of their adapters, one through a GPU of each that one's."""
        within, among = self.sent_bytes(gpus, shards)
        within_rate = NVLINK if shards <= NODE else min(NVLINK, NETWORK * NODE)
        among_rate = NVLINK if gpus <= NODE else min(NVLINK, NETWORK * NODE / shards)
        return (within / within_rate + among / among_rate) / MESSAGES

    def bound_seconds(self, images: int) -> float:
        """The least that a step of an H200 takes: its products, and the bytes that the optimiser moves."""
        return images * self.training_flops / H200_FLOPS + OPTIMISER_BYTES * self.weights / H200_BANDWIDTH


def of_model(cost: Cost) -> dict[str, Any]:
    """A row of the table of models. The rate is an H200's, at a batch of 256."""
    return {
        "model": cost.name,
        "weights, M": cost.weights / 1e6,
        "forward, GFLOP": cost.forward_flops / 1e9,
        "training, GFLOP": cost.training_flops / 1e9,
        "activations, MiB": cost.activation_bytes / 2**20,
        "held, GiB": cost.held_bytes(1) / 2**30,
        "images/s at most": 256 / cost.bound_seconds(256),
    }


def of_resolution(size: tuple[int, int], grid: tuple[int, int], cost: Cost) -> dict[str, Any]:
    """A row of the table of resolutions. The rate is an H200's at half of its matrix rate."""
    return {
        "pixels": "×".join(map(str, size)),
        "tokens": f"{prod(grid)} ({'×'.join(map(str, grid))})",
        "forward, GFLOP": cost.forward_flops / 1e9,
        "training, GFLOP": cost.training_flops / 1e9,
        "activations, MiB": cost.activation_bytes / 2**20,
        "images/s of an H200": round(H200_FLOPS * REACHED / cost.training_flops),
    }


def of_gpus(gpus: int, per_gpu: int, shards: int, cost: Cost) -> dict[str, Any]:
    """A row of the table of many GPUs. The share of computing is between all messages hidden behind it, and none."""
    computing = per_gpu * cost.training_flops / (H200_FLOPS * REACHED)
    sending = cost.sending_seconds(gpus, shards)
    return {
        "GPUs": gpus,
        "model": cost.name,
        "shards": shards,
        "held per GPU, GiB": (cost.held_bytes(shards) + per_gpu * cost.activation_bytes) / 2**30,
        "sent per GPU, GB": sum(cost.sent_bytes(gpus, shards)) / 1e9,
        "computing, ms": round(1e3 * computing),
        "sending, ms": round(1e3 * sending),
        "computing, of a step": f"{computing / max(computing, sending):.0%} to {computing / (computing + sending):.0%}",
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print rows as a table in Markdown."""
    lines = [[f"{cell:,.1f}" if isinstance(cell, float) else str(cell) for cell in row.values()] for row in rows]
    for line in (list(rows[0]), ["---"] * len(rows[0]), *lines):
        print(f"| {' | '.join(line)} |")
    print()


def main(options: Counting) -> str:
    """Print the tables, and then the line of JSON. Returns it."""
    costs = [Cost.of(name, Workload.of("imagenet", name, options.recipe)) for name in options.models]
    workloads = [Workload.of("imagenet", options.model, options.recipe, size) for size in options.resolutions]
    tables = {
        "models": [of_model(cost) for cost in costs],
        "resolutions": [
            of_resolution(size, workload.config.token_grid, Cost.of(options.model, workload))
            for size, workload in zip(options.resolutions, workloads, strict=True)
        ],
        "gpus": [
            of_gpus(gpus, options.per_gpu, shards, cost)
            for gpus in options.gpus
            for cost in costs
            for shards in sorted({1, NODE, gpus})
        ],
    }
    for rows in tables.values():
        show(rows)
    return report(options, tables)


if __name__ == "__main__":
    run(Counting, main, __doc__)
