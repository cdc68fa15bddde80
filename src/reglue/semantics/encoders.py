"""Frozen vision encoders: images in, class token and patch features of chosen layers out.

Everything that is a vision transformer in timm can be used. An encoder is named by a short name (`dinov2-b-reg`), by a
timm name (`timm:vit_base_patch16_clip_224.openai`), by a folder in timm's layout, or by a file of weights. Images
are brought to the network as REPA does (arXiv 2410.06940): /255, the network's mean and standard deviation, bicubic
without antialias to the input size, in that order.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from reglue.errors import UserError

if TYPE_CHECKING:
    from timm.models import Eva, VisionTransformer


@dataclass(frozen=True)
class KnownEncoder:
    """One row of the table of short names: a timm architecture, and the shapes by which its weights are recognised."""

    architecture: str
    width: int
    depth: int
    patch_size: int
    registers: int


KNOWN_ENCODERS = {
    "dinov2-s": KnownEncoder("vit_small_patch14_dinov2.lvd142m", 384, 12, 14, 0),
    "dinov2-b": KnownEncoder("vit_base_patch14_dinov2.lvd142m", 768, 12, 14, 0),
    "dinov2-l": KnownEncoder("vit_large_patch14_dinov2.lvd142m", 1024, 24, 14, 0),
    "dinov2-s-reg": KnownEncoder("vit_small_patch14_reg4_dinov2.lvd142m", 384, 12, 14, 4),
    "dinov2-b-reg": KnownEncoder("vit_base_patch14_reg4_dinov2.lvd142m", 768, 12, 14, 4),
    "dinov2-l-reg": KnownEncoder("vit_large_patch14_reg4_dinov2.lvd142m", 1024, 24, 14, 4),
}
STARTER = "starter"


@dataclass(frozen=True)
class InputRule:
    """How large an image must be for the network: one patch per so many image pixels, and no side below a minimum.

    A folder's `config.json` may carry one under the key `reglue_input`.
    """

    image_pixels_per_patch: int = 16
    """16 makes a 256-pixel image 16×16 patches: DINOv2 then sees 224 pixels, as in REPA, ReDi, REG and REGLUE."""
    minimum_input: int = 0
    """Images whose shorter side is below this are enlarged to it first (pixels of the network's input)."""

    def sizes(self, image_size: tuple[int, int], patch_size: int, name: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """The patch grid and the network's input size, both (height, width), for an image of that size.

        Raises:
            UserError: the image does not divide into patches.
        """
        scale = patch_size / self.image_pixels_per_patch
        scale = max(scale, self.minimum_input / min(image_size))
        patches = [side * scale / patch_size for side in image_size]
        grid = (round(patches[0]), round(patches[1]))
        if min(grid) < 1 or any(abs(exact - whole) > 1e-6 for exact, whole in zip(patches, grid, strict=True)):
            raise UserError(
                f"image size {image_size[0]}×{image_size[1]} does not fit the patches of encoder {name}: "
                f"choose multiples of {self.image_pixels_per_patch} pixels"
            )
        return grid, (grid[0] * patch_size, grid[1] * patch_size)


@dataclass(frozen=True)
class EncoderSpec:
    """What decides an encoder's output, as plain data. Two specs are equal when their features are the same.

    Sizes are (height, width) in pixels; `grid` is in patches.
    """

    name: str = field(compare=False)
    """What `load_encoder` takes to load it again."""
    architecture: str
    """timm's name of the network."""
    weights_sha256: str
    width: int
    """Channels of the class token, and of the features of each layer."""
    depth: int
    """Blocks of the network."""
    layers: tuple[int, ...]
    """Blocks whose output is described, ascending; 0 is the first."""
    patch_size: int
    grid: tuple[int, int]
    image_size: tuple[int, int]
    """Of the prepared images that `describe` takes."""
    input_size: tuple[int, int]
    """Of what the network sees."""
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    interpolation: str
    antialias: bool

    @property
    def feature_channels(self) -> int:
        """Channels of `VisionFeatures.features`: one width per layer."""
        return self.width * len(self.layers)


class VisionFeatures(NamedTuple):
    """What an encoder says about images. Raw values: nothing is standardised."""

    class_token: Tensor
    """(B, width): after the final norm of the last block. A network without class token gives the mean over patches."""
    features: Tensor
    """(B, layers·width, grid height, grid width): the chosen blocks in order, the final norm applied to each."""


class VisionEncoder(nn.Module):
    """A frozen vision transformer with its preprocessing."""

    def __init__(self, network: "VisionTransformer | Eva", spec: EncoderSpec):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.spec = spec
        self.image_mean: Tensor
        self.image_std: Tensor
        self.register_buffer("image_mean", torch.tensor(spec.image_mean).view(1, -1, 1, 1))
        self.register_buffer("image_std", torch.tensor(spec.image_std).view(1, -1, 1, 1))

    def train(self, mode: bool = True) -> "VisionEncoder":
        """Stay in eval mode: the encoder is frozen, also as a part of a module that is trained."""
        return super().train(False)

    def preprocess(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) at the prepared size → float (B, 3, *input_size), standardised, then resized."""
        images = (pixels.to(self.image_mean) / 255 - self.image_mean) / self.image_std
        if self.spec.input_size == self.spec.image_size:
            return images
        return F.interpolate(
            images,
            size=self.spec.input_size,
            mode=self.spec.interpolation,
            antialias=self.spec.antialias,
            align_corners=False,
        )

    @torch.no_grad()
    def describe(self, pixels: Tensor) -> VisionFeatures:
        """Class token and features of uint8 images (B, 3, H, W) at the prepared size, on the encoder's device.

        Raises:
            ValueError: the pixels are not uint8 or not of `spec.image_size`.
        """
        if pixels.dtype != torch.uint8 or tuple(pixels.shape[-2:]) != self.spec.image_size:
            raise ValueError(
                f"the encoder was loaded for uint8 images of {self.spec.image_size}, "
                f"these are {pixels.dtype} of {tuple(pixels.shape[-2:])}"
            )
        described = self.network.forward_intermediates(
            self.preprocess(pixels), indices=list(self.spec.layers), norm=True
        )
        final, layers = cast(tuple[Tensor, list[Tensor]], described)
        prefix = self.network.num_prefix_tokens
        class_token = final[:, 0] if self.network.cls_token is not None else final[:, prefix:].mean(dim=1)
        return VisionFeatures(class_token, torch.cat(layers, dim=1))


@dataclass(frozen=True)
class _Source:
    """Where a network's parts come from, once its name is understood."""

    name: str
    """With paths made absolute, so that it means the same from any working folder."""
    architecture: str
    weights: Path
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)
    input_rule: InputRule = InputRule()


def load_encoder(
    name: str,
    image_size: int | tuple[int, int],
    layers: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
) -> VisionEncoder:
    """A frozen vision encoder for prepared images of one size.

    Args:
        name: `starter`, another short name (`dinov2-b-reg`), `timm:NAME`, a folder in timm's layout (`config.json` and
            `model.safetensors`), `NAME@FILE` (that architecture with the weights in FILE), or a safetensors FILE of a
            network in the table of short names. Names without a file are fetched from the hub, or its cache.
        image_size: side, or (height, width), of the prepared images in pixels.
        layers: indices of the blocks to describe, 0 is the first; None for the last four.
        device: where the network lives.

    Raises:
        UserError: an unknown name, a missing or unfitting file, a layer that the network does not have, or an image
            size that does not divide into patches.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
    source = _find_source(name)
    shape = _empty_network(source)
    patch_size: int = cast(Any, shape.patch_embed).patch_size[0]
    depth = len(shape.blocks)
    grid, input_size = source.input_rule.sizes(size, patch_size, name)

    chosen = tuple(sorted(set(layers))) if layers is not None else tuple(range(depth))[-4:]
    if not chosen or chosen[0] < 0 or chosen[-1] >= depth:
        raise UserError(f"layers {list(layers or [])}: encoder {name} has blocks 0 to {depth - 1}")

    network = _load_network(source, input_size)
    pretrained_cfg = cast(dict[str, Any], network.pretrained_cfg)
    # With the state dict in it, the checkpoint would stay in memory beside the network.
    pretrained_cfg.pop("state_dict", None)
    with source.weights.open("rb") as file:
        weights_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    spec = EncoderSpec(
        name=source.name,
        architecture=source.architecture,
        weights_sha256=weights_sha256,
        width=network.embed_dim,
        depth=depth,
        layers=chosen,
        patch_size=patch_size,
        grid=grid,
        image_size=size,
        input_size=input_size,
        image_mean=tuple(pretrained_cfg["mean"]),
        image_std=tuple(pretrained_cfg["std"]),
        interpolation="bicubic",
        antialias=False,
    )
    return VisionEncoder(network, spec).to(device)


def _find_source(name: str) -> _Source:
    if name == STARTER:
        with resources.as_file(resources.files("reglue.starter") / "encoder") as folder:
            return replace(_source_from_folder(folder), name=STARTER)
    if name in KNOWN_ENCODERS:
        return _source_from_hub(name, KNOWN_ENCODERS[name].architecture)
    if name.startswith("timm:") and "@" not in name:
        return _source_from_hub(name, _timm_architecture(name))

    path = Path(name)
    if path.is_dir():
        return _source_from_folder(path.resolve())
    if path.is_file():
        return _Source(str(path.resolve()), KNOWN_ENCODERS[_recognise(path)].architecture, path)

    architecture_name, at, file = name.partition("@")
    if at and (architecture_name in KNOWN_ENCODERS or architecture_name.startswith("timm:")):
        if not Path(file).is_file():
            raise UserError(f"encoder {name}: there is no file {file}")
        known = KNOWN_ENCODERS.get(architecture_name)
        architecture = known.architecture if known else _timm_architecture(architecture_name)
        return _Source(f"{architecture_name}@{Path(file).resolve()}", architecture, Path(file))
    raise UserError(
        f"unknown encoder {name!r}: it is neither a file nor a folder; short names are {', '.join(encoder_names())}, "
        "others are given as timm:NAME"
    )


def encoder_names() -> list[str]:
    """The short names that `load_encoder` knows."""
    return [STARTER, *KNOWN_ENCODERS]


def _timm_architecture(name: str) -> str:
    architecture = name.removeprefix("timm:")
    import timm

    if not timm.is_model(architecture):
        raise UserError(f"unknown encoder {name!r}: timm has no model {architecture!r}; timm.list_models() lists them")
    return architecture


def _source_from_folder(folder: Path) -> _Source:
    config_file, weights = folder / "config.json", folder / "model.safetensors"
    for file in (config_file, weights):
        if not file.is_file():
            raise UserError(
                f"encoder {folder}: {file.name} is missing; timm's layout is config.json, model.safetensors"
            )
    try:
        config = json.loads(config_file.read_text())
        architecture = config["architecture"]
        input_rule = InputRule(**config.get("reglue_input", {}))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"encoder {folder}: config.json is not in timm's layout ({error!r})") from error
    return _Source(
        str(folder), architecture, weights, config.get("model_args", {}), config.get("pretrained_cfg", {}), input_rule
    )


def _source_from_hub(name: str, architecture: str) -> _Source:
    import timm

    pretrained_cfg = timm.get_pretrained_cfg(architecture)
    repository = pretrained_cfg.hf_hub_id if pretrained_cfg is not None else None
    if repository is None:
        raise UserError(f"encoder {name}: timm has no weights for {architecture}; give yours as {name}@FILE")
    # Models of the newer tags have the bare prefix here; the architecture completes it.
    repository = repository if not repository.endswith("/") else repository + architecture
    try:
        weights = hf_hub_download(repository, "model.safetensors")
    except Exception as error:  # whatever the hub's client raises: offline, refused, not found
        raise UserError(
            f"encoder {name} cannot be fetched ({type(error).__name__}): download model.safetensors of {repository} "
            f"from the Hugging Face hub and give it as {name}@FILE"
        ) from error
    return _Source(name, architecture, Path(weights))


def _recognise(file: Path) -> str:
    """The short name of the architecture whose weights a file holds."""
    shapes = _tensor_shapes(file)
    patch = shapes.get("patch_embed.proj.weight", [0, 0, 0, 0])
    blocks = {int(key.split(".")[1]) for key in shapes if key.startswith("blocks.")}
    registers = next((shapes[key][1] for key in ("reg_token", "register_tokens") if key in shapes), 0)
    found = KnownEncoder("", width=patch[0], depth=len(blocks), patch_size=patch[-1], registers=registers)
    for name, known in KNOWN_ENCODERS.items():
        if asdict(known) == asdict(found) | {"architecture": known.architecture}:
            return name
    raise UserError(
        f"{file} holds no encoder of the table (found width {found.width}, {found.depth} blocks, patch "
        f"{found.patch_size}, {found.registers} registers): say which network it is, as NAME@{file}"
    )


def _tensor_shapes(file: Path) -> dict[str, list[int]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118 not a dict
    except SafetensorError as error:
        raise UserError(f"{file} is not a safetensors file ({error})") from error


def _empty_network(source: _Source) -> "VisionTransformer | Eva":
    """The network without memory for its weights, to read off its shape."""
    with torch.device("meta"):
        return _create(source)


def _load_network(source: _Source, input_size: tuple[int, int]) -> "VisionTransformer | Eva":
    try:
        state = load_file(source.weights)
        network = _create(source, img_size=input_size, pretrained=True, state_dict=state)
    except (SafetensorError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{source.weights} does not fit the network {source.architecture}: {reason}") from error
    return network


def _create(
    source: _Source,
    img_size: tuple[int, int] | None = None,
    pretrained: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> "VisionTransformer | Eva":
    # timm takes longer to import than all of ours, and most jobs only read an EncoderSpec.
    import timm
    from timm.models import Eva, VisionTransformer

    # With the state dict in the configuration, timm itself renames keys and resamples position embeddings to img_size.
    overlay = {**source.pretrained_cfg, "state_dict": state_dict, "custom_load": False}
    arguments = {**source.model_args, "num_classes": 0}
    if img_size is not None:
        arguments["img_size"] = img_size
    try:
        network = timm.create_model(
            source.architecture, pretrained=pretrained, pretrained_cfg_overlay=overlay, **arguments
        )
    except TypeError as error:
        raise UserError(f"encoder {source.architecture} cannot be built with {arguments}: {error}") from error
    if not isinstance(network, VisionTransformer | Eva):
        raise UserError(f"encoder {source.architecture} is not a vision transformer: it has no grid of patch tokens")
    return network
