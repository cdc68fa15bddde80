"""Autoencoders: images to raw latents and back, behind one interface.

Two kinds come from diffusers, `AutoencoderKL` and `AutoencoderTiny`; the third is TAEF2, which diffusers does not have.
Nothing downstream assumes one latent space: channels, downsampling and normalisation are in the spec.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from reglue.errors import UserError
from reglue.latents.taef2 import taef2_decoder, taef2_encoder

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyOutput
    from diffusers.models.autoencoders.vae import DecoderOutput
    from diffusers.models.modeling_outputs import AutoencoderKLOutput

STARTER = "starter"
HUB_NAMES = {
    "sd-vae-ft-mse": "stabilityai/sd-vae-ft-mse",
    "sd-vae-ft-ema": "stabilityai/sd-vae-ft-ema",
    "sdxl-vae": "stabilityai/sdxl-vae",
    "taesd": "madebyollin/taesd",
}
"""Short names of autoencoders on the Hugging Face hub."""
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
TAEF2_FILES = ("taef2_encoder.safetensors", "taef2_decoder.safetensors")


class Moments(NamedTuple):
    """What an encoder says about images, raw: the model's latents are drawn from it, then normalised."""

    mean: Tensor
    """(B, C, H, W)."""
    std: Tensor | None
    """(B, C, H, W); None for a deterministic autoencoder."""

    def draw(self, noise: Tensor) -> Tensor:
        """Raw latents: mean + std·noise, with noise (B, C, H, W) from a standard normal."""
        return self.mean if self.std is None else self.mean + self.std * noise


@dataclass(frozen=True)
class AutoencoderSpec:
    """What decides a latent space, as plain data. Two specs are equal when their latents are the same."""

    name: str = field(compare=False)
    """What `load_autoencoder` takes to load it again."""
    kind: str
    """`AutoencoderKL`, `AutoencoderTiny` or `TAEF2`."""
    weights_sha256: str | None
    """None where the weights were never seen: an imported run names an autoencoder that need not be at hand."""
    latent_channels: int
    downsampling: int
    """Image pixels per latent pixel, along each side."""
    shift: tuple[float, ...]
    """One per channel; models live in (raw − shift)·scale."""
    scale: tuple[float, ...]
    """One per channel."""

    def latent_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the latents of images of a size (height, width) in pixels.

        Raises:
            UserError: the size is not a multiple of the downsampling factor.
        """
        height, width = image_size
        if height % self.downsampling or width % self.downsampling:
            raise UserError(
                f"image size {height}×{width} does not fit autoencoder {self.name}: "
                f"choose multiples of {self.downsampling} pixels"
            )
        return height // self.downsampling, width // self.downsampling

    def normalise(self, raw: Tensor) -> Tensor:
        """Raw latents (B, C, H, W) → the latents that models learn, of about unit standard deviation."""
        return (raw - _per_channel(self.shift, raw)) * _per_channel(self.scale, raw)

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`, for `Autoencoder.decode`."""
        return latents / _per_channel(self.scale, latents) + _per_channel(self.shift, latents)


class Autoencoder(nn.Module, ABC):
    """A frozen autoencoder."""

    spec: AutoencoderSpec

    @abstractmethod
    def encode(self, images: Tensor) -> Moments:
        """Images (B, 3, H, W) in [−1, 1] → moments of raw latents (B, C, H/factor, W/factor)."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Raw latents (B, C, H, W) → images (B, 3, factor·H, factor·W) in [−1, 1], clamped."""

    def train(self, mode: bool = True) -> "Autoencoder":
        """Stay in eval mode: the autoencoder is frozen, also as a part of a module that is trained."""
        return super().train(False)


