"""Planted bugs in worker processes, in what becomes of lost episodes, and in the simulators of robots. See mutations.py."""

from __future__ import annotations

# (name, file, source, replacement, tests separated by spaces)
Row = tuple[str, str, str, str, str]

_LOST, _WORKERS = "tests/core/test_lost_episodes.py", "tests/core/test_workers.py"
ROBOTS: tuple[Row, ...] = (
    (
        "rollout: of a lost episode only the last decision is dropped",
        "mmrl/rollout.py",
        "valid_TB[first_t : last_t + 1, slot] = False",
        "valid_TB[last_t, slot] = False",
        f"{_LOST}::test_a_lost_episode_is_invalid_from_its_first_decision_and_the_slot_goes_on",
    ),
    (
        "rollout: a lost episode is recorded as a failure",
        "mmrl/rollout.py",
        "self.finish(t, step, ended_B & ~step.lost_B, task_ids_B)",
        "self.finish(t, step, ended_B, task_ids_B)",
        f"{_LOST}::test_a_lost_episode_is_invalid_from_its_first_decision_and_the_slot_goes_on",
    ),
    (
        "rollout: what a lost episode earned goes to the next one",
        "mmrl/rollout.py",
        "self.returns_B = torch.where(ended_B, 0.0, self.returns_B)",
        "self.returns_B = torch.where(ended_B & ~step.lost_B, 0.0, self.returns_B)",
        f"{_LOST}::test_a_lost_episode_is_invalid_from_its_first_decision_and_the_slot_goes_on",
    ),
    (
        "grpo: an incomplete group counts",
        "mmrl/algorithms/grpo.py",
        "return self.complete_P & self.spread_P & self.in_range_P",
        "return self.spread_P & self.in_range_P",
        f"{_LOST}::test_grpo_leaves_an_incomplete_group_out",
    ),
    (
        "evaluation: a lost episode is a failure",
        "mmrl/evaluation.py",
        'counted = [episode for episode in played if episode.outcome != "lost"]',
        "counted = list(played)",
        f"{_LOST}::test_evaluation_counts_what_it_cannot_play",
    ),
    (
        "demonstrations: a lost episode is one",
        "mmrl/data/demonstrations.py",
        "valid_BL &= ~step.lost_B[:, None]",
        "pass",
        f"{_LOST}::test_demonstrations_leave_lost_episodes_out",
    ),
    (
        "workers: an episode that was over is lost too",
        "mmrl/workers/environment.py",
        "            if self._running_B[slot]:\n",
        "            if True:\n",
        f"{_WORKERS}::test_an_episode_that_was_over_is_not_lost",
    ),
    (
        "workers: actions after the end are executed",
        "mmrl/workers/process.py",
        "                if self._done[slot]:\n                    break\n",
        "",
        f"{_WORKERS}::test_workers_give_the_trajectories_of_a_loop",
    ),
    (
        "workers: actions are not clipped",
        "mmrl/workers/environment.py",
        ".clip(self._low_A, self._high_A)",
        "",
        f"{_WORKERS}::test_workers_give_the_trajectories_of_a_loop",
    ),
    (
        "workers: the server outlives a run whose worker hangs",
        "mmrl/workers/server.py",
        "    signal.setitimer(signal.ITIMER_REAL, _SECONDS, _SECONDS)\n",
        "",
        f"{_WORKERS}::test_workers_end_with_their_parent_and_leave_nothing",
    ),
    (
        "maniskill: the scene of the last episode is kept",
        "simulators/maniskill_parts/scene.py",
        'options={"reconfigure": True}',
        "options={}",
        "tests/contracts/test_robots.py::test_robots_keep_the_contract",
    ),
    (
        "libero: the controller remembers the last episode",
        "simulators/libero_parts/single.py",
        "        self._forget()\n",
        "",
        "tests/contracts/test_robots.py::test_robots_keep_the_contract",
    ),
    (
        "libero: pictures lie upside down",
        "simulators/libero_parts/single.py",
        "camera_name=CAMERAS[camera])[::-1]",
        "camera_name=CAMERAS[camera])",
        "tests/simulators/test_libero.py::test_pictures_are_the_right_way_up_and_mirrored_on_request",
    ),
    (
        "batched maniskill: what a slot shows moves on after its end",
        "simulators/maniskill_parts/batched.py",
        "                self._observe(frozen_B)\n                frozen_B =",
        "                frozen_B =",
        "tests/simulators/test_maniskill.py::test_the_batched_class_gives_what_the_workers_give",
    ),
    (
        "libero: robosuite's limit ends the run",
        "simulators/libero_parts/single.py",
        "ignore_done=True,",
        "ignore_done=False,",
        "tests/simulators/test_libero.py::test_episodes_may_be_longer_than_robosuite_s_limit",
    ),
    (
        "actions of another shape end in a traceback",
        "mmrl/errors.py",
        "class ActionError(MMRLError, ValueError):",
        "class ActionError(ValueError):",
        "tests/core/test_workers.py::test_actions_of_another_shape_are_refused",
    ),
    (
        "doctor: a slow simulator is built twice",
        "mmrl/simulator_probe.py",
        "    if seconds <= _SLOW:",
        "    if seconds >= 0:",
        "tests/core/test_doctor.py::test_a_slow_simulator_is_built_once",
    ),
)
