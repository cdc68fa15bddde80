"""`reglue evaluate`: how close images are to a reference, by the features of a vision encoder."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from tyro.conf import Positional

from reglue.data.images import ImageFolder, UnreadableImage, crop_to
from reglue.data.images import ImageSource as Images
from reglue.data.store import MANIFEST, Store
from reglue.errors import UserError
from reglue.files import replacing
from reglue.jobs.sample import PROTOCOL
from reglue.metrics.distances import GaussianStatistics, frechet_distance, kernel_distance, precision_recall
from reglue.metrics.features import FeatureKind, image_features
from reglue.runs.ranks import resolve_device
from reglue.seeds import generator
from reglue.semantics.encoders import STARTER, EncoderSpec, VisionEncoder, load_encoder

NEIGHBOURS = 3
"""Of precision and recall, as published."""


@dataclass(frozen=True)
class Evaluate:
    """Compare images with a reference: Fréchet distance, kernel distance, precision and recall.

    Images of another size than --resolution are scaled to cover it and cropped, as `reglue prepare` does. Figures can
    be compared only where encoder, features, resolution, reference and numbers of images are the same.
    """

    images: Positional[Path]
    """A folder of images, or a .npz file with uint8 images (N, H, W, 3) as arr_0 or images."""
    reference: Path
    """A store, or again a folder or .npz file. Precision is the share of images that look like this reference."""
    out: Path | None = None
    """Where the report goes, a .json file. Only printed if not given."""
    encoder: str | None = None
    """starter, a short name, timm:NAME, NAME@FILE, a folder or a file of weights. Default: the store's, or starter."""
    features: FeatureKind = "class-token"
    """What stands for an image; patch-mean is the mean over the patches of the last layer."""
    resolution: int | tuple[int, int] | None = None
    """Side, or height and width, at which both are compared. Default: the store's, or that of the first image."""
    kernel_subsets: int = 100
    """The kernel distance is averaged over so many random subsets."""
    kernel_subset_size: int = 1000
    """Images per subset; all, if there are fewer."""
    seed: int = 0
    """Of the subsets."""
    batch_size: int = 64
    """Images described at once. Changes speed and memory; results change by rounding alone."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        for option, least in (("batch_size", 1), ("kernel_subsets", 1), ("kernel_subset_size", 2)):
            if getattr(self, option) < least:
                raise UserError(f"--{option.replace('_', '-')} {getattr(self, option)}: choose at least {least}")


@dataclass(frozen=True)
class Metrics:
    """The figures. Distances: smaller is better; precision and recall: between 0 and 1, larger is better."""

    frechet_distance: float
    kernel_distance: float
    """Mean over the subsets; around 0 for equal distributions, hence sometimes below."""
    kernel_distance_std: float
    """Standard deviation between the subsets."""
    precision: float
    recall: float


@dataclass(frozen=True)
class Evaluation:
    """Everything that a report about images has to say."""

    metrics: Metrics
    images: str
    image_count: int
    reference: str
    reference_count: int
    reference_features: str
    """Where they came from: the store's cache, or computed from its images."""
    skipped: tuple[str, ...]
    """Images of either side that could not be read."""
    encoder: str
    encoder_sha256: str
    features: FeatureKind
    resolution: tuple[int, int]
    """Height and width of what the encoder was shown."""
    kernel_subsets: int
    kernel_subset_size: int
    neighbours: int
    seed: int
    protocol: dict[str, Any] | None
    """How the images were sampled; None if they do not say."""
    warnings: tuple[str, ...]
    versions: dict[str, str]


def evaluate(options: Evaluate) -> Evaluation:
    """Measure, print a table, and write the report. Raises UserError for input that cannot be compared."""
    device = resolve_device(options.device)
    images = _open_images(options.images)
    store = Store.open(options.reference) if (options.reference / MANIFEST).is_file() else None
    reference = None if store else _open_images(options.reference)
    resolution = _resolution(options, images, store)
    encoder = load_encoder(_encoder_name(options, store), resolution, device=device)

    skipped: list[str] = []
    measured = _describe(encoder, images, "images", options, skipped)
    if store and _has_features(store, encoder.spec, options.features):
        origin = "class tokens cached in the store"
        real = store.read("cls", store.originals)["cls"].float()
    else:
        origin = "computed from the images"
        real = _describe(encoder, reference or _images_of(store), "reference", options, skipped)

    for path, count in ((options.images, len(measured)), (options.reference, len(real))):
        if count <= NEIGHBOURS:
            raise UserError(
                f"{path} has {count} readable images; at least {NEIGHBOURS + 1} are needed for a comparison"
            )
    metrics = _measure(measured, real, options, device)
    evaluation = Evaluation(
        metrics=metrics,
        images=str(options.images),
        image_count=len(measured),
        reference=str(options.reference),
        reference_count=len(real),
        reference_features=origin,
        skipped=tuple(skipped),
        encoder=encoder.spec.name,
        encoder_sha256=encoder.spec.weights_sha256,
        features=options.features,
        resolution=resolution,
        kernel_subsets=options.kernel_subsets,
        kernel_subset_size=min(options.kernel_subset_size, len(measured), len(real)),
        neighbours=NEIGHBOURS,
        seed=options.seed,
        protocol=images.protocol(),
        warnings=tuple(_warnings(len(measured), len(real), encoder.spec.width)),
        versions={name: version(name) for name in ("reglue", "torch", "timm", "numpy")},
    )
    print(as_table(evaluation))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(options.out) as beside:
            beside.write_text(json.dumps(asdict(evaluation), indent=1))
    return evaluation


