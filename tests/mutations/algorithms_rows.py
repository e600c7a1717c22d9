"""Bugs planted in the switches of policy gradients: objectives, credit, whitening, penalties, refills."""

_LOSSES = "tests/numerics/test_losses.py"
_ADVANTAGES = "tests/numerics/test_advantages.py"
_TWIN = "tests/algorithms/test_policy_gradient.py::test_loss_and_gradient_equal_a_twin"
_CREDIT = "tests/algorithms/test_credit.py"
_UNITS = f"{_CREDIT}::test_every_unit_is_worth_what_the_twin_says"
_TEACHES = f"{_CREDIT}::test_a_group_teaches_if_the_returns_differ_that_its_credit_compares"
_REFILL = "tests/core/test_refilling.py"
_REFERENCE = "tests/core/test_updates.py::test_the_reference_scores_before_rewards_are_judged_and_what_is_read_alone"
_KEYS = "tests/core/test_rollout.py::test_a_decision_is_recorded_with_the_state_it_was_made_in"
_SLOTS = "tests/core/test_rollout.py::test_slots_of_whole_episodes_are_taken_out_with_their_episodes"
_RESUME = f"{_REFILL}::test_a_resumed_run_refills_as_the_unbroken_one"

_losses, _advantages = "mmrl/numerics/losses.py", "mmrl/numerics/advantages.py"
_gradient, _grpo, _credit = (f"mmrl/algorithms/{name}.py" for name in ("policy_gradient", "grpo", "credit"))

OBJECTIVES = [
    (
        "cispo: the weight has a gradient",
        _losses,
        "bounded_BK.detach() * log_probs_BK",
        "bounded_BK * log_probs_BK",
        f"{_LOSSES}::test_cispo_s_gradient_is_reinforce_s_weighted_by_bounded_ratios",
    ),
    (
        "cispo: the weight is not bounded",
        _losses,
        "-advantages_BK * bounded_BK.detach() *",
        "-advantages_BK * ratio_BK.detach() *",
        f"{_LOSSES}::test_cispo_s_gradient_is_reinforce_s_weighted_by_bounded_ratios",
    ),
    (
        "sequence ratio: units share their advantages",
        _losses,
        "mean_B1.detach() + (log_ratio_BK - log_ratio_BK.detach())",
        "mean_B1.expand_as(log_ratio_BK)",
        f"{_LOSSES}::test_the_sequence_ratio_s_gradient_is_that_of_each_unit_s_advantage",
    ),
    (
        "sequence ratio: the mean has a gradient too",
        _losses,
        "mean_B1.detach() + (log_ratio_BK - log_ratio_BK.detach())",
        "mean_B1 + (log_ratio_BK - log_ratio_BK.detach())",
        f"{_LOSSES}::test_the_sequence_ratio_of_one_advantage_is_gspo",
    ),
    (
        "policy gradient: the constant forgets the samples",
        _gradient,
        "context.samples * (config.units_per_sample or 1)",
        "(config.units_per_sample or 1)",
        _TWIN,
    ),
    (
        "policy gradient: the KL is a mean over units whatever the reduction",
        _gradient,
        "reduce_units(kl, mask, reduce=config.reduce, normalizer=normalizer)",
        "masked.sum(kl, mask) / context.units",
        _TWIN,
    ),
    (
        "policy gradient: the correction of the KL has no gradient",
        _gradient,
        "batch.old_log_probs_NK, mask).exp()",
        "batch.old_log_probs_NK, mask).exp().detach()",
        _TWIN,
    ),
    ("policy gradient: the KL counts in loss and reward", _gradient, 'if config.kl_in == "loss":', "if config.kl_weight:", _TWIN),
    (
        "batch: units are worth what their decision is",
        "mmrl/types.py",
        "if self.unit_advantages_NK is None else self.unit_advantages_NK",
        "if True else self.unit_advantages_NK",
        _TWIN,
    ),
]

