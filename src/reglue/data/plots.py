"""Curves of a training for people: as SVG for a page, in its colours, or as pixels beside a preview."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from reglue.data.pictures import enlarge

Curve = Sequence[tuple[int, float]]
"""Steps, ascending, and the values there."""
COLOURS = ("#3f7fd8", "#d9822b", "#2f9e77", "#b65fc0", "#c2412d", "#8a7a1f", "#4aa3b5", "#8d6e63")
"""One per run; readable on white and on black."""
INK = "#010203"
"""Stands for the page's text colour in a plot, until the drawing is done."""
UNITS = {"gradient_norm": "norm", "learning_rate": "rate", "images_per_second": "images/s"}
"""What the vertical axis counts, where that is no loss."""
COLUMNS = 3
POINTS = 400
"""Of a curve that are drawn at most."""
LARGEST = 1e30
"""What a plot can hold; a file that was damaged may say more."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "reglue",
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}
PIXELS_PER_INCH = 120
MARGIN = 24
"""Pixels between a plot and a preview."""


def curves(lines: Iterable[Mapping[str, Any]], names: Iterable[str]) -> dict[str, Curve]:
    """The curves of some figures in the lines of a log; those that no line has are left out."""
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in names}
    for line in lines:
        for name, points in found.items():
            value = line.get(name)
            if isinstance(value, int | float) and abs(value) < LARGEST:
                points.append((line["step"], float(value)))
    return {name: points for name, points in found.items() if points}


def as_svg(runs: Sequence[Mapping[str, Curve]]) -> str:
    """One panel for each name, the curves of all runs in it, in the page's text colour. Empty without curves."""
    names = _names(runs)
    if not names:
        return ""
    import matplotlib as mpl  # slow to import

    file = io.StringIO()
    with mpl.rc_context(STYLE):  # What is drawn is a function of it, as well as what is written.
        _figure(runs, names).savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def beside_preview(found: Mapping[str, Curve], preview: np.ndarray) -> np.ndarray:
    """Curves left of a picture of uint8 (h, w, 3), which is enlarged to their height, as one such picture on white."""
    names = _names([found])
    if not names:
        return preview
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with mpl.rc_context(STYLE):
        canvas = FigureCanvasAgg(_figure([found], names))
        canvas.draw()
    plot = np.asarray(canvas.buffer_rgba())[..., :3]
    height, width = preview.shape[:2]
    factor = max(1, len(plot) // height)
    parts = [plot, enlarge(preview[None], (factor * height, factor * width))[0]]
    tallest = max(map(len, parts))
    return np.concatenate(
        [np.pad(part, ((0, tallest - len(part)), (0, MARGIN), (0, 0)), constant_values=255) for part in parts], axis=1
    )


def _names(runs: Sequence[Mapping[str, Curve]]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run))


def _figure(runs: Sequence[Mapping[str, Curve]], names: Sequence[str]) -> Any:
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.5 * columns, 2.5 * rows), layout="constrained", dpi=PIXELS_PER_INCH)
    for number, name in enumerate(names, 1):
        _draw(figure.add_subplot(rows, columns, number), name, [run.get(name, ()) for run in runs])
    return figure


def _draw(panel: Any, name: str, drawn: Sequence[Curve]) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    panel.set_title(name.replace("_", " "), loc="left", fontsize=10, parse_math=False)
    panel.set_xlabel("step", fontsize=8)
    panel.set_ylabel(UNITS.get(name, "loss"), fontsize=8)
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.25, linewidth=0.5)
    panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    panel.xaxis.set_major_formatter("{x:,.0f}")
    values = [value for curve in drawn for _, value in curve]
    # Alignment, a negated cosine, has no logarithm.
    if name not in UNITS and min(values) > 0:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 6, 8)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
    for curve, colour in zip(drawn, COLOURS * len(drawn), strict=False):
        _draw_curve(panel, curve, colour)
    if name in UNITS and min(values) >= 0:
        panel.set_ylim(bottom=0)


def _draw_curve(panel: Any, curve: Curve, colour: str) -> None:
    """The values, faint, and their running mean over a twentieth of them, at the middle of what it averages."""
    if not curve:
        return
    every = -(-len(curve) // POINTS)  # Means of so many neighbours: a log has a line per hundred steps.
    whole = np.array(curve, dtype=np.float64)
    steps, values = np.array([whole[i : i + every].mean(0) for i in range(0, len(whole), every)]).T
    window = max(1, len(values) // 20)
    smooth = np.convolve(values, np.ones(window) / window, mode="valid")
    panel.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
    middle = (window - 1) // 2
    marker = "o" if len(values) == 1 else None
    panel.plot(steps[middle : middle + len(smooth)], smooth, color=colour, linewidth=1.6, marker=marker, markersize=3)
