"""Starting a run with the weights of another one: which tensors are taken, which are new, and what does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from reglue.config import Recipe
from reglue.diffusion.conditions import CLASS
from reglue.diffusion.denoiser import Denoiser
from reglue.encoders.autoencoders import AutoencoderSpec
from reglue.errors import UserError, option
from reglue.files import file_sha256
from reglue.names import Weights
from reglue.run import FILE, RunRecord, Start, find_run, known_as
from reglue.training import checkpoints, distributed

LABELS = f"conditions.{CLASS}.weight"
"""(classes + 1, width), the last row for the null label: the one tensor that may have another size."""
OPTIONAL_GROUPS = ("time_offsets", "tokens", "token_velocities", "conditions", "projector")
"""Parts of a denoiser that some recipes have and others have not begin so."""
NAMED = 4
"""How many tensors a refusal names."""


@dataclass(frozen=True)
class Beginning:
    """How a run starts from another one, or once did."""

    start: Start
    position_grid: tuple[int, int] | None
    """In which its positions are counted, unless its recipe says otherwise."""
    source: RunRecord | None
    """The other run; None if this one has its weights already, and in all processes but the first."""
    weights: Mapping[str, Tensor]
    """Of the other run; empty likewise."""

    def recipe(self, asked: Recipe) -> Recipe:
        """The recipe, with positions counted as in the run that it starts from."""
        return asked if asked.position_grid else replace(asked, position_grid=self.position_grid)

    def record(self, record: RunRecord) -> RunRecord:
        """The record of the run, with its start. Raises UserError, with names and sizes, if the weights do not fit."""
        if self.source:
            with torch.device("meta"):
                refuse_unfitting(self.start.run, self.weights, Denoiser(record.denoiser).state_dict())
        return replace(record, start=self.start)

    def take_weights(self, model: Denoiser, record: RunRecord) -> None:
        """Copy what there is into a freshly initialised model, and print what came of it."""
        assert self.source
        state = model.state_dict()  # Its tensors are the model's own.
        for name in state.keys() & self.weights.keys() - {LABELS}:
            state[name].copy_(self.weights[name])
        rows = rows_of_labels(names_of(self.source), names_of(record))
        for row, row_there in rows.items():
            state[LABELS][row].copy_(self.weights[LABELS][row_there])
        print("\n  ".join(self._report(record, parts(state), classes_taken=len(rows) - 1)))

    def _report(self, record: RunRecord, here: set[str], classes_taken: int) -> Iterable[str]:
        assert self.source
        there = parts(self.weights)
        yield f"{self.start.weights} weights of {self.start.run} at step {self.start.step}"
        yield f"taken: {', '.join(sorted(here & there))}"
        if here - there:
            yield f"new, with random weights: {', '.join(sorted(here - there))}"
        if there - here:
            yield f"left out: {', '.join(sorted(there - here))}"
        if record.class_names != self.source.class_names:
            yield f"classes: {classes_taken} of {len(record.class_names)} are known, and the null label"
        if self.position_grid != record.denoiser.token_grid:
            grid = record.denoiser.position_grid or record.denoiser.token_grid
            yield "positions: of {}×{} tokens, counted in {}×{}".format(*record.denoiser.token_grid, *grid)
        changed = changed_meanings(self.source, record)
        if changed:
            yield f"another than there, to be learned again: {', '.join(changed)}"


def begin(out: Path, run: Path | None, step: int | None, weights: Weights) -> Beginning | None:
    """How the run in `out` starts from another: from `run`, or as it once did. None for random weights.

    `run` is as for `find_run`, `step` None its last checkpoint. The first process looks, and it alone reads
    weights, which the others never need; all must ask. Raises UserError, in the first process, if there is no such
    checkpoint, and if a run that is there already started from something else.
    """
    own = _begin(out, run, step, weights) if distributed.is_first() else None
    said = distributed.broadcast_object(own and replace(own, source=None, weights={}))
    return own or said


def _begin(out: Path, run: Path | None, step: int | None, weights: Weights) -> Beginning | None:
    if not (out / FILE).is_file():
        return None if run is None else _opened(run, step, weights)
    before = RunRecord.read(out)
    started, start_from = before.start, option("start", "from")
    if run and (started is None or Path(started.run).resolve() != run.resolve()):
        what = f"from {started.run}" if started else "with random weights"
        raise UserError(
            f"{out} is a run that started {what}, not from {run}; leave {start_from} out, or choose another folder"
        )
    if run and started and (step or started.step, weights) != (started.step, started.weights):
        what = f"with the {started.weights} weights of step {started.step}"
        raise UserError(
            f"{out} is a run that started {what} of {run}; leave {start_from} out, or choose another folder"
        )
    if started is None:
        return None
    if checkpoints.steps(out):
        return Beginning(started, before.recipe.position_grid, None, {})
    again = _opened(Path(started.run), started.step, started.weights)  # It died before it had taken the weights.
    if again.start.sha256 != started.sha256:
        raise UserError(
            f"{out} started from a checkpoint of {started.run} that has changed since; choose another folder"
        )
    return again


def _opened(run: Path, step: int | None, weights: Weights) -> Beginning:
    folder = find_run(run)
    source = RunRecord.read(folder)
    checkpoint = checkpoints.find(folder, step)
    file = checkpoints.weights_file(checkpoint, weights, option("start_weights", "from-weights"))
    tensors = checkpoints.read_weights(file)
    return Beginning(
        Start(known_as(run), int(checkpoint.name), weights, file_sha256(file)),
        source.denoiser.position_grid or source.denoiser.token_grid,
        source,
        tensors,
    )


def refuse_unfitting(run: str, there: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> None:
    """Raise UserError, with names and sizes, unless the tensors of both are equal in size.

    One side may lack an optional part, and labels may differ in number.
    """
    lacking = {part for part in parts(there) ^ parts(here) if part.startswith(OPTIONAL_GROUPS)}

    def size(tensors: Mapping[str, Tensor], name: str) -> str:
        if name not in tensors:
            return "missing"
        shape = tensors[name].shape[1:] if name == LABELS else tensors[name].shape
        return "×".join(map(str, shape))

    unfitting = [
        f"{name} is {size(there, name)} there and {size(here, name)} here"
        for name in sorted(there.keys() | here.keys())
        if part_of(name) not in lacking and size(there, name) != size(here, name)
    ]
    if unfitting:
        more = f" and {len(unfitting) - NAMED} more" if len(unfitting) > NAMED else ""
        raise UserError(
            f"{option('start', 'from')} {run} does not fit: {', '.join(unfitting[:NAMED])}{more}; choose the "
            f"{option('model')} of that run, and a store and parts of its widths and channels"
        )


def names_of(record: RunRecord) -> tuple[str, ...] | int:
    """The names of a run's classes or, where they are the numbers of a published model that was imported, how many."""
    names = record.class_names
    return len(names) if record.origin and names == tuple(map(str, range(len(names)))) else names


