"""The studio in a real browser: each tab does its main job."""

from __future__ import annotations

import base64
import io
import json
import shlex
import shutil
import signal
import socket
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pytest
from PIL import Image

from helpers import draw_masks
from processes import Reglue
from reglue import cli
from reglue.app.work import Work
from reglue.app.workshop import Workshop
from reglue.commands.prototypes import prototypes
from reglue.errors import UserError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("no chromium (apt-get install chromium)", allow_module_level=True)
pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
PATIENCE = 60_000
"""Milliseconds: the machine may have much else to do."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Path:
    """A run that trains elsewhere, as far as one can see."""
    folder = Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("training") / "tiny"))
    (folder / "previews").mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def address(
    tmp_path_factory: pytest.TempPathFactory, training: Path, tiny_store: Path, tiny_images: Path
) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("studio")
    masks, looks = draw_masks(folder / "masks", tiny_images), folder / "looks"
    line = ["prototypes", str(tiny_store), "--masks", str(masks), "--out", str(looks), "--column=local.conv-4"]
    prototypes(cli.parse(line))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "files/uploads"))
        from reglue.app.page import serve

        workshop = Workshop.open(["starter", str(training)], folder / "files", prototypes=looks, device="cpu")
        for run in workshop.runs:
            run.warm()
        page = serve(workshop, port=free_port())
        assert page.local_url
        yield page.local_url
        page.close(verbose=False)


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """A new visitor's page. Nothing that it shows may come from elsewhere or be an error of its scripts."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(PATIENCE)
    asked, errors = list[str](), list[str]()
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(address)
    page.wait_for_selector("#draw")
    yield page
    page.close()
    assert all(url.startswith((address, "data:", "blob:")) for url in asked), asked
    assert not errors


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def open_tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def set_number(page: Any, within: str, label: str, value: int) -> None:
    """The number beside a slider."""
    field = page.locator(within).get_by_label(f"number input for {label}")
    field.fill(str(value))
    field.press("Tab")


def shown(page: Any, where: str) -> list[np.ndarray]:
    """The pictures of a tab that can be picked, in their order."""
    page.wait_for_selector(f"{where} [data-index]")
    addresses = page.eval_on_selector_all(f"{where} [data-index] img", "images => images.map(image => image.src)")
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(one.partition(",")[2]))).convert("RGB")) for one in addresses
    ]


def repeated(line: str, folder: Path) -> list[np.ndarray]:
    cli.execute(replace(cli.parse(shlex.split(line)[1:]), out=folder))
    return [np.asarray(Image.open(file)) for file in sorted(folder.glob("0*.png"))]


def equal(some: list[np.ndarray], others: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(some, others, strict=True))


