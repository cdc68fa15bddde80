"""`reglue probe`: what features, codes, class tokens and latents of a store still say, told by small probes.

REGLUE's study of its compressor (arXiv 2512.16636) for any store: accuracy of classes, or mean intersection over union
of masks, beside the compression ratio, the reconstruction error and the speed of each compressor.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm
from tyro.conf import Positional

from reglue.data.manifest import CLASS_TOKEN_CODES, LOCAL_CODES, compressor_of, holds_codes, value_of
from reglue.data.store import Store
from reglue.encoders.compressors import Compressor, as_map, load_compressor
from reglue.errors import UserError, require
from reglue.files import TakesPaths, read_json, read_jsonl, replacing, to_json
from reglue.perception.masks import load_masks
from reglue.perception.probes import IGNORE, Constant, Examples, Fitted, Training, fit_linear, fit_map, measure
from reglue.seeds import permutation
from reglue.training import distributed

LAST_LAYER = "features.last"
"""The name of the features of the last stored layer alone, among the inputs."""
REPORT, TABLE, FIGURE = "report.json", "report.md", "figure.png"
TIMED_SECONDS = 1.0
"""At least so long is a compressor's speed measured."""

ProbeKind = Literal["linear, pooled", "linear, flat", "linear", "conv"]
PROBES: tuple[ProbeKind, ...] = get_args(ProbeKind)
LEAST_IMAGES = 4
"""Two to fit a probe to, one to choose its regularisation by and one to measure it on."""


@dataclass(frozen=True)
class Probe(TakesPaths):
    """Fit small probes that tell classes, or masks, from what a store holds: how much does compression keep?

    The same command again continues where an interrupted one stopped, and adds what the store has gained.
    """

    store: Positional[Path]
    """A store with features, codes or class tokens."""
    out: Path
    """Folder of the results (report.json, report.md, figure.png): new, empty, or left over from the same command."""
    masks: Path | None = None
    """Tell the class of every pixel instead of the image's: folder of masks, palette or greyscale PNG files of class
    numbers (255 is ignored) with the names of the images. Images without one are left out."""
    validation: Path | None = None
    """A second store of the same kind to measure on; its codes are computed where it has none. Default: a share of the
    first (--held-out)."""
    validation_masks: Path | None = None
    """Masks of the second store. Default: the folder --masks."""
    columns: tuple[str, ...] | None = None
    """What to probe: features, features.last (the last layer), local.NAME, cls, cls.NAME, latent. Default: all."""
    conv: bool = True
    """Fit the small convolutional probe too."""
    images: int | None = None
    """Use so many images of each store, drawn at random. Default: all, but for the mirror images of --flips."""
    held_out: float = 0.2
    """Share of the images to measure on, which no probe is fitted to."""
    selection: float = 0.2
    """Share of the other images that choose a probe's regularisation."""
    flat_limit: int = 4096
    """A linear probe sees every value of an input by itself where there are no more than this. Memory grows as the
    square: 4096 takes 1 GB."""
    hidden: int = 64
    """Channels of the convolutional probe."""
    steps: int = 1000
    """Of the training of probes of maps. A tenth of them is the grain at which training may stop early."""
    batch_size: int = 64
    """Images per step."""
    learning_rate: float = 1e-3
    """Of Adam, at the start; it falls to 0 along a cosine."""
    seed: int = 0
    """Of the split, of weights and of the order of images."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "hidden", "steps", "batch_size", at_least=1)
        require(self, "held_out", "selection", more_than=0, less_than=1)
        require(self, "images", at_least=LEAST_IMAGES)
        require(self, "flat_limit", "seed", at_least=0)
        require(self, "learning_rate", more_than=0)
        if self.validation_masks is not None and (self.masks is None or self.validation is None):
            raise UserError("--validation-masks belongs to --masks and --validation; give these too")

    def decisive(self) -> dict[str, Any]:
        """The options that decide every result, as JSON has them."""
        without = {"store", "out", "validation", "masks", "validation_masks", "columns", "conv", "flat_limit", "device"}
        return {option: value for option, value in asdict(self).items() if option not in without}


@dataclass(frozen=True)
class Result:
    """One probe of one input."""

    input: str
    probe: ProbeKind
    data: str
    """SHA-256 of the column's shards."""
    channels: int
    values: int
    """Of an image: channels × positions."""
    score: float
    """Accuracy, or mean intersection over union, on images that were not fitted to; 0 to 1."""
    standard_error: float
    """Of sampling those images: binomial, or by bootstrap over images."""
    pixel_accuracy: float | None
    chosen: float
    """The ridge's penalty, or the step at which training stopped."""
    selection_score: float
    """On the images that chose it."""
    compression_ratio: float | None
    """Channels of what the input was made from ÷ its own; None for latents."""
    mse: float | None
    """Of a compressor's reconstruction of standardised features, on images that it was not fitted to."""
    explained_variance: float | None
    """Share of the variance that a compressor's reconstruction explains, on the same images."""
    encoded_per_second: float | None
    """Images whose features the compressor encodes in a second, in memory."""
    seconds: float
    """That fitting and measuring the probe took."""
    at_end: bool = False
    """Whether the penalty was the smallest or largest on offer: the score may be a lower bound."""


