"""What the studio does, without a browser: its actions are plain functions."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import shlex
import shutil
import sys
import threading
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers import draw_masks, mistake
from reglue import cli
from reglue.app import drawing, editing, pictures, seeing, uploads, watching
from reglue.app.curves import curves
from reglue.app.door import Bounded, check_of, password_for
from reglue.app.drawing import EACH, NO_CLASS, Wish
from reglue.app.editing import KEEP, SWAP, EditWish, Painted
from reglue.app.uploads import read_upload
from reglue.app.visitor import Visitor
from reglue.app.work import MOST_WAITING, Done, Failed, Halted, Report, Stopped, Turns, Waiting, Work, at_work
from reglue.app.workshop import Run, Workshop
from reglue.commands.prototypes import prototypes
from reglue.data.images import ImageFolder
from reglue.errors import UserError
from reglue.perception.heads import Head, HeadSpec
from reglue.pipeline import load


@pytest.fixture(scope="module")
def looks(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path, tiny_images: Path) -> Path:
    folder = tmp_path_factory.mktemp("looks")
    masks, out = draw_masks(folder / "masks", tiny_images), folder / "out"
    line = ["prototypes", str(tiny_store), "--masks", str(masks), "--out", str(out), "--column=local.conv-4"]
    prototypes(cli.parse(line))
    return out


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Path:
    encoder = load(tiny_run).record.encoder
    assert encoder is not None
    spec = HeadSpec(
        task="segmentation",
        architecture=encoder.architecture,
        width=encoder.width,
        layers=encoder.layers[-1:],
        outputs=2,
        encoder_sha256=encoder.weights_sha256,
        class_names=("cloth", "background"),
    )
    folder = tmp_path_factory.mktemp("head") / "cloth"
    folder.mkdir()
    torch.manual_seed(0)
    Head(spec).save(folder)
    return folder


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path, head: Path, looks: Path) -> Workshop:
    folder = tmp_path_factory.mktemp("studio")
    return Workshop.open(["starter", str(tiny_run)], folder, [head], looks, device="cpu")


@pytest.fixture
def visitor(tmp_path: Path, tiny_images: Path) -> Visitor:
    visitor = Visitor(tmp_path / "visitor")
    visitor.take(Image.open(tiny_images / "circle/000.png"))
    return visitor


def repeated(line: str, folder: Path) -> list[np.ndarray]:
    """What a command line draws, in its order."""
    options = cli.parse(shlex.split(line)[1:])
    cli.execute(replace(options, out=folder))
    return [np.asarray(Image.open(file)) for file in sorted(folder.glob("0*.png"))]


def test_pictures_are_those_of_generate_and_appear_while_they_are_drawn(workshop: Workshop, tmp_path: Path) -> None:
    run, reports = workshop.run("starter"), list[Report]()
    wish = Wish("bag", count=2, seed=3, sampler="heun", steps=6, strengths={"latent": 2.5, "local": 1.5, "other": 9.0})
    drawn = drawing.draw_all([run], wish, Work(reports.append))["starter"]
    own = run.model().generate(
        "bag", count=2, seed=3, sampler="heun", steps=6, guidance_scale=2.5, local_scale=1.5, cls_scale=2.0
    )  # The last one is the recipe's.
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(drawn, own, strict=True))
    assert [report.share for report in reports] == sorted(report.share for report in reports)
    assert reports[-1].share == 1
    assert any(report.images and len(report.images) == 2 and report.what == "starter" for report in reports)
    line = drawing.command(run, wish)
    assert line.startswith("reglue sample starter --out samples --classes bag --count 2 --seed 3 --sampler heun")
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(repeated(line, tmp_path / "out"), drawn, strict=True))


def test_the_same_seeds_in_two_runs(workshop: Workshop, tmp_path: Path) -> None:
    scales = drawing.scales_of(workshop.runs)
    assert [*scales] == ["latent", "local", "cls"]
    wish = Wish(EACH, count=4, sampler="euler", steps=2, strengths=scales)
    drawn = drawing.draw_all(workshop.runs, wish, Work())
    assert [len(images) for images in drawn.values()] == [4, 4]
    for run in workshop.runs:
        again = repeated(drawing.command(run, wish), tmp_path / run.title)
        assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(again, drawn[run.title], strict=True))
    assert drawing.alts(workshop.runs[1], wish)[3] == "circle, seed 0, number 3"


def test_no_class_is_drawn_and_has_no_command_line(workshop: Workshop) -> None:
    run, wish = workshop.run("starter"), Wish(NO_CLASS, count=1, sampler="euler", steps=1)
    assert len(drawing.draw(run, wish, Work())) == 1
    assert drawing.command(run, wish) == ""
    with pytest.raises(UserError, match="class tiger: choose 0 to 9 or a name"):
        drawing.draw(run, replace(wish, classes="tiger"), Work())


def test_work_can_be_stopped_fails_in_a_line_and_waits_for_its_turn(capsys: pytest.CaptureFixture[str]) -> None:
    turns, begun, ended = Turns(), threading.Event(), threading.Event()

    def endless(work: Work) -> None:
        try:
            while True:
                work.say(0.5)
                begun.set()
                time.sleep(0.001)
        finally:
            ended.set()

    first = at_work(endless, turns)
    assert next(first) == Report(0.5)
    begun.wait()
    waiting = list[Work]()
    second, third, fourth = at_work(lambda _: 7, turns), at_work(endless, turns, waiting), at_work(endless, turns)
    assert [next(one) for one in (second, third, fourth)] == [Waiting(1), Waiting(2), Waiting(3)]
    waiting[0].stop()
    assert [one for one in third if one != Waiting(2)] == [Stopped()]
    assert not waiting
    assert next(one for one in fourth if one != Waiting(3)) == Waiting(2)
    fourth.close()  # type: ignore[reportAttributeAccessIssue], a generator
    first.close()  # type: ignore[reportAttributeAccessIssue], a generator
    assert ended.wait(5)
    (done,) = (one for one in second if one != Waiting(1))
    assert isinstance(done, Done)
    assert done.value == 7

    def fails(error: Exception) -> list[Any]:
        def action(_: Work) -> None:
            raise error

        return [one for one in at_work(action, turns) if not isinstance(one, Waiting)]

    assert fails(UserError("no such thing; choose another")) == [Failed("no such thing; choose another")]
    assert fails(Halted()) == [Stopped()]
    (failed,) = fails(KeyError("x"))
    assert failed.reason.startswith("a defect (KeyError)")
    assert "Traceback" in capsys.readouterr().err


def test_too_many_who_wait_are_sent_away_and_a_visitor_who_leaves_ends_all_of_theirs(tmp_path: Path) -> None:
    turns, visitor = Turns(), Visitor(tmp_path)

    def endless(work: Work) -> None:
        while True:
            work.say(0.5)
            time.sleep(0.001)

    works = [at_work(endless, turns, visitor.works[f"tab {i % 2}"]) for i in range(MOST_WAITING + 1)]
    assert [next(one) for one in works] == [Report(0.5), *map(Waiting, range(1, MOST_WAITING + 1))]
    assert [*at_work(endless, turns)] == [Failed(f"{MOST_WAITING} are waiting already; try again in a while")]
    visitor.stop("tab 1")
    assert [*works[1]][-1] == Stopped()
    visitor.leave()
    assert [[*one][-1] for one in works if one is not works[1]] == [Stopped()] * MOST_WAITING
    *_, done = at_work(lambda _: 7, turns)  # Behind the one that has been stopped and is not yet at its end.
    assert isinstance(done, Done)


def test_a_drawing_stops_at_its_next_evaluation(workshop: Workshop) -> None:
    work = Work()
    work.report = lambda _: work.stopped.set()
    with pytest.raises(Halted):
        drawing.draw(workshop.run("starter"), Wish(steps=50, sampler="euler"), work)
    work.stopped.set()
    with pytest.raises(Halted):
        drawing.draw(workshop.run("starter"), Wish(steps=1, sampler="dopri5"), work)


def painted(**parts: Any) -> Painted:
    """What the browser would send."""
    cells = {name: base64.b64encode(parts.pop(name).tobytes()).decode() for name in ("mask", "labels") if name in parts}
    return Painted.read(json.dumps({"rows": 20, "columns": 20, **cells, **parts}))


@pytest.mark.parametrize("how", ["mask", "paint", "piece", "swap", "strength", "class", "flow"])
def test_the_command_line_of_an_edit_gives_the_same_pictures(
    how: str, workshop: Workshop, visitor: Visitor, tmp_path: Path, tiny_images: Path
) -> None:
    run, cells = workshop.runs[1], np.full((20, 20), 255, np.uint8)
    cells[4:12, 6:] = 1
    wish = EditWish(count=2, seed=5, sampler="euler", steps=3, held={"local": KEEP}, until=0.2)
    on_canvas = Painted()
    visitor.other = visitor.write(Image.open(tiny_images / "square/001.png"), "other")
    if how == "mask":
        on_canvas, wish = painted(mask=cells % 255), replace(wish, feather=2)
    elif how == "paint":
        on_canvas = painted(labels=cells)
    elif how == "piece":
        piece = {"box": [0, 5, 10, 15], "at": [14, 8], "mirror": True}  # Beyond the edge: it is put where it fits.
        on_canvas, wish = painted(piece=piece), replace(wish, resample=1)
    elif how == "swap":
        wish = replace(wish, held={"local": SWAP, "cls": KEEP, "latent": "free"})
    elif how == "strength":
        wish = replace(wish, held={}, strength=0.5)
    elif how == "class":
        wish = replace(wish, classes="square", strengths={"latent": 1.5, "local": 1.0, "cls": 1.5})
    else:
        wish = replace(wish, held={}, classes="square", flow_edit=True, source_class="circle")
    options = editing.options_of(wish, on_canvas, visitor, workshop)
    drawn = editing.edit(run, wish, options, visitor, Work())
    assert len(drawn) == 2
    assert drawn[0].size == (20, 20)
    line = editing.command(run, wish, options, visitor)
    again = repeated(line, tmp_path / "out")
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(again, drawn, strict=True)), line
    expected = {
        "mask": "--mask", "paint": "--prototypes", "piece": "--at 10 8 --mirror", "swap": "--local-from",
        "strength": "--strength 0.5", "class": "--classes square", "flow": "--flow-edit --source-class circle",
    }  # fmt: skip
    assert expected[how] in line


def test_what_an_edit_lacks_is_said_in_a_line(workshop: Workshop, visitor: Visitor, tmp_path: Path) -> None:
    run, wish = workshop.run("starter"), EditWish(steps=1, sampler="euler")
    with pytest.raises(UserError, match="there is no other image yet"):
        editing.options_of(replace(wish, held={"cls": SWAP}), Painted(), visitor, workshop)
    with pytest.raises(UserError, match="no image yet; drop one"):
        editing.options_of(wish, Painted(), Visitor(tmp_path / "new"), workshop)
    with pytest.raises(UserError, match="nothing of the image would be left"):
        editing.edit(run, wish, editing.options_of(wish, Painted(), visitor, workshop), visitor, Work())


def test_the_canvas_shows_the_image_its_map_and_the_palette(workshop: Workshop, visitor: Visitor) -> None:
    shown = editing.canvas(workshop.runs[1], visitor, workshop)
    assert (shown["grid"], shown["cells"], shown["box"]) == ((8, 8), (20, 20), (0, 0, 20, 20))
    assert shown["map"].size == (8, 8)
    assert shown["labels"] == [0, 1]
    visitor.take(Image.new("RGB", (1024, 512)))
    assert editing.canvas(workshop.runs[1], visitor, workshop)["cells"] == (128, 256)


@settings(max_examples=50)
@given(
    st.text()
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=8),
        lambda inside: (
            st.lists(inside, max_size=5)
            | st.dictionaries(st.sampled_from(["rows", "columns", "mask", "labels", "piece", "box", "at"]), inside)
        ),
        max_leaves=8,
    ).map(json.dumps)
)
def test_whatever_a_browser_sends_is_a_painting_or_a_line(text: str) -> None:
    try:
        read = Painted.read(text)
    except UserError:
        return
    assert read.mask is None or read.mask.any()
    assert (read.box is None) == (read.at is None)


def test_a_visitor_goes_back_and_leaves_nothing(tmp_path: Path) -> None:
    visitor = Visitor(tmp_path / "visitor")
    first = visitor.take(Image.new("RGB", (4, 4), "red"))
    second = visitor.take(Image.new("RGB", (4, 4), "blue"))
    assert visitor.image == second
    visitor.undo()
    visitor.undo()
    assert visitor.image == first
    assert visitor.open().getpixel((0, 0)) == (255, 0, 0)
    visitor.leave()
    assert not [*tmp_path.iterdir()]


def test_a_strangers_image_is_bounded_and_decoded_by_our_own_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "uploads"
    folder.mkdir()

    def sent(content: bytes) -> Path:
        file = folder / "a.png"
        file.write_bytes(content)
        return file

    def encoded(image: Image.Image, kind: str = "png") -> bytes:
        file = io.BytesIO()
        image.save(file, kind)
        return file.getvalue()

    read = read_upload(sent(encoded(Image.new("RGBA", (6, 4), (0, 0, 0, 0)))), "cat.png", folder)
    assert (read.mode, read.size, read.getpixel((0, 0))) == ("RGB", (6, 4), (255, 255, 255))
    assert not [*folder.iterdir()]
    outside = tmp_path / "outside.png"
    outside.write_bytes(encoded(Image.new("L", (2, 2))))
    (folder / "link.png").symlink_to(outside)
    for place in (outside, folder / ".." / "outside.png", folder / "link.png", folder):
        with pytest.raises(UserError, match=r"^cat\.png was not uploaded; drop it again$"):
            read_upload(place, "cat.png", folder)
    assert outside.is_file()
    with pytest.raises(UserError, match=r"^a\\nb cannot be read \(.*\); give an image file$") as raised:
        read_upload(sent(b"no image"), "a\nb", folder)
    assert str(tmp_path) not in str(raised.value)
    with pytest.raises(UserError, match=r"^big has 5000×5000 pixels; give at most 16 million$"):
        read_upload(sent(encoded(Image.new("1", (5000, 5000)))), "big", folder)
    monkeypatch.setattr(uploads, "MOST_BYTES", 2**20)
    with pytest.raises(UserError, match=r"^heavy has more than 1 MB; give a smaller file$"):
        read_upload(sent(b"x" * (2**20 + 1)), "heavy", folder)
    assert [file.name for file in folder.iterdir()] == ["link.png"]


def test_what_is_seen_in_a_training_image(workshop: Workshop, tiny_images: Path) -> None:
    run, source = workshop.runs[1], ImageFolder.open(tiny_images)
    image = Image.open(tiny_images / source.names[5])
    seen = seeing.look(run, image, workshop.heads, Work())
    assert not seen.notes
    assert seen.neighbours[0].name == source.names[5]
    assert seen.neighbours[0].similarity == pytest.approx(1, abs=1e-3)
    assert [one.similarity for one in seen.neighbours] == sorted((n.similarity for n in seen.neighbours), reverse=True)
    assert seen.places is not None
    assert seen.places.shape == (8, 8, 4)
    np.testing.assert_allclose(np.linalg.norm(seen.places, axis=-1), 1, atol=1e-5)
    assert seen.map is not None
    assert seen.map.size == seen.image.size == seen.heads["cloth"].image.size == (16, 16)
    assert {name for _, name in seen.heads["cloth"].legend} <= {"cloth", "background"}


def test_what_cannot_be_seen_is_a_note(workshop: Workshop, tiny_images: Path) -> None:
    seen = seeing.look(workshop.run("starter"), Image.open(tiny_images / "circle/000.png"), workshop.heads, Work())
    assert seen.map is not None
    assert [note.partition(":")[0] for note in seen.notes] == ["head cloth", "no nearest training images"]


def test_a_training_is_watched(tiny_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    run = Run.open(str(folder))
    there = watching.look(run)
    assert (there.step, there.steps, there.share, there.checkpoints) == (6, 6, 1, (6,))
    assert there.line().startswith("step 6 of 6 · loss ")
    assert there.line().endswith("complete")
    assert next(iter(there.curves)) == "loss"
    log = folder / "metrics.jsonl"
    log.write_text("".join(json.dumps({"step": n, "loss": 1 / n, "images_per_second": 8.0}) + "\n" for n in (1, 2, 3)))
    shutil.rmtree(folder / "checkpoints")
    there = watching.look(run)
    assert there.seconds_left == pytest.approx(3)
    assert there.line() == "step 3 of 6 · loss 0.3333 · 8 images/s · 3 s left"
    os.utime(log, (0, time.time() - 3600))
    assert watching.look(run).line().endswith("8 images/s · nothing written for 60 min")
    log.write_text('{"step": 1}\n?\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged"):
        watching.look(run)
    log.unlink()
    assert watching.look(run).line() == "nothing yet of 6 steps"
    with pytest.raises(UserError, match="has no checkpoint yet"):
        run.model()


def test_previews_and_samples_by_step(tiny_run: Path, tmp_path: Path, workshop: Workshop) -> None:
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    run = Run.open(str(folder))
    (folder / "previews").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(folder / "previews/00000004.png")
    (folder / "previews/00000006.png").write_bytes(b"half a pi")
    assert watching.look(run).previews == (4, 6)
    assert watching.nearest_step((4, 6), 1) == 4
    assert watching.nearest_step((), 1) is None
    assert watching.preview(run, 4).getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(UserError, match=r"00000006\.png cannot be read"):
        watching.preview(run, 6)
    drawn = watching.draw_checkpoints([run], Work())[run.title][6]
    own = load(folder, device="cpu").generate([i % 3 for i in range(8)])
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(drawn, own, strict=True))


def test_a_newer_checkpoint_is_taken(tiny_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    run = Run.open(str(folder))
    before = run.model()
    assert run.model() is before
    newer = Path(shutil.copytree(folder / "checkpoints/00000006", folder / "checkpoints/00000009"))
    (newer / "progress.json").write_text('{"step": 9}')
    assert run.model().step == 9


def test_runs_of_one_name_are_told_apart(tiny_run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_run, tmp_path / tiny_run.name))
    workshop = Workshop.open([str(tiny_run), str(other), str(other)], tmp_path)
    assert [run.title for run in workshop.runs] == [str(tiny_run), str(other)]
    assert Workshop.open([str(other), "starter"], tmp_path).runs[0].title == tiny_run.name
    with pytest.raises(UserError, match="run x: choose "):
        workshop.run("x")
    with pytest.raises(UserError, match="is not a run"):
        Workshop.open([str(tmp_path)], tmp_path)


def test_curves_are_drawings(workshop: Workshop) -> None:
    points = [(step, 2.0**-step) for step in range(1, 900)]
    page = curves({"loss": {"a<b": points, "other": points[:3]}, "alignment": {"a<b": [(1, -1.0), (2, -1.0)]}, "x": {}})
    tree = ElementTree.fromstring(f"<div>{page}</div>")
    lines = tree.findall(".//polyline")
    assert [len((line.get("points") or "").split()) for line in lines] == [300, 3, 2]
    assert [item.text or (item[0].tail if len(item) else "") for item in tree.findall(".//li")] == ["a<b", "other"]
    assert curves({}) == ""


def test_names_are_no_markup() -> None:
    page = pictures.tiles([Image.new("RGB", (2, 2)), None], ['"><script>', "&"], ["<b>", ""], first=0, action="<i>")
    assert "<script>" not in page
    assert "<b>" not in page
    assert "&quot;&gt;&lt;script&gt;" in page
    assert pictures.note("<x>", "problem") == '<p class="problem" role="alert">&lt;x&gt;</p>'


def test_without_gradio_one_line_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    told = mistake(capsys, monkeypatch, "studio")
    assert told == "reglue: the studio needs gradio: run `pip install 'reglue[app]'`"


@pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "nowhere is not a run: it has no run.json"),
        (["--heads", "nowhere"], "nowhere: no such head"),
        (["--prototypes", "nowhere"], "nowhere has no prototypes.json"),
        (["--password", "NOT_SET"], "--password NOT_SET: there is no such environment variable"),
    ],
)
def test_what_is_not_there_is_said_before_the_page_is(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert told in mistake(capsys, monkeypatch, "studio", *arguments)
    assert not [*tmp_path.iterdir()]


def test_others_need_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "sesame")
    assert password_for("127.0.0.1", None) is None
    assert password_for("127.0.0.1", "SECRET") == "sesame"
    first, second = password_for("0.0.0.0", None), password_for("0.0.0.0", None)
    assert first
    assert second
    assert len(first) >= 16
    assert first != second
    assert check_of(None) is None
    check = check_of("sésame")
    assert check
    assert check("anybody", "sésame")
    assert not check("anybody", "sesame")


def test_large_requests_are_not_read() -> None:
    seen = SimpleNamespace(sent=[], read=0)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] == "http.request":
            seen.read += len(message["body"])

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"x" * 40}

    async def send(message: Any) -> None:
        seen.sent.append(message)

    bounded = Bounded(app, most=100)
    announced = {"type": "http", "headers": [(b"content-length", b"101")]}
    asyncio.run(bounded(announced, receive, send))
    assert seen.sent[0]["status"] == 413
    assert seen.read == 0
    asyncio.run(bounded({"type": "http", "headers": []}, receive, send))
    assert seen.read == 80
