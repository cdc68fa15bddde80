"""The page: its tabs, its looks, and the server that shows it to this machine alone unless told otherwise."""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.themes.utils.fonts import Font
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reglue.app import tab_draw
from reglue.app.parts import QUICK, Visitors, static
from reglue.app.tab_edit import EditTab
from reglue.app.tab_see import SeeTab
from reglue.app.tab_watch import WatchTab
from reglue.app.uploads import MOST_BYTES
from reglue.app.workshop import Run, Workshop
from reglue.errors import UserError

FIRST_PORT = 7860
OWN_MACHINE = ("127.0.0.1", "localhost", "::1")
ENVELOPE = 2**20
"""Bytes around an upload."""


def build(workshop: Workshop) -> gr.Blocks:
    """The page, not yet shown to anybody."""
    visitors = Visitors(workshop.folder)
    with gr.Blocks(title="reglue studio", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(masthead(workshop.runs), apply_default_css=False)
        with gr.Tabs() as tabs:
            with gr.Tab("Draw", id="draw") as draw_tab:
                drawn = tab_draw.build(workshop, visitors)
            with gr.Tab("Edit", id="edit", render_children=True) as edit_tab:
                edit = EditTab(workshop, visitors)
            with gr.Tab("See", id="see", render_children=True) as see_tab:
                see = SeeTab(workshop, visitors)
            with gr.Tab("Watch", id="watch", render_children=True) as watch_tab:
                watch = WatchTab(workshop)
        see.listen(see_tab)
        watch.listen(watch_tab, [draw_tab, edit_tab, see_tab])

        def on_picked(request: gr.Request, event: gr.EventData, title: str) -> tuple[Any, ...]:
            board, told = edit.take(visitors.of(request), "drawn", event, title)
            return gr.update(selected="edit"), board, told

        drawn.picked(on_picked, edit.run, [tabs, edit.board, edit.status], **QUICK)
        page.unload(visitors.leave)
    return page


def masthead(runs: list[Run]) -> str:
    """The head of the page: what is loaded."""
    from html import escape

    lines = [
        f"{run.title}: {run.record.recipe.name} {run.record.recipe.model}, "
        f"{run.record.resolution[0]}×{run.record.resolution[1]}, {len(run.record.class_names)} classes"
        for run in runs
    ]
    return f'<header class="masthead"><h1>reglue studio</h1><span>{escape(" · ".join(lines))}</span></header>'


def theme() -> gr.themes.Base:
    """Quiet, and with the system's own fonts: nothing is fetched from anywhere."""
    return gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="zinc",
        radius_size="sm",
        spacing_size="sm",
        text_size="sm",
        font=[Font("system-ui"), Font("sans-serif")],
        font_mono=[Font("ui-monospace"), Font("monospace")],
    ).set(
        block_border_width="0px",
        block_shadow="none",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
    )


@dataclass
class Bounded:
    """Refuses requests whose bodies are larger than an upload may be, before they are read."""

    app: ASGIApp
    most: int = MOST_BYTES + ENVELOPE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > self.most:
            await send({"type": "http.response.start", "status": 413, "headers": [(b"content-type", b"text/plain")]})
            return await send({"type": "http.response.body", "body": b"too large"})
        taken = 0

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            return message if taken <= self.most else {"type": "http.disconnect"}

        return await self.app(scope, bounded, send)


def password_for(host: str, named: str | None) -> str | None:
    """The password: what an environment variable says, or a new one where others may come; None for this machine alone.

    Raises UserError for a variable that is not set.
    """
    if named is not None:
        if not os.environ.get(named):
            raise UserError(f"--password {named}: there is no such environment variable; set it to the password")
        return os.environ[named]
    return None if host in OWN_MACHINE else secrets.token_urlsafe(12)


def serve(
    workshop: Workshop,
    host: str = OWN_MACHINE[0],
    port: int | None = None,
    password: str | None = None,
    browser: bool = False,
    say: Callable[[str], object] = print,
) -> gr.Blocks:
    """Show the page. Returns once the server listens. Raises UserError for a taken port."""
    os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), *OWN_MACHINE[:2]]))
    page = build(workshop).queue(api_open=False, default_concurrency_limit=1, max_size=64)

    def allowed(_: str, given: str) -> bool:
        return password is not None and hmac.compare_digest(given.encode(), password.encode())

    try:
        page.launch(
            server_name=host,
            server_port=port,
            inbrowser=browser,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            auth=allowed if password else None,
            auth_message="Any name will do; the password is where the studio was started." if password else None,
            max_file_size=MOST_BYTES,
            allowed_paths=[],
            ssr_mode=False,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            pwa=False,
            mcp_server=False,
            theme=theme(),
            css=static("studio.css"),
            app_kwargs={"middleware": [Middleware(Bounded)], "docs_url": None, "redoc_url": None},
        )
    except OSError as error:
        raise UserError(f"--port {port or FIRST_PORT} on {host} cannot be had ({error}); choose another") from error
    say(f"studio: {page.local_url} (Ctrl-C ends it)")
    return page
