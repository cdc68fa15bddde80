"""`reglue synthesise`: a run's images with masks and boxes, kept where what they show is what their own maps say."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from reglue.commands.train_head import TRAINING
from reglue.data.images import open_picture
from reglue.data.picture_writer import write_picture
from reglue.data.pictures import enlarge, label_colours, titled_grid
from reglue.data.prefetch import in_batches
from reglue.editing.options import LOCAL
from reglue.editing.subjects import fitting_head
from reglue.errors import UserError, option
from reglue.extras import need
from reglue.files import file_sha256, plain, refuse_filled, to_json, write_text
from reglue.locks import writes
from reglue.metrics.distances import nearest
from reglue.metrics.image_sets import open_training_images
from reglue.options.synthesise import CARD, SHEET, Synthesise
from reglue.perception.agreement import confusions, markdown_table, mean_iou
from reglue.perception.datasets import LAYOUTS, Labelled, boxes_of
from reglue.perception.heads import HeadSpec
from reglue.perception.perceiving import Scene, Subject, drawn_scenes
from reglue.perception.pictures import OPACITY, as_image
from reglue.perception.records import COPY, JOURNAL, RECORD, REMEDY, DatasetRecord, Drawn, read_record, read_rows
from reglue.pipeline import ImageModel, load
from reglue.run import RunRecord, find_run
from reglue.samples import joined, plan, protocol_of
from reglue.sampling import AutoPrecision
from reglue.training import distributed

QUALITY = 95
"""Of JPEG files."""
NEIGHBOURHOOD = 10
"""Training images around the nearest one whose mean distance from it shows what is usual there."""
SHOWN = 8
"""Images on the sheet, in two columns."""
CELL = 120
"""Least side of an image on the sheet in pixels."""


@writes()
def synthesise(options: Synthesise) -> Path:
    """Draw the images that are missing, and describe all. Returns the folder.

    Raises UserError for what cannot be, before any network runs, and for a folder of another data set.
    """
    need("synthesise", "scipy")
    device = distributed.alone("synthesise", options.device)
    head = fitting_head(options.head, RunRecord.read(find_run(options.run)))
    if head.spec.task != "segmentation":
        raise UserError(f"{option('head')} {options.head} predicts {head.spec.task}, not classes; give a head of masks")
    names = names_of(options, head.spec)
    model = load(
        options.run,
        step=options.step,
        weights=options.weights,
        device=str(device),
        autoencoder=options.autoencoder,
        encoder=options.encoder,
        compile=options.compile,
    )
    seen = model.image_encoder()
    assert seen.encoder is not None
    spec, compressor = seen.encoder.spec, seen.compressors[LOCAL]
    subject = Subject(
        model.autoencoder,
        model.record.resolution,
        {"local": replace(spec, layers=compressor.layers or spec.layers)},
        None,
        compressor,
    )
    drawing = plan(options, model, lambda: precision_before(options.out))
    protocol = plain(protocol_of(options, drawing)) | {
        "head_sha256": head_sha256(options.head),
        "encoder_sha256": spec.weights_sha256,
        "compressor_sha256": compressor.weights_sha256(),
        "format": options.format,
        "agreement": options.agreement,
        "objects": list(names),
    }
    record, rows = asked_before(options, DatasetRecord(protocol, head.spec))
    layout, head = LAYOUTS[options.format], head.to(device)

    def is_there(i: int) -> bool:
        return i in rows and (not rows[i].kept or all((options.out / name).is_file() for name in layout.pictures(i)))

    # A batch is drawn whole or not at all, so that it has the same bits whenever that is.
    batches = [one for one in in_batches(options.count, options.batch_size) if not all(map(is_there, one))]
    if not batches and JOURNAL in record.files and all((options.out / name).is_file() for name in record.files):
        print(f"{options.out} is complete already: {options.count} images drawn")
        return options.out
    rows = {i: row for i, row in rows.items() if not any(i in batch for batch in batches)}
    whole = {name for i in rows for name in layout.pictures(i)}
    record = replace(record, files={name: digest for name, digest in record.files.items() if name in whole})
    write_text(options.out / RECORD, to_json(record))
    write_journal(options.out, rows)
    training = training_tokens(model)
    scenes = drawn_scenes(drawing, subject, seen.encoder, batches, "synthesise")
    for indices, scene in zip(batches, scenes, strict=True):
        maps = scene.maps({"": head}, {"local": [""], "encoder": [""]})
        agreement = [mean_iou(one) for one in confusions(maps["", "local"], maps["", "encoder"], head.spec.outputs)]
        found = nearest_of(scene, training)
        for i, value, mask, pixels, near in zip(
            indices, agreement, maps["", "encoder"], scene.pixels.permute(0, 2, 3, 1).cpu(), found, strict=True
        ):
            label = model.record.class_names[drawing.labels[i]] if model.record.class_names else ""
            rows[i] = Drawn(i, label, value, value >= options.agreement, *near)
            if rows[i].kept:
                options_of = {"quality": QUALITY} if layout.images.endswith(".jpg") else {}
                write_picture(options.out / layout.images.format(i), Image.fromarray(pixels.numpy()), **options_of)
                write_picture(options.out / layout.masks.format(i), as_image(mask.numpy(), head))
        with (options.out / JOURNAL).open("a") as journal:
            journal.write("".join(line(rows[i]) for i in indices))
    least = np.prod(model.record.resolution) / np.prod(spec.grid)
    finish(options, record, rows, names, float(least))
    return options.out


def names_of(options: Synthesise, spec: HeadSpec) -> dict[int, str]:
    """The classes that get boxes, by number. Raises UserError for one that the head does not have."""
    names = dict(enumerate(spec.class_names or map(str, range(spec.outputs))))
    numbers = {name: number for number, name in names.items()} | {str(number): number for number in names}
    if unknown := [name for name in options.objects if name not in numbers]:
        raise UserError(f"{option('objects')} {unknown[0]}: the head has classes {', '.join(names.values())}")
    chosen = sorted({numbers[name] for name in options.objects}) or [number for number in names if number]
    return {number: names[number] for number in chosen}


def head_sha256(head: Path) -> str:
    """Of the weights of a head, which is a folder or a file."""
    return file_sha256(next(head.glob("*.safetensors")) if head.is_dir() else head)


def precision_before(folder: Path) -> AutoPrecision | None:
    """The precision in which the images of a data set were drawn; None if there are none."""
    if not (folder / RECORD).is_file():
        return None
    return (read_record(folder).protocol.get("sampling") or {}).get("precision")


def line(row: Drawn) -> str:
    """A row of the journal."""
    return json.dumps(plain(row)) + "\n"


def write_journal(folder: Path, rows: Mapping[int, Drawn]) -> None:
    """The whole journal, in order: what is added while images are drawn comes at its end."""
    write_text(folder / JOURNAL, "".join(line(rows[i]) for i in sorted(rows)))


def asked_before(options: Synthesise, asked: DatasetRecord) -> tuple[DatasetRecord, dict[int, Drawn]]:
    """The record of all images, those that are there included, and what was drawn, by index.

    Raises UserError if the folder is of another data set, or anything else.
    """
    folder = options.out
    record, rows = asked, {row.index: row for row in read_rows(folder)}
    if (folder / RECORD).is_file():
        before = read_record(folder)
        if missing := [key for key in ("labels", "sampling") if key not in before.protocol]:
            raise UserError(f"{folder / RECORD} is damaged (it holds no {missing[0]}); {REMEDY}")
        complete = JOURNAL in before.files and len(before.protocol["labels"]) >= options.count
        record = replace(before, protocol=joined(folder, before.protocol, asked.protocol, complete=complete))
    else:
        refuse_filled(folder)
    return record, rows


def training_tokens(model: ImageModel) -> tuple[Tensor, list[str]] | None:
    """The class tokens (N, D) of the training images with their names; None if they are gone, or too few to compare."""
    assert model.folder is not None
    try:
        store = open_training_images(model.folder).store
    except UserError:
        return None
    assert store is not None
    rows = torch.arange(len(store))
    return (store.read("cls", rows)["cls"], store.names(rows)) if len(rows) > NEIGHBOURHOOD else None


def nearest_of(scene: Scene, training: tuple[Tensor, list[str]] | None) -> list[tuple[str | None, float | None]]:
    """The nearest training image of each image, and how near it is beside what is usual there."""
    own = scene.seen["encoder"][0].class_token.float()
    if training is None:
        return [(None, None)] * len(own)
    tokens = training[0].to(own)
    distances, rows = nearest(own, tokens)
    # The nearest one of a training image is itself.
    usual = nearest(tokens[rows[:, 0]], tokens, NEIGHBOURHOOD + 1)[0][:, 1:].mean(1)
    shares = (distances[:, 0] / usual.clamp(min=1e-30)).tolist()
    return [(training[1][row], share) for row, share in zip(rows[:, 0].tolist(), shares, strict=True)]


def finish(
    options: Synthesise,
    record: DatasetRecord,
    rows: Mapping[int, Drawn],
    names: Mapping[int, str],
    least: float,
) -> None:
    """Write what the format asks for, the card, the sheet and the record with all hashes."""
    out, layout = options.out, LAYOUTS[options.format]
    write_journal(out, rows)
    kept = [row for row in rows.values() if row.kept]
    labelled: list[Labelled] = []
    for row in sorted(kept, key=lambda row: row.index):
        with open_picture(out / layout.masks.format(row.index)) as file:
            mask = np.asarray(file)
        labelled.append(Labelled(row.index, mask.shape[:2], boxes_of(mask, list(names), least)))
    described = dict(layout.describe(labelled, names))
    counts = Counter(box.label for one in labelled for box in one.boxes)
    boxes = {name: counts[number] for number, name in names.items()}
    for name, text in described.items():
        write_text(out / name, text)
    write_text(out / CARD, card(options, record, rows, boxes))
    if labelled:
        write_picture(out / SHEET, sheet(out, options, labelled[:SHOWN], record.head))
    pictures = [name for one in labelled for name in layout.pictures(one.number)]
    files = [JOURNAL, CARD, *([SHEET] if labelled else []), *described, *pictures]
    hashes = {name: record.files.get(name) or file_sha256(out / name) for name in files}
    write_text(out / RECORD, to_json(replace(record, boxes=boxes, files=hashes)))
    remedy = "" if kept else f"; nothing agrees so well, lower {option('agreement')}"
    print(f"{out}: {len(kept)} of {len(rows)} images kept, with {counts.total()} boxes{remedy}")


def card(options: Synthesise, record: DatasetRecord, rows: Mapping[int, Drawn], boxes: Mapping[str, int]) -> str:
    """The data card, in Markdown."""
    protocol, kept = record.protocol, [row for row in rows.values() if row.kept]
    drawn, stayed = (Counter(row.label for row in part) for part in (rows.values(), kept))
    classes = [[label or "all", str(count), str(stayed[label])] for label, count in sorted(drawn.items())]
    quartiles = np.quantile([row.agreement for row in rows.values()], (0.25, 0.5, 0.75))
    copies = [f"{row.index:06d} of {row.nearest}" for row in kept if row.copied]
    compared = (
        f"{len(copies)} of {len(kept)} may be copies: by the encoder's class token they are nearer to a training\n"
        f"image than {COPY:g} of what is usual around that one, the mean distance of its {NEIGHBOURHOOD} neighbours "
        f"(`closeness` in `{JOURNAL}`)." + "".join(f"\n- {copy}" for copy in copies)
    )
    if kept and kept[0].closeness is None:
        compared = "Not looked for: the store of the training images is not here."
    hashes = ", ".join(f"{name} {str(protocol[f'{name}_sha256'])[:12]}" for name in ("weights", "head", "encoder"))
    return f"""---