CREDIT = [
    (
        "peers: one alone is worth its value",
        _advantages,
        "torch.where(peers.sizes_M > 1, ",
        "torch.where(peers.sizes_M > 0, ",
        f"{_ADVANTAGES}::test_peers_are_compared_as_groups_are",
    ),
    (
        "peers: biased deviation",
        _advantages,
        "(p.squares_M / (p.sizes_M - 1)).sqrt()",
        "(p.squares_M / p.sizes_M).sqrt()",
        f"{_ADVANTAGES}::test_peers_are_compared_as_groups_are",
    ),
    (
        "peers: the mean contains the value",
        _advantages,
        "(p.sums_M - p.values_M) / (p.sizes_M - 1)",
        "p.sums_M / p.sizes_M",
        f"{_ADVANTAGES}::test_peers_are_compared_as_groups_are",
    ),
    (
        "peers: in the values' own precision",
        _advantages,
        "_Peers.of(values_M.double(), groups_M)",
        "_Peers.of(values_M, groups_M)",
        f"{_ADVANTAGES}::test_peers_that_agree_are_worth_nothing",
    ),
    (
        "returns to go: no discount",
        _advantages,
        "gamma * returns_TB[t + 1]",
        "returns_TB[t + 1]",
        f"{_ADVANTAGES}::test_returns_to_go_is_its_sum",
    ),
    (
        "overlong: the buffer begins at the limit",
        _advantages,
        "(limit - buffer - lengths.double()) / buffer",
        "(limit - lengths.double()) / buffer",
        f"{_ADVANTAGES}::test_overlong_penalty_by_hand",
    ),
    ("overlong: without a floor", _advantages, ".clamp(-1, 0)", ".clamp(max=0)", f"{_ADVANTAGES}::test_overlong_penalty_by_hand"),
    (
        "grpo: long episodes are punished at their first decision",
        _grpo,
        "(valid_TB.cumsum(0) == valid_TB.sum(0))",
        "(valid_TB.cumsum(0) == 1)",
        _UNITS,
    ),
    (
        "grpo: lengths count units that are not trained",
        _grpo,
        "(rollout.mask_TBK & rollout.valid_TB[..., None]).sum((0, 2))",
        "(rollout.mask_TBK | rollout.valid_TB[..., None]).sum((0, 2))",
        _UNITS,
    ),
    (
        "grpo: a unit pays for itself twice",
        _grpo,
        "(penalty_TBK.cumsum(2) - penalty_TBK)",
        "(penalty_TBK.cumsum(2) - 2 * penalty_TBK)",
        _UNITS,
    ),
    ("grpo: what follows a unit is its whole decision's", _grpo, "+ (penalty_TBK.cumsum(2) - penalty_TBK)", "", _UNITS),
    (
        "grpo: whitened over decisions that are left out",
        _grpo,
        "rollout.mask_TBK & keep_TB[..., None], eps",
        "rollout.mask_TBK, eps",
        _UNITS,
    ),
    (
        "penalty: in rewards of units that are not trained",
        _gradient,
        "masked.fill(kl_TBK, rollout.mask_TBK & rollout.valid_TB[..., None])",
        "kl_TBK",
        _UNITS,
    ),
    ("penalty: added to the rewards", _gradient, "rewards_TB - penalty_TBK.sum(2)", "rewards_TB + penalty_TBK.sum(2)", _UNITS),
    (
        "ppo: the KL in rewards is dropped",
        "mmrl/algorithms/ppo.py",
        "if penalty_TBK is not None:",
        "if False:",
        f"{_CREDIT}::test_ppo_takes_the_kl_off_its_rewards",
    ),
    (
        "credit: a turn is compared with every turn",
        _credit,
        "torch.arange(len(episodes.valid_TB), device=episodes.valid_TB.device)[:, None].expand_as(episodes.valid_TB)",
        "torch.zeros_like(episodes.valid_TB).long()",
        _UNITS,
    ),
    (
        "credit: states of all tasks are compared",
        _credit,
        "[episodes.group_B.expand_as(key_TB)[counted_TB], key_TB[counted_TB]]",
        "[key_TB[counted_TB], key_TB[counted_TB]]",
        f"{_CREDIT}::test_states_of_other_tasks_are_other_states",
    ),
    (
        "credit: an incomplete group counts",
        _credit,
        "return self.valid_TB & self.complete_P[self.group_B]",
        "return self.valid_TB",
        _UNITS,
    ),
    ("credit: the weight of steps is dropped", _credit, "whole_TB + step_weight * steps_TB", "whole_TB + steps_TB", _UNITS),
    (
        "credit: turns are judged by the return of the episode",
        _credit,
        '    "turn": _spread_of_turns,',
        '    "turn": lambda episodes, between_P: between_P,',
        _TEACHES,
    ),
    (
        "credit: the spread of what is not valid",
        _credit,
        "masked.fill(x_TPG, valid_TPG, sign * torch.inf)",
        "x_TPG",
        "tests/algorithms/test_grpo.py::test_turns_after_the_end_make_no_spread",
    ),
    (
        "grpo: shaped rewards make a group worth learning from",
        _grpo,
        "self._episodes(rollout, rollout.rewards_TB, complete_P).spread",
        "self._episodes(rollout, rollout.rewards_TB + _at_the_end(self._overlong(rollout), rollout.valid_TB), complete_P).spread",
        f"{_CREDIT}::test_neither_length_nor_a_kl_makes_a_group_worth_learning_from",
    ),
]

