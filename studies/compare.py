"""Sets finished studies side by side: one table, and plots with one kind of line per study.

    python studies/compare.py study-taef2 study-kl study-reals --out compared

Latent spaces differ in what their decoders can show, so read each study's own distance between arms first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tyro
from tyro.conf import Positional

from reglue.errors import UserError
from summary import summarise, table


def compare(folders: Positional[tuple[Path, ...]], out: Path) -> None:
    """Write the table and the plots of several studies into a folder.

    Args:
        folders: Folders of studies.
        out: Where table and plots go.
    """
    studies = {}
    for folder in folders:
        file = folder / "results.json"
        if not file.is_file():
            raise UserError(f"{folder} has no results.json; run a study with --out {folder}")
        studies[folder.name if folder.name not in studies else str(folder)] = json.loads(file.read_text())
    out.mkdir(parents=True, exist_ok=True)
    summarise(out, studies)
    print(table(studies))


if __name__ == "__main__":
    try:
        tyro.cli(compare, description=__doc__)
    except UserError as error:
        sys.exit(f"compare: {error}")
