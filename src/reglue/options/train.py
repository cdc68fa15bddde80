"""The options of `reglue train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from reglue.config import Recipe
from reglue.errors import UserError, require
from reglue.files import TakesPaths
from reglue.names import Weights
from reglue.options import ready


@dataclass(frozen=True)
class Train(TakesPaths):
    """Train a recipe on a store, or resume a run. The same command again resumes with the same bits."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    store: Path
    """Folder that `reglue prepare` made."""
    out: Path
    """Folder of the run: new, or one to resume."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and all noise."""
    start: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Start from another run's weights (fine-tuning): its folder, OWNER/NAME on the Hugging Face hub, or
    starter or flowers of this package. Resolution, classes and parts may differ; shared parts must have equal sizes.
    Without the name of a recipe, that of the run is taken. Not needed to resume."""
    start_step: Annotated[int | None, tyro.conf.arg(name="from-step")] = None
    """Checkpoint of that run. Default: the last."""
    start_weights: Annotated[Weights, tyro.conf.arg(name="from-weights")] = "ema"
    """Its averaged weights (ema) or the trained ones (model)."""
    log_every: int = 100
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 10_000
    """Steps between checkpoints."""
    keep: int = 3
    """Number of checkpoints to keep; 0 keeps all."""
    preview_every: int = 10_000
    """Steps between previews, drawn from the averaged weights; 0 draws none."""
    preview_count: int = 16
    """Images per preview."""
    preview_steps: int = 50
    """Sampling steps of a preview."""
    workers: int | None = None
    """Threads that read samples ahead. Default: 4 on a GPU, none on a CPU."""
    device: str = "auto"
    """auto, cpu or cuda."""
    deterministic: bool = True
    """The same bits from the same command on a GPU too, resumed or not, on the same kind of GPU with the same versions.
    Without it, attention's backward pass is slightly faster."""
    track: tuple[str, ...] = ()
    """Where figures, pictures and the recipe go too, beside metrics.jsonl: tensorboard, wandb, trackio, or registered
    trackers of your own. They write to this machine alone unless your own settings for them say otherwise."""
    shards: int = 1
    """Under torchrun: number of processes that share one copy of the model, for models larger than one device. 1 keeps
    a whole copy in each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "log_every", "checkpoint_every", "preview_count", "preview_steps", "shards", at_least=1)
        require(self, "seed", "keep", "preview_every", "workers", at_least=0)
        if self.start is None and (self.start_step is not None or self.start_weights != "ema"):
            raise UserError("--from-step and --from-weights say what to take of another run; give --from too")
        if self.start_step is not None and self.start_step < 0:
            raise UserError(f"--from-step {self.start_step}: choose at least 0")

    @property
    def written(self) -> str:
        """The last line: see `options`."""
        return ready(self.out, "sample", self.out, "--out", "samples")
