"""`reglue head`: a head, trained on a store's features, that tells classes, segmentation or depth pixel by pixel."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tyro.conf import Positional

from reglue.commands.probe import LAST_LAYER, LEAST_IMAGES, Input, Part, divided, input_of, with_classes
from reglue.data.store import Store
from reglue.encoders.vision import VisionFeatures
from reglue.errors import UserError, require
from reglue.files import TakesPaths, new_folder, refuse_filled, replacing, to_json
from reglue.perception.agreement import Agreement, ClassAgreement, DepthAgreement, Figure
from reglue.perception.heads import Head, HeadSpec
from reglue.perception.masks import load_depths
from reglue.perception.probes import (
    IGNORE,
    Fitted,
    LinearProbe,
    MapProbe,
    Training,
    fit_depth,
    fit_linear,
    fit_map,
    measure,
)
from reglue.training import distributed

TRAINING = "training.json"
AT_ONCE = 64
"""Images measured at once."""


@dataclass(frozen=True)
class TrainHead(TakesPaths):
    """Train a head for `reglue perceive`: it tells from an encoder's features what every pixel shows.

    With --masks it segments, with --depth it tells depth; with neither it maps the classes of the store's images, by a
    linear classifier of the mean over patches that is then applied to every patch.
    """

    store: Positional[Path]
    """A store with features."""
    out: Path
    """Folder of the head: new or empty."""
    masks: Path | None = None
    """Folder of masks, palette or greyscale PNG files of class numbers (255 is ignored) with the names of the images.
    Images without one are left out."""
    depth: Path | None = None
    """Folder of depth maps, greyscale PNG files of 8 or 16 bits or NPY arrays, with the names of the images; 0 is
    unknown. The head tells depth in their unit."""
    class_names: tuple[str, ...] = ()
    """Names of the masks' classes, from 0. Default: their numbers; those of the store's classes without --masks."""
    layers: Literal["last", "all"] = "last"
    """Layers of the store's features to read: the last, which is what an autoencoder's alignment network gives of
    latents, or all, which a REGLUE compressor gives of local maps."""
    hidden: int = 0
    """With --masks: channels of two convolutions before the last; 0 makes the head linear."""
    images: int | None = None
    """Use so many images, drawn at random. Default: all, but for the mirror images of --flips."""
    held_out: float = 0.2
    """Share of the images to measure on, which the head is not trained on."""
    selection: float = 0.2
    """Share of the other images that choose the regularisation."""
    steps: int = 1000
    """With --masks: of the training."""
    batch_size: int = 64
    """With --masks: images per step."""
    learning_rate: float = 1e-3
    """With --masks: of Adam, at the start; it falls to 0 along a cosine."""
    seed: int = 0
    """Of the split, of weights and of the order of images."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.masks is not None and self.depth is not None:
            raise UserError("--masks and --depth: a head tells one of them; train two heads")
        if self.masks is None and (self.hidden or self.class_names):
            raise UserError("--hidden and --class-names belong to --masks; give it too, or leave them out")
        require(self, "steps", "batch_size", at_least=1)
        require(self, "held_out", "selection", more_than=0, less_than=1)
        require(self, "images", at_least=LEAST_IMAGES)
        require(self, "hidden", "seed", at_least=0)
        require(self, "learning_rate", more_than=0)


@dataclass(frozen=True)
class HeadRecord:
    """`training.json`: how a head was trained, and how well it does on images that it was not trained on."""

    options: dict[str, str]
    images_sha256: str
    """Of the store's images."""
    fitted: int
    selected: int
    measured: int
    """Images."""
    chosen: float
    """The ridge's penalty, or the step at which training stopped."""
    scores: dict[str, Figure]
    """On the measured images. Of class maps there is `accuracy` alone, of images by their mean over patches."""
    versions: dict[str, str] = field(default_factory=dict)


def train_head(options: TrainHead) -> Head:
    """Train and measure a head and write it. Raises UserError for anything that the user can mend."""
    refuse_filled(options.out)  # Before the training rather than after it.
    device = distributed.alone("head", options.device)
    store = Store.open(options.store)
    read = features_of(options, store)
    part = with_depths(store, options.depth) if options.depth else with_classes(store, options.masks)
    fitting, selection, measured = divided(
        [part], options.seed, options.images, held_out=options.held_out, selection=options.selection
    )
    spec = head_spec(options, store, part.targets)
    fitted = fit(options, spec, read, fitting, selection, device)
    head = head_of(fitted, spec, read).eval()
    record = HeadRecord(
        options={name: str(value) for name, value in vars(options).items()},
        images_sha256=store.manifest.source.fingerprint,
        fitted=len(fitting.rows),
        selected=len(selection.rows),
        measured=len(measured.rows),
        chosen=fitted.chosen,
        scores=scores(head, fitted, read, measured, options.seed),
        versions={name: version(name) for name in ("reglue", "torch", "numpy")},
    )
    with new_folder(options.out) as folder:
        head.save(folder)
        with replacing(folder / TRAINING) as beside:
            beside.write_text(to_json(record))
    told = ", ".join(f"{name.replace('_', ' ')} {figure.value or 0:.3f}" for name, figure in record.scores.items())
    print(f"{options.out}: {told}, on {record.measured} images that the head was not trained on")
    return head