def drag(page: Any, canvas: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    """With the mouse, between shares of the canvas."""
    box = canvas.bounding_box()
    (x, y), (to_x, to_y) = ((box["x"] + a * box["width"], box["y"] + b * box["height"]) for a, b in (start, end))
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move((x + to_x) / 2, (y + to_y) / 2)
    page.mouse.move(to_x, to_y)
    page.mouse.up()


def test_draw_shows_the_same_seeds_of_two_runs_and_the_command_lines_repeat_them(page: Any, tmp_path: Path) -> None:
    set_number(page, "#draw-knobs", "count", 2)
    set_number(page, "#draw-knobs", "steps", 4)
    page.click("#draw")
    drawn = shown(page, "#drawn")
    assert [one.shape[0] for one in drawn] == [32, 32, 16, 16]
    assert page.get_by_alt_text("ankle boot, seed 0, number 1").count() == 1
    lines = page.locator("#draw-command textarea").input_value().splitlines()
    assert equal(drawn[:2], repeated(lines[0], tmp_path / "a"))
    assert equal(drawn[2:], repeated(lines[1], tmp_path / "b"))
    page.locator("#drawn [data-index]").nth(1).click()
    page.wait_for_selector("#canvas canvas:visible")
    assert page.get_by_role("tab", name="Edit").get_attribute("aria-selected") == "true"


def test_edit_paints_copies_picks_and_undoes(page: Any, tmp_path: Path, tiny_images: Path) -> None:
    open_tab(page, "Edit")
    page.locator("#canvas input[type=file]").set_input_files(tiny_images / "circle/000.png")
    canvas = page.locator("#canvas canvas")
    canvas.wait_for()
    set_number(page, "#edit-knobs", "count", 2)
    set_number(page, "#edit-knobs", "steps", 4)
    drag(page, canvas, (0.6, 0.2), (0.7, 0.9))
    page.get_by_role("img", name="the image at hand, a mask", exact=True).wait_for()
    page.click("#edit")
    drawn = shown(page, "#edits")
    command = page.locator("#edit-command textarea")
    line = command.input_value()
    assert "--keep local --mask " in line
    assert equal(drawn, repeated(line, tmp_path / "mask"))
    original = np.asarray(Image.open(tiny_images / "circle/000.png").convert("RGB"))
    assert np.array_equal(drawn[0][:, :8], original[:, :8])  # The mask is elsewhere.
    assert not np.array_equal(drawn[0], original)

    page.locator("#edits [data-index]").nth(1).click()  # It becomes the image, and the mask is gone.
    page.get_by_role("img", name="the image at hand", exact=True).wait_for()
    page.get_by_role("button", name="Copy a piece").click()
    drag(page, canvas, (0.05, 0.05), (0.3, 0.3))
    drag(page, canvas, (0.2, 0.2), (0.45, 0.2))
    page.keyboard.press("ArrowDown")
    page.keyboard.press("m")
    page.click("#edit")
    page.wait_for_function("document.querySelector('#edit-command textarea').value.includes('--paste')")
    line = command.input_value()
    assert "--box 0 0 8 8 --at 5 3 --mirror" in line  # Cells of the map are 2.5 pixels.
    assert equal(shown(page, "#edits"), repeated(line, tmp_path / "piece"))

    page.click("#undo")
    page.get_by_role("img", name="the image at hand", exact=True).wait_for()
    page.click("#undo")
    page.get_by_text("nothing to undo").wait_for()


def test_classes_are_painted_on_the_run_of_the_prototypes(page: Any, tmp_path: Path, tiny_images: Path) -> None:
    open_tab(page, "Edit")
    page.locator("#canvas input[type=file]").set_input_files(tiny_images / "square/001.png")
    canvas = page.locator("#canvas canvas")
    canvas.wait_for()
    page.get_by_label("run", exact=True).click()
    page.get_by_role("option", name="tiny").click()
    page.get_by_role("button", name="Paint classes").click()
    page.get_by_role("radio", name="class 1").click()
    drag(page, canvas, (0.2, 0.2), (0.8, 0.8))
    set_number(page, "#edit-knobs", "count", 1)
    set_number(page, "#edit-knobs", "steps", 2)
    page.click("#edit")
    drawn = shown(page, "#edits")
    line = page.locator("#edit-command textarea").input_value()
    assert "--paint " in line
    assert equal(drawn, repeated(line, tmp_path / "out"))


def test_see_compares_the_place_under_the_pointer(page: Any, tiny_images: Path) -> None:
    open_tab(page, "See")
    page.locator("#places input[type=file]").set_input_files(tiny_images / "circle/000.png")
    output = page.locator("#places output")
    output.get_by_text("row 5, column 5").wait_for()
    page.locator(".seen-map").hover(position={"x": 5, "y": 5})
    assert "row 1, column 1" in output.inner_text()
    page.locator("#places .zone").press("ArrowRight")
    assert "row 1, column 2" in output.inner_text()
    page.get_by_text("no nearest training images").wait_for()
    heat = page.evaluate(
        "document.querySelector('.seen-similarity').getContext('2d').getImageData(48, 16, 1, 1).data[0]"
    )
    assert heat == 253  # The place is like itself: yellow.


def test_watch_follows_a_training(page: Any, training: Path) -> None:
    lines = [{"step": step, "loss": 1 / step, "images_per_second": 4.0} for step in (1, 2, 3)]
    (training / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Image.new("RGB", (8, 8), "red").save(training / "previews/00000002.png")
    open_tab(page, "Watch")
    page.get_by_text("tiny: step 6 of 6 · loss 0.3333").wait_for()
    page.get_by_alt_text("preview of step 2").wait_for()
    Image.new("RGB", (8, 8), "blue").save(training / "previews/00000003.png")
    page.get_by_alt_text("preview of step 3").wait_for()
    assert page.locator("#watch-curves polyline").count() == 1
    set_number(page, "#watch-step", "previews and samples of step", 2)
    page.get_by_alt_text("preview of step 2").wait_for()


def test_a_second_visitor_waits_and_stop_works(
    page: Any, browser: Any, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    say, begun = Work.say, list[Work]()

    def at_length(work: Work, *report: Any) -> None:
        """The first drawing takes until it is stopped, however slow the browser is."""
        say(work, *report)
        begun.append(work)
        while work is begun[0] and not work.stopped.wait(0.05):
            pass

    monkeypatch.setattr(Work, "say", at_length)
    page.click("#draw")
    page.wait_for_selector("#drawn img")
    second = browser.new_page()
    second.set_default_timeout(PATIENCE)
    second.goto(address)
    set_number(second, "#draw-knobs", "count", 1)
    set_number(second, "#draw-knobs", "steps", 1)
    second.click("#draw")
    second.get_by_text("waiting, 1 before you").wait_for()
    second.click("#draw-stop")
    second.get_by_text("stopped").wait_for()
    second.click("#draw")
    second.get_by_text("waiting, 1 before you").wait_for()
    began = time.monotonic()
    page.click("#draw-stop")
    page.get_by_text("stopped").wait_for()
    second.get_by_text("done in").wait_for()
    assert len(shown(second, "#drawn")) == 2
    assert page.locator("#draw-status").inner_text() == "stopped"
    assert page.locator("#drawn [data-index]").count() == 0
    assert time.monotonic() - began < PATIENCE / 1000
    second.close()


def test_what_is_no_image_or_too_large_is_one_line(page: Any, address: str, tmp_path: Path) -> None:
    open_tab(page, "Edit")
    (tmp_path / "text.png").write_text("no picture")
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(21 * 2**20)
    Image.new("1", (5000, 5000)).save(tmp_path / "wide.png")
    field, told = page.locator("#canvas input[type=file]"), page.locator("#edit-status")
    for name, line in (
        ("text.png", "text.png cannot be read (cannot identify image file it); give an image file"),
        ("large.png", "large.png has more than 20 MB, or could not be sent; give a smaller file"),
        ("wide.png", "wide.png has 5000×5000 pixels; give at most 16 million"),
    ):
        field.set_input_files(tmp_path / name)
        told.get_by_text(line, exact=True).wait_for()
    request = urllib.request.Request(f"{address}gradio_api/upload", b"x" * (22 * 2**20), method="POST")
    with pytest.raises((HTTPError, ConnectionError, OSError)) as refused:
        urllib.request.urlopen(request)
    assert not isinstance(refused.value, HTTPError) or refused.value.code == 413


def test_others_give_the_password(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    from reglue.app.page import serve

    workshop, port = Workshop.open(["starter"], tmp_path, device="cpu"), free_port()
    served = serve(workshop, port=port, password="sesame")
    with pytest.raises(UserError, match=f"port {port} on 127.0.0.1 cannot be had "):
        serve(workshop, port=port)
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(served.local_url)
    for password, then in (("wrong", "text=Incorrect Credentials"), ("sesame", "#draw")):
        assert page.locator("#draw").count() == 0
        page.get_by_label("username").fill("anybody")
        page.get_by_label("password").fill(password)
        page.get_by_role("button", name="Login").click()
        page.wait_for_selector(then)  # The page empties its fields when it is told that they are wrong.
    page.close()
    served.close(verbose=False)


def test_the_command_leaves_nothing_behind(tmp_path: Path) -> None:
    home, temporary, port = tmp_path / "home", tmp_path / "tmp", str(free_port())
    home.mkdir()
    temporary.mkdir()
    folders = {"HOME": str(home), "TMPDIR": str(temporary)}
    prelude = "import tempfile; tempfile.tempdir = None"  # The server has asked for it before.
    process = Reglue("studio", "--no-browser", "--port", port, "--device=cpu", prelude=prelude, **folders)
    deadline = time.monotonic() + 300
    while not process.said():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert b"reglue studio" in urllib.request.urlopen(f"http://127.0.0.1:{port}/").read()
    assert len([*temporary.glob("reglue-studio-*")]) == 1
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130
    assert out == f"studio: http://127.0.0.1:{port}/ (Ctrl-C ends it)\n"
    assert err.endswith("reglue: the studio is closed, and its files are removed\n")
    assert not [file for file in temporary.rglob("*") if "reglue" in str(file) or "gradio" in str(file)]
    assert not [file for file in home.rglob("*") if file.is_file()]
