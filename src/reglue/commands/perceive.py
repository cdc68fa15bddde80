"""`reglue perceive`: what heads see in generated latents, beside what they see in the decoded images.

ReaLS (arXiv 2502.00359) reads segmentation and depth off generated latents: its alignment network turns them into a
vision encoder's features, and heads made for those work on them without more training. A run that learns REGLUE's local
map (arXiv 2512.16636) generates compressed features, which the compressor's decoder turns back. How far either is to be
trusted says the encoder itself: the same head on its features of the decoded image.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from reglue.config import LocalSemantics
from reglue.data.pictures import GAP, enlarge, heat_of, image_grid, label_colours
from reglue.data.sources import Reading, open_images
from reglue.diffusion.modalities import LATENT
from reglue.encoders.alignment import FILE as ALIGNMENT_FILE
from reglue.encoders.alignment import AlignmentNetwork, at_usual_length, load_alignment
from reglue.encoders.autoencoders import Autoencoder, AutoencoderSpec, load_autoencoder
from reglue.encoders.compressors import Compressor, resize
from reglue.encoders.vision import EncoderSpec, VisionEncoder, VisionFeatures, load_encoder
from reglue.errors import UserError
from reglue.files import new_folder, replacing, structured, to_json
from reglue.perception.agreement import Agreement, ClassAgreement, DepthAgreement, Figure
from reglue.perception.heads import Head, HeadSpec, load_head
from reglue.pipeline import evaluations, load
from reglue.reals.samples import ImageSamples, all_of, to_images, to_pixels
from reglue.run import FILE as RECORD
from reglue.run import find_compressor
from reglue.samples import Draw, Drawing, plan, protocol_of
from reglue.seeds import permutation
from reglue.training import distributed

Source = Literal["alignment", "local"]
View = Literal["alignment", "local", "original", "encoder"]
"""Whose features a head reads: one of the sources, or the encoder's, of the original or of the decoded image."""
REPORT, PICTURE, IMAGES, MAPS = "perception.json", "picture.png", "images", "maps"
OF_IMAGES_TOO = frozenset(("run", "out", "count", "seed", "autoencoder", "batch_size", "device"))
"""Options of `Draw` that mean something where images are encoded; all others are about drawing."""
SHOWN = 8
"""Images in the picture …"""
CELL, DOTS = 120, 100
"""… whose cells have at least so many pixels along a side, at so many to an inch."""
OPACITY = 0.6
"""Of the classes' colours over the image, in the picture."""
TITLES: dict[View, str] = {
    "alignment": "{head}\nfrom latents",
    "local": "{head}\nfrom local map",
    "original": "{head}\nencoder, original",
    "encoder": "{head}\nencoder, decoded",
}


