"""Operations and memory of a denoiser, counted on tensors without content: nothing is computed and no weight is made.

Operations are those of matrix products, convolutions and attention, as PyTorch counts them; a multiplication and an
addition are two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from reglue.config import Precision
from reglue.diffusion.backbones.sit import Block
from reglue.diffusion.denoiser import Denoiser, DenoiserConfig
from reglue.diffusion.modalities import State
from reglue.training.precision import autocast

H200_PRODUCTS = 790e12
"""Operations per second of bfloat16 products of large matrices on an H200. Assumed, not measured by us: four fifths of
the 989e12 of its data sheet, about what such a GPU reaches on random numbers, whose switching costs it power and hence
clock. `matrix_rate` measures it, and figures of a GPU are shares of what that gives."""


def random_inputs(config: DenoiserConfig, images: int) -> tuple[State, Tensor, Tensor]:
    """State, times and labels for a denoiser, on the default device."""
    state = {name: torch.randn(images, *shape) for name, shape in config.shape.shapes().items()}
    return state, torch.rand(images), torch.zeros(images, dtype=torch.int64)


def all_outputs(model: Denoiser, images: int) -> Tensor:
    """The sum of all that a loss looks at, on the default device: velocities, and tokens to align where there are."""
    prediction = model(*random_inputs(model.config, images))
    outputs = list(prediction.velocity.values())
    if prediction.tap is not None:
        outputs.append(model.projector(prediction.tap))
    return torch.stack([output.float().sum() for output in outputs]).sum()


def forward_flops(config: DenoiserConfig) -> int:
    """Operations of one image's forward pass, as in sampling: without the projector."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = Denoiser(config)
        model(*random_inputs(config, 1))
    return counter.get_total_flops()


def training_flops(config: DenoiserConfig) -> int:
    """Operations of one image's forward and backward pass, the projector included."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        all_outputs(Denoiser(config), 1).backward()
    return counter.get_total_flops()


def parameters(config: DenoiserConfig) -> int:
    """How many weights a denoiser has."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Denoiser(config).parameters())


def activation_bytes(config: DenoiserConfig, precision: Precision) -> int:
    """Bytes that autograd keeps of each image for the backward pass on a CPU, without recomputation."""
    # The difference, since weights in lower precision are kept too, once for all images.
    return kept_bytes(config, precision, 2) - kept_bytes(config, precision, 1)


def kept_bytes(config: DenoiserConfig, precision: Precision, images: int) -> int:
    """Bytes of what autograd keeps of a forward pass, every storage counted once."""
    kept: dict[int, torch.UntypedStorage] = {}  # They stay alive, or another one could get the same address.

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with FakeTensorMode():  # Tensors without content, which take the same way through the operators as real ones.
        model = Denoiser(config)
        with saved_tensors_hooks(keep, lambda tensor: tensor), autocast(torch.device("cpu"), precision):
            all_outputs(model, images)
    return sum(storage.nbytes() for storage in kept.values())


class Traffic(TorchDispatchMode):
    """Counts operators and the bytes that they read and write: what a device moves where nothing is fused."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run, then count."""
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("detach", "device"):  # They start no kernel.
            self.operators += 1
            self.bytes += sum(held(leaf) for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor))
        return out


def held(tensor: Tensor) -> int:
    """Bytes of a tensor; of what is repeated by a stride of 0, once."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


class Cast(nn.Module):
    """In place of a product under autocast: it brings tokens to bfloat16, and so are its results."""

    def forward(self, x: Tensor) -> Tensor:
        """x in bfloat16."""
        return x.to(torch.bfloat16)


class Given(nn.Module):
    """In place of a product whose result is at hand."""

    def __init__(self, result: Tensor) -> None:
        super().__init__()
        self.result = result

    def forward(self, _: Tensor) -> Tensor:
        """The result."""
        return self.result


FUSED_BYTES = 2 * ((4 + 2) + (4 + 2 + 4)), 2 * ((2 + 4 + 4 + 4) + (4 + 2 + 2))
"""Per channel of a token and block, forward and backward, of adaLN's two halves in kernels that read and write each of
their tensors once. Forward: tokens (float32) to modulated ones (bfloat16); tokens and a branch (bfloat16) to tokens.
Backward: gradient of the modulated ones, tokens and their other gradient to a gradient; gradient and branch to that of
the branch. What is per image and not per token is left out."""


def adaln_traffic(config: DenoiserConfig, images: int) -> dict[str, int]:
    """Of LayerNorm, modulation, gates and residual sums of one block in bfloat16, forward and backward.

    Operators and bytes as they run eagerly, casts to the products' precision included, and bytes where all is fused.
    The products themselves do not count.
    """
    with FakeTensorMode():
        block = Block(config.width, config.heads)
        block.attention, block.mlp = Cast(), Cast()  # type: ignore[reportAttributeAccessIssue]
        modulation = torch.randn(images, 6 * config.width, dtype=torch.bfloat16, requires_grad=True)
        block.modulation = Given(modulation)  # type: ignore[reportAttributeAccessIssue]
        leading = 1 if config.shape.class_token_width else 0
        tokens = leading + config.token_grid[0] * config.token_grid[1]
        x = torch.randn(images, tokens, config.width, requires_grad=True)
        gradient = torch.randn_like(x)
        with Traffic() as seen:
            block(x, modulation).backward(gradient)
    return {
        "operators": seen.operators,
        "bytes": seen.bytes,
        "bytes_fused": sum(FUSED_BYTES) * images * tokens * config.width,
    }
