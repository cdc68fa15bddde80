"""What lies beside the pictures in a folder of samples: a table of them, and a page on which to look at them.

The page is HTML and shows the pictures where they lie. A sheet that was a picture itself would be taken for one more
sample by whatever counts the pictures of the folder.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reglue.errors import UserError
from reglue.files import file_sha256, write_text
from reglue.names import PAGE as PAGE

if TYPE_CHECKING:
    import jinja2

TABLE = "samples.csv"
COLUMNS = ("file_name", "label", "class_index", "index", "seed", "sha256")
"""Of the table. `label` is the name of the class, so that `reglue prepare --labels` takes the table."""
SHOWN = 1000
"""Pictures on the page at most, the first ones."""
PIXELATED = 96
"""Pictures of fewer pixels to a side are enlarged without smoothing."""
THREADS = 4
_ROW = (re.compile(r"[0-9]{6,}\.png"), *[re.compile(r".*", re.DOTALL)] * 4, re.compile(r"[0-9a-f]{64}"))


def picture(index: int) -> str:
    """The name of the file of image `index`."""
    return f"{index:06d}.png"


def read_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each picture that the table of a folder lists, by its file name; none without a table.

    Raises UserError for a damaged table.
    """
    table = folder / TABLE
    if not table.exists():
        return {}
    try:
        rows = list(csv.reader(io.StringIO(table.read_bytes().decode(errors="surrogateescape"), newline="")))
        if not rows or tuple(rows[0]) != COLUMNS:
            raise ValueError(f"its columns are not {', '.join(COLUMNS)}")
        for number, row in enumerate(rows[1:], 1):
            if len(row) != len(_ROW) or not all(form.fullmatch(cell) for form, cell in zip(_ROW, row, strict=True)):
                raise ValueError(f"its row {number} does not describe a picture")
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"{table} is damaged ({error}); delete it, and `reglue sample` with the same options writes it again"
        ) from error
    return {row[0]: row[-1] for row in rows[1:]}


def refuse_changed(file: Path, hashes: Mapping[str, str]) -> None:
    """Raise UserError if a picture is not the one that the table of its folder (`read_hashes`) lists, if it does."""
    if file.name in hashes and file_sha256(file) != hashes[file.name]:
        raise UserError(f"{file} is damaged (its content is not what was drawn); delete it, and draw it again")


def forget_missing(folder: Path, protocol: Mapping[str, Any]) -> None:
    """Take pictures that are not there (any more) from the table, before they are drawn again.

    Drawn in another batch they may differ by rounding, and what the table says of a picture is never replaced.
    """
    hashes = read_hashes(folder)
    there = {file: hashes[file] for file in _pictures(folder, protocol) if file in hashes}
    if there != hashes:
        _write(folder / TABLE, table(protocol, there))


def describe(folder: Path, protocol: Mapping[str, Any]) -> None:
    """Write the table of the pictures that are there, and the page.

    A picture that the table has keeps its hash, so that damage since then is found. A function of the pictures and
    their protocol: written again, and by whichever process, the files are the same.
    """
    files = _pictures(folder, protocol)
    known = read_hashes(folder)
    new = [file for file in files if file not in known]
    with ThreadPoolExecutor(THREADS) as threads:
        known |= zip(new, threads.map(lambda file: file_sha256(folder / file), new), strict=True)
    _write(folder / TABLE, table(protocol, {file: known[file] for file in files}))
    _write(folder / PAGE, _page(folder, files, protocol))


def _pictures(folder: Path, protocol: Mapping[str, Any]) -> list[str]:
    """The pictures of a protocol that are there."""
    return [file for file in map(picture, range(len(protocol["labels"]))) if (folder / file).is_file()]


def table(protocol: Mapping[str, Any], hashes: Mapping[str, str]) -> str:
    """What the table says of these pictures."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for file, digest in hashes.items():
        index = int(Path(file).stem)
        writer.writerow((file, *_class_of(index, protocol), index, protocol["seed"], digest))
    return text.getvalue()


def _page(folder: Path, files: list[str], protocol: Mapping[str, Any]) -> str:
    from reglue.data.images import open_picture  # imports PyTorch

    with open_picture(folder / files[0]) as first:
        width, height = first.size
    shown = [(file, _class_of(int(Path(file).stem), protocol)[0]) for file in files[:SHOWN]]
    return template("samples.html").render(
        protocol=protocol, shown=shown, count=len(files), size=(width, height), pixelated=max(width, height) < PIXELATED
    )


def template(name: str, **filters: Callable[..., Any]) -> jinja2.Template:
    """A page of the package, in which no text is trusted, with filters by name."""
    import jinja2  # slow to import

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("reglue", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(name)


def _class_of(index: int, protocol: Mapping[str, Any]) -> tuple[str, int | str]:
    """Name and number of an image's class; both empty where there are no classes."""
    names = protocol["class_names"]
    label = protocol["labels"][index]
    return (names[label], label) if names else ("", "")


def _write(path: Path, text: str) -> None:
    # Names of classes may come from folders whose names are not UTF-8.
    if not holds(path, text):
        write_text(path, text, errors="surrogateescape")


def holds(path: Path, text: str) -> bool:
    """Whether a file is there and says just this."""
    return path.is_file() and path.read_bytes() == text.encode(errors="surrogateescape")
