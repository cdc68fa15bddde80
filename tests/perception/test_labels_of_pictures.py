"""Pictures of maps and of probes, with many classes, many inputs and long names."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from reglue.perception.heads import Head, HeadSpec
from reglue.perception.pictures import draw_maps
from reglue.perception.probing import PROBES, ProbeReport, ProbeResult, plot_probes

LONG = "n02086240 Shih-Tzu, a name that goes on, and on, and on, as those of ImageNet do"


def head(task: str, classes: int) -> Head:
    names = tuple(f"{number} {LONG}" for number in range(classes))
    depth = {"depth_range": (0.0, 10.0)} if task == "depth" else {"class_names": names}
    return Head(HeadSpec(task, "vit", 16, (3,), classes, **depth))  # type: ignore[arg-type]


@pytest.mark.parametrize(("classes", "images"), [(1, 1), (3, 8), (150, 2)])
def test_the_legend_is_under_the_maps_and_nothing_is_cut(tmp_path: Path, classes: int, images: int) -> None:
    heads = {
        f"a-head-with-a-name-longer-than-its-column-{classes}": head("segmentation", classes),
        "d": head("depth", 1),
    }
    maps = np.resize(np.arange(classes), (32, 48))
    shown = [
        (
            np.full((32, 48, 3), 30, np.uint8),
            {(name, view): maps for name in heads for view in ("alignment", "encoder")},
        )
        for _ in range(images)
    ]
    draw_maps(tmp_path / "picture.png", shown, heads)  # type: ignore[arg-type]
    picture = np.asarray(Image.open(tmp_path / "picture.png"))
    width = 5 * 192 + 4 * 2  # the image and two maps of each head, four times as large, and the gaps
    assert picture.shape[1] == width
    dark = np.asarray(np.all(picture[:, :192] < 128, axis=-1))
    image = dark.sum(1) > 150
    assert image.sum() == images * 128
    above, below = picture[: image.argmax()], picture[len(image) - image[::-1].argmax() :]
    for column in range(5):
        title = above[:, column * 194 :][:, :192]
        assert (title < 128).any()
        assert (title[:, [0, -1]] == 255).all(), "titles do not run into each other"
    assert len(below) >= 15 * min(classes, 60) / 3
    assert (below[:, -1] == 255).all()


def test_labels_of_probes_do_not_overprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Axes] = []
    original = Figure.savefig

    def keep(self: Figure, *arguments: object, **options: object) -> None:
        original(self, *arguments, **options)  # type: ignore[arg-type]
        self.draw_without_rendering()
        drawn.extend(self.axes)

    monkeypatch.setattr(Figure, "savefig", keep)
    names = [
        "features",
        "cls",
        "latent",
        *(f"local.conv-16{'-of-a-name-with-much-in-it' * (i % 5)}-{i}" for i in range(30)),
    ]
    results = tuple(
        ProbeResult(name, kind, "", 16, 256, 0.5, 0.02, None, 1.0, 0.5, None, None, None, None, None, 1.0)
        for name in names
        for kind in PROBES
    )
    report = ProbeReport("accuracy", 10, 0.1, 10, 10, 10, 0, {}, "cpu", 1, {}, results)
    plot_probes(report, tmp_path / "figure.png")
    (axes,) = drawn
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert len(boxes) == len(names)
    assert all(box.x0 >= 0 for box in boxes), "cut on the left"
    assert all(one.y0 > other.y1 for one, other in pairwise(boxes))
