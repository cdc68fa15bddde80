"""What `reglue evaluate` does not measure: classes by an independent judge, and copies of training images."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from scipy.stats import binomtest
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck, ResNet

from reglue.data.store import Store
from reglue.errors import Stopped, UserError
from reglue.files import write_text
from reglue.metrics.distances import nearest
from reglue.metrics.features import FeatureNetwork, describe_images
from reglue.metrics.resampling import CONFIDENCE
from reglue.perception.agreement import markdown_table

BATCH = 64
CLOSE = 0.01
"""A sample is close to an image if it stands out by more than all but this share of held-out images do."""
NEIGHBOURHOOD = 50
"""Images next to the nearest that show which distances are usual there (Carlini et al. 2023, arXiv 2301.13188); a tenth
of the smaller set, if that is less."""
PAIRS = 10
"""Of samples and the training images that they are closest to, to be looked at."""


def pictures(folder: Path, count: int) -> Iterator[Tensor]:
    """The first PNG files of a folder of samples, uint8 (B, 3, H, W)."""
    for start in range(0, count, BATCH):
        files = [folder / f"{i:06d}.png" for i in range(start, min(start + BATCH, count))]
        yield torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])


def photographs(store: Store, count: int = sys.maxsize) -> tuple[Tensor, list[int]]:
    """Real images of a store, evenly spread: uint8 (N, 3, H, W), and their labels. Unreadable ones are left out."""
    source = store.manifest.source.open()
    chosen = torch.linspace(0, len(source) - 1, min(count, len(source))).long().tolist()
    loaded = [(source.load(i, store.manifest.source.resolution), i) for i in chosen]
    readable = [(image, source.labels[i] if source.labels else 0) for image, i in loaded if isinstance(image, Tensor)]
    return torch.stack([image for image, _ in readable]), [label for _, label in readable]


class Notes:
    """Figures by name in a folder's results.json: what is there need not be measured again."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "results.json"
        self.results: dict[str, dict[str, float]] = json.loads(self.file.read_text()) if self.file.is_file() else {}

    def write(self, name: str, figures: dict[str, Any]) -> None:
        """Write down what was measured."""
        self.results[name] = {key: round(float(value), 4) for key, value in figures.items()}
        print(name, self.results[name], flush=True)
        write_text(self.file, json.dumps(self.results, indent=1))

    def tables(self) -> str:
        """Names are TABLE: ROW."""
        tables: list[str] = []
        for title in dict.fromkeys(name.partition(": ")[0] for name in self.results):
            rows = {name.partition(": ")[2]: row for name, row in self.results.items() if name.startswith(f"{title}: ")}
            heads = list(dict.fromkeys(key for row in rows.values() for key in row))
            lines = [[name, *(f"{row[key]:.3f}" if key in row else "" for key in heads)] for name, row in rows.items()]
            tables.append(markdown_table([title, *heads], lines, texts=1))
        return "\n\n".join(tables) + "\n"


@contextmanager
def mistakes_in(program: str) -> Iterator[None]:
    """A user's mistake in the block ends the program with one line and exit code 2, a request to stop with 143."""
    try:
        yield
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as request:
        print(request, file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)


@dataclass
class Judge:
    """A frozen network that took no part in any training."""

    network: nn.Module
    """Images to features (B, D)."""
    mean: Sequence[float]
    """Of red, green and blue between 0 and 1, as `std`."""
    std: Sequence[float]
    size: int
    """The side in pixels that the network takes."""
    device: torch.device

    def __post_init__(self) -> None:
        digest = hashlib.sha256()
        for tensor in self.network.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        self.sha256, self.network = digest.hexdigest(), self.network.eval().to(self.device)

    @torch.inference_mode()
    def features(self, batches: Iterable[Tensor]) -> Tensor:
        """Features (N, D) of uint8 images (B, 3, H, W), stretched to the network's size (bicubic, antialias)."""
        mean, std = (torch.tensor(values, device=self.device)[:, None, None] for values in (self.mean, self.std))
        found = []
        for batch in batches:
            images = batch.to(self.device).float()
            if images.shape[-2:] != (self.size, self.size):
                images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 255)
            found.append(self.network((images / 255 - mean) / std).float().cpu())
        return torch.cat(found)


