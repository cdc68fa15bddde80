"""`reglue sample`: a run to images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reglue.samples import Draw, write_samples
from reglue.training.watchdog import watchdog


@dataclass(frozen=True)
class Sample(Draw):
    """Draw images from a run. Image i depends on the seed and i alone; the same command again draws what is missing."""


@watchdog
def sample(options: Sample) -> Path:
    """Draw the images. Returns where they are. Raises UserError as `write_samples`."""
    return write_samples(options)
