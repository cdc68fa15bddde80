"""The benchmarks at toy size: what they say is complete, and what they count is right.

With REGLUE_OFFICIAL naming a checkout of the published code (and accelerate importable), ours is compared with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

import against_official
import gpu_session
from common import Comparison, alternate, ratio
from comparisons.compressing import features, growth
from comparisons.compressing import ours as streamed
from counting import forward_flops, training_flops
from evaluate_speed import EvaluateSpeed
from limits import Limits, Operators, limits
from prepare_speed import PrepareSpeed
from reglue.diffusion.denoiser import Denoiser
from reglue.runs import networks, noise, ranks
from store_reads import StoreReads
from train_speed import TrainSpeed
from workloads import RandomOnline, Workload

OFFICIAL = os.environ.get("REGLUE_OFFICIAL")
needs_official = pytest.mark.skipif(OFFICIAL is None, reason="REGLUE_OFFICIAL names no checkout of the published code")
KEYS = {"benchmark", "figures", "options", "toy", "hardware", "versions", "commit", "official_commit", "date"}
FIGURES = {
    "train": {"seconds_per_call", "flops_per_step", "matrix_flops_per_second", "share_of_matrix_rate", "batch_size"},
    "sample": {"seconds_per_call", "seconds_of_pictures", "network_evaluations_per_image", "flops_per_evaluation"},
    "prepare": {"images", "ours_images_per_second"},
    "compressor": {"ours", "theirs", "bytes_per_image", "published_gigabytes_of_features"},
    "checkpoint": {"save_seconds", "load_seconds", "bytes"},
    "startup": {"seconds"},
}


@pytest.mark.parametrize("benchmark", FIGURES)
def test_a_benchmark_ends_with_a_line_of_json(
    benchmark: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "line.json"
    line = against_official.main([benchmark, "--toy", "--device", "cpu", "--repeats", "1", "--out", str(out)])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads(line) == json.loads(out.read_text())
    assert printed.keys() == KEYS
    assert printed["benchmark"] == benchmark
    assert printed["official_commit"] is None
    assert FIGURES[benchmark] <= printed["figures"].keys()


def test_an_encoder_in_the_step_is_run_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    tokens = RandomOnline.tokens
    monkeypatch.setattr(RandomOnline, "tokens", lambda self, read: (calls.append(1), tokens(self, read))[1])
    against_official.main(["train", "--toy", "--device", "cpu", "--repeats", "3", "--encoder-in-step"])
    assert len(calls) == 4  # one step to warm up


def test_guidance_evaluates_twice_within_its_interval_alone() -> None:
    """Five steps at 1, 0.76, 0.52, 0.28, 0.04; guided up to 0.9, so that all but the first count twice."""
    line = json.loads(against_official.main(["sample", "--toy", "--device", "cpu", "--repeats", "1"]))
    assert line["figures"]["network_evaluations_per_image"] == {"ours bfloat16": 9}


def test_the_sampler_that_is_timed_is_that_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job's noise, its weights in bfloat16, its way to compile: nothing of them is the benchmark's own."""
    called: list[str] = []

    def noted(name: str, original: Any, *arguments: Any, **options: Any) -> Any:
        called.append(name)
        return original(*arguments, **options)

    for module, name in ((ranks, "compiled"), (noise, "normals"), (networks, "with_products_in")):
        monkeypatch.setattr(module, name, partial(noted, name, getattr(module, name)))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # The real one takes minutes.
    against_official.main(["sample", "--toy", "--device", "cpu", "--repeats", "1", "--compile", "model"])
    assert (called.count("compiled"), called.count("with_products_in")) == (1, 1)
    assert called.count("normals") == 2 * 5 * 3 * 2  # two calls of five steps, for three modalities of two images


def test_contestants_take_turns() -> None:
    calls: list[str] = []
    timed = alternate(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, torch.device("cpu"), warmup=1
    )
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert timed["a"].repeats == 2
    assert timed["a"].minimum <= timed["a"].median
    assert ratio(timed["a"], timed["a"], torch.device("cpu")) == pytest.approx(1)


def test_operations_are_those_of_the_layers() -> None:
    """A forward pass of linear layers on N tokens is 2·N·weights; attention adds 4·N²·width per block."""
    workload = Workload.of("toy")
    config = workload.config
    patches = config.token_grid[0] * config.token_grid[1]
    expected = 4 * (1 + patches) ** 2 * config.width * config.depth
    for name, weight in Denoiser(config).named_parameters():
        if weight.ndim == 1 or name.startswith(("projector", "transformer.label_embedding")):
            continue  # biases; training alone; a table
        if ".attention." in name or ".mlp." in name:
            times = 1 + patches
        else:
            times = patches if name.startswith(("patches", "velocity")) else 1
        expected += 2 * times * weight.numel()
    assert forward_flops(config) == expected
    assert training_flops(config) > 3 * expected


