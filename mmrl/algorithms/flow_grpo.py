"""Flow-GRPO: GRPO on the denoising steps of image generators.

    A_i = clamp((R_i - mean_G R) / (std R + eps), -c_A, c_A), the same for every step k of picture i
    L = mean_steps max(-A rho_k, -A clip(rho_k, 1 - c, 1 + c)) + c_KL KL(p_k || p_ref,k)

Liu et al. 2025 (arXiv 2505.05470). A unit is a stochastic denoising step, a Gaussian, whose log-probability is a mean over the
numbers of the latent: hence clip ranges of 1e-5 to 1e-3. Which steps are stochastic and trained, and by which rule (flow_sde,
cps, constant), are fields of the policy, and so are what makes this Flow-GRPO-Fast, MixGRPO (arXiv 2507.21802: windows) and
DanceGRPO (arXiv 2505.07818: constant noise). Switches for what was proposed since (formulas: numerics.steps):

    CPS             log_ratio: unscaled (arXiv 2509.05952): rho of log p = -mean (x' - mean)^2
    GRPO-Guard      log_ratio: guard (arXiv 2510.22319): rho = exp(std (log p - log p_old + b)); flow_grpo's code also has
                    divide_by_delta, which divides a step's loss by its length
    KL              kl_form: flow_grpo, exact or means, in closed form from the means; estimate: kl_kind of log-probabilities
    group_std       scale: group_std (DanceGRPO, Flow-GRPO-Fast on FLUX) instead of the deviation of all returns of a rollout
    DDPO            compare: prompt (arXiv 2305.13301; see ``history``)
    online SFT      compare: best: A = 1 for the best of a group and 0 for the others
    online DPO      compare: best_worst: A = 1 for the best and -1 for the worst
    raw rewards     baseline: none, scale: none

Everything of GRPO holds as well. Departures: deviations are unbiased (flow_grpo's and PromptRL's are not); a KL is averaged as
``reduce`` says; pictures worth exactly 0 are left out, as flow_grpo leaves them out, but are not filled up with others; DDPO's
clip is that of the ratio of a mean log-probability too. GRPO-Guard's formula is flow_sde's; it holds for any Gaussian step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from mmrl.algorithms.credit import Credit, Episodes
from mmrl.algorithms.grpo import GRPO
from mmrl.algorithms.history import PromptHistory, prompt_key
from mmrl.algorithms.policy_gradient import by_unit, policy_loss
from mmrl.errors import ConfigError
from mmrl.numerics.advantages import extremes
from mmrl.numerics.steps import step_kl, step_log_ratio
from mmrl.protocols import Advantages, LikelihoodPolicy, LossContext
from mmrl.types import Batch, Evaluation, Loss, Rollout

_SCALE, _BASELINE = "batch_std", "mean"  # what group comparisons do unless told otherwise


class FlowGRPO(GRPO):
    """See the module."""

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    class Config(GRPO.Config):
        """Fields of a ``mmrl.algorithms.flow_grpo:FlowGRPO`` block."""

        group_size: int = Field(default=24, ge=1)
        """Pictures per prompt (G); must divide the stage's ``collect.num_envs``. At least 2, but for baseline: none."""
        scale: Literal["group_std", "batch_std", "whiten", "none"] = _SCALE
        """What centred returns are divided by: the deviation of the group's, or of all of the rollout; or as in GRPO."""
        eps: float = Field(default=1e-4, ge=0)
        """Added to that deviation."""
        clip_low: float = Field(default=1e-4, gt=0)
        """Ratios below 1 - clip_low earn nothing further."""
        clip_high: float = Field(default=1e-4, gt=0)
        """Ratios above 1 + clip_high earn nothing further."""
        compare: Literal["group", "best", "best_worst", "prompt"] = "group"
        """What makes a return an advantage: scale and baseline; being the best (1) or also the worst (-1) of the group; or the
        earlier returns of the same prompt (DDPO)."""
        history: int = Field(default=16, ge=2)
        """Returns that are remembered of each prompt, for compare: prompt."""
        min_history: int = Field(default=16, ge=2)
        """Remembered returns from which on a prompt is judged by them, and not by the whole rollout."""
        clamp: float | None = Field(default=5.0, gt=0)
        """Largest advantage, of either sign; null: none."""
        log_ratio: Literal["likelihood", "unscaled", "guard"] = "likelihood"
        """What the surrogate clips the exponential of (see the module)."""
        divide_by_delta: bool = False
        """Whether a step's loss is divided by its length t - t'."""
        kl_form: Literal["flow_grpo", "exact", "means", "estimate"] = "flow_grpo"
        """How the KL is normalised: three closed forms, or kl_kind from log-probabilities."""

        @model_validator(mode="after")
        def _comparison_fits(self) -> Self:
            if self.compare == "prompt" and (self.baseline != "none" or self.scale != "none"):
                raise ValueError(
                    "compare 'prompt' takes mean and deviation from a prompt's history; set baseline: none, scale: none"
                )
            if self.compare in ("best", "best_worst") and (self.baseline != _BASELINE or self.scale != _SCALE):
                raise ValueError(f"compare '{self.compare}' reads neither scale nor baseline; leave them out")
            if self.compare != "group" and self.credit != "episode":
                raise ValueError(
                    f"compare '{self.compare}' judges whole episodes, but credit is '{self.credit}'; set credit: episode"
                )
            if self.compare != "prompt" and (self.history, self.min_history) != (16, 16):
                raise ValueError(f"history is remembered for compare: prompt, not for '{self.compare}'; leave it out")
            if self.min_history > self.history:
                raise ValueError(f"min_history is {self.min_history}, but only {self.history} are remembered; raise history")
            return self

        @model_validator(mode="after")
        def _kl_fits(self) -> Self:
            if self.kl_form != "estimate" and self.kl_in == "reward":
                raise ValueError(f"kl_in is 'reward', but kl_form '{self.kl_form}' is a term of the loss; set kl_form: estimate")
            if self.kl_form != "estimate" and self.kl_corrected:
                raise ValueError(f"kl_corrected corrects an estimate, but kl_form is '{self.kl_form}'; set kl_form: estimate")
            return self

    @staticmethod
    def asks(config: Config) -> frozenset[str]:
        """What it needs beside ``needs``, as it is configured."""
        return frozenset({"means"}) if _closed(config) or config.log_ratio == "guard" else frozenset()

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.flow, self.by_unit = config, by_unit(config)
        self.uses_means, self.uses_reference_means = config.log_ratio == "guard", _closed(config)
        self._history = PromptHistory(config.history, config.min_history)

    def advantages(self, rollout: Rollout) -> Advantages:
        """As GRPO's, within bounds; what is worth exactly 0 is left out."""
        judged, bound = super().advantages(rollout), self.flow.clamp
        worth_TB, units_TBK = judged.advantages_TB, judged.units_TBK
        beyond_TB = judged.keep_TB & (worth_TB.abs() > (torch.inf if bound is None else bound))
        if bound is not None:
            worth_TB = worth_TB.clamp(-bound, bound)
            units_TBK = None if units_TBK is None else units_TBK.clamp(-bound, bound)
        something_TB = worth_TB != 0 if units_TBK is None else (units_TBK != 0).any(2)
        share = beyond_TB.sum() / judged.keep_TB.sum().clamp(min=1)
        return replace(
            judged,
            advantages_TB=worth_TB,
            units_TBK=units_TBK,
            keep_TB=judged.keep_TB & something_TB,
            metrics={**judged.metrics, "clamped": float(share)},
        )

    def loss(self, policy: LikelihoodPolicy, batch: Batch, context: LossContext) -> Loss:
        scored, config = policy.evaluate(batch.trace), self.flow
        log_ratio_NK = step_log_ratio(
            scored.log_probs_NK,
            batch.old_log_probs_NK,
            form=config.log_ratio,
            stds_NK=scored.stds_NK if config.log_ratio == "likelihood" else _given(scored.stds_NK, "log_ratio", config.log_ratio),
            means_NKD=scored.means_NKD,
            old_means_NKD=batch.old_means_NKD,
        )
        weights_NK = None
        if config.divide_by_delta:
            deltas_NK = _given(scored.deltas_NK, "divide_by_delta", "true")
            weights_NK = 1 / torch.where(batch.mask_NK, deltas_NK, 1)
        return policy_loss(
            config, scored, batch, context, log_ratio_NK=log_ratio_NK, weights_NK=weights_NK, kl_NK=self._kl(scored, batch)
        )

    def _kl(self, scored: Evaluation, batch: Batch) -> Tensor | None:
        """In closed form; None where there is none, or where it is estimated."""
        form, reference_NKD = self.flow.kl_form, batch.reference_means_NKD
        if not _closed(self.flow):
            return None
        values = (_given(x, "kl_form", form) for x in (scored.means_NKD, reference_NKD, scored.stds_NK, scored.deltas_NK))
        return step_kl(*values, form=form)

    def _credit(self, rollout: Rollout, episodes: Episodes) -> Credit:
        if self.flow.compare == "group":
            return super()._credit(rollout, episodes)
        if self.flow.compare == "prompt":
            worth_B = self._by_prompt(rollout, episodes.rewards_TB.sum(0))
        else:
            returns_PG = episodes.by_group(episodes.rewards_TB.sum(0))
            worth_PG = extremes(returns_PG, worst=self.flow.compare == "best_worst")
            worth_B = (worth_PG * episodes.complete_P[:, None]).flatten()
        return worth_B.expand_as(episodes.rewards_TB), {}

    def _by_prompt(self, rollout: Rollout, returns_B: Tensor) -> Tensor:
        record = rollout.episodes
        if not record.transcripts or record.spans_M3 is None:
            raise ConfigError(
                "'compare' is 'prompt', but the environment holds no conversations, whose question is the prompt; use 'group'"
            )
        slots_M, worth_B = record.spans_M3[:, 0], torch.zeros_like(returns_B)
        keys = [prompt_key(transcript) for transcript in record.transcripts]
        worth_B[slots_M] = self._history.judge(keys, returns_B[slots_M], eps=self.flow.eps)
        return worth_B

    def state_dict(self) -> dict[str, Tensor]:
        return self._history.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._history.load_state_dict(state)


def _closed(config: FlowGRPO.Config) -> bool:
    """Whether there is a KL in closed form."""
    return config.kl_weight > 0 and config.kl_form != "estimate"


def _given(x: Tensor | None, field: str, value: str) -> Tensor:
    """What a policy whose units are no Gaussians lacks."""
    if x is None:
        raise ConfigError(
            f"'{field}' is '{value}', which reads the Gaussians of denoising steps, but the policy gives none; "
            "leave it out, with kl_form: estimate"
        )
    return x
