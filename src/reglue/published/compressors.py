"""Compressors of the published code bases: REGLUE's convolutional one with its statistics, and ReDi's components."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reglue.encoders.compressors import (
    Compressor,
    PcaCompressor,
    conv_compressor_from_published,
    load_compressor,
)
from reglue.errors import UserError, option
from reglue.files import refuse_not_finite
from reglue.pickles import read_untrusted
from reglue.published.containers import weights_in

FIRST_WEIGHT = "encoder.model.0.weight"
"""Every compressor of REGLUE's has it."""


def read_official_compressor(path: Path, statistics: Path | None, channels: int) -> Compressor:
    """The compressor of a published model, as `read_compressor` reads it, whose codes have so many channels.

    Raises UserError as that does, and for another number of channels.
    """
    compressor = read_compressor(path, statistics, channels)
    found = compressor.spec().channels
    if found != channels:
        raise UserError(f"compressor {path} makes {found} channels, but the model has {channels}: give the model's own")
    return compressor


def read_compressor(path: Path, statistics: Path | None, components: int) -> Compressor:
    """A compressor of ours or of the published code bases, in eval mode on the CPU.

    Args:
        path: REGLUE's file of weights, ReDi's file {pca_model, mean, std} (of torch, pickle or joblib), or a folder
            that `Compressor.save` wrote.
        statistics: {mean, std} of the features in float32, which REGLUE keeps in a file of its own: .npz, or a dict
            in .npy, .pt or .pkl. The other two have theirs inside.
        components: of more components than that in ReDi's file, the first are taken.

    Raises:
        UserError: a file that is missing or something else, sizes that differ, or statistics missing or superfluous.
    """
    if path.is_dir():
        _refuse(statistics, f"{path} has its own")
        return load_compressor(path)
    content = read_untrusted(path)
    if isinstance(content, Mapping) and "pca_model" in content:
        _refuse(statistics, f"{path} has its own")
        return _pca(content, path, components)
    weights, _ = weights_in(content, path, FIRST_WEIGHT)
    if statistics is None:
        raise UserError(f"{path} has no statistics of its features: give their file with {option('statistics')}")
    mean, std = read_statistics(statistics)
    try:
        return conv_compressor_from_published(weights, mean, std)
    except UserError as error:
        raise UserError(f"{path} with {statistics}: {error}") from None


def read_statistics(file: Path) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of features, (C,) float32 each. Raises UserError for a file without them."""
    content = read_untrusted(file)
    if not isinstance(content, Mapping) or not {"mean", "std"} <= content.keys():
        raise UserError(f"{file}: expected {{mean, std}}, found {_description(content)}")
    return _statistics(content, file)


def _statistics(content: Mapping[str, Any], file: Path) -> tuple[Tensor, Tensor]:
    mean, std = (_numbers(content.get(name), name, file).flatten() for name in ("mean", "std"))
    if mean.shape != std.shape or not mean.isfinite().all() or not (std.isfinite() & (std > 0)).all():
        raise UserError(
            f"{file}: mean and std must be finite, std positive, and both as long: found {len(mean)} and {len(std)}"
        )
    return mean, std


def _pca(content: Mapping[str, Any], file: Path, most: int) -> PcaCompressor:
    model = content["pca_model"]
    if not isinstance(model, Mapping) or not {"components_", "mean_"} <= model.keys():
        raise UserError(f"{file}: pca_model has no components_ and mean_; found {_description(model)}")
    whiten = model.get("whiten")
    if not isinstance(whiten, int | NoneType) or whiten:
        raise UserError(f"{file}: its components are whitened, and the published ones are not")
    mean, std = _statistics(content, file)
    components, centre = (_numbers(model[name], name, file) for name in ("components_", "mean_"))
    refuse_not_finite({"components_": components, "mean_": centre}, file)
    if components.ndim != 2 or components.shape[1:] != mean.shape or centre.shape != mean.shape:
        raise UserError(
            f"{file}: components_ {tuple(components.shape)}, mean_ {tuple(centre.shape)} and mean {tuple(mean.shape)} "
            "are not of the same features"
        )
    return PcaCompressor(mean, std, centre, components[:most]).eval()


def _numbers(value: Any, name: str, file: Path) -> Tensor:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        with np.errstate(over="ignore"):  # Numbers beyond float32 become infinite, which is refused.
            value = torch.tensor(value.astype(np.float32))
    if not isinstance(value, Tensor):
        raise UserError(f"{file}: {name} is {_description(value)}, expected an array of numbers")
    return value.float()


def _refuse(statistics: Path | None, why: str) -> None:
    if statistics is not None:
        raise UserError(f"{option('statistics')} {statistics}: leave it out, since {why}")


def _description(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(map(str, list(value)[:5]))}{', …' if len(value) > 5 else ''}}}"
    return f"{type(value).__name__}"
