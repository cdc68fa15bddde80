"""A trained model that makes images: image i is a function of (seed, i), whatever the batch or the devices."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, TypedDict, Unpack, get_args, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from reglue.config import Precision, Rounding, SamplerName, Sampling, StatePrecision
from reglue.data.batches import Normalisation
from reglue.diffusion.denoiser import Denoiser
from reglue.diffusion.guidance import Guidance, VelocityFunction, guided_velocity
from reglue.diffusion.modalities import CLS, LATENT, LOCAL, State, concatenate_states
from reglue.diffusion.noise import drawn_ahead
from reglue.diffusion.paths import PATHS
from reglue.diffusion.paths import Path as Interpolant
from reglue.diffusion.samplers import (
    adams_bashforth,
    adaptive_solver,
    aligned,
    dopri5,
    euler,
    euler_maruyama,
    heun,
    stochastic_times,
    uniform_times,
)
from reglue.encoders.autoencoders import Autoencoder, load_autoencoder
from reglue.errors import UserError
from reglue.published import runs_by_name as hub
from reglue.published import sharing
from reglue.run import FILE as RECORD
from reglue.run import RunRecord
from reglue.training import checkpoints
from reglue.training.distributed import resolve_device
from reglue.training.precision import SamplingNetwork

STATE_PRECISIONS: dict[StatePrecision, torch.dtype] = {"float32": torch.float32, "float64": torch.float64}


class GenerateOptions(TypedDict, total=False):
    """What `ImageModel.generate` takes besides classes; everything has a default."""

    count: int
    """How many images: of the one class that is given, or of none."""
    seed: int
    """0 if not given."""
    batch_size: int
    """Images at once, 32 if not given; does not change them beyond rounding."""
    progress: bool
    """Show a progress bar."""
    sampling: Sampling
    """In place of `default_sampling`; the following change single values of it."""
    sampler: SamplerName
    """euler, heun, euler-maruyama, adams-bashforth or dopri5."""
    steps: int
    """Intervals of the time grid."""
    time_shift: float
    """Above 1, the grid has more times near noise; below 1, near data."""
    guidance_scale: float
    """Classifier-free guidance; 1 is none."""
    guidance_interval: tuple[float, float]
    """Guided only between these times; 0 is data, 1 is noise."""
    local_scale: float
    """Guidance scale of the local map."""
    cls_scale: float
    """Guidance scale of the class token."""
    representation_scale: float
    """Representation guidance, for models trained with dropped local maps."""
    guided_channels: int | Literal["all"]
    """Classifier-free guidance moves so many latent channels, the first ones, or all."""
    rounding: Rounding
    """How pixels become 8-bit numbers."""
    state_precision: StatePrecision
    """Precision in which steps add up."""
    precision: Precision
    """Precision of the network's matrix products."""
    relative_tolerance: float
    """Error that dopri5 allows per step, as a share of the values."""
    absolute_tolerance: float
    """Error that dopri5 allows per step in any case."""


class SamplingOptions(TypedDict, total=False):
    """The fields of `Sampling` that may be given singly, None for those that are not."""

    sampler: SamplerName | None
    steps: int | None
    rounding: Rounding | None
    time_shift: float | None
    state_precision: StatePrecision | None
    precision: Precision | None
    relative_tolerance: float | None
    absolute_tolerance: float | None


CHOICES = {
    "sampler": SamplerName,
    "rounding": Rounding,
    "state_precision": StatePrecision,
    "precision": Precision,
}
"""The options of sampling with a few possible values."""


