"""How the Edit tab looks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from reglue.app import editing, pictures
from reglue.app.drawing import NO_CLASS
from reglue.app.editing import FREE, KEEP, SWAP, SWAPPED, EditWish, Painted
from reglue.app.knobs import NAMES, Knobs
from reglue.app.parts import LONG, QUICK, Visitors, board, command_box, problem, refused, shown_while, tiles
from reglue.app.visitor import Visitor
from reglue.app.work import Report, Work
from reglue.app.workshop import Workshop
from reglue.data.pictures import label_colours
from reglue.diffusion.modalities import LATENT
from reglue.editing.options import LOCAL
from reglue.errors import UserError

EMPTY = pictures.note("Edits appear here. A click on one makes it the image at hand.", "empty")


class EditTab:
    """The tab: its parts, and what happens when they are used."""

    def __init__(self, workshop: Workshop, visitors: Visitors) -> None:
        """Lay the tab out."""
        self.workshop, self.visitors = workshop, visitors
        runs = workshop.runs
        # What one of the runs learns at least, the latents last.
        self.modalities = sorted(
            dict.fromkeys(name for run in runs for name in run.modalities), key=lambda name: name == LATENT
        )
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                self.board = board("canvas", "canvas", view=None)
                with gr.Row():
                    self.go = gr.Button("Edit", variant="primary", elem_id="edit", size="md", scale=0, min_width=140)
                    self.stop = gr.Button("Stop", size="md", scale=0, min_width=80, elem_id="edit-stop")
                    self.undo = gr.Button("Undo", size="md", scale=0, min_width=80, elem_id="undo")
                self.status = gr.HTML(pictures.note(""), elem_id="edit-status", apply_default_css=False)
                self.shown = tiles(EMPTY, "edits")
                self.line = command_box("the same from the command line, while the studio runs", "edit-command")
            with gr.Column(scale=2, min_width=280, elem_id="edit-knobs"):
                self.run = gr.Dropdown([run.title for run in runs], label="run", visible=len(runs) > 1)
                self.held = [
                    gr.Radio([FREE, KEEP, *([SWAP] if name in SWAPPED else [])], value=KEEP if name == LOCAL else FREE,
                             label=NAMES.get(name, name), elem_id=f"held-{name}")
                    for name in self.modalities
                ]  # fmt: skip
                self.other = board("drop", "other", visible=len(self.modalities) > 1)
                self.until = gr.Slider(
                    0, 0.95, 0, step=0.05, label="until", info="hold while t is above this, then let go"
                )
                self.strength = gr.Slider(
                    0, 1, 1, step=0.05, label="strength", info="0 gives the image back, 1 ignores it"
                )
                self.knobs = Knobs.lay_out(runs, NO_CLASS, 4)
                with gr.Accordion("more", open=False):
                    self.feather = gr.Slider(0, 32, 0, step=1, label="feather of the mask, in pixels")
                    self.resample = gr.Slider(
                        0, 4, 0, step=1, label="resample", info="go over the steps again: mends seams"
                    )
                    self.flow = gr.Checkbox(label="change the class, little else (FlowEdit)")
                    names = list(dict.fromkeys(name for run in runs for name in run.record.class_names))
                    self.source = gr.Dropdown([NO_CLASS, *names], label="class of the image, for FlowEdit")
        self._listen()

    def _listen(self) -> None:
        outputs = [self.board, self.status]
        self.board.uploaded(self.on_image, self.run, outputs, **{**QUICK, "queue": True, "concurrency_limit": 4})
        self.run.change(self.on_run, self.run, outputs, **{**QUICK, "queue": True, "concurrency_limit": 4})
        self.shown.picked(self.on_picked, self.run, outputs, **QUICK)
        self.undo.click(self.on_undo, self.run, outputs, **QUICK)
        self.other.uploaded(self.on_other, None, [self.other, self.status], **QUICK)
        for part in (self.board, self.other):
            part.refused(refused, None, self.status, **QUICK)
        more = [self.strength, self.until, self.feather, self.resample, self.flow, self.source]
        inputs = [self.board, self.run, *self.held, *more, *self.knobs.inputs]
        done = [self.status, self.shown, self.line]
        self.go.click(self.on_edit, inputs, done, **LONG)
        self.stop.click(self.visitors.stopping("edit"), **QUICK)

    def view(self, visitor: Visitor, title: str) -> dict[str, Any]:
        """What the canvas is told, images as addresses."""
        shown = editing.canvas(self.workshop.run(title), visitor, self.workshop)
        image, colours = shown["image"], label_colours(256)
        palette = [[label, "#" + bytes(colours[label].tolist()).hex()] for label in shown["labels"]]
        return {
            **shown,
            "image": pictures.address(image),
            "map": pictures.address(shown["map"]) if shown["map"] else None,
            "width": image.width,
            "height": image.height,
            "palette": palette,
            "serial": str(visitor.image),
        }

    def refreshed(self, visitor: Visitor, title: str) -> tuple[Any, str]:
        """The board and the status."""
        try:
            return gr.update(view=self.view(visitor, title)), pictures.note("")
        except UserError as error:
            return gr.skip(), problem(str(error))

    def on_image(self, request: gr.Request, event: gr.EventData, title: str) -> tuple[Any, str]:
        """An image was dropped."""
        visitor = self.visitors.of(request)
        try:
            visitor.take(self.visitors.uploaded(event))
        except UserError as error:
            return gr.skip(), problem(str(error))
        return self.refreshed(visitor, title)

    def on_other(self, request: gr.Request, event: gr.EventData) -> tuple[Any, str]:
        """Another image was dropped."""
        visitor = self.visitors.of(request)
        try:
            image = self.visitors.uploaded(event)
        except UserError as error:
            return gr.skip(), problem(str(error))
        visitor.other = visitor.write(image, "other")
        return pictures.picture(image, "the other image"), pictures.note("")

    def on_run(self, request: gr.Request, title: str) -> tuple[Any, Any]:
        """Another run was chosen."""
        visitor = self.visitors.of(request)
        return self.refreshed(visitor, title) if visitor.image else (gr.skip(), gr.skip())

    def on_picked(self, request: gr.Request, event: gr.EventData, title: str) -> tuple[Any, str]:
        """An edit becomes the next image."""
        return self.take(self.visitors.of(request), "edits", event, title)

    def take(self, visitor: Visitor, where: str, event: gr.EventData, title: str) -> tuple[Any, str]:
        """One of the visitor's `drawn` or `edits` becomes the image at hand."""
        images, index = getattr(visitor, where), getattr(event, "index", None)
        if not isinstance(index, int) or not 0 <= index < len(images):
            return gr.skip(), problem("that picture is no more; draw it again")
        visitor.take(images[index])
        return self.refreshed(visitor, title)

    def on_undo(self, request: gr.Request, title: str) -> tuple[Any, str]:
        """Back to the image before."""
        visitor = self.visitors.of(request)
        if len(visitor.images) < 2:
            return gr.skip(), pictures.note("nothing to undo")
        visitor.undo()
        return self.refreshed(visitor, title)

    def on_edit(self, request: gr.Request, painted: str, title: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Draw the edits."""
        visitor = self.visitors.of(request)
        held, rest = values[: len(self.held)], list(values[len(self.held) :])
        strength, until, feather, resample, flow, source, *own = rest
        try:
            run = self.workshop.run(title)
            wish = EditWish(
                **self.knobs.wish(own),
                held={name: how for name, how in zip(self.modalities, held, strict=True) if name in run.modalities},
                strength=float(strength),
                until=float(until),
                feather=int(feather),
                resample=int(resample),
                flow_edit=bool(flow),
                source_class=source,
            )
            options = editing.options_of(wish, Painted.read(painted), visitor, self.workshop)
        except UserError as error:
            yield problem(str(error)), gr.skip(), gr.skip()
            return
        alts = [f"edit {i + 1}" for i in range(wish.count)]

        def action(work: Work) -> Any:
            return editing.edit(run, wish, options, visitor, work), editing.command(run, wish, options, visitor)

        def glimpse(report: Report) -> Any:
            images = [*(report.images or []), *[None] * wish.count][: wish.count]
            return pictures.tiles(images, alts, lossy=True), gr.skip()

        def finish(value: Any) -> Any:
            visitor.edits, line = value
            shown = pictures.tiles(visitor.edits, alts, first=0, action="make it the image at hand")
            return shown, gr.update(value=line, visible=True)

        yield from shown_while(action, self.workshop.turns, visitor.works["edit"], "editing", glimpse, finish, 2)
