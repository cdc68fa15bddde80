"""Pictures as HTML: everything is inside the page, and nothing on a disk."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

SMALL = 160
"""A picture of fewer pixels along its shorter side is enlarged without smoothing."""


def address(image: Image.Image, lossy: bool = False) -> str:
    """An image as a `data:` address; `lossy` for what is only looked at for a moment."""
    file = io.BytesIO()
    kind = "webp" if lossy else "png"
    image.save(file, kind, **({"quality": 80, "method": 0} if lossy else {"compress_level": 3}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def picture(image: Image.Image, alt: str, lossy: bool = False) -> str:
    """An `<img>`; small ones keep their pixels square."""
    small = ' class="pixels"' if min(image.size) < SMALL else ""
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img{small} {size} alt="{escape(alt)}" src="{address(image, lossy)}">'


def tiles(
    images: Sequence[Image.Image | None],
    alts: Sequence[str],
    captions: Sequence[str] = (),
    *,
    columns: int = 4,
    first: int | None = None,
    action: str = "",
    lossy: bool = False,
) -> str:
    """Images side by side, 4 or 8 `columns` on a wide page; None is one that is not there yet.

    With `first` they can be picked: image i then has the index first + i, and `action` says what a click does.
    """
    shown: list[str] = []
    for i, (image, alt) in enumerate(zip(images, alts, strict=True)):
        inside = picture(image, alt, lossy) if image else f'<span class="blank" role="img" aria-label="{escape(alt)}">'
        inside += "" if image else "</span>"
        caption = f"<figcaption>{escape(captions[i])}</figcaption>" if captions else ""
        if first is not None and image:
            label = escape(f"{alt}: {action}")
            inside = f'<button type="button" data-index="{first + i}" title="{label}">{inside}</button>'
        shown.append(f"<figure>{inside}{caption}</figure>")
    return f'<div class="tiles by-{columns}">{"".join(shown)}</div>'


def row(title: str, content: str) -> str:
    """Something with a title over it."""
    return f'<section class="row"><h3>{escape(title)}</h3>{content}</section>' if title else content


def note(text: str, kind: str = "note") -> str:
    """A line: `note`, `problem` or `empty` (what to do first)."""
    role = ' role="alert"' if kind == "problem" else ""
    return f'<p class="{kind}"{role}>{escape(text)}</p>' if text else ""


def progress(share: float, text: str) -> str:
    """A bar and what it stands for."""
    percent = round(100 * min(max(share, 0), 1))
    bar = f'<span class="bar" aria-hidden="true"><span style="width:{percent}%"></span></span>'
    return f'<p class="note" role="status">{bar}{escape(text)} {percent} %</p>'


def legend(entries: Sequence[tuple[tuple[int, int, int], str]]) -> str:
    """Colours and what they stand for."""
    shown = (
        f'<li><i style="background:rgb({red},{green},{blue})"></i>{escape(name)}</li>'
        for (red, green, blue), name in entries
    )
    return f'<ul class="legend">{"".join(shown)}</ul>'
