"""`reglue compress`: fit a compressor to a store's features or class tokens and add its codes to the store."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from tyro.conf import Positional

from reglue.data.manifest import codes_column, compressor_of, value_of
from reglue.data.pictures import colours_of, image_grid
from reglue.data.store import Store
from reglue.data.store_writer import add_codes
from reglue.encoders.compressors import (
    LEARNED,
    CompressedColumn,
    Compressor,
    CompressorKind,
    CompressorSpec,
    LearnedCompressor,
    PcaCompressor,
    as_map,
    load_compressor,
)
from reglue.errors import UserError, require
from reglue.files import TakesPaths, opened_tensors, parse_json, read_json, replacing
from reglue.published.compressors import read_compressor
from reglue.seeds import generator, normals, permutation
from reglue.training import distributed

SHOWN = 8
"""Images in the picture of the codes."""
LATER_OPTIONS = {"column": "features", "kl_weight": 0.0, "layers": None}
"""Options that compressors of earlier versions do not know, with what those did."""


@dataclass(frozen=True)
class Compress(TakesPaths):
    """Learn to write the features of a store in few channels, and add the codes as column local.NAME.

    With --column cls it is the class tokens, and their codes become column cls.NAME. The same command again continues
    where an interrupted one stopped.
    """

    store: Positional[Path]
    """A store prepared with --features."""
    kind: CompressorKind = "conv"
    """conv: REGLUE's convolutional autoencoder; pca: ReDi's principal components; mlp: an autoencoder with one hidden
    layer that looks at every position by itself."""
    column: CompressedColumn = "features"
    """features: the map of patch features; cls: the class token, by pca or mlp. A recipe learns its codes in place of
    the token with --class-token.compressor NAME."""
    layers: Literal["last"] | tuple[int, ...] | None = None
    """last, or blocks of the encoder, 0 is the first: features of these alone are taken, of those that the store has.
    Several must be neighbours there. Default: all. ReDi takes the last one."""
    channels: int = 16
    """Channels of the codes. Of ReDi's file, given as --fitted, so many components are taken, the first ones."""
    hidden: int = 256
    """conv, mlp: channels between."""
    kl_weight: float = 0.0
    """conv, mlp: above 0, the encoder gives a normal distribution of codes, and this weighs its KL divergence from the
    standard normal, summed over an image's code, beside the mean squared error. Sampled in training; afterwards its
    mean is the code. REGLUE measured 1e-6, and found it worse than none."""
    epochs: int = 25
    """conv, mlp: passes over the training images. What the last one gives is kept."""
    cosine_epochs: int = 100
    """conv, mlp: the learning rate falls along a cosine that would end after so many epochs."""
    batch_size: int | None = None
    """conv, mlp: images per step. Default: 4096 as published, but no more than a 64th of the images (and 16 at
    least)."""
    micro_batch: int = 256
    """conv, mlp: images on the device at once, and over which batch statistics are taken."""
    learning_rate: float = 1e-3
    """conv, mlp: of Adam, at the start."""
    final_learning_rate: float = 1e-4
    """conv, mlp: at the end of the cosine."""
    validation: float = 0.05
    """Share of the images that are held out to measure the compressor."""
    seed: int = 0
    """Of the weights, the order of images and what is held out."""
    fitted: Path | None = None
    """Folder of a compressor (RUN/compressor or STORE/compressors/NAME), REGLUE's published .pth or ReDi's PCA file:
    nothing is fitted, its codes are added. For another resolution of images, which a model is to be fine-tuned on,
    other images to compare with, or the published codes. The store must have the features that it was fitted to, from
    the same encoder and layers; a published file does not say which layers, and is taken to mean --layers."""
    statistics: Path | None = None
    """With --fitted: mean and std of the features, which REGLUE keeps beside its compressor: .npz, or a dict in .npy,
    .pt or .pkl."""
    name: str | None = None
    """Of the compressor within the store. Default: KIND-CHANNELS, such as conv-16, with -last or -layers-10-11 behind
    it if these alone are taken, and -kl if variational."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "channels", "hidden", "epochs", "cosine_epochs", "batch_size", "micro_batch", at_least=1)
        require(self, "seed", "kl_weight", at_least=0)
        require(self, "learning_rate", "final_learning_rate", more_than=0)
        require(self, "validation", more_than=0, less_than=1)
        if self.kind == "pca" and self.kl_weight:
            raise UserError("--kl-weight is for --kind conv or mlp; principal components have no distribution of codes")
        if self.kind == "conv" and self.column == "cls":
            raise UserError("--kind conv needs a map, and --column cls has none; choose --kind pca or mlp")
        if self.layers is not None and self.column == "cls":
            raise UserError("--layers is for --column features; a class token is of the last layer")
        if self.statistics and not self.fitted:
            raise UserError("--statistics are those of a published compressor: give it too, with --fitted")
        if self.name is not None and not self.name.replace("-", "").replace("_", "").isalnum():
            raise UserError(f"--name {self.name}: use letters, digits, - and _ alone")

    @property
    def compressor_name(self) -> str:
        """The name under which recipes know this compressor."""
        if self.name:
            return self.name
        layers = "" if self.layers is None else "-last" if self.layers == "last" else f"-layers{_dashed(self.layers)}"
        return f"{self.kind}-{self.channels}{layers}" + ("-kl" if self.kl_weight else "")

    @property
    def codes(self) -> str:
        """The column of the store for the codes."""
        return codes_column(self.compressor_name, self.column)

    def read_fitted(self) -> Compressor | None:
        """The compressor of --fitted. Raises UserError for a file or folder that is none."""
        return read_compressor(self.fitted, self.statistics, components=self.channels) if self.fitted else None

    def decisive(self, fitted: Compressor | None) -> dict[str, Any]:
        """The options that decide the result."""
        without = {"store", "name", "device", "fitted", "statistics"}
        if fitted:
            asked = {} if self.layers is None else {"layers": self.layers}
            return {"fitted": fitted.weights_sha256(), **asked}
        if self.kind == "pca":
            without |= {"hidden", "epochs", "cosine_epochs", "batch_size", "micro_batch"}
            without |= {"learning_rate", "final_learning_rate"}
        without |= {option for option, value in LATER_OPTIONS.items() if getattr(self, option) == value}
        return {option: value for option, value in asdict(self).items() if option not in without}


def compress(options: Compress) -> Store:
    """Fit a compressor and write its codes. Raises UserError for anything that the user can mend."""
    device = distributed.alone("compress", options.device)
    fitted = options.read_fitted()
    if fitted:
        spec = fitted.spec()
        options = replace(options, kind=spec.kind, channels=spec.channels, column=spec.column)
    store = Store.open(options.store, to_be_replaced=options.codes)
    name = compressor_of(options.codes)
    folder = store.folder / "compressors" / name
    if options.column not in store.manifest.columns:
        what, remedy = {"features": ("features", "--features"), "cls": ("class tokens", "--encoder")}[options.column]
        raise UserError(f"{store.folder} has no {what} to compress; prepare a store with {remedy}")
    source = Input.of(options, store, fitted)
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
        print(f"{store.folder} has compressor {name} already")
        return store

    training, held_out = _split(options, store)
    statistics = store.manifest.statistics[options.column]
    mean, std = (torch.tensor(each[source.channels], device=device) for each in (statistics.mean, statistics.std))
    std = torch.where(std > 1e-6, std, 1.0)  # A channel that never changes stays 0 instead of becoming NaN.
    if fits:  # Its codes were damaged.
        compressor = load_compressor(folder).to(device)
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
    _checkpoint_of(folder).unlink(missing_ok=True)
    return store


def _is_the_one(folder: Path, made: CompressorSpec | None) -> bool:
    """Whether the compressor that made a store's codes is still in its folder."""
    try:
        return made is not None and load_compressor(folder).spec() == made
    except UserError:
        return False