REFILLS = [
    (
        "refilling: more slots than there were",
        "mmrl/refilling.py",
        "taught_B & (taught_B.cumsum(0) <= missing)",
        "taught_B",
        f"{_REFILL}::test_groups_that_are_too_many_are_left_out",
    ),
    (
        "refilling: one round too many",
        "mmrl/refilling.py",
        "len(rounds) <= max_refills",
        "len(rounds) <= max_refills + 1",
        f"{_REFILL}::test_no_more_rounds_than_allowed",
    ),
    (
        "refilling: only what is learned from is counted",
        "mmrl/refilling.py",
        "[part.episodes for part in rounds]",
        "[rollout.episodes]",
        f"{_REFILL}::test_groups_that_teach_nothing_are_replaced_until_the_rollout_is_full",
    ),
    (
        "slots: every episode stays",
        "mmrl/rollout.py",
        "rollout.episodes.select(keep_B[played_B].nonzero()[:, 0])",
        "rollout.episodes",
        _SLOTS,
    ),
    (
        "slots: episodes are counted as if none was lost",
        "mmrl/rollout.py",
        "keep_B[played_B].nonzero()[:, 0]",
        "keep_B.nonzero()[:, 0]",
        f"{_REFILL}::test_a_group_that_lost_an_episode_is_replaced_and_counted",
    ),
    (
        "collecting: the state after a decision, not before",
        "mmrl/rollout.py",
        "self._tasks_B, final_values_B, anchors_B)",
        "self._tasks_B, final_values_B, step.observation.anchors_B)",
        _KEYS,
    ),
    (
        "updates: the reference scores what nobody learns from",
        "mmrl/updates.py",
        "return rollout.valid_TB & self.algorithm.taught(rollout)",
        "return rollout.valid_TB",
        _REFERENCE,
    ),
    (
        "updates: rewards are judged by a reference that scored half of them",
        "mmrl/updates.py",
        "and not self.algorithm.judges_by_reference",
        "",
        _REFERENCE,
    ),
    (
        "updates: the policy is its own reference",
        "mmrl/updates.py",
        "scored = policy.evaluate({",
        "scored = self.policy.evaluate({",
        _REFERENCE,
    ),
    (
        "learners: a resumed run plays its tasks again",
        "mmrl/learners.py",
        'return {"next_task": self._collector.next_task,',
        'return {"next_task": self._collector.next_task - 1,',
        _RESUME,
    ),
]
