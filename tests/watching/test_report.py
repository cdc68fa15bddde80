"""`reglue report` of real runs: what their folders tell, and what is drawn from them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import reglue
from helpers import mistake
from reglue.commands.report import Report, names_of, report
from reglue.data.store import Store
from reglue.errors import UserError
from reglue.run import RunRecord
from reglue.sampling import Sampling
from reglue.watching.looking import Wanted, differences, look

WANTED = Wanted(lambda _: {"plain": Sampling("euler", 2, precision="float32")}, samples_per_class=2, device="cpu")


def test_a_page_of_two_runs(tiny_run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_run, tmp_path / "<i>other"))
    out = tmp_path / "pages" / "report.html"
    assert report(Report((tiny_run, other), out, samples_per_class=1, steps=1, device="cpu")) == out
    page = out.read_text()
    assert "&lt;i&gt;other" in page
    assert "<i>other" not in page
    assert page.count("Semantics as colours") == page.count("New, or remembered?") == 2
    assert "reglue sample " in page
    assert [file.name for file in out.parent.iterdir()] == ["report.html"]


def test_what_is_seen_of_a_run(tiny_run: Path, tiny_store: Path) -> None:
    shown = look(tiny_run, "run", WANTED)
    assert shown.rows == ("circle", "square", "stripes")
    drawn = shown.samples["plain"]
    assert drawn.shape == (3, 2, 16, 16, 3)
    # The same images as of the command that the page names.
    model = reglue.load(tiny_run, device="cpu")
    again = model.generate([0, 1, 2, 0, 1, 2], sampling=Sampling("euler", 2, precision="float32"), output="tensor")
    assert (again.permute(0, 2, 3, 1).numpy() == drawn.swapaxes(0, 1).reshape(6, 16, 16, 3)).all()
    assert {"loss", "latent", "local", "cls", "alignment", "images_per_second"} <= shown.curves.keys()
    assert shown.nearest is not None
    assert shown.nearest.searched == len(Store.open(tiny_store))
    assert (np.diff(shown.nearest.distances) >= 0).all()
    assert shown.semantics is not None
    assert shown.semantics.colours is not None
    assert [checkpoint["step"] for checkpoint in shown.checkpoints] == ["6"]
    assert shown.provenance["store"] == str(tiny_store)
    assert shown.command
    assert shown.notes == ()


def test_a_run_alone_and_one_without_checkpoints(tiny_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    replace(RunRecord.read(run), store=str(tmp_path / "gone")).write(run)
    shown = look(run, "run", replace(WANTED, classes=("stripes",)))
    assert shown.rows == ("stripes",)
    assert shown.nearest is None
    assert shown.semantics is not None
    assert shown.semantics.images is None
    assert "not at hand" in shown.notes[0]
    assert "--classes stripes" in (shown.drawn_by or "")
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    begun = look(run, "run", WANTED)
    assert (begun.samples, begun.curves, begun.checkpoints) == ({}, {}, ())
    assert "no checkpoint yet" in begun.notes[0]


def test_an_unconditional_run_and_the_starter(tmp_path: Path) -> None:
    out = report(Report((Path("starter"),), tmp_path / "starter.html", 1, classes=("bag",), steps=1, device="cpu"))
    assert ">bag<" in out.read_text()


def test_mistakes_come_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no run given" in mistake(capsys, monkeypatch, "report")
    assert "ends in .html" in mistake(capsys, monkeypatch, "report", "starter", "--out", "report.pdf")
    assert "is not a run" in mistake(capsys, monkeypatch, "report", tmp_path)
    (tmp_path / "page.html").mkdir()
    assert "is a folder" in mistake(capsys, monkeypatch, "report", "starter", "--out", tmp_path / "page.html")
    with pytest.raises(UserError, match="class cat: choose"):
        look("starter", "starter", replace(WANTED, classes=("cat",)))


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    for name in ("a/run", "b/run"):
        (tmp_path / name).mkdir(parents=True)
    assert names_of((tmp_path / "a/run", tmp_path / "b/run")) == ["a/run", "b/run"]
    assert names_of((tmp_path / "a/run", Path("starter"))) == ["run", "starter"]
    assert names_of((Path("starter"), Path("starter"))) == ["starter (1)", "starter (2)"]


def test_options_that_differ(tiny_run: Path) -> None:
    record = RunRecord.read(tiny_run)
    optimisation = replace(record.recipe.optimisation, batch_size=16)
    other = replace(record, seed=5, recipe=replace(record.recipe, optimisation=optimisation))
    found = differences([record, record, other])
    assert found == {"--optimisation.batch-size": ("8", "8", "16"), "seed": ("0", "0", "5")}
    assert differences([record]) == {}
