"""DiffusionNFT, AWM and Diffusion-DPO on a linear field in float64: against naive loops over what the field was asked."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mmrl.algorithms.awm import AWM
from mmrl.algorithms.decoupled import EMADecay, Times
from mmrl.algorithms.diffusion_dpo import DiffusionDPO
from mmrl.algorithms.nft import DiffusionNFT
from mmrl.errors import ConfigError
from mmrl.numerics.draws import Draws
from mmrl.optim import StepReport
from mmrl.protocols import LossContext
from mmrl.snapshots import Frozen
from mmrl.types import Batch
from mmrl.updates import RolloutUpdate
from tests.algorithms.flows import D, Field, S
from tests.algorithms.test_flow_grpo import rollout

N = 8


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def moved(field: Field, by: float) -> Field:
    other = copy.deepcopy(field)
    for parameter in other.parameters():
        parameter.data = parameter.data + by * torch.randn_like(parameter)
    return other


class Asked:
    """A field that remembers where it was asked, and what it said."""

    def __init__(self, field: Field) -> None:
        self.field, self.calls = field, list[tuple[Tensor, Tensor, Tensor]]()

    def clean(self, trace: Any) -> Tensor:
        return self.field.clean(trace)

    def velocity(self, trace: Any, x_t: Tensor, t_N: Tensor, *, guidance: float | None = None) -> Tensor:
        assert guidance is None
        v = self.field.velocity(trace, x_t, t_N)
        self.calls.append((x_t, t_N, v))
        return v


@pytest.fixture
def batch() -> Batch:
    ones, nothing = torch.ones(N, 1, dtype=torch.bool), torch.zeros(N, 1, dtype=torch.float64)
    trace = {"clean": draw(N, D), "prompt": draw(N, S)}
    return Batch(trace, nothing, ones, 3 * draw(N, 1), nothing, nothing)


def pairs(batch: Batch) -> Batch:
    signs = torch.tensor([1.0, -1, -1, 1, 1, -1, -1, 1], dtype=torch.float64)[:, None]
    return replace(batch, advantages_NJ=signs)


Fields = dict[str, Field]


@pytest.fixture
def fields() -> Fields:
    """The policy, and the others a loss may ask, none of them alike."""
    policy = Field()
    return {"policy": policy, **{name: moved(policy, 0.05) for name in ("behaviour", "reference", "average")}}


def context(fields: Fields, **more: Any) -> LossContext:
    others = {name: Frozen(field) for name, field in fields.items() if name != "policy"}
    return LossContext(0, 0, 0, 0, rows=N, draws=Draws.of(0, torch.arange(N)), **others, **more)


def gradient(value: Tensor, field: Field) -> Tensor:
    found = torch.autograd.grad(value, list(field.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in found])


def samples(asked: Asked, batch: Batch) -> list[tuple[int, Tensor, float, Tensor, Tensor]]:
    """(row, x_t, t, noise, velocity) of every sample at every time."""
    rows = []
    for x_t, t_N, v in asked.calls:
        for n, t in enumerate(t_N.tolist()):
            noise = (x_t[n] - (1 - t) * batch.trace["clean"][n]) / t  # type: ignore[index]
            rows.append((n, x_t[n], t, noise, v[n]))
    return rows


def other_says(field: Field, batch: Batch, n: int, x_t: Tensor, t: float) -> Tensor:
    row = {name: value[n : n + 1] for name, value in batch.trace.items()}
    return field.velocity(row, x_t[None], torch.tensor([t], dtype=torch.float64))[0].detach()


def test_nft_equals_a_loop_over_samples(fields: Fields, batch: Batch) -> None:
    algorithm = DiffusionNFT(
        DiffusionNFT.Config(strength=0.3, kl_weight=0.7, clamp=2.0, times=Times(count=3, distribution="uniform"))
    )
    asked = Asked(fields["policy"])
    loss = algorithm.loss(asked, batch, context(fields))  # type: ignore[arg-type]
    total = torch.zeros((), dtype=torch.float64)
    for n, x_t, t, _, v in samples(asked, batch):
        old, reference = (other_says(fields[name], batch, n, x_t, t) for name in ("behaviour", "reference"))
        x0, r = batch.trace["clean"][n], max(-1.0, min(1.0, float(batch.advantages_NJ[n]) / 2.0)) / 2 + 0.5  # type: ignore[index]
        for share, field in ((r, 0.3 * v + 0.7 * old), (1 - r, 1.3 * old - 0.3 * v)):
            error = x_t - t * field - x0
            total = total + 2.0 / 0.3 * share * (error**2).mean() / float(error.detach().abs().mean())
        total = total + 0.7 * ((v - reference) ** 2).mean()
    assert float(loss.value.detach()) == pytest.approx(float(total.detach()) / (3 * N))
    torch.testing.assert_close(
        gradient(loss.value, fields["policy"]), gradient(total / (3 * N), fields["policy"]), rtol=1e-8, atol=1e-10
    )
    parts = loss.metrics
    assert float(parts["policy_loss"] + 0.7 * parts["kl_reference"]) == pytest.approx(float(loss.value.detach()))


def test_nft_moves_nothing_where_all_are_alike_and_the_weights_unchanged(fields: Fields, batch: Batch) -> None:
    algorithm = DiffusionNFT(DiffusionNFT.Config(kl_weight=0.0))
    alike = replace(batch, advantages_NJ=torch.zeros(N, 1, dtype=torch.float64))
    loss = algorithm.loss(fields["policy"], alike, context({"behaviour": fields["policy"]}))
    assert gradient(loss.value, fields["policy"]).abs().max() < 1e-12 and not loss.metrics["velocity_shift"]
    pulled = algorithm.loss(fields["policy"], batch, context({"behaviour": fields["policy"]}))
    assert gradient(pulled.value, fields["policy"]).abs().max() > 1e-3


@pytest.mark.parametrize("weighting", ["uniform", "time", "power"])
def test_awm_at_ratio_1_is_the_policy_gradient_of_weighted_flow_matching(fields: Fields, batch: Batch, weighting: Any) -> None:
    algorithm = AWM(AWM.Config(weighting=weighting, clamp=2.0, times=Times(count=2)))
    asked = Asked(fields["policy"])
    loss = algorithm.loss(asked, batch, context({"behaviour": fields["policy"]}))  # type: ignore[arg-type]
    expected = torch.zeros((), dtype=torch.float64)
    for n, _, t, noise, v in samples(asked, batch):
        error = ((v - (noise - batch.trace["clean"][n])) ** 2).mean()  # type: ignore[index]
        weighted = {"uniform": error, "time": t * error, "power": t * 4 * ((error + 1e-10) ** 0.25 - 1e-10**0.25)}[weighting]
        expected = expected + max(-2.0, min(2.0, float(batch.advantages_NJ[n]))) * weighted
    torch.testing.assert_close(
        gradient(loss.value, fields["policy"]), gradient(expected / (2 * N), fields["policy"]), rtol=1e-6, atol=1e-9
    )
    assert not loss.metrics["clip_fraction"] and abs(float(loss.metrics["approx_kl"])) < 1e-12


@pytest.mark.parametrize("kl_to", ["reference", "average"])
def test_awm_equals_a_loop_over_samples(fields: Fields, batch: Batch, kl_to: Any) -> None:
    average = {"average": EMADecay()} if kl_to == "average" else {}
    algorithm = AWM(AWM.Config(clip_low=0.02, clip_high=0.1, kl_weight=0.4, kl_to=kl_to, times=Times(count=2), **average))
    asked = Asked(fields["policy"])
    loss = algorithm.loss(asked, batch, context(fields))  # type: ignore[arg-type]
    total, clipped = torch.zeros((), dtype=torch.float64), 0
    for n, x_t, t, noise, v in samples(asked, batch):
        target = noise - batch.trace["clean"][n]  # type: ignore[index]
        old, other = (other_says(fields[name], batch, n, x_t, t) for name in ("behaviour", kl_to))
        ratio = torch.exp(((old - target) ** 2).mean() - ((v - target) ** 2).mean())
        advantage = max(-5.0, min(5.0, float(batch.advantages_NJ[n])))
        free, bounded = -advantage * ratio, -advantage * ratio.clamp(0.98, 1.1)
        clipped += bool(bounded > free)
        total = total + torch.maximum(free, bounded) + 0.4 * ((v - other) ** 2).mean()
    assert float(loss.value.detach()) == pytest.approx(float(total.detach()) / (2 * N))
    torch.testing.assert_close(
        gradient(loss.value, fields["policy"]), gradient(total / (2 * N), fields["policy"]), rtol=1e-8, atol=1e-10
    )
    assert float(loss.metrics["clip_fraction"]) == pytest.approx(clipped / (2 * N)) and clipped


def test_dpo_equals_a_loop_over_pairs_which_share_noise_and_time(fields: Fields, batch: Batch) -> None:
    algorithm, batch = DiffusionDPO(DiffusionDPO.Config(beta=7.0, times=Times(count=2))), pairs(batch)
    asked = Asked(fields["policy"])
    loss = algorithm.loss(asked, batch, context(fields))  # type: ignore[arg-type]
    total, right, everything = torch.zeros((), dtype=torch.float64), 0, samples(asked, batch)
    for first, second in zip(everything[::2], everything[1::2], strict=True):
        assert first[2] == second[2]
        torch.testing.assert_close(first[3], second[3], rtol=1e-6, atol=1e-8)
        errors = []
        for n, x_t, t, noise, v in (first, second):
            target = noise - batch.trace["clean"][n]  # type: ignore[index]
            reference = other_says(fields["reference"], batch, n, x_t, t)
            errors.append(((v - target) ** 2).mean() - float(((reference - target) ** 2).mean()))
        best = 0 if batch.advantages_NJ[first[0]] > 0 else 1
        inside = -7.0 / 2 * (errors[best] - errors[1 - best])
        total = total - torch.log(1 / (1 + torch.exp(-inside)))
        right += bool(inside > 0)
    assert float(loss.value.detach()) == pytest.approx(float(total.detach()) / N)
    torch.testing.assert_close(
        gradient(loss.value, fields["policy"]), gradient(total / N, fields["policy"]), rtol=1e-6, atol=1e-9
    )
    assert float(loss.metrics["preferred"]) == pytest.approx(right / N)
    same = algorithm.loss(fields["policy"], batch, context({"reference": fields["policy"]}))  # type: ignore[arg-type]
    assert float(same.value.detach()) == pytest.approx(math.log(2))


NFT = {"strength": 0.5, "kl_weight": 0.1}
MATCHED = {"kl_weight": 0.1, "clip_low": 1e-3, "clip_high": 1e-3, "times": Times(count=8)}


@pytest.mark.parametrize(
    ("kind", "base", "change"),
    [
        (DiffusionNFT, NFT, {"strength": 1.0}),
        (DiffusionNFT, NFT, {"kl_weight": 0.3}),
        (DiffusionNFT, NFT, {"clamp": 1.0}),
        (DiffusionNFT, NFT, {"times": Times(shift=3.0)}),
        (DiffusionNFT, NFT, {"times": Times(count=2)}),
        (DiffusionNFT, NFT, {"times": Times(distribution="logit_normal")}),
        (AWM, MATCHED, {"kl_weight": 0.3}),
        (AWM, MATCHED, {"kl_to": "average", "average": EMADecay()}),
        (AWM, MATCHED, {"clamp": 1.0}),
        (AWM, MATCHED, {"weighting": "time"}),
        (AWM, MATCHED, {"weighting": "time_squared"}),
        (AWM, MATCHED, {"weighting": "huber"}),
        (AWM, {**MATCHED, "weighting": "power"}, {"power": 0.5}),
        (AWM, MATCHED, {"clip_low": 0.5}),
        (AWM, MATCHED, {"clip_high": 0.5}),
        (DiffusionDPO, {}, {"beta": 100.0}),
    ],
)
def test_every_key_changes_the_gradient(
    fields: Fields, batch: Batch, kind: Any, base: dict[str, Any], change: dict[str, Any]
) -> None:
    data = pairs(batch) if kind is DiffusionDPO else batch

    def of(**more: Any) -> Tensor:
        loss = kind(kind.Config(**{**base, **more})).loss(fields["policy"], data, context(fields))
        return gradient(loss.value, fields["policy"])

    assert not torch.allclose(of(), of(**change), rtol=1e-6)


class Recorder:
    """An optimizer that takes no steps and keeps the gradients."""

    def __init__(self, field: Field) -> None:
        self.field, self.gradients = field, list[Tensor]()

    def zero_grad(self) -> None:
        self.field.zero_grad()

    def step(self, loss_is_finite: bool = True, *, loss: float | None = None) -> StepReport:
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.field.parameters()]))  # type: ignore[union-attr]
        return StepReport(False, 0.0, {})


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda: DiffusionNFT(DiffusionNFT.Config(minibatches=2)), lambda b: b),
        (lambda: AWM(AWM.Config(minibatches=2, times=Times(count=2))), lambda b: b),
        (lambda: DiffusionDPO(DiffusionDPO.Config(minibatches=2, beta=5.0)), pairs),
    ],
)
def test_micro_batches_change_nothing_and_pairs_stay_pairs(
    fields: Fields, batch: Batch, make: Callable[[], Any], data: Callable[[Batch], Batch]
) -> None:
    def run(micro: int | None) -> tuple[list[Tensor], dict[str, float]]:
        algorithm, recorder = make(), Recorder(fields["policy"])
        others: Any = {"reference": fields["reference"]}
        if algorithm.behaviour is not None:
            others["behaviour"] = Frozen(fields["behaviour"])
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        update = RolloutUpdate(
            fields["policy"], algorithm, recorder, generators[0], torch.Generator(), 1, micro,  # type: ignore[arg-type]
            rows_generator=generators[1], **others,
        )  # fmt: skip
        return recorder.gradients, update.run(data(batch), 0)

    whole, metrics = run(None)
    for micro in (1, 3):
        parts, same = run(micro)
        torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)
        assert same == pytest.approx(metrics)
    assert not torch.allclose(*whole) and metrics["updates"] == 2 and "log_prob_mismatch" not in metrics


def test_the_published_schedules_of_averages() -> None:
    preferences, text = EMADecay(), EMADecay(start=75, rate=0.0075, limit=0.999)
    assert [preferences(n) for n in (0, 1, 100, 500, 900)] == pytest.approx([0, 0.001, 0.1, 0.5, 0.5])
    assert [text(n) for n in (0, 75, 76, 175, 1000)] == pytest.approx([0, 0, 0.0075, 0.75, 0.999])
    assert AWM(AWM.Config()).behaviour(50) == 0


def test_times_lie_in_their_strata_and_belong_to_their_rows() -> None:
    draws = Draws.of(0, torch.arange(500))
    t_NM = Times(count=4).draw(draws)
    edges = torch.arange(5) / 4
    assert ((t_NM >= edges[:-1]) & (t_NM < edges[1:])).all()
    assert torch.equal(Times(count=4).draw(Draws.of(0, torch.tensor([7]))), t_NM[7:8])
    shifted = Times(count=1, distribution="uniform", shift=3.0).draw(Draws.of(0, torch.arange(4000)))
    plain = Times(count=1, distribution="uniform").draw(Draws.of(0, torch.arange(4000)))
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))
    assert abs(float(plain.mean()) - 0.5) < 0.02
    middle = Times(count=1, distribution="logit_normal").draw(Draws.of(0, torch.arange(4000)))
    assert float(middle.logit().std()) == pytest.approx(1, abs=0.05) and abs(float(middle.logit().mean())) < 0.05


RETURNS = [0.1, 0.9, 0.4, 0.9, 0.5, 0.2, -3.0, 0.2]


def test_dpo_keeps_the_best_and_the_worst_of_each_group() -> None:
    result = DiffusionDPO(DiffusionDPO.Config(group_size=4)).advantages(rollout(RETURNS))
    assert result.keep_TB[0].tolist() == [True, True, False, False, True, False, True, False]
    assert result.advantages_TB[result.keep_TB].tolist() == [-1, 1, 1, -1]
    several = rollout(RETURNS)
    twice = {name: getattr(several, name).repeat(2, *[1] * (getattr(several, name).dim() - 1)) for name in vars(several)
             if name.endswith(("_TB", "_TBK", "_TBV")) and getattr(several, name) is not None}  # fmt: skip
    with pytest.raises(ConfigError, match="several"):
        DiffusionDPO(DiffusionDPO.Config(group_size=4)).advantages(replace(several, **twice))


@pytest.mark.parametrize(
    ("kind", "fields", "sentence"),
    [
        (AWM, {"kl_to": "average"}, "set both"),
        (AWM, {"average": EMADecay()}, "leave it out"),
        (AWM, {"power": 0.5}, "leave it out"),
        (DiffusionNFT, {"strength": 0.0}, "greater than 0"),
        (DiffusionDPO, {"group_size": 1}, "greater than or equal to 2"),
    ],
)
def test_impossible_settings_are_refused(kind: Any, fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        kind.Config(**fields)
