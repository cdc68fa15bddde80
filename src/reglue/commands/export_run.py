"""`reglue export`: a run for other programs, as a file of weights or as a folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from reglue import graphs
from reglue.config import Recipe
from reglue.errors import UserError, option
from reglue.files import new_folder, refuse_filled, replacing, save_tensors, to_json
from reglue.locks import writes
from reglue.options.export_run import ExportRun, Target
from reglue.pipeline import ImageModel, load
from reglue.portable import INDEX, NODES, template
from reglue.published import sharing
from reglue.published.containers import RECORD, STEP
from reglue.published.families import (
    ENCODER_DEPTH,
    FAMILY,
    NUM_CLASSES,
    PATH_TYPE,
    PREDICTION,
    VELOCITY,
    Family,
    family_of,
    refuse_unpublished,
)
from reglue.published.weights import export_official
from reglue.run import RunRecord, find_run
from reglue.training import checkpoints

ENDINGS = (".safetensors", ".pt", ".pth")


@writes()
def export_run(options: ExportRun) -> Path:
    """Export the run. Returns the file or folder, which is written whole or not at all.

    Raises UserError for a run that the published class cannot be built for, and for another kind of file.
    """
    if options.to != "published":
        return export_folder(options)
    if options.out.suffix not in ENDINGS:
        raise UserError(f"--out {options.out}: choose a file that ends in {', '.join(ENDINGS)}")
    folder = find_run(options.run)
    record = RunRecord.read(folder)
    checkpoint = checkpoints.find(folder, options.step)
    family = family_of(record.denoiser)
    refuse_own_parts(record.recipe, family)
    refuse_unpublished(record.denoiser)

    def published(file: Path) -> dict[str, Tensor]:
        weights = checkpoints.read_weights(file)
        official = export_official(family, record.denoiser, weights, has_null=record.has_null_class)
        return {key: value.contiguous() for key, value in official.items()}

    asked = published(checkpoints.weights_file(checkpoint, options.weights, option("weights")))
    step, arguments = int(checkpoint.name), arguments_of(record, family)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(options.out) as beside:
        if options.out.suffix == ".safetensors":
            save_tensors(beside, asked, {STEP: str(step)} | {name: str(value) for name, value in arguments.items()})
        else:
            # An imported or shared run has the averaged weights alone.
            trained = checkpoint / checkpoints.MODEL
            others = published(trained) if trained.is_file() else asked
            torch.save({"model": others, "ema": asked, "args": arguments, "steps": step}, beside)
    print(f"{options.out}: {family} {record.recipe.model} of step {step}")
    return options.out


def export_folder(options: ExportRun) -> Path:
    """Write the run as a folder for another program, which stays if it is there just so. Returns it.

    Raises UserError if the folder holds other files, what is needed is not installed, or the run cannot be told so.
    """
    mark, fill = FOLDERS[options.to]
    if not (options.out / mark).is_file():
        refuse_filled(options.out)
    for package in graphs.FORMATS[options.to].packages if options.to in graphs.FORMATS else ():
        graphs.needed(package)
    model = load(options.run, step=options.step, device="cpu", encoder=options.encoder)
    if model.is_graph:
        raise UserError(f"{options.run} was exported to ONNX already; export the run that it was made of")
    with new_folder(options.out, again=True) as beside:
        said = fill(model, beside, options)
    print("\n".join(said))
    return options.out


def write_graphs(model: ImageModel, folder: Path, options: ExportRun) -> list[str]:
    """Write the run's networks as graphs. Returns what there is to say."""
    assert options.to in graphs.FORMATS
    assert options.precision != "float8"
    encoder, said = None, list[str]()
    try:
        encoder = model.image_encoder()
    except UserError as error:
        if options.encoder:
            raise
        said.append(f"no graph encodes images: {error}")
    record = sharing.without_places(model.record)
    record.write(folder)
    parts = model.denoiser, model.autoencoder, encoder, model.step, model.default_sampling
    described = graphs.write(folder, record, *parts, options.to, options.precision, options.batch)
    return [
        *said,
        *(f"{options.out / g.file}: {g.bytes / 1e6:.1f} MB, {g.apart}" for g in described.graphs),
    ]


