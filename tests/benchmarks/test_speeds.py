"""The benchmarks of reads, of `prepare` and of resolutions run, and end with one line of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def figures_of(name: str, *arguments: str | Path) -> Any:
    ran = subprocess.run(
        [sys.executable, FOLDER / name, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    line = json.loads(ran.stdout.splitlines()[-1])
    assert line.keys() == {"benchmark", "figures", "options", "hardware", "versions", "date"}
    return line["figures"]


def test_reads_of_a_store(tiny_store: Path) -> None:
    sizes = ["--images", "30", "--batch-sizes", "5", "--columns", "latent", "features", "--processes", "2"]
    figures = figures_of("store_reads.py", "--store", tiny_store, *sizes)
    assert [(read["column"], read["cache"]) for read in figures["reads"]] == [
        ("latent", "cold"), ("latent", "warm"), ("features", "cold"), ("features", "warm"),
    ]  # fmt: skip
    assert [read["bytes_per_image"] for read in figures["reads"]] == [2 * 4 * 3 * 8 * 8] * 2 + [2 * 16 * 4 * 4] * 2
    # DiT's paper counts 23.0 G multiplications and additions for B/2; training takes six times as many operations.
    assert figures["needs"]["sit"]["training_gflop_per_image"] == pytest.approx(6 * 23.0, rel=0.01)


def test_the_speed_of_prepare(tiny_images: Path, tiny_encoder: str, tiny_autoencoder: str) -> None:
    networks = ["--autoencoder", tiny_autoencoder, "--encoder", tiny_encoder, "--resolution", "16"]
    figures = figures_of(
        "prepare.py", tiny_images, *networks, "--count", "8", "--turns", "1", "--workers", "0", "--device", "cpu"
    )
    assert 0 < figures["per_batch_size"]["16"]["share_of_bare_by_core"] <= 1.5


def test_the_cost_of_resolutions() -> None:
    sizes = ["--model", "2x32x2/2", "--timed", "2x32x2/2", "--resolutions", "16", "16", "16", "32"]
    square, oblong = figures_of("resolutions.py", *sizes, "--precision", "float32", "--recipe", "sit")
    assert (square["tokens"], oblong["tokens"]) == (1, 2)
    assert oblong["forward_gflop"] > square["forward_gflop"]
    assert oblong["activation_mib"] > 1.5 * square["activation_mib"] > 0
