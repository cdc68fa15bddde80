"""Tables and plots of results: one study, and several side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compare import compare, speeds
from reglue.errors import UserError
from summary import spaces_of, table


def trial(arm: str, seed: int, distance: float, network: str = "a", step: int = 4) -> dict[str, Any]:
    figures = {
        "frechet_distance": {"value": distance, "low": distance - 1, "high": distance + 1},
        "recall": {"value": 0.25, "low": 0.24, "high": 0.26},
        "network_sha256": network,
    }
    measured = {"training_seconds": 60.0, "encoder": figures}
    steps = {str(step): measured}
    return {"arm": arm, "seed": seed, "note": "", "parameters": 5, "steps": steps, "guided": {}, "guided_step": step}


def results(*trials: dict[str, Any]) -> dict[str, Any]:
    return {"arms": {f"{each['arm']}-seed-{each['seed']}": each for each in trials}}


def write(folder: Path, *trials: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results(*trials)))
    return folder


def test_seeds_have_a_mean_of_the_raw_values_and_a_range() -> None:
    shown = table({"study": results(trial("sit", 0, 1.24), trial("sit", 1, 1.34), trial("reg", 0, 3.0))})
    assert "| 4 | sit, mean of 2 seeds | 0.0 M |  | 1.3 (1.2–1.3) | 0.25 |" in shown  # that of 1.2 and 1.3 is 1.2
    assert "| 4 | sit, seed 0 | 0.0 M | 60 | 1.2 [0.2, 2.2] | 0.25 |" in shown  # no interval of recall
    assert "reg, mean" not in shown


def test_studies_with_one_title_are_one(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one", trial("sit", 0, 2.0)), write(tmp_path / "other", trial("sit", 1, 4.0))
    compare((one, other), tmp_path / "out", titles=("space", "space"))
    assert "sit, mean of 2 seeds | 0.0 M |  | 3.0 (2.0–4.0)" in (tmp_path / "out" / "table.md").read_text()
    assert not (tmp_path / "out" / "quality-by-space.png").exists()
    with pytest.raises(UserError, match=r"--titles same: .* has sit-seed-0 too"):
        compare((one, one), tmp_path / "out", titles=("same", "same"))
    with pytest.raises(UserError, match="--titles: 1 for 2 studies"):
        compare((one, other), tmp_path / "out", titles=("space",))


def test_spaces_have_panels_of_their_own(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", trial("sit", 0, 2.0), trial("sit", 1, 2.5), trial("reglue", 0, 1.0))
    others = write(tmp_path / "f8", trial("sit-in-a", 0, 2.0), trial("sit-in-b", 0, 2.0), trial("sit-in-c", 0, 9.0))
    compare((plain, others), tmp_path / "out", without=("*-in-c",), last=True)
    assert (tmp_path / "out" / "quality-by-space.png").stat().st_size > 10_000
    assert "sit-in-c" not in (tmp_path / "out" / "table.md").read_text()
    studies = {folder.name: json.loads((folder / "results.json").read_text()) for folder in (plain, others)}
    spaces = spaces_of(studies)
    assert list(spaces) == ["plain", "f8: a", "f8: b", "f8: c"]
    assert {one["arm"] for trials in spaces.values() for one in trials} == {"sit", "reglue"}
    assert len(spaces["plain"]) == 3


def test_time_by_a_plan_is_that_of_an_idle_machine(tmp_path: Path) -> None:
    study, plan = write(tmp_path / "study", trial("sit", 0, 2.0), trial("sit", 1, 4.0)), tmp_path / "study-plan.json"
    planned = {"steps": 100, "counted_on": None, "arms": [{"name": "sit-seed-0", "training": 50.0}]}
    plan.write_text(json.dumps(planned))
    compare((study,), tmp_path / "out", plans=(plan,))
    assert "| 4 | sit, seed 1 | 0.0 M | 2 | 4.0" in (tmp_path / "out" / "table.md").read_text()  # 4 steps of 0.5 s
    slower, slowest = tmp_path / "slower-plan.json", tmp_path / "slowest-plan.json"
    for file, seconds in ((slower, 75.0), (slowest, 1000.0)):
        file.write_text(json.dumps({**planned, "arms": [{"name": "sit-seed-0", "training": seconds}]}))
    compare((study,), tmp_path / "out", plans=(slowest, plan, slower))
    assert "| 4 | sit, seed 1 | 0.0 M | 3 | 4.0" in (tmp_path / "out" / "table.md").read_text()  # 4 steps of 0.75 s
    with pytest.raises(UserError, match="--plans: 1 for 2 studies"):
        compare((study, study), tmp_path / "out", plans=(plan,))
    with pytest.raises(UserError, match="--plans nowhere: not there"):
        compare((study,), tmp_path / "out", plans=(Path("nowhere"),))
    plan.write_text(json.dumps({**planned, "arms": [{"name": "reg-seed-0", "training": 50.0}]}))
    with pytest.raises(UserError, match="does not know sit"):
        compare((study,), tmp_path / "out", plans=(plan,))
    plan.write_text(json.dumps({**planned, "counted_on": "h200"}))
    assert list(speeds((plan, plan))) == ["what was counted for h200"]
    compare((study,), tmp_path / "out", plans=(plan,))


def test_studies_by_two_networks_are_not_set_side_by_side(tmp_path: Path) -> None:
    one = write(tmp_path / "one", trial("sit", 0, 2.0))
    other = write(tmp_path / "other", trial("sit", 0, 2.0, network="b"))
    with pytest.raises(UserError, match="sit-seed-0 of one and sit-seed-0 of other were measured with different"):
        compare((one, other), tmp_path / "out")
    assert not (tmp_path / "out").exists()
