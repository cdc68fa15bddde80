"""Precision and compilation: the one place that decides them, for training and for sampling."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from reglue.config import Compile
from reglue.diffusion.conditions import Condition
from reglue.diffusion.denoiser import Denoiser, Prediction
from reglue.diffusion.modalities import HIDDEN, State, TensorTimes
from reglue.machine import multiplies_bfloat16_faster
from reglue.sampling import AutoPrecision, Precision
from reglue.training import distributed

# What is compiled on a CPU need not say that there is no GPU.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def to_precision(asked: AutoPrecision, device: torch.device) -> Precision:
    """The precision of matrix products, where `auto` is what the device multiplies fastest."""
    if asked != "auto":
        return asked
    return "bfloat16" if multiplies_bfloat16_faster(device) else "float32"


def agreed(device: torch.device) -> Precision:
    """What `auto` is in new work of all processes: what the first one's device multiplies fastest. All must ask."""
    return distributed.broadcast_object(to_precision("auto", device))


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Matrix products inside the block are in bfloat16 if that is the precision. For forward passes, within
    `matmul_precision`.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@contextmanager
def matmul_precision(device: torch.device, precision: Precision) -> Iterator[None]:
    """Float32 matrix products inside the block are TF32 on a GPU if that is the precision, and float32 otherwise.

    For the whole process, so for gradients too; in no function that is compiled. Convolutions are not meant: cuDNN's
    may use TF32 unless PyTorch is told otherwise.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


WORTH_COMPILING = 1000
"""Steps of a training from which on a CPU makes up for the quarter of a minute that it compiles: the demo's model does
after some 400, larger ones sooner (`benchmarks/train_speed.py`)."""


def to_compile(asked: Compile, device: torch.device, steps: int) -> Compile:
    """What torch.compile compiles of a transformer that is trained for so many steps in all, where `auto` is resolved.

    `auto` is blocks on a GPU, if Triton and the C compiler that it needs are there, and on a CPU where that pays and
    works; nothing otherwise.
    """
    if asked != "auto":
        return asked
    if device.type == "cuda":
        able = find_spec("triton") and (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))
    else:
        able = steps >= WORTH_COMPILING and compiles()
    return "blocks" if able else "no"


def compiles() -> bool:
    """Whether torch.compile works on this CPU: it needs a C++ compiler, OpenMP, headers and room for its files."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8))
    except Exception:  # Whatever is missing.
        return False
    return True


def compiled_for_shapes(
    function: Callable[..., dict[str, Tensor]], device: torch.device
) -> Callable[..., dict[str, Tensor]]:
    """A function of tensors, compiled for each shape that it meets.

    On a GPU it is captured in CUDA graphs, whose results lie where the next call writes its own, so they are copied.
    """
    fast = torch.compile(function, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None)

    def call(*arguments: object) -> dict[str, Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        return {name: value.clone() for name, value in fast(*arguments).items()}

    return call


def compile_parts(network: nn.Module, blocks: Iterable[nn.Module], parts: Compile) -> None:
    """Have torch.compile compile a network, or one of its blocks for all: their code is the same, weights are inputs.

    `auto` is resolved before (`to_compile`).
    """
    assert parts != "auto"
    if parts == "no":
        return
    # Sizes are known, and stay. Kernels of a network before, in the same process, would make these ones take any
    # size, and so compute otherwise than those of a process that continues the training.
    torch.compiler.reset()
    if parts == "model":
        network.compile(dynamic=False)
    else:
        # Or DistributedDataParallel would have every block cut where its buckets end. Their gradients travel while
        # those of the blocks before them are computed, in any case. For the whole process, which trains this network.
        torch._dynamo.config.optimize_ddp = False
        for block in blocks:
            block.compile(dynamic=False)


OF = "variance of "
"""Before the name of a modality, in what a compiled network returns."""


class SamplingNetwork:
    """A frozen denoiser: the weights of its matrix products are brought to their precision once.

    Autocast would do it in every evaluation, with the same bits.
    """

    def __init__(self, denoiser: Denoiser, precision: Precision, *, compiled: bool = False) -> None:
        self.null = denoiser.null
        device = denoiser.positions.device
        network = with_products_in(denoiser, torch.bfloat16) if precision == "bfloat16" else denoiser

        def predict(state: State, time: Tensor | TensorTimes, condition: Condition) -> dict[str, Tensor]:
            with autocast(device, precision):
                predicted = network(state, time, condition)
            # What leads by gradients alone asks for hidden tokens.
            tap = {HIDDEN: predicted.tap} if predicted.tap is not None and torch.is_grad_enabled() else {}
            return predicted.velocity | tap | {OF + name: w for name, w in (predicted.variance or {}).items()}

        self._products = partial(matmul_precision, device, precision)
        self._predict = compiled_for_shapes(predict, device) if compiled else predict

    def __call__(self, state: State, time: Tensor | TensorTimes, condition: Condition) -> Prediction:
        """See `diffusion.denoiser.DenoiserFunction`."""
        with self._products():
            predicted = self._predict(state, time, condition)
        variance = {name: predicted[OF + name] for name in state if OF + name in predicted}
        return Prediction({name: predicted[name] for name in state}, predicted.get(HIDDEN), variance)


def with_products_in(denoiser: Denoiser, dtype: torch.dtype) -> Denoiser:
    """A copy whose linear and convolutional weights are in `dtype`, all else as it is; to be run under autocast."""
    copy = deepcopy(denoiser)
    for module in copy.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)
    return copy