@dataclass(frozen=True)
class Report:
    """All probes of a store."""

    metric: Literal["accuracy", "mIoU"]
    classes: int
    chance: float
    """The score of the most common class, whatever the input."""
    fitted: int
    """Images that probes are fitted to …"""
    selected: int
    """… that choose their regularisation (a ridge is then fitted to these too) …"""
    measured: int
    """… and that they are measured on."""
    without_mask: int
    """Images of the stores that were left out."""
    protocol: dict[str, Any]
    """What decides the results: options, and fingerprints of images, models and masks."""
    device: str
    threads: int
    """Of PyTorch on the CPU; with `device`, what speeds depend on."""
    versions: dict[str, str]
    results: tuple[Result, ...] = ()


def probe(options: Probe) -> Report:
    """Fit and measure all probes, print a table and write it. Raises UserError for anything that the user can mend."""
    device = distributed.alone("probe", options.device)
    store = Store.open(options.store)
    validation = None if options.validation is None else _second_store(options.validation, store)
    inputs = _inputs(options, store)
    split = _split(options, store, validation)
    report = _begin(options, store, validation, split, device)
    current = {read.name: read.data for read in inputs}
    done = {(one.input, one.probe): one for one in report.results if one.data == current.get(one.input)}
    chosen = [read for read in inputs if options.columns is None or read.name in options.columns]
    jobs: dict[str, list[ProbeKind]] = {
        read.name: [kind for kind in _kinds(options, read) if (read.name, kind) not in done] for read in chosen
    }
    with tqdm(total=sum(map(len, jobs.values())), desc="probe", unit="probe") as progress:
        for read in chosen:
            speed = _encoded_per_second(options, read, split, device) if jobs[read.name] else None
            for kind in jobs[read.name]:
                progress.set_postfix_str(f"{read.name}: {kind}")
                result = _measure(options, read, kind, split, report.classes, device)
                done[read.name, kind] = replace(result, encoded_per_second=speed)
                _write(options.out / REPORT, to_json(replace(report, results=tuple(done.values()))))
                progress.update()
    order = [read.name for read in inputs]
    results = sorted(done.values(), key=lambda result: (order.index(result.input), PROBES.index(result.probe)))
    report = replace(report, results=tuple(results))
    _write(options.out / REPORT, to_json(report))
    _write(options.out / TABLE, as_markdown(report) + "\n")
    draw(report, options.out / FIGURE)
    print(as_markdown(report))
    return report


