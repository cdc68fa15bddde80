"""`autoencode`: what it learns, what it leaves behind, its exactness under a kill, and its answers to mistakes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from helpers import reglue_command, run_reglue
from reglue.cli import parse
from reglue.commands.autoencode import UNLABELLED, autoencode, split
from reglue.commands.prepare import Prepare, prepare
from reglue.data.opening import open_images
from reglue.data.store import Store
from reglue.encoders.alignment import load_alignment
from reglue.encoders.autoencoders import load_autoencoder
from reglue.encoders.vision import load_encoder
from reglue.errors import UserError
from reglue.files import read_json, write_tensors
from reglue.metrics.inception import load_inception
from reglue.metrics.latents import LatentSummary
from reglue.metrics.perceptual import encoder_features, load_lpips
from reglue.reals.config import Architecture, AutoencoderRecipe, Perceptual
from reglue.reals.measuring import check_latents, load_judges, warning_of_dead_channels
from reglue.reals.measuring import evaluate as measure_reconstructions
from reglue.reals.record import TrainingRecord
from reglue.reals.samples import ImageSamples, to_images, to_pixels
from reglue.reals.trainable import AlignedAutoencoder, Trained, new_network
from reglue.reals.training import alignment_spec, loss_terms
from reglue.training import checkpoints, precision
from reglue.training.tracking import read

ARCHITECTURE = [
    "--architecture.widths", "4", "8", "--architecture.norm-groups=2", "--architecture.layers-per-block=1",
    "--architecture.latent-channels=3", "--architecture.no-attention",
]  # fmt: skip
TINY = [
    "--resolution=16",
    "--validation=0.25",
    "--alignment.hidden=16",
    "--optimisation.batch-size=4",
    "--optimisation.precision=float32",
    "--optimisation.learning-rate=2e-3",
    "--optimisation.warmup=2",
    "--optimisation.ema=0.9",
    "--adversary.weight=0.5",
    "--adversary.start=5",
    "--adversary.layers=2",
    "--adversary.width=4",
    "--checkpoint-every=10",
    "--evaluate-every=10",
    "--log-every=5",
    "--workers=0",
    "--device=cpu",
]
"""With every part present."""
LONG = [
    "--optimisation.steps=200", "--adversary.start=190", "--optimisation.learning-rate=5e-3", "--evaluate-every=40",
]  # fmt: skip
"""Held-out images gain between 2.2 and 2.5 dB from the first measurement to the last, whatever the processor rounds."""


def arguments(images: Path, out: Path, encoder: str, *more: str, architecture: bool = True) -> list[str]:
    return [
        *("autoencode", str(images), str(out), "--encoder", encoder),
        *(ARCHITECTURE if architecture else []),
        *TINY,
        *more,
    ]


def run(*given: Any, **named: Any) -> Path:
    return autoencode(parse(arguments(*given, **named)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path, tiny_encoder: str) -> Path:
    return run(tiny_images, tmp_path_factory.mktemp("autoencoder") / "out", tiny_encoder, *LONG)


def training_lines(out: Path) -> list[dict[str, Any]]:
    return [line for line in read(out) if "validation" not in line]


def figures(out: Path) -> list[dict[str, float]]:
    return [line["validation"] for line in read(out) if "validation" in line]


@pytest.mark.trains
def test_every_term_of_the_loss_falls(trained: Path) -> None:
    first, *_, last = training_lines(trained)
    for term in ("reconstruction", "perceptual", "alignment", "class_alignment"):
        assert last[term] < 0.9 * first[term], term
    assert "adversary" in last
    assert last["adversary_weight"] > 0
    start, *_, end = figures(trained)
    assert end["psnr"] > start["psnr"] + 1
    assert end["patch_cosine"] > start["patch_cosine"]
    assert {
        "ssim",
        "encoder_distance",
        "frechet_distance",
        "kl",
        "class_cosine",
        "latent_mean",
        "latent_std",
    } <= end.keys()
    picture = Image.open(trained / "previews" / "00000200.png")
    assert picture.height > 5 * 16


@pytest.mark.trains
def test_the_result_is_an_autoencoder_of_unit_latents_for_prepare(
    trained: Path, tiny_images: Path, tiny_encoder: str, tmp_path: Path
) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    prepare(Prepare(tiny_images, tmp_path / "store", 16, str(trained), tiny_encoder, workers=0, device="cpu"))
    store = Store.open(tmp_path / "store")
    moments = store.read("latent", torch.arange(len(store)))
    spec = store.manifest.autoencoder
    latents = spec.normalise(moments["mean"] + moments["std"] * torch.randn_like(moments["std"]))
    assert float(latents.std()) == pytest.approx(1, rel=0.1)
    assert float(latents.mean()) == pytest.approx(0, abs=0.1)
    kept = json.loads((trained / "mean_std.json").read_text())
    assert spec.shift == pytest.approx((kept["mean"],) * 3)
    assert spec.scale == pytest.approx((1 / kept["std"],) * 3)

    network = AutoencoderKL.from_pretrained(trained)
    averaged = load_file(trained / "checkpoints" / "00000200" / "ema.safetensors")
    for name, value in network.state_dict().items():
        assert torch.equal(value, averaged[f"network.{name}"]), name


def test_the_alignment_network_reads_the_latents(trained: Path, tiny_images: Path, tiny_encoder: str) -> None:
    autoencoder, alignment = load_autoencoder(str(trained)), load_alignment(trained)
    encoder = load_encoder(tiny_encoder, 16)
    assert alignment.spec.encoder["weights_sha256"] == encoder.spec.weights_sha256
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    patches, class_token = alignment(autoencoder.encode(pixels / 127.5 - 1).mean)
    described = encoder.describe(pixels)
    assert patches.shape == (2, encoder.spec.width, *encoder.spec.grid)
    assert class_token.shape == described.class_token.shape


def test_the_record_says_how_it_was_made(trained: Path, tiny_images: Path) -> None:
    record = read_json(trained / "training.json", TrainingRecord, "")
    assert (record.steps_done, record.recipe.optimisation.steps, record.images) == (200, 200, str(tiny_images))
    assert record.figures == figures(trained)[-1]
    assert record.source is None


def test_lpips_and_rfid_are_measured_whatever_the_loss(
    tiny_images: Path, tiny_encoder: str, random_lpips: Path, random_inception: Path, tmp_path: Path
) -> None:
    """Of the reconstructions that the result itself gives, against the originals, all six held out."""
    more = ["--optimisation.steps=1", "--measure-lpips", str(random_lpips), f"--measure-inception={random_inception}"]
    out = run(tiny_images, tmp_path / "out", tiny_encoder, *more)
    line = next(line for line in read(out) if "validation" in line)

    options = parse(arguments(tiny_images, tmp_path / "out", tiny_encoder, *more))
    held_out = replace(split(options, open_images(tiny_images, UNLABELLED))[1], shape=(3, 8, 8))
    pixels, noise = (torch.stack(tensors) for tensors in zip(*(held_out[row] for row in range(6)), strict=True))
    autoencoder = load_autoencoder(str(out))
    restored = to_pixels(autoencoder.decode(autoencoder.encode(to_images(pixels)).draw(noise)))
    inception = load_inception(random_inception)
    real, fake = (inception.describe(images).features.double() for images in (pixels, restored))
    x, y = (features - features.mean(0) for features in (real, fake))
    # Of covariances xᵀx/5 and yᵀy/5, the trace of the root of their product is the nuclear norm of x·yᵀ/5.
    spread = (x.square().sum() + y.square().sum() - 2 * torch.linalg.svdvals(x @ y.T).sum()) / 5
    expected = float((real.mean(0) - fake.mean(0)).square().sum() + spread)
    assert line["images"] == len(real) == 6
    assert line["validation"]["rfid"] == pytest.approx(expected, rel=1e-3)
    distances = load_lpips([random_lpips])(to_images(pixels), to_images(restored))
    assert line["validation"]["lpips"] == pytest.approx(float(distances.mean()), rel=1e-3)

    record = read_json(out / "training.json", TrainingRecord, "")
    assert record.measured_with["lpips"] == str(random_lpips)
    assert record.measured_with["rfid"].startswith(str(random_inception))
    assert record.recipe.perceptual.by_encoder


def test_cosines_have_a_baseline_of_other_images(tiny_images: Path, tiny_encoder: str) -> None:
    judges = load_judges(tiny_encoder, (16, 16), Perceptual(), torch.device("cpu"))
    architecture = Architecture((4, 8), 3, 1, norm_groups=2, attention=False)
    spec = alignment_spec(AutoencoderRecipe(), 3, judges.encoder)
    model = AlignedAutoencoder(new_network(architecture, (16, 16)), spec)
    pixels, noise = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8), torch.randn(5, 3, 8, 8)

    def measured(size: int) -> dict[str, float]:
        batches = zip(pixels.split(size), noise.split(size), strict=True)
        return measure_reconstructions(model, judges, batches, "float32").figures

    seen = judges.encoder.describe(pixels)
    with torch.no_grad():
        patches, class_token = model(to_images(pixels), noise).semantics
    pairs = [(image, image - 1) for image in range(1, 5)]
    by_class = [F.cosine_similarity(class_token[i], seen.class_token[j], dim=0) for i, j in pairs]
    width = judges.encoder.spec.width
    by_patch = [F.cosine_similarity(patches[i], seen.features[j, -width:], dim=0).mean() for i, j in pairs]
    for size in (5, 2, 1):
        figures = measured(size)
        assert figures["class_cosine_unrelated"] == pytest.approx(float(sum(by_class) / 4), abs=1e-5)
        assert figures["patch_cosine_unrelated"] == pytest.approx(float(sum(by_patch) / 4), abs=1e-5)


def test_again_does_nothing_and_more_steps_prolong(
    trained: Path, tiny_images: Path, tiny_encoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def again(*more: str) -> None:
        run(tiny_images, trained, tiny_encoder, *LONG, *more)

    before = {file: file.read_bytes() for file in trained.rglob("*") if file.is_file()}
    again("--optimisation.steps=200")
    assert "complete already: 200 steps" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"has 200 steps already, more than optimisation\.steps 199; choose 200 or"):
        again("--optimisation.steps=199")
    assert {file: file.read_bytes() for file in trained.rglob("*") if file.is_file()} == before
    again("--optimisation.steps=205")
    assert training_lines(trained)[-1]["step"] == 205
    assert (trained / "diffusion_pytorch_model.safetensors").read_bytes() not in before.values()
    with pytest.raises(UserError, match=r"settings: kl\.weight 1\.0 \(was 1e-06\), seed 1 \(was 0\); choose a new"):
        again("--optimisation.steps=210", "--kl.weight=1", "--seed=1")


@pytest.mark.parametrize("perceptual", ["encoder", "lpips"])
def test_a_step_is_that_of_its_definitions(
    perceptual: str, tiny_images: Path, tiny_encoder: str, random_lpips: Path, tmp_path: Path
) -> None:
    """The third one, recomputed from the checkpoint of the second: every term, every gradient, and the next weight."""
    given = arguments(
        tiny_images, tmp_path / "out", tiny_encoder, "--optimisation.steps=3", "--optimisation.clip=0",
        "--adversary.start=1", "--kl.weight=0.01", "--alignment.weight=0.7", "--alignment.class-weight=0.2",
        "--perceptual.weight=0.3", "--perceptual.network", "encoder" if perceptual == "encoder" else str(random_lpips),
        "--log-every=1", "--checkpoint-every=1", "--keep=0", "--evaluate-every=3",
    )  # fmt: skip
    options = parse(given)
    line = training_lines(autoencode(options))[2]
    before, after = (tmp_path / "out" / "checkpoints" / f"0000000{step}" for step in (2, 3))

    encoder, lpips = load_encoder(tiny_encoder, 16, (0, 1, 2, 4)), load_lpips([random_lpips])
    recipe = options.recipe
    spec = alignment_spec(recipe, 3, encoder)
    autoencoder = AlignedAutoencoder(new_network(recipe.architecture, (16, 16)), spec)
    model = Trained(autoencoder, recipe.adversary)
    model.load_state_dict(load_file(before / "model.safetensors"))
    images = open_images(tiny_images, UNLABELLED)
    samples = ImageSamples(images, split(options, images)[0], (16, 16), (3, 8, 8), 0, "training", flips=True)
    pixels, noise = (
        torch.stack(tensors) for tensors in zip(*(samples[position] for position in range(8, 12)), strict=True)
    )
    originals = pixels / 127.5 - 1

    network: Any = autoencoder.network
    posterior = network.encode(originals).latent_dist
    latents = posterior.mean + posterior.std * noise
    restored = network.decode(latents).sample
    seen, layers = encoder.describe(pixels), encoder_features(encoder, restored).chunk(4, dim=1)
    assert autoencoder.alignment
    assert model.discriminator
    semantics, discriminator = autoencoder.alignment(latents), model.discriminator
    by_layer = [cosine(features, those) for features, those in zip(seen.features.chunk(4, dim=1), layers, strict=True)]
    terms = {
        "reconstruction": (restored - originals).abs().mean(),
        "perceptual": 1 - sum(by_layer) / 4 if perceptual == "encoder" else lpips(originals, restored).mean(),
        "kl": posterior.kl().sum() / latents.numel(),
        "alignment": 1 - cosine(semantics.patches, seen.features[:, -encoder.spec.width :]),
        "class_alignment": 1 - cosine(semantics.class_token, seen.class_token),
        "adversary": -discriminator(restored).mean(),
        "discriminator": ((1 - discriminator(originals)).relu() + (1 + discriminator(restored.detach())).relu()).mean()
        / 2,
    }
    visible = terms["reconstruction"] + 0.3 * terms["perceptual"]
    semantic = 0.7 * terms["alignment"] + 0.2 * terms["class_alignment"]
    terms["loss"] = visible + 0.01 * terms["kl"] + semantic + 0.5 * model.adversary_weight * terms["adversary"]
    last = network.decoder.conv_out.weight
    ratio = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (visible, terms["adversary"])]
    terms["adversary_weight"] = ratio[0] / (ratio[1] + 1e-4)
    names, parameters = zip(*autoencoder.named_parameters(prefix="autoencoder"), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(terms["loss"], parameters, retain_graph=True), strict=True))
    terms["gradient_norm"] = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    names, parameters = zip(*discriminator.named_parameters(prefix="discriminator"), strict=True)
    gradients |= zip(names, torch.autograd.grad(terms["discriminator"], parameters), strict=True)

    assert model.adversary_weight > 0
    for name, value in terms.items():
        assert line[name] == pytest.approx(value.item(), rel=1e-4), name
    old, new = (load_file(checkpoint / "optimiser.safetensors") for checkpoint in (before, after))
    assert len(gradients) == sum(key.endswith(".exp_avg") for key in new)
    for name, gradient in gradients.items():  # Adam's first moment, of β = 0.5.
        expected = (old[f"{name}.exp_avg"] + gradient) / 2
        torch.testing.assert_close(new[f"{name}.exp_avg"], expected, rtol=1e-3, atol=1e-6, msg=name)


def cosine(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Of the vectors along the second dimension, on average."""
    return (F.normalize(first, dim=1) * F.normalize(second, dim=1)).sum(1).mean()


