"""Every kind of folder and file that the commands write: what `verify`, `info` and `list` know them by."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reglue.data.manifest import MANIFEST, PARTIAL
from reglue.editing.folder import RECORD as EDITS
from reglue.editing.painting import SPEC_FILE as PROTOTYPES
from reglue.errors import UserError
from reglue.perception.heads import SPEC_FILE, WEIGHTS_FILE
from reglue.perception.records import RECORD as DATASET_RECORD
from reglue.portable import INDEX
from reglue.reals.record import RECORD as TRAINING_RECORD
from reglue.run import FILE as RECORD
from reglue.samples import PROTOCOL
from reglue.watching import checks, facts, rows


@dataclass(frozen=True)
class Kind:
    """One kind of folder or file."""

    name: str
    checks: Callable[[Path], Iterator[checks.Check]]
    """What `reglue verify` reads of one."""
    facts: Callable[[Path], dict[str, str]]
    """What `reglue info` says of one: texts by what they are about. Raises UserError for damage."""
    pictures: Callable[[Path], list[np.ndarray]] = lambda _: []
    """A few pictures of it, uint8 (h, w, 3)."""
    row: Callable[[Path], rows.Row] | None = None
    """Its line in `reglue list`; None for what that leaves out."""


RUN = Kind("run", checks.run, facts.run, facts.newest_preview, rows.run)
PIPELINE = Kind("diffusers pipeline", checks.pipeline, facts.pipeline)
STORE = Kind("store", checks.store, facts.store, facts.stored_images, rows.store)
AUTOENCODER = Kind("autoencoder", checks.autoencoder, facts.autoencoder, facts.newest_preview, rows.autoencoder)
HEAD = Kind("head", checks.head, facts.head)
SAMPLES = Kind("samples", checks.samples, facts.samples, facts.first_samples)
EDITED = Kind("edits", checks.edits, facts.edits, facts.sheet)
LOOKS = Kind("prototypes", checks.prototypes, facts.prototypes, facts.colours_of_prototypes)
DATASET = Kind("data set", checks.dataset, facts.dataset, facts.drawn_images)
ARCHIVE = Kind("archive", checks.archive, facts.archive, facts.archived_images)
PUBLISHED = Kind("published file", checks.published, facts.published)

KINDS: dict[str, Kind] = {
    RECORD: RUN,
    INDEX: PIPELINE,
    MANIFEST: STORE,
    PARTIAL: STORE,
    SPEC_FILE: HEAD,
    WEIGHTS_FILE: HEAD,
    TRAINING_RECORD: AUTOENCODER,
    PROTOCOL: SAMPLES,
    EDITS: EDITED,
    PROTOTYPES: LOOKS,
    DATASET_RECORD: DATASET,
}
"""Kinds of folders by a file that each alone has; heads have a record of the autoencoders' name too."""
FILES = {".npz": ARCHIVE, **dict.fromkeys((".pt", ".pth", ".ckpt", ".bin", ".safetensors"), PUBLISHED)}
"""Kinds of files by how their names end."""


def kind_among(names: Collection[str]) -> Kind | None:
    """The kind of a folder that holds files of these names; None if it is none of ours."""
    return next((kind for name, kind in KINDS.items() if name in names), None)


def kind_of(path: Path) -> Kind:
    """What is at a path. Raises UserError for what is none of the kinds."""
    kind = FILES.get(path.suffix.lower()) if path.is_file() else None
    kind = kind or kind_among([name for name in KINDS if (path / name).is_file()])
    if kind is None:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        kinds = sorted({kind.name for kind in KINDS.values()})
        raise UserError(
            f"{path} has none of {', '.join(KINDS)}; give {', '.join(kinds)}, an .npz of samples or a published file"
        )
    return kind
