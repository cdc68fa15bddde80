"""`reglue probe`: how well small probes predict from the features, codes, class tokens and latents of a store.

REGLUE's study of its compressor (arXiv 2512.16636) for any store: accuracy of classes, or mean intersection over union
of masks, beside the compression ratio, the reconstruction error and the speed of each compressor.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from tyro.conf import Positional

from reglue.data.store import Store
from reglue.errors import UserError, require
from reglue.files import TakesPaths, read_json, refuse_filled, replacing, to_json
from reglue.locks import writes
from reglue.perception.agreement import IGNORE
from reglue.perception.labelled import (
    LEAST_IMAGES,
    LabelledImages,
    Parts,
    draw_parts,
    open_input,
    with_classes,
    with_masks,
)
from reglue.perception.probes import ProbeTraining, score_of_chance
from reglue.perception.probing import (
    PROBES,
    ProbeKind,
    ProbeReport,
    encoded_per_second,
    input_names,
    plot_probes,
    probe_kinds,
    probe_table,
    run_probe,
)
from reglue.run import versions
from reglue.training import distributed

REPORT, TABLE, FIGURE = "report.json", "report.md", "figure.png"


@dataclass(frozen=True)
class ProbingOptions(TakesPaths):
    """What `reglue probe` and `reglue head` have in common: the images that they are fitted to, and how."""

    store: Positional[Path]
    """A store with features."""
    out: Path
    """Folder of the results: new, empty, or left over from the same `reglue probe`."""
    masks: Path | None = None
    """Predict the class of every pixel: folder of masks, palette or greyscale PNG files of class numbers (255 is
    ignored) with the names of the images. Images without one are left out."""
    images: int | None = None
    """Use so many images of each store, drawn at random. Default: all, but for the mirror images of --flips."""
    held_out: float = 0.2
    """Share of the images to measure on, which nothing is fitted to."""
    selection: float = 0.2
    """Share of the other images that choose the regularisation."""
    steps: int = 1000
    """Of the training of probes of maps, which may stop early, at a tenth of them."""
    batch_size: int = 64
    """Images per step."""
    learning_rate: float = 1e-3
    """Of Adam, at the start; it falls to 0 along a cosine."""
    seed: int = 0
    """Of the choice of images, of weights and of the order of images."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "steps", "batch_size", at_least=1)
        require(self, "held_out", "selection", more_than=0, less_than=1)
        require(self, "images", at_least=LEAST_IMAGES)
        require(self, "seed", at_least=0)
        require(self, "learning_rate", more_than=0)

    def labelled(self, store: Store, masks: Path | None = None) -> LabelledImages:
        """The images of a store with masks of a folder, --masks if not given; with their classes without --masks."""
        folder = masks or self.masks
        return with_classes(store) if folder is None else with_masks(store, folder)

    def draw_parts(self, *sets: LabelledImages) -> Parts:
        """The images for fitting, selection and measurement."""
        return draw_parts(sets, self.seed, self.images, held_out=self.held_out, selection=self.selection)

    def training(self, hidden: int, device: torch.device) -> ProbeTraining:
        """The training of a probe of maps with so many channels in its convolutions; 0 makes it linear."""
        return ProbeTraining(hidden, self.steps, self.batch_size, self.learning_rate, self.seed, device)


