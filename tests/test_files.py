"""Folders are filled whole or not at all, wherever the command is run; files are read strictly."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from reglue.errors import UserError, refused_by_system
from reglue.files import BESIDE, new_folder, parse_json, read_json, read_jsonl, read_network, to_json


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
    assert [path.name for path in tmp_path.rglob(f"*{BESIDE}")] == []
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


@dataclass(frozen=True)
class Part:
    share: float | None
    count: int | Literal["all"] = "all"
    place: Path | None = None


@dataclass(frozen=True)
class Whole:
    number: int
    names: tuple[str, ...]
    parts: dict[str, Part]
    size: tuple[int, int] | None = None
    flag: bool = False
    kind: Literal["a", "b"] = "a"


WHOLE = Whole(1, ("a", "b"), {"one": Part(1.0, 3, Path("x")), "two": Part(None)}, (2, 3), True, "b")


def test_what_is_written_as_json_comes_back() -> None:
    assert parse_json(to_json(WHOLE), Whole) == WHOLE
    assert parse_json(b'{"number": 1, "names": [], "parts": {"one": {"share": 2}}}', Whole).parts == {"one": Part(2.0)}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ('"number": 2.0', "expected int @ $.number"),
        ('"number": true', "expected int @ $.number"),
        ('"number": "1"', "expected int @ $.number"),
        ('"number": 9223372036854775808', "is not a 64-bit integer"),
        ('"number": ' + "1" * 5000, ""),
        ('"number": NaN', "NaN is not a finite number"),
        ('"number": -1e999', "-1e999 is not a finite number"),
        ('"names": "text"', "expected tuple @ $.names"),
        ('"names": [3]', "$.names"),
        ('"names": ["a\\u0000"]', "$.names"),
        ('"names": {"a": 1}', "expected tuple @ $.names"),
        ('"parts": []', "expected dict @ $.parts"),
        ('"parts": {"one": {"share": true}}', "@ $.parts['one'].share"),
        ('"parts": {"one": {"share": 1, "count": 1.5}}', "@ $.parts['one'].count"),
        ('"parts": {"one": {"share": 1, "place": 3}}', "@ $.parts['one'].place"),
        ('"parts": {"one": {"share": 1, "unknown": 3}}', "extra fields found (unknown) @ $.parts['one']"),
        ('"size": [1]', "@ $.size"),
        ('"size": [1, 2, 3]', "@ $.size"),
        ('"flag": 1', "expected bool @ $.flag"),
        ('"kind": "c"', "@ $.kind"),
        ('"kind": []', "@ $.kind"),
        ('"unknown": 1', "extra fields found (unknown) @ $"),
    ],
)
def test_json_of_anything_else_is_refused_with_the_place(changed: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "whole.json"
    file.write_text('{"number": 1, "names": [], "parts": {}, ' + changed + "}")
    with pytest.raises(UserError) as raised:
        read_json(file, Whole, "write it again")
    message = str(raised.value)
    assert message.startswith(f"{file} is damaged (")
    assert message.endswith("); write it again")
    assert told in message
    assert len(message.splitlines()) == 1


def test_a_missing_field_and_a_missing_file_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "whole.json"
    with pytest.raises(UserError, match=r"whole\.json is missing; write it again"):
        read_json(file, Whole, "write it again")
    file.write_text("{}")
    with pytest.raises(UserError, match=r"required field missing @ \$\.number"):
        read_json(file, Whole, "write it again")


def test_a_log_may_end_in_the_middle_of_a_line_and_nowhere_else(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"

    def read(remedy: str | None = "mend it") -> list[dict[str, Any]]:
        return read_jsonl(file, dict[str, Any], remedy)

    assert read() == []
    file.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert read() == [{"a": 1}, {"a": 2}]
    file.write_bytes(b'{"a": 1}\n\xff\n{"a": 3}\n')
    with pytest.raises(UserError, match=r"log\.jsonl is damaged \(line 2: .*\); mend it$"):
        read()
    assert read(remedy=None) == [{"a": 1}, {"a": 3}]


def test_a_network_is_built_without_memory_and_keeps_its_precision(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    expected = nn.Linear(2, 3)
    save_file({name: tensor.double() for name, tensor in expected.state_dict().items()}, file)
    network = read_network(lambda: nn.Linear(2, 3), file, "fetch it")
    file.write_bytes(b"x" * file.stat().st_size)  # Nothing of the network lies in the file.
    assert network.weight.dtype == torch.float32
    assert network.weight.requires_grad
    assert torch.equal(network.weight, expected.weight)
    save_file(expected.state_dict(), file)
    for width in (5, 10**9, 10**18, -1):
        with pytest.raises(
            UserError, match=r"weights\.safetensors does not fit the network it should hold .*; fetch it"
        ):
            read_network(lambda width=width: nn.Linear(width, width), file, "fetch it")


def test_messages_of_copies_name_the_file_and_the_reason(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "file").symlink_to(tmp_path / "gone")
    (tmp_path / "from" / "other").symlink_to(tmp_path / "gone")
    with pytest.raises(shutil.Error) as caught:
        shutil.copytree(tmp_path / "from", tmp_path / "to")
    assert refused_by_system(caught.value) == f"cannot copy to {tmp_path}/to/file: No such file or directory"
    with pytest.raises(OSError) as other:  # noqa: PT011
        (tmp_path / "gone").read_text()
    assert refused_by_system(other.value) == f"{tmp_path}/gone: No such file or directory"
    assert refused_by_system(OSError(28, "No space left on device")) == "No space left on device"


def test_a_folder_that_cannot_be_filled_is_named(tmp_path: Path) -> None:
    def fill() -> None:
        with new_folder(tmp_path / "out"):
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=rf"^cannot write {tmp_path}/out: No space left on device; free some space"):
        fill()
