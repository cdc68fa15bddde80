"""A run as graphs, for whoever has not this code: of ONNX, and models that compute with them, or of torch.export.

Such a folder is that of a run whose checkpoint is a graph:

    run.json               the record
    graphs.json            inputs and outputs of the graphs, how modalities are scaled, how images are drawn
    checkpoints/STEP/denoiser.onnx
                           noisy modalities (B, …), time (B,) and conditions (B, …) to velocities
    decoder.onnx           raw latents (B, C, H, W) to images (B, 3, H, W) in [−1, 1]
    encoder.onnx           uint8 images (B, 3, H, W) to the modalities, as the denoiser learns them

Programs of torch.export end in .pt2. PyTorch unpickles parts of them, so none but those just written are opened here.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from inspect import signature
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reglue.diffusion.conditions import Condition
from reglue.diffusion.denoiser import Denoiser, DenoiserConfig, Prediction
from reglue.diffusion.embeddings import SPAN
from reglue.diffusion.modalities import LATENT, Normalisation, State, TensorTimes, times_of_each
from reglue.editing.encoding import ImageEncoder
from reglue.encoders.autoencoders import Autoencoder, AutoencoderSpec, Moments
from reglue.errors import UserError, one_line
from reglue.extras import need
from reglue.files import read_json, to_json
from reglue.names import GraphFormat, GraphPrecision
from reglue.run import RunRecord
from reglue.sampling import Sampling
from reglue.training import checkpoints

DECODER, ENCODER, DESCRIPTION = "decoder.onnx", "encoder.onnx", "graphs.json"
REMEDY = "export the run again"
TIME = "time"
OF = "of_"
"""In front of the names of conditions within a module that is exported, for `class` is a word of Python's."""
MOST = 4096
"""Images in a batch of a graph that takes any number."""


class Graph:
    """An ONNX graph in onnxruntime, on the CPU."""

    def __init__(self, file: Path) -> None:
        """Raises UserError if it is missing or damaged, or onnxruntime is not installed."""
        runtime = needed("onnxruntime")
        try:
            options = runtime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            self.session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # It has a kind of its own for everything that a file may lack.
            raise UserError(f"{file} cannot be read ({one_line(error)}); {REMEDY}") from error
        self.inputs = {each.name: each for each in self.session.get_inputs()}
        self.outputs = [each.name for each in self.session.get_outputs()]

    def __call__(self, **given: Tensor) -> dict[str, Tensor]:
        """The outputs by name, on the CPU."""
        feeds = {name: given[name].detach().cpu().numpy() for name in self.inputs}
        results = self.session.run(self.outputs, feeds)
        return {name: torch.from_numpy(np.asarray(value)) for name, value in zip(self.outputs, results, strict=True)}

    def __deepcopy__(self, memo: dict[int, Any]) -> Graph:
        return self  # It has no state.


class GraphDenoiser(Denoiser):
    """A denoiser whose network is a graph."""

    def __init__(self, config: DenoiserConfig, file: Path) -> None:
        """Raises UserError as `Graph` does, and for a graph of other sizes."""
        nn.Module.__init__(self)
        self.config, self.graph = config, Graph(file)
        self.register_buffer("positions", torch.zeros(0), persistent=False)  # It says where a model is.
        expected = {name: [None, *shape] for name, shape in config.shapes().items()}
        for name, shape in expected.items():
            found = self.graph.inputs[name].shape if name in self.graph.inputs else []
            if list(found[1:]) != shape[1:]:
                raise UserError(f"{file} is not of this run: it has {name} {found}; {REMEDY}")

    def forward(self, state: State, time: Tensor | TensorTimes, condition: Condition) -> Prediction:
        """See `Denoiser.forward`."""
        if self.config.span:
            time = times_of_each(time, state)
            time = {SPAN: torch.zeros_like(time[LATENT]), **time}
        times = {TIME: time} if isinstance(time, Tensor) else {f"{TIME}_{name}": t for name, t in time.items()}
        seen = {name: value.float() for name, value in ({**state, **times}).items()}
        found = self.graph(**seen, **condition)
        return Prediction({name: found[f"velocity_{name}"].to(state[name].device) for name in state}, None)


