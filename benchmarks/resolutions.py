"""What each resolution costs: tokens, operations, memory for the backward pass, and seconds.

    python benchmarks/resolutions.py --recipe reglue --model B/2

Operations are those of matrix products, training with the projector, and memory is what autograd keeps of an image for
the backward pass, all found without running the model. Seconds are of the model `--timed`, forward and backward for one
image, on one core of this machine.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
import tyro

from common import Conditions, report
from counting import H200_PRODUCTS, activation_bytes, all_outputs, forward_flops, training_flops
from reglue.config import Precision
from reglue.diffusion.denoiser import Denoiser, DenoiserConfig
from reglue.papers import RECIPES

REACHED = 0.5
"""Share of an H200's matrix rate that training is to reach."""


@dataclass(frozen=True)
class Resolutions:
    """The cost of resolutions."""

    conditions: Annotated[Conditions, tyro.conf.arg(name="")] = field(default_factory=Conditions)
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
    precision: Precision = "bfloat16"
    """In which the memory is counted."""
    timed: str = "S/2"
    """The model that is timed."""
    timed_up_to: int = 256
    """The longest side, in pixels, that is timed."""


def main(options: Resolutions) -> None:
    """Print a table in markdown, and the figures as JSON."""
    torch.set_num_threads(options.conditions.threads)
    print(
        "| pixels | tokens | forward, GFLOP | training, GFLOP | activations, MiB | images/s of an H200 | s on a core |"
    )
    print("|---|---|---|---|---|---|---|")
    figures = [row(options, size) for size in options.resolutions]
    report("resolutions", options, {"rows": figures}, torch.device("cpu"))


def row(options: Resolutions, size: tuple[int, int]) -> dict[str, Any]:
    """One line of the table."""
    config = config_at(options, options.model, size)
    rows, columns = config.token_grid
    forward, training = forward_flops(config), training_flops(config)
    figures = {
        "resolution": size,
        "tokens": rows * columns,
        "forward_gflop": forward / 1e9,
        "training_gflop": training / 1e9,
        "activation_mib": activation_bytes(config, options.precision) / 2**20,
        "images_per_second_of_an_h200": H200_PRODUCTS * REACHED / training,
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


def seconds(options: Resolutions, size: tuple[int, int]) -> float:
    """Seconds on a core for one image, forward and backward: the best of three."""
    config = config_at(options, options.timed, size)
    model = Denoiser(config)
    best = float("inf")
    for _ in range(4):
        started = time.process_time()
        all_outputs(model, 1).backward()
        best = min(best, time.process_time() - started)
    return best


if __name__ == "__main__":
    main(tyro.cli(Resolutions, description=__doc__))
