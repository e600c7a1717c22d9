"""Bugs to plant in policies/token_vla.py and its parts; rows as in beyond_numerics.py."""

from __future__ import annotations

Row = tuple[str, str, str, str, str]

_POLICY, _PARTS = "policies/token_vla.py", "policies/token_vla_parts"
_BINS, _UPSTREAM = "tests/policies/test_token_vla_bins.py", "tests/policies/test_token_vla_upstream.py"
_TRAINING, _CHECKPOINT = "tests/policies/test_token_vla_training.py", "tests/policies/test_token_vla_checkpoint.py"

TOKEN_VLA: tuple[Row, ...] = (
    (
        "256 bins instead of 255 between 256 edges",
        f"{_PARTS}/bins.py",
        "(2 / (bins - 1)) - 1",
        "(2 / bins) - 1",
        f"{_BINS}::test_encoding_is_openvla_s",
    ),
    (
        "lower edges instead of centres",
        f"{_PARTS}/bins.py",
        "centres_V = (edges_V[:-1] + edges_V[1:]) / 2",
        "centres_V = edges_V[:-1]",
        f"{_BINS}::test_decoding_is_openvla_s",
    ),
    (
        "an edge belongs to the bin below",
        f"{_PARTS}/bins.py",
        "right=True) - 1",
        "right=False).clamp(min=1) - 1",
        f"{_BINS}::test_encoding_is_openvla_s",
    ),
    (
        "ids ascend",
        f"{_PARTS}/backbone.py",
        "return self.end - 1 - bins",
        "return self.end - self.bins + bins",
        f"{_UPSTREAM}::test_the_state_ends_the_prompt_as_the_tokens_of_its_bins",
    ),
    (
        "the head's rows ascend",
        f"{_PARTS}/backbone.py",
        "head.weight[rows].flip(0)",
        "head.weight[rows]",
        f"{_UPSTREAM}::test_log_probs_entropy_and_values_are_the_plain_model_s",
    ),
    (
        "quantiles swapped for extremes",
        f"{_PARTS}/bins.py",
        "[0.01, 0.99]",
        "[0.0, 1.0]",
        f"{_BINS}::test_quantiles_are_numpy_s",
    ),
    (
        "a gripper that hardly closes is taken for still",
        f"{_PARTS}/bins.py",
        "if len(values) <= 2 else ()",
        "if len(values) == 1 else ()",
        f"{_BINS}::test_choices_are_found_in_the_data",
    ),
    (
        "a gripper's tokens mean centres of bins",
        f"{_PARTS}/bins.py",
        "values_AV[dimension, places] = torch.tensor(values, dtype=torch.float64)",
        "pass",
        f"{_BINS}::test_a_gripper_has_two_tokens_which_mean_exactly_its_values",
    ),
    (
        "tokens are drawn that a dimension does not have",
        _POLICY,
        "logits_BV = self._backbone.logits(hidden_BW).masked_fill(~allowed_KV[k], -torch.inf)",
        "logits_BV = self._backbone.logits(hidden_BW)",
        f"{_UPSTREAM}::test_acting_without_exploration_is_upstream_s_greedy_generation",
    ),
    (
        "scored over tokens that a dimension does not have",
        _POLICY,
        "self._backbone.logits(hidden_NKW[:, :count]).masked_fill(~self._allowed(count), -torch.inf)",
        "self._backbone.logits(hidden_NKW[:, :count])",
        f"{_UPSTREAM}::test_log_probs_entropy_and_values_are_the_plain_model_s",
    ),
    (
        "scored behind what was generated",
        _POLICY,
        "prompt.cache.crop(1 - bins_BK.shape[1])",
        "pass",
        "tests/contracts/test_policies.py::test_scoring_again_equals_the_rollout",
    ),
    (
        "padding is attended to",
        f"{_PARTS}/backbone.py",
        "attention_mask=F.pad(prompt.mask, (0, count), value=1)",
        "attention_mask=torch.ones_like(F.pad(prompt.mask, (0, count)))",
        f"{_UPSTREAM}::test_log_probs_entropy_and_values_are_the_plain_model_s",
    ),
    (
        "positions count padding",
        f"{_PARTS}/backbone.py",
        "follow_BK = mask_BP.sum(1, keepdim=True) +",
        "follow_BK = mask_BP.shape[1] + 0 * mask_BP.sum(1, keepdim=True) +",
        f"{_UPSTREAM}::test_log_probs_entropy_and_values_are_the_plain_model_s",
    ),
    (
        "PaliGemma's prompt is causal",
        f"{_PARTS}/eyes.py",
        'return {"token_type_ids": torch.zeros_like(prompt_BP)}',
        "return {}",
        f"{_UPSTREAM}::test_log_probs_entropy_and_values_are_the_plain_model_s",
    ),
    (
        "Qwen's images have positions of text",
        f"{_PARTS}/backbone.py",
        'if grid is None or not hasattr(self.model.base_model, "get_rope_index"):',
        "if True:",
        f"{_UPSTREAM}::test_log_probs_entropy_and_values_are_the_plain_model_s",
    ),
    (
        "cameras before rows",
        f"{_PARTS}/eyes.py",
        "torch.stack(pixels, 1).flatten(0, 1)",
        "torch.stack(pixels, 0).flatten(0, 1)",
        f"{_UPSTREAM}::test_prompts_and_pixels_are_the_processor_s",
    ),
    (
        "patches in reading order",
        f"{_PARTS}/eyes.py",
        "split.permute(0, 2, 5, 3, 6, 1, 4, 7)",
        "split.permute(0, 2, 3, 5, 6, 1, 4, 7)",
        f"{_UPSTREAM}::test_prompts_and_pixels_are_the_processor_s",
    ),
    (
        "not rounded between rows and columns",
        f"{_PARTS}/eyes.py",
        "antialias=True).round().clamp(0, 255)",
        "antialias=True)",
        f"{_UPSTREAM}::test_prompts_and_pixels_are_the_processor_s",
    ),
    (
        "the critic reads the last action",
        _POLICY,
        "hidden_NKW[:, 1 if self._sees_first_action else 0]",
        "hidden_NKW[:, -1]",
        f"{_UPSTREAM}::test_log_probs_entropy_and_values_are_the_plain_model_s",
    ),
    (
        "the critic's loss reaches the model",
        _POLICY,
        "features = hidden_NW.detach() if critic.detach else hidden_NW",
        "features = hidden_NW",
        f"{_TRAINING}::test_a_detached_critic_s_loss_stops_at_the_head",
    ),
    (
        "padding of demonstrations is imitated",
        _POLICY,
        "real_BH[..., None] & bins.varies_A",
        "torch.ones_like(real_BH)[..., None] & bins.varies_A",
        f"{_TRAINING}::test_what_follows_the_end_of_a_demonstration_does_not_matter",
    ),
    (
        "tokens without a choice count",
        _POLICY,
        "real_BH[..., None] & bins.varies_A",
        "real_BH[..., None] & torch.ones_like(bins.varies_A)",
        f"{_TRAINING}::test_the_loss_is_the_mean_surprise_at_real_actions_in_dimensions_that_vary",
    ),
    (
        "units averaged",
        _POLICY,
        "sizes[self.config.granularity])).sum(2)",
        "sizes[self.config.granularity])).mean(2)",
        f"{_TRAINING}::test_units_are_sums_of_tokens",
    ),
    (
        "chunks of dimensions instead of actions",
        _POLICY,
        '"action": self.action_dim,',
        '"action": numbers_NK.shape[1] // self.action_dim,',
        f"{_TRAINING}::test_units_are_sums_of_tokens",
    ),
    (
        "statistics stay behind",
        _POLICY,
        "self.statistics = None if raw is None else Statistics.parse(raw)",
        "pass",
        f"{_CHECKPOINT}::test_a_state_dict_carries_the_statistics",
    ),
    (
        "the vocabulary ends with the tokenizer in any case",
        _POLICY,
        'if config.vocabulary_end == "tokenizer" else head.out_features\n        if not',
        "if True else head.out_features\n        if not",
        f"{_CHECKPOINT}::test_the_vocabulary_may_end_with_the_tokenizer_or_with_the_head",
    ),
)
