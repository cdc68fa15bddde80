"""From `results.jsonl` to a table, what was saved, curves over steps and over time, and the same seeds of all arms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter
from PIL import Image, ImageDraw

from reglue.data.pictures import image_grid
from reglue.files import replacing
from reglue.metrics.resampling import CONFIDENCE
from reglue.seeds import generator

if TYPE_CHECKING:
    from study import Arm

SHOWN = 10
"""Samples of each arm in the picture."""
CURVES = {
    "FID": ("inception", "frechet_distance", "{:.1f}"),
    "class accuracy": ("judge", "accuracy", "{:.1%}"),
    "Fréchet distance": ("encoder", "frechet_distance", "{:.1f}"),
    "copied": ("copies", "copied", "{:.1%}"),
}
"""Figures over steps: their kind, their name and how they are printed. What is saved is told by the distances."""
LAST = {
    "KID": ("encoder", "kernel_distance", "{:.4f}"),
    "precision": ("encoder", "precision", "{:.2f}"),
    "recall": ("encoder", "recall", "{:.2f}"),
    "weights": ("training", "parameters", "{:,}"),
}
"""More figures of the last milestone."""
DRAWS = 1000
"""Of curves within the intervals of their figures, for the interval of what is saved."""
REMARKS = """
FID is by the Inception and class accuracy by the judge, from which no method has learned; Fréchet distance, KID,
precision, recall and copies are by the vision encoder that the methods learn from. Distances are to held-out images,
and those of few images compare within this table alone. In brackets: 95 % intervals over resampled samples, not over
seeds; of accuracies Wilson's, of copies Newcombe's. "Copied" is the share of samples, or of their mirror images, that
are close to a training image less the share close to a held-out one: 0 where nothing is learned by heart. Published
figures are FID on ImageNet 256×256 (B/2, 400,000 steps, no guidance): compare orders alone.
"""
Known = dict[tuple[str, int, str], dict[str, Any]]
"""The lines of `results.jsonl` by arm, step and kind."""


def write_report(work: Path, question: str, arms: Sequence[Arm], lines: Sequence[dict[str, Any]]) -> None:
    """Write QUESTION.md, QUESTION.png, QUESTION-over-time.png and QUESTION-samples.png, as far as there is anything."""
    titles = {title for arm in arms for title in (arm.title, arm.run_title)}
    known = {(x["arm"], x["step"], x["by"]): x for x in lines if x["arm"] in titles}
    steps = sorted({step for _, step, by in known if step and by != "training"})
    work.mkdir(parents=True, exist_ok=True)
    with replacing(work / f"{question}.md") as beside:
        beside.write_text("\n".join(page(question, arms, known, steps)))
    pictures: dict[str, Figure | Image.Image | None] = {
        f"{question}.png": curves(arms, known, steps, timed=False),
        f"{question}-over-time.png": curves(arms, known, steps, timed=True) if comparable(known) else None,
        f"{question}-samples.png": samples(work, arms, steps),
    }
    for name, picture in pictures.items():
        if picture is None:
            (work / name).unlink(missing_ok=True)
            continue
        with replacing(work / name) as beside:
            picture.save(beside, "png") if isinstance(picture, Image.Image) else picture.savefig(beside, format="png")


def comparable(known: Known) -> bool:
    """Whether all trainings were timed on one machine."""
    return len({line["machine"] for (*_, by), line in known.items() if by == "training"}) == 1


def seconds_per_step(known: Known, name: str) -> float:
    """Of an arm, all of its seeds together; NaN if none was timed."""
    lines = [line for (title, _, by), line in known.items() if by == "training" and title.startswith(f"{name}-seed-")]
    steps = sum(line["figures"]["steps"] for line in lines)
    return sum(line["seconds"] for line in lines if line["figures"]["steps"]) / steps if steps else float("nan")


def page(question: str, arms: Sequence[Arm], known: Known, steps: Sequence[int]) -> Iterator[str]:
    """The table with a row per arm and seed, without columns that are empty; then what was saved."""
    rows = []
    for arm in arms:
        last, row = steps[-1] if arm.train and steps else 0, {"arm": arm.title.replace("-seed-", ", seed ")}
        for name, where in CURVES.items():
            for step in steps if name == "FID" else steps[-1:]:
                when = step if arm.train else 0 if step == steps[-1] else -1
                row[f"{name}, {step:,} steps"] = printed(known, arm.title, when, *where)
        for name, (by, *where) in LAST.items():
            row[name] = printed(known, arm.run_title if by == "training" else arm.title, last, by, *where)
        seconds = seconds_per_step(known, arm.run or arm.name)
        row["seconds per step"] = f"{seconds:.3f}" if comparable(known) and seconds == seconds else ""
        rows.append(row | {"published": arm.published})
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    yield from (f"# {question}", "", f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|")
    yield from (f"| {' | '.join(row[name] for name in columns)} |" for row in rows)
    yield REMARKS
    for name in ("FID", "Fréchet distance"):
        yield from saved(name, arms, known)
    for real in {f"{x['figures']['of_real_images']:.1%}" for x in known.values() if x["by"] == "judge"}:
        yield f"The judge knows {real} of real held-out images of this size.\n"
    for by in ("training", "drawing"):
        seconds = [line["seconds"] for (*_, kind), line in known.items() if kind == by]
        yield f"{by}: {sum(seconds):,.0f} s in all  "
    yield f"measuring: {sum(x['seconds'] for x in known.values() if x['by'] not in ('training', 'drawing')):,.0f} s  "
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


def points(arm: Arm, known: Known, by: str, name: str) -> np.ndarray:
    """An arm's steps, figures, and the ends of their intervals, which are the figures where there is none: (N, 4)."""
    rows = []
    for (title, step, kind), line in sorted(known.items()):
        if (title, kind) == (arm.title, by) and step and (found := line["figures"].get(name)):
            ends = (found["value"] if found.get(end) is None else found[end] for end in ("low", "high"))
            rows.append((step, found["value"], *ends))
    return np.array(rows, float).reshape(-1, 4)


