"""The options of `reglue sample`."""

from __future__ import annotations

from dataclasses import dataclass

from reglue.sampling import Draw


@dataclass(frozen=True)
class Sample(Draw):
    """Draw images from a run. Image i depends on the seed and i alone; the same command again draws what is missing."""