@dataclass(frozen=True)
class Input:
    """Something of a store that probes look at."""

    name: str
    column: str
    channels: slice
    shape: tuple[int, int, int]
    """(C, h, w); class tokens are maps of one position."""
    shift: Tensor
    scale: Tensor
    """(C, 1, 1): inputs are (x − shift)·scale, of unit variance by the store's statistics."""
    data: str
    compressor: Compressor | None
    ratio: float | None
    fit: dict[str, float]
    """What `reglue compress` measured last."""

    def read(self, store: Store, rows: Tensor) -> Tensor:
        """(n, C, h, w) float32 of rows (n,) of the store, or of another one of the same kind."""
        return (as_map(self._raw(store, rows).float()) - self.shift) * self.scale

    @torch.inference_mode()
    def _raw(self, store: Store, rows: Tensor) -> Tensor:
        manifest = store.manifest
        if self.compressor is not None:
            same = manifest.compressors.get(compressor_of(self.column)) == self.compressor.spec()
            if not (same and self.column in manifest.columns):
                column, channels = self.compressor.column, _taken(self.compressor, store)
                if channels is None:
                    raise UserError(
                        f"{store.folder} has neither the codes {self.column} nor the layers "
                        f"{list(self.compressor.layers or ())} that they are made of; prepare it with these"
                    )
                return self.compressor.encode(as_map(store.read(column, rows, channels)[column]))
        return store.read(self.column, rows, self.channels)[value_of(self.column)]


@dataclass(frozen=True)
class Part:
    """Rows of a store with what is to be told of them."""

    store: Store
    rows: Tensor
    """(n,)."""
    targets: Tensor
    """(n, …): the classes of images or of pixels."""

    def __getitem__(self, which: slice | Tensor) -> Part:
        return replace(self, rows=self.rows[which], targets=self.targets[which])

    def ascending(self) -> Part:
        """In the order of the store, which is faster to read."""
        return self[self.rows.argsort()]

    def examples(self, read: Input) -> Examples:
        """The same as a probe sees it."""
        return Examples(lambda rows: read.read(self.store, rows), self.rows, self.targets, read.shape)


@dataclass(frozen=True)
class Split:
    """Which images serve for what."""

    fitting: Part
    selection: Part
    measured: Part
    masks_sha256: str | None
    without_mask: int


def _second_store(path: Path, store: Store) -> Store:
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


def _inputs(options: Probe, store: Store) -> list[Input]:
    """What can be probed, in the order of the table. Raises UserError for a column that was asked for and is not."""
    columns = store.manifest.columns
    layers = store.manifest.encoder.layers if store.manifest.encoder else ()
    names = [name for name in ("features", "cls", "latent") if name in columns]
    names += [name for name in columns if holds_codes(name)]
    names += [LAST_LAYER] if "features" in columns and len(layers) > 1 else []
    if options.masks is not None:  # One vector for an image says nothing of where.
        names = [name for name in names if name != "cls" and not name.startswith(CLASS_TOKEN_CODES)]
    order = ["features", LAST_LAYER, LOCAL_CODES, "cls", CLASS_TOKEN_CODES, "latent"]
    names.sort(key=lambda name: (order.index(name[: name.find(".") + 1] if holds_codes(name) else name), name))
    for name in options.columns or ():
        if name not in names:
            raise UserError(f"--columns {name}: choose from {', '.join(names)}")
    return [input_of(store, name) for name in names]


