"""`reglue evaluate`: how close images are to a reference, by the features of a network."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from reglue.encoders.vision import load_encoder
from reglue.errors import UserError, one_line
from reglue.extras import need
from reglue.files import parse_json, replacing
from reglue.locks import writes, writing
from reglue.metrics.distances import DENSITY_NEIGHBOURS, NEIGHBOURS
from reglue.metrics.evaluation import Evaluation, measure_figures, warnings_of
from reglue.metrics.features import EncoderFeatures, FeatureNetwork, load_encoder_features
from reglue.metrics.image_sets import ImageSet, Share, drawn_images, is_run, open_image_set, open_training_images
from reglue.metrics.inception import INCEPTION, Inception, is_inception, load_inception
from reglue.metrics.resampling import CONFIDENCE
from reglue.metrics.sides import describe_side, refuse_too_few
from reglue.options.evaluate import Evaluate
from reglue.published.sharing import REPORTS, STATED
from reglue.run import RunRecord
from reglue.samples import Draw
from reglue.training import checkpoints, distributed, tracking
from reglue.training.distributed import resolve_device
from reglue.training.tracking import Trackers, check_trackers

STORE = "store"
"""The feature network's name for the encoder of a store."""
WITHOUT_DOWNLOAD = "--feature-network FILE; store or an encoder's name there measures another distance without it"
"""How else the Inception's weights may be given."""
DRAWN = "evaluated"
"""The folder beneath a run for the images that are drawn to be evaluated."""


@writes()
def evaluate(options: Evaluate) -> Evaluation:
    """Measure, print a table, and write the report. Raises UserError for input that cannot be compared.

    The report goes to `out`, and into the `reports` folder of the run that the images were drawn from, if it is there.
    Under torchrun the processes share the images, and each returns the same.
    """
    need("evaluate", "torch_fidelity")
    rank, processes = distributed.join(options.device)
    share = Share(options.batch_size, rank, processes)
    device = resolve_device(options.device)
    if options.out:  # Before the work, which may take hours.
        if options.out.is_dir():
            raise UserError(f"--out {options.out} is a folder; name a .json file")
        options.out.parent.mkdir(parents=True, exist_ok=True)
    check_trackers(options.track)
    stated = stated_protocol(options.protocol)
    images = images_of(options)
    if stated and (is_run(options.images) or (images.images and images.images.protocol())):
        raise UserError(f"--protocol: how the images of {options.images} are made is recorded already; leave it out")
    reference = reference_of(options)
    for side in (images, reference):
        if side.images is not None:
            count = len(side.images)
            asked = options.count is not None and side is images
            refuse_too_few(count, f"--count {count}" if asked else f"{side.path} has {count} images")
    network = load_network(options, images, reference, device)
    images, reference = (at_resolution(side, network, options) for side in (images, reference))

    size = resolution_of(options)
    # Resampling asks for the influence of the images on sFID, not for that of the reference.
    keep_spatial = options.resamples > 0
    measured = describe_side(network, images, "images", share, resolution=size, keep_spatial=keep_spatial)
    real = describe_side(network, reference, "reference", share, resolution=size)
    metrics, absent = measure_figures(
        network,
        measured,
        real,
        resamples=options.resamples,
        kernel_subsets=options.kernel_subsets,
        kernel_subset_size=options.kernel_subset_size,
        seed=options.seed,
        device=device,
    )
    subset_size = min(options.kernel_subset_size, measured.count or 0, real.count or 0)
    recorded = images.images.protocol() if images.images else None
    evaluation = Evaluation(
        metrics=metrics,
        absent=absent,
        distance_name=network.distance_name,
        images=str(options.images),
        image_count=measured.count,
        image_size=measured.size,
        image_features=measured.origin,
        reference=str(reference.path),
        reference_count=real.count,
        reference_size=real.size,
        reference_features=real.origin,
        skipped=measured.skipped + real.skipped,
        feature_network=network.name,
        feature_network_sha256=network.sha256,
        features=network.features_name,
        input_rule=network.input_rule,
        # Where a subset is all that there is, one is measured.
        kernel_subsets=1 if subset_size == measured.count == real.count else options.kernel_subsets,
        kernel_subset_size=subset_size,
        neighbours=NEIGHBOURS,
        density_neighbours=DENSITY_NEIGHBOURS,
        resamples=options.resamples,
        confidence=CONFIDENCE,
        seed=options.seed,
        protocol=stated or recorded,
        warnings=tuple(warnings_of(network, measured, real)),
        versions={name: version(name) for name in ("reglue", "torch", "timm", "torch-fidelity", "numpy", "pillow")},
    )
    if rank == 0:
        print(evaluation)
        report = json.dumps(asdict(evaluation), indent=1)
        if options.out:
            with replacing(options.out) as beside:
                beside.write_text(report)
        run = drawn_from(options.images, recorded)
        if run:
            keep_report(report, run / REPORTS / evaluation.report_name(), options.out)
        if run and options.track:
            step = evaluation.protocol["step"] if evaluation.protocol else 0
            last = tracking.newest(run, "loss").get("step", step)
            with closing(Trackers(run, options.track, max(step, last), record=False)) as trackers:
                trackers.log(step, {"evaluation": evaluation.figures()})
        elif options.track:
            print("warning: nothing is tracked: these images are of no run that is at hand", file=sys.stderr)
    distributed.barrier()
    return evaluation