@dataclass(frozen=True)
class Probe(ProbingOptions):
    """Fit small probes that predict classes, or masks, from what a store holds: how much does compression keep?

    The same command again continues where an interrupted one stopped, and adds what the store has gained.
    """

    validation: Path | None = None
    """A second store of the same kind to measure on; its codes are computed where it has none. Default: a share of the
    first (--held-out)."""
    validation_masks: Path | None = None
    """Masks of the second store. Default: the folder --masks."""
    columns: tuple[str, ...] | None = None
    """What to probe: features, features.last (the last layer), local.NAME, cls, cls.NAME, latent. Default: all."""
    conv: bool = True
    """Fit the small convolutional probe too."""
    hidden: int = 64
    """Channels of the convolutional probe."""
    flat_limit: int = 4096
    """A linear probe sees every value of an input by itself where there are no more than this. Memory grows as the
    square: 4096 takes 1 GB."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "hidden", at_least=1)
        require(self, "flat_limit", at_least=0)
        if self.validation_masks is not None and (self.masks is None or self.validation is None):
            raise UserError("--validation-masks belongs to --masks and --validation; give these too")

    def decisive(self) -> dict[str, Any]:
        """The options that decide every result, as JSON has them."""
        without = {"store", "out", "validation", "masks", "validation_masks", "columns", "conv", "flat_limit", "device"}
        return {option: value for option, value in asdict(self).items() if option not in without}


@writes()
def probe(options: Probe) -> ProbeReport:
    """Fit and measure all probes, print a table and write it. Raises UserError for anything that the user can fix."""
    device = distributed.alone("probe", options.device)
    store = Store.open(options.store)
    second = None if options.validation is None else second_store(options.validation, store)
    names = input_names(store, maps_only=options.masks is not None)
    for name in options.columns or ():
        if name not in names:
            raise UserError(f"--columns {name}: choose from {', '.join(names)}")
    inputs = [open_input(store, name) for name in names]
    sets = [options.labelled(store)]
    if second is not None:
        sets.append(options.labelled(second, options.validation_masks))
    parts = options.draw_parts(*sets)
    report = begin(options, sets, parts, device)
    data = {read.name: read.data for read in inputs}
    done = {(one.input, one.probe): one for one in report.results if one.data == data.get(one.input)}
    missing: list[tuple[int, ProbeKind]] = [
        (index, kind)
        for index, read in enumerate(inputs)
        if options.columns is None or read.name in options.columns
        for kind in probe_kinds(read, options.masks is not None, options.conv, options.flat_limit)
        if (read.name, kind) not in done
    ]
    speeds: dict[int, float | None] = {}
    for index, kind in tqdm(missing, desc="probe", unit="probe"):
        read = inputs[index]
        if index not in speeds:
            speeds[index] = encoded_per_second(read, parts, options.batch_size, device)
        training = options.training(options.hidden if kind == "conv" else 0, device)
        result = run_probe(read, kind, parts, report.classes, training)
        done[read.name, kind] = replace(result, encoded_per_second=speeds[index])
        write(options.out / REPORT, to_json(replace(report, results=tuple(done.values()))))
    results = sorted(done.values(), key=lambda result: (names.index(result.input), PROBES.index(result.probe)))
    report = replace(report, results=tuple(results))
    write(options.out / REPORT, to_json(report))
    write(options.out / TABLE, probe_table(report) + "\n")
    plot_probes(report, options.out / FIGURE)
    print(probe_table(report))
    return report


def second_store(path: Path, store: Store) -> Store:
    """The store to measure on. Raises UserError if it is of another kind than the first."""
    second = Store.open(path)
    mine, theirs = store.manifest, second.manifest
    for what, a, b in (
        ("encoder", mine.encoder, theirs.encoder),
        ("autoencoder", mine.autoencoder, theirs.autoencoder),
        ("resolution", mine.source.resolution, theirs.source.resolution),
        ("classes", mine.source.class_names, theirs.source.class_names),
    ):
        if a != b:
            raise UserError(f"--validation {path} has another {what} than {store.folder}; prepare both alike")
    return second


def begin(options: Probe, sets: list[LabelledImages], parts: Parts, device: torch.device) -> ProbeReport:
    """The report without results, or with those of an interrupted run. Raises UserError if the folder holds others."""
    manifest, masks_sha256 = sets[0].store.manifest, None
    if options.masks is None:
        classes = len(manifest.source.class_names)
    else:
        if any(bool((part.targets == IGNORE).all()) for part in parts):
            raise UserError(f"{options.masks}: too few masks with a pixel that is not to be ignored (255); give more")
        classes = 1 + max(int(part.targets.masked_fill(part.targets == IGNORE, 0).max()) for part in parts)
        masks_sha256 = hashlib.sha256(b"".join(images.targets.numpy().tobytes() for images in sets)).hexdigest()
    protocol = {
        **options.decisive(),
        "images_sha256": [images.store.manifest.source.fingerprint for images in sets],
        "encoder_sha256": manifest.encoder.weights_sha256 if manifest.encoder else None,
        "autoencoder_sha256": manifest.autoencoder.weights_sha256,
        "masks_sha256": masks_sha256,
    }
    report = ProbeReport(
        metric="accuracy" if options.masks is None else "mIoU",
        classes=classes,
        chance=score_of_chance(parts.fitting.targets, parts.measured.targets, classes),
        fitted=len(parts.fitting),
        selected=len(parts.selection),
        measured=len(parts.measured),
        without_mask=sum(len(images.store.originals) - len(images) for images in sets),
        protocol=protocol,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        versions=versions(),
    )
    path = options.out / REPORT
    if not path.is_file():
        refuse_filled(options.out)
        options.out.mkdir(parents=True, exist_ok=True)
        return report
    before = read_json(path, ProbeReport, "delete it, or choose another --out")
    for key, value in protocol.items():
        if before.protocol.get(key) != value:
            raise UserError(
                f"{path} was made with {key.replace('_', '-')} {before.protocol.get(key)}, not {value}; "
                "choose another --out, or the old settings"
            )
    return replace(report, results=before.results)


def write(path: Path, text: str) -> None:
    """Write a file of results, whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(text)
