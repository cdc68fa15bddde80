"""The options of `reglue info`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from reglue.errors import UserError, option
from reglue.files import TakesPaths

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Info(TakesPaths):
    """Say what a folder or file is: counts, sizes, where it came from; and show some of it as one picture."""

    path: Positional[Path]
    """A run, store, autoencoder, head, prototypes, samples, edits, an .npz archive or a published checkpoint; or
    OWNER/NAME of a run on the Hugging Face hub, starter or flowers of this package."""
    out: Path | None = None
    """Picture to write of what is in it: .png, .jpg or .webp."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out and self.out.suffix.lower() not in PICTURES:
            raise UserError(f"{option('out')} {self.out}: name a picture that ends in {', '.join(PICTURES)}")

    @property
    def written(self) -> str:
        """The last line: see `options`."""
        return f"{self.out} shows some of it" if self.out else ""
