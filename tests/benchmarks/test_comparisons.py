"""The benchmarks at toy size: what they say is complete, and what they count is right.

With REGLUE_OFFICIAL naming a checkout of the published code (and accelerate importable), ours is compared with it; with
REGLUE_OFFICIAL_SIT, with SiT's own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

import against_official
import common
import gpu_session
import workloads
from common import Comparison, Timing, alternate, matrix_rate, measured, ratio
from comparisons import preparing, training
from comparisons.compressing import features, growth
from comparisons.compressing import ours as streamed
from comparisons.preparing import Preparing
from comparisons.training import Training, as_loaded, fitting_timings, our_turns
from counting import Traffic, adaln_traffic, forward_flops, training_flops
from evaluate_speed import EvaluateSpeed
from gpu_tests import GpuTests
from limits import Limits, Operators, limits
from prepare_speed import PrepareSpeed
from reglue.cli import parse
from reglue.commands.prepare import Prepare
from reglue.config import Precision
from reglue.data.batches import TrainingData, denoiser_config
from reglue.data.store import Store
from reglue.diffusion import noise
from reglue.diffusion.denoiser import Denoiser
from reglue.errors import UserError
from reglue.papers import RECIPES
from reglue.published.weights import export_official
from reglue.training import distributed
from reglue.training import precision as networks
from store_reads import StoreReads
from train_speed import TrainSpeed
from workloads import RandomOnline, Workload

OFFICIAL = os.environ.get("REGLUE_OFFICIAL")
OFFICIAL_SIT = os.environ.get("REGLUE_OFFICIAL_SIT")
needs_official = pytest.mark.skipif(OFFICIAL is None, reason="REGLUE_OFFICIAL names no checkout of the published code")
KEYS = {"benchmark", "figures", "options", "toy", "hardware", "versions", "commit", "official_commit", "date"}
FIGURES = {
    "train": {
        "seconds_per_step",
        "images_per_second",
        "flops_per_step",
        "matrix_flops_per_second",
        "share_of_matrix_rate",
        "batch_size",
    },
    "sample": {"seconds_per_call", "seconds_of_pictures", "network_evaluations_per_image", "flops_per_evaluation"},
    "prepare": {"images", "seconds", "seconds_of_cores", "ours_images_per_second", "times_faster"},
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
    assert len(calls) == 2 * 4  # with and without reading, one step to warm up


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

    for module, name in ((distributed, "compiled"), (noise, "normals"), (networks, "with_products_in")):
        monkeypatch.setattr(module, name, partial(noted, name, getattr(module, name)))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # The real one takes minutes.
    against_official.main(["sample", "--toy", "--device", "cpu", "--repeats", "1", "--compile", "model"])
    assert (called.count("compiled"), called.count("with_products_in")) == (1, 1)
    assert called.count("normals") == 2 * 5 * 3 * 2  # two calls of five steps, for three modalities of two images


@pytest.mark.parametrize("threads", [0, 2])
def test_a_turn_reads_for_itself_and_leaves_no_thread(threads: int, tiny_store: Path) -> None:
    recipe, store, cpu = replace(RECIPES["sit"], model="2x32x2/2"), Store.open(tiny_store), torch.device("cpu")
    data = TrainingData(store, recipe, denoiser_config(store, recipe), 0, cpu)
    read, steps = [], []
    one = data.read
    data.read = lambda positions: (read.append(positions.start), one(positions))[1]
    step: Any = Step(lambda: steps.append(len(readers())))
    turns = our_turns(step, data, 3, threads)
    batch = len(store)
    assert read == [0]
    turns[", without reading"]()
    assert (read, steps) == ([0], [0, 0, 0])
    read.clear()
    steps.clear()
    for _ in range(2):
        turns[""]()
        assert not readers()
    assert sorted(read) == [0, 0, batch, batch, 2 * batch, 2 * batch]  # None is left over, of none the reading is free.
    assert [count > 0 for count in steps] == [threads > 0] * 6


def test_theirs_has_its_batches_in_pinned_memory_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by their DataLoader's `pin_memory`."""
    pinned, batch = torch.ones(1), torch.zeros(1)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda _: pinned)
    assert as_loaded(batch, torch.device("cuda")) is pinned
    assert as_loaded(batch, torch.device("cpu")) is batch


@needs_official
@pytest.mark.parametrize("inside", [(), ("--encoder-in-step",)])
def test_all_that_theirs_copies_in_a_step_is_as_its_loader_has_it(
    inside: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[int, ...]] = []
    monkeypatch.setattr(training, "as_loaded", lambda tensor, _: (loaded.append(tuple(tensor.shape)), tensor)[1])
    against_official.main(["train", "--toy", "--device", "cpu", "--repeats", "1", "--official", str(OFFICIAL), *inside])
    pixels = [(4, 3, 64, 64)] if inside else []
    assert loaded == [(4, 4, 8, 8), (4, 4, 8, 8), (4,), (4, 8, 8, 8), *pixels]


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read ahead")]


