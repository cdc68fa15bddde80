"""What a model is conditioned on besides time: named tensors, each with an embedding and a null of its own.

To add one, write a `ConditionKind` and register it in `CONDITIONS`; recipes name it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from reglue.diffusion.specs import CLASS as CLASS

Condition = dict[str, Tensor]
"""Values (B, …) by the name of the condition."""


class ConditionKind(ABC):
    """How one named condition is read, embedded and left out."""

    @abstractmethod
    def size(self, store: Any) -> int:
        """The one number that the embedding depends on, of a store (`data.store.Store`): how many classes, how wide."""

    @abstractmethod
    def read(self, store: Any, rows: Tensor) -> Tensor:
        """The values (B, …) of a store's rows (B,), on the CPU, from any thread."""

    @abstractmethod
    def embedding(self, size: int, width: int) -> nn.Module:
        """The module from values (B, …) to (B, width); embeddings of all conditions and of time are added."""

    @abstractmethod
    def null(self, size: int, batch: int) -> Tensor:
        """The values (batch, …) that stand for no condition."""

    def drop(self, values: Tensor, dropped: Tensor, size: int) -> Tensor:
        """The values with the null in place of those that are `dropped` (B,) bool."""
        null = self.null(size, len(values)).to(values.device)
        return torch.where(dropped.view(-1, *[1] * (values.ndim - 1)), null, values)


class ClassLabel(ConditionKind):
    """A class label (B,) int64 in [0, classes); the null label is `classes`, the last row of the table (DiT)."""

    def size(self, store: Any) -> int:
        """The number of classes; 0 for images without."""
        return len(store.manifest.source.class_names)

    def read(self, store: Any, rows: Tensor) -> Tensor:
        """The labels; zeros, which then is the null label, for images without classes."""
        labels = store.labels[rows]
        return labels if self.size(store) else torch.zeros_like(labels)

    def embedding(self, size: int, width: int) -> nn.Module:
        """A table of size + 1 rows."""
        return nn.Embedding(size + 1, width)

    def null(self, size: int, batch: int) -> Tensor:
        """The label behind the last class."""
        return torch.full((batch,), size)


CONDITIONS: dict[str, ConditionKind] = {CLASS: ClassLabel()}
