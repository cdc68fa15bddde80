"""What the tabs are made of: components of our own, and how long work is shown."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import gradio as gr

from reglue.app import pictures
from reglue.app.uploads import MOST_BYTES, read_upload
from reglue.app.visitor import Visitor
from reglue.app.work import Done, Failed, Report, Work, at_work
from reglue.errors import UserError, printable

LONG = {"concurrency_id": "long", "concurrency_limit": 1, "show_progress": "minimal"}
"""Of events that take long: one at a time for all visitors, and whoever comes second sees their place in the queue."""
QUICK = {"queue": False, "show_progress": "hidden"}
"""Of events that take no time."""
STATIC = resources.files("reglue.app") / "static"

def static(name: str) -> str:
    """The text of a file that comes with the app."""
    return (STATIC / name).read_text(encoding="utf-8")

class Pictures(gr.HTML):
    """Tiles, whose pictures are `picked`."""

    def __init__(self, value: str = "", **props: Any) -> None:
        super().__init__(value, js_on_load=static("pictures.js"), apply_default_css=False, **props)

    def api_info(self) -> dict[str, Any]:
        """What gradio asks of components of one's own."""
        return {"type": "string"}
    from collections.abc import Callable, Sequence
    from typing import TYPE_CHECKING, Any, Literal

    from gradio.blocks import Block

    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component

class Board(gr.HTML):
    """Something that shows a `view`, and takes images: they are `uploaded`, or `refused` for their size."""

    def __init__(self, name: str, **props: Any) -> None:
        super().__init__(
            "",
            html_template=static(f"{name}.html"),
            js_on_load=static("drop.js") + static(f"{name}.js"),
            apply_default_css=False,
            view=None,
            most=MOST_BYTES,
            **props,
        )

    def api_info(self) -> dict[str, Any]:
        """What gradio asks of components of one's own."""
        return {"type": "string"}
    from collections.abc import Callable, Sequence
    from typing import TYPE_CHECKING, Any, Literal

    from gradio.blocks import Block

    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component

class Drop(gr.HTML):
    """A place for one image, which shows it."""

    TEMPLATE = (
        '<div class="zone small" tabindex="0" aria-label="Another image: drop or paste it">${value || `<div class='
        '"empty">Another image: drop one, or <button type="button" data-action="choose">choose a file</button></div>`}'
        '</div><input type="file" accept="image/*" hidden aria-label="Another image">'
    )

    def __init__(self, **props: Any) -> None:
        super().__init__(
            "",
            html_template=self.TEMPLATE,
            js_on_load=static("drop.js"),
            apply_default_css=False,
            most=MOST_BYTES,
            **props,
        )

    def api_info(self) -> dict[str, Any]:
        """What gradio asks of components of one's own."""
        return {"type": "string"}
    from collections.abc import Callable, Sequence
    from typing import TYPE_CHECKING, Any, Literal

    from gradio.blocks import Block

    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component

class Visitors:
    """The visitors by the sessions of their pages."""

    def __init__(self, folder: Path) -> None:
        """`folder` holds theirs, and what is being uploaded."""
        self.folder = folder
        self.uploads = folder / "uploads"
        self._known: dict[str, Visitor] = {}
        self._lock = threading.Lock()

    def of(self, request: gr.Request) -> Visitor:
        """The visitor whose page asks."""
        name = "".join(c for c in str(request.session_hash) if c.isalnum())
        with self._lock:
            if name not in self._known:
                self._known[name] = Visitor(self.folder / f"visitor-{len(self._known):03d}-{name[:20]}")
            return self._known[name]

    def leave(self, request: gr.Request) -> None:
        """The page is closed: nothing of it stays."""
        self.of(request).leave()

    def uploaded(self, event: gr.EventData) -> Any:
        """The image of an `uploaded` event. Raises UserError as `read_upload`, and for events of no image."""
        path, name = (str(getattr(event, part, "") or "") for part in ("path", "name"))
        if not path:
            raise UserError("nothing was uploaded; drop the image again")
        return read_upload(Path(path), name, self.uploads)

def refused(event: gr.EventData) -> str:
    """What is said of a file that is too large to be uploaded."""
    name = printable(str(getattr(event, "name", "") or "the file"))[:80]
    return problem(f"{name} has more than {MOST_BYTES // 2**20} MB, or could not be sent; give a smaller file")

def problem(text: str) -> str:
    """A line that says what is wrong."""
    return pictures.note(text, "problem")

def shown_while(
    action: Callable[[Work], Any],
    lock: threading.Lock,
    verb: str,
    glimpse: Callable[[Report], Any],
    finish: Callable[[Done[Any]], Any],
) -> Iterator[tuple[str, Any]]:
    """Run an action and yield (status, what is shown) as it goes on.

    `glimpse` makes of a report with pictures what is shown, `finish` of what has come out; nothing else changes it.
    """
    yield pictures.progress(0, f"{verb} …"), gr.skip()
    for news in at_work(action, lock):
        if isinstance(news, Report):
            what = f"{verb} {news.what}".strip()
            yield pictures.progress(news.share, what), glimpse(news) if news.images else gr.skip()
        elif isinstance(news, Failed):
            yield problem(news.reason), gr.skip()
        else:
            shown = finish(news)
            yield pictures.note(f"done in {news.seconds:.1f} s"), shown
