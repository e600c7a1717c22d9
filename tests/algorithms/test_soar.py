"""SOAR on a linear field in float64: against a naive loop over what the field was asked, and its special case SFT."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mmrl.algorithms.soar import SOAR
from mmrl.types import Loss, Talks
from tests.algorithms.flows import D, Field, S, talks

N = 4


@pytest.fixture
def shown() -> Talks:
    return talks(torch.randn(N, S, dtype=torch.float64), torch.randn(N, D, dtype=torch.float64))


class Asked:
    """A field that remembers where it was asked and what it said, with its guidance."""

    def __init__(self, field: Any) -> None:
        self.field, self.calls = field, list[tuple[Tensor, Tensor, Tensor, float | None]]()
        self.examine, self.clean = field.examine, field.clean

    def velocity(self, trace: Any, x_t: Tensor, t_N: Tensor, *, guidance: float | None = None) -> Tensor:
        v = self.field.velocity(trace, x_t, t_N, guidance=guidance)
        self.calls.append((x_t, t_N, v, guidance))
        return v


def run(policy: Any, shown: Talks, share: float = 1.0, seed: int = 0, **fields: Any) -> Loss:
    generator = torch.Generator().manual_seed(seed)
    return SOAR(SOAR.Config(**fields)).loss(policy, shown, share=share, generator=generator)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_loss_and_gradient_equal_a_loop(shown: Talks, shift: float) -> None:
    field = Field()
    asked, lam, steps = Asked(field), 0.7, 40
    loss = run(asked, shown, share=0.5, aux_weight=lam, points=3, guidance=4.5, shift=shift, steps=steps)
    (x_t, t_N, v, none), (x_again, t_again, guided, guidance), *further = asked.calls
    assert none is None and guidance == 4.5 and not guided.requires_grad and len(further) == 3
    assert torch.equal(x_again, x_t) and torch.equal(t_again, t_N)
    z0_N = field.examine(shown)["clean"]
    total = torch.zeros((), dtype=torch.float64)
    for n in range(N):
        z0, t = z0_N[n], float(t_N[n])
        z1 = (x_t[n] - (1 - t) * z0) / t
        main = ((v[n] - (z1 - z0)) ** 2).mean()
        # One step of 1 / steps of the schedule, of which time t is shift u / (1 + (shift - 1) u).
        u = t / (shift - (shift - 1) * t) - 1 / steps
        s1 = shift * u / (1 + (shift - 1) * u)
        rolled = x_t[n] - (t - s1) * guided[n]
        auxiliary = torch.zeros((), dtype=torch.float64)
        for point, times, said, other in further:
            s = float(times[n])
            assert other is None and s1 <= s <= 1
            a = (s - s1) / (1 - s1)
            torch.testing.assert_close(point[n], (1 - a) * rolled + a * z1, rtol=1e-8, atol=1e-8)
            auxiliary = auxiliary + ((said[n] - (point[n] - z0) / s) ** 2).mean()
        total = total + (main + lam * auxiliary) / (1 + lam * 3)
    total = 0.5 * total / N
    assert float(loss.value.detach()) == pytest.approx(float(total.detach()), rel=1e-7)
    gradients = [torch.autograd.grad(value, list(field.parameters()), retain_graph=True) for value in (loss.value, total)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


class Straight:
    """The field that leads to the pictures shown, whose one step is exact: v = (x - z0) / t."""

    def __init__(self) -> None:
        self.examine = Field().examine

    def clean(self, trace: Any) -> Tensor:
        return trace["clean"]

    def velocity(self, trace: Any, x_t: Tensor, t_N: Tensor, *, guidance: float | None = None) -> Tensor:
        return (x_t - trace["clean"]) / t_N[:, None]


def test_an_exact_rollout_gives_the_target_of_sft(shown: Talks) -> None:
    asked = Asked(Straight())
    loss = run(asked, shown, points=5)
    (x_t, t_N, _, _), _, *further = asked.calls
    z0 = asked.examine(shown)["clean"]
    z1 = (x_t - (1 - t_N[:, None]) * z0) / t_N[:, None]
    for point, s_N, _, _ in further:
        torch.testing.assert_close(point, (1 - s_N[:, None]) * z0 + s_N[:, None] * z1, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close((point - z0) / s_N[:, None], z1 - z0, rtol=1e-9, atol=1e-9)
    assert float(loss.value) < 1e-20 and float(loss.metrics["auxiliary_loss"]) < 1e-20


def test_without_further_points_it_is_sft(shown: Talks) -> None:
    field = Field()
    asked = Asked(field)
    loss = run(asked, shown, aux_weight=0.0)
    assert len(asked.calls) == 1 and torch.equal(loss.value.detach(), loss.metrics["flow_matching"])


def test_stochastic_paths_scatter_around_the_deterministic_one(shown: Talks) -> None:
    """Without noise all paths are the deterministic one."""
    asked = Asked(Field())
    run(asked, shown, paths=3, points=2, path_rule="constant", path_noise=0.4)
    assert len(asked.calls) == 2 + 3 * 2
    quiet = Asked(Field())
    run(quiet, shown, paths=3, points=2, path_rule="constant", path_noise=1e-9)
    (x_t, t_N, _, _), (_, _, guided, _), *further = quiet.calls
    s1 = (t_N - 1 / 40)[:, None]
    rolled = x_t - (t_N[:, None] - s1) * guided
    z0 = quiet.examine(shown)["clean"]
    z1 = (x_t - (1 - t_N[:, None]) * z0) / t_N[:, None]
    for point, s_N, _, _ in further:
        a = (s_N[:, None] - s1) / (1 - s1)
        torch.testing.assert_close(point, (1 - a) * rolled + a * z1, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(asked.calls[-1][0], quiet.calls[-1][0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"aux_weight": 0.5},
        {"points": 2},
        {"steps": 10},
        {"guidance": 1.0},
        {"shift": 3.0},
        {"logit_mean": 0.5},
        {"logit_std": 0.5},
        {"paths": 2},
        {"paths": 2, "path_rule": "cps"},
        {"paths": 2, "path_noise": 0.9},
    ],
)
def test_every_key_changes_the_gradient(shown: Talks, change: dict[str, Any]) -> None:
    field = Field()

    def of(**fields: Any) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(run(field, shown, **fields).value, list(field.parameters()))])

    base = {"paths": 2} if len(change) > 1 else {}
    assert not torch.allclose(of(**base), of(**change), rtol=1e-6)


def test_times_of_the_main_point_are_logit_normal() -> None:
    many = talks(torch.zeros(4000, S).double(), torch.zeros(4000, D).double())
    asked = Asked(Field())
    run(asked, many, aux_weight=0.0, logit_mean=0.3, logit_std=0.8)
    logits = asked.calls[0][1].logit()
    assert float(logits.mean()) == pytest.approx(0.3, abs=0.06) and float(logits.std()) == pytest.approx(0.8, abs=0.04)
    assert math.isfinite(float(run(asked, many, logit_mean=-6.0).value.detach()))  # times where a step ends at 0


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"path_noise": 0.3}, "raise paths"),
        ({"paths": 2, "path_rule": "cps", "path_noise": 1.5}, "lower it"),
        ({"aux_weight": -1.0}, "greater than or equal to 0"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        SOAR.Config(**fields)
