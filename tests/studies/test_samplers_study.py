"""The study of samplers at toy size: an adaptive sampler's tolerances, and the evaluations that it chose."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from reglue.commands.sample import PROTOCOL
from reglue.files import read_json
from samplers import Results, Setting, Study, settings, study, table


def test_an_adaptive_sampler_is_measured_at_each_tolerance(tmp_path: Path, tiny_run: Path, tiny_store: Path) -> None:
    options = Study(
        tiny_run,
        tiny_store,
        tmp_path / "study",
        samplers=("euler",),
        evaluations=(2,),
        anchor_evaluations=3,
        solution_evaluations=20,
        solution_count=2,
        count=6,
        guidance_scale=1.0,
        batch_size=2,
        device="cpu",
    )
    before = study(options)
    both = replace(options, samplers=("dopri5",), relative_tolerances=(1e-1, 1e-4))
    assert [setting.name for setting in settings(both)][1:] == ["dopri5-tolerance-0.1", "dopri5-tolerance-0.0001"]
    results = study(both)  # Continues what was measured without them.
    assert results.settings[: len(before.settings)] == before.settings
    loose, strict = results.settings[-2:]
    assert loose.evaluations is not None
    assert strict.evaluations is not None
    assert 6 < loose.evaluations < strict.evaluations  # A step takes six, and two come before the first one.
    assert strict.pixel_distance is not None
    sampling = json.loads((both.out / strict.setting.name / PROTOCOL).read_text())["sampling"]
    assert sampling["relative_tolerance"] == 1e-4
    assert sampling["absolute_tolerance"] == pytest.approx(1e-7)
    assert f"| dopri5 | 1 | 0.0001 | {strict.evaluations} |" in table(results)


def test_results_of_before_tolerances_were_chosen_can_be_read(tmp_path: Path) -> None:
    setting = {"sampler": "dopri5", "evaluations": 0, "time_shift": 1.0}
    measured = {"setting": setting, "evaluations": None, "frechet_distance": 1.0, "low": 0.5, "high": 2.0}
    nothing = {"fid": None, "pixel_distance": None, "seconds": None}
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"options": {}, "settings": [{**measured, **nothing}]}))
    (read,) = read_json(file, Results, "").settings
    assert read.setting == Setting("dopri5", 0, 1.0)
    assert read.setting.name == "dopri5"
