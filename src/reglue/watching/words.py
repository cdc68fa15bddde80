"""Recipes, sizes and times in words."""

from __future__ import annotations

from collections.abc import Sequence

from reglue.config import OptimiserConfig, Recipe
from reglue.data.manifest import compressor_of, holds_codes
from reglue.diffusion.specs import DenoiserConfig, Modality
from reglue.run import RunRecord
from reglue.sampling import Sampling

LISTED = 12
"""Names that are listed before the rest is counted."""


def counted(count: int, what: str, many: str = "") -> str:
    """`1 class`, `1,000 classes`."""
    return f"{count:,} {what if count == 1 else many or what + 's'}"


def listed(names: Sequence[str], most: int = LISTED) -> str:
    """Names with commas, the last ones counted where there are many."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest:,} more" if rest > 0 else "")


def size(count: float) -> str:
    """A number of bytes: `97 MB`."""
    units = ["TB", "GB", "MB", "kB", "B"]
    while count >= 999.5 and len(units) > 1:
        count, _ = count / 1000, units.pop()
    unit = units[-1]
    return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"


def duration(seconds: float) -> str:
    """`1.5 s`, `4 min 01 s`, `2 h 03 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def pixels(resolution: Sequence[int]) -> str:
    """Height and width of images."""
    height, width = resolution
    return f"{height}×{width} pixels"


def recipe(record: RunRecord, parameters: int = 0) -> dict[str, str]:
    """What a run learns, how, and how it is sampled: a text for each."""
    config, ours = record.denoiser, record.recipe
    denoiser = (
        f"{ours.name}, {counted(config.depth, 'block')} of width {config.width} with {counted(config.heads, 'head')} "
        f"({ours.model}{'' if config.backbone == 'sit' else ', ' + config.backbone}) on patches of "
        f"{config.patch}×{config.patch} latent pixels"
    )
    if parameters:
        denoiser += f"; {parameters / 1e6:.1f} million parameters"
    said = {
        "recipe": denoiser,
        "images": pixels(record.resolution)
        + (f" in {counted(len(record.class_names), 'class', 'classes')}" if record.class_names else ", no classes"),
        "learns": "; ".join(_learned(ours, config, modality) for modality in config.modalities),
    }
    if ours.alignment.present:
        said["aligned"] = (
            f"with the vision encoder after block {config.alignment_depth} (weight {ours.alignment.weight:g})"
        )
    if record.origin is None:
        said["trained"] = optimisation(ours.optimisation)
    return {**said, "sampled": sampling(ours.sampling)}


def _learned(recipe: Recipe, config: DenoiserConfig, modality: Modality) -> str:
    part = next((part for part in recipe.learned_parts if part.modality == modality.name), None)
    shape = "×".join(map(str, config.shapes()[modality.name]))
    codes = f", codes of {compressor_of(modality.column)}" if holds_codes(modality.column) else ""
    return f"{modality.name} {shape}{codes}" + (f" (weight {part.weight:g})" if part else "")


def optimisation(config: OptimiserConfig) -> str:
    """How a network is trained."""
    falls = ", falling as a cosine" if config.decay == "cosine" else ""
    warmup = f" after a warm-up of {counted(config.warmup, 'step')}" if config.warmup else ""
    return (
        f"{counted(config.steps, 'step')} of {counted(config.batch_size, 'image')}, AdamW at "
        f"{config.learning_rate:g}{warmup}{falls}"
    )


def sampling(options: Sampling) -> str:
    """How images are drawn."""
    lowest, highest = options.guidance_interval
    while_ = "" if (lowest, highest) == (0, 1) else f" from t = {highest:g} to {lowest:g}"
    guided = f"guidance {options.guidance_scale:g}{while_}" if options.guidance_scale != 1 else "no guidance"
    return f"{options.sampler}, {counted(options.steps, 'step')}, {guided}"


def provenance(record: RunRecord) -> dict[str, str]:
    """What a run was made from."""
    said: dict[str, str] = {}
    if record.store:
        said["store"] = record.store
    if record.store_hash:
        said["data"] = f"SHA-256 {record.store_hash}"
    said["autoencoder"] = _network(record.autoencoder.name, record.autoencoder.weights_sha256)
    if record.decoder:
        said["decoder"] = record.decoder
    if record.encoder:
        said["vision encoder"] = _network(record.encoder.name, record.encoder.weights_sha256)
    for modality, spec in record.compressors.items():
        said[f"compressor of {modality}"] = _network(
            f"{spec.kind}, {spec.channels_in} to {counted(spec.channels, 'channel')}", spec.weights_sha256
        )
    if record.start:
        start = record.start
        said["began with"] = _network(f"{start.run}, step {start.step:,} ({start.weights})", start.sha256)
    if record.origin:
        said["imported from"] = record.origin
    if record.seed is not None:
        said["seed"] = str(record.seed)
    said["versions"] = versions(record.versions)
    return said


def versions(found: dict[str, str]) -> str:
    """Of libraries, on one line."""
    return ", ".join(f"{name} {number}" for name, number in found.items())


def _network(name: str, sha256: str | None) -> str:
    return f"{name} (SHA-256 {sha256[:12]})" if sha256 else name
