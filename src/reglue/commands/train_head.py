"""`reglue head`: a head, trained on a store's features, that predicts classes, segmentation or depth of every pixel."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from reglue.commands.probe import ProbingOptions
from reglue.data.store import Store
from reglue.errors import UserError, require
from reglue.files import new_folder, refuse_filled, replacing, to_json
from reglue.locks import writes
from reglue.perception.agreement import Estimate
from reglue.perception.fitting import fit_head, head_spec, score_head
from reglue.perception.heads import Head
from reglue.perception.labelled import LAST_LAYER, StoreInput, open_input, with_depths
from reglue.run import versions
from reglue.training import distributed

TRAINING = "training.json"


@dataclass(frozen=True)
class TrainHead(ProbingOptions):
    """Train a head for `reglue perceive`: it predicts from an encoder's features what every pixel shows.

    With --masks it segments, with --depth it predicts depth; with neither it maps the classes of the store's images, by
    a linear classifier of the mean over patches that is then applied to every patch. Steps, batch size and learning
    rate are those of a head for --masks.
    """

    depth: Path | None = None
    """Folder of depth maps, greyscale PNG files of 8 or 16 bits or NPY arrays, with the names of the images; 0 is
    unknown. The head predicts depth in their unit."""
    class_names: tuple[str, ...] = ()
    """Names of the masks' classes, from 0. Default: their numbers; those of the store's classes without --masks."""
    layers: Literal["last", "all"] = "last"
    """Layers of the store's features to read: the last, which is what an autoencoder's alignment network gives of
    latents, or all, which a REGLUE compressor gives of local maps."""
    hidden: int = 0
    """With --masks: channels of two convolutions before the last; 0 makes the head linear."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "hidden", at_least=0)
        if self.masks is not None and self.depth is not None:
            raise UserError("--masks and --depth: a head predicts one of them; train two heads")
        if self.masks is None and (self.hidden or self.class_names):
            raise UserError("--hidden and --class-names belong to --masks; give it too, or leave them out")


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
    scores: dict[str, Estimate]
    """On the measured images. Of class maps there is `accuracy` alone, of images by their mean over patches."""
    versions: dict[str, str] = field(default_factory=dict)


@writes()
def train_head(options: TrainHead) -> Head:
    """Train and measure a head and write it. Raises UserError for anything that the user can fix."""
    refuse_filled(options.out)  # Before the training rather than after it.
    device = distributed.alone("head", options.device)
    store = Store.open(options.store)
    read = features_of(options, store)
    images = options.labelled(store) if options.depth is None else with_depths(store, options.depth)
    parts = options.draw_parts(images)
    spec = head_spec(
        images,
        task="depth" if options.depth else "segmentation",
        all_layers=options.layers == "all",
        hidden=options.hidden,
        class_names=options.class_names,
    )
    head, fitted = fit_head(spec, read, parts, options.training(options.hidden, device))
    record = HeadRecord(
        options={name: str(value) for name, value in vars(options).items()},
        images_sha256=store.manifest.source.fingerprint,
        fitted=len(parts.fitting),
        selected=len(parts.selection),
        measured=len(parts.measured),
        chosen=fitted.chosen,
        scores=score_head(head, fitted, read, parts.measured, options.seed),
        versions=versions(),
    )
    with new_folder(options.out) as folder:
        head.save(folder)
        with replacing(folder / TRAINING) as beside:
            beside.write_text(to_json(record))
    scores = ", ".join(f"{name.replace('_', ' ')} {score.value or 0:.3f}" for name, score in record.scores.items())
    print(f"{options.out}: {scores}, on {record.measured} images that the head was not trained on")
    return head


def features_of(options: TrainHead, store: Store) -> StoreInput:
    """The layers of the store's features that the head reads. Raises UserError if it has none, or not the last."""
    encoder = store.manifest.encoder
    if "features" not in store.manifest.columns or encoder is None:
        raise UserError(f"{store.folder} has no features; prepare it with --features")
    if options.layers == "last" and encoder.layers[-1] != encoder.depth - 1:
        raise UserError(
            f"{store.folder} holds layers {list(encoder.layers)}, not the last one ({encoder.depth - 1}); use "
            "--layers all, or prepare with it among --layers"
        )
    return open_input(store, LAST_LAYER if options.layers == "last" else "features")
