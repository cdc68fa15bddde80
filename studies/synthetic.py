"""Do images that a run has made help a segmenter of real ones? Real, both, and made ones alone, at shares of the real.

    python studies/synthetic.py --train camvid/train --test camvid/test --made dataset --out measured

`train` and `test` have images/ and masks/ with the same names; `made` is what `reglue synthesise --format masks` wrote.
Every arm takes the same number of steps, so that it sees as many images as any other. The figure is the mean IoU on
`test`, of each seed. results.json has all; what was measured stays, and the same command goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from measures import Notes, mistakes_in
from reglue.data.images import crop_to, decode
from reglue.data.masks import crop_mask, read_mask
from reglue.errors import UserError
from reglue.perception.agreement import IGNORE, confusions, markdown_table, mean_iou
from reglue.progress import Bar
from reglue.seeds import permutation, torch_generator

LEARNING_RATE, BATCH = 1e-3, 16
BACKBONE, STRIDES = "regnetx_002", (2, 4)
"""Of timm, and which of its maps are read: an eighth and a thirty-second of the image."""


@dataclass(frozen=True)
class Options:
    """What is trained and measured."""

    train: Path
    """Real images and masks to learn from."""
    test: Path
    """Real images and masks to measure on."""
    made: Path
    """Made images and masks."""
    out: Path
    """Folder of the results."""
    size: tuple[int, int] = (128, 128)
    """Height and width of all images."""
    ignored: int = IGNORE
    """The class in masks that stands for none."""
    shares: tuple[float, ...] = (0.1, 0.25, 1.0)
    """Of the real images."""
    seeds: tuple[int, ...] = (0, 1)
    """Of weights and batches; the shares of the real images are those of the first one."""
    steps: int = 2000
    """Of every arm, of 16 images each."""


class Segmenter(nn.Module):
    """A small network of timm with linear layers on two of its strides, as in LR-ASPP; from random weights."""

    def __init__(self, classes: int, backbone: str = BACKBONE) -> None:
        super().__init__()
        self.backbone = timm.create_model(backbone, features_only=True, out_indices=STRIDES)
        widths = self.backbone.feature_info.channels()  # type: ignore[reportCallIssue]
        self.heads = nn.ModuleList(nn.Conv2d(width, classes, 1) for width in widths)

    def forward(self, images: Tensor) -> Tensor:
        """Scores (B, classes, H, W) of images (B, 3, H, W) between -1 and 1."""
        fine, coarse = (head(found) for head, found in zip(self.heads, self.backbone(images), strict=True))
        fine = fine + F.interpolate(coarse, fine.shape[-2:], mode="bilinear")
        return F.interpolate(fine, images.shape[-2:], mode="bilinear")


class Pairs:
    """Images and masks in memory."""

    def __init__(self, folder: Path, options: Options) -> None:
        files = sorted(file for file in (folder / "images").rglob("*") if file.is_file())
        masks = [folder / "masks" / file.relative_to(folder / "images").with_suffix(".png") for file in files]
        if not files or not all(map(Path.is_file, masks)):
            raise UserError(f"{folder} does not have images/ with a mask for each in masks/")
        pixels = [np.asarray(crop_to(decode(file), options.size)) for file in files]
        self.images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        labels = np.stack([np.asarray(crop_mask(read_mask(file), options.size)) for file in masks])
        self.masks = torch.from_numpy(np.where(labels == options.ignored, IGNORE, labels).astype(np.int64))
        self.classes = int(self.masks[self.masks != IGNORE].max()) + 1


class Study:
    """The arms and their figures so far."""

    def __init__(self, options: Options) -> None:
        self.options, self.notes = options, Notes(options.out)
        self.real, self.test, self.made = (Pairs(one, options) for one in (options.train, options.test, options.made))
        self.order = permutation(options.seeds[0], "real images", 0, len(self.real.images))

    def measure(self) -> None:
        """Every arm that has no figure yet."""
        for seed in self.options.seeds:
            self.note(f"made alone, seed {seed}", torch.empty(0, dtype=torch.int64), True, seed)
            for share in self.options.shares:
                rows = self.order[: max(1, round(share * len(self.order)))]
                self.note(f"{share:.0%} real, seed {seed}", rows, False, seed)
                self.note(f"{share:.0%} real and made, seed {seed}", rows, True, seed)
        self.report()

    def note(self, name: str, rows: Tensor, with_made: bool, seed: int) -> None:
        """Train an arm and write its figure down."""
        if name in self.notes.results:
            return
        images, masks = self.real.images[rows], self.real.masks[rows]
        weights = torch.full((len(rows),), 1 / max(len(rows), 1))
        if with_made:  # As many of either, whatever there are of them.
            made = len(self.made.images)
            weights = torch.cat([weights, torch.full((made,), 1 / made)])
            images, masks = torch.cat([images, self.made.images]), torch.cat([masks, self.made.masks])
        self.notes.write(name, {"miou": self.miou(self.trained(images, masks, weights, seed, name))})

    def trained(self, images: Tensor, masks: Tensor, weights: Tensor, seed: int, name: str) -> nn.Module:
        """A segmenter, with images mirrored at random."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = Segmenter(self.real.classes)
        draws, steps = torch_generator(seed, "batches"), self.options.steps
        optimiser = torch.optim.AdamW(network.parameters(), LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps)
        for _ in Bar(range(steps), desc=name, unit="step"):
            rows = torch.multinomial(weights, BATCH, replacement=True, generator=draws)
            x, y = images[rows].float() / 127.5 - 1, masks[rows]
            mirrored = torch.rand(BATCH, generator=draws) < 0.5
            x, y = (torch.where(mirrored.view(-1, *[1] * (one.ndim - 1)), one.flip(-1), one) for one in (x, y))
            loss = F.cross_entropy(network(x), y, ignore_index=IGNORE)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        return network.eval()

    @torch.inference_mode()
    def miou(self, network: nn.Module) -> float:
        """On the images of `test`."""
        found = [network(some.float() / 127.5 - 1).argmax(1) for some in self.test.images.split(BATCH)]
        return mean_iou(confusions(torch.cat(found), self.test.masks, self.real.classes).sum(0))

    def report(self) -> None:
        """Print the table, a row for each arm and a column for each seed."""
        arms = dict.fromkeys(name.rpartition(", ")[0] for name in self.notes.results)
        found = {name: f"{figures['miou']:.3f}" for name, figures in self.notes.results.items()}
        rows = [[arm, *(found[f"{arm}, seed {seed}"] for seed in self.options.seeds)] for arm in arms]
        print(markdown_table(["mean IoU", *(f"seed {seed}" for seed in self.options.seeds)], rows, texts=1))


def main(arguments: list[str] | None = None) -> None:
    """Measure everything. A user's mistake ends with one line and exit code 2."""
    with mistakes_in("synthetic"):
        Study(tyro.cli(Options, description=__doc__, args=arguments)).measure()


if __name__ == "__main__":
    main()
