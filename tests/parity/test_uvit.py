"""U-ViT's published numbers: forward pass, losses and their gradients, chain, DPM-Solver++.

They are of noise on Stable Diffusion's chain, ours of velocities on the linear path: (ε − x_t) / (1 − t).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_files import Golden, assert_close
from torch import Tensor

from reglue.diffusion.chains import STABLE_DIFFUSION
from reglue.diffusion.denoiser import Denoiser
from reglue.diffusion.guidance import Guidance, guided_velocity
from reglue.diffusion.modalities import LATENT, expand_as
from reglue.diffusion.objective import TrainingSample, loss_terms
from reglue.diffusion.paths import LINEAR
from reglue.diffusion.samplers import chain_times, dpm_solver
from reglue.published.weights import export_official
from solving import solve

CFG = 1.4
"""Theirs is c + 0.4·(c − u)."""


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("uvit")


@pytest.fixture(scope="module")
def denoiser(golden: Golden) -> Denoiser:
    return golden.denoiser()


def time_of(numbers: Tensor) -> Tensor:
    """The linear path's times of the chain's steps."""
    return LINEAR.time_of(torch.tensor([STABLE_DIFFUSION.ratio(n) for n in numbers.tolist()], dtype=torch.float64))


def scale(t: Tensor, like: Tensor) -> Tensor:
    """Of the linear path's states, those of the chain being 1."""
    return expand_as(((1 - t) ** 2 + t**2).sqrt().to(like.dtype), like)


def noise_of(denoiser: Denoiser, x: Tensor, numbers: Tensor, labels: Tensor) -> Tensor:
    """What the network predicts of the chain's states x."""
    t = time_of(numbers)
    state = x * scale(t, x)
    velocity = denoiser({LATENT: state}, t, {"class": labels}).velocity[LATENT]
    return state + expand_as((1 - t).to(x.dtype), x) * velocity


def test_the_file_comes_in_and_goes_out(golden: Golden) -> None:
    official, about = golden.official(), golden.about
    config = official.config
    assert (official.family, config.depth, config.patch) == ("uvit", about["depth"], about["patch_size"])
    assert (config.parts.time_mlp, config.parts.convolution) == (about["mlp_time_embed"], about["conv"])
    published = export_official(official.family, official.config, official.weights)
    assert published.keys() == golden.published.keys()
    for name, value in golden.published.items():
        assert torch.equal(published[name], value), name


@torch.no_grad()
def test_forward_pass(golden: Golden, denoiser: Denoiser) -> None:
    x, labels = golden["input.x"], golden["input.y"]
    if "forward.eps" in golden:
        assert_close(noise_of(denoiser, x, golden["input.t"], labels), golden["forward.eps"])
        return
    null = denoiser.null(len(x))["class"]
    assert_close(noise_of(denoiser, x, golden["input.n"], labels), golden["forward.output"])
    assert_close(noise_of(denoiser, x, golden["input.n"], null), golden["forward.output_null"])
    assert_close(noise_of(denoiser, x, 1000 * golden["input.t"].double(), labels), golden["forward.output_continuous"])


def test_loss_and_its_gradients(golden: Golden, denoiser: Denoiser) -> None:
    numbers = golden["loss.n" if "loss.n" in golden else "loss.t"]
    data, noise, t = {LATENT: golden["loss.x"]}, {LATENT: golden["loss.noise"]}, time_of(numbers)
    noisy, _ = LINEAR.interpolate(data, noise, t)
    theirs = golden["loss.noisy" if "loss.noisy" in golden else "loss.x_t"]
    assert_close(noisy[LATENT] / scale(t, theirs), theirs)
    expected = golden["loss.noise_term" if "loss.noise_term" in golden else "loss.eps_term"]
    for i, term in enumerate(expected):
        one = slice(i, i + 1)
        x, drawn = ({LATENT: part[LATENT][one]} for part in (data, noise))
        sample = TrainingSample(x, drawn, t[one], class_of(golden, one))
        assert_close(loss_terms(denoiser, LINEAR, sample)[LATENT].detach(), term)
    terms = loss_terms(denoiser, LINEAR, TrainingSample(data, noise, t, class_of(golden)))
    assert_close(terms[LATENT].detach(), expected.mean())
    denoiser.zero_grad()
    terms[LATENT].backward()
    gradients = {name: weight.grad for name, weight in denoiser.named_parameters() if weight.grad is not None}
    published = export_official("uvit", denoiser.config, gradients)
    for name in ("in_blocks.0.attn.qkv.weight", "out_blocks.0.skip_linear.weight"):
        if f"gradient.{name}" in golden:
            assert_close(published[name], golden[f"gradient.{name}"])


