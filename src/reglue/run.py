"""What a run is: `run.json`, with everything that sampling and resuming need."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from reglue.config import Recipe
from reglue.data.batches import denoiser_config
from reglue.data.manifest import compressor_of, holds_codes
from reglue.data.store import Store
from reglue.data.targets import decoded, target_columns, target_compressor
from reglue.diffusion.denoiser import DenoiserConfig
from reglue.encoders.autoencoders import Autoencoder, AutoencoderSpec, load_autoencoder
from reglue.encoders.compressors import Compressor, CompressorSpec, load_compressor
from reglue.encoders.vision import EncoderSpec
from reglue.errors import UserError, option
from reglue.files import read_json, to_json, write_text
from reglue.names import Weights
from reglue.overrides import differing
from reglue.sampling import Precision
from reglue.training import checkpoints

FILE = "run.json"
COMPRESSORS = "compressors"
"""Folder of the compressors, one per modality that is learned as codes, in the run's and in a store's."""
FORMAT = 2

BROUGHT = {"starter": "model", "flowers": "flowers"}
"""The runs that the package brings along, and their folders in the starter kit."""
AUTOENCODER = "autoencoder"
"""Folder of an autoencoder that a shared run brings along."""
NEEDED = [
    FILE,
    f"{checkpoints.FOLDER}/*/{checkpoints.EMA}",
    f"{checkpoints.FOLDER}/*/{checkpoints.PROGRESS}",
    f"{COMPRESSORS}/*",
    f"{AUTOENCODER}/*",
]
"""Of a repository, what sampling reads."""
OPTIONS = ("seed",)
"""Fields of a record that are options of `train`, beside those of its recipe."""
BRIEF = 60
"""Characters of a value that a message quotes, at most."""
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Start:
    """The checkpoint of another run with whose weights a run started."""

    run: str
    """Its folder as it was given; it may have moved since, or be gone."""
    step: int
    weights: Weights
    """The averaged ones, or those that were trained."""
    sha256: str
    """Of their file."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Everything about a run but its weights."""

    format: int = FORMAT
    recipe: Recipe
    denoiser: DenoiserConfig
    class_names: tuple[str, ...]
    """In the order of the labels; empty for an unconditional model."""
    resolution: tuple[int, int]
    """Height and width of the images in pixels."""
    autoencoder: AutoencoderSpec
    encoder: EncoderSpec | None
    compressors: dict[str, CompressorSpec]
    """Of the modalities that are learned as codes, by name."""
    decoder: str | None = None
    """The autoencoder that decodes, where it is another than the one whose latents are learned: `sd-vae-ft-ema` for
    the published models, which learn those of `sd-vae-ft-mse`."""
    autoencoder_assumed: bool = field(default=False, compare=False)
    """Whether nobody said whose latents an imported run learned, so that they were taken for the published ones."""
    seed: int | None = None
    """None for an imported run."""
    store: str | None = field(default=None, compare=False)
    """The store's folder as it was given; it may have moved since. None for an imported or shared run."""
    store_hash: str | None = None
    """None for an imported run."""
    origin: str | None = field(default=None, compare=False)
    """The published file that the run was imported from; None for a run that was trained here."""
    start: Start | None = field(default=None, compare=False)
    """None for a run that began with random weights."""
    versions: dict[str, str] = field(compare=False)

    @classmethod
    def of(cls, store: Store, recipe: Recipe, seed: int) -> RunRecord:
        """The record of training a recipe on a store. Raises UserError if they do not fit together."""
        manifest = store.manifest
        denoiser = denoiser_config(store, recipe)  # First of all, since it checks that the store has the columns.
        return cls(
            recipe=recipe,
            denoiser=denoiser,
            class_names=manifest.source.class_names,
            resolution=manifest.source.resolution,
            autoencoder=manifest.autoencoder,
            encoder=manifest.encoder,
            compressors={
                part.modality: manifest.compressors[compressor_of(part.column)]
                for part in recipe.learned_parts
                if holds_codes(part.column)
            },
            seed=seed,
            store=str(store.folder.absolute()),
            store_hash=data_hash(store, recipe),
            versions=versions(),
        )

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """The record of a run folder. Raises UserError if it is none."""
        path = folder / FILE
        if not path.is_file():
            raise UserError(f"{folder} is not a run: it has no {FILE}; make one with `reglue train`")
        return read_json(path, cls, "put the file back, or train again in a new folder")

    def write(self, folder: Path) -> None:
        """Write the record into a run folder, whole or not at all."""
        write_text(folder / FILE, to_json(self))

    @property
    def has_null_class(self) -> bool:
        """Whether the model can stand for no class: it has no classes at all, or was trained without them too."""
        trained = bool(self.recipe.optimisation.label_dropout) or self.start is not None
        return trained or not self.denoiser.classes

    def initial_share(self, step: int) -> float:
        """How much of the averaged weights of a step, from 0 to 1, is those that the run began with; 0 if imported."""
        return 0.0 if self.origin else self.recipe.optimisation.initial_share(step)

    def trained_on(self, store: Store) -> bool:
        """Whether a store holds, to the bit, what this run was trained on."""
        there = {*needed_columns(self.recipe)} <= store.manifest.columns.keys()
        return there and data_hash(store, self.recipe) == self.store_hash

    def settled(self, before: RunRecord | None, precision: Precision) -> RunRecord:
        """The same with what its recipe leaves open decided: as it was `before`, if a run is continued."""
        optimisation = self.recipe.optimisation.settled(before and before.recipe.optimisation, precision)
        return replace(self, recipe=replace(self.recipe, optimisation=optimisation))

    def differences(self, other: RunRecord) -> list[str]:
        """What another record has in place of this one's, for a message: see `told`.

        The number of steps may differ where the learning rate does not depend on it: such a run may be prolonged. And
        what is compiled may differ, which changes nothing but rounding.
        """
        free = {"recipe.optimisation.compile"}
        if self.recipe.optimisation.decay == "constant":
            free.add("recipe.optimisation.steps")
        different = {name: values for name, values in differing(self, other).items() if name not in free}
        # The sizes of the denoiser are those of the recipe and the store.
        causes = {name: values for name, values in different.items() if not name.startswith("denoiser.")}
        return told(causes or different, OPTIONS)