def load(
    run: str | Path,
    *,
    step: int | None = None,
    device: str = "auto",
    autoencoder: str | None = None,
    revision: str | None = None,
    compile: bool = False,
) -> ImageModel:
    """Load a trained model, with the averaged (EMA) weights.

    `run` is a run folder, or `OWNER/NAME` of a model on the Hugging Face hub that `ImageModel.push_to_hub` put there,
    of which `revision` picks a version, or `starter`, the small model that this package brings along; a folder of that
    name comes first. `step` picks a checkpoint, the last one if
    not given; `autoencoder` replaces the one that the run decodes with; `compile` compiles the denoiser when it is
    first used: a minute's wait, and faster from then on. Raises UserError for anything missing or unfitting.
    """
    folder, target = hub.find_run(run, revision), resolve_device(device)
    record = RunRecord.read(folder)
    checkpoint = checkpoints.find(folder, step)
    weights = checkpoints.read_weights(checkpoint / checkpoints.EMA)
    denoiser = Denoiser(record.denoiser)
    try:
        denoiser.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"{checkpoint / checkpoints.EMA} does not fit {folder / RECORD}: {' '.join(str(error).split())[:200]}"
        ) from None
    return ImageModel(
        record,
        denoiser.to(target),
        decoder(record, target, autoencoder, folder),
        folder,
        int(checkpoint.name),
        compile,
    )


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
                f"--autoencoder {name or own} has {getattr(found.spec, part)} {what}, "
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
                "put the old one back or choose one with --autoencoder"
            )
    return found


def changed_sampling(
    default: Sampling,
    *,
    guidance_scale: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    local_scale: float | None = None,
    cls_scale: float | None = None,
    representation_scale: float | None = None,
    auto_scale: float | None = None,
    guided_channels: int | Literal["all"] | None = None,
    **sampling: Unpack[SamplingOptions],
) -> Sampling:
    """A way to sample with what is given (not None) in place of the default's. Raises UserError for what cannot be."""
    guidance = {
        "scale": guidance_scale,
        "interval": guidance_interval,
        "local_scale": local_scale,
        "cls_scale": cls_scale,
        "representation_scale": representation_scale,
        "auto_scale": auto_scale,
        "guided_channels": guided_channels,
    }
    changes = {name: value for name, value in sampling.items() if value is not None}
    for name, known in CHOICES.items():
        if name in changes and changes[name] not in get_args(known):
            raise UserError(f"{name.replace('_', '-')} {changes[name]}: choose {', '.join(get_args(known))}")
    given = {name: value for name, value in guidance.items() if value is not None}
    if guided_channels == "all":
        given["guided_channels"] = None
    result = replace(default, guidance=replace(default.guidance, **given), **changes)  # type: ignore[arg-type]
    if result.sampler == "dopri5":
        adaptive_solver()  # It says at once if it is missing.
    return result


