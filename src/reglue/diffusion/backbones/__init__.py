"""Backbones: from tokens and what conditions them to tokens.

To add one, write a `Backbone` and register it in `BACKBONES`; recipes name it. `parts` are for any of them.
"""

from __future__ import annotations

from collections.abc import Callable

from reglue.diffusion.backbones.backbone import Backbone, BackboneSizes
from reglue.diffusion.backbones.sit import SiT
from reglue.diffusion.backbones.uvit import UViT

__all__ = ["BACKBONES", "Backbone", "BackboneSizes", "SiT", "UViT"]

BACKBONES: dict[str, Callable[[BackboneSizes], Backbone]] = {"sit": SiT, "lightning": SiT, "uvit": UViT}
"""`lightning` is SiT with the parts of `specs.ALWAYS`."""
