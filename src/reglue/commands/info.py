"""`reglue info`: what a folder or file is."""

from __future__ import annotations

import math
from shutil import get_terminal_size
from textwrap import wrap

import numpy as np
from PIL import Image

from reglue.data.images import crop_to
from reglue.data.pictures import image_grid
from reglue.errors import UserError, printable
from reglue.files import replacing
from reglue.locks import writes
from reglue.options.info import Info
from reglue.run import find_run
from reglue.watching.kinds import kind_of

WIDEST = 120
"""Characters of a line, as in the help."""


@writes()
def info(options: Info) -> dict[str, str]:
    """Print what is at a path, and write some pictures of it if asked to. Returns what is printed, by its titles.

    Raises UserError for what is none of the kinds of `watching.kinds`, for damage, and where there is no picture.
    """
    path = find_run(options.path)
    kind = kind_of(path)
    said = kind.facts(path)
    if options.out:
        pictures = kind.pictures(path)
        if not pictures:
            raise UserError(f"there is nothing to see of {path}, a {kind.name}; leave out --out")
        with replacing(options.out) as beside:
            form = {".jpg": "jpeg", ".jpeg": "jpeg"}.get(suffix := options.out.suffix.lower(), suffix[1:])
            Image.fromarray(grid_of(pictures)).save(beside, form)
    print(f"{options.path}: {kind.name}")
    print("\n".join(as_lines(said)))
    return said


def as_lines(said: dict[str, str]) -> list[str]:
    """Titles and what is said under each, in two columns."""
    left = max(map(len, said)) + 2
    width = max(left + 20, min(get_terminal_size().columns, WIDEST))
    lines: list[str] = []
    for title, text in said.items():
        first, *rest = wrap(printable(text), width - left, break_on_hyphens=False) or [""]
        lines += [f"{printable(title):<{left}}{first}", *(" " * left + line for line in rest)]
    return lines


def grid_of(pictures: list[np.ndarray]) -> np.ndarray:
    """Pictures uint8 (h, w, 3) as one, in the size of the first."""
    size = pictures[0].shape[:2]
    cells = [one if one.shape[:2] == size else np.asarray(crop_to(Image.fromarray(one), size)) for one in pictures]
    return image_grid(np.stack(cells), math.ceil(len(cells) ** 0.5))
