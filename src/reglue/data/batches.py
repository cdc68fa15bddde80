"""From rows of a store to training samples: normalised, with everything random already drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from reglue.config import Recipe
from reglue.data.store import CLASS_TOKEN_CODES, Store, codes_column, compressor_of
from reglue.data.targets import Tokens, alignment_targets, target_columns
from reglue.diffusion.denoiser import DenoiserConfig
from reglue.diffusion.modalities import CLS, LATENT, LOCAL
from reglue.diffusion.objective import TrainingSample
from reglue.encoders.compressors import resize
from reglue.errors import UserError
from reglue.seeds import generator, normals, permutation

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Normalisation:
    """What a model sees of a modality: (x − shift)·scale, one shift and scale per channel."""

    shift: tuple[float, ...]
    scale: tuple[float, ...]

    def normalise(self, x: Tensor) -> Tensor:
        """Raw (B, C, …) to what the model learns."""
        shift, scale = self.tensors(x)
        return (x - shift) * scale

    def denormalise(self, x: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        shift, scale = self.tensors(x)
        return x / scale + shift

    def tensors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale in the type, on the device and broadcasting to the shape of x (B, C, …)."""
        view = (1, -1, *[1] * (x.ndim - 2))
        shift, scale = (torch.tensor(v, dtype=x.dtype, device=x.device).view(view) for v in (self.shift, self.scale))
        return shift, scale


def unit_variance(store: Store, column: str, one_scale: bool = False) -> Normalisation:
    """The normalisation to mean 0 and standard deviation 1 by the store's statistics: per channel, or over all."""
    statistics = store.manifest.statistics[column]
    mean, std = np.array(statistics.mean), np.array(statistics.std)
    if one_scale:  # The variance over all channels is the mean of theirs and the variance of their means.
        std = np.full_like(std, np.sqrt(np.square(std).mean() + mean.var()))
        mean = np.full_like(mean, mean.mean())
    return Normalisation(tuple(mean.tolist()), tuple((1 / np.maximum(std, 1e-6)).tolist()))


def local_column(recipe: Recipe) -> str:
    """The store's column with the compressed features that a recipe learns."""
    return codes_column(recipe.local.compressor, "features")


def class_token_column(recipe: Recipe) -> str:
    """The store's column with the class tokens, or their codes, that a recipe learns."""
    compressor = recipe.class_token.compressor
    return "cls" if compressor is None else codes_column(compressor, "cls")


def normalisations(store: Store, recipe: Recipe) -> dict[str, Normalisation]:
    """How the modalities of a recipe are scaled; one that is learned as it is has no entry."""
    autoencoder = store.manifest.autoencoder
    own = Normalisation(autoencoder.shift, autoencoder.scale)
    latent = recipe.latent
    scaled = {LATENT: unit_variance(store, "latent", latent.one_scale) if latent.unit_variance else own}
    if recipe.local.present and recipe.local.unit_variance:
        scaled[LOCAL] = unit_variance(store, local_column(recipe))
    if recipe.class_token.present and recipe.class_token.unit_variance:
        scaled[CLS] = unit_variance(store, class_token_column(recipe))
    return scaled


def denoiser_config(store: Store, recipe: Recipe) -> DenoiserConfig:
    """The sizes of a recipe's denoiser on a store.

    Raises UserError, with the command to run, if the store lacks what the recipe learns.
    """
    manifest = store.manifest
    needed = [
        *([class_token_column(recipe)] if recipe.class_token.present else []),
        *([local_column(recipe)] if recipe.local.present else []),
        *target_columns(recipe),
    ]
    how = {"cls": "--encoder NAME", "features": "--features"}
    for column in needed:
        if column not in manifest.columns:
            command = f"`reglue prepare … {how[column]}`" if column in how else _compress_command(store, column)
            has = ", ".join(sorted(manifest.columns))
            raise UserError(
                f"recipe {recipe.name} needs column {column}, which {store.folder} lacks (it has {has}); "
                f"make it with {command}"
            )
    encoder = manifest.encoder
    if recipe.alignment.present and encoder is None:
        raise UserError(
            f"recipe {recipe.name} aligns with a vision encoder, but {store.folder} was prepared without one"
        )
    if target_columns(recipe) and encoder is not None and encoder.layers[-1] != encoder.depth - 1:
        raise UserError(
            f"{store.folder} holds layers {list(encoder.layers)}, not the last one ({encoder.depth - 1}) that "
            "alignment needs; prepare with it among --layers, or use --alignment.targets online"
        )
    channels, *grid = manifest.columns["latent"].tensors["mean"].shape
    local = manifest.columns.get(local_column(recipe))
    class_token = manifest.columns.get(class_token_column(recipe))
    return recipe.denoiser_config(
        latent_channels=channels,
        grid=(grid[0], grid[1]),
        classes=len(manifest.source.class_names),
        local_channels=local.tensors["local"].shape[0] if local else 0,
        token_width=encoder.width if encoder else 0,
        class_token_width=class_token.tensors["cls"].shape[0] if class_token else 0,
    )


