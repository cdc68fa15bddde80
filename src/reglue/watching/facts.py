"""What `reglue info` says and shows of each kind of folder and file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch

from reglue import graphs
from reglue.arrays import ArrayFile
from reglue.contact_sheet import picture as picture_name
from reglue.data.images import crop_to, decode
from reglue.data.manifest import MANIFEST, PARTIAL, Contents, read_manifest
from reglue.data.pictures import colours_of, enlarge
from reglue.data.store import Store
from reglue.editing.folder import read_record
from reglue.editing.options import SHEET
from reglue.editing.painting import load_prototypes
from reglue.encoders.autoencoders import AutoencoderSpec
from reglue.errors import UserError, one_line
from reglue.files import opened_tensors, read_json
from reglue.perception import records
from reglue.perception.heads import TRAINING as HEAD_RECORD
from reglue.perception.heads import load_head
from reglue.perception.records import HeadRecord
from reglue.portable import pipeline_record
from reglue.published.containers import read_official
from reglue.published.sharing import PREVIEWS, REPORTS
from reglue.reals.record import RECORD as TRAINING_RECORD
from reglue.reals.record import TrainingRecord
from reglue.run import RunRecord
from reglue.samples import PROTOCOL, archived_protocol, read_protocol
from reglue.sampling import Sampling
from reglue.training import checkpoints, tracking
from reglue.watching import words
from reglue.watching.rows import newest_figure, size_of
from reglue.watching.words import counted, listed

REMEDY = "see `reglue verify`"
SHOWN = 16
"""Pictures of one thing at most."""
ENLARGED = 96
"""Pixels to a side that small pictures are enlarged to."""
IMAGE_CLASSES = "classes"


def run(folder: Path) -> dict[str, str]:
    """What a run is, and how far it has come."""
    record, saved = RunRecord.read(folder), checkpoints.steps(folder)
    said = words.recipe(record, parameters(folder))
    if record.class_names:
        said[IMAGE_CLASSES] = listed(record.class_names)
    if line := tracking.newest(folder, "loss"):
        rate = line.get("images_per_second")
        said["loss"] = f"{line['loss']:.4g} at step {line['step']:,}" + (
            f", {rate:.4g} images/s" if isinstance(rate, int | float) else ""
        )
    said["checkpoints"] = listed([f"{step:,}" for step in saved]) or "none yet"
    if (folder / graphs.DESCRIPTION).is_file():
        described = graphs.Description.read(folder)
        said["graphs"] = ", ".join(f"{g.file} ({words.size(g.bytes)}, {g.apart})" for g in described.graphs)
    said["previews"] = counted(len([*folder.glob(f"{PREVIEWS}/*.png")]), "picture")
    if figure := newest_figure(folder):
        said["figures"] = f"{figure}, of {counted(len([*folder.glob(f'{REPORTS}/*.json')]), 'report')}"
    return {**said, **words.provenance(record), "size": words.size(size_of(folder))}


def pipeline(folder: Path) -> dict[str, str]:
    """What the run in a pipeline of diffusers is."""
    record, step = pipeline_record(folder)
    said = words.recipe(record)
    if record.class_names:
        said[IMAGE_CLASSES] = listed(record.class_names)
    return {**said, "step": f"{step:,}", **words.provenance(record), "size": words.size(size_of(folder))}


def parameters(folder: Path) -> int:
    """How many numbers the averaged weights of a run's last checkpoint have; 0 without one.

    Those of the projector, which sampling does without, are not counted.
    """
    saved = checkpoints.steps(folder)
    file = checkpoints.find(folder, saved[-1]) / checkpoints.EMA if saved else None
    if file is None or not file.is_file():
        return 0
    with opened_tensors(file, REMEDY, sealed=False) as opened:
        shapes = [opened.get_slice(name).get_shape() for name in opened.keys() if not name.startswith("projector")]  # noqa: SIM118
    return sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes)


def newest_preview(folder: Path) -> list[np.ndarray]:
    """The last preview of a training."""
    files = sorted(folder.glob(f"{PREVIEWS}/*.png")) or [file for file in [folder / "samples.png"] if file.is_file()]
    return [_pixels(file) for file in files[-1:]]


def store(folder: Path) -> dict[str, str]:
    """What a store holds."""
    if not (folder / MANIFEST).is_file():
        asked = read_json(folder / PARTIAL, Contents, REMEDY)
        return {"state": "half-written: the same `reglue prepare` finishes it", **_contents(asked)}
    manifest = read_manifest(folder)
    rows = sum(shard.rows for shard in manifest.columns["label"].shards)
    skipped = f", {counted(len(manifest.skipped), 'more')} unreadable" if manifest.skipped else ""
    mirrored = ", each with its mirror image" if manifest.source.flips else ""
    said = {"images": f"{rows:,} of {words.pixels(manifest.source.resolution)}{mirrored}{skipped}"}
    if manifest.source.class_names:
        labels = Store(folder, manifest).labels
        counts = torch.bincount(labels, minlength=len(manifest.source.class_names)).tolist()
        named = [f"{name} ({n:,})" for name, n in zip(manifest.source.class_names, counts, strict=False)]
        said[IMAGE_CLASSES] = f"{len(named):,}: {listed(named)}"
    for name, column in sorted(manifest.columns.items()):
        tensors = ", ".join(
            f"{tensor} {'×'.join(map(str, spec.shape)) or 'one number'} {spec.dtype}"
            for tensor, spec in column.tensors.items()
        )
        size = words.size(sum(shard.bytes for shard in column.shards))
        said[f"column {name}"] = f"{tensors}; {size} in {counted(len(column.shards), 'file')}"
    for name, spec in manifest.compressors.items():
        said[f"compressor {name}"] = f"{spec.kind}, {spec.channels_in} to {counted(spec.channels, 'channel')}"
    return {
        **said,
        **_contents(manifest),
        "versions": words.versions(manifest.versions),
        "hash": manifest.hash,
        "size": words.size(size_of(folder)),
    }


def _contents(asked: Contents) -> dict[str, str]:
    said = {"from": asked.source.path, "autoencoder": _autoencoder(asked.autoencoder)}
    if asked.encoder:
        layers = ", ".join(str(layer + 1) for layer in asked.encoder.layers)
        said["vision encoder"] = f"{asked.encoder.name}, {asked.encoder.width} wide, blocks {layers}"
    return said


def _autoencoder(spec: AutoencoderSpec) -> str:
    return f"{spec.name}, {counted(spec.latent_channels, 'channel')} at 1/{spec.downsampling} of the size"


def stored_images(folder: Path) -> list[np.ndarray]:
    """Some of a store's images where they still lie in the folder that they came from; else its latents as colours."""
    if not (folder / MANIFEST).is_file():
        return []
    opened = Store.open(folder)
    rows = torch.linspace(0, len(opened) - 1, min(SHOWN, len(opened))).long()
    manifest = opened.manifest
    files = [Path(manifest.source.path) / name for name in opened.names(rows)]
    with suppress(Exception):  # Whatever Pillow raises for what has gone or been damaged since.
        return enlarged([np.asarray(crop_to(decode(file), manifest.source.resolution)) for file in files])
    return enlarged([*opened.as_colours(rows)])


