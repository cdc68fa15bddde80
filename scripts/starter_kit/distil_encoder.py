"""Distil the starter kit's vision encoder from the last four layers of a larger one.

    python scripts/starter_kit/distil_encoder.py --images imagenette-224.tar --teacher dinov2-s@FILE --out encoder

Each of the student's last four layers predicts one of the teacher's through a linear head of its own, and so does the
class token; the heads are thrown away. Both see the same views, cut to the same grid of patches. The teacher describes
them once, before the training.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
import tyro
from safetensors.torch import save_file
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from views import random_view, read_images, to_tensor

from reglue.encoders.vision import VisionEncoder, load_encoder

ARCHITECTURE = "vit_tiny_patch16_224"
"""timm's entry whose sizes the arguments override."""


@dataclass(frozen=True)
class DistilEncoder:
    """Options of the distillation."""

    images: Path
    """A tar file or a folder laid out as train/class/image."""
    teacher: str
    """Any encoder with one patch per 16 image pixels, as `load_encoder` names it."""
    out: Path
    """Folder to write, in timm's layout."""
    minutes: float = 15.0
    """Time to train, after the teacher's features are there; the learning rate falls to zero over it."""
    views: int = 10_000
    """Crops and shapes that the teacher describes, at most."""
    teacher_minutes: float = 10.0
    """Time for the teacher; views that it has not described by then are left out."""
    image_limit: int = 10_000
    """Photographs to read."""
    teacher_size: int = 128
    """Side of the views that the teacher describes, in pixels."""
    size: int = 64
    """Side of the student's input in pixels."""
    shape_share: float = 0.25
    """Share of views that are bright shapes on a dark ground."""
    small_share: float = 0.3
    """Share of batches seen at half the size and enlarged, as prepared images of half the input size are."""
    batch_size: int = 32
    learning_rate: float = 1.5e-3
    width: int = 128
    depth: int = 6
    heads: int = 4
    threads: int = 1
    seed: int = 0


def distil_encoder(options: DistilEncoder) -> None:
    """Describe views with the teacher, train the student on them, save it."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)

    teacher = load_encoder(options.teacher, options.teacher_size)
    photographs = read_images(options.images, "train", options.image_limit)
    order = np.concatenate([rng.permutation(len(photographs)) for _ in range(-(-options.views // len(photographs)))])
    views = torch.stack(
        [
            to_tensor(random_view(photographs[row], options.teacher_size, options.shape_share, rng))
            for row in tqdm(order[: options.views], desc="views")
        ]
    )
    class_tokens, features = describe(teacher, views, options.teacher_minutes)
    count = len(features)
    inputs, small_inputs = (reduced(views[:count], size) for size in (options.size, options.size // 2))

    grid = teacher.spec.grid
    sizes: dict[str, Any] = {
        "img_size": options.size,
        "patch_size": options.size // grid[0],
        "embed_dim": options.width,
        "depth": options.depth,
        "num_heads": options.heads,
    }
    student = timm.create_model(ARCHITECTURE, num_classes=0, **sizes)
    assert isinstance(student, VisionTransformer)
    layers = len(teacher.spec.layers)
    heads = nn.ModuleList(nn.Linear(options.width, teacher.spec.width) for _ in range(layers + 1))
    parameters = [*student.parameters(), *heads.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, options.learning_rate, betas=(0.9, 0.98))

    start, step, elapsed, row = time.monotonic(), 0, 0.0, count
    with tqdm(total=100, desc="training", unit="%") as progress:
        while elapsed < 1:
            if row + options.batch_size > count:
                order, row = rng.permutation(count), 0
            rows = torch.from_numpy(order[row : row + options.batch_size])
            row += options.batch_size

            pixels = small_inputs[rows] if rng.random() < options.small_share else inputs[rows]
            # The teacher's features of a flipped image are nearly its features flipped: twice the views for nothing.
            flip = bool(rng.random() < 0.5)
            pixels = pixels.flip(-1) if flip else pixels
            wanted = features[rows].unflatten(1, grid)
            wanted = (wanted.flip(2) if flip else wanted).flatten(1, 2)
            normalised = (pixels / 255 - teacher.image_mean) / teacher.image_std
            images = F.interpolate(normalised, (options.size, options.size), mode="bicubic")
            described = student.forward_intermediates(images, indices=layers, norm=True, output_fmt="NLC")
            final, tokens = cast(tuple[Tensor, list[Tensor]], described)
            predicted = torch.cat([head(token) for head, token in zip(heads, tokens, strict=False)], dim=-1)
            patch_loss = F.mse_loss(predicted, wanted.float())
            class_loss = F.mse_loss(heads[layers](final[:, 0]), class_tokens[rows].float())

            for group in optimiser.param_groups:
                group["lr"] = options.learning_rate * min(1.0, (step + 1) / 100) * (1 - elapsed)
            optimiser.zero_grad()
            (patch_loss + class_loss).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()

            step += 1
            elapsed = (time.monotonic() - start) / (60 * options.minutes)
            progress.update(100 * elapsed - progress.n)
            progress.set_postfix(step=step, patches=f"{patch_loss:.3f}", class_token=f"{class_loss:.3f}")
    print(f"{step} steps with {options.batch_size} views each")
    save_timm_folder(options.out, student, sizes, teacher)


@torch.no_grad()
def describe(teacher: VisionEncoder, views: Tensor, minutes: float) -> tuple[Tensor, Tensor]:
    """The teacher's class tokens (N, D) and features (N, patches, layers·D) in float16, standardised per channel.

    Of as many views (N, 3, H, W) uint8 as there is time for.
    """
    class_tokens: list[Tensor] = []
    features: list[Tensor] = []
    start = time.monotonic()
    for batch in tqdm(views.split(32), desc="teacher"):
        described = teacher.describe(batch)
        class_tokens.append(described.class_token.half())
        features.append(described.features.flatten(2).mT.half())
        if time.monotonic() - start > 60 * minutes:
            break
    return standardised(torch.cat(class_tokens)), standardised(torch.cat(features))


def standardised(values: Tensor) -> Tensor:
    """Values (N, …, channels) with mean 0 and deviation 1 of each channel, by the first thousand."""
    sample = values[:1000].flatten(0, -2).double()
    return ((values - sample.mean(0)) / sample.std(0)).half()


def reduced(views: Tensor, size: int) -> Tensor:
    """The views at size × size, uint8."""
    parts = (F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True) for part in views.split(256))
    return torch.cat([part.round().byte() for part in parts])


def save_timm_folder(folder: Path, model: nn.Module, sizes: dict[str, Any], teacher: VisionEncoder) -> None:
    """Write `config.json` and `model.safetensors` (float16)."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "model_args": sizes,
        "pretrained_cfg": {
            "mean": teacher.spec.image_mean,
            "std": teacher.spec.image_std,
            "input_size": [3, sizes["img_size"], sizes["img_size"]],
            "interpolation": "bicubic",
            "first_conv": "patch_embed.proj",
            "license": "apache-2.0",
        },
        "reglue_input": {"image_pixels_per_patch": sizes["patch_size"], "minimum_input": sizes["img_size"]},
    }
    weights = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    distil_encoder(tyro.cli(DistilEncoder, description=__doc__))
