"""Tar files as people make them: each with its images and labels, or why it is refused; and damaged headers."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reglue.data.opening import open_images
from reglue.data.reading import Reading
from reglue.errors import UserError


def png(value: int) -> bytes:
    """An image of one grey value."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value,) * 3).save(file, "png")
    return file.getvalue()


def write(file: Path, members: Mapping[str, bytes | tuple[bytes, str]], kind: int = tarfile.GNU_FORMAT) -> Path:
    """A tar file of members: what they hold, or the kind of a link and where it leads."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=kind) as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                header.type, header.linkname = content
                archive.addfile(header)
            else:
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
    return file


def found(path: Path, **reading) -> dict[str, tuple[int, str]]:
    """What is opened: each image by its name, with its grey value and its class."""
    images = open_images(path, Reading(**reading))
    classes = images.class_names or ("",)
    pixels = [torch.as_tensor(images.load(index, (4, 4))) for index in range(len(images))]
    return {
        name: (int(image[0, 0, 0]), classes[label])
        for name, image, label in zip(images.names, pixels, images.labels, strict=True)
    }


SAMPLES = {"a.png": png(1), "a.cls": b"cat", "b.png": png(2), "b.cls": b"dog"}
SAME = {"a.png": (1, "cat"), "b.png": (2, "dog")}
FOLDERS = {"cat/1.png": png(1), "cat/2.png": png(2), "dog/1.png": png(3)}
IN_FOLDERS = {"cat/1.png": (1, "cat"), "cat/2.png": (2, "cat"), "dog/1.png": (3, "dog")}
SYMBOLIC, HARD = tarfile.SYMTYPE, tarfile.LNKTYPE

READ: dict[str, tuple[dict, dict]] = {
    "as WebDataset writes it": (SAMPLES, SAME),
    "labels as other programs end and begin them": (
        {**SAMPLES, "a.cls": b"\xef\xbb\xbfcat\r\n", "b.cls": b"dog\0\0"},
        SAME,
    ),
    "names that begin with ./": ({f"./{name}": content for name, content in SAMPLES.items()}, SAME),
    "names from the root": ({f"/{name}": content for name, content in SAMPLES.items()}, SAME),
    "labels after all images": (dict(sorted(SAMPLES.items(), key=lambda item: item[0][::-1], reverse=True)), SAME),
    "numbers written as floats": (
        {"a.png": png(1), "a.json": b'{"label": 11.0}', "b.png": png(2), "b.json": b'{"label": 9}'},
        {"a.png": (1, "11"), "b.png": (2, "9")},
    ),
    "what a Macintosh adds": ({"._a.png": b"x", "__MACOSX/._a.png": b"x", ".DS_Store": b"x", **SAMPLES}, SAME),
    "class folders": (FOLDERS, IN_FOLDERS),
    "class folders that begin with ./": ({f"./{name}": content for name, content in FOLDERS.items()}, IN_FOLDERS),
    "class folders in a folder": (
        {f"photos/{name}": content for name, content in FOLDERS.items()},
        {f"photos/{name}": value for name, value in IN_FOLDERS.items()},
    ),
    "class folders that are numbers": (
        {f"{number}/a.png": png(number) for number in (10, 9, 0)},
        {f"{number}/a.png": (number, str(number)) for number in (10, 9, 0)},
    ),
    "hard links": (
        {**SAMPLES, "c.png": (HARD, "a.png"), "c.cls": (HARD, "b.cls")},
        {**SAME, "c.png": (1, "dog")},
    ),
    "symbolic links": (
        {
            **{f"pool/{name}": content for name, content in SAMPLES.items()},
            **{"x/c.png": (SYMBOLIC, "../pool/a.png"), "x/c.cls": (SYMBOLIC, "./../x/d"), "x/d": (HARD, "pool/b.cls")},
        },
        {**{f"pool/{name}": value for name, value in SAME.items()}, "x/c.png": (1, "dog")},
    ),
    "links before what they lead to": (
        {"0/z.png": (SYMBOLIC, "../cat/1.png"), **FOLDERS},
        {"0/z.png": (1, "0"), **IN_FOLDERS},
    ),
    "links from the root": (
        {"cat/1.png": png(1), "dog/2.png": (SYMBOLIC, "/cat/1.png"), "dog/3.png": (HARD, "/cat/1.png")},
        {"cat/1.png": (1, "cat"), "dog/2.png": (1, "dog"), "dog/3.png": (1, "dog")},
    ),
    "class folders with points in names": (
        {"cat/a.1.png": png(1), "cat/a.2.png": png(2), "dog/a.1.png": png(3), "dog/b.png": png(4), "dog/b.jpg": png(5)},
        {
            **{"cat/a.1.png": (1, "cat"), "cat/a.2.png": (2, "cat"), "dog/a.1.png": (3, "dog")},
            **{"dog/b.png": (4, "dog"), "dog/b.jpg": (5, "dog")},
        },
    ),
    "all in a hidden folder": (
        {f"home/me/.cache/x/{name}": content for name, content in {**FOLDERS, "cat/.thumbs/1.png": b"x"}.items()},
        {f"home/me/.cache/x/{name}": value for name, value in IN_FOLDERS.items()},
    ),
    "long names": ({f"{'x' * 150}/{name}": content for name, content in FOLDERS.items()}, {}),
}


@pytest.mark.parametrize(("members", "expected"), READ.values(), ids=READ)
@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_images_and_labels_are_found(tmp_path: Path, members: dict, expected: dict, kind: int):
    if not expected:
        expected = {f"{'x' * 150}/{name}": value for name, value in IN_FOLDERS.items()}
    images = found(write(tmp_path / "a.tar", members, kind))
    assert images == {f"a.tar/{name}": value for name, value in expected.items()}


def test_tar_files_joined_by_cat(tmp_path: Path):
    parts = [write(tmp_path / f"{i}.tar", {f"{name}/{i}.png": png(i) for name in ("cat", "dog")}) for i in range(3)]
    joined = tmp_path / "joined.tar"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert found(joined) == {f"joined.tar/{of}/{i}.png": (i, of) for i in range(3) for of in ("cat", "dog")}
    joined.write_bytes(parts[0].read_bytes() + parts[0].read_bytes())
    with pytest.raises(UserError, match=r"joined\.tar has two images cat/0\.png"):
        found(joined)
    for cut in (100, 512, 700):
        joined.write_bytes(parts[0].read_bytes() + parts[1].read_bytes()[:cut])
        with pytest.raises(UserError, match="not a whole tar file"):
            found(joined)


def test_shards_of_one_name_in_two_folders(tmp_path: Path):
    for of in ("a", "b"):
        write(tmp_path / of / "0.tar", {f"{label}/1.png": png(ord(of)) for label in ("cat", "dog")})
    expected = {f"{of}/0.tar/{label}/1.png": (ord(of), label) for of in ("a", "b") for label in ("cat", "dog")}
    assert found(tmp_path) == expected
    assert found(tmp_path / "{a,b}" / "0.tar") == found(tmp_path / "*" / "*.tar") == expected


@pytest.mark.parametrize("within", ["", "00"])
def test_what_img2dataset_writes(tmp_path: Path, within: str):
    for shard in range(3):
        about = json.dumps({"key": str(shard), "label": "cat" if shard else "dog", "caption": "x"}).encode()
        write(tmp_path / within / f"{shard:05d}.tar", {"0.jpg": png(shard), "0.json": about, "0.txt": b"x"})
        pq.write_table(pa.table({"url": ["x"], "key": [str(shard)]}), tmp_path / within / f"{shard:05d}.parquet")
        (tmp_path / within / f"{shard:05d}_stats.json").write_text("{}")
    images = open_images(tmp_path)
    assert [images.class_names[label] for label in images.labels] == ["dog", "cat", "cat"]
    assert images.notes == ("passed over: 3 .txt",)
    assert len(open_images(tmp_path, Reading(streaming=True, count=3, no_labels=True))) == 3


MANY = {f"{key}.png": png(1) for key in "abc"}
REFUSED: dict[str, tuple[dict, str]] = {
    "no labels": (MANY, r"a\.png has no label: no file \.cls and no key label in a \.json .* folder for each class"),
    "some labels": ({**SAMPLES, "c.png": png(3)}, r"c\.png has no label"),
    "links out of it": (
        {**SAMPLES, "c.png": (SYMBOLIC, "/data/c.png")},
        r"c\.png is a link to data/c\.png, which",
    ),
    "links in a circle": ({"a.png": (SYMBOLIC, "b.png"), "b.png": (HARD, "a.png")}, "is a link to"),
    "formats that nobody reads": (
        {"a.xyz": b"x", "b.xyz": b"x", "c": b"x"},
        r"passed over: 2 \.xyz, 1 without an",
    ),
    "two images of a sample": (
        {"IMG.1.jpg": png(1), "IMG.2.jpg": png(2)},
        r"images 1\.jpg, 2\.jpg .*to the first dot",
    ),
    "two images of a sample in a folder": (
        {"x/1.left.png": png(1), "x/1.right.png": png(2), "x/1.cls": b"cat"},
        r"images left\.png, right\.png .*to the first dot",
    ),
    "images beside class folders": ({**FOLDERS, "top.png": png(4)}, r"top\.png has no label"),
    "a label that is no text": ({**SAMPLES, "b.cls": b"\xff\xfe\xfa"}, r"\.cls beside .*b\.png is not text in UTF-8"),
    "a label that is no JSON": ({"a.png": png(1), "a.json": b"[" * 10**5}, r"\.json beside .*a\.png is not JSON"),
    "a label that is a list": ({"a.png": png(1), "a.json": b'{"label": [[1]]}'}, "neither a name nor a whole number"),
}


@pytest.mark.parametrize(("members", "says"), REFUSED.values(), ids=REFUSED)
def test_the_true_reason_is_named(tmp_path: Path, members: dict, says: str):
    with pytest.raises(UserError, match=says) as caught:
        found(write(tmp_path / "a.tar", members))
    assert "\n" not in str(caught.value)
    assert "a.tar" in str(caught.value)


def test_levels_of_folders(tmp_path: Path):
    deep = {f"{name}.png": png(i) for i, name in enumerate(("x/a/1", "x/b/1", "y/a/1"))}
    file = write(tmp_path / "a.tar", deep)
    assert [label for _, label in found(file).values()] == ["x", "x", "y"]
    assert "class_level 2 takes the second (such as x/a)" in open_images(file).notes[0]
    assert [label for _, label in found(file, class_level=2).values()] == ["x/a", "x/b", "y/a"]


@pytest.mark.parametrize("program", ["gzip", "bzip2", "xz"])
def test_compressed_tar_files_are_called_so(tmp_path: Path, program: str):
    whole = write(tmp_path / "whole.tar", SAMPLES)
    with whole.open("rb") as source, (tmp_path / "a.tar").open("wb") as target:
        subprocess.run([program, "-c"], stdin=source, stdout=target, check=True)
    with pytest.raises(UserError, match=f"it is compressed by {program}"):
        found(tmp_path / "a.tar")


def test_files_with_holes(tmp_path: Path):
    (tmp_path / "cat").mkdir()
    with (tmp_path / "cat" / "1.bmp").open("wb") as file:
        file.write(b"BM")
        file.truncate(2**20)
    for kind in ("gnu", "posix"):
        made = ["tar", "--sparse", f"--format={kind}", "-cf", str(tmp_path / "a.tar"), "-C", str(tmp_path), "cat"]
        subprocess.run(made, check=True)
        with pytest.raises(UserError, match=r"a\.tar keeps cat/1\.bmp with holes"):
            found(tmp_path / "a.tar")


def checked(header: bytearray) -> bytes:
    """A header with the sum that it should have."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def negative(header: bytearray) -> None:
    header[124:136] = b"\xff" * 8 + (-512).to_bytes(4, "big", signed=True)


