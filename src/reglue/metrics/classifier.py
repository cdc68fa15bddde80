"""A judge of generated images: a small classifier trained on the real ones.

It answers the question that a distance between distributions does not: does a sample show the class it was asked for?
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reglue.progress import Bar

EPOCHS = 8
BATCH_SIZE = 64
LEARNING_RATE = 1e-2
EVALUATION_BATCH = 500


class Classifier(nn.Module):
    """A convolutional network from uint8 images (B, 3, H, W) of any size to class scores (B, classes)."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, classes: int):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        layers: list[nn.Module] = []
        for width_in, width_out in ((len(mean), 16), (16, 32), (32, 64)):
            layers += [
                nn.Conv2d(width_in, width_out, 3, padding=1, bias=False),
                nn.BatchNorm2d(width_out),
                nn.ReLU(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64 * 16, classes))

    def forward(self, images: Tensor) -> Tensor:
        """Scores (B, classes) of uint8 images, or floats between 0 and 255, (B, 3, H, W)."""
        return self.layers((images.float() - self.mean[:, None, None]) / self.std[:, None, None])

    @torch.inference_mode()
    def predict(self, images: Tensor) -> Tensor:
        """The likeliest class (N,) int64 of each uint8 image (N, 3, H, W)."""
        return torch.cat([self(batch).argmax(1) for batch in images.split(EVALUATION_BATCH)])

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The share, 0 to 1, of images (N, 3, H, W) recognised as their class (N,)."""
        return float((self.predict(images) == labels).double().mean())


def train_classifier(images: Tensor, labels: Tensor, classes: int, seed: int, progress: bool = True) -> Classifier:
    """Trains a classifier on uint8 images (N, 3, H, W) and labels (N,) int64 below `classes`, on the CPU.

    AdamW with a one-cycle schedule and label smoothing. Images are turned by up to 10°, scaled by up to 10 % and
    shifted by up to a fourteenth of their size, never flipped: a flipped digit is no digit. A function of its
    arguments; the global random state is neither read nor changed. Raises ValueError for labels outside the classes or
    sizes that do not match.
    """
    if len(images) != len(labels) or len(images) < 2:
        raise ValueError(f"{len(images)} images and {len(labels)} labels; there must be as many, and at least two")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(f"labels run from {int(labels.min())} to {int(labels.max())}, outside {classes} classes")
    generator = torch.Generator().manual_seed(seed)
    pixels = images.double()
    std, mean = torch.std_mean(pixels, dim=(0, 2, 3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier(mean.float(), std.float().clamp(min=1.0), classes)
    classifier.to(memory_format=torch.channels_last)
    steps_per_epoch = math.ceil(len(images) / BATCH_SIZE)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, epochs=EPOCHS, steps_per_epoch=steps_per_epoch
    )
    with Bar(total=EPOCHS * steps_per_epoch, desc="classifier", disable=not progress) as bar:
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(images), generator=generator).tensor_split(steps_per_epoch):
                scores = classifier(_moved(images[rows].float(), generator))
                loss = F.cross_entropy(scores, labels[rows], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return classifier.eval()


def _moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Float images (B, C, H, W), each turned, scaled and shifted a little; what comes in at the border repeats it."""

    def uniform(limit: float) -> Tensor:
        return (torch.rand(len(images), generator=generator) * 2 - 1) * limit

    angle, scale = uniform(math.radians(10)), 1 + uniform(0.1)
    aspect = images.shape[-1] / images.shape[-2]
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = (torch.stack([cos, -sin / aspect, uniform(1 / 7)], 1), torch.stack([sin * aspect, cos, uniform(1 / 7)], 1))
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
