"""Folders are filled whole or not at all, wherever the command is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from reglue.errors import UserError
from reglue.files import new_folder


def fill(path: Path) -> None:
    with new_folder(path) as folder:
        (folder / "weights").write_text("1")
        (folder / "parts").mkdir()
        (folder / "parts" / "one").write_text("2")


@pytest.mark.parametrize("out", [".", "out", "missing/out", "../here/out", "../here"])
def test_a_folder_is_filled_from_wherever_one_is(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    fill(Path(out))
    assert sorted(part.name for part in (here / out).iterdir()) == ["parts", "weights"]
    assert (Path(out) / "parts" / "one").read_text() == "2", "as seen from here"
    assert [path.name for path in tmp_path.rglob("*.tmp")] == []
    with pytest.raises(UserError, match="holds other files"):
        fill(Path(out))


def test_an_empty_folder_behind_a_link_is_filled(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    fill(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "weights").is_file()


def test_nothing_is_left_of_what_ends_badly(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        with new_folder(folder) as beside:
            (beside / "weights").write_text("1")
            raise UserError("a mistake")

    with pytest.raises(UserError, match="a mistake"):
        fail(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