def test_a_compiled_autoencoder_meets_its_discriminator_later(
    tiny_images: Path, tiny_encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps before it are compiled for one backward pass over the graph, those with it need several."""
    compile = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile(module, backend="aot_eager"))
    more = ["--optimisation.steps=4", "--adversary.start=2", "--optimisation.compile=model"]
    out = run(tiny_images, tmp_path / "out", tiny_encoder, *more, "--log-every=1")
    assert ["adversary" in line for line in training_lines(out)] == [False, False, True, True]


def test_the_discriminator_waits_for_its_start(tiny_images: Path, tiny_encoder: str, tmp_path: Path) -> None:
    out = run(
        tiny_images, tmp_path / "out", tiny_encoder, "--optimisation.steps=4", "--adversary.start=3",
        "--checkpoint-every=1", "--keep=0",
    )  # fmt: skip
    first, *later = (load_file(path / "model.safetensors") for path in sorted((out / "checkpoints").iterdir()))
    names = [name for name in first if name.startswith("discriminator")]
    assert [all(torch.equal(first[name], one[name]) for name in names) for one in later] == [True, True, False]
    assert not any("adversary" in line for line in training_lines(out)[:3])
    assert "adversary" in training_lines(out)[3]


def test_the_encoder_runs_only_for_a_term_that_needs_it(tiny_encoder: str, random_lpips: Path) -> None:
    judges = load_judges(tiny_encoder, (16, 16), Perceptual(network=(str(random_lpips),)), torch.device("cpu"))
    architecture = Architecture((4, 8), 3, 1, norm_groups=2, attention=False)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    calls: list[int] = []
    judges.encoder.network.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    for alignment, perceptual, expected in (
        (None, Perceptual(network=(str(random_lpips),)), 0),
        (None, Perceptual(0), 0),
        (alignment_spec(AutoencoderRecipe(), 3, judges.encoder), Perceptual(0), 1),
    ):
        model = AlignedAutoencoder(new_network(architecture, (16, 16)), alignment)
        restored = model(to_images(pixels), torch.randn(2, 3, 8, 8))
        terms = loss_terms(AutoencoderRecipe(perceptual=perceptual), judges, pixels, to_images(pixels), restored)
        assert len(calls) == expected
        assert ("alignment" in terms) == (alignment is not None)


def comparable(out: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in read(out)]


def begun(until: Path, *given: str) -> subprocess.Popen[str]:
    """A process of its own, as soon as a file is there that it writes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(reglue_command(*given), env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not until.is_file():
        assert process.poll() is None, "it has ended already"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return process


def test_sigterm_stops_after_the_step_with_a_checkpoint(tiny_images: Path, tiny_encoder: str, tmp_path: Path) -> None:
    out, seldom = tmp_path / "out", [f"--{what}-every=1000000" for what in ("log", "checkpoint", "evaluate")]
    given = arguments(tiny_images, out, tiny_encoder, "--optimisation.steps=100000", "--workers=1", *seldom)
    process = begun(out / "training.json", *given)
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=60)
    (step,) = checkpoints.steps(out)
    assert process.returncode == 143
    assert "Traceback" not in text
    assert f"reglue: stopped after step {step}, with a checkpoint; the same command continues" in text


def test_killed_and_resumed_training_gives_the_same_bits(tiny_images: Path, tiny_encoder: str, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = [
        "--optimisation.steps=20", "--workers=1", "--optimisation.precision=bfloat16", "--optimisation.accumulate=2",
    ]  # fmt: skip
    run_reglue(*arguments(tiny_images, whole, tiny_encoder, *more))

    # A process that dies at step 10 or a little after, in the middle of a step.
    process = begun(
        broken / "checkpoints" / "00000010" / "progress.json", *arguments(tiny_images, broken, tiny_encoder, *more)
    )
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (broken / "checkpoints" / "00000020").exists(), "it was killed too late to test anything"
    assert not (broken / "config.json").exists()

    run_reglue(*arguments(tiny_images, broken, tiny_encoder, *more))
    for name in ("ema", "model", "optimiser"):
        ours, theirs = (load_file(out / "checkpoints" / "00000020" / f"{name}.safetensors") for out in (whole, broken))
        assert ours.keys() == theirs.keys()
        assert any(key.startswith("discriminator") for key in ours) == (name != "ema")
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]), key
    assert comparable(whole) == comparable(broken)
    for file in ("diffusion_pytorch_model.safetensors", "alignment.safetensors", "mean_std.json", "config.json"):
        assert (whole / file).read_bytes() == (broken / file).read_bytes(), file


