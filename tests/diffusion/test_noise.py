"""The noise of samples: the same bits whenever they are drawn, and of every modality its own."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reglue import generation
from reglue.diffusion import noise
from reglue.diffusion.noise import drawn_ahead
from reglue.pipeline import load
from reglue.sampling import Sampling
from reglue.seeds import generator

CPU = torch.device("cpu")
SIT = {"latent": (4, 6, 5)}
REGLUE = {"latent": (4, 6, 5), "local": (3, 6, 5), "cls": (7,)}


def states(shapes: dict[str, tuple[int, ...]], indices: range = range(3), count: int = 4) -> list[dict[str, Tensor]]:
    with drawn_ahead(5, indices, shapes, CPU, torch.float32, count) as drawn:
        return list(drawn)


def test_latents_meet_the_same_noise_at_every_step_whatever_else_is_generated() -> None:
    sit, reglue, turned = states(SIT), states(REGLUE), states(dict(reversed(REGLUE.items())))
    assert len(sit) == len(reglue) == 4
    for step in range(4):
        assert torch.equal(sit[step]["latent"], reglue[step]["latent"])
        for name in REGLUE:
            assert torch.equal(reglue[step][name], turned[step][name]), name
        assert not torch.equal(reglue[step]["latent"][:, :3], reglue[step]["local"])


def test_what_is_drawn_ahead_is_what_its_definition_says_to_the_bit() -> None:
    drawn = states(REGLUE, range(2, 4))
    for name, shape in REGLUE.items():
        for position, index in enumerate((2, 3)):
            stream = generator(5, f"sample {name}", index)
            for state in drawn:
                assert np.array_equal(state[name][position].numpy(), stream.standard_normal(shape, dtype=np.float32))


def test_the_next_noise_is_drawn_while_the_last_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    original, drawn = noise.normals, [threading.Event() for _ in range(3)]
    waiting = iter(drawn)
    monkeypatch.setattr(noise, "normals", lambda *a, **k: (original(*a, **k), next(waiting).set())[0])
    with drawn_ahead(0, range(1), SIT, CPU, torch.float32, 3) as ahead:
        for following in drawn[1:]:
            next(ahead)
            assert following.wait(30), "nothing was drawn meanwhile"
        next(ahead)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("noise")]


def test_the_images_are_shared_among_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [states(REGLUE, range(i, i + 1)) for i in range(7)]
    original, together = noise.normals, threading.Barrier(noise.THREADS)
    monkeypatch.setattr(noise, "normals", lambda *a, **k: (together.wait(30), original(*a, **k))[1])
    shared = states(REGLUE, range(7))
    for step in range(4):
        for name, drawn in shared[step].items():
            assert torch.equal(drawn, torch.cat([one[step][name] for one in alone]))
            assert drawn.is_contiguous()


def test_a_gpu_copies_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise for a GPU is drawn into pinned memory, and the copy does not wait."""
    asked: list[bool] = []
    copies: list[dict[str, Any]] = []
    original, to = noise.normals, Tensor.to

    def normals(*arguments: Any, pinned: bool) -> dict[str, Tensor]:
        asked.append(pinned)
        return original(*arguments)

    def copied(self: Tensor, where: Any, **how: Any) -> Tensor:
        if isinstance(where, torch.device):
            copies.append(how)
            return self
        return to(self, where)

    monkeypatch.setattr(noise, "normals", normals)
    monkeypatch.setattr(Tensor, "to", copied)
    with drawn_ahead(0, range(1), SIT, torch.device("cuda"), torch.float64, 2) as ahead:
        assert {x.dtype for state in ahead for x in state.values()} == {torch.float64}
    assert asked == [True, True]
    assert copies == [{"non_blocking": True}] * 2


@pytest.mark.parametrize(("sampler", "draws"), [("euler-maruyama", 5), ("euler", 1), ("heun", 1), ("dopri5", 1)])
def test_no_noise_is_drawn_that_the_sampler_does_not_use(
    sampler: Any, draws: int, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sampler == "dopri5":
        pytest.importorskip("torchdiffeq")
    asked: list[int] = []
    left: list[int] = []
    original = generation.integrate

    def followed(*arguments: Any) -> Any:
        state = original(*arguments)
        left.append(len(list(arguments[-1])))
        return state

    def counted(*arguments: Any) -> Any:
        asked.append(arguments[-1])
        return drawn_ahead(*arguments)

    monkeypatch.setattr(generation, "drawn_ahead", counted)
    monkeypatch.setattr(generation, "integrate", followed)
    model = load(tiny_run, device="cpu")
    model.draw([0], model.condition([0]), 0, Sampling(sampler, 5))
    assert (asked, left) == ([draws], [0])
