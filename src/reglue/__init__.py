"""Latent diffusion transformers that learn images together with their semantics.

model = reglue.load("run")
images = model.generate(classes=[207, 88], seed=0)
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["load"]

if TYPE_CHECKING:
    from reglue.runs.generation import load


def __getattr__(name: str) -> Any:
    """Import `load` when it is first used: `import reglue` alone need not wait for PyTorch."""
    if name == "load":
        from reglue.runs.generation import load

        return load
    raise AttributeError(f"module 'reglue' has no attribute {name!r}")
