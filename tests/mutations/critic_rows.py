"""Planted bugs in values of tokens, from acting to the loss, and in the states that GiGPO compares. See mutations.py."""

from __future__ import annotations

Row = tuple[str, str, str, str, str]

_LIKELIHOOD, _TRAINING = "tests/policies/test_qwen_vl_likelihood.py", "tests/policies/test_qwen_vl_training.py"
_PPO, _STATES = "tests/algorithms/test_ppo.py", "tests/core/test_states.py"
_SCORED = f"{_LIKELIHOOD}::test_scoring_whole_conversations_gives_the_numbers_of_acting"
_FOLLOWS = f"{_LIKELIHOOD}::test_what_follows_a_token_is_the_next_one_that_the_policy_says"
_NAIVE = f"{_PPO}::test_advantages_equal_a_naive_sum_and_are_standardised_over_what_counts"
_SHOWN = f"{_STATES}::test_a_state_is_what_was_shown_last_and_what_has_been_shown"

TOKENS: tuple[Row, ...] = (
    (
        "ppo: tokens share their turn's advantage",
        "mmrl/algorithms/ppo.py",
        "advantages_TBV if values > 1 else None",
        "None",
        _NAIVE,
    ),
    (
        "ppo: the mean advantage of a turn is over the tokens that there could be",
        "mmrl/algorithms/ppo.py",
        "/ there_TBV.sum(2).clamp(min=1)",
        "/ there_TBV.shape[2]",
        _NAIVE,
    ),
    (
        "ppo: a KL in rewards is a reward",
        "mmrl/algorithms/ppo.py",
        "earned_TBV = -penalty_TBK",
        "earned_TBV = penalty_TBK",
        f"{_PPO}::test_the_kl_in_rewards_is_each_unit_s_own_where_units_have_values",
    ),
    (
        "ppo: the value loss is divided by samples",
        "mmrl/algorithms/ppo.py",
        "normalizer=context.values",
        "normalizer=context.samples",
        f"{_PPO}::test_the_loss_equals_a_naive_twin",
    ),
    (
        "updates: units are put on the scale of decisions",
        "mmrl/updates.py",
        "worth, where = batch.unit_advantages_NK, trained",
        "pass",
        "tests/core/test_updates.py::test_advantages_of_units_are_put_on_the_scale_of_units",
    ),
    (
        "rollout: a turn is followed by the last value of the next",
        "mmrl/rollout.py",
        "values_TBV[1:, :, 0]",
        "values_TBV[1:, :, -1]",
        _FOLLOWS,
    ),
    (
        "types: tokens that were not said teach the critic",
        "mmrl/types.py",
        "there_TBK = self.mask_TBK & self.valid_TB[..., None]",
        "there_TBK = torch.ones_like(self.mask_TBK) & self.valid_TB[..., None]",
        _NAIVE,
    ),
    (
        "chat: a token's value is read after it",
        "policies/chat_parts/scoring.py",
        "before_MW if before else None",
        "before_MW.roll(-1, 0) if before else None",
        _SCORED,
    ),
    (
        "chat: values of rows that stay stand in those that left",
        "policies/chat_parts/engine.py",
        "values_BK[rows_R, k] = critic(hidden_RW)",
        "values_BK[: len(rows_R), k] = critic(hidden_RW)",
        f"{_LIKELIHOOD}::test_a_token_s_value_is_read_where_it_is_drawn_from",
    ),
    (
        "chat: without hidden states, values are of what was said first",
        "policies/chat_parts/policy.py",
        "self.critic(scores.before_MW[new_M])",
        "self.critic(scores.before_MW[: int(new_M.sum())])",
        f"{_LIKELIHOOD}::test_values_are_the_same_where_an_engine_shows_no_hidden_states",
    ),
    (
        "chat: a saved critic of turns is taken for one of tokens",
        "policies/chat_parts/policy.py",
        'f"value of {critic.granularity}s through',
        'f"value of turns through',
        f"{_TRAINING}::test_what_is_saved_is_transformers_own_folder_and_opens_again",
    ),
)

STATES: tuple[Row, ...] = (
    (
        "states: those of all tasks are the same",
        "mmrl/tool_use.py",
        "json.dumps([transcript.task_id, last, seen])",
        "json.dumps([last, seen])",
        f"{_STATES}::test_what_was_said_is_no_part_of_a_state_and_the_task_is",
    ),
    (
        "states: what was shown last does not count",
        "mmrl/tool_use.py",
        "transcript.task_id, last, seen",
        "transcript.task_id, seen",
        _SHOWN,
    ),
    (
        "states: what was seen before does not count",
        "mmrl/tool_use.py",
        "transcript.task_id, last, seen",
        "transcript.task_id, last",
        _SHOWN,
    ),
    (
        "states: the order in which things were seen counts",
        "mmrl/tool_use.py",
        "sorted({_content(reply) for call, reply in pairs if call.error is None})",
        "[_content(reply) for call, reply in pairs if call.error is None]",
        _SHOWN,
    ),
    ("states: what failed is remembered", "mmrl/tool_use.py", "if call.error is None})", "})", _SHOWN),
    (
        "states: pictures look alike",
        "mmrl/tool_use.py",
        '{"picture": part.key}',
        '{"picture": ""}',
        f"{_STATES}::test_pictures_are_told_apart_by_their_pixels",
    ),
    (
        "states: those that one episode was in are shared",
        "mmrl/algorithms/credit.py",
        "(episodes_S > 1)",
        "(episodes_S > 0)",
        f"{_STATES}::test_two_of_four_replicas_open_the_same_page",
    ),
)
