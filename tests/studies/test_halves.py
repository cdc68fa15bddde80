"""Samples with a real half."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import halves
from halves import ARMS, Halves
from reglue.diffusion.controls import Clamp


def test_what_is_real_is_held(
    tiny_run: Path, tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[dict[str, Any]] = []

    class Watched(Clamp):
        def __init__(self, data: dict[str, Any], *others: Any, **named: Any) -> None:
            known.append(data)
            super().__init__(data, *others, **named)

    monkeypatch.setattr(halves, "Clamp", Watched)
    settings: dict[str, Any] = {"resamples": 0, "device": "cpu"}
    options = Halves(tiny_run, tiny_store, tiny_store, "store", tmp_path, count=6, batch_size=4, evaluate=settings)
    found = halves.main(options)
    assert [tuple(data) for data in known] == [names for names in ARMS.values() for _ in range(2)]
    assert found.keys() == ARMS.keys()
    pictures = {arm: np.asarray(Image.open(tmp_path / arm / "000005.png")) for arm in ARMS}
    assert not np.array_equal(pictures["local"], pictures["cls"])
    halves.main(options)  # Everything is there.
    assert len(known) == 6
