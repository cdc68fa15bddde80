"""From results to a table and plots, of one study or of several side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

from reglue.errors import UserError
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
    "copied": ("encoder", "copied", "{:.1%}"),
    "distinct nearest": ("encoder", "distinct_nearest_training_images", "{:.0f}"),
    "FID": ("inception", "frechet_distance", "{:.1f}"),
    "KID (Inception)": ("inception", "kernel_distance", "{:.4f}"),
}
"""Heading of each column, where its figure is, and how it is printed."""
WITHOUT_INTERVAL = ("recall",)
"""Figures whose intervals, in results of earlier versions, resample held-out images alone: far too narrow."""
PLOTTED = ("Fréchet distance (encoder)", "class accuracy", "recall", "FID")
LINES = ("-", "--", ":", "-.")
"""One kind of line per study."""
MEASURED_BY = {"encoder": "network_sha256", "inception": "network_sha256", "judge": "judge_sha256"}
"""Kinds of figures, and where they name the network that they are by."""
UPPER_BOUND = "time on a shared machine is an upper bound"
IN_SPACE = "-in-"
"""Between the method and the latent space in the names of arms of `studies/spaces.py`."""
REMARKS = """
In square brackets: 95 % intervals over resampled samples (not over seeds); of class accuracy Wilson's, of copies
Newcombe's. Recall has none: it rests on few samples that lie far from all others, and moves more from seed to seed than
resampled images tell. In round brackets: the range over seeds. Distances are to held-out images; smaller is better.
Figures of few images are biased and can be compared within this table alone.

"Copied" says whether training images were learned by heart. A sample counts as close to an image where that one stands
out from the next fifty as no more than 1 % of held-out images make a training image stand out; the figure is the share
of samples close to a training image, less the share close to a held-out one. It is 0 for new images and for images
without features, which are near to many, and the row of reconstructed training images shows what it is for copies.
"Distinct nearest" counts the training images that are the nearest of a sample: few mean samples that are alike.