@dataclass(frozen=True)
class Perceive(Draw):
    """Draw images from a run and tell what they show from their latents, with heads that `reglue head` trained.

    The same heads look at the decoded images through the vision encoder; the report says how far the two agree.
    """

    out: Path
    """Folder of the results (picture.png, perception.json, images, maps): new or empty."""
    head: tuple[Path, ...] = field(kw_only=True)
    """Heads: folders of `reglue head`, or files of linear heads that DINOv2's authors published."""
    images: Path | None = None
    """Encode images of this folder (or of whatever `reglue prepare` takes) in place of drawing: the control that tells
    the generator's errors from those of the features. The run may then be the folder of an autoencoder that
    `reglue autoencode` aligned. Options that are about drawing are refused then."""
    sources: Annotated[tuple[Source, ...], tyro.conf.arg(name="from")] = ()
    """What gives features without the image: alignment (the alignment network of the run's autoencoder, on latents) or
    local (the decoder of the run's compressor, on the local map). Default: what the run has and the heads can read."""
    encoder: str | None = None
    """Where the vision encoder is now, if it has moved: as for `reglue prepare`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        of_drawing = (part for part in fields(Draw) if part.name not in OF_IMAGES_TOO)
        given = next((part.name for part in of_drawing if getattr(self, part.name) != part.default), None)
        if self.images is not None and given:
            raise UserError(
                f"--{given.replace('_', '-')} is about drawing, and with --images nothing is drawn; leave either out"
            )


@dataclass(frozen=True)
class HeadAgreement:
    """How far a head's maps from one source agree with its maps from the encoder's features of the decoded image."""

    head: str
    view: View
    figures: dict[str, Figure]
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


def perceive(options: Perceive) -> Perception:
    """Draw or encode images, apply the heads, write maps, picture and report.

    Raises UserError for user mistakes, and under torchrun with several processes: one does it all.
    """
    device = distributed.alone("perceive", options.device)
    heads = load_heads(options.head, device)
    subject = load_subject(options, device)
    views = choose_views(options, heads, subject)
    encoder = load_reference(options, heads, subject, views, device)
    counted: dict[tuple[str, View], Agreement] = {
        (name, view): _agreement(heads[name]) for view, names in views.items() for name in names
    }
    shown: list[tuple[np.ndarray, dict[tuple[str, View], np.ndarray]]] = []
    count = 0
    with new_folder(options.out) as out:
        for scene in scenes(options, subject, encoder, views, device):
            maps = look(scene, heads, views)
            for key, agreement in counted.items():
                agreement.update(maps[key], maps[key[0], "encoder"])
            for position, pixels in enumerate(scene.pixels.permute(0, 2, 3, 1).cpu().numpy()):
                of_image = {key: of_batch[position].numpy() for key, of_batch in maps.items()}
                _write(out / IMAGES / f"{count:06d}.png", Image.fromarray(pixels))
                for (name, view), values in of_image.items():
                    _write(out / MAPS / name / view / f"{count:06d}.png", as_image(values, heads[name]))
                if count < SHOWN:
                    shown.append((pixels, of_image))
                count += 1
        report = Perception(
            images=count,
            agreement=tuple(
                HeadAgreement(name, view, one.figures(options.seed)) for (name, view), one in counted.items()
            ),
            heads={name: head.spec for name, head in heads.items()},
            encoder=encoder.spec,
            protocol=subject.protocol,
            versions={name: version(name) for name in ("reglue", "torch", "numpy")},
        )
        (out / REPORT).write_text(to_json(report))
        draw(out / PICTURE, shown, heads)
    print(as_markdown(report))
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


@dataclass(frozen=True)
class Subject:
    """What is looked into: a run, or an autoencoder by itself."""

    autoencoder: Autoencoder
    size: tuple[int, int]
    """Of the images in pixels."""
    gives: Mapping[Source, EncoderSpec]
    """The sources that it has, with the encoder whose features each gives: its layers are those."""
    alignment: AlignmentNetwork | None
    compressor: Compressor | None
    drawing: Drawing | None
    """None where images are encoded."""
    samples: ImageSamples | None
    """The images that are encoded, if any."""
    protocol: dict[str, Any]

    def from_latents(self, latents: Tensor) -> VisionFeatures:
        """What the alignment network makes of raw latents (B, C, H, W)."""
        assert self.alignment is not None
        semantics = at_usual_length(self.alignment(latents), self.alignment.spec)
        return VisionFeatures(semantics.class_token, semantics.patches, semantics.class_token)

    def from_local(self, code: Tensor) -> VisionFeatures:
        """What the compressor's decoder makes of a raw local map (B, K, H, W), brought to the encoder's grid.

        A local map has no class token: its width is 0.
        """
        assert self.compressor is not None
        features = self.compressor.decode(resize(code, self.gives["local"].grid))
        return VisionFeatures(features.new_empty(len(code), 0), features)


def load_subject(options: Perceive, device: torch.device) -> Subject:
    """Load the run, or the aligned autoencoder. Raises UserError if neither, or if it has no semantics to look into."""
    if (options.run / ALIGNMENT_FILE).is_file() and not (options.run / RECORD).is_file():
        return _aligned_autoencoder(options, device)
    model = load(
        options.run,
        step=options.step,
        device=str(device),
        autoencoder=options.autoencoder,
        compile=options.compile,
    )
    folder = Path(model.autoencoder.spec.name)
    if not (folder / ALIGNMENT_FILE).is_file() and model.folder:
        folder = model.folder / folder  # A shared run brings its autoencoder along.
    alignment = load_alignment(folder, device) if (folder / ALIGNMENT_FILE).is_file() else None
    record = model.record
    compressor = find_compressor(record, model.folder, LocalSemantics.modality)
    gives: dict[Source, EncoderSpec] = {}
    if alignment:
        gives["alignment"] = _encoder_of(alignment, folder)
    if compressor and record.encoder:
        gives["local"] = replace(record.encoder, layers=compressor.layers or record.encoder.layers)
    gives = _asked_for(options, gives)
    drawing = plan(options, model) if options.images is None else None
    samples = _samples(options, model.autoencoder.spec, record.resolution)
    return Subject(
        autoencoder=model.autoencoder,
        size=record.resolution,
        gives=gives,
        alignment=alignment,
        compressor=compressor.to(device) if compressor else None,
        drawing=drawing,
        samples=samples,
        protocol=protocol_of(options, drawing) if drawing else _chosen(options, samples),
    )


def _aligned_autoencoder(options: Perceive, device: torch.device) -> Subject:
    if options.images is None:
        raise UserError(f"{options.run} is an autoencoder, which draws no images; give a run, or --images too")
    if options.autoencoder is not None:
        raise UserError(f"--autoencoder replaces that of a run, and {options.run} is an autoencoder; leave it out")
    alignment = load_alignment(options.run, device)
    encoder = _encoder_of(alignment, options.run)
    gives = _asked_for(options, {"alignment": encoder})
    autoencoder = load_autoencoder(str(options.run), device)
    samples = _samples(options, autoencoder.spec, encoder.image_size)
    return Subject(
        autoencoder=autoencoder,
        size=encoder.image_size,
        gives=gives,
        alignment=alignment,
        compressor=None,
        drawing=None,
        samples=samples,
        protocol=_chosen(options, samples),
    )


def _encoder_of(alignment: AlignmentNetwork, folder: Path) -> EncoderSpec:
    """The encoder that an alignment network speaks for: of its features there are the last layer's alone."""
    try:
        encoder = structured(json.dumps(alignment.spec.encoder), EncoderSpec)
    except ValueError as error:
        raise UserError(
            f"{folder / ALIGNMENT_FILE} does not say whose features it gives ({error}); run `reglue autoencode` again"
        ) from error
    return replace(encoder, layers=(encoder.depth - 1,))


