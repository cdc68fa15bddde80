"""`reglue edit`: images that share with given ones what is asked."""

from __future__ import annotations

from pathlib import Path

from reglue.editing.folder import write_edits
from reglue.options.edit import Edit
from reglue.training.watchdog import watchdog


@watchdog
def edit(options: Edit) -> Path:
    """Draw the edits. Returns their folder. Raises UserError as `write_edits`."""
    return write_edits(options)
