"""`reglue evaluate`: how close images are to a reference, by the features of a network."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from tyro.conf import Positional

from reglue.data.store import Store
from reglue.encoders.vision import EncoderSpec, load_encoder
from reglue.errors import UserError, require
from reglue.files import TakesPaths, replacing
from reglue.image_sets import ImageSet, Share, is_run, open_images, open_reference
from reglue.metrics.distances import (
    Gaussian,
    GaussianStatistics,
    frechet_distance,
    frechet_influence,
    inception_scores,
    kernel_distance,
    manifold_scores,
)
from reglue.metrics.features import (
    EncoderFeatures,
    FeatureKind,
    FeatureNetwork,
    FeatureSet,
    describe_images,
    load_encoder_features,
)
from reglue.metrics.inception import INCEPTION, Inception, is_inception, load_inception
from reglue.metrics.resampling import CONFIDENCE, interval, resample_counts, resampled_means
from reglue.published.sharing import REPORTS, STATED
from reglue.run import RunRecord
from reglue.seeds import generator
from reglue.training import checkpoints, distributed
from reglue.training.distributed import resolve_device

STORE = "store"
"""The feature network's name for the encoder of a store."""
NEIGHBOURS = 3
"""Of precision and recall, as published."""
DENSITY_NEIGHBOURS = 5
"""Of density and coverage, as published."""


