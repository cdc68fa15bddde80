"""Checkpoints: folders of safetensors, whole or not there, from which training continues with the same bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reglue.errors import UserError

FOLDER = "checkpoints"
MODEL, EMA, OPTIMISER, PROGRESS = "model.safetensors", "ema.safetensors", "optimiser.safetensors", "progress.json"


def save(run: Path, step: int, model: nn.Module, ema: dict[str, Tensor], optimiser: torch.optim.AdamW) -> Path:
    """Write the checkpoint of a step, beside its place first. Raises UserError if the disk is full."""
    return _write(run, step, {MODEL: model.state_dict(), EMA: ema, OPTIMISER: _optimiser_tensors(model, optimiser)})


def save_weights(run: Path, step: int, ema: dict[str, Tensor]) -> Path:
    """Write a checkpoint of averaged weights alone: to sample from, not to continue. Raises UserError as `save`."""
    return _write(run, step, {EMA: {name: value.detach().cpu().contiguous() for name, value in ema.items()}})


def _write(run: Path, step: int, files: dict[str, dict[str, Tensor]]) -> Path:
    folder = run / FOLDER / f"{step:08d}"
    beside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        for name, tensors in files.items():
            save_file(tensors, beside / name)
        (beside / PROGRESS).write_text(json.dumps({"step": step}))
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(f"cannot write checkpoint {folder}: {error}; the previous checkpoint is untouched") from None
    return folder


def steps(run: Path) -> list[int]:
    """The steps that a run has checkpoints of, ascending. Half-written ones do not count."""
    return sorted(int(folder.name) for folder in (run / FOLDER).glob("[0-9]" * 8) if (folder / PROGRESS).is_file())


def forget_all_but(run: Path, keep: int) -> None:
    """Delete the oldest checkpoints; `keep` 0 keeps all."""
    for step in steps(run)[:-keep] if keep else []:
        shutil.rmtree(run / FOLDER / f"{step:08d}", ignore_errors=True)


def find(run: Path, step: int | None = None) -> Path:
    """The folder of a checkpoint, the last one if no step is given. Raises UserError, listing what is there."""
    available = steps(run)
    if not available:
        raise UserError(f"{run} has no checkpoint yet; train it with `reglue train`")
    step = available[-1] if step is None else step
    if step not in available:
        raise UserError(f"{run} has no checkpoint of step {step}; it has {', '.join(map(str, available))}")
    return run / FOLDER / f"{step:08d}"


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file. Raises UserError if it is missing or damaged."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}); delete its folder to go on from the one before") from None


def restore(folder: Path, model: nn.Module, ema: dict[str, Tensor], optimiser: torch.optim.AdamW) -> int:
    """Load a checkpoint into a model, its moving average and its optimiser, in place. Returns the step."""
    model.load_state_dict(read_weights(folder / MODEL))
    for name, value in read_weights(folder / EMA).items():
        ema[name].copy_(value)
    state = read_weights(folder / OPTIMISER)
    for name, parameter in model.named_parameters():
        if f"{name}.step" in state:
            # load_state_dict would do as well, but it counts parameters where these names are safe against reordering.
            optimiser.state[parameter] = {
                key: state[f"{name}.{key}"].to(parameter.device) for key in ("step", "exp_avg", "exp_avg_sq")
            }
    return int(json.loads((folder / PROGRESS).read_text())["step"])


def _optimiser_tensors(model: nn.Module, optimiser: torch.optim.AdamW) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimiser.state.get(parameter, {}).items()
    }
