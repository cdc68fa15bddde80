"""How the See tab looks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from reglue.app import pictures, seeing
from reglue.app.parts import LONG, QUICK, Visitors, board, problem, refused, shown_while
from reglue.app.seeing import Seen
from reglue.app.visitor import Visitor
from reglue.app.work import Work
from reglue.app.workshop import Workshop
from reglue.errors import UserError


class SeeTab:
    """The tab: its parts, and what happens when they are used."""

    def __init__(self, workshop: Workshop, visitors: Visitors) -> None:
        """Lay the tab out."""
        self.workshop, self.visitors = workshop, visitors
        titles = [run.title for run in workshop.runs]
        with gr.Row():
            self.run = gr.Dropdown(titles, label="run", visible=len(titles) > 1, scale=1)
            self.status = gr.HTML(pictures.note(""), elem_id="see-status", apply_default_css=False, scale=3)
        self.board = board("places", "places", view=None)
        self.shown = gr.HTML("", elem_id="seen", apply_default_css=False)
        outputs = [self.status, self.board, self.shown]
        self.board.uploaded(self.on_image, self.run, outputs, **LONG)
        self.board.refused(refused, None, self.status, **QUICK)
        self.run.change(self.on_look, self.run, outputs, **LONG)

    def listen(self, tab: gr.Tab) -> None:
        """Look at the image at hand whenever the tab is opened."""
        outputs = [self.status, self.board, self.shown]
        tab.select(self.on_look, self.run, outputs, **LONG)

    def on_image(self, request: gr.Request, event: gr.EventData, title: str) -> Iterator[tuple[Any, ...]]:
        """An image was dropped: it becomes the one at hand."""
        visitor = self.visitors.of(request)
        try:
            visitor.take(self.visitors.uploaded(event))
        except UserError as error:
            yield problem(str(error)), gr.skip(), gr.skip()
            return
        yield from self.looked(visitor, title)

    def on_look(self, request: gr.Request, title: str) -> Iterator[tuple[Any, ...]]:
        """See the image at hand, if there is one."""
        visitor = self.visitors.of(request)
        if visitor.image is None:
            yield gr.skip(), gr.skip(), gr.skip()
            return
        yield from self.looked(visitor, title)

    def looked(self, visitor: Visitor, title: str) -> Iterator[tuple[Any, ...]]:
        """See an image, and show it."""

        def action(work: Work) -> Seen:
            return seeing.look(self.workshop.run(title), visitor.open(), self.workshop.heads, work)

        def finish(seen: Seen) -> Any:
            return gr.update(view=self.view(seen)), self.rows(seen)

        yield from shown_while(action, self.workshop.turns, visitor.works["see"], "looking", None, finish, 2)

    @staticmethod
    def view(seen: Seen) -> dict[str, Any]:
        """What the board is told."""
        places = seen.places
        rows, columns = (0, 0) if places is None else places.shape[:2]
        return {
            "image": pictures.address(seen.image),
            "map": pictures.address(seen.map) if seen.map else None,
            "width": seen.image.width,
            "height": seen.image.height,
            "rows": rows,
            "columns": columns,
            "places": None if places is None else places.astype(float).round(4).tolist(),
        }

    @staticmethod
    def rows(seen: Seen) -> str:
        """Heads, nearest training images, and what is not there."""
        found = [
            pictures.row(f"head {name}", pictures.tiles([one.image], [f"seen by {name}"]) + pictures.legend(one.legend))
            for name, one in seen.heads.items()
        ]  # fmt: skip
        if seen.neighbours:
            images = [one.image for one in seen.neighbours]
            captions = [f"{one.similarity:.3f} · {one.name}" for one in seen.neighbours]
            alts = [f"training image {one.name}, cosine {one.similarity:.3f}" for one in seen.neighbours]
            title = "nearest training images, by cosine of class tokens"
            found.append(pictures.row(title, pictures.tiles(images, alts, captions, columns=8)))
        return "".join([*found, *map(pictures.note, seen.notes)])
