"""From `results.jsonl` to a table, curves over steps and over time, and the same seeds of all arms side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter
from PIL import Image, ImageDraw

from reglue.data.pictures import image_grid
from reglue.files import replacing

if TYPE_CHECKING:
    from study import Arm

SHOWN = 10
"""Samples of each arm in the picture."""
CURVES = {
    "Fréchet distance": ("encoder", "frechet_distance", "{:.1f}"),
    "FID": ("inception", "frechet_distance", "{:.1f}"),
    "class accuracy": ("judge", "accuracy", "{:.1%}"),
}
"""Figures of every milestone: their kind, their name and how they are printed."""
LAST = {
    "KID": ("encoder", "kernel_distance", "{:.4f}"),
    "precision": ("encoder", "precision", "{:.2f}"),
    "recall": ("encoder", "recall", "{:.2f}"),
    "copied": ("copies", "copied", "{:.1%}"),
    "seconds of drawing": ("drawing", "seconds", "{:.0f}"),
    "weights": ("training", "parameters", "{:,}"),
    "seconds of training": ("training", "seconds", "{:.0f}"),
}
"""Figures of the last milestone."""
SPACE = ("psnr", "ssim", "kl", "frechet_distance", "rfid", "probe, pooled", "probe, flat")
"""Figures of a latent space."""
REMARKS = """
Fréchet distance, KID, precision and recall are by the vision encoder that the methods learn from, FID by the Inception;
distances are to held-out images, and those of few samples compare within this table alone. In brackets: 95 % intervals
over resampled samples, not over seeds; of accuracies Wilson's, of copies Newcombe's. "Copied" is the share of samples,
or of their mirror images, that are close to a training image less the share close to a held-out one: 0 where nothing is
learned by heart. Published figures are FID on ImageNet 256×256 (B/2, 400,000 steps, no guidance): compare orders alone.
"""
Known = dict[tuple[str, int, str], dict[str, Any]]
"""The lines of `results.jsonl` by arm, step and kind."""


def write_report(work: Path, question: str, arms: Sequence[Arm], lines: Sequence[dict[str, Any]]) -> None:
    """Write QUESTION.md, QUESTION.png, QUESTION-over-time.png and QUESTION-samples.png, as far as there is anything."""
    titles = {title for arm in arms for title in (arm.title, arm.run_title)}
    known = {(x["arm"], x["step"], x["by"]): x for x in lines if x["arm"] in titles or x["by"] == "space"}
    steps = sorted({step for title, step, by in known if step and by != "training"})
    with replacing(work / f"{question}.md") as beside:
        beside.write_text("\n".join(table(question, arms, known, steps)))
    pictures: dict[str, Figure | Image.Image | None] = {
        f"{question}.png": curves(arms, known, steps, timed=False),
        # Seconds of several machines do not compare.
        f"{question}-over-time.png": curves(arms, known, steps, timed=True) if len(machines(known)) == 1 else None,
        f"{question}-samples.png": samples(work, arms, steps),
    }
    for name, picture in pictures.items():
        if picture is None:
            (work / name).unlink(missing_ok=True)
            continue
        with replacing(work / name) as beside:
            picture.save(beside, "png") if isinstance(picture, Image.Image) else picture.savefig(beside, format="png")


def machines(known: Known) -> set[str]:
    """All machines on which something was timed."""
    of_line = {"training": lambda line: line["figures"]["machines"], "drawing": lambda line: [line["machine"]]}
    return {name for (*_, by), line in known.items() if by in of_line for name in of_line[by](line)}


def table(question: str, arms: Sequence[Arm], known: Known, steps: Sequence[int]) -> Iterator[str]:
    """A row per arm and seed; columns without any figure are left out."""
    rows = []
    for arm in arms:
        last, row = steps[-1] if arm.train and steps else 0, {"arm": arm.title.replace("-seed-", ", seed ")}
        for name, where in CURVES.items():
            for step in steps:
                when = step if arm.train else 0 if step == steps[-1] else -1
                row[f"{name}, {step:,} steps"] = printed(known, arm.title, when, *where)
        for name, (by, *where) in LAST.items():
            row[name] = printed(known, arm.run_title if by == "training" else arm.title, last, by, *where)
        for name in SPACE:
            row[name.replace("_", " ")] = printed(known, arm.space or "", 0, "space", name, "{:.3g}")
        rows.append(row | {"published": arm.published})
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    if len(machines(known)) > 1:
        columns = [name for name in columns if not name.startswith("seconds")]
    yield from (f"# {question}", "", f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|")
    yield from (f"| {' | '.join(row[name] for name in columns)} |" for row in rows)
    yield REMARKS
    yield from leads(arms, known, steps)
    for real in {f"{x['figures']['of_real_images']:.1%}" for x in known.values() if x["by"] == "judge"}:
        yield f"The judge knows {real} of real held-out images of this size.\n"
    for name in ("machine", "versions", "commit", "date"):
        values = (line[name] for line in known.values())
        values = (
            ", ".join(" ".join(pair) for pair in v.items()) if isinstance(v, dict) else str(v)[:80] for v in values
        )
        yield f"{name}: {'; '.join(sorted({v.partition('T')[0] if name == 'date' else v for v in values}))}  "
    yield ""


def printed(known: Known, title: str, step: int, by: str, name: str, form: str) -> str:
    """A figure and its interval; empty if it is not known."""
    figure = known.get((title, step, by), {"figures": {}})["figures"].get(name)
    if not isinstance(figure, dict):
        return "" if figure is None else form.format(figure)
    low, high = figure.get("low"), figure.get("high")
    return form.format(figure["value"]) + ("" if low is None else f" [{form.format(low)}, {form.format(high)}]")


def points(arm: Arm, known: Known, steps: Sequence[int], by: str, name: str, end: str = "value") -> np.ndarray:
    """Steps, and an arm's figures there: (N, 2)."""
    found = [(step, known.get((arm.title, step, by), {"figures": {}})["figures"].get(name)) for step in steps]
    return np.array([(step, figure[end]) for step, figure in found if figure and figure[end] is not None]).reshape(
        -1, 2
    )


