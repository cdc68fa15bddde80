"""What all visitors of the studio share: its runs with their models, heads and prototypes, and one folder."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from reglue.app.work import Turns
from reglue.editing.painting import Prototypes, load_prototypes
from reglue.errors import UserError
from reglue.perception.heads import Head, load_head
from reglue.pipeline import ImageModel, load
from reglue.run import RunRecord, find_run
from reglue.training import checkpoints


@dataclass
class Run:
    """A run, and its model once somebody needs it."""

    name: str
    """As it was given: what a command line calls it."""
    folder: Path
    record: RunRecord
    device: str = "auto"
    title: str = ""
    """What the page calls it."""
    _model: ImageModel | None = None
    _loading: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, name: str, device: str = "auto") -> Run:
        """A run by its folder or name; it need not have a checkpoint yet. Raises UserError if it is none."""
        folder = find_run(name)
        return cls(name, folder, RunRecord.read(folder), device, title=name)

    @property
    def modalities(self) -> list[str]:
        """What it learns, by name; the latents come first."""
        return [modality.name for modality in self.record.denoiser.modalities]

    def model(self) -> ImageModel:
        """Its model at the newest checkpoint: loaded when first asked for, and again when there is a newer one.

        Raises UserError while there is no checkpoint.
        """
        with self._loading:
            newest = int(checkpoints.find(self.folder).name)
            if self._model is None or self._model.step != newest:
                self._model = load(self.name, step=newest, device=self.device)
            return self._model

    def warm(self) -> None:
        """Do once what takes time the first time: load, draw, encode. Whatever is missing is said when it is needed."""
        try:
            model = self.model()
            label = None if self.record.has_null_class else 0
            (image,) = model.generate(classes=label, count=1, steps=1, sampler="euler")
            model.encode(image)
        except UserError:
            pass


@dataclass
class Workshop:
    """Everything that the command line names."""

    runs: list[Run]
    folder: Path
    """For all that is written; whoever opened the studio removes it."""
    heads: dict[str, Head] = field(default_factory=dict[str, Head])
    """By the names of their folders or files."""
    prototypes: Prototypes | None = None
    prototypes_at: Path | None = None
    turns: Turns = field(default_factory=Turns)
    """One piece of long work has the machine at a time."""

    @classmethod
    def open(
        cls,
        names: Sequence[str],
        folder: Path,
        heads: Sequence[Path] = (),
        prototypes: Path | None = None,
        device: str = "auto",
    ) -> Workshop:
        """Read what is named. Raises UserError for whatever is not there or is something else."""
        runs = [Run.open(name, device) for name in dict.fromkeys(names)]
        short = [Path(run.name).name for run in runs]
        for run, title in zip(runs, short, strict=True):
            # Two folders of one name are told apart by their paths.
            run.title = title if short.count(title) == 1 and Path(run.name).exists() else run.name
        loaded = {path.stem: load_head(path) for path in heads}
        found = load_prototypes(prototypes) if prototypes else None
        return cls(runs, folder, loaded, found, prototypes)

    def run(self, title: str) -> Run:
        """The run that the page calls so. Raises UserError if there is none."""
        for run in self.runs:
            if run.title == title:
                return run
        raise UserError(f"run {title}: choose {', '.join(run.title for run in self.runs)}")
