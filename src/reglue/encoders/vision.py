"""Frozen vision encoders: images in, class token and patch features of chosen layers out.

Everything that is a vision transformer in timm can be used. An encoder is named by a short name (`dinov2-b-reg`), by a
timm name (`timm:vit_base_patch16_clip_224.openai`), by a folder in the layout of timm or of transformers, or by a file
of weights. Images are brought to the network as REPA does (arXiv 2410.06940): one patch per 16 image pixels, so that
256 pixels make 16×16 patches; /255, the network's mean and standard deviation, and bicubic without antialias to the
input size, in the order that the table of short names gives.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reglue.encoders.known import KNOWN_ENCODERS, NORMALISE_RESIZE, STARTER, Shape, Steps, fitting, recognise
from reglue.encoders.renaming import as_timm
from reglue.encoders.weights import (
    CONFIG,
    REMEDY,
    at_most,
    read_config,
    read_shapes,
    read_weights,
    sha256_of,
    unfitting,
    weight_files,
)
from reglue.errors import UserError, one_line
from reglue.files import file_sha256, parse_json, refuse_not_finite
from reglue.hub import fetch

if TYPE_CHECKING:
    from timm.models import Eva, VisionTransformer


WEIGHTS = "model.safetensors"
STEMS = ("model", "pytorch_model")
"""What the files of weights in a folder begin with, of timm and of transformers."""
LAYOUT = f"fetch the folder again: it is {CONFIG} and {WEIGHTS}; a file of weights alone may be given as NAME@FILE"
OF_TRANSFORMERS = {
    "dinov2": "vit_base_patch14_dinov2",
    "dinov2_with_registers": "vit_base_patch14_reg4_dinov2",
    "dinov3_vit": "vit_base_patch16_dinov3",
}
"""What transformers calls the kinds of its networks that can be read, and one of timm's of each kind."""
HEAD_WIDTH = 64
"""Channels of an attention head, in all that have short names."""
_CLASSIFIER = re.compile(r"(head|head_dist)\.(weight|bias)$|(visual\.)?proj$")
"""Tensors of a classifier or projection after the pooled vector, as timm and OpenAI name them."""


@dataclass(frozen=True)
class InputRule:
    """How large an image must be for the network: one patch per so many image pixels, and no side below a minimum.

    A folder's `config.json` may carry one under the key `reglue_input`.
    """

    image_pixels_per_patch: int = 16
    """16 makes a 256-pixel image 16×16 patches: DINOv2 then sees 224 pixels, as in REPA, ReDi, REG and REGLUE."""
    minimum_input: int = 0
    """Images whose shorter side is below this are enlarged to it first (pixels of the network's input)."""

    def __post_init__(self) -> None:
        if not (1 <= self.image_pixels_per_patch <= 1024 and 0 <= self.minimum_input <= 4096):
            raise ValueError("image_pixels_per_patch lies between 1 and 1024, minimum_input between 0 and 4096")

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


Pooling = Literal["class token or mean", "attention"]


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
    steps: Steps
    """The order of standardising and resizing."""
    final_norm: bool
    """Whether the final norm was applied to the features of each layer. The class token always comes after it."""
    pooling: Pooling
    """How the vector for the whole image is made: the network's class token, or the mean over patches where
    `prefix_tokens` says that it has none; or the network's own attention pooling."""
    prefix_tokens: int = field(compare=False)
    """Tokens before the patches: the class token and registers. The architecture decides it."""
    registers: int = field(compare=False)
    """How many of them are registers."""

    @property
    def feature_channels(self) -> int:
        """Channels of `VisionFeatures.features`: one width per layer."""
        return self.width * len(self.layers)

    def channels_of(self, layers: tuple[int, ...] | None) -> slice:
        """Where some of the layers are among the channels of `VisionFeatures.features`; None stands for all.

        Raises ValueError, naming them, for layers that are not described, or not one after the other.
        """
        if layers is None:
            return slice(0, self.feature_channels)
        for first in range(len(self.layers)):
            if layers and self.layers[first : first + len(layers)] == layers:
                return slice(first * self.width, (first + len(layers)) * self.width)
        raise ValueError(f"layers {list(layers)} are not neighbours among {list(self.layers)}")


