"""`reglue import`: a published checkpoint to a run that `reglue sample` and `reglue.load` use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from reglue.config import MODEL_SIZES, ClassToken, LocalSemantics, Recipe, model_size
from reglue.data.labels import read_class_names
from reglue.diffusion.denoiser import DenoiserConfig
from reglue.diffusion.modalities import LATENT, Modality, Normalisation
from reglue.diffusion.paths import PathName
from reglue.encoders.autoencoders import AutoencoderSpec, load_autoencoder
from reglue.encoders.compressors import Compressor
from reglue.encoders.vision import EncoderSpec, load_encoder
from reglue.errors import UserError
from reglue.files import TakesPaths, new_folder
from reglue.locks import writes
from reglue.papers import RECIPES
from reglue.published.compressors import read_official_compressor
from reglue.published.weights import (
    ENCODER_DEPTH,
    PATH_TYPE,
    PREDICTION,
    PUBLISHED_AUTOENCODER,
    PUBLISHED_DECODER,
    VELOCITY,
    Family,
    OfficialModel,
    PublishedFile,
    channels_of,
    import_official,
    read_official,
)
from reglue.run import COMPRESSORS, RunRecord, versions
from reglue.training import checkpoints

PATHS_BY_PUBLISHED_NAME: dict[str, PathName] = {"linear": "linear", "cosine": "cosine", "gvp": "cosine"}


@dataclass(frozen=True)
class ImportRun(TakesPaths):
    """Turn a checkpoint of SiT, REPA, ReDi, REG or REGLUE into a run. Nothing in the file is executed.

    The method is recognised by the shapes of the weights. The run can be sampled, evaluated, shared and exported, but
    its training cannot be continued.
    """

    file: Positional[Path]
    """A .pt, .pth or .safetensors file: weights alone, or {model, ema, …}, of which the averaged weights are used."""
    out: Path
    """Folder of the run: new or empty."""
    compressor: Path | None = None
    """The compressor of the model's local maps: REGLUE's .pth, ReDi's PCA file, or a compressor's folder in a store or
    run. Sampling does not need it."""
    statistics: Path | None = None
    """With --compressor: mean and standard deviation of the features, which REGLUE keeps in a file of their own: .npz,
    or a dict in .npy, .pt or .pkl."""
    autoencoder: str | None = None
    """The autoencoder whose latents the model learned: a name, or a folder in diffusers' layout (ReaLS's too). Default:
    the published sd-vae-ft-mse, decoded by sd-vae-ft-ema, neither of which is needed yet. Checkpoints do not record it,
    so give it if the model has other channels than published."""
    encoder: str | None = None
    """The vision encoder that the model was trained with, for the record. Sampling does not need it."""
    class_names: Path | None = None
    """Text file with the names of the classes, one per line, in the order of the labels. Default: their numbers."""
    heads: int | None = None
    """Attention heads, for models of a width that was not published."""
    resolution: int | tuple[int, int] | None = None
    """Side of the images in pixels, or height and width: for learned position embeddings that are not square."""


@writes()
def import_run(options: ImportRun) -> Path:
    """Import the checkpoint. Returns the run folder, which is written whole or not at all.

    Raises UserError, with what was found and what was expected, for a file that is no such checkpoint, parts that do
    not fit the model, and an output folder that holds other files.
    """
    published = read_official(options.file)
    autoencoder, decoder = chosen_autoencoder(options.autoencoder)
    model = recognised(options, published, autoencoder)
    if options.autoencoder is None:
        refuse_unpublished_channels(options.file, model)
    path = published_path(options.file, published.arguments)
    recipe = recipe_of(model.family, model.config, path)
    factor = autoencoder.downsampling
    resolution = (model.config.grid[0] * factor, model.config.grid[1] * factor)
    encoder = encoder_of(options.encoder, model, resolution)
    compressor = compressor_of(options, model, encoder)
    record = RunRecord(
        recipe=recipe,
        denoiser=replace(model.config, path=path, modalities=with_scales(model, recipe, autoencoder)),
        class_names=class_names(options.class_names, model.config.classes),
        resolution=resolution,
        autoencoder=autoencoder,
        decoder=decoder,
        encoder=encoder,
        compressors={LocalSemantics.modality: compressor.spec()} if compressor else {},
        autoencoder_assumed=options.autoencoder is None,
        origin=options.file.name,
        versions=versions(),
    )
    with new_folder(options.out) as folder:
        record.write(folder)
        checkpoints.save_weights(folder, published.step, model.weights)
        if compressor:
            compressor.save(folder / COMPRESSORS / LocalSemantics.modality)
    learned = ", learned positions" if model.config.learned_positions else ""
    print(
        f"{options.file}: {model.family} {recipe.model} of step {published.step}, "
        f"{resolution[0]}×{resolution[1]} pixels, {model.config.classes} classes{learned}; "
        f"sample it with `reglue sample {options.out} --out SAMPLES`"
    )
    if record.autoencoder_assumed:
        print(
            f"The file does not record its autoencoder: assuming {autoencoder.name}, decoded by {decoder}, as "
            "published. If it was another (ReaLS's, for example), import the file with --autoencoder."
        )
    return options.out


def with_scales(model: OfficialModel, recipe: Recipe, autoencoder: AutoencoderSpec) -> tuple[Modality, ...]:
    """The model's modalities, with the autoencoder's scale and with what the paper drops in training."""
    scaled = {LATENT: Normalisation(autoencoder.shift, autoencoder.scale)}
    dropped = {part.modality: part.dropout for part in recipe.learned_parts}
    return tuple(
        replace(modality, normalisation=scaled.get(modality.name), dropout=dropped[modality.name])
        for modality in model.config.modalities
    )


def chosen_autoencoder(name: str | None) -> tuple[AutoencoderSpec, str | None]:
    """The autoencoder whose latents the model learned, and the name of the one that decodes them if that is another.

    The published ones need not be downloaded; any other is loaded. Raises UserError for an unknown name.
    """
    if name is None:
        return PUBLISHED_AUTOENCODER, PUBLISHED_DECODER
    if name in (PUBLISHED_AUTOENCODER.name, PUBLISHED_DECODER):
        return replace(PUBLISHED_AUTOENCODER, name=name), None
    return load_autoencoder(name).spec, None


def recognised(options: ImportRun, published: PublishedFile, autoencoder: AutoencoderSpec) -> OfficialModel:
    """The model in the file. Raises UserError, naming the file, if there is none."""
    size = options.resolution
    grid = None if size is None else autoencoder.latent_size((size, size) if isinstance(size, int) else size)
    depth = published.arguments.get(ENCODER_DEPTH)
    try:
        return import_official(
            published.weights,
            latent_channels=autoencoder.latent_channels,
            heads=options.heads,
            alignment_depth=depth if isinstance(depth, int) and depth > 0 else None,
            grid=grid,
        )
    except UserError as error:
        raise UserError(f"{options.file}: {error}") from None


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


def recipe_of(family: Family, config: DenoiserConfig, path: PathName) -> Recipe:
    """The paper's recipe, with the sizes and parts of the model."""
    paper = RECIPES[family]
    sizes = (config.depth, config.width, config.heads, config.patch)
    known = (name for name, size in MODEL_SIZES.items() if (size.depth, size.width, size.heads, size.patch) == sizes)
    model = next(known, "{}x{}x{}/{}".format(*sizes))
    local, alignment = paper.local, replace(paper.alignment, weight=0.0)
    if local.present:
        kind, _, _ = local.compressor.partition("-")
        local = replace(local, compressor=f"{kind}-{channels_of(config, LocalSemantics.modality)}")
    if config.alignment_width:
        usual = config.alignment_depth == model_size(model).alignment_depth
        alignment = replace(
            alignment,
            weight=paper.alignment.weight or RECIPES["repa"].alignment.weight,
            after_block=None if usual else config.alignment_depth,
            hidden=config.alignment_hidden,
        )
    return replace(
        paper,
        model=model,
        path=path,
        learn_sigma=config.learn_sigma,
        local=local,
        alignment=alignment,
        # Whatever precision they were trained in, the published codes sample in float32.
        optimisation=replace(paper.optimisation, precision="float32"),
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


def class_names(file: Path | None, count: int) -> tuple[str, ...]:
    """One name per class. Raises UserError if the file has more or fewer names."""
    if file is None:
        return tuple(map(str, range(count)))
    names = read_class_names(file)
    if len(names) != count:
        raise UserError(f"--class-names {file} has {len(names)} names, but the model has {count} classes")
    return names
