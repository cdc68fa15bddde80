"""Autoencoders: images to raw latents and back, behind one interface.

All kinds but one come from diffusers (`DIFFUSERS_KINDS`); the other is TAEF2, which diffusers does not have. KL
autoencoders are read from the files of latent diffusion and Stable Diffusion too, by diffusers' network. Nothing
downstream assumes one latent space: channels, downsampling and normalisation are in the spec.

A diffusers folder may carry its normalisation as `mean_std.json`, which goes before its configuration: `{"mean": …,
"std": …}`, each one number for all channels (as ReaLS has it, arXiv 2502.00359) or a list with one for each channel, of
the raw latents. Models live in (raw − mean)/std.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module, resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reglue.diffusion.specs import Normalisation
from reglue.encoders.known import (
    AUTOENCODERS_ON_HUB,
    GATED_AUTOENCODERS,
    LATENT_CHANNELS,
    LATENT_SCALES,
    MODELS_AROUND,
    STARTER,
)
from reglue.encoders.renaming import as_diffusers, kl_config
from reglue.encoders.taef2 import taef2_decoder, taef2_encoder
from reglue.encoders.weights import CONFIG, filled, read_config, read_weights, sha256_of, weight_files
from reglue.errors import UserError, one_line, option
from reglue.files import read_json, read_network, read_tensors, refuse_not_finite
from reglue.hub import fetch

DIFFUSERS_STEM = "diffusion_pytorch_model"
DIFFUSERS_WEIGHTS = f"{DIFFUSERS_STEM}.safetensors"
PART_OF_PIPELINE = "vae"
"""The folder of the autoencoder in one of diffusers' pipelines."""
MEAN_STD = "mean_std.json"
REMEDY = "fetch it again, with all files of the autoencoder in one folder"
TAEF2_FILES = ("taef2_encoder.safetensors", "taef2_decoder.safetensors")


