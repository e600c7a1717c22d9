"""Bugs planted in what trains flow models: comparisons of Gaussian steps, regressions of velocity fields, and their plumbing."""

_STEPS = "tests/numerics/test_steps.py"
_MATCHING = "tests/numerics/test_matching.py"
_FLOW = "tests/algorithms/test_flow_grpo.py"
_DECOUPLED = "tests/algorithms/test_decoupled.py"
_SOAR = "tests/algorithms/test_soar.py"
_RUNS = "tests/algorithms/test_flow_runs.py"

_steps, _matching = "mmrl/numerics/steps.py", "mmrl/numerics/matching.py"
_flow_grpo, _decoupled, _nft, _awm, _dpo, _soar, _history = (
    f"mmrl/algorithms/{name}.py" for name in ("flow_grpo", "decoupled", "nft", "awm", "diffusion_dpo", "soar", "history")
)
_snapshots, _updates, _learners = (f"mmrl/{name}.py" for name in ("snapshots", "updates", "learners"))

FORMULAS = [
    (
        "steps: the KL forgets its 1/2",
        _steps,
        "shift_NK / (2 * safe_NK**2)",
        "shift_NK / safe_NK**2",
        f"{_STEPS}::test_the_exact_kl_is_that_of_torch_distributions_for_a_number",
    ),
    (
        "steps: flow_grpo's KL is divided by the length",
        _steps,
        "_exact_kl(shift_NK, stds_NK) * deltas_NK",
        "_exact_kl(shift_NK, stds_NK) / deltas_NK",
        f"{_STEPS}::test_the_exact_kl_is_that_of_torch_distributions_for_a_number",
    ),
    (
        "steps: guard takes its bias off",
        _steps,
        "(gap.log_probs_NK + bias_NK)",
        "(gap.log_probs_NK - bias_NK)",
        f"{_STEPS}::test_guards_log_ratio_has_no_mean_and_a_variance_that_knows_no_step",
    ),
    (
        "steps: guard does not scale",
        _steps,
        "gap.stds_NK * (gap.log_probs_NK + bias_NK)",
        "gap.log_probs_NK + bias_NK",
        f"{_STEPS}::test_guards_log_ratio_has_no_mean_and_a_variance_that_knows_no_step",
    ),
    (
        "steps: the unscaled log-ratio keeps its 1/2",
        _steps,
        "2 * gap.stds_NK**2 *",
        "gap.stds_NK**2 *",
        f"{_STEPS}::test_the_unscaled_log_ratio_is_that_of_squared_distances",
    ),
    (
        "steps: a step without noise divides by 0",
        _steps,
        "torch.where(noisy_NK, stds_NK, torch.ones_like(stds_NK))",
        "stds_NK",
        f"{_STEPS}::test_steps_without_noise_add_nothing_and_have_finite_gradients",
    ),
    (
        "nft: the strength divides nothing",
        _matching,
        "(1 - preference_N) * disliked_N) / strength",
        "(1 - preference_N) * disliked_N)",
        f"{_MATCHING}::test_nft_at_unchanged_weights_pulls_by_2_r_minus_1_whatever_the_strength",
    ),
    (
        "nft: v+ is the policy's whatever the strength",
        _matching,
        "strength * velocity + (1 - strength) * old",
        "velocity",
        f"{_MATCHING}::test_nft_sample_by_sample",
    ),
    (
        "nft: v- is mirrored the wrong way",
        _matching,
        "(1 + strength) * old - strength * velocity",
        "(1 - strength) * old + strength * velocity",
        f"{_MATCHING}::test_nft_at_unchanged_weights_pulls_by_2_r_minus_1_whatever_the_strength",
    ),
    (
        "nft: the divisor has a gradient",
        _matching,
        "per_sample(error.detach().abs())",
        "per_sample(error.abs())",
        f"{_MATCHING}::test_nft_at_strength_1_and_preference_1_is_flow_matching_over_its_own_size",
    ),
    (
        "awm: the error is what is likely",
        _matching,
        "return -_WEIGHTINGS",
        "return _WEIGHTINGS",
        f"{_MATCHING}::test_awm_weightings",
    ),
    (
        "dpo: the worst is preferred",
        _matching,
        "-beta / 2 * ((best_P",
        "beta / 2 * ((best_P",
        f"{_MATCHING}::test_dpo_pair_by_pair",
    ),
    (
        "dpo: the reference of the worst is added",
        _matching,
        "(worst_P - worst_reference_P)",
        "(worst_P + worst_reference_P)",
        f"{_MATCHING}::test_dpo_pair_by_pair",
    ),
    (
        "soar: the target leads to the rolled-out picture",
        _matching,
        "(point - clean.to(dtype)) /",
        "(point - rolled.to(dtype)) /",
        f"{_MATCHING}::test_soars_target_on_the_ray_is_that_of_flow_matching",
    ),
    (
        "soar: noised again as if from 0",
        _matching,
        "(wide(to_N) - wide(from_N)) / (1 - wide(from_N))",
        "wide(to_N)",
        f"{_MATCHING}::test_soars_target_on_the_ray_is_that_of_flow_matching",
    ),
]

