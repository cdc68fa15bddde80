"""Checkpoints: seconds to save and to load, and bytes on disk."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import tyro
from torch import nn

from common import Comparison, alternate, ratio, report
from comparisons.official import Official
from reglue.diffusion.denoiser import Denoiser
from reglue.published.weights import export_official
from reglue.training import checkpoints
from workloads import Data, Workload


@dataclass(frozen=True)
class Checkpointing:
    """Time saving and loading a checkpoint: weights, averaged weights, AdamW's state.

    Ours is safetensors, written beside its place and renamed. Theirs is one pickle by torch.save, loaded to the CPU
    first, as their train.py has it.
    """

    conditions: Annotated[Comparison, tyro.conf.arg(name="")] = field(default_factory=Comparison)
    data: Data = "imagenet"
    model: str | None = None
    """B/2, XL/2, …; default: B/2, or the demo's own."""
    folder: Path | None = None
    """On the disk that is measured; a temporary one if not given."""


def stepped(model: nn.Module) -> torch.optim.AdamW:
    """An optimiser that has made a step, so that it has a state."""
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, weight_decay=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return optimiser


def checkpointing(options: Checkpointing) -> str:
    """Save and load both, in turns."""
    conditions = options.conditions
    device = conditions.begin()
    workload = Workload.of("toy" if conditions.toy else options.data, None if conditions.toy else options.model)
    model = workload.random_model().to(device)
    ema = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser = stepped(model)
    with TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        saves: dict[str, Callable[[], object]] = {"ours": lambda: save(folder / "run", model, ema, optimiser)}
        loads: dict[str, Callable[[], object]] = {
            "ours": lambda: checkpoints.restore(checkpoints.find(folder / "run"), model, ema, optimiser)
        }
        if conditions.official:
            saves["theirs"], loads["theirs"] = theirs(conditions.official, model, workload, folder)
        saving = alternate(saves, conditions.repeats, device)
        sizes = {"ours": sum(file.stat().st_size for file in (folder / "run").rglob("*.*") if file.is_file())}
        if conditions.official:
            sizes["theirs"] = (folder / "theirs.pt").stat().st_size
        loading = alternate(loads, conditions.repeats, device)
    figures: dict[str, Any] = {"save_seconds": saving, "load_seconds": loading, "bytes": sizes}
    if conditions.official:
        figures["times_faster"] = {
            "save": ratio(saving["theirs"], saving["ours"], device),
            "load": ratio(loading["theirs"], loading["ours"], device),
        }
    return report("checkpoint", options, figures, device)


def save(run: Path, model: nn.Module, ema: dict[str, torch.Tensor], optimiser: torch.optim.AdamW) -> None:
    """Write a checkpoint, and wait for it."""
    writer = checkpoints.Writer(run, keep=0, sharded=False)
    writer.save(1, model, ema, optimiser)
    writer.wait()
    writer.close()


def theirs(
    folder: Path, model: Denoiser, workload: Workload, out: Path
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Saving and loading as their train.py does: a dictionary of state dicts."""
    device = model.positions.device
    network = Official.load(folder, "models.sit").model(workload.config)
    network.load_state_dict(export_official("reglue", workload.config, model.state_dict()))
    network.to(device)
    ema = Official.load(folder, "models.sit").model(workload.config).to(device)
    ema.load_state_dict(network.state_dict())
    optimiser = stepped(network)
    file = out / "theirs.pt"

    def save() -> None:
        content = {"model": network.state_dict(), "ema": ema.state_dict(), "opt": optimiser.state_dict()}
        torch.save({**content, "args": Namespace(model="any"), "steps": 1}, file)

    def load() -> None:
        with torch.serialization.safe_globals([Namespace]):
            content = torch.load(file, map_location="cpu")
        network.load_state_dict(content["model"])
        ema.load_state_dict(content["ema"])
        optimiser.load_state_dict(content["opt"])

    return save, load
