"""Published files as they come: weights in containers of many shapes, averaged or not, under the prefixes of wrappers.

A file is searched for state dicts, which are told by the name of one weight, wherever they are in it and whatever
stands before their names: {model, ema}, {state_dict, state_dict_ema}, Lightning's {state_dict: {net.…, ema_model.…}}.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any

from torch import Tensor

from reglue.encoders.weights import is_pickled
from reglue.errors import UserError
from reglue.files import opened_tensors, refuse_not_finite
from reglue.pickles import read_untrusted
from reglue.training.checkpoints import MOST_STEPS

WRAPPERS = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_flat_param"}
)
"""What DDP, torch.compile, FSDP, recomputation and Lightning put into names, anywhere and in any order."""
AVERAGED = re.compile(
    # Words in names of any style: model_ema, ema1, modelEMA, emaModel, EMAModel. Adam's exp_avg averages no weights.
    r"(?:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))(?<!exp_)"
    r"(?i:ema|avg|average[ds]?|swa|shadow|polyak|teacher)"
    r"(?:(?![A-Za-z])|(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z]))"
)
"""In the name of a state dict, or in a prefix: averaged weights."""
ARGUMENTS = ("args", "hyper_parameters", "config", "cfg")
"""Where containers keep the options of the training."""
STEPS = ("steps", "step", "global_step", "train_steps")
STEP = "step"
"""Key of our safetensors files' metadata: the step of training, in decimal digits."""
STEP_DIGITS = re.compile(r"[0-9]{1,18}")
"""What may be a step: a stranger's file can say anything."""
RECORD = "reglue"
"""Option in our files: the record of the run, in JSON."""
FIRST_WEIGHTS = ("x_embedder.proj.weight", "in_blocks.0.norm1.weight")
"""Every model like SiT has the first, and every U-ViT the second."""
OF_UVIT, STEP_OF_UVIT = ("nnet_ema.pth", "nnet.pth"), "step.pth"
"""Files in U-ViT's folders: the averaged weights, the trained ones, and the step."""
FIXED = "pos_embed"
"""Never trained, and not always kept among the averages."""


@dataclass(frozen=True)
class StateDict:
    """Weights by their names, without what stood before these."""

    place: str
    """The keys and the prefix that lead to it in the file: `state_dict.ema_model`; empty for a bare one."""
    weights: dict[str, Tensor]

    @property
    def averaged(self) -> int:
        """How often its place says so: `ema.ema_model` twice, and `ema.online_model` beside it once."""
        return len(AVERAGED.findall(self.place))


@dataclass(frozen=True)
class PublishedFile:
    """What a published file holds, in its own terms."""

    weights: dict[str, Tensor]
    """The averaged (EMA) ones where the file has them, under their published names."""
    arguments: dict[str, Any]
    """The options that it was trained with, by name, as far as the file keeps them; those of groups among the others,
    unless they have the same names."""
    step: int
    """Of training; 0 if neither the file (its metadata, for safetensors) nor its name (`0400000.pt`) says."""
    notes: tuple[str, ...] = ()
    """What was chosen, where the file left a choice, as sentences."""


def read_official(file: Path) -> PublishedFile:
    """Read a published file, executing nothing that is in it.

    Raises UserError if the file is missing or is something else, or if a weight is not a finite number.
    """
    if of_uvit := next((file / name for name in OF_UVIT if (file / name).is_file()), None):
        found = read_official(of_uvit)
        step = read_untrusted(file / STEP_OF_UVIT) if (file / STEP_OF_UVIT).is_file() else 0
        return replace(found, step=step if type(step) is int and 0 <= step <= MOST_STEPS else 0)
    if not file.is_file():
        raise UserError(f"{file}: {'a folder; give the file in it' if file.is_dir() else 'no such file'}")
    content: Any
    stated: dict[str, Any] = {}
    if _is_safetensors(file):
        with opened_tensors(file, "fetch it again") as opened:
            texts = (opened.metadata() or {}).items()
            content = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, not a dict
        stated = {name: int(text) if STEP_DIGITS.fullmatch(text) else text for name, text in texts}
    else:
        is_pickled(file)  # which says what to do about one that is called safetensors
        content = read_untrusted(file)
    container = content if isinstance(content, dict) else {}
    weights, notes = weights_in(content, file, *FIRST_WEIGHTS)
    groups = [container[name] for name in ARGUMENTS if isinstance(container.get(name), dict)]
    steps = [place[name] for place in (container, stated) for name in STEPS if type(place.get(name)) is int]
    named = [int(file.stem)] if STEP_DIGITS.fullmatch(file.stem) else []
    counts = [step for step in (*steps, *named) if step >= 0]
    step = next((count for count in counts if count <= MOST_STEPS), 0)
    if counts and counts[0] > MOST_STEPS:
        notes += (f"It says step {counts[0]:,}, which no training reaches: taking it as step {step}.",)
    return PublishedFile(weights, _flat([stated, *groups]), step, notes)