task_categories: [image-segmentation, object-detection]
tags: [synthetic]
---
# {options.out.resolve().name}

{len(kept)} images with masks and {sum(boxes.values())} boxes, made by `reglue synthesise --format {options.format}`.

**No person has looked at them.** The images are drawn by a model ({protocol["recipe"]} {protocol["model"]}, step
{protocol["step"]}). Their labels are what a head sees in them, with its errors; its scores on real images are in its
`{TRAINING}`. Test on real images what learns from these.

## What was dropped
An image stays if the head sees the same in it, through the vision encoder, as in the local map that was drawn along:
mean intersection over union of at least {options.agreement:g}. Over all {len(rows)} images its quartiles are
{", ".join(f"{value:.2f}" for value in quartiles)}.

{markdown_table(["class", "drawn", "kept"], classes, texts=1)}

## What is in it
Masks hold class numbers. A box is a connected component of one class; components smaller than a patch of the encoder
have none.

{markdown_table(["class", "boxes"], [[name, str(count)] for name, count in boxes.items()], texts=1)}

## Copies of training images
{compared}

## How it was made
Seed {protocol["seed"]}; SHA-256: {hashes}.
`{RECORD}` has everything, and `reglue verify` compares all files with it.
"""


def sheet(out: Path, options: Synthesise, images: Sequence[Labelled], spec: HeadSpec) -> Image.Image:
    """Images beside themselves with masks and boxes, uint8."""
    layout, colours = LAYOUTS[options.format], label_colours(max(spec.outputs, 2))
    factor = max(1, -(-CELL // min(images[0].size)))
    size = (images[0].size[0] * factor, images[0].size[1] * factor)
    cells: list[np.ndarray] = []
    for one in images:
        with open_picture(out / layout.images.format(one.number)) as image:
            pixels = np.asarray(image.convert("RGB"))
        with open_picture(out / layout.masks.format(one.number)) as mask:
            painted = (OPACITY * colours[np.asarray(mask)] + (1 - OPACITY) * pixels).round().astype(np.uint8)
        plain_cell, marked = enlarge(np.stack([pixels, painted]), size)
        drawing = Image.fromarray(marked)
        for box in one.boxes:
            corners = [box.left * factor, box.top * factor, box.right * factor - 1, box.bottom * factor - 1]
            ImageDraw.Draw(drawing).rectangle(corners, outline="white")
        cells += [plain_cell, np.asarray(drawing)]
    columns = min(4, len(cells))
    return Image.fromarray(titled_grid(np.stack(cells), columns, ("image", "mask and boxes") * (columns // 2)))