def _asked_for(options: Perceive, gives: dict[Source, EncoderSpec]) -> dict[Source, EncoderSpec]:
    """The sources that are asked for. Raises UserError if one of them is not there, or none is."""
    remedies: dict[Source, str] = {
        "alignment": "its autoencoder has no alignment network, which `reglue autoencode` makes with "
        "--alignment.weight above 0",
        "local": "it learns no local map, or the compressor of that map is gone",
    }
    for source in options.sources:
        if source not in gives:
            raise UserError(f"--from {source}: {options.run} has no such features: {remedies[source]}")
    if not gives:
        raise UserError(
            f"{options.run} gives no features of what it generates: {remedies['alignment']}, and {remedies['local']}"
        )
    return {source: encoder for source, encoder in gives.items() if source in (options.sources or gives)}


def _samples(options: Perceive, spec: AutoencoderSpec, size: tuple[int, int]) -> ImageSamples | None:
    """The images to encode, in an order drawn by the seed, with the noise that draws their latents."""
    if options.images is None:
        return None
    images = open_images(options.images, Reading(no_labels=True))
    rows = permutation(options.seed, "perceived images", 0, len(images))[: options.count]
    shape = (spec.latent_channels, *spec.latent_size(size))
    return ImageSamples(images, rows, size, shape, options.seed, "perception")


def _chosen(options: Perceive, samples: ImageSamples | None) -> dict[str, Any]:
    """What decides the result where images are encoded: which they are, in the order of the maps."""
    assert samples is not None
    names = [samples.images.names[row] for row in samples.rows.tolist()]
    return {"run": str(options.run), "images": str(options.images), "names": names, "seed": options.seed}


def choose_views(options: Perceive, heads: dict[str, Head], subject: Subject) -> dict[View, list[str]]:
    """Which heads look at which features, besides the decoded image's, which all do.

    Raises UserError if a head can read none of the sources, or not all that were asked for.
    """
    views: dict[View, list[str]] = {source: [] for source in subject.gives}
    whose = {"alignment": "the alignment network", "local": "the local map"}
    for name, head in heads.items():
        refusals = []
        for source, encoder in subject.gives.items():
            try:
                head.spec.check_fits(encoder, f"{whose[source]} of {options.run}")
                if head.spec.class_token and source == "local":
                    raise UserError("the head reads the class token too, which a local map does not have")
                views[source].append(name)
            except UserError as error:
                refusals.append(error)
        if refusals and (options.sources or len(refusals) == len(subject.gives)):
            raise UserError(f"--head {name}: {refusals[0]}")
    if options.images is not None:
        views["original"] = list(heads)
    return {view: names for view, names in views.items() if names}


