"""The options of `reglue evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from reglue.errors import require
from reglue.files import TakesPaths
from reglue.names import INCEPTION, FeatureKind, Weights


@dataclass(frozen=True)
class Evaluate(TakesPaths):
    """Compare images with a reference: FID, sFID, Inception Score, precision, recall, KID, density and coverage.

    The figures are those of ADM's evaluator, with 95 % intervals. Images go into the Inception network at the size that
    they have, and are stretched there to 299×299. Within a side, those of another size than the first are scaled to
    cover it and cropped, as `reglue prepare` does. Figures can be compared only where network, reference, sizes and
    numbers of images are the same; published ones are of 50,000 images.
    """

    images: Positional[Path]
    """A folder of images, an .npz or .npy file (uint8 (N, H, W, 3); as arr_0 or images), a store, or a run. A run first
    draws them as its recipe says, into its folder `evaluated`; the same command again continues."""
    reference: Path | None = None
    """What to compare with: any of the same, ADM's reference batches included; of a run, its training store. Default:
    the training store of the run in IMAGES."""
    out: Path | None = None
    """JSON file for the report. A report on a run's images also goes into the run's folder `reports`, for its model
    card; one on other images is only printed by default."""
    protocol: str | None = None
    """How the images were made, if no samples.json beside them says so: a sentence, or a .json file with an object. The
    report quotes it as yours."""
    count: int | None = None
    """Images to draw from a run. Default: 50000."""
    weights: Weights = "ema"
    """Of a run: its averaged weights (ema) or the trained ones (model)."""
    feature_network: str = INCEPTION
    """inception, or store for the encoder of the reference's store, or any vision encoder, or a file of weights.

    inception gives FID, and its weights are downloaded. dinov2-l gives FD-DINOv2 (by name, not from a file). Other
    encoders are named as in `reglue prepare`: starter, a short name, timm:NAME, NAME@FILE, a folder or a file.
    """
    features: FeatureKind = "class-token"
    """Features of an image in a vision encoder: its class token, or the mean over the patches of the last layer."""
    resolution: int | tuple[int, int] | None = None
    """Side, or height and width, to which all images are scaled and cropped first. Default: unchanged for Inception and
    FD-DINOv2; for other encoders the store's, or that of the first image."""
    resamples: int = 1000
    """Random resamples of the images, for the intervals; 0 computes none."""
    kernel_subsets: int = 100
    """Random subsets over which KID is averaged."""
    kernel_subset_size: int = 1000
    """Images per subset; all, if there are fewer."""
    seed: int = 0
    """Seed of subsets and resamples."""
    batch_size: int = 64
    """Images processed at once: affects speed and memory, and results by rounding alone."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""

    track: tuple[str, ...] = ()
    """Trackers that get the figures too, at the step of the run that the images were drawn from: tensorboard, wandb,
    trackio, or your own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "count", "resolution", "kernel_subsets", "batch_size", at_least=1)
        require(self, "kernel_subset_size", at_least=2)
        require(self, "resamples", "seed", at_least=0)

    @property
    def written(self) -> str:
        """The last line: see `options`."""
        return f"the report is in {self.out}" if self.out else ""