def curves(arms: Sequence[Arm], known: Known, steps: Sequence[int], *, timed: bool) -> Figure | None:
    """Figures over steps or minutes: a row of panels per latent space, a colour per method, a line per seed."""
    arms = [arm for arm in arms if arm.train and not arm.run]
    shown = {k: v[:2] for k, v in CURVES.items() if any(len(points(arm, known, steps, *v[:2])) > 1 for arm in arms)}
    if not shown:
        return None
    spaces, methods = (list(dict.fromkeys(names)) for names in ([a.space for a in arms], map(method, arms)))
    figure = Figure(figsize=(5 * len(shown), 4 * len(spaces)), layout="constrained", dpi=110)
    panels = figure.subplots(len(spaces), len(shown), squeeze=False)
    for arm in arms:
        for panel, (name, where) in zip(panels[spaces.index(arm.space)], shown.items(), strict=True):
            x, y = points(arm, known, steps, *where).T
            if timed:
                x = [known[arm.run_title, step, "training"]["figures"]["seconds"] / 60 for step in x]
            style = {"color": f"C{methods.index(method(arm)) % 10}", "label": method(arm) if arm.seed == 0 else None}
            panel.plot(x, y, "o-", markersize=3, linewidth=1, **style)
            panel.set(xscale="log", xlabel="minutes of training" if timed else "steps", ylabel=name, title=arm.space)
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.xaxis.set_major_formatter(ScalarFormatter())
            if not timed:
                panel.set_xticks(steps)
            panel.legend(fontsize="small")
    return figure


def method(arm: Arm) -> str:
    """What an arm is called in every latent space."""
    return arm.name.partition("-in-")[0]


def leads(arms: Sequence[Arm], known: Known, steps: Sequence[int]) -> Iterator[str]:
    """How many steps the arms need for what SiT has reached at each milestone: seed 0 of each, by every figure."""
    firsts = {arm.name: arm for arm in arms if arm.seed == 0 and arm.train}
    for title, (by, name, form) in CURVES.items():
        goals = points(firsts["sit"], known, steps, by, name)[1:] if "sit" in firsts and by != "judge" else []
        if not len(goals) or len(firsts) < 2:
            continue
        yield f"Steps to SiT's {title}, interpolated, in brackets by the ends of an arm's interval:\n"
        yield f"| arm | {' | '.join(f'{form.format(goal)} (SiT: {step:,.0f})' for step, goal in goals)} |"
        yield "| --- " * (len(goals) + 1) + "|"
        for arm in firsts.values():
            ends = [points(arm, known, steps, by, name, end) for end in ("value", "low", "high")]
            cells = ("{} [{}, {}]".format(*(reached(curve, goal) for curve in ends)) for _, goal in goals)
            yield f"| {arm.name} | {' | '.join(cells)} |"
        yield ""


def reached(curve: np.ndarray, goal: float) -> str:
    """The step at which a curve (N, 2) first falls to a figure, interpolated over the logarithm of steps."""
    if not len(curve):
        return "–"
    steps, falling = curve[:, 0], np.minimum.accumulate(curve[:, 1])
    if falling[-1] > goal or falling[0] <= goal:
        return f"> {steps[-1]:,.0f}" if falling[-1] > goal else f"≤ {steps[0]:,.0f}"
    levels, first = np.unique(-falling, return_index=True)
    return f"{np.exp(np.interp(-goal, levels, np.log(steps[first]))):,.0f}"


def samples(work: Path, arms: Sequence[Arm], steps: Sequence[int]) -> Image.Image | None:
    """The first samples of all arms at the last step, a row of each: columns are of one seed and class."""
    folders = {arm.title: work / "samples" / arm.title / f"step-{(steps or [0])[-1]}" for arm in arms if arm.train}
    files = {title: found for title, folder in folders.items() if (found := sorted(folder.glob("*.png"))[:SHOWN])}
    if not files:
        return None
    columns = min(map(len, files.values()))
    images = [np.asarray(Image.open(file)) for found in files.values() for file in found[:columns]]
    grid, left = image_grid(np.stack(images), columns), max(map(len, files)) * 7 + 8
    page = Image.new("RGB", (grid.shape[1] + left, grid.shape[0]), "white")
    page.paste(Image.fromarray(grid), (left, 0))
    for row, title in enumerate(files):
        ImageDraw.Draw(page).text((2, row * (grid.shape[0] + 2) / len(files) + 2), title, "black")
    return page
