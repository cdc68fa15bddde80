"""One training step on many devices: a whole copy of the model on each, or copies cut into shards."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from reglue.errors import UserError, option
from reglue.sampling import Precision
from reglue.training import distributed


def check_shards(shards: int, processes: int) -> None:
    """Raise UserError if the processes cannot share copies of the model among so many."""
    if shards < 1 or processes % shards:
        raise UserError(
            f"{option('shards')} {shards} does not divide {processes} processes; choose a divisor, or 1 for none"
        )


def parallelise(
    losses: nn.Module, blocks: Iterable[nn.Module], shards: int, device: torch.device, precision: Precision
) -> nn.Module:
    """Let all processes work on one step. Returns what to call in place of `losses`, a module from samples to losses.

    Gradients become means over the processes while the backward pass still runs. Without others nothing changes; with
    `shards` 1, every process keeps a whole copy (DistributedDataParallel); with more, that many processes share a copy:
    its weights, gradients and whatever is made of them, an optimiser for example (FSDP2), and whole weights exist for
    one of the `blocks` at a time. Parameters then are DTensors, the same bits as before, on `device`: call this before
    anything else holds on to them. Raises UserError if the processes do not divide by `shards`.
    """
    _, processes = distributed.rank_and_count()
    check_shards(shards, processes)
    if not dist.is_initialized():
        return losses.to(device)
    if shards == 1:
        with warnings.catch_warnings():
            # Newer versions of torch have another name for `broadcast_buffers`, and older ones only this.
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(losses.to(device), broadcast_buffers=False, gradient_as_bucket_view=True)
    # Slow to import, which only sharded runs have to spend.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (processes // shards, shards), mesh_dim_names=("copies", "shards"))
    if shards == processes:
        mesh = mesh["shards"]
    # Matrix products round their weights to bfloat16 in any case (autocast), so those of a block may travel as that.
    # Outside of the blocks there are weights that are not rounded.
    half = torch.bfloat16 if precision == "bfloat16" else None
    in_blocks = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=in_blocks)
    fully_shard(losses, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    return losses


@contextmanager
def accumulating(losses: nn.Module, last: bool) -> Iterator[None]:
    """Around forward and backward of one part of a step: processes exchange gradients in the last part alone."""
    if hasattr(losses, "set_requires_gradient_sync"):  # An FSDPModule, without the import.
        cast(Any, losses).set_requires_gradient_sync(last)
    if isinstance(losses, DistributedDataParallel) and not last:
        with losses.no_sync():
            yield
    else:
        yield


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Scale the gradients down to a norm of `largest`; 0 leaves them as they are. Returns the norm before, a scalar.

    All processes must ask.
    """
    if largest:
        return whole(nn.utils.clip_grad_norm_(parameters, largest))
    return whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


def whole(tensor: Tensor) -> Tensor:
    """The tensor with every process's rows. All processes must ask."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors in the first process, and nothing in the others. All processes must ask.

    Sharded ones are gathered one after another and kept in the memory of the CPU.
    """
    result: dict[str, Tensor] = {}
    for name, value in tensors.items():
        complete = whole(value)
        if distributed.is_first():
            result[name] = complete.cpu() if is_sharded(value) else complete
    return result


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of whose rows each process has some."""
    return hasattr(tensor, "full_tensor")  # isinstance would need the class, which is slow to import.


def local_rows(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this process holds, in the same memory."""
    return cast(Any, tensor.detach()).to_local() if is_sharded(tensor) else tensor.detach()


def own_rows(tensor: Tensor) -> slice:
    """Which rows of the whole tensor these are: an empty slice where there are fewer rows than shards."""
    if not is_sharded(tensor):
        return slice(None)
    spread: Any = tensor
    (dimension,) = (i for i, placement in enumerate(spread.placements) if placement.is_shard())
    count = spread.to_local().shape[0]
    # As torch.chunk cuts: all parts are equal but the last ones.
    per_shard = -(-spread.shape[0] // spread.device_mesh.size(dimension))
    first = min(per_shard * spread.device_mesh.get_local_rank(dimension), spread.shape[0])
    return slice(first, first + count)


def on_cpu(tensor: Tensor) -> Tensor:
    """Room in the CPU's memory for a tensor, spread over processes as it is."""
    if not is_sharded(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    return torch.empty_like(tensor, device="cpu")
