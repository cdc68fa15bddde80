"""What folders and files are: `info` and `list`, by the kinds that `verify` knows."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from helpers import mistake
from reglue.commands.export_run import ExportRun, export_run
from reglue.commands.info import Info, as_lines, info
from reglue.commands.list_runs import NAME_WIDTH, ListRuns, list_runs, number, table
from reglue.commands.verify import Verify, verify
from reglue.errors import UserError
from reglue.training.tracking import newest
from reglue.watching import words
from reglue.watching.kinds import FILES, KINDS, kind_of
from test_damaged_files import (  # noqa: F401, fixtures
    aligned_autoencoder,
    begun_store,
    tiny_dataset,
    tiny_edits,
    tiny_head,
    tiny_looks,
    tiny_pipeline,
    tiny_samples,
)

SAID = {
    "tiny_run": ("run", {"images": "16×16 pixels in 3 classes", "checkpoints": "6"}),
    "tiny_pipeline": ("diffusers pipeline", {"images": "16×16 pixels in 3 classes", "step": "6"}),
    "tiny_store": ("store", {"images": "24 of 16×16 pixels", "classes": "3: circle (8), square (8), stripes (8)"}),
    "begun_store": ("store", {"state": "half-written: the same `reglue prepare` finishes it"}),
    "aligned_autoencoder": ("autoencoder", {"checkpoints": "1", "state": "finished after 1 step"}),
    "tiny_head": ("head", {"predicts": "3 classes"}),
    "tiny_samples": ("samples", {"images": "2 images"}),
    "tiny_edits": ("edits", {"recipe": "reglue"}),
    "tiny_dataset": ("data set", {}),
    "tiny_looks": ("prototypes", {"codes": "local.pca-4, 4 channels"}),
}


@pytest.mark.parametrize("fixture", SAID)
def test_every_kind_says_what_it_is_and_is_seen(
    fixture: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder: Path = request.getfixturevalue(fixture)
    name, expected = SAID[fixture]
    capsys.readouterr()  # what making it has said
    said = info(Info(folder))
    assert capsys.readouterr().out.startswith(f"{folder}: {name}\n")
    assert {title: said.get(title) for title in expected} == expected
    kind = kind_of(folder)
    assert kind.name == name
    pictures = kind.pictures(folder)
    assert all(picture.dtype == np.uint8 and picture.shape[2] == 3 for picture in pictures)
    if pictures:
        info(Info(folder, tmp_path / "seen.jpg"))
        assert Image.open(tmp_path / "seen.jpg").format == "JPEG"
    else:
        with pytest.raises(UserError, match="there is nothing to see"):
            info(Info(folder, tmp_path / "seen.png"))
    assert not [file for file in tmp_path.iterdir() if file.name != "seen.jpg"]


def test_every_kind_is_tried() -> None:
    assert {kind.name for kind in KINDS.values()} == {name for name, _ in SAID.values()}


def test_archives_and_published_files(tiny_run: Path, tmp_path: Path) -> None:
    archive = tmp_path / "samples.npz"
    np.savez(archive, np.zeros((3, 8, 8, 3), np.uint8))
    assert info(Info(archive, tmp_path / "seen.png"))["array arr_0"] == "3×8×8×3 uint8"
    exported = tmp_path / "weights.safetensors"
    export_run(ExportRun(tiny_run, exported))
    said = info(Info(exported))
    assert said["weights"].startswith("0.1 million numbers in ")
    assert "reglue import" in said["next"]
    assert verify(Verify(exported)) == exported
    exported.write_bytes(exported.read_bytes()[:-9])
    for command in (lambda: info(Info(exported)), lambda: verify(Verify(exported))):
        with pytest.raises(UserError, match=r"weights\.safetensors"):
            command()


def test_images_of_a_store_that_have_moved_are_latents(tiny_store: Path, tiny_images: Path, tmp_path: Path) -> None:
    kind = kind_of(tiny_store)
    there = kind.pictures(tiny_store)
    moved = tiny_images.rename(tmp_path / "moved")
    try:
        latents = kind.pictures(tiny_store)
    finally:
        moved.rename(tiny_images)
    assert len(there) == len(latents) == 16
    assert {picture.shape for picture in there} == {picture.shape for picture in latents} == {(96, 96, 3)}
    assert any((one != other).any() for one, other in zip(there, latents, strict=True))


def test_what_is_none_of_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = mistake(capsys, monkeypatch, "info", tmp_path)
    assert f"{tmp_path} has none of {', '.join(KINDS)}; give " in told
    assert "nowhere: no such file or folder" in mistake(capsys, monkeypatch, "info", "nowhere")
    assert "name a picture that ends in" in mistake(capsys, monkeypatch, "info", "starter", "--out", "seen.txt")
    assert ".npz" in FILES


def test_a_table_of_what_is_below_a_folder(
    tiny_run: Path, tiny_store: Path, begun_store: Path, aligned_autoencoder: Path,  # noqa: F811
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "200")
    shutil.copytree(tiny_run, tmp_path / "deep" / "er" / "run")
    shutil.copytree(tiny_run, tmp_path / "deep" / "er" / "run" / "inside")
    shutil.copytree(tiny_store, tmp_path / "store")
    shutil.copytree(begun_store, tmp_path / "begun")
    shutil.copytree(aligned_autoencoder, tmp_path / "aligned")
    damaged = shutil.copytree(tiny_run, tmp_path / "damaged")
    (damaged / "run.json").write_text("{")
    (tmp_path / ".hidden").mkdir()
    shutil.copytree(tiny_run, tmp_path / ".hidden" / "run")
    reports = tmp_path / "deep" / "er" / "run" / "reports"
    reports.mkdir(exist_ok=True)
    for age, value in ((100, 3.5), (50, 2.25)):
        content = {"metrics": {"frechet_distance": {"value": value}}, "distance_name": "FID", "image_count": 5000}
        file = reports / f"{age}.json"
        file.write_text(json.dumps(content))
        os.utime(file, (10**9 - age, 10**9 - age))

    found = list_runs(ListRuns(tmp_path))
    assert [one.name for one in found] == ["aligned", "begun", "damaged", "deep/er/run", "store"]
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["steps", "loss", "figure", "size"]
    assert lines[1].split()[:3] == ["begun", "store", "half-written"]
    assert "damaged: see `reglue verify`" in lines[2]
    assert "reglue 2x32x2/2, 16×16" in lines[3]
    assert "FID 2.25 (5,000)" in lines[3]
    assert "24 images, 16×16" in lines[4]
    last = newest(tiny_run, "loss")
    assert f"{last['loss']:.4g}" in lines[3]
    by_size = [one.size for one in list_runs(ListRuns(tmp_path, "size"))]
    assert by_size == sorted(by_size, reverse=True)
    assert list_runs(ListRuns(tmp_path, "steps"))[0].name == "deep/er/run"
    assert [one.name for one in list_runs(ListRuns(tmp_path / "store"))] == ["."]


def test_nothing_to_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert list_runs(ListRuns(tmp_path)) == []
    assert "no run, store or autoencoder" in capsys.readouterr().out
    with pytest.raises(UserError, match="is no folder"):
        list_runs(ListRuns(tmp_path / "missing"))


def test_the_end_of_a_log_is_enough(tmp_path: Path) -> None:
    assert newest(tmp_path, "loss") == {}
    lines = [json.dumps({"step": i, "loss": 1.0}) for i in range(5000)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 5000, "other": 2}', '{"step": 50']))
    assert newest(tmp_path, "loss")["step"] == 4999
    assert newest(tmp_path, "other")["step"] == 5000
    assert newest(tmp_path, "none") == {}


@given(st.dictionaries(st.text(max_size=20), st.text(max_size=200), min_size=1))
def test_facts_are_lines_that_fit(said: dict[str, str]) -> None:
    for line in as_lines(said):
        assert line.isprintable() or not line


def test_tables_and_words() -> None:
    assert number("1,500 of 2,000") == 1500
    assert number("") == 0
    assert [*table([["", "steps"], ["a", ""]])] == ["", "a"]
    assert len(f"…{'x' * 99}"[:NAME_WIDTH]) == NAME_WIDTH
    sizes = {0: "0 B", 999: "999 B", 1000: "1.0 kB", 123_456: "123 kB", 10**9: "1.0 GB", 10**15: "1000 TB"}
    assert {count: words.size(count) for count in sizes} == sizes
    assert [words.duration(s) for s in (1.26, 61, 7380)] == ["1.3 s", "1 min 01 s", "2 h 03 min"]
