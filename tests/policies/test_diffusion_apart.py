"""A branch without prompt that is detached: what it said in the rollout is taken again, and only while the weights are those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mmrl.snapshots import Snapshot
from policies.diffusion import Diffusion
from tests.policies import tiny_diffusion as tiny

UNITS = tiny.STEPS - 1


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_sd3(tmp_path_factory.mktemp("sd3"))


def counted(policy: Diffusion) -> list[int]:
    """The rows of each pass of the network from here on."""
    rows: list[int] = []
    predict: Any = policy.family.predict
    policy.family.predict = lambda x, *rest: (rows.append(len(x)), predict(x, *rest))[1]  # type: ignore[method-assign,assignment]
    return rows


def scored(policy: Diffusion, trace: Any) -> tuple[torch.Tensor, int]:
    """Log-probabilities, and how many passes they took."""
    rows = counted(policy)
    with policy.compute_mode(train=True):
        return policy.evaluate(trace).log_probs_NK, len(rows)


@pytest.mark.parametrize("fields", [{}, {"train": "lora"}, {"sampler": "cps", "dtype": "float64"}], ids=str)
def test_unchanged_weights_need_one_branch_and_give_its_numbers(sd3: str, fields: dict[str, Any]) -> None:
    policy = tiny.build(sd3, guidance_detached=True, **fields)
    decision = policy.act(tiny.observe(), tiny.draws(), explore=True)
    log_probs, passes = scored(policy, decision.trace)
    assert passes == UNITS and torch.equal(log_probs, decision.log_probs_BK)
    policy.zero_grad()
    log_probs.sum().backward()
    grads = [p.grad.clone() for group in policy.trainable().values() for p in group if p.grad is not None]
    policy.zero_grad()
    trace = {name: value for name, value in decision.trace.items() if name != "weights"}
    asked, passes = scored(policy, trace)
    assert passes == 2 * UNITS and torch.equal(asked, log_probs)
    asked.sum().backward()
    again = [p.grad for group in policy.trainable().values() for p in group if p.grad is not None]
    assert grads and all(torch.equal(one, other) for one, other in zip(grads, again, strict=True))


def test_a_window_behind_a_shared_prefix_is_the_same(sd3: str) -> None:
    window = {"which": "window", "size": 1, "start": 2, "shared_prefix": True}
    policy = tiny.build(sd3, guidance_detached=True, trained_steps=window)
    decision = policy.act(tiny.observe(), tiny.draws(), explore=True)
    log_probs, passes = scored(policy, decision.trace)
    assert passes == 1 and torch.equal(log_probs, decision.log_probs_BK)


def update(policy: Diffusion) -> None:
    parameters = [p for group in policy.trainable().values() for p in group]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    policy.zero_grad()


def loaded(policy: Diffusion) -> None:
    policy.load_state_dict({name: 1.1 * value for name, value in policy.state_dict().items()})


CHANGES: dict[str, Callable[[Diffusion], Any]] = {"an update": update, "loaded": loaded, "stirred": tiny.stir}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changed_weights_ask_again(sd3: str, change: Callable[[Diffusion], Any]) -> None:
    policy = tiny.build(sd3, guidance_detached=True)
    trace = policy.act(tiny.observe(), tiny.draws(), explore=True).trace
    change(policy)
    plain = {name: value for name, value in trace.items() if name not in ("weights", "apart")}
    wanted, passes = scored(policy, plain)
    assert passes == 2 * UNITS
    found, passes = scored(policy, trace)
    assert passes == 2 * UNITS and torch.equal(found, wanted)


@pytest.mark.parametrize("train", ["all", "lora"])
def test_a_reference_and_weights_that_are_worn_ask_for_themselves(sd3: str, train: str) -> None:
    policy = tiny.build(sd3, guidance_detached=True, train=train)
    reference, average = policy.reference(), Snapshot(policy, lambda n: 0.0)
    update(policy)
    policy.version += 1
    trace = policy.act(tiny.observe(), tiny.draws(), explore=True).trace
    plain = {name: value for name, value in trace.items() if name not in ("weights", "apart")}
    assert torch.equal(scored(reference, trace)[0], scored(reference, plain)[0])
    with average.worn():
        assert torch.equal(policy.evaluate(trace).log_probs_NK, policy.evaluate(plain).log_probs_NK)
        worn = policy.act(tiny.observe(), tiny.draws(), explore=True).trace
    plain = {name: value for name, value in worn.items() if name not in ("weights", "apart")}
    assert torch.equal(policy.evaluate(worn).log_probs_NK, policy.evaluate(plain).log_probs_NK)


def row_by_row(policy: Diffusion) -> None:
    """Its network sees one row at a time, so that no row depends on the others, whatever the machine's matrix products do."""
    predict: Any = policy.family.predict

    def alone(x: torch.Tensor, time_B: torch.Tensor, embedding: Any, guidance_B: Any) -> torch.Tensor:
        rows = [slice(n, n + 1) for n in range(len(x))]
        return torch.cat([predict(x[n], time_B[n], {name: v[n] for name, v in embedding.items()}, None) for n in rows])

    policy.family.predict = alone  # type: ignore[method-assign]


@pytest.mark.parametrize("fields", [{}, {"train": "lora", "dtype": "float64"}], ids=str)
def test_branches_share_a_pass_where_each_says_what_it_says_alone(sd3: str, fields: dict[str, Any]) -> None:
    policy = tiny.build(sd3, guidance_detached=True, **fields)
    row_by_row(policy)
    rows, size = counted(policy), len(tiny.TEXTS)
    for trial in ([size, size], []):
        rows.clear()
        decision = policy.act(tiny.observe(), tiny.draws(), explore=True)
        assert rows == [*trial, *[2 * size] * tiny.STEPS]
        assert torch.equal(policy.evaluate(decision.trace).log_probs_NK, decision.log_probs_BK)
        asked = {name: value for name, value in decision.trace.items() if name != "weights"}
        assert torch.equal(scored(policy, asked)[0], decision.log_probs_BK)


@pytest.mark.parametrize("fields", [{}, {"train": "lora"}, {"dtype": "float64"}, {"dtype": "bfloat16"}], ids=str)
def test_many_pictures_are_replayed_whether_their_branches_share_a_pass_or_not(sd3: str, fields: dict[str, Any]) -> None:
    policy, texts = tiny.build(sd3, guidance_detached=True, **fields), tiny.TEXTS * 4
    for _ in range(2):
        decision = policy.act(tiny.observe(texts), tiny.draws(0, len(texts)), explore=True)
        asked = {name: value for name, value in decision.trace.items() if name != "weights"}
        assert torch.equal(scored(policy, asked)[0], decision.log_probs_BK)


def test_branches_that_would_say_something_else_together_go_alone(sd3: str) -> None:
    policy = tiny.build(sd3, guidance_detached=True)
    row_by_row(policy)
    predict: Any = policy.family.predict
    policy.family.predict = lambda x, *rest: predict(x, *rest) * (1 + 1e-6 * (len(x) > size))  # type: ignore[method-assign,assignment]
    rows, size = counted(policy), len(tiny.TEXTS)
    decision = policy.act(tiny.observe(), tiny.draws(), explore=True)
    assert rows == [size, size, 2 * size, *[size, size] * UNITS]
    assert torch.equal(scored(policy, decision.trace)[0], decision.log_probs_BK)


def test_a_branch_that_learns_is_not_kept(sd3: str) -> None:
    policy = tiny.build(sd3)
    assert not {"apart", "weights"} & policy.act(tiny.observe(), tiny.draws(), explore=True).trace.keys()
