"""`precision: auto` becomes what the device multiplies fastest, is recorded as that, and stays so elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import TINY_RECIPE
from reglue import machine
from reglue.cli import parse
from reglue.commands.sample import Sample, sample
from reglue.commands.train import train
from reglue.config import OptimiserConfig
from reglue.errors import UserError
from reglue.machine import multiplies_bfloat16_faster
from reglue.run import FILE, RunRecord
from reglue.samples import PROTOCOL, archived_protocol
from reglue.sampling import Precision
from reglue.training import distributed, precision
from reglue.training.precision import agreed, to_precision

CPU = torch.device("cpu")
AMX = {"amx_tile", "amx_bf16", "avx512_bf16"}
ZEN4 = {"avx512_bf16", "sse4a"}
Pretend = Callable[[bool], None]


@pytest.fixture
def fast_bfloat16(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """Has this machine be one that multiplies bfloat16 faster, or one that does not."""
    return lambda faster: monkeypatch.setattr(precision, "multiplies_bfloat16_faster", lambda _: faster)


@pytest.mark.parametrize(
    ("has", "capability", "allowed", "faster"),
    [
        (AMX, "AVX512", None, True),
        (AMX, "AVX512", "default", True),
        (AMX, "AVX512", "AVX512_CORE_AMX", True),
        (AMX, "AVX512", "AVX512_CORE_BF16", False),  # An Intel without AMX.
        (AMX, "AVX512", "AVX2", False),
        (AMX, "AVX2", None, False),
        (AMX, "DEFAULT", None, False),
        ({"avx512_bf16"}, "AVX512", None, False),
        ({"amx_tile", "amx_int8"}, "AVX512", None, False),
        (ZEN4, "AVX512", None, True),
        (ZEN4, "AVX512", "AVX512_CORE_BF16", True),
        (ZEN4, "AVX512", "AVX512_CORE_VNNI", False),
        (ZEN4, "AVX2", "AVX2", False),
        (set[str](), "NEON", None, False),
    ],
)
def test_what_a_cpu_has_and_may_use_decides(
    has: set[str], capability: str, allowed: str | None, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "instructions", lambda: has)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if allowed:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", allowed)
    assert multiplies_bfloat16_faster(CPU) == faster
    assert to_precision("auto", CPU) == ("bfloat16" if faster else "float32")
    assert to_precision("tf32", CPU) == "tf32"


def test_instructions_are_found_with_linux_and_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    listed = tmp_path / "cpuinfo"
    listed.write_text("processor : 0\nmodel name\t: Some CPU\nflags\t\t: fpu amx_tile amx_bf16\n\nprocessor : 1\n")
    monkeypatch.setattr(machine, "CPUINFO", listed)
    assert machine.instructions() == {"fpu", "amx_tile", "amx_bf16"}
    assert machine.machine(CPU).startswith("Some CPU, ")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "none")
    known = {"avx2": True, "amx_tile": False, "architecture": "x86_64", "l2_cache_size": 1}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert machine.instructions() == {"avx2"}


@pytest.mark.parametrize("recent", [True, False])
def test_a_gpu_is_asked_for_products_of_its_own(recent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return recent or including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert multiplies_bfloat16_faster(torch.device("cuda")) == recent


def test_the_first_process_decides_for_all(fast_bfloat16: Pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(_: Precision) -> Precision:
        return "bfloat16"

    fast_bfloat16(False)
    monkeypatch.setattr(distributed, "broadcast_object", said)
    assert agreed(CPU) == "bfloat16"


def test_what_a_training_leaves_open_is_as_before() -> None:
    left_open, before = OptimiserConfig(), OptimiserConfig(precision="bfloat16")
    assert left_open.settled(None, "float32").precision == "float32"
    assert left_open.settled(before, "float32").precision == "bfloat16"
    assert OptimiserConfig(precision="tf32").settled(before, "float32").precision == "tf32"


def test_a_run_keeps_what_it_began_with(tiny_store: Path, tmp_path: Path, fast_bfloat16: Pretend) -> None:
    tiny = [option for option in TINY_RECIPE if "precision" not in option]

    def trained(run: str, steps: int, *more: str) -> Path:
        out = tmp_path / run
        arguments = ["--store", str(tiny_store), "--out", str(out), *tiny, f"--optimisation.steps={steps}", *more]
        return train(parse(["train", "reglue", *arguments]))

    fast_bfloat16(True)
    whole, run = trained("whole", 4), trained("run", 2)
    assert RunRecord.read(run).recipe.optimisation.precision == "bfloat16"
    fast_bfloat16(False)
    trained("run", 4)  # On another machine, by the same command.
    assert RunRecord.read(run).recipe.optimisation.precision == "bfloat16"
    expected, found = (load_file(each / "checkpoints" / "00000004" / "model.safetensors") for each in (whole, run))
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    with pytest.raises(UserError, match=r"other settings: optimisation\.precision float32 \(was bfloat16\)"):
        trained("run", 6, "--optimisation.precision=float32")
    assert RunRecord.read(trained("here", 2)).recipe.optimisation.precision == "float32"


@pytest.mark.parametrize("name", ["images", "images.npz"])
def test_images_are_continued_in_the_precision_of_those_that_are_there(
    name: str, tiny_run: Path, tmp_path: Path, fast_bfloat16: Pretend
) -> None:
    record, run, out = RunRecord.read(tiny_run), tmp_path / "run", tmp_path / name
    run.mkdir()
    for part in ("checkpoints", "compressors"):
        (run / part).symlink_to(tiny_run / part)
    ways = replace(record.recipe.sampling, precision="auto")
    replace(record, recipe=replace(record.recipe, sampling=ways)).write(run)
    assert (run / FILE).is_file()

    def recorded(place: Path = out) -> str:
        protocol = archived_protocol(place) if place.suffix else json.loads((place / PROTOCOL).read_text())
        assert protocol
        return protocol["sampling"]["precision"]

    fast_bfloat16(True)
    sample(Sample(run, out, count=2, device="cpu"))
    assert recorded() == "bfloat16"
    fast_bfloat16(False)
    sample(Sample(run, out, count=2 if out.suffix else 3, device="cpu"))
    assert recorded() == "bfloat16"
    with pytest.raises(UserError, match=r"another protocol \(sampling\)"):
        sample(Sample(run, out, count=2, device="cpu", precision="float32"))
    assert recorded(sample(Sample(run, tmp_path / f"other-{name}", count=1, device="cpu"))) == "float32"
