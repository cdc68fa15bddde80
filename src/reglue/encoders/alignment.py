"""What latents say of an image's semantics: the alignment network of ReaLS (arXiv 2502.00359).

In training it pulls the latents towards a frozen vision encoder. Afterwards it turns latents, generated ones too, into
the encoder's features, for whatever was made to read those.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reglue.errors import UserError, option
from reglue.files import opened_tensors, parse_json, read_network, to_json, write_tensors

FILE = "alignment.safetensors"
_METADATA = "spec"
_REMEDY = "run `reglue autoencode` again"


@dataclass(frozen=True)
class AlignmentSpec:
    """Sizes of an alignment network, as plain data."""

    latent_channels: int
    hidden: int
    width: int
    """Channels of the encoder's features and class token."""
    grid: tuple[int, int]
    """Height and width of the encoder's patches."""
    encoder: dict[str, Any] = field(default_factory=dict)
    """The `EncoderSpec` of the encoder, as JSON has it."""
    patch_length: float | None = None
    """Root mean square length of the encoder's features at a patch. The network learns cosines, which say nothing of
    it. None: not measured."""
    class_token_length: float | None = None
    """That of its class token."""


class LatentSemantics(NamedTuple):
    """What an alignment network reads in latents: estimates of the encoder's features after its last block."""

    patches: Tensor
    """(B, width, grid height, grid width)."""
    class_token: Tensor
    """(B, width)."""


class AlignmentNetwork(nn.Module):
    """A multilayer perceptron on every latent position, and another on their mean."""

    def __init__(self, spec: AlignmentSpec):
        super().__init__()
        self.spec = spec
        self.body = nn.Sequential(
            nn.Conv2d(spec.latent_channels, spec.hidden, 1),
            nn.SiLU(),
            nn.Conv2d(spec.hidden, spec.hidden, 1),
            nn.SiLU(),
        )
        self.to_patches = nn.Conv2d(spec.hidden, spec.width, 1)
        self.to_class_token = nn.Sequential(
            nn.Linear(spec.hidden, spec.hidden), nn.SiLU(), nn.Linear(spec.hidden, spec.width)
        )

    def forward(self, latents: Tensor) -> LatentSemantics:
        """Raw latents (B, C, H, W) of any grid → the encoder's features at its own grid, and its class token.

        Raises ValueError for another number of channels.
        """
        if latents.ndim != 4 or latents.shape[1] != self.spec.latent_channels:
            raise ValueError(
                f"this alignment network reads latents of {self.spec.latent_channels} channels, "
                f"these are {tuple(latents.shape)}"
            )
        hidden = self.body(latents)
        class_token = self.to_class_token(hidden.mean((2, 3)))
        if hidden.shape[2:] != self.spec.grid:
            # Resampled before the last layer, which is linear: the same as after it, on fewer channels. In float32,
            # since torch cannot do it in bfloat16 on a CPU.
            hidden = F.interpolate(hidden.float(), self.spec.grid, mode="bilinear", antialias=True)
        return LatentSemantics(self.to_patches(hidden), class_token)


def at_usual_length(semantics: LatentSemantics, spec: AlignmentSpec) -> LatentSemantics:
    """The same directions with the lengths that the encoder's own have; as they are where those were not measured."""
    patches, class_token = semantics
    if spec.patch_length is not None:
        patches = F.normalize(patches, dim=1) * spec.patch_length
    if spec.class_token_length is not None:
        class_token = F.normalize(class_token, dim=1) * spec.class_token_length
    return LatentSemantics(patches, class_token)


def cosine_similarities(semantics: LatentSemantics, patches: Tensor, class_token: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines with the encoder's own: (B,) of the patches (B, width, h, w), averaged over them, and (B,) of the class
    token (B, width). Each is between −1 and 1, in float32."""
    by_patch = F.cosine_similarity(semantics.patches.float(), patches.float(), dim=1)
    return by_patch.mean((1, 2)), F.cosine_similarity(semantics.class_token.float(), class_token.float(), dim=1)


def similarity_maps(features: Tensor, position: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """Cosine similarity (B, h, w) of the features (B, C, h, w) at every position to those at one.

    `position` is that of the reference as a share of height and width, from 0 to 1.
    """
    _, _, height, width = features.shape
    row, column = (min(int(share * size), size - 1) for share, size in zip(position, (height, width), strict=True))
    return F.cosine_similarity(features, features[:, :, row, column, None, None], dim=1)


def save_alignment(network: AlignmentNetwork, file: Path) -> None:
    """Write the network with its spec as one safetensors file, whole or not at all."""
    write_tensors(file, network.state_dict(), {_METADATA: to_json(network.spec)})


def load_alignment(folder: Path | str, device: str | torch.device = "cpu") -> AlignmentNetwork:
    """The alignment network of a folder that `reglue autoencode` made, in eval mode.

    Called with raw latents (B, C, H, W) it gives `LatentSemantics`: patch features at the encoder's grid, and the class
    token. `spec.encoder` says whose features these are. Raises UserError for a folder without one, or a damaged file.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        raise UserError(
            f"{folder} has no {FILE}; give a folder that `reglue autoencode` made with {option('alignment.weight')} "
            "above 0"
        )
    with opened_tensors(file, _REMEDY, sealed=False) as opened:
        spec = parse_json((opened.metadata() or {}).get(_METADATA, ""), AlignmentSpec)
    return read_network(lambda: AlignmentNetwork(spec), file, _REMEDY, sealed=True).eval().to(device)
