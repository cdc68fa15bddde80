"""What a training step does and does not do: compiling, computing again, waiting for the device, reading ahead."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import reglue.commands.train
import reglue.data.batches
from helpers import TINY_RECIPE
from reglue.cli import parse
from reglue.commands.train import Losses, train
from reglue.config import Compile, Recipe
from reglue.data import images
from reglue.data.batches import TrainingData, denoiser_config
from reglue.data.store import Store
from reglue.data.targets import AlignmentTargets
from reglue.diffusion.backbones import parts as backbone_parts
from reglue.diffusion.backbones.attention import attention
from reglue.diffusion.denoiser import Denoiser
from reglue.diffusion.objective import TrainingSample, loss_terms, weighted_sum
from reglue.diffusion.paths import PATHS
from reglue.papers import RECIPES
from reglue.sampling import Precision
from reglue.training import parallel
from reglue.training.precision import autocast, compile_parts

RECIPE = replace(
    RECIPES["reglue"], model="4x32x2/2", local=replace(RECIPES["reglue"].local, compressor="conv-4", dropout=0.2)
)


@pytest.fixture
def data(tiny_store: Path) -> TrainingData:
    store = Store.open(tiny_store)
    return TrainingData(store, RECIPE, denoiser_config(store, RECIPE), 0)


def awake(data: TrainingData) -> Denoiser:
    """A model whose blocks and heads do something: as initialised, they are zero."""
    torch.manual_seed(0)
    model = Denoiser(data.config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def loss_and_gradients(
    model: Denoiser,
    sample: TrainingSample,
    precision: Precision = "float32",
    losses: Callable[[TrainingSample], dict[str, torch.Tensor]] | None = None,
):
    model.zero_grad()
    with autocast(torch.device("cpu"), precision):
        terms = (losses or Losses(model, PATHS[RECIPE.path]))(sample)
    loss = weighted_sum(terms, RECIPE.loss_weights(0))
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("parts", "graphs"), [("blocks", 1), ("model", 1)])
@pytest.mark.parametrize("recomputed", [0, 2])
def test_compiled_without_a_break_and_once_for_all_blocks(
    parts: Compile, graphs: int, recomputed: int, data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo import utils

    torch._dynamo.reset()
    utils.counters.clear()
    of_module = torch.nn.Module.compile
    # Everything but the code that it generates, which takes minutes: any break in the graph is an error.
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **how: of_module(module, fullgraph=True, backend="aot_eager", **how)
    )
    sample = data.sample(range(4))
    model, compiled = awake(data), awake(data)
    losses = Losses(compiled, PATHS[RECIPE.path])
    compile_parts(losses, compiled.backbone.blocks, parts)
    compiled.backbone.recomputed_blocks = recomputed
    assert model.state_dict().keys() == compiled.state_dict().keys()
    loss, gradients = loss_and_gradients(model, sample)
    same, same_gradients = loss_and_gradients(compiled, sample, losses=losses)
    torch.testing.assert_close(same, loss, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same_gradients[name], gradient, rtol=1e-3, atol=1e-5)
    # Those of the blocks that are computed again are inside a checkpoint, where dynamo compiles once more.
    assert utils.counters["stats"]["unique_graphs"] <= graphs + (recomputed > 0 and parts == "blocks")
    assert not utils.counters["graph_break"]


@pytest.mark.parametrize("parts", ["blocks", "model"])
def test_a_network_of_other_sizes_in_the_same_process_is_compiled_for_its_own(
    parts: Compile, tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a run that is continued, alone in its process, would compute otherwise than the one that began it."""
    symbols: list[torch.SymInt] = []

    def watched(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        symbols.extend(value for value in inputs if isinstance(value, torch.SymInt))
        return graph.forward

    of_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: of_module(module, backend=watched, **how))
    tokens = set()
    for recipe in (RECIPE, replace(RECIPE, class_token=replace(RECIPE.class_token, weight=0.0))):
        store = Store.open(tiny_store)
        data = TrainingData(store, recipe, denoiser_config(store, recipe), 0)
        losses = Losses(awake(data), PATHS[recipe.path])
        compile_parts(losses, losses.denoiser.backbone.blocks, parts)
        losses(data.sample(range(4)))
        tokens.add(losses.denoiser.positions.shape[1])
    assert len(tokens) == 2
    assert not symbols


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    """A process group, over gloo, of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_compiled_blocks_stay_whole_however_gradients_are_sent(
    group_of_one: None, data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    torch._dynamo.config.optimize_ddp = True  # As PyTorch has it; compile_parts decides. A monkeypatch would delete it.
    compiled: list[torch.fx.GraphModule] = []

    def counted(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        compiled.append(graph)
        return aot_eager(graph, inputs)

    of_module = torch.nn.Module.compile
    compile = lambda module, **how: of_module(module, fullgraph=True, backend=counted, **how)  # noqa: E731
    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    # Buckets of a kilobyte, of which a block fills many.
    monkeypatch.setattr(parallel, "DistributedDataParallel", partial(DistributedDataParallel, bucket_cap_mb=1e-3))
    sample, model, alone = data.sample(range(4)), awake(data), awake(data)
    losses = Losses(model, PATHS[RECIPE.path])
    compile_parts(losses, model.backbone.blocks, "blocks")
    copies = parallel.parallelise(losses, model.backbone.blocks, 1, torch.device("cpu"), "float32")
    loss, gradients = loss_and_gradients(model, sample, losses=copies)
    same, same_gradients = loss_and_gradients(alone, sample)
    torch.testing.assert_close(loss, same, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, same_gradients[name], rtol=1e-3, atol=1e-5)
    assert isinstance(copies, DistributedDataParallel)
    assert len(compiled) == 1


def test_blocks_that_compute_again_keep_less_and_give_the_same_gradients(data: TrainingData) -> None:
    sample, model = data.sample(range(8)), awake(data)
    kept: dict[int, int] = {}
    results = {}
    for recomputed in (0, 2, 4):
        model.backbone.recomputed_blocks = recomputed
        storages: dict[int, int] = {}

        def keep(tensor: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            terms = loss_terms(model, PATHS[RECIPE.path], sample)
        kept[recomputed] = sum(storages.values())
        del terms
        results[recomputed] = loss_and_gradients(model, sample)
    assert kept[0] > kept[2] > kept[4]
    for recomputed in (2, 4):
        assert torch.equal(results[0][0], results[recomputed][0])
        for name, gradient in results[0][1].items():
            assert torch.equal(gradient, results[recomputed][1][name]), name


def test_attention_sees_half_precision_where_the_rest_of_the_step_has_it(
    data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flash attention takes nothing wider: one float32 among query, key and value, and it would not be chosen."""
    seen: list[tuple[torch.dtype, ...]] = []

    def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen.append((q.dtype, k.dtype, v.dtype))
        return attention(q, k, v)

    monkeypatch.setattr(backbone_parts, "attention", watched)
    sample, model = data.sample(range(2)), awake(data)
    dtypes: dict[Precision, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    for precision, dtype in dtypes.items():
        seen.clear()
        loss_and_gradients(model, sample, precision)
        assert seen == [(dtype,) * 3] * 4


class Waits(TorchFunctionMode):
    """Counts what makes the host wait for a device: calls that turn tensors into Python's numbers or move them."""

    NAMES = frozenset(["item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy", "nonzero"])

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in self.NAMES
        return func(*args, **(kwargs or {}))


class Scalars(TorchDispatchMode):
    """Counts numbers that are read out of tensors beneath Python."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("targets", ["cached", "decoded", "online"])
def test_nothing_waits_for_the_device_between_lines_of_the_log(
    targets: str, tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many waits in long runs as in short ones. Reading is done by threads, whose tensors are on the CPU anyway."""

    def waits(steps: int, log_every: int) -> int:
        command = ["train", "reglue", "--store", str(tiny_store), "--out", str(tmp_path / f"{steps}-{log_every}")]
        more = [f"--optimisation.steps={steps}", "--workers=1", "--optimisation.accumulate=2", "--optimisation.clip=1"]
        options = parse([*command, *TINY_RECIPE, *more, f"--alignment.targets={targets}"])
        with Waits() as python, Scalars() as beneath:
            train(replace(options, log_every=log_every))
        return python.count + beneath.count

    few = waits(2, 100)
    assert waits(8, 100) == few
    assert waits(8, 4) > few, "it counts nothing"


def test_gradients_that_are_not_clipped_stay_as_they_are() -> None:
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    gradients = [torch.tensor([3.0, torch.inf]), torch.tensor([4.0, 0.0])]
    for parameter, gradient in zip(parameters, gradients, strict=False):
        parameter.grad = gradient.clone()
    assert parallel.clip_gradients(parameters, 0.0) == torch.inf
    for parameter, gradient in zip(parameters, gradients, strict=False):
        assert torch.equal(torch.as_tensor(parameter.grad), gradient)
    parameters[0].grad = torch.tensor([3.0, 0.0])
    assert parallel.clip_gradients(parameters, 0.0) == parallel.clip_gradients(parameters, 1.0) == 5
    torch.testing.assert_close(parallel.clip_gradients(parameters, 0.0), torch.tensor(1.0))


@pytest.mark.parametrize(("targets", "network"), [("online", "encoder"), ("decoded", "compressor")])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_network_of_the_targets_computes_in_the_precision_of_training(
    precision: Precision,
    targets: str,
    network: str,
    tiny_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: set[torch.dtype] = set()
    made = reglue.data.batches.alignment_targets

    def watched(store: Store, recipe: Recipe, device: torch.device) -> AlignmentTargets:
        result = made(store, recipe, device)
        part = getattr(result, network)
        for module in getattr(part, "network", part).modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.register_forward_hook(lambda _, inputs, output: seen.add(output.dtype))
        return result

    monkeypatch.setattr(reglue.data.batches, "alignment_targets", watched)
    command = ["train", "reglue", "--store", str(tiny_store), "--out", str(tmp_path / "run"), *TINY_RECIPE]
    more = [f"--alignment.targets={targets}", f"--optimisation.precision={precision}", "--optimisation.steps=1"]
    train(parse([*command, *more]))
    assert seen == {getattr(torch, precision)}


def test_threads_decode_the_images_of_online_targets_side_by_side(
    tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(tiny_store)
    recipe = replace(RECIPE, alignment=replace(RECIPE.alignment, targets="online"))
    data = TrainingData(store, recipe, denoiser_config(store, recipe), 0)
    meeting, decode = threading.Barrier(2), images.decode

    def meet(file: Path | bytes) -> Image.Image:
        meeting.wait(10)
        return decode(file)

    monkeypatch.setattr(images, "decode", meet)
    with ThreadPoolExecutor(2) as threads:
        both = list(threads.map(data.read, (range(1), range(1, 2))))
    assert all(draft.target["pixels"].shape == (1, 3, 16, 16) for draft in both)


@pytest.mark.gpu
def test_nothing_waits_for_a_gpu_between_lines_of_the_log(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(tiny_store)
    data = TrainingData(store, RECIPE, denoiser_config(store, RECIPE), 0, torch.device("cuda"))
    model = awake(data).cuda()
    drafts = [data.read(range(4)) for _ in range(3)]
    try:
        for number, draft in enumerate(drafts):
            torch.cuda.set_sync_debug_mode("error" if number else "default")
            with autocast(torch.device("cuda"), "bfloat16"):
                terms = loss_terms(model, PATHS[RECIPE.path], data.finish(draft))
            weighted_sum(terms, RECIPE.loss_weights(0)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_with_and_without_threads_are_the_same(tiny_store: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights = []
    for workers in (0, 3):
        command = ["train", "reglue", "--store", str(tiny_store), "--out", str(tmp_path / str(workers)), *TINY_RECIPE]
        run = train(parse([*command, "--optimisation.steps=4", f"--workers={workers}"]))
        weights.append(load_file(run / "checkpoints" / "00000004" / "model.safetensors"))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.trains
def test_run_with_decoded_targets_learns(tiny_store: Path, tmp_path: Path) -> None:
    command = ["train", "repa", "--store", str(tiny_store), "--out", str(tmp_path / "run"), *TINY_RECIPE]
    run = train(parse([*command, "--optimisation.steps=40", "--alignment.targets=decoded"]))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["alignment"] < lines[0]["alignment"] - 0.1
    assert reglue.commands.train.RunRecord.read(run).recipe.alignment.targets == "decoded"
