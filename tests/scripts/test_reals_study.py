"""The study of latent spaces reads what its earlier versions left."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.axes import Axes

from reals_study import Study, draw_sweep, print_table


def test_arms_of_an_earlier_version_may_lack_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: dict[str, tuple[list[float], list[float]]] = {}
    titles = []

    def semilogx(panel: Axes, x: list[float], y: list[float], **_: str) -> None:
        titles.append((x, y))

    def set_(panel: Axes, *, title: str, **_: str) -> None:
        drawn[title] = titles[-1]

    monkeypatch.setattr(Axes, "semilogx", semilogx)
    monkeypatch.setattr(Axes, "set", set_)
    names = ("psnr", "kl", "patch_cosine", "linear_probe_pooled", "linear_probe_flat", "neighbours_flat", "latent_std")
    arms = [{"kl_weight": weight, **dict.fromkeys(names, 1.0)} for weight in (1e-6, 1e-5)]
    arms[0]["rfid"], arms[1]["frechet_distance"] = 7.0, 8.0
    draw_sweep(Study(tmp_path, out=tmp_path), arms, arms[0])
    assert drawn["frechet distance"] == ([1e-5], [8.0])
    assert drawn["psnr"] == ([1e-6, 1e-5], [1.0, 1.0])
    assert (tmp_path / "kl-sweep.png").is_file()
    print_table({"arms": {"old": arms[0], "new": arms[1]}})
    old, new = capsys.readouterr().out.splitlines()[1:]
    assert "–" in old
    assert "8" in new
