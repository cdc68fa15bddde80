"""`reglue compress`: fit a compressor to a store's features and add its codes to the store."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from tyro.conf import Positional

from reglue.data.images import ImageFolder
from reglue.data.pictures import colours_of, image_grid
from reglue.data.store import CODES, Store
from reglue.errors import UserError
from reglue.files import replacing
from reglue.runs.ranks import resolve_device
from reglue.seeds import generator, permutation
from reglue.semantics.compressors import Compressor, ConvCompressor, PcaCompressor, load_compressor

SHOWN = 8
"""Images in the picture of the codes."""


@dataclass(frozen=True)
class Compress:
    """Learn to write the features of a store in few channels, and add the codes as column local.NAME.

    The same command again continues where an interrupted one stopped.
    """

    store: Positional[Path]
    """A store prepared with --features."""
    kind: Literal["conv", "pca"] = "conv"
    """conv: REGLUE's convolutional autoencoder; pca: ReDi's principal components."""
    channels: int = 16
    """Channels of the codes."""
    hidden: int = 256
    """conv: channels between."""
    epochs: int = 25
    """conv: passes over the training images. What the last one gives is kept."""
    cosine_epochs: int = 100
    """conv: the learning rate falls along a cosine that would end after so many epochs."""
    batch_size: int | None = None
    """conv: images per step. Default: 4096 as published, but no more than a 64th of the images (and 16 at least)."""
    micro_batch: int = 256
    """conv: images on the device at once, and over which batch statistics are taken."""
    learning_rate: float = 1e-3
    """conv: of Adam, at the start."""
    final_learning_rate: float = 1e-4
    """conv: at the end of the cosine."""
    validation: float = 0.05
    """Share of the images that are held out to measure the compressor."""
    seed: int = 0
    """Of the weights, the order of images and what is held out."""
    name: str | None = None
    """Of the compressor within the store. Default: KIND-CHANNELS, such as conv-16."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        for option in ("channels", "hidden", "epochs", "cosine_epochs", "micro_batch"):
            if getattr(self, option) < 1:
                raise UserError(f"--{option.replace('_', '-')} {getattr(self, option)}: choose at least 1")
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: choose at least 1")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: choose 0 or more")
        if not 0 < self.validation < 1:
            raise UserError(f"--validation {self.validation}: choose a share between 0 and 1, such as 0.05")
        if self.name is not None and not self.name.replace("-", "").replace("_", "").isalnum():
            raise UserError(f"--name {self.name}: use letters, digits, - and _ alone")

    @property
    def compressor_name(self) -> str:
        """The name under which the store knows this compressor."""
        return self.name or f"{self.kind}-{self.channels}"

    def decisive(self) -> dict[str, Any]:
        """The options that decide the result."""
        without = {"store", "name", "device"}
        if self.kind == "pca":
            without |= {"hidden", "epochs", "cosine_epochs", "batch_size", "micro_batch"}
            without |= {"learning_rate", "final_learning_rate"}
        return {option: value for option, value in asdict(self).items() if option not in without}


def compress(options: Compress) -> Store:
    """Fit a compressor and write its codes. Raises UserError for anything that the user can mend."""
    name = options.compressor_name
    store = Store.open(options.store, to_be_replaced=CODES + name)
    folder = store.folder / "compressors" / name
    if "features" not in store.manifest.columns:
        raise UserError(f"{store.folder} has no features to compress; prepare a store with --features")
    if len(store) < 2:
        raise UserError(f"{store.folder} has a single image; a compressor needs two at least, one to be measured on")
    _same_options_as_before(folder, options, begun=name in store.manifest.compressors)
    if store.is_whole(CODES + name):
        print(f"{store.folder} has compressor {name} already")
        return store

    device = resolve_device(options.device)
    training, held_out = _split(options, len(store))
    statistics = store.manifest.statistics["features"]
    mean, std = torch.tensor(statistics.mean, device=device), torch.tensor(statistics.std, device=device)
    std = torch.where(std > 1e-6, std, 1.0)  # A channel that never changes stays 0 instead of becoming NaN.
    if name in store.manifest.compressors:  # Its codes were damaged.
        compressor = load_compressor(folder).to(device)
    elif options.kind == "pca":
        compressor = _fit_pca(options, store, folder, training, held_out, mean, std)
    else:
        compressor = _train_conv(options, store, folder, training, held_out, mean, std)
    spec = compressor.save(folder)
    store = store.add_codes(name, spec, _codes(store, compressor, device))
    _draw_codes(store, name, folder / "codes.png")
    _checkpoint_of(folder).unlink(missing_ok=True)
    return store


