"""Planted bugs, each of which the tests named beside it must catch. ``run.py`` plants them one at a time.

To add one: copy a line or more of the source exactly (it must occur once in its file), write what a tired programmer might have
written instead, and name the tests that ought to fail: by their oracle rather than by the golden file, which notices every change
but cannot say which side is right. Name the fastest first, and a test by hand before one that searches (hypothesis).
"""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Mutation(NamedTuple):
    """One bug: ``source`` (exact, once in ``file``) becomes ``replacement``; ``tests`` are pytest node ids."""

    name: str
    file: str
    source: str
    replacement: str
    tests: tuple[str, ...]

    def apply(self, text: str) -> str:
        """``text`` with the bug planted. Raises LookupError unless the source occurs exactly once."""
        found = text.count(self.source)
        if found != 1:
            raise LookupError(f"mutation {self.name!r}: its source occurs {found} times in {self.file}, expected once; update it")
        return text.replace(self.source, self.replacement)


def _numerics(module: str, *rows: tuple[str, str, str, str]) -> tuple[Mutation, ...]:
    """Rows (name, source, replacement, tests) of mmrl/numerics/MODULE.py; tests are names in its test file, space-separated."""
    return tuple(
        Mutation(
            name=f"{module}: {name}",
            file=f"mmrl/numerics/{module}.py",
            source=source,
            replacement=replacement,
            tests=tuple(f"tests/numerics/test_{module}.py::{test}" for test in tests.split()),
        )
        for name, source, replacement, tests in rows
    )


FLOW = _numerics(
    "flow",
    ("ode walks backwards", "s.x - s.delta * s.velocity, torch.zeros", "s.x + s.delta * s.velocity, torch.zeros",
     "test_no_noise_is_the_ode"),
    ("sde noise without sqrt(delta)", "sigma * s.delta.sqrt()", "sigma * s.delta",
     "test_flow_sde_has_the_noise_of_pi_rl_table test_marginals_are_kept_to_first_order"),
    ("sde drift without 1/2", "sigma**2 * s.delta / (2 * s.t)", "sigma**2 * s.delta / s.t",
     "test_marginals_are_kept_to_first_order"),
    ("sde drift has the wrong sign", "s.t_next - sigma**2", "s.t_next + sigma**2",
     "test_flow_sde_equals_the_form_that_image_projects_print"),
    ("sde drift uses t_star", "s.delta / (2 * s.t)", "s.delta / (2 * s.t_star)",
     "test_flow_sde_equals_the_form_that_image_projects_print"),
    ("sde noise ignores t_star", "s.t / (1 - s.t_star)", "s.t / (1 - s.t)",
     "test_flow_sde_has_the_noise_of_pi_rl_table"),
    ("guarded time guards nothing", "torch.where(t >= 1, t_next, t)", "t",
     "test_guarded_time_moves_only_the_first_grid_point"),
    ("cps noise at t instead of t_next", "s.t_next * angle.sin()", "s.t * angle.sin()",
     "test_cps_keeps_marginals_exactly_when_the_clean_estimate_is_exact"),
    ("cps mean without its cosine", "s.t_next * angle.cos()", "s.t_next",
     "test_cps_keeps_marginals_exactly_when_the_clean_estimate_is_exact"),
    ("clean estimate forgets t", "clean_weight * (self.x - self.t * self.velocity)", "clean_weight * (self.x - self.velocity)",
     "test_no_noise_is_the_ode"),
    ("transition in half precision", "std=std)\n    dtype = torch.promote_types(x_t.dtype, torch.float32)",
     "std=std)\n    dtype = x_t.dtype", "test_half_precision_is_computed_in_float32"),
    ("times per sample align with the last axis", "value.reshape(value.shape + (1,) * (like.ndim - value.ndim))", "value",
     "test_a_time_per_sample_equals_one_call_per_sample_bit_for_bit"),
    ("log-prob without 1/2", "- 0.5 * ((x - mean) / safe) ** 2", "- ((x - mean) / safe) ** 2",
     "test_log_prob_and_entropy_are_those_of_torch_distributions test_log_prob_integrates_to_one"),
    ("log-prob divides by std instead of variance", "((x - mean) / safe) ** 2", "(x - mean) ** 2 / safe",
     "test_log_prob_integrates_to_one"),
    ("log-prob without the log std", "-safe.log() - _LOG_SQRT_2PI", "-_LOG_SQRT_2PI",
     "test_log_prob_integrates_to_one"),
    ("log-prob of no noise has NaN gradients", "torch.ones_like(std))  # keeps", "std)  # keeps",
     "test_a_deterministic_entry_has_log_prob_zero_and_no_gradient"),
)  # fmt: skip