def test_two_processes_and_accumulated_parts_give_the_losses_of_one(
    tiny_images: Path, tiny_encoder: str, tmp_path: Path
) -> None:
    more = ["--optimisation.steps=10"]
    run(tiny_images, tmp_path / "one", tiny_encoder, *more)
    run(tiny_images, tmp_path / "parts", tiny_encoder, *more, "--optimisation.accumulate=2")
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "reglue"),
            *arguments(tiny_images, tmp_path / "two", tiny_encoder, *more),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    one, parts, two = (comparable(tmp_path / name) for name in ("one", "parts", "two"))
    assert len(one) == len(parts) == len(two) == 3
    for expected, *others in zip(one, parts, two, strict=True):
        for other in others:
            flat, expected_flat = ({**line, **line.get("validation", {})} for line in (other, expected))
            for name in expected_flat.keys() - {"validation"}:
                assert flat[name] == pytest.approx(expected_flat[name], rel=2e-3, abs=1e-5), name
    means = [json.loads((tmp_path / name / "mean_std.json").read_text()) for name in ("one", "parts", "two")]
    for other in means[1:]:
        assert other == pytest.approx(means[0], rel=2e-3, abs=1e-5)


@pytest.mark.trains
def test_an_existing_autoencoder_is_measured_first_and_then_changed(
    tiny_images: Path, tiny_encoder: str, tiny_autoencoder: str, tmp_path: Path
) -> None:
    out = run(
        tiny_images, tmp_path / "out", tiny_encoder, "--from", tiny_autoencoder, "--optimisation.steps=40",
        architecture=False,
    )  # fmt: skip
    before, *_, after = figures(out)
    assert len(figures(out)) == 5
    assert after["psnr"] > before["psnr"]
    assert load_autoencoder(str(out)).spec.latent_channels == 3
    record = json.loads((out / "training.json").read_text())
    assert record["source"]["weights_sha256"] == load_autoencoder(tiny_autoencoder).spec.weights_sha256


