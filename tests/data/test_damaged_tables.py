"""Parquet files and saved data sets with damage in their data or in what they say of themselves: one line each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sources import as_dataset
from test_tars import png

from reglue.data.images import UnreadableImage
from reglue.data.opening import open_images
from reglue.data.reading import Reading
from reglue.errors import UserError

ROWS = [(str(i), png(i), i % 2) for i in range(6)]


def labelled(names: object) -> str:
    """What `datasets` writes into a parquet file of an image and a label with these names."""
    features = {"photo": {"_type": "Image"}, "kind": {"names": names, "_type": "ClassLabel"}}
    return json.dumps({"info": {"features": features}})


DEEP = "[" * 5000 + "]" * 5000
METADATA = {
    "labels of one name": labelled(["cat", "cat"]),
    "labels that are numbers": labelled(3),
    "labels that are nothing": labelled(None),
    "labels that are lists": labelled([["cat"], ["dog"]]),
    "a kind that is unknown": labelled(["cat", "dog"]).replace("ClassLabel", "Klasse"),
    "a kind that is a number": labelled(["cat", "dog"]).replace('"ClassLabel"', "3"),
    "too deep": f'{{"info": {{"features": {DEEP}}}}}',
    "deep features": '{"info": {"features": {"photo": ' + '{"feature": ' * 3000 + "1" + "}" * 3000 + "}}}",
    "no JSON": "{",
    "a list": "[]",
    "a number": "3",
    "features that are a list": '{"info": {"features": []}}',
    "no features": '{"info": {}}',
    "an info that is text": '{"info": "x"}',
    "other columns": labelled(["cat", "dog"]).replace("photo", "foto"),
    "no text": "\udcff",
}


@pytest.mark.parametrize("text", METADATA.values(), ids=METADATA)
def test_metadata_that_cannot_be_believed(tmp_path: Path, text: str):
    as_dataset(ROWS, ("cat", "dog")).to_parquet(tmp_path / "a.parquet")
    table = pq.read_table(tmp_path / "a.parquet")
    content = text.encode(errors="surrogateescape")
    pq.write_table(table.replace_schema_metadata({b"huggingface": content}), tmp_path / "a.parquet")
    refused_or_read(tmp_path / "a.parquet", Reading(image_column="photo", label_column="kind"))


@pytest.mark.parametrize(
    "columns",
    [
        lambda: pa.table([[b"x"], [b"x"], [1]], names=["jpg", "jpg", "label"]),
        lambda: pa.table([[b"x"], [1], [2]], names=["jpg", "label", "label"]),
        lambda: pa.table({"jpg": [b"x"], "label": [[1]]}),
        lambda: pa.table({"jpg": [b"x"], "label": [{"a": 1}]}),
        lambda: pa.table({"jpg": [b"x"], "label": [1.5]}),
        lambda: pa.table({"jpg": [b"x"], "label": [float("nan")]}),
        lambda: pa.table({"jpg": [b"x"], "json": ["{}"]}),
        lambda: pa.table({"jpg": [b"x"], "label": pa.array([b"\xff"], pa.binary())}),
        lambda: pa.table({"jpg": [b"x"], "label": pa.array([b"\xff"], pa.binary()).cast(pa.string(), safe=False)}),
    ],
)
def test_columns_that_cannot_be_labels(tmp_path: Path, columns: Callable[[], pa.Table]):
    try:
        pq.write_table(columns(), tmp_path / "a.parquet")
    except pa.ArrowException:
        pytest.skip("this pyarrow does not write such a table")
    with pytest.raises(UserError) as caught:
        open_images(tmp_path / "a.parquet")
    assert "\n" not in str(caught.value)


def test_labels_as_floats_are_numbers(tmp_path: Path):
    pq.write_table(pa.table({"jpg": [b"x"] * 3, "class": [11.0, 9.0, 11.0]}), tmp_path / "a.parquet")
    images = open_images(tmp_path / "a.parquet")
    assert (images.class_names, list(images.labels)) == (("9", "11"), [1, 0, 1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("whole") / "whole.parquet"
    as_dataset(ROWS, ("cat", "dog")).to_parquet(file, batch_size=2)
    return file


@settings(max_examples=150, derandomize=True)  # pyarrow may abort where it should raise
@given(data=st.data())
def test_flipped_bits_are_read_or_refused(whole: Path, data: st.DataObject):
    content = bytearray(whole.read_bytes())
    footer = int.from_bytes(content[-8:-4], "little") + 8
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(-footer, -1) | st.integers(0, len(content) - 1))
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    file = whole.with_name("flipped.parquet")
    file.write_bytes(content)
    refused_or_read(file, Reading())


@pytest.mark.parametrize("file", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: b"[" * 100_000,
        lambda content: b"3",
        lambda content: b"{}",
        lambda content: content.decode("latin-1").encode("utf-16"),
        lambda content: content.replace(b'"names"', b'"nanes"').replace(b"ARROW1", b"ARROW2"),
        lambda content: content.replace(b'"dog"', b'"cat"'),
    ],
)
def test_saved_data_sets(tmp_path: Path, file: str, damage: Callable[[bytes], bytes]):
    as_dataset(ROWS, ("cat", "dog")).save_to_disk(tmp_path / "saved")
    path = tmp_path / "saved" / file
    path.write_bytes(damage(path.read_bytes()))
    refused_or_read(tmp_path / "saved", Reading())


def refused_or_read(path: Path, reading: Reading) -> None:
    """Open images and read all: a UserError in one line, or images and reasons of one line."""
    try:
        images = open_images(path, reading)
        images.fingerprint()
        assert len(images) == len(images.names) == len(images.labels)
        assert len(images) < 10**6
        results = [images.load(index, (4, 4)) for index in range(len(images))]
    except UserError as error:
        said = str(error)
        assert said.isprintable() and len(said) < 600 and str(path) in said  # noqa: PT018
        return
    for result in results:
        assert not isinstance(result, UnreadableImage) or result.reason.isprintable()
        assert not isinstance(result, UnreadableImage) or "StopIteration" not in result.reason
    assert np.asarray(images.labels).max(initial=0) < max(1, len(images.class_names))
