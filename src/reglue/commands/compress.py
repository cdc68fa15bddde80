"""`reglue compress`: fit a compressor to a store's features or class tokens and add its codes to the store."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from reglue.config import OptimiserConfig
from reglue.data.manifest import compressor_of, value_of
from reglue.data.picture_writer import write_picture
from reglue.data.pictures import colours_of, enlarge, image_grid
from reglue.data.store import Store
from reglue.data.store_writer import add_codes
from reglue.encoders.compressors import (
    LEARNED,
    Compressor,
    CompressorSpec,
    LearnedCompressor,
    PcaCompressor,
    load_compressor,
)
from reglue.errors import UserError
from reglue.files import read_json, write_text
from reglue.locks import writes
from reglue.options.compress import Compress
from reglue.progress import Bar
from reglue.published.compressors import read_compressor
from reglue.seeds import generator, normals, permutation
from reglue.training import checkpoints, distributed
from reglue.training.compressors import Source, measure
from reglue.training.loop import Task, fit
from reglue.training.tracking import JsonLines

_order = lru_cache(maxsize=2)(permutation)  # A thread that reads ahead is in two epochs at most.
SHOWN = 8
"""Images in the picture of the codes."""
LEAST_PATIENCE = 100
"""Steps: after fewer, averages of batch normalisation still follow the weights, and small stores have short epochs."""
OVERFITTED = 1.05
"""Error of held-out images after the last epoch, as a multiple of the least, from which it is worth a word."""


@writes("store")
def compress(options: Compress) -> Store:
    """Fit a compressor and write its codes. Raises UserError for anything that the user can fix."""
    device = distributed.alone("compress", options.device)
    fitted = read_fitted(options)
    if fitted:
        spec = fitted.spec()
        options = replace(options, kind=spec.kind, channels=spec.channels, column=spec.column)
    store = Store.open(options.store, to_be_replaced=options.codes)
    name = compressor_of(options.codes)
    folder = store.folder / "compressors" / name
    if options.column not in store.manifest.columns:
        what, remedy = {"features": ("features", "--features"), "cls": ("class tokens", "--encoder")}[options.column]
        raise UserError(f"{store.folder} has no {what} to compress; prepare a store with {remedy}")
    source = _source(options, store, fitted)
    if fitted and len(fitted.mean) != source.width:
        raise UserError(
            f"--fitted {options.fitted} takes {len(fitted.mean)} channels, but {store.folder} has {source.width}; "
            "prepare it with the same encoder and --layers"
        )
    if len(store.originals) < 2:
        raise UserError(f"{store.folder} has a single image; a compressor needs two at least, one to be measured on")
    fits = _is_the_one(folder, store.manifest.compressors.get(name))
    _same_options_as_before(folder, options.decisive(fitted), begun=fits)
    if fits and store.has_whole(options.codes):
        # What the process left, or left out, if it died before it could.
        shutil.rmtree(folder / checkpoints.FOLDER, ignore_errors=True)
        if options.column == "features" and not (folder / "codes.png").is_file():
            _draw_codes(store, options.codes, folder / "codes.png")
        print(f"{store.folder} has compressor {name} already")
        return store

    training, held_out = _split(options, store)
    statistics = store.manifest.statistics[options.column]
    mean, std = (torch.tensor(each[source.channels], device=device) for each in (statistics.mean, statistics.std))
    std = torch.where(std > 1e-6, std, 1.0)  # A channel that never changes stays 0 instead of becoming NaN.
    if fits:  # Its codes were damaged.
        compressor = load_compressor(folder, f"delete {folder} and run it again").to(device)
    elif fitted:
        compressor = fitted.to(device)
    elif options.kind == "pca":
        compressor = _fit_pca(options, source, folder, training, held_out, mean, std)
    else:
        compressor = _train(options, source, folder, training, held_out, mean, std)
    compressor.column, compressor.layers = options.column, source.layers
    spec = compressor.save(folder)
    store = add_codes(store, options.compressor_name, spec, _codes(source, compressor, device))
    if options.column == "features":
        _draw_codes(store, options.codes, folder / "codes.png")
    shutil.rmtree(folder / checkpoints.FOLDER, ignore_errors=True)
    return store


def read_fitted(options: Compress) -> Compressor | None:
    """The compressor of --fitted. Raises UserError for a file or folder that is none."""
    file = options.fitted
    return read_compressor(file, options.statistics, components=options.channels) if file else None


def _is_the_one(folder: Path, made: CompressorSpec | None) -> bool:
    """Whether the compressor that made a store's codes is still in its folder."""
    try:
        return made is not None and load_compressor(folder).spec() == made
    except UserError:
        return False


