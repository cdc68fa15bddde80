"""The notebooks run from their first cell to their last, as Jupyter runs them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jupytext
import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

DOCS = Path(__file__).parents[2] / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.py"))
SMALLER = {"IMAGES, STEPS = 200, 400": "IMAGES, STEPS = 40, 4"}


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelManager]:
    """One for all, since it imports PyTorch."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(tmp_path_factory.mktemp("notebooks")))
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs(file: Path, kernel: KernelManager) -> None:
    text = file.read_text()
    for large, small in SMALLER.items():
        text = text.replace(large, small)
    notebook = jupytext.reads(text, fmt="py:percent")
    nbformat.validate(notebook)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = f"%reset -f\n{first.source}"  # Names that another notebook has left.
    NotebookClient(notebook, km=kernel, timeout=300).execute()
    shown = {kind for cell in notebook.cells for output in cell.get("outputs", ()) for kind in output.get("data", ())}
    assert {"text/html", "image/png"} & shown


def test_a_notebook_is_what_a_page_links_to() -> None:
    pages = "".join(page.read_text() for page in DOCS.glob("*.md"))
    assert {notebook.stem for notebook in NOTEBOOKS} == {"start", "edit", "study"}
    assert all(f"](notebooks/{notebook.name})" in pages for notebook in NOTEBOOKS)
    assert all(large in (DOCS / "notebooks/study.py").read_text() for large in SMALLER)
