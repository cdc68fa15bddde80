"""Compressors: wide patch features to few channels and back, frozen once fitted.

Both kinds standardise the features first, (f − mean)/std per channel, with statistics that travel as buffers:
REGLUE's convolutional autoencoder (arXiv 2512.16636) and ReDi's principal components (arXiv 2504.16064).
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from cattrs.errors import BaseValidationError
from cattrs.preconf.json import make_converter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from reglue.errors import UserError
from reglue.files import replacing

SPEC_FILE = "compressor.json"
WEIGHTS_FILE = "compressor.safetensors"


@dataclass(frozen=True)
class CompressorSpec:
    """What a compressor is, as plain data."""

    kind: Literal["conv", "pca"]
    channels_in: int
    """Channels of the features: layers × width of the encoder."""
    hidden: int
    """Channels between; 0 for principal components."""
    channels: int
    """Channels of the code."""
    weights_sha256: str
    """Of all parameters and buffers, the statistics included."""


class Compressor(nn.Module, ABC):
    """Features (B, channels_in, h, w) to codes (B, channels, h, w) and back."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor):
        """`mean`, `std`: (channels_in,), of the raw features."""
        super().__init__()
        self.register_buffer("mean", mean.float().clone())
        self.register_buffer("std", std.float().clone())

    def standardise(self, features: Tensor) -> Tensor:
        """(f − mean)/std per channel, in the precision of the statistics."""
        return (features.to(self.mean.dtype) - self.mean[:, None, None]) / self.std[:, None, None]

    def destandardise(self, standardised: Tensor) -> Tensor:
        """Inverse of `standardise`."""
        return standardised * self.std[:, None, None] + self.mean[:, None, None]

    def encode(self, features: Tensor) -> Tensor:
        """Raw features (B, channels_in, h, w) of any floating type to codes (B, channels, h, w)."""
        return self.compress(self.standardise(features))

    def decode(self, code: Tensor) -> Tensor:
        """Codes (B, channels, h, w) to raw features (B, channels_in, h, w)."""
        return self.destandardise(self.expand(code))

    @abstractmethod
    def compress(self, standardised: Tensor) -> Tensor:
        """Standardised features to codes."""

    @abstractmethod
    def expand(self, code: Tensor) -> Tensor:
        """Codes to standardised features."""

    @abstractmethod
    def spec(self) -> CompressorSpec:
        """Kind, sizes and hash of the weights as they are now."""

    def weights_sha256(self) -> str:
        """Hash of names and values of all parameters and buffers."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path | str) -> CompressorSpec:
        """Write `compressor.safetensors` and `compressor.json` into a folder, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        spec = self.spec()
        with replacing(folder / WEIGHTS_FILE) as beside:
            save_file({name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}, beside)
        with replacing(folder / SPEC_FILE) as beside:
            beside.write_text(json.dumps(asdict(spec), indent=1))
        return spec


class ConvCompressor(Compressor):
    """REGLUE's compressor: Conv3×3 → residual block → Conv3×3, the decoder mirrored."""

    def __init__(
        self,
        channels_in: int,
        hidden: int,
        channels_out: int,
        mean: Tensor | None = None,
        std: Tensor | None = None,
    ):
        """Freshly initialised. Without `mean` and `std` (channels_in,) features count as standardised already."""
        super().__init__(
            torch.zeros(channels_in) if mean is None else mean, torch.ones(channels_in) if std is None else std
        )
        self.sizes = (channels_in, hidden, channels_out)
        self.encoder = _conv_stack(channels_in, hidden, channels_out)
        self.decoder = _conv_stack(channels_out, hidden, channels_in)

    def compress(self, standardised: Tensor) -> Tensor:
        """Standardised features (B, channels_in, h, w) to codes (B, channels_out, h, w)."""
        return self.encoder(standardised)

    def expand(self, code: Tensor) -> Tensor:
        """Codes (B, channels_out, h, w) to standardised features (B, channels_in, h, w)."""
        return self.decoder(code)

    def spec(self) -> CompressorSpec:
        """Kind, sizes and hash of the weights as they are now."""
        return CompressorSpec("conv", *self.sizes, self.weights_sha256())


