"""What is installed only where it is asked for: `pip install 'reglue[train]'`. Drawing images needs none of it."""

from __future__ import annotations

from importlib.util import find_spec

from reglue.errors import UserError

EXTRAS = {
    "train": ("datasets", "matplotlib", "pyarrow", "scipy"),
    "evaluate": ("torch_fidelity",),
    "app": ("gradio",),
    "track": ("tensorboard", "trackio", "wandb"),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "ode": ("torchdiffeq",),
    "heif": ("pillow_heif",),
    "demo": ("mlxtend",),
}
"""Extra → the modules that come with it, as pyproject.toml has them; `all` has all."""


def need(what: str, *modules: str) -> None:
    """Raise UserError if a module is not installed that `what` needs, with the extra that brings it."""
    for module in modules:
        if not is_installed(module):
            raise UserError(f"{what} needs {remedy(module)}")


def remedy(module: str) -> str:
    """What to do for a module, or one in it, that is not installed; empty if no extra brings it."""
    name = module.partition(".")[0]
    found = next((extra for extra, modules in EXTRAS.items() if name in modules), "")
    return found and f"{name.replace('_', '-')}: run `pip install 'reglue[{found}]'`"


def is_installed(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    try:
        return find_spec(module) is not None
    except ImportError:
        return False