def autoencoder(folder: Path) -> dict[str, str]:
    """What an autoencoder that is trained here is, and how far it has come."""
    record = read_json(folder / TRAINING_RECORD, TrainingRecord, REMEDY)
    recipe, line = record.recipe, tracking.newest(folder, "loss")
    said = {
        "images": f"{words.pixels(record.resolution)}, from {record.images}",
        "began with": record.source.name if record.source else "random weights",
        "trained": words.optimisation(recipe.optimisation),
        "vision encoder": record.encoder.name,
    }
    if line:
        said["loss"] = f"{line['loss']:.4g} at step {line['step']:,}"
    done = record.steps_done
    said["state"] = f"finished after {counted(done, 'step')}" if done else "in training: the same command continues it"
    if record.figures:
        said["figures"] = ", ".join(f"{name} {value:.4g}" for name, value in record.figures.items())
    said["checkpoints"] = listed([f"{step:,}" for step in checkpoints.steps(folder)]) or "none yet"
    return {
        **said,
        "seed": str(record.seed),
        "versions": words.versions(record.versions),
        "size": words.size(size_of(folder)),
    }


def head(folder: Path) -> dict[str, str]:
    """What a head predicts, from what, and how well."""
    spec = load_head(folder).spec
    layers = ", ".join(str(layer + 1) for layer in spec.layers)
    classes = counted(spec.outputs, "class", "classes")
    named = f" ({listed(spec.class_names)})" if spec.class_names else ""
    said = {
        "predicts": f"{classes}{named}" if spec.task == "segmentation" else "depth",
        "reads": f"blocks {layers} of {spec.encoder or spec.architecture}, {spec.width} wide",
        "hidden": counted(spec.hidden, "channel") if spec.hidden else "none: it is linear",
    }
    if (folder / HEAD_RECORD).is_file():
        record = read_json(folder / HEAD_RECORD, HeadRecord, REMEDY)
        scores = ", ".join(f"{name.replace('_', ' ')} {score.value or 0:.3f}" for name, score in record.scores.items())
        said |= {
            "scores": f"{scores}, on {counted(record.measured, 'image')}",
            "fitted to": counted(record.fitted, "image"),
        }
    return {**said, "size": words.size(size_of(folder))}


