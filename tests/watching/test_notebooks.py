"""What models, stores and evaluations show of themselves, on a line and in a notebook."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import reglue
from reglue.commands.evaluate import Evaluate, evaluate


def test_a_model_and_its_newest_preview(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = reglue.load(tiny_run, device="cpu")
    assert repr(model).startswith("ImageModel(reglue 2x32x2/2, 16×16, 3 classes, step 6, ")
    page = model._repr_html_()
    for said in ("circle, square, stripes", "16×16 pixels", "0.1 million", "6 (ema)"):
        assert said in page
    assert "<img" not in page
    (tmp_path / "previews").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "previews" / "00000006.png")
    assert "<img" in replace(model, folder=tmp_path)._repr_html_()
    (tmp_path / "previews" / "00000007.png").write_text("damaged")
    assert "<img" not in replace(model, folder=tmp_path)._repr_html_()
    hostile = replace(model, record=replace(model.record, class_names=("<script>", "a", "b")))
    assert "<script>" not in hostile._repr_html_()


def test_a_store_and_an_evaluation(tiny_store: Path, tiny_encoder: str, tiny_images: Path) -> None:
    store = reglue.Store.open(tiny_store)
    assert repr(store).startswith("Store(24 images of 16×16, 3 classes, columns cls, features, label, latent, ")
    page = store._repr_html_()
    assert "24 of 16×16 pixels" in page
    assert page.count("<img") == 1
    options = Evaluate(tiny_images, tiny_store, feature_network=tiny_encoder, resamples=0, device="cpu")
    evaluation = evaluate(options)
    assert repr(evaluation) == str(evaluation)
    table = evaluation._repr_html_()
    for name, value in evaluation.figures().items():
        assert name in table
        assert f"{value:.4f}" in table
    assert "<table>" in table