def arguments_of(record: RunRecord, family: Family) -> dict[str, str | int]:
    """What the weights leave open: under the names of the published options, and the whole record for `reglue import`.

    What was trained on and from stays here, but for names.
    """
    shared = replace(sharing.without_places(record), autoencoder=record.autoencoder, store=None)
    arguments: dict[str, str | int] = {FAMILY: family, NUM_CLASSES: record.denoiser.classes, RECORD: to_json(shared)}
    if record.denoiser.prediction == VELOCITY[1]:
        arguments |= {PREDICTION: VELOCITY[0], PATH_TYPE: record.recipe.path}
    if record.denoiser.alignment_depth:
        arguments[ENCODER_DEPTH] = record.denoiser.alignment_depth
    return arguments


def refuse_own_parts(recipe: Recipe, family: Family) -> None:
    """Raise UserError for what the published files cannot hold: a modality that is scaled by the store's statistics,
    which LightningDiT's and SFD's code alone know, from a file beside the weights; and codes of the class token."""
    for part in recipe.learned_parts:
        if part.unit_variance and family not in ("lightningdit", "sfd"):
            raise UserError(
                f"the published code has no {option(part.prefix + 'unit_variance')}: the file would lose its "
                "statistics, so this run cannot be exported"
            )
    if recipe.class_token.present and recipe.class_token.compressor is not None:
        raise UserError(
            f"the published code has no {option('class_token.compressor')}: it learns the class token itself, so this "
            "run cannot be exported"
        )


def write_pipeline(model: ImageModel, folder: Path, options: ExportRun) -> list[str]:
    """Write the run as a pipeline of diffusers. Returns what there is to say.

    Raises UserError if diffusers has no class for the autoencoder.
    """
    from reglue.portable.diffusers import RegluePipeline  # It imports all of diffusers' pipelines.

    RegluePipeline.of(model).save_pretrained(folder)
    return [f"{options.out}: DiffusionPipeline.from_pretrained({str(options.out)!r}, trust_remote_code=True) loads it"]


def write_run(model: ImageModel, folder: Path, options: ExportRun) -> list[str]:
    """Write the run as one to share. Returns what there is to say."""
    assert options.precision != "int8"
    weights, name = model.denoiser.state_dict(), options.out.resolve().name
    sharing.fill(folder, model.record, weights, model.step, model.folder, name=name, precision=options.precision)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return [f"{options.out}: {size / 1e6:.1f} MB; {options.out / sharing.CARD} says what it is, reglue sample takes it"]


def write_nodes(model: ImageModel, folder: Path, options: ExportRun) -> list[str]:
    """Write the run, and what makes its folder a pack of nodes for ComfyUI. Returns what there is to say."""
    record, name = model.record, options.out.resolve().name
    sharing.fill(folder, record, model.denoiser.state_dict(), model.step, model.folder, name=name)
    (folder / sharing.CARD).rename(folder / "MODEL.md")
    said = {
        "name": name,
        "modalities": ", ".join(modality.name for modality in record.denoiser.modalities),
        "encoder": record.encoder.name if record.encoder else "it has none",
        "classes": ", ".join(record.class_names) or "none",
    }
    (folder / sharing.CARD).write_text(template("nodes.md").format(**said), encoding="utf-8")
    (folder / NODES).write_text(template("nodes.py"), encoding="utf-8")
    (folder / "workflow.json").write_text(template("workflow.json").replace("NAME", name), encoding="utf-8")
    (folder / "requirements.txt").write_text("reglue\n")
    return [f"{options.out}: move it into ComfyUI's custom_nodes; {options.out / sharing.CARD} says what is there"]


FOLDERS: dict[Target, tuple[str, Callable[[ImageModel, Path, ExportRun], list[str]]]] = {
    "reglue": (sharing.CARD, write_run),
    "onnx": (graphs.DESCRIPTION, write_graphs),
    "torch": (graphs.DESCRIPTION, write_graphs),
    "diffusers": (INDEX, write_pipeline),
    "comfyui": (NODES, write_nodes),
}
"""Target → a file that its folder has, and what fills it."""
