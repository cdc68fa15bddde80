"""How the Watch tab looks."""

from __future__ import annotations

from typing import Any

import gradio as gr

from reglue.app import pictures, watching
from reglue.app.curves import curves
from reglue.app.parts import QUICK, problem
from reglue.app.workshop import Workshop
from reglue.errors import UserError

EVERY = 2.0
"""Seconds between two looks at what a training has written."""
EMPTY = pictures.note("This run has no log here. Name one that trains: reglue studio RUN", "empty")


class WatchTab:
    """The tab: its parts, and what happens when they are used."""

    def __init__(self, workshop: Workshop) -> None:
        """Lay the tab out."""
        self.workshop = workshop
        titles = [run.title for run in workshop.runs]
        self.run = gr.CheckboxGroup(titles, value=titles, label="runs", visible=len(titles) > 1)
        self.state = gr.HTML("", elem_id="watch-state", apply_default_css=False)
        self.curves = gr.HTML("", elem_id="watch-curves", apply_default_css=False)
        self.step = gr.Slider(0, 1, 0, step=1, label="previews at step", visible=False, elem_id="watch-step")
        self.newest = gr.State(0)
        self.preview = gr.HTML("", elem_id="watch-preview", apply_default_css=False)
        self.timer = gr.Timer(EVERY, active=False)
        outputs = [self.state, self.curves, self.step, self.newest, self.preview]
        for event in (self.timer.tick, self.run.change):
            event(self.on_tick, [self.run, self.step, self.newest], outputs, **QUICK)
        self.step.input(self.on_step, [self.run, self.step], self.preview, trigger_mode="always_last", **QUICK)

    def listen(self, tab: gr.Tab, others: list[gr.Tab]) -> None:
        """Look while the tab is open."""
        outputs = [self.state, self.curves, self.step, self.newest, self.preview]
        tab.select(lambda: gr.Timer(active=True), None, self.timer, **QUICK)
        tab.select(self.on_tick, [self.run, self.step, self.newest], outputs, **QUICK)
        for other in others:
            other.select(lambda: gr.Timer(active=False), None, self.timer, **QUICK)

    def on_tick(self, titles: list[str], step: float, newest: int) -> tuple[Any, ...]:
        """What is there now; a slider that stood at the newest preview follows it."""
        terms: dict[str, dict[str, watching.Points]] = {}
        lines: list[str] = []
        steps: set[int] = set()
        for title in titles:
            try:
                there = watching.look(self.workshop.run(title))
            except UserError as error:
                lines.append(problem(str(error)))
                continue
            share = there.step / there.steps if there.steps else 1.0
            prefix = f"{title}: " if len(self.workshop.runs) > 1 else ""
            lines.append(pictures.progress(share, prefix + there.line() + " ·"))
            steps.update(there.previews)
            for name, points in there.curves.items():
                terms.setdefault(name, {})[title] = points
        drawn = curves(terms) or EMPTY
        last = max(steps, default=0)
        if not steps:
            return "".join(lines), drawn, gr.update(visible=False), 0, ""
        at = last if step in (0, newest) else int(step)
        slider = gr.update(minimum=min(steps), maximum=max(last, min(steps) + 1), value=at, visible=len(steps) > 1)
        same = at == step and last == newest
        slider, preview = (gr.skip(), gr.skip()) if same else (slider, self.on_step(titles, at))
        return "".join(lines), drawn, slider, last, preview

    def on_step(self, titles: list[str], step: float) -> str:
        """The previews nearest to a step, one for each run."""
        found: list[str] = []
        for title in titles:
            run = self.workshop.run(title)
            try:
                nearest = watching.nearest_step(watching.look(run).previews, step)
                if nearest is None:
                    continue
                image = watching.preview(run, nearest)
            except UserError as error:
                found.append(problem(str(error)))
                continue
            name = f"{title}, step {nearest:,}" if len(self.workshop.runs) > 1 else f"step {nearest:,}"
            shown = pictures.picture(image, f"previews of {name}")
            found.append(pictures.row(name, f'<div class="whole">{shown}</div>'))
        return "".join(found)
