"""How different two images look to a network: LPIPS, and a vision encoder's features. Both can be trained through."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reglue.encoders.vision import VisionEncoder
from reglue.encoders.weights import read_weights
from reglue.errors import UserError, option
from reglue.files import refuse_not_finite

STAGE_ENDS = (3, 8, 15, 22, 29)
"""Indices into torchvision's VGG16 of the last activation before each pooling, and of the very last one."""


class Lpips(nn.Module):
    """The learned perceptual distance of Zhang et al. (arXiv 1801.03924), version 0.1 with VGG16."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        """Without weights: `load_lpips` fills them."""
        from torchvision.models import vgg16  # slow to import

        super().__init__()
        with torch.device("meta"):  # VGG16's classifier, which is not needed, has most of its weights.
            backbone = vgg16(weights=None)
        self.features = cast(nn.Sequential, backbone.features)[: STAGE_ENDS[-1] + 1].to_empty(device="cpu")
        for module in self.features:
            if isinstance(module, nn.ReLU):
                module.inplace = False  # It would overwrite what a gradient needs.
        widths = [cast(nn.Conv2d, self.features[end - 1]).out_channels for end in STAGE_ENDS]
        self.layers = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in widths)
        # ImageNet's mean and standard deviation, for values in [−1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Distances (B,) between images (B, 3, H, W) in [−1, 1]; 0 for equal ones. Sides of 16 pixels at least.

        Gradients flow to whichever of the two asks for them; of the other nothing is kept for the way back.
        """
        total = torch.zeros(len(first), device=first.device)
        x, y = ((images - self.shift) / self.scale for images in (first, second))
        stages = zip((0, *(end + 1 for end in STAGE_ENDS)), STAGE_ENDS, self.layers, strict=False)
        for start, end, layer in stages:
            x, y = (self.features[start : end + 1](images) for images in (x, y))
            difference = (_unit(x.float()) - _unit(y.float())).square()
            total = total + layer(difference).float().mean((1, 2, 3))
        return total


def load_lpips(files: Sequence[Path], given_by: str = "perceptual.network") -> Lpips:
    """LPIPS from files that together hold VGG16 and the linear layers, safetensors or PyTorch's (tensors alone).

    Names may be torchvision's (`features.0.weight`) or those of the package lpips (`net.slice1.0.weight`,
    `lin0.model.1.weight`). Raises UserError, naming the files and the option that they are `given_by`, for one
    that cannot be read or if something is missing.
    """
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors = read_weights([file])
            refuse_not_finite(tensors, file)
        except UserError as error:
            raise UserError(f"{option(given_by)} {error}") from None
        for name, tensor in tensors.items():
            name = re.sub(r"^net\.slice\d+\.", "features.", name)
            found[re.sub(r"^lins?\.?(\d)\.model\.\d\.", r"layers.\1.", name)] = tensor
    names = " and ".join(map(str, files))
    network = Lpips()
    state = {**found, "shift": network.shift, "scale": network.scale}
    needed = network.state_dict().keys()
    missing = sorted(needed - state.keys())
    if missing:
        what = "VGG16" if missing[0].startswith("features") else "LPIPS's linear layers (vgg.pth of the package lpips)"
        raise UserError(f"{option(given_by)} {names}: {what} is missing ({missing[0]}); add the file that has it")
    try:
        network.load_state_dict({name: state[name].float() for name in needed})
    except RuntimeError as error:
        raise UserError(f"{option(given_by)} {names}: not VGG16 ({' '.join(str(error).split())[:160]})") from error
    return network


def encoder_features(encoder: VisionEncoder, images: Tensor) -> Tensor:
    """The features (B, layers·width, h, w) that `VisionEncoder.describe` gives, of float images (B, 3, H, W) in
    [−1, 1], through which gradients flow."""
    pixels = (images.clamp(-1, 1) + 1) * 127.5
    _, layers = encoder.network.forward_intermediates(
        encoder.preprocess(pixels), indices=list(encoder.spec.layers), norm=encoder.spec.final_norm
    )
    return torch.cat(cast(list[Tensor], layers), dim=1)


def encoder_distance(first: Tensor, second: Tensor, layers: int) -> Tensor:
    """1 − cosine (B,) of features (B, layers·width, h, w), averaged over layers and positions: from 0 to 2."""
    x, y = (features.float().unflatten(1, (layers, -1)) for features in (first, second))
    return 1 - F.cosine_similarity(x, y, dim=2).mean((1, 2, 3))


def _unit(features: Tensor) -> Tensor:
    """Features (B, C, h, w), of norm 1 at every position."""
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)
