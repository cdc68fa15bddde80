"""What is known of a store: the manifest, and the dataclasses of plain data that it is made of."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from reglue.data.images import ImageSource, UnreadableImage
from reglue.data.opening import open_images
from reglue.data.reading import Reading, Subset
from reglue.encoders.autoencoders import AutoencoderSpec
from reglue.encoders.compressors import CompressorSpec
from reglue.encoders.vision import EncoderSpec
from reglue.errors import UserError
from reglue.files import file_sha256, plain, read_json, to_json, write_text
from reglue.names import CLASS_TOKEN_CODES, LOCAL_CODES
from reglue.overrides import differing
from reglue.sampling import Precision

FORMAT = 1
"""Version of the layout on disk."""
MANIFEST = "manifest.json"
PARTIAL = "manifest.partial.json"
"""In place of the manifest as long as a store is being written: its `Contents`."""
METADATA = "reglue"
"""Key of a shard's metadata: `ShardMetadata` as JSON."""
REMEDY = "prepare the store again"


@dataclass(frozen=True)
class Source:
    """The images that a store was made from."""

    path: str = field(compare=False)
    """Where the images were, as it was given; they may have moved since."""
    fingerprint: str
    """`ImageSource.fingerprint`: of a folder, names and sizes of its files."""
    resolution: tuple[int, int]
    """Height and width in pixels after the crop."""
    class_names: tuple[str, ...]
    """In the order of the labels; empty for an unconditional store."""
    count: int
    """Images that rows are made of: unreadable ones included, and mirror images."""
    reading: Reading = field(default=Reading(), compare=False)
    """How images and labels were found at the path. What came of it is in the fingerprint."""
    subset: Subset | None = None
    """Which of the images were taken; None for all."""
    flips: bool = False
    """Whether each image is followed by its mirror image, whose name ends with `#flipped`."""
    colours: Literal["as stored", "sRGB"] = "as stored"
    """sRGB: images with an ICC profile of their own were brought to it (`data.colours`)."""

    def open(self) -> ImageSource:
        """The images once more, in the same order. Raises UserError if they are gone, or others than they were."""
        images = open_images(Path(self.path), self.reading, self.subset, self.flips)
        if images.fingerprint() != self.fingerprint:
            raise UserError(f"{self.path} has changed since the store was made; prepare the store again")
        return images


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a column."""

    shape: tuple[int, ...]
    """Of one row."""
    dtype: str
    """`float16`, `float32`, `int64` or `int8`."""

    @classmethod
    def of(cls, rows: Tensor) -> TensorSpec:
        """That of a tensor (rows, …)."""
        return cls(tuple(rows.shape[1:]), str(rows.dtype).removeprefix("torch."))

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.dtype}"


@dataclass(frozen=True)
class Shard:
    """One file of a column."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardMetadata:
    """A shard's metadata."""

    format: int
    column: str
    names: list[str]
    """The images of its rows."""


@dataclass(frozen=True)
class Column:
    """What a column holds and where."""

    tensors: dict[str, TensorSpec]
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Statistics:
    """Per channel, over images and positions, in float64. For latents: of mean + std·ξ, ξ standard normal."""

    images: int
    """How many images were looked at."""
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a store is asked to hold. Equal contents give equal stores."""

    source: Source
    autoencoder: AutoencoderSpec
    encoder: EncoderSpec | None
    features: bool
    """Whether the encoder's patch features are stored."""
    latent_dtype: str
    """`float32` or `float16`: how moments are stored."""
    shard_rows: int
    """Images per shard, unreadable ones included."""
    statistics_images: int
    """Statistics are taken over so many images, drawn at random (or over all, if there are fewer)."""
    statistics_seed: int
    precision: Precision = "float32"
    """Of the networks' matrix products."""
    features_dtype: str = "float16"
    """`float16` or `int8`: how patch features are stored."""


@dataclass(frozen=True, kw_only=True)
class Manifest(Contents):
    """Everything about a finished store."""

    format: int
    skipped: tuple[UnreadableImage, ...]
    """Images of the source that have no row."""
    columns: dict[str, Column]
    statistics: dict[str, Statistics]
    compressors: dict[str, CompressorSpec]
    """The codes of compressor NAME are in column `local.NAME`; those of `cls.NAME` in the column of the same name."""
    versions: dict[str, str]
    """Of the libraries that made the store."""
    hash: str = ""
    """SHA-256 of all of the above, hence of all shards too."""


def value_of(column: str) -> str:
    """The tensor of a column that its statistics describe: `mean` for `latent`, otherwise the column's namesake."""
    return "mean" if column == "latent" else column.partition(".")[0]


def holds_codes(column: str) -> bool:
    """Whether a column holds codes: what `reglue compress` adds."""
    return column.startswith((LOCAL_CODES, CLASS_TOKEN_CODES))


def compressor_of(column: str) -> str:
    """Under which name `Manifest.compressors` and the store's folder `compressors` hold the compressor of a column."""
    return column.removeprefix(LOCAL_CODES)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store; no other file is looked at. Raises UserError if it is none, or is half-written."""
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / PARTIAL).is_file():
            raise UserError(f"{folder} is a half-written store; run the same `reglue prepare` again to finish it")
        raise UserError(f"{folder} is not a store: it has no {MANIFEST}; make one with `reglue prepare`")
    manifest = read_json(path, Manifest, REMEDY)
    if manifest.format != FORMAT:
        raise UserError(f"{path} has format {manifest.format}, and this program reads {FORMAT}; {REMEDY}")
    if _hash(read_json(path, dict[str, Any], REMEDY)) != manifest.hash:  # In the file, 1 and 1.0 are two things.
        raise UserError(f"{path} was changed by hand or damaged: its hash does not fit; {REMEDY}")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write a manifest into the folder of its store. Returns it with its hash."""
    manifest = replace(manifest, hash=_hash(plain(manifest)))
    write_text(folder / MANIFEST, to_json(manifest))
    return manifest


def _hash(content: dict[str, Any]) -> str:
    """SHA-256 of the content of a manifest's file, without the hash itself."""
    return hashlib.sha256(json.dumps({**content, "hash": ""}, indent=1).encode()).hexdigest()


def is_whole(folder: Path, shard: Shard) -> bool:
    """Whether a file of a store is there in full size."""
    try:
        return (folder / shard.file).stat().st_size == shard.bytes
    except OSError:
        return False


def is_intact(folder: Path, shard: Shard) -> bool:
    """Whether a file of a store has the hash in the manifest. Reads all of it."""
    return is_whole(folder, shard) and file_sha256(folder / shard.file) == shard.sha256


def refuse_others(folder: Path, has: Contents, asked: Contents) -> None:
    """Raise UserError naming the first thing in which a store differs from what was asked for."""
    shared = {part.name for part in fields(Contents)}  # Either may be the manifest of a store, which has more.
    for path, (new, old) in differing(asked, has).items():
        if path.partition(".")[0] in shared:
            raise UserError(
                f"{folder} was prepared with {path} {_brief(old)}{_model_of(path, has)}, not {_brief(new)}"
                f"{_model_of(path, asked)}; choose another folder, or the same options and images as before"
            )


def _model_of(path: str, contents: Contents) -> str:
    """The user's name for the model that a field such as `encoder.weights_sha256` belongs to."""
    if path.startswith("encoder.") and contents.encoder:
        return f" ({contents.encoder.name})"
    return f" ({contents.autoencoder.name})" if path.startswith("autoencoder.") else ""


def _brief(value: Any) -> str:
    text = value.name if isinstance(value, EncoderSpec) else str(value)
    return text if len(text) <= 60 else text[:57] + "…"