ADVANTAGES = _numerics(
    "advantages",
    ("termination still bootstraps", "torch.where(terminated_TB, torch.zeros_like(next_values_TB), next_values_TB)",
     "next_values_TB", "test_gae_by_hand test_gae_is_its_definition"),
    ("truncation taken for termination", "torch.where(terminated_TB, ", "torch.where(terminated_TB | truncated_TB, ",
     "test_gae_by_hand test_gae_is_its_definition"),
    ("trace runs through truncation", "(~(terminated_TB | truncated_TB))", "(~terminated_TB)",
     "test_gae_by_hand test_gae_of_joined_episodes_is_that_of_each"),
    ("trace without lambda", "gamma * lam * (", "gamma * (",
     "test_gae_with_lam_zero_is_the_temporal_difference test_gae_by_hand"),
    ("returns without the value", "advantages_TB + values_TB", "advantages_TB",
     "test_gae_with_lam_one_is_the_discounted_return_less_the_value"),
    ("a turn's reward is its first unit's", "there_TBV.flip(2).cumsum(2).flip(2) == 1", "there_TBV.cumsum(2) == 1",
     "test_gae_of_units_by_hand"),
    ("what a decision without units was paid is lost", "rewards[t - 1] + masked.fill(rewards[t], moves_B)", "rewards[t - 1]",
     "test_gae_of_units_by_hand"),
    ("a decision without units does not end its episode", "truncated[t - 1] | (moves_B & truncated[t])", "truncated[t - 1]",
     "test_gae_of_units_is_its_definition"),
    ("a decision without units ends the episode before it", "moves_B = ~steps_TB[t] & ~terminated[t - 1] & ~truncated[t - 1]",
     "moves_B = ~steps_TB[t]", "test_gae_of_units_is_its_definition"),
    ("an episode's end is not bootstrapped", "torch.where(last_LB, at_last(next_values_TB.to(values_LB.dtype)), within_LB)",
     "within_LB", "test_gae_of_units_by_hand"),
    ("a unit is followed by itself", "torch.cat([values_LB[1:], torch.zeros_like(values_LB[:1])])", "values_LB",
     "test_gae_of_units_by_hand"),
    ("units that are not there take a step", "(~there_SB).to(torch.uint8)", "torch.zeros_like(there_SB, dtype=torch.uint8)",
     "test_gae_of_units_is_its_definition"),
    ("what units earn themselves is lost", "(0 if earned_TBV is None else steps(earned_TBV))", "0",
     "test_gae_of_units_is_its_definition"),
    ("biased group std", "rewards_PG.std(dim=1, keepdim=True)", "rewards_PG.std(dim=1, keepdim=True, unbiased=False)",
     "test_group_relative_is_its_definition test_group_relative_by_hand"),
    ("baseline over the batch", "rewards_PG.mean(dim=1, keepdim=True)", "rewards_PG.mean()",
     "test_group_relative_is_its_definition test_a_group_that_agrees_has_no_advantage"),
    ("leave-one-out divides by G", "/ (rewards_PG.shape[1] - 1)", "/ rewards_PG.shape[1]",
     "test_leave_one_out_is_the_mean_baseline_times_g_over_g_minus_one"),
    ("standardize over all entries", "masked.mean(x, mask)) / (", "x.mean()) / (",
     "test_standardize_is_over_the_kept_entries"),
)  # fmt: skip

