"""LIBERO: a Panda arm at a table, in suites of tasks whose goals are written in BDDL; one environment a worker process.

Liu et al. 2023 (arXiv 2306.03310); LIBERO-PRO's perturbed suites where its distribution is installed. Episodes start from
the official initial states. Observations are as openpi gives them to its policies: cameras ``agentview`` and ``wrist``, and
a state of eight numbers: the hand's position, its turn (axis times angle) and both fingers. Actions are robosuite's OSC_POSE,
in [-1, 1]: three of position, three of rotation, and the gripper (-1 opens). Success is the BDDL goal's.
"""

from __future__ import annotations

import torch

from mmrl.workers.environment import WorkerEnvironment
from simulators.libero_parts.options import Options


class Libero(WorkerEnvironment):
    """The environment. Families are the suite's tasks; ``expert_action`` solves those that put one thing into another."""

    Config = Options

    def __init__(self, config: Options, *, num_envs: int, device: torch.device) -> None:
        self.config = config
        super().__init__(
            "simulators.libero_parts.single:Single",
            config,
            num_envs=num_envs,
            device=device,
            workers=config.workers,
            time_limit=config.time_limit,
        )
