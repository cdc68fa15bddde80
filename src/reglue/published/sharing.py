"""A run as others get it: a folder with what sampling needs, and a model card that says what it is."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from torch import Tensor

from reglue.command_lines import changed_options, words
from reglue.encoders.alignment import FILE as ALIGNMENT
from reglue.encoders.alignment import load_alignment, save_alignment
from reglue.encoders.autoencoders import CONFIG as AUTOENCODER_CONFIG
from reglue.encoders.autoencoders import autoencoder_files
from reglue.errors import UserError
from reglue.files import new_folder, read_json
from reglue.locks import writing
from reglue.names import StoredPrecision
from reglue.papers import PAPERS
from reglue.run import AUTOENCODER, COMPRESSORS, NAME, RunRecord, find_compressor, hub_error
from reglue.training import checkpoints

CARD, PICTURE, REPORTS, PREVIEWS = "README.md", "samples.png", "reports", "previews"
DISTANCE = "frechet_distance"
"""The metric whose name depends on the features: reports have it as `distance_name`."""
STATED = "stated_by_user"
"""Where a report's protocol has what the user said about images whose making nothing has recorded."""
MOST_LOST = 0.04
"""Of a matrix by float8: the length of the difference to its own."""
NO_PROTOCOL = ("metrics", "protocol", "skipped", "absent", "warnings")
"""What a report says of other things than how its metrics were made."""


def save(folder: Path, *parts: Any, name: str | None = None, **others: Any) -> Path:
    """Write a run folder with averaged weights alone, whole or not at all. Returns it. See `fill`.

    Raises UserError if the folder holds other files, or a report is none.
    """
    with writing(folder), new_folder(folder) as beside:
        fill(beside, *parts, name=name or folder.name, **others)
    return folder


def fill(
    folder: Path,
    record: RunRecord,
    weights: dict[str, Tensor],
    step: int,
    run: Path | None,
    reports: Sequence[Path] = (),
    picture: Path | None = None,
    *,
    name: str,
    precision: StoredPrecision = "float32",
) -> None:
    """Write what sampling needs, and a model card, into an empty folder.

    `run` is the folder that the run is in now, if any: compressor, autoencoder, reports and picture are found from
    there; of the run's reports those about `step`. `name` is what `reglue.load` will take. Weights are stored in a
    `precision`; models compute as before. Raises UserError for a report that is none.
    """
    weights = {key: rounded(value, precision) for key, value in weights.items()}
    shown = read_reports(run, reports, step)
    picture = picture or _preview(run, step)
    shared = _with_autoencoder(without_places(record), record, run, folder)
    shared.write(folder)
    checkpoints.save_weights(folder, step, weights)
    for modality in record.compressors:
        if compressor := find_compressor(record, run, modality):
            compressor.save(folder / COMPRESSORS / modality)
    if picture:
        shutil.copyfile(picture, folder / PICTURE)
    parameters = sum(value.numel() for value in weights.values())
    card = model_card(shared, name, step, parameters, shown, bool(picture))
    (folder / CARD).write_text(card, encoding="utf-8")


def rounded(value: Tensor, precision: StoredPrecision) -> Tensor:
    """A weight as it is stored. In float8 are those matrices that lose little by it, and all else in float16.

    Three bits of mantissa change a matrix by 2.6 %, but numbers below 2⁻⁶ have fewer, and above 448 there are none.
    """
    if not value.is_floating_point() or precision == "float32":
        return value
    eight = value.to(torch.float8_e4m3fn)
    near = value.ndim > 1 and (eight.float() - value).norm() <= MOST_LOST * value.norm()
    return eight if precision == "float8" and near else value.half()


def without_places(record: RunRecord) -> RunRecord:
    """The record without the folders of this machine: names of files alone are left."""
    start = record.start and replace(record.start, run=_without_place(record.start.run))
    encoder = record.encoder and replace(record.encoder, name=_without_place(record.encoder.name))
    autoencoder = replace(record.autoencoder, name=_without_place(record.autoencoder.name))
    store = record.store and Path(record.store).name
    return replace(record, encoder=encoder, autoencoder=autoencoder, store=store, start=start)


