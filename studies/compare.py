"""Sets finished studies side by side: one table, and plots with one kind of line per study and a panel per space.

    python studies/compare.py study-taef2 study-kl study-reals --out compared

Latent spaces differ in what their decoders can show, so read each study's own distance between arms first. Studies with
the same title are one: seeds, or arms, that were trained in several folders.
"""

from __future__ import annotations

import json
import sys
from fnmatch import fnmatch
from pathlib import Path
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
) -> None:
    """Write the table and the plots of several studies into a folder.

    Args:
        folders: Folders of studies.
        out: Where table and plots go.
        titles: Of the studies, in the order of the folders; their folders' names if not given.
        without: Arms to leave out, such as `*-in-aligned-*`.
        last: Only the last figures of each arm in the table.
    """
    if titles and len(titles) != len(folders):
        raise UserError(f"--titles: {len(titles)} for {len(folders)} studies; give one of each")
    studies: dict[str, dict[str, Any]] = {}
    for index, folder in enumerate(folders):
        file = folder / "results.json"
        if not file.is_file():
            raise UserError(f"{folder} has no results.json; run a study with --out {folder}")
        results = json.loads(file.read_text())
        arms = {name: arm for name, arm in results["arms"].items() if not any(fnmatch(arm["arm"], w) for w in without)}
        title = titles[index] if titles else folder.name if folder.name not in studies else str(folder)
        before = studies.get(title, {"arms": {}})
        if twice := before["arms"].keys() & arms.keys():
            raise UserError(f"--titles {title}: {folder} has {min(twice)} too; give it a title of its own")
        controls = {**before.get("controls", {}), **results.get("controls", {})}
        studies[title] = {**results, "controls": controls, "arms": {**before["arms"], **arms}}
    refuse_mixtures(studies)
    out.mkdir(parents=True, exist_ok=True)
    summarise(out, studies, last)
    print(table(studies, last))


if __name__ == "__main__":
    try:
        tyro.cli(compare, description=__doc__)
    except UserError as error:
        sys.exit(f"compare: {error}")
