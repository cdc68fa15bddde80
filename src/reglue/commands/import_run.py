"""`reglue import`: a published checkpoint to a run that `reglue sample` and `reglue.load` use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reglue.config import MODEL_SIZES, ClassToken, LocalSemantics, Recipe, model_size
from reglue.data.labels import read_class_names
from reglue.diffusion.denoiser import DenoiserConfig
from reglue.diffusion.modalities import LATENT, Modality, Normalisation
from reglue.diffusion.paths import PathName
from reglue.encoders.autoencoders import AutoencoderSpec, load_autoencoder
from reglue.encoders.compressors import Compressor
from reglue.encoders.vision import EncoderSpec, load_encoder
from reglue.errors import UnknownPart, UserError, one_line
from reglue.files import new_folder, parse_json
from reglue.locks import writes
from reglue.options.import_run import ImportRun
from reglue.papers import RECIPES
from reglue.published.compressors import read_official_compressor
from reglue.published.containers import RECORD, PublishedFile, read_official
from reglue.published.families import (
    ENCODER_DEPTH,
    LABEL_DROPOUTS,
    MAP_DROPOUT,
    NUM_CLASSES,
    NUM_HEADS,
    PATH_TYPE,
    PREDICTION,
    VELOCITY,
    Family,
    channels_of,
    evidence_in,
)
from reglue.published.weights import (
    LABELS,
    PUBLISHED_AUTOENCODER,
    PUBLISHED_DECODER,
    OfficialModel,
    import_official,
)
from reglue.run import COMPRESSORS, FILE, RunRecord, versions
from reglue.training import checkpoints

PATHS_BY_PUBLISHED_NAME: dict[str, PathName] = {"linear": "linear", "cosine": "cosine", "gvp": "cosine"}


@writes()
def import_run(options: ImportRun) -> Path:
    """Import the checkpoint. Returns the run folder, which is written whole or not at all.

    Raises UserError, with what was found and what was expected, for a file that is no such checkpoint, parts that do
    not fit the model, and an output folder that holds other files.
    """
    published = read_official(options.file)
    stated = stated_record(options.file, published.arguments)
    autoencoder, decoder = chosen_autoencoder(options.autoencoder, stated)
    model = recognised(options, published, autoencoder, stated)
    if options.autoencoder is None and stated is None:
        refuse_unpublished_channels(options.file, model)
    if stated:
        refuse_other_model(options.file, stated.denoiser, model.config)
    path = published_path(options.file, published.arguments)
    recipe = stated.recipe if stated else recipe_of(model, path, published.arguments)
    factor = autoencoder.downsampling
    resolution = (model.config.grid[0] * factor, model.config.grid[1] * factor)
    encoder = encoder_of(options.encoder, model, resolution)
    compressor = compressor_of(options, model, encoder)
    as_stated = stated.denoiser.modalities if stated and options.autoencoder is None else None
    modalities = as_stated or with_scales(model, recipe, autoencoder)
    record = RunRecord(
        recipe=recipe,
        denoiser=replace(model.config, path=path, modalities=modalities),
        class_names=class_names(options.class_names, model.config.classes, stated),
        resolution=resolution,
        autoencoder=autoencoder,
        decoder=decoder,
        encoder=encoder or (stated.encoder if stated else None),
        compressors={LocalSemantics.modality: compressor.spec()} if compressor else {},
        autoencoder_assumed=stated.autoencoder_assumed if stated else options.autoencoder is None,
        origin=options.file.name,
        start=stated.start if stated else None,
        versions=versions(),
    )
    if is_imported(options.out, record, published.step, model.weights):
        print(f"{options.out} is complete already")
        return options.out
    with new_folder(options.out) as folder:
        record.write(folder)
        checkpoints.save_weights(folder, published.step, model.weights)
        if compressor:
            compressor.save(folder / COMPRESSORS / LocalSemantics.modality)
    announce(options, record, published, model)
    return options.out


def announce(options: ImportRun, record: RunRecord, published: PublishedFile, model: OfficialModel) -> None:
    """Print what was found, what was chosen where the file left a choice, and what was assumed."""
    config, (height, width) = model.config, record.resolution
    classes = f"{config.classes} classes{'' if model.has_null else ' without a null class, so no guidance'}"
    learned = ", learned positions" if config.learned_positions else ""
    print(
        f"{options.file}: {model.family} {record.recipe.model} of step {published.step}, {height}×{width} pixels, "
        f"{classes}{learned}"
    )
    for note in (*published.notes, *model.notes):
        print(note)
    if record.autoencoder_assumed:
        print(
            f"The file does not record its autoencoder: assuming {record.autoencoder.name}, decoded by "
            f"{record.decoder}, as published. If it was another (ReaLS's, for example), import the file with "
            "--autoencoder."
        )


def is_imported(out: Path, record: RunRecord, step: int, weights: dict[str, Tensor]) -> bool:
    """Whether a folder holds just this run already. Raises UserError for a damaged one."""
    if not ((out / FILE).is_file() and RunRecord.read(out) == record and checkpoints.steps(out) == [step]):
        return False
    there = checkpoints.read_weights(checkpoints.find(out) / checkpoints.EMA)
    return there.keys() == weights.keys() and all(torch.equal(there[name], one) for name, one in weights.items())


def stated_record(file: Path, arguments: dict[str, Any]) -> RunRecord | None:
    """The record of the run that `reglue export` wrote the file from; None for a file of others.

    Raises UserError if it is damaged.
    """
    text = arguments.get(RECORD)
    if not isinstance(text, str):
        return None
    try:
        return parse_json(text, RunRecord)
    except UnknownPart as error:
        raise UserError(
            f"{file}: its record of the run names a part that is not here: {error}; import the file that registers it"
        ) from None
    except ValueError as error:
        raise UserError(f"{file}: its record of the run is damaged ({one_line(error)}); export the run again") from None


def refuse_other_model(file: Path, stated: DenoiserConfig, found: DenoiserConfig) -> None:
    """Raise UserError if the weights in a file are not of the model that its record describes."""
    for part in ("depth", "width", "heads", "patch", "grid", "learn_sigma", "classes"):
        said, is_so = getattr(stated, part), getattr(found, part)
        if said != is_so:
            raise UserError(
                f"{file}: its record of the run says {part} {said}, its weights {is_so}; export the run again"
            )
    if stated.shapes() != found.shapes():
        raise UserError(f"{file}: its record of the run has other modalities than its weights; export the run again")


def with_scales(model: OfficialModel, recipe: Recipe, autoencoder: AutoencoderSpec) -> tuple[Modality, ...]:
    """The model's modalities, with the autoencoder's scale and with what the paper drops in training."""
    scaled = {LATENT: Normalisation(autoencoder.shift, autoencoder.scale)}
    dropped = {part.modality: part.dropout for part in recipe.learned_parts}
    return tuple(
        replace(modality, normalisation=scaled.get(modality.name), dropout=dropped[modality.name])
        for modality in model.config.modalities
    )


def chosen_autoencoder(name: str | None, stated: RunRecord | None) -> tuple[AutoencoderSpec, str | None]:
    """The autoencoder whose latents the model learned, and the name of the one that decodes them if that is another.

    The published ones need not be downloaded, nor those that the file states; any other is loaded. Raises UserError for
    an unknown name.
    """
    if name is None:
        return (stated.autoencoder, stated.decoder) if stated else (PUBLISHED_AUTOENCODER, PUBLISHED_DECODER)
    if name in (PUBLISHED_AUTOENCODER.name, PUBLISHED_DECODER):
        return replace(PUBLISHED_AUTOENCODER, name=name), None
    return load_autoencoder(name).spec, None


def recognised(
    options: ImportRun, published: PublishedFile, autoencoder: AutoencoderSpec, stated: RunRecord | None
) -> OfficialModel:
    """The model in the file. Raises UserError, naming the file, if there is none."""
    size, heads = options.resolution, options.heads
    grid = None if size is None else autoencoder.latent_size((size, size) if isinstance(size, int) else size)
    if stated:
        grid, heads = grid or stated.denoiser.grid, heads or stated.denoiser.heads
    depth, kept = (published.arguments.get(name) for name in (ENCODER_DEPTH, NUM_HEADS))
    if heads is None and isinstance(kept, int) and kept > 0:
        heads = kept
    try:
        return import_official(
            published.weights,
            latent_channels=autoencoder.latent_channels,
            heads=heads,
            alignment_depth=depth if isinstance(depth, int) and depth > 0 else None,
            grid=grid,
            classes=stated_classes(options, published),
            evidence=evidence_in(options.file, published.arguments, options.family),
        )
    except UserError as error:
        raise UserError(f"{options.file}: {error}") from None


def stated_classes(options: ImportRun, published: PublishedFile) -> int | None:
    """How many classes the model knows, besides none, as far as the file's options or the names of the classes tell."""
    arguments = published.arguments
    if isinstance(count := arguments.get(NUM_CLASSES), int):
        return count
    if any(name in arguments and not arguments[name] for name in LABEL_DROPOUTS) and LABELS in published.weights:
        return len(published.weights[LABELS])
    return len(read_class_names(options.class_names)) if options.class_names else None


