"""Which process this is, its device and precision. One path for a laptop, one GPU and many."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from reglue.errors import UserError

Precision = Literal["float32", "bfloat16"]

LONG_WAIT = timedelta(days=30)
"""Until a process that waits for the others gives up. One that has died is noticed at once."""


def resolve_device(name: str = "auto") -> torch.device:
    """The device that a job runs on.

    `auto` is this process's GPU where there is one and the CPU otherwise. Raises UserError if the device is missing.
    """
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is not a device; use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this machine has no NVIDIA GPU that PyTorch can see; use --device cpu")
    return device


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, for timings."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def join(long_waits: bool = False) -> tuple[int, int]:
    """Join the process group that torchrun announces. Returns (rank, number of processes); (0, 1) without torchrun.

    With `long_waits`, processes that work on their own for hours may wait for each other, over the network alone.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return 0, 1
    if not dist.is_initialized():
        if long_waits:
            dist.init_process_group("gloo", timeout=LONG_WAIT)
        else:
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


def leave() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Return once every process has come here. Raises UserError if one of them never will, because it has ended."""
    if not dist.is_initialized():
        return
    try:
        dist.barrier()
    except RuntimeError as error:
        raise UserError(
            f"process {dist.get_rank()} waited for another one that has stopped; see what that one said, and run the "
            "same command again"
        ) from error


@contextmanager
def first_process_first() -> Iterator[None]:
    """Process 0 runs the block alone, then all others do. None leaves it before all have."""
    alone = not dist.is_initialized() or dist.get_rank() == 0
    if not alone:
        wait_for_all()
    yield
    if alone:
        wait_for_all()
    wait_for_all()


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes: one message for all of them."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def average(value: Tensor) -> Tensor:
    """The mean of a small tensor over the processes."""
    if dist.is_initialized():
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The precision of matrix products inside the block. The one place that decides it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def compiled(function: Callable[..., dict[str, Tensor]], device: torch.device) -> Callable[..., dict[str, Tensor]]:
    """A function of tensors, compiled for each shape that it meets. The one place that decides how.

    On a GPU it is captured in CUDA graphs, whose results lie where the next call writes its own, so they are copied.
    """
    fast = torch.compile(function, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None)

    def call(*arguments: object) -> dict[str, Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        return {name: value.clone() for name, value in fast(*arguments).items()}

    return call


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; the copy to a GPU does not wait for what the GPU is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
