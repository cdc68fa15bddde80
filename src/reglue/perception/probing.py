"""Probes of all that a store holds: which fit what, their results, and the report as table and picture."""

from __future__ import annotations

import copy
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from reglue.data.manifest import CLASS_TOKEN_CODES, LOCAL_CODES, holds_codes
from reglue.data.store import Store
from reglue.files import replacing
from reglue.perception.agreement import markdown_table
from reglue.perception.labelled import LAST_LAYER, Parts, StoreInput, compressor_figures, read_uncompressed
from reglue.perception.probes import ProbeTraining, fit_linear, fit_map, measure_probe

NAME = 40
"""Characters of an input's name on a line of the picture."""
TIMED_SECONDS = 1.0
"""At least so long is a compressor's speed measured."""
COMPARED = 2000
"""Images among which neighbours are looked for, at most: their cosines are as many, squared."""
ProbeKind = Literal["linear, pooled", "linear, flat", "linear", "conv"]
PROBES: tuple[ProbeKind, ...] = get_args(ProbeKind)


@dataclass(frozen=True)
class ProbeResult:
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
    cknna: float | None
    """How far the input, averaged over positions, has the same nearest images as the encoder's last layer, of those
    that are measured on (`neighbours.cknna`); None for that layer itself, and without it."""
    seconds: float
    """Of fitting and measuring the probe."""
    at_end: bool = False
    """Whether the penalty was the smallest or largest on offer: the score may be a lower bound."""


@dataclass(frozen=True)
class ProbeReport:
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
    results: tuple[ProbeResult, ...] = ()


def input_names(store: Store, maps_only: bool) -> list[str]:
    """What of a store can be probed, in the order of the table; with `maps_only` no vectors, which have no places."""
    columns, encoder = store.manifest.columns, store.manifest.encoder
    names = [name for name in columns if name in ("features", "cls", "latent") or holds_codes(name)]
    if "features" in columns and encoder and len(encoder.layers) > 1:
        names.append(LAST_LAYER)
    if maps_only:
        names = [name for name in names if name != "cls" and not name.startswith(CLASS_TOKEN_CODES)]
    order = ["features", LAST_LAYER, LOCAL_CODES, "cls", CLASS_TOKEN_CODES, "latent"]
    return sorted(
        names, key=lambda name: (order.index(name[: name.find(".") + 1] if holds_codes(name) else name), name)
    )


def probe_kinds(read: StoreInput, masks: bool, conv: bool, flat_limit: int) -> Iterator[ProbeKind]:
    """The probes that suit an input, of pixels if there are `masks`; flat ones see at most `flat_limit` values."""
    channels, height, width = read.shape
    if masks:
        yield "linear"
    else:
        yield "linear, pooled"
        if 1 < height * width <= flat_limit / channels:
            yield "linear, flat"
    if conv and height * width > 1:
        yield "conv"


def run_probe(read: StoreInput, kind: ProbeKind, parts: Parts, classes: int, training: ProbeTraining) -> ProbeResult:
    """Fit one probe and measure it; `training` is that of probes of maps. Speeds are not measured."""
    started = time.perf_counter()
    fitting, selection, measured = map(read.examples, parts)
    if kind in ("linear, pooled", "linear, flat"):
        fitted = fit_linear(fitting, selection, classes, flat=kind == "linear, flat")
    else:
        fitted = fit_map(fitting, selection, classes, training)
    score = measure_probe(fitted.probe, measured, classes, training.seed)
    seconds = time.perf_counter() - started
    channels, height, width = read.shape
    figures = compressor_figures(parts.fitting.store, read.column) if read.compressor else {}
    return ProbeResult(
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
        mse=figures.get("validation_mse"),
        explained_variance=figures.get("explained_variance"),
        encoded_per_second=None,
        cknna=None,
        seconds=seconds,
        at_end=fitted.at_end,
    )


@torch.inference_mode()
def encoded_per_second(read: StoreInput, parts: Parts, batch_size: int, device: torch.device) -> float | None:
    """Images per second from features in memory to codes, after one batch to warm up.

    None without a compressor, and where the store has kept the codes but not the layers that it takes.
    """
    if read.compressor is None:
        return None
    features = read_uncompressed(read.compressor, parts.measured.store, parts.measured.rows[:batch_size])
    if features is None:
        return None
    compressor, features = copy.deepcopy(read.compressor).to(device), features.to(device)

    def encode() -> None:
        compressor.encode(features).sum().item()  # Waits for the device.

    encode()
    started, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < TIMED_SECONDS:
        encode()
        count += len(features)
    return count / seconds


def pooled(read: StoreInput, parts: Parts) -> Tensor:
    """What images that are measured on, `COMPARED` at most, have of an input: (n, C), averaged over positions."""
    images = read.examples(parts.measured[:COMPARED])
    return torch.cat([inputs.mean((2, 3)) for inputs, _ in images.batches("compare")])


def probe_table(report: ProbeReport) -> str:
    """The results as a table in Markdown, and what they rest on; no newline at the end."""
    pixels = ["pixel accuracy"] if report.metric == "mIoU" else []
    heads = ["input", "probe", report.metric, *pixels, "channels", "values", "ratio", "MSE", "explained", "CKNNA"]
    heads.append("encoded/s")
    table = markdown_table(heads, map(_cells, report.results), texts=2)
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
    return "\n".join([table, "", about, *at_end])


def _cells(result: ProbeResult) -> list[str]:
    def cell(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    return [
        result.input,
        result.probe,
        f"{result.score:.3f} ± {result.standard_error:.3f}",
        *([] if result.pixel_accuracy is None else [f"{result.pixel_accuracy:.3f}"]),
        str(result.channels),
        str(result.values),
        "–" if result.compression_ratio is None else f"{result.compression_ratio:g}×",
        cell(result.mse, ".3f"),
        cell(result.explained_variance, ".1%"),
        cell(result.cknna, ".3f"),
        cell(result.encoded_per_second, ",.0f"),
    ]


def plot_probes(report: ProbeReport, path: Path) -> None:
    """The scores with a line for each input, those of the most channels first, as PNG."""
    from matplotlib.figure import Figure  # Slow to import.

    channels = {result.input: result.channels for result in report.results}
    inputs = sorted(channels, key=lambda name: (-channels[name], name))
    kinds = [kind for kind in PROBES if any(result.probe == kind for result in report.results)]
    names = ["\n".join(textwrap.wrap(f"{name} ({channels[name]})", NAME)) for name in inputs]
    lines = max((name.count("\n") + 1 for name in names), default=1)
    figure = Figure(figsize=(8, 1.6 + max(0.3, 0.15 * lines) * len(inputs)), layout="constrained")
    axes = figure.subplots()
    for index, kind in enumerate(kinds):
        results = [result for result in report.results if result.probe == kind]
        # The probes of one input stand a little above each other, so that none hides another.
        places = [inputs.index(one.input) + 0.18 * (index - (len(kinds) - 1) / 2) for one in results]
        errors = [one.standard_error for one in results]
        axes.errorbar([one.score for one in results], places, xerr=errors, fmt="o", ms=4, capsize=2, label=kind)
    axes.axvline(report.chance, color="grey", linestyle=":", label="the most common class")
    axes.set_yticks(range(len(inputs)), names, size=8)
    axes.set_ylim(max(len(inputs), 1) - 0.5, -0.5)
    axes.set_ylabel("input (channels)")
    axes.set_xlabel(report.metric)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=150)
