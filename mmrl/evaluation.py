"""Evaluation: the deterministic policy on held-out tasks, with intervals, and a few episodes on video."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrl.checkpoint import atomic_write_text
from mmrl.errors import TrainingError
from mmrl.numerics.draws import Draws
from mmrl.numerics.statistics import wilson_interval
from mmrl.progress import Progress
from mmrl.protocols import Environment, Policy, RenderEnvironment
from mmrl.report.video import write_animation
from mmrl.seeding import derive_seed
from mmrl.types import Observation

VIDEO_FPS = 10
ATTEMPTS = 3  # how often an episode is played that the simulator loses


@dataclass(frozen=True)
class FamilyResult:
    """Success of one task family with its 95 % Wilson interval, and mean and standard deviation of the undiscounted return.

    The standard deviation is over episodes (unbiased; 0 where there is only one).
    """

    success: float
    episodes: int
    low: float
    high: float
    return_: float
    return_std: float

    def row(self) -> dict[str, Any]:
        """As it stands in metrics.jsonl, where the mean is called ``return``."""
        out = asdict(self)
        out["return"] = out.pop("return_")
        return out


@dataclass(frozen=True)
class EvaluationResult(FamilyResult):
    """Success and return over all episodes and per family; ``length`` is the mean in env steps.

    lost: episodes that the simulator lost at every attempt; they are not among ``episodes``.
    """

    length: float
    families: Mapping[str, FamilyResult]
    seconds: float
    lost: int = 0

    def row(self) -> dict[str, Any]:
        """The result as a row of metrics.jsonl."""
        return {**super().row(), "families": {name: family.row() for name, family in self.families.items()}}

    def sentence(self) -> str:
        success = f"success {self.success:.1%} [{self.low:.1%}, {self.high:.1%}]"
        lost = f" ({self.lost} more were lost by the simulator)" if self.lost else ""
        return f"{success}, return {self.return_:.4g} ± {self.return_std:.2g} (std) over {self.episodes} episodes{lost}"


@dataclass
class _Film:
    """Frames of the first few slots of an evaluation."""

    slots_M: Tensor
    frames: list[Tensor]

    def shoot(self, environment: Environment) -> None:
        if isinstance(environment, RenderEnvironment) and len(self.slots_M):
            self.frames.append(environment.render_video(self.slots_M).cpu())


@torch.no_grad()
def evaluate(
    policy: Policy,
    environment: Environment,
    *,
    episodes: int,
    first_task: int,
    seed: int,
    device: torch.device,
    progress: Progress,
    videos: int = 0,
    video_folder: Path | None = None,
    label: str = "",
    stage: str = "",
) -> EvaluationResult:
    """Run the tasks ``first_task ..`` once each, ``num_envs`` at a time; exactly ``episodes`` count.

    An episode that the simulator loses is played again, ATTEMPTS times in all, and then left out and counted. Raises
    TrainingError where none is left.

    ``videos`` of the first ``num_envs`` episodes, taken from the families in turn before anything ran, go to ``video_folder``.
    The numbers depend on policy, tasks and seed; not on what is filmed, and on ``num_envs`` only as far as the rounding of matrix
    products does: each episode draws random numbers of its own.
    """
    started = time.perf_counter()
    rounds: list[dict[str, Tensor]] = []
    pending_M = torch.arange(first_task, first_task + episodes, device=device)
    with progress.task(f"evaluating {label}".strip(), episodes) as advance:
        for _ in range(ATTEMPTS):
            lost: list[Tensor] = []
            for tasks in pending_M.split(environment.num_envs):
                missing = environment.num_envs - len(tasks)
                tasks_B = torch.cat([tasks, tasks[-1:].expand(missing)])
                slots = (
                    _video_slots(environment.family_of(tasks), videos)
                    if not rounds and video_folder is not None
                    else torch.zeros(0).long()
                )
                film = _Film(slots, [])
                outcome, instructions = _play(policy, environment, tasks_B, seed, film)
                if video_folder is not None and film.frames:
                    _save_films(film, outcome, instructions, environment.family_of(tasks_B), video_folder, label, stage)
                rounds.append({name: value[: len(tasks)] for name, value in outcome.items()})
                lost.append(tasks[rounds[-1]["lost"]])
                advance(len(tasks) - len(lost[-1]))
            pending_M = torch.cat(lost)
            if len(pending_M) == 0:
                break
    results = {name: torch.cat([r[name][~r["lost"]] for r in rounds]).cpu() for name in rounds[0]}
    if len(results["task"]) == 0:
        raise TrainingError(f"the simulator lost each of {episodes} evaluation episodes {ATTEMPTS} times; see `mmrl doctor`")
    by_family: dict[str, list[int]] = defaultdict(list)
    for episode, family in enumerate(environment.family_of(results["task"])):
        by_family[family].append(episode)
    families = {name: _family(results, episodes) for name, episodes in sorted(by_family.items())}
    overall = _family(results, list(range(len(results["task"]))))
    return EvaluationResult(
        **asdict(overall),
        length=float(results["steps"].float().mean()),
        families=families,
        seconds=time.perf_counter() - started,
        lost=len(pending_M),
    )


def _family(results: Mapping[str, Tensor], episodes: list[int]) -> FamilyResult:
    count, n = round(float(results["success"][episodes].sum())), len(episodes)
    returns = results["return"][episodes].double()
    spread = float(returns.std()) if n > 1 else 0.0
    return FamilyResult(count / n, n, *wilson_interval(count, n), float(returns.mean()), spread)


def _video_slots(families: tuple[str, ...], videos: int) -> Tensor:
    """``videos`` slots, shared among the families in turn."""
    by_family: dict[str, list[int]] = defaultdict(list)
    for slot, family in enumerate(families):
        by_family[family].append(slot)
    chosen: list[int] = []
    while len(chosen) < videos and any(by_family.values()):
        for family in sorted(by_family):
            if by_family[family] and len(chosen) < videos:
                chosen.append(by_family[family].pop(0))
    return torch.tensor(sorted(chosen), dtype=torch.long)


def _play(
    policy: Policy, environment: Environment, tasks_B: Tensor, seed: int, film: _Film
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """One episode per slot: success, return, env steps and whether the simulator lost it [B], and the instructions."""
    observation: Observation = environment.reset(tasks_B)
    instructions = observation.instructions
    done_B = torch.zeros_like(tasks_B, dtype=torch.bool)
    success_B, return_B, steps_B = (torch.zeros(tasks_B.shape, device=tasks_B.device) for _ in range(3))
    film.shoot(environment)
    stream = derive_seed(seed, "evaluation")
    for t in count():
        if bool(done_B.all()):
            break
        rows = (~done_B).nonzero()[:, 0]
        draws = Draws.of(stream, tasks_B[rows], t)
        action_BCA = policy.act(observation.select(rows), draws, explore=False).spread(rows, len(tasks_B)).action_BCA
        # One action at a time while filming: the same episode, but every frame is seen.
        pieces = action_BCA.split(1, dim=1) if film.frames else (action_BCA,)
        for piece in pieces:
            step = environment.step(piece)
            return_B += (step.rewards_BC * step.valid_BC).sum(1) * ~done_B
            steps_B += step.valid_BC.sum(1) * ~done_B
            success_B = torch.where(done_B, success_B, step.metrics["success"].to(success_B.dtype))
            done_B = done_B | step.done_B
            if film.frames:
                film.shoot(environment)
        observation = step.observation
    outcome = {"success": success_B, "return": return_B, "steps": steps_B, "task": tasks_B, "lost": step.lost_B}
    return outcome, instructions


def _save_films(
    film: _Film,
    outcome: Mapping[str, Tensor],
    instructions: tuple[str, ...],
    families: tuple[str, ...],
    folder: Path,
    label: str,
    stage: str,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    frames_TM = torch.stack(film.frames)
    for m, slot in enumerate(film.slots_M.tolist()):
        if bool(outcome["lost"][slot]):
            continue
        steps = int(outcome["steps"][slot])
        name = f"{stage}-{label}-{slot:04d}"
        success = bool(outcome["success"][slot] > 0.5)
        write_animation(folder / f"{name}.webp", frames_TM[: steps + 1, m], fps=VIDEO_FPS, success=success)
        about = {
            "label": label,
            "stage": stage,
            "task_id": int(outcome["task"][slot]),
            "family": families[slot],
            "instruction": instructions[slot],
            "success": success,
            "steps": steps,
            "return": float(outcome["return"][slot]),
            "video": f"{name}.webp",
        }
        atomic_write_text(folder / f"{name}.json", json.dumps(about, indent=1) + "\n")
