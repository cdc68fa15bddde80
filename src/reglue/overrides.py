"""Options that change single fields of a dataclass, made from the dataclass itself: an option is declared once."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import field, fields, make_dataclass
from typing import get_type_hints


def overrides_of(declared: type) -> type:
    """A frozen dataclass with the fields of another, by keyword alone, each None unless it is given.

    Its docstring says of each field what the other one's does, which is where the command line finds its help.
    """
    hints = get_type_hints(declared)
    made = make_dataclass(
        f"{declared.__name__}Overrides",
        [(part.name, hints[part.name] | None, field(default=None)) for part in fields(declared)],
        frozen=True,
        kw_only=True,
    )
    described = "".join(f"    {name}: {text}\n" for name, text in field_docstrings(declared).items())
    made.__doc__ = f"Changes of single values of a `{declared.__name__}`.\n\nArgs:\n{described}"
    return made


def field_docstrings(declared: type) -> dict[str, str]:
    """The string under each field of a dataclass, as one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(declared))).body
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for statement, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
            found[statement.target.id] = " ".join(str(text).split())
    return found