@dataclass
class ImageModel:
    """A denoiser and the decoder of its latents."""

    record: RunRecord
    denoiser: Denoiser
    autoencoder: Autoencoder
    folder: Path | None = None
    """The run's folder; None for a model that is still in training."""
    step: int = 0
    """Of training, at which the weights were taken."""
    compile: bool = False
    """Compile the denoiser when it is first used. Then batches should have one size: see `draw`."""
    _networks: dict[tuple[Denoiser, Precision], SamplingNetwork] = field(
        default_factory=dict[tuple[Denoiser, Precision], SamplingNetwork], init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        self.denoiser.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.denoiser.positions.device

    @property
    def default_sampling(self) -> Sampling:
        """What the recipe says, but for guidance that this model cannot have: it lacks classes or the modality."""
        sampling = self.record.recipe.sampling
        guidance = sampling.guidance
        if not self.record.class_names:
            guidance = replace(guidance, scale=1.0, local_scale=None, cls_scale=None)
        without = dict.fromkeys(self._unfitting_scales(guidance), 1.0)
        return replace(sampling, guidance=replace(guidance, **without))

    def resolved(self, sampling: Sampling) -> Sampling:
        """The same, with the precisions that are used where it leaves them open.

        Raises UserError for guidance of, or by, what the model lacks.
        """
        for name, lacking in self._unfitting_scales(sampling.guidance).items():
            option = "guidance-scale" if name == "scale" else name.replace("_", "-")
            raise UserError(
                f"{option} {getattr(sampling.guidance, name)}: this model has no {lacking} to guide with; choose 1"
            )
        return replace(
            sampling,
            state_precision=sampling.state_precision or ("float64" if sampling.published_sampler else "float32"),
            precision=sampling.precision or self.record.recipe.optimisation.precision,
        )

    def _unfitting_scales(self, guidance: Guidance) -> dict[str, str]:
        """The names of the scales that ask for what this model lacks, and what that is."""
        modalities, lacking = self.record.denoiser.shape.shapes(), dict[str, str]()
        if LOCAL not in modalities:
            lacking |= dict.fromkeys(("local_scale", "representation_scale"), "local map")
        if CLS not in modalities:
            lacking["cls_scale"] = "class token"
        recipe, begun_elsewhere = self.record.recipe, self.record.start is not None
        if LOCAL in modalities and not recipe.local.dropout and not begun_elsewhere:
            lacking["representation_scale"] = "branch without its map (trained with --local.dropout 0)"
        if not recipe.optimisation.label_dropout and not begun_elsewhere:
            unconditional = "branch without labels (trained with --optimisation.label-dropout 0)"
            lacking |= dict.fromkeys(("scale", "local_scale", "cls_scale"), unconditional)
        if not self.record.class_names:
            lacking |= dict.fromkeys(("scale", "local_scale", "cls_scale"), "classes")
        return {name: what for name, what in lacking.items() if getattr(guidance, name) not in (None, 1)}

    def to(self, device: str | torch.device) -> ImageModel:
        """The same model, moved to a device (`"cuda"`, `"cpu"`, …)."""
        self.denoiser.to(device)
        self.autoencoder.to(device)
        self._networks.clear()
        return self

    @overload
    def generate(
        self,
        classes: int | str | Sequence[int | str] | None = None,
        *,
        output: Literal["pil"] = "pil",
        **options: Unpack[GenerateOptions],
    ) -> list[Image.Image]: ...

    @overload
    def generate(
        self,
        classes: int | str | Sequence[int | str] | None = None,
        *,
        output: Literal["tensor"],
        **options: Unpack[GenerateOptions],
    ) -> Tensor: ...

    def generate(
        self,
        classes: int | str | Sequence[int | str] | None = None,
        *,
        output: Literal["pil", "tensor"] = "pil",
        **options: Unpack[GenerateOptions],
    ) -> list[Image.Image] | Tensor:
        """Images of the given classes (indices or names), one each, or `count` images of one class or of none.

        Image i depends on `seed` and i alone. What is not given is as in `default_sampling`; see `GenerateOptions`.

        Returns PIL images, or for `output="tensor"` uint8 (N, 3, height, width) on the CPU.

        Raises UserError for an unknown class, a count that contradicts the classes, and guidance without classes;
        TypeError for an unknown option.
        """
        known = GenerateOptions.__annotations__
        if unknown := [name for name in options if name not in known]:
            raise TypeError(
                f"generate() takes no {', '.join(unknown)}; it takes {', '.join(('classes', 'output', *known))}"
            )
        if output not in ("pil", "tensor"):
            raise UserError(f"output {output!r}: choose 'pil' or 'tensor'")
        labels = self._labels(classes, options.pop("count", None))
        seed, batch_size = options.pop("seed", 0), options.pop("batch_size", 32)
        if batch_size < 1:
            raise UserError("batch_size must be at least 1")
        if seed < 0:
            raise UserError(f"seed {seed}: choose 0 or more")
        default = options.pop("sampling", None) or self.default_sampling
        show_progress = options.pop("progress", False)
        sampling = changed_sampling(default, **options)  # type: ignore[reportArgumentType], the rest are its own
        batches: list[Tensor] = []
        with tqdm(
            total=evaluations(sampling, len(labels), batch_size),
            desc="generate",
            unit="evaluation",
            disable=not show_progress,
        ) as progress:
            for start in range(0, len(labels), batch_size):
                indices = range(start, min(start + batch_size, len(labels)))
                wanted = [labels[i] for i in indices]
                room = min(batch_size, len(labels))
                state = self.draw(indices, wanted, seed, sampling, room=room, on_evaluation=progress.update)
                batches.append(torch.from_numpy(self.decode(state, sampling.rounding)))
        pixels = torch.cat(batches) if batches else torch.empty(0, *self.record.resolution, 3, dtype=torch.uint8)
        if output == "tensor":
            return pixels.permute(0, 3, 1, 2).contiguous()
        return [Image.fromarray(image.numpy()) for image in pixels]

    def save(
        self,
        folder: str | Path,
        *,
        reports: Sequence[str | Path] = (),
        picture: str | Path | None = None,
        half_precision: bool = False,
    ) -> Path:
        """Write what sampling needs into a new folder: record, averaged weights, compressor, and a model card.

        An autoencoder from a local folder goes with them; one from the hub or from this package is named. `reports`
        are files of `reglue evaluate --out`, beside those in the run's own `reports` folder; `picture` is one to show,
        the run's last preview if not given. `half_precision` stores weights as float16, in half the space: images
        differ by roundings. `reglue.load` and `reglue sample` take the folder. Returns it; raises UserError if it
        holds other files.
        """
        return self._save(Path(folder), reports, picture, None, half_precision)

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool = False,
        reports: Sequence[str | Path] = (),
        picture: str | Path | None = None,
        half_precision: bool = False,
    ) -> str:
        """Put the model on the Hugging Face hub as `OWNER/NAME`, as `save` writes it. Returns the address.

        `reglue.load("OWNER/NAME")` fetches it. Raises UserError if the hub cannot be reached or refuses.
        """
        with TemporaryDirectory() as folder:
            return hub.push(self._save(Path(folder) / "model", reports, picture, name, half_precision), name, private)

    def _save(
        self,
        folder: Path,
        reports: Sequence[str | Path],
        picture: str | Path | None,
        name: str | None,
        half_precision: bool,
    ) -> Path:
        files, shown = [Path(report) for report in reports], Path(picture) if picture else None
        weights = self.denoiser.state_dict()
        return sharing.save(
            folder, self.record, weights, self.step, self.folder, files, shown, name, half_precision=half_precision
        )

    def _labels(self, classes: int | str | Sequence[int | str] | None, count: int | None) -> list[int]:
        if count is not None and count < 0:
            raise UserError(f"count {count}: choose 0 or more")
        if classes is None:
            return [self.denoiser.null_label] * (1 if count is None else count)
        if isinstance(classes, int | str | np.integer):
            return [self.label(classes)] * (1 if count is None else count)
        if count not in (None, len(classes)):
            raise UserError(f"count {count}, but {len(classes)} classes: give one class for several images of it")
        return [self.label(name) for name in classes]

    def label(self, name: int | str) -> int:
        """The label of a class index or name. Raises UserError if there is no such class.

        Text is a name first, and then a number; where all names are numbers, it is a name alone.
        """
        names = self.record.class_names
        by_name = isinstance(name, str) and all(map(str.isdecimal, names))
        if isinstance(name, str):
            if name in names:
                return names.index(name)
            index = int(name) if name.isdecimal() and not by_name else -1
        else:
            try:
                index = operator.index(name)  # NumPy's integers are not `int`.
            except TypeError:
                index = -1
        if 0 <= index < len(names):
            return index
        shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
        if not names:
            raise UserError(f"class {name}: this model was trained without classes")
        choice = f"a name ({shown})" if by_name else f"0 to {len(names) - 1} or a name ({shown})"
        raise UserError(f"class {name}: choose {choice}")

    @torch.no_grad()
    def draw(
        self,
        indices: Sequence[int],
        labels: Sequence[int],
        seed: int,
        sampling: Sampling,
        *,
        weaker: Denoiser | None = None,
        room: int = 0,
        on_evaluation: Callable[[], object] = lambda: None,
    ) -> State:
        """Sample the images `indices` of a seed, with labels as long: normalised states on the device.

        They are in float32 or float64, as `sampling` says. `weaker` is the second model of autoguidance. A compiled
        model evaluates batches of `room` images, if that is more, so that a smaller last batch needs no compilation.
        dopri5 takes image by image, since its steps would otherwise depend on which images are drawn together.
        `on_evaluation` is called after each evaluation, for progress.
        """
        guidance, device = sampling.guidance, self.device
        sampling = self.resolved(sampling)
        if sampling.sampler == "dopri5" and len(indices) > 1:
            alone = [
                self.draw([i], [label], seed, sampling, weaker=weaker, on_evaluation=on_evaluation)
                for i, label in zip(indices, labels, strict=True)
            ]
            return concatenate_states(alone)
        filling = max(room - len(indices), 0) if self.compile and sampling.sampler != "dopri5" else 0
        inner = guided_velocity(
            self._network(self.denoiser, sampling.precision),
            torch.tensor([*labels, *[labels[-1]] * filling], device=device),
            guidance,
            self._network(weaker, sampling.precision) if weaker else None,
        )

        def velocity(state: State, time: float, step_start: float | None = None) -> State:
            result = inner(state, time, step_start)
            on_evaluation()
            return result

        filled = [*indices, *[indices[-1]] * filling]
        shapes, path = self.record.denoiser.shape.shapes(), PATHS[self.record.recipe.path]
        state = from_noise(velocity, seed, filled, shapes, sampling, path, device)
        return {name: value[: len(indices)] for name, value in state.items()}

    def _network(self, denoiser: Denoiser, precision: Precision | None) -> SamplingNetwork:
        assert precision is not None
        key = denoiser, precision
        if key not in self._networks:
            self._networks[key] = SamplingNetwork(denoiser, precision, compiled=self.compile)
        return self._networks[key]

    @torch.no_grad()
    def decode(self, state: State, rounding: Rounding) -> np.ndarray:
        """The images of a state: uint8 (B, height, width, 3)."""
        return self.pixels(state, rounding).cpu().numpy()

    @torch.no_grad()
    def pixels(self, state: State, rounding: Rounding) -> Tensor:
        """What `decode` gives, on the device still, which may be working on it."""
        return to_pixels(self.autoencoder.decode(self.raw(state, LATENT)), rounding)

    def raw(self, state: State, name: str) -> Tensor:
        """A modality of a state as the autoencoder, encoder or compressor gives it, float32."""
        scaled: Normalisation | None = self.record.normalisation.get(name)
        value = state[name].float()
        return scaled.denormalise(value) if scaled else value