@dataclass(frozen=True)
class Input:
    """What of a store is compressed."""

    store: Store
    column: CompressedColumn
    layers: tuple[int, ...] | None
    """Whose features; None for class tokens."""
    channels: slice
    """Where these are in the column."""

    @classmethod
    def of(cls, options: Compress, store: Store, fitted: Compressor | None) -> Input:
        """What the options ask for. Raises UserError for layers that are not there, or not those of `fitted`."""
        encoder = store.manifest.encoder
        assert encoder is not None
        if options.column == "cls":
            return cls(store, "cls", None, slice(0, encoder.width))
        last = (encoder.depth - 1,)
        asked = last if options.layers == "last" else options.layers
        known = fitted.layers if fitted else None
        if asked and known and asked != known:
            raise UserError(f"--fitted {options.fitted} takes layers {list(known)}: leave out --layers")
        layers = asked or known or encoder.layers
        try:
            return cls(store, "features", layers, encoder.channels_of(layers))
        except ValueError as error:
            if not asked:
                raise UserError(
                    f"--fitted {options.fitted} takes layers {list(layers)}, but {store.folder} holds "
                    f"{list(encoder.layers)}; prepare it with the same encoder and --layers"
                ) from error
            raise UserError(f"--layers: {error} of {store.folder}; choose of these, or prepare it anew") from error

    @property
    def width(self) -> int:
        """Channels of the values that are compressed."""
        return self.channels.stop - self.channels.start

    def read(self, rows: Tensor) -> Tensor:
        """The values of rows (n,) as maps (n, width, h, w)."""
        return as_map(self.store.read(self.column, rows, self.channels)[self.column])

    def scan(self, rows: Tensor) -> Iterator[Tensor]:
        """The same of ascending rows, a few images at a time."""
        for _, tensors in self.store.scan(self.column, rows, channels=self.channels):
            yield as_map(tensors[self.column])


