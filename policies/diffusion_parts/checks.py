"""What ``mmrl check-policy`` tries on an image generator: whatever a pipeline, its precision or its options may get wrong.

Four pictures of two prompts, with the policy's own weights, steps, sampler and guidance. The policy is saved and opened again
beside itself, which takes as much room on disk and in memory as it has.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mmrl.errors import MMRLError
from mmrl.numerics.draws import Draws
from mmrl.protocols import Check
from mmrl.types import Decision, Evaluation, Observation, Trace
from policies.diffusion_families.base import Family
from policies.diffusion_parts.guided import Guided
from policies.diffusion_parts.options import Options
from policies.diffusion_parts.prompts import Embeddings, Prompt, prompts_of
from policies.diffusion_parts.sampling import Sampler

ROWS = 4
REPLAY = 1e-6  # how far log-probabilities may lie apart: image papers clip ratios at 1e-5 from 1
# How far latents may lie apart that were computed in other batches, in units of their spread, by the type of the weights.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3, torch.bfloat16: 0.25}


class Painter(Protocol):
    """What is tried."""

    config: Options
    family: Family

    @property
    def device(self) -> torch.device: ...

    def act(self, observation: Observation, draws: Draws, *, explore: bool) -> Decision: ...

    def evaluate(self, trace: Trace) -> Evaluation: ...

    def save(self, folder: Path) -> None: ...

    def example_observation(self, batch_size: int) -> Observation: ...


@dataclass(frozen=True)
class Trial:
    """A policy and its parts."""

    policy: Painter
    sampler: Sampler
    embeddings: Embeddings
    noise: Callable[[Draws], Tensor]

    def draws(self) -> Draws:
        return Draws.of(0, torch.arange(ROWS, device=self.policy.device))

    def prompts(self) -> list[Prompt]:
        """Two, of two pictures each."""
        conversations = self.policy.example_observation(2).conversations
        assert conversations is not None
        first, second = prompts_of(conversations)
        return [first, first, second, second]

    def guided(self, *, scale: float | None = None, detached: bool = False, drop_N: Tensor | None = None) -> Guided:
        """The network for the four pictures; scale: None is the policy's."""
        scale = self.policy.config.guidance if scale is None else scale
        return Guided(self.policy.family, self.embeddings, self.prompts(), scale, detached=detached, drop_N=drop_N)

    def close(self, name: str, ours: Tensor, theirs: Tensor, what: str) -> Check:
        """Of latents of pictures [N, ...]."""
        spread = float(theirs.double().std())
        apart = float((ours.double() - theirs.double()).abs().max()) / max(spread, 1e-12)
        allowed = TOLERANCE[self.policy.family.network.dtype]
        return Check(name, apart <= allowed, f"{what}: {apart:.1e} of their spread apart at most ({allowed:.0e} allowed)")


def checks(trial: Trial) -> Iterator[Check]:
    """One after the other; what fails with an error is a check that failed."""
    for name, tried in _TRIALS.items():
        try:
            yield tried(name, trial)
        except (MMRLError, RuntimeError, ValueError, OSError) as error:
            yield Check(name, False, " ".join(str(error).split())[:300])


def _replay(name: str, trial: Trial) -> Check:
    policy = trial.policy
    if policy.config.sampler == "ode":
        return Check(name, True, "nothing is drawn at random")
    decision = policy.act(policy.example_observation(ROWS), trial.draws(), explore=True)
    scored, what = policy.evaluate(decision.trace), f"{decision.log_probs_BK.shape[1]} steps in {policy.config.dtype}"
    apart = float((scored.log_probs_NK.detach() - decision.log_probs_BK).abs().max())
    if decision.means_BKD is not None:
        assert scored.means_NKD is not None
        apart = max(apart, float((scored.means_NKD.detach() - decision.means_BKD).abs().max()))
    return Check(name, apart <= REPLAY, f"{what}, drawn and scored again: {apart:.1e} apart at most ({REPLAY:.0e} allowed)")


def _no_noise(name: str, trial: Trial) -> Check:
    """Every rule that the schedule knows, at every step, where nothing is added."""
    schedule, policy = trial.policy.family.schedule, trial.policy
    grid, x = schedule.grid(policy.config.steps), schedule.start(trial.noise(trial.draws()))
    rules, worst = sorted(schedule.rules - {"ode"}), 0.0
    for k in range(len(grid.times)):
        step_B = torch.full((ROWS,), k, device=x.device)
        output = _said(trial.guided(), x, grid.times[k])
        mean = schedule.transition(x, output, grid, step_B, rule="ode", level=None)[0].mean
        for rule in rules:
            same, _ = schedule.transition(x, output, grid, step_B, rule=rule, level=0.0)
            worst = max(worst, float((same.mean - mean).abs().max() / mean.std()), float(same.std.abs().max()))
        x = mean.to(x.dtype)
    allowed = TOLERANCE[torch.float32] if x.dtype != torch.float64 else TOLERANCE[torch.float64]
    return Check(
        name, worst <= allowed, f"{', '.join(rules)} with noise 0, and the ODE's {len(grid.times)} steps: {worst:.1e} apart"
    )


def _split(name: str, trial: Trial) -> Check:
    policy, index = trial.policy, torch.tensor([2, 0], device=trial.policy.device)
    seen = policy.example_observation(ROWS)
    together = policy.act(seen, trial.draws(), explore=True)
    apart = policy.act(seen.select(index), trial.draws().select(index), explore=True)
    return trial.close(name, _clean(apart), _clean(together)[index], "four pictures at a time, and two in another order")