def refuse_unpublished_channels(file: Path, model: OfficialModel) -> None:
    """Raise UserError if the local map has other channels than published, unless the autoencoder is given.

    A model of 16 channels may have learned 16 latent channels, or 4 and a local map of 12: the shapes do not tell.
    """
    local, latents, found = RECIPES[model.family].local, model.config.modalities[0].channels, model.config.channels
    published = int(local.compressor.rpartition("-")[2]) if local.present else 0
    if found - latents != published:
        raise UserError(
            f"{file} has {found} channels, but published {model.family} models have {latents + published}: name the "
            f"autoencoder whose latents it learned with --autoencoder ({PUBLISHED_AUTOENCODER.name}, if {latents} "
            "channels are latents and the others a local map)"
        )


def published_path(file: Path, arguments: dict[str, Any]) -> PathName:
    """The path that a model was trained on, linear if its file does not record it.

    Raises UserError for an unknown path, and for a model that does not predict velocities.
    """
    prediction, path = arguments.get(PREDICTION, VELOCITY[0]), str(arguments.get(PATH_TYPE, "linear"))
    if prediction not in VELOCITY:
        raise UserError(f"{file} predicts {prediction}; only models that predict velocities can be imported")
    if path.lower() not in PATHS_BY_PUBLISHED_NAME:
        raise UserError(
            f"{file} was trained on the path {path}; choose a model trained on {', '.join(PATHS_BY_PUBLISHED_NAME)}"
        )
    return PATHS_BY_PUBLISHED_NAME[path.lower()]


