"""Planted bugs in the overlap of acting and simulating, and in processes that simulate. See mutations.py."""

from __future__ import annotations

# (name, file, source, replacement, tests separated by spaces)
Row = tuple[str, str, str, str, str]

_OVERLAP, _REMOTE = "tests/core/test_overlap.py", "tests/core/test_remote.py"
OVERLAP: tuple[Row, ...] = (
    (
        "rollout: a step is waited for at once",
        "mmrl/rollout.py",
        "        return environment.begin_step(actions)\n",
        "        step = environment.begin_step(actions)()\n        return lambda: step\n",
        f"{_OVERLAP}::test_the_policy_acts_while_the_other_part_simulates",
    ),
    (
        "rollout: the parts are reset one after the other",
        "mmrl/rollout.py",
        "        return environment.begin_reset(task_ids_B, where_B)\n",
        "        observation = environment.begin_reset(task_ids_B, where_B)()\n        return lambda: observation\n",
        f"{_OVERLAP}::test_the_policy_acts_while_the_other_part_simulates",
    ),
    (
        "rollout: all parts are waited for before any is acted for",
        "mmrl/rollout.py",
        "                part.follow()  # waits for this part alone\n",
        "                for each in parts:\n                    each.follow()\n",
        f"{_OVERLAP}::test_the_policy_acts_while_the_other_part_simulates",
    ),
    (
        "rollout: after a reset the last observation is acted on",
        "mmrl/rollout.py",
        "        self._observe = _begin_reset(self._environment, self._tasks_B, ended_B)\n",
        "        _begin_reset(self._environment, self._tasks_B, ended_B)()\n",
        "tests/core/test_rollout.py::test_auto_reset_worked_by_hand",
    ),
    (
        "pool: time is counted from when the answer is looked for",
        "mmrl/workers/pool.py",
        "ready = wait(list(call.waiting), timeout=max(call.deadline - time.monotonic(), 0))",
        "ready = wait(list(call.waiting), timeout=call.seconds)",
        f"{_REMOTE}::test_a_process_that_hangs_is_replaced_when_its_time_is_up",
    ),
    (
        "pool: an answer that is looked at late does not count",
        "mmrl/workers/pool.py",
        "                if not ready:\n",
        "                if not ready or time.monotonic() > call.deadline:\n",
        f"{_REMOTE}::test_an_answer_that_came_in_time_counts_however_late_it_is_looked_at",
    ),
    (
        "pool: calls may cross",
        "mmrl/workers/pool.py",
        "        if self._sent is not None:\n",
        "        if False:\n",
        f"{_OVERLAP}::test_what_is_begun_must_be_finished",
    ),
    (
        "remote: an episode that was over is lost too",
        "mmrl/workers/remote.py",
        "running_B = self._held_B & ~(self._terminated_B | self._truncated_B | self._lost_B)",
        "running_B = self._held_B.copy()",
        f"{_REMOTE}::test_episodes_of_a_killed_process_are_lost_and_those_that_were_over_are_not",
    ),
    (
        "remote: a replacement shows episodes that nobody asked for",
        "mmrl/workers/batch.py",
        "self._board.write_rows(observation, self._held_B)",
        "self._board.write_rows(observation, self._held_B | True)",
        f"{_REMOTE}::test_episodes_of_a_killed_process_are_lost_and_those_that_were_over_are_not",
    ),
    (
        "remote: actions lose their precision",
        "mmrl/workers/remote.py",
        'layout = {"actions": (actions_BCA.shape, actions_BCA.dtype.name)}',
        'layout = {"actions": (actions_BCA.shape, "float16")}',
        f"{_OVERLAP}::test_parts_in_processes_give_the_serial_rollout",
    ),
    (
        "building: parts run in the policy's process",
        "mmrl/building.py",
        "if parts == 1 or _simulates_apart",
        "if True or _simulates_apart",
        f"{_REMOTE}::test_parts_are_built_as_the_simulator_needs_them",
    ),
)
