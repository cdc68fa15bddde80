"""What one visitor of the studio has: the image at hand, those before it, and what was drawn."""

from __future__ import annotations

import shutil
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from reglue.app.work import Work
from reglue.errors import UserError

MOST_BEFORE = 50
"""Images that `undo` can go back over."""


@dataclass
class Visitor:
    """The state of one page in one browser; all files are in a folder of its own."""

    folder: Path
    images: list[Path] = field(default_factory=list[Path])
    """The image at hand is the last one; those before it are what `undo` goes back to."""
    other: Path | None = None
    """Another image, of which map or class token are taken."""
    drawn: list[Image.Image] = field(default_factory=list[Image.Image])
    """What the Draw tab shows, in its order."""
    edits: list[Image.Image] = field(default_factory=list[Image.Image])
    """What the Edit tab shows."""
    samples: dict[str, dict[int, list[Image.Image]]] = field(default_factory=dict[str, dict[int, list[Image.Image]]])
    """What the Watch tab has drawn: by the run's title and the checkpoint's step."""
    works: dict[str, list[Work]] = field(default_factory=lambda: defaultdict[str, list[Work]](list))
    """What is being done or waits, by the tab that asked for it."""
    written: int = 0
    """Files so far."""

    @property
    def image(self) -> Path | None:
        """The image at hand; None at first."""
        return self.images[-1] if self.images else None

    def open(self) -> Image.Image:
        """The image at hand. Raises UserError if there is none."""
        if self.image is None:
            raise UserError("no image yet; drop one, or click one that you have drawn")
        with Image.open(self.image, formats=["PNG"]) as opened:
            return opened.convert("RGB")

    def take(self, image: Image.Image) -> Path:
        """Make an image the one at hand."""
        self.images = [*self.images[-MOST_BEFORE:], self.write(image, "image")]
        return self.images[-1]

    def undo(self) -> None:
        """Go back to the image before."""
        if len(self.images) > 1:
            self.images.pop()

    def write(self, image: Image.Image, name: str) -> Path:
        """Write an image as a file that a command line can name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.written += 1
        file = self.folder / f"{name}-{self.written:03d}.png"
        image.save(file)
        return file

    def stop(self, *tabs: str) -> None:
        """End the work of these tabs, or of all."""
        for tab in tabs or [*self.works]:
            for work in [*self.works[tab]]:
                work.stop()

    def leave(self) -> None:
        """End all work, and remove all files."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
