"""What the folder of a trained autoencoder holds: how it was trained, and the result."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors import SafetensorError

from reglue.encoders.alignment import FILE as ALIGNMENT_FILE
from reglue.encoders.alignment import save_alignment
from reglue.encoders.autoencoders import DIFFUSERS_WEIGHTS, AutoencoderSpec
from reglue.encoders.vision import EncoderSpec
from reglue.errors import UserError
from reglue.files import BESIDE, seal, to_json, write_text
from reglue.overrides import differing
from reglue.reals.config import AutoencoderRecipe
from reglue.reals.trainable import AlignedAutoencoder
from reglue.run import told
from reglue.sampling import Precision

OPTIONS = ("resolution", "validation", "validation_images", "statistics_images", "seed")
"""Fields of a record that are options of `autoencode`, beside those of its recipe."""
RECORD, CONFIG, MEAN_STD = "training.json", "config.json", "mean_std.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """`training.json`: how an autoencoder was trained."""

    format: int = FORMAT
    recipe: AutoencoderRecipe
    source: AutoencoderSpec | None
    """What it began with; None for new weights."""
    encoder: EncoderSpec
    resolution: tuple[int, int]
    fingerprint: str
    """Of the images."""
    validation: str
    """The share held out, or the fingerprint of the other folder."""
    validation_images: int
    statistics_images: int
    seed: int
    images: str = field(compare=False)
    versions: dict[str, str] = field(compare=False)
    steps_done: int = field(default=0, compare=False)
    """Of which the folder holds the result; 0 before there is one."""
    figures: dict[str, float] = field(default_factory=dict, compare=False)
    """Of the result, on held-out images."""
    measured_with: dict[str, str] = field(default_factory=dict, compare=False)
    """The files of the networks behind the figures lpips and rfid."""

    def settled(self, before: TrainingRecord | None, precision: Precision) -> TrainingRecord:
        """The same with what its recipe leaves open decided: as it was `before`, if a training is continued."""
        optimisation = self.recipe.optimisation.settled(before and before.recipe.optimisation, precision)
        return replace(self, recipe=replace(self.recipe, optimisation=optimisation))


def differences(before: TrainingRecord, now: TrainingRecord) -> list[str]:
    """What differs, for a message. The number of steps may, where the learning rate does not depend on it."""
    free = {"recipe.optimisation.steps"} if now.recipe.optimisation.decay == "constant" else ()
    return told({name: values for name, values in differing(before, now).items() if name not in free}, OPTIONS)


def write_result(out: Path, averaged: AlignedAutoencoder, mean: float, std: float, record: TrainingRecord) -> None:
    """The averaged weights in diffusers' layout, the alignment network, `mean_std.json` and the finished record.

    All of it is written beside first, and `config.json`, without which nobody takes the folder for an autoencoder, is
    moved last: the result is there whole or not at all.
    """
    (out / CONFIG).unlink(missing_ok=True)
    beside = out / f"result{BESIDE}"
    shutil.rmtree(beside, ignore_errors=True)
    # What diffusers' own pipelines and ours normalise by.
    averaged.network.register_to_config(scaling_factor=1 / std, shift_factor=mean, latents_mean=None, latents_std=None)
    try:
        averaged.network.save_pretrained(beside)
        seal(beside / DIFFUSERS_WEIGHTS)
        config = json.loads((beside / CONFIG).read_text())
        config.pop("_name_or_path", None)  # The folder of --from is in the record.
        (beside / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (beside / MEAN_STD).write_text(json.dumps({"mean": mean, "std": std}))
        if averaged.alignment:
            save_alignment(averaged.alignment, beside / ALIGNMENT_FILE)
        for file in sorted(beside.iterdir(), key=lambda file: file.name == CONFIG):
            file.replace(out / file.name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {out}: {error}; free some space and run it again") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    write_text(out / RECORD, to_json(record))
