"""One LIBERO environment, for a worker process."""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any

import numpy as np

from mmrl.errors import EnvironmentMissing, MMRLError
from mmrl.registry import did_you_mean
from mmrl.types import ActionSpec
from mmrl.workers.single import Description, Outcome, View
from simulators.libero_parts.expert import expert_action
from simulators.libero_parts.options import Options, limit

os.environ.setdefault("MUJOCO_GL", "egl")  # robosuite reads it when it is imported
os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa's own threads only slow down a machine on which each worker has a processor
_EGL = "apt-get install libegl1 libegl-mesa0 libgl1"
try:
    from libero.libero import benchmark
    from libero.libero.envs import OffScreenRenderEnv
    from robosuite.utils.transform_utils import quat2axisangle
except (AttributeError, OSError) as failure:  # what PyOpenGL makes of a missing library
    raise EnvironmentMissing(f"EGL, with which LIBERO renders ({failure})", _EGL) from failure

Array = np.ndarray[Any, Any]
CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}  # our names -> robosuite's
_STILL = np.array([0, 0, 0, 0, 0, 0, -1.0])
_VIDEO = 256  # pixels


class Single:
    """See ``mmrl.workers.single.SingleEnvironment``. The simulation is built anew where the next task is another of the suite."""

    def __init__(self, options: Options) -> None:
        self._options = options
        suites = benchmark.get_benchmark_dict()
        if options.suite not in suites:
            raise MMRLError(
                f"environment.suite = {options.suite}: LIBERO has none so called{did_you_mean(options.suite, suites)}"
            )
        with contextlib.redirect_stdout(io.StringIO()):  # it announces the order of its tasks
            self._suite: Any = suites[options.suite]()
        self._tasks = list(range(self._suite.n_tasks)) if options.tasks is None else list(options.tasks)
        wrong = [task for task in self._tasks if not 0 <= task < self._suite.n_tasks]
        if wrong or not self._tasks:
            raise MMRLError(f"'environment.tasks' must be numbers below {self._suite.n_tasks}, at least one; got {self._tasks}")
        self._starts = {task: self._initial_states(task) for task in self._tasks}
        self._env: Any = None
        self._task, self._age = -1, 0
        size = (options.image_size, options.image_size)
        self.description = Description(
            ActionSpec(7, (-1.0,) * 7, (1.0,) * 7),
            limit(options),
            cameras=dict.fromkeys(CAMERAS, size) if options.render else {},
            state_dim=8,
            families=tuple(self._suite.get_task(task).name for task in self._tasks),
        )

    def reset(self, task_id: int) -> str:
        """The official initial state number ``task_id // number of tasks``, over and over."""
        task = self._tasks[task_id % len(self._tasks)]
        self._build(task)
        # The furniture that no initial state moves is placed with numpy's global generator.
        np.random.seed(np.random.SeedSequence([self._options.seed, task_id]).generate_state(1))
        self._env.reset()
        self._forget()
        states = self._starts[task]
        self._observation = self._env.set_init_state(states[task_id // len(self._tasks) % len(states)])
        for _ in range(self._options.settle_steps):
            self._observation, *_ = self._env.step(_STILL)
        self._age = 0
        return self._suite.get_task(task).language

    def step(self, action_A: Array) -> Outcome:
        self._age += 1
        self._observation, _, success, _ = self._env.step(action_A)
        late = not success and self._age >= self.description.max_steps
        return Outcome(float(success), bool(success), late, {"success": float(success)})

    def observe(self) -> View:
        seen = self._observation
        turn = quat2axisangle(np.array(seen["robot0_eef_quat"]))
        state = np.concatenate([seen["robot0_eef_pos"], turn, seen["robot0_gripper_qpos"]]).astype(np.float32)
        return View({name: self._picture(name, self._options.image_size) for name in self.description.cameras}, state)

    def expert_action(self) -> Array:
        return expert_action(self._env, self._observation)

    def render(self) -> Array:
        return self._picture("agentview", _VIDEO)

    def close(self) -> None:
        if self._env is not None:
            self._env.close()

    def _picture(self, camera: str, size: int) -> Array:
        picture_HWC = self._env.sim.render(width=size, height=size, camera_name=CAMERAS[camera])[::-1]  # the lowest row is first
        return picture_HWC[:, ::-1] if self._options.mirror else picture_HWC

    def _build(self, task: int) -> None:
        if task == self._task:
            return
        self.close()
        try:
            self._env = OffScreenRenderEnv(
                bddl_file_name=self._suite.get_task_bddl_file_path(task),
                use_camera_obs=False,
                ignore_done=True,  # robosuite's own limit of 1,000 actions, after which it refuses to go on; ours is max_steps
            )
        except (AttributeError, ImportError, RuntimeError) as error:  # of robosuite's EGL context
            if "egl" not in str(error).lower():
                raise
            raise EnvironmentMissing(f"EGL, with which LIBERO renders ({error})", _EGL) from error
        self._env.env.hard_reset = False  # a new simulation for each episode takes seconds and changes nothing
        self._task = task

    def _forget(self) -> None:
        """Clear what robosuite keeps from the last episode where it does not build a new simulation: controller and fingers."""
        self._env.sim.forward()  # controllers take their bearings from where things are
        for robot in self._env.robots:
            robot.gripper.current_action = np.zeros_like(robot.gripper.current_action)
            robot.reset(deterministic=True)

    def _initial_states(self, task: int) -> Array:
        try:
            return np.asarray(self._suite.get_task_init_states(task))
        except FileNotFoundError as error:
            name = self._suite.get_task(task).name
            raise MMRLError(
                f"LIBERO's initial states for '{name}' of {self._options.suite} are not installed ({error.filename or error}); "
                "leave the task out with 'environment.tasks', or choose another suite"
            ) from error
