"""The benchmarks at toy size: both sides compute the same, the product itself is timed, and counts are right.

With REGLUE_OFFICIAL naming a checkout of the published code, and accelerate importable, ours is compared with it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.benchmark import Measurement, TaskSpec

import attention_speed
import common
import counting
import prepare_speed
import read_speed
import sample_speed
import sizes
import soak
import train_speed
from attention_speed import AttentionSpeed
from counting import Counting, activation_bytes, forward_flops, parameters, training_flops
from prepare_speed import PrepareSpeed
from read_speed import ReadSpeed
from reglue.commands.prepare import Prepare
from reglue.commands.train import Train, train
from reglue.config import Optimisation
from reglue.data.batches import TrainingData, denoiser_config
from reglue.data.store import Store
from reglue.diffusion.denoiser import Denoiser
from reglue.papers import RECIPES
from reglue.pipeline import ImageModel
from reglue.sampling import Precision, Sampling
from reglue.training.checkpoints import find
from sample_speed import SampleSpeed
from sizes import Sizes
from train_speed import TrainingStep, TrainSpeed
from workloads import Workload

CPU = torch.device("cpu")
OFFICIAL = Path(os.environ["REGLUE_OFFICIAL"]) if "REGLUE_OFFICIAL" in os.environ else None
needs_official = pytest.mark.skipif(OFFICIAL is None, reason="REGLUE_OFFICIAL names no checkout of the published code")
TOY: dict[str, Any] = {"toy": True, "device": "cpu", "repeats": 1}
KEYS = {"benchmark", "figures", "options", "hardware", "versions", "commit", "official_commit", "date"}


def figures_of(line: str) -> Any:
    return json.loads(line)["figures"]


@pytest.mark.parametrize(
    ("options", "main", "figures"),
    [
        (
            TrainSpeed(**TOY),
            train_speed.main,
            {"parameters", "seconds_per_step", "images_per_second", "flops_per_image", "share_of_matmul_rate"},
        ),
        (AttentionSpeed(**TOY), attention_speed.main, {"milliseconds"}),
        (SampleSpeed(**TOY), sample_speed.main, {"seconds_per_batch", "flops_per_evaluation", "steps"}),
        (PrepareSpeed(**TOY, workers=0), prepare_speed.main, {"seconds", "images_per_second", "share_of_networks"}),
        (
            Counting(models=("2x32x2/2",), resolutions=((16, 16),)),
            counting.main,
            {"models", "resolutions"},
        ),
        (Sizes(sizes=(16,), model="1x32x2/2", images=1, steps=1, tile=16), sizes.main, {"rows"}),
    ],
    ids=["train", "attention", "sample", "prepare", "count", "sizes"],
)
def test_a_benchmark_ends_with_a_line_of_json(
    options: Any, main: Callable[[Any], str], figures: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "line.json"
    line = main(replace(options, out=out))
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads(line) == json.loads(out.read_text())
    assert printed.keys() == KEYS
    assert (printed["benchmark"], printed["official_commit"]) == (type(options).__name__, None)
    assert figures <= printed["figures"].keys()


@needs_official
@pytest.mark.parametrize(
    ("options", "main", "difference", "contestant"),
    [
        (TrainSpeed(**TOY), train_speed.main, "loss_difference", "ours bfloat16, cached / theirs no"),
        (SampleSpeed(**TOY), sample_speed.main, "sample_difference", "ours bfloat16 / theirs float32"),
    ],
    ids=["train", "sample"],
)
def test_ours_and_theirs_compute_the_same(
    options: Any, main: Callable[[Any], str], difference: str, contestant: str
) -> None:
    figures = figures_of(main(replace(options, official=OFFICIAL)))
    assert figures[difference] < 1e-5
    assert figures["times_faster"].keys() == {contestant}


@needs_official
def test_ours_and_theirs_crop_the_same() -> None:
    figures = figures_of(prepare_speed.main(PrepareSpeed(**TOY, workers=0, official=OFFICIAL)))
    assert figures["pixel_difference"] == 0
    assert "theirs" in figures["seconds"]


@needs_official
def test_what_theirs_copies_in_a_step_is_as_its_loader_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[int, ...]] = []
    monkeypatch.setattr(train_speed, "as_loaded", lambda tensor, _: (loaded.append(tuple(tensor.shape)), tensor)[1])
    train_speed.main(TrainSpeed(**TOY, official=OFFICIAL))
    assert loaded == [(4, 8, 8, 8), (4,)]


def test_theirs_has_its_batches_in_pinned_memory_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by their DataLoader's `pin_memory`."""
    pinned, batch = torch.ones(1), torch.zeros(1)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda _: pinned)
    assert train_speed.as_loaded(batch, torch.device("cuda")) is pinned
    assert train_speed.as_loaded(batch, CPU) is batch


