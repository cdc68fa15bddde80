"""Which device and which group of processes a job gets, how precise products are, and what is compiled."""

from __future__ import annotations

import os
import resource
import signal
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from reglue import cli
from reglue.config import Compile
from reglue.errors import UserError
from reglue.sampling import Precision
from reglue.training import checkpoints, distributed, precision, stopping
from reglue.training.precision import WORTH_COMPILING, autocast, matmul_precision, to_compile

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine of two GPUs, as far as decisions go; what is asked of it is noted."""
    asked: dict[str, Any] = {}
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.update(current=device))

    def init(backend: str, timeout: timedelta) -> None:
        asked.update(backend=backend, timeout=timeout, current_before=asked.get("current"))

    monkeypatch.setattr(dist, "init_process_group", init)
    monkeypatch.setattr(distributed, "private_group", lambda timeout: asked.update(waiting=timeout))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "_waiting", None)
    return asked


def under_torchrun(monkeypatch: pytest.MonkeyPatch, local_rank: int, processes: int = 2) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:1"])
def test_each_process_takes_its_own_gpu_and_talks_over_both_networks(
    device: str, machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    under_torchrun(monkeypatch, local_rank=1)
    assert distributed.resolve_device(device) == torch.device("cuda", 1)
    assert distributed.join(device) == (1, 2)
    assert machine == {
        "current": torch.device("cuda", 1),
        "current_before": torch.device("cuda", 1),
        "backend": "cpu:gloo,cuda:nccl",
        "timeout": distributed.STEP_WAIT,
        "waiting": distributed.LONG_WAIT,
    }


def test_processes_on_the_cpu_of_a_machine_with_gpus_do_not_use_them(
    machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    under_torchrun(monkeypatch, local_rank=5, processes=8)
    assert distributed.resolve_device("cpu") == CPU
    distributed.join("cpu")
    assert machine["backend"] == "gloo"
    assert "current" not in machine


def test_without_torchrun_there_is_no_group_and_any_gpu_may_be_named(machine: dict[str, Any]) -> None:
    for name, index in (("cuda", 0), ("cuda:1", 1)):
        assert distributed.join(name) == (0, 1)
        assert machine == {"current": torch.device("cuda", index)}
    assert distributed.resolve_device("auto") == distributed.resolve_device("cuda") == torch.device("cuda", 0)
    assert distributed.resolve_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize("device", ["meta", "mps", "xpu:0"])
def test_devices_that_nothing_runs_on_are_refused(device: str) -> None:
    with pytest.raises(UserError, match=f"^device {device}: choose auto, cpu or cuda$"):
        distributed.resolve_device(device)


@pytest.mark.parametrize(
    ("device", "local_rank", "processes", "says"),
    [
        ("auto", 2, 4, "process 2 of this machine has no GPU of its own, it sees 2; start 2 processes per machine"),
        ("cuda", 2, 4, "device cuda: process 2 of this machine has no GPU of its own"),
        ("cuda:0", 1, 2, "device cuda:0 is for one process, not for 2; choose cuda"),
        ("cuda:2", 0, 1, "device cuda:2: there are 2 GPUs"),
    ],
)
def test_gpus_that_are_not_there_for_a_process_are_refused_in_one_line(
    device: str, local_rank: int, processes: int, says: str, machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    under_torchrun(monkeypatch, local_rank, processes)
    with pytest.raises(UserError) as error:
        distributed.resolve_device(device)
    assert says in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert not machine


def test_a_failed_message_keeps_its_reason_and_errors_of_the_device_stay_what_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 3)

    def raising(error: Exception) -> None:
        def barrier(group: object) -> None:
            raise error

        monkeypatch.setattr(dist, "barrier", barrier)
        distributed.barrier()

    with pytest.raises(UserError, match=r"process 3 waited .* \(Connection closed by peer\)"):
        raising(RuntimeError("Connection closed by peer\nand a trace of C++"))
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        raising(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        raising(torch.AcceleratorError("an illegal memory access"))


@pytest.mark.parametrize(("precision", "inside"), [("tf32", "high"), ("float32", "highest"), ("bfloat16", "highest")])
def test_products_are_tf32_on_a_gpu_where_asked_for_and_as_before_afterwards(precision: Precision, inside: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with matmul_precision(GPU, precision):
            assert torch.get_float32_matmul_precision() == inside
            assert torch.backends.cuda.matmul.allow_tf32 == (precision == "tf32")
        assert torch.get_float32_matmul_precision() == "medium"
        with matmul_precision(CPU, precision):
            assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("precision", "kind"), [("tf32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_tf32_is_float32_for_everything_but_the_products_of_a_gpu(precision: Precision, kind: torch.dtype) -> None:
    with matmul_precision(CPU, precision), autocast(CPU, precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == kind


@pytest.mark.parametrize("asked", ["auto", "no", "blocks", "model"])
def test_blocks_are_compiled_where_it_pays_unless_told_otherwise(
    asked: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def auto(resolved: Compile) -> Compile:
        return resolved if asked == "auto" else asked

    monkeypatch.setattr(precision, "find_spec", lambda name: name)
    monkeypatch.setenv("CC", "gcc")
    for steps in (1, WORTH_COMPILING):
        assert to_compile(asked, GPU, steps) == auto("blocks")
    monkeypatch.setattr(precision, "find_spec", lambda name: None)
    assert to_compile(asked, GPU, WORTH_COMPILING) == auto("no")

    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert to_compile(asked, CPU, WORTH_COMPILING) == auto("blocks")
    assert to_compile(asked, CPU, WORTH_COMPILING - 1) == auto("no")


def test_without_a_working_compiler_a_cpu_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda function: fails)
    assert to_compile("auto", CPU, WORTH_COMPILING) == "no"
    assert to_compile("blocks", CPU, WORTH_COMPILING) == "blocks"


def test_an_unexpected_error_ends_a_process_among_others_at_once_after_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(arguments: list[str]) -> None:
        raise ZeroDivisionError("a defect")

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(cli, "parse", broken)
    monkeypatch.setattr(distributed, "end", end)
    with pytest.raises(ZeroDivisionError):
        cli.main()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith("ZeroDivisionError: a defect\n")


def test_sigterm_is_deferred_in_the_main_thread_alone_and_for_the_job_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stopping.deferred():
        assert not stopping.requested()
        signal.raise_signal(signal.SIGTERM)
        assert stopping.requested()
    assert signal.getsignal(signal.SIGTERM) == before
    with stopping.deferred():
        signal.raise_signal(signal.SIGINT)
        assert stopping.requested()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)  # The user insists.

    @stopping.deferred()
    def handler() -> Any:
        return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(handler).result() == before
    assert handler() != before


def test_a_checkpoint_that_stays_invisible_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoints.last_of_all(tmp_path) is None
    monkeypatch.setattr(distributed, "broadcast_object", lambda value: 5)
    monkeypatch.setattr(checkpoints, "VISIBLE_WITHIN", 0.0)
    with pytest.raises(UserError, match=r"00000005 is not visible to every process"):
        checkpoints.last_of_all(tmp_path)


def test_processes_may_open_as_many_files_as_the_machine_lets_them() -> None:
    """Each group keeps a connection to every other process, and a limit of 1,024 is usual."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 256
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, before[1]))
        distributed._open_many_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("job", ["compress", "head", "perceive", "probe"])
