"""How the Draw tab looks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr
from PIL import Image

from reglue.app import drawing, pictures
from reglue.app.drawing import EACH, Wish
from reglue.app.knobs import Knobs
from reglue.app.parts import LONG, QUICK, Visitors, command_box, shown_while, tiles
from reglue.app.work import Report, Work
from reglue.app.workshop import Workshop

EMPTY = pictures.note("Press Draw: the pictures appear here while they are drawn.", "empty")


class DrawTab:
    """The tab: its parts, and what happens when they are used."""

    def __init__(self, workshop: Workshop, visitors: Visitors) -> None:
        """Lay the tab out."""
        self.workshop, self.visitors = workshop, visitors
        titles = [run.title for run in workshop.runs]
        with gr.Row():
            with gr.Column(scale=1, min_width=280, elem_id="draw-knobs"):
                several = len(titles) > 1
                self.runs = gr.CheckboxGroup(titles, value=titles[:2], label="runs, side by side", visible=several)
                self.knobs = Knobs.lay_out(workshop.runs, EACH, 8)
            with gr.Column(scale=3, min_width=320):
                with gr.Row():
                    go = gr.Button("Draw", variant="primary", elem_id="draw", size="md", scale=0, min_width=140)
                    stop = gr.Button("Stop", elem_id="draw-stop", size="md", scale=0, min_width=80)
                status = gr.HTML(pictures.note(""), elem_id="draw-status", apply_default_css=False)
                self.shown = tiles(EMPTY, "drawn")
                line = command_box("the same from the command line", "draw-command")
        inputs, outputs = [self.runs, *self.knobs.inputs], [status, self.shown, line]
        go.click(self.on_draw, inputs, outputs, **LONG)
        stop.click(visitors.stopping("draw"), **QUICK)

    def on_draw(self, request: gr.Request, titles: list[str], *values: Any) -> Iterator[tuple[Any, ...]]:
        """Draw with the runs that are chosen, one after the other."""
        visitor, wish = self.visitors.of(request), Wish(**self.knobs.wish(values))
        chosen = [run for run in self.workshop.runs if run.title in titles] or self.workshop.runs[:1]
        there: dict[str, list[Image.Image]] = {}

        def rows(lossy: bool) -> str:
            found: list[str] = []
            for i, run in enumerate(chosen):
                images = [*there.get(run.title, []), *[None] * wish.count][: wish.count]
                first = None if lossy else i * wish.count
                several, alts = len(chosen) > 1, drawing.alts(run, wish)
                columns = 8 if several else 4
                content = pictures.tiles(images, alts, columns=columns, first=first, action="edit it", lossy=lossy)
                found.append(pictures.row(run.title if several else "", content))
            return "".join(found)

        def action(work: Work) -> Any:
            # Each run needs a folder of its own.
            folders = ["samples" if len(chosen) == 1 else f"samples-{i + 1}" for i in range(len(chosen))]
            lines = [drawing.command(run, wish, out) for run, out in zip(chosen, folders, strict=True)]
            return drawing.draw_all(chosen, wish, work), lines

        def glimpse(report: Report) -> Any:
            there[report.what] = report.images or []
            return rows(lossy=True), gr.skip()

        def finish(value: Any) -> Any:
            drawn, lines = value
            there.update(drawn)
            visitor.drawn = [image for images in drawn.values() for image in images]
            text = "\n".join(filter(None, lines))
            return rows(lossy=False), gr.update(value=text, visible=bool(text))

        yield from shown_while(action, self.workshop.turns, visitor.works["draw"], "drawing", glimpse, finish, 2)