class KlAutoencoder(Autoencoder):
    """diffusers' AutoencoderKL: a normal distribution of latents for every image."""

    def __init__(self, network: "AutoencoderKL", spec: AutoencoderSpec):
        super().__init__()
        self.network, self.spec = network.eval().requires_grad_(False), spec

    @torch.no_grad()
    def encode(self, images: Tensor) -> Moments:
        """See `Autoencoder.encode`."""
        posterior = cast("AutoencoderKLOutput", self.network.encode(images)).latent_dist
        return Moments(posterior.mean, posterior.std)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See `Autoencoder.decode`."""
        return cast("DecoderOutput", self.network.decode(cast(Any, latents))).sample.clamp(-1, 1)


class TinyAutoencoder(Autoencoder):
    """diffusers' AutoencoderTiny (TAESD and its kin): deterministic."""

    def __init__(self, network: "AutoencoderTiny", spec: AutoencoderSpec):
        super().__init__()
        self.network, self.spec = network.eval().requires_grad_(False), spec

    @torch.no_grad()
    def encode(self, images: Tensor) -> Moments:
        """See `Autoencoder.encode`."""
        return Moments(cast("AutoencoderTinyOutput", self.network.encode(images)).latents, None)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See `Autoencoder.decode`."""
        return cast("DecoderOutput", self.network.decode(cast(Any, latents))).sample.clamp(-1, 1)


class Taef2Autoencoder(Autoencoder):
    """TAEF2: deterministic, its pixels in [0, 1]."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, spec: AutoencoderSpec):
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        self.decoder = decoder.eval().requires_grad_(False)
        self.spec = spec

    @torch.no_grad()
    def encode(self, images: Tensor) -> Moments:
        """See `Autoencoder.encode`."""
        return Moments(self.encoder((images + 1) / 2), None)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See `Autoencoder.decode`."""
        return self.decoder(latents).mul(2).sub(1).clamp(-1, 1)


def load_autoencoder(name: str, device: str | torch.device = "cpu") -> Autoencoder:
    """A frozen autoencoder.

    Args:
        name: `starter`, another short name (`sd-vae-ft-mse`), a hub name `OWNER/REPOSITORY[/SUBFOLDER]`, a folder in
            diffusers' layout (`config.json` and `diffusion_pytorch_model.safetensors`), or TAEF2 by the folder
            of its two files or by either file. Hub names are fetched, or taken from the hub's cache.
        device: where the network lives.

    Raises:
        UserError: an unknown name, or a missing or unfitting file.
    """
    if name == STARTER:
        with resources.as_file(resources.files("reglue.starter") / "autoencoder") as folder:
            return _load_diffusers(name, folder).to(device)
    path = Path(name)
    if path.is_file() and path.name in TAEF2_FILES:
        path = path.parent
    if path.is_dir():
        path = path.resolve()  # so that the name in the spec means the same from any working folder
        is_taef2 = any((path / file).is_file() for file in TAEF2_FILES)
        return (_load_taef2 if is_taef2 else _load_diffusers)(str(path), path).to(device)
    if path.exists():
        raise UserError(
            f"autoencoder {name}: give a folder in diffusers' layout, or one of {' and '.join(TAEF2_FILES)}"
        )
    return _load_diffusers(name, _fetch(name)).to(device)


def autoencoder_names() -> list[str]:
    """The short names that `load_autoencoder` knows."""
    return [STARTER, *HUB_NAMES]


def _fetch(name: str) -> Path:
    """The local folder of an autoencoder on the hub."""
    owner, _, rest = HUB_NAMES.get(name, name).partition("/")
    repository, _, subfolder = rest.partition("/")
    if not repository or name.startswith(("/", ".", "~")):
        raise UserError(
            f"unknown autoencoder {name!r}: it is neither a file nor a folder; short names are "
            f"{', '.join(autoencoder_names())}, others on the hub are OWNER/REPOSITORY"
        )
    prefix = f"{subfolder}/" if subfolder else ""
    files = [prefix + "config.json", prefix + DIFFUSERS_WEIGHTS]
    try:
        snapshot = snapshot_download(f"{owner}/{repository}", allow_patterns=files)
    except Exception as error:  # whatever the hub's client raises: offline, refused, not found
        raise UserError(
            f"autoencoder {name} cannot be fetched ({type(error).__name__}): download {' and '.join(files)} of "
            f"{owner}/{repository} from the Hugging Face hub into a folder, and give that folder"
        ) from error
    return Path(snapshot) / subfolder


def _load_diffusers(name: str, folder: Path) -> KlAutoencoder | TinyAutoencoder:
    # Importing diffusers takes seconds, which TAEF2 need not wait for.
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    config_file, weights = folder / "config.json", folder / DIFFUSERS_WEIGHTS
    for file in (config_file, weights):
        if not file.is_file():
            raise UserError(f"autoencoder {folder}: {file.name} is missing; a diffusers folder has it beside the rest")
    try:
        config = json.loads(config_file.read_text())
        kind = config["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"autoencoder {folder}: config.json is not in diffusers' layout ({error!r})") from error
    networks = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    if kind not in networks:
        raise UserError(f"autoencoder {folder}: config.json says {kind}; known are {' and '.join(networks)}")

    # from_pretrained would also take pickled weights, and would fill missing ones with noise: neither is wanted.
    try:
        network = networks[kind].from_config(config)
        _load_weights(network, weights)
    except (ValueError, TypeError) as error:
        raise UserError(f"autoencoder {folder}: config.json describes no {kind} ({error})") from error

    network_config = dict(network.config)
    shift, scale = _normalisation(network_config)
    channels = network_config["latent_channels"]
    encoder_widths = network_config["encoder_block_out_channels" if kind == "AutoencoderTiny" else "block_out_channels"]
    spec = AutoencoderSpec(
        name=name,
        kind=kind,
        weights_sha256=_sha256(weights),
        latent_channels=channels,
        downsampling=2 ** (len(encoder_widths) - 1),
        shift=shift,
        scale=scale,
    )
    return KlAutoencoder(network, spec) if isinstance(network, AutoencoderKL) else TinyAutoencoder(network, spec)


def _normalisation(config: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Shift and scale per channel, from what diffusers keeps: one number each, or the mean and std of every channel."""
    channels, factor = config["latent_channels"], float(config["scaling_factor"])
    means, stds = config.get("latents_mean"), config.get("latents_std")
    if means is not None and stds is not None:
        return tuple(map(float, means)), tuple(factor / std for std in stds)
    return (float(config.get("shift_factor") or 0.0),) * channels, (factor,) * channels