def _split(options: Compress, rows: int) -> tuple[Tensor, Tensor]:
    """Ascending rows for training and for validation, at least one each."""
    order = permutation(options.seed, "compressor validation", 0, rows)
    held_out = min(max(1, round(options.validation * rows)), rows - 1)
    return order[held_out:].sort().values, order[:held_out].sort().values


def _same_options_as_before(folder: Path, options: Compress, begun: bool) -> None:
    """Refuse to continue, or to take for the same, what was begun with other options."""
    path = folder / "options.json"
    asked = options.decisive()
    begun = begun or _checkpoint_of(folder).is_file()
    if not (begun and path.is_file()):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            beside.write_text(json.dumps(asked, indent=1))
        return
    before = json.loads(path.read_text())
    for option in sorted(before.keys() | asked.keys()):
        if before.get(option) != asked.get(option):
            raise UserError(
                f"{folder} was made with {option.replace('_', '-')} {before.get(option)}, not {asked.get(option)}; "
                "choose another --name, use the same options as before, or delete that folder"
            )


def _fit_pca(
    options: Compress, store: Store, folder: Path, training: Tensor, held_out: Tensor, mean: Tensor, std: Tensor
) -> Compressor:
    features = (tensors["features"] for _, tensors in _scan(store, training, "principal components"))
    compressor = PcaCompressor.fit(features, mean, std, options.channels)
    fit, validation = (_measure(compressor, store, rows) for rows in (training, held_out))
    record = {"train_mse": fit.mse, "validation_mse": validation.mse, "explained_variance": validation.explained}
    _write_metrics(folder, [record])
    print(f"{options.compressor_name}: {validation.explained:.1%} of the variance of held-out features explained")
    return compressor


def _train_conv(
    options: Compress, store: Store, folder: Path, training: Tensor, held_out: Tensor, mean: Tensor, std: Tensor
) -> Compressor:
    """REGLUE's training: MSE on standardised features, Adam, a cosine longer than what is used of it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(generator(options.seed, "compressor weights").integers(2**63)))
        compressor = ConvCompressor(len(mean), options.hidden, options.channels, mean, std).to(mean.device)
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
            parts = _read_ahead(store, [part for batch in batches for part in batch.split(options.micro_batch)])
            squared_error = torch.zeros((), device=mean.device)
            compressor.train()
            for batch in batches:
                optimizer.zero_grad()
                for _ in batch.split(options.micro_batch):
                    features = compressor.standardise(next(parts).to(mean.device))
                    loss = F.mse_loss(compressor.expand(compressor.compress(features)), features)
                    (loss * (len(features) / batch_size)).backward()
                    squared_error += loss.detach() * len(features)
                optimizer.step()
                progress.update()
            train_mse = squared_error.item() / (steps * batch_size)
            if not math.isfinite(train_mse):
                raise UserError(f"the loss became {train_mse} in epoch {epoch + 1}; choose a lower --learning-rate")
            compressor.eval()
            validation = _measure(compressor, store, held_out)
            record = {"epoch": epoch + 1, "train_mse": train_mse, "validation_mse": validation.mse}
            records.append({**record, "explained_variance": validation.explained})
            progress.set_postfix(validation_mse=f"{validation.mse:.4f}", explained=f"{validation.explained:.1%}")
            _write_progress(folder, compressor, optimizer, records)
    return compressor.eval()


def _learning_rate(options: Compress, epoch: int) -> float:
    cosine = (1 + math.cos(math.pi * min(1.0, epoch / options.cosine_epochs))) / 2
    return options.final_learning_rate + (options.learning_rate - options.final_learning_rate) * cosine


def _read_ahead(store: Store, parts: list[Tensor]) -> Iterator[Tensor]:
    """The features of each list of rows; while one is used, a thread reads the next."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(store.read, "features", parts[0])
        for rows in [*parts[1:], None]:
            ready = coming.result()["features"]
            if rows is not None:
                coming = reader.submit(store.read, "features", rows)
            yield ready