class PcaCompressor(Compressor):
    """The first principal components of the standardised features; they are not rescaled."""

    centre: Tensor
    components: Tensor

    def __init__(self, mean: Tensor, std: Tensor, centre: Tensor, components: Tensor):
        """`mean`, `std` (C,) of raw features; `centre` (C,) of standardised ones; `components` (K, C), orthonormal."""
        super().__init__(mean, std)
        self.register_buffer("centre", centre.float().clone())
        self.register_buffer("components", components.float().clone())

    @classmethod
    def fit(cls, batches: Iterable[Tensor], mean: Tensor, std: Tensor, channels: int) -> PcaCompressor:
        """Fit to raw features given in batches (B, C, h, w), from a covariance streamed in float64.

        The sign of a component is such that its entry of largest magnitude is positive. Raises UserError if there are
        fewer feature channels than components.
        """
        width = mean.shape[0]
        if channels > width:
            raise UserError(f"--channels {channels}: the features have only {width} channels; choose at most so many")
        device = mean.device
        total = torch.zeros(width, dtype=torch.float64, device=device)
        products = torch.zeros(width, width, dtype=torch.float64, device=device)
        count = 0
        mean, std = mean.double(), std.double()
        for batch in batches:
            # Subtracting the mean first keeps the sums small, so that nothing cancels in the covariance below.
            x = (batch.to(device).double() - mean[:, None, None]) / std[:, None, None]
            x = x.transpose(0, 1).flatten(1)
            total += x.sum(1)
            products += x @ x.T
            count += x.shape[1]
        centre = total / count
        covariance = products / count - centre.outer(centre)
        components = torch.linalg.eigh(covariance).eigenvectors.T.flip(0)[:channels]
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        return cls(mean, std, centre, components * largest.sign())

    def compress(self, standardised: Tensor) -> Tensor:
        """Standardised features (B, C, h, w) to components (B, K, h, w)."""
        return torch.einsum("kc,bchw->bkhw", self.components, standardised - self.centre[:, None, None])

    def expand(self, code: Tensor) -> Tensor:
        """Components (B, K, h, w) to the nearest standardised features (B, C, h, w)."""
        return torch.einsum("kc,bkhw->bchw", self.components, code) + self.centre[:, None, None]

    def spec(self) -> CompressorSpec:
        """Kind, sizes and hash of the weights as they are now."""
        channels, channels_in = self.components.shape
        return CompressorSpec("pca", channels_in, 0, channels, self.weights_sha256())


class ResidualBlock(nn.Module):
    """ReLU(x + BN(conv(ReLU(BN(conv(x)))))), 3×3 convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) to the same shape."""
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(inner)))


def resize(code: Tensor, grid: tuple[int, int]) -> Tensor:
    """Codes (B, K, h, w) at another grid (height, width): bilinear, align_corners False, no antialias."""
    return F.interpolate(code, size=grid, mode="bilinear", align_corners=False)


def load_compressor(folder: Path | str) -> Compressor:
    """Load what `Compressor.save` wrote, in eval mode on the CPU. Raises UserError for a missing or damaged file."""
    folder = Path(folder)
    try:
        spec = make_converter(forbid_extra_keys=True).structure(
            json.loads((folder / SPEC_FILE).read_text()), CompressorSpec
        )
        weights = load_file(folder / WEIGHTS_FILE)
        compressor = _from_weights(spec, weights)
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename or folder} is missing: no compressor there; make one with `reglue compress`"
        ) from error
    except (ValueError, BaseValidationError, SafetensorError, RuntimeError, KeyError) as error:
        raise UserError(f"the compressor in {folder} is damaged; delete it and run `reglue compress` again") from error
    if compressor.weights_sha256() != spec.weights_sha256:
        raise UserError(
            f"{folder / WEIGHTS_FILE} does not belong to {SPEC_FILE} beside it; run `reglue compress` again"
        )
    return compressor


def conv_compressor_from_published(state_dict: Mapping[str, Tensor], mean: Tensor, std: Tensor) -> ConvCompressor:
    """REGLUE's released compressor, in eval mode.

    `state_dict` has keys `encoder.model.{0,1,2}.*` and `decoder.model.{0,1,2}.*`, with or without `module.` in front;
    `mean` and `std` (channels_in,) are its normalisation statistics. Raises UserError for any other keys or shapes.
    """
    weights = {key.removeprefix("module.").replace(".model.", "."): tensor for key, tensor in state_dict.items()}
    try:
        hidden, channels_in, *_ = weights["encoder.0.weight"].shape
        compressor = ConvCompressor(channels_in, hidden, weights["encoder.2.weight"].shape[0], mean, std)
        compressor.load_state_dict({**weights, "mean": compressor.mean, "std": compressor.std})
    except (KeyError, RuntimeError) as error:
        raise UserError(
            f"these weights are not a published REGLUE compressor: {' '.join(str(error).split())}"
        ) from error
    return compressor.eval()


def _conv_stack(channels_in: int, hidden: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, hidden, 3, padding=1),
        ResidualBlock(hidden),
        nn.Conv2d(hidden, channels_out, 3, padding=1),
    )


def _from_weights(spec: CompressorSpec, weights: dict[str, Tensor]) -> Compressor:
    if spec.kind == "pca":
        return PcaCompressor(weights["mean"], weights["std"], weights["centre"], weights["components"]).eval()
    compressor = ConvCompressor(spec.channels_in, spec.hidden, spec.channels)
    compressor.load_state_dict(weights)
    return compressor.eval()