def as_table(evaluation: Evaluation) -> str:
    """The report for people: several lines, no newline at the end."""
    metrics = evaluation.metrics
    protocol = evaluation.protocol or {}
    sampling = protocol.get("sampling", {})
    rows = {
        "Fréchet distance": f"{metrics.frechet_distance:.4f}",
        "kernel distance": f"{metrics.kernel_distance:.6f} ± {metrics.kernel_distance_std:.6f}",
        "precision": f"{metrics.precision:.4f}",
        "recall": f"{metrics.recall:.4f}",
        "images": f"{evaluation.image_count} of {evaluation.images}",
        "reference": f"{evaluation.reference_count} of {evaluation.reference} ({evaluation.reference_features})",
        "features": f"{evaluation.features} of {evaluation.encoder} ({evaluation.encoder_sha256[:12]}), "
        f"{evaluation.resolution[0]}×{evaluation.resolution[1]} pixels",
        "protocol": ", ".join(f"{k} {v}" for k, v in {**sampling, "seed": protocol.get("seed")}.items())
        if protocol
        else "unknown: nothing says how the images were made",
    }
    width = max(map(len, rows))
    return "\n".join([*(f"{name:<{width}}  {value}" for name, value in rows.items()), *evaluation.warnings])


def _measure(measured: Tensor, real: Tensor, options: Evaluate, device: torch.device) -> Metrics:
    gaussians = [GaussianStatistics(side.shape[1]).update(side) for side in (measured, real)]
    kernel = kernel_distance(
        measured,
        real,
        subsets=options.kernel_subsets,
        subset_size=options.kernel_subset_size,
        generator=generator(options.seed, "kernel distance"),
    )
    shares = precision_recall(generated=measured.to(device), real=real.to(device), neighbours=NEIGHBOURS)
    return Metrics(frechet_distance(*gaussians), kernel.mean, kernel.std, shares.precision, shares.recall)


def _warnings(images: int, reference: int, width: int) -> Iterator[str]:
    for name, count in (("images", images), ("reference", reference)):
        if count < width:
            yield (
                f"warning: {count} {name} for {width} features: the covariance is singular and the Fréchet distance "
                "biased; compare it only with figures from as many images"
            )


class ImageSource(Protocol):
    """Images of one side, readable in batches."""

    def __len__(self) -> int: ...

    def first_size(self) -> tuple[int, int]:
        """Height and width of the first image."""
        ...

    def batches(self, resolution: tuple[int, int], size: int) -> Iterator[list[Tensor | UnreadableImage]]:
        """At most `size` images at a time, each uint8 (3, *resolution) or why it cannot be read."""
        ...

    def protocol(self) -> dict[str, Any] | None:
        """How they were sampled, if they say."""
        ...


@dataclass(frozen=True)
class _FolderImages:
    folder: Images

    def __len__(self) -> int:
        return len(self.folder)

    def first_size(self) -> tuple[int, int]:
        path = self.folder.path / self.folder.names[0]
        try:
            with Image.open(path) as image:
                return image.height, image.width
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error}); mend it, or set --resolution") from error

    def batches(self, resolution: tuple[int, int], size: int) -> Iterator[list[Tensor | UnreadableImage]]:
        for start in range(0, len(self), size):
            yield [self.folder.load(i, resolution) for i in range(start, min(start + size, len(self)))]

    def protocol(self) -> dict[str, Any] | None:
        path = self.folder.path / PROTOCOL
        return _read_protocol(path.read_text(), path) if path.is_file() else None


