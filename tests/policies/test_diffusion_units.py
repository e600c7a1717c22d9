"""Denoising steps that go forward and back one by one: gradients and metrics are those of all at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmrl.algorithms.flow_grpo import FlowGRPO
from mmrl.optim import StepReport
from mmrl.types import Batch, ShapeError
from mmrl.updates import RolloutUpdate
from policies.diffusion import Diffusion
from tests.policies import tiny_diffusion as tiny

UNITS = tiny.STEPS - 1


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_sd3(tmp_path_factory.mktemp("sd3"))


class Recorder:
    """An optimizer that takes no steps and keeps the gradients."""

    def __init__(self, policy: Diffusion) -> None:
        self.policy, self.gradient = policy, torch.empty(0)

    def zero_grad(self) -> None:
        self.policy.zero_grad()

    def step(self, loss_is_finite: bool = True, *, loss: float | None = None) -> StepReport:
        grads = [p.grad for group in self.policy.trainable().values() for p in group]
        self.gradient = torch.cat([grad.flatten() for grad in grads if grad is not None])
        self.zero_grad()
        return StepReport(False, 0.0, {})


def drawn(policy: Diffusion) -> Batch:
    """A rollout's batch whose likelihoods have moved, and of which some units are not trained, among them all of a step."""
    made = policy.act(tiny.observe(), tiny.draws(), explore=True)
    assert made.means_BKD is not None
    generator = torch.Generator().manual_seed(2)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    n, k = made.log_probs_BK.shape
    mask = made.mask_BK.clone()
    mask[:, 1] = False
    mask[2, 0] = False
    return Batch(
        trace=made.trace,
        old_log_probs_NK=made.log_probs_BK + 0.1 * noise(n, k),
        mask_NK=mask,
        advantages_NJ=noise(n, 1),
        returns_NV=noise(n, 1),
        old_values_NV=noise(n, 1),
        reference_log_probs_NK=made.log_probs_BK + 0.1 * noise(n, k),
        unit_advantages_NK=noise(n, k),
        old_means_NKD=made.means_BKD + 0.1 * noise(*made.means_BKD.shape),
        reference_means_NKD=made.means_BKD + 0.1 * noise(*made.means_BKD.shape),
    )


ALGORITHMS: dict[str, dict[str, Any]] = {
    "flow_grpo": {"kl_weight": 0.3},
    "guard": {"log_ratio": "guard", "divide_by_delta": True},
    "constant": {"reduce": "constant", "units_per_sample": 3.0, "kl_weight": 0.2, "kl_form": "estimate"},
    "means of samples": {"reduce": "sample_mean"},
    "one ratio for all": {"ratio": "sequence"},
}
WHOLE = ("means of samples", "one ratio for all")  # those whose loss is no sum over units


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_one_by_one_is_all_at_once(sd3: str, name: str, micro_batch: int | None) -> None:
    policy = tiny.build(sd3, guidance_detached=True, dtype="float64")
    batch = drawn(policy)
    algorithm = FlowGRPO(FlowGRPO.Config(group_size=5, clip_low=0.2, clip_high=0.2, **ALGORITHMS[name]))
    found = []
    for by_unit in (True, False):
        policy.by_unit, recorder, asked = by_unit, Recorder(policy), []
        evaluate = type(policy).evaluate

        def watched(trace: Any, asked: list[int] = asked, evaluate: Any = evaluate) -> Any:
            asked.append(trace["step"].shape[1])
            return evaluate(policy, trace)

        policy.evaluate = watched  # type: ignore[method-assign]
        dice = torch.Generator().manual_seed(0)
        update = RolloutUpdate(policy, algorithm, recorder, dice, dice, 1, micro_batch=micro_batch)  # type: ignore[arg-type]
        metrics = update.run(batch, 0)
        found.append((recorder.gradient, metrics))
        apart = by_unit and name not in WHOLE
        assert set(asked) == {1 if apart else UNITS}
        assert micro_batch or len(asked) == (UNITS - 1 if apart else 1)  # the middle step is not trained
    (gradient, metrics), (whole, whole_metrics) = found
    assert float(whole.abs().max()) > 1e-3
    torch.testing.assert_close(gradient, whole, rtol=1e-9, atol=1e-12)
    assert metrics == pytest.approx(whole_metrics, rel=1e-9, abs=1e-12)


def test_text_encoders_that_learn_are_asked_once(sd3: str) -> None:
    assert not tiny.build(sd3, train="text_encoders").by_unit and tiny.build(sd3).by_unit


def test_units_of_a_batch_are_those_of_single_decisions(sd3: str) -> None:
    policy = tiny.build(sd3, dtype="float64")
    batch = drawn(policy)
    one = batch.units(slice(2, 3), policy.units(batch.trace, slice(2, 3)))
    assert torch.equal(one.old_log_probs_NK, batch.old_log_probs_NK[:, 2:]) and one.engine_log_probs_NK is None
    assert torch.equal(policy.evaluate(one.trace).log_probs_NK, policy.evaluate(batch.trace).log_probs_NK[:, 2:])
    turns = Batch({}, *(torch.zeros(2, 4), torch.ones(2, 4) > 0), *(torch.zeros(2, 2) for _ in range(3)))
    with pytest.raises(ShapeError, match="has 2 decisions a sample"):
        turns.units(slice(0, 1), {})
