"""The options of `reglue export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from tyro.conf import Positional

from reglue.errors import UserError, require
from reglue.files import TakesPaths
from reglue.names import GraphPrecision, StoredPrecision, Weights

Target = Literal["published", "reglue", "onnx", "torch", "diffusers", "comfyui"]
BELONGS: dict[str, tuple[Target, ...]] = {
    "batch": ("onnx", "torch"),
    "encoder": ("onnx", "torch"),
    "weights": ("published",),
}
"""Options that some targets alone have a use for."""
PRECISIONS: dict[Target, tuple[str, ...]] = {"reglue": get_args(StoredPrecision), "onnx": get_args(GraphPrecision)}
"""The targets that know precisions, and which."""


@dataclass(frozen=True)
class ExportRun(TakesPaths):
    """Write a run for others: a small folder to share, its weights for the published code of its method, its networks
    as graphs, a pipeline of diffusers or nodes of ComfyUI."""

    run: Positional[Path]
    """Folder of the run, or OWNER/NAME of one on the Hugging Face hub."""
    out: Path
    """With --to a folder; `reglue sample` takes that of onnx. Else a file: .safetensors holds the weights, .pt or .pth
    {ema, model, args, steps}, as the published code reads it. Published samplers take the path as an option. For
    `reglue import` the run's record goes with them, in the metadata or the args: it names the classes, and the
    autoencoder with its folder."""
    to: Target = "published"
    """published: the weights, under the names and in the time convention of SiT's, REPA's, ReDi's, REG's or REGLUE's
    code. reglue: the run without what training needs, with its autoencoder and a model card. onnx: the denoiser, the
    decoder and what encodes images as graphs, for ONNX Runtime, also in a browser. torch: the same as programs of
    torch.export. diffusers: a folder for `DiffusionPipeline.from_pretrained`. comfyui: a folder for `custom_nodes`."""
    precision: GraphPrecision | StoredPrecision = "float32"
    """Of the weights. float16: half the size. A quarter of it: int8, for matrix products of graphs, or float8, for
    --to reglue, which computes as before."""
    batch: int | None = None
    """Number of images that graphs take at a time, for runtimes that want it fixed. Default: any."""
    encoder: str | None = None
    """Where the run's vision encoder is now, for the graph that encodes images."""
    step: int | None = None
    """Checkpoint to export; the last one if not given."""
    weights: Weights = "ema"
    """What a .safetensors file holds: the averaged weights (ema) or the trained ones (model)."""

    written = ""  # The command itself says what is in the file.

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "step", at_least=0)
        require(self, "batch", at_least=1)
        known = {"precision": tuple(to for to, precisions in PRECISIONS.items() if self.precision in precisions)}
        for name, targets in (BELONGS | known).items():
            if self.to not in targets and getattr(self, name) != getattr(type(self), name):
                where = "published .safetensors files" if name == "weights" else f"--to {' or '.join(targets)}"
                raise UserError(f"--{name} {getattr(self, name)} is for {where}; leave it out")
        if self.to != "published":
            if self.out.suffix:
                raise UserError(
                    f"--out {self.out}: --to {self.to} makes a folder; choose a name without {self.out.suffix}"
                )
        elif self.weights != "ema" and self.out.suffix != ".safetensors":
            raise UserError(f"--weights {self.weights} is for .safetensors files, since others hold both; leave it out")
