"""Nodes of ComfyUI that draw, encode, edit and decode with a run. ComfyUI alone can import them.

Between them go a model (`ImageModel`) and a state: the joint state of images, (B, …) each, as the model learns it. An
IMAGE is float32 (B, H, W, 3) in [0, 1], a MASK (B, H, W), where 1 is drawn anew.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy.utils import ProgressBar  # type: ignore[reportMissingImports], it is ComfyUI's
from comfy_api.latest import ComfyExtension, io  # type: ignore[reportMissingImports]
from PIL import Image
from torch import Tensor

from reglue.diffusion.controls import Progress
from reglue.diffusion.modalities import State, concatenate_states
from reglue.diffusion.samplers import SAMPLERS
from reglue.editing.options import CLASS_TOKEN, LOCAL
from reglue.generation import evaluations
from reglue.pipeline import ImageModel, load
from reglue.sampling import Sampling

MODEL, STATE = io.Custom("REGLUE_MODEL"), io.Custom("REGLUE_STATE")
AS_RECIPE = "as the recipe"
KEPT = {"nothing": (), "the map": (LOCAL,), "the class token": (CLASS_TOKEN,), "both": (LOCAL, CLASS_TOKEN)}
"""What of an image's own semantics edits keep."""
BATCH = 32
"""Images that are drawn together."""


def extension(folder: Path) -> ComfyExtension:
    """The nodes. The one that loads the run in a folder is named after it: several packs have one each."""
    number, word = io.Int.Input, io.String.Input
    draws = lambda: [  # noqa: E731, inputs belong to one node each
        word("classes", default="", tooltip="Names or numbers, with commas, in turn. Empty: none."),
        number("count", default=1, min=1, max=4096),
        number("seed", default=0, min=0, max=2**63 - 1, control_after_generate=True),
        number("steps", default=0, min=0, max=10000, tooltip="0: as the recipe says."),
        io.Float.Input("guidance", default=-1.0, min=-1.0, max=100.0, step=0.1, tooltip="-1: as the recipe says."),
        io.Combo.Input("sampler", options=[AS_RECIPE, *SAMPLERS]),
    ]
    share = partial(io.Float.Input, min=0.0, max=1.0, step=0.05)
    loads = [
        word("run", default="", tooltip="Another run: its folder, or OWNER/NAME on the hub. Empty: this one."),
        word("encoder", default="", tooltip="Where the run's vision encoder is. Empty: as the run says."),
        io.Combo.Input("device", options=["auto", "cuda", "cpu"]),
    ]
    edits = [
        io.Image.Input("image"),
        io.Combo.Input("keep", options=[*KEPT], tooltip="What is held of the image's semantics."),
        share("until", default=0.0, tooltip="Let go below this time."),
        share("strength", default=1.0, tooltip="1: drawn from noise."),
        *draws(),
        io.Mask.Input("mask", optional=True, tooltip="Where the image is drawn anew. Black everywhere: none."),
        io.Image.Input("map_from", optional=True, tooltip="The image to take the map from."),
    ]
    nodes = [
        node(f"Load {folder.name}", partial(load_run, folder), loads, MODEL.Output(display_name="model")),
        node("Sample", sample, [MODEL.Input("model"), *draws()], STATE.Output(display_name="state")),
        node("Encode", encode, [MODEL.Input("model"), io.Image.Input("image")], STATE.Output(display_name="state")),
        node("Edit", edit, [MODEL.Input("model"), *edits], io.Image.Output()),
        node("Decode", decode, [MODEL.Input("model"), STATE.Input("state")], io.Image.Output()),
        node("See map", see_map, [MODEL.Input("model"), STATE.Input("state")], io.Image.Output()),
    ]

    class Extension(ComfyExtension):
        async def get_node_list(self) -> list[type[io.ComfyNode]]:
            return nodes

    return Extension()


