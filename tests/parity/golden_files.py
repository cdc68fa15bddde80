"""The golden files, and how far ours may be from them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from torch import Tensor

from reglue.diffusion.denoiser import Denoiser
from reglue.published.families import DIT, Evidence
from reglue.published.weights import OfficialModel, import_official

GOLDEN = Path(os.environ.get("REGLUE_GOLDEN") or Path(__file__).parent / "golden")
TOLERANCE = 2e-5
METHODS = ("sit", "repa", "redi", "reg", "reglue")
FAMILIES = (*METHODS, "lightningdit", "uvit")
"""All whose files come in and go out."""


class Golden:
    """One golden file: its tensors, its sizes and the model that its weights make."""

    def __init__(self, method: str) -> None:
        if not (GOLDEN / f"{method}.safetensors").is_file():
            pytest.skip(f"no golden numbers of {method} in {GOLDEN}")
        with safe_open(GOLDEN / f"{method}.safetensors", "pt") as file:
            self.tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.about: dict[str, Any] = json.loads(file.metadata()["about"])
        self.method = method
        self.from_noise = method in ("sit", "redi", "lightningdit")
        self.published = {k.removeprefix("weights."): v for k, v in self.tensors.items() if k.startswith("weights.")}

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def get(self, key: str) -> Tensor | None:
        return self.tensors.get(key)

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    @property
    def condition(self) -> dict[str, Tensor]:
        return {"class": self["input.y"]}

    def official(self) -> OfficialModel:
        depth = self.about.get("encoder_depth", self.about.get("repa_depth"))
        # The file counts all channels: beside a map, the latents are the SD-VAE's.
        latent_channels = 4 if self.method in ("redi", "reglue") else self.about["in_channels"]
        latent_channels -= self.about.get("semantic_chans", 0)
        # Random weights are not zero where trained ones of SiT are: no shape tells DiT's.
        evidence = [Evidence(frozenset({DIT}), "the file says so", firm=True)] if self.method == DIT else []
        return import_official(
            self.published,
            heads=self.about["num_heads"],
            alignment_depth=depth,
            latent_channels=latent_channels,
            evidence=evidence,
        )

    def denoiser(self) -> Denoiser:
        return self.official().denoiser()


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Relative distance ‖ours − theirs‖ / ‖theirs‖ below the tolerance."""
    assert ours.shape == theirs.shape
    distance = (ours.double() - theirs.double()).norm() / theirs.double().norm()
    assert distance < TOLERANCE, f"relative distance {distance:.2e}"
