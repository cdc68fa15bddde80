"""Edits of images in a folder: which ones, the record that goes with them, and the picture that shows them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from reglue.data.images import ImageFolder, crop_to, laid_over, open_picture
from reglue.data.manifest import file_sha256
from reglue.data.picture_writer import write_picture
from reglue.data.pictures import colours_of, enlarge, heat_of, label_colours, titled_grid
from reglue.diffusion.modalities import concatenate_states
from reglue.editing.options import FEATURES, LOCAL, SHEET, DrawEdits, Editing
from reglue.editing.painting import IGNORED
from reglue.editing.subjects import Request, Subject, refuse_lacking
from reglue.errors import UserError
from reglue.files import plain, read_json, refuse_filled, replacing, to_json
from reglue.locks import writing
from reglue.pipeline import load
from reglue.progress import Bar
from reglue.run import RunRecord, find_run
from reglue.samples import PLACES, Drawing, protocol_of, way_to_sample
from reglue.sampling import AutoPrecision
from reglue.seeds import generator
from reglue.training import distributed

RECORD = "edits.json"
REMEDY = "choose another folder, or delete this one and edit the images again"
SHOWN = 8
"""Images on the sheet, and edits of each, at most."""
CELL = 120
"""Least side of an image on the sheet in pixels."""
TINT = np.array([255, 60, 60])
"""Colour that shows where a mask is white."""


@dataclass(frozen=True)
class EditedImage:
    """One of the images that are edited."""

    file: str
    """As it was given; it may have moved since."""
    sha256: str


@dataclass(frozen=True)
class EditsRecord:
    """`edits.json`: everything that decides the edits, and what they are."""

    protocol: dict[str, Any]
    """Of sampling, as samples have it, with the options of editing and the hashes of the files that they name."""
    images: tuple[EditedImage, ...]
    count: int
    """Edits of each image."""
    pictures: dict[str, str]
    """SHA-256 of each edit, by its file; empty until all are drawn."""


def picture(image: int, edit: int) -> str:
    """The name of the file of an edit."""
    return f"{image:06d}-{edit:03d}.png"


def write_edits(options: DrawEdits) -> Path:
    """Draw the edits that are missing, in every process. Returns their folder.

    It gets `JJJJJJ-III.png`, edit i of image j in its size, the sheet and the record. Raises UserError for what cannot
    be, before any network runs, and for a folder with edits of another protocol.
    """
    with writing(options.out):
        return _write_edits(options)


def _write_edits(options: DrawEdits) -> Path:
    rank, processes = distributed.join(options.device)
    editing = Editing(**{part.name: getattr(options, part.name) for part in fields(Editing)})
    record = RunRecord.read(find_run(options.run))
    files = image_files(options.images)
    refuse_lacking(editing, record)
    for file in files:
        Request.of(file, editing, record)
    model = load(
        options.run,
        step=options.step,
        weights=options.weights,
        device=options.device,
        autoencoder=options.autoencoder,
        encoder=options.encoder,
        compile=options.compile,
    )
    default = model.sampling_for(bool(options.classes))
    weaker, sampling = way_to_sample(options, model, default, lambda: precision_before(options.out))
    model.refuse_unfit(editing, sampling, bool(options.classes))
    allowed = [model.label(name) for name in options.classes] or model.labels_of(None, 1)
    drawing = Drawing(model, weaker, sampling, [], options.seed)
    asked = EditsRecord(
        protocol=plain(protocol_of_edits(options, editing, drawing)),
        images=tuple(EditedImage(str(file), file_sha256(file)) for file in files),
        count=options.count,
        pictures={},
    )
    known = create_or_resume(options.out, asked, rank)
    if rank == 0 and (warning := model.warning()):
        tqdm.write(f"warning: {warning}", file=sys.stderr)
    pairs = [(j, i) for j in range(len(files)) for i in range(options.count)]
    mine = [pair for pair in pairs[rank::processes] if not (options.out / picture(*pair)).is_file()]

    def subject(j: int) -> Subject:
        return model.subject(files[j], editing)

    def label(j: int, i: int) -> int:
        random = options.labels == "random"
        return allowed[generator(options.seed, "label", j, i).integers(len(allowed)) if random else i % len(allowed)]

    with Bar(total=len(mine), unit="image", desc="edit", disable=rank > 0) as progress:
        subjects: dict[int, Subject] = {}
        for start in range(0, len(mine), options.batch_size):
            batch = mine[start : start + options.batch_size]
            subjects = {j: subjects.get(j) or subject(j) for j, _ in batch}
            labels = [label(*pair) for pair in batch]
            own = [subjects[j] for j, _ in batch]
            drawn = model.edits(own, batch, labels, editing, sampling, options.seed, len(batch), weaker=weaker)
            for pair, image in zip(batch, drawn, strict=True):
                write_picture(options.out / picture(*pair), image)
                progress.update()
    distributed.barrier()
    if rank == 0:
        if not mine:
            print(f"{options.out} is complete already: {len(pairs)} edits")
        names = [model.record.class_names[label(0, i)] if options.classes else str(i + 1) for i in range(options.count)]
        shown = [subject(j) for j in range(min(len(files), SHOWN))]
        write_picture(options.out / SHEET, sheet(options.out, shown, names, options.labels == "balanced"))
        finish(options.out, known)
    distributed.barrier()
    return options.out


def image_files(given: Sequence[Path]) -> list[Path]:
    """The images that are given, and those of folders by their paths. Raises UserError for a folder without any."""

    def found() -> Iterator[Path]:
        for path in given:
            yield from (path / name for name in ImageFolder.unlabelled(path).names) if path.is_dir() else [path]

    return list(found())


def protocol_of_edits(options: DrawEdits, editing: Editing, drawing: Drawing) -> dict[str, Any]:
    """Everything that decides the edits but the images themselves."""
    model = drawing.model
    named = {part.name: getattr(editing, part.name) for part in fields(Editing)}
    files = {name: value for name, value in named.items() if isinstance(value, Path)}
    encoder = model.image_encoder(FEATURES in editing.held)
    own = protocol_of(options, drawing)
    del own["labels"]
    return {
        **own,
        "classes": list(options.classes),
        "editing": {name: value for name, value in named.items() if name not in files},
        "files_sha256": {
            # Of prototypes and of a head it is their tensors.
            name: file_sha256(next(file.glob("*.safetensors")) if file.is_dir() else file)
            for name, file in files.items()
        },
        "encoder_sha256": encoder.encoder and encoder.encoder.spec.weights_sha256,
        "compressors_sha256": {name: one.weights_sha256() for name, one in encoder.compressors.items()},
    }


def precision_before(folder: Path) -> AutoPrecision | None:
    """The precision in which the edits in a folder were drawn; None if there are none."""
    if not (folder / RECORD).is_file():
        return None
    return (read_record(folder).protocol.get("sampling") or {}).get("precision")


def create_or_resume(folder: Path, asked: EditsRecord, rank: int) -> EditsRecord:
    """Make the folder, or check that its edits are of the same protocol. Raises UserError if they are not.

    Returns the record of all edits, those that are there included.
    """
    path = folder / RECORD
    record = asked
    if path.is_file():
        before = read_record(folder)
        moved = {name: asked.protocol[name] for name, digest in PLACES.items() if before.protocol.get(digest)}
        protocol = {**before.protocol, **moved}
        different = sorted(name for name in asked.protocol if protocol.get(name) != asked.protocol[name])
        if [one.sha256 for one in before.images] != [one.sha256 for one in asked.images]:
            different.append("images")
        complete = all((folder / name).is_file() for name in _expected(asked))
        if different and not (complete and different == ["versions"]):
            raise UserError(f"{folder} holds edits of another protocol ({', '.join(different)}); choose another folder")
        there = {name: digest for name, digest in before.pictures.items() if (folder / name).is_file()}
        kept = before if different else asked
        record = replace(kept, count=max(before.count, asked.count), pictures=there)
    else:
        refuse_filled(folder)
    distributed.barrier()
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        _write_record(folder, record)
    distributed.barrier()
    return record


def finish(folder: Path, record: EditsRecord) -> None:
    """Write the record with the hashes of all pictures; those that it has stay, so that damage since then is found."""
    there = [name for name in _expected(record) if (folder / name).is_file()]
    hashes = {name: record.pictures.get(name) or file_sha256(folder / name) for name in there}
    _write_record(folder, replace(record, pictures=hashes))


def read_record(folder: Path) -> EditsRecord:
    """The record of a folder of edits. Raises UserError if it is damaged."""
    return read_json(folder / RECORD, EditsRecord, REMEDY)


def _expected(record: EditsRecord) -> list[str]:
    return [picture(j, i) for j in range(len(record.images)) for i in range(record.count)]


def _write_record(folder: Path, record: EditsRecord) -> None:
    with replacing(folder / RECORD) as beside:
        beside.write_text(to_json(record))


def painting(labels: np.ndarray) -> np.ndarray:
    """Classes or depths (see `Subject.labels`) as colours, uint8 (H, W, 3): the nearest is dark, what is free black."""
    if labels.dtype == np.uint8:
        return label_colours(IGNORED + 1)[labels]
    nearest, farthest = np.nanmin(labels), np.nanmax(labels)
    shares = (labels - nearest) / max(farthest - nearest, 1e-12)
    return np.where(np.isnan(labels)[..., None], 0, heat_of(torch.from_numpy(2 * shares - 1).nan_to_num()[None])[0])


def sheet(folder: Path, subjects: Sequence[Subject], names: Sequence[str], same_classes: bool) -> Image.Image:
    """A row for each image: the image, its mask or the map that is asked for, and its edits, as the model sees them."""
    size = subjects[0].place.size
    rows = [[np.asarray(crop_to(laid_over(one.image, "white"), size))] for one in subjects]
    titles = ["image"]
    if subjects[0].share is not None:
        titles.append("mask")
        for row, one in zip(rows, subjects, strict=True):
            assert one.share is not None
            share = np.asarray(crop_to(Image.fromarray((255 * one.share).round().astype(np.uint8)), size)) / 510
            row.append((row[0] * (1 - share[..., None]) + TINT * share[..., None]).round().astype(np.uint8))
    if subjects[0].labels is not None:
        titles.append("painting")
        for row, one in zip(rows, subjects, strict=True):
            assert one.labels is not None
            row.append(painting(one.labels))
    maps = [one.edit(0).shown() for one in subjects]
    if LOCAL in maps[0] and (len(titles) == 1 or LOCAL in subjects[0].known):
        titles.append("local map")
        colours = colours_of(concatenate_states(maps)[LOCAL].cpu())
        for row, one in zip(rows, enlarge(colours, size), strict=True):
            row.append(one)
    for j, row in enumerate(rows):
        for i in range(min(len(names), SHOWN)):
            with open_picture(folder / picture(j, i)) as edit:
                row.append(np.asarray(crop_to(laid_over(edit, "white"), size)))
    titles += [name if same_classes else str(i + 1) for i, name in enumerate(names[:SHOWN])]
    factor = max(1, -(-CELL // min(size)))
    cells = enlarge(np.stack([cell for row in rows for cell in row]), (size[0] * factor, size[1] * factor))
    return Image.fromarray(titled_grid(cells, len(titles), titles))
