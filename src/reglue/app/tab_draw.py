"""How the Draw tab looks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from reglue.app import drawing, pictures
from reglue.app.drawing import EACH, NO_CLASS, Wish
from reglue.app.parts import LONG, QUICK, Visitors, command_box, shown_while, tiles
from reglue.app.work import Report
from reglue.app.workshop import Run, Workshop

EMPTY = pictures.note("Press Draw: the pictures appear here while they are drawn.", "empty")
NAMES = {"local": "local map", "cls": "class token", "latent": "latents"}
"""What modalities are called."""


@dataclass(frozen=True)
class Knobs:
    """The controls that Draw and Edit share, in the order of `Wish`."""

    classes: gr.Dropdown
    count: gr.Slider
    seed: gr.Number
    sampler: gr.Dropdown
    steps: gr.Slider
    scales: dict[str, gr.Slider]

    @property
    def inputs(self) -> list[Any]:
        """All of them."""
        return [self.classes, self.count, self.seed, self.sampler, self.steps, *self.scales.values()]

    def wish(self, values: list[Any]) -> dict[str, Any]:
        """The fields of `Wish` from the values of `inputs`."""
        classes, count, seed, sampler, steps, *scales = values
        strengths = dict(zip(self.scales, map(float, scales), strict=True))
        return {
            "classes": classes or NO_CLASS,
            "count": int(count),
            "seed": max(int(seed or 0), 0),
            "sampler": sampler,
            "steps": int(steps),
            "strengths": strengths,
        }


def knobs(runs: list[Run], classes: str, count: int) -> Knobs:
    """Class, count, seed, sampler, steps and guidance."""
    names = list(dict.fromkeys(name for run in runs for name in run.record.class_names))
    first = [EACH] if classes == EACH else []
    none = [NO_CLASS] if classes == NO_CLASS or all(run.record.has_null_class for run in runs) else []
    sampling = runs[0].record.recipe.sampling
    chosen = classes if names else NO_CLASS
    dropdown = gr.Dropdown([*first, *none, *names], value=chosen, label="class", visible=bool(names))
    counted = gr.Slider(1, 16, count, step=1, label="count")
    with gr.Row(equal_height=True):
        seed = gr.Number(0, label="seed", precision=0, minimum=0, min_width=90)
        another = gr.Button("Another", size="sm", scale=0, min_width=90, elem_classes="beside")
        another.click(lambda: random.randrange(10**6), None, seed, **QUICK)
    sampler = gr.Dropdown(drawing.samplers(), value=sampling.sampler, label="sampler")
    steps = gr.Slider(1, 250, min(sampling.steps, 250), step=1, label="steps")
    scales = drawing.scales_of(runs)
    with gr.Accordion("guidance (1 is none)", open=len(scales) < 5):
        dials = {name: gr.Slider(0, 8, scale, step=0.1, label=NAMES.get(name, name)) for name, scale in scales.items()}
    return Knobs(dropdown, counted, seed, sampler, steps, dials)


def build(workshop: Workshop, visitors: Visitors) -> gr.HTML:
    """Lay the tab out. Returns its pictures, which can be picked."""
    runs = workshop.runs
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            named = gr.CheckboxGroup(
                [run.title for run in runs],
                value=[run.title for run in runs[:2]],
                label="runs, side by side",
                visible=len(runs) > 1,
            )
            own = knobs(runs, EACH, 8)
        with gr.Column(scale=3, min_width=320):
            with gr.Row():
                go = gr.Button("Draw", variant="primary", elem_id="draw", scale=0, min_width=140)
                stop = gr.Button("Stop", elem_id="draw-stop", scale=0, min_width=80)
            status = gr.HTML(pictures.note(""), elem_id="draw-status", apply_default_css=False)
            shown = tiles(EMPTY, "drawn")
            line = command_box("the same from the command line", "draw-command")

    def on_draw(request: gr.Request, titles: list[str], *values: Any) -> Iterator[tuple[Any, ...]]:
        visitor, wish = visitors.of(request), Wish(**own.wish(list(values)))
        chosen = [run for run in runs if run.title in titles] or runs[:1]
        there: dict[str, list[Image.Image]] = {}

        def rows(images: dict[str, list[Image.Image]], lossy: bool) -> str:
            blank: list[Image.Image | None] = [None] * wish.count
            found: list[str] = []
            for i, run in enumerate(chosen):
                padded = [*images.get(run.title, blank), *blank][: wish.count]
                first = None if lossy else i * wish.count
                alts = drawing.titles_of(run, wish)
                content = pictures.tiles(padded, alts, first=first, action="edit it", lossy=lossy)
                found.append(pictures.row(run.title if len(chosen) > 1 else "", content))
            return "".join(found)

        def glimpse(report: Report) -> str:
            there[report.what] = report.images or []
            return rows(there, lossy=True)

        def finish(done: Any) -> str:
            visitor.drawn = [image for run in chosen for image in done.value[run.title]]
            return rows(done.value, lossy=False)

        def action(work: Any) -> Any:
            return drawing.draw_all(chosen, wish, work)

        text = ""
        for message, what in shown_while(action, workshop.at_work, "drawing", glimpse, finish):
            if isinstance(what, str) and not text:
                text = "\n".join(filter(None, (drawing.command(run, wish) for run in chosen)))
            yield message, what, gr.update(value=text, visible=bool(text)) if text else gr.skip()

    drawn = go.click(on_draw, [named, *own.inputs], [status, shown, line], show_progress_on=[status], **LONG)
    stop.click(lambda: pictures.note("stopped"), None, status, cancels=[drawn], **QUICK)
    return shown
