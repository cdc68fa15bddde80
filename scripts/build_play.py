"""Builds the page that draws and redraws pictures in a browser: docs/play with a model and ONNX Runtime beside it.

    python scripts/build_play.py --out site/play
    python -m http.server --directory site

Needs npm, which brings onnxruntime-web; the page itself fetches nothing from elsewhere.
"""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from reglue.commands.export_run import export_run
from reglue.names import GraphPrecision
from reglue.options.export_run import ExportRun

PAGE = Path(__file__).parents[1] / "docs" / "play"
RUNTIME = "onnxruntime-web@1.30.0"
FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


@dataclass(frozen=True)
class Build:
    """Build the page."""

    out: Path
    """The folder; it is replaced."""
    model: Path = Path("starter")
    """Folder of a run, or starter."""
    precision: GraphPrecision = "float32"
    """Of its graphs."""


def build(options: Build) -> Path:
    """Write the page. Returns its folder."""
    shutil.rmtree(options.out, ignore_errors=True)
    shutil.copytree(PAGE, options.out)
    with tempfile.TemporaryDirectory() as folder:
        packed = subprocess.run(["npm", "pack", "--silent", RUNTIME], cwd=folder, check=True, capture_output=True)
        with tarfile.open(Path(folder) / packed.stdout.decode().strip()) as archive:
            archive.extractall(folder, filter="data")
        (options.out / "ort").mkdir()
        for name in FILES:
            shutil.copy(Path(folder) / "package" / "dist" / name, options.out / "ort")
    export_run(ExportRun(options.model, options.out / "model", "onnx", options.precision))
    return options.out


if __name__ == "__main__":
    build(tyro.cli(Build))
