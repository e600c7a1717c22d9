"""Rollouts that are full of groups worth learning from (dynamic sampling of DAPO, arXiv 2503.14476).

Where a group has nothing to teach, another is played in its place, until the rollout has as many groups as it would have had or
``max_refills`` further rounds are over. A round plays every slot, so that nothing but the task counter has to survive (and a
resumed run is the unbroken run); groups of the last round that are one too many are left out. All that was played is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mmrl.rollout import join, of_slots
from mmrl.types import EpisodeRecord, Rollout


@dataclass(frozen=True)
class Gathered:
    """What is learned from, and all that was played for it."""

    rollout: Rollout
    episodes: EpisodeRecord
    decisions: int
    env_steps: int
    lost: int
    metrics: Mapping[str, float]


def gather_rollout(collect: Callable[[], Rollout], taught: Callable[[Rollout], Tensor], max_refills: int) -> Gathered:
    """``taught`` says of which slots a rollout of whole episodes teaches something: bool [B], the same for all of a group.

    If no group of any round does, the rollout is the first round, so that its metrics say why nothing is learned.
    metrics: refills, the further rounds; taught_share, of all the slots that were played.
    """
    rounds: list[Rollout] = []
    kept: list[Rollout] = []
    missing, useful = 1, 0
    while missing and len(rounds) <= max_refills:
        rounds.append(collect())
        taught_B = taught(rounds[-1])
        missing = missing if kept else len(taught_B)
        keep_B = taught_B & (taught_B.cumsum(0) <= missing)
        if bool(keep_B.any()):
            kept.append(of_slots(rounds[-1], keep_B))
        missing -= int(keep_B.sum())
        useful += int(taught_B.sum())
    played = sum(part.valid_TB.shape[1] for part in rounds)
    metrics = {"refills": float(len(rounds) - 1), "taught_share": useful / played}
    return counted(join(kept) if kept else rounds[0], rounds, metrics)


def counted(rollout: Rollout, rounds: Sequence[Rollout], metrics: Mapping[str, float]) -> Gathered:
    """What is learned from, beside the sums over the rounds that it comes from."""
    return Gathered(
        rollout,
        EpisodeRecord.concat([part.episodes for part in rounds]),
        decisions=sum(part.decisions for part in rounds),
        env_steps=sum(part.env_steps for part in rounds),
        lost=sum(part.lost for part in rounds),
        metrics=metrics,
    )