def load_reference(
    options: Perceive, heads: dict[str, Head], subject: Subject, views: dict[View, list[str]], device: torch.device
) -> VisionEncoder:
    """The encoder that the heads read, with all layers that are needed. Raises UserError for another one."""
    specs = [spec for source, spec in subject.gives.items() if source in views]
    expected = specs[0]
    if any((spec.weights_sha256, spec.final_norm) != (expected.weights_sha256, expected.final_norm) for spec in specs):
        raise UserError("--head: these heads read the features of different encoders; look with each by itself")
    layers = {layer for head in heads.values() for layer in head.spec.layers}
    if "local" in views:
        layers |= set(subject.gives["local"].layers)
    name = options.encoder or expected.name
    encoder = load_encoder(name, subject.size, sorted(layers), device, final_norm=expected.final_norm)
    if encoder.spec.weights_sha256 != expected.weights_sha256:
        raise UserError(f"encoder {name} is not the one whose features the heads read; give that one with --encoder")
    if "alignment" in views and encoder.spec.grid != expected.grid:
        tqdm.write(f"the encoder's grid is {encoder.spec.grid} here, and was {expected.grid} in the alignment")
    return encoder


class Scene(NamedTuple):
    """Some images, and everything that heads may look at."""

    pixels: Tensor
    """uint8 (B, 3, H, W): the decoded images."""
    seen: dict[View, tuple[VisionFeatures, tuple[int, ...]]]
    """The features, and the encoder's blocks that they are of."""
    any_length: frozenset[View] = frozenset()
    """Views whose features are directions alone: how long they are means nothing."""


def scenes(
    options: Perceive, subject: Subject, encoder: VisionEncoder, views: dict[View, list[str]], device: torch.device
) -> Iterator[Scene]:
    """The images in batches: drawn, or encoded."""
    if subject.drawing is None:
        yield from _of_images(options, subject, encoder, views, device)
    else:
        yield from _drawn(options, subject.drawing, subject, encoder, views)


@torch.no_grad()
def _drawn(
    options: Perceive, drawing: Drawing, subject: Subject, encoder: VisionEncoder, views: dict[View, list[str]]
) -> Iterator[Scene]:
    model, size = drawing.model, options.batch_size
    room = min(size, options.count)
    steps = evaluations(drawing.sampling, options.count, size)
    with tqdm(total=steps, unit="evaluation", desc="perceive") as progress:
        for start in range(0, options.count, size):
            state = drawing.draw(range(start, min(start + size, options.count)), progress.update, room)
            decoded = model.decode(state, drawing.sampling.rounding)
            pixels = torch.from_numpy(decoded).permute(0, 3, 1, 2).contiguous().to(model.device)
            code = model.raw(state, local) if (local := LocalSemantics.modality) in state else None
            yield _scene(subject, encoder, views, pixels, model.raw(state, LATENT), code)


@torch.no_grad()
def _of_images(
    options: Perceive, subject: Subject, encoder: VisionEncoder, views: dict[View, list[str]], device: torch.device
) -> Iterator[Scene]:
    assert subject.samples is not None
    samples, grid = subject.samples, subject.autoencoder.spec.latent_size(subject.size)
    for originals, noise in all_of(samples, options.batch_size, 0, device):
        latents = subject.autoencoder.encode(to_images(originals)).draw(noise)
        pixels = to_pixels(subject.autoencoder.decode(latents))
        seen, code = encoder.describe(originals), None
        if subject.compressor and "local" in views:
            layers = subject.gives["local"].layers
            each = dict(zip(encoder.spec.layers, seen.features.split(encoder.spec.width, dim=1), strict=True))
            # As a model meets it: compressed, and brought to the grid of the latents.
            code = resize(subject.compressor.encode(torch.cat([each[layer] for layer in layers], dim=1)), grid)
        scene = _scene(subject, encoder, views, pixels, latents, code)
        yield scene._replace(seen={**scene.seen, "original": (seen, encoder.spec.layers)})


def _scene(
    subject: Subject,
    encoder: VisionEncoder,
    views: dict[View, list[str]],
    pixels: Tensor,
    latents: Tensor,
    code: Tensor | None,
) -> Scene:
    """Everything that is seen of decoded `pixels`, of raw `latents`, and of a raw local map."""
    seen = encoder.describe(pixels)
    all_seen: dict[View, tuple[VisionFeatures, tuple[int, ...]]] = {"encoder": (seen, encoder.spec.layers)}
    if "alignment" in views:
        all_seen["alignment"] = (subject.from_latents(latents), subject.gives["alignment"].layers)
    if "local" in views and code is not None:
        all_seen["local"] = (subject.from_local(code), subject.gives["local"].layers)
    # The alignment network learned cosines, and older ones do not know how long the encoder's features are.
    unmeasured = subject.alignment is not None and subject.alignment.spec.patch_length is None
    return Scene(pixels, all_seen, frozenset({"alignment"} if unmeasured else ()))


