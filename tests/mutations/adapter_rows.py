"""Planted bugs between simulators and pi0 checkpoints, and in the reward of progress. See mutations.py."""

from __future__ import annotations

# (name, file, source, replacement, tests separated by spaces)
Row = tuple[str, str, str, str, str]

_TESTS, _WITHIN = "tests/policies/test_pi0_adapters.py", "test_everything_passes_through_the_adapter"
ADAPTERS: tuple[Row, ...] = (
    (
        "adapters: differences are of the wrong sign",
        "policies/pi0_adapters/base.py",
        "offset_BH = sign * state_BS",
        "offset_BH = -sign * state_BS",
        f"{_TESTS}::test_older_libero_checkpoints_predict_differences",
    ),
    (
        "adapters: the gripper is relative too",
        "policies/pi0_adapters/libero.py",
        "_MOTION = 6 ",
        "_MOTION = 7 ",
        f"{_TESTS}::test_older_libero_checkpoints_predict_differences",
    ),
    (
        "adapters: a turn jumps where a hand points down",
        "policies/pi0_adapters/maniskill.py",
        "torch.where(q_B4[:, 1:2] < 0, -q_B4, q_B4)",
        "torch.where(q_B4[:, 0:1] < 0, -q_B4, q_B4)",
        f"{_TESTS}::test_the_turn_of_a_hand_that_points_down_does_not_jump",
    ),
    (
        "adapters: half the angle",
        "policies/pi0_adapters/maniskill.py",
        "angle_B = 2 * torch.atan2",
        "angle_B = torch.atan2",
        f"{_TESTS}::test_a_turn_is_axis_times_angle",
    ),
    (
        "adapters: both fingers count alike",
        "policies/pi0_adapters/maniskill.py",
        "new_tensor([1.0, -1.0])",
        "new_tensor([1.0, 1.0])",
        f"{_TESTS}::test_the_hand_is_position_turn_and_fingers_as_in_libero",
    ),
    (
        "adapters: the gripper keeps LIBERO's sign",
        "policies/pi0_adapters/maniskill.py",
        "-5.0, -5.0, -5.0, -1.0)",
        "-5.0, -5.0, -5.0, 1.0)",
        f"{_TESTS}::test_libero_s_actions_in_maniskill_move_as_far",
    ),
    (
        "pi0: acts in the checkpoint's numbers",
        "policies/pi0.py",
        "return replace(decision, action=self.adapter.to_simulator(decision.action, observation.state))",
        "return decision",
        f"{_TESTS}::{_WITHIN}",
    ),
    (
        "pi0: imitates the simulator's numbers",
        "policies/pi0.py",
        "actions_BHA = self.adapter.to_policy(examples.actions_BHA[:, : self.horizon], examples.observation.state)",
        "actions_BHA = examples.actions_BHA[:, : self.horizon]",
        f"{_TESTS}::{_WITHIN}",
    ),
    (
        "pi0: statistics are of the simulator's actions",
        "policies/pi0.py",
        "actions_BHA = self.adapter.to_policy(examples.actions_BHA, examples.observation.state)",
        "actions_BHA = examples.actions_BHA",
        f"{_TESTS}::{_WITHIN}",
    ),
    (
        "pi0: sees the simulator's state",
        "policies/pi0.py",
        'self._normalize(self.adapter.state(observation.state), "state")',
        'self._normalize(observation.state, "state")',
        f"{_TESTS}::{_WITHIN}",
    ),
    (
        "maniskill: progress goes on from the last episode",
        "simulators/maniskill_parts/scene.py",
        "        self._dense_B[slice(None) if env_idx is None else env_idx] = 0\n",
        "",
        "tests/simulators/test_maniskill.py::test_progress_adds_up_to_the_dense_reward",
    ),
    (
        "trainer: a stage evaluates as often as the run says",
        "mmrl/trainer.py",
        "every if self.config.evaluate_every is None else self.config.evaluate_every",
        "every",
        "tests/core/test_trainer.py::test_stages_evaluations_and_iterations_follow_one_another",
    ),
)
