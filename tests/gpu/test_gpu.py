"""What only a GPU shows: waits, kernels that refuse, graphs that are replayed, copies that are still on their way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

import reglue.training.loop
import sample_speed
import study
import train_speed
from helpers import TINY_RECIPE
from reglue.cli import parse
from reglue.commands.prepare import Prepare, prepare
from reglue.commands.train import Losses, train
from reglue.config import Compile
from reglue.data.batches import HostBatch, TrainingData, denoiser_config
from reglue.data.store import Store
from reglue.diffusion.backbones.sit import Attention
from reglue.diffusion.denoiser import Denoiser
from reglue.diffusion.guidance import guided_velocity
from reglue.diffusion.modalities import State
from reglue.diffusion.objective import weighted_sum
from reglue.diffusion.paths import LINEAR
from reglue.generation import from_noise
from reglue.papers import RECIPES
from reglue.sampling import Precision, Sampling
from reglue.training import checkpoints, distributed, parallel
from reglue.training.precision import SamplingNetwork, autocast
from sample_speed import SampleSpeed
from train_speed import TrainingStep, TrainSpeed

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
RECIPE = replace(RECIPES["reglue"], model="2x32x2/2", local=replace(RECIPES["reglue"].local, compressor="conv-4"))


@pytest.fixture
def data(tiny_store: Path) -> TrainingData:
    store = Store.open(tiny_store)
    return TrainingData(store, RECIPE, denoiser_config(store, RECIPE), 0, CUDA)


def awake(data: TrainingData, seed: int = 0) -> Denoiser:
    """A model all of whose weights are random: as initialised, its outputs are zero."""
    torch.manual_seed(seed)
    model = Denoiser(data.config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.to(CUDA)


@pytest.mark.parametrize("compile", ["no", "blocks", "model"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_no_iteration_of_training_waits_for_the_gpu(
    compile: str, precision: str, tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the third step's samples on to the last but one's average, whatever the loop does, its readers included."""
    steps, prefetch = 8, reglue.training.loop.prefetch
    watched: list[int] = []

    def watching(*arguments: Any) -> Iterator[HostBatch]:
        for number, draft in enumerate(prefetch(*arguments)):
            if number == 2:
                torch.cuda.set_sync_debug_mode("error")
            if number == steps - 1:  # Its step ends with a line of the log, which waits.
                torch.cuda.set_sync_debug_mode("default")
            watched.append(torch.cuda.get_sync_debug_mode())
            yield draft

    monkeypatch.setattr(reglue.training.loop, "prefetch", watching)
    options = [
        f"--store={tiny_store}", f"--out={tmp_path / 'run'}", *TINY_RECIPE, f"--optimisation.steps={steps}",
        "--optimisation.clip=1", f"--optimisation.compile={compile}", f"--optimisation.precision={precision}",
        "--log-every=100", f"--device={CUDA}",
    ]  # fmt: skip
    try:
        train(parse(["train", "reglue", *options]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watched == [0] * 2 + [2] * (steps - 3) + [0]


@pytest.mark.parametrize("width_of_head", [64, 72])
def test_flash_attention_takes_what_our_attention_gives_it(width_of_head: int) -> None:
    """B/2's heads are 64 wide, XL/2's 72."""
    torch.manual_seed(0)
    attention = Attention(4 * width_of_head, 4).to(CUDA)
    x = torch.randn(2, 257, 4 * width_of_head, device=CUDA)

    def outputs(backend: SDPBackend) -> tuple[Tensor, Tensor]:
        attention.zero_grad()
        with sdpa_kernel(backend), autocast(CUDA, "bfloat16"):
            out = attention(x)
            out.float().square().sum().backward()
        assert attention.qkv.weight.grad is not None
        return out.detach().float(), attention.qkv.weight.grad.clone()

    for flash, plain in zip(outputs(SDPBackend.FLASH_ATTENTION), outputs(SDPBackend.MATH), strict=True):
        assert (flash - plain).norm() < 0.02 * plain.norm()


@pytest.mark.parametrize("tokens", [257, 1024])
def test_gradients_of_attention_are_the_same_bits_each_time(tokens: int) -> None:
    """Of so many tokens that several parts of the GPU add to the same numbers, in an order that nobody knows."""
    torch.manual_seed(0)
    attention, x = Attention(768, 12).to(CUDA), torch.randn(32, tokens, 768, device=CUDA)

    def gradient() -> Tensor:
        attention.zero_grad()
        with distributed.deterministic(CUDA, True), autocast(CUDA, "bfloat16"):
            attention(x).float().square().sum().backward()
        assert attention.qkv.weight.grad is not None
        return attention.qkv.weight.grad.clone()

    first = gradient()
    assert all(torch.equal(gradient(), first) for _ in range(5))


@pytest.mark.parametrize("compile", ["blocks", "model"])
def test_a_compiled_step_is_the_eager_one(compile: Compile, data: TrainingData) -> None:
    """The losses and the gradient's norm of two steps, so of weights that a compiled step has left."""

    def sums(compile: Compile) -> dict[str, float]:
        torch.compiler.reset()
        step = TrainingStep(data, awake(data), "float32", compile)
        terms = [step(data.read(range(first, first + 4))) for first in (0, 4)]
        return {name: sum(of_step[name].item() for of_step in terms) for name in terms[0]}

    assert sums(compile) == pytest.approx(sums("no"), rel=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_compiled_sampler_draws_what_the_eager_one_does(precision: Precision, data: TrainingData) -> None:
    """Two batches of a sampler that is guided in an interval, so in batches of two sizes, and by a weaker model.

    In bfloat16 they round in different places: compiled it is as near to float32 as the eager one.
    """
    torch.set_float32_matmul_precision("highest")
    torch.compiler.reset()
    strong, weak = awake(data), awake(data, seed=1)
    how = Sampling(steps=8, guidance_scale=2.0, guidance_interval=(0.2, 0.8), auto_scale=1.5, state_precision="float64")

    def batches(precision: Precision, compiled: bool) -> list[State]:
        network, weaker = (SamplingNetwork(model, precision, compiled=compiled) for model in (strong, weak))
        drawn = []
        for first in (0, 4):
            condition = {"class": torch.arange(4, device=CUDA) % data.config.classes}
            velocity = guided_velocity(network, condition, data.config.modalities, how.guidance, weaker)
            drawn.append(from_noise(velocity, 0, range(first, first + 4), data.config.shapes(), how, CUDA))
        return drawn

    with torch.no_grad():
        drawn = batches("float32", False), batches(precision, False), batches(precision, True)
    for exact, eager, compiled in zip(*drawn, strict=True):
        for name, expected in exact.items():
            rounding = (eager[name] - expected).norm()
            assert (compiled[name] - expected).norm() <= 1.5 * rounding + 1e-3 * expected.norm(), name


def test_the_benchmarks_run_on_a_gpu() -> None:
    """With data in pinned memory, read ahead by threads."""
    toy: Any = {"toy": True, "repeats": 1, "device": "cuda"}
    trained = json.loads(train_speed.main(TrainSpeed(**toy, steps=3, workers=2, compile=("blocks",))))
    drawn = json.loads(sample_speed.main(SampleSpeed(**toy, compile=("no", "model"))))
    for line, figure in ((trained, "seconds_per_step"), (drawn, "seconds_per_batch")):
        assert line["hardware"]["gpu"]
        assert all(one["median"] > 0 for one in line["figures"][figure].values())


def test_a_study_runs_on_a_gpu(tiny_images: Path, tiny_encoder: str, tiny_autoencoder: str, tmp_path: Path) -> None:
    prepare = f"--resolution 16 --autoencoder {tiny_autoencoder} --encoder {tiny_encoder} --workers 0"
    train = "--model 1x32x2/2 --optimisation.batch-size 4 --alignment.hidden 16"
    study.main(
        [
            *("convergence", "--work", str(tmp_path), "--images", str(tiny_images), "--held-out", "0.5"),
            *("--device", "cuda", "--milestones", "1", "--arms", "sit", "reglue"),
            *(f"--prepare={prepare}", f"--train={train}", "--compress=--hidden 8 --epochs 1"),
            *("--sample=--count 8 --steps 2", "--evaluate=--resamples 10 --kernel-subsets 2"),
        ]
    )
    assert (tmp_path / "convergence.md").read_text().count("reglue")


def test_a_checkpoint_holds_what_was_there_when_it_was_asked_for(data: TrainingData, tmp_path: Path) -> None:
    """Not what the next step made of it while copies were on their way; the second one fills the same memory."""
    model = awake(data)
    ema = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    writer = checkpoints.Writer(tmp_path, keep=0, sharded=False)
    for step in (1, 2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimiser.step()
        expected = {name: value.clone() for name, value in model.state_dict().items()}
        averages = {name: value.clone() for name, value in ema.items()}
        moments = [optimiser.state[parameter]["exp_avg_sq"].clone() for parameter in model.parameters()]
        torch.cuda._sleep(100_000_000)  # The GPU is busy when it is asked for the copies.
        writer.save(step, model, ema, optimiser)
        with torch.no_grad():
            torch._foreach_add_([*model.parameters(), *ema.values()], 1.0)  # type: ignore[reportPrivateImportUsage]
        optimiser.step()
        writer.wait()
        folder = checkpoints.find(tmp_path, step)
        for file, values in ((checkpoints.MODEL, expected), (checkpoints.EMA, averages)):
            for name, written in load_file(folder / file).items():
                assert torch.equal(written, values[name].cpu()), (step, file, name)
        written = load_file(folder / checkpoints.OPTIMISER)
        for (name, _), moment in zip(model.named_parameters(), moments, strict=True):
            assert torch.equal(written[f"{name}.exp_avg_sq"], moment.cpu()), (step, name)


def test_prepare_makes_the_same_store_as_on_the_cpu(
    tiny_store: Path, tiny_images: Path, tiny_autoencoder: str, tiny_encoder: str, tmp_path: Path
) -> None:
    networks = partial(Prepare, tiny_images, tmp_path / "store", 16, tiny_autoencoder, tiny_encoder, features=True)
    prepare(networks(shard_size=10, device=str(CUDA)))
    stores = Store.open(tmp_path / "store"), Store.open(tiny_store)
    rows = torch.arange(len(stores[0]))
    assert torch.equal(stores[0].labels, stores[1].labels)
    for column in ("latent", "cls", "features"):
        ours, expected = (store.read(column, rows) for store in stores)
        for name, values in expected.items():
            # Convolutions may be TF32, and features are float16.
            assert (ours[name].float() - values.float()).norm() < 5e-3 * values.float().norm(), (column, name)


@pytest.fixture
def one_process() -> Iterator[None]:
    """A group of this process alone, as `distributed.join` makes it under torchrun."""
    backend = "cpu:gloo,cuda:nccl" if CUDA.type == "cuda" else "gloo"
    store = dist.HashStore()  # type: ignore[reportPrivateImportUsage]
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.leave()


@pytest.mark.parametrize("kind", ["copies", "shards"])
def test_a_step_over_nccl_is_that_of_one_process(
    kind: Literal["copies", "shards"], data: TrainingData, one_process: None, tmp_path: Path
) -> None:
    """DistributedDataParallel and FSDP2, the latter on a mesh of one: clipping, AdamW, gathering and a checkpoint."""
    expected, expected_norm = two_steps(data, "alone", tmp_path / "alone")
    found, norm = two_steps(data, kind, tmp_path / kind)
    torch.testing.assert_close(norm, expected_norm, rtol=1e-4, atol=0)
    written = load_file(checkpoints.find(tmp_path / kind) / checkpoints.MODEL)
    assert found.keys() == expected.keys() == written.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].to(CUDA), value, rtol=1e-4, atol=1e-5, msg=name)
        assert torch.equal(written[name], found[name].cpu()), name


def two_steps(data: TrainingData, kind: str, run: Path) -> tuple[dict[str, Tensor], Tensor]:
    """The weights after two steps, and the norm of the second's gradients."""
    model = awake(data)
    losses = spread(kind, Losses(model, LINEAR), model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4, fused=True)
    norm = torch.zeros(())
    for first in (0, 4):
        with parallel.accumulating(losses, last=True):
            terms = losses(data.sample(range(first, first + 4)))
            weighted_sum(terms, RECIPE.loss_weights(0)).backward()
        norm = parallel.clip_gradients(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    writer = checkpoints.Writer(run, keep=0, sharded=kind == "shards")
    writer.save(2, model, {name: value.clone() for name, value in model.state_dict().items()}, optimiser)
    writer.wait()
    return parallel.gathered({name: value.detach().clone() for name, value in model.state_dict().items()}), norm


def spread(kind: str, losses: Losses, model: Denoiser) -> torch.nn.Module:
    """`parallel.parallelise`; where it should cut the model for two processes, into a mesh of the one that there is."""
    if kind == "alone":
        return losses.to(CUDA)
    with pytest.MonkeyPatch.context() as pretended:
        if kind == "shards":
            pretended.setattr(distributed, "rank_and_count", lambda: (0, 2))
            pretended.setattr(
                torch.distributed.device_mesh,
                "init_device_mesh",
                lambda device, _, mesh_dim_names: init_device_mesh(device, (1,), mesh_dim_names=mesh_dim_names[1:]),
            )
        return parallel.parallelise(losses, model.backbone.blocks, 2 if kind == "shards" else 1, CUDA, "float32")


@pytest.mark.parametrize("compile", ["no", "blocks"])
def test_training_gives_the_same_bits_whole_again_and_continued(compile: str, tiny_store: Path, tmp_path: Path) -> None:
    def trained(name: str, *steps: int) -> dict[str, Tensor]:
        for count in steps:
            torch.compiler.reset()
            more = ["--optimisation.precision=bfloat16", f"--optimisation.compile={compile}", "--device=cuda"]
            given = [*TINY_RECIPE, *more, f"--optimisation.steps={count}"]
            run = train(parse(["train", "reglue", "--store", str(tiny_store), "--out", str(tmp_path / name), *given]))
        return load_file(checkpoints.find(run, steps[-1]) / checkpoints.MODEL)

    whole = trained("whole", 6)
    for other in (trained("again", 6), trained("continued", 3, 6)):
        assert all(torch.equal(whole[name], value) for name, value in other.items())