def load_judge(name: str, device: torch.device) -> Judge:
    """A file of `scripts/convert_classifier.py`, or timm:NAME. Raises UserError if it is neither."""
    kind, _, model = name.partition(":")
    if kind == "timm":
        if not timm.is_model(model):
            raise UserError(f"--judge {name}: timm has no network of that name")
        network = timm.create_model(model, pretrained=True, num_classes=0)
        config = resolve_model_data_config(network)
        return Judge(network, config["mean"], config["std"], config["input_size"][1], device)
    try:
        with safe_open(name, "pt") as opened:
            described = json.loads((opened.metadata() or {})["judge"])
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 not a dict
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(f"--judge {name} is no file of scripts/convert_classifier.py ({error}); convert one") from error
    network = ResNet(Bottleneck, described["blocks"])
    for module in network.modules():
        if isinstance(module, Bottleneck):  # Keras has the stride in the first convolution of a block.
            module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
    network.fc = nn.Identity()  # type: ignore[reportAttributeAccessIssue]
    # torchvision counts the batches of training, of which the file says nothing.
    counted = {key: value for key, value in network.state_dict().items() if key.endswith("num_batches_tracked")}
    network.load_state_dict({key: state[key] for key in state if not key.startswith("fc.")} | counted)
    return Judge(network, described["mean"], described["std"], described["size"], device)


def views(network: FeatureNetwork, batches: Iterable[Tensor]) -> Tensor:
    """Features (2, N, D) of images as they are and of their mirror images."""
    both = [torch.cat([batch, batch.flip(-1)]) for batch in batches]
    found = describe_images(network, both).features.split([len(batch) // 2 for batch in both for _ in range(2)])
    return torch.stack([torch.cat(found[::2]), torch.cat(found[1::2])])


def closeness(seen: Tensor, real: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """How much samples stand out towards one real image, and which one.

    `seen` (V, N, D) are the views of the samples, of which the closest counts; `real` is (M, D). Returns the ratio (N,)
    of the distance to the nearest image to the mean distance to the next `neighbours`, and the nearest one (N,) int64.
    Blurred samples, which are near to many images, have a ratio close to 1, and it does not fall with the size of a
    set as distances do.
    """
    found = [nearest(view, real, neighbours + 1) for view in seen]
    tiny = torch.finfo(torch.float64).tiny
    ratios = torch.stack([distances[:, 0] / distances[:, 1:].mean(1).clamp(min=tiny) for distances, _ in found])
    best, rows = ratios.argmin(0), torch.arange(ratios.shape[1])
    return ratios[best, rows], torch.stack([places[:, 0] for _, places in found])[best, rows]


def copying(samples: Tensor, training: Tensor, held_out: Tensor) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Whether samples are copies of training images, by their views (2, N, D), (M, D) features and (2, K, D) views.

    `copied` is the share of samples that are close to a training image less the share close to a held-out one: 0 where
    nothing is learned by heart, 1 where everything is. Returns the figures, the few samples that stand out most, and
    the nearest training image of each of these.
    """
    neighbours = max(1, min(NEIGHBOURHOOD, len(training) // 10, held_out.shape[1] // 10))
    usual, _ = closeness(held_out, training, neighbours)
    ratio, places = closeness(samples, training, neighbours)
    innocent = closeness(samples, held_out[0], neighbours)[0] < usual.quantile(CLOSE)
    close = ratio < usual.quantile(CLOSE)
    copies, others = (float(which.double().mean()) for which in (close & ~innocent, innocent & ~close))
    closest = ratio.argsort()[:PAIRS]
    return {"copied": difference_of(copies, others, len(ratio))}, closest, places[closest]


def share_of(share: float, count: int) -> dict[str, float]:
    """A share of so many images with Wilson's interval."""
    found = binomtest(round(share * count), count).proportion_ci(CONFIDENCE, method="wilson")
    return {"value": share, "low": float(found.low), "high": float(found.high)}


def difference_of(first: float, second: float, count: int) -> dict[str, float]:
    """The difference of two shares of so many images, with the interval of Newcombe (1998, method 10).

    Unlike one by resampling, it has a width where no image was found.
    """
    one, other = share_of(first, count), share_of(second, count)
    below = math.hypot(one["value"] - one["low"], other["high"] - other["value"])
    above = math.hypot(one["high"] - one["value"], other["value"] - other["low"])
    return {"value": first - second, "low": max(-1.0, first - second - below), "high": min(1.0, first - second + above)}