def _source(options: Compress, store: Store, fitted: Compressor | None) -> Source:
    """What the options ask for. Raises UserError for layers that are not there, or not those of `fitted`."""
    encoder = store.manifest.encoder
    assert encoder is not None
    if options.column == "cls":
        return Source(store, "cls", None, slice(0, encoder.width))
    last = (encoder.depth - 1,)
    asked = last if options.layers == "last" else options.layers
    known = fitted.layers if fitted else None
    if asked and known and asked != known:
        raise UserError(f"--fitted {options.fitted} takes layers {list(known)}: leave out --layers")
    layers = asked or known or encoder.layers
    try:
        return Source(store, "features", layers, encoder.channels_of(layers))
    except ValueError as error:
        if not asked:
            raise UserError(
                f"--fitted {options.fitted} takes layers {list(layers)}, but {store.folder} holds "
                f"{list(encoder.layers)}; prepare it with the same encoder and --layers"
            ) from error
        raise UserError(
            f"--layers: {error} of {store.folder}; choose from these, or prepare the store again"
        ) from error


def _split(options: Compress, store: Store) -> tuple[Tensor, Tensor]:
    """Ascending rows for training and for validation, at least one each. A mirror image stays with its original."""
    originals = store.originals
    images = len(originals)
    order = permutation(options.seed, "compressor validation", 0, images)
    held_out = torch.zeros(images, dtype=torch.bool)
    held_out[order[: min(max(1, round(options.validation * images)), images - 1)]] = True
    image_of_row = torch.searchsorted(originals, torch.arange(len(store)), right=True) - 1  # The last one up to there.
    is_held_out = held_out[image_of_row]
    return (~is_held_out).nonzero().flatten(), is_held_out.nonzero().flatten()


def _same_options_as_before(folder: Path, asked: dict[str, Any], begun: bool) -> None:
    """Refuse to continue, or to take for the same, what was begun with other options."""
    asked = json.loads(json.dumps(asked))  # As it will be read back: tuples are lists there.
    path = folder / "options.json"
    begun = begun or bool(checkpoints.steps(folder))
    if not (begun and path.is_file()):
        write_text(path, json.dumps(asked, indent=1))
        return
    before = read_json(path, dict[str, Any], f"delete {folder} and compress again")
    for option in sorted(before.keys() | asked.keys()):
        if before.get(option) != asked.get(option):
            raise UserError(
                f"{folder} was made with {option.replace('_', '-')} {before.get(option)}, not {asked.get(option)}; "
                "choose another --name, use the same options as before, or delete that folder"
            )


def _fit_pca(
    options: Compress, source: Source, folder: Path, training: Tensor, held_out: Tensor, mean: Tensor, std: Tensor
) -> Compressor:
    features = _scan(source, training, "principal components")
    compressor = PcaCompressor.fit(features, mean, std, options.channels)
    trained, validation = (measure(compressor, source, rows) for rows in (training, held_out))
    figures = {"train_mse": trained.mse, "validation_mse": validation.mse, "explained_variance": validation.explained}
    JsonLines(folder, after_step=-1).log(0, figures)
    print(f"{options.compressor_name}: {validation.explained:.1%} of the variance of held-out features explained")
    return compressor


class Rows(NamedTuple):
    """A part of a batch: the epoch, rows (n,) of the store and their values (n, width, h, w)."""

    epoch: int
    rows: Tensor
    values: Tensor