def huge(header: bytearray) -> None:
    header[124:136] = b"\x80" + (10**19).to_bytes(11, "big")


def sparse(header: bytearray) -> None:
    header[156:157] = b"S"
    header[386:482] = b"9" * 96
    header[482] = 1


def a_long_name(header: bytearray) -> None:
    header[156:157] = b"L"


@pytest.mark.parametrize("damage", [negative, huge, sparse, a_long_name])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_headers_with_valid_sums_and_mad_values(tmp_path: Path, damage: Callable[[bytearray], None], which: int):
    file = write(tmp_path / "a.tar", FOLDERS)
    content = bytearray(file.read_bytes())
    with tarfile.open(file) as archive:
        at = archive.getmembers()[which].offset
    header = content[at : at + 512]
    damage(header)
    content[at : at + 512] = checked(header)
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.tar (is not a whole tar file|keeps|holds no images)|no label"):
        assert found(file) == {}, "one is lost in silence"


@settings(max_examples=150)
@given(data=st.data())
def test_a_damaged_header_is_never_passed_over_in_silence(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    file = write(tmp_path_factory.getbasetemp() / "wild.tar", SAMPLES)
    content = np.frombuffer(file.read_bytes(), np.uint8).copy()
    with tarfile.open(file) as archive:
        at = data.draw(st.sampled_from([member.offset for member in archive]))
    valid = data.draw(st.booleans())
    for _ in range(data.draw(st.integers(1, 3))):
        content[at + data.draw(st.integers(100, 511))] = data.draw(st.integers(0, 255))
    header = bytearray(content[at : at + 512].tobytes())
    if valid:
        content[at : at + 512] = np.frombuffer(checked(header), np.uint8)
    file.write_bytes(content.tobytes())
    try:
        images = open_images(file)
        [images.load(index, (4, 4)) for index in range(len(images))]
    except UserError as error:
        assert str(error).isprintable()  # noqa: PT017
        return
    assert valid or tarfile.TarInfo.frombuf(bytes(header), "utf-8", "strict"), "the sum does not fit"


def test_a_shard_is_gone_since(tmp_path: Path):
    images = open_images(write(tmp_path / "a.tar", SAMPLES))
    os.truncate(tmp_path / "a.tar", 600)
    assert "cut short" in str(images.load(1, (4, 4)))
