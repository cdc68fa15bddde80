"""Backbones: from tokens and what conditions them to tokens.

To add one, write a `Backbone` and register it in `BACKBONES`; recipes name it. `attention.attention` is for any
of them.
"""

from __future__ import annotations

from collections.abc import Callable

from reglue.diffusion.backbones.backbone import Backbone, BackboneSizes
from reglue.diffusion.backbones.sit import SiT

__all__ = ["BACKBONES", "Backbone", "BackboneSizes", "SiT"]

BACKBONES: dict[str, Callable[[BackboneSizes], Backbone]] = {"sit": SiT}
