"""What the commands are asked for: a frozen dataclass each, read and refused before PyTorch is imported.

`written` is what the command line says at the end of a command: where the result is, and what may come next.
"""

from __future__ import annotations

import shlex
from pathlib import Path


def ready(result: Path, *then: str | Path) -> str:
    """The line for a result and for the words of a command that takes it."""
    return f"{shlex.quote(str(result))} is ready; next: {shlex.join(['reglue', *map(str, then)])}"