def _load_taef2(name: str, folder: Path) -> Taef2Autoencoder:
    files = [folder / file for file in TAEF2_FILES]
    for file in files:
        if not file.is_file():
            raise UserError(f"autoencoder {name}: {file} is missing; TAEF2 needs both {' and '.join(TAEF2_FILES)}")
    encoder_state = _read_weights(files[0])
    # Its two ends tell the sizes: the first convolution (width, 3, 3, 3) and the last (latent channels, width, 3, 3).
    first, last = encoder_state.get("0.weight"), encoder_state.get("14.weight")
    if first is None or last is None:
        raise UserError(f"{files[0]} does not hold the encoder of TAEF2: it has no 0.weight and 14.weight")
    width, latent_channels = first.shape[0], last.shape[0]
    encoder, decoder = taef2_encoder(width, latent_channels), taef2_decoder(width, latent_channels)
    _load_weights(encoder, files[0])
    _load_weights(decoder, files[1])
    spec = AutoencoderSpec(
        name=name,
        kind="TAEF2",
        weights_sha256=_sha256(*files),
        latent_channels=latent_channels,
        downsampling=8,
        shift=(0.0,) * latent_channels,
        scale=(1.0,) * latent_channels,
    )
    return Taef2Autoencoder(encoder, decoder, spec)


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} is not a safetensors file ({error})") from error


def _load_weights(network: nn.Module, file: Path) -> None:
    """Fill the network from a file; half-precision weights become float32."""
    try:
        network.load_state_dict(_read_weights(file))
    except RuntimeError as error:
        details = " ".join(str(error).split())[:200]
        raise UserError(f"{file} does not fit the network it should hold: {details}") from error


def _sha256(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _per_channel(values: tuple[float, ...], latents: Tensor) -> Tensor:
    return torch.tensor(values, dtype=latents.dtype, device=latents.device).view(1, -1, 1, 1)
