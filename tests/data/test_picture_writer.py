"""Pictures are written in the background: whole, several at the same time, and not too many ahead."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reglue.data import picture_writer as pictures
from reglue.data.picture_writer import WAITING, PictureWriter
from reglue.errors import UserError


def batch(number: int) -> torch.Tensor:
    return torch.full((2, 4, 4, 3), number, dtype=torch.uint8)


def files(folder: Path, number: int) -> list[Path]:
    return [folder / f"{number}-{i}.png" for i in range(2)]


def test_every_picture_is_there_when_the_block_ends(tmp_path: Path) -> None:
    with PictureWriter() as writer:
        for number in range(7):
            writer.write(files(tmp_path, number), batch(number))
    for number in range(7):
        for file in files(tmp_path, number):
            assert np.array_equal(np.asarray(Image.open(file)), batch(number)[0].numpy())


def test_drawing_goes_on_while_pictures_are_written_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, handed_over = threading.Event(), []
    original = pictures._write
    monkeypatch.setattr(pictures, "_write", lambda *arguments: (may_write.wait(30), original(*arguments)))
    everything = threading.Event()

    def draw() -> None:
        with PictureWriter() as writer:
            for number in range(WAITING + 3):
                writer.write(files(tmp_path, number), batch(number))
                handed_over.append(number)
                if number == WAITING - 1:
                    everything.set()

    drawing = threading.Thread(target=draw)
    drawing.start()
    assert everything.wait(30)
    drawing.join(0.3)  # it is stuck with the next one, and would have ended otherwise
    assert drawing.is_alive()
    assert len(handed_over) == WAITING
    may_write.set()
    drawing.join(30)
    assert len(list(tmp_path.glob("*.png"))) == 2 * (WAITING + 3)


def test_pictures_of_a_batch_are_written_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, together = pictures._write, threading.Barrier(2, timeout=30)
    monkeypatch.setattr(pictures, "_write", lambda *arguments: (together.wait(), original(*arguments)))
    with PictureWriter(threads=2) as writer:
        writer.write(files(tmp_path, 0), batch(0))
    assert sorted(tmp_path.iterdir()) == files(tmp_path, 0)


def test_an_error_with_one_picture_of_a_batch_is_not_lost(tmp_path: Path) -> None:
    two = [files(tmp_path, 0)[0], tmp_path / "missing" / "1.png"]
    with pytest.raises(UserError, match=r"cannot write .*missing"), PictureWriter() as writer:
        writer.write(two, batch(0))
    assert list(tmp_path.iterdir()) == two[:1]


def test_an_error_stops_the_drawing(tmp_path: Path) -> None:
    drawn: list[int] = []

    def draw() -> None:
        with PictureWriter() as writer:
            for number in range(100):
                writer.write(files(tmp_path / "missing", number), batch(number))
                drawn.append(number)

    with pytest.raises(UserError, match=r"cannot write .*missing"):
        draw()
    assert len(drawn) <= WAITING + 1


def test_an_error_with_the_last_batch_is_not_lost(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*missing"), PictureWriter() as writer:
        writer.write(files(tmp_path / "missing", 0), batch(0))


def test_an_interruption_is_told_once_what_is_being_written_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = pictures._write
    monkeypatch.setattr(pictures, "_write", lambda *arguments: (time.sleep(0.3), original(*arguments)))

    def draw() -> None:
        with PictureWriter(threads=1) as writer:
            for number in range(WAITING):
                writer.write(files(tmp_path, number), batch(number))
            time.sleep(0.1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw()
    assert sorted(tmp_path.iterdir()) == files(tmp_path, 0)
    assert not any("pictures" in thread.name for thread in threading.enumerate())
