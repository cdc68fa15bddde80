"""From results to a table and plots, of one study or of several side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from reglue.files import replacing

COLUMNS = {
    "Fréchet distance (encoder)": ("encoder", "frechet_distance", "{:.1f}"),
    "KID (encoder)": ("encoder", "kernel_distance", "{:.4f}"),
    "precision": ("encoder", "precision", "{:.2f}"),
    "recall": ("encoder", "recall", "{:.2f}"),
    "class accuracy": ("judge", "top1_among_own", "{:.1%}"),
    "of 1000 classes": ("judge", "top1", "{:.1%}"),
    "nearest training image": ("encoder", "nearest_training_image", "{:.1f}"),
    "(of held-out images)": ("encoder", "nearest_training_image_of_held_out", "{:.1f}"),
    "suspiciously close": ("encoder", "suspiciously_close", "{:.1%}"),
    "FID": ("inception", "frechet_distance", "{:.1f}"),
    "KID (Inception)": ("inception", "kernel_distance", "{:.4f}"),
}
"""Heading of each column, where its figure is, and how it is printed."""
PLOTTED = ("Fréchet distance (encoder)", "class accuracy", "recall", "FID")
LINES = ("-", "--", ":", "-.")
"""One kind of line per study."""
REMARKS = """
In brackets: 95 % intervals over resampled images (not over seeds). Distances are to held-out images; smaller is better.
Figures of few images are biased and can be compared within this table alone. "Suspiciously close" is the share of
samples closer to a training image than all but 1 % of held-out images are: 1 % is innocent. Seconds are of training,
and an upper bound where the machine was shared with other work.
"""


def summarise(out: Path, studies: Mapping[str, dict[str, Any]]) -> None:
    """Write `table.md`, `quality-by-steps.png` and `quality-by-time.png`. `studies` maps a title to its results."""
    with replacing(out / "table.md") as beside:
        beside.write_text(table(studies))
    for file, axis in (("quality-by-steps.png", "steps"), ("quality-by-time.png", "minutes of training")):
        figure = plot(studies, axis)
        with replacing(out / file) as beside:
            figure.savefig(beside, format="png", dpi=110)


def table(studies: Mapping[str, dict[str, Any]], last: bool = False) -> str:
    """All figures, or only the `last` of each arm, as a table in Markdown. Columns that are empty are left out."""
    rows = [
        {"study": title, "arm": f"{trial['arm']}, seed {trial['seed']}", "parameters": _millions(trial), **cells}
        for title, results in studies.items()
        for trial in results["arms"].values()
        for cells in _rows(trial, last)
    ]
    rows.sort(key=lambda row: (list(studies).index(row["study"]), row["guided"], row["step"]))
    shown = ["study"] if len(studies) > 1 else []
    shown += ["step", "arm", "parameters", "seconds"]
    shown += [name for name in (*COLUMNS, "published") if any(row.get(name) for row in rows)]
    lines = [shown, ["---"] * len(shown)]
    lines += [[_cell(row, name) for name in shown] for row in rows]
    heading = " · ".join(studies)
    known = [f"{title}: {ceiling}" for title, results in studies.items() if (ceiling := _ceiling(results))]
    return "\n".join([f"# {heading}", "", *("| " + " | ".join(line) + " |" for line in lines), REMARKS, *known])


def _ceiling(results: dict[str, Any]) -> str:
    """What the judge says of real images, if it was asked."""
    for trial in results["arms"].values():
        for figures in (*trial["steps"].values(), trial["guided"]):
            real = figures.get("judge", {}).get("real")
            if real:
                known = f"{real['top1_among_own']:.1%} of {real['images']} real held-out images of the same size"
                return f"the judge recognises {known} ({real['top1']:.1%} among all of its classes).\n"
    return ""


def _rows(trial: dict[str, Any], last: bool) -> Iterator[dict[str, Any]]:
    measured = [(int(step), False, figures) for step, figures in trial["steps"].items()]
    if trial["guided"]:
        measured.append((trial["guided_step"], True, trial["guided"]))
    for step, guided, figures in measured[-1:] if last else measured:
        cells = {name: _printed(figures, *where) for name, where in COLUMNS.items()}
        seconds = figures.get("training_seconds")
        yield {
            "step": step,
            "guided": guided,
            "seconds": "" if seconds is None else f"{seconds:.0f}",
            "published": trial["note"],
            **cells,
        }


def _cell(row: dict[str, Any], name: str) -> str:
    return f"{row['step']}{', guided' if row['guided'] else ''}" if name == "step" else str(row.get(name, ""))


def _millions(trial: dict[str, Any]) -> str:
    return f"{trial['parameters'] / 1e6:.1f} M"


def _printed(figures: dict[str, Any], kind: str, name: str, form: str) -> str:
    figure = figures.get(kind, {}).get(name)
    if not isinstance(figure, dict):
        return "" if figure is None else form.format(figure)
    value = form.format(figure["value"])
    if figure["low"] is None:
        return value
    return f"{value} [{form.format(figure['low'])}, {form.format(figure['high'])}]"


def plot(studies: Mapping[str, dict[str, Any]], axis: str) -> Figure:
    """Quality against steps or time: one colour per arm, one line per seed, one kind of line per study."""
    panels = [name for name in PLOTTED if any(len(list(_curve(*line, name, axis))) for line in _lines(studies))]
    figure = Figure(figsize=(5.5 * max(1, len(panels)), 4.5), layout="constrained")
    names = list(dict.fromkeys(trial["arm"] for _, trial in _lines(studies)))
    for panel, name in zip(figure.subplots(1, max(1, len(panels)), squeeze=False)[0], panels, strict=False):
        labelled: set[str] = set()
        for title, trial in _lines(studies):
            points = list(_curve(title, trial, name, axis))
            label = trial["arm"] + (f", {title}" if len(studies) > 1 else "")
            kind = LINES[list(studies).index(title) % len(LINES)]
            colour = f"C{names.index(trial['arm']) % 10}"
            if points:
                # One entry in the legend for all seeds.
                entry = None if label in labelled else label
                panel.plot(*zip(*points, strict=True), kind, marker="o", markersize=3, color=colour, label=entry)
                labelled.add(label)
        panel.set(xlabel=axis, ylabel=name, xscale="log")
        if "distance" in name or name == "FID":
            panel.set_yscale("log")
        panel.legend(fontsize="small")
        panel.grid(alpha=0.3)
    if axis != "steps":
        figure.suptitle("time on a shared machine is an upper bound", fontsize="small")
    return figure


def _lines(studies: Mapping[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return [(title, trial) for title, results in studies.items() for trial in results["arms"].values()]


def _curve(title: str, trial: dict[str, Any], name: str, axis: str) -> Iterator[tuple[float, float]]:
    kind, figure_name, _ = COLUMNS[name]
    for step, figures in trial["steps"].items():
        figure = figures.get(kind, {}).get(figure_name)
        if figure is not None:
            value = figure["value"] if isinstance(figure, dict) else figure
            yield (int(step) if axis == "steps" else figures["training_seconds"] / 60), value
