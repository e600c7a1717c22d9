"""The fields of a LIBERO block, and the suites' step limits. Imports nothing of LIBERO's."""

from __future__ import annotations

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

# Actions until truncation, by which openpi and OpenVLA report success: somewhat more than the longest demonstration takes.
LIMITS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}


@dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class Options:
    """Fields of a ``simulators.libero:Libero`` block."""

    suite: str = "libero_spatial"
    """libero_spatial, libero_object, libero_goal, libero_10, libero_90, or a perturbed one of LIBERO-PRO where it is installed,
    such as libero_goal_swap."""
    tasks: tuple[int, ...] | None = None
    """Numbers of the suite's tasks in the mixture; null: all. Task id i plays number i modulo how many they are."""
    max_steps: int | None = Field(default=None, gt=0)
    """Actions until truncation; null: the suite's own limit (that of the suite it perturbs)."""
    settle_steps: int = Field(default=10, ge=0)
    """Actions without motion before an episode, in which objects come to rest, as published evaluations do."""
    image_size: int = Field(default=256, ge=16)
    """Side of the camera images, in pixels."""
    mirror: bool = True
    """Whether left and right are exchanged, as in what openpi's and OpenVLA's policies learned from (they turn LIBERO's pictures,
    which lie upside down in memory, by half a turn); false shows them as a camera would, and writing can be read."""
    render: bool = True
    """Whether observations have images; without, only state and instruction."""
    seed: int = Field(default=0, ge=0)
    """Another seed places the furniture differently, as far as a task leaves that open."""
    workers: int | None = Field(default=None, gt=0)
    """Worker processes, which share the environments; null: one an environment, but no more than there are processors."""
    time_limit: float = Field(default=300.0, gt=0)
    """Seconds that a worker may take for an action or a reset of one environment before it is replaced."""


def limit(options: Options) -> int:
    """Actions until truncation."""
    known = [suite for suite in LIMITS if options.suite == suite or options.suite.startswith(f"{suite}_")]
    return options.max_steps or (LIMITS[known[0]] if known else max(LIMITS.values()))
