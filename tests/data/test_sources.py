"""Sources of images: the same pictures in every wrapping, labels from every place, and wrappings that are torn."""

from __future__ import annotations

import copy
import csv
import io
import json
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from webdataset.writer import ShardWriter, TarWriter

from helpers import CLASSES
from reglue.data.images import ImageFolder, ImageSource, UnreadableImage
from reglue.data.opening import open_images
from reglue.data.reading import Reading, Subset
from reglue.errors import UserError

SIZE = (16, 16)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def rows(tiny_images: Path) -> list[tuple[str, bytes, int]]:
    """Key, file and label of each of the 24 images, in the order of the folder."""
    folder = ImageFolder.open(tiny_images)
    return [
        (name.replace("/", "-").removesuffix(".png"), (tiny_images / name).read_bytes(), label)
        for name, label in zip(folder.names, folder.labels, strict=True)
    ]


def as_dataset(rows, names: tuple[str, ...] | None = CLASSES) -> datasets.Dataset:
    kind = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    return datasets.Dataset.from_dict(
        {"photo": [{"bytes": content, "path": None} for _, content, _ in rows], "kind": [label for *_, label in rows]},
        features=datasets.Features({"photo": datasets.Image(), "kind": kind}),
    )


def write_tars(rows, folder: Path, **extra: Callable[[int], Any]) -> Path:
    folder.mkdir()
    with ShardWriter(str(folder / "shard-%02d.tar"), maxcount=10, verbose=0) as writer:
        for key, content, label in rows:
            writer.write({"__key__": key, "png": content, **{name: make(label) for name, make in extra.items()}})
    return folder


def write_parquet(rows, folder: Path) -> Path:
    (folder / "data").mkdir(parents=True)
    as_dataset(rows[:14]).to_parquet(folder / "data" / "train-00000-of-00002.parquet", batch_size=5)
    as_dataset(rows[14:]).to_parquet(folder / "data" / "train-00001-of-00002.parquet")
    as_dataset(rows[:3]).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    return folder


def tars_of_numbers(rows, folder: Path) -> tuple[Path, Reading]:
    return write_tars(rows, folder / "tars", cls=lambda label: label), Reading()


def tars_of_names(rows, folder: Path) -> tuple[Path, Reading]:
    return write_tars(rows, folder / "tars", cls=lambda label: CLASSES[label].encode()), Reading()


def tars_by_braces_and_json(rows, folder: Path) -> tuple[Path, Reading]:
    write_tars(rows, folder / "tars", json=lambda label: {"what": CLASSES[label]})
    return folder / "tars" / "shard-{00..02}.tar", Reading(label_column="what")


def tars_by_glob_and_another_ending(rows, folder: Path) -> tuple[Path, Reading]:
    write_tars(rows, folder / "tars", txt=lambda label: CLASSES[label])
    return folder / "tars" / "shard-*.tar", Reading(label_column="txt")


def one_tar(rows, folder: Path) -> tuple[Path, Reading]:
    with TarWriter(str(folder / "a.tar")) as writer:
        for key, content, label in rows:
            writer.write({"__key__": f"some/where/{key}", "cls": label, "png": content})
    return folder / "a.tar", Reading()


def parquet_folder(rows, folder: Path) -> tuple[Path, Reading]:
    return write_parquet(rows, folder / "parquet"), Reading()


def parquet_pattern(rows, folder: Path) -> tuple[Path, Reading]:
    write_parquet(rows, folder / "parquet")
    return folder / "parquet" / "data" / "train-*.parquet", Reading(image_column="photo", label_column="kind")


def bare_parquet(rows, folder: Path) -> tuple[Path, Reading]:
    """Without what `datasets` would add; one large row group."""
    keys, contents, labels = zip(*rows, strict=True)
    pq.write_table(
        pa.table({"key": keys, "jpg": contents, "label": [CLASSES[i] for i in labels]}), folder / "a.parquet"
    )
    return folder / "a.parquet", Reading()


def saved(rows, folder: Path) -> tuple[Path, Reading]:
    as_dataset(rows).save_to_disk(folder / "saved")
    return folder / "saved", Reading()


