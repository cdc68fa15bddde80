"""Which process this is, its device and precision. One path for a laptop, one GPU and many."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from reglue.errors import UserError

Precision = Literal["float32", "bfloat16"]

LONG_WAIT = timedelta(days=30)
"""Until a process that waits for the others gives up. One that has died is noticed at once."""

STEP_WAIT = timedelta(minutes=30)
"""Until a message between GPUs that does not arrive ends its process: longer than the first one draws previews."""


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
        elif torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group("nccl", timeout=STEP_WAIT)
        else:
            dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def leave() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end(code: int) -> NoReturn:
    """End this process. Among others it ends at once: the thread that watches them (`together`) does not stop."""
    if not dist.is_initialized():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait_for_all() -> None:
    """Return once every process has come here. Raises UserError if one of them never will, because it has ended."""
    if dist.is_initialized():
        with _others_must_live():
            dist.barrier()


@contextmanager
def _others_must_live() -> Iterator[None]:
    """Around what needs every process. Raises UserError if one of them has ended."""
    try:
        yield
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


def private_group(timeout: timedelta = STEP_WAIT) -> dist.ProcessGroup:
    """Another group of all processes, over the CPU: its messages do not mix with the others. All must make it."""
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    return group


@contextmanager
def together() -> Iterator[None]:
    """Around a job: its processes join, and when one of them dies, the others end within seconds.

    They say so in one line and exit with code 2, whatever they are waiting for at that moment (NCCL would not notice
    for STEP_WAIT). Each process watches the next one, over a connection of its own, and all leave together. An
    exception that leaves the block must end the process.
    """
    if join()[1] == 1:
        yield
        return
    rank, count = dist.get_rank(), dist.get_world_size()
    after, before = (rank + 1) % count, (rank - 1) % count
    group = private_group(LONG_WAIT)
    leaving = threading.Event()

    def watch() -> None:
        try:
            dist.recv(torch.empty(1), after, group)  # its goodbye
        except RuntimeError:
            if not leaving.is_set():
                message = f"process {rank} ends, because process {after} has; see which one ended first, and why"
                print(f"\nreglue: {message}; the same command continues", file=sys.stderr, flush=True)
                os._exit(2)  # The main thread may be inside a message that never ends.

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
        dist.send(torch.ones(1), before, group)
        watcher.join()
    except RuntimeError:
        # A message that failed may have noticed before the watcher did.
        watcher.join(5)
        raise
    finally:
        leaving.set()


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


def all_rows(rows: Tensor) -> Tensor:
    """The rows (n, …) of every process, in the order of processes, which may have different numbers of them.

    Takes and returns tensors on the CPU, of one type and of as many dimensions; the shape of a row counts only where
    there are any. The processes must have joined with `long_waits`. Raises UserError if one of them has ended.
    """
    if not dist.is_initialized():
        return rows
    with _others_must_live():
        shapes = [torch.zeros(rows.ndim, dtype=torch.int64) for _ in range(dist.get_world_size())]
        dist.all_gather(shapes, torch.tensor(rows.shape))
        longest = max(shapes, key=lambda shape: int(shape[0])).tolist()
        padded = torch.zeros(longest, dtype=rows.dtype)
        if len(rows):
            padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in shapes]
        dist.all_gather(parts, padded)
    return torch.cat([part[: int(shape[0])] for part, shape in zip(parts, shapes, strict=True)])


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