def class_of(golden: Golden, part: slice = slice(None)) -> dict[str, Tensor]:
    return {"class": golden["input.y"][part]}


def test_the_chain(golden: Golden) -> None:
    prefix = "schedule" if "schedule.betas" in golden else "table"
    assert_close(torch.from_numpy(STABLE_DIFFUSION.betas), golden[f"{prefix}.betas"])
    assert_close(torch.from_numpy(STABLE_DIFFUSION.alphas_cumprod), golden[f"{prefix}.cum_alphas"][1:])
    if "table.lambda" in golden:
        ratios = [STABLE_DIFFUSION.ratio(1000 * t) for t in golden["table.lambda_t"].double().flatten().tolist()]
        assert_close(-torch.tensor(ratios).log(), golden["table.lambda"].flatten())


SAMPLED: dict[str, dict[str, Any]] = {
    "dpm_solver": {"steps": 6},
    "dpm_solver_cfg": {"steps": 6, "guidance": CFG},
    "dpm": {"steps": 7},
    "dpm_cfg": {"steps": 8, "guidance": CFG},
    "dpm_nfe9": {"steps": 9},
    "dpm1": {"steps": 5, "order": 1},
    "dpm2": {"steps": 6, "order": 2},
}
"""Evaluations, the order if it is not that of the default, and the scale of guidance."""
ELSEWHERE = {"vpsde_sde", "vpsde_ode"}
"""Of the pixel models, whose chain is none of Stable Diffusion's."""


@pytest.mark.parametrize("case", SAMPLED)
@torch.no_grad()
def test_dpm_solver(case: str, golden: Golden, denoiser: Denoiser) -> None:
    if f"sample.{case}.out" not in golden:
        pytest.skip(f"the file has no case {case}")
    options = dict(SAMPLED[case])
    guidance, steps = Guidance(options.pop("guidance", 1.0)), options["steps"]
    labels = golden.get("sample.y")
    condition = golden.condition if labels is None else {"class": labels}
    grid = torch.tensor(chain_times(steps)[:-1], dtype=torch.float64)
    grid[0] = time_of(torch.tensor([1000]))
    if f"sample.{case}.times" in golden:
        assert_close(grid[:-1], time_of(golden[f"sample.{case}.times"]))
    if options.get("order") == 2:  # Its steps are equal in time, and halved in λ.
        grid = torch.tensor(chain_times(steps // 2)[:-1], dtype=torch.float64)
        grid[0] = time_of(torch.tensor([1000]))
        middle = torch.special.logit(grid).unfold(0, 2, 1).mean(1).sigmoid()
        grid = torch.cat([torch.stack([grid[:-1], middle], dim=1).flatten(), grid[-1:]])
    x = golden["sample.x_init"]
    velocity = guided_velocity(denoiser, condition, denoiser.config.modalities, guidance)
    start = {LATENT: x * scale(grid[:1], x)}
    result = solve(dpm_solver, velocity, start, [*grid.tolist(), 0.0], **options)
    assert_close(result[LATENT], golden[f"sample.{case}.out"])


def test_every_sampling_case_of_the_file_is_checked(golden: Golden) -> None:
    cases = {k.split(".")[1] for k in golden.tensors if k.startswith("sample.") and k.endswith(".out")}
    assert cases <= SAMPLED.keys() | ELSEWHERE