def node(title: str, function: Callable[..., Any], inputs: list[Any], output: Any) -> type[io.ComfyNode]:
    """A node that gives what a function makes of its inputs; the function's documentation is shown with it."""
    what = getattr(function, "func", function).__doc__

    class Node(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> Any:
            name = "Reglue" + title.replace(" ", "_")
            return io.Schema(name, title, "reglue", description=what, inputs=inputs, outputs=[output])

        @classmethod
        def execute(cls, **given: Any) -> Any:
            return io.NodeOutput(function(**given))

    return Node


def load_run(folder: Path, run: str, encoder: str, device: str) -> ImageModel:
    """The model in this folder, or another run."""
    return load(run.strip() or folder, encoder=encoder.strip() or None, device=device)


def sample(model: ImageModel, classes: str, count: int, seed: int, steps: int, guidance: float, sampler: str) -> State:
    """Images as states: the same as `reglue sample` draws with this seed."""
    sampling, labels = changed(model.default_sampling, steps, guidance, sampler), model.labels_of(named(classes), count)
    return concatenate_states([*model.drawn(labels, seed, sampling, BATCH, progress(sampling, count))])


def encode(model: ImageModel, image: Tensor) -> State:
    """Images as the model sees them, scaled and cropped to its size."""
    return concatenate_states([model.encode(picture) for picture in as_pictures(image)])


def decode(model: ImageModel, state: State) -> Tensor:
    """The images of states."""
    return as_image(model.decode(state, model.default_sampling.rounding, model.default_sampling.tile))


def see_map(model: ImageModel, state: State) -> Tensor:
    """What is where: three principal components of the local map as colours, side by side."""
    return as_image(np.asarray(model.see(state))[None])


def edit(
    model: ImageModel,
    image: Tensor,
    keep: str,
    until: float,
    strength: float,
    classes: str,
    count: int,
    seed: int,
    steps: int,
    guidance: float,
    sampler: str,
    mask: Tensor | None = None,
    map_from: Tensor | None = None,
) -> Tensor:
    """Images that share with given ones what is kept: their map, what lies outside a mask, or both."""
    pictures, given = as_pictures(image), named(classes)
    sampling = changed(model.sampling_for(given is not None), steps, guidance, sampler)
    options: dict[str, Any] = {"count": count, "seed": seed, "classes": given, "sampling": sampling}
    options |= {"keep": KEPT[keep], "until": until, "strength": strength if strength < 1 else None}
    options["controls"] = [Progress(progress(sampling, count * len(pictures)))]
    edits: list[Image.Image] = []
    for i, picture in enumerate(pictures):
        held = None if mask is None else as_mask(mask[i % len(mask)], picture.size)
        source = None if map_from is None else as_pictures(map_from)[i % len(map_from)]
        edits += model.edit(picture, mask=held, local_from=source, **options)
    return as_image(np.stack([np.asarray(one) for one in edits]))


def changed(sampling: Sampling, steps: int, guidance: float, sampler: str) -> Sampling:
    """A way to sample with what the inputs of a node say."""
    scale, name = guidance if guidance >= 0 else None, None if sampler == AS_RECIPE else sampler
    return sampling.changed(steps=steps or None, guidance_scale=scale, sampler=name)


def named(classes: str) -> list[str] | None:
    """The classes in a text; None without any."""
    return [name.strip() for name in classes.split(",") if name.strip()] or None


def progress(sampling: Sampling, count: int) -> Callable[[], object]:
    """What is to be called after each evaluation. It also ends the work when the user cancels it."""
    return partial(ProgressBar(evaluations(sampling, count, BATCH) or 1).update, 1)


def as_pictures(image: Tensor) -> list[Image.Image]:
    """An IMAGE as pictures."""
    return [Image.fromarray(one) for one in as_bytes(image[..., :3])]


def as_mask(mask: Tensor, size: tuple[int, int]) -> Image.Image | None:
    """One of a MASK, (H, W), as a picture of a size (width, height); None where it is black everywhere."""
    # ComfyUI has such a one for images without transparency.
    return Image.fromarray(as_bytes(mask)).resize(size) if (mask > 0).any() else None


def as_bytes(values: Tensor) -> np.ndarray:
    """Numbers in [0, 1] as uint8."""
    return (255 * values.cpu()).round().clamp(0, 255).to(torch.uint8).numpy()


def as_image(pixels: np.ndarray) -> Tensor:
    """Pixels uint8 (B, H, W, 3) as an IMAGE."""
    return torch.from_numpy(pixels.astype(np.float32) / 255)
