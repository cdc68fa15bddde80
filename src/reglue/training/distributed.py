"""Which process this is, its device, and what processes say to each other. One path for a laptop and for many GPUs."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from typing import Any, NoReturn, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from reglue.errors import UserError, one_line, option

try:
    import resource
except ImportError:  # On Windows.
    resource = None

LONG_WAIT = timedelta(days=30)
"""Until a process that waits for the others gives up. One that has died is noticed at once."""

JOIN_WAIT = timedelta(minutes=3)
"""Until a process gives up that waits for the others to start: none of them can be watched before it has."""

STEP_WAIT = timedelta(minutes=30)
"""Until a message between GPUs that does not arrive ends its process: longer than the first one draws previews."""

DEVICE_ERRORS = (torch.OutOfMemoryError, torch.AcceleratorError)
"""What this process's own device says, though RuntimeErrors as those of messages are."""

_T = TypeVar("_T")
_waiting: dist.ProcessGroup | None = None
"""All processes over the CPU, for whatever one may take hours for while the others wait."""


def resolve_device(name: str = "auto") -> torch.device:
    """The device that a job runs on.

    `cuda` is this process's GPU: under torchrun the one of its number on the machine, the current one otherwise. `auto`
    is that where there is a GPU and the CPU otherwise. Raises UserError if the device is missing, or is not for this
    process to take.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    given = f"{option('device')} {name}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"{given}: choose auto, cpu or cuda") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"{given}: choose auto, cpu or cuda")
    if not torch.cuda.is_available():
        raise UserError(f"{given}: this machine has no NVIDIA GPU that PyTorch can see; choose cpu")
    # What `deterministic` needs, read once, at the first matrix product; as large as it is on new GPUs in any case.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    count, own = torch.cuda.device_count(), os.environ.get("LOCAL_RANK")
    if _announced() > 1 and own is not None:
        if int(own) >= count:
            raise UserError(
                f"{given}: process {own} of this machine has no GPU of its own, it sees {count}; start {count} "
                "processes per machine, let every process see all GPUs of its machine, or choose cpu"
            )
        if device.index not in (None, int(own)):
            raise UserError(f"{given} is for one process, not for {_announced()}; choose cuda")
        return torch.device("cuda", int(own))
    if device.index is not None and device.index >= count:
        raise UserError(f"{given}: there are {count} GPUs, counted from cuda:0; choose cuda")
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, for timings."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _announced() -> int:
    """How many processes torchrun says there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: str) -> tuple[int, int]:
    """Join the process group that torchrun announces. Returns (rank, number of processes); (0, 1) without torchrun.

    `device` is the job's option. On GPUs, tensors travel from GPU to GPU (NCCL, whose connections are made by the first
    of them) and whatever is on the CPU over the network (gloo); on CPUs there is gloo alone. Messages between GPUs have
    to arrive within STEP_WAIT; `barrier`, `all_gather` and `broadcast_object` wait for as long as it takes. All have to
    come within JOIN_WAIT. Raises UserError as `resolve_device`.
    """
    global _waiting
    place = resolve_device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)  # PyTorch waits for the current one in places that do not know another.
    if _announced() == 1:
        return 0, 1
    if not dist.is_initialized():
        _open_many_files()
        with _meeting():
            dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", timeout=STEP_WAIT)
        _waiting = private_group(LONG_WAIT)
    return dist.get_rank(), dist.get_world_size()