class Step:
    """A training step that does something else."""

    precision = "float32"

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def __call__(self, sample: Any) -> None:
        self.action()


class Memory:
    """A GPU that has some memory, of which every contestant that lives takes a piece."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive: weakref.WeakSet[Contestant] = weakref.WeakSet()
        self.freed: list[int] = []
        for name in ("reset_peak_memory_stats", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: len(self.alive) * 2**20)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: self.freed.append(len(self.alive)))
        monkeypatch.setattr(torch.compiler, "reset", lambda: None)
        monkeypatch.setattr(common, "synchronize", lambda _: None)


class Contestant:
    """In a cycle, as models are, and taking a piece of the memory."""

    def __init__(self, memory: Memory, fits: bool = True) -> None:
        self.itself = self
        memory.alive.add(self)
        if not fits:
            raise torch.OutOfMemoryError

    def __call__(self) -> None:
        return


def test_on_a_gpu_a_contestant_has_the_memory_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(monkeypatch)

    def make() -> dict[str, Contestant]:
        return {"": (contestant := Contestant(memory)), " again": contestant}

    makers: dict[str, common.Maker] = dict.fromkeys(("a", "b", "c"), make)
    on_gpu = measured(makers, 2, torch.device("cuda"))
    assert [one.peak_gpu_memory_mib for one in on_gpu.values()] == [1] * 6
    assert memory.freed == [0, 0, 0]
    on_cpu = measured(makers, 2, torch.device("cpu"))
    assert [one.peak_gpu_memory_mib for one in on_cpu.values()] == [None] * 6
    assert list(on_gpu) == list(on_cpu) == ["a", "a again", "b", "b again", "c", "c again"]


def test_what_did_not_fit_is_gone_before_the_next_try(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(monkeypatch)
    tried = []

    def timings(options: Training, workload: Workload, start: Any, store: Store, *_: Any) -> dict[str, int]:
        tried.append((len(store), len(memory.alive)))
        contestant = Contestant(memory, fits=len(store) == 1)
        contestant()
        return {"batch_size": len(store)}

    monkeypatch.setattr(training, "timings", timings)
    options = Training(Comparison(toy=True))
    start: Any = None
    assert fitting_timings(options, Workload.of("toy"), start, None, torch.device("cuda")) == {"batch_size": 1}
    assert tried == [(4, 0), (2, 0), (1, 0)]
    assert memory.freed == [0, 0]


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_the_rate_of_products_is_that_of_many_in_a_row(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    times = Timing(1.0, 1.0, 2.0, 2.0, 5)
    monkeypatch.setattr(
        common, "alternate", lambda contestants, *_: (contestants["products"](), {"products": times})[1]
    )
    with Operators() as seen:
        rate = matrix_rate(torch.device("cpu"), precision, 8)
    assert rate == common.PRODUCTS * 2 * 8**3 / 2.0
    assert seen.count >= common.PRODUCTS


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


def test_bytes_are_counted_of_what_is_read_and_written() -> None:
    x, row = torch.ones(8, 4), torch.ones(4, dtype=torch.bfloat16)
    with Traffic() as seen:
        torch.mul(x.view(4, 8).view(8, 4), row).to(torch.bfloat16)
        torch.add(x, torch.ones(1, 1).expand(8, 4))
    assert seen.operators == 4  # one makes ones
    assert seen.bytes == (128 + 8 + 128) + (128 + 64) + 4 + (128 + 4 + 128)


def test_adaln_moves_in_proportion_to_its_tokens_and_less_where_it_is_fused() -> None:
    config = Workload.of("toy").config
    one, two = (adaln_traffic(config, images) for images in (8, 16))
    assert one["operators"] == two["operators"] == 14 + 27
    assert two["bytes"] == pytest.approx(2 * one["bytes"], rel=0.01)
    assert one["bytes_fused"] < one["bytes"] / 2


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
    assert (
        (tmp_path / "broken.error").read_text().startswith(f"at commit {common.commit_of(common.ROOT)}: exit code 2\n")
    )


def test_what_failed_at_this_commit_comes_after_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "benchmark.py"
    script.write_text(
        "import json, sys\nfrom pathlib import Path\n\n"
        "out = Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "assert out.stem != 'wrong', 'never right'\n"
        "out.write_text(json.dumps({'figures': {}}))\n"
    )
    figures = [gpu_session.Figure(name, (str(script),), 1, ()) for name in ("wrong", "mended", "new")]
    monkeypatch.setattr(gpu_session, "FIGURES", figures)
    monkeypatch.setattr(gpu_session, "commit_of", lambda _: "second")
    (tmp_path / "wrong.error").write_text("at commit second: took longer than 540 s")
    (tmp_path / "mended.error").write_text("at commit first: exit code 1")
    assert gpu_session.session(gpu_session.Session(tmp_path, device="cpu", toy=True)) == 1
    said = capsys.readouterr().out.splitlines()
    assert [line.removeprefix("── ") for line in said if line.startswith("──")] == ["mended", "new", "wrong"]
    assert said[-2:] == ["AssertionError: never right", "left: wrong"]
    assert not (tmp_path / "mended.error").exists()


@pytest.mark.parametrize(
    ("passed", "failed", "commit", "device", "accepted"),
    [
        (3, 0, "now", "auto", True),
        (3, 1, "now", "auto", False),
        (0, 0, "now", "auto", False),  # All were skipped: it saw no GPU.
        (0, 0, "now", "cpu", True),
        (3, 0, "before", "auto", False),
    ],
)
def test_tests_count_as_done_if_they_passed_at_this_commit(
    passed: int, failed: int, commit: str, device: str, accepted: bool, tmp_path: Path
) -> None:
    line = {"figures": {"passed": passed, "failed": failed}, "commit": commit}
    (tmp_path / "tests.json").write_text(json.dumps(line))
    options = gpu_session.Session(tmp_path, device=device)
    assert gpu_session.is_measured(gpu_session.FIGURES[0], options, "now") == accepted


@pytest.mark.parametrize(("waits", "how"), [(True, "took longer than 1 s"), (False, "exit code 0")])
def test_nothing_that_a_benchmark_started_is_left(waits: bool, how: str, tmp_path: Path) -> None:
    file = tmp_path / "worker"
    script = f"sleep 600 & echo $! > {file}; echo begun >&2; {'wait' * waits}"
    assert gpu_session.run(["sh", "-c", script], 1) == f"{how}\nbegun"
    status = Path(f"/proc/{int(file.read_text())}/status")
    deadline = time.monotonic() + 10
    while status.is_file() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline, "the worker lives"
        time.sleep(0.01)


def test_a_session_begins_with_the_tests_that_need_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then come training and sampling, and one that failed is not done."""
    most_telling = [figure.name for figure in gpu_session.FIGURES[:5]]
    assert most_telling == ["tests", "train-b2", "train-xl2", "sample-b2", "sample-xl2"]
    (tmp_path / "test_three.py").write_text(
        "import pytest\n\npytestmark = pytest.mark.gpu\n\n\ndef test_right(): pass\n\n\n"
        "def test_wrong(): assert 1 == 2\n\n\n@pytest.mark.skip\ndef test_left_out(): pass\n"
    )
    (tmp_path / "test_other.py").write_text("import a_package_that_is_not_there\n")
    figure = replace(gpu_session.FIGURES[0], toy=("--folders", str(tmp_path)))
    monkeypatch.setattr(gpu_session, "FIGURES", [figure])
    assert gpu_session.session(gpu_session.Session(tmp_path, device="cpu", toy=True)) == 1
    figures = json.loads((tmp_path / "tests.json").read_text())["figures"]
    assert (figures["passed"], figures["failed"], figures["skipped"]) == (1, 1, 1)
    assert [(name.split("::")[1], why) for name, why in figures["failures"].items()] == [
        ("test_wrong", "assert 1 == 2")
    ]
    assert '"failed": 1' in capsys.readouterr().out
    assert "test_wrong" in (tmp_path / "tests.error").read_text()