Seconds are of training, and an upper bound where the machine was shared with other work; those of several machines are
not added.
"""
RECONSTRUCTIONS = {"training": "training images, reconstructed", "held-out": "other held-out images, reconstructed"}


class Measured(NamedTuple):
    """The figures of one set of samples."""

    arm: str
    seed: int | None
    """None of reconstructed real images."""
    parameters: int | None
    note: str
    step: int
    guided: bool
    figures: dict[str, Any]


def refuse_mixtures(studies: Mapping[str, dict[str, Any]]) -> None:
    """Raise UserError if figures of one kind are by several networks, so that they do not compare."""
    for kind, name in MEASURED_BY.items():
        known = {}
        for title, results in studies.items():
            for folder, trial in results["arms"].items():
                for figures in (*trial["steps"].values(), trial["guided"]):
                    if digest := figures.get(kind, {}).get(name):
                        known.setdefault(digest, f"{folder} of {title}")
        if len(known) > 1:
            one, other, *_ = known.values()
            raise UserError(
                f"{one} and {other} were measured with different networks (--{kind}), which do not compare; measure "
                "one of them again, in an --out of its own"
            )


def summarise(out: Path, studies: Mapping[str, dict[str, Any]], last: bool = False, on_time: str = UPPER_BOUND) -> None:
    """Write `table.md`, `quality-by-steps.png`, `quality-by-time.png` and, of several spaces, `quality-by-space.png`.

    `studies` maps a title to its results. The table has all figures, or the `last` of each arm. `on_time` stands above
    the plot by time.
    """
    with replacing(out / "table.md") as beside:
        beside.write_text(table(studies, last))
    axes = {"quality-by-steps.png": "steps", "quality-by-time.png": "minutes of training"}
    figures = {file: plot(studies, axis, on_time) for file, axis in axes.items()}
    spaces = spaces_of(studies)
    if len(spaces) > 1:
        figures["quality-by-space.png"] = plot_spaces(spaces)
    for file, figure in figures.items():
        with replacing(out / file) as beside:
            figure.savefig(beside, format="png", dpi=110)


def table(studies: Mapping[str, dict[str, Any]], last: bool = False) -> str:
    """All figures, or only the `last` of each arm, as a table in Markdown. Columns that are empty are left out."""
    rows = [{"study": title, **row} for title, results in studies.items() for row in _rows(results, last)]
    shown = ["study"] if len(studies) > 1 else []
    shown += ["step", "arm"]
    shown += [name for name in ("parameters", "seconds", *COLUMNS, "published") if any(row.get(name) for row in rows)]
    lines = [shown, ["---"] * len(shown)]
    lines += [[row.get(name, "") for name in shown] for row in rows]
    heading = " · ".join(studies)
    known = [f"{title}: {line}\n" for title, results in studies.items() for line in (_ceiling(results), _made(results))]
    known = [line for line in known if not line.endswith(": \n")]
    return "\n".join([f"# {heading}", "", *("| " + " | ".join(line) + " |" for line in lines), REMARKS, *known])


def _ceiling(results: dict[str, Any]) -> str:
    """What the judge says of real images, if it was asked."""
    for sample in _measured(results):
        real = sample.figures.get("judge", {}).get("real")
        if real:
            shares = {name: _printed({"judge": real}, "judge", name, "{:.1%}") for name in ("top1_among_own", "top1")}
            known = f"{shares['top1_among_own']} of {real['images']} real held-out images of the same size"
            return f"the judge recognises {known} ({shares['top1']} among all of its classes)."
    return ""


def _made(results: dict[str, Any]) -> str:
    """On what, with what and when the figures were made, and on what the models were trained."""
    kinds = [sample.figures.get(kind, {}) for sample in _measured(results) for kind in MEASURED_BY]
    known = [found for figures in kinds if (found := figures.get("circumstances"))]
    seconds = [figures.get("training_seconds_by_machine", {}) for *_, figures in _measured(results)]
    trained = dict.fromkeys(machine for machines in seconds for machine in machines)
    lines = [f"trained on {' and on '.join(trained)}"] if trained else []
    if known:
        dates = sorted(each["date"][:10] for each in known)
        libraries = dict.fromkeys(
            ", ".join(f"{name} {number}" for name, number in each["versions"].items()) for each in known
        )
        machines = dict.fromkeys(each["machine"] for each in known)
        commits = dict.fromkeys(f"commit {each['commit'] or 'unknown'}" for each in known)
        when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        parts = (machines, libraries, commits)
        lines.append(f"measured on {'; '.join(' and '.join(part) for part in parts)}; {when}")
    return "; ".join(lines) + ("." if lines else "")


def _measured(results: dict[str, Any], last: bool = False) -> list[Measured]:
    """Every set of samples, or the last of each arm, in the order of the arms' steps."""
    found = []
    for trial in results["arms"].values():
        known = (trial["arm"], trial["seed"], trial["parameters"], trial["note"])
        of_arm = [Measured(*known, int(step), False, figures) for step, figures in trial["steps"].items()]
        if trial["guided"]:
            of_arm.append(Measured(*known, trial["guided_step"], True, trial["guided"]))
        found += of_arm[-1:] if last else of_arm
    return sorted(found, key=lambda sample: (sample.guided, sample.step))


def _rows(results: dict[str, Any], last: bool) -> Iterator[dict[str, str]]:
    """Reconstructions of real images, then each set of samples, and below several seeds of an arm their mean."""
    controls = results.get("controls", {})
    for space, both in controls.items():
        for name, figures in both.items():
            arm = RECONSTRUCTIONS[name] + (f" by {space}" if len(controls) > 1 else "")
            yield {"arm": arm, **_cells({"encoder": figures})}
    samples = _measured(results, last)
    groups: dict[tuple[int, bool, str], list[Measured]] = {}
    for sample in samples:
        groups.setdefault((sample.step, sample.guided, sample.arm), []).append(sample)
    for group in groups.values():
        for sample in group:
            yield {
                **_named(sample, f"seed {sample.seed}"),
                "seconds": _seconds(sample.figures),
                **_cells(sample.figures),
            }
        if len(group) > 1:
            yield {**_named(group[0], f"mean of {len(group)} seeds"), **_means([sample.figures for sample in group])}


def _named(sample: Measured, seed: str) -> dict[str, str]:
    return {
        "step": f"{sample.step}{', guided' if sample.guided else ''}",
        "arm": f"{sample.arm}, {seed}",
        "parameters": f"{(sample.parameters or 0) / 1e6:.1f} M",
        "published": sample.note,
    }


def _seconds(figures: dict[str, Any]) -> str:
    """Of training, on each machine."""
    total = figures.get("training_seconds")
    parts = figures.get("training_seconds_by_machine") or {"": total}
    return "" if total is None else " + ".join(f"{seconds:.0f}" for seconds in parts.values())


def _cells(figures: dict[str, Any]) -> dict[str, str]:
    return {name: _printed(figures, *where) for name, where in COLUMNS.items()}


