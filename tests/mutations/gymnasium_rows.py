# ruff: noqa: E501
"""Bugs to plant in simulators/gymnasium.py, policies/mlp.py and what they asked of the core; rows as in beyond_numerics.py."""

from __future__ import annotations

Row = tuple[str, str, str, str, str]

_MLP_TEST = "tests/policies/test_mlp.py"
_GYMNASIUM_TEST = "tests/simulators/test_gymnasium.py"

GYMNASIUM: tuple[Row, ...] = (
    (
        "mlp: dimensions averaged",
        "policies/mlp.py",
        "self.log_std.exp().expand_as(mean_BA)).sum(1)\n\n    def entropy",
        "self.log_std.exp().expand_as(mean_BA)).mean(1)\n\n    def entropy",
        f"{_MLP_TEST}::test_gaussian_scores_are_those_of_torch_distributions",
    ),
    (
        "mlp: entropy of one component",
        "policies/mlp.py",
        "token_entropy(logits_BAV).sum(1)",
        "token_entropy(logits_BAV)[:, 0]",
        f"{_MLP_TEST}::test_categorical_scores_are_those_of_torch_distributions",
    ),
    (
        "mlp: choices that do not exist are drawn",
        "policies/mlp.py",
        ".masked_fill(absent_AV, -math.inf)",
        "",
        f"{_MLP_TEST}::test_choices_are_drawn_as_often_as_they_are_likely",
    ),
    (
        "mlp: the deviation is its logarithm",
        "policies/mlp.py",
        "return mean_BA + self.log_std.exp() * draws",
        "return mean_BA + self.log_std * draws",
        f"{_MLP_TEST}::test_gaussian_actions_spread_as_they_say_and_are_not_clipped",
    ),
    (
        "mlp: actions start as large as values",
        "policies/mlp.py",
        "self.mean = _linear(width, dim, gain=0.01)",
        "self.mean = _linear(width, dim, gain=1.0)",
        f"{_MLP_TEST}::test_weights_start_as_cleanrl_s",
    ),
    (
        "mlp: the critic trains the actor's layers",
        "policies/mlp.py",
        "seen_BW = features_BW if self.critic_trunk is None else self.critic_trunk(inputs_BS)",
        "seen_BW = features_BW",
        f"{_MLP_TEST}::test_only_a_shared_critic_moves_the_actor",
    ),
    (
        "mlp: moments merged without the gap between means",
        "policies/mlp.py",
        " + delta_S**2 * self.count * n / total",
        "",
        f"{_MLP_TEST}::test_running_moments_are_those_of_all_states_together",
    ),
    (
        "mlp: padding is imitated",
        "policies/mlp.py",
        "value = (surprise_B * real_B).sum() / real_B.sum().clamp(min=1)",
        "value = surprise_B.mean()",
        f"{_MLP_TEST}::test_the_supervised_loss_is_the_mean_surprise_over_real_first_actions",
    ),
    (
        "gymnasium: the next episode's first observation at the end",
        "simulators/gymnasium.py",
        "self._seen[alive_B] = seen[alive_B]\n        self._return_B",
        "self._seen[:] = seen\n        self._return_B",
        f"{_GYMNASIUM_TEST}::test_cartpole_is_gymnasium_s",
    ),
    (
        "gymnasium: truncated although it ended",
        "simulators/gymnasium.py",
        "alive_B & truncated_B & ~terminated_B",
        "alive_B & truncated_B",
        f"{_GYMNASIUM_TEST}::test_an_end_by_itself_at_the_time_limit_is_no_truncation",
    ),
    (
        "gymnasium: the slot is the seed",
        "simulators/gymnasium.py",
        "seeds = [seed_of(task, self.config.seed) for task in task_ids_B.tolist()]",
        "seeds = [seed_of(slot, self.config.seed) for slot in range(self.num_envs)]",
        f"{_GYMNASIUM_TEST}::test_cartpole_is_gymnasium_s tests/contracts/test_environments.py::test_a_task_is_the_same_episode_in_any_slot_of_any_batch",
    ),
    (
        "gymnasium: slots that are done go on earning",
        "simulators/gymnasium.py",
        "reward_B = np.where(alive_B, reward_B, 0.0)",
        "pass",
        f"{_GYMNASIUM_TEST}::test_cartpole_is_gymnasium_s",
    ),
    (
        "gymnasium: actions not clipped",
        "simulators/gymnasium.py",
        "return np.clip(action_BA, low_A, high_A).reshape(shape)",
        "return action_BA.reshape(shape)",
        f"{_GYMNASIUM_TEST}::test_an_environment_gets_nothing_beyond_its_bounds",
    ),
    (
        "gymnasium: choices start at zero",
        "simulators/gymnasium.py",
        "return self._space.start + (",
        "return (",
        f"{_GYMNASIUM_TEST}::test_images_come_as_images_and_choices_start_at_zero",
    ),
    (
        "gymnasium: observations share memory",
        "simulators/gymnasium.py",
        "return torch.tensor(array, dtype=dtype, device=self._device)",
        "return torch.from_numpy(array).to(dtype or torch.from_numpy(array).dtype)",
        "tests/contracts/test_environments.py::test_observations_are_not_written_to_afterwards",
    ),
    (
        "ppo: each micro-batch has advantages of its own",
        "mmrl/algorithms/ppo.py",
        "(x - context.advantage_mean)",
        "(x - x.mean())",
        "tests/core/test_updates.py::test_micro_batches_give_the_whole_batch_s_gradient_and_metrics",
    ),
    (
        "updates: untrained rows count for the advantages",
        "mmrl/updates.py",
        "advantage_std=float(masked.std(worth, where)),",
        "advantage_std=float(worth.std()),",
        "tests/core/test_updates.py::test_every_epoch_sees_every_row_once_in_minibatches_of_its_own",
    ),
    (
        "learners: statistics move before the updates",
        "mmrl/learners.py",
        "        metrics = self._update.run(batch, iteration)\n        if isinstance(self._policy, AdaptivePolicy):\n            self._policy.adapt(batch.trace)\n",
        "        if isinstance(self._policy, AdaptivePolicy):\n            self._policy.adapt(batch.trace)\n        metrics = self._update.run(batch, iteration)\n",
        "tests/core/test_learners.py::test_running_statistics_move_between_rollouts_and_not_within",
    ),
    (
        "evaluation: the spread divides by n",
        "mmrl/evaluation.py",
        "statistics.stdev(returns) if n > 1 else 0.0",
        "statistics.pstdev(returns) if n > 1 else 0.0",
        "tests/core/test_evaluation.py::test_every_task_counts_once",
    ),
    (
        "gymnasium: a process that dies ends in a traceback",
        "simulators/gymnasium.py",
        "except (EOFError, ConnectionError, multiprocessing.TimeoutError) as error:",
        "except multiprocessing.TimeoutError as error:",
        "tests/simulators/test_gymnasium.py::test_a_process_that_dies_or_hangs_ends_in_a_sentence",
    ),
    (
        "gymnasium: a process that hangs outlives the run",
        "simulators/gymnasium.py",
        "        die_with_the_parent(builder)",
        "        pass",
        "tests/simulators/test_gymnasium.py::test_no_process_outlives_the_run_even_if_it_hangs",
    ),
)
