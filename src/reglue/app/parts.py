"""What the tabs are made of: components of our own, and how long work is shown."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import gradio as gr

from reglue.app import pictures
from reglue.app.uploads import MOST_BYTES, read_upload
from reglue.app.visitor import Visitor
from reglue.app.work import Failed, Report, Stopped, Turns, Waiting, Work, at_work
from reglue.errors import UserError, printable

LONG = {"concurrency_limit": None, "show_progress": "hidden"}
"""Of events that take long. They begin at once and wait for their turn in `shown_while`, which says so."""
QUICK = {"queue": False, "show_progress": "hidden"}
"""Of events that take no time."""
STATIC = resources.files("reglue.app") / "static"


def static(name: str) -> str:
    """The text of a file that comes with the app."""
    return (STATIC / name).read_text(encoding="utf-8")


def tiles(value: str, name: str) -> gr.HTML:
    """Pictures side by side, which are `picked`. `name` is its identity on the page."""
    return gr.HTML(value, js_on_load=static("pictures.js"), apply_default_css=False, elem_id=name)


def board(template: str, name: str, **options: Any) -> gr.HTML:
    """Something that takes images: they are `uploaded`, or `refused` for their size.

    The canvas and the places show a `view`; `drop` is a place for one image, which it shows.
    """
    scripts = dict.fromkeys(("drop", template))
    return gr.HTML(
        "",
        html_template=static(f"{template}.html"),
        js_on_load="".join(static(f"{script}.js") for script in scripts),
        apply_default_css=False,
        elem_id=name,
        most=MOST_BYTES,
        **options,
    )


def command_box(label: str, name: str) -> gr.Textbox:
    """A command line to copy; not there until there is one."""
    return gr.Textbox(
        label=label, interactive=False, lines=1, max_lines=8, buttons=["copy"], visible=False,
        elem_id=name, elem_classes="command",
    )  # fmt: skip


class Visitors:
    """The visitors by the sessions of their pages."""

    def __init__(self, folder: Path) -> None:
        """`folder` holds theirs, and what is being uploaded."""
        self.folder = folder
        self.uploads = folder / "uploads"
        self.count = 0
        self._known: dict[str, Visitor] = {}
        self._lock = threading.Lock()

    def of(self, request: gr.Request) -> Visitor:
        """The visitor whose page asks."""
        name = "".join(c for c in str(request.session_hash) if c.isalnum())
        with self._lock:
            if name not in self._known:
                self.count += 1
                self._known[name] = Visitor(self.folder / f"visitor-{self.count}")
            return self._known[name]

    def stopping(self, tab: str) -> Callable[[gr.Request], None]:
        """What a Stop button does."""

        def stop(request: gr.Request) -> None:
            self.of(request).stop(tab)

        return stop

    def leave(self, request: gr.Request) -> None:
        """The page is closed: nothing of it stays."""
        visitor = self.of(request)
        with self._lock:
            self._known = {name: one for name, one in self._known.items() if one is not visitor}
        visitor.leave()

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
    turns: Turns,
    works: list[Work],
    verb: str,
    glimpse: Callable[[Report], Sequence[Any]] | None,
    finish: Callable[[Any], Sequence[Any]],
    count: int,
) -> Iterator[tuple[Any, ...]]:
    """Run an action and yield the status and, for `count` other outputs, what they become as it goes on.

    It alone writes the status, also when one of `works` is stopped: two that write it would overtake each other.
    `glimpse` makes that of a report with pictures, `finish` of what has come out; nothing else changes them.
    """
    same = [gr.skip()] * count
    yield pictures.progress(0, f"{verb} …"), *same
    for news in at_work(action, turns, works):
        if isinstance(news, Report):
            what = f"{verb} {news.what}".strip()
            yield pictures.progress(news.share, what), *(glimpse(news) if glimpse and news.images else same)
        elif isinstance(news, Waiting):
            yield pictures.note(f"waiting, {news.before} before you"), *same
        elif isinstance(news, Stopped):
            yield pictures.note("stopped"), *same
        elif isinstance(news, Failed):
            yield problem(news.reason), *same
        else:
            yield pictures.note(f"done in {news.seconds:.1f} s"), *finish(news.value)
