"""Runs within other programs: as a pipeline of diffusers, as nodes of ComfyUI."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from reglue.errors import UserError, one_line
from reglue.files import parse_json, read_json
from reglue.run import RunRecord

INDEX, TRANSFORMER, CONFIG, CODE = "model_index.json", "transformer", "config.json", "pipeline.py"
"""In the folder of a pipeline: what its parts are, the part that has the run's record in its configuration, and what
diffusers takes the class from."""
NODES = "__init__.py"
"""In the folder of a run: what ComfyUI takes nodes from."""
REMEDY = "export the run again"


def template(name: str) -> str:
    """The text of a file that goes into a folder as it is."""
    return (resources.files("reglue.portable") / "templates" / name).read_text(encoding="utf-8")


def record_of(config: dict[str, Any]) -> RunRecord:
    """The record in the configuration of a pipeline's transformer. Raises ValueError, KeyError if there is none."""
    return parse_json(json.dumps(config["record"]), RunRecord)


def pipeline_record(folder: Path) -> tuple[RunRecord, int]:
    """The record and the step of the run in a folder of a pipeline. Raises UserError for another one's, or damage."""
    if TRANSFORMER not in read_json(folder / INDEX, dict[str, Any], REMEDY):
        raise UserError(f"{folder} is a pipeline of diffusers that was made of no run")
    file = folder / TRANSFORMER / CONFIG
    config = read_json(file, dict[str, Any], REMEDY)
    try:
        return record_of(config), int(config["step"])
    except (UserError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} has no record of a run ({one_line(error)}); {REMEDY}") from error