def _compress_command(store: Store, column: str) -> str:
    """What makes a column of codes, as far as the name tells."""
    of_class_token = column.startswith(CLASS_TOKEN_CODES)
    name = compressor_of(column).removeprefix(CLASS_TOKEN_CODES)
    kind, _, sizes = name.partition("-")
    channels, _, layers = sizes.partition("-")
    if channels.isdecimal() and layers in ("", "last"):
        options = f"--kind {kind} --channels {channels}{' --layers last' if layers else ''}"
    else:
        options = f"--name {name}"
    return f"`reglue compress {store.folder}{' --column cls' if of_class_token else ''} {options}`"


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Times in [0, 1] moved towards noise for shift > 1, towards data for shift < 1 (SD3, arXiv 2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True)
class HostBatch:
    """A training sample before its arithmetic: rows as they are stored, and everything random."""

    latent: dict[str, Tensor]
    """Tensors of the column `latent`."""
    codes: dict[str, Tensor]
    """`local` (B, K, h, w) at the encoder's grid and `cls` (B, D), where the recipe learns them."""
    target: dict[str, Tensor]
    """What the alignment targets have read."""
    noise: dict[str, Tensor]
    """ε of each modality, and that of the latents' distribution as `posterior`."""
    drawn: dict[str, Tensor]
    """`time`, `label` and, where maps are dropped, `keep_local`: see `TrainingSample`."""

    copied: torch.cuda.Event | None = None
    """When a GPU has it, if `sent` is copying it there."""

    def sent(self, stream: torch.cuda.Stream) -> HostBatch:
        """The same on a stream's GPU, which copies it while other streams compute."""
        with torch.cuda.stream(stream):
            # What is pinned already stays where it is, until it is copied even if it is not held any more.
            moved = self._each(lambda tensor: tensor.pin_memory().to(stream.device, non_blocking=True))
        return replace(moved, copied=stream.record_event())

    def to(self, device: torch.device) -> HostBatch:
        """The same on a device. If it has been `sent` there, what is computed from now on waits for the copy."""
        if self.copied is None:
            return self._each(lambda tensor: tensor.to(device))
        stream = torch.cuda.current_stream(device)
        stream.wait_event(self.copied)
        for part in self._parts():
            for tensor in part.values():
                tensor.record_stream(stream)  # Its memory is not given away before this stream has read it.
        return self

    def _parts(self) -> list[dict[str, Tensor]]:
        return [self.latent, self.codes, self.target, self.noise, self.drawn]

    def _each(self, move: Callable[[Tensor], Tensor]) -> HostBatch:
        moved = [{name: move(value) for name, value in part.items()} for part in self._parts()]
        latent, codes, target, noise, drawn = moved
        return HostBatch(latent, codes, target, noise, drawn)