LOSSES = _numerics(
    "losses",
    ("advantage has the wrong sign", "free_BK = -advantages_BK", "free_BK = advantages_BK",
     "test_gradient_at_ratio_one_is_that_of_reinforce test_clipped_surrogate_by_hand"),
    ("old and new swapped", "log_probs_BK - old_log_probs_BK", "old_log_probs_BK - log_probs_BK",
     "test_gradient_at_ratio_one_is_that_of_reinforce"),
    ("clip bounds swapped", "clamp(1 - clip_low, 1 + clip_high)", "clamp(1 - clip_high, 1 + clip_low)",
     "test_clipped_surrogate_by_hand"),
    ("smaller of the two terms", "torch.maximum(free_BK, clipped_BK)", "torch.minimum(free_BK, clipped_BK)",
     "test_clipped_surrogate_by_hand"),
    ("dual clip on the wrong side", "torch.where(advantages_BK < 0,", "torch.where(advantages_BK > 0,",
     "test_clipped_surrogate_by_hand"),
    ("sequence ratio of the sum", "log_ratio_BK.sum(dim=1, keepdim=True) / units_B1", "log_ratio_BK.sum(dim=1, keepdim=True)",
     "test_clipped_surrogate_is_its_loop"),
    ("units divided by the local count", "(masked.count(x_BK, mask_BK) if normalizer is None else normalizer)",
     "masked.count(x_BK, mask_BK)", "test_micro_batches_add_up_to_the_whole"),
    ("samples divided by the local count", "((units_B > 0).sum().clamp(min=1) if normalizer is None else normalizer)",
     "(units_B > 0).sum().clamp(min=1)", "test_micro_batches_add_up_to_the_whole"),
    ("samples without units count", "((units_B > 0).sum().clamp(min=1) if", "(len(units_B) if",
     "test_clipped_surrogate_is_its_loop"),
    ("sample mean over all units", "units_B = mask_BK.sum(dim=1)", "units_B = torch.ones_like(mask_BK).sum(dim=1)",
     "test_clipped_surrogate_is_its_loop"),
    ("clipped value starts from the new value", "old_values + (values - old_values)", "values + (values - old_values)",
     "test_value_loss_is_its_loop"),
    ("smaller of the two value losses", "torch.maximum(loss, clipped)", "torch.minimum(loss, clipped)",
     "test_value_loss_is_its_loop"),
    ("Huber's line has the wrong offset", "delta * (size - 0.5 * delta)", "delta * (size - delta)",
     "test_value_loss_without_clip_is_torchs_huber_loss"),
    ("k3 of the other direction", "torch.expm1(-d) + d", "torch.expm1(d) - d", "test_kl_estimates_are_unbiased"),
    ("explained variance of the mean square", "masked.var(returns - values, mask)", "masked.mean((returns - values) ** 2, mask)",
     "test_explained_variance"),
)  # fmt: skip

OTHERS = (
    *_numerics(
        "masked",
        ("mask ignored", "torch.where(mask, x, torch.full((), value, dtype=x.dtype, device=x.device))", "x",
         "test_a_masked_reduction_is_that_of_the_kept_entries"),
        ("biased variance", "(count(x, mask) - 1)", "count(x, mask)", "test_a_masked_reduction_is_that_of_the_kept_entries"),
    ),
    *_numerics(
        "tokens",
        ("gradient of the log-prob has the wrong sign", ".softmax(-1).neg_()", ".softmax(-1)",
         "test_log_probs_and_their_gradient_are_torchs"),
        ("entropy's gradient without the entropy", "torch.special.entr(p) - p * entropy_BT[:, piece, None]",
         "torch.special.entr(p)",
         "test_entropy_and_its_gradient_are_torchs"),
        ("logits widened all at once", "chunk = chunk\n        parts = []",
         "chunk = chunk\n        parts, logits_BTV = [], _wide(logits_BTV)",
         "test_no_float32_copy_of_the_logits_is_made"),
    ),
    *_numerics(
        "statistics",
        ("Wilson's centre off", "p + z * z / (2 * trials)", "p + z * z / trials",
         "test_wilson_interval_has_the_published_bounds"),
        ("Student series off by one", "(2 * k + 1 + odd)", "(2 * k + 1)", "test_student_quantile_has_the_published_value"),
        ("normal instead of Student", "student_quantile(confidence, n - 1)", "NormalDist().inv_cdf(0.5 + confidence / 2)",
         "test_mean_interval_by_hand"),
    ),
)  # fmt: skip

# The other files here hold the bugs outside the numerics: groups in capitals, whose rows are (name, file, source, replacement,
# tests separated by spaces).
_PREFIXES = {"PI0": "pi0: ", "TOKEN_VLA": "token vla: "}


def _elsewhere() -> Iterator[Mutation]:
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem in ("mutations", "run"):
            continue
        for group, rows in runpy.run_path(str(path)).items():
            if group.isupper() and not group.startswith("_"):
                yield from (
                    Mutation(_PREFIXES.get(group, "") + name, *rest, tests=tuple(tests.split())) for name, *rest, tests in rows
                )


MUTATIONS = (*FLOW, *ADVANTAGES, *LOSSES, *OTHERS, *_elsewhere())
