"""Compressors: wide features to few channels and back, frozen once fitted.

All kinds standardise the features first, (f − mean)/std per channel, with statistics that travel as buffers:
REGLUE's convolutional autoencoder (arXiv 2512.16636), also as a variational one, ReDi's principal components (arXiv
2504.16064), and a perceptron that looks at one position at a time. A class token is a map of one position.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reglue.errors import UserError, option
from reglue.files import read_json, read_network, to_json, write_tensors, write_text
from reglue.names import CompressedColumn, CompressorKind

ALL = slice(None)

SPEC_FILE = "compressor.json"
WEIGHTS_FILE = "compressor.safetensors"


@dataclass(frozen=True)
class CompressorSpec:
    """What a compressor is, as plain data."""

    kind: CompressorKind
    channels_in: int
    """Channels of the features: layers × width of the encoder; its width alone for class tokens."""
    hidden: int
    """Channels between; 0 for principal components."""
    channels: int
    """Channels of the code."""
    weights_sha256: str
    """Of all parameters and buffers, the statistics included."""
    variational: bool = False
    """Whether the encoder gives a normal distribution of codes, whose mean is the code."""
    column: CompressedColumn = "features"
    """What it was fitted to."""
    layers: tuple[int, ...] | None = field(default=None, compare=False)
    """Blocks of the encoder whose features it takes, ascending; None for class tokens, and for all that its store
    has. The hash distinguishes compressors: it covers the statistics of what they take."""
    epoch: int | None = field(default=None, compare=False)
    """After which epoch of its training it was kept; None for principal components, and where that is not known."""


class Compressor(nn.Module, ABC):
    """Features (B, channels_in, h, w) to codes (B, channels, h, w) and back."""

    mean: Tensor
    std: Tensor
    column: CompressedColumn = "features"
    """What it is fitted to; goes into the spec."""
    layers: tuple[int, ...] | None = None
    """Of which layers; goes into the spec."""
    epoch: int | None = None
    """After which epoch it was kept; goes into the spec."""

    def __init__(self, mean: Tensor, std: Tensor):
        """`mean`, `std`: (channels_in,), of the raw features."""
        super().__init__()
        self.register_buffer("mean", mean.float().clone())
        self.register_buffer("std", std.float().clone())

    def standardise(self, features: Tensor) -> Tensor:
        """(f − mean)/std per channel, in the precision of the statistics."""
        return (features.to(self.mean.dtype) - self.mean[:, None, None]) / self.std[:, None, None]

    def destandardise(self, standardised: Tensor, channels: slice = ALL) -> Tensor:
        """Inverse of `standardise`, for some of the channels or all."""
        return standardised * self.std[channels, None, None] + self.mean[channels, None, None]

    def encode(self, features: Tensor) -> Tensor:
        """Raw features (B, channels_in, h, w) of any floating type to codes (B, channels, h, w)."""
        return self.compress(self.standardise(features))

    def decode(self, code: Tensor, channels: slice = ALL) -> Tensor:
        """Codes (B, channels, h, w) to raw features (B, channels_in, h, w), or some `channels` of them alone."""
        return self.destandardise(self.expand(code, channels), channels)

    @abstractmethod
    def compress(self, standardised: Tensor) -> Tensor:
        """Standardised features to codes."""

    @abstractmethod
    def expand(self, code: Tensor, channels: slice = ALL) -> Tensor:
        """Codes to standardised features; what is left out of their `channels` is not computed."""

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
        write_tensors(folder / WEIGHTS_FILE, self.state_dict())
        write_text(folder / SPEC_FILE, to_json(spec))
        return spec


class Posterior(NamedTuple):
    """A normal distribution of codes, independent in every value."""

    mean: Tensor
    """(B, channels, h, w)."""
    log_variance: Tensor
    """(B, channels, h, w)."""

    def draw(self, noise: Tensor) -> Tensor:
        """Codes mean + std·noise, with noise as the mean from a standard normal."""
        return self.mean + (self.log_variance / 2).exp() * noise

    def divergence(self) -> Tensor:
        """(B,): KL divergence from a standard normal in nats, summed over the values of an image's code."""
        values = self.mean.square() + self.log_variance.exp() - 1 - self.log_variance
        return values.flatten(1).sum(1) / 2


