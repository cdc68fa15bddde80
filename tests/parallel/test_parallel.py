"""Many processes do what one does: losses, checkpoints, samples. And they end together, whatever ends one of them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from helpers import TINY_RECIPE
from reglue import cli
from reglue.training import checkpoints

TERMS = ("loss", "latent", "local", "cls", "alignment", "gradient_norm")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def training(store: Path, out: Path, *more: str) -> list[str]:
    """Arguments of a run whose gradients are clipped and whose steps have two parts."""
    return [
        "train", "reglue", f"--store={store}", f"--out={out}", *TINY_RECIPE, "--log-every=1", "--keep=0",
        "--optimisation.accumulate=2", "--optimisation.clip=1", "--checkpoint-every=3", "--optimisation.ema=0.9", *more,
    ]  # fmt: skip


def sampling(run: Path, out: Path) -> list[str]:
    return ["sample", str(run), f"--out={out}", "--count=6", "--steps=4", "--guidance-scale=1.5", "--device=cpu"]


def run_here(*jobs: list[str]) -> None:
    for arguments in jobs:
        options = cli.parse(arguments)
        cli.execute(options)


def run_on(processes: int, *jobs: list[str]) -> None:
    """Run jobs one after another under torchrun."""
    script = str(Path(__file__).with_name("scenarios.py"))
    result = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", script,
            *map(json.dumps, jobs),
        ],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Warning" not in result.stderr


@pytest.mark.slow
def test_machines_that_meet_at_an_address_train_as_one_process_does(
    one: Path, tiny_store: Path, tmp_path: Path
) -> None:
    """Two torchruns, as on two machines, of one process each."""
    address = f"localhost:{free_port()}"
    agents = [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
                "--rdzv-backend=c10d", f"--rdzv-endpoint={address}", "--rdzv-id=test", "-m", "reglue",
                *training(tiny_store, tmp_path / "run", "--optimisation.steps=6"),
            ],
            env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    for agent in agents:
        text = last_words(agent, within=600)
        assert agent.returncode == 0, text[-3000:]
    assert_same_training(one, tmp_path / "run")


def losses(run: Path) -> np.ndarray:
    """(steps, terms)."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return np.array([[line[term] for term in TERMS] for line in lines])