def input_of(store: Store, name: str) -> Input:
    """One of the inputs that a store has, by its name."""
    manifest = store.manifest
    column = "features" if name == LAST_LAYER else name
    encoder = manifest.encoder
    channels = slice(-encoder.width, None) if name == LAST_LAYER and encoder else slice(None)
    content, statistics = manifest.columns[column], manifest.statistics[column]
    mean, std = (torch.tensor(value)[channels].float() for value in (statistics.mean, statistics.std))
    width, *grid = content.tensors[value_of(column)].shape
    height, across = grid or (1, 1)
    compressor, fit = None, {}
    ratio = {"features": 1.0, "cls": 1.0, LAST_LAYER: width / len(mean)}.get(name)
    if holds_codes(column):
        folder = store.folder / "compressors" / compressor_of(column)
        compressor = load_compressor(folder)
        ratio = compressor.spec().channels_in / width
        fit = _last_line(folder / "metrics.jsonl")
    return Input(
        name=name,
        column=column,
        channels=channels,
        shape=(len(mean), height, across),
        shift=mean[:, None, None],
        scale=1 / torch.where(std > 1e-6, std, 1.0)[:, None, None],
        data=hashlib.sha256("".join(shard.sha256 for shard in content.shards).encode()).hexdigest(),
        compressor=compressor,
        ratio=ratio,
        fit=fit,
    )


def _taken(compressor: Compressor, store: Store) -> slice | None:
    """Which channels of a store's column a compressor takes; None if the store does not have them."""
    encoder = store.manifest.encoder
    if encoder is None or compressor.column not in store.manifest.columns:
        return None
    if compressor.column == "cls":
        return slice(None)
    try:
        return encoder.channels_of(compressor.layers)
    except ValueError:
        return None


def _last_line(path: Path) -> dict[str, float]:
    """The last of the figures that `reglue compress` wrote; none if they are gone."""
    lines = read_jsonl(path, dict[str, float], "delete it")
    return lines[-1] if lines else {}


def _split(options: Probe, store: Store, validation: Store | None) -> Split:
    """Who is fitted to, who selects, who is measured on: random by the seed, or the second store."""
    parts = [with_classes(store, options.masks)]
    if validation is not None:
        parts.append(with_classes(validation, options.validation_masks or options.masks))
    fitting, selection, measured = divided(
        parts, options.seed, options.images, held_out=options.held_out, selection=options.selection
    )
    digest = hashlib.sha256(b"".join(part.targets.numpy().tobytes() for part in parts)) if options.masks else None
    return Split(
        fitting=fitting,
        selection=selection,
        measured=measured,
        masks_sha256=digest.hexdigest() if digest else None,
        without_mask=sum(len(part.store.originals) - len(part.rows) for part in parts),
    )


def divided(
    parts: Sequence[Part], seed: int, images: int | None, *, held_out: float, selection: float
) -> tuple[Part, Part, Part]:
    """What is fitted to, what chooses the regularisation, and what is measured on, random by the seed.

    The share `held_out` of the first part is measured on, or the second part if there is one; the share `selection` of
    the rest selects. No more than `images` are drawn from each part. Raises UserError for too few.
    """
    drawn = []
    for part in parts:
        order = permutation(seed, "probe split", 0, len(part.rows))
        drawn.append(part[order[:images]])
    rest, *others = drawn
    if others:
        measured = others[0]
    else:
        measuring = max(1, round(held_out * len(rest.rows)))
        measured, rest = rest[:measuring], rest[measuring:]
    selecting = max(1, round(selection * len(rest.rows)))
    if len(rest.rows) - selecting < 2:
        raise UserError(
            f"{parts[0].store.folder} has too few images for probes: {len(parts[0].rows)}; use another store"
        )
    return rest[selecting:].ascending(), rest[:selecting].ascending(), measured.ascending()


def with_classes(store: Store, masks: Path | None) -> Part:
    """All rows of a store that have a target, but mirror images: a probe fitted to those would know the measured."""
    source, rows = store.manifest.source, store.originals
    if masks is not None:
        found, targets = load_masks(masks, Path(source.path), store.names(rows), source.resolution)
        return Part(store, rows[found], targets)
    if not source.class_names:
        raise UserError(f"{store.folder} has no classes to tell; give --masks")
    return Part(store, rows, store.labels[rows])


