"""Heads: small modules that predict, from a vision encoder's features, the class or the depth of every pixel.

They are made for real features, by `reglue head` or by DINOv2's authors (arXiv 2304.07193), and work on whatever gives
such features: an alignment network makes them of generated latents (ReaLS, arXiv 2502.00359), without more training.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reglue.encoders.compressors import Compressor, resize
from reglue.encoders.known import KNOWN_ENCODERS
from reglue.encoders.vision import EncoderSpec, VisionFeatures
from reglue.encoders.weights import read_weights
from reglue.errors import UserError
from reglue.files import read_json, read_network, refuse_not_finite, to_json, write_tensors, write_text

Task = Literal["segmentation", "depth"]

SPEC_FILE, WEIGHTS_FILE = "head.json", "head.safetensors"
TRAINING = "training.json"
REMEDY = "train the head again with `reglue head`"
POSSIBLE_LAYERS = frozenset(range(1000))
"""Of an encoder; the deepest have some fifty."""
BATCH_NORM_EPSILON = 1e-5
"""PyTorch's default, which the published heads were trained with."""
DEPTH_LAYERS = {12: (2, 5, 8, 11), 24: (4, 11, 17, 23), 40: (9, 19, 29, 39)}
"""The blocks that DINOv2's depth heads on four layers read, by the number of blocks."""
DEPTH_RANGES = {"nyu": (0.001, 10.0), "kitti": (0.001, 80.0)}
"""Metres between which the published depth heads predict, by the data set in the file's name."""
DEPTH_ENLARGEMENT = 4
"""The published depth heads read features at four times the grid."""
DEPTH_FLOOR = 0.1
"""What they add to the score of every bin."""
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


@dataclass(frozen=True)
class HeadSpec:
    """What a head reads and what it predicts, as plain data."""

    task: Task
    architecture: str
    """timm's name of the encoder."""
    width: int
    """Channels of one of the encoder's layers."""
    layers: tuple[int, ...]
    """Blocks whose features are read, ascending; 0 is the first."""
    outputs: int
    """Channels of the last convolution: classes, depth bins, or 1 for a depth without bins."""
    encoder_sha256: str | None = None
    """Of the encoder's weights; None for a published head, whose file does not record it."""
    encoder: str | None = field(default=None, compare=False)
    """What `load_encoder` took to load it."""
    final_norm: bool = True
    """Whether it reads features after the encoder's final norm."""
    class_token: bool = False
    """Whether it reads the class token too, as further channels of every position."""
    hidden: int = 0
    """Channels of its two convolutions before the last; 0 for a linear head."""
    class_names: tuple[str, ...] = ()
    """Of a segmentation."""
    depth_range: tuple[float, float] | None = None
    """Least and greatest depth, in the unit that it was trained with. Bins divide it evenly; other heads may
    predict depths outside."""

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or not set(self.layers) <= POSSIBLE_LAYERS:
            raise ValueError(f"layers {list(self.layers)} are not ascending numbers of blocks")
        if self.width < 1 or self.outputs < 1 or self.hidden < 0:
            raise ValueError(f"width {self.width}, outputs {self.outputs}, hidden {self.hidden} are too small")
        if self.class_names and len(self.class_names) != self.outputs:
            raise ValueError(f"{len(self.class_names)} class_names are not those of {self.outputs} outputs")
        if self.depth_range and not -torch.inf < self.depth_range[0] <= self.depth_range[1] < torch.inf:
            raise ValueError(f"depth_range {list(self.depth_range)} is none")

    @property
    def channels(self) -> int:
        """That it reads: those of its layers, and as many of the class token if it reads that."""
        return self.width * len(self.layers) * (2 if self.class_token else 1)

    def check_fits(self, encoder: EncoderSpec, what: str, class_token: bool = True) -> None:
        """Raise UserError, in words for `what` has the encoder's features, if the head was not made for those.

        Only `encoder.layers` count as there to be read, and the class token if it is.
        """
        if self.class_token and not class_token:
            raise UserError(f"the head reads the class token too, which {what} does not have; choose a head that fits")
        sides = ("after", "before") if self.final_norm else ("before", "after")
        remedy = (
            ""
            if self.final_norm
            else " (`reglue prepare --no-final-norm` and `reglue autoencode --no-final-norm` take the others)"
        )
        same = (self.encoder_sha256 or encoder.weights_sha256, self.architecture)
        if self.width != encoder.width:
            reason = f"features of width {self.width}, and {what} has features of width {encoder.width}"
        elif same != (encoder.weights_sha256, encoder.architecture):
            own = self.encoder or self.architecture
            reason = f"the encoder {own}, and {what} has features of another one, {encoder.name}"
        elif self.final_norm != encoder.final_norm:
            reason = f"features {sides[0]} the encoder's final norm, and {what} has them {sides[1]} it{remedy}"
        elif not set(self.layers) <= set(encoder.layers):
            reason = f"layers {list(self.layers)} of the encoder, and {what} has {list(encoder.layers)}"
        else:
            return
        raise UserError(f"the head was made for {reason}; choose a head that fits")


