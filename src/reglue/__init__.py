"""Latent diffusion transformers that learn images together with their semantics.

model = reglue.load("run")                # a run folder, or OWNER/NAME on the Hugging Face hub
images = model.generate(classes=[207, 88], seed=0)

Everything that a command does is a function of a dataclass of its options: `reglue.prepare(reglue.Prepare(...))`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from reglue.commands.autoencode import autoencode
    from reglue.commands.compress import compress
    from reglue.commands.demo import demo
    from reglue.commands.edit import edit
    from reglue.commands.evaluate import evaluate
    from reglue.commands.export_run import export_run
    from reglue.commands.import_run import import_run
    from reglue.commands.info import info
    from reglue.commands.list_runs import list_runs
    from reglue.commands.perceive import perceive
    from reglue.commands.prepare import prepare
    from reglue.commands.probe import probe
    from reglue.commands.prototypes import prototypes
    from reglue.commands.reencode import reencode
    from reglue.commands.report import report
    from reglue.commands.sample import sample
    from reglue.commands.studio import studio
    from reglue.commands.synthesise import synthesise
    from reglue.commands.train import train
    from reglue.commands.train_head import train_head
    from reglue.commands.verify import verify
    from reglue.config import Recipe
    from reglue.data.store import Store
    from reglue.diffusion.controls import Control
    from reglue.encoders.autoencoders import load_autoencoder
    from reglue.encoders.compressors import load_compressor
    from reglue.encoders.vision import load_encoder
    from reglue.errors import Stopped, UserError
    from reglue.options.autoencode import Autoencode
    from reglue.options.compress import Compress
    from reglue.options.demo import Demo
    from reglue.options.edit import Edit
    from reglue.options.evaluate import Evaluate
    from reglue.options.export_run import ExportRun
    from reglue.options.import_run import ImportRun
    from reglue.options.info import Info
    from reglue.options.list_runs import ListRuns
    from reglue.options.perceive import Perceive
    from reglue.options.prepare import Prepare
    from reglue.options.probe import Probe
    from reglue.options.prototypes import MakePrototypes
    from reglue.options.reencode import Reencode
    from reglue.options.report import Report
    from reglue.options.sample import Sample
    from reglue.options.studio import Studio
    from reglue.options.synthesise import Synthesise
    from reglue.options.train import Train
    from reglue.options.train_head import TrainHead
    from reglue.options.verify import Verify
    from reglue.papers import RECIPES as recipes  # noqa: N811 a module's public names are its attributes
    from reglue.perception.heads import load_head
    from reglue.pipeline import ImageModel, load
    from reglue.sampling import Sampling

# Name → module, or module and the name there. Imported when first used: `import reglue` need not wait for PyTorch.
_HOMES = {
    # using models
    "load": "reglue.pipeline",
    "ImageModel": "reglue.pipeline",
    "Sampling": "reglue.sampling",
    "Control": "reglue.diffusion.controls",
    # the commands
    "Prepare": "reglue.options.prepare",
    "prepare": "reglue.commands.prepare",
    "Reencode": "reglue.options.reencode",
    "reencode": "reglue.commands.reencode",
    "Compress": "reglue.options.compress",
    "compress": "reglue.commands.compress",
    "Autoencode": "reglue.options.autoencode",
    "autoencode": "reglue.commands.autoencode",
    "Train": "reglue.options.train",
    "train": "reglue.commands.train",
    "Sample": "reglue.options.sample",
    "sample": "reglue.commands.sample",
    "Edit": "reglue.options.edit",
    "edit": "reglue.commands.edit",
    "Evaluate": "reglue.options.evaluate",
    "evaluate": "reglue.commands.evaluate",
    "MakePrototypes": "reglue.options.prototypes",
    "prototypes": "reglue.commands.prototypes",
    "Probe": "reglue.options.probe",
    "probe": "reglue.commands.probe",
    "TrainHead": "reglue.options.train_head",
    "train_head": "reglue.commands.train_head",
    "Perceive": "reglue.options.perceive",
    "perceive": "reglue.commands.perceive",
    "Synthesise": "reglue.options.synthesise",
    "synthesise": "reglue.commands.synthesise",
    "ImportRun": "reglue.options.import_run",
    "import_run": "reglue.commands.import_run",
    "ExportRun": "reglue.options.export_run",
    "export_run": "reglue.commands.export_run",
    "Report": "reglue.options.report",
    "report": "reglue.commands.report",
    "Info": "reglue.options.info",
    "info": "reglue.commands.info",
    "ListRuns": "reglue.options.list_runs",
    "list_runs": "reglue.commands.list_runs",
    "Verify": "reglue.options.verify",
    "verify": "reglue.commands.verify",
    "Studio": "reglue.options.studio",
    "studio": "reglue.commands.studio",
    "Demo": "reglue.options.demo",
    "demo": "reglue.commands.demo",
    # parts
    "Recipe": "reglue.config",
    "recipes": "reglue.papers:RECIPES",
    "Store": "reglue.data.store",
    "load_encoder": "reglue.encoders.vision",
    "load_autoencoder": "reglue.encoders.autoencoders",
    "load_compressor": "reglue.encoders.compressors",
    "load_head": "reglue.perception.heads",
    "Stopped": "reglue.errors",
    "UserError": "reglue.errors",
}

__all__ = [  # noqa: RUF022 in the order of use
    "load",
    "ImageModel",
    "Sampling",
    "Control",
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
    "Edit",
    "edit",
    "Evaluate",
    "evaluate",
    "MakePrototypes",
    "prototypes",
    "Probe",
    "probe",
    "TrainHead",
    "train_head",
    "Perceive",
    "perceive",
    "Synthesise",
    "synthesise",
    "ImportRun",
    "import_run",
    "ExportRun",
    "export_run",
    "Report",
    "report",
    "Info",
    "info",
    "ListRuns",
    "list_runs",
    "Verify",
    "verify",
    "Studio",
    "studio",
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
