"""How the Watch tab looks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from reglue.app import pictures, watching
from reglue.app.curves import curves
from reglue.app.parts import LONG, QUICK, Visitors, problem, shown_while
from reglue.app.visitor import Visitor
from reglue.app.work import Work
from reglue.app.workshop import Workshop
from reglue.data.plots import Curve
from reglue.errors import UserError

EVERY = 2.0
"""Seconds between two looks at what a training has written."""
EMPTY = pictures.note("This run has no log here. Name one that trains: reglue studio RUN", "empty")


class WatchTab:
    """The tab: its parts, and what happens when they are used."""

    def __init__(self, workshop: Workshop, visitors: Visitors) -> None:
        """Lay the tab out."""
        self.workshop, self.visitors = workshop, visitors
        titles = [run.title for run in workshop.runs]
        self.runs = gr.CheckboxGroup(titles, value=titles, label="runs", visible=len(titles) > 1)
        self.state = gr.HTML("", elem_id="watch-state", apply_default_css=False)
        self.curves = gr.HTML("", elem_id="watch-curves", apply_default_css=False)
        self.step = gr.Slider(
            0, 1, 0, step=1, label="previews and samples of step", visible=False, elem_id="watch-step"
        )
        self.newest = gr.State(0)
        self.shown = gr.HTML("", elem_id="watch-shown", apply_default_css=False)
        with gr.Row():
            go = gr.Button("Draw from every checkpoint", elem_id="watch-draw", size="md", scale=0, min_width=240)
            stop = gr.Button("Stop", size="md", scale=0, min_width=80)
            status = gr.HTML(pictures.note(""), elem_id="watch-status", apply_default_css=False)
        self.timer = gr.Timer(EVERY, active=False)
        self.inputs = [self.runs, self.step, self.newest]
        self.outputs = [self.state, self.curves, self.step, self.newest, self.shown]
        for event in (self.timer.tick, self.runs.change):
            event(self.on_tick, self.inputs, self.outputs, **QUICK)
        at = [self.runs, self.step]
        self.step.input(self.on_step, at, self.shown, trigger_mode="always_last", **QUICK)
        go.click(self.on_draw, at, [status, self.shown], **LONG)
        stop.click(visitors.stopping("watch"), **QUICK)

    def listen(self, tab: gr.Tab, others: list[gr.Tab]) -> None:
        """Look while the tab is open."""
        tab.select(lambda: gr.Timer(active=True), None, self.timer, **QUICK)
        tab.select(self.on_tick, self.inputs, self.outputs, **QUICK)
        for other in others:
            other.select(lambda: gr.Timer(active=False), None, self.timer, **QUICK)

    def on_tick(self, request: gr.Request, titles: list[str], step: float, newest: int) -> tuple[Any, ...]:
        """What is there now; a slider that stood at the newest pictures follows them."""
        terms: dict[str, dict[str, Curve]] = {}
        lines: list[str] = []
        steps: set[int] = set()
        visitor = self.visitors.of(request)
        for title in titles:
            try:
                there = watching.look(self.workshop.run(title))
            except UserError as error:
                lines.append(problem(str(error)))
                continue
            prefix = f"{title}: " if len(self.workshop.runs) > 1 else ""
            lines.append(pictures.progress(there.share, f"{prefix}{there.line()} ·"))
            steps.update(there.previews, visitor.samples.get(title, {}))
            for name, points in there.curves.items():
                terms.setdefault(name, {})[title] = points
        state = "".join(lines), curves(terms) or EMPTY
        if not steps:
            return *state, gr.update(visible=False), 0, ""
        first, last = min(steps), max(steps)
        at = last if step in (0, newest) else int(step)
        if at == step and last == newest:
            return *state, gr.skip(), last, gr.skip()
        slider = gr.update(minimum=first, maximum=max(last, first + 1), value=at, visible=len(steps) > 1)
        return *state, slider, last, self.pictures(visitor, titles, at)

    def on_step(self, request: gr.Request, titles: list[str], step: float) -> str:
        """The slider was moved."""
        return self.pictures(self.visitors.of(request), titles, step)

    def on_draw(self, request: gr.Request, titles: list[str], step: float) -> Iterator[tuple[Any, ...]]:
        """Draw the same seeds from every checkpoint."""
        visitor, runs = self.visitors.of(request), [self.workshop.run(title) for title in titles]

        def action(work: Work) -> Any:
            return watching.draw_checkpoints(runs, work)

        def finish(samples: Any) -> list[str]:
            visitor.samples = samples
            return [self.pictures(visitor, titles, step)]

        yield from shown_while(action, self.workshop.turns, visitor.works["watch"], "drawing", None, finish, 1)

    def pictures(self, visitor: Visitor, titles: list[str], step: float) -> str:
        """The preview and the samples of each run that are nearest to a step."""
        found: list[str] = []
        for title in titles:
            run, samples = self.workshop.run(title), visitor.samples.get(title, {})
            prefix = f"{title}, " if len(self.workshop.runs) > 1 else ""
            try:
                nearest = watching.nearest_step(watching.look(run).previews, step)
                if nearest is not None:
                    shown = pictures.picture(watching.preview(run, nearest), f"preview of step {nearest}")
                    found.append(
                        pictures.row(f"{prefix}preview of step {nearest:,}", f'<div class="whole">{shown}</div>')
                    )
            except UserError as error:
                found.append(problem(str(error)))
            nearest = watching.nearest_step([*samples], step)
            if nearest is not None:
                alts = [f"sample {i} of step {nearest}" for i in range(len(samples[nearest]))]
                tiles = pictures.tiles(samples[nearest], alts, columns=8)
                found.append(pictures.row(f"{prefix}samples of the checkpoint of step {nearest:,}", tiles))
        return "".join(found)