class GraphAutoencoder(Autoencoder):
    """The decoder of a run, as a graph."""

    of_one_size = True

    def __init__(self, spec: AutoencoderSpec, file: Path) -> None:
        super().__init__()
        self.spec, self.graph = spec, Graph(file)

    def encode(self, images: Tensor) -> Moments:
        """There is no such graph: raises UserError."""
        raise UserError("an exported run has no autoencoder to encode with; edit with the run that it was made of")

    def decode(self, latents: Tensor) -> Tensor:
        """See `Autoencoder.decode`."""
        return self.graph(latents=latents.float())["images"].to(latents.device)


class FlatDenoiser(nn.Module):
    """A denoiser from tensors in a row to tensors in a row, as graphs have them."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = deepcopy(denoiser)
        self.denoiser.conditions = nn.ModuleDict({OF + name: part for name, part in denoiser.conditions.items()})
        self.names = list(denoiser.config.shapes())
        spans = [SPAN] if denoiser.config.span else []
        self.timed = [*self.names, *spans] if spans or denoiser.config.times != "shared" else []
        self.times = [f"{TIME}_{name}" for name in self.timed] or [TIME]
        self.inputs = [*self.names, *self.times, *denoiser.config.conditions]
        self.outputs = [f"velocity_{name}" for name in self.names]

    def example(self, batch: int) -> tuple[Tensor, ...]:
        """Inputs of a seed of their own, as many images."""
        draws = torch.Generator().manual_seed(0)
        state = [torch.randn(batch, *shape, generator=draws) for shape in self.denoiser.config.shapes().values()]
        times = [torch.rand(batch, generator=draws) for _ in self.times]
        return (*state, *times, *Denoiser.null(self.denoiser, batch).values())

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """The `inputs`, (B, …) each, to the `outputs`."""
        count, until = len(self.names), len(self.names) + len(self.times)
        state, times = dict(zip(self.names, given, strict=False)), given[count:until]
        time = dict(zip(self.timed, times, strict=True)) if self.timed else times[0]
        names = (OF + name for name in self.denoiser.config.conditions)
        velocity = self.denoiser(state, time, dict(zip(names, given[until:], strict=True))).velocity
        return tuple(velocity[name] for name in self.names)


class Function(nn.Module):
    """A function of one tensor as a module that holds the networks it uses."""

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, ...]], *networks: nn.Module | None) -> None:
        super().__init__()
        self.function, self.networks = function, nn.ModuleList(network for network in networks if network)

    def forward(self, given: Tensor) -> tuple[Tensor, ...]:
        """The function's."""
        return self.function(given)


@dataclass(frozen=True)
class Written:
    """A graph that has been written, beside the network that it was made of."""

    file: str
    """Its place in the folder."""
    inputs: tuple[str, ...]
    """In their order."""
    outputs: tuple[str, ...]
    bytes: int
    sha256: str
    difference: float
    """Of the outputs, ‖graph − PyTorch‖ / ‖PyTorch‖ on one batch."""
    largest: float | None = None
    """The largest difference of a single number among them."""

    @property
    def apart(self) -> str:
        """How far it is from PyTorch, in words."""
        return f"{self.difference:.1e} from PyTorch" + (f", {self.largest:.1e} at most" if self.largest else "")


@dataclass(frozen=True)
class Scaled:
    """A modality as a runtime needs it."""

    name: str
    kind: str
    shape: tuple[int, ...]
    """Without the batch."""
    shift: tuple[float, ...]
    scale: tuple[float, ...]
    """The model learns (raw − shift)·scale, per channel; the decoder takes raw latents."""


@dataclass(frozen=True)
class Description:
    """`graphs.json`: all that a runtime needs besides the graphs."""

    precision: GraphPrecision
    batch: int | None
    """The number of images that the graphs take; None for any."""
    step: int
    class_names: tuple[str, ...]
    """In the order of the labels; the number of classes stands for none."""
    resolution: tuple[int, int]
    """Height and width in pixels."""
    path: str
    """Interpolant: x_t = (1 − t)·x + t·noise if linear."""
    modalities: tuple[Scaled, ...]
    sampling: dict[str, Any]
    """How images are drawn by default."""
    graphs: tuple[Written, ...]

    @classmethod
    def read(cls, folder: Path) -> Description:
        """That of an exported run. Raises UserError if it is missing or damaged."""
        return read_json(folder / DESCRIPTION, cls, REMEDY)


