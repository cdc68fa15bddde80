"""From rows of a store to training samples: normalised, with everything random already drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from reglue.config import LearnedPart, Recipe, TimeDistribution
from reglue.data.manifest import CLASS_TOKEN_CODES, compressor_of, value_of
from reglue.data.store import Store
from reglue.data.targets import alignment_targets, target_columns, target_of
from reglue.diffusion.conditions import CLASS, CONDITIONS
from reglue.diffusion.denoiser import DenoiserConfig
from reglue.diffusion.embeddings import SPAN
from reglue.diffusion.modalities import LATENT, Modality, Normalisation, State, TensorTimes
from reglue.diffusion.objective import TrainingSample
from reglue.diffusion.paths import PATHS
from reglue.diffusion.predictions import PREDICTIONS
from reglue.diffusion.students import STUDENTS, Student
from reglue.encoders.compressors import resize
from reglue.errors import UserError, option
from reglue.seeds import generator, normals, permutation

CPU = torch.device("cpu")


def unit_variance(store: Store, column: str, one_scale: bool = False) -> Normalisation:
    """The normalisation to mean 0 and standard deviation 1 by the store's statistics: per channel, or over all."""
    statistics = store.manifest.statistics[column]
    mean, std = np.array(statistics.mean), np.array(statistics.std)
    if one_scale:  # The variance over all channels is the mean of theirs and the variance of their means.
        std = np.full_like(std, np.sqrt(np.square(std).mean() + mean.var()))
        mean = np.full_like(mean, mean.mean())
    return Normalisation(tuple(mean.tolist()), tuple((1 / np.maximum(std, 1e-6)).tolist()))


def modalities(store: Store, recipe: Recipe) -> tuple[Modality, ...]:
    """What a recipe learns of a store: sizes by the columns, scales by their statistics or by the autoencoder."""
    return tuple(_modality(store, part) for part in recipe.learned_parts)


def _modality(store: Store, part: LearnedPart) -> Modality:
    column = store.manifest.columns[part.column]
    tensor = column.tensors.get(value_of(part.column))
    if tensor is None or len(tensor.shape) != (3 if part.kind == "map" else 1):
        raise UserError(
            f"modality {part.modality} is a {part.kind}, and column {part.column} of {store.folder} holds "
            f"{tensor.shape if tensor else 'something else'} per image; choose another column or kind"
        )
    channels = tensor.shape[0]
    normalisation = None
    if part.unit_variance:
        normalisation = unit_variance(store, part.column, part.one_scale)
    elif part.modality == LATENT:
        autoencoder = store.manifest.autoencoder
        normalisation = Normalisation(autoencoder.shift, autoencoder.scale)
    return part.as_modality(channels, normalisation)


def denoiser_config(store: Store, recipe: Recipe) -> DenoiserConfig:
    """The sizes of a recipe's denoiser on a store.

    Raises UserError, with the command to run, if the store lacks what the recipe learns.
    """
    manifest = store.manifest
    needed = [*(part.column for part in recipe.learned_parts), *target_columns(recipe)]
    how = {"cls": "`reglue prepare … --encoder NAME`", "features": "`reglue prepare … --features`"}
    for column in needed:
        if column not in manifest.columns:
            command = how.get(column) or _compress_command(store, column)
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
            f"alignment needs; prepare with it among {option('layers')}, or choose {option('alignment.targets')} online"
        )
    latents = manifest.columns[LATENT].tensors
    _, *grid = latents[value_of(LATENT)].shape
    return recipe.denoiser_config(
        modalities(store, recipe),
        (grid[0], grid[1]),
        {name: CONDITIONS[name].size(store) for name in recipe.condition_dropout},
        encoder.width if encoder else 0,
    )


def student_of(recipe: Recipe) -> Student | None:
    """The student of a recipe that is `settled`; None for one that learns velocities."""
    few = recipe.few_steps
    return STUDENTS[recipe.student](few.guidance, few.share, few.mix) if recipe.student else None


def _compress_command(store: Store, column: str) -> str:
    """What makes a column of codes, as far as its name shows."""
    name = compressor_of(column).removeprefix(CLASS_TOKEN_CODES)
    kind, _, sizes = name.partition("-")
    channels, _, layers = sizes.partition("-")
    by_sizes = channels.isdecimal() and layers in ("", "last")
    return (
        f"`reglue compress {store.folder}{' --column cls' if column.startswith(CLASS_TOKEN_CODES) else ''} "
        f"{f'--kind {kind} --channels {channels}' if by_sizes else f'--name {name}'}"
        f"{' --layers last' if by_sizes and layers else ''}`"
    )


