"""`reglue export`: a run to a checkpoint under the names of the published code bases."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tyro.conf import Positional

from reglue.config import Recipe
from reglue.errors import UserError, option
from reglue.files import TakesPaths, replacing
from reglue.locks import writes
from reglue.published.weights import ENCODER_DEPTH, PATH_TYPE, PREDICTION, STEP, VELOCITY, export_official, family_of
from reglue.run import RunRecord, find_run
from reglue.training import checkpoints

ENDINGS = (".safetensors", ".pt", ".pth")


@dataclass(frozen=True)
class ExportRun(TakesPaths):
    """Write a run's weights under the names, and in the time convention, of SiT's, REPA's, ReDi's, REG's or REGLUE's
    code."""

    run: Positional[Path]
    """Folder of the run, or OWNER/NAME of one on the Hugging Face hub."""
    out: Path
    """File to write. A .safetensors file holds the averaged weights, with step and path in its metadata; a .pt or .pth
    file holds {ema, model, args, steps}, as the published code reads it. Published samplers take the path as an
    option."""
    step: int | None = None
    """Checkpoint to export; the last one if not given."""


@writes()
def export_run(options: ExportRun) -> Path:
    """Export the run. Returns the file, which is written whole or not at all.

    Raises UserError for a run with a combination of parts that no published code has, and for another kind of file.
    """
    if options.out.suffix not in ENDINGS:
        raise UserError(f"--out {options.out}: choose a file that ends in {', '.join(ENDINGS)}")
    folder = find_run(options.run)
    record = RunRecord.read(folder)
    checkpoint = checkpoints.find(folder, options.step)
    refuse_own_scales(record.recipe)
    family = family_of(record.denoiser)

    def published(name: str) -> dict[str, Tensor]:
        weights = export_official(family, record.denoiser, checkpoints.read_weights(checkpoint / name))
        return {key: value.contiguous() for key, value in weights.items()}

    averaged, step, arguments = published(checkpoints.EMA), int(checkpoint.name), arguments_of(record)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(options.out) as beside:
        if options.out.suffix == ".safetensors":
            save_file(averaged, beside, {STEP: str(step)} | {name: str(value) for name, value in arguments.items()})
        else:
            # An imported or shared run has the averaged weights alone.
            has_others = (checkpoint / checkpoints.MODEL).is_file()
            others = published(checkpoints.MODEL) if has_others else averaged
            torch.save({"model": others, "ema": averaged, "args": arguments, "steps": step}, beside)
    print(f"{options.out}: {family} {record.recipe.model} of step {step}")
    return options.out


def arguments_of(record: RunRecord) -> dict[str, str | int]:
    """What the shapes of the weights leave open, under the names of the published options, for `reglue import`."""
    arguments: dict[str, str | int] = {PREDICTION: VELOCITY[0], PATH_TYPE: record.recipe.path}
    if record.denoiser.alignment_depth:
        arguments[ENCODER_DEPTH] = record.denoiser.alignment_depth
    return arguments


def refuse_own_scales(recipe: Recipe) -> None:
    """Raise UserError for a recipe that scales a modality by the store's statistics, which the files cannot hold."""
    for part in recipe.learned_parts:
        if part.unit_variance:
            raise UserError(
                f"the published code has no {option(part.prefix + 'unit_variance')}: the file would lose its "
                "statistics, so this run cannot be exported"
            )