def _dashed(layers: tuple[int, ...]) -> str:
    return "".join(f"-{layer}" for layer in layers)


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
    begun = begun or _checkpoint_of(folder).is_file()
    if not (begun and path.is_file()):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            beside.write_text(json.dumps(asked, indent=1))
        return
    before = read_json(path, dict[str, Any], f"delete {folder} and compress again")
    for option in sorted(before.keys() | asked.keys()):
        if before.get(option) != asked.get(option):
            raise UserError(
                f"{folder} was made with {option.replace('_', '-')} {before.get(option)}, not {asked.get(option)}; "
                "choose another --name, use the same options as before, or delete that folder"
            )


def _fit_pca(
    options: Compress, source: Input, folder: Path, training: Tensor, held_out: Tensor, mean: Tensor, std: Tensor
) -> Compressor:
    features = _scan(source, training, "principal components")
    compressor = PcaCompressor.fit(features, mean, std, options.channels)
    fit, validation = (_measure(compressor, source, rows) for rows in (training, held_out))
    record = {"train_mse": fit.mse, "validation_mse": validation.mse, "explained_variance": validation.explained}
    _write_metrics(folder, [record])
    print(f"{options.compressor_name}: {validation.explained:.1%} of the variance of held-out features explained")
    return compressor


def _train(
    options: Compress, source: Input, folder: Path, training: Tensor, held_out: Tensor, mean: Tensor, std: Tensor
) -> Compressor:
    """REGLUE's training: MSE on standardised features, Adam, a cosine longer than what is used of it.

    A variational compressor's loss is MSE + kl_weight·KL (arXiv 2512.16636 does not say how its KL is reduced; this is
    latent diffusion's convention, arXiv 2112.10752).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(generator(options.seed, "compressor weights").integers(2**63)))
        architecture = LEARNED[options.kind]
        sizes = (len(mean), options.hidden, options.channels)
        compressor = architecture(*sizes, mean, std, variational=options.kl_weight > 0).to(mean.device)
    optimizer = torch.optim.Adam(compressor.parameters(), lr=options.learning_rate)
    first, records = _resume(folder, compressor, optimizer)
    batch_size = min(options.batch_size or min(4096, max(16, len(training) // 64)), len(training))
    steps = len(training) // batch_size  # An incomplete last batch is dropped; the next epoch has other images there.

    with tqdm(
        total=options.epochs * steps, initial=first * steps, desc=options.compressor_name, unit="step"
    ) as progress:
        for epoch in range(first, options.epochs):
            optimizer.param_groups[0]["lr"] = _learning_rate(options, epoch)
            order = training[permutation(options.seed, "compressor order", epoch, len(training))]
            batches = order[: steps * batch_size].split(batch_size)
            micro_batches = [part for batch in batches for part in batch.split(options.micro_batch)]
            parts = _read_ahead(source, micro_batches)
            squared_error, divergence = torch.zeros((), device=mean.device), torch.zeros((), device=mean.device)
            compressor.train()
            for batch in batches:
                optimizer.zero_grad()
                for rows in batch.split(options.micro_batch):
                    features = compressor.standardise(next(parts).to(mean.device))
                    if compressor.variational:
                        posterior = compressor.posterior(features)
                        code = posterior.draw(_noise(options, epoch, rows, posterior.mean))
                        kl = posterior.divergence().mean()
                    else:
                        code, kl = compressor.compress(features), torch.zeros_like(divergence)
                    mse = F.mse_loss(compressor.expand(code), features)
                    loss = mse + options.kl_weight * kl if compressor.variational else mse
                    (loss * (len(features) / batch_size)).backward()
                    squared_error += mse.detach() * len(features)
                    divergence += kl.detach() * len(features)
                optimizer.step()
                progress.update()
            train_mse = squared_error.item() / (steps * batch_size)
            if not math.isfinite(train_mse):
                raise UserError(f"the loss became {train_mse} in epoch {epoch + 1}; choose a lower --learning-rate")
            compressor.eval()
            validation = _measure(compressor, source, held_out)
            record = {"epoch": epoch + 1, "train_mse": train_mse, "validation_mse": validation.mse}
            if compressor.variational:
                record["train_kl"] = divergence.item() / (steps * batch_size)
            records.append({**record, "explained_variance": validation.explained})
            progress.set_postfix(validation_mse=f"{validation.mse:.4f}", explained=f"{validation.explained:.1%}")
            _write_progress(folder, compressor, optimizer, records)
    return compressor.eval()


def _learning_rate(options: Compress, epoch: int) -> float:
    cosine = (1 + math.cos(math.pi * min(1.0, epoch / options.cosine_epochs))) / 2
    return options.final_learning_rate + (options.learning_rate - options.final_learning_rate) * cosine


def _noise(options: Compress, epoch: int, rows: Tensor, like: Tensor) -> Tensor:
    """Standard normal noise for the codes of images: a function of seed, epoch and row."""
    generators = [generator(options.seed, "compressor noise", epoch, row) for row in rows.tolist()]
    return normals(generators, {"code": like.shape[1:]})["code"].to(like.device)


def _read_ahead(source: Input, parts: list[Tensor]) -> Iterator[Tensor]:
    """The features of each list of rows as maps; while one is used, a thread reads the next."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(source.read, parts[0])
        for rows in [*parts[1:], None]:
            ready = coming.result()
            if rows is not None:
                coming = reader.submit(source.read, rows)
            yield ready


