"""torch-fidelity's Inception network, in a module of its own: its package takes seconds to import."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as URL_INCEPTION_V3
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from reglue.names import INCEPTION


class InceptionNetwork(FeatureExtractorInceptionV3):
    """torch-fidelity's network with random weights, to be given others as tensors.

    The constructor it inherits either downloads weights or unpickles a file without restrictions. It is given an empty
    file here, and nothing to load.
    """

    def __init__(self) -> None:
        nothing = io.BytesIO()
        torch.save({}, nothing)
        nothing.seek(0)
        super().__init__(INCEPTION, ["2048", "logits_unbiased"], feature_extractor_weights_path=nothing)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As any module's, but the constructor's empty one is passed over."""
        return super().load_state_dict(state_dict, strict, assign) if state_dict else None
