"""`reglue sample`: a run to images."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile, ZipFile, is_zipfile

import numpy as np
from PIL import Image
from tqdm import tqdm
from tyro.conf import Positional

from reglue.config import Precision, Rounding, SamplerName, Sampling, StatePrecision
from reglue.data.picture_writer import THREADS, PictureWriter
from reglue.diffusion.denoiser import Denoiser
from reglue.diffusion.modalities import State
from reglue.diffusion.noise import STREAMS
from reglue.errors import UserError, require
from reglue.files import TakesPaths, from_json, replacing
from reglue.pipeline import ImageModel, changed_sampling, evaluations, load
from reglue.published import runs_by_name as hub
from reglue.seeds import generator
from reglue.training import checkpoints, distributed, fine_tuning
from reglue.training.watchdog import watchdog

PROTOCOL = "samples.json"
PACKED_AT_ONCE = 64
"""Pictures in memory while an archive is written."""


@dataclass(frozen=True)
class Sample(TakesPaths):
    """Draw images from a run. Image i depends on the seed and i alone; the same command again draws what is missing."""

    run: Positional[Path]
    """Folder of the run, OWNER/NAME of one on the Hugging Face hub, or starter, the small model of this package."""
    out: Path
    """A folder for PNG files, or a file that ends in .npz."""
    count: int = 50
    """How many images."""
    seed: int = 0
    labels: Literal["balanced", "random"] = "balanced"
    """Classes in turn, or drawn at random (by seed and index)."""
    classes: tuple[str, ...] = ()
    """Only these classes, by number or name; all if not given."""
    step: int | None = None
    """Checkpoint to use; the last one if not given."""
    sampler: SamplerName | None = None
    """These and the following: as in the run's recipe if not given."""
    steps: int | None = None
    """Intervals of the time grid: evaluations, but for Heun, which takes two in each. dopri5 chooses its own."""
    time_shift: float | None = None
    """Above 1, the grid has more times near noise; below 1, near data."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 1 is none."""
    local_scale: float | None = None
    """Guidance scale of the local map; as --guidance-scale if not given there either, 1 leaves it conditional."""
    cls_scale: float | None = None
    """Guidance scale of the class token; likewise."""
    guidance_interval: tuple[float, float] | None = None
    """Guided only between these times; 0 is data, 1 is noise."""
    representation_scale: float | None = None
    """Representation guidance, for models trained with --local.dropout."""
    guided_channels: int | Literal["all"] | None = None
    """Classifier-free guidance moves so many latent channels, the first ones, or all. SiT's recipe says 3, as published
    for the four channels of its autoencoder; in spaces of more channels, all is the better choice."""
    weaker_run: Path | None = None
    """A run on the same store whose model guides by being worse (autoguidance)."""
    auto_scale: float = 2.0
    """Scale of autoguidance, where --weaker-run is given."""
    rounding: Rounding | None = None
    """How pixels become 8-bit numbers."""
    state_precision: StatePrecision | None = None
    """Precision in which steps add up."""
    precision: Precision | None = None
    """Precision of the network's matrix products; that of training if the recipe says nothing either."""
    relative_tolerance: float | None = None
    """Error that dopri5 allows per step, as a share of the values."""
    absolute_tolerance: float | None = None
    """Error that dopri5 allows per step in any case."""
    autoencoder: str | None = None
    """Decode with another autoencoder than the run's own."""
    batch_size: int = 32
    """Images at once in each process; does not change them beyond rounding."""
    compile: bool = False
    """Compile the network: slower to start, faster after; does not change images beyond rounding."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "count", "batch_size", at_least=1)
        require(self, "seed", at_least=0)


@watchdog
def sample(options: Sample) -> Path:
    """Draw the images. Returns where they are.

    The folder gets `000000.png` … and `samples.json` with the protocol and every label, those of more images that are
    there already included. Raises UserError for a class
    outside the range, guidance without classes, or a folder or file with images of another protocol.
    """
    rank, processes = distributed.join(options.device)
    model = load(
        options.run,
        step=options.step,
        device=options.device,
        autoencoder=options.autoencoder,
        compile=options.compile,
    )
    drawing = plan(options, model)
    labels, sampling = drawing.labels, drawing.sampling

    as_npz = options.out.suffix.lower() == ".npz"
    folder = options.out.with_suffix(".parts") if as_npz else options.out
    protocol = describe(options, model, sampling, labels)
    unless_told = model.resolved(replace(sampling, precision=None, state_precision=None))
    if as_npz and is_finished(options.out, protocol, unless_told):
        if rank == 0:
            _remove(folder)  # Left over, if the process died before it could.
            print(f"{options.out} is complete already: {options.count} images")
        return options.out
    create_or_resume(folder, protocol, unless_told, rank)
    # Who draws what must not depend on what the other processes have drawn already.
    mine = [i for i in range(rank, options.count, processes) if not (folder / f"{i:06d}.png").is_file()]
    total = evaluations(sampling, len(mine), options.batch_size)
    room = min(options.batch_size, len(mine))
    with (
        tqdm(total=total, unit="evaluation", desc="sample", disable=rank > 0) as progress,
        PictureWriter() as pictures,
    ):
        for start in range(0, len(mine), options.batch_size):
            indices = mine[start : start + options.batch_size]
            state = drawing.draw(indices, progress.update, room)
            pictures.write([folder / f"{i:06d}.png" for i in indices], model.pixels(state, sampling.rounding))
    distributed.barrier()
    if as_npz and rank == 0:
        write_archive(options.out, [folder / f"{i:06d}.png" for i in range(options.count)], labels, protocol)
        _remove(folder)
    return options.out


def _remove(folder: Path) -> None:
    """Remove pictures that are in an archive by now, with their protocol and their folder, if they are there.

    A folder that holds other files, such as those of a file manager, stays.
    """
    if folder.is_dir():
        for file in (*folder.glob("*.png"), folder / PROTOCOL):
            file.unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()


def write_archive(out: Path, pictures: Sequence[Path], labels: list[int], protocol: dict[str, Any]) -> None:
    """Write pictures of one size into a NumPy archive, as `numpy.savez` would: `arr_0` (N, H, W, 3) uint8, as in ADM's.

    Besides, `labels` (N,) and the `protocol` as JSON. A few pictures at a time are in memory. Raises UserError if the
    file cannot be written.
    """
    with Image.open(pictures[0]) as first:
        width, height = first.size
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(pictures), height, width, 3)}
    with replacing(out) as beside, ZipFile(beside, "w") as archive, ThreadPoolExecutor(THREADS) as threads:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, len(pictures), PACKED_AT_ONCE):
                for image in threads.map(_pixels, pictures[start : start + PACKED_AT_ONCE]):
                    file.write(image.data)
        for name, value in (("labels", np.array(labels)), ("protocol", np.array(json.dumps(protocol)))):
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, value, allow_pickle=False)


def archived_protocol(archive: Path) -> dict[str, Any] | None:
    """The protocol in an .npz file, if it has one. Raises UserError for a damaged file."""
    try:
        if not is_zipfile(archive):
            raise ValueError("it is no archive")
        with np.load(archive, allow_pickle=False) as arrays:
            text = str(arrays["protocol"]) if "protocol" in arrays.files else None
    except (ValueError, OSError, BadZipFile) as error:
        raise UserError(f"{archive}: the protocol cannot be read ({error}); mend or remove the file") from error
    return None if text is None else protocol_in(text, archive)


def protocol_in(text: str, path: Path) -> dict[str, Any]:
    """A protocol from JSON that was read in `path`. Raises UserError if it is none."""
    try:
        protocol = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: the protocol is not JSON ({error}); mend or remove it") from error
    if not isinstance(protocol, dict):
        raise UserError(f"{path}: the protocol is not a JSON object; mend or remove it")
    return protocol


def _pixels(file: Path) -> np.ndarray:
    """A picture as contiguous uint8 (height, width, 3)."""
    with Image.open(file) as picture:
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
        labels = [self.labels[i] for i in indices]
        return self.model.draw(
            indices,
            labels,
            self.seed,
            self.sampling,
            weaker=self.weaker,
            room=room,
            on_evaluation=on_evaluation,
        )


def plan(options: Sample, model: ImageModel) -> Drawing:
    """What the options ask of a model. Raises UserError for what it cannot do."""
    weaker = weaker_model(options, model) if options.weaker_run else None
    sampling = changed_sampling(
        model.default_sampling,
        sampler=options.sampler,
        steps=options.steps,
        rounding=options.rounding,
        time_shift=options.time_shift,
        state_precision=options.state_precision,
        precision=options.precision,
        relative_tolerance=options.relative_tolerance,
        absolute_tolerance=options.absolute_tolerance,
        guidance_scale=options.guidance_scale,
        guidance_interval=options.guidance_interval,
        local_scale=options.local_scale,
        cls_scale=options.cls_scale,
        representation_scale=options.representation_scale,
        guided_channels=options.guided_channels,
        auto_scale=options.auto_scale if options.weaker_run else None,
    )
    return Drawing(model, weaker, sampling, choose_labels(options, model), options.seed)


def weaker_model(options: Sample, model: ImageModel) -> Denoiser:
    """The second model of autoguidance. Raises UserError unless both speak of the same images, in the same terms."""
    assert options.weaker_run
    weaker = load(options.weaker_run, device=options.device)
    shape = weaker.denoiser.config.shape
    if shape != model.denoiser.config.shape:
        raise UserError(
            f"--weaker-run {options.weaker_run} was trained on other modalities or sizes than {options.run}"
        )
    different = fine_tuning.changed_meanings(weaker.record, model.record)
    if not shape.class_token_width:
        different = [name for name in different if name != "encoder"]  # It was only aligned with.
    if not fine_tuning.same_classes(fine_tuning.names_of(weaker.record), fine_tuning.names_of(model.record)):
        different.append("classes")
    if different:
        raise UserError(
            f"--weaker-run {options.weaker_run} was trained with another {', another '.join(different)} than "
            f"{options.run}; choose a run that differs in its model or its training alone"
        )
    return weaker.denoiser


def choose_labels(options: Sample, model: ImageModel) -> list[int]:
    """The label of each image: a function of the seed and its index."""
    names = model.record.class_names
    if not names:
        if options.classes:
            model.label(options.classes[0])
        return [model.denoiser.null_label] * options.count
    allowed = [model.label(name) for name in options.classes] or list(range(len(names)))
    if options.labels == "balanced":
        return [allowed[i % len(allowed)] for i in range(options.count)]
    return [allowed[generator(options.seed, "label", i).integers(len(allowed))] for i in range(options.count)]


def describe(options: Sample, model: ImageModel, sampling: Sampling, labels: list[int]) -> dict[str, Any]:
    """Everything that decides the images: goes with them, and into every report about them."""
    record, weaker = model.record, options.weaker_run
    return {
        "run": hub.known_as(options.run),
        "recipe": record.recipe.name,
        "model": record.recipe.model,
        "step": model.step,
        "weights": "EMA",
        "weights_sha256": checkpoints.weights_sha256(model.folder, model.step) if model.folder else None,
        "sampling": asdict(model.resolved(sampling)),
        "label_policy": options.labels,
        "labels": labels,
        "class_names": list(record.class_names),
        "seed": options.seed,
        "noise": STREAMS,
        "decoder": model.autoencoder.spec.name,
        "decoder_sha256": model.autoencoder.spec.weights_sha256,
        "weaker_run": hub.known_as(weaker) if weaker else None,
        "weaker_weights_sha256": weaker and checkpoints.weights_sha256(hub.find_run(weaker)),
        "versions": {name: version(name) for name in ("reglue", "torch", "numpy")},
    }


def read_protocol(path: Path) -> dict[str, Any]:
    """The protocol of images that are to be continued. Raises UserError if the file does not hold it (any more)."""
    remedy = "choose a new --out, or delete the folder and draw anew"
    protocol = from_json(path, dict[str, Any], remedy)
    if not (isinstance(protocol.get("sampling"), dict) and isinstance(protocol.get("labels"), list)):
        raise UserError(f"{path} is damaged (it holds no protocol of samples); {remedy}")
    return protocol


ADDED = ("weights_sha256", "weaker_weights_sha256")
"""What protocols of older versions lack."""
PLACES = {"run": "weights_sha256", "weaker_run": "weaker_weights_sha256", "decoder": "decoder_sha256"}
"""Where models were found, and the hash that says which ones they are, wherever they have been moved or copied to."""


def create_or_resume(folder: Path, protocol: dict[str, Any], unless_told: Sampling, rank: int) -> None:
    """Make the folder, or check that its images are of the same protocol. Raises UserError if they are not.

    `unless_told` has the precisions that are used where nobody asks for one: what older files meant by null.
    """
    path = folder / PROTOCOL
    if path.is_file():
        protocol = joined(folder, read_protocol(path), protocol, unless_told, complete=is_drawn(folder, protocol))
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} holds other files; choose a new or an empty folder for --out")
    distributed.barrier()
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            beside.write_text(json.dumps(protocol, indent=1))
    distributed.barrier()


def is_drawn(folder: Path, protocol: dict[str, Any]) -> bool:
    """Whether all images of a protocol are there."""
    return all((folder / f"{i:06d}.png").is_file() for i in range(len(protocol["labels"])))


def is_finished(archive: Path, protocol: dict[str, Any], unless_told: Sampling) -> bool:
    """Whether an .npz file is there. Raises UserError if it holds anything but the images of this very protocol."""
    if not archive.exists():
        return False
    before = archived_protocol(archive) or {}
    if not {"labels", "sampling"} <= before.keys():
        raise UserError(f"{archive} is there, and does not say how its images were drawn; choose a new --out")
    joined(archive, before, protocol, unless_told, complete=True)
    has, asked = len(before["labels"]), len(protocol["labels"])
    if has != asked:
        raise UserError(f"{archive} holds {has} images, not {asked}, and takes no more; choose a new --out")
    return True


def joined(
    place: Path, before: dict[str, Any], protocol: dict[str, Any], unless_told: Sampling, *, complete: bool
) -> dict[str, Any]:
    """The protocol of the images that lie at a place and of those to come. Raises UserError if they are of two.

    `complete`, none are to come: then it does not matter which versions of libraries would draw them.
    """
    protocol = json.loads(json.dumps(protocol))  # as it will be read back
    # Older files lack the settings that have come since, and left open which precisions were used.
    defaults = asdict(Sampling()) | {
        "state_precision": unless_told.state_precision,
        "precision": unless_told.precision,
    }
    before["sampling"] |= {name: v for name, v in defaults.items() if before["sampling"].get(name) is None}
    # They have paths as they were typed, too.
    before |= {name: hub.known_as(before[name]) for name in ("run", "weaker_run") if before.get(name)}
    before |= {name: protocol[name] for name, digest in PLACES.items() if before.get(digest)}
    # Nor do they say which weights drew their images, so nothing can be said about all that will be there.
    protocol = {name: value for name, value in protocol.items() if name in before or name not in ADDED}
    # More images of the same kind may be added: labels are a function of the index.
    count = min(len(before["labels"]), len(protocol["labels"]))
    shortened = [{**p, "labels": p["labels"][:count]} for p in (before, protocol)]
    free = ("versions",) if complete else ()
    different = sorted(key for key in protocol if key not in free and shortened[0].get(key) != shortened[1][key])
    if different:
        raise UserError(f"{place} holds samples of another protocol ({', '.join(different)}); choose a new --out")
    # Fewer images take none away, and the protocol describes all that are there.
    return max(before, protocol, key=lambda p: len(p["labels"]))
