"""The report of the demo: one HTML file with everything inside, for someone who has never seen such a model."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from reglue.data.pictures import enlarge, image_grid
from reglue.files import replacing

PICTURE_WIDTH = 1600
"""Pictures are enlarged to about so many pixels …"""
MAX_ENLARGEMENT = 6
"""… but by no more than this."""
INK = "#010203"
"""Stands for the page's text colour in a plot, until the drawing is done."""
CURVES = ("#3f7fd8", "#d9822b", "#2f9e77", "#b65fc0")
"""One per run; readable on white and on black."""


@dataclass(frozen=True)
class Nearest:
    """Samples beside the training images that are most like them."""

    samples: np.ndarray
    """uint8 (N, H, W, 3)."""
    neighbours: np.ndarray
    """uint8 (N, k, H, W, 3), nearest first."""
    distances: np.ndarray
    """(N, k), in the measure that the text names."""
    typical: float
    """Median distance of a training image to its nearest other training image, for comparison."""
    measure: str
    """What the distances are, `Euclidean distance of class tokens` for example."""


@dataclass(frozen=True)
class Semantics:
    """Images beside their compressed semantics as colours (`data.pictures.colours_of`, one reference for all)."""

    images: np.ndarray
    """Real images, uint8 (N, H, W, 3)."""
    colours: np.ndarray
    """Of the codes that the encoder and the compressor give for them, uint8 (N, h, w, 3)."""
    generated_images: np.ndarray
    """Samples, uint8 (M, H, W, 3)."""
    generated_colours: np.ndarray
    """Of the codes that the model drew together with them, uint8 (M, h, w, 3)."""


@dataclass(frozen=True)
class RunResult:
    """One trained model and what became of it."""

    name: str
    """As shown: `REGLUE`, `SiT`."""
    guided: np.ndarray
    """Samples with guidance, uint8 (classes, N, H, W, 3); a model without classes has one row."""
    unguided: np.ndarray
    """Samples without guidance, of the same shape but for N."""
    recognised: float
    """Share, 0 to 1, of guided samples in which the judge sees the class asked for."""
    recognised_unguided: float
    losses: Mapping[str, Sequence[tuple[int, float]]]
    """(step, value) of each loss term, by name, in order of steps."""
    metrics: Mapping[str, Mapping[str, float | str]]
    """Figures by name, for each set of samples: `{"guided": {"Fréchet distance": 12.3}}`."""
    steps: int
    """Of training."""
    parameters: int
    seconds: float
    """Of training."""
    recipe: Mapping[str, Any]
    """The recipe as plain data."""
    nearest: Nearest | None = None
    semantics: Semantics | None = None


@dataclass(frozen=True)
class DemoReport:
    """Everything that the page shows. The first run is the one that it is about; others are for comparison."""

    title: str
    """A line: what was trained on what."""
    class_names: tuple[str, ...]
    """In the order of the rows of samples; empty for a model without classes."""
    runs: tuple[RunResult, ...]
    training_images: int
    judge_accuracy: float
    """Share of held-out real images, 0 to 1, that the judge recognises: the best that samples can be held to."""
    judge_images: int
    """How many images were held out for that figure."""
    stage_seconds: Mapping[str, float]
    """Duration of each stage, in order."""
    protocol: Mapping[str, Any]
    """Plain data that decides the result: sampler, guidance, seeds, versions, hardware, date …"""
    commands: tuple[str, ...]
    """Shell lines that do the same by hand."""


def write_report(path: Path, report: DemoReport) -> None:
    """Writes the page, whole or not at all: pictures and plots are inside it, and it loads nothing.

    Raises UserError when the file cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("reglue", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "picture": _picture,
        "percent": lambda share: f"{100 * share:.1f}",
        "duration": _duration,
        "figure": lambda value: value if isinstance(value, str) else f"{value:.4g}",
        "data": lambda value: json.dumps(value, indent=2, ensure_ascii=False, default=str),
    }
    page = environment.get_template("report.html").render(
        report=report,
        rows=report.class_names or ("all",),
        loss_curves=_loss_curves(report.runs),
        metric_columns=[(run, name, values) for run in report.runs for name, values in run.metrics.items()],
        metric_names=list(dict.fromkeys(n for run in report.runs for v in run.metrics.values() for n in v)),
        hero=report.runs[0].guided[:20, 0],
        paired=_paired,
    )
    with replacing(path) as beside:
        beside.write_text(page, encoding="utf-8")


def _picture(images: np.ndarray, columns: int | None = None) -> str:
    """Images uint8 (N, H, W, 3) as the address of one PNG, `columns` to a row (all, if not given); gaps are clear.

    Small ones are enlarged by whole numbers: a browser would blur them, or make their pixels unequal.
    """
    columns = columns or len(images)
    factor = max(1, min(MAX_ENLARGEMENT, PICTURE_WIDTH // (columns * images.shape[2])))
    # Clear gaps, so that the page's own colour is seen between the images in the dark too.
    opaque = image_grid(np.full_like(images, 255), columns, background=0)[..., :1]
    grid = np.concatenate([image_grid(images, columns), opaque], axis=2).repeat(factor, 0).repeat(factor, 1)
    file = io.BytesIO()
    Image.fromarray(grid).save(file, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _paired(images: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """A row of images over a row of colours, enlarged to the same size without smoothing: uint8 (2N, H, W, 3)."""
    return np.concatenate([images, enlarge(colours, images.shape[1:3])])


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def _loss_curves(runs: Sequence[RunResult]) -> str:
    """One panel per loss term as SVG that takes the page's text colour; runs above each other, on the same axes."""
    # Slow to import, and only the demo draws plots.
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    terms = list(dict.fromkeys(term for run in runs for term in run.losses))
    if not terms:
        return ""
    colours = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "reglue",
        "font.family": "sans-serif",
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(colours, INK),
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(10.5, 2.5 * len(runs)), layout="constrained")
        panels = figure.subplots(len(runs), len(terms), squeeze=False, sharex=True, sharey="col")
        for term, column in zip(terms, panels.T, strict=True):
            drawn = [value for run in runs for _, value in run.losses.get(term, ())]
            for run, panel, colour in zip(runs, column, CURVES * len(runs), strict=False):
                panel.set_title(term if len(runs) == 1 else f"{run.name}: {term}", loc="left", fontsize=10)
                panel.grid(alpha=0.25, linewidth=0.5)
                # Alignment, a negated cosine, has no logarithm.
                if drawn and min(drawn) > 0:
                    panel.set_yscale("log")
                    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 6, 8)))
                    panel.yaxis.set_major_formatter("{x:g}")
                    panel.yaxis.set_minor_formatter(NullFormatter())
                _draw_curve(panel, run.losses.get(term, ()), colour)
        for panel in panels[-1]:
            panel.set_xlabel("step")
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def _draw_curve(panel: Any, points: Sequence[tuple[int, float]], colour: str) -> None:
    """The values, faint, and their running mean over a twentieth of them, at the middle of what it averages."""
    if not points:
        panel.text(0.5, 0.5, "not part of this model", transform=panel.transAxes, ha="center", va="center", alpha=0.6)
        return
    steps, values = np.array([step for step, _ in points]), np.array([value for _, value in points])
    window = max(1, len(values) // 20)
    smooth = np.convolve(values, np.ones(window) / window, mode="valid")
    panel.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
    middle = (window - 1) // 2
    panel.plot(steps[middle : middle + len(smooth)], smooth, color=colour, linewidth=1.6)