def _saved(name: str, trial: Trial) -> Check:
    """The pictures of evaluation, since noise that is drawn at random would hide what is amiss."""
    policy: Any = trial.policy
    with tempfile.TemporaryDirectory() as folder:
        policy.save(Path(folder) / "saved")
        fields = {"checkpoint": str(Path(folder) / "saved"), "weights": "pretrained", "train": "all", "prompt_cache": None}
        again = type(policy)(replace(policy.config, **fields), device=policy.device)
    noise, ends = trial.noise(trial.draws()), []
    for each in (trial, replace(trial, policy=again, embeddings=Embeddings(again.family, 0, learning=False))):
        grid = each.policy.family.schedule.grid(policy.config.steps)
        ends.append(trial.sampler.walk(each.guided(), noise, grid, None, ()).clean)
    return trial.close(name, ends[1], ends[0], f"saved, and opened by diffusers' {type(again.family.pipeline).__name__}")


def _guidance(name: str, trial: Trial) -> Check:
    """Both branches at once, one after the other, and by hand of the network with and without its prompts."""
    family, scale = trial.policy.family, trial.policy.config.guidance
    x, time = trial.noise(trial.draws()), family.schedule.grid(trial.policy.config.steps).times[0]
    together = _said(trial.guided(), x, time)
    if family.distilled:
        return Check(name, bool(together.isfinite().all()), f"its scale, {scale:g}, is an input of the network")
    drop_N = torch.ones(ROWS, dtype=torch.bool, device=x.device)
    known, unknown = (_said(trial.guided(scale=1.0, drop_N=drop), x, time) for drop in (None, drop_N))
    by_hand = known if scale == 1 else family.guide(known, unknown, scale)
    others = torch.cat([_said(trial.guided(detached=True), x, time), by_hand])
    found = trial.close(name, torch.cat([together, together]), others, f"scale {scale:g}, both branches at once and apart")
    moved = float((known - unknown).abs().mean() / known.abs().mean().clamp(min=1e-12))
    return replace(found, measured=f"{found.measured}; prompts change {moved:.0%} of the output")


def _window(name: str, trial: Trial) -> Check:
    """The state in which a step is drawn at random is the ODE's, and pictures of one prompt share it where they should."""
    schedule, grid = trial.policy.family.schedule, trial.policy.family.schedule.grid(trial.policy.config.steps)
    first, noise = len(grid.times) // 2, trial.noise(trial.draws())
    prompt_B = torch.tensor([0, 0, 1, 1], device=noise.device)
    guided = trial.guided()
    free = trial.sampler.walk(guided, noise, grid, trial.draws(), [first])
    shared = trial.sampler.walk_from_one_point(guided, noise[[0, 2]], prompt_B, grid, trial.draws(), [first])
    x = schedule.start(noise)
    for k in range(first):
        output = _said(guided, x, grid.times[k])
        step_B = torch.full((ROWS,), k, device=x.device)
        x = schedule.transition(x, output, grid, step_B, rule="ode", level=None)[0].mean.to(x.dtype)
    before = shared.before[0]
    one = torch.equal(before[0], before[1]) and torch.equal(before[2], before[3]) and not torch.equal(before[0], before[2])
    ode = trial.close(name, torch.cat([free.before[0], before[[0, 2]]]), torch.cat([x, x[[0, 2]]]), f"{first} steps before it")
    drawn = trial.policy.config.sampler == "ode" or not torch.equal(shared.after[0][0], shared.after[0][1])
    return replace(
        ode, ok=ode.ok and one and drawn, measured=f"{ode.measured}; {'one' if one else 'NOT one'} prefix for a prompt"
    )


def _noise(name: str, trial: Trial) -> Check:
    """The collector's streams of (seed, prompt, replica): a picture's noise is its stream's, whatever stands beside it."""
    device = trial.policy.device
    tasks, copies = torch.tensor([5, 5, 6, 6], device=device), torch.tensor([0, 1, 0, 1], device=device)
    noise = trial.noise(Draws.of(1, tasks, copies)).double()
    order = torch.tensor([3, 1], device=device)
    alone = trial.noise(Draws.of(1, tasks[order], copies[order])).double()
    others = [*noise, *trial.noise(Draws.of(2, tasks, copies)).double()]
    differ = all(not torch.equal(a, b) for i, a in enumerate(others) for b in others[:i])
    size, mean, std = noise.numel(), float(noise.mean()), float(noise.std())
    normal = abs(mean) < 5 / size**0.5 and abs(std - 1) < 5 / (2 * size) ** 0.5 + (noise.dtype != torch.float64) * 0.01
    ok = torch.equal(alone, noise[order]) and differ and normal
    return Check(
        name, ok, f"of (seed, prompt, replica) alone, all different; mean {mean:.3f} and spread {std:.3f} of {size} numbers"
    )


def _clean(decision: Decision) -> Tensor:
    clean = decision.trace["clean"]
    assert isinstance(clean, Tensor)
    return clean


def _said(guided: Guided, x: Tensor, time: Tensor) -> Tensor:
    with torch.no_grad():
        times_B = time.to(x.device, torch.promote_types(x.dtype, torch.float32)).expand(len(x))
        return guided(x, times_B, None)


_TRIALS: dict[str, Callable[[str, Trial], Check]] = {
    "scores of steps": _replay,
    "steps without noise": _no_noise,
    "batches": _split,
    "saved and opened": _saved,
    "guidance": _guidance,
    "window": _window,
    "noise": _noise,
}
