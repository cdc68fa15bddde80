"""Backbones: from tokens and what conditions them to tokens.

To add one, write a `Backbone` and register it in `BACKBONES`; recipes name it. `parts` are for any of them.
"""

from __future__ import annotations

from collections.abc import Callable

from reglue.diffusion.backbones.backbone import Backbone
from reglue.diffusion.backbones.sit import SiT
from reglue.diffusion.backbones.uvit import UViT
from reglue.diffusion.specs import DenoiserConfig

__all__ = ["BACKBONES", "Backbone", "SiT", "UViT"]

BACKBONES: dict[str, Callable[[DenoiserConfig], Backbone]] = {"sit": SiT, "lightning": SiT, "uvit": UViT}
"""`lightning` is SiT with the parts of `specs.ALWAYS`."""
