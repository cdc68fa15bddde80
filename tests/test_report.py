import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from reglue.report import DemoReport, Nearest, RunResult, Semantics, write_report

from reglue.errors import UserError

RNG = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)


def run_result(name: str, classes: int = 2) -> RunResult:
    return RunResult(
        name=name,
        guided=pixels(classes, 3, 6, 8),
        unguided=pixels(classes, 4, 6, 8),
        recognised=0.974,
        recognised_unguided=0.881,
        losses={"latent": [(1, 2.0), (2, 1.0)], "alignment": [(1, -0.1), (2, -0.3)]},
        metrics={"guided": {"recall": 0.61}, "unguided": {"precision": "0.8 ± 0.1"}},
        steps=2000,
        parameters=1_600_000,
        seconds=241,
        recipe={"model": "S/2"},
        nearest=Nearest(pixels(2, 6, 8), pixels(2, 3, 6, 8), np.array([[1.0, 7, 8], [6, 7, 8]]), 5.0, "class tokens"),
        semantics=Semantics(pixels(3, 6, 8), pixels(3, 2, 3), pixels(2, 6, 8), pixels(2, 2, 3)),
    )


def demo_report(**changes) -> DemoReport:
    report = DemoReport(
        title="REGLUE & digits <1>",
        class_names=("zero", "one"),
        runs=(run_result("REGLUE"),),
        training_images=4000,
        judge_accuracy=0.989,
        judge_images=1000,
        stage_seconds={"prepare": 10.0, "train": 241.0},
        protocol={"seed": 7, "date": "today"},
        commands=("reglue train reglue --store S",),
    )
    return replace(report, **changes)


def pictures(page: str) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(code))) for code in re.findall(r"base64,([A-Za-z0-9+/=]+)", page)]


def test_the_page_says_everything_and_loads_nothing(tmp_path):
    path = tmp_path / "report.html"
    write_report(path, demo_report())
    page = path.read_text()
    for said in ("REGLUE &amp; digits &lt;1&gt;", "97.4", "88.1", "98.9", "4,000", "1.6 million", "4 min 01 s"):
        assert said in page
    for said in ("zero", "0.61", "0.8 ± 0.1", "reglue train reglue --store S", "&#34;seed&#34;: 7"):
        assert said in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "url(" not in page.replace("url(#", "")
    # One sample is nearer than half the typical distance, and the legend shows how that looks.
    assert page.count('class="close"') == 2
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_pictures_are_whole_numbers_of_the_pixels_given(tmp_path):
    report = demo_report(runs=(replace(run_result("SiT"), losses={}),))
    write_report(tmp_path / "report.html", report)
    hero, guided = pictures((tmp_path / "report.html").read_text())[:2]
    assert hero.mode == "RGBA"
    enlarged = np.asarray(guided)
    factor = enlarged.shape[0] // 6
    assert (enlarged[::factor, ::factor, :3][:, :8] == report.runs[0].guided[0, 0]).all()
    assert (enlarged[:, 8 * factor : 10 * factor, 3] == 0).all(), "the gap between two images is clear"


def test_runs_are_compared_on_the_same_axes(tmp_path):
    plain = replace(run_result("SiT"), losses={"latent": [(1, 3.0)]}, nearest=None, semantics=None)
    write_report(tmp_path / "report.html", demo_report(runs=(run_result("REGLUE"), plain)))
    page = (tmp_path / "report.html").read_text()
    assert "REGLUE: latent" in page
    assert "SiT: latent" in page
    assert page.count("not part of this model") == 1
    assert "SiT, guided" in page


def test_no_classes_no_losses_and_large_images(tmp_path):
    run = replace(
        run_result("SiT", classes=1), guided=pixels(1, 1, 64, 48), losses={}, metrics={}, nearest=None, semantics=None
    )
    write_report(tmp_path / "report.html", demo_report(class_names=(), runs=(run,)))
    page = (tmp_path / "report.html").read_text()
    assert "<svg" not in page
    assert "Guided samples of class all" in page


def test_a_page_that_cannot_be_written_is_the_users_to_mend(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        write_report(tmp_path / "missing" / "report.html", demo_report(runs=(replace(run_result("SiT"), losses={}),)))