def images_of(options: Evaluate) -> ImageSet:
    """What is to be measured. A run draws its images by its recipe's own protocol, when they are read."""
    run, count = options.images, options.count or 50_000
    if not is_run(run):
        if options.count is not None:
            raise UserError(f"--count {options.count}: {run} is not a run, and only runs draw images; leave it out")
        if options.weights != "ema":
            raise UserError(f"--weights {options.weights}: {run} is not a run, and only runs draw images; leave it out")
        return open_image_set(run)
    averaged = options.weights == "ema"
    folder = run / DRAWN / f"step-{checkpoints.find(run).name}{'' if averaged else '-model'}"
    drawn = Draw(run, folder, count, weights=options.weights, batch_size=options.batch_size, device=options.device)
    return drawn_images(drawn)


def reference_of(options: Evaluate) -> ImageSet:
    """What to compare with; a run stands for its training store, by whose name the report calls it."""
    path = options.reference or options.images
    if is_run(path):
        return open_training_images(path)
    if options.reference is None:
        raise UserError(f"--reference is missing; only a run knows what to compare with, and {path} is none")
    return open_image_set(path)


def resolution_of(options: Evaluate) -> tuple[int, int] | None:
    """Height and width that are asked for."""
    asked = options.resolution
    return (asked, asked) if isinstance(asked, int) else asked


def load_network(options: Evaluate, images: ImageSet, reference: ImageSet, device: torch.device) -> FeatureNetwork:
    """The feature network that is asked for. Raises UserError if it cannot be loaded, or not for these two sides."""
    name, file = options.feature_network, Path(options.feature_network)
    if name == INCEPTION or (file.is_file() and is_inception(file)):
        if options.features != "class-token":
            raise UserError(f"--features {options.features} is for vision encoders; leave it out with the Inception")
        return load_inception(None if name == INCEPTION else file, device, WITHOUT_DOWNLOAD)
    stores = [side.store for side in (reference, images) if side.store]
    sources = [side.images for side in (images, reference) if side.images]
    resolution = resolution_of(options) or (stores[0].manifest.source.resolution if stores else None)
    if resolution is None and not sources:
        raise UserError(f"{images.path} and {reference.path} hold no images, and their statistics are the Inception's")
    resolution = resolution or sources[0].first_size()  # An encoder is shown both sides at one size.
    if name != STORE:
        return load_encoder_features(name, resolution, options.features, device)
    encoder = next((store.manifest.encoder for store in stores if store.manifest.encoder), None)
    if encoder is None:
        raise UserError("--feature-network store: neither side is a store with an encoder; name a network")
    return EncoderFeatures(load_encoder(encoder.name, resolution, device=device), options.features)


def at_resolution(side: ImageSet, network: FeatureNetwork, options: Evaluate) -> ImageSet:
    """A side without the statistics of its file, if they are of images of another size than the one that is asked for.

    Raises UserError if the file has no images to compute them from.
    """
    size = resolution_of(options)
    if side.pool is None or size is None or not isinstance(network, Inception):
        return side
    if side.images is None:
        raise UserError(
            f"--resolution: {side.path} holds statistics alone, which cannot be brought to {size[0]}×{size[1]} pixels; "
            "leave the option out, or give the images"
        )
    return side if side.images.first_size() == size else replace(side, pool=None, spatial=None)


def stated_protocol(statement: str | None) -> dict[str, Any] | None:
    """What the user states about images whose making is not recorded. Raises UserError if that is nothing."""
    if statement is None:
        return None
    content: Any = " ".join(statement.split())
    if statement.endswith(".json"):
        try:
            content = parse_json(Path(statement).read_bytes(), dict[str, Any])
        except OSError as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else one_line(error)
            raise UserError(f"--protocol {statement}: {reason}; name a .json file, or write a sentence") from None
        except ValueError as error:
            raise UserError(
                f"--protocol {statement} holds no JSON object ({one_line(error)}); write one, or a sentence"
            ) from error
    if not content:
        raise UserError("--protocol says nothing; give a sentence, or a .json file with an object")
    return {STATED: content}


def drawn_from(images: Path, protocol: dict[str, Any] | None) -> Path | None:
    """The run whose averaged weights drew the images, if it is there: given itself, or named by their protocol."""
    protocol = protocol or {}
    if protocol.get("weights") == "model":
        return None  # The run's card is about the averaged ones.
    if is_run(images):
        return images
    run, step = Path(str(protocol.get("run"))), protocol.get("step")
    if not is_run(run) or not isinstance(step, int):
        return None
    try:
        recipe = RunRecord.read(run).recipe
    except UserError:
        return None
    # Another run may be at this path now, or from here.
    same = (recipe.name, recipe.model) == (protocol.get("recipe"), protocol.get("model"))
    if same and "weights_sha256" in protocol and step in checkpoints.steps(run):
        same = checkpoints.weights_sha256(run, step) == protocol["weights_sha256"]
    return run if same else None


def keep_report(report: str, file: Path, out: Path | None) -> None:
    """Write a report into its run, and say so. A run that cannot be written to is no reason to lose an evaluation."""
    if out and out.resolve().parent == file.resolve().parent:
        return
    try:
        file.parent.mkdir(exist_ok=True)
        with writing(file), replacing(file) as beside:
            beside.write_text(report)
    except (OSError, UserError) as error:
        print(f"The report is not in {file.parent}, so no model card will show it: {error}", file=sys.stderr)
    else:
        print(f"The report is in {file}, for the model card.", file=sys.stderr)
