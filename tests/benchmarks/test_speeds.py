"""The benchmarks of ours alone run, and end with one line of JSON."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import prepare_speed
from common import Timed, Timing
from counting import activation_bytes
from evaluate_speed import EvaluateSpeed
from evaluate_speed import main as evaluate_speed
from prepare_speed import PrepareSpeed
from reglue.commands.train import Train, train
from reglue.config import Optimisation
from reglue.data.batches import TrainingData, denoiser_config
from reglue.data.store import Store
from reglue.errors import UserError
from reglue.papers import RECIPES
from reglue.training.checkpoints import find
from resolutions import Resolutions, config_at
from scaling import Scaling
from scaling import main as scaling
from store_reads import Readers, StoreReads, Work
from store_reads import main as store_reads
from train_speed import TrainSpeed, mean_of
from train_speed import main as train_speed
from training_step import TrainingStep

FOLDER = Path(__file__).parents[2] / "benchmarks"


def figures_of(name: str, *arguments: str | Path) -> Any:
    ran = subprocess.run(
        [sys.executable, FOLDER / name, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    line = json.loads(ran.stdout.splitlines()[-1])
    assert line.keys() == {"benchmark", "figures", "options", "hardware", "versions", "commit", "date"}
    return line["figures"]


def test_reads_of_a_store(tiny_store: Path) -> None:
    sizes = ["--images", "30", "--batch-sizes", "5", "--columns", "latent", "features", "--processes", "2"]
    figures = figures_of("store_reads.py", "--store", tiny_store, *sizes)
    assert [(read["column"], read["cache"]) for read in figures["reads"]] == [
        ("latent", "cold"), ("latent", "warm"), ("features", "cold"), ("features", "warm"),
    ]  # fmt: skip
    assert [read["bytes_per_image"] for read in figures["reads"]] == [2 * 4 * 3 * 8 * 8] * 2 + [2 * 16 * 4 * 4] * 2
    recipes = ("sit", "repa", "redi", "reg", "reglue")
    reads = [(read["recipe"], read["cache"]) for read in figures["training"]]
    assert reads == [(recipe, cache) for recipe in recipes for cache in ("cold", "warm")]
    assert all(read["images_per_core_second"] > 0 for read in figures["training"])
    # DiT's paper counts 23.0 G multiplications and additions for B/2; training takes six times as many operations.
    assert figures["needs"]["sit"]["training_gflop_per_image"] == pytest.approx(6 * 23.0, rel=0.01)


def pins(work: Work, ready: Callable[[], object]) -> None:
    """Fails where a process cannot give pinned memory though its machine could."""
    ready()
    assert not torch.cuda._is_in_bad_fork()


def fails(work: Work, ready: Callable[[], object]) -> None:
    """The second of two fails while the first one waits for it."""
    if work.rows == [1]:
        raise OSError("no more memory")
    ready()


def dies(work: Work, ready: Callable[[], object]) -> None:
    """The last of three dies while the others wait for it."""
    if work.rows == [2]:
        os._exit(1)
    ready()


def test_processes_that_read_can_pin_memory_and_do_not_wait_for_one_that_failed(tiny_store: Path) -> None:
    torch._C._cuda_getDeviceCount()  # As imports do. A copy of this process could not pin memory any more.
    work = [Work(tiny_store, "latent", [row], 1, False, False) for row in range(3)]
    with Readers(3, 1) as readers:
        assert readers.together(pins, work[:1])[0] >= 0
        with pytest.raises(OSError, match="no more memory"):
            readers.together(fails, work[:2])
        with pytest.raises(BrokenProcessPool):
            readers.together(dies, work)


def test_memory_is_not_pinned_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--pinned"):
        store_reads(StoreReads(made=tmp_path / "store", pinned=True))


def test_the_speed_of_prepare(tiny_images: Path, tiny_encoder: str, tiny_autoencoder: str) -> None:
    networks = ["--autoencoder", tiny_autoencoder, "--encoder", tiny_encoder, "--resolution", "16"]
    figures = figures_of(
        "prepare_speed.py",
        "--images",
        tiny_images,
        *networks,
        "--count",
        "8",
        "--repeats",
        "1",
        "--workers",
        "0",
        "--device",
        "cpu",
    )
    assert 0 < figures["per_batch_size"]["16"]["share_of_bare_by_core"] <= 1.5


def test_what_prepare_runs_for_long_is_compared_with_networks_that_run_for_short(
    tiny_images: Path, tiny_encoder: str, tiny_autoencoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job on eight images, the bare networks on every other one of them."""
    seconds = {"autoencoder": 1.0, "encoder": 1.0, "describe": 1.0, "job": 8.0}

    def timings(contestants: dict[str, Callable[[], object]], *_: Any) -> dict[str, Timing]:
        return {name: (call(), Timing(*[seconds[name]] * 4, repeats=1))[1] for name, call in contestants.items()}

    monkeypatch.setattr(prepare_speed, "BARE", 4)
    monkeypatch.setattr(prepare_speed, "alternate", timings)
    encoded = []
    describe = prepare_speed.job.describe
    noted = lambda pixels, *rest: (encoded.append(len(pixels)), describe(pixels, *rest))[1]  # noqa: E731
    monkeypatch.setattr(prepare_speed.job, "describe", noted)
    options = PrepareSpeed(tiny_images, 16, tiny_autoencoder, tiny_encoder, workers=0, count=8)
    figures = prepare_speed.measured(options, tiny_images, 4, torch.device("cpu"))
    assert encoded == [4, 4, 4, 4]  # describe; the job's two batches; the one that is written
    assert (figures["images_per_second"], figures["bare_images_per_second"]) == (1, 2)
    assert figures["share_of_bare_by_clock"] == 0.5


