"""Data sets that a run makes: what is kept, how it is read back, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from torchvision.datasets import VOCDetection, VOCSegmentation

import reglue
from helpers import draw_masks, mistake
from reglue.cli import parse
from reglue.commands.perceive import perceive
from reglue.commands.synthesise import nearest_of, read_record, read_rows, synthesise, training_tokens
from reglue.commands.train_head import train_head
from reglue.commands.verify import Verify, verify
from reglue.errors import UserError
from reglue.perception.agreement import confusions, mean_iou
from reglue.perception.datasets import Box, Labelled, boxes_of, run_lengths
from reglue.perception.perceiving import Scene


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path, tiny_images: Path) -> Path:
    """A head that sees what is left and what is right."""
    folder = tmp_path_factory.mktemp("head")
    masks = draw_masks(folder / "masks", tiny_images)
    line = ["head", str(tiny_store), "--masks", str(masks), "--out", str(folder / "out"), "--layers=all", "--steps=20"]
    train_head(parse([*line, "--class-names", "left", "right", "--device=cpu"]))
    return folder / "out"


def line(run: Path, head: Path, out: Path, *more: str) -> list[str]:
    own = ["--count=6", "--steps=2", "--batch-size=4", "--device=cpu", "--agreement=0.01", "--objects", "left", "right"]
    return ["synthesise", str(run), "--head", str(head), "--out", str(out), *own, *more]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path, head: Path) -> dict[str, Path]:
    """The same data set in all formats."""
    folder = tmp_path_factory.mktemp("made")
    return {
        name: synthesise(parse(line(tiny_run, head, folder / name, f"--format={name}")))
        for name in ("coco", "yolo", "voc", "masks")
    }


def mask_of(folder: Path, number: int) -> np.ndarray:
    return np.asarray(Image.open(folder / f"masks/{number:06d}.png"))


def test_images_and_masks_are_those_that_perceive_draws(
    made: dict[str, Path], tiny_run: Path, head: Path, tmp_path: Path
) -> None:
    seen = ["perceive", str(tiny_run), "--head", str(head), "--out", str(tmp_path / "seen"), "--count=6", "--steps=2"]
    perceive(parse([*seen, "--from", "local", "--batch-size=4", "--device=cpu"]))
    rows = read_rows(made["masks"])
    assert [row.index for row in rows] == [*range(6)]
    for row in rows:
        view = {
            name: np.array(Image.open(tmp_path / "seen" / "maps" / "out" / name / f"{row.index:06d}.png"))
            for name in ("local", "encoder")
        }
        local, encoder = (torch.from_numpy(one)[None].long() for one in view.values())
        assert row.agreement == pytest.approx(mean_iou(confusions(local, encoder, 2)[0]))
        assert row.kept
        assert np.array_equal(mask_of(made["masks"], row.index), view["encoder"])
        image, drawn = (folder / "images" / f"{row.index:06d}.png" for folder in (made["masks"], tmp_path / "seen"))
        assert np.array_equal(np.asarray(Image.open(image)), np.asarray(Image.open(drawn)))


def test_all_formats_say_the_same(made: dict[str, Path]) -> None:
    """The components of the masks, found here by their pixels alone."""
    coco = json.loads((made["coco"] / "annotations.json").read_text())
    assert coco["categories"] == [{"id": 0, "name": "left"}, {"id": 1, "name": "right"}]
    voc = VOCDetection(str(made["voc"]), year="2012", image_set="train", download=False)
    segmented = VOCSegmentation(str(made["voc"]), year="2012", image_set="train", download=False)
    yaml = (made["yolo"] / "data.yaml").read_text()
    assert "train: images/train" in yaml
    assert '  0: "left"\n  1: "right"\n' in yaml
    assert len(coco["images"]) == len(voc) == len(segmented) == 6
    assert len({one["id"] for one in coco["annotations"]}) == len(coco["annotations"]) > 6
    for position, image in enumerate(coco["images"]):
        mask = mask_of(made["coco"], image["id"])
        height, width = mask.shape
        assert (
            Image.open(made["coco"] / image["file_name"]).size == (image["width"], image["height"]) == (width, height)
        )
        own = [one for one in coco["annotations"] if one["image_id"] == image["id"]]
        covered = np.zeros(mask.shape, int)
        boxes = []
        for one in own:
            assert one["segmentation"]["size"] == [height, width]
            inside = decoded(one["segmentation"]["counts"], height, width)
            assert inside.sum() == one["area"]
            assert (mask[inside] == one["category_id"]).all()
            covered += inside
            rows, columns = np.nonzero(inside)
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert one["bbox"] == [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            boxes.append((one["category_id"], *map(int, box)))
        assert covered.max() == 1
        picture, annotation = voc[position]
        assert picture.size == (width, height)
        assert np.array_equal(np.asarray(segmented[position][1]), mask)
        assert [
            (("left", "right").index(one["name"]), int(one["bndbox"]["xmin"]) - 1, int(one["bndbox"]["ymin"]) - 1,
             int(one["bndbox"]["xmax"]), int(one["bndbox"]["ymax"]))
            for one in annotation["annotation"]["object"]
        ] == boxes  # fmt: skip
        lines = (made["yolo"] / f"labels/train/{image['id']:06d}.txt").read_text().splitlines()
        found = []
        for label, x, y, w, h in (map(float, one.split()) for one in lines):
            corners = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
            found.append((int(label), *map(round, corners)))
        assert found == boxes
        assert (made["yolo"] / f"images/train/{image['id']:06d}.png").is_file()


def decoded(counts: list[int], height: int, width: int) -> np.ndarray:
    """COCO's run lengths as a mask."""
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