class TrainingData:
    """The training samples of a recipe on a store.

    Sample `position` of the run, counted over all steps, is a function of the seed and the position: its image, its
    time, its noise and what is dropped. So a batch can be cut into parts and spread over processes in any way.

    Reading and drawing (`read`) is the CPU's work, for any number of threads, which also have a GPU copy what they have
    read. All arithmetic (`finish`) is the device's: it has the time for it, and what is copied to it is as small as on
    disk.
    """

    def __init__(
        self,
        store: Store,
        recipe: Recipe,
        config: DenoiserConfig,
        seed: int,
        device: torch.device = CPU,
    ) -> None:
        """Raises UserError if what the alignment's targets are made of is not at hand."""
        gpu = device.type == "cuda"
        self.store = Store(store.folder, store.manifest, pinned=True) if gpu else store
        self.recipe, self.config, self.seed, self.device = recipe, config, seed, device
        self.shapes = config.shape.shapes()
        self.targets = alignment_targets(self.store, recipe, device) if config.alignment_width else None
        self.copies = torch.cuda.Stream(device) if gpu else None
        # Made once, since to copy them to a GPU in every step would wait for it.
        self.scales = {
            name: scaling.tensors(torch.empty(1, *self.shapes[name], device=device))
            for name, scaling in normalisations(store, recipe).items()
        }
        # Threads that read ahead may be in two epochs at once.
        self._order = lru_cache(maxsize=2)(lambda epoch: permutation(seed, "order of images", epoch, len(store)))

    def rows(self, positions: range) -> Tensor:
        """The store's rows at positions of the run: every epoch has a random order of its own."""
        epochs_and_indices = [divmod(position, len(self.store)) for position in positions]
        return torch.stack([self._order(epoch)[index] for epoch, index in epochs_and_indices])

    def sample(self, positions: range) -> TrainingSample:
        """The samples at positions of the run, on the device."""
        return self.finish(self.read(positions))

    def read(self, positions: range) -> HostBatch:
        """Read and draw the samples at positions of the run, on the CPU. If the device is a GPU, it copies them."""
        rows = self.rows(positions)
        generators = [generator(self.seed, "training sample", position) for position in positions]
        uniform = torch.from_numpy(np.stack([g.random(3) for g in generators]))
        noise = normals(generators, {"posterior": self.shapes[LATENT], **self.shapes}, pinned=self.store.pinned)

        label = self.store.labels[rows]
        if not self.config.classes:
            label = torch.zeros_like(label)  # the null label is the only one
        dropped = uniform[:, 1] < self.recipe.optimisation.label_dropout
        drawn = {
            "time": shift_time(uniform[:, 0], self.recipe.optimisation.time_shift).float(),
            "label": torch.where(dropped, self.config.classes, label),
        }
        dropout = self.recipe.local.dropout if LOCAL in self.shapes else 0.0
        if dropout:
            drawn["keep_local"] = uniform[:, 2] >= dropout
        columns = {LOCAL: local_column(self.recipe), CLS: class_token_column(self.recipe)}
        draft = HostBatch(
            latent=self.store.read("latent", rows),
            codes={k: self.store.read(column, rows)[k] for k, column in columns.items() if k in self.shapes},
            target=self.targets.read(rows) if self.targets else {},
            noise=noise,
            drawn=drawn,
        )
        return draft.sent(self.copies) if self.copies else draft

    @torch.no_grad()
    def finish(self, draft: HostBatch) -> TrainingSample:
        """The training samples of a draft, on the device: nothing here waits for it."""
        draft = draft.to(self.device)
        latent = draft.latent["mean"].float()
        if "std" in draft.latent:
            latent = latent + draft.latent["std"].float() * draft.noise["posterior"]
        state = {LATENT: latent, **{name: code.float() for name, code in draft.codes.items()}}
        for name, (shift, scale) in self.scales.items():
            state[name] = (state[name] - shift) * scale
        if LOCAL in state:
            state[LOCAL] = resize(state[LOCAL], self.config.shape.grid)
        return TrainingSample(
            data=state,
            noise={name: draft.noise[name] for name in state},
            alignment_target=self._target(self.targets.tokens(draft.target)) if self.targets else None,
            time=draft.drawn["time"],
            label=draft.drawn["label"],
            keep_local=draft.drawn.get("keep_local"),
        )

    def _target(self, tokens: Tokens) -> Tensor:
        """The encoder's raw tokens (B, N, D) float32 for the model's tokens: resampled if the grids differ."""
        patches = tokens.patches
        if patches.shape[2:] != self.config.token_grid:
            patches = F.interpolate(patches.float(), self.config.token_grid, mode="bilinear", antialias=True)
        patches = patches.flatten(2).transpose(1, 2)
        leading = 1 if self.config.shape.class_token_width else 0
        # Float16 to float32, another order and the token in front: in one pass over the largest tensor of a step.
        target = patches.new_empty((len(patches), leading + patches.shape[1], patches.shape[2]), dtype=torch.float32)
        target[:, leading:] = patches
        if leading:
            target[:, 0] = tokens.class_token
        return target