def features_of(options: TrainHead, store: Store) -> Input:
    """The layers of the store's features that the head reads. Raises UserError if it has none, or not the last."""
    encoder = store.manifest.encoder
    if "features" not in store.manifest.columns or encoder is None:
        raise UserError(f"{store.folder} has no features; prepare it with --features")
    if options.layers == "last" and encoder.layers[-1] != encoder.depth - 1:
        raise UserError(
            f"{store.folder} holds layers {list(encoder.layers)}, not the last one ({encoder.depth - 1}); use "
            "--layers all, or prepare with it among --layers"
        )
    return input_of(store, LAST_LAYER if options.layers == "last" else "features")


def with_depths(store: Store, folder: Path) -> Part:
    """All rows of a store that have a depth map, but mirror images."""
    source, rows = store.manifest.source, store.originals
    found, depths = load_depths(folder, Path(source.path), store.names(rows), source.resolution)
    known = depths.flatten(1).isfinite().any(1)
    if not bool(known.any()):
        raise UserError(f"{folder}: no depth map has a pixel of known depth (above 0); give others")
    return Part(store, rows[found[known]], depths[known])


def head_spec(options: TrainHead, store: Store, targets: Tensor) -> HeadSpec:
    """What the head will be."""
    encoder = store.manifest.encoder
    assert encoder is not None
    spec = HeadSpec(
        task="depth" if options.depth else "segmentation",
        architecture=encoder.architecture,
        width=encoder.width,
        layers=encoder.layers if options.layers == "all" else encoder.layers[-1:],
        outputs=1,
        encoder_sha256=encoder.weights_sha256,
        encoder=encoder.name,
        final_norm=encoder.final_norm,
        hidden=options.hidden,
    )
    if options.depth:
        known = targets[targets.isfinite()]
        return replace(spec, depth_range=(float(known.min()), float(known.max())))
    names = store.manifest.source.class_names
    if options.masks:
        counted = targets[targets != IGNORE]
        if not len(counted):
            raise UserError(f"{options.masks}: every pixel is to be ignored (255); give other masks")
        highest = int(counted.max())
        if options.class_names and highest >= len(options.class_names):
            raise UserError(f"--class-names has {len(options.class_names)}, but a mask has class {highest}; name all")
        names = options.class_names or tuple(str(number) for number in range(highest + 1))
    return replace(spec, outputs=len(names), class_names=names)


def fit(
    options: TrainHead, spec: HeadSpec, read: Input, fitting: Part, selection: Part, device: torch.device
) -> Fitted:
    """The probe that becomes the head."""
    examples = (fitting.examples(read), selection.examples(read))
    if options.depth:
        return fit_depth(*examples)
    if options.masks is None:
        return fit_linear(*examples, classes=spec.outputs, flat=False)
    training = Training(
        hidden=options.hidden,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        device=device,
    )
    return fit_map(*examples, classes=spec.outputs, training=training)


def head_of(fitted: Fitted, spec: HeadSpec, read: Input) -> Head:
    """The head that does to raw features what a probe does to standardised ones."""
    head = Head(spec, mean=read.shift.flatten(), std=1 / read.scale.flatten())
    if isinstance(fitted.probe, MapProbe):
        head.layers.load_state_dict(fitted.probe.layers.state_dict())
    else:
        assert isinstance(fitted.probe, LinearProbe)
        weight = fitted.probe.weight.T[:, :, None, None].float()
        head.layers.load_state_dict({"0.weight": weight, "0.bias": fitted.probe.bias.float()})
    return head


def scores(head: Head, fitted: Fitted, read: Input, measured: Part, seed: int) -> dict[str, Figure]:
    """How well the head does on images that it was not trained on."""
    if measured.targets.ndim == 1:
        score = measure(fitted.probe, measured.examples(read), head.spec.outputs, seed)
        return {"accuracy": Figure(score.value, score.standard_error, None)}
    segments = head.spec.task == "segmentation"
    agreement: Agreement = ClassAgreement(head.spec.outputs) if segments else DepthAgreement()
    size = (measured.targets.shape[1], measured.targets.shape[2])
    for inputs, targets in measured.examples(read).batches("measure", AT_ONCE):
        features = inputs / read.scale + read.shift
        seen = VisionFeatures(torch.empty(len(inputs), 0), features)
        agreement.update(head.predict(seen, head.spec.layers, size), targets)
    return agreement.figures(seed)
