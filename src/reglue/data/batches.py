"""From rows of a store to training samples: normalised, with everything random already drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from reglue.data.store import CLASS_TOKEN_CODES, Store, codes_column, compressor_of
from reglue.diffusion.denoiser import DenoiserConfig
from reglue.diffusion.modalities import CLS, LATENT, LOCAL, State
from reglue.diffusion.objective import TrainingSample
from reglue.errors import UserError
from reglue.recipe import Recipe
from reglue.seeds import generator, normals, permutation
from reglue.semantics.compressors import resize

OnlineTargets = Callable[[Sequence[str]], Tensor]
"""Names of images → the encoder's tokens (B, 1 + h·w, D), class token first, for targets that are not cached."""


@dataclass(frozen=True)
class Normalisation:
    """What a model sees of a modality: (x − shift)·scale, one shift and scale per channel."""

    shift: tuple[float, ...]
    scale: tuple[float, ...]

    def normalise(self, x: Tensor) -> Tensor:
        """Raw (B, C, …) to what the model learns."""
        shift, scale = self._as(x)
        return (x - shift) * scale

    def denormalise(self, x: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        shift, scale = self._as(x)
        return x / scale + shift

    def _as(self, x: Tensor) -> tuple[Tensor, Tensor]:
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
    needs = {
        class_token_column(recipe): recipe.class_token.present,
        local_column(recipe): recipe.local.present,
        "features": recipe.alignment.present and recipe.alignment.targets == "cached",
    }
    how = {"cls": "--encoder NAME", "features": "--features"}
    for column, needed in needs.items():
        if needed and column not in manifest.columns:
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
    if needs["features"] and encoder is not None and encoder.layers[-1] != encoder.depth - 1:
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
    kind, _, channels = name.partition("-")
    options = f"--kind {kind} --channels {channels}" if channels.isdecimal() else f"--name {name}"
    return f"`reglue compress {store.folder}{' --column cls' if of_class_token else ''} {options}`"


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Times in [0, 1] moved towards noise for shift > 1, towards data for shift < 1 (SD3, arXiv 2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


class TrainingData:
    """The training samples of a recipe on a store.

    Sample `position` of the run, counted over all steps, is a function of the seed and the position: its image, its
    time, its noise and what is dropped. So a batch can be cut into parts and spread over processes in any way.
    """

    def __init__(
        self, store: Store, recipe: Recipe, config: DenoiserConfig, seed: int, online: OnlineTargets | None = None
    ) -> None:
        self.store, self.recipe, self.config, self.seed, self.online = store, recipe, config, seed, online
        self.scaled = normalisations(store, recipe)
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def rows(self, positions: range) -> Tensor:
        """The store's rows at positions of the run: every epoch has a random order of its own."""
        return torch.stack([self._row(position) for position in positions])

    def sample(self, positions: range) -> TrainingSample:
        """The samples at positions of the run, on the CPU."""
        rows = self.rows(positions)
        shapes = self.config.shape.shapes()
        generators = [generator(self.seed, "training sample", position) for position in positions]
        uniform = torch.from_numpy(np.stack([g.random(3) for g in generators]))
        noise = normals(generators, {"posterior": shapes[LATENT], **shapes})

        label = self.store.labels[rows]
        if not self.config.classes:
            label = torch.zeros_like(label)  # the null label is the only one
        dropped = uniform[:, 1] < self.recipe.optimisation.label_dropout
        dropout = self.recipe.local.dropout if LOCAL in shapes else 0.0
        return TrainingSample(
            data=self._state(rows, noise.pop("posterior")),
            noise=noise,
            time=shift_time(uniform[:, 0], self.recipe.optimisation.time_shift).float(),
            label=torch.where(dropped, self.config.classes, label),
            alignment_target=self._targets(rows) if self.config.alignment_width else None,
            keep_local=uniform[:, 2] >= dropout if dropout else None,
        )

    def _row(self, position: int) -> Tensor:
        epoch, index = divmod(position, len(self.store))
        if self._order[0] != epoch:
            self._order = (epoch, permutation(self.seed, "order of images", epoch, len(self.store)))
        return self._order[1][index]

    def _state(self, rows: Tensor, posterior_noise: Tensor) -> State:
        moments = self.store.read("latent", rows)
        latent = moments["mean"].float()
        if "std" in moments:
            latent = latent + moments["std"].float() * posterior_noise
        state = {LATENT: self._scale(LATENT, latent)}
        if self.config.shape.local_channels:
            local = self.store.read(local_column(self.recipe), rows)["local"].float()
            state[LOCAL] = resize(self._scale(LOCAL, local), self.config.shape.grid)
        if self.config.shape.class_token_width:
            state[CLS] = self._scale(CLS, self.store.read(class_token_column(self.recipe), rows)["cls"].float())
        return state

    def _scale(self, name: str, value: Tensor) -> Tensor:
        return self.scaled[name].normalise(value) if name in self.scaled else value

    def _targets(self, rows: Tensor) -> Tensor:
        """The encoder's raw tokens (B, N, D) for the model's tokens: resampled if the grids differ."""
        if self.online is not None:
            tokens = self.online(self.store.names(rows))
            cls, patches = tokens[:, :1], tokens[:, 1:].transpose(1, 2)
        else:
            cls = self.store.read("cls", rows)["cls"].float().unsqueeze(1)
            last_layer = slice(-self.config.alignment_width, None)
            patches = self.store.read("features", rows, last_layer)["features"].float().flatten(2)
        encoder = self.store.manifest.encoder
        assert encoder is not None
        if encoder.grid != self.config.token_grid:
            maps = patches.unflatten(2, encoder.grid)
            patches = F.interpolate(maps, self.config.token_grid, mode="bilinear", antialias=True).flatten(2)
        patches = patches.transpose(1, 2)
        return torch.cat([cls, patches], dim=1) if self.config.shape.class_token_width else patches