def saved_splits(rows, folder: Path) -> tuple[Path, Reading]:
    splits = datasets.DatasetDict({"train": as_dataset(rows), "held-out": as_dataset(rows[:2])})
    splits.save_to_disk(folder / "saved")
    return folder / "saved", Reading()


def hub(rows, folder: Path) -> tuple[Path, Reading]:
    """`datasets` takes a folder OWNER/NAME for the data set of that name."""
    write_parquet(rows, folder / "owner" / "name")
    return Path("hf:owner/name"), Reading(split="train")


def streamed_hub(rows, folder: Path) -> tuple[Path, Reading]:
    write_parquet(rows, folder / "owner" / "name")
    return Path("hf:owner/name"), Reading(streaming=True, count=24)


def streamed_parquet(rows, folder: Path) -> tuple[Path, Reading]:
    return parquet_pattern(rows, folder)[0], Reading(streaming=True, count=24)


def streamed_parquet_that_tells_its_count(rows, folder: Path) -> tuple[Path, Reading]:
    path = write_parquet(rows, folder / "parquet")
    as_train = {"name": "train", "num_bytes": 1, "num_examples": 24}
    features = as_dataset(rows).features._to_yaml_list()
    about = {"features": features, "splits": [as_train, {"name": "test", "num_bytes": 1, "num_examples": 3}]}
    (path / "README.md").write_text(f"---\n{json.dumps({'dataset_info': about})}\n---\n")
    return path, Reading(streaming=True)


def streamed_tars(rows, folder: Path) -> tuple[Path, Reading]:
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    tars = write_tars(rows, folder / "tars", cls=lambda label: label) / "shard-{00..02}.tar"
    return tars, Reading(streaming=True, count=24, class_names=folder / "classes.txt")


def streamed_tars_with_json(rows, folder: Path) -> tuple[Path, Reading]:
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    tars = write_tars(rows, folder / "tars", json=lambda label: {"label": CLASSES[label]})
    return tars, Reading(streaming=True, count=24, class_names=folder / "classes.txt")


WRAPPINGS = (
    *(tars_of_numbers, tars_of_names, tars_by_braces_and_json, tars_by_glob_and_another_ending, one_tar),
    *(parquet_folder, parquet_pattern, bare_parquet, saved, saved_splits, hub),
    *(streamed_hub, streamed_parquet, streamed_parquet_that_tells_its_count, streamed_tars, streamed_tars_with_json),
)


