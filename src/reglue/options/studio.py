"""The options of `reglue studio`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from reglue.errors import require
from reglue.files import TakesPaths


@dataclass(frozen=True)
class Studio(TakesPaths):
    """See, draw, edit and watch in the browser: one page on this machine, for one run or for several side by side.

    Nothing is written but to a temporary folder, which is removed in the end.
    """

    runs: Positional[tuple[str, ...]] = ("starter",)
    """Folders of runs, OWNER/NAME of some on the Hugging Face hub, starter or flowers of this package. One
    that trains need not have a checkpoint yet."""
    heads: tuple[Path, ...] = ()
    """Heads to lay over images: folders that `reglue head` made, or files of DINOv2's."""
    prototypes: Path | None = None
    """Classes to paint with: a folder that `reglue prototypes` made."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything but this machine's own asks for a password."""
    port: int | None = None
    """Port to listen on. Default: the first one that is free from 7860."""
    password: str | None = None
    """Name of an environment variable that holds the password. Default: a new one is printed, where one is asked
    for."""
    browser: bool = True
    """Open the page in a browser."""
    device: str = "auto"
    """auto, cpu or cuda."""

    written = ""  # The command itself says where the page is.

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "port", at_least=1, at_most=65535)
        if not self.runs:
            object.__setattr__(self, "runs", ("starter",))