@dataclass(frozen=True)
class Evaluate(TakesPaths):
    """Compare images with a reference: FID, sFID, Inception Score, precision, recall, KID, density and coverage.

    The figures are those of ADM's evaluator, with 95 % intervals. Images go into the Inception network at the size that
    they have, and are stretched there to 299×299. Within a side, those of another size than the first are scaled to
    cover it and cropped, as `reglue prepare` does. Figures can be compared only where network, reference, sizes and
    numbers of images are the same; published ones are of 50,000 images.
    """

    images: Positional[Path]
    """A folder of images, a .npz file (uint8 (N, H, W, 3) as arr_0 or images), a store, or a run.

    A run draws them first, by the protocol of its recipe, into `evaluated` beneath it; the same command continues.
    """
    reference: Path | None = None
    """The same; ADM's reference batches too, and of a run its training store. Default: that of the run in IMAGES."""
    out: Path | None = None
    """Where the report goes, a .json file. That about a run's images is written into the run's reports folder too, from
    where its model card takes it; that about other images is only printed if not given."""
    protocol: str | None = None
    """How the images were made, where no samples.json beside them says so: a sentence, or a .json file with an object.
    It goes into the report, as stated by you."""
    count: int | None = None
    """Images to draw from a run; 50000 if not given."""
    feature_network: str = INCEPTION
    """inception, or store for the encoder of the reference's store, or any vision encoder, or a file of weights.

    inception gives FID, and its weights are downloaded. dinov2-l gives FD-DINOv2 (by name, not from a file). Other
    encoders are named as in `reglue prepare`: starter, a short name, timm:NAME, NAME@FILE, a folder or a file.
    """
    features: FeatureKind = "class-token"
    """What stands for an image in a vision encoder; patch-mean is the mean over the patches of the last layer."""
    resolution: int | tuple[int, int] | None = None
    """Side, or height and width, to which both sides are scaled and cropped first. Default: each as it is for the
    Inception and FD-DINOv2; for other encoders the store's, or that of the first image."""
    resamples: int = 1000
    """Random resamples of the images, for the intervals; 0 gives none."""
    kernel_subsets: int = 100
    """KID is averaged over so many random subsets."""
    kernel_subset_size: int = 1000
    """Images per subset; all, if there are fewer."""
    seed: int = 0
    """Of subsets and resamples."""
    batch_size: int = 64
    """Images described (and drawn) at once. Changes speed and memory; results change by rounding alone."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "count", "resolution", "kernel_subsets", "batch_size", at_least=1)
        require(self, "kernel_subset_size", at_least=2)
        require(self, "resamples", "seed", at_least=0)


@dataclass(frozen=True, repr=False)
class Figure:
    """A figure and, where resampling gives one, the 95 % interval around it.

    It prints no number, since one without its protocol says little: print the `Evaluation`. `value` is the number.
    """

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, value: float, resampled: Tensor, least: float = -math.inf, most: float = math.inf) -> Figure:
        """With the interval of its resamples (R,), if there are any, within what the figure can be."""
        if not len(resampled):
            return cls(value)
        low, high = interval(value, resampled)
        return cls(value, max(low, least), min(high, most))

    def __repr__(self) -> str:
        return "<Figure: print its Evaluation, which says how it was made>"


@dataclass(frozen=True, repr=False)
class Metrics:
    """The figures; None for those that could not be measured, for reasons in `Evaluation.absent`.

    Distances: smaller is better. All others: larger is better. As those of a `Figure`, the numbers are not printed.
    """

    frechet_distance: Figure
    """FID, if the network is the Inception."""
    spatial_frechet_distance: Figure | None = None
    """sFID of ADM."""
    inception_score: Figure | None = None
    precision: Figure | None = None
    recall: Figure | None = None
    kernel_distance: Figure | None = None
    """KID, the mean over the subsets; around 0 for equal distributions, hence sometimes below."""
    kernel_distance_std: float | None = None
    """Standard deviation between the subsets."""
    density: Figure | None = None
    coverage: Figure | None = None

    def __repr__(self) -> str:
        measured = ", ".join(part.name for part in fields(self) if getattr(self, part.name) is not None)
        return f"<Metrics {measured}: print their Evaluation, which says how they were made>"


@dataclass(frozen=True)
class Evaluation:
    """Figures and all that they depend on. Figures are printed in no other way than `print(evaluation)`, the table."""

    metrics: Metrics
    absent: dict[str, str]
    """Figures that are missing, and why."""
    distance_name: str
    """What the field calls the Fréchet distance of these features: FID, FD-DINOv2, or the encoder in brackets."""
    images: str
    image_count: int | None
    """None where the figures come from the statistics in a file."""
    image_size: tuple[int, int] | None
    """Height and width at which the network was given them; None if it was given none."""
    image_features: str
    """Where they came from: computed, or the store's cache, or statistics in the file."""
    reference: str
    reference_count: int | None
    reference_size: tuple[int, int] | None
    reference_features: str
    skipped: tuple[str, ...]
    """Images of either side that could not be read."""
    feature_network: str
    feature_network_sha256: str
    features: str
    input_rule: str
    """How the network brings images to its own input."""
    kernel_subsets: int
    kernel_subset_size: int
    neighbours: int
    density_neighbours: int
    resamples: int
    confidence: float
    seed: int
    protocol: dict[str, Any] | None
    """How the images were sampled; None if nothing says so. What the user states in place of a record is under
    `stated_by_user`."""
    warnings: tuple[str, ...]
    versions: dict[str, str]

    def __str__(self) -> str:
        """The report for people: several lines, no newline at the end."""
        rows = {name: _shown(figure) for name, figure in self._figures()}
        if self.protocol is None:
            rows[self.distance_name] += ", protocol not recorded"
        if self.metrics.kernel_distance is not None:
            rows["KID"] += f", ± {self.metrics.kernel_distance_std:.6f} between subsets"
        rows |= {name: f"– ({reason})" for name, reason in self.absent.items()}
        if self.resamples:
            rows["in brackets"] = f"{self.confidence:.0%} intervals of {self.resamples} resamples of one side"
        rows |= {
            "images": _side_row(self.images, self.image_count, self.image_size, self.image_features),
            "reference": _side_row(self.reference, self.reference_count, self.reference_size, self.reference_features),
            "features": f"{self.features} of {self.feature_network} (SHA-256 {self.feature_network_sha256[:12]})",
            "resize": f"another size within a side scaled to cover and cropped; then {self.input_rule}",
            "settings": f"{self.kernel_subsets} subsets of {self.kernel_subset_size}, {self.neighbours} neighbours "
            f"({self.density_neighbours} for density and coverage), seed {self.seed}",
            "protocol": _protocol_row(self.protocol),
            "versions": ", ".join(f"{name} {number}" for name, number in self.versions.items()),
        }
        width = max(map(len, rows))
        return "\n".join([*(f"{name:<{width}}  {value}" for name, value in rows.items()), *self.warnings])

    def _figures(self) -> Iterator[tuple[str, Figure]]:
        for part in fields(self.metrics):
            figure = getattr(self.metrics, part.name)
            if isinstance(figure, Figure):
                yield self.distance_name if part.name == "frechet_distance" else NAMES[part.name], figure


NAMES = {
    "spatial_frechet_distance": "sFID",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
    "kernel_distance": "KID",
    "density": "density",
    "coverage": "coverage",
}
"""What the field calls the figures, but for the Fréchet distance, whose name depends on the network."""