class Moments(NamedTuple):
    """What an encoder makes of images, raw: the model's latents are drawn from it, then normalised."""

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
    """One of `DIFFUSERS_KINDS`, or `TAEF2`."""
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
        return Normalisation(self.shift, self.scale).normalise(raw)

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`, for `Autoencoder.decode`."""
        return Normalisation(self.shift, self.scale).denormalise(latents)


class Autoencoder(nn.Module, ABC):
    """A frozen autoencoder."""

    spec: AutoencoderSpec
    of_one_size = False
    """Whether it knows latents of one size alone, so that there can be no tiles of them."""

    @abstractmethod
    def encode(self, images: Tensor) -> Moments:
        """Images (B, 3, H, W) in [−1, 1] → moments of raw latents (B, C, H/factor, W/factor)."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Raw latents (B, C, H, W) → images (B, 3, factor·H, factor·W) in [−1, 1], clamped."""

    def train(self, mode: bool = True) -> "Autoencoder":
        """Stay in eval mode: the autoencoder is frozen, also as a part of a module that is trained."""
        return super().train(False)


class DiffusersAutoencoder(Autoencoder):
    """diffusers' autoencoders, with one latent for every image or a normal distribution of them.

    AutoencoderTiny (TAESD and its kin) changes from [−1, 1] to its own [0, 1] inside. AutoencoderDC is DC-AE (arXiv
    2410.10733). VQModel's latents (VQGAN, arXiv 2012.09841) are those before quantisation, which decoding begins with.
    """

    def __init__(self, network: Any, spec: AutoencoderSpec):
        super().__init__()
        self.network, self.spec = network.eval().requires_grad_(False), spec

    @torch.no_grad()
    def encode(self, images: Tensor) -> Moments:
        """See `Autoencoder.encode`."""
        (found,) = self.network.encode(images, return_dict=False)
        return Moments(found, None) if isinstance(found, Tensor) else Moments(found.mean, found.std)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See `Autoencoder.decode`."""
        (images, *_) = self.network.decode(latents, return_dict=False)
        return images.clamp(-1, 1)


class Flux2Autoencoder(DiffusersAutoencoder):
    """diffusers' AutoencoderKLFlux2, in the space that FLUX.2's transformer learns.

    There, patches of latent pixels are stacked into channels, which the running statistics of a batch norm normalise.
    """

    @torch.no_grad()
    def encode(self, images: Tensor) -> Moments:
        """See `Autoencoder.encode`."""
        mean, std = super().encode(images)
        assert std is not None
        return Moments(*(F.pixel_unshuffle(part, self._patch) for part in (mean, std)))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See `Autoencoder.decode`."""
        return super().decode(F.pixel_shuffle(latents, self._patch))

    @property
    def _patch(self) -> int:
        return self.network.config["patch_size"][0]


class RaeAutoencoder(DiffusersAutoencoder):
    """diffusers' AutoencoderRAE (arXiv 2510.11690): the tokens of a vision encoder, and a decoder of images from them.

    Its pixels are in [0, 1], it normalises its latents itself, and it knows images of one size.
    """

    of_one_size = True

    @torch.no_grad()
    def encode(self, images: Tensor) -> Moments:
        """See `Autoencoder.encode`. Raises UserError for images of another size."""
        side = self.network.decoder_image_size
        if images.shape[2:] != (side, side):
            height, width = images.shape[2:]
            raise UserError(
                f"this autoencoder takes images of {side}×{side} pixels, not {height}×{width}: choose "
                f"{option('resolution')} {side}"
            )
        return super().encode((images + 1) / 2)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See `Autoencoder.decode`."""
        return (2 * super().decode(latents) - 1).clamp(-1, 1)


class _Kind(NamedTuple):
    """A class of diffusers' and what it becomes here."""

    module: str
    """Of diffusers, below `diffusers.models.autoencoders`."""
    widths: str
    """What its configuration calls the channels of the encoder's stages, each of which but the first halves the sides.
    """
    autoencoder: type[DiffusersAutoencoder] = DiffusersAutoencoder


DIFFUSERS_KINDS = {
    "AutoencoderKL": _Kind("autoencoder_kl", "block_out_channels"),
    "AsymmetricAutoencoderKL": _Kind("autoencoder_asym_kl", "down_block_out_channels"),
    "AutoencoderKLFlux2": _Kind("autoencoder_kl_flux2", "block_out_channels", Flux2Autoencoder),
    "VQModel": _Kind("vq_model", "block_out_channels"),
    "AutoencoderTiny": _Kind("autoencoder_tiny", "encoder_block_out_channels"),
    "AutoencoderRAE": _Kind("autoencoder_rae", "", RaeAutoencoder),
    "AutoencoderDC": _Kind("autoencoder_dc", "encoder_block_out_channels"),
}
"""Classes of diffusers that are known, by the name in a folder's configuration."""


class Taef2Autoencoder(Autoencoder):
    """TAEF2: deterministic, its pixels in [0, 1]. The decoder may be there alone: drawing needs no more."""

    def __init__(self, encoder: nn.Module | None, decoder: nn.Module, spec: AutoencoderSpec):
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False) if encoder else None
        self.decoder = decoder.eval().requires_grad_(False)
        self.spec = spec

    @torch.no_grad()
    def encode(self, images: Tensor) -> Moments:
        """See `Autoencoder.encode`. Raises UserError for a decoder alone."""
        if self.encoder is None:
            raise UserError(
                f"autoencoder {self.spec.name} is a decoder alone and encodes no images; put {TAEF2_FILES[0]} beside "
                f"it, or choose the same with both, with {option('autoencoder')}"
            )
        return Moments(self.encoder((images + 1) / 2), None)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See `Autoencoder.decode`."""
        return self.decoder(latents).mul(2).sub(1).clamp(-1, 1)


def load_autoencoder(name: str, device: str | torch.device = "cpu") -> Autoencoder:
    """A frozen autoencoder.

    Args:
        name: `starter`, another short name (`sd-vae-ft-mse`), a hub name `OWNER/REPOSITORY[/SUBFOLDER]`, a folder in
            diffusers' layout (`config.json` and `diffusion_pytorch_model.safetensors`) or of a pipeline that has one,
            a FILE of a KL autoencoder in latent diffusion's layout, alone or in a checkpoint of Stable Diffusion,
            `NAME@FILE` (the same, in the latent space of a short name), or TAEF2 by the folder of its two files or by
            either file. Hub names are taken from the hub's cache, or fetched.
        device: where the network lives.

    Raises:
        UserError: an unknown name, or a missing or unfitting file.
    """
    if name == STARTER:
        with resources.as_file(resources.files("reglue.starter") / "autoencoder") as folder:
            return _load_diffusers(name, folder).to(device)
    path = Path(name)
    if path.is_file() and (path.name in TAEF2_FILES or _is_diffusers(path.parent, path.name)):
        path = path.parent
    if path.is_dir():
        path = path.resolve()  # so that the name in the spec means the same from any working folder
        if any((path / file).is_file() for file in TAEF2_FILES):
            return _load_taef2(str(path), path).to(device)
        if not (path / CONFIG).is_file() and (path / PART_OF_PIPELINE / CONFIG).is_file():
            path /= PART_OF_PIPELINE
        return _load_diffusers(str(path), path).to(device)
    if path.is_file():
        return _load_latent_diffusion(None, path.resolve()).to(device)
    latents_of, at, file = name.partition("@")
    if at and latents_of in LATENT_SCALES:
        if not Path(file).is_file():
            raise UserError(f"autoencoder {name}: there is no file {file}")
        return _load_latent_diffusion(latents_of, Path(file).resolve()).to(device)
    return _load_diffusers(name, _fetch(name)).to(device)


def autoencoder_files(folder: Path) -> tuple[Path, ...]:
    """The files of a folder that its autoencoder is read from, without what else lies beside them.

    Raises UserError where its weights are missing.
    """
    if any((folder / file).is_file() for file in TAEF2_FILES):
        return tuple(folder / file for file in TAEF2_FILES if (folder / file).is_file())
    others = (folder / CONFIG, folder / MEAN_STD, *sorted(folder.glob(f"{DIFFUSERS_STEM}*.index*.json")))
    return (*weight_files(folder, [DIFFUSERS_STEM], REMEDY), *(file for file in others if file.is_file()))


def _is_diffusers(folder: Path, name: str) -> bool:
    """Whether a file is a part of a folder in diffusers' layout."""
    return (folder / CONFIG).is_file() and (name == CONFIG or name.startswith(DIFFUSERS_STEM))


def autoencoder_names() -> list[str]:
    """The short names that `load_autoencoder` knows."""
    return [STARTER, *AUTOENCODERS_ON_HUB]


def _fetch(name: str) -> Path:
    """The local folder of an autoencoder on the hub."""
    owner, _, rest = AUTOENCODERS_ON_HUB.get(name, name).partition("/")
    repository, _, subfolder = rest.partition("/")
    if not repository or name.startswith(("/", ".", "~")):
        raise UserError(
            f"unknown autoencoder {name!r}: it is neither a file nor a folder; short names are "
            f"{', '.join(autoencoder_names())}, others on the hub are OWNER/REPOSITORY"
        )
    prefix = f"{subfolder}/" if subfolder else ""
    return fetch(
        f"autoencoder {name}",
        f"{owner}/{repository}",
        [prefix + CONFIG, prefix + DIFFUSERS_WEIGHTS],
        instead="put them into a folder, and give that folder",
        optional=prefix + MEAN_STD,
        gated=name in GATED_AUTOENCODERS,
    )


def _load_diffusers(name: str, folder: Path) -> DiffusersAutoencoder:
    config = read_config(folder / CONFIG, REMEDY)
    class_name = _class_name(config, folder)
    files = weight_files(folder, [DIFFUSERS_STEM], REMEDY)
    tensors = as_diffusers(read_weights(files, REMEDY), files[0])
    return _of_diffusers(name, class_name, config, tensors, files, folder / CONFIG)


def _load_latent_diffusion(latents_of: str | None, file: Path) -> DiffusersAutoencoder:
    """A KL autoencoder from a file by itself, in the latent space of a short name, or in that which the file shows."""
    tensors = read_weights([file], REMEDY)
    parts = as_diffusers(tensors, file)
    try:
        config = kl_config(parts)
    except ValueError as error:
        raise UserError(
            f"autoencoder {file}: {error}; give a KL autoencoder in latent diffusion's layout, a folder in "
            f"diffusers' layout, or one of {' and '.join(TAEF2_FILES)}"
        ) from error
    scale, shift = _latent_scale(tensors, config["latent_channels"], latents_of, file)
    config |= {"scaling_factor": scale, "shift_factor": shift}
    return _of_diffusers(
        f"{latents_of}@{file}" if latents_of else str(file), "AutoencoderKL", config, parts, (file,), file
    )


def _latent_scale(
    tensors: Mapping[str, Tensor], channels: int, latents_of: str | None, file: Path
) -> tuple[float, float]:
    """Scale and shift of the latents of an autoencoder in a file. Raises UserError if nothing shows them."""
    if latents_of is not None:
        return LATENT_SCALES[latents_of]
    if "scale_factor" in tensors and tensors["scale_factor"].numel() == 1:
        return float(tensors["scale_factor"]), 0.0
    if (file.parent / MEAN_STD).is_file():
        return 1.0, 0.0  # What stands there goes before.
    around = (name for prefix, name in MODELS_AROUND.items() if any(key.startswith(prefix) for key in tensors))
    names = LATENT_CHANNELS.get(channels, ())
    if (found := next(around, None)) in names:
        return LATENT_SCALES[str(found)]
    choices = " or ".join(f"{name}@{file}" for name in names)
    raise UserError(
        f"autoencoder {file} does not say how its latents are scaled: "
        + (f"give it as {choices}, or " if choices else "")
        + f'put {MEAN_STD} beside it, {{"mean": 0, "std": 1 / the scale}}'
    )


def _of_diffusers(
    name: str,
    class_name: str,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    files: tuple[Path, ...],
    config_file: Path,
) -> DiffusersAutoencoder:
    """diffusers' network of a configuration, with these tensors of the files."""
    kind, network_class = DIFFUSERS_KINDS[class_name], _class_of_diffusers(class_name, config_file)
    refuse_not_finite(tensors, files[0])
    own = config_file.parent / MEAN_STD

    def make() -> Any:
        network = network_class.from_config(config)
        _check_sizes(dict(network.config), config_file)
        channels, downsampling = _latents(kind, network.config)
        side = network.decoder_image_size // downsampling if kind.autoencoder is RaeAutoencoder else 4
        _try(kind.autoencoder(network, cast(AutoencoderSpec, None)), channels, downsampling, side)
        return network

    try:
        with _quiet():
            network = filled(make, tensors, files[0])
            if any(buffer.is_meta for buffer in network.buffers()):  # They are no weights: the network makes them.
                whole = network_class.from_config(config)
                whole.load_state_dict(network.state_dict())
                network = whole
        channels, downsampling = _latents(kind, network.config)
        shift, scale = _read_mean_std(own, channels) if own.is_file() else _normalisation(network, channels)
    except UserError:
        raise
    except Exception as error:  # diffusers does not check a configuration: a wrong value may fail anywhere.
        raise UserError(f"{config_file} describes no {class_name} ({one_line(error)}); {REMEDY}") from error
    spec = AutoencoderSpec(name, class_name, sha256_of(*files), channels, downsampling, shift, scale)
    return kind.autoencoder(network, spec)


def _class_name(config: Mapping[str, Any], folder: Path) -> str:
    """Which of `DIFFUSERS_KINDS` a folder's configuration describes."""
    known, class_name = ", ".join(DIFFUSERS_KINDS), config.get("_class_name")
    if not isinstance(class_name, str):
        raise UserError(
            f"autoencoder {folder}: config.json is not in diffusers' layout: it lacks _class_name, the autoencoder's "
            f"class; add it if you know it (known are {known}), or fetch the folder again"
        )
    if class_name not in DIFFUSERS_KINDS:
        said = " ".join(class_name.split())[:100]
        raise UserError(
            f"autoencoder {folder}: config.json says {said}, which is not a known autoencoder of images; choose a "
            f"folder of one of {known}"
        )
    return class_name


def _class_of_diffusers(class_name: str, config_file: Path) -> Any:
    if DIFFUSERS_KINDS[class_name].autoencoder is RaeAutoencoder and not find_spec("transformers"):
        raise UserError(f"autoencoder {config_file}: {class_name} needs transformers: run `pip install transformers`")
    # Importing diffusers takes seconds, which TAEF2 need not wait for.
    try:
        module = import_module(f"diffusers.models.autoencoders.{DIFFUSERS_KINDS[class_name].module}")
    except ModuleNotFoundError as error:
        raise UserError(
            f"autoencoder {config_file}: the installed diffusers has no {class_name}; `pip install -U diffusers`"
        ) from error
    return getattr(module, class_name)


def _latents(kind: _Kind, config: Mapping[str, Any]) -> tuple[int, int]:
    """Channels, and image pixels per latent pixel along each side."""
    if kind.autoencoder is RaeAutoencoder:
        return config["encoder_hidden_size"], config["patch_size"]
    patch = config["patch_size"][0] if kind.autoencoder is Flux2Autoencoder else 1
    channels = config.get("vq_embed_dim") or config["latent_channels"]
    return channels * patch**2, 2 ** (len(config[kind.widths]) - 1) * patch


def _try(autoencoder: Autoencoder, channels: int, downsampling: int, small: int) -> None:
    """Raises, with a reason, unless images become latents of this size, `small` along a side, and images again.
    Nothing is computed: the network is on the device `meta`."""
    side = small * downsampling
    latents = autoencoder.encode(torch.empty(1, 3, side, side)).mean
    if latents.shape != (1, channels, small, small) or autoencoder.decode(latents).shape != (1, 3, side, side):
        raise ValueError(
            f"images of {side}×{side} pixels do not become {small}×{small} latents of {channels} channels and back"
        )


def _check_sizes(config: dict[str, Any], file: Path) -> None:
    """Raises UserError for what does not take images of RGB and give them back in the same size."""
    taken = config.get("in_channels", config.get("num_channels"))
    given = config.get("out_channels", taken)
    if (taken, given) != (3, 3):
        raise UserError(
            f"autoencoder {file} takes images of {taken} channel{'s' * (taken != 1)} and gives {given}; give one of "
            "RGB images, 3 and 3"
        )
    stages = [config[f"{way}_block_out_channels"] for way in ("down", "up") if f"{way}_block_out_channels" in config]
    if len(set(map(len, stages))) > 1:
        raise UserError(
            f"autoencoder {file} has {len(stages[0])} stages down and {len(stages[1])} up; give one that restores "
            "the size of images"
        )
    if isinstance(patch := config.get("patch_size"), tuple | list) and len({*patch}) > 1:
        raise UserError(f"autoencoder {file} has patches of {config['patch_size']}; give one with square patches")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of diffusers about its configuration: what matters of them is refused."""
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _normalisation(network: Any, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Shift and scale per channel, as diffusers has them: one number each, or the mean and standard deviation of every
    channel; for FLUX.2 the mean and variance of a batch norm among the weights.

    Raises ValueError for numbers that are none of these.
    """
    config = dict(network.config)
    if hasattr(network, "decoder_image_size"):  # RAE's, which normalises them itself.
        return (0.0,) * channels, (1.0,) * channels
    means, stds = config.get("latents_mean"), config.get("latents_std")
    if "batch_norm_eps" in config:
        std = (network.bn.running_var.double() + config["batch_norm_eps"]).sqrt()
        shifts, scales = network.bn.running_mean.tolist(), (1 / std).tolist()
    elif means is not None and stds is not None:
        factor = float(config["scaling_factor"])
        shifts, scales = list(map(float, means)), [factor / std for std in stds]
    else:
        shifts = [float(config.get("shift_factor") or 0.0)] * channels
        scales = [float(config["scaling_factor"])] * channels
    # In float32, as they are used.
    numbers = torch.tensor([shifts, scales], dtype=torch.float32)
    if numbers.shape != (2, channels) or not numbers.isfinite().all() or not (numbers[1] > 0).all():
        raise ValueError(f"its latents have shift {shifts} and scale {scales}")
    return tuple(shifts), tuple(scales)


def _read_mean_std(file: Path, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Shift and scale of each channel, from a file of its mean and standard deviation."""
    content = read_json(file, dict[str, Any], "fix it, or take it away to use config.json")
    try:
        mean, std = (torch.tensor(content[key], dtype=torch.float64).expand(channels) for key in ("mean", "std"))
        valid = std.min() > 0 and torch.stack([mean, std, std.reciprocal()]).float().isfinite().all()
    except (ValueError, KeyError, TypeError, RuntimeError):
        valid = False
    if not valid:
        raise UserError(
            f'{file} must say {{"mean": …, "std": …}}, each one finite number or a list of {channels}, one for each '
            "latent channel, std above 0: fix it, or take it away to use config.json"
        )
    return tuple(mean.tolist()), tuple(std.reciprocal().tolist())


def _load_taef2(name: str, folder: Path) -> Taef2Autoencoder:
    encoder_file, decoder_file = (folder / file for file in TAEF2_FILES)
    # The first convolution gives the sizes: (width, latent channels, 3, 3).
    first = read_tensors(decoder_file, REMEDY).get("1.weight")
    if first is None or first.ndim != 4:
        raise UserError(f"{decoder_file} does not hold the decoder of TAEF2: it has no 1.weight")
    width, latent_channels = first.shape[:2]
    decoder = read_network(lambda: taef2_decoder(width, latent_channels), decoder_file, REMEDY)
    encoder = None
    if encoder_file.is_file():
        encoder = read_network(lambda: taef2_encoder(width, latent_channels), encoder_file, REMEDY)
    files = (encoder_file, decoder_file) if encoder else (decoder_file,)
    spec = AutoencoderSpec(
        name=name,
        kind="TAEF2",
        weights_sha256=sha256_of(*files),
        latent_channels=latent_channels,
        downsampling=8,
        shift=(0.0,) * latent_channels,
        scale=(1.0,) * latent_channels,
    )
    return Taef2Autoencoder(encoder, decoder, spec)