@pytest.mark.parametrize("wrap", WRAPPINGS)
def test_the_same_pictures_come_out_of_every_wrapping(
    wrap, rows, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = ImageFolder.open(tiny_images)
    path, reading = wrap(rows, tmp_path)

    images: ImageSource = copy.deepcopy(open_images(path, reading))  # As for another process.

    assert (len(images), images.path) == (24, path)
    assert list(images.labels) == list(folder.labels)
    numbers = wrap is tars_of_numbers or wrap is one_tar
    assert images.class_names == (("0", "1", "2") if numbers else folder.class_names)
    assert len(set(images.names)) == 24
    for index in (0, 13, 14, 23, 3):  # Backwards too.
        expected = folder.load(index, SIZE)
        assert isinstance(expected, torch.Tensor)
        assert torch.equal(torch.as_tensor(images.load(index, SIZE)), expected)
    assert images.fingerprint() == open_images(path, reading).fingerprint()


def test_nothing_local_is_copied(rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for wrap in (tars_of_numbers, parquet_folder, bare_parquet, saved):
        folder = tmp_path / wrap.__name__
        folder.mkdir()
        open_images(*wrap(rows, folder)).load(5, SIZE)
    assert not list((tmp_path / "cache").rglob("*.arrow"))


@pytest.mark.parametrize("wrap", [tars_of_numbers, parquet_folder, bare_parquet, saved])
def test_fingerprints_notice_another_label_and_another_image(wrap, rows, tmp_path: Path):
    def fingerprint(name: str, of) -> str:
        (tmp_path / name).mkdir()
        return open_images(*wrap(of, tmp_path / name)).fingerprint()

    file = io.BytesIO()
    Image.new("RGB", (50, 50), (9, 8, 7)).save(file, "png")
    key, content, label = rows[4]
    prints = {
        fingerprint("whole", rows),
        fingerprint("same", rows),
        fingerprint("relabelled", [*rows[:4], (key, content, 2), *rows[5:]]),
        fingerprint("replaced", [*rows[:4], (key, file.getvalue(), label), *rows[5:]]),
    }
    assert len(prints) == 3


def test_images_that_cannot_be_read_are_named_wherever_they_lie(rows, tmp_path: Path):
    broken = [*rows[:2], ("broken", b"no image", 2), ("empty", b"", 2), *rows[4:]]
    for wrap in (tars_of_numbers, parquet_folder, bare_parquet, saved, streamed_parquet):
        folder = tmp_path / wrap.__name__
        folder.mkdir()
        images = open_images(*wrap(broken, folder))
        for index in (2, 3):
            result = images.load(index, SIZE)
            assert isinstance(result, UnreadableImage)
            assert result.name == images.names[index]
            assert "0x" not in result.reason, "the reason has an address, which is another one each time"


def test_parquet_files_of_one_name_give_images_of_different_names(rows, tmp_path: Path):
    for folder, part in (("a", rows[:3]), ("b", rows[3:8])):
        (tmp_path / folder).mkdir()
        as_dataset(part).to_parquet(tmp_path / folder / "0.parquet")
    pattern = tmp_path / "[ab]" / "*.parquet"
    images = open_images(pattern)
    assert list(images.names) == [f"a/0.parquet/{i}" for i in range(3)] + [f"b/0.parquet/{i}" for i in range(5)]
    assert list(open_images(tmp_path).names) == list(images.names)

    before = images.fingerprint()
    (tmp_path / "b").rename(tmp_path / "c")
    assert open_images(tmp_path / "[ac]" / "*.parquet").fingerprint() != before
    (tmp_path / "c" / "0.parquet").rename(tmp_path / "c" / "1.parquet")
    names = list(open_images(tmp_path / "[ac]" / "*.parquet").names)
    assert names[2:4] == ["0.parquet/2", "1.parquet/0"], "as they were named before, where that tells them apart"


def test_a_parquet_file_that_a_pattern_means_twice_is_refused(rows, tmp_path: Path):
    as_dataset(rows[:3]).to_parquet(tmp_path / "0.parquet")
    with pytest.raises(UserError, match=r"means 0\.parquet twice"):
        open_images(tmp_path / "{*,0}.parquet")


def test_a_row_without_an_image_is_unreadable(rows, tmp_path: Path):
    pq.write_table(pa.table({"jpg": [rows[0][1], None], "label": [0, 1]}), tmp_path / "a.parquet")
    result = open_images(tmp_path / "a.parquet").load(1, SIZE)
    assert isinstance(result, UnreadableImage)
    assert result == UnreadableImage("a.parquet/1", "the row has no image")


def test_a_tar_file_cut_short(rows, tmp_path: Path):
    path, _ = one_tar(rows, tmp_path)
    content = path.read_bytes()
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    images = open_images(path)
    for end in (last.offset, last.offset + 100, last.offset_data + 5):  # Before and in a header, in an image.
        path.write_bytes(content[:end])
        with pytest.raises(UserError, match=r"a\.tar is not a whole tar file"):
            open_images(path)
    result = images.load(23, SIZE)  # Cut since it was opened.
    assert isinstance(result, UnreadableImage)
    assert "cut short" in result.reason


def write_csv(folder: Path, lines: list[str], name: str = "labels.csv") -> Reading:
    (folder / name).write_text("\n".join(lines))
    return Reading(labels=folder / name)


@pytest.fixture
def nested(rows, tmp_path: Path) -> Path:
    """Images in folders that are no classes: a/0.png, a/b/1.png, 2.png."""
    folder = tmp_path / "nested"
    (folder / "a" / "b").mkdir(parents=True)
    for name, (_, content, _) in zip(("a/0.png", "a/b/1.png", "2.png"), rows, strict=False):
        (folder / name).write_bytes(content)
    (folder / "a" / "b" / "back").symlink_to(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "text", "labels", "class_names"),
    [
        ("a.csv", "file,label\n2.png,ape\na/0.png,zebra\na/b/1.png,ape\n", [0, 1, 0], ("ape", "zebra")),
        ("a.csv", "id,label,file\n0,ape,2.png\n1,zebra,./a/0.png\n2,ape,a/b/1.png\n", [0, 1, 0], ("ape", "zebra")),
        ("a.csv", "\ufeff2.png,10\na/0.png,9\na/b/1.png,10", [1, 0, 1], ("9", "10")),
        ("a.CSV", 'image,class\n2.png,"a, b"\na/0.png,07\na/b/1.png,7\n', [2, 0, 1], ("07", "7", "a, b")),
        ("a.json", '{"2.png": "b", "a/0.png": "a", "a/b/1.png": "b"}', [1, 0, 1], ("a", "b")),
        ("dataset.json", '{"labels": [["2.png", 2], ["a/0.png", 0], ["a/b/1.png", 1]]}', [2, 0, 1], ("0", "1", "2")),
    ],
)
def test_tables_of_labels(nested: Path, tmp_path: Path, name: str, text: str, labels, class_names):
    (tmp_path / name).write_text(text)
    images = open_images(nested, Reading(labels=tmp_path / name))
    assert list(images.names) == ["2.png", "a/0.png", "a/b/1.png"]
    assert list(images.labels) == labels
    assert images.class_names == class_names
    assert images.fingerprint() != ImageFolder.unlabelled(nested).fingerprint()


def test_whatever_names_csv_can_hold_are_read_back(rows, tmp_path: Path):
    names = ["a\u2028b.png", "a\x85b.png", 'new\nline, "quoted".png', "plain.png"]
    (tmp_path / "images").mkdir()
    for name, (_, content, _) in zip(names, rows, strict=False):
        (tmp_path / "images" / name).write_bytes(content)
    table = tmp_path / "labels.csv"
    for ends in ("\r\n", "\n", "\r"):
        with table.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator=ends)
            writer.writerows([("file", "label"), *zip(names, "abca", strict=True)])
        images = open_images(tmp_path / "images", Reading(labels=table))
        labels = {name: images.class_names[label] for name, label in zip(images.names, images.labels, strict=True)}
        assert labels == dict(zip(names, "abca", strict=True))
    with table.open("a", newline="") as file:
        file.write("lonely.png\n")
    with pytest.raises(UserError, match=r"labels\.csv, line 7: it has 1 column"):
        open_images(tmp_path / "images", Reading(labels=table))


