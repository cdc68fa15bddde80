"""Puts files together that `studies/pack.py` has cut into parts, with the same bytes as before.

    python studies/unpack.py packed

The same command again does what is left.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tyro
from tyro.conf import Positional

from pack import join_parts
from reglue.errors import UserError


def unpack(folder: Positional[Path]) -> None:
    """Put together all parts in a folder and beneath it.

    Args:
        folder: What studies/pack.py has written.
    """
    for whole in join_parts(folder):
        print(whole)


if __name__ == "__main__":
    try:
        tyro.cli(unpack, description=__doc__)
    except UserError as error:
        sys.exit(f"unpack: {error}")
