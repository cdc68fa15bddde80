"""The options of `reglue reencode`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from reglue.errors import require
from reglue.files import TakesPaths
from reglue.options import ready


@dataclass(frozen=True)
class Reencode(TakesPaths):
    """Encode a store's images into another latent space, to compare autoencoders at the price of one encoder.

    Class tokens, features and codes are those of the first store: linked if both are on one disk, copied otherwise. The
    images are read again. GPUs and machines share the work as in `reglue prepare`. The same command again continues,
    and restores what is missing.
    """

    store: Positional[Path]
    """Folder that `reglue prepare` made."""
    out: Positional[Path]
    """Folder of the second store: new, empty, or begun by the same command."""
    autoencoder: str
    """starter, a short name, a name on the hub (OWNER/REPOSITORY[/SUBFOLDER]), a folder in diffusers' layout, a
    checkpoint of Stable Diffusion, or NAME@FILE, as in `reglue prepare`."""
    dtype: Literal["float32", "float16"] = "float32"
    """Precision in which latents are stored."""
    batch_size: int = 16
    """Images encoded at once. Changes speed and memory; results change by rounding alone."""
    workers: int = 2
    """Processes that decode images, per process of torchrun; 0 decodes in the main process."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "batch_size", at_least=1)
        require(self, "workers", at_least=0)

    @property
    def written(self) -> str:
        """The last line: see `options`."""
        return ready(self.out, "train", "sit", "--store", self.out, "--out", "run")