ALGORITHMS = [
    (
        "flow_grpo: advantages are not bounded below",
        _flow_grpo,
        "worth_TB = worth_TB.clamp(-bound, bound)",
        "worth_TB = worth_TB.clamp(max=bound)",
        f"{_FLOW}::test_the_deviation_is_that_of_all_returns_and_advantages_are_bounded",
    ),
    (
        "flow_grpo: divided by the square root of the length",
        _flow_grpo,
        "1 / torch.where(batch.mask_NK, deltas_NK, 1)",
        "1 / torch.where(batch.mask_NK, deltas_NK, 1).sqrt()",
        f"{_FLOW}::test_loss_and_gradient_equal_a_twin",
    ),
    (
        "flow_grpo: guard compares with the reference",
        _flow_grpo,
        "old_means_NKD=batch.old_means_NKD",
        "old_means_NKD=batch.reference_means_NKD",
        f"{_FLOW}::test_loss_and_gradient_equal_a_twin",
    ),
    (
        "history: a prompt is judged before its returns are remembered",
        _history,
        "deque(maxlen=self._size)).append(value)",
        "deque([value], maxlen=self._size))",
        f"{_FLOW}::test_a_prompt_is_judged_by_its_own_history_once_that_is_long_enough",
    ),
    (
        "history: judged by itself one return too late",
        _history,
        "len(own) >= self._min_count",
        "len(own) > self._min_count",
        f"{_FLOW}::test_a_prompt_is_judged_by_its_own_history_once_that_is_long_enough",
    ),
    (
        "decay: it starts at once",
        _decoupled,
        "max(iteration - self.start, 0)",
        "iteration",
        f"{_DECOUPLED}::test_the_published_schedules_of_averages",
    ),
    (
        "nft: preferences are not scaled by the bound",
        _nft,
        "(batch.advantages_NJ[:, 0] / config.clamp)",
        "batch.advantages_NJ[:, 0]",
        f"{_DECOUPLED}::test_nft_equals_a_loop_over_samples",
    ),
    (
        "nft: the old field is the new one",
        _nft,
        "old = context.behaviour.velocity(batch.trace, at.x_t, at.t_N)",
        "old = policy.velocity(batch.trace, at.x_t, at.t_N).detach()",
        f"{_DECOUPLED}::test_nft_equals_a_loop_over_samples",
    ),
    (
        "awm: the distance is always from the reference",
        _awm,
        'context.average if config.kl_to == "average" else context.reference',
        "context.reference",
        f"{_DECOUPLED}::test_awm_equals_a_loop_over_samples",
    ),
    (
        "dpo: each of a pair has noise of its own",
        _dpo,
        "points(policy, batch, config.times, shared)",
        "points(policy, batch, config.times, context.draws)",
        f"{_DECOUPLED}::test_dpo_equals_a_loop_over_pairs_which_share_noise_and_time",
    ),
    (
        "dpo: the first of a pair is always the best",
        _dpo,
        "best_P = worth_P2.argmax(1)",
        "best_P = worth_P2.argmax(1) * 0",
        f"{_DECOUPLED}::test_dpo_equals_a_loop_over_pairs_which_share_noise_and_time",
    ),
    (
        "soar: the step has gradients",
        _soar,
        "    @torch.no_grad()\n",
        "",
        f"{_SOAR}::test_loss_and_gradient_equal_a_loop",
    ),
    (
        "soar: the step is of time, not of the schedule",
        _soar,
        "shifted((unshifted(t_N, config.shift) - 1 / config.steps).clamp(min=0), config.shift)",
        "(t_N - 1 / config.steps).clamp(min=0)",
        f"{_SOAR}::test_loss_and_gradient_equal_a_loop",
    ),
    (
        "soar: further points are guided",
        _soar,
        "policy.velocity(trace, point, to_N)",
        "policy.velocity(trace, point, to_N, guidance=config.guidance)",
        f"{_SOAR}::test_loss_and_gradient_equal_a_loop",
    ),
]

PLUMBING = [
    (
        "snapshots: the average moves by the decay",
        _snapshots,
        "kept.lerp_(now.to(kept.dtype), 1 - decay)",
        "kept.lerp_(now.to(kept.dtype), decay)",
        f"{_RUNS}::test_nft_collects_with_an_average_of_the_policy",
    ),
    (
        "learners: the policy itself collects",
        _learners,
        "with nullcontext() if behaviour is None else behaviour.worn():",
        "with nullcontext():",
        f"{_RUNS}::test_nft_collects_with_an_average_of_the_policy",
    ),
    (
        "learners: averages are not saved",
        _learners,
        "kept: dict[str, Any] = dict(self._snapshots)",
        "kept: dict[str, Any] = {}",
        f"{_RUNS}::test_a_resumed_run_is_the_unbroken_one",
    ),
    (
        "learners: what an algorithm remembers is not saved",
        _learners,
        'kept["algorithm"] = self._update.algorithm',
        "pass",
        f"{_RUNS}::test_a_resumed_run_remembers_what_prompts_earned",
    ),
    (
        "updates: rows draw what their micro-batch's place says",
        _updates,
        "draws=Draws(keys_N[piece])",
        "draws=Draws(keys_N[: piece.stop - piece.start])",
        f"{_DECOUPLED}::test_micro_batches_change_nothing_and_pairs_stay_pairs",
    ),
    (
        "updates: pairs are shuffled apart",
        _updates,
        "self.algorithm.minibatches, self.minibatch_generator, self._together)",
        "self.algorithm.minibatches, self.minibatch_generator)",
        f"{_DECOUPLED}::test_micro_batches_change_nothing_and_pairs_stay_pairs",
    ),
]