def curves(arms: Sequence[Arm], known: Known, steps: Sequence[int], *, timed: bool) -> Figure | None:
    """Figures over steps or minutes: a panel for each, a colour per arm, a line per seed."""
    arms = [arm for arm in arms if arm.train and not arm.run]
    shown = {k: v[:2] for k, v in CURVES.items() if any(len(points(arm, known, *v[:2])) > 1 for arm in arms)}
    if not shown:
        return None
    names = [*dict.fromkeys(arm.name for arm in arms)]
    figure = Figure(figsize=(4.5 * len(shown), 4), layout="constrained", dpi=110)
    for panel, (title, where) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        for arm in arms:
            x, y, low, high = points(arm, known, *where).T
            if timed:
                x = x * seconds_per_step(known, arm.name) / 60
            style = {"color": f"C{names.index(arm.name) % 10}", "label": arm.name if arm.seed == 0 else None}
            panel.errorbar(x, y, np.abs([low - y, high - y]), fmt="o-", markersize=3, linewidth=1, capsize=2, **style)
        panel.set(xscale="log", xlabel="minutes of training" if timed else "steps", ylabel=title)
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.xaxis.set_major_formatter(ScalarFormatter())
        if not timed:
            panel.set_xticks(steps, [f"{step:,}" for step in steps])
        panel.legend(fontsize="small")
    return figure


def saved(name: str, arms: Sequence[Arm], known: Known) -> Iterator[str]:
    """How many steps each arm needs for the distance that SiT has at each milestone but the first, and what that saves.

    The interval is of DRAWS pairs of curves that are drawn within the intervals of their figures.
    """
    by, figure, form = CURVES[name]
    noise, curves = generator(0, f"curves of {by}"), {}
    for method in dict.fromkeys(arm.name for arm in arms if arm.train and not arm.run):
        curves[method] = drawn_curves([points(arm, known, by, figure) for arm in arms if arm.name == method], noise)
    steps, distances = curves.pop("sit", (np.zeros(0), np.zeros((1, 0))))
    if len(steps) < 2 or not any(len(own) for own, _ in curves.values()):
        return
    goals = [f"{form.format(goal)} (SiT: {step:,.0f})" for step, goal in zip(steps, distances[0], strict=True)]
    yield f"Steps to SiT's {name}, how many times fewer, and how many times less time:\n"
    yield f"| arm | {' | '.join(goals[1:])} |"
    yield "| --- " * len(goals) + "|"
    for method, (own, drawn) in curves.items():
        dearer = seconds_per_step(known, method) / seconds_per_step(known, "sit") if comparable(known) else np.nan
        cells = []
        for place, step in enumerate(steps[1:], 1):
            needed = [reached(own, curve, goal) for curve, goal in zip(drawn, distances[:, place], strict=True)]
            fewer = step / np.array(needed)
            low, high = np.quantile(fewer[1:], ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
            least = max(own, default=np.inf) if np.isinf(needed[0]) else needed[0]
            # What is not reached yet needs more, and saves less, than its last figure says.
            more, less = ("> ", "< ") if np.isinf(needed[0]) else ("", "")
            cell = f"{more}{least:,.0f}: {less}{step / least:.2f}× [{low:.2f}, {high:.2f}]"
            cells.append(cell if np.isnan(dearer) else f"{cell}, {less}{step / least / dearer:.2f}× in time")
        yield f"| {method} | {' | '.join(cells)} |"
    yield "\nA figure at an arm's first milestone is a bound; 0 in an interval: perhaps not yet reached.\n"


def drawn_curves(seeds: Sequence[np.ndarray], noise: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A curve of the seeds that have a step, each `points`: the steps (N,), and their mean followed by DRAWS within
    the intervals (DRAWS + 1, N).
    """
    steps = np.unique(np.concatenate([seed[:, 0] for seed in seeds]))
    curves = np.zeros((DRAWS + 1, len(steps)))
    for place, step in enumerate(steps):
        rows = [row for seed in seeds for row in seed if row[0] == step]
        deviations = noise.standard_normal((DRAWS, len(rows)))
        width = 2 * NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
        for column, (_, value, low, high) in enumerate(rows):
            curves[:, place] += value / len(rows)
            curves[1:, place] += deviations[:, column] * (high - low) / width / len(rows)
    return steps, curves


def reached(steps: np.ndarray, curve: np.ndarray, goal: float) -> float:
    """The step at which a curve first falls to a goal, interpolated over the logarithm of steps; infinity if it never
    does, and the first step if it has begun below.
    """
    falling = np.minimum.accumulate(curve)
    if not len(curve) or falling[-1] > goal:
        return float("inf")
    levels, first = np.unique(-falling, return_index=True)
    return float(np.exp(np.interp(-goal, levels, np.log(steps[first]))))


def samples(work: Path, arms: Sequence[Arm], steps: Sequence[int]) -> Image.Image | None:
    """The first samples of all arms at their last common step, a row of each: columns are of one seed and class."""
    folders = {arm.title: work / "samples" / arm.title for arm in arms if arm.train}
    drawn = [step for step in steps if all((f / f"step-{step}").is_dir() for f in folders.values() if f.is_dir())]
    files = {
        t: sorted((f / f"step-{drawn[-1]}").glob("*.png"))[:SHOWN] for t, f in folders.items() if drawn and f.is_dir()
    }
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