def _means(several: list[dict[str, Any]]) -> dict[str, str]:
    """Mean and range of figures that all of several sets of samples have."""
    cells = {}
    for name, (kind, figure, form) in COLUMNS.items():
        values = [value for figures in several if (value := _value(figures, kind, figure)) is not None]
        if len(values) == len(several):
            low, high = form.format(min(values)), form.format(max(values))
            cells[name] = low if low == high else f"{form.format(mean(values))} ({low}–{high})"
    return cells


def _value(figures: dict[str, Any], kind: str, name: str) -> float | None:
    figure = figures.get(kind, {}).get(name)
    return figure["value"] if isinstance(figure, dict) else figure


def _printed(figures: dict[str, Any], kind: str, name: str, form: str) -> str:
    value, figure = _value(figures, kind, name), figures.get(kind, {}).get(name)
    if value is None:
        return ""
    if not isinstance(figure, dict) or figure["low"] is None or name in WITHOUT_INTERVAL:
        return form.format(value)
    return f"{form.format(value)} [{form.format(figure['low'])}, {form.format(figure['high'])}]"


def spaces_of(studies: Mapping[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The trials by latent space: that of their study or, of `studies/spaces.py`, that in the names of their arms."""
    spaces: dict[str, list[dict[str, Any]]] = {}
    for title, trial in _lines(studies):
        method, _, space = trial["arm"].partition(IN_SPACE)
        spaces.setdefault(f"{title}: {space}" if space else title, []).append({**trial, "arm": method})
    return spaces


def plot_spaces(spaces: Mapping[str, list[dict[str, Any]]]) -> Figure:
    """Fréchet distance by steps: a panel per latent space, a colour per arm in all of them, a thin line per seed.

    All panels have the same axes; distances of several spaces contain what their decoders cannot show.
    """
    columns = min(3, len(spaces))
    rows = -(-len(spaces) // columns)
    figure = Figure(figsize=(4 * columns, 3.2 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    names = list(dict.fromkeys(trial["arm"] for trials in spaces.values() for trial in trials))
    name = "Fréchet distance (encoder)"
    for index, (panel, (space, trials)) in enumerate(zip(panels, spaces.items(), strict=False)):
        labelled: set[str] = set()
        for trial in trials:
            if points := list(_curve(space, trial, name, "steps")):
                colour, arm = f"C{names.index(trial['arm']) % 10}", trial["arm"]
                label = None if arm in labelled else arm
                panel.plot(*zip(*points, strict=True), "o-", linewidth=1, markersize=3, color=colour, label=label)
                labelled.add(arm)
        panel.set(title=space, xscale="log", yscale="log")
        _mark_steps(panel, (trial for trials in spaces.values() for trial in trials))
        _plain_numbers(panel.yaxis)
        panel.set_xlabel("steps" if index + columns >= len(spaces) else "")
        panel.set_ylabel(name if index % columns == 0 else "")
        if labelled:
            panel.legend(fontsize="small")
        panel.grid(alpha=0.3, which="both")
    for panel in panels[len(spaces) :]:
        panel.set_axis_off()
    return figure


def _mark_steps(panel: Axes, trials: Iterable[dict[str, Any]]) -> None:
    """The steps at which anything was measured, by their numbers."""
    ticks = sorted({int(step) for trial in trials for step in trial["steps"]})
    panel.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    panel.set_xticks([], minor=True)


def _plain_numbers(axis: Axis) -> None:
    """Numbers instead of powers of ten, and enough of them on less than a decade."""
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_locator(NullLocator())


def plot(studies: Mapping[str, dict[str, Any]], axis: str, on_time: str = UPPER_BOUND) -> Figure:
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
        if axis == "steps":
            _mark_steps(panel, (trial for _, trial in _lines(studies)))
        else:
            _plain_numbers(panel.xaxis)
        if "distance" in name or name == "FID":
            panel.set_yscale("log")
            _plain_numbers(panel.yaxis)
        if labelled:
            panel.legend(fontsize="small")
        panel.grid(alpha=0.3)
    if axis != "steps":
        figure.suptitle(on_time, fontsize="small")
    return figure


def _lines(studies: Mapping[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return [(title, trial) for title, results in studies.items() for trial in results["arms"].values()]


def _curve(title: str, trial: dict[str, Any], name: str, axis: str) -> Iterator[tuple[float, float]]:
    """Points of a line. By time there are none after a second machine trained, whose seconds are others."""
    kind, figure_name, _ = COLUMNS[name]
    for step, figures in trial["steps"].items():
        value = _value(figures, kind, figure_name)
        if value is None:
            continue
        if axis == "steps":
            yield int(step), value
        elif len(figures.get("training_seconds_by_machine", {})) < 2:
            yield figures["training_seconds"] / 60, value