@contextmanager
def _meeting() -> Iterator[None]:
    """Around what makes connections, which wait for a process that has died as long as messages may take afterwards.

    When they take longer than JOIN_WAIT, this process says so in one line and ends with exit code 2. Raises UserError
    if they fail.
    """

    this = f"process {os.environ.get('RANK', '0')} of {_announced()}"
    remedy = "see which one has ended or did not start, and run the same command again"

    def give_up() -> None:
        reason = f"{this} has waited {JOIN_WAIT.seconds} seconds for the others"
        print(f"reglue: {reason}; {remedy}", file=sys.stderr, flush=True)
        os._exit(2)  # The main thread is inside a call that does not return.

    timer = threading.Timer(JOIN_WAIT.total_seconds(), give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except DEVICE_ERRORS:
        raise
    except RuntimeError as error:
        raise UserError(f"{this} cannot reach the others ({one_line(error)}); {remedy}") from error
    finally:
        timer.cancel()


def rank_and_count() -> tuple[int, int]:
    """Number of this process, from 0, and how many have joined; (0, 1) if it has not joined others."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _open_many_files() -> None:
    """As many as this process may: every group of processes keeps a connection to each of the others open."""
    if resource is not None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def alone(job: str, device: str) -> torch.device:
    """The device of a job that works in one process.

    Raises UserError as `resolve_device`, and where torchrun has started several processes, which would write the same
    files.
    """
    if _announced() > 1:
        raise UserError(f"{job} works in one process; start it without torchrun")
    return resolve_device(device)


def leave() -> None:
    """Leave the process group, if one was joined."""
    global _waiting
    if dist.is_initialized():
        dist.destroy_process_group()
    _waiting = None


def are_many() -> bool:
    """Whether this process has joined others."""
    return dist.is_initialized()


def end(code: int) -> NoReturn:
    """End this process. Among others it ends at once: the thread that watches them (`watchdog`) does not stop."""
    if not dist.is_initialized():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def barrier() -> None:
    """Return once every process has come here. Raises UserError if one of them never will, because it has ended."""
    if dist.is_initialized():
        with _others_must_live():
            dist.barrier(_waiting)


def is_first() -> bool:
    """Whether this is the first process of all."""
    return rank_and_count()[0] == 0


@contextmanager
def _others_must_live() -> Iterator[None]:
    """Around what needs every process. Raises UserError if one of them has ended."""
    try:
        yield
    except DEVICE_ERRORS:
        raise
    except RuntimeError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"process {dist.get_rank()} waited for another one that has stopped ({reason}); see what that one said, "
            "and run the same command again"
        ) from error


@contextmanager
def first_process_first() -> Iterator[None]:
    """Process 0 runs the block alone, then all others do. None leaves it before all have."""
    alone = is_first()
    if not alone:
        barrier()
    yield
    if alone:
        barrier()
    barrier()


def private_group(timeout: timedelta = STEP_WAIT) -> dist.ProcessGroup:
    """Another group of all processes, over the CPU: its messages do not mix with the others. All must make it."""
    with _meeting():
        group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    return group


def broadcast_object(value: _T) -> _T:
    """What the first process gave, in every process: any value that can be pickled. All must ask.

    Raises UserError if one of them has ended.
    """
    said = [value]
    if dist.is_initialized():
        with _others_must_live():
            dist.broadcast_object_list(said, group=_waiting, group_src=0)
    return said[0]


class RunsOn(Protocol):
    """Options of a job that runs on a device."""

    @property
    def device(self) -> str:
        """As `resolve_device` takes it."""
        ...


class Repeatable(RunsOn, Protocol):
    """Options of a job whose results can be asked for to the bit."""

    @property
    def deterministic(self) -> bool:
        """Whether the same command is to give the same bits."""
        ...


_Repeatable = TypeVar("_Repeatable", bound=Repeatable)


def repeatable(*, strict: bool) -> Callable[[Callable[[_Repeatable], _T]], Callable[[_Repeatable], _T]]:
    """Has a job run within `deterministic` as its options say."""

    def decorate(job: Callable[[_Repeatable], _T]) -> Callable[[_Repeatable], _T]:
        @wraps(job)
        def repeated(options: _Repeatable) -> _T:
            with deterministic(resolve_device(options.device), options.deterministic, strict=strict):
                return job(options)

        return repeated

    return decorate


@contextmanager
def deterministic(device: torch.device, wanted: bool, *, strict: bool = True) -> Iterator[None]:
    """A GPU uses algorithms inside the block that give the same bits each time; the CPU's do so in any case.

    Without it, gradients of attention are added in whatever order they are ready. `strict`, PyTorch raises RuntimeError
    where it has no such algorithm. Otherwise it warns, and also takes the faster one for attention, though it has both.
    For the whole process.
    """
    if not wanted or device.type != "cuda":
        yield
        return
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    settings.fill_uninitialized_memory = False  # Nobody reads it, and it is as much work as a copy.
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filling


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


def all_gather(rows: Tensor) -> Tensor:
    """The rows (n, …) of every process, in the order of processes, which may have different numbers of them.

    Takes and returns tensors on the CPU, of one type and of as many dimensions; the shape of a row counts only where
    there are any. Raises UserError if one of them has ended.
    """
    if not dist.is_initialized():
        return rows
    with _others_must_live():
        shapes = [torch.zeros(rows.ndim, dtype=torch.int64) for _ in range(dist.get_world_size())]
        dist.all_gather(shapes, torch.tensor(rows.shape), _waiting)
        longest = max(shapes, key=lambda shape: int(shape[0])).tolist()
        padded = torch.zeros(longest, dtype=rows.dtype)
        if len(rows):
            padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in shapes]
        dist.all_gather(parts, padded, _waiting)
    return torch.cat([part[: int(shape[0])] for part, shape in zip(parts, shapes, strict=True)])


def average(value: Tensor) -> Tensor:
    """The mean of a small tensor over the processes."""
    if dist.is_initialized():
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value
