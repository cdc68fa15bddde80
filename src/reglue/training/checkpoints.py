"""Checkpoints: folders of safetensors, whole or not there, from which training continues with the same bits."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from reglue.errors import UserError, option
from reglue.files import BESIDE, opened_tensors, read_json, read_tensors, save_tensors, seal, to_json
from reglue.names import Weights
from reglue.training import distributed
from reglue.training.parallel import local_rows, on_cpu, own_rows

Tensors = Mapping[str, Tensor]
Files = dict[str, dict[str, Tensor]]

FOLDER = "checkpoints"
MOST_STEPS = 10**8 - 1
"""Checkpoints are folders of eight digits."""
VISIBLE_WITHIN = 120.0
"""Seconds: network file systems keep listings for a minute by default."""
GRAPH, PROGRAM = "denoiser.onnx", "denoiser.pt2"
"""In place of weights, in a run that was exported for others: what this package computes with too, and what it does not
open."""
MODEL, EMA, OPTIMISER, PROGRESS = "model.safetensors", "ema.safetensors", "optimiser.safetensors", "progress.json"
REMEDY = "delete its folder to go on from the one before"


@dataclass(frozen=True)
class Progress:
    """`progress.json`, the last file of a checkpoint that is written."""

    step: int


class Writer:
    """Writes the checkpoints of a run while its training goes on, one at a time.

    The files are the same however the model is spread: with shards, every process writes its own rows, and the first
    one puts the files together, so all of them must see the same folder.
    """

    def __init__(self, run: Path, keep: int, sharded: bool) -> None:
        """`keep` checkpoints stay; 0 keeps all. All processes must make one, and call each of its methods."""
        self.run, self.keep = run, keep
        # Messages about checkpoints must not mix with those of the training.
        self.group = distributed.private_group() if sharded else None
        self.takes_part = sharded or distributed.is_first()
        self.copies: Files = {}
        # A new thread begins on the first GPU, and would take memory of it that is another process's.
        own = partial(torch.cuda.set_device, torch.cuda.current_device()) if torch.cuda.is_initialized() else None
        self.thread = ThreadPoolExecutor(1, "checkpoints", initializer=own)
        self.pending: Future[None] | None = None

    def save(self, step: int, model: nn.Module, ema: Tensors, optimiser: torch.optim.Optimizer) -> None:
        """Begin to write a checkpoint, from a copy. Waits for the one before. Raises as `check`."""
        self.wait()
        if self.takes_part:
            self._copy(_training_state(model, ema, optimiser))
            self.pending = self.thread.submit(self._write, step)

    def check(self) -> None:
        """Raise UserError if a checkpoint could not be written, a full disk for example. Does not wait."""
        if self.pending and self.pending.done():
            self.pending.result()

    def wait(self) -> None:
        """Return once everything is written. Raises as `check`."""
        if self.pending:
            self.pending.result()

    def close(self) -> None:
        """Return once nothing is being written any more, whether that went well or not."""
        self.thread.shutdown()

    def _copy(self, files: Files) -> None:
        """Copy tensors to the CPU, into the same memory each time: new pages cost as much as the copy itself."""
        for name, tensors in files.items():
            copies = self.copies.setdefault(name, {})
            for key, value in tensors.items():
                if key not in copies:
                    copies[key] = on_cpu(value)
                local_rows(copies[key]).copy_(local_rows(value))

    def _write(self, step: int) -> None:
        if self.group is None:
            _write(self.run, step, self.copies)
            forget_all_but(self.run, self.keep)
        else:
            _write_shards(self.run, step, self.copies, self.group)
            if dist.get_rank() == 0:
                forget_all_but(self.run, self.keep)


def save_start(run: Path, model: nn.Module) -> Path:
    """Write the checkpoint of step 0 of a run whose weights are not random. Raises UserError as `save`."""
    weights = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    return _write(run, 0, {MODEL: weights, EMA: weights, OPTIMISER: {}})


def save_weights(run: Path, step: int, ema: dict[str, Tensor]) -> Path:
    """Write a checkpoint of averaged weights alone: to sample from, not to continue. Raises UserError as `save`."""
    return _write(run, step, {EMA: {name: value.detach().cpu().contiguous() for name, value in ema.items()}})


def _write(run: Path, step: int, files: Files) -> Path:
    folder = run / FOLDER / f"{step:08d}"
    with _beside(folder) as beside:
        beside.mkdir(parents=True)
        for name, tensors in files.items():
            save_tensors(beside / name, tensors)
        _finish(folder, beside, step)
    return folder


def _write_shards(run: Path, step: int, files: Files, group: dist.ProcessGroup) -> None:
    """As `_write`, by all processes of a group: each its own rows, in a folder of parts that become one file."""
    # Two seconds to import, which only sharded runs have to spend.
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

    folder = run / FOLDER / f"{step:08d}"
    with _beside(folder) as beside:
        _first_does(group, lambda: beside.mkdir(parents=True))
        for name, tensors in files.items():
            parts = beside / f"{name}.parts"
            # Torch loses the value of a tensor without dimensions when it puts parts together.
            tensors = {key: value if value.dim() else value.reshape(1) for key, value in tensors.items()}
            writer = HuggingFaceStorageWriter(str(parts), save_distributed=True, enable_consolidation=True)
            try:
                save_distributed(tensors, storage_writer=writer, process_group=group)
            except CheckpointException as error:
                raise OSError(str(next(cause for cause, _ in error.failures.values()))) from error

            def take_out(parts: Path = parts, name: str = name) -> None:
                (complete,) = parts.glob("*.safetensors")
                complete.rename(beside / name)
                shutil.rmtree(parts)
                seal(beside / name)

            _first_does(group, take_out)
        _first_does(group, lambda: _finish(folder, beside, step))


def _first_does(group: dist.ProcessGroup, action: Callable[[], None]) -> None:
    """The first process acts while the others wait. All raise an OSError if it fails."""
    failure: list[str | None] = [None]
    if dist.get_rank(group) == 0:
        try:
            action()
        except OSError as error:
            failure = [str(error)]
    dist.broadcast_object_list(failure, group=group, group_src=0)
    if failure[0] is not None:
        raise OSError(failure[0])


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """Where to write what will become `folder`. Raises UserError, and leaves nothing there, if writing fails."""
    beside = folder.with_name(folder.name + BESIDE)
    try:
        shutil.rmtree(beside, ignore_errors=True)
        yield beside
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(f"cannot write checkpoint {folder}: {error}; the previous checkpoint is untouched") from None


def _finish(folder: Path, beside: Path, step: int) -> None:
    (beside / PROGRESS).write_text(to_json(Progress(step)))
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def steps(run: Path) -> list[int]:
    """The steps that a run has checkpoints of, ascending. Half-written ones do not count."""
    return sorted(int(folder.name) for folder in (run / FOLDER).glob("[0-9]" * 8) if (folder / PROGRESS).is_file())


def told(run: Path) -> str:
    """Which checkpoint the same command would continue from."""
    return f"last checkpoint at {done[-1]:,}" if (done := steps(run)) else "no checkpoint yet"


def refuse_fewer_steps(run: Path, asked: int) -> None:
    """Raise UserError if a run has been trained for more steps than are asked for."""
    done = max(steps(run), default=0)
    if done > asked:
        raise UserError(
            f"{run} has {done} steps already, more than {option('optimisation.steps')} {asked}; choose {done} or more"
        )


def forget_all_but(run: Path, keep: int) -> None:
    """Delete the oldest checkpoints; `keep` 0 keeps all."""
    for step in steps(run)[:-keep] if keep else []:
        shutil.rmtree(run / FOLDER / f"{step:08d}", ignore_errors=True)


def find(run: Path, step: int | None = None) -> Path:
    """The folder of a checkpoint, the last one if no step is given. Raises UserError, listing what is there."""
    available = steps(run)
    if not available:
        raise UserError(f"{run} has no checkpoint yet; train it with `reglue train`")
    step = available[-1] if step is None else step
    if step not in available:
        raise UserError(f"{run} has no checkpoint of step {step}; it has {', '.join(map(str, available))}")
    return run / FOLDER / f"{step:08d}"


def last_of_all(run: Path) -> Path | None:
    """The folder of the last checkpoint that the first process sees, in every process; None if there is none.

    A network file system may show it to the others later, so they look again for as long as VISIBLE_WITHIN. All must
    ask. Raises UserError that names the folder if it does not appear.
    """
    step = distributed.broadcast_object(max(steps(run), default=None))
    if step is None:
        return None
    folder, deadline = run / FOLDER / f"{step:08d}", time.monotonic() + VISIBLE_WITHIN
    while step not in steps(run):
        if time.monotonic() > deadline:
            raise UserError(
                f"{folder} is not visible to every process, {VISIBLE_WITHIN:.0f} seconds after the first one saw it; "
                "put the run into a folder that all machines share"
            )
        time.sleep(0.2)
    return folder


def weights_file(checkpoint: Path, weights: Weights, asked_by: str) -> Path:
    """The file of a checkpoint's weights, for `read_weights`, or its graph, in a run that was exported as one.

    Raises UserError, naming the option that it is `asked_by`, if the checkpoint has the other ones alone, and for a run
    that was exported for PyTorch alone.
    """
    if (program := checkpoint / PROGRAM).is_file():
        raise UserError(f"{program} is for PyTorch without this package; give the run that it was made of")
    if (graph := checkpoint / GRAPH).is_file() and weights == "ema":
        return graph
    names: dict[Weights, str] = {"ema": EMA, "model": MODEL}
    (other,) = names.keys() - {weights}
    if not (checkpoint / names[weights]).is_file() and (checkpoint / names[other]).is_file():
        raise UserError(f"{checkpoint} has no {names[weights]}; choose {asked_by} {other}")
    return checkpoint / names[weights]


def weights_sha256(run: Path, step: int | None = None, weights: Weights = "ema") -> str:
    """SHA-256 of the file of weights that `read_weights` reads, of the last checkpoint if no step is given."""
    with weights_file(find(run, step), weights, option("weights")).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file. Raises UserError if it is missing or damaged, and for a graph."""
    if file.name == GRAPH:
        raise UserError(f"{file} is a graph, not weights; give the run that it was made of")
    return read_tensors(file, REMEDY, sealed=True)


