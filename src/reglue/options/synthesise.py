"""The options of `reglue synthesise`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from reglue.errors import UserError, option, require
from reglue.names import DatasetFormat
from reglue.sampling import Draw

CARD, SHEET = "README.md", "dataset.png"


@dataclass(frozen=True)
class Synthesise(Draw):
    """Draw images with masks and boxes: what a head sees in them, kept where the run's own local map agrees.

    The local map is drawn along with the image, so the head can look at either. Where it sees something else in the map
    than in the image, the image is dropped. The same command again draws what is missing.
    """

    out: Path
    """Folder of the data set (images, masks, what the format asks for, README.md, dataset.png to look at): new, or
    begun so before."""
    head: Path = field(kw_only=True)
    """What names the classes of pixels: a folder of `reglue head --masks … --layers all`."""
    format: DatasetFormat = "coco"
    """coco: annotations.json. yolo: labels/train and data.yaml. voc: Annotations and SegmentationClass of VOC2012.
    masks: palette images alone. All have the masks too."""
    agreement: float = 0.7
    """Keep images whose two maps agree so well: their mean intersection over union."""
    objects: tuple[str, ...] = ()
    """Classes that get boxes, one for each connected component, by number or name. Default: all but class 0."""
    count: int = 50
    """Images to draw; those whose maps agree are kept."""
    encoder: str | None = None
    """The run's vision encoder, if it has moved: as for `reglue prepare`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "agreement", at_least=0, at_most=1)
        if self.out.suffix.lower() == ".npz":
            raise UserError(f"{option('out')} {self.out}: a data set is a folder; name one")

    @property
    def written(self) -> str:
        """The last line: see `options`."""
        return f"the data set is in {self.out}; look at {self.out / SHEET}, and read {self.out / CARD}"
