"""The options of `reglue edit`."""

from __future__ import annotations

from dataclasses import dataclass

from reglue.editing.options import SHEET, DrawEdits


@dataclass(frozen=True)
class Edit(DrawEdits):
    """Edit images: some of what a run sees in them is held or replaced, and the rest is drawn anew to fit.

    Images are scaled and cropped as `reglue prepare` does, and results go back into the image, in its size. The same
    command again draws what is missing.
    """

    @property
    def written(self) -> str:
        """The last line: see `options`."""
        return f"edits are in {self.out}; look at {self.out / SHEET}"