def write(
    folder: Path,
    record: RunRecord,
    denoiser: Denoiser,
    autoencoder: Autoencoder,
    encoder: ImageEncoder | None,
    step: int,
    sampling: Sampling,
    to: GraphFormat = "onnx",
    precision: GraphPrecision = "float32",
    batch: int | None = None,
) -> Description:
    """Write a run's graphs into an empty folder. All networks are on the CPU.

    Without an `encoder` there is no graph that encodes images. `batch` fixes the number of images that the graphs take.
    Raises UserError as `write_graph`.
    """
    config, size = record.denoiser, batch or 2  # A batch of one would be taken for a constant.
    flat = FlatDenoiser(denoiser)
    checkpoint = folder / checkpoints.FOLDER / f"{step:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / checkpoints.PROGRESS).write_text(to_json(checkpoints.Progress(step)))
    draws = torch.Generator().manual_seed(0)
    latents = config.modalities[0].denormalise(torch.randn(size, *config.shapes()[LATENT], generator=draws))
    emit = partial(write_graph, folder, to=to, precision=precision, batch=batch)
    graphs = [
        emit(checkpoint / checkpoints.GRAPH, flat, flat.example(size), flat.inputs, flat.outputs),
        emit(folder / DECODER, Function(decoding(autoencoder), autoencoder), (latents,), ["latents"], ["images"]),
    ]
    if encoder:
        pixels = torch.randint(0, 256, (size, 3, *record.resolution), generator=draws, dtype=torch.uint8)
        networks = encoder.autoencoder, encoder.encoder, *encoder.compressors.values()
        graphs.append(emit(folder / ENCODER, Function(encoding(encoder), *networks), (pixels,), ["pixels"], flat.names))
    plain = Normalisation((0.0,), (1.0,))
    modalities = [
        Scaled(m.name, m.kind, config.shapes()[m.name], norm.shift, norm.scale)
        for m in config.modalities
        for norm in [m.normalisation or plain]
    ]
    described = Description(
        precision,
        batch,
        step,
        record.class_names,
        record.resolution,
        config.path,
        tuple(modalities),
        asdict(sampling),
        tuple(graphs),
    )
    (folder / DESCRIPTION).write_text(to_json(described))
    return described


def decoding(autoencoder: Autoencoder) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Latents to images, as a graph has it."""
    return lambda latents: (autoencoder.decode(latents),)


def encoding(encoder: ImageEncoder) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Images to the modalities, in the model's order."""
    return lambda pixels: tuple(encoder.encode(pixels).values())