class _NpzImages:
    """The images of an .npz file, streamed: the array is never whole in memory."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                member = next((name for name in ("arr_0.npy", "images.npy") if name in names), None)
                if member is None:
                    raise UserError(f"{path} has no array arr_0 or images; it has {', '.join(names) or 'nothing'}")
                with archive.open(member) as file:
                    shape, fortran, dtype = _read_header(file)
        except (zipfile.BadZipFile, ValueError) as error:
            raise UserError(f"{path} is not a whole .npz file: {error}") from error
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
            raise UserError(f"{path}: {member} is {dtype} {shape}, but images are uint8 (N, H, W, 3) in C order")
        if 0 in shape:
            raise UserError(f"{path}: {member} holds no images, its shape is {shape}")
        self.member, self.shape = member, shape

    def __len__(self) -> int:
        return self.shape[0]

    def first_size(self) -> tuple[int, int]:
        return self.shape[1], self.shape[2]

    def batches(self, resolution: tuple[int, int], size: int) -> Iterator[list[Tensor | UnreadableImage]]:
        bytes_per_image = int(np.prod(self.shape[1:]))
        with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
            _read_header(file)
            for start in range(0, len(self), size):
                count = min(size, len(self) - start)
                try:
                    content = file.read(count * bytes_per_image)
                except (zipfile.BadZipFile, OSError, EOFError) as error:
                    raise UserError(f"{self.path} is damaged: {error}") from error
                if len(content) < count * bytes_per_image:
                    raise UserError(f"{self.path} is cut short: {self.member} ends within image {start + count - 1}")
                pixels = np.frombuffer(content, dtype=np.uint8).reshape(count, *self.shape[1:])
                yield [_to_size(image, resolution) for image in pixels]

    def protocol(self) -> dict[str, Any] | None:
        with np.load(self.path, allow_pickle=False) as arrays:
            if "protocol" not in arrays.files:
                return None
            try:
                text = str(arrays["protocol"])
            except ValueError as error:
                raise UserError(f"{self.path}: protocol is not text: {error}") from error
        return _read_protocol(text, self.path)


def _open_images(path: Path) -> ImageSource:
    if path.suffix == ".npz":
        if not path.is_file():
            raise UserError(f"{path}: no such file; give a folder of images, or an .npz file")
        return _NpzImages(path)
    return _FolderImages(ImageFolder.open(path))


def _images_of(store: Store | None) -> ImageSource:
    """The images that a store was made from. Raises UserError if they are gone or others."""
    assert store is not None
    source = store.manifest.source
    try:
        return _FolderImages(replace(source, flips=False).open())
    except UserError as error:
        need = f"the store {store.folder} holds no such features, so its images are needed"
        raise UserError(f"{error}; {need}; put them back, or use the store's encoder") from error


def _encoder_name(options: Evaluate, store: Store | None) -> str:
    if options.encoder:
        return options.encoder
    return store.manifest.encoder.name if store and store.manifest.encoder else STARTER


def _resolution(options: Evaluate, images: ImageSource, store: Store | None) -> tuple[int, int]:
    if options.resolution is not None:
        chosen = options.resolution
        return (chosen, chosen) if isinstance(chosen, int) else chosen
    return store.manifest.source.resolution if store else images.first_size()


def _has_features(store: Store, spec: EncoderSpec, kind: FeatureKind) -> bool:
    """Whether the store's class tokens are what the encoder would say. Choices for the patches do not matter."""
    cached = store.manifest.encoder
    if kind != "class-token" or cached is None:
        return False
    return replace(cached, layers=spec.layers, final_norm=spec.final_norm) == spec


def _describe(encoder: VisionEncoder, images: ImageSource, name: str, options: Evaluate, skipped: list[str]) -> Tensor:
    def batches() -> Iterator[Tensor]:
        with tqdm(total=len(images), unit="image", desc=name) as progress:
            for batch in images.batches(encoder.spec.image_size, options.batch_size):
                for image in batch:
                    if isinstance(image, UnreadableImage):
                        tqdm.write(f"skipped {image.name} of the {name}: {image.reason}", file=sys.stderr)
                        skipped.append(image.name)
                readable = [image for image in batch if isinstance(image, Tensor)]
                if readable:
                    yield torch.stack(readable)
                progress.update(len(batch))

    return image_features(encoder, batches(), options.features)


def _to_size(image: np.ndarray, resolution: tuple[int, int]) -> Tensor:
    if image.shape[:2] != resolution:
        image = np.asarray(crop_to(Image.fromarray(image), resolution))
    return torch.tensor(image).permute(2, 0, 1)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and type of the array that begins here; leaves the file at its first number."""
    version_read = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version_read == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _read_protocol(text: str, path: Path) -> dict[str, Any]:
    try:
        protocol = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: the protocol is not JSON ({error}); mend or remove it") from error
    if not isinstance(protocol, dict):
        raise UserError(f"{path}: the protocol is not a JSON object; mend or remove it")
    return protocol
