"""The options of `reglue import`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from reglue.errors import require
from reglue.files import TakesPaths
from reglue.options import ready


@dataclass(frozen=True)
class ImportRun(TakesPaths):
    """Turn a checkpoint of SiT, DiT, REPA, ReDi, REG, REGLUE, LightningDiT, SFD or U-ViT into a run. Nothing in it is
    executed.

    The method is recognised by the weights. The run can be sampled, evaluated, shared and exported, but its training
    cannot be continued. A file of `reglue export` needs no options.
    """

    file: Positional[Path]
    """A .safetensors, .pt, .pth, .ckpt or .bin file: weights alone, or in a container ({model, ema, …}, Lightning's),
    of which the averaged ones are used where there are any."""
    out: Path
    """Folder of the run: new or empty."""
    compressor: Path | None = None
    """The compressor of the model's local maps: REGLUE's .pth, ReDi's PCA file, or a compressor's folder in a store or
    run. Sampling does not need it."""
    statistics: Path | None = None
    """With --compressor: mean and standard deviation of the features, which REGLUE keeps in a file of their own: .npz,
    or a dict in .npy, .pt or .pkl."""
    autoencoder: str | None = None
    """The autoencoder whose latents the model learned: a name, or a folder in diffusers' layout (ReaLS's too). Default:
    the published sd-vae-ft-mse, decoded by sd-vae-ft-ema, neither of which is needed yet. Checkpoints do not record it,
    so give it if the model has other channels than published."""
    encoder: str | None = None
    """The vision encoder that the model was trained with, for the record. Sampling does not need it."""
    class_names: Path | None = None
    """Text file with the names of the classes, one per line, in the order of the labels. Default: their numbers."""
    family: Literal["sit", "dit", "repa", "redi", "reg", "reglue", "lightningdit", "sfd", "uvit"] | None = None
    """Whose model it is, where shapes leave a choice: DiT's are SiT's. Default: what the options in the file and then
    its name say; else SiT."""
    heads: int | None = None
    """Attention heads, for models of a width that was not published."""
    resolution: int | tuple[int, int] | None = None
    """Side of the images in pixels, or height and width: for learned position embeddings that are not square."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "heads", "resolution", at_least=1)

    @property
    def written(self) -> str:
        """The last line: see `options`."""
        return ready(self.out, "sample", self.out, "--out", "samples")