@dataclass(frozen=True)
class Described:
    """What the network says about one side."""

    gaussian: Gaussian
    spatial: Gaussian | None
    images: FeatureSet | None
    """None where a file holds statistics alone."""
    size: tuple[int, int] | None
    origin: str
    given: bool
    """Whether the Gaussians come from a file, and not from the features."""

    @property
    def count(self) -> int | None:
        """Of images whose features are known."""
        return len(self.images.features) if self.images else None


def evaluate(options: Evaluate) -> Evaluation:
    """Measure, print a table, and write the report. Raises UserError for input that cannot be compared.

    The report goes to `out`, and into the `reports` folder of the run that the images were drawn from, if it is there.
    Under torchrun the processes share the images, and each returns the same.
    """
    rank, processes = distributed.join(options.device)
    share = Share(options.batch_size, rank, processes)
    device = resolve_device(options.device)
    if options.out:  # Before the work, which may take hours.
        if options.out.is_dir():
            raise UserError(f"--out {options.out} is a folder; name a .json file")
        options.out.parent.mkdir(parents=True, exist_ok=True)
    stated = _stated_protocol(options.protocol)
    images = open_images(options.images, options.count, options.batch_size, options.device)
    if stated and (is_run(options.images) or images.protocol()):
        raise UserError(f"--protocol: how the images of {options.images} are made is recorded already; leave it out")
    reference = open_reference(_reference_path(options))
    for side in (images, reference):
        if side.images is not None:
            _refuse_too_few(len(side.images), "images", side, options)
    network = _load_network(options, images, reference, device)
    images, reference = (_at_resolution(side, network, options) for side in (images, reference))

    skipped: list[str] = []
    measured = describe(network, images, "images", options, skipped, share)
    real = describe(network, reference, "reference", options, skipped, share)
    metrics, absent = measure(network, measured, real, options, device)
    subset_size = min(options.kernel_subset_size, measured.count or 0, real.count or 0)
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
        skipped=tuple(skipped),
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
        protocol=stated or images.protocol(),
        warnings=tuple(_warnings(network, measured, real)),
        versions={name: version(name) for name in ("reglue", "torch", "timm", "torch-fidelity", "numpy", "pillow")},
    )
    if rank == 0:
        print(evaluation)
        report = json.dumps(asdict(evaluation), indent=1)
        if options.out:
            with replacing(options.out) as beside:
                beside.write_text(report)
        run = drawn_from(options.images, images.protocol())
        if run:
            _keep(report, run / REPORTS / report_name(evaluation), options.out)
    distributed.barrier()
    return evaluation


def drawn_from(images: Path, protocol: dict[str, Any] | None) -> Path | None:
    """The run that images were drawn from, if it is there: it was given itself, or their protocol names it."""
    if is_run(images):
        return images
    protocol = protocol or {}
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


def report_name(evaluation: Evaluation) -> str:
    """The file of a report in its run's `reports`: step, network, and a hash of all that the figures depend on.

    The same evaluation again, perhaps by other versions of libraries, has the same name.
    """
    protocol = evaluation.protocol or {}
    about = {name: value for name, value in asdict(evaluation).items() if name not in ("metrics", "absent", "warnings")}
    about |= {"versions": None, "protocol": {**protocol, "versions": None}}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
    network = re.sub(r"[^\w.-]+", "-", Path(evaluation.feature_network).name)
    return f"step-{protocol.get('step', 0):08d}-{network}-{digest}.json"


def _keep(report: str, file: Path, out: Path | None) -> None:
    """Write a report into its run, and say so. A run that cannot be written to is no reason to lose an evaluation."""
    if out and out.resolve().parent == file.resolve().parent:
        return
    try:
        file.parent.mkdir(exist_ok=True)
        with replacing(file) as beside:
            beside.write_text(report)
    except (OSError, UserError) as error:
        print(f"The report is not in {file.parent}, so no model card will show it: {error}", file=sys.stderr)
    else:
        print(f"The report is in {file}, for the model card.", file=sys.stderr)


def _stated_protocol(said: str | None) -> dict[str, Any] | None:
    """What the user says about images whose making nothing has recorded. Raises UserError if that is nothing."""
    content: Any = said
    if said is not None and said.endswith(".json"):
        file = Path(said)
        if not file.is_file():
            raise UserError(f"--protocol {file}: no such file; name one with a JSON object, or say it in a sentence")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"--protocol {file} is not JSON ({error}); mend it, or say it in a sentence") from error
        if not isinstance(content, dict):
            raise UserError(f"--protocol {file} holds no JSON object; write one, or say it in a sentence")
    elif said is not None:
        content = " ".join(said.split())
    if said is not None and not content:
        raise UserError("--protocol says nothing; give a sentence, or a .json file with an object")
    return None if said is None else {STATED: content}