def _begin(options: Probe, store: Store, validation: Store | None, split: Split, device: torch.device) -> Report:
    """The report without results, or with those of an interrupted run. Raises UserError if the folder holds others."""
    parts = (split.fitting, split.selection, split.measured)
    if options.masks is None:
        classes = len(store.manifest.source.class_names)
    else:
        if any(bool((part.targets == IGNORE).all()) for part in parts):
            raise UserError(f"{options.masks}: too few masks with a pixel that is not to be ignored (255); give more")
        classes = 1 + max(int(part.targets.masked_fill(part.targets == IGNORE, 0).max()) for part in parts)
    constant = Constant.fit(split.fitting.targets)
    nothing = Examples(
        lambda rows: torch.empty(len(rows), 1, 1, 1), split.measured.rows, split.measured.targets, (1, 1, 1)
    )
    manifests = [one.manifest for one in (store, validation) if one is not None]
    protocol = {
        **options.decisive(),
        "images_sha256": [manifest.source.fingerprint for manifest in manifests],
        "encoder_sha256": store.manifest.encoder.weights_sha256 if store.manifest.encoder else None,
        "autoencoder_sha256": store.manifest.autoencoder.weights_sha256,
        "masks_sha256": split.masks_sha256,
    }
    report = Report(
        metric="accuracy" if options.masks is None else "mIoU",
        classes=classes,
        chance=measure(constant, nothing, classes, options.seed, resamples=0).value,
        fitted=len(split.fitting.rows),
        selected=len(split.selection.rows),
        measured=len(split.measured.rows),
        without_mask=split.without_mask,
        protocol=protocol,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        versions={name: version(name) for name in ("reglue", "torch", "numpy")},
    )
    path = options.out / REPORT
    if not path.is_file():
        if options.out.is_dir() and any(options.out.iterdir()):
            raise UserError(f"{options.out} holds other files; choose a new or an empty folder for --out")
        options.out.mkdir(parents=True, exist_ok=True)
        return report
    before = read_json(path, Report, "delete it, or choose another --out")
    for key, value in protocol.items():
        if before.protocol.get(key) != value:
            raise UserError(
                f"{path} was made with {key.replace('_', '-')} {before.protocol.get(key)}, not {value}; "
                "choose another --out, or the old settings"
            )
    return replace(report, results=before.results)


def _kinds(options: Probe, read: Input) -> Iterator[ProbeKind]:
    """The probes that suit an input."""
    channels, height, width = read.shape
    if options.masks is not None:
        yield "linear"
    else:
        yield "linear, pooled"
        if 1 < height * width <= options.flat_limit / channels:
            yield "linear, flat"
    if options.conv and height * width > 1:
        yield "conv"


def _measure(options: Probe, read: Input, kind: ProbeKind, split: Split, classes: int, device: torch.device) -> Result:
    """Fit one probe and measure it."""
    started = time.perf_counter()
    fitted = _fit(options, kind, split.fitting.examples(read), split.selection.examples(read), classes, device)
    score = measure(fitted.probe, split.measured.examples(read), classes, options.seed)
    seconds = time.perf_counter() - started
    channels, height, width = read.shape
    return Result(
        input=read.name,
        probe=kind,
        data=read.data,
        channels=channels,
        values=channels * height * width,
        score=score.value,
        standard_error=score.standard_error,
        pixel_accuracy=score.pixel_accuracy,
        chosen=fitted.chosen,
        selection_score=fitted.selection_score,
        compression_ratio=read.ratio,
        mse=read.fit.get("validation_mse"),
        explained_variance=read.fit.get("explained_variance"),
        encoded_per_second=None,
        seconds=seconds,
        at_end=fitted.at_end,
    )


def _fit(
    options: Probe, kind: ProbeKind, fitting: Examples, selection: Examples, classes: int, device: torch.device
) -> Fitted:
    if kind in ("linear, pooled", "linear, flat"):
        return fit_linear(fitting, selection, classes, flat=kind == "linear, flat")
    training = Training(
        hidden=options.hidden if kind == "conv" else 0,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        device=device,
    )
    return fit_map(fitting, selection, classes, training)


