"""What the counts say, without a GPU: operations and bytes of a training step, and what the published step adds.

python benchmarks/limits.py --models B/2 XL/2 --official PATH
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from common import Comparison, report
from comparisons.official import MODULES, Official, OfficialTraining
from counting import H200_PRODUCTS, adaln_traffic, forward_flops, parameters, training_flops
from reglue.data.batches import TrainingData
from reglue.diffusion.modalities import CLS, LOCAL
from reglue.published.weights import export_official
from training_step import TrainingStep
from workloads import Workload, loss_weights, random_store

BYTES_PER_PARAMETER = {
    # float32: read or written once each
    "AdamW": 4 * 7,  # weight, gradient, two moments read; weight, two moments written
    "clipping": 4 * 3,  # gradient read for its norm; read and written when scaled
    "moving average": 4 * 3,  # weight and average read, average written
    "weights for bfloat16": 4 + 2,  # read, written in half the size
}


@dataclass(frozen=True)
class Limits:
    """Count matrix operations, bytes of the optimiser, operators and waits for the device per training step."""

    conditions: Annotated[Comparison, tyro.conf.arg(name="")] = field(default_factory=Comparison)
    models: tuple[str, ...] = ("B/2", "XL/2")
    batch_size: int = 256
    peak_flops: float = H200_PRODUCTS
    """Matrix operations per second of the GPU in bfloat16: of an H200, assumed (`counting.H200_PRODUCTS`)."""
    bandwidth: float = 4.0e12
    """Bytes per second of its memory, of an H200: what can be reached of 4.8e12."""


class Operators(TorchDispatchMode):
    """Counts the operators that are dispatched, and those that fetch a number from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.fetched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, then run."""
        name = func.overloadpacket.__name__
        if not func.is_view and name != "detach":  # views start no kernel
            self.count += 1
        self.fetched += name == "_local_scalar_dense"
        return func(*args, **(kwargs or {}))


def limits(options: Limits) -> str:
    """Count everything."""
    device = torch.device("cpu")
    models = ("toy",) if options.conditions.toy else options.models
    figures: dict[str, Any] = {model: of_model(model, options) for model in models}
    figures["encoder_flops_per_image"] = 0 if options.conditions.toy else encoder_flops()
    figures["compressor_flops_per_image"] = compressor_flops()
    figures["operators"] = operators(options, device)
    return report("limits", options, figures, device)


def of_model(model: str, options: Limits) -> dict[str, Any]:
    """Time that matrix products and memory ask for, at least."""
    workload = Workload.of("toy") if model == "toy" else Workload.of("imagenet", model)
    weights = parameters(workload.config)
    flops = training_flops(workload.config) * options.batch_size
    moved = {name: bytes_ * weights for name, bytes_ in BYTES_PER_PARAMETER.items()}
    return {
        "parameters": weights,
        "flops_per_step": flops,
        "forward_flops_per_image": forward_flops(workload.config),
        "matrix_milliseconds_at_peak": 1e3 * flops / options.peak_flops,
        "optimiser_gigabytes": {name: value / 1e9 for name, value in moved.items()},
        "optimiser_milliseconds": 1e3 * sum(moved.values()) / options.bandwidth,
        "adaln_per_block": (adaln := adaln_traffic(workload.config, options.batch_size)),
        "adaln_milliseconds": {
            name: 1e3 * workload.config.depth * adaln[name] / options.bandwidth for name in ("bytes", "bytes_fused")
        },
    }


def encoder_flops() -> int:
    """Of DINOv2-B with registers at 224 px, forward, one image."""
    import timm

    with torch.device("meta"):
        network: Any = timm.create_model("vit_base_patch14_reg4_dinov2", num_classes=0, img_size=224)
        with FlopCounterMode(display=False) as counter:
            network.forward_features(torch.empty(1, 3, 224, 224))
    return counter.get_total_flops()


def compressor_flops() -> int:
    """Of REGLUE's compressor (encoder half, 3072 → 256 → 16 channels on 16×16), forward, one image: four 3×3
    convolutions."""
    return 2 * 9 * 16 * 16 * (3072 * 256 + 2 * 256 * 256 + 256 * 16)


def operators(options: Limits, device: torch.device) -> dict[str, dict[str, int]]:
    """Operators of one step of 12 blocks, which are as many for every width: ours and theirs, on the CPU in float32.

    Ours are counted from the draft of a sample on, theirs from the moments on.
    """
    toy = options.conditions.toy
    workload = Workload.of("toy", None if toy else "12x32x2/2")
    batch = 4 if toy else options.batch_size
    start = workload.random_model()
    with TemporaryDirectory() as folder:
        store = random_store(Path(folder) / "store", workload, batch)
        data = TrainingData(store, workload.recipe, workload.config, 0, device)
        draft = data.read(range(batch))
        latent = store.read("latent", torch.arange(batch))
    ours = TrainingStep(workload.recipe, workload.config, device, "float32", start=start)
    counted = {"ours": count(lambda: ours(data.finish(draft)))}
    if options.conditions.official:
        official = Official.load(options.conditions.official, *MODULES)
        model = official.model(workload.config)
        model.load_state_dict(export_official("reglue", workload.config, start.state_dict()))
        theirs = OfficialTraining(official, model, loss_weights(workload.recipe), "no", cpu=True)
        moments = torch.cat(list(latent.values()), dim=1)
        sample = data.finish(draft)
        assert sample.alignment_target is not None
        semantics = sample.data[LOCAL], sample.data[CLS], sample.alignment_target
        counted["theirs"] = count(lambda: theirs.step(moments, store.labels, lambda: semantics))
    return counted


def count(step: Callable[[], None]) -> dict[str, int]:
    """Of a second step: the first one makes the optimiser's state."""
    step()
    with Operators() as seen:
        step()
    return {"operators": seen.count, "numbers_fetched": seen.fetched}


if __name__ == "__main__":
    options = tyro.cli(Limits, description=__doc__)
    torch.set_num_threads(options.conditions.threads)
    limits(options)