def decoder(
    record: RunRecord, device: torch.device, name: str | None = None, folder: Path | None = None
) -> Autoencoder:
    """The autoencoder that turns a run's latents into images. Raises UserError if it is not the run's own.

    A `name` that is given replaces it on purpose, and only channels and downsampling must fit: latents are scaled as
    the run has recorded. Relative names in the record are looked for in the run's `folder` first: a shared run brings
    its own autoencoder along.
    """
    expected = record.autoencoder
    own = record.decoder or expected.name
    if folder is not None and (folder / own).is_dir():
        own = str(folder / own)
    found = load_autoencoder(name or own, device)
    for part, what in (("latent_channels", "latent channels"), ("downsampling", "pixels of a latent along a side")):
        if getattr(found.spec, part) != getattr(expected, part):
            raise UserError(
                f"{option('autoencoder')} {name or own} has {getattr(found.spec, part)} {what}, "
                f"the run has {getattr(expected, part)}"
            )
    if name is None and record.decoder is None:
        # What was never seen cannot be compared.
        seen = found.spec if expected.weights_sha256 else replace(found.spec, weights_sha256=None)
        compared = (part.name for part in fields(expected) if part.compare)
        changed = [part for part in compared if getattr(seen, part) != getattr(expected, part)]
        if changed:
            raise UserError(
                f"autoencoder {own} is not the one that the run was trained with, {', '.join(changed)} differ: "
                f"put the old one back, or choose one with {option('autoencoder')}"
            )
    return found


def find_compressor(record: RunRecord, run: Path | None, modality: str) -> Compressor | None:
    """The compressor of a modality, from the run's folder or its store; None if neither has its own."""
    places = [run / COMPRESSORS / modality] if run else []
    column = next((m.column for m in record.denoiser.modalities if m.name == modality), "")
    if record.store and column:
        places.append(Path(record.store) / COMPRESSORS / compressor_of(column))
    for place in places if modality in record.compressors else []:
        if place.is_dir():
            compressor = load_compressor(place, "delete it and run the command that wrote it again")
            if compressor.spec() == record.compressors[modality]:
                return compressor
    return None


def versions() -> dict[str, str]:
    """Of the packages that decide the numbers."""
    return {name: version(name) for name in ("reglue", "torch", "numpy", "safetensors")}


def find_run(run: str | Path, revision: str | None = None) -> Path:
    """The folder of a run: a local one, or else the package's (`BROUGHT`) or the local copy of `OWNER/NAME` on the hub.

    Raises UserError if the hub is asked and cannot be reached, or has no such repository. Whether the folder holds a
    run is for the caller to see.
    """
    folder = Path(run)
    if str(run) in BROUGHT and not folder.exists():
        return Path(str(resources.files("reglue.starter"))) / BROUGHT[str(run)]
    if folder.exists() or not NAME.fullmatch(str(run)):
        return folder
    try:
        return Path(snapshot_download(str(run), revision=revision, allow_patterns=NEEDED, etag_timeout=5))
    except Exception as error:  # whatever the hub's client raises: offline, refused, not found
        raise UserError(
            f"{run}: there is no such folder, and the Hugging Face hub gives no such model ({hub_error(error)}); check "
            "the name and the connection, download the repository elsewhere and give its folder, or take "
            f"{' or '.join(BROUGHT)}, which need no network"
        ) from error


def known_as(run: str | Path) -> str:
    """The absolute path of a run's folder, so that it is found from elsewhere too; any other run's name."""
    return str(Path(run).resolve() if Path(run).exists() else run)


def hub_error(error: Exception) -> str:
    """What the hub's client raised, in a few words."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def needed_columns(recipe: Recipe) -> list[str]:
    """The store's columns that training a recipe reads."""
    return sorted({"label", *(part.column for part in recipe.learned_parts), *target_columns(recipe)})


def data_hash(store: Store, recipe: Recipe) -> str:
    """SHA-256 of what training reads, so that adding a column that it does not read changes nothing."""
    columns = store.manifest.columns
    parts = [shard.sha256 for name in needed_columns(recipe) for shard in columns[name].shards]
    if decoded(recipe):
        parts.append(store.manifest.compressors[target_compressor(recipe)].weights_sha256)
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def told(different: Mapping[str, tuple[Any, Any]], options: Collection[str]) -> list[str]:
    """What differs, for a message: `--optimisation.batch-size 64 (was 32)`, or its name where values are long.

    Fields of a recipe are options, and so are those that are named.
    """
    lines: list[str] = []
    for name, values in different.items():
        is_option = name.startswith("recipe.") or name in options
        spelt = option(name.removeprefix("recipe.")) if is_option else name
        if is_option and isinstance(values[1], bool):  # A switch is not followed by a value.
            before, _, last = spelt.rpartition(".")
            lines.append(spelt if values[1] else f"{before}.{'no-' if spelt.startswith('-') else 'no_'}{last}")
            continue
        was, is_ = (" ".join(map(str, value)) if isinstance(value, tuple) else str(value) for value in values)
        lines.append(spelt if max(len(was), len(is_)) > BRIEF else f"{spelt} {is_} (was {was})")
    return lines
