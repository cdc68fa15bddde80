"""Single fields of a dataclass: options that change them, made from the dataclass itself, and which ones differ."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import field, fields, is_dataclass, make_dataclass
from typing import Any, get_type_hints


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


def differing(before: Any, now: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The fields in which two dataclasses of one type differ: their dotted names, and the values in both."""
    different: dict[str, tuple[Any, Any]] = {}
    for part in fields(before):
        was, is_ = getattr(before, part.name), getattr(now, part.name)
        if part.compare and was != is_:
            nested = is_dataclass(was) and type(was) is type(is_)
            different |= differing(was, is_, f"{prefix}{part.name}.") if nested else {prefix + part.name: (was, is_)}
    return different
