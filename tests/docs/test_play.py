"""The page that draws in a browser: built with a real runtime, driven in a real browser. Needs npm's network."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.network,
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM or not shutil.which("npm"), reason="needs chromium and npm"),
]
FIRST_PICTURE = 10
"""Seconds until there is one, at most."""


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder, without a line for each file."""

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from build_play import Build, build

    folder = build(Build(tmp_path_factory.mktemp("site") / "play"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/index.html"
    server.shutdown()


def test_it_draws_and_redraws(address: str) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 1100})
        started = time.monotonic()
        page.goto(address)
        page.get_by_text("Ready.").wait_for(timeout=30_000)
        page.locator("#class").select_option("ankle boot")
        page.locator("#count").fill("4")
        page.get_by_role("button", name="Draw", exact=True).click()
        pictures = page.locator("#pictures canvas")
        page.get_by_text("4 pictures in").wait_for(timeout=60_000)
        assert time.monotonic() - started < FIRST_PICTURE
        assert pictures.count() == 4
        shades = "c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
        assert pictures.first.evaluate(shades) > 30, "a picture, not one colour"

        pictures.first.click()
        page.locator("#redraw").click()
        page.get_by_text("4 pictures in").wait_for(timeout=60_000)
        assert page.locator("#edits canvas").count() == 4

        # Where nothing is marked the original stays: its left half, here.
        box = page.locator("#source").bounding_box()
        assert box
        for row in range(8):
            y = box["y"] + box["height"] * (row + 0.5) / 8
            page.mouse.move(box["x"] + box["width"] * 0.55, y)
            page.mouse.down()
            page.mouse.move(box["x"] + box["width"] * 0.95, y, steps=8)
            page.mouse.up()
        page.locator("#redraw").click()
        page.locator("#status", has_text="pictures in").wait_for(timeout=60_000)
        page.wait_for_function("document.querySelector('#redraw').disabled === false")
        halves = """([kept, drawn]) => {
            const of = (c) => c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
            const [a, b] = [of(kept), of(drawn)], sums = [0, 0], side = kept.width;
            for (let i = 0; i < a.length; i++) sums[Math.floor((i / 4) % side / (side / 2))] += Math.abs(a[i] - b[i]);
            return sums;
        }"""
        kept, drawn = pictures.first.element_handle(), page.locator("#edits canvas").first.element_handle()
        left, right = page.evaluate(halves, [kept, drawn])
        assert left < right / 3
        browser.close()
