"""The options of `reglue sample`."""

from __future__ import annotations

from dataclasses import dataclass

from reglue.names import PAGE
from reglue.options import ready
from reglue.sampling import Draw


@dataclass(frozen=True)
class Sample(Draw):
    """Draw images from a run. Image i depends on the seed and i alone; the same command again draws what is missing."""

    @property
    def written(self) -> str:
        """The last line: see `options`."""
        line = ready(self.out, "evaluate", self.out, "--reference", "STORE")
        return line if self.out.suffix.lower() == ".npz" else f"{line} (look at {self.out / PAGE})"
