"""What figures depend on besides their options: machine, versions of packages, commit of this repository, date."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("reglue", "torch", "torchvision", "timm", "diffusers", "numpy")
UNKNOWN = "a machine that was not recorded"
"""Where figures and phases are older than these records."""


def circumstances(device: torch.device) -> dict[str, Any]:
    """Under which figures are made now, as plain data."""
    return {
        "machine": machine(device),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def machine(device: torch.device) -> str:
    """The processor that computes: the GPU's name, or the CPU's with the number of its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name, described = platform.processor(), Path("/proc/cpuinfo")
    if described.is_file():
        lines = described.read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name or platform.machine()}, {os.cpu_count()} cores"


def commit() -> str | None:
    """The commit of this repository, with `-changed` behind it where files differ; None without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty=-changed"]
    try:
        found = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() if found.returncode == 0 else None