def _reference_path(options: Evaluate) -> Path:
    if options.reference is not None:
        return options.reference
    if is_run(options.images):
        return options.images
    raise UserError(f"--reference is missing; only a run knows what to compare with, and {options.images} is none")


def _load_network(options: Evaluate, images: ImageSet, reference: ImageSet, device: torch.device) -> FeatureNetwork:
    name, file = options.feature_network, Path(options.feature_network)
    if name == INCEPTION or (file.is_file() and is_inception(file)):
        if options.features != "class-token":
            raise UserError(f"--features {options.features} is for vision encoders; leave it out with the Inception")
        return load_inception(None if name == INCEPTION else file, device)
    stores = [side.store for side in (reference, images) if side.store]
    resolution = _common_resolution(options, images, reference, stores)
    if name != STORE:
        return load_encoder_features(name, resolution, options.features, device)
    encoder = next((store.manifest.encoder for store in stores if store.manifest.encoder), None)
    if encoder is None:
        raise UserError("--feature-network store: neither side is a store with an encoder; name a network")
    return EncoderFeatures(load_encoder(encoder.name, resolution, device=device), options.features)


def _common_resolution(
    options: Evaluate, images: ImageSet, reference: ImageSet, stores: list[Store]
) -> tuple[int, int]:
    """The size at which an encoder is shown both sides."""
    if options.resolution is not None:
        return _given_resolution(options.resolution)
    if stores:
        return stores[0].manifest.source.resolution
    sources = [side.images for side in (images, reference) if side.images]
    if not sources:
        raise UserError(f"{images.path} and {reference.path} hold no images, and their statistics are the Inception's")
    return sources[0].first_size()


def _given_resolution(resolution: int | tuple[int, int]) -> tuple[int, int]:
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def _at_resolution(side: ImageSet, network: FeatureNetwork, options: Evaluate) -> ImageSet:
    """A side without the statistics of its file, if they are of images of another size than the one that is asked for.

    Raises UserError if the file has no images to compute them from.
    """
    if side.pool is None or options.resolution is None or not isinstance(network, Inception):
        return side
    height, width = _given_resolution(options.resolution)
    if side.images is None:
        raise UserError(
            f"--resolution: {side.path} holds statistics alone, which cannot be brought to {height}×{width} pixels; "
            "leave the option out, or give the images"
        )
    return side if side.images.first_size() == (height, width) else replace(side, pool=None, spatial=None)


def _refuse_too_few(count: int, what: str, side: ImageSet, options: Evaluate) -> None:
    """Raise UserError where there are fewer images than neighbours to look for."""
    least = max(NEIGHBOURS, DENSITY_NEIGHBOURS) + 1
    if count < least:
        asked = options.count is not None and side.path == options.images
        found = f"--count {options.count}" if asked else f"{side.path} has {count} {what}"
        raise UserError(f"{found}; at least {least} are needed for a comparison")


def describe(
    network: FeatureNetwork,
    side: ImageSet,
    name: str,
    options: Evaluate,
    skipped: list[str],
    share: Share | None = None,
) -> Described:
    """Features and Gaussians of one side, computed, or as far as its store or file has them.

    `name` says which side it is, for messages; names of images that cannot be read are added to `skipped`. `share` is
    what this process describes, of what all return; all of it if not given.
    """
    share = share or Share(options.batch_size)
    given = side.pool is not None and isinstance(network, Inception)
    if side.images is None and not given:
        raise UserError(f"{side.path} holds no images, and its statistics are the Inception's; give the images too")
    images, size, origin = None, None, ""
    if isinstance(network, EncoderFeatures) and side.store and _has_features(side.store, network):
        origin, size = "class tokens cached in the store", network.image_size
        images = FeatureSet(side.store.read("cls", side.store.originals)["cls"].float(), None, None)
    elif side.images is not None:
        origin = "computed from the images"
        size = _given_resolution(options.resolution) if options.resolution else network.image_size
        size = size or side.images.first_size()
        # Whose influence on sFID resampling asks for: the images', not the reference's.
        keep_spatial = name == "images" and options.resamples > 0
        images = _describe_share(network, side, size, name, share, skipped, keep_spatial)
    if images is not None:
        _refuse_too_few(len(images.features), "readable images", side, options)
    if given:
        assert side.pool is not None
        for gaussian, width in ((side.pool, network.width), (side.spatial, network.spatial_width)):
            if gaussian is not None and len(gaussian.mean) != width:
                raise UserError(f"{side.path} has statistics of {len(gaussian.mean)} features, not of {width}")
        what = "FID and sFID" if side.spatial else "FID"
        origin = f"{what} from the statistics in the file, all else {origin}" if origin else "statistics in the file"
        spatial = side.spatial or (images.spatial.gaussian if images and images.spatial else None)
        return Described(side.pool, spatial, images, size, origin, given)
    assert images is not None
    pool = GaussianStatistics(network.width).update(images.features).gaussian
    return Described(pool, images.spatial.gaussian if images.spatial else None, images, size, origin, given)


