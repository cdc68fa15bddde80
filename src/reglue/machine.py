"""What figures depend on beside their options: the machine, what it is good at, and the commit of the code."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from math import isfinite, nan
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # On Windows.
    resource = None

CPUINFO, STATM = Path("/proc/cpuinfo"), Path("/proc/self/statm")
"""Of Linux."""


def machine(device: torch.device) -> str:
    """What computes: the GPU's name, or the processor's with the number of its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpuinfo('model name') or platform.processor()}, {os.cpu_count()} cores"


def cpuinfo(name: str) -> str:
    """What Linux says of the first core under a name; nothing elsewhere."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    found = (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name)
    return next(found, "")


def memory() -> tuple[float, float]:
    """MiB of this process that are resident now, and that have been at most; NaN where the system does not say."""
    now = most = nan
    if resource is not None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        most = peak / (2**20 if sys.platform == "darwin" else 2**10)
        if STATM.is_file():
            now = int(STATM.read_text().split()[1]) * resource.getpagesize() / 2**20
    return now, most


def memory_told() -> str:
    """The same in words, with PyTorch's own on a GPU that it uses."""
    mib = dict[str, float](zip(("memory now", "at most"), memory(), strict=True))
    if torch.cuda.is_initialized():
        mib["on the GPU now"] = torch.cuda.memory_allocated() / 2**20
        mib["at most there"] = torch.cuda.max_memory_allocated() / 2**20
    return ", ".join(f"{name} {held:,.0f} MiB" for name, held in mib.items() if isfinite(held))


def multiplies_bfloat16_faster(device: torch.device) -> bool:
    """Whether matrix products are faster in bfloat16 than in float32, as far as that is known.

    On a GPU from Ampere on. On a CPU with AMX, or with AVX-512's own products if it is AMD's: those take about half of
    float32's time, and Intel's twice as long. `benchmarks/train_speed.py` measures both rates.
    """
    if device.type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    # Environment variables may keep PyTorch, and the library that multiplies for it, from using what there is.
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    everything = allowed in ("ALL", "DEFAULT")
    if device.type != "cpu" or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    has = instructions()
    if {"amx_tile", "amx_bf16"} <= has and (everything or "AMX" in allowed):
        return True
    amd = "sse4a" in has  # No other maker's processors have it.
    return amd and "avx512_bf16" in has and (everything or any(name in allowed for name in ("BF16", "FP16", "AMX")))


def instructions() -> set[str]:
    """The extensions that the CPU has, by the names that Linux gives them."""
    if CPUINFO.is_file():
        return {*cpuinfo("flags").split()}
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch knows since 2.11.
    return {name for name, there in capabilities.items() if there is True}


def commit(folder: Path) -> str | None:
    """The commit of a checkout, with `-changed` behind it where files differ; None without git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--dirty=-changed", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
