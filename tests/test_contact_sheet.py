"""The table and the page beside samples: what they say, and that any interruption is mended."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from helpers import CLASSES, mistake
from reglue import contact_sheet
from reglue.commands.sample import Sample, sample
from reglue.data.images import ImageFolder
from reglue.data.opening import open_images
from reglue.data.reading import Reading
from reglue.errors import UserError
from reglue.metrics.image_sets import open_image_set

TABLE, PAGE = contact_sheet.TABLE, contact_sheet.PAGE
SAMPLING = {"sampler": "euler", "steps": 2, "guidance_scale": 1.0}


def pictures(folder: Path, count: int) -> None:
    for i in range(count):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i:06d}.png")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Sample:
    """What five samples were drawn with."""
    options = Sample(tiny_run, tmp_path_factory.mktemp("drawn") / "out", count=5, steps=1, seed=3, device="cpu")
    sample(options)
    return options


@pytest.fixture
def options(drawn: Sample, tmp_path: Path) -> Sample:
    """The same, with a folder to change."""
    return replace(drawn, out=Path(shutil.copytree(drawn.out, tmp_path / "out")))


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / TABLE).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


class Page(HTMLParser):
    """The pictures of a page and its text."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.pictures: list[str] = []
        self.text = ""
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.pictures.append(dict(attrs)["src"] or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_table_says_what_each_picture_is(drawn: Sample) -> None:
    assert rows(drawn.out) == [
        {
            "file_name": f"{i:06d}.png",
            "label": CLASSES[i % 3],
            "class_index": str(i % 3),
            "index": str(i),
            "seed": "3",
            "sha256": sha256(drawn.out / f"{i:06d}.png"),
        }
        for i in range(5)
    ]


def test_the_page_shows_the_pictures_with_their_classes(options: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Page(options.out / PAGE)
    assert page.pictures == [f"{i:06d}.png" for i in range(5)]
    assert [page.text.count(name) for name in CLASSES] == [2, 2, 1]
    assert "5 images of" in " ".join(page.text.split())
    monkeypatch.setattr(contact_sheet, "SHOWN", 2)
    sample(options)
    page = Page(options.out / PAGE)
    assert page.pictures == ["000000.png", "000001.png"]
    assert "The first 2 of 5 images" in " ".join(page.text.split())


def test_nothing_takes_them_for_samples(drawn: Sample) -> None:
    measured = open_image_set(drawn.out).images
    assert measured
    assert len(measured) == len(ImageFolder.open(drawn.out)) == len(ImageFolder.unlabelled(drawn.out)) == 5


def test_the_table_labels_the_samples(drawn: Sample) -> None:
    images = open_images(drawn.out, Reading(labels=drawn.out / TABLE))
    assert [images.class_names[label] for label in images.labels] == [*CLASSES, *CLASSES[:2]]


def test_without_classes(tmp_path: Path) -> None:
    protocol = {"run": "run", "step": 1, "seed": 0, "labels": [0, 0], "class_names": [], "sampling": SAMPLING}
    pictures(tmp_path, 2)
    contact_sheet.describe(tmp_path, protocol)
    assert [(row["label"], row["class_index"]) for row in rows(tmp_path)] == [("", "")] * 2


def test_names_of_classes_may_be_anything(tmp_path: Path) -> None:
    names = ["<b>&", 'a,"b"\nc', "名前", "x" * 200, "\udcff"]
    protocol = {"run": "r", "step": 1, "seed": 0, "labels": list(range(5)), "class_names": names, "sampling": SAMPLING}
    pictures(tmp_path, 5)
    for _ in range(2):
        contact_sheet.describe(tmp_path, protocol)
    text = (tmp_path / TABLE).read_bytes().decode(errors="surrogateescape")
    assert [row[1] for row in csv.reader(text.splitlines(keepends=True))][1:] == names
    assert b"&lt;b&gt;&amp;" in (tmp_path / PAGE).read_bytes()
    assert contact_sheet.read_hashes(tmp_path) == {f"{i:06d}.png": sha256(tmp_path / f"{i:06d}.png") for i in range(5)}


@pytest.mark.parametrize("missing", [(TABLE,), (PAGE,), (TABLE, PAGE), (TABLE, PAGE, "000001.png"), ("000001.png",)])
def test_the_same_command_writes_what_is_missing(options: Sample, drawn: Sample, missing: tuple[str, ...]) -> None:
    for name in missing:
        (options.out / name).unlink()
    sample(options)
    assert [row | {"sha256": ""} for row in rows(options.out)] == [row | {"sha256": ""} for row in rows(drawn.out)]
    assert all(row["sha256"] == sha256(options.out / row["file_name"]) for row in rows(options.out))
    assert content(options.out)[PAGE] == content(drawn.out)[PAGE]


def test_a_picture_that_is_drawn_again_loses_its_hash_first(options: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process may die between the picture and the table, and the picture differ by rounding."""
    (options.out / "000001.png").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(contact_sheet, "describe", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            sample(options)
    assert (options.out / "000001.png").is_file()
    assert [row["index"] for row in rows(options.out)] == ["0", "2", "3", "4"]


def test_the_hash_of_a_picture_is_never_replaced(options: Sample) -> None:
    before = content(options.out)[TABLE]
    picture = options.out / "000002.png"
    picture.write_bytes(picture.read_bytes()[:-1] + b"!")
    sample(options)
    assert content(options.out)[TABLE] == before
    sample(replace(options, count=6))
    assert [row["sha256"] for row in rows(options.out)][:5] == [
        row.split(",")[-1] for row in before.decode().split()[1:]
    ]
    assert len(rows(options.out)) == 6


def test_fewer_images_take_none_from_the_table(options: Sample) -> None:
    before = content(options.out)
    sample(replace(options, count=2))
    assert content(options.out) == before


def test_an_archive_has_neither(options: Sample) -> None:
    archive = sample(replace(options, out=options.out.with_suffix(".npz")))
    sample(replace(options, out=archive.with_suffix(".parts")))  # As if killed before they were removed.
    sample(replace(options, out=archive))
    assert sorted(path.name for path in archive.parent.iterdir()) == ["out", "out.npz"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: b"",
        lambda text: b"\0" * len(text),
        lambda text: text[:100],
        lambda text: text[:-2],
        lambda text: text.decode().encode("utf-16"),
        lambda text: text.replace(b"000001.png", b"../secret"),
        lambda text: text.replace(b"000001.png", "٠٠٠٠٠١.png".encode()),
        lambda text: text + b"a,b\n",
        lambda text: b'"' * 200_000,
        lambda text: b"[" * 200_000,
    ],
)
def test_a_damaged_table_is_one_line(
    options: Sample,
    damage: Callable[[bytes], bytes],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = options.out / TABLE
    table.write_bytes(damage(table.read_bytes()))
    asked = ["sample", options.run, "--out", options.out, "--count=5", "--steps=1", "--seed=3", "--device=cpu"]
    assert f"{table} is damaged" in mistake(capsys, monkeypatch, *asked)
    table.unlink()
    sample(options)
    assert len(rows(options.out)) == 5


def test_a_table_that_lists_more_than_was_drawn_is_cut(options: Sample) -> None:
    protocol = json.loads((options.out / "samples.json").read_text())
    pictures(options.out, 9)
    contact_sheet.describe(options.out, protocol)
    assert len(rows(options.out)) == 5


def test_a_table_that_is_a_folder(options: Sample) -> None:
    (options.out / TABLE).unlink()
    (options.out / TABLE).mkdir()
    with pytest.raises(UserError, match=r"samples\.csv is damaged"):
        sample(options)