class VisionFeatures(NamedTuple):
    """What an encoder makes of images. Raw values: nothing is standardised."""

    class_token: Tensor
    """(B, width): after the final norm of the last block. A network without class token gives what its attention
    pooling makes of the tokens, and where it has none, the mean over patches."""
    features: Tensor
    """(B, layers·width, grid height, grid width): the chosen blocks in order, the final norm applied to each unless
    `EncoderSpec.final_norm` says otherwise."""
    class_tokens: Tensor | None = None
    """(B, layers·width): the class tokens of the chosen blocks, the final norm applied to each as to their features.
    None where the network has no class token."""


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
        """uint8 (B, 3, H, W) at the prepared size → float (B, 3, *input_size): standardised and resized, in that order
        or the other, as `spec.steps` says."""
        images = pixels.to(self.image_mean) / 255
        spec = self.spec
        for step in spec.steps:
            if step == "normalise":
                images = (images - self.image_mean) / self.image_std
            elif spec.input_size != spec.image_size:
                how = {"mode": spec.interpolation, "antialias": spec.antialias, "align_corners": False}
                images = F.interpolate(images, spec.input_size, **how)
        return images

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
        has_token = self.network.cls_token is not None
        described = self.network.forward_intermediates(
            self.preprocess(pixels),
            indices=list(self.spec.layers),
            norm=self.spec.final_norm,
            return_prefix_tokens=has_token,
        )
        final, layers = cast(tuple[Tensor, list[Any]], described)
        if not has_token:
            return VisionFeatures(self._pooled(final), torch.cat(layers, dim=1))
        features, prefixes = zip(*layers, strict=True)
        class_tokens = torch.cat([prefix[:, 0] for prefix in prefixes], dim=1)
        return VisionFeatures(self._pooled(final), torch.cat(features, dim=1), class_tokens)

    def last_layer(self, seen: VisionFeatures) -> tuple[Tensor, Tensor]:
        """Of what `describe` gave: features (B, width, h, w) of the last layer, and the vector of the image (B, width).

        Where features are described before the final norm, so is the class token here, if the network has one.
        """
        features = seen.features[:, -self.spec.width :]
        if self.spec.final_norm or seen.class_tokens is None:
            return features, seen.class_token
        return features, seen.class_tokens[:, -self.spec.width :]

    def _pooled(self, tokens: Tensor) -> Tensor:
        """Tokens (B, prefix + patches, width) after the final norm → (B, width)."""
        if self.spec.pooling == "attention":
            return self.network.pool(tokens)
        if self.network.cls_token is not None:
            return tokens[:, 0]
        return tokens[:, self.network.num_prefix_tokens :].mean(dim=1)


@dataclass(frozen=True)
class _Source:
    """Where a network's parts come from, once its name is understood."""

    name: str
    """With paths made absolute, so that it means the same from any working folder."""
    architecture: str
    weights: tuple[Path, ...]
    """One file, or its shards."""
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)
    input_rule: InputRule = InputRule()
    steps: Steps = NORMALISE_RESIZE


