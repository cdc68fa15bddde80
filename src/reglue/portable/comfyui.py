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

CATEGORY = "reglue"
MODEL, STATE = io.Custom("REGLUE_MODEL"), io.Custom("REGLUE_STATE")
AS_RECIPE = "as the recipe"
KEPT = {"nothing": (), "the map": (LOCAL,), "the class token": (CLASS_TOKEN,), "both": (LOCAL, CLASS_TOKEN)}
"""What of an image's own semantics edits keep."""
BATCH = 32
"""Images that are drawn together."""


def extension(folder: Path) -> ComfyExtension:
    """The nodes, and the one that loads the run in a folder."""

    class Extension(ComfyExtension):
        async def get_node_list(self) -> list[type[io.ComfyNode]]:
            return [loader(folder), Sample, Encode, Edit, Decode, SeeMap]

    return Extension()


def schema(name: str, title: str, what: str, inputs: list[Any], output: Any) -> Any:
    """What ComfyUI shows of a node."""
    return io.Schema(
        node_id=f"Reglue{name}",
        display_name=title,
        category=CATEGORY,
        description=what,
        inputs=inputs,
        outputs=[output],
    )


def loader(folder: Path) -> type[io.ComfyNode]:
    """The node that loads the run in a folder, which is named after it: several packs have one each."""

    class Load(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> Any:
            return schema(
                f"Load_{folder.name}",
                f"Load {folder.name}",
                "The model in this folder, or another run.",
                [
                    io.String.Input(
                        "run", default="", tooltip="Another run: its folder, or OWNER/NAME on the hub. Empty: this one."
                    ),
                    io.String.Input(
                        "encoder", default="", tooltip="Where the run's vision encoder is. Empty: as the run says."
                    ),
                    io.Combo.Input("device", options=["auto", "cuda", "cpu"]),
                ],
                MODEL.Output(display_name="model"),
            )

        @classmethod
        def execute(cls, run: str, encoder: str, device: str) -> Any:
            return io.NodeOutput(load(run.strip() or folder, encoder=encoder.strip() or None, device=device))

    return Load


def drawing() -> list[Any]:
    """The inputs of a node that draws."""
    return [
        io.String.Input("classes", default="", tooltip="Names or numbers, with commas, in turn. Empty: none."),
        io.Int.Input("count", default=1, min=1, max=4096),
        io.Int.Input("seed", default=0, min=0, max=2**63 - 1, control_after_generate=True),
        io.Int.Input("steps", default=0, min=0, max=10000, tooltip="0: as the recipe says."),
        io.Float.Input("guidance", default=-1.0, min=-1.0, max=100.0, step=0.1, tooltip="-1: as the recipe says."),
        io.Combo.Input("sampler", options=[AS_RECIPE, *SAMPLERS]),
    ]


def changed(sampling: Sampling, steps: int, guidance: float, sampler: str) -> Sampling:
    """A way to sample with what the inputs of a node say."""
    return sampling.changed(
        steps=steps or None,
        guidance_scale=guidance if guidance >= 0 else None,
        sampler=None if sampler == AS_RECIPE else sampler,
    )


def named(classes: str) -> list[str] | None:
    """The classes in a text; None without any."""
    return [name.strip() for name in classes.split(",") if name.strip()] or None


def progress(sampling: Sampling, count: int) -> Callable[[], object]:
    """What is to be called after each evaluation. It also ends the work when the user cancels it."""
    return partial(ProgressBar(evaluations(sampling, count, BATCH) or 1).update, 1)


class Sample(io.ComfyNode):
    """Draws states."""

    @classmethod
    def define_schema(cls) -> Any:
        """See `io.ComfyNode`."""
        what = "The same images as `reglue sample` draws with this seed."
        return schema("Sample", "Sample", what, [MODEL.Input("model"), *drawing()], STATE.Output(display_name="state"))

    @classmethod
    def execute(
        cls, model: ImageModel, classes: str, count: int, seed: int, steps: int, guidance: float, sampler: str
    ) -> Any:
        """See `io.ComfyNode`."""
        sampling = changed(model.default_sampling, steps, guidance, sampler)
        labels = model.labels_of(named(classes), count)
        states = model.drawn(labels, seed, sampling, BATCH, progress(sampling, count))
        return io.NodeOutput(concatenate_states([*states]))


class Encode(io.ComfyNode):
    """Turns images into states."""

    @classmethod
    def define_schema(cls) -> Any:
        """See `io.ComfyNode`."""
        what = "Images as the model sees them, scaled and cropped to its size."
        inputs = [MODEL.Input("model"), io.Image.Input("image")]
        return schema("Encode", "Encode", what, inputs, STATE.Output(display_name="state"))

    @classmethod
    def execute(cls, model: ImageModel, image: Tensor) -> Any:
        """See `io.ComfyNode`."""
        return io.NodeOutput(concatenate_states([model.encode(picture) for picture in as_pictures(image)]))


class Decode(io.ComfyNode):
    """Turns states into images."""

    @classmethod
    def define_schema(cls) -> Any:
        """See `io.ComfyNode`."""
        inputs = [MODEL.Input("model"), STATE.Input("state")]
        return schema("Decode", "Decode", "The images of states.", inputs, io.Image.Output())

    @classmethod
    def execute(cls, model: ImageModel, state: State) -> Any:
        """See `io.ComfyNode`."""
        return io.NodeOutput(as_image(model.decode(state, model.default_sampling.rounding)))


class SeeMap(io.ComfyNode):
    """Shows the local map of states."""

    @classmethod
    def define_schema(cls) -> Any:
        """See `io.ComfyNode`."""
        what = "What is where: three principal components of the local map as colours, side by side."
        return schema("SeeMap", "See map", what, [MODEL.Input("model"), STATE.Input("state")], io.Image.Output())

    @classmethod
    def execute(cls, model: ImageModel, state: State) -> Any:
        """See `io.ComfyNode`."""
        return io.NodeOutput(as_image(np.asarray(model.see(state))[None]))


class Edit(io.ComfyNode):
    """Draws parts of images anew."""

    @classmethod
    def define_schema(cls) -> Any:
        """See `io.ComfyNode`."""
        what = "Images that share with given ones what is kept: their map, what lies outside a mask, or both."
        inputs = [
            MODEL.Input("model"),
            io.Image.Input("image"),
            io.Combo.Input("keep", options=[*KEPT], tooltip="What is held of the image's semantics."),
            io.Float.Input("until", default=0.0, min=0.0, max=0.99, step=0.05, tooltip="Let go below this time."),
            io.Float.Input("strength", default=1.0, min=0.0, max=1.0, step=0.05, tooltip="1: drawn from noise."),
            *drawing(),
            io.Mask.Input("mask", optional=True, tooltip="Where the image is drawn anew. Black everywhere: none."),
            io.Image.Input("map_from", optional=True, tooltip="The image to take the map from."),
        ]
        return schema("Edit", "Edit", what, inputs, io.Image.Output())

    @classmethod
    def execute(
        cls,
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
    ) -> Any:
        """See `io.ComfyNode`."""
        pictures, given = as_pictures(image), named(classes)
        sampling = changed(model.sampling_for(given is not None), steps, guidance, sampler)
        update = progress(sampling, count * len(pictures))
        edits: list[Image.Image] = []
        for i, picture in enumerate(pictures):
            asked = {
                "keep": KEPT[keep],
                "until": until,
                "strength": strength if strength < 1 else None,
                "mask": None if mask is None else as_mask(mask[i % len(mask)], picture.size),
                "local_from": None if map_from is None else as_pictures(map_from)[i % len(map_from)],
            }
            controls = [Progress(update)]
            edits += model.edit(
                picture, count=count, seed=seed, classes=given, sampling=sampling, controls=controls, **asked
            )
        return io.NodeOutput(as_image(np.stack([np.asarray(edit) for edit in edits])))


def as_pictures(image: Tensor) -> list[Image.Image]:
    """An IMAGE as pictures."""
    pixels = (255 * image[..., :3].cpu()).round().clamp(0, 255).to(torch.uint8).numpy()
    return [Image.fromarray(one) for one in pixels]


def as_mask(mask: Tensor, size: tuple[int, int]) -> Image.Image | None:
    """One of a MASK, (H, W), as a picture of a size (width, height); None where it is black everywhere."""
    if not (mask > 0).any():
        return None  # ComfyUI has such a one for images without transparency.
    return Image.fromarray((255 * mask.cpu()).round().clamp(0, 255).to(torch.uint8).numpy()).resize(size)


def as_image(pixels: np.ndarray) -> Tensor:
    """Pixels uint8 (B, H, W, 3) as an IMAGE."""
    return torch.from_numpy(pixels.astype(np.float32) / 255)
