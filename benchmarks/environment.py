"""What every figure depends on, and the one line of JSON that a benchmark ends with."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from reglue.diffusion.denoiser import Denoiser, DenoiserConfig
from reglue.diffusion.modalities import State

PACKAGES = ("torch", "timm", "diffusers", "numpy", "safetensors", "pillow")


def report(benchmark: str, options: Any, figures: Any) -> None:
    """Print figures with options, hardware, versions and date, as one line of JSON."""
    hardware = {"cpu": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    content = {
        "benchmark": benchmark,
        "figures": figures,
        "options": asdict(options),
        "hardware": {**hardware, "load_average": os.getloadavg()[0]},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    print(json.dumps(rounded(content), default=str))


def rounded(value: Any) -> Any:
    """Numbers to four digits, inside of anything."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def random_inputs(config: DenoiserConfig, images: int) -> tuple[State, torch.Tensor, torch.Tensor]:
    """State, times and labels for a denoiser, on the default device."""
    state = {name: torch.randn(images, *shape) for name, shape in config.shape.shapes().items()}
    return state, torch.rand(images), torch.zeros(images, dtype=torch.int64)


def forward_flops(config: DenoiserConfig) -> int:
    """Floating-point operations of the matrix products of one image's forward pass, an addition counted as one.

    Counted on the meta device, so that no memory is needed. Training takes three times as many.
    """
    with torch.device("meta"):
        model, inputs = Denoiser(config), random_inputs(config, 1)
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops()