def from_noise(
    velocity: VelocityFunction,
    seed: int,
    indices: Sequence[int],
    shapes: Mapping[str, Sequence[int]],
    sampling: Sampling,
    path: Interpolant,
    device: torch.device,
) -> State:
    """The states of the images `indices` of a seed, from their noise to data, by a way to sample that is `settled`."""
    assert sampling.state_precision is not None
    draws = sampling.steps if sampling.sampler == "euler-maruyama" else 1  # Its last step has none, the start has one.
    with drawn_ahead(seed, indices, shapes, device, STATE_PRECISIONS[sampling.state_precision], draws) as noise:
        return follow(velocity, next(noise), noise, sampling, path)


def follow(
    velocity: VelocityFunction, start: State, noise: Iterator[State], sampling: Sampling, path: Interpolant
) -> State:
    """Run the sampler that was asked for."""
    steps, shift, discontinuities = sampling.steps, sampling.time_shift, sampling.guidance.discontinuities
    if sampling.sampler == "euler-maruyama":
        return euler_maruyama(velocity, start, stochastic_times(steps, shift), noise, path)
    if sampling.sampler == "dopri5":
        return dopri5(velocity, start, discontinuities, sampling.relative_tolerance, sampling.absolute_tolerance)
    if sampling.sampler == "adams-bashforth":
        return adams_bashforth(velocity, start, aligned(uniform_times(steps, shift), discontinuities), discontinuities)
    method = {"euler": euler, "heun": heun}[sampling.sampler]
    return method(velocity, start, uniform_times(steps, shift))


def evaluations(sampling: Sampling, count: int = 1, batch_size: int = 1) -> int | None:
    """How often a sampler evaluates the velocity for `count` images; None for dopri5, which nobody knows beforehand."""
    per_batch = {"heun": 2 * sampling.steps - 1, "dopri5": None}.get(sampling.sampler, sampling.steps)
    return None if per_batch is None else -(-count // batch_size) * per_batch


def to_pixels(images: Tensor, rounding: Rounding) -> Tensor:
    """Images (B, 3, H, W) in [−1, 1] to uint8 (B, H, W, 3); values outside are clamped."""
    scaled = 127.5 * images + 128 if rounding == "round" else 255 * (images + 1) / 2
    return scaled.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