def map_dropout(family: Family, arguments: dict[str, Any]) -> float:
    """The share of the training without the map, as the file records it; ReDi's 0.2 where it does not.

    Without that, a published model could not be asked for representation guidance, which it may have been made for.
    """
    share = arguments.get(MAP_DROPOUT, 0.2 if family == "redi" else 0.0)
    return float(share) if isinstance(share, int | float) and 0 <= share < 1 else 0.0


def recipe_of(model: OfficialModel, path: PathName, arguments: dict[str, Any]) -> Recipe:
    """The paper's recipe, with the sizes and parts of the model, and what the options of its training say."""
    paper, config = RECIPES[model.family], model.config
    sizes = (config.depth, config.width, config.heads, config.patch)
    known = (name for name, size in MODEL_SIZES.items() if (size.depth, size.width, size.heads, size.patch) == sizes)
    size = next(known, "{}x{}x{}/{}".format(*sizes))
    local, alignment = paper.local, replace(paper.alignment, weight=0.0)
    if local.present:
        kind, _, _ = local.compressor.partition("-")
        codes = f"{kind}-{channels_of(config, LocalSemantics.modality)}"
        local = replace(local, compressor=codes, dropout=map_dropout(model.family, arguments))
    if config.alignment_width:
        usual = config.alignment_depth == model_size(size).alignment_depth
        alignment = replace(
            alignment,
            weight=paper.alignment.weight or RECIPES["repa"].alignment.weight,
            after_block=None if usual else config.alignment_depth,
            hidden=config.alignment_hidden,
        )
    return replace(
        paper,
        model=size,
        backbone=config.backbone,
        blocks=config.blocks,
        path=path,
        learn_sigma=config.learn_sigma,
        local=local,
        alignment=alignment,
        optimisation=replace(
            paper.optimisation,
            precision="float32",
            label_dropout=paper.optimisation.label_dropout if model.has_null else 0.0,
        ),
        # Whatever they were trained in, the published codes sample in float32.
        sampling=replace(paper.sampling, precision="float32"),
    )


def encoder_of(name: str | None, model: OfficialModel, resolution: tuple[int, int]) -> EncoderSpec | None:
    """The vision encoder, with the layers that the method uses. Raises UserError if its width is not the model's."""
    if name is None:
        return None
    spec = load_encoder(name, resolution).spec
    for what, width in (
        ("class token", channels_of(model.config, ClassToken.modality)),
        ("alignment", model.config.alignment_width),
    ):
        if width not in (0, spec.width):
            raise UserError(f"--encoder {name} is {spec.width} wide, but the model's {what} is {width} wide")
    # REGLUE compresses the last four layers, the others use the last one alone.
    return spec if model.family == "reglue" else replace(spec, layers=spec.layers[-1:])


def compressor_of(options: ImportRun, model: OfficialModel, encoder: EncoderSpec | None) -> Compressor | None:
    """The compressor that goes with the model. Raises UserError if its channels are not the model's."""
    if options.compressor is None:
        if options.statistics is not None:
            raise UserError("--statistics belong to a compressor: give it too, with --compressor")
        return None
    channels = channels_of(model.config, LocalSemantics.modality)
    if not channels:
        raise UserError(f"--compressor {options.compressor}: a {model.family} model has no local map; leave it out")
    compressor = read_official_compressor(options.compressor, options.statistics, channels)
    expected = compressor.spec().channels_in
    if encoder is not None:
        given = encoder.width * len(compressor.layers or encoder.layers)
        if given != expected:
            raise UserError(
                f"--compressor {options.compressor} takes {expected} features, but --encoder {options.encoder} gives "
                f"{given}"
            )
    return compressor


def class_names(file: Path | None, count: int, stated: RunRecord | None) -> tuple[str, ...]:
    """One name per class. Raises UserError if the file has more or fewer names."""
    if file is None:
        return stated.class_names if stated else tuple(map(str, range(count)))
    names = read_class_names(file)
    if len(names) != count:
        raise UserError(f"--class-names {file} has {len(names)} names, but the model has {count} classes")
    return names
