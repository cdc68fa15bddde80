"""`reglue perceive`: what heads see in generated latents, beside what they see in the decoded images."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reglue.config import LocalSemantics
from reglue.data.opening import open_images
from reglue.data.picture_writer import write_picture
from reglue.data.prefetch import in_batches
from reglue.data.reading import Reading
from reglue.diffusion.modalities import LATENT
from reglue.encoders.alignment import FILE as ALIGNMENT_FILE
from reglue.encoders.alignment import load_alignment
from reglue.encoders.autoencoders import load_autoencoder
from reglue.encoders.vision import EncoderSpec, VisionEncoder, load_encoder
from reglue.errors import UserError
from reglue.files import new_folder, plain, read_json, to_json
from reglue.locks import writes
from reglue.options.perceive import Perceive
from reglue.perception.agreement import Agreement, ClassAgreement, DepthAgreement, Estimate, markdown_table
from reglue.perception.heads import Head, HeadSpec, load_head
from reglue.perception.perceiving import (
    Estimator,
    Subject,
    View,
    aligned_encoder,
    drawn_scenes,
    encoded_scenes,
)
from reglue.perception.pictures import Maps, as_image, draw_maps
from reglue.pipeline import ImageModel, load
from reglue.progress import Bar
from reglue.reals.samples import ImageSamples
from reglue.run import FILE as RECORD
from reglue.run import find_compressor, versions
from reglue.samples import plan, protocol_of
from reglue.sampling import Sampling
from reglue.seeds import permutation
from reglue.training import distributed

REPORT, PICTURE, IMAGES, MAPS = "perception.json", "picture.png", "images", "maps"
SHOWN = 8
"""Images in the picture."""


@dataclass(frozen=True)
class HeadAgreement:
    """How far a head's maps from one view agree with its maps from the encoder's features of the decoded image."""

    head: str
    view: View
    figures: dict[str, Estimate]
    """`mean_iou` and `pixel_accuracy` of a segmentation, `correlation` and `relative_error` of depth."""


@dataclass(frozen=True)
class Perception:
    """`perception.json`."""

    images: int
    agreement: tuple[HeadAgreement, ...]
    heads: dict[str, HeadSpec]
    """Depth maps hold 0 at the least depth of their head's range, and 65535 at the greatest."""
    encoder: EncoderSpec
    protocol: dict[str, Any]
    """Of sampling, or of the images that were encoded."""
    versions: dict[str, str]


@writes()
def perceive(options: Perceive) -> Perception:
    """Draw or encode images, apply the heads, write maps, picture and report.

    Raises UserError for user mistakes, and under torchrun with several processes: one does it all.
    """
    device = distributed.alone("perceive", options.device)
    heads = load_heads(options.head, device)
    subject, model = load_subject(options, device)
    if model:
        drawing = plan(options, model)
        protocol = protocol_of(options, drawing)
    else:
        samples = images_to_encode(options, subject)
        # What decides the result: which images these are, in the order of the maps.
        names = [samples.images.names[row] for row in samples.rows.tolist()]
        protocol = {"run": str(options.run), "images": str(options.images), "names": names, "seed": options.seed}
        if "drawn" in subject.estimates:
            protocol |= {part.name: getattr(options, part.name) for part in fields(Sampling)}
    views = choose_views(options, heads, subject)
    subject = replace(subject, estimates={one: spec for one, spec in subject.estimates.items() if one in views})
    encoder = load_reference(options, heads, subject, device)
    if (options.out / REPORT).is_file():
        before = read_json(options.out / REPORT, Perception, "delete its folder and perceive again")
        made_of = (plain(before.protocol), before.heads, before.encoder)
        if made_of == (plain(protocol), {name: head.spec for name, head in heads.items()}, encoder.spec):
            print(f"{options.out} is complete already\n\n{agreement_table(before)}")
            return before
    if model:
        scenes = drawn_scenes(drawing, subject, encoder, in_batches(options.count, options.batch_size))
    else:
        scenes = encoded_scenes(samples, subject, encoder, options.batch_size, device)
    counted: dict[tuple[str, View], Agreement] = {
        (name, view): agreement_of(heads[name]) for view, names in views.items() for name in names
    }
    shown: list[tuple[np.ndarray, Maps]] = []
    count = 0
    with new_folder(options.out) as out:
        if model and (warning := model.warning()):
            Bar.write(f"warning: {warning}", file=sys.stderr)
        for scene in scenes:
            maps = scene.maps(heads, {**views, "encoder": list(heads)})
            for key, agreement in counted.items():
                agreement.update(maps[key], maps[key[0], "encoder"])
            for position, pixels in enumerate(scene.pixels.permute(0, 2, 3, 1).cpu().numpy()):
                of_image = {key: of_batch[position].numpy() for key, of_batch in maps.items()}
                write_picture(out / IMAGES / f"{count:06d}.png", Image.fromarray(pixels))
                for (name, view), values in of_image.items():
                    write_picture(out / MAPS / name / view / f"{count:06d}.png", as_image(values, heads[name]))
                if count < SHOWN:
                    shown.append((pixels, of_image))
                count += 1
        report = Perception(
            images=count,
            agreement=tuple(
                HeadAgreement(name, view, one.estimates(options.seed)) for (name, view), one in counted.items()
            ),
            heads={name: head.spec for name, head in heads.items()},
            encoder=encoder.spec,
            protocol=protocol,
            versions=versions(),
        )
        (out / REPORT).write_text(to_json(report))
        draw_maps(out / PICTURE, shown, heads)
    print(agreement_table(report))
    return report


