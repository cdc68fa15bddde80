"""Distil the starter kit's vision encoder from the last four layers of a larger one.

    python scripts/starter_kit/distil_encoder.py --images imagenette-224.tar --teacher dinov2-s@FILE --out encoder

Each of the student's last four layers predicts one of the teacher's through a linear head of its own, and so does the
class token; the heads are thrown away. Both see the same views, cut to the same grid of patches.
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
from shared import minimise, random_views
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from reglue.encoders.vision import VisionEncoder, load_encoder

ARCHITECTURE, WIDTH, DEPTH, HEADS = "vit_tiny_patch16_224", 128, 6, 4
"""timm's entry, and what of its sizes is other."""
TEACHER_SIZE, SIZE = 128, 64
"""Side of the views that the teacher describes, and of the student's input, in pixels."""
SMALL = 0.3
"""Share of batches seen at half the size and enlarged, as prepared images of half the input size are."""
BATCH, LEARNING_RATE = 32, 1.5e-3


@dataclass(frozen=True)
class DistilEncoder:
    """Options of the distillation."""

    images: Path
    """A tar file laid out as `train/class/image`."""
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
    threads: int = 1


def distil_encoder(options: DistilEncoder) -> None:
    """Describe views with the teacher, train the student on them, save it."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)

    teacher = load_encoder(options.teacher, TEACHER_SIZE)
    views = random_views(options.images, options.image_limit, options.views, TEACHER_SIZE, rng)
    class_tokens, features = describe(teacher, views, options.teacher_minutes)
    count, grid, layers = len(features), teacher.spec.grid, len(teacher.spec.layers)
    inputs, small_inputs = (reduced(views[:count], size) for size in (SIZE, SIZE // 2))

    sizes: dict[str, Any] = {"img_size": SIZE, "patch_size": SIZE // grid[0], "embed_dim": WIDTH}
    sizes |= {"depth": DEPTH, "num_heads": HEADS}
    student = timm.create_model(ARCHITECTURE, num_classes=0, **sizes)
    assert isinstance(student, VisionTransformer)
    heads = nn.ModuleList(nn.Linear(WIDTH, teacher.spec.width) for _ in range(layers + 1))
    parameters = [*student.parameters(), *heads.parameters()]
    matrices, vectors = ([p for p in parameters if (p.ndim > 1) == matrix] for matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, LEARNING_RATE, betas=(0.9, 0.98))

    per_epoch = count // BATCH
    for step, progress in minimise(optimiser, options.minutes):
        if step % per_epoch == 0:
            order = torch.from_numpy(rng.permutation(count)).split(BATCH)
        rows = order[step % per_epoch]
        pixels = small_inputs[rows] if rng.random() < SMALL else inputs[rows]
        wanted = features[rows].unflatten(1, grid)
        # The teacher's features of a flipped image are nearly its features flipped: twice the views for nothing.
        if rng.random() < 0.5:
            pixels, wanted = pixels.flip(-1), wanted.flip(2)
        normalised = (pixels / 255 - teacher.image_mean) / teacher.image_std
        images = F.interpolate(normalised, (SIZE, SIZE), mode="bicubic")
        described = student.forward_intermediates(images, indices=layers, norm=True, output_fmt="NLC")
        final, tokens = cast(tuple[Tensor, list[Tensor]], described)
        predicted = torch.cat([head(token) for head, token in zip(heads, tokens, strict=False)], dim=-1)
        patch_loss = F.mse_loss(predicted, wanted.flatten(1, 2).float())
        class_loss = F.mse_loss(heads[layers](final[:, 0]), class_tokens[rows].float())
        (patch_loss + class_loss).backward()
        progress.set_postfix(step=step, patches=f"{patch_loss:.3f}", class_token=f"{class_loss:.3f}")
    save_timm_folder(options.out, student, sizes, teacher)


@torch.no_grad()
def describe(teacher: VisionEncoder, views: Tensor, minutes: float) -> tuple[Tensor, Tensor]:
    """The teacher's class tokens (N, D) and features (N, patches, layers·D) in float16, standardised per channel.

    Of as many views (N, 3, H, W) uint8 as there is time for.
    """
    class_tokens, features, start = [], [], time.monotonic()
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
            **{"mean": teacher.spec.image_mean, "std": teacher.spec.image_std, "input_size": [3, SIZE, SIZE]},
            **{"interpolation": "bicubic", "first_conv": "patch_embed.proj", "license": "apache-2.0"},
        },
        "reglue_input": {"image_pixels_per_patch": sizes["patch_size"], "minimum_input": SIZE},
    }
    weights = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    distil_encoder(tyro.cli(DistilEncoder, description=__doc__))
