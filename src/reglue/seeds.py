"""The only source of randomness: every draw is a function of a seed, a purpose and indices.

Nothing here has a state, so nothing depends on the batch size, on the number of devices or on what was drawn before,
and resuming has nothing to restore.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

Index = int | tuple[int, ...]
"""What tells one thing that is drawn from the others: image i, or edit i of image j as (j, i)."""


def generator(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """A generator of its own for one thing that is drawn.

    The same (seed, purpose, indices) give the same bits on every machine: NumPy's Philox is counter-based and integer
    only. `seed` and `indices` are non-negative.
    """
    # crc32 and not hash(): the latter changes from process to process.
    entropy = (seed, zlib.crc32(purpose.encode()), *indices)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


def indices_of(index: Index) -> tuple[int, ...]:
    """An index as the last arguments of `generator`."""
    return (index,) if isinstance(index, int) else index


def torch_generator(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """The same for what torch draws, on the CPU."""
    return torch.Generator("cpu").manual_seed(int(generator(seed, purpose, *indices).integers(2**63)))


def normals(
    generators: Sequence[np.random.Generator], shapes: Mapping[str, Sequence[int]], *, pinned: bool = False
) -> dict[str, Tensor]:
    """Standard normal noise for a batch, one generator per sample: float32 `(B, *shape)` for each name.

    All of a sample's modalities come from its generator in the order of `shapes`. With `pinned`, they are drawn into
    memory that a GPU can copy from by itself.
    """
    noise = {
        name: torch.empty(len(generators), *shape, dtype=torch.float32, pin_memory=pinned)
        for name, shape in shapes.items()
    }
    parts = [part.numpy() for part in noise.values()]
    for row, g in enumerate(generators):
        for part in parts:
            g.standard_normal(dtype=np.float32, out=part[row])
    return noise


def permutation(seed: int, purpose: str, index: int, size: int) -> Tensor:
    """A random order of `size` things, (size,) int64."""
    return torch.from_numpy(generator(seed, purpose, index).permutation(size))