@torch.inference_mode()
def _encoded_per_second(options: Probe, read: Input, split: Split, device: torch.device) -> float | None:
    """Images per second from features in memory to codes, after one batch to warm up.

    None without a compressor, and where the store has kept the codes but not the layers that it takes.
    """
    store = split.measured.store
    channels = read.compressor and _taken(read.compressor, store)
    if read.compressor is None or channels is None:
        return None
    compressor = copy.deepcopy(read.compressor).to(device)
    rows = split.measured.rows[: options.batch_size]
    features = as_map(store.read(compressor.column, rows, channels)[compressor.column]).to(device)

    def encode() -> None:
        compressor.encode(features).sum().item()  # Waits for the device.

    encode()
    started, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < TIMED_SECONDS:
        encode()
        count += len(rows)
    return count / seconds


def _write(path: Path, text: str) -> None:
    with replacing(path) as beside:
        beside.write_text(text)


def as_markdown(report: Report) -> str:
    """The results as a table in Markdown, and what they rest on; no newline at the end."""
    pixels = ["pixel accuracy"] if report.metric == "mIoU" else []
    heads = ["input", "probe", report.metric, *pixels, "channels", "values", "ratio", "MSE", "explained", "encoded/s"]
    lines = [heads, ["---"] * 2 + ["---:"] * (len(heads) - 2), *map(_cells, report.results)]
    without = f"; {report.without_mask} images have no mask" if report.without_mask else ""
    about = (
        f"{report.classes} classes, chance {report.chance:.3f} (the most common one). Fitted to {report.fitted} "
        f"images, regularisation chosen on {report.selected}, measured on {report.measured}{without}; ± one standard "
        f"error. Speed on {report.device}, {report.threads} CPU threads."
    )
    at_end = [
        f"The best penalty for {result.input} ({result.probe}) was {result.chosen:g}, at the end of those on offer: a "
        "better one may lie beyond, so its score is a lower bound."
        for result in report.results
        if result.at_end
    ]
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", about, *at_end])


def _cells(result: Result) -> list[str]:
    return [
        result.input,
        result.probe,
        f"{result.score:.3f} ± {result.standard_error:.3f}",
        *([] if result.pixel_accuracy is None else [f"{result.pixel_accuracy:.3f}"]),
        str(result.channels),
        str(result.values),
        "–" if result.compression_ratio is None else f"{result.compression_ratio:g}×",
        "–" if result.mse is None else f"{result.mse:.3f}",
        "–" if result.explained_variance is None else f"{result.explained_variance:.1%}",
        "–" if result.encoded_per_second is None else f"{result.encoded_per_second:,.0f}",
    ]


def draw(report: Report, path: Path) -> None:
    """The scores over the number of channels, as PNG."""
    from matplotlib.figure import Figure  # Slow to import.

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for kind in dict.fromkeys(result.probe for result in report.results):
        results = sorted((one for one in report.results if one.probe == kind), key=lambda one: one.channels)
        axes.errorbar(
            [one.channels for one in results],
            [one.score for one in results],
            [one.standard_error for one in results],
            fmt="o",
            capsize=3,
            alpha=0.8,
            label=kind,
        )
    for name in dict.fromkeys(result.input for result in report.results):
        one = max((result for result in report.results if result.input == name), key=lambda result: result.score)
        where = {"textcoords": "offset points", "xytext": (7, 0), "va": "center", "size": 8}
        axes.annotate(one.input, (one.channels, one.score), **where)
    axes.axhline(report.chance, color="grey", linestyle=":", label="the most common class")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("channels")
    axes.set_ylabel(report.metric)
    axes.grid(alpha=0.25)
    axes.margins(x=0.12, y=0.12)
    axes.legend()
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=150)