def look(scene: Scene, heads: dict[str, Head], views: dict[View, list[str]]) -> dict[tuple[str, View], Tensor]:
    """The map (B, H, W) of every head from every view, on the CPU."""
    height, width = scene.pixels.shape[-2:]
    all_views: dict[View, list[str]] = {**views, "encoder": list(heads)}
    return {
        (name, view): heads[name].predict(*scene.seen[view], (height, width), any_length=view in scene.any_length).cpu()
        for view, names in all_views.items()
        for name in names
    }


def as_image(values: np.ndarray, head: Head) -> Image.Image:
    """A map (H, W) as a picture that keeps its numbers: classes with a palette, or depth in 16 bits over its range."""
    if head.spec.task == "segmentation":
        if head.spec.outputs > 256:
            return Image.fromarray(values.astype(np.uint16))
        image = Image.fromarray(values.astype(np.uint8))
        image.putpalette(label_colours(head.spec.outputs).tobytes())
        return image
    return Image.fromarray((depth_share(values, head) * 65535).round().astype(np.uint16))


def depth_share(values: np.ndarray, head: Head) -> np.ndarray:
    """Depths as shares of the head's range, from 0 to 1; those outside are cut."""
    assert head.spec.depth_range is not None
    nearest, farthest = head.spec.depth_range
    return np.clip((values - nearest) / max(farthest - nearest, 1e-12), 0, 1)


def draw(
    path: Path, shown: list[tuple[np.ndarray, dict[tuple[str, View], np.ndarray]]], heads: dict[str, Head]
) -> None:
    """Images as rows: the decoded image, then what every head sees, from every view that it has."""
    from matplotlib.figure import Figure as Canvas  # slow to import
    from matplotlib.patches import Patch

    columns = sorted(shown[0][1], key=lambda key: (list(heads).index(key[0]), list(TITLES).index(key[1])))
    height, width = (side * -(-CELL // min(shown[0][0].shape[:2])) for side in shown[0][0].shape[:2])
    pictures = [
        picture
        for pixels, maps in shown
        for picture in (pixels, *(as_colours(maps[key], heads[key[0]], pixels) for key in columns))
    ]
    grid = image_grid(enlarge(np.stack(pictures), (height, width)), columns=1 + len(columns))
    canvas = Canvas(figsize=(grid.shape[1] / DOTS, grid.shape[0] / DOTS + 1.5), dpi=DOTS, layout="constrained")
    axes = canvas.subplots()
    axes.imshow(grid)
    axes.xaxis.tick_top()
    axes.set_xticks(
        [width / 2 + (width + GAP) * column for column in range(1 + len(columns))],
        ["decoded image", *(TITLES[view].format(head=name) for name, view in columns)],
        size=8,
    )
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    patches = []
    for name, head in heads.items():
        if head.spec.task == "segmentation":
            of_head = [one.ravel() for _, maps in shown for key, one in maps.items() if key[0] == name]
            colours = label_colours(head.spec.outputs) / 255
            patches += [
                Patch(color=tuple(colours[number]), label=f"{name}: {head.spec.class_names[number]}")
                for number in np.unique(np.concatenate(of_head))
            ]
    if patches:
        canvas.legend(handles=patches, loc="outside lower center", ncols=4, fontsize=7)
    with replacing(path) as beside:
        canvas.savefig(beside, format="png")


def as_colours(values: np.ndarray, head: Head, pixels: np.ndarray) -> np.ndarray:
    """A map (H, W) as uint8 (H, W, 3): classes as colours over the image (H, W, 3), depth from dark to light."""
    if head.spec.task == "depth":
        return heat_of(torch.from_numpy(2 * depth_share(values, head) - 1)[None])[0]
    colours = label_colours(head.spec.outputs)[values]
    return (OPACITY * colours + (1 - OPACITY) * pixels).round().astype(np.uint8)


def as_markdown(report: Perception) -> str:
    """The agreement as a table in Markdown; no newline at the end."""
    lines = [["head", "features", "measure", "agreement", "unrelated images"], ["---"] * 3 + ["---:"] * 2]
    for one in report.agreement:
        for name, figure in one.figures.items():
            error = "" if figure.standard_error is None else f" ± {figure.standard_error:.3f}"
            lines.append(
                [one.head, one.view, name.replace("_", " "), f"{_shown(figure.value)}{error}", _shown(figure.unrelated)]
            )
    about = (
        f"Agreement with the same head on the encoder's features of the decoded image, over {report.images} images; "
        "± one standard error. Unrelated: with the map of another image."
    )
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", about])


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _agreement(head: Head) -> Agreement:
    return ClassAgreement(head.spec.outputs) if head.spec.task == "segmentation" else DepthAgreement()


def _write(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        image.save(beside, format="png")