def load_heads(paths: tuple[Path, ...], device: torch.device) -> dict[str, Head]:
    """The heads by name, that of their folder or file. Raises UserError for two of one name."""
    heads: dict[str, Head] = {}
    for path in map(Path, paths):
        name = path.stem if path.is_file() else path.resolve().name
        if name in heads:
            raise UserError(f"--head {path}: there is another head of the name {name}; rename one")
        heads[name] = load_head(path, device)
    if not heads:
        raise UserError("--head: give a folder of `reglue head`, or a file of a DINOv2 head")
    return heads


def load_subject(options: Perceive, device: torch.device) -> tuple[Subject, ImageModel | None]:
    """The run or the aligned autoencoder, and the model that draws, if images are drawn.

    Raises UserError for anything else, and if it has no features to look into.
    """
    if (options.run / ALIGNMENT_FILE).is_file() and not (options.run / RECORD).is_file():
        if options.images is None:
            raise UserError(f"{options.run} is an autoencoder, which draws no images; give a run, or --images too")
        if options.autoencoder is not None:
            raise UserError(f"--autoencoder replaces that of a run, and {options.run} is an autoencoder; leave it out")
        alignment = load_alignment(options.run, device)
        encoder = aligned_encoder(alignment, options.run)
        estimates = asked_for(options, {"alignment": encoder})
        return Subject(load_autoencoder(str(options.run), device), encoder.image_size, estimates, alignment), None
    model = load(
        options.run,
        step=options.step,
        weights=options.weights,
        device=str(device),
        autoencoder=options.autoencoder,
        compile=options.compile,
    )
    record, folder = model.record, Path(model.autoencoder.spec.name)
    if not (folder / ALIGNMENT_FILE).is_file() and model.folder:
        folder = model.folder / folder  # A shared run brings its autoencoder along.
    alignment = load_alignment(folder, device) if (folder / ALIGNMENT_FILE).is_file() else None
    compressor = find_compressor(record, model.folder, LocalSemantics.modality)
    found: dict[Estimator, EncoderSpec] = {}
    if alignment:
        found["alignment"] = aligned_encoder(alignment, folder)
    if compressor and record.encoder:
        compressor = compressor.to(device)
        found["local"] = replace(record.encoder, layers=compressor.layers or record.encoder.layers)
        if options.images is not None and model.can_complete([LATENT]):
            found["drawn"] = found["local"]
    estimates, draw = asked_for(options, found), partial(draw_maps_of, model, options)
    subject = Subject(model.autoencoder, record.resolution, estimates, alignment, compressor, draw)
    return subject, model if options.images is None else None


def draw_maps_of(model: ImageModel, options: Perceive, latents: Tensor, indices: range) -> Tensor:
    """Raw local maps (B, K, h, w) that a model draws given raw latents (B, C, h, w) of images by number."""
    known = {LATENT: model.record.denoiser.modalities[0].normalise(latents)}
    changes = {part.name: getattr(options, part.name) for part in fields(Sampling)}
    state = model.complete(known, indices=indices, seed=options.seed, **changes)
    return model.raw(state, LocalSemantics.modality)