def write_graph(
    folder: Path,
    file: Path,
    network: nn.Module,
    example: tuple[Tensor, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    to: GraphFormat,
    precision: GraphPrecision,
    batch: int | None,
) -> Written:
    """Export a network as a file in a folder, and compare them. `batch` fixes the number of images, None leaves it.

    The file's name ends as its format says. float16 halves weights and arithmetic, with inputs and outputs in float32;
    int8 quantises the weights of matrix products, and their inputs as they come. Raises UserError if the network has
    an operation that the format lacks.
    """
    network, form = network.eval().requires_grad_(False), FORMATS[to]
    file = file.with_suffix(form.suffix)
    free = torch.export.Dim("batch", min=1, max=MOST)
    shapes = tuple({0: free} for _ in example) if batch is None else None
    if shapes and any(p.kind == p.VAR_POSITIONAL for p in signature(network.forward).parameters.values()):
        shapes = (shapes,)
    given = dict(zip(inputs, example, strict=True))
    with quietly(), torch.no_grad():
        try:
            form.save(file, network, example, shapes, inputs, outputs, precision)
        except Exception as error:
            raise UserError(f"{file.name} cannot be exported to {to} ({one_line(error)})") from error
        found, expected = form.run(file, given, outputs), network(*example)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    apart = distances([found[name] for name in outputs], expected)
    place = file.relative_to(folder).as_posix()
    return Written(place, tuple(inputs), tuple(outputs), file.stat().st_size, digest, *apart)


@dataclass(frozen=True)
class Format:
    """What graphs are written as."""

    suffix: str
    packages: tuple[str, ...]
    """That must be installed."""
    save: Callable[..., None]
    """Write a network: `save_onnx`, `save_torch`."""
    run: Callable[[Path, Mapping[str, Tensor], Sequence[str]], Mapping[str, Tensor]]
    """The outputs, by these names, of what was just written, for these inputs."""


def save_onnx(
    file: Path,
    network: nn.Module,
    example: tuple[Tensor, ...],
    shapes: Any,
    inputs: Sequence[str],
    outputs: Sequence[str],
    precision: GraphPrecision,
) -> None:
    """Write a network with these inputs, dynamic shapes and names of inputs and outputs as an ONNX graph."""
    onnx = needed("onnx")
    program = torch.onnx.export(
        network,
        example,
        dynamo=True,
        input_names=[*inputs],
        output_names=[*outputs],
        dynamic_shapes=shapes,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto  # a new one each time
    without_origins(model)
    onnx.save(model, str(file))
    if precision == "float16":
        as_float16(file)
    elif precision == "int8":
        as_int8(file)


def save_torch(file: Path, network: nn.Module, example: tuple[Tensor, ...], shapes: Any, *_: object) -> None:
    """The same as a program of torch.export, which has its inputs and outputs in a row, without names."""
    from torch._dynamo.exc import UserError as ConstraintError  # slow to import

    try:
        program = torch.export.export(network, example, dynamic_shapes=shapes)
    except ConstraintError as error:  # diffusers' decoders treat 64 images and more otherwise.
        shapes = torch.export.dynamic_shapes.refine_dynamic_shapes_from_suggested_fixes(error.msg, shapes)
        program = torch.export.export(network, example, dynamic_shapes=shapes)
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # It names the folders of this machine.
    torch.export.save(program, file)


def run_torch(file: Path, given: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
    """See `Format.run`: for nothing that a stranger may have written."""
    return dict(zip(outputs, torch.export.load(file).module()(*given.values()), strict=True))


FORMATS: dict[GraphFormat, Format] = {
    "onnx": Format(
        ".onnx", ("onnx", "onnxscript", "onnxruntime"), save_onnx, lambda file, given, _: Graph(file)(**given)
    ),
    "torch": Format(".pt2", (), save_torch, run_torch),
}


def without_origins(model: Any) -> None:
    """Remove from a graph what tells of each node where in PyTorch's code it comes from: half of a small graph."""
    for part in (model, model.graph, *model.functions, *model.graph.node, *model.graph.value_info):
        for name in ("metadata_props", "doc_string"):
            if name in part.DESCRIPTOR.fields_by_name:
                part.ClearField(name)


def distances(found: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, float]:
    """‖found − expected‖ / ‖expected‖ over all tensors, and the largest difference of two numbers."""
    graph, torchs = (torch.cat([part.double().flatten() for part in parts]) for parts in (found, expected))
    difference = graph - torchs
    return (difference.norm() / torchs.norm().clamp(min=1e-12)).item(), difference.abs().max().item()


def as_float16(file: Path) -> None:
    """Halve a graph's weights and arithmetic; what it takes and gives stays float32."""
    onnx, convert = needed("onnx"), import_module("onnxruntime.transformers.float16").convert_float_to_float16
    onnx.save(convert(onnx.load(str(file)), keep_io_types=True), str(file))


def as_int8(file: Path) -> None:
    """Quantise the weights of a graph's matrix products to 8 bits, and what they multiply when they do."""
    quantisation = import_module("onnxruntime.quantization")
    beside = file.with_suffix(".int8")
    quantisation.quantize_dynamic(str(file), str(beside), op_types_to_quantize=["MatMul", "Gemm"], per_channel=True)
    beside.replace(file)


@contextmanager
def quietly() -> Iterator[None]:
    """Without what exporters and quantisers print about themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def needed(package: str) -> Any:
    """A package of the extra. Raises UserError if it is not installed."""
    need("this", package)
    return import_module(package)