def load_encoder(
    name: str,
    image_size: int | tuple[int, int],
    layers: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
    *,
    final_norm: bool = True,
) -> VisionEncoder:
    """A frozen vision encoder for prepared images of one size.

    Args:
        name: `starter`, another short name (`dinov2-b-reg`), `timm:NAME`, a folder in the layout of timm or, for DINOv2
            and DINOv3, of transformers (`config.json` and `model.safetensors`), `NAME@FILE` (that architecture with the
            weights in FILE), or a FILE of a network in the table of short names. Files may be safetensors or PyTorch's,
            Meta's own among them. Names without a file are taken from the hub's cache, or fetched.
        image_size: side, or (height, width), of the prepared images in pixels.
        layers: indices of the blocks to describe, 0 is the first; None for the last four.
        device: where the network lives.
        final_norm: whether the network's final norm is applied to the features of each layer.

    Raises:
        UserError: an unknown name, a missing or unfitting file, a layer that the network does not have, or an image
            size that does not divide into patches.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
    source = _find_source(name)
    empty = _empty_network(source, len(as_timm(read_shapes(source.weights), source.weights[0])))
    patch_size: int = cast(Any, empty.patch_embed).patch_size[0]
    depth = len(empty.blocks)
    grid, input_size = source.input_rule.sizes(size, patch_size, name)

    chosen = tuple(sorted(set(layers))) if layers is not None else tuple(range(depth))[-4:]
    if not chosen or chosen[0] < 0 or chosen[-1] >= depth:
        raise UserError(f"layers {list(layers or [])}: encoder {name} has blocks 0 to {depth - 1}")

    network = _load_network(source, input_size, empty)
    pretrained_cfg = cast(dict[str, Any], network.pretrained_cfg)
    # With the state dict in it, the checkpoint would stay in memory beside the network.
    pretrained_cfg.pop("state_dict", None)
    first, *more = source.weights
    spec = EncoderSpec(
        name=source.name,
        architecture=source.architecture,
        # Of one file its own, so that anyone can look it up.
        weights_sha256=sha256_of(first, *more) if more else file_sha256(first),
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
        steps=source.steps,
        final_norm=final_norm,
        pooling="attention" if network.cls_token is None and network.attn_pool is not None else "class token or mean",
        prefix_tokens=network.num_prefix_tokens,
        registers=network.num_prefix_tokens - int(network.cls_token is not None),
    )
    return VisionEncoder(network, spec).to(device)


def _find_source(name: str) -> _Source:
    if name == STARTER:
        with resources.as_file(resources.files("reglue.starter") / "encoder") as folder:
            return replace(_source_from_folder(folder), name=STARTER)
    architecture, at, file = name.partition("@")
    has_name = architecture in KNOWN_ENCODERS or architecture.startswith("timm:")
    if has_name and not at:
        return _source_by_name(name, name)
    path = Path(name)
    if path.is_dir():
        return _source_from_folder(path.resolve())
    if path.is_file():
        return _source_by_name(recognise(path), str(path.resolve()), path)
    if has_name:
        if not Path(file).is_file():
            raise UserError(f"encoder {name}: there is no file {file}")
        return _source_by_name(architecture, f"{architecture}@{Path(file).resolve()}", Path(file))
    raise UserError(
        f"unknown encoder {name!r}: it is neither a file nor a folder; short names are {', '.join(encoder_names())}, "
        "others are given as timm:NAME"
    )


def _source_by_name(architecture: str, name: str, weights: Path | None = None) -> _Source:
    """A network in the table of short names, or timm:NAME, with its published weights or those of a file."""
    known = KNOWN_ENCODERS.get(architecture)
    of_timm = known.architecture if known else _timm_architecture(architecture)
    steps = known.family.steps if known else NORMALISE_RESIZE
    return _Source(name, of_timm, (weights or _fetch_weights(name, of_timm),), steps=steps)


def encoder_names() -> list[str]:
    """The short names that `load_encoder` knows."""
    return [STARTER, *KNOWN_ENCODERS]


def _timm_architecture(name: str) -> str:
    architecture = name.removeprefix("timm:")
    import timm

    if not timm.is_model(architecture):
        raise UserError(f"unknown encoder {name!r}: timm has no model {architecture!r}; timm.list_models() lists them")
    return architecture


def _refuse_elsewhere(config: Mapping[str, Any], file: Path) -> None:
    """Raise UserError if a folder's configuration in timm's layout has timm look beyond it, for a network on the hub or
    in another folder, or for other weights."""
    import timm
    from timm.models import build_model_with_cfg

    architecture, arguments = config["architecture"], dict(config.get("model_args", {}))
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise UserError(f"{file}: timm has no architecture {str(architecture)[:100]!r}; timm.list_models() lists them")
    # What timm's functions take themselves, and do not hand on to the network.
    takers = (timm.create_model, build_model_with_cfg)
    own = {name for taker in takers for name in signature(taker).parameters} | {"device", "dtype"}
    if found := sorted(own & arguments.keys()):
        raise UserError(f"{file}: model_args has {', '.join(found)}, which is nothing of a network; take it out")


def _source_from_folder(folder: Path) -> _Source:
    config_file = folder / CONFIG
    config = read_config(config_file, LAYOUT)
    if "model_type" in config and "architecture" not in config:
        return _source_from_transformers(folder, config)
    try:
        _refuse_elsewhere(config, config_file)
        pretrained_cfg = dict(config.get("pretrained_cfg", {}))
        return _Source(
            str(folder),
            config["architecture"],
            weight_files(folder, STEMS),
            dict(config.get("model_args", {})),
            # Of the rest, some decide which tensors timm passes over.
            {name: pretrained_cfg[name] for name in ("mean", "std") if name in pretrained_cfg},
            parse_json(json.dumps(config.get("reglue_input", {})), InputRule),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"encoder {folder}: config.json is not in timm's layout ({error!r})") from error


def _source_from_transformers(folder: Path, config: Mapping[str, Any]) -> _Source:
    """A network of DINOv2 or DINOv3. All of its sizes are those of its weights, but for the number of heads."""
    kind = config["model_type"]
    if not isinstance(kind, str) or kind not in OF_TRANSFORMERS:
        raise UserError(
            f"encoder {folder}: config.json is transformers' of model_type {str(kind)[:100]!r}, of which "
            f"{', '.join(OF_TRANSFORMERS)} can be read; give the same network of timm's, as a short name or timm:NAME"
        )
    files = weight_files(folder, STEMS)
    tensors = as_timm(read_shapes(files), files[0])
    shape = Shape.of(tensors)
    heads = config.get("num_attention_heads", shape.width // HEAD_WIDTH)
    if type(heads) is not int or heads < 1 or shape.width % heads:
        raise UserError(f"{folder / CONFIG} is damaged ({heads} heads for width {shape.width}); {REMEDY}")
    known = fitting(tensors)
    if known and heads * HEAD_WIDTH == shape.width:
        return _Source(str(folder), KNOWN_ENCODERS[known[0]].architecture, files)
    first = tensors.get("blocks.0.mlp.fc1.weight")
    hidden = first.shape[0] if first is not None and first.ndim else 0
    sizes = {
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": heads,
        "patch_size": shape.patch_size,
        "mlp_ratio": (hidden + 0.5) / max(shape.width, 1),  # timm rounds down.
    }
    if shape.registers:
        sizes["num_reg_tokens" if kind == "dinov3_vit" else "reg_tokens"] = shape.registers
    return _Source(str(folder), OF_TRANSFORMERS[kind], files, sizes)


def _fetch_weights(name: str, architecture: str) -> Path:
    import timm

    pretrained_cfg = timm.get_pretrained_cfg(architecture)
    repository = pretrained_cfg.hf_hub_id if pretrained_cfg is not None else None
    if repository is None:
        raise UserError(f"encoder {name}: timm has no weights for {architecture}; give yours as {name}@FILE")
    # Models of the newer tags have the bare prefix here; the architecture completes it.
    repository = repository if not repository.endswith("/") else repository + architecture
    return fetch(f"encoder {name}", repository, [WEIGHTS], instead=f"give it as {name}@FILE") / WEIGHTS


def _empty_network(source: _Source, tensors: int) -> "VisionTransformer | Eva":
    """The network without memory for its weights, to read off its shape. So many tensors are there to fill it."""
    with at_most(tensors):
        network = _create(source)
        try:  # Some arguments are looked at only when it runs.
            network.forward_features(torch.empty(1, 3, *cast(Any, network.patch_embed).img_size))
        except Exception as error:
            raise _unbuildable(source, source.model_args, error) from error
    return network


def _load_network(source: _Source, input_size: tuple[int, int], empty: nn.Module) -> "VisionTransformer | Eva":
    file, wanted = source.weights[0], empty.state_dict()
    # Without the classifier of the training, since with it timm would load a file in which others are missing.
    tensors = as_timm(read_weights(source.weights, REMEDY), file)
    state = {key: value for key, value in tensors.items() if not _CLASSIFIER.match(key)}
    if "blocks.0.attn.q_bias" in state and "blocks.0.attn.q_bias" not in wanted:
        state = _without_biases(state, source)
    refuse_not_finite(state, file)
    for name in state.keys() & wanted.keys() - {"pos_embed"}:
        # timm would resample patches of another size, and make all the memory that a damaged configuration asks for.
        if state[name].shape != wanted[name].shape:
            shapes = [str(list(tensor.shape)) for tensor in (state[name], wanted[name])]
            raise unfitting(file, f"{name} is {shapes[0]}, not {shapes[1]}")
    try:
        network = _create(source, img_size=input_size, pretrained=True, state_dict=state)
    except UserError:
        raise
    except Exception as error:  # What is not as timm expects it may fail anywhere.
        raise UserError(f"{file} does not fit the network {source.architecture}: {one_line(error)}") from error
    return network


def _without_biases(state: dict[str, Tensor], source: _Source) -> dict[str, Tensor]:
    """DINOv3's tensors without the biases of its attention, which were trained to zero in most of its networks."""
    biases = [name for name in state if name.endswith((".q_bias", ".v_bias"))]
    if any(state[name].any() for name in biases):
        base, _, tag = source.architecture.partition(".")
        raise UserError(
            f"{source.weights[0]} has biases in its attention, for which timm's {source.architecture} has no place; "
            f"give it as timm:{base}_qkvb{tag and '.'}{tag}@FILE"
        )
    return {name: tensor for name, tensor in state.items() if name not in biases}