def samples(folder: Path) -> dict[str, str]:
    """How the images of a folder were drawn."""
    return {**_protocol(read_protocol(folder / PROTOCOL)), "size": words.size(size_of(folder))}


def _protocol(protocol: dict) -> dict[str, str]:
    names, labels = protocol.get("class_names", []), protocol.get("labels", [])
    said = {"images": counted(len(labels), "image")}
    if names:
        said[IMAGE_CLASSES] = listed([f"{names[label]} ({n:,})" for label, n in sorted(Counter(labels).items())])
    said |= {name: str(protocol[name]) for name in ("run", "recipe", "step", "weights", "seed") if name in protocol}
    with suppress(KeyError, TypeError, UserError):  # Others write other things into theirs.
        said["sampled"] = words.sampling(Sampling(**protocol["sampling"]))
    return said


def first_samples(folder: Path) -> list[np.ndarray]:
    """The first of the images that are there."""
    return _first(folder / picture_name(i) for i in range(len(read_protocol(folder / PROTOCOL)["labels"])))


def edits(folder: Path) -> dict[str, str]:
    """How the images of a folder were edited."""
    record = read_record(folder)
    protocol = {name: value for name, value in record.protocol.items() if name not in ("labels", "class_names")}
    return {
        "images": f"{listed([image.file for image in record.images])}; {counted(record.count, 'edit')} of each",
        **{name: text for name, text in _protocol(protocol).items() if name != "images"},
        **{name: str(value) for name, value in protocol.get("editing", {}).items() if value not in (None, (), [], {})},
        "size": words.size(size_of(folder)),
    }


def sheet(folder: Path) -> list[np.ndarray]:
    """The sheet of edits."""
    return [_pixels(folder / SHEET)] if (folder / SHEET).is_file() else []


def prototypes(folder: Path) -> dict[str, str]:
    """Of which classes there are prototypes."""
    spec = load_prototypes(folder).spec
    found = [f"{label} ({counted(n, 'position')})" for label, n in enumerate(spec.positions) if n]
    return {
        "classes": listed(found),
        "looks": f"{spec.looks} of each class",
        "codes": f"{spec.column}, {counted(spec.compressor.channels, 'channel')}",
        "seed": str(spec.seed),
        "versions": words.versions(spec.versions),
    }