def read_step(folder: Path) -> int:
    """The step of a checkpoint, as its `progress.json` and its folder's name say.

    Raises UserError if the file is missing or damaged, or says another one.
    """
    step = read_json(folder / PROGRESS, Progress, REMEDY).step
    if step != int(folder.name):
        raise UserError(f"{folder / PROGRESS} is damaged (it says step {step}); {REMEDY}")
    return step


def restore(folder: Path, model: nn.Module, ema: Tensors, optimiser: torch.optim.Optimizer) -> int:
    """Load a checkpoint into a model, its moving average and its optimiser, in place. Returns the step.

    However the model was spread when it was written, and is now: with shards, a process reads its own rows alone.
    Raises UserError if a file is missing, damaged or of another model.
    """
    step = read_step(folder)
    _fill(model.state_dict(), folder / MODEL)
    if ema:
        _fill(ema, folder / EMA)
    with opened_tensors(folder / OPTIMISER, REMEDY, sealed=False) as stored:
        trained = [(name, p) for name, p in model.named_parameters() if f"{name}.step" in stored.keys()]  # noqa: SIM118
    if step and not trained:
        raise UserError(f"{folder / OPTIMISER} is damaged (it has no tensors of this model); {REMEDY}")
    for _, parameter in trained:
        # load_state_dict would do as well, but it counts parameters where these names are safe against reordering.
        optimiser.state[parameter] = {
            "step": torch.zeros((), device=parameter.device if optimiser.defaults["fused"] else None),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    _fill(_optimiser_tensors(model, optimiser), folder / OPTIMISER)
    return step


@torch.no_grad()
def _fill(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Copy what a file holds into tensors of the same names. Raises UserError if they do not fit."""
    # One process checks for all: with shards, the others read a part of the file alone.
    with opened_tensors(file, REMEDY, sealed=distributed.is_first()) as stored:
        for name in sorted(tensors.keys() ^ set(stored.keys())):
            raise UserError(f"{file} does not fit this model: {name} is only in one of them")
        for name, tensor in tensors.items():
            part = stored.get_slice(name)
            if tensor.dim() and tuple(part.get_shape()) != tuple(tensor.shape):
                raise UserError(f"{file} does not fit this model: {name} is {part.get_shape()}")
            if tensor.dim():
                local_rows(tensor).copy_(part[own_rows(tensor)])
            else:
                # Sharded runs write tensors without dimensions as rows of one.
                tensor.copy_(stored.get_tensor(name).reshape(()))


def _training_state(model: nn.Module, ema: Tensors, optimiser: torch.optim.Optimizer) -> Files:
    average = {EMA: dict(ema)} if ema else {}
    return {MODEL: model.state_dict(), **average, OPTIMISER: _optimiser_tensors(model, optimiser)}


def _optimiser_tensors(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimiser.state.get(parameter, {}).items()
    }
