"""Images that are drawn from a run: which ones, their folder or archive, and the protocol that goes with them."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np

from reglue import contact_sheet, fine_tuning
from reglue.arrays import UNSEALED, ArrayFile, seal_archive
from reglue.data.images import open_picture
from reglue.data.picture_writer import THREADS, PictureWriter
from reglue.diffusion.controls import Progress
from reglue.diffusion.denoiser import Denoiser
from reglue.diffusion.modalities import State
from reglue.errors import UserError, one_line, option
from reglue.files import SEAL, parse_json, read_json, refuse_filled, replacing, write_text
from reglue.generation import evaluations
from reglue.locks import writing
from reglue.pipeline import ImageModel, load
from reglue.progress import Bar
from reglue.run import find_run, known_as
from reglue.sampling import AutoPrecision, Draw, Sampling
from reglue.seeds import generator
from reglue.training import checkpoints, distributed
from reglue.training.precision import agreed

PROTOCOL = "samples.json"
WEAKER_SCALE = 2.0
"""Of autoguidance, where it is not given."""
PACKED_AT_ONCE = 64
"""Pictures in memory while an archive is written."""


def write_samples(options: Draw) -> Path:
    """Draw the images that are missing, in every process. Returns where they are.

    The folder gets `000000.png` … and `samples.json` with the protocol and every label, those of more images that are
    there already included; at the end the table and the page of `contact_sheet`. Raises UserError for a class outside
    the range, guidance without classes, or a folder or file with images of another protocol.
    """
    as_npz, folder = is_archive(options.out), folder_of(options.out)
    with writing(options.out), writing(folder):
        return _write_samples(options, folder, as_npz)


def _write_samples(options: Draw, folder: Path, as_npz: bool) -> Path:
    rank, processes = distributed.join(options.device)
    model = load(
        options.run,
        step=options.step,
        weights=options.weights,
        device=options.device,
        autoencoder=options.autoencoder,
        compile=options.compile,
    )
    drawing = plan(options, model)
    protocol = protocol_of(options, drawing)
    if as_npz and is_finished(options.out, protocol):
        if rank == 0:
            _remove(folder)  # Left over, if the process died before it could.
            print(f"{options.out} is complete already: {options.count} images")
        return options.out
    create_or_resume(folder, protocol, rank)
    if rank == 0 and (warning := model.warning()):
        Bar.write(f"warning: {warning}", file=sys.stderr)
    # Who draws what must not depend on what the other processes have drawn already.
    mine = [i for i in range(rank, options.count, processes) if not (folder / contact_sheet.picture(i)).is_file()]
    batches = [mine[start : start + options.batch_size] for start in range(0, len(mine), options.batch_size)]
    with PictureWriter() as pictures:
        for indices, state in zip(batches, drawing.states(batches, "sample", silent=rank > 0), strict=True):
            pixels = model.pixels(state, drawing.sampling.rounding, drawing.sampling.tile)
            pictures.write([folder / contact_sheet.picture(i) for i in indices], pixels)
    distributed.barrier()
    if as_npz and rank == 0:
        files = [folder / contact_sheet.picture(i) for i in range(options.count)]
        write_archive(options.out, files, drawing.labels, protocol)
        _remove(folder)
    elif rank == 0:
        contact_sheet.describe(folder, read_protocol(folder / PROTOCOL))
    return options.out


def is_archive(out: Path) -> bool:
    """Whether images are to be in one file."""
    return out.suffix.lower() == ".npz"


def folder_of(out: Path) -> Path:
    """Where the images lie, until they are all there if they are to be in one file."""
    return out.with_suffix(".parts") if is_archive(out) else out


def _remove(folder: Path) -> None:
    """Remove pictures that are in an archive by now, with their protocol and their folder, if they are there.

    A folder that holds other files, such as those of a file manager, stays.
    """
    if folder.is_dir():
        beside = (folder / name for name in (contact_sheet.PAGE, contact_sheet.TABLE, PROTOCOL))
        for file in (*folder.glob("*.png"), *beside):
            file.unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()


def write_archive(out: Path, pictures: Sequence[Path], labels: list[int], protocol: dict[str, Any]) -> None:
    """Write pictures of one size into a NumPy archive, as `numpy.savez` would: `arr_0` (N, H, W, 3) uint8, as in ADM's.

    Besides, `labels` (N,) and the `protocol` as JSON. The file is sealed (`seal_archive`). A few pictures at a time are
    in memory. Raises UserError if the file cannot be written.
    """
    with open_picture(pictures[0]) as first:
        width, height = first.size
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(pictures), height, width, 3)}
    others = {"labels": np.array(labels), "protocol": np.array(json.dumps(sealed(protocol)))}
    with replacing(out) as beside:
        with ZipFile(beside, "w") as archive, ThreadPoolExecutor(THREADS) as threads:
            archive.comment = UNSEALED
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for start in range(0, len(pictures), PACKED_AT_ONCE):
                    for image in threads.map(_pixels, pictures[start : start + PACKED_AT_ONCE]):
                        file.write(image.data)
            for name, value in others.items():
                with archive.open(f"{name}.npy", "w") as file:
                    np.lib.format.write_array(file, value, allow_pickle=False)
        seal_archive(beside)


def archived_protocol(archive: Path) -> dict[str, Any] | None:
    """The protocol in an .npz file, if it has one. Raises UserError for a damaged file."""
    try:
        arrays = ArrayFile(archive)
        text = str(arrays.read("protocol")) if "protocol" in arrays.names else None
    except UserError as error:
        raise UserError(f"the protocol cannot be read: {error}") from error
    return None if text is None else protocol_in(text, archive)


def protocol_in(text: str | bytes, path: Path) -> dict[str, Any]:
    """A protocol from JSON that was read in `path`. Raises UserError if it is none, or not the one that was written.

    Others may write less into theirs than we do: what is not there is not missed.
    """
    remedy = "fix or remove it"
    try:
        return _checked(parse_json(text, dict[str, Any]), path, remedy)
    except ValueError as error:
        raise UserError(f"{path} is damaged (its protocol: {one_line(error)}); {remedy}") from error


def sealed(protocol: dict[str, Any]) -> dict[str, Any]:
    """A protocol with its own SHA-256, by which it is known when it is read."""
    text = json.dumps(protocol, sort_keys=True)
    return {**protocol, SEAL: hashlib.sha256(text.encode()).hexdigest()}


def _checked(content: dict[str, Any], path: Path, remedy: str) -> dict[str, Any]:
    """A protocol without its hash, which is compared if it is there. Raises UserError for another hash, and for values
    that are none of a protocol."""
    protocol = {key: value for key, value in content.items() if key != SEAL}
    if SEAL in content and content != sealed(protocol):
        raise UserError(f"{path} is damaged (its protocol is not what was written); {remedy}")
    labels, names = protocol.get("labels", []), protocol.get("class_names", [])
    if not (
        isinstance(protocol.get("sampling", {}), dict)
        and isinstance(labels, list)
        and isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        and all(type(label) is int and (not names or 0 <= label < len(names)) for label in labels)
    ):
        raise UserError(f"{path} is damaged (it holds no protocol of samples); {remedy}")
    return protocol


def _pixels(file: Path) -> np.ndarray:
    """A picture as contiguous uint8 (height, width, 3)."""
    with open_picture(file) as picture:
        return np.ascontiguousarray(picture)


@dataclass(frozen=True)
class Drawing:
    """Images that are to be drawn: image i is a function of the seed and i."""

    model: ImageModel
    weaker: Denoiser | None
    sampling: Sampling
    labels: list[int]
    seed: int

    def draw(self, indices: Sequence[int], on_evaluation: Callable[[], object], room: int = 0) -> State:
        """The states of some of the images; `on_evaluation` is called after each evaluation, for progress.

        A compiled network evaluates batches of `room` images, if that is more, so that it sees one shape.
        """
        return self.model.draw(
            indices,
            self.model.condition([self.labels[i] for i in indices]),
            self.seed,
            self.sampling,
            weaker=self.weaker,
            room=room,
            controls=[Progress(on_evaluation)],
        )

    def states(self, batches: Sequence[Sequence[int]], what: str, silent: bool = False) -> Iterator[State]:
        """Those of batches of the images, one after the other, with a progress bar that says `what`."""
        room, total = max(map(len, batches), default=0), evaluations(self.sampling, len(batches))
        with Bar(total=total, unit="evaluation", desc=what, disable=silent) as progress:
            for indices in batches:
                yield self.draw(indices, progress.update, room)


def plan(options: Draw, model: ImageModel, before: Callable[[], AutoPrecision | None] | None = None) -> Drawing:
    """What the options ask of a model; `before` as for `way_to_sample`. Raises UserError for what it cannot do."""
    before = before or (lambda: drawn_before(options.out))
    weaker, sampling = way_to_sample(options, model, model.default_sampling, before)
    return Drawing(model, weaker, sampling, choose_labels(options, model), options.seed)


def way_to_sample(
    options: Draw, model: ImageModel, default: Sampling, before: Callable[[], AutoPrecision | None]
) -> tuple[Denoiser | None, Sampling]:
    """The second model of autoguidance, if there is one, and how images are drawn: as options say, or else as default.

    `before` tells the precision of the images that are there already, which those to come have too. Raises UserError
    for what the model cannot do.
    """
    weaker = weaker_model(options, model) if options.weaker_run else None
    changes = {part.name: getattr(options, part.name) for part in fields(Sampling)}
    if weaker:
        own = model.record.recipe.sampling.auto_scale
        given = changes["auto_scale"]
        changes["auto_scale"] = given if given is not None else own if own != 1 else WEAKER_SCALE
    for name in ("auto_scale", "auto_scales"):
        if not weaker and changes[name] not in (None, 1):
            given = changes[name] if name == "auto_scale" else " ".join(f"{n} {w}" for n, w in changes[name].items())
            raise UserError(
                f"{option(name)} {given}: autoguidance needs a weaker model; name one with {option('weaker_run')}"
            )
    sampling = default.changed(**changes)
    if sampling.precision == "auto":
        sampling = replace(sampling, precision=before() or agreed(model.device))
    return weaker, model.resolved(sampling)


def drawn_before(out: Path) -> AutoPrecision | None:
    """The precision in which the images that lie at a place were drawn; None if there are none."""
    place = out if is_archive(out) and out.exists() else folder_of(out) / PROTOCOL
    if not place.exists():
        return None
    protocol = archived_protocol(place) if is_archive(place) else read_protocol(place)
    return ((protocol or {}).get("sampling") or {}).get("precision")


def weaker_model(options: Draw, model: ImageModel) -> Denoiser:
    """The second model of autoguidance. Raises UserError unless both speak of the same images, in the same terms."""
    assert options.weaker_run
    weaker = load(options.weaker_run, device=options.device)
    config = weaker.denoiser.config
    own = model.denoiser.config
    if (config.shapes(), config.conditions.keys()) != (own.shapes(), own.conditions.keys()):
        raise UserError(
            f"{option('weaker_run')} {options.weaker_run} was trained on other modalities, conditions or sizes than "
            f"{options.run}; choose a run on the same store"
        )
    different = fine_tuning.changed_meanings(weaker.record, model.record)
    if not any(modality.is_class_token for modality in config.modalities):
        different = [name for name in different if name != "encoder"]  # It was only aligned with.
    if not fine_tuning.same_classes(fine_tuning.names_of(weaker.record), fine_tuning.names_of(model.record)):
        different.append("classes")
    if different:
        raise UserError(
            f"{option('weaker_run')} {options.weaker_run} was trained with another {', another '.join(different)} than "
            f"{options.run}; choose a run that differs in its model or its training alone"
        )
    return weaker.denoiser


def choose_labels(options: Draw, model: ImageModel) -> list[int]:
    """The label of each image: a function of the seed and its index."""
    names = model.record.class_names
    if not names:
        if options.classes:
            model.label(options.classes[0])
        return [model.null_label] * options.count
    allowed = [model.label(name) for name in options.classes] or list(range(len(names)))
    if options.labels == "balanced":
        return [allowed[i % len(allowed)] for i in range(options.count)]
    return [allowed[generator(options.seed, "label", i).integers(len(allowed))] for i in range(options.count)]


def protocol_of(options: Draw, drawing: Drawing) -> dict[str, Any]:
    """Everything that decides the images: goes with them, and into every report about them."""
    model, weaker = drawing.model, options.weaker_run
    record = model.record
    return {
        "run": known_as(options.run),
        "recipe": record.recipe.name,
        "model": record.recipe.model,
        "step": model.step,
        "weights": model.weights,
        "weights_sha256": model.folder and checkpoints.weights_sha256(model.folder, model.step, model.weights),
        "sampling": asdict(drawing.sampling),
        "label_policy": options.labels,
        "labels": drawing.labels,
        "class_names": list(record.class_names),
        "seed": options.seed,
        "decoder": model.autoencoder.spec.name,
        "decoder_sha256": model.autoencoder.spec.weights_sha256,
        "weaker_run": known_as(weaker) if weaker else None,
        "weaker_weights_sha256": weaker and checkpoints.weights_sha256(find_run(weaker)),
        "versions": {name: version(name) for name in ("reglue", "torch", "numpy")},
    }


def read_protocol(path: Path) -> dict[str, Any]:
    """The protocol of images that are to be continued. Raises UserError if the file does not hold it (any more)."""
    remedy = "choose another folder, or delete this one and draw the images again"
    content = read_json(path, dict[str, Any], remedy)
    if missing := [key for key in ("sampling", "labels", "class_names", "seed", SEAL) if key not in content]:
        raise UserError(f"{path} is damaged (it holds no {missing[0]}); {remedy}")
    return _checked(content, path, remedy)


PLACES = {"run": "weights_sha256", "weaker_run": "weaker_weights_sha256", "decoder": "decoder_sha256"}
"""Where models were found, and the hash that says which ones they are, wherever they have been moved or copied to."""


def create_or_resume(folder: Path, protocol: dict[str, Any], rank: int) -> None:
    """Make the folder, or check that its images are of the same protocol. Raises UserError if they are not."""
    path = folder / PROTOCOL
    if path.is_file():
        protocol = joined(folder, read_protocol(path), protocol, complete=is_drawn(folder, protocol))
    else:
        refuse_filled(folder)
    contact_sheet.read_hashes(folder)  # A damaged table ends every process alike.
    distributed.barrier()
    if rank == 0:
        write_text(path, json.dumps(sealed(protocol), indent=1))
        contact_sheet.forget_missing(folder, protocol)
    distributed.barrier()


def is_drawn(folder: Path, protocol: dict[str, Any]) -> bool:
    """Whether all images of a protocol are there."""
    return all((folder / contact_sheet.picture(i)).is_file() for i in range(len(protocol["labels"])))


def is_finished(archive: Path, protocol: dict[str, Any]) -> bool:
    """Whether an .npz file is there. Raises UserError if it holds anything but the images of this very protocol."""
    if not archive.exists():
        return False
    before = archived_protocol(archive) or {}
    if not {"labels", "sampling"} <= before.keys():
        raise UserError(f"{archive} is there already, but does not say how its images were drawn; choose another file")
    joined(archive, before, protocol, complete=True)
    has, asked = len(before["labels"]), len(protocol["labels"])
    if has != asked:
        raise UserError(f"{archive} holds {has} images, not {asked}, and takes no more; choose another file")
    return True


def joined(place: Path, before: dict[str, Any], protocol: dict[str, Any], *, complete: bool) -> dict[str, Any]:
    """The protocol of the images that lie at a place and of those to come. Raises UserError if they are of two.

    `complete`, none are to come: then it does not matter which versions of libraries would draw them.
    """
    protocol = json.loads(json.dumps(protocol))  # as it will be read back
    # Models may have moved: their hashes say which ones they are.
    before |= {name: protocol[name] for name, digest in PLACES.items() if before.get(digest)}
    # More images of the same kind may be added: labels are a function of the index.
    count = min(len(before["labels"]), len(protocol["labels"]))
    shortened = [{**p, "labels": p["labels"][:count]} for p in (before, protocol)]
    free = ("versions",) if complete else ()
    different = sorted(key for key in protocol if key not in free and shortened[0].get(key) != shortened[1][key])
    if different:
        raise UserError(f"{place} holds samples of another protocol ({', '.join(different)}); choose another place")
    # Fewer images take none away, and the protocol describes all that are there.
    return max(before, protocol, key=lambda p: len(p["labels"]))
