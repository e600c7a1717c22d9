"""One gymnasium environment, for a worker process."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmrl.errors import MMRLError
from mmrl.workers.single import Description, Outcome, View
from simulators.gymnasium_parts.making import CAMERA, SUCCESS_KEYS, Array, facts_of, make, native, seed_of
from simulators.gymnasium_parts.options import Options


class Single:
    """See ``mmrl.workers.single.SingleEnvironment``."""

    def __init__(self, options: Options) -> None:
        self._options, self._environment = options, make(options)
        self._facts = facts_of(options, self._environment)
        shape: Any = self._environment.observation_space.shape
        self._seen: Any = None
        self._return = 0.0
        self.description = Description(
            self._facts.action_spec,
            self._facts.max_steps,
            cameras={CAMERA: shape[:2]} if self._facts.is_image else {},
            state_dim=0 if self._facts.is_image else int(np.prod(shape)),
            families=(options.id,),
        )

    def reset(self, task_id: int) -> str:
        # Options that are empty, as SyncVectorEnv gives them: an environment may tell them from none.
        self._seen, _ = self._environment.reset(seed=seed_of(task_id, self._options.seed), options={})
        self._return = 0.0
        return self._options.sentence

    def step(self, action_A: Array) -> Outcome:
        taken = native(self._environment.action_space, action_A)
        self._seen, reward, terminated, truncated, info = self._environment.step(taken)
        self._return += float(reward)
        wanted = self._facts.success_return
        reached = wanted is not None and self._return >= wanted
        success = next((bool(info[key]) for key in SUCCESS_KEYS if key in info), reached)
        return Outcome(float(reward), bool(terminated), bool(truncated and not terminated), {"success": float(success)})

    def observe(self) -> View:
        seen = np.asarray(self._seen, self._environment.observation_space.dtype)
        return View({CAMERA: seen}, None) if self._facts.is_image else View({}, seen.ravel().astype(np.float32))

    def expert_action(self) -> Array:
        raise MMRLError(f"{self._options.id} has no scripted expert")

    def render(self) -> Array:
        return np.asarray(self._environment.render())

    def close(self) -> None:
        self._environment.close()
