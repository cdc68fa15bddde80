"""What lies in folders: which files are images, which folders classes, and what is passed over."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path

from PIL import Image, features

from reglue.data.labels import in_class_order
from reglue.errors import UserError, option
from reglue.extras import is_installed

PLUG_INS = {
    "pillow_heif": ("pillow-heif", (".heic", ".heif", ".hif")),
    "pillow_jxl": ("pillow-jxl-plugin", (".jxl",)),
}
"""Modules that teach Pillow further formats: their packages, and what the files of these formats end in."""
EXTENSIONS = frozenset(
    (
        *(".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
        *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp"),
        *((".avif",) if features.check("avif") else ()),
        *(ending for module, (_, endings) in PLUG_INS.items() if is_installed(module) for ending in endings),
    )
)
"""Files with these endings (in either case) are images; every other file is passed over."""
SYSTEM_FOLDERS = frozenset(
    ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")
)
"""What systems leave among images, besides hidden entries."""
SPLITS = frozenset(("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"))
"""Folders with these names are parts of a data set, and no classes."""

MOST_WAYS = 100
"""Links to links multiply: by no more ways is one folder reached."""


@dataclass
class Listing:
    """What is in a folder. Hidden entries and those of the system are passed over."""

    images: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    endings: Counter[str] = field(default_factory=Counter)
    """Of the other files, how many have which."""

    @property
    def notes(self) -> tuple[str, ...]:
        """See `ImageSource.notes`."""
        return passed_over(self.endings)

    @property
    def reason(self) -> str:
        """The same in brackets, to explain why there are no images."""
        return "".join(f" ({note})" for note in self.notes)


def list_runs(folder: Path) -> Listing:
    """The images, sub-folders and other files that lie in a folder, by their names, sorted."""
    found = Listing()
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if is_hidden(entry.name):
                continue
            if _is_folder(entry):
                found.folders.append(entry.name)
            elif is_image(entry.name):
                found.images.append(entry.name)
            else:
                found.endings[ending_of(entry.name)] += 1
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one. A link that leads to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_image(name: str) -> bool:
    """Whether a file is an image by its name."""
    return ending_of(name) in EXTENSIONS


def is_hidden(name: str) -> bool:
    """Whether a file or folder is one that people do not see, by its name."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def ending_of(name: str) -> str:
    """The ending of a file's name in lower case, with its dot; empty if it has none."""
    return Path(name).suffix.lower()


def passed_over(endings: Mapping[str, int]) -> tuple[str, ...]:
    """A line that says what was no image, if anything was: how many files of each ending."""
    counts = sorted(endings.items(), key=lambda item: (-item[1], item[0]))
    named = [f"{count} {ending or 'without an ending'}" for ending, count in counts[:8]]
    if len(counts) > 8:
        named.append(f"{sum(count for _, count in counts[8:])} others")
    readable = [f"{package} reads {ending}" for package, of in PLUG_INS.values() for ending in of if ending in endings]
    return (f"passed over: {', '.join(named)}{''.join(f' ({package})' for package in readable)}",) if named else ()


def list_tree(path: Path) -> Listing:
    """What is in a folder and in all folders below it, by paths. Links that lead back up are not followed.

    Raises UserError if there is no such folder, and for links by which one folder is reached in too many ways.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a folder of images, or one with a sub-folder per class")
    found = Listing()
    ways: Counter[tuple[int, int]] = Counter()
    ahead: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while ahead:  # No recursion: folders may lie deeper than Python's own stack reaches.
        prefix, above = ahead.pop()
        folder = path / prefix
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        if here in above:
            continue
        ways[here] += 1
        if ways[here] > MOST_WAYS:
            raise UserError(f"more than {MOST_WAYS} links in {path} lead to {folder.resolve()}; remove some")
        listing = list_runs(folder)
        found.images += [prefix + name for name in listing.images]
        found.endings.update(listing.endings)
        found.folders += [prefix + name for name in listing.folders]
        ahead += [(f"{prefix}{name}/", above | {here}) for name in reversed(listing.folders)]
    return found


def refuse_none(path: Path, found: Listing) -> None:
    """Raise UserError if there are no images in a folder."""
    if not found.images:
        raise UserError(f"{path} holds no images{found.reason}; images end in {', '.join(sorted(EXTENSIONS))}")


def classes_of(path: Path, names: Sequence[str], class_level: int | None = None) -> tuple[list[str], tuple[str, ...]]:
    """The class of each image by its path: its folders down to a level. And notes, as a source has them.

    Without a level it is the first. Raises UserError for images above it, and, where no level was given and there are
    folders in folders, if the first ones are no classes: the parts of a data set (`SPLITS`), or a single one.
    """
    level = class_level or 1
    folders = [name.split("/")[:-1] for name in names]
    for name, above in zip(names, folders, strict=True):
        if len(above) < level:
            place = next((f"beside {'/'.join(inner)}" for inner in folders if len(inner) >= level), "above them")
            raise UserError(
                f"classes are folders of level {level}, but {path.joinpath(*above)} holds images, such as "
                f"{name.rpartition('/')[2]} {place}; put every image into a class folder, or leave only images"
            )
    classes = ["/".join(above[:level]) for above in folders]
    deeper = next(("/".join(above[: level + 1]) for above in folders if len(above) > level), None)
    if deeper is None or class_level is not None:
        return classes, ()
    kinds = in_class_order(set(classes))
    if len(kinds) == 1 or SPLITS.issuperset(kind.lower() for kind in kinds):
        raise UserError(
            f"{path} holds no classes but {', '.join(kinds)}, with further folders (such as {deeper}); give "
            f"{path / kinds[0]}, or choose {option('class_level')} 2"
        )
    return classes, (
        f"classes are the folders of the first level ({', '.join(kinds[:2])}, …); {option('class_level')} 2 takes the "
        f"second (such as {deeper})",
    )


@cache
def formats() -> tuple[str, ...]:
    """The formats of images by Pillow's names, with those of the plug-ins that are installed.

    Pillow goes by what a file holds, and knows more of them: it hands PostScript over to another program, whatever the
    file is called.
    """
    if is_installed("pillow_heif"):
        import_module("pillow_heif").register_heif_opener()
    if is_installed("pillow_jxl"):
        import_module("pillow_jxl")  # It needs no more.
    endings = EXTENSIONS.union(*(endings for _, endings in PLUG_INS.values()))
    of_images = {kind for ending, kind in Image.registered_extensions().items() if ending in endings}
    # In Pillow's order: a format that has no mark of its own, such as TGA, is tried late.
    return tuple(kind for kind in Image.ID if kind in of_images)
