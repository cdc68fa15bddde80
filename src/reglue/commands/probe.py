"""`reglue probe`: how well small probes predict from the features, codes, class tokens and latents of a store.

REGLUE's study of its compressor (arXiv 2512.16636) for any store: accuracy of classes, or mean intersection over union
of masks, beside the compression ratio, the reconstruction error and the speed of each compressor.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import torch

from reglue.data.store import Store
from reglue.errors import UserError
from reglue.extras import need
from reglue.files import read_json, refuse_filled, to_json, write_text
from reglue.locks import writes
from reglue.options.probe import Probe, ProbingOptions
from reglue.perception.agreement import IGNORE
from reglue.perception.labelled import (
    LAST_LAYER,
    LabelledImages,
    Parts,
    draw_parts,
    open_input,
    with_classes,
    with_masks,
)
from reglue.perception.neighbours import cknna
from reglue.perception.probes import ProbeTraining, score_of_chance
from reglue.perception.probing import (
    PROBES,
    ProbeKind,
    ProbeReport,
    encoded_per_second,
    input_names,
    plot_probes,
    pooled,
    probe_kinds,
    probe_table,
    run_probe,
)
from reglue.progress import Bar
from reglue.run import versions
from reglue.training import distributed

REPORT, TABLE, FIGURE = "report.json", "report.md", "figure.png"


@writes()
def probe(options: Probe) -> ProbeReport:
    """Fit and measure all probes, print a table and write it. Raises UserError for anything that the user can fix."""
    need("probe", "matplotlib")
    device = distributed.alone("probe", options.device)
    store = Store.open(options.store)
    second = None if options.validation is None else second_store(options.validation, store)
    names = input_names(store, maps_only=options.masks is not None)
    for name in options.columns or ():
        if name not in names:
            raise UserError(f"--columns {name}: choose from {', '.join(names)}")
    inputs = [open_input(store, name) for name in names]
    sets = [labelled_images(options, store)]
    if second is not None:
        sets.append(labelled_images(options, second, options.validation_masks))
    parts = parts_of(options, *sets)
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
    alike: dict[int, float | None] = {}
    last = next((read for name in (LAST_LAYER, "features") for read in inputs if read.name == name), None)
    of_last = pooled(last, parts) if last and missing else None
    for index, kind in Bar(missing, desc="probe", unit="probe"):
        read = inputs[index]
        if index not in speeds:
            speeds[index] = encoded_per_second(read, parts, options.batch_size, device)
            alike[index] = None if of_last is None or read is last else cknna(pooled(read, parts), of_last)
        training = training_of(options, options.hidden if kind == "conv" else 0, device)
        result = run_probe(read, kind, parts, report.classes, training)
        done[read.name, kind] = replace(result, encoded_per_second=speeds[index], cknna=alike[index])
        write_text(options.out / REPORT, to_json(replace(report, results=tuple(done.values()))))
    results = sorted(done.values(), key=lambda result: (names.index(result.input), PROBES.index(result.probe)))
    report = replace(report, results=tuple(results))
    write_text(options.out / REPORT, to_json(report))
    write_text(options.out / TABLE, probe_table(report) + "\n")
    plot_probes(report, options.out / FIGURE)
    print(probe_table(report))
    return report


def labelled_images(options: ProbingOptions, store: Store, masks: Path | None = None) -> LabelledImages:
    """The images of a store with masks of a folder, --masks if not given; with their classes without --masks."""
    folder = masks or options.masks
    return with_classes(store) if folder is None else with_masks(store, folder)


def parts_of(options: ProbingOptions, *sets: LabelledImages) -> Parts:
    """The images for fitting, selection and measurement."""
    return draw_parts(sets, options.seed, options.images, held_out=options.held_out, selection=options.selection)


def training_of(options: ProbingOptions, hidden: int, device: torch.device) -> ProbeTraining:
    """The training of a probe of maps with so many channels in its convolutions; 0 makes it linear."""
    return ProbeTraining(hidden, options.steps, options.batch_size, options.learning_rate, options.seed, device)


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