def test_every_figure_of_a_session_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    replaced = {name: (kind, lambda o: parsed.append(o) or "") for name, (kind, _) in against_official.COMMANDS.items()}
    monkeypatch.setattr(against_official, "COMMANDS", replaced)
    others = {
        "train_speed.py": TrainSpeed,
        "prepare_speed.py": PrepareSpeed,
        "store_reads.py": StoreReads,
        "evaluate_speed.py": EvaluateSpeed,
        "gpu_tests.py": GpuTests,
    }
    first = gpu_session.Session(tmp_path, images=tmp_path, autoencoder="folder", threads=3)
    for options in (first, gpu_session.Session(tmp_path, toy=True)):
        for figure in gpu_session.FIGURES:
            script, *arguments = gpu_session.command_of(figure, options)
            if Path(script).name == gpu_session.OFFICIAL:
                against_official.main([*arguments, "--out", str(tmp_path)])
            else:
                tyro.cli(others[Path(script).name], args=[*arguments, "--out", str(tmp_path)])
    assert len(parsed) == 2 * sum(figure.arguments[0] == gpu_session.OFFICIAL for figure in gpu_session.FIGURES)
    assert parsed[0].official_precision == "fp16"
    assert (parsed[0].compile, parsed[0].steps, parsed[0].conditions.threads) == (("blocks",), 100, 3)
    prepared = [options for options in parsed if isinstance(options, Preparing)]
    assert [(options.images, options.autoencoder) for options in prepared] == [(tmp_path, "folder"), (None, "starter")]