def asked_for(options: Perceive, found: Mapping[Estimator, EncoderSpec]) -> dict[Estimator, EncoderSpec]:
    """The estimators that are asked for. Raises UserError if one of them is missing, or there are none."""
    remedies: dict[Estimator, str] = {
        "alignment": "its autoencoder has no alignment network, which `reglue autoencode` makes with "
        "--alignment.weight above 0",
        "local": "it learns no local map, or the compressor of that map is gone",
        "drawn": "with --images, runs that were trained with --times independent draw a local map of given latents",
    }
    for one in options.sources:
        if one not in found:
            raise UserError(f"--from {one}: {options.run} has no such features: {remedies[one]}")
    if not found:
        raise UserError(
            f"{options.run} has no features of what it generates: {remedies['alignment']} and {remedies['local']}"
        )
    return {one: encoder for one, encoder in found.items() if one in (options.sources or found)}


def images_to_encode(options: Perceive, subject: Subject) -> ImageSamples:
    """The images of --images in an order drawn by the seed, with the noise that draws their latents."""
    assert options.images is not None
    images = open_images(options.images, Reading(no_labels=True))
    rows = permutation(options.seed, "perceived images", 0, len(images))[: options.count]
    spec = subject.autoencoder.spec
    shape = (spec.latent_channels, *spec.latent_size(subject.size))
    return ImageSamples(images, rows, subject.size, shape, options.seed, "perception")


def choose_views(options: Perceive, heads: Mapping[str, Head], subject: Subject) -> dict[View, list[str]]:
    """Which heads look at which features, besides the decoded image's, which all do.

    Raises UserError if a head can read none of the estimates, or not all that were asked for.
    """
    views: dict[View, list[str]] = {estimator: [] for estimator in subject.estimates}
    whose = {"alignment": "the alignment network", "local": "the local map", "drawn": "the local map"}
    for name, head in heads.items():
        refusals = []
        for estimator, encoder in subject.estimates.items():
            try:
                head.spec.check_fits(encoder, f"{whose[estimator]} of {options.run}", estimator == "alignment")
                views[estimator].append(name)
            except UserError as error:
                refusals.append(error)
        if refusals and (options.sources or len(refusals) == len(subject.estimates)):
            raise UserError(f"--head {name}: {refusals[0]}")
    if options.images is not None:
        views["original"] = list(heads)
    return {view: names for view, names in views.items() if names}


def load_reference(
    options: Perceive, heads: Mapping[str, Head], subject: Subject, device: torch.device
) -> VisionEncoder:
    """The encoder that the heads read, with all layers that are needed. Raises UserError for another one."""
    specs = list(subject.estimates.values())
    expected = specs[0]
    if any((spec.weights_sha256, spec.final_norm) != (expected.weights_sha256, expected.final_norm) for spec in specs):
        raise UserError("--head: these heads read the features of different encoders; look with each by itself")
    layers = {layer for head in heads.values() for layer in head.spec.layers}
    layers |= {layer for of in ("local", "drawn") if of in subject.estimates for layer in subject.estimates[of].layers}
    name = options.encoder or expected.name
    encoder = load_encoder(name, subject.size, sorted(layers), device, final_norm=expected.final_norm)
    if encoder.spec.weights_sha256 != expected.weights_sha256:
        raise UserError(f"encoder {name} is not the one whose features the heads read; give that one with --encoder")
    aligned = subject.estimates.get("alignment")
    if aligned and encoder.spec.grid != aligned.grid:
        Bar.write(f"the encoder's grid is {encoder.spec.grid} here, and was {aligned.grid} in the alignment")
    return encoder


def agreement_of(head: Head) -> Agreement:
    """What counts the agreement of a head's maps."""
    return ClassAgreement(head.spec.outputs) if head.spec.task == "segmentation" else DepthAgreement()


def agreement_table(report: Perception) -> str:
    """The agreement as a table in Markdown; no newline at the end."""

    def shown(value: float | None, form: str = "{:.3f}", nothing: str = "–") -> str:
        return nothing if value is None else form.format(value)

    rows = [
        [one.head, one.view, name.replace("_", " "), value, shown(figure.unrelated)]
        for one in report.agreement
        for name, figure in one.figures.items()
        for value in [shown(figure.value) + shown(figure.standard_error, " ± {:.3f}", "")]
    ]
    table = markdown_table(["head", "features", "measure", "agreement", "unrelated images"], rows, texts=3)
    return (
        f"{table}\n\nAgreement with the same head on the encoder's features of the decoded image, over {report.images} "
        "images; ± one standard error. Unrelated: with the map of another image."
    )