def test_without_alignment_it_is_a_plain_autoencoder(tiny_images: Path, tiny_encoder: str, tmp_path: Path) -> None:
    out = run(
        tiny_images, tmp_path / "out", tiny_encoder, "--optimisation.steps=3", "--alignment.weight=0",
        "--alignment.class-weight=0", "--adversary.weight=0", "--perceptual.weight=0", "--kl.weight=0",
        "--optimisation.precision=bfloat16", "--validation", str(tiny_images),
    )  # fmt: skip
    assert not (out / "alignment.safetensors").exists()
    assert {"reconstruction", "loss"} == training_lines(out)[-1].keys() & {
        *("reconstruction", "loss", "perceptual", "kl", "alignment", "class_alignment", "adversary", "discriminator")
    }
    assert "patch_cosine" not in figures(out)[-1]
    with pytest.raises(UserError, match=r"made with alignment\.weight above 0"):
        load_alignment(out)


def test_grey_and_tiny_images_of_any_shape_will_do(tiny_encoder: str, tmp_path: Path) -> None:
    for index in range(6):
        size, mode = ((3, 5), "L") if index % 2 else ((40, 9), "1")
        Image.new(mode, size, 40 * index).save(tmp_path / f"{index}.png")
    out = run(tmp_path, tmp_path.parent / "out", tiny_encoder, "--optimisation.steps=2", "--adversary.weight=0")
    assert load_autoencoder(str(out)).spec.latent_channels == 3