def colours_of_prototypes(folder: Path) -> list[np.ndarray]:
    """Each class's prototypes as colours, a row of looks each."""
    codes = load_prototypes(folder).codes
    return enlarged([*colours_of(codes.transpose(1, 2).unsqueeze(2))])


def dataset(folder: Path) -> dict[str, str]:
    """What a data set that was drawn holds."""
    record, rows = records.read_record(folder), records.read_rows(folder)
    kept = Counter(row.label for row in rows if row.kept)
    return {
        **_protocol(record.protocol),
        "images": f"{sum(kept.values()):,} kept of {len(rows):,} drawn",
        "labels": listed([f"{name or 'none'} ({n:,})" for name, n in sorted(kept.items())]),
        "boxes": listed([f"{name} ({n:,})" for name, n in record.boxes.items()]) or "none",
        "size": words.size(size_of(folder)),
    }


def drawn_images(folder: Path) -> list[np.ndarray]:
    """The first pictures that the record lists."""
    return _first(folder / name for name in sorted(records.read_record(folder).files) if name.endswith(".png"))


def archive(file: Path) -> dict[str, str]:
    """The arrays of an archive, and how its images were drawn if it says so."""
    arrays = ArrayFile(file)
    headers = {name: arrays.header(name) for name in arrays.names}
    said = {f"array {name}": f"{'×'.join(map(str, h.shape)) or 'one'} {h.dtype}" for name, h in headers.items()}
    if protocol := archived_protocol(file):
        said |= {name: text for name, text in _protocol(protocol).items() if text}
    with ZipFile(file) as opened:
        said["size"] = words.size(sum(member.compress_size for member in opened.infolist()))
    return said


def archived_images(file: Path) -> list[np.ndarray]:
    """The first images of an archive, if it has any."""
    arrays = ArrayFile(file)
    header = arrays.header("arr_0") if "arr_0" in arrays.names else None
    if header is None or len(header.shape) != 4 or header.shape[-1] != 3 or header.dtype != np.uint8:
        return []
    return enlarged([*next(arrays.blocks("arr_0", SHOWN), [])])


def published(file: Path) -> dict[str, str]:
    """What a published checkpoint holds; nothing in it is executed."""
    read = read_official(file)
    count = sum(tensor.numel() for tensor in read.weights.values())
    said = {
        "weights": f"{count / 1e6:.1f} million numbers in {counted(len(read.weights), 'tensor')}",
        "step": f"{read.step:,}",
        "tensors": listed([f"{name} {'×'.join(map(str, t.shape))}" for name, t in read.weights.items()], 4),
    }
    said |= {str(name): str(value)[:100] for name, value in islice(read.arguments.items(), words.LISTED)}
    said |= {"note": " ".join(read.notes)} if read.notes else {}
    return {**said, "size": words.size(file.stat().st_size), "next": f"reglue import {file} --out RUN"}


def enlarged(pictures: list[np.ndarray]) -> list[np.ndarray]:
    """Small pictures by a whole number, so that they have some hundred pixels to a side."""
    sides = [(picture.shape[:2], max(1, ENLARGED // max(picture.shape[:2]))) for picture in pictures]
    sizes = [(factor * height, factor * width) for (height, width), factor in sides]
    return [enlarge(picture[None], size)[0] for picture, size in zip(pictures, sizes, strict=True)]


def _first(files: Iterable[Path]) -> list[np.ndarray]:
    """The first of the pictures that are there."""
    return enlarged([_pixels(file) for file in islice(filter(Path.is_file, files), SHOWN)])


def _pixels(file: Path) -> np.ndarray:
    """A picture, uint8 (h, w, 3). Raises UserError if it is damaged."""
    try:
        return np.asarray(decode(file))
    except Exception as error:  # whatever Pillow raises
        raise UserError(f"{file} is damaged ({one_line(error)}); {REMEDY}") from error