@settings(max_examples=60)
@given(st.data())
def test_components_cover_their_class(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    mask = data.draw(arrays(np.uint8, shape, elements=st.integers(0, 2)))
    boxes = boxes_of(mask, [1, 2], 1)
    total = np.zeros(shape, int)
    for box in boxes:
        whole = decoded(run_lengths(box, shape), *shape)
        assert np.array_equal(whole[box.top : box.bottom, box.left : box.right], box.inside)
        assert whole.sum() == box.inside.sum()
        total += box.label * whole
        assert box.inside.any(0).all() or len(box.inside[0]) > 1
    assert np.array_equal(total, np.where(mask == 0, 0, mask))
    for one in boxes:  # No two of a class touch.
        for other in boxes:
            if one is not other and one.label == other.label:
                first, second = (np.pad(decoded(run_lengths(b, shape), *shape), 1) for b in (one, other))
                for down in (-1, 0, 1):
                    for across in (-1, 0, 1):
                        assert not (first & np.roll(second, (down, across), (0, 1))).any()
    large = boxes_of(mask, [1, 2], 3)
    assert [b[:5] for b in large] == [b[:5] for b in boxes if b.inside.sum() >= 3]


def test_an_image_without_boxes_is_described() -> None:
    from reglue.perception.datasets import LAYOUTS

    for layout in LAYOUTS.values():
        files = dict(layout.describe([Labelled(3, (4, 6), [])], {1: 'a "thing"'}))
        assert all(isinstance(text, str) for text in files.values())
    touching = Box(1, 0, 1, 2, 3, np.ones((2, 2), bool))
    (annotation, *_) = dict(LAYOUTS["voc"].describe([Labelled(3, (4, 6), [touching])], {1: "<a>"})).values()
    assert "<truncated>1</truncated>" in annotation
    assert "&lt;a&gt;" in annotation


def test_what_does_not_agree_is_dropped_and_reported(
    tiny_run: Path, head: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = synthesise(parse(line(tiny_run, head, tmp_path / "all", "--format=masks")))
    values = sorted(row.agreement for row in read_rows(every))
    out = synthesise(parse(line(tiny_run, head, tmp_path / "some", "--format=masks", f"--agreement={values[3]}")))
    rows = read_rows(out)
    kept = [row.index for row in rows if row.agreement >= values[3]]
    assert [row.index for row in rows if row.kept] == kept
    assert sorted(int(file.stem) for file in (out / "images").iterdir()) == kept
    assert f"{len(kept)} images with masks" in (out / "README.md").read_text()
    verify(Verify(out))
    none = synthesise(parse(line(tiny_run, head, tmp_path / "none", "--format=coco", "--agreement=1")))
    if not any(row.kept for row in read_rows(none)):
        assert json.loads((none / "annotations.json").read_text())["images"] == []
        assert "0 of 6 images kept, with 0 boxes; nothing agrees so well, lower agreement" in capsys.readouterr().out
    verify(Verify(none))


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_it_continues_and_adds(tiny_run: Path, head: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, asked = tmp_path / "out", lambda *more: parse(line(tiny_run, head, tmp_path / "out", *more))
    synthesise(asked())
    first = content(out)
    synthesise(asked())
    assert "complete already: 6 images drawn" in capsys.readouterr().out
    (out / "masks" / "000001.png").unlink()
    (out / "annotations.json").unlink()
    with pytest.raises(UserError, match="are missing or damaged"):
        verify(Verify(out))
    synthesise(asked())
    assert content(out) == first
    (out / "annotations.json").unlink()
    synthesise(asked())
    assert content(out) == first
    synthesise(asked("--count=9"))
    assert len(read_rows(out)) == 9
    assert content(out)["images/000001.png"] == first["images/000001.png"]
    more = content(out)
    synthesise(asked())
    assert content(out) == more
    verify(Verify(out))
    for other in (["--format=yolo"], ["--agreement=0.5"], ["--seed=1"], ["--objects", "left"]):
        with pytest.raises(UserError, match="holds samples of another protocol"):
            synthesise(asked(*other))
    (out / "images" / "000000.png").write_bytes((out / "images" / "000001.png").read_bytes())
    with pytest.raises(UserError, match=r"images/000000\.png is missing or damaged"):
        verify(Verify(out))


def test_copies_of_training_images_are_flagged(made: dict[str, Path], tiny_run: Path, tiny_store: Path) -> None:
    training = training_tokens(reglue.load(tiny_run, device="cpu"))
    assert training is not None
    tokens = training[0].float()
    scene = Scene(torch.empty(0), {"encoder": (reglue_features(tokens[:3] + 1e-4), (0,))})
    for i, (name, closeness) in enumerate(nearest_of(scene, training)):
        assert name == training[1][i]
        assert closeness is not None
        assert closeness < 0.01
    rows = read_rows(made["coco"])
    assert {row.nearest for row in rows} <= set(training[1])
    assert "may be copies" in (made["coco"] / "README.md").read_text()


def reglue_features(tokens: torch.Tensor) -> Any:
    from reglue.encoders.vision import VisionFeatures

    return VisionFeatures(tokens, torch.empty(0))


def test_the_record_counts_boxes(made: dict[str, Path]) -> None:
    record = read_record(made["coco"])
    boxes = json.loads((made["coco"] / "annotations.json").read_text())["annotations"]
    assert sum(record.boxes.values()) == len(boxes)
    assert {*record.files} == {*content(made["coco"])} - {"dataset.json"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--agreement=1.5"), "--agreement 1.5: choose at least 0 and at most 1"),
        (("--format=pascal"), "--format pascal: give coco or yolo or voc or masks"),
        (("--objects", "triangle"), "--objects triangle: the head has classes left, right"),
        (("--head=.",), "has no head.json: give a folder that `reglue head` made"),
        (("--classes", "triangle"), "class triangle: choose 0 to 2 or a name"),
        (("--out", "x.npz"), "x.npz: a data set is a folder; name one"),
    ],
    ids=str,
)
def test_mistakes_are_one_line_before_any_network_runs(
    arguments: tuple[str, ...],
    told: str,
    tiny_run: Path,
    head: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a network ran")

    monkeypatch.setattr("reglue.diffusion.denoiser.Denoiser.forward", never)
    words = [arguments] if isinstance(arguments, str) else arguments
    assert told in mistake(capsys, monkeypatch, *line(tiny_run, head, tmp_path / "out", *words))
    assert not (tmp_path / "out").exists()
