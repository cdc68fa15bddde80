"""Folders as they come from cameras, archives and other people: what is found, what is passed over, what is refused."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, features
from test_tars import FOLDERS, SAME, SAMPLES, png, write

from reglue.data.images import ImageFolder, UnreadableImage, decode
from reglue.data.labels import in_class_order
from reglue.data.opening import open_images
from reglue.data.reading import Reading
from reglue.errors import UserError

PNG = png(7)


def fill(folder: Path, *names: str) -> Path:
    """A folder of files, all of which hold the same picture."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PNG)
    return folder


FOUND: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "what systems leave": (
        (
            *("cat/1.png", "dog/1.png", "__MACOSX/cat/._1.png", "@eaDir/1.png", "cat/@eaDir/1.png", "cat/._1.png"),
            *(".cache/1.png", "#recycle/1.png", ".DS_Store", "dog/.thumbs/1.png"),
        ),
        {"cat/1.png": "cat", "dog/1.png": "dog"},
    ),
    "numbers": (
        tuple(f"{number}/a.png" for number in range(12)),
        {f"{number}/a.png": str(number) for number in range(12)},
    ),
    "numbers with zeros": (("07/a.png", "8/a.png", "10/a.png"), {"07/a.png": "07", "8/a.png": "8", "10/a.png": "10"}),
    "years within classes": (
        ("cat/2020/1.png", "cat/2021/1.png", "dog/1.png"),
        {"cat/2020/1.png": "cat", "cat/2021/1.png": "cat", "dog/1.png": "dog"},
    ),
    "names that are patterns": (
        ("[a]/1.png", "{b,c}/*.png", "*/1.png"),
        {"*/1.png": "*", "[a]/1.png": "[a]", "{b,c}/*.png": "{b,c}"},
    ),
}


@pytest.mark.parametrize(("names", "expected"), FOUND.values(), ids=FOUND)
def test_classes_and_images_are_found(tmp_path: Path, names: tuple[str, ...], expected: dict[str, str]):
    images = ImageFolder.open(fill(tmp_path / "photos", *names))
    assert {
        name: images.class_names[label] for name, label in zip(images.names, images.labels, strict=True)
    } == expected
    assert images.class_names == in_class_order(set(expected.values()))
    assert list(images.labels) == sorted(images.labels)


def test_what_is_passed_over_is_counted_by_its_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("reglue.data.listing.EXTENSIONS", {".png", ".jpg"})
    names = ("1.png", "2.PNG", "3.heic", "4.HEIC", "5.jxl", "6", "7.jpg_large", "8.txt", ".hidden", "9.tar.gz")
    images = ImageFolder.open(fill(tmp_path, *names))
    assert images.names == ("1.png", "2.PNG")
    assert images.notes == (
        "passed over: 2 .heic, 1 without an ending, 1 .gz, 1 .jpg_large, 1 .jxl, 1 .txt (pillow-heif reads .heic) "
        "(pillow-jxl-plugin reads .jxl)",
    )
    for name in ("1.png", "2.PNG"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=r"holds no images \(passed over: 2 \.heic"):
        ImageFolder.open(tmp_path)


def test_levels_of_folders(tmp_path: Path):
    fill(tmp_path, "animals/cat/1.png", "animals/dog/a/2.png", "plants/cat/3.png")
    first, second = ImageFolder.open(tmp_path), open_images(tmp_path, Reading(class_level=2))
    assert (first.class_names, first.labels) == (("animals", "plants"), (0, 0, 1))
    assert first.notes == (
        "classes are the folders of the first level (animals, plants, …); class_level 2 takes the second (such as "
        "animals/cat)",
    )
    assert second.class_names == ("animals/cat", "animals/dog", "plants/cat")
    assert (second.notes, list(second.labels)) == ((), [0, 1, 2])
    assert open_images(tmp_path, Reading(no_labels=True)).class_names == ()


REFUSED: dict[str, tuple[tuple[str, ...], Reading, str]] = {
    "parts of a data set": (
        ("train/cat/1.png", "val/cat/2.png"),
        Reading(),
        r"no classes but train, val, .* give .*/train, or choose class_level 2",
    ),
    "a folder in a folder": (
        ("photos/cat/1.png", "photos/dog/2.png"),
        Reading(),
        r"give .*/photos, or choose",
    ),
    "images above the level": (("a/cat/1.png", "a/2.png"), Reading(class_level=2), r"/a holds images, such as 2\.png"),
    "no such level": (("cat/1.png",), Reading(class_level=2), r"folders of level 2, but .*/cat holds images"),
    "an empty class": (("cat/1.png", "dog/1.doc"), Reading(), r"/dog is a class without images \(passed over: 1 \.doc"),
    "an empty class below": (("a/cat/1.png", "a/b/1.doc"), Reading(class_level=2), "/a/b is a class without images"),
}


@pytest.mark.parametrize(("names", "reading", "says"), REFUSED.values(), ids=REFUSED)
def test_folders_that_are_no_classes_are_refused(tmp_path: Path, names: tuple[str, ...], reading: Reading, says: str):
    with pytest.raises(UserError, match=says) as caught:
        open_images(fill(tmp_path, *names), reading)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"class_level": 0}, {"class_level": 2, "no_labels": True}, {"class_level": 1, "labels": Path("a.csv")}]
)
def test_a_level_that_means_nothing_is_refused(options: dict):
    with pytest.raises(UserError, match=r"class_level [012]: choose at least 1"):
        Reading(**options)


