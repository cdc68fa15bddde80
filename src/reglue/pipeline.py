"""A trained model that makes images: image i is a function of (seed, i), whatever the batch or the devices."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from inspect import Parameter, Signature, signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, Unpack, get_type_hints, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reglue import graphs
from reglue.config import YOUNG
from reglue.data.images import decode
from reglue.data.pictures import in_html
from reglue.diffusion.conditions import CLASS, Condition
from reglue.diffusion.controls import Control, Progress
from reglue.diffusion.denoiser import Denoiser
from reglue.diffusion.guidance import Velocity, guided_velocity, hidden_modalities
from reglue.diffusion.modalities import LATENT, State, concatenate_states
from reglue.diffusion.paths import PATHS
from reglue.diffusion.predictions import PREDICTIONS
from reglue.diffusion.samplers import SAMPLERS, Start
from reglue.diffusion.schedules import Schedule
from reglue.editing.editor import Editor
from reglue.editing.encoding import ImageEncoder
from reglue.encoders import tiling
from reglue.encoders.autoencoders import Autoencoder
from reglue.errors import UserError, option
from reglue.generation import evaluations, from_noise, to_pixels
from reglue.names import StoredPrecision, Weights
from reglue.progress import Bar
from reglue.published import sharing
from reglue.run import FILE as RECORD
from reglue.run import RunRecord, decoder, find_run
from reglue.sampling import MODALITY_SCALES, AutoPrecision, Precision, Rounding, Sampling, SamplingChanges
from reglue.seeds import Index
from reglue.training import checkpoints
from reglue.training.distributed import resolve_device
from reglue.training.precision import SamplingNetwork, to_precision

LISTED = 12
"""Classes that a notebook shows by name."""


def load(
    run: str | Path,
    *,
    step: int | None = None,
    weights: Weights = "ema",
    device: str = "auto",
    autoencoder: str | None = None,
    encoder: str | None = None,
    revision: str | None = None,
    compile: bool = False,
) -> ImageModel:
    """Load a trained model, with the averaged weights (`ema`) or those that were trained (`model`).

    `run` is a run folder, or `OWNER/NAME` of a model on the Hugging Face hub that `ImageModel.push_to_hub` put there,
    of which `revision` picks a version, or `starter` or `flowers`, the models that this package brings along; a folder
    of that name comes first. `step` picks a checkpoint, the last one if not given; `autoencoder` replaces the one that
    the run decodes with; `encoder` says where the run's vision encoder is now, for edits; `compile` compiles the
    denoiser when it is first used: a minute's wait, and faster from then on. Raises UserError for anything missing or
    unfitting.
    """
    folder, target = find_run(run, revision), resolve_device(device)
    record = RunRecord.read(folder)
    checkpoint = checkpoints.find(folder, step)
    file = checkpoints.weights_file(checkpoint, weights, option("weights"))
    as_graph = file.name == checkpoints.GRAPH
    if as_graph:
        denoiser, target = graphs.GraphDenoiser(record.denoiser, file), torch.device("cpu")
    else:
        tensors = checkpoints.read_weights(file)
        denoiser = Denoiser(record.denoiser)
        try:
            denoiser.load_state_dict(tensors)
        except RuntimeError as error:
            raise UserError(f"{file} does not fit {folder / RECORD}: {' '.join(str(error).split())[:200]}") from None
    if as_graph and autoencoder is None:
        decodes: Autoencoder = graphs.GraphAutoencoder(record.autoencoder, folder / graphs.DECODER)
    else:
        decodes = decoder(record, target, autoencoder, folder)
    return ImageModel(
        record,
        denoiser.to(target),
        decodes,
        folder,
        int(checkpoint.name),
        compile,
        weights,
        encoder,
    )


class GenerateOptions(SamplingChanges, total=False):
    """The keywords of `ImageModel.generate` but for `output`, for editors."""

    count: int | None
    seed: int
    batch_size: int
    progress: bool
    condition: Condition | None
    controls: Sequence[Control]
    sampling: Sampling | None


@dataclass(repr=False)
class ImageModel(Editor):
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
    weights: Weights = "ema"
    """Which ones of the checkpoint the denoiser has."""
    encoder: str | None = None
    """The run's vision encoder, if it is elsewhere than the record says. Loaded when an image is first encoded."""
    _networks: dict[tuple[Denoiser, Precision], SamplingNetwork] = field(
        default_factory=dict[tuple[Denoiser, Precision], SamplingNetwork], init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        self.denoiser.eval().requires_grad_(False)

    def __repr__(self) -> str:
        record, (height, width) = self.record, self.record.resolution
        what = f"{record.recipe.name} {record.recipe.model}, {height}×{width}, {len(record.class_names)} classes"
        return f"ImageModel({what}, step {self.step}, from {self.folder}, on {self.device})"

    def _repr_html_(self) -> str:
        """The same in a notebook, with the run's newest preview."""
        record = self.record
        # Sampling does without the projector.
        own = [w.numel() for name, w in self.denoiser.named_parameters() if not name.startswith("projector")]
        facts = {
            "recipe": f"{record.recipe.name} {record.recipe.model}",
            "images": "{}×{} pixels".format(*record.resolution),
            "classes": ", ".join(record.class_names[:LISTED]) + (", …" if len(record.class_names) > LISTED else ""),
            "parameters": f"{sum(own) / 1e6:.1f} million",
            "step": f"{self.step:,} ({self.weights})",
            "from": str(self.folder),
            "on": str(self.device),
        }
        previews = sorted((self.folder / sharing.PREVIEWS).glob("*.png")) if self.folder else []
        shown = None
        with suppress(Exception):  # A damaged preview is no reason to show nothing.
            shown = np.asarray(decode(previews[-1]))[None]
        return in_html("ImageModel", {name: text for name, text in facts.items() if text}, shown)

    @property
    def is_graph(self) -> bool:
        """Whether its networks are graphs of another runtime, which have the precision that they were exported in."""
        return isinstance(self.denoiser, graphs.GraphDenoiser)

    def image_encoder(self, target: bool = False) -> ImageEncoder:
        """See `Editor.image_encoder`. Raises UserError for graphs, too, of which none encodes images here."""
        if self.is_graph:
            raise UserError(f"{self.folder} was exported to ONNX: edit with the run that it was made of")
        return super().image_encoder(target)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.denoiser.positions.device

    def warning(self) -> str | None:
        """A line if the averaged weights hold more than a few per cent of those that the run began with, else None."""
        share = self.record.initial_share(self.step) if self.folder and self.weights == "ema" else 0.0
        if not self.folder or share < YOUNG:
            return None
        trained = (checkpoints.find(self.folder, self.step) / checkpoints.MODEL).is_file()
        return (
            f"{share:.0%} of the averaged weights of step {self.step} are those that the run began with, and images "
            "show it; " + (f"{option('weights')} model takes the trained ones" if trained else "train it for longer")
        )

    @property
    def default_sampling(self) -> Sampling:
        """What the recipe says, but for guidance by what this model lacks: a condition, a modality, a weaker model."""
        sampling = replace(self.record.recipe.sampling, auto_scale=1.0, auto_scales={})
        if self._lacks_unconditional():
            sampling = sampling.unguided()
        return replace(sampling, **dict.fromkeys(self._unfitting_scales(sampling), 1.0))  # type: ignore[arg-type]

    def resolved(self, sampling: Sampling) -> Sampling:
        """The same, with the precisions that are used where it leaves them open.

        Raises UserError for guidance of, or by, what the model lacks, and for a sampler that is not installed.
        """
        sampler, config = SAMPLERS[sampling.sampler], self.record.denoiser
        sampler.check()
        if sampler.spans and not config.span:
            raise UserError(
                f"{option('sampler')} {sampling.sampler} is for students, and this run is none; choose euler, or train "
                f"one from it with {option('student')}"
            )
        for name, lacking in self._unfitting_scales(sampling).items():
            raise UserError(
                f"{option(name)} {getattr(sampling, name)}: this model has no {lacking} to guide with; choose 1"
            )
        known = len(PREDICTIONS[config.prediction].known_times(PATHS[config.path]))
        if sampler.respaced and 0 < known < sampling.steps:
            raise UserError(
                f"{option('steps')} {sampling.steps}: {sampling.sampler} goes along the {known} steps of the model's "
                f"training; choose {known} or fewer"
            )
        learned = [modality.name for modality in config.modalities]
        for name in ("other_scales", "auto_scales"):
            for stranger in getattr(sampling, name):
                if stranger not in learned:
                    raise UserError(f"{option(name)} {stranger}: this model learns {', '.join(learned)}")
        if sampling.unconditional != "class" and not self.record.recipe.schedule.any_times:
            raise UserError(
                f"{option('unconditional')} {sampling.unconditional}: this model does not know semantics as noise "
                f"beside latents that are not (trained with {option('times')} independent); choose class"
            )
        for name, scale in sampling.other_scales.items():
            if scale != 1 and (lacking := self._lacks_unconditional()):
                raise UserError(f"{option('other_scales')} {name}: this model has no {lacking} to guide with; choose 1")
        return replace(
            sampling,
            state_precision=sampling.state_precision or SAMPLERS[sampling.sampler].state_precision,
            precision="float32" if self.is_graph else to_precision(sampling.precision, self.device),
        )

    def _lacks_unconditional(self) -> str:
        """What this model lacks for classifier-free guidance; nothing if it can be guided so."""
        if not any(self.record.denoiser.conditions.values()):
            return "classes"
        if not self.record.has_null_class:
            return f"branch without labels (trained with {option('optimisation.label_dropout')} 0)"
        learned = self.record.recipe.few_steps.guidance
        if self.record.recipe.student and {learned.scale, *learned.scales.values()} != {1}:
            return f"unguided branch (it has learned guidance {learned.scale:g})"
        return ""

    def _unfitting_scales(self, sampling: Sampling) -> dict[str, str]:
        """The names of the scales that ask for what this model lacks, and what that is."""
        config, recipe = self.record.denoiser, self.record.recipe
        lacking = {
            name: what for name, what in MODALITY_SCALES.items() if not config.modality(name.removesuffix("_scale"))
        }
        if not hidden_modalities(config.modalities):
            lacking["representation_scale"] = "local map"
        elif not (self.record.start or recipe.schedule.any_times or any(p.dropout for p in recipe.learned_parts)):
            lacking["representation_scale"] = f"branch without its map (trained with {option('local.dropout')} 0)"
        if unconditional := self._lacks_unconditional():
            lacking |= dict.fromkeys(("guidance_scale", *MODALITY_SCALES), unconditional)
        return {name: what for name, what in lacking.items() if getattr(sampling, name) not in (None, 1)}

    def to(self, device: str | torch.device) -> ImageModel:
        """The same model, moved to a device (`"cuda"`, `"cpu"`, …)."""
        self.denoiser.to(device)
        self.autoencoder.to(device)
        self._networks.clear()
        self._image_encoder = None
        return self

    def condition(self, labels: Sequence[int], others: Condition | None = None) -> Condition:
        """What the model is given for classes by number, one image each; the number of classes stands for none.

        `others` are the values of other conditions, (B, …) each; those that are not given are null. Raises UserError
        for a condition that the model does not have, and for another number of values.
        """
        condition = self.denoiser.null(len(labels))
        if CLASS in condition:
            condition[CLASS] = torch.tensor(labels, device=self.device)
        for name, values in (others or {}).items():
            if name not in condition:
                raise UserError(f"condition {name}: this model has {', '.join(condition) or 'none'}")
            null = condition[name]
            if values.shape != null.shape:
                raise UserError(
                    f"condition {name} has values of the shape {tuple(values.shape)}; {len(labels)} images need "
                    f"{tuple(null.shape)}"
                )
            condition[name] = values.to(null)
        return condition

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
        count: int | None = None,
        seed: int = 0,
        batch_size: int = 32,
        output: Literal["pil", "tensor"] = "pil",
        progress: bool = False,
        condition: Condition | None = None,
        controls: Sequence[Control] = (),
        sampling: Sampling | None = None,
        **changes: Unpack[SamplingChanges],
    ) -> list[Image.Image] | Tensor:
        """Images of the given classes (indices or names), one each, or `count` images of one class or of none.

        Image i depends on `seed` and i alone, whatever `batch_size` is; `progress` shows a bar. How they are drawn is
        `sampling`, `default_sampling` if not given, of which any field may be changed: `steps=50, guidance_scale=2.0`.
        `condition` has the values (N, …) of conditions other than the class. `controls` are given to the loop over time
        (`diffusion.controls`).

        Returns a list of PIL images, or for `output="tensor"` uint8 (N, 3, height, width) on the CPU.

        Raises UserError for an unknown class, a count that contradicts the classes, and guidance without classes;
        TypeError for an unknown option.
        """
        _, *known = signature(ImageModel.generate).parameters
        if unknown := [name for name in changes if name not in known]:
            raise TypeError(f"generate() takes no {', '.join(unknown)}; it takes {', '.join(known)}")
        if output not in ("pil", "tensor"):
            raise UserError(f"output {output!r}: choose 'pil' or 'tensor'")
        labels = self._labels(classes, count)
        if batch_size < 1:
            raise UserError("batch_size must be at least 1")
        if seed < 0:
            raise UserError(f"seed {seed}: choose 0 or more")
        sampling = (sampling or self.default_sampling).changed(**changes)
        self.condition(labels, condition)  # It says at once if these are not values for as many images.
        if warning := self.warning():
            warnings.warn(warning, stacklevel=2)
        total = evaluations(sampling, len(labels), batch_size)
        with Bar(total=total, desc="generate", unit="evaluation", disable=not progress) as bar:
            drawn = self.drawn(labels, seed, sampling, batch_size, bar.update, condition, controls)
            batches = [torch.from_numpy(self.decode(state, sampling.rounding, sampling.tile)) for state in drawn]
        pixels = torch.cat(batches) if batches else torch.empty(0, *self.record.resolution, 3, dtype=torch.uint8)
        if output == "tensor":
            return pixels.permute(0, 3, 1, 2).contiguous()
        return [Image.fromarray(image.numpy()) for image in pixels]

    def drawn(
        self,
        labels: Sequence[int],
        seed: int,
        sampling: Sampling,
        batch_size: int,
        update: Callable[[], object],
        condition: Condition | None = None,
        controls: Sequence[Control] = (),
    ) -> Iterator[State]:
        """The states of the first images of a seed, with these labels, in batches; `update` follows every evaluation.

        `condition` and `controls` are as for `generate`. Raises UserError as `draw` does.
        """
        for start in range(0, len(labels), batch_size):
            part = slice(start, start + batch_size)
            others = {name: values[part] for name, values in (condition or {}).items()}
            given = self.condition(labels[part], others)
            room = min(batch_size, len(labels))
            watching = [*(c.of(part) for c in controls), Progress(update)]
            indices = range(len(labels))[part]
            yield self.draw(indices, given, seed, sampling, room=room, controls=watching)

    def save(
        self,
        folder: str | Path,
        *,
        reports: Sequence[str | Path] = (),
        picture: str | Path | None = None,
        precision: StoredPrecision = "float32",
    ) -> Path:
        """Write what sampling needs into a new folder: record, averaged weights, compressor, and a model card.

        An autoencoder from a local folder goes with them; one from the hub or from this package is named. `reports`
        are files of `reglue evaluate --out`, beside those in the run's own `reports` folder; `picture` is one to show,
        the run's last preview if not given. `precision` is that of the stored weights: float16 takes half the space,
        float8 a quarter, and images differ by roundings. `reglue.load` and `reglue sample` take the folder. Returns it;
        raises UserError if it holds other files.
        """
        return self._save(Path(folder), reports, picture, None, precision)

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool = False,
        reports: Sequence[str | Path] = (),
        picture: str | Path | None = None,
        precision: StoredPrecision = "float32",
    ) -> str:
        """Put the model on the Hugging Face hub as `OWNER/NAME`, as `save` writes it. Returns the address.

        `reglue.load("OWNER/NAME")` fetches it. Raises UserError if the hub cannot be reached or refuses.
        """
        with TemporaryDirectory() as folder:
            return sharing.push(self._save(Path(folder) / "model", reports, picture, name, precision), name, private)

    def _save(
        self,
        folder: Path,
        reports: Sequence[str | Path],
        picture: str | Path | None,
        name: str | None,
        precision: StoredPrecision,
    ) -> Path:
        if self.is_graph:
            raise UserError(f"{self.folder} was exported to ONNX: save the run that it was made of")
        if self.weights != "ema":
            raise UserError(f"{option('weights')} {self.weights}: averaged weights are shared; load the run with ema")
        files, shown = [Path(report) for report in reports], Path(picture) if picture else None
        weights = self.denoiser.state_dict()
        return sharing.save(
            folder, self.record, weights, self.step, self.folder, files, shown, name=name, precision=precision
        )

    def _labels(self, classes: int | str | Sequence[int | str] | None, count: int | None) -> list[int]:
        if count is not None and count < 0:
            raise UserError(f"count {count}: choose 0 or more")
        if classes is None:
            if not self.record.has_null_class:
                raise UserError(
                    f"this model has no {self._lacks_unconditional()} to draw from: name a class, 0 to "
                    f"{self.null_label - 1}"
                )
            return [self.null_label] * (1 if count is None else count)
        if isinstance(classes, int | str | np.integer):
            return [self.label(classes)] * (1 if count is None else count)
        if count not in (None, len(classes)):
            raise UserError(f"count {count}, but {len(classes)} classes: give one class for several images of it")
        return [self.label(name) for name in classes]

    def labels_of(self, classes: int | str | Sequence[int | str] | None, count: int) -> list[int]:
        """The labels of so many images: of one class, of several in turn, or of none.

        Raises UserError for an unknown class, and for none where the model was trained with classes alone.
        """
        if classes is None or isinstance(classes, int | str | np.integer):
            return self._labels(classes, count)
        given = [self.label(name) for name in classes]
        if not given:
            raise UserError(f"{option('classes')} names no class; name one, or leave it out")
        return [given[i % len(given)] for i in range(count)]

    @property
    def null_label(self) -> int:
        """The class number that stands for none."""
        return self.denoiser.config.classes

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
        indices: Sequence[Index],
        condition: Condition,
        seed: int,
        sampling: Sampling,
        *,
        weaker: Denoiser | None = None,
        room: int = 0,
        controls: Sequence[Control] = (),
        start: Start | None = None,
        repeats: int = 0,
        schedule: Schedule | None = None,
    ) -> State:
        """Sample the images `indices` of a seed, under a condition as long: normalised states on the device.

        They are in float32 or float64, as `sampling` says. `weaker` is the second model of autoguidance. A compiled
        model evaluates batches of `room` images, if that is more, so that a smaller last batch needs no compilation.
        Adaptive samplers take image by image, since their steps would otherwise depend on which images are drawn
        together. `controls` see every step; they are for the images `indices`, in their order. So is `start`, where
        they begin if that is not noise. `repeats`: every tenth of the steps is gone over so many times more. `schedule`
        is that of the modalities' times, if not the recipe's: of what is at t = 0 all along, `start` has the data.
        """
        sampling, device = self.resolved(sampling), self.device
        if sampling.guidance.asks_for_weaker and weaker is None:
            raise UserError(
                f"{option('auto_scale')} {sampling.auto_scale}: autoguidance needs a weaker model; choose 1"
            )
        adaptive = SAMPLERS[sampling.sampler].adaptive
        if adaptive and len(indices) > 1:
            one_by_one = [{name: value[i : i + 1] for name, value in condition.items()} for i in range(len(indices))]
            return concatenate_states(
                [
                    self.draw(
                        [i],
                        one,
                        seed,
                        sampling,
                        weaker=weaker,
                        controls=[c.of(slice(n, n + 1)) for c in controls],
                        start=start and start.of(slice(n, n + 1)),
                        repeats=repeats,
                        schedule=schedule,
                    )
                    for n, (i, one) in enumerate(zip(indices, one_by_one, strict=True))
                ]
            )
        # Controls are for these images alone.
        plain = not adaptive and not start and all(isinstance(control, Progress) for control in controls)
        filling = max(room - len(indices), 0) if self.compile and plain else 0
        if filling:
            condition = {n: torch.cat([v, v[-1:].expand(filling, *v.shape[1:])]) for n, v in condition.items()}
        config, velocity = self.record.denoiser, self.velocity(condition, sampling, weaker)
        filled = [*indices, *[indices[-1]] * filling]
        times = schedule or self.record.recipe.schedule
        state = from_noise(velocity, seed, filled, config.shapes(), sampling, device, times, controls, start, repeats)
        return {name: value[: len(indices)] for name, value in state.items()}

    def velocity(self, condition: Condition, sampling: Sampling, weaker: Denoiser | None = None) -> Velocity:
        """What samplers follow under a condition (B, …), guided as `sampling`, which is `resolved`, says."""
        config = self.record.denoiser
        return guided_velocity(
            self._network(self.denoiser, sampling.precision),
            condition,
            config.modalities,
            sampling.guidance,
            self._network(weaker, sampling.precision) if weaker else None,
            PATHS[config.path],
            known_times=PREDICTIONS[config.prediction].known_times(PATHS[config.path]),
            any_times=self.record.recipe.schedule.any_times,
        )

    def _network(self, denoiser: Denoiser, precision: AutoPrecision) -> SamplingNetwork:
        key = denoiser, to_precision(precision, self.device)
        if key not in self._networks:
            self._networks[key] = SamplingNetwork(*key, compiled=self.compile)
        return self._networks[key]

    @torch.no_grad()
    def decode(self, state: State, rounding: Rounding, tile: int = Sampling.tile) -> np.ndarray:
        """The images of a state: uint8 (B, height, width, 3)."""
        return self.pixels(state, rounding, tile).cpu().numpy()

    @torch.no_grad()
    def pixels(self, state: State, rounding: Rounding, tile: int = Sampling.tile) -> Tensor:
        """What `decode` gives, on the device still, which may be working on it.

        Raises UserError for latents, and for images of them, that are NaN or infinite: they would be black.
        """
        latents = self.raw(state, LATENT)
        images = tiling.decode(self.autoencoder, latents, tile)
        # One number is waited for. What is not finite does not add up to what is.
        if not (latents.sum() + images.sum()).isfinite():
            self._refuse_not_finite(latents, images)
        return to_pixels(images, rounding)

    def _refuse_not_finite(self, latents: Tensor, images: Tensor) -> None:
        if not latents.isfinite().all():
            raise UserError(
                f"the model drew latents that are NaN or infinite; choose {option('precision')} float32, a lower "
                f"{option('guidance_scale')}, or weights of another step"
            )
        if not images.isfinite().all():
            name = self.record.decoder or self.record.autoencoder.name
            raise UserError(f"autoencoder {name} decodes latents to NaN or infinite values; fetch it again")

    def raw(self, state: State, name: str) -> Tensor:
        """A modality of a state as the autoencoder, encoder or compressor gives it, float32."""
        modality = self.record.denoiser.modality(name)
        assert modality is not None
        return modality.denormalise(state[name].float())


def _visible_signature() -> Signature:
    """The signature of `generate` with the fields of `Sampling` in place of `**changes`, for help and completion."""
    *own, _ = signature(ImageModel.generate).parameters.values()
    hints = get_type_hints(Sampling)
    changes = [
        Parameter(part.name, Parameter.KEYWORD_ONLY, default=None, annotation=hints[part.name] | None)
        for part in fields(Sampling)
    ]
    return Signature([*own, *changes], return_annotation="list[Image.Image] | Tensor")


ImageModel.generate.__signature__ = _visible_signature()  # type: ignore[reportFunctionMemberAccess]
