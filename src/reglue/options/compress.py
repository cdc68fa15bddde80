"""The options of `reglue compress`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from reglue.errors import UserError, require
from reglue.files import TakesPaths
from reglue.names import CompressedColumn, CompressorKind, codes_column
from reglue.options import ready

if TYPE_CHECKING:
    from reglue.encoders.compressors import Compressor


@dataclass(frozen=True)
class Compress(TakesPaths):
    """Fit a compressor to a store's features, and add its codes to the store as column local.NAME.

    With --column cls it compresses the class tokens, into column cls.NAME. The same command again continues where an
    interrupted one stopped.
    """

    store: Positional[Path]
    """A store prepared with --features."""
    kind: CompressorKind = "conv"
    """conv: REGLUE's convolutional autoencoder. pca: ReDi's principal components. mlp: an autoencoder with one hidden
    layer, applied at every position."""
    column: CompressedColumn = "features"
    """features: the map of patch features. cls: the class token, by pca or mlp; a recipe learns its codes in place of
    the token with --class-token.compressor NAME."""
    layers: Literal["last"] | tuple[int, ...] | None = None
    """last, or blocks of the encoder, counted from 0 and adjacent in the store: only their features are compressed.
    Default: all that the store has. ReDi uses the last one."""
    channels: int = 16
    """Channels of the codes. With --fitted and ReDi's file: how many of its components to use, the first ones."""
    hidden: int = 256
    """conv, mlp: hidden channels."""
    kl_weight: float = 0.0
    """conv, mlp: above 0, the compressor is variational: weight of the KL divergence from the standard normal, summed
    over an image's code, beside the mean squared error. Codes are sampled in training and are the means afterwards.
    REGLUE tried 1e-6, and found it worse than none."""
    epochs: int = 25
    """conv, mlp: passes over the training images at most. The compressor after the last one is kept."""
    patience: int = 5
    """conv, mlp: stop once the error of held-out images has not fallen for so many epochs (and a hundred steps), and
    keep the compressor of the best one. 0: all epochs."""
    cosine_epochs: int = 100
    """conv, mlp: epochs after which the cosine decay of the learning rate would end."""
    batch_size: int | None = None
    """conv, mlp: images per step. Default: 4096 as published, but at most a 64th of the images, and at least 16."""
    micro_batch: int = 256
    """conv, mlp: images on the device at once, which share batch statistics."""
    learning_rate: float = 1e-3
    """conv, mlp: initial learning rate of Adam."""
    final_learning_rate: float = 1e-4
    """conv, mlp: learning rate at the end of the cosine."""
    validation: float = 0.05
    """Share of the images held out to evaluate the compressor."""
    seed: int = 0
    """Seed of the weights, the order of the images and the held-out share."""
    fitted: Path | None = None
    """Apply a fitted compressor in place of fitting one: a folder (RUN/compressors/NAME or STORE/compressors/NAME),
    REGLUE's published .pth or ReDi's PCA file. For images at another resolution to fine-tune on, for other images to
    compare with, or for the published codes. The store must hold the features that it was fitted to, of the same
    encoder and layers; published files do not record their layers, so name them with --layers."""
    statistics: Path | None = None
    """With --fitted: mean and standard deviation of the features, which REGLUE keeps in a file of their own: .npz, or a
    dict in .npy, .pt or .pkl."""
    name: str | None = None
    """Name of the compressor in the store. Default: KIND-CHANNELS, such as conv-16, followed by -last or -layers-10-11
    if it reads these alone, and by -kl if it is variational."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "channels", "hidden", "epochs", "cosine_epochs", "batch_size", "micro_batch", at_least=1)
        require(self, "seed", "kl_weight", "patience", at_least=0)
        require(self, "learning_rate", "final_learning_rate", more_than=0)
        require(self, "validation", more_than=0, less_than=1)
        if self.kind == "pca" and self.kl_weight:
            raise UserError("--kl-weight is for --kind conv or mlp; principal components have no distribution of codes")
        if self.kind == "conv" and self.column == "cls":
            raise UserError("--kind conv needs a map, and --column cls has none; choose --kind pca or mlp")
        if self.layers is not None and self.column == "cls":
            raise UserError("--layers is for --column features; a class token is of the last layer")
        if self.statistics and not self.fitted:
            raise UserError("--statistics are those of a published compressor: give it too, with --fitted")
        if self.name is not None and not self.name.replace("-", "").replace("_", "").isalnum():
            raise UserError(f"--name {self.name}: use letters, digits, - and _ alone")

    @property
    def compressor_name(self) -> str:
        """The name under which recipes know this compressor."""
        if self.name:
            return self.name
        numbers = "".join(f"-{layer}" for layer in self.layers or ())
        layers = "" if self.layers is None else "-last" if self.layers == "last" else f"-layers{numbers}"
        return f"{self.kind}-{self.channels}{layers}" + ("-kl" if self.kl_weight else "")

    @property
    def codes(self) -> str:
        """The column of the store for the codes."""
        return codes_column(self.compressor_name, self.column)

    def decisive(self, fitted: Compressor | None) -> dict[str, Any]:
        """The options that decide the result, of which a fitted compressor is one."""
        without = {"store", "name", "device", "fitted", "statistics"}
        if fitted:
            asked = {} if self.layers is None else {"layers": self.layers}
            return {"fitted": fitted.weights_sha256(), **asked}
        if self.kind == "pca":
            without |= {"hidden", "epochs", "cosine_epochs", "patience", "batch_size", "micro_batch"}
            without |= {"learning_rate", "final_learning_rate"}
        return {option: value for option, value in asdict(self).items() if option not in without}

    @property
    def written(self) -> str:
        """The last line: see `options`."""
        name = self.compressor_name
        what = ("--local.compressor" if self.column == "features" else "--class-token.compressor", name)
        recipe = "redi" if self.kind == "pca" and self.column == "features" else "reglue"
        line = ready(self.store, "train", recipe, "--store", self.store, "--out", "run", *what)
        return f"{line} (on a laptop with --model tiny, see docs/evening.md)"
