"""Edits: images that share with a given one what is asked, drawn on the one loop over time by controls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reglue.data.pictures import colours_of, enlarge, image_grid
from reglue.diffusion.conditions import Condition
from reglue.diffusion.controls import Clamp, Control, FlowEdit, Loss, LossGuidance, SquaredError, Unlikeness, let_go
from reglue.diffusion.denoiser import Denoiser
from reglue.diffusion.guidance import Velocity
from reglue.diffusion.modalities import LATENT, State, concatenate_states
from reglue.diffusion.noise import Draws
from reglue.diffusion.paths import PATHS
from reglue.diffusion.samplers import SAMPLERS, Start
from reglue.diffusion.schedules import Schedule
from reglue.editing.encoding import ImageEncoder, Picture, as_pixels, open_picture
from reglue.editing.options import CLASS_TOKEN, FEATURES, LOCAL, Editing
from reglue.editing.painting import HeadLoss, depths_of, shares_of
from reglue.editing.subjects import Request, Subject, refuse_lacking
from reglue.encoders.autoencoders import Autoencoder
from reglue.errors import UserError, option
from reglue.progress import Bar
from reglue.run import RunRecord
from reglue.sampling import MODALITY_SCALES, Sampling
from reglue.seeds import Index

KNOWN = "known"
"""The purpose of the noise on what is held."""
LOSS_SCALE = 10.0
"""Of loss guidance, where it is not given."""


class Editor(ABC):
    """What an `ImageModel` can do with images that are there."""

    record: RunRecord
    denoiser: Denoiser
    autoencoder: Autoencoder
    folder: Path | None
    encoder: str | None
    _image_encoder: ImageEncoder | None = None

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the model lives."""

    @property
    @abstractmethod
    def default_sampling(self) -> Sampling:
        """What the recipe says."""

    @abstractmethod
    def resolved(self, sampling: Sampling) -> Sampling:
        """The same, with what it leaves open decided."""

    @abstractmethod
    def condition(self, labels: Sequence[int], others: Condition | None = None) -> Condition:
        """What the model is given for classes by number."""

    @abstractmethod
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
        """The states of images, drawn."""

    @abstractmethod
    def velocity(self, condition: Condition, sampling: Sampling, weaker: Denoiser | None = None) -> Velocity:
        """What samplers follow under a condition."""

    @abstractmethod
    def decode(self, state: State, rounding: Any, tile: int = ...) -> np.ndarray:
        """The images of a state."""

    @abstractmethod
    def labels_of(self, classes: int | str | Sequence[int | str] | None, count: int) -> list[int]:
        """The labels of so many images, of classes in turn or of none."""

    def image_encoder(self, target: bool = False) -> ImageEncoder:
        """What encodes images, loaded once; with `target` it knows what hidden tokens were aligned with.

        Raises UserError, saying what is missing, if it cannot be loaded.
        """
        if self._image_encoder is None or (target and self._image_encoder.encoder is None):
            self._image_encoder = ImageEncoder.load(
                self.record, self.folder, self.autoencoder, self.device, self.encoder, target
            )
        return self._image_encoder

    def encode(self, image: Picture) -> State:
        """The joint state of an image, a batch of one, as the model learns it: `latent`, `local`, `cls`.

        Raises UserError for an image that cannot be read, and for networks of the run that are not at hand.
        """
        return self.image_encoder().encode(as_pixels(open_picture(image), self.record.resolution))

    def edit(
        self,
        image: Picture,
        *,
        count: int = 1,
        seed: int = 0,
        classes: int | str | Sequence[int | str] | None = None,
        batch_size: int = 32,
        progress: bool = False,
        controls: Sequence[Control] = (),
        sampling: Sampling | None = None,
        **changes: Any,
    ) -> list[Image.Image]:
        """`count` edits of an image, in its size: what is held stays, everything else is drawn to fit.

        What is held is told by the fields of `Editing` (`keep=("local",)`, `mask="mask.png"`, `strength=0.6`), how the
        rest is drawn by those of `Sampling` (`steps=50`). Edit i depends on `seed` and i alone. `classes` are taken in
        turn; without them edits belong to none. `controls` are as for `generate`. Raises UserError for what contradicts
        itself, does not fit the image or is not in the model, and TypeError for an unknown option.
        """
        editing, changes = _split(changes)
        refuse_numbers(count, seed, batch_size)
        labels = self.labels_of(classes, count)
        sampling = self.resolved((sampling or self.sampling_for(classes is not None)).changed(**changes))
        self.refuse_unfit(editing, sampling, classes is not None)
        subject = self.subject(image, editing)
        pairs = [(0, i) for i in range(count)]
        drawn = self.edits(
            [subject], pairs, labels, editing, sampling, seed, batch_size, progress=progress, controls=controls
        )
        return [*drawn]

    def interpolate(
        self,
        image_a: Picture,
        image_b: Picture,
        *,
        steps: int = 8,
        what: str | Sequence[str] = (LOCAL, CLASS_TOKEN),
        classes: int | str | Sequence[int | str] | None = None,
        until: float | Mapping[str, float] = 0.0,
        seed: int = 0,
        batch_size: int = 32,
        **changes: Any,
    ) -> list[Image.Image]:
        """Images from one's semantics to another's: `steps` of them, all from the same noise.

        The modalities `what` are held to (1 − f)·A + f·B for f from 0 to 1, while t ≥ `until`; those that the model
        does not have are passed over. Other options are those of `Sampling`. Raises UserError if it has none of them.
        """
        learned = [modality.name for modality in self.record.denoiser.modalities]
        what = (what,) if isinstance(what, str) else what
        held = [name for name in what if name in learned]
        if not held or not set(what) <= {LOCAL, CLASS_TOKEN, *learned}:
            raise UserError(f"what {' '.join(what)}: this model learns {', '.join(learned)}")
        if steps < 2:
            raise UserError(f"steps {steps}: choose 2 at least")
        refuse_numbers(steps, seed, batch_size)
        Editing(keep=tuple(held), until=until)  # It checks them.
        sampling = self.resolved(self.sampling_for(classes is not None).changed(**changes))
        a, b = self.encode(image_a), self.encode(image_b)
        shares = torch.linspace(0, 1, steps, device=self.device)
        known = {name: torch.cat([torch.lerp(a[name], b[name], f) for f in shares]) for name in held}
        labels = self.labels_of(classes, steps)
        images: list[Image.Image] = []
        for start in range(0, steps, batch_size):
            part = slice(start, start + batch_size)
            indices: list[Index] = [(0, 0)] * len(labels[part])
            own, condition = {n: v[part] for n, v in known.items()}, self.condition(labels[part])
            if schedule := None if until else self._given(own):
                state = self.draw(indices, condition, seed, sampling, start=Start(1.0, own), schedule=schedule)
            else:
                clamp = self._clamp(own, {}, indices, seed, sampling, until)
                state = self.draw(indices, condition, seed, sampling, controls=[clamp])
            images += map(Image.fromarray, self.decode(state, sampling.rounding, sampling.tile))
        return images

    def complete(self, known: State, *, indices: Sequence[Index] = (), seed: int = 0, **changes: Any) -> State:
        """The joint states (B, …) of images of which some modalities are known, as the model learns them, (B, …) each.

        What is not `known` is drawn from p(others | known), exactly, without a class: the local map of an image's
        latents, say, which is what the model sees in it. `indices` are the numbers of the images, 0, 1, … if not given;
        other options are those of `Sampling`. Raises UserError for a model that has not learned it.
        """
        learned = [modality.name for modality in self.record.denoiser.modalities]
        schedule = self._given(known)
        if schedule is None or not self.can_complete(known):
            raise UserError(
                f"this model cannot draw {', '.join(n for n in learned if n not in known) or 'anything'} from "
                f"{', '.join(known)}: train one with {option('times')} independent"
            )
        indices = indices or range(len(next(iter(known.values()))))
        sampling = self.resolved(self.sampling_for(False).changed(**changes))
        condition = self.condition(self.labels_of(None, len(indices)))
        return self.draw(indices, condition, seed, sampling, start=Start(1.0, known), schedule=schedule)

    def can_complete(self, known: Iterable[str]) -> bool:
        """Whether `complete` can draw the rest of these modalities."""
        learned, known = {modality.name for modality in self.record.denoiser.modalities}, {*known}
        return bool(known) and known < learned and self._given(known) is not None

    def _given(self, known: Iterable[str]) -> Schedule | None:
        """The schedule that draws from p(others | known); None if the model has not learned it."""
        return self.record.recipe.schedule.given(known, [m.name for m in self.record.denoiser.modalities])

    def see(self, what: Picture | State, reference: State | None = None) -> Image.Image:
        """The local map of an image, or those of a state, as a picture: three principal components as colours.

        They are fitted to the maps that are shown, or to those of `reference`. Several stand side by side. Raises
        UserError for a model without a local map.
        """
        state = what if isinstance(what, dict) else self.encode(what)
        if LOCAL not in state:
            raise UserError(f"this model has no local map to see; it learns {', '.join(state)}")
        colours = colours_of(state[LOCAL].cpu(), reference[LOCAL].cpu() if reference else None)
        return Image.fromarray(image_grid(enlarge(colours, self.record.resolution), len(colours)))

    def strengths(self, **scales: float) -> dict[str, Any]:
        """How strongly each modality follows the class, by name, as options of `generate` and `edit`.

        `model.edit(image, keep=("local",), classes=3, **model.strengths(latent=2.0, cls=0.5))`; 1 is no guidance, and
        modalities that are not named keep the recipe's. Raises UserError for what the model does not learn.
        """
        learned = [modality.name for modality in self.record.denoiser.modalities]
        if unknown := [name for name in scales if name not in learned]:
            raise UserError(f"strength of {', '.join(unknown)}: this model learns {', '.join(learned)}")
        base = self.default_sampling
        # Whatever has no scale of its own has that of the latents.
        own = {name: base.guidance.scale_of(name) for name in learned[1:]} | scales
        named = {f"{name}_scale": own.pop(name) for name in [*own] if f"{name}_scale" in MODALITY_SCALES}
        result = {"guidance_scale": own.pop(LATENT, base.guidance_scale), **named, "other_scales": own}
        base.changed(**result)
        return result

    def sampling_for(self, with_classes: bool) -> Sampling:
        """How edits are drawn unless told otherwise: as the recipe says, unguided where there is no class to follow."""
        own = self.default_sampling
        return (
            own if with_classes else replace(own, guidance_scale=1.0, local_scale=None, cls_scale=None, other_scales={})
        )

    def refuse_unfit(self, editing: Editing, sampling: Sampling, with_classes: bool) -> None:
        """Raise UserError if an edit cannot be drawn so."""
        refuse_lacking(editing, self.record)
        if not editing.flow_edit:
            return
        asked = option("flow_edit")
        if not with_classes:
            raise UserError(f"{asked} changes the class; name one with {option('classes')}")
        known = [name for name, sampler in SAMPLERS.items() if not (sampler.stochastic or sampler.spans)]
        if sampling.sampler not in known:
            what = "noise" if SAMPLERS[sampling.sampler].stochastic else "long steps"
            raise UserError(
                f"{asked} has no place for the {what} of {sampling.sampler}; choose {option('sampler')} "
                f"{', '.join(known)}"
            )
        self.labels_of(editing.source_class, 1)

    def subject(self, image: Picture, editing: Editing) -> Subject:
        """An image with what its edits are to have. Raises UserError for what does not fit it."""
        return Request.of(image, editing, self.record).subject(self.image_encoder(FEATURES in editing.held))

    def edits(
        self,
        subjects: Sequence[Subject],
        pairs: Sequence[tuple[int, int]],
        labels: Sequence[int],
        editing: Editing,
        sampling: Sampling,
        seed: int,
        batch_size: int,
        *,
        weaker: Denoiser | None = None,
        progress: bool = False,
        controls: Sequence[Control] = (),
    ) -> Iterator[Image.Image]:
        """The edits (j, i), in the sizes of their images: edit i of image j, of which `subjects` has one each, or one.

        Each is a function of the seed, j and i, whatever is drawn beside it. `sampling` is `resolved`.
        """
        with Bar(total=len(pairs), unit="image", desc="edit", disable=not progress) as bar:
            for first in range(0, len(pairs), batch_size):
                part = slice(first, first + batch_size)
                own = list(subjects[part]) if len(subjects) > 1 else [*subjects] * len(pairs[part])
                own = [subject.edit(i) for subject, (_, i) in zip(own, pairs[part], strict=True)]
                clamps, start, schedule = self.controls_for(own, pairs[part], editing, sampling, seed)
                condition = self.condition(labels[part])
                state = self.draw(
                    pairs[part],
                    condition,
                    seed,
                    sampling,
                    weaker=weaker,
                    controls=[*clamps, *(control.of(part) for control in controls)],
                    start=start,
                    repeats=editing.resample,
                    schedule=schedule,
                )
                drawn = self.decode(state, sampling.rounding, sampling.tile)
                bar.update(len(own))
                for subject, pixels in zip(own, drawn, strict=True):
                    yield subject.place.put_back(subject.image, Image.fromarray(pixels), subject.share)

    def controls_for(
        self, subjects: Sequence[Subject], indices: Sequence[Index], editing: Editing, sampling: Sampling, seed: int
    ) -> tuple[list[Control], Start | None, Schedule | None]:
        """What holds the known of images, one for each index, where they begin, and by which times they come to data.

        What is known as a whole, and to the end, is data all along if the model knows how to draw the rest of it.
        """
        controls: list[Control] = []
        scale, path = editing.loss_scale or LOSS_SCALE, PATHS[self.record.denoiser.path]
        known, where, own = (
            concatenate_states([getattr(one, part) for one in subjects]) for part in ("known", "where", "own")
        )
        if subjects[0].head:
            controls.append(LossGuidance(self._painted(subjects), scale, until=editing.until, path=path))
        if subjects[0].target:
            each = zip(*(one.target for one in subjects if one.target), strict=True)
            target, chosen = (torch.cat(part) for part in each)
            loss = Unlikeness(self.denoiser.projector, target, chosen)
            controls.append(LossGuidance(loss, scale, until=let_go(editing.until, FEATURES), path=path))
        exact = known and not (where or editing.until or editing.by == "loss")
        schedule = self._given(known) if exact else None
        if known and editing.by == "loss":
            controls.append(LossGuidance(SquaredError(known, where), scale, until=editing.until, path=path))
        elif known and not schedule:
            controls.append(self._clamp(known, where, indices, seed, sampling, editing.until))
        if subjects[0].outside is not None:
            outside = torch.cat([one.outside for one in subjects if one.outside is not None])
            maps = {modality.name: own[modality.name] for modality in self.record.denoiser.maps}
            everywhere = dict.fromkeys(maps, outside)
            if editing.by == "loss":
                controls.append(LossGuidance(SquaredError(maps, everywhere), scale, path=path))
            else:
                # Of both, the image's own wins, since outside the mask nothing is to change.
                controls.append(self._clamp(maps, everywhere, indices, seed, sampling, 0.0))
        if editing.flow_edit:
            controls.insert(0, self._flow_edit(own, indices, editing, sampling, seed))
        if editing.strength is None and not schedule:
            return controls, None, None
        start = 1.0 if editing.strength is None else editing.strength
        return controls, Start(start, concatenate_states([one.shown() for one in subjects])), schedule

    def _painted(self, subjects: Sequence[Subject]) -> Loss:
        """How far maps are from what is painted on images, as a head sees it."""
        seen, modality, head = self.image_encoder(), self.record.denoiser.modality(LOCAL), subjects[0].head
        compressor = seen.compressors[LOCAL]
        assert seen.encoder
        assert modality
        assert head
        encoder = replace(seen.encoder.spec, layers=compressor.layers or seen.encoder.spec.layers)
        labels = torch.from_numpy(np.stack([one.labels for one in subjects if one.labels is not None])).to(self.device)
        if labels.is_floating_point():
            depths, shares = depths_of(labels, encoder.grid)
            return HeadLoss(head, modality, compressor, encoder, shares, depths)
        return HeadLoss(head, modality, compressor, encoder, shares_of(labels, head.spec.outputs, encoder.grid))

    def _flow_edit(
        self, own: State, indices: Sequence[Index], editing: Editing, sampling: Sampling, seed: int
    ) -> Control:
        """What leads images (B, …) to another class. The way of the images themselves is not guided."""
        condition = self.condition(self.labels_of(editing.source_class, len(indices)))
        plain = replace(sampling, guidance_scale=1.0, other_scales={}, **dict.fromkeys(MODALITY_SCALES, None))  # type: ignore[arg-type]
        plain = replace(plain, representation_scale=1.0, auto_scale=1.0, auto_scales={}, guiders={})
        noise = Draws(seed, KNOWN, indices, {name: tuple(value.shape[1:]) for name, value in own.items()})
        return FlowEdit(lambda condition: self.velocity(condition, plain), condition, own, noise)

    def _clamp(
        self,
        known: State,
        where: Mapping[str, Tensor],
        indices: Sequence[Index],
        seed: int,
        sampling: Sampling,
        until: float | Mapping[str, float],
    ) -> Control:
        """What holds values (B, …) of the images `indices`."""
        noise = Draws(seed, KNOWN, indices, {name: tuple(value.shape[1:]) for name, value in known.items()})
        fresh = SAMPLERS[sampling.sampler].stochastic
        return Clamp(known, noise, where, until=until, fresh=fresh, path=PATHS[self.record.denoiser.path])


def refuse_numbers(count: int, seed: int, batch_size: int) -> None:
    """Raise UserError for numbers that cannot be."""
    for name, value, least in (("count", count, 1), ("seed", seed, 0), ("batch_size", batch_size, 1)):
        if value < least:
            raise UserError(f"{name} {value}: choose {least} at least")


def _split(changes: Mapping[str, Any]) -> tuple[Editing, dict[str, Any]]:
    """The options of an edit, and those of sampling. Raises TypeError for an unknown one."""
    own, others = ({part.name for part in fields(kind)} for kind in (Editing, Sampling))
    if unknown := [name for name in changes if name not in own | others]:
        raise TypeError(f"edit() takes no {', '.join(unknown)}; it takes {', '.join(sorted(own | others))}")
    asked = {name: value for name, value in changes.items() if name in own}
    keep = asked.get("keep", ())
    editing = Editing(**{**asked, "keep": (keep,) if isinstance(keep, str) else keep})
    return editing, {name: value for name, value in changes.items() if name in others}