def _create(
    source: _Source,
    img_size: tuple[int, int] | None = None,
    pretrained: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> "VisionTransformer | Eva":
    # timm takes longer to import than all of ours, and most commands only read an EncoderSpec.
    import timm
    from timm.models import Eva, VisionTransformer

    # With the state dict in the configuration, timm itself renames keys and resamples position embeddings to img_size.
    overlay = {**source.pretrained_cfg, "state_dict": state_dict, "custom_load": False, "num_classes": 0}
    arguments = {**source.model_args, "num_classes": 0}
    if img_size is not None:
        arguments["img_size"] = img_size
    try:
        network = timm.create_model(
            source.architecture, pretrained=pretrained, pretrained_cfg_overlay=overlay, **arguments
        )
        # A configuration may leave these out, or have anything for them.
        statistics = [list(cast(Any, network).pretrained_cfg[name]) for name in ("mean", "std")]
        mean, std = torch.tensor(statistics, dtype=torch.float32, device="cpu").reshape(2, 3)
        if not (mean.isfinite().all() and std.isfinite().all() and std.min() > 0):
            raise ValueError(f"mean and std are {statistics}")
    except Exception as error:  # timm checks nothing: wrong arguments may fail anywhere.
        if pretrained:  # It is about the weights: without them, the network could be built.
            raise
        raise _unbuildable(source, arguments, error) from error
    if not isinstance(network, VisionTransformer | Eva):
        raise UserError(f"encoder {source.architecture} is not a vision transformer: it has no grid of patch tokens")
    return network


def _unbuildable(source: _Source, arguments: Mapping[str, Any], error: Exception) -> UserError:
    what = f"config.json of {source.name}" if source.model_args or source.pretrained_cfg else source.architecture
    return UserError(f"encoder {what} cannot be built with {str(arguments)[:300]}: {one_line(error)}")