def rows_of_labels(there: tuple[str, ...] | int, here: tuple[str, ...] | int) -> dict[int, int]:
    """Rows of this run's label table → rows of the other's: classes by name, and the null label, which comes last.

    Classes without names, of which only the number is known, stand for as many others in the same order.
    """
    if same_classes(there, here):
        there = here
    there, here = (tuple(map(str, range(names))) if isinstance(names, int) else names for names in (there, here))
    known = {name: row for row, name in enumerate(there)}
    rows = {row: known[name] for row, name in enumerate(here) if name in known}
    return {**rows, len(here): len(there)}


def same_classes(there: tuple[str, ...] | int, here: tuple[str, ...] | int) -> bool:
    """Whether labels mean the same, as far as it is known: of a number, how many there are."""
    if isinstance(there, int) or isinstance(here, int):
        there, here = (names if isinstance(names, int) else len(names) for names in (there, here))
    return there == here


def same_latents(there: AutoencoderSpec, here: AutoencoderSpec) -> bool:
    """Whether latents mean the same, as far as it is known: imported runs have not seen the autoencoder's weights."""
    if None in (there.weights_sha256, here.weights_sha256):
        there, here = replace(there, weights_sha256=None), replace(here, weights_sha256=None)
    return there == here


def changed_meanings(there: RunRecord, here: RunRecord) -> list[str]:
    """The names of what gives a model's inputs and outputs another meaning in one run than in the other.

    As far as the records tell it, and of the parts that both have.
    """

    shared = [(m, here.denoiser.modality(m.name)) for m in there.denoiser.modalities]
    shared = [(a, b) for a, b in shared if b]
    encoders = [
        record.encoder.weights_sha256
        for record in (there, here)
        if record.encoder and (record.recipe.class_token.present or record.recipe.alignment.present)
    ]
    changed = {
        "autoencoder": not same_latents(there.autoencoder, here.autoencoder),
        "path": there.recipe.path != here.recipe.path,
        "prediction": there.recipe.prediction != here.recipe.prediction,
        **{f"compressor of {a.name}": there.compressors.get(a.name) != here.compressors.get(a.name) for a, _ in shared},
        "encoder": len(set(encoders)) == 2,
        **{f"scale of {a.name}": a.normalisation != b.normalisation for a, b in shared},
    }
    return [name for name, is_other in changed.items() if is_other]


def parts(tensors: Iterable[str]) -> set[str]:
    """The parts of a denoiser that tensors belong to."""
    return set(map(part_of, tensors))


def part_of(name: str) -> str:
    """The part that a tensor belongs to, by its name: one token, one condition, or a module of the denoiser."""
    group, _, rest = name.partition(".")
    return f"{group}.{rest.partition('.')[0]}" if group in OPTIONAL_GROUPS[:-1] else group