class LearnedCompressor(Compressor):
    """An autoencoder trained by gradient descent; a variational one encodes to the mean of its posterior."""

    kind: CompressorKind

    def __init__(
        self,
        channels_in: int,
        hidden: int,
        channels_out: int,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        variational: bool = False,
    ):
        """Freshly initialised. Without `mean` and `std` (channels_in,) features count as standardised already."""
        super().__init__(
            torch.zeros(channels_in) if mean is None else mean, torch.ones(channels_in) if std is None else std
        )
        self.sizes = (channels_in, hidden, channels_out)
        self.variational = variational
        self.encoder = self.stack(channels_in, hidden, channels_out * (2 if variational else 1))
        self.decoder = self.stack(channels_out, hidden, channels_in)

    @staticmethod
    @abstractmethod
    def stack(channels_in: int, hidden: int, channels_out: int) -> nn.Sequential:
        """The layers of the encoder, and mirrored of the decoder."""

    def compress(self, standardised: Tensor) -> Tensor:
        """Standardised features (B, channels_in, h, w) to codes (B, channels_out, h, w)."""
        return self.posterior(standardised).mean if self.variational else self.encoder(standardised)

    def expand(self, code: Tensor, channels: slice = ALL) -> Tensor:
        """Codes (B, channels_out, h, w) to standardised features (B, channels_in, h, w), or some channels of them."""
        *inner, last = self.decoder
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        for layer in inner:
            code = layer(code)
        return F.conv2d(code, last.weight[channels], last.bias[channels], padding=last.padding)

    def posterior(self, standardised: Tensor) -> Posterior:
        """The distribution of codes of standardised features (B, channels_in, h, w), of a variational compressor."""
        mean, log_variance = self.encoder(standardised).chunk(2, dim=1)
        # Beyond these limits, as in latent diffusion's autoencoder, exponentials overflow.
        return Posterior(mean, log_variance.clamp(-30, 20))

    def spec(self) -> CompressorSpec:
        """Kind, sizes and hash of the weights as they are now."""
        about = (self.weights_sha256(), self.variational, self.column, self.layers, self.epoch)
        return CompressorSpec(self.kind, *self.sizes, *about)


class ConvCompressor(LearnedCompressor):
    """REGLUE's compressor: Conv3×3 → residual block → Conv3×3, the decoder mirrored."""

    kind = "conv"

    @staticmethod
    def stack(channels_in: int, hidden: int, channels_out: int) -> nn.Sequential:
        """(B, channels_in, h, w) to (B, channels_out, h, w)."""
        return nn.Sequential(
            nn.Conv2d(channels_in, hidden, 3, padding=1),
            ResidualBlock(hidden),
            nn.Conv2d(hidden, channels_out, 3, padding=1),
        )


class MlpCompressor(LearnedCompressor):
    """A perceptron with one hidden layer at every position by itself, the decoder mirrored: for class tokens too."""

    kind = "mlp"

    @staticmethod
    def stack(channels_in: int, hidden: int, channels_out: int) -> nn.Sequential:
        """(B, channels_in, h, w) to (B, channels_out, h, w)."""
        return nn.Sequential(nn.Conv2d(channels_in, hidden, 1), nn.GELU(), nn.Conv2d(hidden, channels_out, 1))


