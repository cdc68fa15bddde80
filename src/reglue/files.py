"""Writing files whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from reglue.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes the place of `path` when the block ends well.

    When the block raises, or the process dies, whatever was at `path` is still there, whole. Raises UserError when the
    file cannot be written, a full disk for example.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.touch()
        mode = beside.stat().st_mode
        yield beside
        beside.chmod(mode)  # safetensors makes files that only their owner may read; this one is as any other new file.
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        # safetensors wraps the system's error in its own, of which only the text is left.
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error).rpartition("error: ")[2]
        raise UserError(
            f"cannot write {path}: {reason}; free some space or choose another folder, and run it again"
        ) from error
    finally:
        beside.unlink(missing_ok=True)