class CompressorTask(Task[Rows]):
    """REGLUE's training: MSE on standardised features, Adam, and a cosine longer than what is used of it.

    Unlike REGLUE's it ends early where it over-fits (`--patience`).

    The loss of a variational compressor is MSE + kl_weight·KL (arXiv 2512.16636 does not say how its KL is reduced;
    this is latent diffusion's convention, arXiv 2112.10752). An epoch drops its incomplete last batch: the next one has
    other images there.
    """

    remedy = "choose a lower --learning-rate"
    shown = ("validation_mse", "explained_variance")

    def __init__(
        self, compressor: LearnedCompressor, source: Source, training: Tensor, held_out: Tensor, options: Compress
    ) -> None:
        """`training` and `held_out` are ascending rows."""
        self.name, self.options = options.compressor_name, options
        self.compressor, self.source, self.training, self.held_out = compressor.train(), source, training, held_out
        self.batch_size = min(options.batch_size or min(4096, max(16, len(training) // 64)), len(training))
        self.steps_per_epoch = len(training) // self.batch_size
        optimisation = OptimiserConfig(steps=options.epochs * self.steps_per_epoch, batch_size=self.batch_size)
        optimiser = torch.optim.Adam(compressor.parameters(), lr=options.learning_rate)
        self.patience = max(options.patience, -(-LEAST_PATIENCE // self.steps_per_epoch)) if options.patience else None
        self.errors = torch.zeros(options.epochs, dtype=torch.float64)
        """Of held-out images after each epoch, as far as it has come."""
        self.best = {name: value.clone() for name, value in compressor.state_dict().items()}
        kept = {**self.best, "errors": self.errors}  # In checkpoints, in the place of averages.
        super().__init__(optimisation, compressor.mean.device, options.micro_batch, compressor, optimiser, ema=kept)

    def read(self, positions: range) -> Rows:
        """See `Task`."""
        epoch, first = divmod(positions.start, self.steps_per_epoch * self.batch_size)
        order = _order(self.options.seed, "compressor order", epoch, len(self.training))
        rows = self.training[order[first : first + len(positions)]]
        return Rows(epoch, rows, self.source.read(rows))

    def backward(self, batch: Rows, step: int, last_part: bool) -> dict[str, Tensor]:
        """See `Task`."""
        compressor = self.compressor
        features = compressor.standardise(batch.values.to(self.device))
        terms: dict[str, Tensor] = {}
        if compressor.variational:
            posterior = compressor.posterior(features)
            code = posterior.draw(_noise(self.options, batch.epoch, batch.rows, posterior.mean))
            terms["train_kl"] = posterior.divergence().mean()
        else:
            code = compressor.compress(features)
        loss = terms["train_mse"] = F.mse_loss(compressor.expand(code), features)
        if compressor.variational:
            loss = loss + self.options.kl_weight * terms["train_kl"]
        (loss * (len(features) / self.batch_size)).backward()
        return terms

    def before_update(self, step: int) -> dict[str, Tensor]:
        """See `Task`: nothing is clipped."""
        return {}

    def learning_rate(self, step: int) -> float:
        """See `Task`: constant within an epoch."""
        options, epoch = self.options, step // self.steps_per_epoch
        cosine = (1 + math.cos(math.pi * min(1.0, epoch / options.cosine_epochs))) / 2
        return options.final_learning_rate + (options.learning_rate - options.final_learning_rate) * cosine

    def line(self, step: int, values: dict[str, float]) -> dict[str, Any]:
        """See `Task`: an epoch's figures, with those of the images held out."""
        self.compressor.eval()
        validation = measure(self.compressor, self.source, self.held_out)
        self.compressor.train()
        trained = {name: values[name] for name in ("train_mse", "train_kl") if name in values}
        figures = {"validation_mse": validation.mse, "explained_variance": validation.explained}
        epoch = step // self.steps_per_epoch
        self.errors[epoch - 1] = validation.mse
        if self.best_epoch(epoch) == epoch:
            for name, value in self.compressor.state_dict().items():
                self.best[name].copy_(value)
        return {"epoch": epoch, **trained, **figures}

    def check(self, step: int, saved: int | None) -> None:
        """See `Task`."""
        epoch = step // self.steps_per_epoch
        if not self.errors[epoch - 1].isfinite():
            raise UserError(f"the error of held-out images is not finite after epoch {epoch}; {self.remedy}")

    def ended(self, step: int) -> bool:
        """See `Task`: after epochs none of which was better than one before."""
        epoch, rest = divmod(step, self.steps_per_epoch)
        return epoch > 0 and not rest and self.patience is not None and epoch - self.best_epoch(epoch) >= self.patience

    def best_epoch(self, epoch: int) -> int:
        """The first of those with the least error so far."""
        return 1 + int(self.errors[:epoch].argmin())

    def keep(self, epoch: int) -> str:
        """Put the weights that are kept after the last epoch into the compressor. Returns a line about them."""
        best = self.best_epoch(epoch)
        least, last = self.errors[[best - 1, epoch - 1]].tolist()
        if self.ended(epoch * self.steps_per_epoch):
            self.compressor.load_state_dict(self.best)
            self.compressor.epoch = best
            return (
                f"stopped after epoch {epoch} of {self.options.epochs}: the error of held-out images was least after "
                f"epoch {best}, whose weights are kept ({least:.4g}, not {last:.4g})"
            )
        self.compressor.epoch = epoch
        too_many = f" (it was {least:.4g} after epoch {best}: it over-fits)" if last > OVERFITTED * least else ""
        return f"{epoch} epochs, error of held-out images {last:.4g}{too_many}"


def _train(
    options: Compress, source: Source, folder: Path, training: Tensor, held_out: Tensor, mean: Tensor, std: Tensor
) -> Compressor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(generator(options.seed, "compressor weights").integers(2**63)))
        architecture = LEARNED[options.kind]
        sizes = (len(mean), options.hidden, options.channels)
        compressor = architecture(*sizes, mean, std, variational=options.kl_weight > 0).to(mean.device)
    task = CompressorTask(compressor, source, training, held_out, options)
    epoch = task.steps_per_epoch
    fit(task, folder, log_every=epoch, checkpoint_every=epoch, keep=1, workers=1)
    print(f"{options.compressor_name}: {task.keep(checkpoints.steps(folder)[-1] // epoch)}")
    return compressor.eval()


def _noise(options: Compress, epoch: int, rows: Tensor, like: Tensor) -> Tensor:
    """Standard normal noise for the codes of images: a function of seed, epoch and row."""
    generators = [generator(options.seed, "compressor noise", epoch, row) for row in rows.tolist()]
    return normals(generators, {"code": like.shape[1:]})["code"].to(like.device)


def _scan(source: Source, rows: Tensor, what: str) -> Iterator[Tensor]:
    """What is compressed of ascending rows as maps, a few images at a time."""
    with Bar(total=len(rows), desc=what, unit="image") as progress:
        for part in source.scan(rows):
            yield part
            progress.update(len(part))


@torch.inference_mode()
def _codes(source: Source, compressor: Compressor, device: torch.device) -> Iterator[Tensor]:
    """The codes of every shard, in the precision of the store's latents."""
    store, column = source.store, source.column
    dtype = getattr(torch, store.manifest.latent_dtype)
    parts = _scan(source, torch.arange(len(store)), "codes")
    for shard in store.manifest.columns[column].shards:
        codes: list[Tensor] = []
        while sum(map(len, codes)) < shard.rows:
            code = compressor.encode(next(parts).to(device)).to("cpu", dtype)
            codes.append(code if column == "features" else code.flatten(1))
        yield torch.cat(codes) if codes else torch.empty(0)


def _draw_codes(store: Store, column: str, path: Path) -> None:
    """A picture of a few images over their codes as colours; of the codes alone where the images have moved away."""
    rows = store.originals
    rows = rows[torch.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).long()]
    codes = store.read(column, rows)[value_of(column)]
    colours = [*enlarge(colours_of(codes), store.manifest.source.resolution)]
    images = [crop.permute(1, 2, 0).numpy() for crop in _crops(store, rows)]
    shown = [*images, *colours] if len(images) == len(colours) else colours
    write_picture(path, Image.fromarray(image_grid(np.stack(shown), columns=len(colours))))


def _crops(store: Store, rows: Tensor) -> list[Tensor]:
    """The images of rows, uint8 (3, height, width) each; fewer where they have moved away, or are a stream."""
    source = store.manifest.source
    try:
        images = source.open()
    except UserError:
        return []
    if images.sequential:
        return []
    index_of = {name: index for index, name in enumerate(images.names)}
    crops = [images.load(index_of[name], source.resolution) for name in store.names(rows)]
    return [crop for crop in crops if isinstance(crop, Tensor)]