@pytest.mark.parametrize(
    ("std", "signal", "says"),
    [
        (1.0, (5e-4, 1e-5), "collapsed at step 7 .*0.05%.*lower kl.weight.*step 5 is the last sound one"),
        (1e-5, (1.0, 1.0), "vanished .*raise kl.weight"),
        (2e3, (1.0, 1.0), "blown up .*raise kl.weight"),
        (float("nan"), (1.0, 1.0), "blown up"),
    ],
)
def test_useless_latents_are_named(std: float, signal: tuple[float, ...], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        check_latents(LatentSummary(8, 0.0, std, signal, (1.0, 1.0)), 7, 5)
    assert "\n" not in str(caught.value)


def test_dead_channels_among_others_are_a_warning() -> None:
    latents = LatentSummary(8, 0.0, 1.0, (1.0, 0.005, 0.5, 0.0), (1.0, 1.0, 1.0, 1.0))
    check_latents(latents, 7, None)
    assert "latent channels 1, 3 (of 0 to 3)" in str(warning_of_dead_channels(latents, 7))
    assert warning_of_dead_channels(latents._replace(signal=(1.0,) * 4), 7) is None


def test_too_much_divergence_collapses_at_once_and_says_what_is_left(
    tiny_images: Path, tiny_encoder: str, tmp_path: Path
) -> None:
    """Long before the first evaluation."""
    more = [
        "--optimisation.steps=400", "--evaluate-every=400", "--adversary.weight=0", "--perceptual.weight=0",
        "--optimisation.learning-rate=1e-2",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"collapsed at step \d+ .*lower kl.weight.* no sound checkpoint yet"):
        run(tiny_images, tmp_path / "at-once", tiny_encoder, *more, "--kl.weight=1000", "--checkpoint-every=50")
    assert training_lines(tmp_path / "at-once")[-1]["step"] < 40

    out, later = tmp_path / "later", ["--kl.schedule", "23", "1000"]
    with pytest.raises(UserError, match=r"collapsed at step \d\d .* step 20 is the last sound one"):
        run(tiny_images, out, tiny_encoder, *more, *later, "--checkpoint-every=20", "--keep=1", "--log-every=2")
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["00000020"]


@pytest.mark.trains
def test_dead_channels_are_named_at_an_evaluation(
    tiny_images: Path, tiny_encoder: str, tiny_autoencoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Channel 1 of three sees no image, only the places of a picture."""
    shutil.copytree(tiny_autoencoder, tmp_path / "half-dead")
    file = tmp_path / "half-dead" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["quant_conv.weight"][1] = 0
    weights["quant_conv.weight"][[0, 2]] *= 100
    weights["quant_conv.bias"][1] = 30
    save_file(weights, file, {"format": "pt"})
    more = ["--from", str(tmp_path / "half-dead"), "--optimisation.steps=1", "--optimisation.learning-rate=1e-9"]
    out = run(tiny_images, tmp_path / "out", tiny_encoder, *more, architecture=False)
    assert capsys.readouterr().err.count("latent channels 1 (of 0 to 2)") == len(figures(out)) == 2
    for line in (*figures(out), *training_lines(out)):
        assert line["dead_channels"] == 1
        assert line["latent_std"] > 10 > line["signal_std"]


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(
    tiny_images: Path, tiny_encoder: str, tmp_path: Path
) -> None:
    out = run(tiny_images, tmp_path / "out", tiny_encoder, "--optimisation.steps=5")
    # The weights are spoilt as a defective memory would: the next loss cannot be finite.
    weights = out / "checkpoints" / "00000005" / "model.safetensors"
    spoilt = load_file(weights)
    spoilt["autoencoder.network.decoder.conv_out.bias"].fill_(1e30)
    write_tensors(weights, spoilt)
    with pytest.raises(UserError, match=r"not finite between steps 5 and 10 \(.*reconstruction"):
        run(tiny_images, out, tiny_encoder, "--optimisation.steps=10")
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["00000005"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--resolution=17"], "multiples of"),
        (["--resolution=1"], "too small"),
        (["--adversary.layers=3"], "adversary.layers 3"),
        (["--validation=2.0"], "--validation 2.0"),
        (["--validation=nowhere"], "nowhere: no such folder"),
        (["--validation=0.99"], "too few"),
        (["--optimisation.accumulate=3"], "does not divide"),
        (["--perceptual.network", "nothing.pth"], "perceptual.network nothing.pth"),
        (["--measure-lpips", "nothing.pth"], "measure_lpips nothing.pth"),
        (["--measure-inception", "nothing.pth"], "measure_inception nothing.pth"),
        (
            ["--measure-lpips", "x", "--resolution=8", "--adversary.layers=1"],
            "LPIPS needs at least 16 pixels along each side; leave out measure_lpips",
        ),
        (["--from=starter"], "leave it out with --from"),
        (["--encoder=nonsense"], "unknown encoder"),
        (["--log-every=0"], "log_every 0"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(
    more: list[str], says: str, tiny_images: Path, tiny_encoder: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says) as caught:
        run(tiny_images, tmp_path / "out", tiny_encoder, *more)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_left_alone(tiny_images: Path, tiny_encoder: str, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="holds other files"):
        run(tiny_images, tmp_path, tiny_encoder)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_images_need_no_labels(tiny_images: Path, tiny_encoder: str, tmp_path: Path):
    rows = [{"bytes": file.read_bytes()} for file in sorted(tiny_images.rglob("*.png"))]
    pq.write_table(pa.table({"image": rows}), tmp_path / "images.parquet")
    out = run(tmp_path / "images.parquet", tmp_path / "out", tiny_encoder, "--optimisation.steps=1")
    assert load_autoencoder(str(out)).spec.latent_channels == 3


def test_a_training_keeps_the_precision_that_it_began_with(
    tiny_images: Path, tiny_encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(steps: int, faster: bool) -> str:
        monkeypatch.setattr(precision, "multiplies_bfloat16_faster", lambda _: faster)
        more = ["--optimisation.precision=auto", f"--optimisation.steps={steps}"]
        out = run(tiny_images, tmp_path / "out", tiny_encoder, *more)
        return json.loads((out / "training.json").read_text())["recipe"]["optimisation"]["precision"]

    assert trained(2, faster=True) == trained(4, faster=False) == "bfloat16"