def test_the_cost_of_resolutions() -> None:
    sizes = ["--model", "2x32x2/2", "--timed", "2x32x2/2", "--resolutions", "16", "16", "16", "32"]
    square, oblong = figures_of("resolutions.py", *sizes, "--precision", "float32", "--recipe", "sit")["rows"]
    assert (square["tokens"], oblong["tokens"]) == (1, 2)
    assert oblong["forward_gflop"] > square["forward_gflop"]
    assert oblong["activation_mib"] > 1.5 * square["activation_mib"] > 0


@pytest.mark.parametrize("targets", ["cached", "int8", "decoded", "online"])
def test_the_speed_of_the_training_step(targets: str, capsys: pytest.CaptureFixture[str]) -> None:
    conditions = Timed(device="cpu", repeats=1)
    options = TrainSpeed(conditions, data="toy", batch_size=4, targets=targets, precision="float32", workers=0)  # type: ignore[reportArgumentType]
    figures = json.loads(train_speed(options))["figures"]
    capsys.readouterr()
    assert figures["images_per_second"] > 0
    assert (figures["flops_of_targets"] > 0) == (targets in ("decoded", "online"))
    # One layer of four holds 32 channels on 4×4; in 8 bits there are scales (float16) besides.
    bytes_of_features = {"cached": 4 * 32 * 16 * 2, "int8": 4 * 32 * (16 + 2)}
    assert figures["bytes_of_features_per_image"] == pytest.approx(bytes_of_features.get(targets, 0), rel=0.1)


def test_a_mean_tells_of_a_step_that_waited() -> None:
    """Every other step waits for its data, which the shortest step does not show."""
    waits = itertools.cycle([0.0, 0.1])
    assert mean_of(lambda: time.sleep(next(waits)), 4, torch.device("cpu")) >= 0.05


def test_a_step_is_that_of_the_job(tiny_store: Path, tmp_path: Path) -> None:
    """Three steps of the benchmarks' loop leave the weights and averages that `reglue train` leaves."""
    optimisation = Optimisation(steps=3, batch_size=4, learning_rate=1e-2, clip=1.0, ema=0.9)
    store = Store.open(tiny_store)
    recipe = replace(RECIPES["sit"], model="2x32x2/2", optimisation=optimisation)
    run = train(Train(recipe, tiny_store, tmp_path / "run", preview_every=0, device="cpu"))
    trained = load_file(find(run) / "model.safetensors")
    averaged = load_file(find(run) / "ema.safetensors")
    cpu = torch.device("cpu")
    data = TrainingData(store, recipe, denoiser_config(store, recipe), 0, cpu)
    step = TrainingStep(recipe, data.config, cpu, "float32")
    for first in (0, 4, 8):
        step(data.sample(range(first, first + 4)))
    for name, weight in step.model.state_dict().items():
        assert torch.equal(weight, trained[name]), name
        assert torch.equal(step.ema[name], averaged[name]), name


def test_the_cost_of_many_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    scaling(Scaling(gpus=(8,)))
    *tables, line = capsys.readouterr().out.splitlines()
    assert any(row.startswith("| XL/2 | 8 |") for row in tables)
    (model,) = [model for model in json.loads(line)["figures"]["models"] if model["name"] == "B/2"]
    # The other page that says what an image's activations take says the same.
    assert model["activations"] == activation_bytes(config_at(Resolutions(), "B/2", (256, 256)), "bfloat16")


def test_the_speed_of_evaluate(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate_speed(EvaluateSpeed(count=64, width=16, classes=8, resamples=10))
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    assert {"FID", "KID with its interval", "precision to coverage"} < figures["seconds"].keys()
