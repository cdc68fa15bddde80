"""The See tab: what a run and its encoder see in the image at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from reglue.app.work import Work
from reglue.app.workshop import Run
from reglue.data.store import Store
from reglue.diffusion.modalities import LATENT
from reglue.editing.encoding import as_pixels
from reglue.editing.options import LOCAL
from reglue.encoders.vision import VisionEncoder, load_encoder
from reglue.errors import UserError
from reglue.perception.heads import Head
from reglue.perception.pictures import as_colours, meanings
from reglue.pipeline import ImageModel

NEIGHBOURS = 8
AT_ONCE = 4096
"""Class tokens that are compared at a time."""


@dataclass(frozen=True)
class Overlay:
    """What a head says of the image."""

    image: Image.Image
    """Classes as colours over the image, or depth."""
    legend: list[tuple[tuple[int, int, int], str]]
    """Colours and what they stand for."""


@dataclass(frozen=True)
class Neighbour:
    """A training image, as its latents decode."""

    image: Image.Image
    name: str
    """Its path among the images that the store was prepared from."""
    similarity: float
    """Cosine of class tokens."""


@dataclass
class Seen:
    """All that is seen in an image."""

    image: Image.Image
    """The part that the model sees, at its resolution."""
    map: Image.Image | None = None
    """Three principal components of the local map as colours, at the same resolution."""
    places: np.ndarray | None = None
    """The local map as unit vectors, float32 (h, w, K): their products are cosines."""
    heads: dict[str, Overlay] = field(default_factory=dict[str, Overlay])
    neighbours: list[Neighbour] = field(default_factory=list[Neighbour])
    notes: list[str] = field(default_factory=list[str])
    """What is not there, and why: a line each."""


def look(run: Run, image: Image.Image, heads: Mapping[str, Head], work: Work) -> Seen:
    """See all that can be seen. Raises UserError if the run cannot encode images; what else fails is a note."""
    model = run.model()
    work.say(0)
    pixels = as_pixels(image, run.record.resolution)
    cropped = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    seen = Seen(cropped)
    state = model.encode(image)
    if LOCAL in state:
        seen.map = model.see(state)
        seen.places = F.normalize(state[LOCAL][0].float().cpu(), dim=0).permute(1, 2, 0).numpy()
    else:
        seen.notes.append(f"{run.title} has no local map; it learns {', '.join(run.modalities)}")
    work.say(0.2)
    for name, head in heads.items():
        try:
            seen.heads[name] = overlay(model, head, pixels)
        except UserError as error:
            seen.notes.append(f"head {name}: {error}")
    work.say(0.5)
    try:
        seen.neighbours = nearest(run, pixels, work)
    except UserError as error:
        seen.notes.append(f"no nearest training images: {error}")
    return seen


def overlay(model: ImageModel, head: Head, pixels: Tensor) -> Overlay:
    """What a head predicts of uint8 pixels (1, 3, H, W). Raises UserError if it was made for another encoder."""
    encoder = _encoder_for(model, head)
    head.spec.check_fits(encoder.spec, "the run")
    own = head.to(model.device)
    values = own.predict(encoder.describe(pixels.to(model.device)), encoder.spec.layers, model.record.resolution)
    shown = values[0].cpu().numpy()
    image = pixels[0].permute(1, 2, 0).numpy()
    legend = [(tuple(int(part) for part in colour), meaning) for colour, meaning in meanings(head, [shown])]
    return Overlay(Image.fromarray(as_colours(shown, head, image)), legend)  # type: ignore[arg-type]


def nearest(run: Run, pixels: Tensor, work: Work, most: int = NEIGHBOURS) -> list[Neighbour]:
    """The training images with the most similar class tokens, if the run's store is there. Raises UserError if not."""
    model, place = run.model(), Path(run.record.store or "")
    if run.record.store is None or not place.is_dir():
        raise UserError(f"the store that {run.title} was trained on is not there")
    store, encoder = Store.open(place), model.image_encoder().encoder
    if "cls" not in store.manifest.columns or encoder is None:
        raise UserError("the run has no class tokens to compare")
    asked = F.normalize(encoder.describe(pixels.to(model.device)).class_token.float().cpu(), dim=1)
    best, rows = torch.empty(0), torch.empty(0, dtype=torch.int64)
    for part, tensors in store.scan("cls", store.originals, AT_ONCE):
        work.say(0.5 + 0.4 * int(part[-1]) / len(store))
        similar = F.normalize(tensors["cls"].float(), dim=1) @ asked[0]
        best, order = torch.cat([best, similar]).topk(min(most, len(best) + len(similar)))
        rows = torch.cat([rows, part])[order]
    modality = run.record.denoiser.modality(LATENT)
    assert modality is not None
    latents = store.read("latent", rows)["mean"].float().to(model.device)
    images = model.decode({LATENT: modality.normalise(latents)}, "round")
    found = zip(images, store.names(rows), best.tolist(), strict=True)
    return [Neighbour(Image.fromarray(image), name, similarity) for image, name, similarity in found]


def _encoder_for(model: ImageModel, head: Head) -> VisionEncoder:
    """The run's encoder with the layers that a head reads: the one that is loaded, if it has them."""
    own, record = model.image_encoder().encoder, model.record
    if own is None or record.encoder is None:
        raise UserError("the run has no vision encoder")
    if {*head.spec.layers} <= {*own.spec.layers} and head.spec.final_norm == own.spec.final_norm:
        return own
    return load_encoder(
        model.encoder or record.encoder.name,
        record.resolution,
        head.spec.layers,
        model.device,
        final_norm=head.spec.final_norm,
    )