def _has_features(store: Store, network: EncoderFeatures) -> bool:
    """Whether the store's class tokens are what the network would say. Choices for the patches do not matter."""
    cached: EncoderSpec | None = store.manifest.encoder
    spec = network.encoder.spec
    if network.kind != "class-token" or cached is None:
        return False
    return replace(cached, layers=spec.layers, final_norm=spec.final_norm) == spec


def _describe_share(
    network: FeatureNetwork,
    side: ImageSet,
    size: tuple[int, int],
    name: str,
    share: Share,
    skipped: list[str],
    keep_spatial: bool,
) -> FeatureSet:
    """What the network says about a side, in its order, of which each process describes a share.

    Names of unreadable images are added to `skipped`.
    """
    numbers: list[int] = []
    unreadable: list[tuple[int, str]] = []
    batches = _batches(side, size, name, share, numbers, unreadable)
    found = describe_images(network, batches, keep_spatial=keep_spatial)
    if share.processes == 1:
        skipped += [image for _, image in unreadable]
        return found
    lines = "".join(json.dumps(pair) + "\n" for pair in unreadable).encode()
    text = distributed.all_gather(torch.tensor(list(lines), dtype=torch.uint8))
    skipped += [image for _, image in sorted(json.loads(line) for line in bytes(text.tolist()).splitlines())]
    order = distributed.all_gather(torch.tensor(numbers, dtype=torch.int64)).argsort()
    logits = distributed.all_gather(torch.zeros(0, 0) if found.logits is None else found.logits)
    return FeatureSet(
        features=distributed.all_gather(found.features)[order],
        logits=logits[order] if len(logits) else None,
        spatial=_of_all_processes(found.spatial) if found.spatial else None,
        spatial_features=None
        if found.spatial_features is None
        else distributed.all_gather(found.spatial_features)[order],
    )


def _of_all_processes(statistics: GaussianStatistics) -> GaussianStatistics:
    """Statistics of what all processes have seen."""
    own = (torch.tensor(statistics.count), statistics.mean, statistics.scatter)
    counts, means, scatters = (distributed.all_gather(part[None]) for part in own)
    merged = GaussianStatistics(len(statistics.mean))
    for count, mean, scatter in zip(counts.tolist(), means, scatters, strict=True):
        merged.merge(GaussianStatistics.of(count, mean, scatter))
    return merged


def _batches(
    side: ImageSet,
    size: tuple[int, int],
    name: str,
    share: Share,
    numbers: list[int],
    unreadable: list[tuple[int, str]],
) -> Iterator[Tensor]:
    """The readable images of a share, uint8 (B, 3, *size), a batch at a time.

    Their numbers within the side are added to `numbers`, numbers and names of the others to `unreadable`.
    """
    assert side.images is not None
    count = len(side.images)
    with tqdm(total=count, unit="image", desc=name, disable=share.rank > 0) as progress:
        for within, batch in zip(share.batches(count), side.images.batches(size, share), strict=True):
            readable = []
            for number, image in zip(within, batch, strict=True):
                if isinstance(image, Tensor):
                    readable.append(image)
                    numbers.append(number)
                else:
                    tqdm.write(f"skipped {image.name} of the {name}: {image.reason}", file=sys.stderr)
                    unreadable.append((number, image.name))
            if readable:
                yield torch.stack(readable)
            progress.update(min(len(batch) * share.processes, count - progress.n))


def _distance(own: Gaussian, reference: Gaussian, features: Tensor | None, counts: Tensor) -> Figure:
    """The Fréchet distance, with an interval if the features (N, D) behind `own` are there to be resampled."""
    distance = frechet_distance(own, reference)
    if features is None:
        return Figure(distance)
    influence = frechet_influence(features, own, reference)
    return Figure.of(distance, resampled_means(influence, counts), least=0)