class Head(nn.Module):
    """Linear at every position, or Conv1×1 → ReLU → Conv3×3 → ReLU → linear, on standardised features."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: HeadSpec, mean: Tensor | None = None, std: Tensor | None = None):
        """`mean`, `std` (spec.channels,) of the features; without them features are read as they are."""
        super().__init__()
        self.spec = spec
        self.register_buffer("mean", torch.zeros(spec.channels) if mean is None else mean.float().clone())
        self.register_buffer("std", torch.ones(spec.channels) if std is None else std.float().clone())
        self.layers = head_layers(spec.channels, spec.outputs, spec.hidden)

    def forward(self, seen: VisionFeatures, layers: tuple[int, ...], size: tuple[int, int]) -> Tensor:
        """What is seen of images (B), at the blocks `layers`, to scores (B, classes, *size) or depth (B, 1, *size).

        Results are enlarged bilinearly to `size` (height, width). A head that reads the class token takes that of each
        of its layers, from `seen.class_tokens`.
        """
        inputs = self._inputs(seen, layers).float()
        has_bins = self.spec.task == "depth" and self.spec.outputs > 1
        if has_bins:
            inputs = F.interpolate(inputs, scale_factor=DEPTH_ENLARGEMENT, mode="bilinear", align_corners=False)
        scores = self.layers((inputs - self.mean[:, None, None]) / self.std[:, None, None])
        if has_bins and self.spec.depth_range is not None:
            scores = _expected_depth(scores, self.spec.depth_range)
        return F.interpolate(scores, size, mode="bilinear", align_corners=False)

    @torch.inference_mode()
    def predict(self, seen: VisionFeatures, layers: tuple[int, ...], size: tuple[int, int]) -> Tensor:
        """The same as maps (B, *size): class numbers, int64, or depth, float32."""
        scores = self(seen, layers, size)
        return scores.argmax(1) if self.spec.task == "segmentation" else scores[:, 0]

    def save(self, folder: Path) -> None:
        """Write `head.safetensors` and `head.json` into a folder that is there."""
        write_tensors(folder / WEIGHTS_FILE, self.state_dict())
        write_text(folder / SPEC_FILE, to_json(self.spec))

    def _inputs(self, seen: VisionFeatures, layers: tuple[int, ...]) -> Tensor:
        """The channels (B, spec.channels, h, w) that it reads."""
        each = dict(zip(layers, seen.features.split(self.spec.width, dim=1), strict=True))
        if not self.spec.class_token:
            return torch.cat([each[layer] for layer in self.spec.layers], dim=1)
        assert seen.class_tokens is not None
        tokens = dict(zip(layers, seen.class_tokens.split(self.spec.width, dim=1), strict=True))
        everywhere = {layer: token[..., None, None].expand_as(each[layer]) for layer, token in tokens.items()}
        return torch.cat([part for layer in self.spec.layers for part in (each[layer], everywhere[layer])], dim=1)


def features_of_codes(
    code: Tensor, compressor: Compressor, encoder: EncoderSpec
) -> tuple[VisionFeatures, tuple[int, ...]]:
    """What the compressor decodes from a raw local map (B, K, H, W), at the encoder's grid, and of which blocks.

    `encoder` has the compressor's layers. A local map has no class token: its width is 0.
    """
    features = compressor.decode(resize(code, encoder.grid))
    return VisionFeatures(features.new_empty(len(code), 0), features), encoder.layers


def head_layers(channels: int, outputs: int, hidden: int) -> nn.Sequential:
    """The convolutions of a head, and of a probe that may become one; `hidden` 0 makes it linear."""
    layers: list[nn.Module] = [nn.Conv2d(hidden or channels, outputs, 1)]
    if hidden:
        around = nn.Conv2d(hidden, hidden, 3, padding=1)
        layers = [nn.Conv2d(channels, hidden, 1), nn.ReLU(), around, nn.ReLU(), *layers]
    return nn.Sequential(*layers)


def load_head(path: Path | str, device: str | torch.device = "cpu") -> Head:
    """A head in eval mode: a folder of `reglue head`, or a file of a linear head that DINOv2's authors published.

    Published files (`dinov2_vits14_voc2012_linear_head.pth` and the like, or their tensors as safetensors) are
    recognised by their tensors' names and shapes; `kitti` in the name of a depth head makes its depths end at 80 m in
    place of 10 m. Depth heads read features and class token before the encoder's final norm. Raises UserError for
    anything else.
    """
    path = Path(path)
    if path.is_dir():
        head = _load_folder(path)
    elif path.is_file():
        read = read_weights([path])
        refuse_not_finite(read, path)
        tensors = {name.removeprefix("decode_head."): one.float() for name, one in read.items()}
        head = _published(tensors, path)
        refuse_not_finite(head.state_dict(), path)
    else:
        raise UserError(f"{path}: no such head; give a folder that `reglue head` made, or a file of a DINOv2 head")
    return head.eval().requires_grad_(False).to(device)


def _load_folder(folder: Path) -> Head:
    for file in (SPEC_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise UserError(f"{folder} has no {file}: give a folder that `reglue head` made")
    spec = read_json(folder / SPEC_FILE, HeadSpec, REMEDY)
    return read_network(lambda: Head(spec), folder / WEIGHTS_FILE, REMEDY, sealed=True)


def _published(tensors: dict[str, Tensor], file: Path) -> Head:
    """A linear head of DINOv2. Raises UserError if these are not its tensors."""
    task: Task = "segmentation" if "conv_seg.weight" in tensors else "depth"
    layer, nothing = "conv_seg" if task == "segmentation" else "conv_depth", torch.empty(0)
    weight, bias = (tensors.get(f"{layer}.{name}", nothing) for name in ("weight", "bias"))
    spec = _published_spec(task, tuple(weight.shape), file)
    if spec is None or bias.shape != weight.shape[:1]:
        raise UserError(
            f"{file} holds no linear head of DINOv2 (conv_seg or conv_depth on the features of one of its networks); "
            "give such a file, or a folder that `reglue head` made"
        )
    head = Head(spec)
    if task == "segmentation":
        norm = [tensors.get(f"bn.{name}", nothing) for name in ("running_mean", "running_var", "weight", "bias")]
        if any(part.shape != weight.shape[1:2] for part in norm):
            raise UserError(f"{file}: its batch norm (bn) is missing or of another width; fetch the file again")
        mean, variance, scale, shift = norm
        head = Head(spec, mean, (variance + BATCH_NORM_EPSILON).sqrt())
        # What the batch norm does after standardising becomes a part of the convolution.
        weight, bias = weight * scale[:, None, None], bias + weight[:, :, 0, 0] @ shift
    head.layers.load_state_dict({"0.weight": weight, "0.bias": bias})
    return head


def _published_spec(task: Task, shape: tuple[int, ...], file: Path) -> HeadSpec | None:
    """By the shape of the last convolution: which of the networks, and how many of its layers. None if none fits."""
    if len(shape) != 4 or shape[0] < 1 or shape[2:] != (1, 1):
        return None
    depth = task == "depth"
    channels = shape[1] // 2 if depth else shape[1]  # Depth heads read the class token too.
    # Heads were published for the networks without registers, whose widths are 384, 768, 1024 and 1536. Four layers of
    # the narrowest have as many channels as one of the widest, so that one's name is asked for too.
    for count, name in itertools.product((1, 4), ("dinov2-s", "dinov2-b", "dinov2-l", "dinov2-g")):
        known = KNOWN_ENCODERS[name]
        if known.width * count != channels or (channels == 1536 and f"vit{name[-1]}14" not in file.name):
            continue
        names = VOC_CLASSES if shape[0] == len(VOC_CLASSES) else tuple(map(str, range(shape[0])))
        return HeadSpec(
            task=task,
            architecture=known.architecture,
            width=known.width,
            layers=DEPTH_LAYERS[known.depth] if depth and count > 1 else tuple(range(known.depth - count, known.depth)),
            outputs=shape[0],
            final_norm=not depth,
            class_token=depth,
            class_names=() if depth else names,
            depth_range=DEPTH_RANGES["kitti" if "kitti" in file.name else "nyu"] if depth else None,
        )
    return None


def _expected_depth(scores: Tensor, depth_range: tuple[float, float]) -> Tensor:
    """Scores (B, bins, h, w) to depths (B, 1, h, w): the mean of evenly spaced ones, weighted by scores."""
    weights = scores.relu() + DEPTH_FLOOR
    bins = torch.linspace(*depth_range, scores.shape[1], device=scores.device)
    return torch.einsum("bkhw,k->bhw", weights / weights.sum(1, keepdim=True), bins)[:, None]
