"""What does alignment do to a latent space, and how strong should the KL term be? (ReaLS, arXiv 2502.00359)

    python scripts/reals_study.py IMAGES --out study --encoder dinov2-b-reg --resolution 256

Trains two autoencoders alike but for the alignment, and the aligned one once for each weight of the KL term. Of each it
measures the reconstruction of held-out images, and how well their class can be read from the latents: a linear probe
and nearest neighbours, on latents averaged over positions and on all of them. Everything is in `results.json`, with
pictures beside it: reconstructions, similarity to a reference patch, t-SNE, the sweep. IMAGES needs a sub-folder per
class. The same command again continues where it stopped; arms that are there already are not done again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from PIL import Image
from sklearn.linear_model import RidgeClassifierCV
from sklearn.manifold import TSNE
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tyro.conf import Positional

from reglue.commands.autoencode import Autoencode, autoencode
from reglue.config import OptimiserConfig
from reglue.data.images import ImageFolder
from reglue.data.pictures import enlarge, heat_of, image_grid
from reglue.encoders.alignment import similarity_maps
from reglue.encoders.autoencoders import Autoencoder, load_autoencoder
from reglue.encoders.vision import VisionEncoder, load_encoder
from reglue.files import replacing
from reglue.reals.config import Architecture, AutoencoderRecipe, Kl, LatentAlignment, Perceptual
from reglue.reals.samples import ImageSamples, all_of, to_images, to_pixels
from reglue.seeds import permutation
from reglue.training.distributed import resolve_device
from reglue.training.tracking import read

SHOWN = 8
"""Images in the pictures."""
NEIGHBOURS = 20
RIDGE_PENALTIES = tuple(np.logspace(-2, 5, 8))
"""Of which the linear probe chooses by leave-one-out cross-validation on the training images."""


@dataclass(frozen=True)
class Study:
    """Options of the study."""

    images: Positional[Path]
    """Images to train on, a sub-folder per class."""
    out: Path = Path("reals-study")
    validation: Path | None = None
    """Held-out images, with the same classes. Default: a tenth of the others."""
    encoder: str = "dinov2-b-reg"
    resolution: int = 64
    kl_weights: tuple[float, ...] = (1e-7, 1e-5, 1e-4, 1e-3, 1e-2)
    """Weights of the KL term of the aligned autoencoder; the first two arms have --kl-weight."""
    kl_weight: float = 1e-5
    alignment: float = 0.5
    """Weight of the alignment, of patches and of the class token."""
    perceptual: float = 0.1
    hidden: int = 256
    """Of the alignment network."""
    widths: tuple[int, ...] = (16, 32, 64)
    latent_channels: int = 8
    layers_per_block: int = 1
    steps: int = 800
    batch_size: int = 16
    learning_rate: float = 5e-4
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products; bfloat16 is 1.4 times as fast on a CPU that knows it."""
    probe_images: int = 5000
    """At most so many training images are used to fit the probes, and so many held-out ones to test them."""
    tsne_images: int = 1000
    reference: tuple[float, float] = (0.5, 0.5)
    """The reference patch of the similarity maps, as shares of height and width."""
    seed: int = 0
    workers: int = 1
    device: str = "auto"


@dataclass(frozen=True)
class Arm:
    """One autoencoder of the study."""

    kl_weight: float
    alignment: float

    @property
    def name(self) -> str:
        """Also of its folder."""
        return f"{'aligned' if self.alignment else 'plain'}-kl-{self.kl_weight:g}"


def study(options: Study) -> None:
    """Train, probe and draw every arm, then the pictures of all of them."""
    pair = [Arm(options.kl_weight, weight) for weight in (0.0, options.alignment)]
    sweep = [Arm(weight, options.alignment) for weight in sorted({*options.kl_weights, options.kl_weight})]
    results = open_results(options)
    device = resolve_device(options.device)
    training, held_out = probe_sets(options)
    for arm in dict.fromkeys([*pair, *sweep]):
        if arm.name in results["arms"]:
            continue
        folder = autoencode(training_of(options, arm))
        autoencoder = load_autoencoder(str(folder), device)
        latents = [latents_of(autoencoder, part, options, device) for part in (training, held_out)]
        figures = next(line["validation"] for line in reversed(read(folder)) if "validation" in line)
        results["arms"][arm.name] = {**asdict(arm), **figures, **probes(latents, (training, held_out))}
        draw_tsne(options, arm, latents[1], held_out)
        write_results(options, results)
        print(json.dumps({"arm": arm.name, **results["arms"][arm.name]}))
    encoder = load_encoder(options.encoder, options.resolution, device=device)
    autoencoders = {arm.name: load_autoencoder(str(options.out / arm.name), device) for arm in pair}
    draw_reconstructions(options, autoencoders, encoder, held_out, device)
    draw_sweep(options, [results["arms"][arm.name] for arm in sweep], results["arms"][pair[0].name])
    print_table(results)


