"""What each resolution costs: tokens, operations, memory for the backward pass, and seconds.

    python benchmarks/resolutions.py --recipe reglue --model B/2

Operations are those of matrix products, and memory is what autograd keeps of an image for the backward pass, both found
without running the model. Seconds are of the model `--timed`, forward and backward for one image, on one core of this
machine.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
import tyro
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from environment import forward_flops, random_inputs, report
from reglue.diffusion.denoiser import Denoiser, DenoiserConfig
from reglue.papers import RECIPES
from reglue.runs import ranks

PEAK, REACHED = 790e12, 0.5
"""bfloat16 FLOP/s that an H200 reaches in matrix products, and the share of it that training is to reach."""


@dataclass(frozen=True)
class Resolutions:
    """The cost of resolutions."""

    recipe: str = "reglue"
    model: str = "B/2"
    resolutions: tuple[tuple[int, int], ...] = ((64, 64), (128, 128), (256, 256), (512, 512), (512, 768), (1024, 1024))
    """Heights and widths in pixels."""
    downsampling: int = 8
    """Of the autoencoder, along each side."""
    latent_channels: int = 4
    local_channels: int = 16
    token_width: int = 768
    """Of the vision encoder."""
    precision: ranks.Precision = "bfloat16"
    """In which the memory is counted."""
    timed: str = "S/2"
    """The model that is timed."""
    timed_up_to: int = 256
    """The longest side, in pixels, that is timed."""


def main(options: Resolutions) -> None:
    """Print a table in markdown, and the figures as JSON."""
    torch.set_num_threads(1)
    print(
        "| pixels | tokens | forward, GFLOP | training, GFLOP | activations, MiB | images/s of an H200 | s on a core |"
    )
    print("|---|---|---|---|---|---|---|")
    figures = [row(options, size) for size in options.resolutions]
    report("resolutions", options, figures)


def row(options: Resolutions, size: tuple[int, int]) -> dict[str, Any]:
    """One line of the table."""
    config = config_at(options, options.model, size)
    rows, columns = config.token_grid
    forward = forward_flops(config)
    figures = {
        "resolution": size,
        "tokens": rows * columns,
        "forward_gflop": forward / 1e9,
        "training_gflop": 3 * forward / 1e9,
        "activation_mib": activation_bytes(config, options.precision) / 2**20,
        "images_per_second_of_an_h200": PEAK * REACHED / (3 * forward),
        "seconds_on_a_core": seconds(options, size) if max(size) <= options.timed_up_to else None,
    }
    took = figures["seconds_on_a_core"]
    print(
        f"| {size[0]}×{size[1]} | {figures['tokens']} ({rows}×{columns}) | {figures['forward_gflop']:.1f} | "
        f"{figures['training_gflop']:.1f} | {figures['activation_mib']:.0f} | "
        f"{figures['images_per_second_of_an_h200']:.0f} | {'–' if took is None else f'{took:.2f}'} |",
        flush=True,
    )
    return figures


def config_at(options: Resolutions, model: str, size: tuple[int, int]) -> DenoiserConfig:
    """The recipe's denoiser for images of a size."""
    return replace(RECIPES[options.recipe], model=model).denoiser_config(
        latent_channels=options.latent_channels,
        grid=(size[0] // options.downsampling, size[1] // options.downsampling),
        classes=1000,
        local_channels=options.local_channels,
        token_width=options.token_width,
    )


def activation_bytes(config: DenoiserConfig, precision: ranks.Precision) -> int:
    """Bytes that the backward pass keeps for each image."""
    # The difference, since weights in lower precision are kept too, once for all images.
    return kept_bytes(config, precision, 2) - kept_bytes(config, precision, 1)


def kept_bytes(config: DenoiserConfig, precision: ranks.Precision, images: int) -> int:
    """Bytes of what autograd keeps of a forward pass, every storage counted once."""
    kept: dict[int, torch.UntypedStorage] = {}  # They stay alive, or another one could get the same address.

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with FakeTensorMode():  # Tensors without content, which take the same way through the operators as real ones.
        model, inputs = Denoiser(config), random_inputs(config, images)
        with saved_tensors_hooks(keep, lambda tensor: tensor), ranks.autocast(torch.device("cpu"), precision):
            prediction = model(*inputs)
        del prediction
    return sum(storage.nbytes() for storage in kept.values())


def seconds(options: Resolutions, size: tuple[int, int]) -> float:
    """Seconds on a core for one image, forward and backward: the best of three."""
    config = config_at(options, options.timed, size)
    model, inputs = Denoiser(config), random_inputs(config, 1)
    best = float("inf")
    for _ in range(4):
        started = time.process_time()
        prediction = model(*inputs)
        torch.stack([velocity.square().mean() for velocity in prediction.velocity.values()]).sum().backward()
        best = min(best, time.process_time() - started)
    return best


if __name__ == "__main__":
    main(tyro.cli(Resolutions, description=__doc__))
