"""A run as a model of the starter kit: as `reglue export --to reglue` writes it, and smaller still.

    python scripts/starter_kit/share.py RUN flowers --draws-only --sampler adams-bashforth --steps 30

Autoencoder and compressors are stored in float16 too, or, where the model is to draw alone, left out but for the
decoder. Other weights have other hashes, so the record and the card get them.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from tyro.conf import Positional

import reglue
from reglue.encoders.autoencoders import TAEF2_FILES, load_autoencoder
from reglue.encoders.compressors import SPEC_FILE, WEIGHTS_FILE, load_compressor
from reglue.files import read_tensors, to_json, write_tensors, write_text
from reglue.names import StoredPrecision
from reglue.published.sharing import CARD, rounded, save
from reglue.run import AUTOENCODER, COMPRESSORS, RunRecord


@dataclass(frozen=True)
class Share:
    """What is made smaller, and how it draws unless told otherwise."""

    run: Positional[Path]
    out: Positional[Path]
    precision: StoredPrecision = "float16"
    """Of the model's weights."""
    draws_only: bool = False
    """Without compressors and the encoder of TAEF2: it then edits nothing."""
    sampler: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None


def share(options: Share) -> None:
    """Save, then round or remove, and correct the record and the card."""
    model, folder = reglue.load(options.run, device="cpu"), options.out
    chosen = {name: getattr(options, name) for name in ("sampler", "steps", "guidance_scale")}
    sampling = replace(model.record.recipe.sampling, **{name: value for name, value in chosen.items() if value})
    record = replace(model.record, recipe=replace(model.record.recipe, sampling=sampling))
    weights = model.denoiser.state_dict()
    save(folder, record, weights, model.step, model.folder, name=folder.name, precision=options.precision)
    record, autoencoder = RunRecord.read(folder), folder / AUTOENCODER
    compressors = {**record.compressors}
    if options.draws_only:
        (autoencoder / TAEF2_FILES[0]).unlink()
        shutil.rmtree(folder / COMPRESSORS, ignore_errors=True)
    else:
        halve(*autoencoder.glob("*.safetensors"))
        for name in compressors:
            place = folder / COMPRESSORS / name
            network = load_compressor(place)
            network.load_state_dict({key: rounded(v, "float16").to(v.dtype) for key, v in network.state_dict().items()})
            compressors[name] = network.spec()
            halve(place / WEIGHTS_FILE)
            write_text(place / SPEC_FILE, to_json(compressors[name]))
    spec = replace(load_autoencoder(str(autoencoder)).spec, name=record.autoencoder.name)
    replace(record, autoencoder=spec, compressors=compressors).write(folder)
    card, was, now = folder / CARD, record.autoencoder.weights_sha256 or "", spec.weights_sha256 or ""
    card.write_text(card.read_text().replace(was[:12], now[:12]))


def halve(*files: Path) -> None:
    """Store weights in float16."""
    for file in files:
        tensors = read_tensors(file, "export the run again")
        write_tensors(file, {key: rounded(value, "float16") for key, value in tensors.items()})


if __name__ == "__main__":
    share(tyro.cli(Share, description=__doc__))
