"""The wheel: what is in it, and that it runs where there is nothing else of the project."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
LARGEST = 30e6
"""Bytes of the wheel, most of which are the starter kit's weights."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=PROJECT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_it_holds_the_package_and_its_licences_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    package = PROJECT / "src" / "reglue"
    expected = {
        f"reglue/{path.relative_to(package)}"
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if name.startswith("reglue/")} == expected
    others = [name.partition("/")[2] for name in names if not name.startswith("reglue/")]
    assert {"METADATA", "licenses/LICENSE", "licenses/LICENSES/Apache-2.0.txt"} <= {*others}
    assert "reglue/py.typed" in names
    assert wheel.stat().st_size < LARGEST


def test_it_runs_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    script = (
        "import sys, reglue; assert 'installed' in reglue.__file__, reglue.__file__\n"
        "from reglue.cli import main; sys.argv = ['reglue', *sys.argv[1:]]; main()"
    )

    def reglue(*arguments: str) -> str:
        command = [sys.executable, "-c", script, *arguments]
        return subprocess.run(
            command, cwd=elsewhere, env=environment, check=True, capture_output=True, text=True
        ).stdout

    assert "train" in reglue("--help")
    reglue("sample", "starter", "--out", "clothes", "--count", "2", "--steps", "2")
    assert len([*(elsewhere / "clothes").rglob("*.png")]) == 2


def test_the_image_is_built_from_what_the_wheel_needs() -> None:
    lines = (PROJECT / "Dockerfile").read_text().splitlines()
    copied = {
        name for line in lines if line.startswith("COPY ") and "--from" not in line for name in line.split()[1:-1]
    }
    assert copied == {"pyproject.toml", "README.md", "LICENSE", "LICENSES", "src"}
    sent = {line[1:] for line in (PROJECT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert sent == copied
    *_, user, _, entry, _ = lines
    assert (user, entry) == ("USER 1000", 'ENTRYPOINT ["reglue"]')