@dataclass(frozen=True)
class _Fit:
    """How well features are restored, in units of the standardised features."""

    mse: float
    explained: float
    """1 − squared error / squared deviation from the store's mean of each channel."""


@torch.inference_mode()
def _measure(compressor: Compressor, source: Input, rows: Tensor) -> _Fit:
    error = torch.zeros((), dtype=torch.float64, device=compressor.mean.device)
    deviation = torch.zeros_like(error)
    count = 0
    for values in source.scan(rows):
        features = compressor.standardise(values.to(compressor.mean.device))
        error += (compressor.expand(compressor.compress(features)) - features).double().square().sum()
        deviation += features.double().square().sum()
        count += features.numel()
    return _Fit((error / count).item(), (1 - error / deviation).item())


def _scan(source: Input, rows: Tensor, what: str) -> Iterator[Tensor]:
    """What is compressed of ascending rows as maps, a few images at a time."""
    with tqdm(total=len(rows), desc=what, unit="image") as progress:
        for part in source.scan(rows):
            yield part
            progress.update(len(part))


@torch.inference_mode()
def _codes(source: Input, compressor: Compressor, device: torch.device) -> Iterator[Tensor]:
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


def _checkpoint_of(folder: Path) -> Path:
    return folder / "training.safetensors"


def _write_progress(
    folder: Path, compressor: LearnedCompressor, optimizer: torch.optim.Adam, records: list[dict[str, float]]
) -> None:
    """Write the state after an epoch, from which a killed run continues, and the epochs' figures as JSON lines."""
    state = {f"weights.{key}": value for key, value in compressor.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        state |= {f"adam.{index}.{key}": value for key, value in moments.items()}
    with replacing(_checkpoint_of(folder)) as beside:
        save_file(state, beside, {"records": json.dumps(records)})
    _write_metrics(folder, records)


def _write_metrics(folder: Path, records: list[dict[str, float]]) -> None:
    with replacing(folder / "metrics.jsonl") as beside:
        beside.write_text("".join(json.dumps(record) + "\n" for record in records))


def _resume(
    folder: Path, compressor: LearnedCompressor, optimizer: torch.optim.Adam
) -> tuple[int, list[dict[str, float]]]:
    """Load the state after the last complete epoch, if there is one. Returns the next epoch and the figures so far."""
    path = _checkpoint_of(folder)
    if not path.is_file():
        return 0, []
    with opened_tensors(path, "delete it to begin anew") as file:
        records = parse_json((file.metadata() or {}).get("records", ""), list[dict[str, float]])
        state = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 not a dict
        compressor.load_state_dict(
            {key.removeprefix("weights."): value for key, value in state.items() if key.startswith("weights.")}
        )
        adam = optimizer.state_dict()
        adam["state"] = {}
        for key, value in state.items():
            if key.startswith("adam."):
                _, index, moment = key.split(".")
                adam["state"].setdefault(int(index), {})[moment] = value
        optimizer.load_state_dict(adam)
    return len(records), records


def _draw_codes(store: Store, column: str, path: Path) -> None:
    """A picture of a few images over their codes as colours; of the codes alone where the images have moved away."""
    rows = store.originals
    rows = rows[torch.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).long()]
    codes = store.read(column, rows)[value_of(column)]
    height, width = store.manifest.source.resolution
    colours = [
        np.asarray(Image.fromarray(colour).resize((width, height), Image.Resampling.NEAREST))
        for colour in colours_of(codes)
    ]
    images = [crop.permute(1, 2, 0).numpy() for crop in _crops(store, rows)]
    shown = [*images, *colours] if len(images) == len(colours) else colours
    with replacing(path) as beside:
        Image.fromarray(image_grid(np.stack(shown), columns=len(colours))).save(beside, format="PNG")


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