@dataclass(frozen=True)
class Report:
    """What an evaluation report says, whatever its version."""

    name: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    """Low and high, of the metrics that have them."""
    protocol: dict[str, str]
    warnings: tuple[str, ...]
    step: int | None
    """Of training, at which the weights were that drew the images; None if it does not say."""


def read_reports(run: Path | None, named: Sequence[Path] = (), step: int | None = None) -> list[Report]:
    """The reports in a run's `reports` folder, and those that are named.

    With a `step`, those in the folder that say to be about another one are passed over.
    A report is a JSON object with `metrics`, an object of numbers. Raises UserError for a named file that is none;
    other files in the folder are passed over.
    """
    found = sorted((run / REPORTS).glob("*.json")) if run else []
    known = {file.resolve() for file in named}
    reports = [_read_report(file) for file in found if file.resolve() not in known]
    reports = [report for report in reports if report and (step is None or report.step in (None, step))]
    for file in named:
        report = _read_report(file)
        if report is None:
            raise UserError(f"{file} is not a report of `reglue evaluate --out`: it has no metrics")
        reports.append(report)
    return reports


def train_command(record: RunRecord) -> str | None:
    """The command that trains a run, with every option that differs from the paper's.

    None for an imported run, and where modalities of one's own were learned, which the command line cannot say.
    """
    if record.recipe.name not in PAPERS or record.seed is None or record.recipe.others:
        return None
    published, ours = PAPERS[record.recipe.name].recipe, record.recipe
    # What steps and decay decide by themselves need not be said.
    usual = replace(ours.optimisation, ema_warmup=published.optimisation.ema_warmup).settled()
    if ours.optimisation.ema_warmup == usual.ema_warmup:
        published = replace(published, optimisation=replace(published.optimisation, ema_warmup=usual.ema_warmup))
    start = record.start
    began = {"from": start.run, "from_step": start.step, "from_weights": start.weights} if start else {}
    given = words({"store": record.store or "STORE", "out": "RUN"})
    later = words({"seed": record.seed or None, **began})
    return shlex.join(["reglue", "train", ours.name, *given, *changed_options(published, ours), *later])


def model_card(
    record: RunRecord, name: str, step: int, parameters: int, reports: Sequence[Report], has_picture: bool
) -> str:
    """The README.md of a shared run: a YAML header for the hub, then what it is and how its numbers were made."""
    results = [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type="image-folder",
            dataset_name=report.protocol.get("reference", "unknown"),
            metric_type=metric,
            metric_value=value,
        )
        for report in reports
        for metric, value in report.metrics.items()
    ]
    header = ModelCardData(
        library_name="reglue",
        pipeline_tag="unconditional-image-generation",
        tags=["reglue", "latent-diffusion", "diffusion-transformer", record.recipe.name],
        model_name=name.rpartition("/")[2],
        eval_results=results or None,
    )
    template = resources.files("reglue.published") / "templates" / "model_card.md"
    return ModelCard.from_template(
        header,
        template_str=template.read_text(encoding="utf-8"),
        record=record,
        recipe=record.recipe,
        sampling=record.recipe.sampling,
        paper=PAPERS.get(record.recipe.name),
        name=name,
        step=step,
        parameters=parameters,
        reports=reports,
        has_picture=has_picture,
        picture=PICTURE,
        command=train_command(record),
    ).content


