"""Metrics of a run as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reglue.files import read_jsonl, replacing

FILE = "metrics.jsonl"


class MetricsLog:
    """Appends to `metrics.jsonl`, one object per logged step."""

    def __init__(self, run: Path, after_step: int) -> None:
        """Continue the log of a run after a step: later lines are of work that was lost, and will be done again."""
        self.path = run / FILE
        if self.path.is_file():
            kept = [line for line in read(run) if line.get("step", 0) <= after_step]
            with replacing(self.path) as beside:
                beside.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(self, **values: Any) -> None:
        """Append one line."""
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")


def read(run: Path) -> list[dict[str, Any]]:
    """All lines of a run's log, as `read_jsonl` reads them."""
    return read_jsonl(run / FILE, dict[str, Any], "mend that line, or delete it")
