"""Latent diffusion transformers that learn images together with their semantics.

model = reglue.load("run")                # a run folder, or OWNER/NAME on the Hugging Face hub
images = model.generate(classes=[207, 88], seed=0)

Everything that a command does is a function of a dataclass of its options: `reglue.prepare(reglue.Prepare(...))`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from reglue.data.store import Store
    from reglue.diffusion.guidance import Guidance
    from reglue.errors import Stopped, UserError
    from reglue.jobs.autoencode import Autoencode, autoencode
    from reglue.jobs.compress import Compress, compress
    from reglue.jobs.demo import Demo, demo
    from reglue.jobs.evaluate import Evaluate, evaluate
    from reglue.jobs.export_run import ExportRun, export_run
    from reglue.jobs.import_run import ImportRun, import_run
    from reglue.jobs.perceive import Perceive, perceive
    from reglue.jobs.prepare import Prepare, prepare
    from reglue.jobs.probe import Probe, probe
    from reglue.jobs.reencode import Reencode, reencode
    from reglue.jobs.sample import Sample, sample
    from reglue.jobs.train import Train, train
    from reglue.jobs.train_head import TrainHead, train_head
    from reglue.jobs.verify import Verify, verify
    from reglue.latents.autoencoders import load_autoencoder
    from reglue.papers import RECIPES as recipes  # noqa: N811 a module's public names are its attributes
    from reglue.recipe import Recipe, Sampling
    from reglue.runs.generation import ImageModel, load
    from reglue.semantics.compressors import load_compressor
    from reglue.semantics.encoders import load_encoder
    from reglue.semantics.heads import load_head

# Name → module, or module and the name there. Imported when first used: `import reglue` need not wait for PyTorch.
_HOMES = {
    # using models
    "load": "reglue.runs.generation",
    "ImageModel": "reglue.runs.generation",
    "Sampling": "reglue.recipe",
    "Guidance": "reglue.diffusion.guidance",
    # the commands
    "Prepare": "reglue.jobs.prepare",
    "prepare": "reglue.jobs.prepare",
    "Reencode": "reglue.jobs.reencode",
    "reencode": "reglue.jobs.reencode",
    "Compress": "reglue.jobs.compress",
    "compress": "reglue.jobs.compress",
    "Autoencode": "reglue.jobs.autoencode",
    "autoencode": "reglue.jobs.autoencode",
    "Train": "reglue.jobs.train",
    "train": "reglue.jobs.train",
    "Sample": "reglue.jobs.sample",
    "sample": "reglue.jobs.sample",
    "Evaluate": "reglue.jobs.evaluate",
    "evaluate": "reglue.jobs.evaluate",
    "Probe": "reglue.jobs.probe",
    "probe": "reglue.jobs.probe",
    "TrainHead": "reglue.jobs.train_head",
    "train_head": "reglue.jobs.train_head",
    "Perceive": "reglue.jobs.perceive",
    "perceive": "reglue.jobs.perceive",
    "ImportRun": "reglue.jobs.import_run",
    "import_run": "reglue.jobs.import_run",
    "ExportRun": "reglue.jobs.export_run",
    "export_run": "reglue.jobs.export_run",
    "Verify": "reglue.jobs.verify",
    "verify": "reglue.jobs.verify",
    "Demo": "reglue.jobs.demo",
    "demo": "reglue.jobs.demo",
    # parts
    "Recipe": "reglue.recipe",
    "recipes": "reglue.papers:RECIPES",
    "Store": "reglue.data.store",
    "load_encoder": "reglue.semantics.encoders",
    "load_autoencoder": "reglue.latents.autoencoders",
    "load_compressor": "reglue.semantics.compressors",
    "load_head": "reglue.semantics.heads",
    "Stopped": "reglue.errors",
    "UserError": "reglue.errors",
}

__all__ = [  # noqa: RUF022 in the order of use
    "load",
    "ImageModel",
    "Sampling",
    "Guidance",
    "Prepare",
    "prepare",
    "Reencode",
    "reencode",
    "Compress",
    "compress",
    "Autoencode",
    "autoencode",
    "Train",
    "train",
    "Sample",
    "sample",
    "Evaluate",
    "evaluate",
    "Probe",
    "probe",
    "TrainHead",
    "train_head",
    "Perceive",
    "perceive",
    "ImportRun",
    "import_run",
    "ExportRun",
    "export_run",
    "Verify",
    "verify",
    "Demo",
    "demo",
    "Recipe",
    "recipes",
    "Store",
    "load_encoder",
    "load_autoencoder",
    "load_compressor",
    "load_head",
    "Stopped",
    "UserError",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'reglue' has no attribute {name!r}")
    module, _, inside = _HOMES[name].partition(":")
    value = getattr(import_module(module), inside or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
