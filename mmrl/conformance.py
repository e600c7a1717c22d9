"""``mmrl check-policy CONFIG``: does a policy keep its promises, on its own weights and in numbers?

What holds for every policy is tried here, by the contract alone (``mmrl.protocols``). A policy that knows more of itself, as one
that talks does, offers its own checks (SelfCheckingPolicy).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, PositiveInt
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from mmrl.building import choose_device
from mmrl.component import Component
from mmrl.config import Block, device_name, load_as, resolved
from mmrl.measuring import load_measurement
from mmrl.numerics.draws import Draws
from mmrl.protocols import Check, LikelihoodPolicy, SelfCheckingPolicy, ValuePolicy
from mmrl.seeding import configure_torch
from mmrl.types import Decision, EpisodeRecord, Evaluation, Packing, Rollout, gather

ROWS = 4
# How far numbers that should be equal may lie apart, by the least precise type among the weights.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


class ConformanceConfig(Block):
    """A policy alone."""

    policy: Component
    """What is checked."""
    device: Annotated[str, AfterValidator(device_name)] = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:1."""
    threads: PositiveInt | None = None
    """Torch's threads within an operation; null leaves torch's choice."""


def load(path: Path, overrides: Sequence[str]) -> ConformanceConfig:
    """The policy of a YAML that has nothing else, or of a run's or an evaluation's."""
    if "environment" not in resolved(path, overrides):
        return load_as(ConformanceConfig, path, overrides)
    found = load_measurement(path, overrides)
    return ConformanceConfig(policy=found.policy, device=found.device, threads=found.threads)


def check(config: ConformanceConfig, title: str) -> bool:
    """Print a table of what was tried and measured; whether all of it holds."""
    configure_torch(config.threads, deterministic=False)
    console, held = Console(width=130), True
    table = Table(title=escape(title))
    for column in ("check", "holds", "measured"):
        table.add_column(column)
    with console.status("building the policy") as status:
        policy = config.policy.build(device=choose_device(config.device))
        status.update("trying its promises")
        for found in checks(policy):
            held = held and found.ok
            table.add_row(escape(found.name), "[green]yes[/]" if found.ok else "[red]NO[/]", escape(found.measured))
            status.update(f"{escape(found.name)}: tried")
    console.print(table)
    return held


def checks(policy: Any) -> Iterator[Check]:
    """What applies to the policy, one check at a time."""
    device = next(iter(policy.state_dict().values())).device
    draws = Draws.of(0, torch.arange(ROWS, device=device))
    everyone = torch.arange(ROWS, device=device)
    seen = policy.example_observation(ROWS).to(device)
    with policy.compute_mode(train=False):
        first, again = (policy.act(seen, draws.select(everyone), explore=True) for _ in range(2))
        yield _close("the same draws", policy, first.log_probs_BK, again.log_probs_BK, "acting twice")
        some = torch.tensor([2, 0], device=device)
        apart = policy.act(seen.select(some), draws.select(some), explore=True)
        yield _close("rows beside it", policy, apart.log_probs_BK, first.log_probs_BK[some], "with four rows and with two")
    lacks: Any = getattr(policy, "lacks", lambda config: {})
    if isinstance(policy, LikelihoodPolicy) and "likelihood" not in lacks(getattr(policy, "config", None)):
        yield from _scored(policy, first)
    own: Any = policy
    if isinstance(policy, SelfCheckingPolicy):
        with own.compute_mode(train=False):
            yield from own.checks()


def _scored(policy: Any, decision: Decision) -> Iterator[Check]:
    packing = policy.pack(_rollout(decision))
    with policy.compute_mode(train=True):
        evaluation: Evaluation = policy.evaluate(packing.trace)
        old, there = _of_units(decision.log_probs_BK, packing), _of_units(decision.mask_BK, packing)
        new = evaluation.log_probs_NK.detach()
        yield _close("log-probs of acting", policy, new[there], old[there], f"{int(there.sum())} units, scored again")
        finite = bool(evaluation.entropy_NK.isfinite().all() and new.isfinite().all())
        yield Check("finite", finite, f"mean entropy {float(evaluation.entropy_NK.detach()[there].mean()):.3g} nats")
        if isinstance(policy, ValuePolicy) and policy.has_critic and decision.values_BV is not None:
            assert evaluation.values_NV is not None
            values, said = _of_units(decision.values_BV, packing), f"{decision.values_BV.shape[1]} a decision, scored again"
            yield _close("values of acting", policy, evaluation.values_NV.detach(), values, said)
        yield _gradient(policy, evaluation.log_probs_NK.sum())


def _gradient(policy: Any, total: Tensor) -> Check:
    trained = [p for group in policy.trainable().values() for p in group]
    gradients = [g for g in torch.autograd.grad(total, trained, allow_unused=True) if g is not None]
    length = float(torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()) if gradients else 0.0
    return Check("gradient", 0 < length < float("inf"), f"length {length:.3g}, of {len(gradients)} of {len(trained)} tensors")


def _rollout(decision: Decision) -> Rollout:
    """One decision in each environment, the last of its episode."""
    size = len(decision.log_probs_BK)
    like = decision.log_probs_BK
    nothing, yes = like.new_zeros(1, size), torch.ones(1, size, dtype=torch.bool, device=like.device)
    none = like.new_zeros(0)
    return Rollout(
        {name: values[None] for name, values in decision.trace.items()},
        like[None],
        decision.mask_BK[None],
        nothing,
        nothing[..., None] if decision.values_BV is None else decision.values_BV[None],
        nothing,
        yes,
        yes,
        ~yes,
        torch.zeros(1, size, dtype=torch.long, device=like.device),
        EpisodeRecord(none.long(), none, none, none.long()),
        env_steps=size,
    )


def _of_units(x_BK: Tensor, packing: Packing) -> Tensor:
    return gather(x_BK[None], packing.index_NJ).flatten(1)


def _close(name: str, policy: Any, ours: Tensor, theirs: Tensor, what: str) -> Check:
    kinds = [tensor.dtype for tensor in policy.state_dict().values() if tensor.is_floating_point()]
    allowed = max((TOLERANCE[kind] for kind in kinds if kind in TOLERANCE), default=TOLERANCE[torch.float32])
    apart = float((ours - theirs).abs().max())
    return Check(name, apart <= allowed, f"{what}: {apart:.1e} apart at most ({allowed:.0e} allowed)")
