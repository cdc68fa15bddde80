"""A stranger's image: bounded in bytes and pixels before it is decoded, and by our own decoder."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from reglue.data.images import decode, upright_size
from reglue.errors import UserError, one_line, printable

MOST_BYTES = 20 * 2**20
MOST_PIXELS = 4096 * 4096


def read_upload(file: Path, name: str, folder: Path) -> Image.Image:
    """An image that a visitor has uploaded into a folder, in RGB and upright; its file is deleted.

    `name` is what the visitor calls it. Raises UserError for what is no image or too large, and for a file that lies
    elsewhere: the path comes from the browser.
    """
    called = printable(name)[:80] or "the file"
    place = file.resolve()
    if not place.is_relative_to(folder.resolve()) or not place.is_file():
        raise UserError(f"{called} was not uploaded; drop it again")
    try:
        if place.stat().st_size > MOST_BYTES:
            raise UserError(f"{called} has more than {MOST_BYTES // 2**20} MB; give a smaller file")
        try:
            height, width = upright_size(place)
            if height * width > MOST_PIXELS:
                raise UserError(f"{called} has {width}×{height} pixels; give at most {MOST_PIXELS // 2**20} million")
            return decode(place)
        except UserError:
            raise
        except Exception as error:  # Decoders raise nearly anything on malformed bytes, not OSError alone.
            reason = one_line(error).replace(repr(str(place)), "it")
            raise UserError(f"{called} cannot be read ({reason}); give an image file") from error
    finally:
        place.unlink(missing_ok=True)