def test_operators_and_fetched_numbers_are_counted() -> None:
    x = torch.ones(3)
    with Operators() as seen:
        (x * 2).view(3, 1).sum().item()
    assert (seen.count, seen.fetched) == (3, 1)  # multiply, sum, fetch


def test_limits_count_our_step(capsys: pytest.CaptureFixture[str]) -> None:
    line = json.loads(limits(Limits(Comparison(toy=True))))
    capsys.readouterr()
    assert line["figures"]["operators"]["ours"]["numbers_fetched"] == 0
    assert line["figures"]["toy"]["flops_per_step"] > 0


def test_streamed_statistics_do_not_grow_with_the_images() -> None:
    """The features of the images that are added take 48 MiB; everything else is warm after the first run."""
    per_image = 192 * 16 * 16 * 4
    growth(streamed, 16, 192, 16)
    few, many = (growth(streamed, count, 192, 16) for count in (64, 320))
    assert sum(part.numel() * 4 for part in features(256, 192, 16)) == 256 * per_image
    assert (many - few) * 2**20 < 0.5 * 256 * per_image


def test_a_session_continues_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = [f for f in gpu_session.FIGURES if f.name in ("train-b2", "checkpoint-b2")]
    monkeypatch.setattr(gpu_session, "FIGURES", figures)
    (tmp_path / "train-b2.json").write_text("measured before")
    (tmp_path / "checkpoint-b2.error").write_text("failed before")
    no_time = gpu_session.Session(tmp_path, device="cpu", seconds=-1, toy=True)
    assert gpu_session.session(no_time) == 1
    assert gpu_session.session(gpu_session.Session(tmp_path, device="cpu", toy=True)) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"train-b2.json", "checkpoint-b2.json"}
    assert (tmp_path / "train-b2.json").read_text() == "measured before"
    assert json.loads((tmp_path / "checkpoint-b2.json").read_text())["toy"]


def test_a_failed_figure_leaves_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = gpu_session.Figure("broken", (gpu_session.OFFICIAL, "no-such-benchmark"), 1)
    monkeypatch.setattr(gpu_session, "FIGURES", [figure])
    assert gpu_session.session(gpu_session.Session(tmp_path, device="cpu", toy=True)) == 1
    assert (tmp_path / "broken.error").read_text().startswith("exit code 2\n")


def test_every_figure_of_a_session_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    replaced = {name: (kind, lambda o: parsed.append(o) or "") for name, (kind, _) in against_official.COMMANDS.items()}
    monkeypatch.setattr(against_official, "COMMANDS", replaced)
    others = {
        "train_speed.py": TrainSpeed,
        "prepare_speed.py": PrepareSpeed,
        "store_reads.py": StoreReads,
        "evaluate_speed.py": EvaluateSpeed,
    }
    for options in (gpu_session.Session(tmp_path, images=tmp_path), gpu_session.Session(tmp_path, toy=True)):
        for figure in gpu_session.FIGURES:
            script, *arguments = gpu_session.command_of(figure, options)
            if Path(script).name == gpu_session.OFFICIAL:
                against_official.main([*arguments, "--out", str(tmp_path)])
            else:
                tyro.cli(others[Path(script).name], args=[*arguments, "--out", str(tmp_path)])
    assert len(parsed) == 2 * sum(figure.arguments[0] == gpu_session.OFFICIAL for figure in gpu_session.FIGURES)
    assert parsed[0].official_precision == "fp16"
    assert parsed[0].compile == ("no", "blocks", "model")


def test_a_folder_without_the_published_code_is_named(tmp_path: Path) -> None:
    script = Path(against_official.__file__)
    command = [sys.executable, str(script), "sample", "--toy", "--device", "cpu", "--official", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(f"against_official: --official {tmp_path}: ")
    assert len(result.stderr.splitlines()) == 1


@needs_official
@pytest.mark.parametrize(("benchmark", "figure"), [("train", "loss_difference"), ("sample", "sample_difference")])
def test_ours_and_theirs_compute_the_same(benchmark: str, figure: str) -> None:
    arguments = [benchmark, "--toy", "--device", "cpu", "--repeats", "1", "--official", str(OFFICIAL)]
    figures = json.loads(against_official.main(arguments))["figures"]
    assert figures[figure] < 1e-5
    assert figures["times_faster"]