def measure(
    network: FeatureNetwork, measured: Described, real: Described, options: Evaluate, device: torch.device
) -> tuple[Metrics, dict[str, str]]:
    """The figures, and the reasons for those that are missing."""
    images, others = measured.images, real.images
    # Of statistics that came in the file there are no images to resample.
    resampled = None if measured.given or images is None or not options.resamples else images
    count = len(images.features) if images else 0
    counts = resample_counts(count, options.resamples if images else 0, options.seed, "images")
    metrics = Metrics(_distance(measured.gaussian, real.gaussian, resampled and resampled.features, counts))
    absent: dict[str, str] = {}
    if measured.spatial and real.spatial:
        spatial = _distance(measured.spatial, real.spatial, resampled and resampled.spatial_features, counts)
        metrics = replace(metrics, spatial_frechet_distance=spatial)
    else:
        absent["sFID"] = "a file has no mu_s" if network.spatial_width else "defined for the Inception alone"
    if images is None:
        return metrics, absent | dict.fromkeys(
            [name for name in NAMES.values() if name != "sFID"], f"{options.images} has statistics and no images"
        )
    if images.logits is None:
        absent["Inception Score"] = network.without_logits
    else:
        whole = torch.ones(1, len(images.logits))
        score = float(inception_scores(images.logits, whole))
        metrics = replace(metrics, inception_score=Figure.of(score, inception_scores(images.logits, counts)))
    if others is None:
        need_images = ("precision", "recall", "KID", "density", "coverage")
        return metrics, absent | dict.fromkeys(need_images, "the reference has statistics and no images")

    generated, reals = (side.features.to(device) for side in (images, others))
    kernel = kernel_distance(
        generated,
        reals,
        subsets=options.kernel_subsets,
        subset_size=options.kernel_subset_size,
        generator=generator(options.seed, "kernel distance"),
        counts=counts,
    )
    scores = manifold_scores(
        generated=generated,
        real=reals,
        neighbours=NEIGHBOURS,
        density_neighbours=DENSITY_NEIGHBOURS,
    )

    def mean(values: Tensor, most: float = 1.0) -> Figure:
        resampled = resampled_means(values.cpu(), counts) if len(counts) else torch.empty(0)
        return Figure.of(float(values.mean()), resampled, least=0, most=most)

    return replace(
        metrics,
        precision=mean(scores.precision),
        # Recall and coverage have no intervals: they rest on few images that lie far from all others, and resamples do
        # not tell by how much they would move had others been drawn.
        recall=Figure(float(scores.recall.mean())),
        kernel_distance=Figure.of(kernel.mean, kernel.resampled),
        kernel_distance_std=kernel.std,
        density=mean(scores.density, most=math.inf),
        coverage=Figure(float(scores.coverage.mean())),
    ), absent


def _warnings(network: FeatureNetwork, measured: Described, real: Described) -> Iterator[str]:
    for name, side in (("images", measured), ("reference images", real)):
        if not side.given and side.count is not None and side.count < network.width:
            yield (
                f"warning: {side.count} {name} for {network.width} features: the covariance is singular and the "
                "Fréchet distance biased; compare it only with figures from as many images"
            )
    if measured.size and real.size and measured.size != real.size:
        sizes = [f"{height}×{width}" for height, width in (measured.size, real.size)]
        yield (
            f"warning: images of {sizes[0]} pixels are compared with a reference of {sizes[1]}: the figures contain "
            "the difference in sharpness; --resolution brings both to one size"
        )


def _shown(figure: Figure) -> str:
    digits = 6 if abs(figure.value) < 0.1 else 4
    value = f"{figure.value:.{digits}f}"
    return value if figure.low is None else f"{value} [{figure.low:.{digits}f}, {figure.high:.{digits}f}]"


def _side_row(path: str, count: int | None, size: tuple[int, int] | None, origin: str) -> str:
    counted = "" if count is None else f"{count} of "
    sized = "" if size is None else f", {size[0]}×{size[1]} pixels"
    return f"{counted}{path}{sized} ({origin})"


def _protocol_row(protocol: dict[str, Any] | None) -> str:
    """A protocol on one line, but for what is long."""
    if protocol is None:
        return "not recorded: nothing says how the images were made"
    short = {name: value for name, value in protocol.items() if name not in ("labels", "class_names", "versions")}
    return ", ".join(f"{name} {value}" for name, value in _flat(short))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, value
