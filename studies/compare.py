"""Sets finished studies side by side: one table, and plots with one kind of line per study and a panel per space.

    python studies/compare.py study-taef2 study-kl study-reals --out compared

Where studies ran beside other work their seconds do not compare. With --plans, made on an idle machine with --plan, or
counted with --counted-on, training takes the plan's time in the plot of quality against time.

Latent spaces differ in what their decoders can show, so read each study's own distance between arms first. Studies with
the same title are one: seeds, or arms, that were trained in several folders.
"""

from __future__ import annotations

import json
import sys
from fnmatch import fnmatch
from pathlib import Path
from statistics import median
from typing import Any

import tyro
from tyro.conf import Positional

from reglue.errors import UserError
from summary import refuse_mixtures, summarise, table


def compare(
    folders: Positional[tuple[Path, ...]],
    out: Path,
    titles: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
    last: bool = False,
    plans: tuple[Path, ...] = (),
) -> None:
    """Write the table and the plots of several studies into a folder.

    Args:
        folders: Folders of studies.
        out: Where table and plots go.
        titles: Of the studies, in the order of the folders; their folders' names if not given.
        without: Arms to leave out, such as `*-in-aligned-*`.
        last: Only the last figures of each arm in the table.
        plans: OUT-plan.json of each folder, or several of each in the order of the folders, by whose medians its arms
            take their time.
    """
    if titles and len(titles) != len(folders):
        raise UserError(f"--titles: {len(titles)} for {len(folders)} studies; give one of each")
    if len(plans) % len(folders):
        raise UserError(f"--plans: {len(plans)} for {len(folders)} studies; give as many of each")
    plans_of_each = len(plans) // len(folders)
    studies: dict[str, dict[str, Any]] = {}
    for index, folder in enumerate(folders):
        file = folder / "results.json"
        if not file.is_file():
            raise UserError(f"{folder} has no results.json; run a study with --out {folder}")
        results = json.loads(file.read_text())
        arms = {name: arm for name, arm in results["arms"].items() if not any(fnmatch(arm["arm"], w) for w in without)}
        if plans:
            arms = timed_by(plans[index * plans_of_each : (index + 1) * plans_of_each], arms)
        title = titles[index] if titles else folder.name if folder.name not in studies else str(folder)
        before = studies.get(title, {"arms": {}})
        if twice := before["arms"].keys() & arms.keys():
            raise UserError(f"--titles {title}: {folder} has {min(twice)} too; give it a title of its own")
        controls = {**before.get("controls", {}), **results.get("controls", {})}
        studies[title] = {**results, "controls": controls, "arms": {**before["arms"], **arms}}
    refuse_mixtures(studies)
    out.mkdir(parents=True, exist_ok=True)
    if plans:
        summarise(out, studies, last, on_time=f"training takes {' and '.join(speeds(plans))}")
    else:
        summarise(out, studies, last)
    print(table(studies, last))


def speeds(plans: tuple[Path, ...]) -> dict[str, None]:
    """How the times of plans were found, each once."""
    counted = [json.loads(plan.read_text())["counted_on"] for plan in plans]
    return dict.fromkeys(f"what was counted for {gpu}" if gpu else "what was timed by itself" for gpu in counted)


def timed_by(plans: tuple[Path, ...], trials: dict[str, Any]) -> dict[str, Any]:
    """Trials with the seconds that training takes by the median of plans, which know one seed of each arm at least.

    Raises UserError for a plan that is not there, or does not know an arm.
    """
    seconds: dict[str, list[float]] = {}
    for plan in plans:
        if not plan.is_file():
            raise UserError(f"--plans {plan}: not there; make it with --plan")
        planned = json.loads(plan.read_text())
        for line in planned["arms"]:
            seconds.setdefault(line["name"].partition("-seed-")[0], []).append(line["training"] / planned["steps"])
    timed = {}
    for folder, trial in trials.items():
        if len(known := seconds.get(trial["arm"], [])) < len(plans):
            raise UserError(
                f"--plans {plans[0]}: does not know {trial['arm']}; plan it too, or leave it out by --without"
            )
        steps = {
            step: {**figures, "training_seconds": int(step) * median(known), "training_seconds_by_machine": {}}
            for step, figures in trial["steps"].items()
        }
        timed[folder] = {**trial, "steps": steps}
    return timed


if __name__ == "__main__":
    try:
        tyro.cli(compare, description=__doc__)
    except UserError as error:
        sys.exit(f"compare: {error}")
