"""Tables of labels as people and programs write them: each with the labels that it gives, or why it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reglue.data.labels import in_class_order, index_labels, whole_number
from reglue.data.opening import open_images
from reglue.data.reading import Reading
from reglue.errors import UserError

NAMES = ("0001.png", "0002.png", "deep/0003.png")
APES = ["ape", "zebra", "ape"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled") / "photos"
    (folder / "deep").mkdir(parents=True)
    for name in NAMES:
        Image.new("RGB", (4, 4)).save(folder / name)
    return folder


def labels_by(photos: Path, name: str, text: str | bytes, **reading) -> list[str]:
    """The class of each image, by a table beside the folder of the images."""
    table = photos.parent / name
    table.write_bytes(text if isinstance(text, bytes) else text.encode())
    images = open_images(photos, Reading(labels=table, **reading))
    assert tuple(images.names) == NAMES
    return [images.class_names[label] for label in images.labels]


def lines(heading: str, *rows: str) -> str:
    return "\n".join([heading, *rows]) + "\n"


READ = {
    "sizes before the label": lines(
        "file_name,width,height,label",
        *("0001.png,640,480,ape", "0002.png,640,480,zebra", "deep/0003.png,9,9,ape"),
    ),
    "the label first": lines("label,width,path", "ape,1,0001.png", "zebra,2,0002.png", "ape,3,deep/0003.png"),
    "class": lines("image,split,class", "0001.png,train,ape", "0002.png,val,zebra", "deep/0003.png,train,ape"),
    "category": lines("filename,category,n", "0001.png,ape,1", "0002.png,zebra,2", "deep/0003.png,ape,3"),
    "capitals and blanks": lines(
        "Image Name,Width,Class Name", "0001.png,1,ape", "0002.png,1,zebra", "deep/0003.png,1,ape"
    ),
    "ids": lines("id,label", "0001,ape", "0002,zebra", "0003,ape"),
    "ids, and a label by another name": lines("id,breed", "0001,ape", "0002,zebra", "deep/0003,ape"),
    "the same the other way round": lines("breed,id", "ape,0001", "zebra,0002", "ape,0003"),
    "no heading": lines("0001.png,ape", "0002.png,zebra", "deep/0003.png,ape"),
    "no heading, no endings": lines("0001,ape", "0002,zebra", "0003,ape"),
    "no heading, the label first": lines("ape,0001.png", "zebra,0002.png", "ape,deep/0003.png"),
    "a number for each row": lines(",file_name,label", "0,0001.png,ape", "1,0002.png,zebra", "2,deep/0003.png,ape"),
    "numbers that are no names": lines("id,path,label", "7,0001.png,ape", "8,0002.png,zebra", "9,deep/0003.png,ape"),
    "paths from the table": lines(
        "path,label", "photos/0001.png,ape", "./photos/0002.png,zebra", "photos/deep/0003.png,ape"
    ),
    "paths of another system": lines("path,label", ".\\0001.png,ape", "0002.png,zebra", "deep\\0003.png,ape"),
    "semicolons": lines("file_name;width;label", "0001.png;1;ape", "0002.png;1;zebra", "deep/0003.png;1;ape"),
    "semicolons without a heading": lines("0001.png;ape", "0002.png;zebra", "deep/0003.png;ape"),
    "tabs": lines("file_name\twidth\tlabel", "0001.png\t1\tape", "0002.png\t1\tzebra", "deep/0003.png\t1\tape"),
    "quoted commas": lines('"file_name","note","label"', '0001.png,"a, b",ape', "0002.png,,zebra", "0003.png,x,ape"),
    "blank lines and columns": lines(
        "file_name,label,,", "0001.png, ape ,,", "", ",,,", "0002.png,zebra,,", "0003,ape,,"
    ),
}


@pytest.mark.parametrize("text", READ.values(), ids=READ)
@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_the_columns_that_are_called_so_wherever_they_stand(photos: Path, text: str, ending: str):
    assert labels_by(photos, f"table{ending}", text) == APES


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_what_spreadsheets_save(photos: Path, encoding: str):
    text = lines("file_name\tlabel", "0001.png\tÄffchen", "0002.png\tzebra", "0003\tÄffchen")
    content = text.encode(encoding)
    content = b"\xff\xfe" + content if encoding == "utf-16-le" else content
    assert labels_by(photos, "table.csv", content) == ["Äffchen", "zebra", "Äffchen"]


OBJECTS = '{"file_name": "0001.png", "width": 5, "label": "ape"}\n{"file_name": "0002.png", "label": "zebra"}\n'
OBJECTS += '{"label": "ape", "file_name": "deep/0003.png"}\n'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.jsonl", OBJECTS),
        ("metadata.json", f"[{','.join(OBJECTS.splitlines())}]"),
        (
            "ids.json",
            '[{"id": "0001", "class": "ape"}, {"id": "0002", "class": "zebra"}, {"id": "0003", "class": "ape"}]',
        ),
        (
            "marks.jsonl",
            '{"file": "0001", "label": "ape", "note": "x\u2028y\u0085z"}\r\n{"file": "0002", "label": "zebra"}\r\n'
            '{"file": "0003", "label": "ape"}',
        ),
        ("map.json", '{"0001": "ape", "0002.png": "zebra", "0003": "ape"}'),
        ("pairs.json", '{"labels": [["0001.png", "ape"], ["0002.png", "zebra"], ["deep/0003.png", "ape"]]}'),
    ],
)
def test_tables_in_json(photos: Path, name: str, text: str):
    assert labels_by(photos, name, text) == APES


@pytest.mark.parametrize("written", [("11.0", "9", "11"), ("11", "9.0", "11"), ("11.00", "9", "11.0")])
def test_numbers_are_numbers(photos: Path, written: tuple[str, str, str]):
    rows = [f"{name},{label}" for name, label in zip(NAMES, written, strict=True)]
    assert labels_by(photos, "table.csv", lines("file_name,label", *rows)) == ["11", "9", "11"]
    pairs = ", ".join(f'"{name}": {label}' for name, label in zip(NAMES, written, strict=True))
    assert labels_by(photos, "table.json", f"{{{pairs}}}") == ["11", "9", "11"]


def test_columns_may_be_named(photos: Path):
    text = lines("photo,label,breed", "0001,1,ape", "0002,2,zebra", "0003,3,ape")
    assert labels_by(photos, "table.csv", text, image_column="photo", label_column="breed") == APES
    assert labels_by(photos, "table.csv", lines("photo;breed", "0001;ape", "0002;zebra", "0003;ape")) == APES


REFUSED = {
    "no known label": (lines("file_name,width,breed", "0001.png,5,ape"), r"labels \(it has file_name, width, breed\)"),
    "no known name": (lines("photo,width,label", "0001.png,5,ape"), r"names of images \(it has photo, width, label\)"),
    "two of one name": (lines("file_name,label,label", "0001.png,ape,5"), r"two columns label \(it has file_name, "),
    "no heading": (lines("0001.png,5,ape", "0002.png,5,ape"), r"3 columns without names .*file_name and label"),
    "a label that is missing": (
        lines("file_name,label", "0001.png,ape", "0002.png,", "0003,ape"),
        "'0002.png' has label",
    ),
    "a negative label": (lines("file_name,label", "0001.png,1", "0002.png,-1.0", "0003,2"), "has no label"),
    "a row too short": (lines("file_name,w,label", "0001.png,5,ape", "0002.png,5"), "line 3: it has 2 column"),
    "the same image twice": (lines("id,label", "0001,ape", "0001.png,zebra"), "has 0001.png twice"),
    "Latin-1": ("file_name,label\n0001.png,Äffchen\n".encode("latin-1"), "not text in UTF-8"),
    **{
        f"the column {column} is no label": (
            lines(f"file_name,{column}", "0001.png,5", "0002.png,6", "0003,5"),
            rf"no column that is known to hold labels \(it has file_name, {column}\); name it with label_column",
        )
        for column in ("width", "Height", "file size", "split", "URL", "caption", "SHA256")
    },
    **{
        f"{word} among numbers": (
            lines("file_name,label", "0001.png,1", f"0002.png,{word}", "0003,2"),
            rf"0002\.png of .* has no label \('{word}'\)",
        )
        for word in ("nan", "NaN", "NA", "N/A", "null", "None")
    },
    "a zero in a label": (
        lines("file_name,label", "0001.png,a\0b", "0002.png,b", "0003,b"),
        r"'a\\x00b', which no file",
    ),
    "an archive": (b"PK\x03\x04\x14\0\x06\0", "not text in UTF-8|names no|is not CSV|no column|labels no image"),
}


@pytest.mark.parametrize(("text", "says"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_told_is_refused_with_its_columns(photos: Path, text: str | bytes, says: str):
    with pytest.raises(UserError, match=says) as caught:
        labels_by(photos, "table.csv", text)
    assert "\n" not in str(caught.value)
    assert "table.csv" in str(caught.value)


@pytest.mark.parametrize("character", ["\0", "\ud800"])
def test_labels_that_no_file_can_hold_are_refused(photos: Path, character: str):
    text = json.dumps({"0001": f"a{character}", "0002": "b", "0003": "b"})
    with pytest.raises(UserError, match=r"labels\.json has a class called 'a\\.*', which no file can hold"):
        labels_by(photos, "labels.json", text)
    with pytest.raises(UserError, match="which no file can hold"):
        index_labels([0], str, (f"a{character}",), "x")


def test_missing_numbers_are_names_among_names(photos: Path):
    assert labels_by(photos, "table.csv", lines("file_name,label", "0001,NA", "0002,SE", "0003,NA")) == [
        "NA",
        "SE",
        "NA",
    ]


def test_a_name_that_may_be_two_images_is_refused(photos: Path, tmp_path: Path):
    for name in ("a/1.png", "b/1.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "photos" / name)
    (tmp_path / "table.csv").write_text(lines("id,label", "1,ape"))
    with pytest.raises(UserError, match=r"has 1, which may be a/1\.png or b/1\.png; write out its path"):
        open_images(tmp_path / "photos", Reading(labels=tmp_path / "table.csv"))


@pytest.mark.parametrize("depth", [50, 400, 900, 5000, 100_000])
@pytest.mark.parametrize("text", ['{{"0001.png": {}}}', "{}", '[{{"file_name": {}, "label": 1}}]'])
def test_json_nested_too_deep_is_one_line(photos: Path, depth: int, text: str):
    with pytest.raises(UserError) as caught:
        labels_by(photos, "table.json", text.format("[" * depth + "]" * depth))
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


@settings(max_examples=100)
@given(ending=st.sampled_from([".csv", ".tsv", ".json", ".jsonl"]), data=st.data())
def test_whatever_a_table_holds_it_is_read_or_refused(photos: Path, ending: str, data: st.DataObject):
    cells = st.sampled_from(
        ["0001.png", "0002", "label", "file_name", "id", "", "-1", "11.0", "NaN", '"', "\0", "\ud800x"[1:], "[" * 20]
    )
    marks = st.sampled_from([",", ";", "\t", "\n", "{", "}", ":", '"', "[", "]"])
    text = "".join(data.draw(st.lists(cells | marks, max_size=30)))
    encoding = data.draw(st.sampled_from(["utf-8", "utf-16", "utf-32"]))
    try:
        labels_by(photos, f"wild{ending}", text.encode(encoding))
    except UserError as error:
        assert f"wild{ending}" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("names", "order"),
    [
        ([str(i) for i in range(12)], [str(i) for i in range(12)]),
        (["10", "9", "007"], ["007", "9", "10"]),
        (["10", "9", "a"], ["10", "9", "a"]),
        (["2/10", "2/9", "10/1"], ["2/9", "2/10", "10/1"]),
        (["-1", "1"], ["-1", "1"]),
    ],
)
def test_classes_that_are_numbers_are_in_the_order_of_numbers(names: list[str], order: list[str]):
    assert list(in_class_order(names)) == order


@given(st.lists(st.integers(0, 10**20) | st.floats(0, 1e6).map(float.__floor__).map(float), min_size=1))
def test_whole_numbers_in_any_spelling_are_one_class(numbers: list[float]):
    indices, names = index_labels(numbers, str, None, "x")
    assert [int(names[index]) for index in indices] == [int(number) for number in numbers]
    assert [int(name) for name in names] == sorted({int(number) for number in numbers})


@given(st.text() | st.integers() | st.floats() | st.booleans() | st.none())
def test_whole_numbers_are_found_in_what_prints_one(label: object):
    number = whole_number(label)
    assert number is None or float(str(label)) == float(number)