def test_jobs_of_one_process_do_not_write_the_same_files_from_several(
    job: str, tiny_store: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        "compress": [tiny_store, "--channels=3"],
        "head": [tiny_store, "--out", tmp_path / "head", "--masks", tmp_path],
        "perceive": [tiny_run, "--head", tmp_path, "--out", tmp_path / "seen"],
        "probe": [tiny_store, "--out", tmp_path / "probe"],
    }
    options = cli.parse([job, *map(str, given[job])])
    under_torchrun(monkeypatch, local_rank=1)
    with pytest.raises(UserError, match=f"^{job} works in one process; start it without torchrun$"):
        cli.execute(options)
    assert not list(tmp_path.iterdir())


def test_a_gpu_computes_the_same_bits_each_time_if_asked_to(
    machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    distributed.resolve_device("cuda")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"]
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for device, wanted, steady in ((cuda, True, True), (cuda, False, False), (cpu, True, False)):
        with distributed.deterministic(device, wanted):
            assert torch.are_deterministic_algorithms_enabled() == steady
        assert not torch.are_deterministic_algorithms_enabled()
    for strict in (True, False):  # Where it only warns, PyTorch lets attention differ.
        with distributed.deterministic(cuda, True, strict=strict):
            assert torch.is_deterministic_algorithms_warn_only_enabled() == (not strict)


def test_a_job_is_repeatable_as_its_options_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "resolve_device", torch.device)
    steady = distributed.repeatable(strict=True)(lambda options: torch.are_deterministic_algorithms_enabled())
    assert steady(SimpleNamespace(device="cuda", deterministic=True))
    assert not steady(SimpleNamespace(device="cuda", deterministic=False))