@pytest.fixture(scope="module")
def one(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps by one process."""
    run = tmp_path_factory.mktemp("one") / "run"
    run_here(training(tiny_store, run, "--optimisation.steps=6"))
    return run


@pytest.fixture(scope="module")
def two(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes did: three sharded steps in `sharded`, six in `replicated`; bfloat16 and compiled too."""
    folder = tmp_path_factory.mktemp("two")
    half = ["--optimisation.steps=3", "--optimisation.precision=bfloat16"]
    compiled = ["--optimisation.steps=3", "--optimisation.compile=blocks"]
    run_on(
        2,
        training(tiny_store, folder / "replicated", "--optimisation.steps=6", "--preview-every=6"),
        training(tiny_store, folder / "sharded", "--optimisation.steps=3", "--shards=2", "--preview-every=3"),
        training(tiny_store, folder / "half", *half),
        training(tiny_store, folder / "half-sharded", *half, "--shards=2"),
        training(tiny_store, folder / "compiled", *compiled),
        training(tiny_store, folder / "compiled-sharded", *compiled, "--shards=2"),
    )
    return folder


@pytest.fixture(scope="module")
def four(tiny_store: Path, two: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four processes did: six steps in two copies of two shards, the other three of `sharded` on four, samples."""
    folder = tmp_path_factory.mktemp("four")
    for name in ("continued", "replicated"):
        copy(two / "sharded", folder / name)
    run_on(
        4,
        training(tiny_store, folder / "two-copies", "--optimisation.steps=6", "--shards=2"),
        training(tiny_store, folder / "continued", "--optimisation.steps=6", "--shards=4"),
        training(tiny_store, folder / "replicated", "--optimisation.steps=6"),
        sampling(two / "sharded", folder / "samples"),
    )
    return folder


def copy(run: Path, to: Path) -> Path:
    subprocess.run(["cp", "-r", str(run), str(to)], check=True)
    return to


def assert_same_training(run: Path, other: Path) -> None:
    """The same losses at every step, and the same averaged weights in the end, to the tolerance of float32."""
    np.testing.assert_allclose(losses(run), losses(other), rtol=2e-5, atol=1e-6)
    first, second = (load_file(checkpoints.find(folder) / checkpoints.EMA) for folder in (run, other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        # Adam divides by the gradient's size, so a gradient that is all rounding may move a weight by a learning rate.
        torch.testing.assert_close(value, second[name], rtol=1e-4, atol=2e-4)


def test_whole_copies_train_as_one_process_does(one: Path, two: Path) -> None:
    assert_same_training(one, two / "replicated")
    assert (two / "replicated" / "previews" / "00000006.png").is_file()


def test_shards_train_as_one_process_does(one: Path, two: Path, four: Path) -> None:
    assert_same_training(one, four / "two-copies")
    np.testing.assert_allclose(losses(two / "sharded"), losses(one)[:3], rtol=2e-5, atol=1e-6)
    assert (two / "sharded" / "previews" / "00000003.png").is_file()


def test_shards_round_to_bfloat16_where_whole_copies_do(two: Path) -> None:
    np.testing.assert_allclose(losses(two / "half-sharded"), losses(two / "half"), rtol=2e-3)


@pytest.mark.parametrize("name", ["compiled", "compiled-sharded"])
def test_compiled_blocks_give_the_same_losses(name: str, one: Path, two: Path) -> None:
    np.testing.assert_allclose(losses(two / name), losses(one)[:3], rtol=2e-5, atol=1e-6)


def test_a_sharded_checkpoint_holds_the_same_files(one: Path, two: Path) -> None:
    ours, theirs = (checkpoints.find(run, 3) for run in (two / "sharded", one))
    assert sorted(file.name for file in ours.iterdir()) == sorted(file.name for file in theirs.iterdir())
    for name in (checkpoints.MODEL, checkpoints.EMA, checkpoints.OPTIMISER):
        first, second = load_file(ours / name), load_file(theirs / name)
        assert first.keys() == second.keys()
        for key, value in first.items():
            torch.testing.assert_close(value.reshape(second[key].shape), second[key], rtol=1e-3, atol=1e-4)
    steps = [value for name, value in load_file(ours / checkpoints.OPTIMISER).items() if name.endswith(".step")]
    assert steps
    assert all(float(value) == 3 for value in steps)


def test_a_sharded_checkpoint_is_continued_by_any_number_of_processes(
    one: Path, two: Path, four: Path, tiny_store: Path, tmp_path: Path
) -> None:
    run = copy(two / "sharded", tmp_path / "run")
    run_here(training(tiny_store, run, "--optimisation.steps=6"))
    assert_same_training(one, run)
    assert_same_training(one, four / "continued")
    assert_same_training(one, four / "replicated")


def test_four_processes_draw_the_same_images_as_one(two: Path, four: Path, tmp_path: Path) -> None:
    run_here(sampling(two / "sharded", tmp_path / "samples"))
    for i in range(6):
        first, second = (
            np.asarray(Image.open(folder / f"{i:06d}.png")).astype(int)
            for folder in (tmp_path / "samples", four / "samples")
        )
        assert abs(first - second).max() <= 1


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_two(arguments: list[str], *preludes: str) -> list[subprocess.Popen[str]]:
    """Two processes as SLURM would start them, without torchrun, which would end both by itself.

    Each runs its prelude first, if it has one.
    """
    preludes = (*preludes, "", "")[:2]
    port = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, "-c", f"{preludes[rank]}\nfrom reglue.cli import main; main()", *arguments],
            env={
                **ENVIRONMENT, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            },
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip


def last_words(process: subprocess.Popen[str], within: float) -> str:
    """What a process writes on stderr. Fails if it does not end in time."""
    try:
        return process.communicate(timeout=within)[1]
    finally:
        process.kill()


def ends(process: subprocess.Popen[str], within: float) -> list[str]:
    """What a process says in the end. Fails if that takes too long, or for a traceback."""
    text = last_words(process, within)
    assert "Traceback" not in text
    return re.findall(r"(?<!train )reglue: .*", text)  # and not the progress bar


def start_training(store: Path, run: Path) -> list[subprocess.Popen[str]]:
    """Two processes that have trained for three steps, and go on."""
    processes = start_two(training(store, run, "--optimisation.steps=100000"))
    deadline = time.monotonic() + 300
    while not (run / "checkpoints" / "00000003" / "progress.json").is_file():
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return processes


def test_all_stop_at_one_step_with_a_checkpoint_when_one_is_asked_to(tiny_store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    processes = start_training(tiny_store, run)
    processes[1].send_signal(signal.SIGTERM)
    said = [ends(process, within=60) for process in processes]
    assert [process.returncode for process in processes] == [143, 143]
    last = checkpoints.steps(run)[-1]
    end = f"reglue: stopped after step {last}, with a checkpoint; the same command continues"
    assert said == [[end], ["reglue: stops with a checkpoint after this step", end]]
    assert len(losses(run)) == last


def test_a_killed_process_ends_the_others(tiny_store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first, second = start_training(tiny_store, run)
    second.send_signal(signal.SIGKILL)
    (line,) = ends(first, within=20)
    assert line.startswith("reglue: process 0 ends, because process 1 has")
    assert first.returncode == 2
    assert 3 in checkpoints.steps(run)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_full_disk_of_one_process_ends_all(shards: int, tiny_store: Path, tmp_path: Path) -> None:
    # Room for everything but weights.
    prelude = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))"
    more = ["--optimisation.steps=100000", "--checkpoint-every=1", f"--shards={shards}"]
    first, second = start_two(training(tiny_store, tmp_path / "run", *more), prelude)
    said = ends(first, within=300), ends(second, within=20)
    assert any("cannot write checkpoint" in line and "File too large" in line for line in said[0])
    assert len(said[1]) == 1
    assert first.returncode == second.returncode == 2
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_an_error_in_one_process_is_shown_and_ends_all(tiny_store: Path, tmp_path: Path) -> None:
    prelude = "import reglue.commands.train as job; job.take_compressors = lambda *_: 1 // 0"
    first, second = start_two(training(tiny_store, tmp_path / "run", "--optimisation.steps=100000"), prelude)
    text = last_words(first, within=300)
    (line,) = ends(second, within=20)
    assert text.count("Traceback") == 1
    assert "ZeroDivisionError" in text
    assert first.returncode == 1
    assert line.startswith("reglue: process 1 ends, because process 0 has")
    assert second.returncode == 2


STALE = """
from reglue.training import checkpoints
seen, steps = [], checkpoints.steps
checkpoints.steps = lambda run: steps(run) if seen.append(run) or len(seen) > 1 else []
"""


def test_a_process_that_sees_the_last_checkpoint_late_continues_from_it_too(
    one: Path, two: Path, tiny_store: Path, tmp_path: Path
) -> None:
    run = copy(two / "replicated", tmp_path / "run")
    subprocess.run(["rm", "-r", str(checkpoints.find(run, 6))], check=True)
    for process in start_two(training(tiny_store, run, "--optimisation.steps=6"), "", STALE):
        assert ends(process, within=300) == []
        assert process.returncode == 0
    assert_same_training(one, run)
