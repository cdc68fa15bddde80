"""`reglue prototypes`: what the classes of masks look like in a store's codes."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from reglue.data.manifest import compressor_of, holds_codes, value_of
from reglue.data.store import Store
from reglue.editing.painting import IGNORED, SPEC_FILE, Prototypes, PrototypesSpec, load_prototypes, shares_of
from reglue.errors import UserError
from reglue.extras import need
from reglue.files import new_folder, refuse_filled
from reglue.locks import writes
from reglue.options.prototypes import MakePrototypes
from reglue.perception.labelled import with_masks
from reglue.progress import Bar
from reglue.run import versions
from reglue.seeds import generator
from reglue.training import distributed

READ_AT_ONCE = 256
"""Images."""
MOST = 50_000
"""Positions of a class that are clustered, drawn at random where there are more."""
ROUNDS = 20
"""Of k-means."""


@writes()
def prototypes(options: MakePrototypes) -> Prototypes:
    """Make and write the prototypes. Raises UserError for anything that the user can fix."""
    need("prototypes", "scipy")
    distributed.alone("prototypes", "cpu")
    store = Store.open(options.store)
    column = column_of(options, store)
    labelled = with_masks(store, options.masks)
    masks = labelled.targets
    classes = int(masks[masks != IGNORED].max()) + 1 if (masks != IGNORED).any() else 0
    if not classes:
        raise UserError(f"{options.masks}: the masks have no class, only {IGNORED}, which is ignored")
    codes: list[list[Tensor]] = [[] for _ in range(classes)]
    batches = range(0, len(labelled), READ_AT_ONCE)
    for start in Bar(batches, desc="prototypes", unit="batch"):
        part = labelled[start : start + READ_AT_ONCE]
        code = store.read(column, part.rows)[value_of(column)].float()
        positions, shares = code.movedim(1, -1), shares_of(part.targets, classes, (code.shape[2], code.shape[3]))
        for label in range(classes):
            codes[label].append(positions[shares[:, label] > 0.5])
    found = [torch.cat(of_class) for of_class in codes]
    spec = PrototypesSpec(
        column=column,
        compressor=store.manifest.compressors[compressor_of(column)],
        images_sha256=store.manifest.source.fingerprint,
        looks=options.looks,
        positions=tuple(map(len, found)),
        seed=options.seed,
        masks_sha256=hashlib.sha256(masks.numpy().tobytes()).hexdigest(),
        versions=versions(),
    )
    if (options.out / SPEC_FILE).is_file() and (before := load_prototypes(options.out)).spec == spec:
        print(f"{options.out} is complete already")
        return before
    refuse_filled(options.out)
    few = [str(label) for label, of_class in enumerate(found) if 0 < len(of_class) < options.looks]
    if few:
        raise UserError(
            f"--looks {options.looks}: class {few[0]} has {spec.positions[int(few[0])]} positions; choose less"
        )
    centres = [looks_of(one, options.looks, options.seed, label) for label, one in enumerate(found)]
    made = Prototypes(spec, torch.stack(centres))
    with new_folder(options.out) as folder:
        made.save(folder)
    counted = ", ".join(f"{label}: {count}" for label, count in enumerate(spec.positions) if count)
    print(f"{options.out}: prototypes of {sum(map(bool, spec.positions))} classes (class: positions; {counted})")
    return made


def column_of(options: MakePrototypes, store: Store) -> str:
    """The column of codes. Raises UserError if it is not there, or not the only one."""
    there = [name for name, column in store.manifest.columns.items()
             if holds_codes(name) and len(column.tensors[value_of(name)].shape) == 3]  # fmt: skip
    if not there:
        raise UserError(f"{options.store} has no codes of patches; make some with `reglue compress`")
    if options.column is None and len(there) > 1:
        raise UserError(f"{options.store} has codes {', '.join(there)}; choose one with --column")
    if options.column is not None and options.column not in there:
        raise UserError(f"--column {options.column}: {options.store} has codes {', '.join(there)}")
    return options.column or there[0]


def looks_of(codes: Tensor, looks: int, seed: int, label: int) -> Tensor:
    """The centres (looks, K) of clusters of codes (n, K), those of more codes first; zeros where there are none."""
    if not len(codes) or looks == 1:
        return codes.mean(0, keepdim=True) if len(codes) else torch.zeros(looks, codes.shape[1])
    from scipy.cluster.vq import kmeans2  # slow to import

    order = generator(seed, "looks", label).permutation(len(codes))[:MOST]
    chosen = codes[torch.from_numpy(order)].double().numpy()
    centres, owners = kmeans2(chosen, chosen[:looks], ROUNDS, minit="matrix")
    order = np.argsort(-np.bincount(owners, minlength=looks), kind="stable")
    return torch.from_numpy(centres[order]).float()