def test_a_folder_without_the_published_code_is_named(tmp_path: Path) -> None:
    script = Path(against_official.__file__)
    command = [sys.executable, str(script), "sample", "--toy", "--device", "cpu", "--official", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(f"against_official: --official {tmp_path}: ")
    assert len(result.stderr.splitlines()) == 1


def test_preparing_is_judged_by_cores_on_a_cpu_and_by_the_clock_on_a_gpu() -> None:
    """By the shortest of the turns, of everything that each side has to do."""
    ours = {"ours: prepare": (4.0, 8.0), "ours: decode and crop": (1.0, 2.0)}
    convert, encode = {"theirs: convert": (6.0, 3.0)}, {"theirs: encode": (18.0, 18.0)}
    slower = {name: (wall + 1, core + 1) for name, (wall, core) in {**ours, **convert, **encode}.items()}
    on_gpu = preparing.figures_of([slower, {**ours, **convert, **encode}], 8, torch.device("cuda"))
    assert on_gpu["times_faster"] == {"decode and crop": 6, "images to moments": 6}
    assert on_gpu["ours_images_per_second"] == 2
    on_cpu = preparing.figures_of([{**ours, **convert}], 8, torch.device("cpu"))
    assert on_cpu["times_faster"] == {"decode and crop": 1.5}
    assert preparing.figures_of([ours], 8, torch.device("cpu"))["times_faster"] == {}


def test_ours_prepares_as_by_default() -> None:
    options = Preparing(Comparison(device="cpu"), autoencoder="folder")
    commands = preparing.ours(options, Path("images"), Path("out"), 64)
    assert parse(commands["ours: prepare"][3:]) == Prepare(
        Path("images"), Path("out/store"), 64, "folder", "none", device="cpu"
    )


def test_images_are_spread_over_a_folder_or_made_once(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert workloads.spread(tiny_images, tmp_path / "some", 6) == 6
    links = sorted(file for file in (tmp_path / "some").rglob("*") if file.is_symlink())
    assert [link.parent.name for link in links] == ["circle"] * 2 + ["square"] * 2 + ["stripes"] * 2
    assert links[0].resolve() == (tiny_images / "circle/000.png").resolve()
    with pytest.raises(UserError, match="--images"):
        workloads.spread(tmp_path / "missing", tmp_path / "none", 6)
    monkeypatch.setattr(workloads, "DIFFERENT", 2)
    files = list(workloads.random_images(tmp_path / "made", 5, 16).rglob("*.jpg"))
    assert (len(files), len({file.stat().st_ino for file in files})) == (5, 2)


@needs_official
def test_ours_and_theirs_crop_the_same() -> None:
    arguments = ["prepare", "--toy", "--device", "cpu", "--repeats", "1", "--official", str(OFFICIAL)]
    figures = json.loads(against_official.main(arguments))["figures"]
    assert figures["pixel_difference"] == 0
    assert figures["times_faster"].keys() == {"decode and crop"}


@needs_official
@pytest.mark.parametrize(("benchmark", "figure"), [("train", "loss_difference"), ("sample", "sample_difference")])
def test_ours_and_theirs_compute_the_same(benchmark: str, figure: str) -> None:
    arguments = [benchmark, "--toy", "--device", "cpu", "--repeats", "1", "--official", str(OFFICIAL)]
    figures = json.loads(against_official.main(arguments))["figures"]
    assert figures[figure] < 1e-5
    assert figures["times_faster"]


@pytest.mark.skipif(OFFICIAL_SIT is None, reason="REGLUE_OFFICIAL_SIT names no checkout of SiT's own code")
def test_ours_and_sit_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where one half of the exchange is left out, time that runs the other way, it is noticed."""
    arguments = ["train", "--recipe", "sit", "--toy", "--device", "cpu", "--repeats", "1", "--official"]
    figures = json.loads(against_official.main([*arguments, str(OFFICIAL_SIT)]))["figures"]
    assert figures["loss_difference"] < 1e-5
    assert figures["times_faster"].keys() == {"ours bfloat16", "ours bfloat16, without reading"}
    assert "theirs SiT" in figures["images_per_second"]
    monkeypatch.setattr(training, "export_official", lambda _, *model: export_official("repa", *model))
    with pytest.raises(AssertionError, match="loss_difference"):
        against_official.main([*arguments, str(OFFICIAL_SIT)])


def test_sit_has_no_encoder_in_its_step() -> None:
    with pytest.raises(UserError, match="--encoder-in-step"):
        against_official.main(["train", "--toy", "--device", "cpu", "--recipe", "sit", "--encoder-in-step"])
