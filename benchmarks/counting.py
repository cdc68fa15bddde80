"""Operations and memory of a denoiser, counted on tensors without content: nothing is computed and no weight is made.

Operations are those of matrix products, convolutions and attention, as PyTorch counts them; a multiplication and an
addition are two.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from reglue.diffusion.denoiser import Denoiser, DenoiserConfig
from reglue.diffusion.modalities import State
from reglue.runs import ranks

H200_PRODUCTS = 790e12
"""Operations per second that an H200 reaches in bfloat16 products of large matrices."""


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


def activation_bytes(config: DenoiserConfig, precision: ranks.Precision) -> int:
    """Bytes that autograd keeps of each image for the backward pass on a CPU, without recomputation."""
    # The difference, since weights in lower precision are kept too, once for all images.
    return kept_bytes(config, precision, 2) - kept_bytes(config, precision, 1)


def kept_bytes(config: DenoiserConfig, precision: ranks.Precision, images: int) -> int:
    """Bytes of what autograd keeps of a forward pass, every storage counted once."""
    kept: dict[int, torch.UntypedStorage] = {}  # They stay alive, or another one could get the same address.

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with FakeTensorMode():  # Tensors without content, which take the same way through the operators as real ones.
        model = Denoiser(config)
        with saved_tensors_hooks(keep, lambda tensor: tensor), ranks.autocast(torch.device("cpu"), precision):
            all_outputs(model, images)
    return sum(storage.nbytes() for storage in kept.values())
