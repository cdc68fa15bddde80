"""The documentation as a site: every page is in its navigation, every public name in its reference, no link is dead."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import reglue

PROJECT = Path(__file__).parents[2]
DOCS = PROJECT / "docs"
SETTINGS = PROJECT / "mkdocs.yml"


def pages(nav: Any) -> list[str]:
    """The files of a navigation, however deep."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages(part)]


def test_every_page_is_in_the_navigation_once() -> None:
    found = sorted(pages(yaml.safe_load(SETTINGS.read_text())["nav"]))
    assert found == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def test_the_reference_has_every_public_name() -> None:
    named = re.findall(r"^::: (\S+)$", (DOCS / "reference.md").read_text(), re.MULTILINE)
    public = {path.replace(":", ".") if ":" in path else f"{path}.{name}" for name, path in reglue._HOMES.items()}
    assert public <= {*named}
    for path in named:
        module, _, name = path.rpartition(".")
        assert hasattr(__import__(module, fromlist=[name]), name), path


@pytest.mark.skipif(not shutil.which("zensical", path=Path(sys.executable).parent), reason="zensical is not installed")
def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    shutil.copy(SETTINGS, tmp_path)
    shutil.copytree(DOCS, tmp_path / "docs")
    (tmp_path / "src").symlink_to(PROJECT / "src")
    command = [str(Path(sys.executable).parent / "zensical"), "build", "--strict"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "Train until the recipe" in (tmp_path / "site" / "reference.html").read_text()
    assert (tmp_path / "site" / "methods" / "reglue.html").is_file()
