"""The page: its tabs, its looks, and the server that shows it to this machine alone unless told otherwise."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr
from gradio.themes.base import Base
from gradio.themes.utils.fonts import Font
from starlette.middleware import Middleware

from reglue.app.door import OWN_MACHINE, Bounded, check_of
from reglue.app.parts import QUICK, Visitors, static
from reglue.app.tab_draw import DrawTab
from reglue.app.tab_edit import EditTab
from reglue.app.tab_see import SeeTab
from reglue.app.tab_watch import WatchTab
from reglue.app.uploads import MOST_BYTES
from reglue.app.workshop import Run, Workshop
from reglue.errors import UserError, one_line, option

FIRST_PORT = 7860


def build(workshop: Workshop) -> gr.Blocks:
    """The page, not yet shown to anybody."""
    visitors = Visitors(workshop.folder)
    with gr.Blocks(title="reglue studio", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(masthead(workshop.runs), apply_default_css=False)
        with gr.Tabs() as tabs:
            with gr.Tab("Draw", id="draw") as draw_tab:
                draw = DrawTab(workshop, visitors)
            with gr.Tab("Edit", id="edit", render_children=True) as edit_tab:
                edit = EditTab(workshop, visitors)
            with gr.Tab("See", id="see", render_children=True) as see_tab:
                see = SeeTab(workshop, visitors)
            with gr.Tab("Watch", id="watch", render_children=True) as watch_tab:
                watch = WatchTab(workshop, visitors)
        see.listen(see_tab)
        watch.listen(watch_tab, [draw_tab, edit_tab, see_tab])

        def on_picked(request: gr.Request, event: gr.EventData, title: str) -> tuple[Any, ...]:
            board, told = edit.take(visitors.of(request), "drawn", event, title)
            return gr.update(selected="edit"), board, told

        draw.shown.picked(on_picked, edit.run, [tabs, edit.board, edit.status], **QUICK)
        page.unload(visitors.leave)
    return page


def masthead(runs: list[Run]) -> str:
    """The head of the page: what is loaded."""
    lines = [
        f"{run.title}: {run.record.recipe.name} {run.record.recipe.model}, "
        f"{run.record.resolution[0]}×{run.record.resolution[1]}, {len(run.record.class_names)} classes"
        for run in runs
    ]
    return f'<header class="masthead"><h1>reglue studio</h1><span>{escape(" · ".join(lines))}</span></header>'


def theme() -> Base:
    """Quiet, and with the system's own fonts: nothing is fetched from anywhere."""
    return Base(
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


def serve(
    workshop: Workshop,
    host: str = OWN_MACHINE[0],
    port: int | None = None,
    password: str | None = None,
    browser: bool = False,
) -> gr.Blocks:
    """Show the page. Returns once the server listens. Raises UserError for a taken port."""
    page = build(workshop).queue(api_open=False, default_concurrency_limit=1, max_size=64)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            inbrowser=browser,
            share=False,
            _frontend=False,  # It would ask itself over a proxy, or give up on a busy machine.
            quiet=True,
            prevent_thread_lock=True,
            auth=check_of(password),
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
        asked = f"{option('port')} {port or FIRST_PORT}"
        raise UserError(f"{asked} on {host} cannot be had ({one_line(error)}); choose another") from error
    return page
