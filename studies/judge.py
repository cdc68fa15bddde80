"""An independent classifier that says whether a generated image shows the class it was asked for.

    python studies/judge.py resnet50.safetensors imagenette/val --resolutions 224 128 64

prints how well a judge knows real images, a sub-folder per WordNet id, which bounds what samples can reach.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torchvision
import tyro
from safetensors import SafetensorError, safe_open
from timm.data.config import resolve_model_data_config
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck, ResNet
from tqdm import tqdm

from reglue.data.images import ImageFolder
from reglue.errors import UserError

BATCH_SIZE = 64


@dataclass(frozen=True)
class Verdict:
    """Shares, 0 to 1, of images that are recognised as their class."""

    top1: float
    """Among all classes of the judge."""
    top1_among_own: float
    """Among the classes of the images alone."""


class Judge:
    """A frozen classifier for uint8 images of any size."""

    def __init__(
        self,
        name: str,
        network: nn.Module,
        classes: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
        size: int,
    ):
        """`mean` and `std` are of red, green and blue between 0 and 1; `size` is the side that the network takes."""
        self.name, self.network, self.classes, self.size = name, network.eval(), tuple(classes), size
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))
        digest = hashlib.sha256()
        for tensor in network.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        self.sha256 = digest.hexdigest()

    def to(self, device: torch.device) -> Judge:
        """Itself, on a device."""
        self.network = self.network.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    @torch.inference_mode()
    def scores(self, pixels: Tensor) -> Tensor:
        """Scores (B, classes) of uint8 images (B, 3, H, W), stretched to the network's size (bicubic, antialias)."""
        images = pixels.to(self.mean.device).float()
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 255)
        return self.network((images / 255 - self.mean) / self.std)

    def verdict(self, batches: Iterable[Tensor], labels: Sequence[int], class_names: Sequence[str]) -> Verdict:
        """How many of the images in uint8 batches (B, 3, H, W) are what `labels`, indices of `class_names`, say."""
        places = torch.tensor(self.places_of(class_names))
        scores = torch.cat([self.scores(batch).cpu() for batch in batches])
        expected = torch.tensor(labels)
        return Verdict(
            float((scores.argmax(1) == places[expected]).double().mean()),
            float((scores[:, places].argmax(1) == expected).double().mean()),
        )

    def places_of(self, class_names: Sequence[str]) -> list[int]:
        """Where the judge has these classes. Raises UserError for one that it does not know."""
        place_of = {name: place for place, name in enumerate(self.classes)}
        unknown = [name for name in class_names if name not in place_of]
        if unknown or not class_names:
            raise UserError(
                f"--judge {self.name} knows no class {unknown[0] if unknown else 'at all of these'}; it has "
                f"{', '.join(self.classes[:2])} and {len(self.classes) - 2} more, so leave the judge out"
            )
        return [place_of[name] for name in class_names]


def load_judge(name: str, device: torch.device) -> Judge:
    """A file of `scripts/convert_classifier.py`, or timm:NAME or torchvision:NAME with the 1000 classes of ImageNet.

    Raises UserError if it is none of these.
    """
    kind, _, model = name.partition(":")
    if kind == "timm":
        return _of_timm(name, model).to(device)
    if kind == "torchvision":
        return _of_torchvision(name, model).to(device)
    return _of_file(Path(name)).to(device)


def _of_file(file: Path) -> Judge:
    try:
        with safe_open(file, "pt") as opened:
            described = json.loads((opened.metadata() or {})["judge"])
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 not a dict
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(f"--judge {file} is no file of scripts/convert_classifier.py ({error}); convert one") from error
    network = ResNet(Bottleneck, described["blocks"], num_classes=len(described["classes"]))
    for module in network.modules():
        if isinstance(module, Bottleneck):  # Keras has the stride in the first convolution of a block.
            module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
    # torchvision counts batches in training, which says nothing about a trained network.
    counted = {key: value for key, value in network.state_dict().items() if key.endswith("num_batches_tracked")}
    network.load_state_dict({**state, **counted})
    return Judge(file.name, network, described["classes"], described["mean"], described["std"], described["size"])


def _of_timm(name: str, model: str) -> Judge:
    if not timm.is_model(model):
        raise UserError(f"--judge {name}: timm has no network of that name")
    network = timm.create_model(model, pretrained=True)
    config = resolve_model_data_config(network)
    classes = _imagenet(name, network.num_classes)  # type: ignore[reportArgumentType]
    return Judge(name, network, classes, config["mean"], config["std"], config["input_size"][1])


def _of_torchvision(name: str, model: str) -> Judge:
    try:
        weights = torchvision.models.get_model_weights(model).DEFAULT  # type: ignore[reportAttributeAccessIssue]
    except ValueError as error:
        raise UserError(f"--judge {name}: {error}") from error
    preset = weights.transforms()
    network = torchvision.models.get_model(model, weights=weights)
    return Judge(
        name, network, _imagenet(name, len(weights.meta["categories"])), preset.mean, preset.std, preset.crop_size[0]
    )


def _imagenet(name: str, count: int) -> list[str]:
    """ImageNet's classes as WordNet ids, in the order that all of its classifiers have."""
    names = ImageNetInfo().label_names()
    if len(names) != count:
        raise UserError(f"--judge {name} has {count} classes, not the {len(names)} of ImageNet; choose another network")
    return names


def main(judge: str, images: Path, /, resolutions: tuple[int, ...] = (224, 128, 64), every: int = 1) -> None:
    """Judge real images.

    Args:
        judge: A file of scripts/convert_classifier.py, timm:NAME or torchvision:NAME.
        images: A folder with a sub-folder per WordNet id.
        resolutions: Sides in pixels to which the images are scaled first.
        every: Only every so many images.
    """
    classifier, folder = load_judge(judge, torch.device("cpu")), ImageFolder.open(images)
    indices = range(0, len(folder), every)
    for side in resolutions:
        loaded = ((index, folder.load(index, (side, side))) for index in tqdm(indices, desc=f"{side} px"))
        readable = [(index, image) for index, image in loaded if isinstance(image, Tensor)]
        batches = torch.stack([image for _, image in readable]).split(BATCH_SIZE)
        verdict = classifier.verdict(batches, [folder.labels[index] for index, _ in readable], folder.class_names)
        print(
            f"{side} px, {len(readable)} images: {verdict.top1:.1%} among {len(classifier.classes)} classes, "
            f"{verdict.top1_among_own:.1%} among {len(folder.class_names)}",
            flush=True,
        )


if __name__ == "__main__":
    tyro.cli(main)