TIME_DISTRIBUTIONS: dict[TimeDistribution, Callable[[Tensor], Tensor]] = {
    "uniform": lambda u: u,
    "logit-normal": lambda u: torch.special.ndtri(u).sigmoid(),
}
"""Times in [0, 1] of a distribution, made of uniform ones."""


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Times in [0, 1] moved towards noise for shift > 1, towards data for shift < 1 (SD3, arXiv 2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True)
class HostBatch:
    """Training samples before their arithmetic: rows as they are stored, and everything random."""

    columns: dict[str, dict[str, Tensor]]
    """Per modality, the tensors of its column: `mean` and `std` where the store has a distribution."""
    target: dict[str, Tensor]
    """What the alignment targets have read."""
    noise: dict[str, Tensor]
    """ε of each modality, and that of the latents' distribution as `posterior`."""
    condition: dict[str, Tensor]
    """See `TrainingSample`."""
    drawn: dict[str, Tensor]
    """`time MODALITY` where they differ, else that of the latents; what is kept of each modality that is dropped,
    under its name; for a student, the lengths of steps and which samples have one (`spanning`)."""
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
        # Its memory is not given away before this stream has read it.
        self._each(lambda tensor: (tensor.record_stream(stream), tensor)[1])
        return self

    def _each(self, move: Callable[[Tensor], Tensor]) -> HostBatch:
        columns = {key: {name: move(x) for name, x in part.items()} for key, part in self.columns.items()}
        others = (self.target, self.noise, self.condition, self.drawn)
        target, noise, condition, drawn = ({name: move(x) for name, x in part.items()} for part in others)
        return HostBatch(columns, target, noise, condition, drawn)


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
        self.shapes, self.path = config.shapes(), PATHS[config.path]
        self.schedule, self.prediction = recipe.schedule, PREDICTIONS[config.prediction]
        self.student = student_of(recipe)
        self.dropped_modalities = [modality for modality in config.modalities if modality.dropout]
        self.targets = alignment_targets(self.store, recipe, device) if config.alignment_width else None
        self.copies = torch.cuda.Stream(device) if gpu else None
        # Made once, since to copy them to a GPU in every step would wait for it.
        self.scales = {
            modality.name: modality.normalisation.tensors(torch.empty(1, *self.shapes[modality.name], device=device))
            for modality in config.modalities
            if modality.normalisation
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
        # Of each sample: its time, whether its class is dropped, whether a modality is; then those of other parts, and
        # what else its times are made of.
        dropout = self.recipe.condition_dropout
        own = 2 + max(len(self.dropped_modalities), 1) + len(dropout) - 1
        behind = own + self.schedule.clocks(self.shapes) - 1
        choices = behind + self.schedule.choices
        draws = choices + (2 if self.student else 0)
        uniform = torch.from_numpy(np.stack([g.random(draws) for g in generators])).unbind(1)
        noise = normals(generators, {"posterior": self.shapes[LATENT], **self.shapes}, pinned=self.store.pinned)

        of_conditions = (uniform[1], *uniform[own - len(dropout) + 1 : own])
        without_class = uniform[1] < dropout[CLASS]  # and so without any other: the branch that guidance asks for
        condition = {
            name: CONDITIONS[name].drop(
                CONDITIONS[name].read(self.store, rows), without_class | (u < share), self.config.conditions[name]
            )
            for (name, share), u in zip(dropout.items(), of_conditions, strict=True)
        }
        optimisation = self.recipe.optimisation
        distributed = TIME_DISTRIBUTIONS[optimisation.time_distribution]
        shift = partial(shift_time, shift=optimisation.time_shift)
        clocks = [shift(distributed(u)) for u in (uniform[0], *uniform[own:behind])]
        times = self.schedule.training_times(clocks, self.shapes, uniform[behind:choices])
        distinct = {id(t): self.prediction.training_time(t, self.path) for t in times.values()}
        drawn = {f"time {name}": distinct[id(t)] for name, t in times.items() if len(distinct) > 1 or name == LATENT}
        drawn |= {m.name: u >= m.dropout for m, u in zip(self.dropped_modalities, uniform[2:], strict=False)}
        if self.student:
            time, span = self.student.times((uniform[0], *uniform[choices:]), shift)
            drawn |= {f"time {LATENT}": time.float(), SPAN: span.float(), "spanning": span.nonzero().squeeze(1)}
        batch = HostBatch(
            columns={modality.name: self.store.read(modality.column, rows) for modality in self.config.modalities},
            target=self.targets.read(rows) if self.targets else {},
            noise=noise,
            condition=condition,
            drawn=drawn,
        )
        return batch.sent(self.copies) if self.copies else batch

    @torch.no_grad()
    def finish(self, batch: HostBatch) -> TrainingSample:
        """The training samples of a batch, on the device: nothing here waits for it."""
        batch = batch.to(self.device)
        state: State = {}
        for modality in self.config.modalities:
            stored = batch.columns[modality.name]
            value = stored[value_of(modality.column)].float()
            if "std" in stored:
                value = value + stored["std"].float() * batch.noise["posterior"]
            if modality.normalisation:
                shift, scale = self.scales[modality.name]
                value = (value - shift) * scale
            if modality.kind == "map" and value.shape[2:] != self.config.grid:
                value = resize(value, self.config.grid)
            state[modality.name] = value
        times = {name: batch.drawn[key] for name in state if (key := f"time {name}") in batch.drawn}
        learned = self._learned(times) if len(times) > 1 else {}
        if SPAN in batch.drawn:
            times = {**dict.fromkeys(state, times[LATENT]), SPAN: batch.drawn[SPAN]}
        tokens = self.targets.tokens(batch.target) if self.targets else None
        return TrainingSample(
            data=state,
            noise={name: batch.noise[name] for name in state},
            time=times if len(times) > 1 else times[LATENT],
            condition=batch.condition,
            alignment_target=target_of(tokens, self.recipe, self.config) if tokens else None,
            keep={modality.name: batch.drawn[modality.name] for modality in self.dropped_modalities},
            learned=learned,
            spanning=batch.drawn.get("spanning"),
        )

    def _learned(self, times: TensorTimes) -> dict[str, Tensor]:
        """Of which samples each modality is learned, (B,) bool."""
        learned = dict(self.schedule.learned(times))
        if not self.recipe.optimisation.clean_loss:
            learned = {name: learned.get(name, True) & (t > 0) for name, t in times.items()}
        return learned