def training_of(options: Study, arm: Arm) -> Autoencode:
    """The job that trains an arm."""
    recipe = AutoencoderRecipe(
        architecture=Architecture(
            options.widths, options.latent_channels, options.layers_per_block, norm_groups=min(32, options.widths[0])
        ),
        perceptual=Perceptual(options.perceptual),
        kl=Kl(arm.kl_weight),
        alignment=LatentAlignment(arm.alignment, class_weight=arm.alignment, hidden=options.hidden),
        optimisation=OptimiserConfig(
            steps=options.steps,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            warmup=min(100, options.steps // 10),
            decay="cosine",
            betas=(0.9, 0.95),
            clip=1.0,
            ema=0.995,
            ema_warmup=True,
            precision=options.precision,
        ),
    )
    return Autoencode(
        options.images,
        options.out / arm.name,
        recipe,
        resolution=options.resolution,
        encoder=options.encoder,
        validation=options.validation or 0.1,
        validation_images=1000,
        seed=options.seed,
        evaluate_every=max(1, options.steps // 4),
        checkpoint_every=max(1, options.steps // 10),
        log_every=max(1, min(100, options.steps // 4)),
        keep=1,
        workers=options.workers,
        device=options.device,
    )


def open_results(options: Study) -> dict[str, Any]:
    """The results so far. Stops if they are of other options."""
    settings = json.loads(json.dumps(asdict(options), default=str))
    for name in ("out", "device", "workers", "kl_weights"):
        del settings[name]
    path = options.out / "results.json"
    if not path.is_file():
        return {"settings": settings, "arms": {}}
    results = json.loads(path.read_text())
    if results["settings"] != settings:
        raise SystemExit(f"{path} is of a study with other options; choose another --out, or the old options")
    return results


def write_results(options: Study, results: dict[str, Any]) -> None:
    """`results.json`, whole or not at all."""
    with replacing(options.out / "results.json") as beside:
        beside.write_text(json.dumps(results, indent=1))


def probe_sets(options: Study) -> tuple[ImageSamples, ImageSamples]:
    """Training and held-out images for the probes, drawn at random; the held-out ones are not trained on."""
    images = ImageFolder.open(options.images)
    if len(images.class_names) < 2:
        raise SystemExit(f"{options.images} has no classes to probe for; give a sub-folder per class")
    others = ImageFolder.open(options.validation) if options.validation else images
    if others.class_names != images.class_names:
        raise SystemExit(f"{options.validation} has other classes than {options.images}")
    # The same draw as that of the training job, which holds out the first.
    order = permutation(options.seed, "autoencoder validation", 0, len(images))
    count = 0 if options.validation else max(2, round(0.1 * len(images)))
    held_out = permutation(options.seed, "probe", 0, len(others)) if options.validation else order[:count]
    size, shape = (options.resolution, options.resolution), (1, 1, 1)
    parts = (("probe", images, order[count:]), ("held-out", others, held_out))
    training, testing = (
        ImageSamples(source, rows[: options.probe_images].sort().values, size, shape, options.seed, purpose)
        for purpose, source, rows in parts
    )
    return training, testing


def labels_of(samples: ImageSamples) -> np.ndarray:
    """(N,) int64."""
    return np.array([samples.images.labels[row] for row in samples.rows.tolist()])


def latents_of(autoencoder: Autoencoder, samples: ImageSamples, options: Study, device: torch.device) -> Tensor:
    """The posterior's means (N, C, h, w), normalised as a diffusion model would see them."""
    batches = all_of(samples, 64, options.workers, device)
    return torch.cat(
        [autoencoder.spec.normalise(autoencoder.encode(to_images(pixels)).mean).cpu() for pixels, _ in batches]
    )


def probes(latents: list[Tensor], sets: tuple[ImageSamples, ImageSamples]) -> dict[str, float]:
    """Accuracy, 0 to 1, on held-out images of a ridge classifier and of nearest neighbours fitted on the others."""
    labels, expected = (labels_of(samples) for samples in sets)
    found: dict[str, float] = {}
    for view, tensors in (("pooled", [x.mean((2, 3)) for x in latents]), ("flat", [x.flatten(1) for x in latents])):
        scaler = StandardScaler().fit(tensors[0].numpy())
        known, asked = (scaler.transform(x.numpy()) for x in tensors)
        linear = RidgeClassifierCV(RIDGE_PENALTIES).fit(known, labels)
        neighbours = KNeighborsClassifier(min(NEIGHBOURS, len(known)), metric="cosine").fit(known, labels)
        found[f"linear_probe_{view}"] = float(linear.score(asked, expected))
        found[f"neighbours_{view}"] = float(neighbours.score(asked, expected))
    return found


def draw_tsne(options: Study, arm: Arm, latents: Tensor, samples: ImageSamples) -> None:
    """Held-out images as points in the plane, coloured by class, by their pooled and by their flat latents."""
    chosen = permutation(options.seed, "t-SNE", 0, len(latents))[: options.tsne_images]
    labels = labels_of(samples)[chosen.numpy()]
    figure = Figure(figsize=(10, 5), layout="constrained")
    views = (("pooled", latents.mean((2, 3))), ("flat", latents.flatten(1)))
    for panel, (view, points) in zip(figure.subplots(1, 2), views, strict=True):
        perplexity = min(30.0, (len(chosen) - 1) / 3)
        plane = TSNE(perplexity=perplexity, random_state=options.seed).fit_transform(points[chosen].numpy())
        for label, name in enumerate(samples.images.class_names):
            panel.scatter(*plane[labels == label].T, s=6, label=name)
        panel.set(title=f"{arm.name}, {view} latents", xticks=[], yticks=[])
    if len(samples.images.class_names) <= 20:
        figure.legend(*panel.get_legend_handles_labels(), loc="outside right upper", fontsize=7)  # type: ignore[arg-type]
    save(figure, options.out / f"tsne-{arm.name}.png")


@torch.no_grad()
def draw_reconstructions(
    options: Study,
    autoencoders: dict[str, Autoencoder],
    encoder: VisionEncoder,
    held_out: ImageSamples,
    device: torch.device,
) -> None:
    """Two pictures of held-out images: originals over each arm's reconstructions, and over maps of the similarity to a
    reference patch, the encoder's first."""
    rows = torch.linspace(0, len(held_out) - 1, min(SHOWN, len(held_out))).long().tolist()
    pixels = torch.stack([replace(held_out, flips=False)[row][0] for row in rows]).to(device)
    encoded = {name: autoencoder.encode(to_images(pixels)).mean for name, autoencoder in autoencoders.items()}
    decoded = [to_pixels(autoencoders[name].decode(latents)) for name, latents in encoded.items()]
    originals = pixels.permute(0, 2, 3, 1).cpu().numpy()
    restored = [images.permute(0, 2, 3, 1).cpu().numpy() for images in decoded]
    features = [encoder.describe(pixels).features[:, -encoder.spec.width :], *encoded.values()]
    size = (options.resolution, options.resolution)
    maps = [enlarge(heat_of(similarity_maps(x, options.reference)), size) for x in features]
    for name, pictures in (("reconstructions", restored), ("similarity", maps)):
        with replacing(options.out / f"{name}.png") as beside:
            grid = image_grid(np.concatenate([originals, *pictures]), columns=len(rows))
            Image.fromarray(grid).save(beside, format="png")


def draw_sweep(options: Study, swept: list[dict[str, float]], plain: dict[str, float]) -> None:
    """Figures of the aligned arms over the weight of the KL term; those of the plain one as a dashed line.

    Arms made by an earlier version may lack some: they are left out there.
    """
    names = [
        "psnr",
        "frechet_distance",
        "kl",
        "patch_cosine",
        "linear_probe_pooled",
        "linear_probe_flat",
        "neighbours_flat",
        "latent_std",
    ]
    figure = Figure(figsize=(12, 5), layout="constrained")
    for panel, name in zip(figure.subplots(2, 4).flat, names, strict=True):
        measured = [arm for arm in swept if name in arm]
        panel.semilogx([arm["kl_weight"] for arm in measured], [arm[name] for arm in measured], marker="o")
        if name in plain:
            panel.axhline(plain[name], linestyle="--", color="grey")
        panel.set(title=name.replace("_", " "), xlabel="weight of KL")
    save(figure, options.out / "kl-sweep.png")


def save(figure: Figure, path: Path) -> None:
    """A plot as PNG, whole or not at all."""
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=110)


def print_table(results: dict[str, Any]) -> None:
    """All arms, one line each."""
    columns = {
        name: name.replace("_", " ")
        for name in ("psnr", "ssim", "frechet_distance", "kl", "patch_cosine", "class_cosine")
    }
    columns |= {f"linear_probe_{view}": f"linear {view}" for view in ("pooled", "flat")}
    columns |= {f"neighbours_{view}": f"kNN {view}" for view in ("pooled", "flat")}
    print("arm".ljust(22) + "".join(title.rjust(17) for title in columns.values()))
    for name, figures in results["arms"].items():
        cells = (f"{figures[column]:.4g}" if column in figures else "–" for column in columns)
        print(name.ljust(22) + "".join(cell.rjust(17) for cell in cells))


if __name__ == "__main__":
    study(tyro.cli(Study, description=__doc__))