@pytest.mark.parametrize("name", ["[x]", "a*b{1,2}", "[!a]? {b"])
def test_folders_whose_names_are_patterns(tmp_path: Path, name: str):
    """Whatever lies in them, and also where they are given as the beginning of a pattern."""
    folder = tmp_path / name / "photos [1]"
    write(folder / "tars" / "0.tar", SAMPLES)
    write(folder / "tars" / "[1].tar", FOLDERS)
    table = {"jpg": [PNG] * 3, "label": ["cat", "dog", "cat"]}
    for split in ("train", "test"):
        (folder / "tables").mkdir(exist_ok=True)
        pq.write_table(pa.table(table), folder / "tables" / f"{split}-00000-of-00001.parquet")
    fill(folder / "images", "cat/1.png", "dog/1.png")
    (folder / "labels.csv").write_text("id,label\n1,cat\n")
    assert len(open_images(folder / "images")) == 2
    assert len(open_images(folder / "tars" / "0.tar")) == len(SAME)
    assert len(open_images(folder / "tars" / "[1].tar")) == len(FOLDERS)
    assert len(open_images(folder / "tars" / "*.tar", Reading(no_labels=True))) == len(SAME) + len(FOLDERS)
    assert len(open_images(folder / "tars" / "{0,[1]}.tar", Reading(no_labels=True))) == len(SAME) + len(FOLDERS)
    assert len(open_images(folder / "tars", Reading(no_labels=True))) == len(SAME) + len(FOLDERS)
    assert len(open_images(folder / "tables")) == 3
    assert len(open_images(folder / "tables" / "t*.parquet")) == 6
    assert len(open_images(folder / "images" / "cat", Reading(labels=folder / "labels.csv"))) == 1
    assert len(open_images(folder / "tars" / "[1].tar", Reading(streaming=True, count=3, no_labels=True))) == 3


def test_avif_is_read(tmp_path: Path):
    if not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    Image.new("RGB", (8, 8), (200, 100, 50)).save(tmp_path / "a.avif")
    (image,) = (ImageFolder.open(tmp_path).load(0, (8, 8)) for _ in range(1))
    assert (torch.as_tensor(image)[:, 4, 4].int() - torch.tensor([200, 100, 50])).abs().max() <= 4


def test_heic_is_read_where_its_plug_in_is(tmp_path: Path):
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    Image.new("RGB", (64, 64), (200, 100, 50)).save(tmp_path / "a.HEIC")
    image = ImageFolder.open(tmp_path).load(0, (8, 8))
    assert (torch.as_tensor(image)[:, 4, 4].int() - torch.tensor([200, 100, 50])).abs().max() <= 8


def test_a_plug_in_is_asked_to_read_its_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With one that says that PPM files with another beginning are its own."""
    (tmp_path / "pillow_heif.py").write_text(
        "from PIL import Image, PpmImagePlugin\n"
        "def opened(file, name=None):\n"
        "    file.seek(4)\n"
        "    import io\n"
        "    return PpmImagePlugin.PpmImageFile(io.BytesIO(file.read()))\n"
        "def register_heif_opener():\n"
        "    Image.register_open('TOY', opened, lambda start: start.startswith(b'TOY!'))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pillow_heif", raising=False)
    monkeypatch.setitem(Image.EXTENSION, ".heic", "TOY")
    listing = "reglue.data.listing"
    sys.modules[listing].formats.cache_clear()
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (9, 8, 7)).save(file, "ppm")
    try:
        assert decode(b"TOY!" + file.getvalue()).getpixel((0, 0)) == (9, 8, 7)
    finally:
        sys.modules[listing].formats.cache_clear()
        Image.OPEN.pop("TOY", None)
        Image.ID.remove("TOY")


def test_links_to_class_folders_are_followed_once(tmp_path: Path):
    fill(tmp_path / "pool", "1.png")
    fill(tmp_path / "photos", "dog/1.png")
    (tmp_path / "photos" / "cat").symlink_to(tmp_path / "pool")
    (tmp_path / "pool" / "up").symlink_to(tmp_path / "photos")
    images = ImageFolder.open(tmp_path / "photos")
    assert images.names[0] == "cat/1.png"
    assert images.class_names == ("cat", "dog")
    shutil.rmtree(tmp_path / "pool")
    assert ImageFolder.open(tmp_path / "photos").names == ("dog/1.png",)


def test_a_link_to_itself_is_an_image_that_cannot_be_read(tmp_path: Path):
    fill(tmp_path, "cat/1.png", "dog/1.png")
    (tmp_path / "cat" / "2.png").symlink_to("2.png")
    images = ImageFolder.open(tmp_path)
    assert images.names == ("cat/1.png", "cat/2.png", "dog/1.png")
    assert images.fingerprint()
    assert images.load(1, (4, 4)) == UnreadableImage("cat/2.png", "not a file, or a broken link")
