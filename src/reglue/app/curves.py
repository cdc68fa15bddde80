"""Losses as small pictures: SVG that takes the page's colours, drawn anew in milliseconds while a run trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

from reglue.data.plots import Curve

WIDTH, HEIGHT = 320, 150
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 22
"""Pixels around the curves."""
MOST = 300
"""Curve of a curve: as many pixels as it has, about."""


def curves(terms: Mapping[str, Mapping[str, Curve]]) -> str:
    """A panel for each term, with the curve of each run in it."""
    runs = list(dict.fromkeys(run for of_run in terms.values() for run in of_run))
    names = "".join(
        f'<li><i class="curve-{i % 4}"></i>{escape(run)}</li>' for i, run in enumerate(runs) if len(runs) > 1
    )
    panels = "".join(panel(term, {run: of_run.get(run, ()) for run in runs}) for term, of_run in terms.items())
    return f'<ul class="legend">{names}</ul><div class="curves">{panels}</div>' if panels else ""


def panel(term: str, of_run: Mapping[str, Curve]) -> str:
    """One term: curves over steps, logarithmic where all values are positive and span more than a factor of three."""
    thinned = {run: thin(points) for run, points in of_run.items()}
    points = [point for one in thinned.values() for point in one]
    if not points:
        return ""
    lowest, highest = min(value for _, value in points), max(value for _, value in points)
    logarithmic = lowest > 0 and highest > 3 * lowest
    scale = math.log if logarithmic else float
    bottom, top = scale(lowest), scale(highest)
    last = max(step for step, _ in points) or 1
    span = (top - bottom) or 1.0

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (scale(value) - bottom) / span)

    marks = "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y(v) + 3:.1f}" text-anchor="end">{v:.3g}</text>'
        for v in ticks(lowest, highest, logarithmic)
    )
    marks += f'<text x="{LEFT}" y="{HEIGHT - 6}">0</text>'
    marks += f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{last:,.0f}</text>'
    lines = "".join(
        f'<polyline class="curve-{i % 4}" points="{" ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in one)}"/>'
        for i, one in enumerate(thinned.values())
        if one
    )
    title = f"{term}: {points[-1][1]:.4g} at step {points[-1][0]:,.0f}"
    return (
        f"<figure><figcaption>{escape(term.replace('_', ' '))}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{marks}{lines}</svg></figure>'
    )


def thin(points: Curve) -> list[tuple[float, float]]:
    """The curve with no more points than can be seen: means of neighbours."""
    size = -(-len(points) // MOST)
    groups = [points[i : i + size] for i in range(0, len(points), size)] if size else []
    return [(sum(s for s, _ in group) / len(group), sum(v for _, v in group) / len(group)) for group in groups]


def ticks(lowest: float, highest: float, logarithmic: bool) -> list[float]:
    """Three values that span the range."""
    if logarithmic:
        return [lowest, math.sqrt(lowest * highest), highest]
    return [lowest, (lowest + highest) / 2, highest] if highest > lowest else [lowest]