@dataclass(frozen=True)
class _Fit:
    """How well features are restored, in units of the standardised features."""

    mse: float
    explained: float
    """1 − squared error / squared deviation from the store's mean of each channel."""


@torch.inference_mode()
def _measure(compressor: Compressor, store: Store, rows: Tensor) -> _Fit:
    error = torch.zeros((), dtype=torch.float64, device=compressor.mean.device)
    deviation = torch.zeros_like(error)
    count = 0
    for _, tensors in store.scan("features", rows):
        features = compressor.standardise(tensors["features"].to(compressor.mean.device))
        error += (compressor.expand(compressor.compress(features)) - features).double().square().sum()
        deviation += features.double().square().sum()
        count += features.numel()
    return _Fit((error / count).item(), (1 - error / deviation).item())


def _scan(store: Store, rows: Tensor, what: str) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    with tqdm(total=len(rows), desc=what, unit="image") as progress:
        for part, tensors in store.scan("features", rows):
            yield part, tensors
            progress.update(len(part))


@torch.inference_mode()
def _codes(store: Store, compressor: Compressor, device: torch.device) -> Iterator[Tensor]:
    """The codes of every shard, in the precision of the store's latents."""
    dtype = getattr(torch, store.manifest.latent_dtype)
    parts = _scan(store, torch.arange(len(store)), "codes")
    for shard in store.manifest.columns["features"].shards:
        codes: list[Tensor] = []
        while sum(map(len, codes)) < shard.rows:
            codes.append(compressor.encode(next(parts)[1]["features"].to(device)).to("cpu", dtype))
        yield torch.cat(codes) if codes else torch.empty(0)


def _checkpoint_of(folder: Path) -> Path:
    return folder / "training.safetensors"


def _write_progress(
    folder: Path, compressor: ConvCompressor, optimizer: torch.optim.Adam, records: list[dict[str, float]]
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
    folder: Path, compressor: ConvCompressor, optimizer: torch.optim.Adam
) -> tuple[int, list[dict[str, float]]]:
    """Load the state after the last complete epoch, if there is one. Returns the next epoch and the figures so far."""
    path = _checkpoint_of(folder)
    if not path.is_file():
        return 0, []
    with safe_open(path, "pt") as file:
        records = json.loads(file.metadata()["records"])
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


def _draw_codes(store: Store, name: str, path: Path) -> None:
    """A picture of a few images over their codes as colours; of the codes alone where the images have moved away."""
    rows = torch.linspace(0, len(store) - 1, min(SHOWN, len(store))).long()
    codes = store.read(CODES + name, rows)["local"]
    height, width = store.manifest.source.resolution
    colours = [
        np.asarray(Image.fromarray(colour).resize((width, height), Image.Resampling.NEAREST))
        for colour in colours_of(codes)
    ]
    source = Path(store.manifest.source.path)
    names = store.names(rows)
    folder = ImageFolder(source, tuple(names), (0,) * len(names), ())
    crops = [folder.load(index, (height, width)) for index in range(len(names))]
    images = [crop.permute(1, 2, 0).numpy() for crop in crops if isinstance(crop, Tensor)]
    shown = [*images, *colours] if len(images) == len(colours) else colours
    with replacing(path) as beside:
        Image.fromarray(image_grid(np.stack(shown), columns=len(colours))).save(beside, format="PNG")