def test_nothing_is_timed_where_they_disagree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(train_speed, "loss_difference", lambda *_: 1e-3)
    monkeypatch.setattr(train_speed, "alternate", lambda *_: pytest.fail("timed"))
    with pytest.raises(AssertionError, match="loss_difference"):
        train_speed.main(TrainSpeed(**TOY, official=tmp_path))


def test_a_folder_without_the_published_code_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("models", "models.sit"):  # Other tests may have imported it from elsewhere.
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "argv", ["sample_speed.py", "--toy", "--device", "cpu", "--official", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        common.run(SampleSpeed, sample_speed.main, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sample_speed: --official {tmp_path}: ")
    assert str(tmp_path) not in sys.path


def test_contestants_take_turns() -> None:
    calls: list[str] = []
    timed = common.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, CPU, calls=4)
    assert "".join(calls) == "ababab"  # The first turn is not timed.
    assert [len(one.raw_times) for one in timed.values()] == [2, 2]
    assert timed["a"].median == pytest.approx(sum(timed["a"].raw_times) / 2 / 4)


def test_speedups_are_ratios_of_medians() -> None:
    seconds = {"theirs no": [4.0, 8.0, 6.0], "ours a": [2.0], "ours b": [12.0]}
    measured = {name: Measurement(1, times, TaskSpec(name, "")) for name, times in seconds.items()}
    assert common.speedups(measured) == {"ours a / theirs no": 3, "ours b / theirs no": 0.5}


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_the_matmul_rate_is_that_of_many_products_in_a_row(
    precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    products: list[torch.dtype] = []
    multiply = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: (products.append(a.dtype), multiply(a, b))[1])
    monkeypatch.setattr(common, "core_seconds", iter(range(100)).__next__)
    rate = common.matmul_rate(CPU, precision, toy=True)
    assert products == [torch.bfloat16 if precision == "bfloat16" else torch.float32] * 60
    assert rate == 10 * 2 * 64**3  # A turn of ten takes a second by this clock.


# Training


def test_a_step_is_that_of_the_command(tiny_store: Path, tmp_path: Path) -> None:
    """Three steps leave the weights and averages that `reglue train` leaves."""
    optimisation = Optimisation(steps=3, batch_size=4, learning_rate=1e-2, clip=1.0, ema=0.9, ema_warmup="no")
    store = Store.open(tiny_store)
    recipe = replace(RECIPES["sit"], model="2x32x2/2", optimisation=optimisation)
    run = train(Train(recipe, tiny_store, tmp_path / "run", preview_every=0, device="cpu"))
    trained = load_file(find(run) / "model.safetensors")
    averaged = load_file(find(run) / "ema.safetensors")
    data = TrainingData(store, recipe, denoiser_config(store, recipe), 0)
    step = TrainingStep(data, Denoiser(data.config), "float32")
    for first in (0, 4, 8):
        step(data.read(range(first, first + 4)))
    for name, weight in step.task.model.state_dict().items():
        assert torch.equal(weight, trained[name]), name
        assert torch.equal(step.task.ema[name], averaged[name]), name


@pytest.mark.parametrize("workers", [0, 2])
def test_a_turn_reads_for_itself_and_leaves_no_thread(
    workers: int, tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def readers() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("read ahead")]

    recipe, store = replace(RECIPES["sit"], model="2x32x2/2"), Store.open(tiny_store)
    data = TrainingData(store, recipe, denoiser_config(store, recipe), 0)
    read, steps = [], []
    one = data.read
    monkeypatch.setattr(data, "read", lambda positions: (read.append(positions.start), one(positions))[1])
    monkeypatch.setattr(TrainingStep, "__call__", lambda *_: steps.append(len(readers()) > 0))
    options = TrainSpeed(**TOY, steps=3, workers=workers)
    turn = train_speed.ours(options, data, Denoiser(data.config), 4, "float32", "no")
    for _ in range(2):
        turn()
        assert not readers()
    assert sorted(read) == [0, 0, 4, 4, 8, 8]  # Nothing is read ahead for the next turn: none of the reading is free.
    assert steps == [workers > 0] * 6


@pytest.mark.parametrize("targets", ["cached", "int8", "decoded"])
def test_making_targets_is_timed_and_counted(targets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = []
    finish = TrainingData.finish
    monkeypatch.setattr(TrainingData, "finish", lambda self, rows: (finished.append(1), finish(self, rows))[1])
    figures = figures_of(train_speed.main(TrainSpeed(**TOY, targets=(targets,), steps=2)))
    assert len(finished) == 1 + 4 + 2  # Once to count, two turns of two steps, two turns of finishing by itself.
    assert (figures["flops_of_targets_per_image"][targets] > 0) == (targets == "decoded")
    assert figures["seconds_of_parts"].keys() == {f"read {targets}", f"finish {targets}"}


# Sampling and preparing


def test_the_sampling_that_is_timed_is_the_model_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ImageModel.draw` with its noise, in the precisions and compiled as asked for."""
    drawn: list[tuple[int, bool, Sampling]] = []
    draw = ImageModel.draw

    def noted(self: ImageModel, indices: range, *arguments: Any) -> Any:
        drawn.append((len(indices), self.compile, self.resolved(arguments[-1])))
        return draw(self, indices, *arguments)

    monkeypatch.setattr(ImageModel, "draw", noted)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # The real one takes minutes.
    sample_speed.main(SampleSpeed(**TOY, precision=("float32", "bfloat16"), compile=("no", "model")))
    sampling = Sampling("euler-maruyama", 5, guidance_scale=2.3, guidance_interval=(0.0, 0.9))
    ways = [(2, compiled, precision) for precision in ("float32", "bfloat16") for compiled in (False, True)]
    assert drawn == [
        (count, compiled, replace(sampling, precision=precision, state_precision="float64"))
        for _ in range(2)
        for count, compiled, precision in ways
    ]


def test_ours_prepares_as_the_command_does_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Prepare] = []
    monkeypatch.setattr(prepare_speed, "prepare", asked.append)
    prepare_speed.ours(PrepareSpeed(device="cpu", autoencoder="folder"), tmp_path, 64)
    assert asked == [Prepare(tmp_path, asked[0].out, 64, "folder", "none", device="cpu")]


def test_what_prepare_runs_for_long_is_compared_with_networks_that_run_for_short(
    tiny_images: Path, tiny_encoder: str, tiny_autoencoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command on 24 images in 8 seconds, the networks on six of them in one."""

    def timings(contestants: dict[str, Any], *_: Any) -> dict[str, Measurement]:
        for call in contestants.values():
            call()
        return {name: Measurement(1, [{"ours": 8.0}.get(name, 1.0)], TaskSpec(name, "")) for name in contestants}

    monkeypatch.setattr(prepare_speed, "AT_HAND", 6)
    monkeypatch.setattr(prepare_speed, "alternate", timings)
    options = PrepareSpeed(
        device="cpu", images=tiny_images, resolution=16, autoencoder=tiny_autoencoder, encoder=tiny_encoder, workers=0
    )
    figures = figures_of(prepare_speed.main(options))
    assert (figures["images"], figures["images_per_second"], figures["share_of_networks"]) == (24, 3, 0.5)


# Reads and counts


def test_reads_of_a_store(tiny_store: Path) -> None:
    rows = figures_of(read_speed.main(ReadSpeed(store=tiny_store, images=30, batch_size=5)))["recipes"]
    latent, cls, features, local = 2 * 4 * 3 * 8 * 8, 4 * 16, 2 * 16 * 4 * 4, 4 * 4 * 4 * 4
    assert {row["recipe"]: row["bytes of an image"] for row in rows} == {
        **dict.fromkeys(("dit", "sit", "uvit", "lightningdit", "meanflow"), latent),
        "repa": latent + cls + features,
        "redi": latent + local,
        "reg": latent + cls + features,
        **dict.fromkeys(("reglue", "sfd"), latent + cls + features + local),
    }
    assert all(row[f"{cache}: per second of a core"] > 0 for row in rows for cache in ("cold", "warm"))


def test_operations_are_those_of_the_layers() -> None:
    """A forward pass of linear layers on N tokens is 2·N·weights; attention adds 4·N²·width per block."""
    config = Workload.of("toy").config
    patches = config.token_grid[0] * config.token_grid[1]
    expected = 4 * (1 + patches) ** 2 * config.width * config.depth
    for name, weight in Denoiser(config).named_parameters():
        if weight.ndim == 1 or name.startswith(("projector", "conditions.class")):
            continue  # Biases; training alone; a table.
        if ".attention." in name or ".mlp." in name:
            times = 1 + patches
        else:
            times = patches if name.startswith(("patches", "velocity")) else 1
        expected += 2 * times * weight.numel()
    assert forward_flops(config) == expected
    assert training_flops(config) > 3 * expected


def test_training_takes_what_the_paper_counts() -> None:
    """DiT's paper counts 23.0 G multiplications and additions for B/2; training takes six times as many operations."""
    assert training_flops(Workload.of("imagenet", recipe="sit").config) == pytest.approx(6 * 23.0e9, rel=0.01)


@pytest.mark.parametrize(
    ("recipe", "model", "published"),
    [
        ("sit", "B/2", 130_512_416),
        ("sit", "XL/2", 675_129_632),
        ("repa", "B/2", 137_845_008),
        ("repa", "XL/2", 683_242_512),
        ("redi", "B/2", 130_549_296),
        ("redi", "XL/2", 675_184_944),
        ("reg", "B/2", 139_028_496),
        ("reg", "XL/2", 685_017_360),
        ("reglue", "B/2", 139_126_864),
        ("reglue", "XL/2", 685_164_880),
    ],
)
def test_parameters_are_those_of_the_published_models(recipe: str, model: str, published: int) -> None:
    """Which count their position embeddings too."""
    config = Workload.of("imagenet", model, recipe).config
    if recipe == "sit":  # Its checkpoints have twice the output channels.
        config = replace(config, learn_sigma=True)
    tokens = len(config.tokens) + config.token_grid[0] * config.token_grid[1]
    assert parameters(config) + tokens * config.width == published


def test_the_tables_of_counts(capsys: pytest.CaptureFixture[str]) -> None:
    options = Counting(models=("2x32x2/2",), model="2x32x2/2", resolutions=((64, 64), (64, 128)))
    figures = figures_of(counting.main(options))
    square, oblong = figures["resolutions"]
    assert (square["tokens"], oblong["tokens"]) == ("16 (4×4)", "32 (4×8)")
    for count in ("forward, GFLOP", "activations, MiB"):
        assert oblong[count] > 1.5 * square[count] > 0
    config, (model,) = Workload.of("imagenet", "2x32x2/2").config, figures["models"]
    assert model["activations, MiB"] == pytest.approx(activation_bytes(config) / 2**20, rel=1e-4)
    assert model["whole, GiB"] == pytest.approx((20 + 2) * model["weights, M"] * 1e6 / 2**30, rel=1e-3)
    assert 1 / 8 < model["8 shards, GiB"] / model["whole, GiB"] < 1
    assert "| 2x32x2/2 | " in capsys.readouterr().out


def test_a_soak_says_what_rose() -> None:
    found = soak.look(os.getpid())
    assert found["memory, MiB"] > 10
    assert min(found["open files"], found["threads"]) >= 1
    flat = [{"memory, MiB": 900.0 - i, "open files": 20.0, "threads": 7.0} for i in range(30)]
    assert soak.judged(flat)[2] == []
    assert soak.judged([{**look, "open files": 20.0 + i} for i, look in enumerate(flat)])[2] == ["open files"]
    assert soak.judged([{**look, "memory, MiB": 900.0 + i} for i, look in enumerate(flat)])[2] == ["memory, MiB"]
