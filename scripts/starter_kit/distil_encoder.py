"""Distil the starter kit's vision encoder from the last four layers of a larger one.

    python scripts/starter_kit/distil_encoder.py --images imagenette-224.tar --teacher dinov2-s@FILE --out encoder

Each of the student's last four layers predicts one of the teacher's last four through a linear head of its own, and so
does the class token; the heads are thrown away. So "the last four layers" of the student differ as the teacher's do.
Both see the same views, cut to the same grid of patches. The teacher describes them once, before the training.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
import tyro
from numpy.typing import NDArray
from safetensors.torch import save_file
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from views import random_view, read_images, to_array

from reglue.encoders.vision import VisionEncoder, load_encoder


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
    save_minutes: float = 6.0
    """Write what there is after so many minutes, and again after as many."""
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


ARCHITECTURE = "vit_tiny_patch16_224"
"""timm's entry whose sizes the arguments override."""


def distil_encoder(options: DistilEncoder) -> None:
    """Describe views with the teacher, train the student on them, save it."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)

    teacher = load_encoder(options.teacher, options.teacher_size)
    photographs, _ = read_images(options.images, "train", options.image_limit)
    order = np.concatenate([rng.permutation(len(photographs)) for _ in range(-(-options.views // len(photographs)))])
    views = np.empty((options.views, 3, options.teacher_size, options.teacher_size), np.uint8)
    for row in tqdm(range(options.views), desc="views"):
        view = random_view(photographs[order[row]], options.teacher_size, options.shape_share, rng)
        views[row] = to_array([view])[0]
    del photographs

    class_tokens, features = describe_all(teacher, views, options.teacher_minutes)
    count = len(features)
    views = views[:count]
    targets = Targets(class_tokens, features)
    inputs = student_inputs(views, options.size)
    small_inputs = student_inputs(views, options.size // 2)
    del views

    grid = teacher.spec.grid
    model_args: dict[str, Any] = {
        "img_size": options.size,
        "patch_size": options.size // grid[0],
        "embed_dim": options.width,
        "depth": options.depth,
        "num_heads": options.heads,
    }
    student = timm.create_model(ARCHITECTURE, num_classes=0, **model_args)
    assert isinstance(student, VisionTransformer)
    teacher_width, layers = teacher.spec.width, len(teacher.spec.layers)
    heads = nn.ModuleList(nn.Linear(options.width, teacher_width) for _ in range(layers + 1))
    mean, std = teacher.image_mean, teacher.image_std

    parameters = [*student.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        options.learning_rate,
        betas=(0.9, 0.98),
    )
    start, step, elapsed, saves, row = time.monotonic(), 0, 0.0, 1, count
    order = np.arange(count)
    with tqdm(total=100, desc="training", unit="%") as progress:
        while elapsed < 1:
            if row + options.batch_size > count:
                order, row = rng.permutation(count), 0
            rows = torch.from_numpy(order[row : row + options.batch_size])
            row += options.batch_size

            pixels = small_inputs[rows] if rng.random() < options.small_share else inputs[rows]
            flip = bool(rng.random() < 0.5)
            pixels = pixels.flip(-1) if flip else pixels
            images = F.interpolate((pixels / 255 - mean) / std, (options.size, options.size), mode="bicubic")
            described = student.forward_intermediates(images, indices=layers, norm=True, output_fmt="NLC")
            final, tokens = cast(tuple[Tensor, list[Tensor]], described)
            class_token, wanted = targets.take(rows, grid, flip)
            predicted = torch.cat([head(token) for head, token in zip(heads, tokens, strict=False)], dim=-1)
            patch_loss = F.mse_loss(predicted, wanted)
            class_loss = F.mse_loss(heads[layers](final[:, 0]), class_token)
            loss = patch_loss + class_loss

            for group in optimiser.param_groups:
                group["lr"] = options.learning_rate * min(1.0, (step + 1) / 100) * (1 - elapsed)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()

            step += 1
            elapsed = (time.monotonic() - start) / (60 * options.minutes)
            progress.update(100 * elapsed - progress.n)
            progress.set_postfix(step=step, patches=f"{patch_loss:.3f}", class_token=f"{class_loss:.3f}")
            if elapsed * options.minutes > saves * options.save_minutes:
                save_timm_folder(options.out, student, model_args, mean, std)
                saves += 1

    print(f"{step} steps with {options.batch_size} views each")
    save_timm_folder(options.out, student, model_args, mean, std)


class Targets:
    """The teacher's class tokens and features, standardised per channel when they are taken."""

    def __init__(self, class_tokens: Tensor, features: Tensor):
        """Take float16 (N, D) and (N, patches, layers·D)."""
        self.class_tokens, self.features = class_tokens, features
        sample = features[:1000].double()
        self.feature_mean, self.feature_std = sample.mean((0, 1)).float(), sample.std((0, 1)).float()
        self.class_mean = class_tokens.double().mean(0).float()
        self.class_std = class_tokens.double().std(0).float()

    def take(self, rows: Tensor, grid: tuple[int, int], flip: bool) -> tuple[Tensor, Tensor]:
        """Class tokens (B, D) and features (B, patches, layers·D), standardised; flipped as the images are.

        The teacher's features of a flipped image are nearly its features flipped, which doubles the views for nothing.
        """
        features = self.features[rows].unflatten(1, grid)
        features = (features.flip(2) if flip else features).flatten(1, 2)
        return (
            (self.class_tokens[rows] - self.class_mean) / self.class_std,
            (features - self.feature_mean) / self.feature_std,
        )


def describe_all(teacher: VisionEncoder, views: NDArray[np.uint8], minutes: float) -> tuple[Tensor, Tensor]:
    """The teacher's class tokens (N, D) and features (N, patches, layers·D), in float16; as many as there is time."""
    spec = teacher.spec
    class_tokens = torch.empty(len(views), spec.width, dtype=torch.float16)
    features = torch.empty(len(views), spec.grid[0] * spec.grid[1], spec.feature_channels, dtype=torch.float16)
    batch, start = 32, time.monotonic()
    for row in tqdm(range(0, len(views), batch), desc="teacher"):
        described = teacher.describe(torch.from_numpy(views[row : row + batch]))
        class_tokens[row : row + batch] = described.class_token
        features[row : row + batch] = described.features.flatten(2).mT
        if time.monotonic() - start > 60 * minutes:
            return class_tokens[: row + batch], features[: row + batch]
    return class_tokens, features


def student_inputs(views: NDArray[np.uint8], size: int) -> Tensor:
    """The views reduced to size × size, as uint8."""
    reduced = [
        F.interpolate(chunk.float(), (size, size), mode="bilinear", antialias=True).round().byte()
        for chunk in torch.from_numpy(views).split(256)
    ]
    return torch.cat(reduced)


def save_timm_folder(folder: Path, model: nn.Module, model_args: dict[str, Any], mean: Tensor, std: Tensor) -> None:
    """Write `config.json` and `model.safetensors` (float16)."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "model_args": model_args,
        "pretrained_cfg": {
            "mean": [round(value, 6) for value in mean.flatten().tolist()],
            "std": [round(value, 6) for value in std.flatten().tolist()],
            "input_size": [3, model_args["img_size"], model_args["img_size"]],
            "interpolation": "bicubic",
            "first_conv": "patch_embed.proj",
            "license": "apache-2.0",
        },
        "reglue_input": {"image_pixels_per_patch": model_args["patch_size"], "minimum_input": model_args["img_size"]},
    }
    weights = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    distil_encoder(tyro.cli(DistilEncoder))