def test_a_table_labels_tar_shards_and_class_names_order_the_labels(rows, tmp_path: Path):
    tars = write_tars(rows, tmp_path / "tars")
    names = list(open_images(tars, Reading(no_labels=True)).names)
    assert names[10] == f"shard-01.tar/{rows[10][0]}.png"
    reading = write_csv(tmp_path, [f"{name},{label}" for name, (*_, label) in zip(names, rows, strict=True)])
    (tmp_path / "classes.txt").write_text("round\nangular\nstriped\nspare\n")
    images = open_images(tars, Reading(labels=reading.labels, class_names=tmp_path / "classes.txt"))
    assert list(images.labels) == [label for *_, label in rows]
    assert images.class_names == ("round", "angular", "striped", "spare")


def test_a_table_may_name_images_of_tar_shards_as_they_are_called_there(rows, tmp_path: Path):
    files = ["im0.PNG", "folder.of/Im1.Png", "im2.png"]
    with tarfile.open(tmp_path / "u.tar", "w") as archive:
        for file, (_, content, _) in zip(files, rows, strict=False):
            member = tarfile.TarInfo(file)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    names = ["u.tar/im0.png", "u.tar/folder.of/Im1.png", "u.tar/im2.png"]
    for spelled in ([f"u.tar/{file}" for file in files], names):
        reading = write_csv(tmp_path, [f"{name},{label}" for name, label in zip(spelled, "aba", strict=True)])
        images = open_images(tmp_path / "u.tar", reading)
        assert list(images.names) == names
        assert list(images.labels) == [0, 1, 0]
    with pytest.raises(UserError, match=r"has u\.tar/im0\.png twice"):
        open_images(tmp_path / "u.tar", write_csv(tmp_path, ["u.tar/im0.PNG,a", "u.tar/im0.png,b"]))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "file,label\n2.png,ape\na/0.png,ape\n", r"has no label for a/b/1\.png"),
        (
            "a.csv",
            "2.png,ape\na/0.png,ape\na/b/1.png,ape\n9.png,ape\n8.png,ape\n",
            r"label for 8\.png and 1 more, which",
        ),
        ("a.csv", "2.png,ape\n2.png,zebra\n", r"has 2\.png twice"),
        ("a.csv", "2.png,ape\na/0.png\n", r"a\.csv, line 2"),
        ("a.csv", "2.png,\n", r"'2\.png' has label ''"),
        ("a.csv", "", "labels no image"),
        ("a.csv", "file,label\n", "labels no image"),
        ("a.txt", "2.png,ape", r"a \.csv or a \.json"),
        ("a.json", '{"2.png": "a", "2.png": "b"}', r"has 2\.png twice"),
        ("a.json", '{"2.png": null}', "label None"),
        ("a.json", '{"2.png": 1.5}', r"label 1\.5"),
        ("a.json", '{"labels": null}', "labels no images"),
        ("a.json", "[3", "is not JSON"),
        ("a.json", "[" * 100_000, "is not JSON"),
        ("a.json", "3", "labels no images"),
    ],
)
def test_tables_that_do_not_fit_are_refused(nested: Path, tmp_path: Path, name: str, text: str, says: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        open_images(nested, Reading(labels=tmp_path / name))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_no_labels_takes_every_image_once(nested: Path, tiny_images: Path):
    images = open_images(nested, Reading(no_labels=True))
    assert (list(images.names), images.class_names) == (["2.png", "a/0.png", "a/b/1.png"], ())
    assert open_images(tiny_images, Reading(no_labels=True)).names == ImageFolder.open(tiny_images).names


def test_what_cannot_be_told_is_asked_for_by_its_option(rows, tmp_path: Path):
    unlabelled = write_tars(rows, tmp_path / "unlabelled")
    two = write_tars(rows, tmp_path / "two", **{"mask.png": lambda _: rows[0][1]}, cls=lambda label: label)
    gap = write_tars(rows, tmp_path / "names")
    (gap / "train-0.tar").write_bytes((gap / "shard-00.tar").read_bytes())
    dataset = as_dataset(rows[:3])
    dataset.add_column("other", [1, 2, 3]).rename_column("kind", "x").remove_columns("x").to_parquet(
        tmp_path / "no.parquet"
    )
    both = datasets.concatenate_datasets(
        [dataset, dataset.select_columns("photo").rename_column("photo", "too")], axis=1
    )
    both.to_parquet(tmp_path / "twice.parquet")
    as_dataset(rows[:3], None).to_parquet(tmp_path / "numbers.parquet")
    dataset.remove_columns("photo").to_parquet(tmp_path / "blind.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "no.parquet").read_bytes()[:-20])
    (tmp_path / "squeezed.tar").write_bytes(b"\x1f\x8b\x08\x00no tar file")
    (tmp_path / "photo.png").write_bytes(rows[0][1])
    parquet = write_parquet(rows, tmp_path / "parquet")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for name in ("photo.png", "no.parquet"):
        (mixed / name).write_bytes((tmp_path / name).read_bytes())
    cases: list[tuple[Path, Reading, str]] = [
        (tmp_path / "nowhere", Reading(), "nowhere: no such folder or file"),
        (tmp_path / "shard-{0..3.tar", Reading(), "no such folder or file|is not a pattern"),
        (unlabelled / "shard-{00..09}.tar", Reading(no_labels=True), r"shard-03\.tar: no such"),
        (tmp_path / "photo.png", Reading(), "neither a folder nor"),
        (unlabelled, Reading(), r"has no label.*label_column"),
        (two, Reading(), r"images png, mask\.png|images mask\.png, png"),
        (gap, Reading(no_labels=True), r"passes over shard-00\.tar"),
        (mixed, Reading(), r"photo\.png\) beside no\.parquet"),
        (tmp_path / "squeezed.tar", Reading(), "not a whole tar file"),
        (tmp_path / "cut.parquet", Reading(), r"cut\.parquet is not a whole parquet file"),
        (tmp_path / "no.parquet", Reading(), r"no columns of labels \(it has photo, other\)"),
        (tmp_path / "twice.parquet", Reading(), "2 columns of images"),
        (tmp_path / "blind.parquet", Reading(), "no columns of images"),
        (tmp_path / "twice.parquet", Reading(image_column="foto"), "no column foto"),
        (tmp_path / "twice.parquet", Reading(image_column="kind"), "column kind .* holds no image files"),
        (tmp_path / "twice.parquet", Reading(label_column="sort"), "no column sort"),
        (tmp_path / "no.parquet", Reading(split="train"), "split and configuration are for data sets"),
        (tmp_path / "no.parquet", Reading(labels=tmp_path / "a.csv"), "^labels is for folders and tar shards"),
        (parquet, Reading(split="dev"), r"no split dev \(it has train, test\)"),
        (
            tmp_path / "numbers.parquet",
            Reading(streaming=True, count=3, label_column="kind"),
            "class_names, or use no_labels$",
        ),
        (tmp_path / "no.parquet", Reading(streaming=True, no_labels=True), "with count$"),
        (Path("hf:no-one/nothing"), Reading(), "cannot load hf:no-one/nothing"),
    ]
    for path, reading, says in cases:
        with pytest.raises(UserError, match=says) as caught:
            open_images(path, reading)
        assert "\n" not in str(caught.value)
    assert len(open_images(two, Reading(image_column=".mask.png"))) == 24
    assert list(open_images(tmp_path / "no.parquet", Reading(label_column="other")).labels) == [0, 1, 2]


def test_labels_outside_the_classes_are_refused(rows, tmp_path: Path):
    tars = write_tars(rows, tmp_path / "tars", cls=lambda label: label)
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match=r"label 2, but .* has 2 classes"):
        open_images(tars, Reading(class_names=tmp_path / "classes.txt"))
    as_dataset([(key, content, -1) for key, content, _ in rows[:3]]).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(UserError, match=r"test\.parquet/0 has no label \(-1\); remove it"):
        open_images(tmp_path / "test.parquet")
    assert open_images(tmp_path / "test.parquet", Reading(no_labels=True)).class_names == ()


@pytest.mark.parametrize("names", [False, True])
def test_negative_numbers_are_no_labels(names: bool, rows, nested: Path, tmp_path: Path):
    class_names = tmp_path / "classes.txt" if names else None
    (tmp_path / "classes.txt").write_text("one\ntwo\nthree\n")
    tars = write_tars(rows, tmp_path / "tars", cls=lambda label: label or -1)
    (tmp_path / "a.csv").write_text("2.png,-1\na/0.png,0\na/b/1.png,1\n")
    (tmp_path / "a.json").write_text('{"2.png": 0, "a/0.png": -1, "a/b/1.png": 1}')
    unlabelled = [(key, content, label or -1) for key, content, label in rows]
    as_dataset(unlabelled, None).rename_column("kind", "label").to_parquet(tmp_path / "a.parquet")
    as_dataset(unlabelled, None).rename_column("kind", "label").save_to_disk(tmp_path / "saved")
    for path, table, image in (
        (tars, None, r"shard-00\.tar/circle-000\.png"),
        (nested, tmp_path / "a.csv", r"2\.png"),
        (nested, tmp_path / "a.json", r"a/0\.png"),
        (tmp_path / "a.parquet", None, r"a\.parquet/0"),
        (tmp_path / "saved", None, "row-0"),
    ):
        with pytest.raises(UserError, match=rf"{image} .*has no label \('?-1'?\); .*no_labels"):
            open_images(path, Reading(labels=table, class_names=class_names))


def test_a_blank_line_between_names_of_classes_is_refused(rows, tmp_path: Path):
    tars = write_tars(rows, tmp_path / "tars", cls=lambda label: label)
    file = tmp_path / "classes.txt"
    file.write_bytes("one\r\ntw\u2028o\r\n three\r\n \r\n\r\n".encode())
    assert open_images(tars, Reading(class_names=file)).class_names == ("one", "tw\u2028o", "three")
    for text, line in (("one\n\ntwo\nthree\n", 2), ("\none\ntwo\nthree", 1)):
        file.write_text(text)
        with pytest.raises(UserError, match=rf"classes\.txt, line {line} is blank"):
            open_images(tars, Reading(class_names=file))


def test_a_stream_shorter_than_its_count_says_so(rows, tmp_path: Path):
    path, _ = bare_parquet(rows, tmp_path)
    images = open_images(path, Reading(streaming=True, no_labels=True, count=30))
    with pytest.raises(UserError, match="ends before image 29 of count 30"):
        images.load(29, SIZE)


def test_subsets_are_drawn_per_class_and_nest(tiny_images: Path):
    whole = ImageFolder.open(tiny_images)

    def chosen(**of) -> set[str]:
        images = open_images(tiny_images, subset=Subset(**of))
        assert list(images.names) == sorted(images.names)
        assert [whole.class_names[label] for label in images.labels] == [name.split("/")[0] for name in images.names]
        assert torch.equal(
            torch.as_tensor(images.load(1, SIZE)), torch.as_tensor(whole.load(whole.names.index(images.names[1]), SIZE))
        )
        return set(images.names)

    assert len(chosen(share=0.25)) == 6
    assert len(chosen(share=0.01)) == 3
    assert len(chosen(per_class=3)) == 9
    assert len(chosen(per_class=99)) == 24
    assert len(chosen(share=0.5, per_class=3)) == 9
    assert chosen(share=0.25) < chosen(share=0.5)
    assert chosen(share=0.5) != chosen(share=0.5, seed=1)
    # The classes draw on their own: not the same numbers in each.
    numbers = [{name[-7:] for name in chosen(share=0.5) if name.startswith(of)} for of in whole.class_names]
    assert not numbers[0] == numbers[1] == numbers[2]


def test_mirror_images_follow_their_originals_and_are_decoded_once(tiny_images: Path, monkeypatch: pytest.MonkeyPatch):
    whole = ImageFolder.open(tiny_images)
    images = open_images(tiny_images, flips=True)
    decoded: list[int] = []
    load = ImageFolder.load

    def counted(self, index, resolution):
        decoded.append(index)
        return load(self, index, resolution)

    monkeypatch.setattr(ImageFolder, "load", counted)
    for index in range(len(whole)):
        one, other = (torch.as_tensor(images.load(2 * index + side, SIZE)) for side in (0, 1))
        assert torch.equal(one, torch.as_tensor(load(whole, index, SIZE)))
        np.testing.assert_array_equal(other.numpy(), one.numpy()[:, :, ::-1])
    assert decoded == list(range(24))
    assert list(images.names[:2] if isinstance(images.names, list) else [images.names[0], images.names[1]]) == [
        "circle/000.png",
        "circle/000.png#flipped",
    ]
    assert [images.labels[index] for index in range(48)] == [label for label in whole.labels for _ in range(2)]


@pytest.mark.parametrize("wrap", [tars_of_numbers, parquet_folder, saved])
@pytest.mark.parametrize("flips", [False, True])
def test_threads_may_share_a_source(flips: bool, wrap, rows, tmp_path: Path) -> None:
    path, reading = wrap(rows, tmp_path)
    images = open_images(path, reading, flips=flips)
    order = torch.randint(len(images), (400,), generator=torch.Generator().manual_seed(0)).tolist()
    alone = [torch.as_tensor(images.load(index, SIZE)) for index in order]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            together = list(threads.map(lambda index: images.load(index, SIZE), order))
    finally:
        sys.setswitchinterval(interval)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, torch.as_tensor(other))
