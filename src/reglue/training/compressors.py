"""What of a store a compressor is fitted to, and how well it restores it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from reglue.data.store import Store
from reglue.encoders.compressors import Compressor, as_map
from reglue.names import CompressedColumn


@dataclass(frozen=True)
class Source:
    """What of a store is compressed."""

    store: Store
    column: CompressedColumn
    layers: tuple[int, ...] | None
    """Whose features; None for class tokens."""
    channels: slice
    """Where these are in the column."""

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


class Fit(NamedTuple):
    """How well features are restored, in units of the standardised features."""

    mse: float
    explained: float
    """1 − squared error / squared deviation from the store's mean of each channel; 0 where nothing deviates."""


@torch.inference_mode()
def measure(compressor: Compressor, source: Source, rows: Tensor) -> Fit:
    """How well a compressor restores ascending rows of a store."""
    error = torch.zeros((), dtype=torch.float64, device=compressor.mean.device)
    deviation = torch.zeros_like(error)
    count = 0
    for values in source.scan(rows):
        features = compressor.standardise(values.to(compressor.mean.device))
        error += (compressor.expand(compressor.compress(features)) - features).double().square().sum()
        deviation += features.double().square().sum()
        count += features.numel()
    return Fit((error / count).item(), (1 - error / deviation).item() if deviation else 0.0)