def _is_safetensors(file: Path) -> bool:
    """Whether a file begins like safetensors, whatever it is called: with the length of some JSON, and that."""
    with file.open("rb") as opened:
        return opened.read(9)[8:] == b"{"


def _flat(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Options with those of inner groups among them; outer ones win. What is no text, number or None is left out."""
    inner = [value for group in groups for value in group.values() if isinstance(value, dict)]
    plain = str | int | float | NoneType
    own = {name: value for group in groups for name, value in group.items() if isinstance(value, plain)}
    return _flat(inner) | own if inner else own


def weights_in(content: Any, file: Path, *first: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The weights in what was read from a file, and what there is to say about the choice of them.

    `first` are names of one of them, of which the file may have any. The averaged ones are taken; others only where
    there are none. Raises UserError if there are none at all, and for numbers that are not finite.
    """
    by_name = ([*_state_dicts(content, name)] for name in first)
    found = next(filter(None, by_name), None) or _largest(content)
    if not found:
        inside = ", ".join(map(str, list(content)[:4])) if isinstance(content, Mapping) else type(content).__name__
        raise UserError(f"{file}: expected a state dict or {{model, ema, …}}, found {inside or 'nothing'}")
    most = max(each.averaged for each in found)
    averages = [each for each in found if most and each.averaged == most]
    taken = (averages or found)[0]
    weights: dict[str, Tensor] = dict(taken.weights)
    notes: list[str] = []
    if fixed := [each.weights[FIXED] for each in found if FIXED in each.weights]:
        weights.setdefault(FIXED, fixed[0])
    if len(averages) > 1:
        others = ", ".join(each.place for each in averages[1:])
        notes.append(f"It has several averages of the weights: taking {taken.place} (the others are {others}).")
    if "teacher" in taken.place.lower():
        notes.append(f"It has averaged (EMA) weights by the name {taken.place}, if that was not another model's.")
    if not averages and taken.place:
        notes.append(f"It has no averaged (EMA) weights by name: taking those of {taken.place}.")
    refuse_not_finite(weights, file)
    return weights, tuple(notes)


def _state_dicts(content: Any, first: str, place: str = "") -> Iterator[StateDict]:
    """Every state dict with a weight of the name `first`, in the order of the file."""
    if not isinstance(content, Mapping):
        return
    tensors = _tensors(content)
    marks = [name.removesuffix(first) for name in tensors if name == first or name.endswith(f".{first}")]
    parts: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in marks}
    for name, value in tensors.items():
        if prefixes := [prefix for prefix in marks if name.startswith(prefix)]:
            prefix = max(prefixes, key=len)
            parts[prefix][name.removeprefix(prefix)] = value
    for prefix, weights in parts.items():
        yield StateDict(_joined(place, prefix), weights)
        if average := _nameless_average(tensors, prefix, weights, first):
            yield StateDict(_joined(place, "ema"), average)
    for name, inside in content.items():
        yield from _state_dicts(inside, first, _joined(place, str(name)))


def _largest(content: Any) -> list[StateDict]:
    """Where no state dict has the weight that was looked for: the largest one, of which to say what it lacks."""

    def inside(content: Any) -> Iterator[dict[str, Tensor]]:
        if isinstance(content, Mapping):
            yield _tensors(content)
            for value in content.values():
                yield from inside(value)

    largest = max(inside(content), key=len, default={})
    return [StateDict("", largest)] if largest else []


def _tensors(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The weights that are directly in a mapping, without wrappers in their names. Single numbers are counters."""
    return {
        ".".join(part for part in str(name).split(".") if part not in WRAPPERS): value
        for name, value in content.items()
        if isinstance(value, Tensor) and value.ndim
    }


def _nameless_average(
    tensors: Mapping[str, Tensor], prefix: str, weights: Mapping[str, Tensor], first: str
) -> dict[str, Tensor] | None:
    """The averages of latent-diffusion's code, which it keeps under names without dots (`model_ema.x_embedderproj…`).

    What it does not average is taken as it is.
    """
    parted = {name.rpartition("."): value for name, value in tensors.items()}
    averages = {tail: value for (head, _, tail), value in parted.items() if AVERAGED.search(head)}
    parts = prefix.split(".")
    for start in range(len(parts)):
        lead = "".join(parts[start:])
        if lead + first.replace(".", "") in averages:
            return {name: averages.get(lead + name.replace(".", ""), value) for name, value in weights.items()}
    return None


def _joined(place: str, name: str) -> str:
    return f"{place}.{name}".strip(".")