def _with_autoencoder(shared: RunRecord, record: RunRecord, run: Path | None, folder: Path) -> RunRecord:
    """Copy the autoencoder that decodes, if it is in a local folder, and name it as in the shared folder.

    What it was trained on and from stays here: it names folders of this machine.
    """
    place = (run or Path()) / (record.decoder or record.autoencoder.name)
    if not place.is_dir():
        return shared
    (folder / AUTOENCODER).mkdir()
    for file in autoencoder_files(place):
        shared_file = folder / AUTOENCODER / file.name
        if file.name == AUTOENCODER_CONFIG:
            # diffusers notes the folder that a network was loaded from.
            content = json.loads(file.read_text())
            content.pop("_name_or_path", None)
            shared_file.write_text(json.dumps(content, indent=2) + "\n")
        else:
            shutil.copyfile(file, shared_file)
    if (place / ALIGNMENT).is_file():
        network = load_alignment(place)
        encoder = {**network.spec.encoder}
        encoder["name"] = _without_place(str(encoder.get("name", "")))
        network.spec = replace(network.spec, encoder=encoder)
        save_alignment(network, folder / AUTOENCODER / ALIGNMENT)
    if record.decoder:
        return replace(shared, decoder=AUTOENCODER)
    return replace(shared, autoencoder=replace(shared.autoencoder, name=AUTOENCODER))


def _without_place(name: str) -> str:
    architecture, at, file = name.rpartition("@")
    return architecture + at + Path(file).name if Path(file).is_absolute() else name


def _preview(run: Path | None, step: int) -> Path | None:
    preview = run / PREVIEWS / f"{step:08d}.png" if run else None
    return preview if preview and preview.is_file() else None


def _read_report(file: Path) -> Report | None:
    if not file.exists():
        raise UserError(f"{file}: no such report")
    try:
        content = read_json(file, dict[str, Any], "evaluate again")
    except UserError:
        return None
    if not isinstance(content.get("metrics"), dict):
        return None
    distance = str(content.get("distance_name") or DISTANCE)
    figures = {distance if key == DISTANCE else key: value for key, value in content["metrics"].items()}
    flat = {key: float(value) for key, value in _flat(figures) if isinstance(value, int | float)}
    metrics = {key.removesuffix(".value"): value for key, value in flat.items() if not key.endswith((".low", ".high"))}
    intervals = {
        key: (flat[f"{key}.low"], flat[f"{key}.high"])
        for key in metrics
        if {f"{key}.low", f"{key}.high"} <= flat.keys()
    }
    about = {key: value for key, value in content.items() if key not in NO_PROTOCOL}
    how, warnings = content.get("protocol"), content.get("warnings")
    protocol = dict(_flat(about)) | dict(_flat({"samples": how if isinstance(how, dict) else "protocol not recorded"}))
    short = {key: _without_place(str(value)) for key, value in protocol.items() if value not in (None, "")}
    short = {key: value for key, value in short.items() if len(value) <= 100 or key.startswith(f"samples.{STATED}")}
    step = how.get("step") if isinstance(how, dict) else None
    return Report(
        name=file.stem,
        metrics=metrics,
        intervals=intervals,
        protocol=short,
        warnings=tuple(map(str, warnings)) if isinstance(warnings, list) else (),
        step=step if isinstance(step, int) else None,
    )


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values under dotted names; lists of more than a few values (labels, class names) are left out."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif not isinstance(value, list) or len(value) <= 4:
            yield prefix + str(key), value


def push(folder: Path, name: str, private: bool) -> str:
    """Make the repository `OWNER/NAME` hold what a folder holds. Returns its address. Raises UserError."""
    if not NAME.fullmatch(name):
        raise UserError(f"{name!r} is not a name on the Hugging Face hub; give OWNER/NAME")
    try:
        api = HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        # Weights of an earlier step would be taken for checkpoints of this run.
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message="Model, record and card, written by reglue",
            delete_patterns=[f"{checkpoints.FOLDER}/*"],
        )
    except Exception as error:  # whatever the hub's client raises: offline, not logged in, refused
        raise UserError(
            f"{name} cannot be written on the Hugging Face hub ({hub_error(error)}); check the connection, log in with "
            "`hf auth login`, or write a folder with `ImageModel.save` and upload it yourself"
        ) from error
    return str(address)
