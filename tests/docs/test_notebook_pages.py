"""The notebooks run from their first cell to their last, as text here and as notebooks where Jupyter is installed."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.py"))
JUPYTER = all(map(find_spec, ("jupytext", "nbclient", "ipykernel")))
SMALLER = {"IMAGES, STEPS = 200, 400": "IMAGES, STEPS = 40, 4"}


def smaller(notebook: Path) -> str:
    text = notebook.read_text()
    for large, small in SMALLER.items():
        text = text.replace(large, small)
    return text


def cells(text: str) -> list[str]:
    """The code of a percent script, cell by cell."""
    parts = re.split(r"^# %%(.*)$", text, flags=re.MULTILINE)[1:]
    return [code for mark, code in zip(parts[::2], parts[1::2], strict=True) if "[markdown]" not in mark]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = smaller(notebook)
    if JUPYTER:
        notebook_of, client = import_module("jupytext").reads, import_module("nbclient").NotebookClient
        client(notebook_of(text, fmt="py:percent"), timeout=120, kernel_name="python3").execute()
        return
    names: dict[str, Any] = {}
    for i, cell in enumerate(cells(text)):
        exec(compile(cell, f"{notebook.name}, cell {i}", "exec"), names)


def test_a_notebook_is_what_a_page_links_to() -> None:
    pages = "".join(page.read_text() for page in DOCS.glob("*.md"))
    assert {notebook.stem for notebook in NOTEBOOKS} == {"start", "edit", "study"}
    assert all(f"](notebooks/{notebook.name})" in pages for notebook in NOTEBOOKS)
    assert all(large in (DOCS / "notebooks/study.py").read_text() for large in SMALLER)