LEARNED: dict[CompressorKind, type[LearnedCompressor]] = {"conv": ConvCompressor, "mlp": MlpCompressor}


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
            raise UserError(
                f"{option('channels')} {channels}: choose at most {width}, the number of channels of the features"
            )
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

    def expand(self, code: Tensor, channels: slice = ALL) -> Tensor:
        """Components (B, K, h, w) to the nearest standardised features (B, C, h, w), or some channels of them."""
        centre = self.centre[channels, None, None]
        return torch.einsum("kc,bkhw->bchw", self.components[:, channels], code) + centre

    def spec(self) -> CompressorSpec:
        """Kind, sizes and hash of the weights as they are now."""
        channels, channels_in = self.components.shape
        hash_ = self.weights_sha256()
        return CompressorSpec("pca", channels_in, 0, channels, hash_, column=self.column, layers=self.layers)


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


def as_map(values: Tensor) -> Tensor:
    """Class tokens (B, D) as maps of one position (B, D, 1, 1); features (B, C, h, w) as they are."""
    return values[:, :, None, None] if values.ndim == 2 else values


def resize(code: Tensor, grid: tuple[int, int]) -> Tensor:
    """Codes (B, K, h, w) at another grid (height, width): bilinear, align_corners False, no antialias."""
    return F.interpolate(code, size=grid, mode="bilinear", align_corners=False)


def load_compressor(folder: Path | str, remedy: str = "give a folder that `reglue compress` wrote") -> Compressor:
    """Load what `Compressor.save` wrote, in eval mode on the CPU.

    Raises UserError, which ends in the `remedy`, for a missing or damaged file.
    """
    folder = Path(folder)
    spec = read_json(folder / SPEC_FILE, CompressorSpec, remedy)
    compressor = read_network(lambda: _empty(spec), folder / WEIGHTS_FILE, remedy, sealed=True).eval()
    if compressor.weights_sha256() != spec.weights_sha256:
        raise UserError(f"{folder / WEIGHTS_FILE} does not belong to {SPEC_FILE} beside it; {remedy}")
    return compressor


def conv_compressor_from_published(state_dict: Mapping[str, Tensor], mean: Tensor, std: Tensor) -> ConvCompressor:
    """REGLUE's released compressor, in eval mode.

    `state_dict` has keys `encoder.model.{0,1,2}.*` and `decoder.model.{0,1,2}.*`, with or without `module.` in front;
    `mean` and `std` (channels_in,) are its normalisation statistics. It is built without memory, so that shapes in a
    damaged file cannot ask for too much of it. Raises UserError for any other keys or shapes.
    """
    weights = {key.removeprefix("module.").replace(".model.", "."): tensor for key, tensor in state_dict.items()}
    try:
        hidden, channels_in, _, _ = weights["encoder.0.weight"].shape
        sizes = (channels_in, hidden, len(weights["encoder.2.weight"]))
        if not all(sizes):
            raise ValueError(f"its channels are {', '.join(map(str, sizes))}")
        for name, statistics in {"mean": mean, "std": std}.items():
            if statistics.shape != (channels_in,):
                raise ValueError(f"{name} is {list(statistics.shape)}, and they take {channels_in} channels")
        with torch.device("meta"):
            compressor = ConvCompressor(*sizes, mean, std)
        own = compressor.state_dict()
        weights = {key: value.to(own[key].dtype, copy=True) if key in own else value for key, value in weights.items()}
        compressor.load_state_dict({**weights, "mean": compressor.mean, "std": compressor.std}, assign=True)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"these weights are not a published REGLUE compressor: {' '.join(str(error).split())}"
        ) from error
    return compressor.eval()


def _empty(spec: CompressorSpec) -> Compressor:
    """A compressor of these sizes, its weights still to be filled in."""
    if spec.kind == "pca":
        vector = torch.empty(spec.channels_in)
        compressor = PcaCompressor(vector, vector, vector, torch.empty(spec.channels, spec.channels_in))
    else:
        compressor = LEARNED[spec.kind](spec.channels_in, spec.hidden, spec.channels, variational=spec.variational)
    compressor.column, compressor.layers, compressor.epoch = spec.column, spec.layers, spec.epoch
    return compressor
