"""Which of an environment's scores a run was trained on, read from its resolved configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mmrl.component import class_name, merge
from mmrl.errors import ConfigError


def trained_scores(config: Mapping[str, Any]) -> frozenset[str] | None:
    """Names of the scores that a stage with rollouts was paid for; all others only watch. None: the configuration does not say.

    A stage is paid for the environment's ``rewards`` with a weight; where it has ``rewards`` of its own, for those scores that
    these name, and for the environment's if ``scoring.environment`` gives them a weight. Without stages, as in an evaluation, it
    is the environment's weights that count.
    """
    own = _blocks(config.get("environment"))
    stages = config.get("stages")
    if not isinstance(stages, list):
        return frozenset(_weighted(own)) or None
    collecting = [stage for stage in stages if isinstance(stage, Mapping) and isinstance(stage.get("collect"), Mapping)]
    return frozenset(name for stage in collecting for name in _of_stage(stage, own)) or None


def _of_stage(stage: Mapping[str, Any], own: list[Mapping[str, Any]]) -> Iterator[str]:
    changed, scoring = stage.get("environment"), stage.get("scoring")
    paid = _changed(own, changed["rewards"]) if isinstance(changed, Mapping) and "rewards" in changed else own
    of_stage = _blocks(stage)
    if not of_stage or (isinstance(scoring, Mapping) and scoring.get("environment")):
        yield from _weighted(paid)
    for block in of_stage:
        if block.get("weight", 1.0):
            yield str(block.get("score", _name(block)))


def _changed(own: list[Mapping[str, Any]], changes: Any) -> list[Mapping[str, Any]]:
    """The environment's rewards as a stage has them: others, or some of them changed by name."""
    try:
        return _blocks({"rewards": merge(own, changes)})
    except ConfigError:  # a run's own configuration would have been refused
        return own


def _blocks(holder: Any) -> list[Mapping[str, Any]]:
    rewards = holder.get("rewards") if isinstance(holder, Mapping) else None
    return [block for block in rewards if isinstance(block, Mapping)] if isinstance(rewards, list) else []


def _weighted(blocks: list[Mapping[str, Any]]) -> list[str]:
    return [_name(block) for block in blocks if block.get("weight", 1.0)]


def _name(block: Mapping[str, Any]) -> str:
    """As ``mmrl.rewarding.RewardBlock`` names it."""
    return str(block.get("name", class_name(str(block.get("target", "")))))
