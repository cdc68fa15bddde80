"""`reglue sample`: a run to images."""

from __future__ import annotations

from pathlib import Path

from reglue.options.sample import Sample
from reglue.samples import write_samples
from reglue.training.watchdog import watchdog


@watchdog
def sample(options: Sample) -> Path:
    """Draw the images. Returns where they are. Raises UserError as `write_samples`."""
    return write_samples(options)
