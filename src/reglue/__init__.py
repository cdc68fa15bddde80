"""Latent diffusion transformers that learn images together with their semantics.

model = reglue.load("run")                # a run folder, or OWNER/NAME on the Hugging Face hub
images = model.generate(classes=[207, 88], seed=0)

Everything that a command does is a function of a dataclass of its options: `reglue.prepare(reglue.Prepare(...))`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from reglue.commands.autoencode import autoencode as autoencode
    from reglue.commands.compress import compress as compress
    from reglue.commands.demo import demo as demo
    from reglue.commands.edit import edit as edit
    from reglue.commands.evaluate import evaluate as evaluate
    from reglue.commands.export_run import export_run as export_run
    from reglue.commands.import_run import import_run as import_run
    from reglue.commands.info import info as info
    from reglue.commands.list_runs import list_runs as list_runs
    from reglue.commands.perceive import perceive as perceive
    from reglue.commands.prepare import prepare as prepare
    from reglue.commands.probe import probe as probe
    from reglue.commands.prototypes import prototypes as prototypes
    from reglue.commands.reencode import reencode as reencode
    from reglue.commands.report import report as report
    from reglue.commands.sample import sample as sample
    from reglue.commands.studio import studio as studio
    from reglue.commands.synthesise import synthesise as synthesise
    from reglue.commands.train import train as train
    from reglue.commands.train_head import train_head as train_head
    from reglue.commands.verify import verify as verify
    from reglue.config import Recipe as Recipe
    from reglue.data.store import Store as Store
    from reglue.diffusion.controls import Control as Control
    from reglue.encoders.autoencoders import load_autoencoder as load_autoencoder
    from reglue.encoders.compressors import load_compressor as load_compressor
    from reglue.encoders.vision import load_encoder as load_encoder
    from reglue.errors import Stopped as Stopped
    from reglue.errors import UserError as UserError
    from reglue.options.autoencode import Autoencode as Autoencode
    from reglue.options.compress import Compress as Compress
    from reglue.options.demo import Demo as Demo
    from reglue.options.edit import Edit as Edit
    from reglue.options.evaluate import Evaluate as Evaluate
    from reglue.options.export_run import ExportRun as ExportRun
    from reglue.options.import_run import ImportRun as ImportRun
    from reglue.options.info import Info as Info
    from reglue.options.list_runs import ListRuns as ListRuns
    from reglue.options.perceive import Perceive as Perceive
    from reglue.options.prepare import Prepare as Prepare
    from reglue.options.probe import Probe as Probe
    from reglue.options.prototypes import MakePrototypes as MakePrototypes
    from reglue.options.reencode import Reencode as Reencode
    from reglue.options.report import Report as Report
    from reglue.options.sample import Sample as Sample
    from reglue.options.studio import Studio as Studio
    from reglue.options.synthesise import Synthesise as Synthesise
    from reglue.options.train import Train as Train
    from reglue.options.train_head import TrainHead as TrainHead
    from reglue.options.verify import Verify as Verify
    from reglue.papers import RECIPES as recipes  # noqa: F401, N811 a module's public names are its attributes
    from reglue.perception.heads import load_head as load_head
    from reglue.pipeline import ImageModel as ImageModel
    from reglue.pipeline import load as load
    from reglue.sampling import Sampling as Sampling

# Everything is imported when it is first used: `import reglue` need not wait for PyTorch.
_COMMANDS = {
    "Prepare": "prepare",
    "Reencode": "reencode",
    "Compress": "compress",
    "Autoencode": "autoencode",
    "Train": "train",
    "Sample": "sample",
    "Edit": "edit",
    "Evaluate": "evaluate",
    "MakePrototypes": "prototypes",
    "Probe": "probe",
    "TrainHead": "train_head",
    "Perceive": "perceive",
    "Synthesise": "synthesise",
    "ImportRun": "import_run",
    "ExportRun": "export_run",
    "Report": "report",
    "Info": "info",
    "ListRuns": "list_runs",
    "Verify": "verify",
    "Studio": "studio",
    "Demo": "demo",
}
"""The options of each command → its module's name, which is that of its function too."""
_HOMES = {
    "load": "reglue.pipeline",
    "ImageModel": "reglue.pipeline",
    "Sampling": "reglue.sampling",
    "Control": "reglue.diffusion.controls",
    **{options: f"reglue.options.{name}" for options, name in _COMMANDS.items()},
    **{name: f"reglue.commands.{name}" for name in _COMMANDS.values()},
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
"""Name → module, or module and the name there."""
__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll], which goes by the imports above


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
