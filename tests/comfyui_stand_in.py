"""What nodes need of ComfyUI, by its documented interface: signatures are strict, and no graph is executed."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any


def kind(name: str, *widget: str) -> Any:
    """A type of values: its inputs, which take what is documented of their widget, and its outputs."""

    class Input:
        io_type = name

        def __init__(
            self, id: str, display_name: Any = None, optional: bool = False, tooltip: Any = None, **others: Any
        ) -> None:
            assert others.keys() <= {*widget}, f"{name} takes no {others.keys() - {*widget}}"
            self.id, self.optional, self.options = id, optional, others.get("options")
            self.default = others.get("default", self.options[0] if self.options else None)

    class Output:
        io_type = name

        def __init__(self, id: Any = None, display_name: Any = None, tooltip: Any = None) -> None:
            self.id = id

    return SimpleNamespace(Input=Input, Output=Output)


@dataclass
class Schema:
    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list[Any] = field(default_factory=list[Any])
    outputs: list[Any] = field(default_factory=list[Any])
    description: str = ""


class ComfyNode(ABC):
    @classmethod
    @abstractmethod
    def define_schema(cls) -> Schema: ...

    @classmethod
    @abstractmethod
    def execute(cls, **inputs: Any) -> Any: ...


class ComfyExtension(ABC):
    @abstractmethod
    async def get_node_list(self) -> list[type[ComfyNode]]: ...


class ProgressBar:
    """Counts. ComfyUI's raises where the user has cancelled."""

    bars: list[ProgressBar] = []  # noqa: RUF012
    cancelled = False

    def __init__(self, total: int) -> None:
        self.total, self.current = total, 0
        self.bars.append(self)

    def update(self, value: int) -> None:
        if self.cancelled:
            raise InterruptedError
        self.current += value


def modules() -> dict[str, ModuleType]:
    """The modules by name, as they stand in for ComfyUI's."""
    number = ("default", "min", "max", "step", "control_after_generate")
    io = SimpleNamespace(
        Schema=Schema,
        ComfyNode=ComfyNode,
        NodeOutput=lambda *values: SimpleNamespace(result=values),
        Custom=kind,
        String=kind("STRING", "default", "multiline"),
        Int=kind("INT", *number),
        Float=kind("FLOAT", *number[:-1]),
        Combo=kind("COMBO", "options", "default"),
        Image=kind("IMAGE"),
        Mask=kind("MASK"),
    )
    names = ("comfy", "comfy.utils", "comfy_api", "comfy_api.latest")
    found = {name: ModuleType(name) for name in names}
    found["comfy.utils"].__dict__.update(ProgressBar=ProgressBar)
    found["comfy_api.latest"].__dict__.update(io=io, ComfyExtension=ComfyExtension)
    return {name: module for name, module in found.items() if name not in sys.modules}
