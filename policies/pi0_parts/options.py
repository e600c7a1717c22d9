"""The fields of a pi0's block, and its nested blocks."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from mmrl.component import Component

STRICT = ConfigDict(extra="forbid")
NOISE_LEVEL_SAMPLERS = ("flow_sde", "cps")


@dataclass(frozen=True, config=STRICT)
class CriticConfig:
    """The value head."""

    inputs: tuple[Literal["prefix", "state_token", "suffix", "time"], ...] = ("state_token",)
    """Concatenated features: mean of the prefix, the expert's state token, mean of its action tokens at the trained steps, and
    how many decisions were made. Where a time limit ends episodes for good, what is left to gain depends on the time."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers."""
    detach: bool = True
    """Whether the value loss stops at the head instead of reaching the expert and the prefix."""


@dataclass(frozen=True, config=STRICT)
class LoraOptions:
    """Low-rank adapters (peft) on the action expert's and the language model's linear layers."""

    rank: int = Field(default=16, gt=0)
    alpha: int = 16
    modules: str = r".*(dit|language_model).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    """Regular expression over module names."""


@dataclass(frozen=True, config=STRICT)
class Options:
    """Fields of a ``policies.pi0:Pi0`` block."""

    checkpoint: str
    """Folder or hub id in the format of lerobot/pi0_base as transformers reads it."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; null: the checkpoint's (lerobot/pi0_base has none; google/paligemma-3b-pt-224 fits)."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """``random`` takes only architecture and tokenizer from the checkpoint."""
    sampler: Literal["ode", "flow_sde", "flow_noise", "cps"] = "flow_sde"
    """How actions are drawn while exploring; evaluation always follows the ODE."""
    denoising_steps: int = Field(default=4, ge=1)
    """Steps from noise to actions (K)."""
    noise_level: float | None = None
    """Noise of flow_sde (any positive number) and cps (at most 1); required by these two, refused by the others."""
    stochastic_steps: Literal["one", "all"] = "one"
    """flow_sde and cps: one random denoising step per decision is stochastic and trained, or all; flow_noise: always all."""
    train_last_step: bool = True
    """Whether the last denoising step may be stochastic (its noise goes straight into the action); that of cps never is."""
    noise_std_range: tuple[float, float] = (0.08, 0.16)
    """flow_noise: bounds of the learned standard deviation, in normalised actions."""
    execute: int | None = Field(default=None, ge=1)
    """Actions of a chunk that are executed and scored (C); None: all."""
    action_dim: int | None = Field(default=None, ge=1)
    """Action dimensions that are executed and scored (A); None: those of the statistics."""
    granularity: Literal["chunk", "action", "step"] = "chunk"
    """Units of the log-probability: the whole chunk, each executed action, or each denoising step."""
    step_reduction: Literal["sum", "mean", "mean_with_prior"] = "sum"
    """How denoising steps are combined within a unit (not for granularity ``step``)."""
    critic: CriticConfig | None = field(default_factory=CriticConfig)
    """The value head; null for algorithms that need none."""
    train: Literal["expert", "all", "lora"] = "expert"
    """Which weights learn: the action expert with its projections, everything, or low-rank adapters and projections."""
    lora: LoraOptions = field(default_factory=LoraOptions)
    """Used with ``train: lora``."""
    cache_prefix: bool = True
    """Keep frozen prefixes (``train: expert``) for the update; in bfloat16 pi0_base needs 5 MB per decision and camera."""
    adapter: Component | None = None
    """What lies between a simulator and the checkpoint, of ``policies.pi0_adapters``; null: everything passes as it is."""
    cameras: tuple[str, ...] | None = None
    """The simulator's cameras for the checkpoint's image slots, in order; null: the adapter's, without one ``front``."""
    max_text_tokens: int = Field(default=48, ge=1)
    """Text is padded to this length."""
    flow_samples: int = Field(default=1, ge=1)
    """Noise and time draws per example in the supervised loss, all over one encoded prefix."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """transformers' attention implementation; eager is the fastest for tiny models on a CPU."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Storage type of the weights; densities and chains are computed in float32 or better in any case."""
    seed: int = 0
    """Seed of fresh weights (heads, and everything with ``weights: random``)."""

    @model_validator(mode="after")
    def _consistent(self) -> Options:
        needs_level = self.sampler in NOISE_LEVEL_SAMPLERS
        if needs_level and not (self.noise_level and self.noise_level > 0):
            raise ValueError(f"noise_level must be above 0 with sampler '{self.sampler}' (it has no likelihood without noise)")
        if not needs_level and self.noise_level is not None:
            raise ValueError(f"noise_level is not used by sampler '{self.sampler}'; remove it")
        if self.sampler == "cps" and self.noise_level is not None and self.noise_level > 1:
            raise ValueError("noise_level must be at most 1 with sampler 'cps'")
        if not 0 < self.noise_std_range[0] <= self.noise_std_range[1]:
            raise ValueError("noise_std_range must be two positive numbers, low and high")
        if not self.noisy_last_step and self.denoising_steps < 2:
            why = "train_last_step is false" if self.sampler != "cps" else "the last step of sampler 'cps' has no noise"
            raise ValueError(f"denoising_steps must be at least 2, because {why}")
        if self.granularity == "step" and self.step_reduction != "sum":
            raise ValueError("step_reduction is not used with granularity 'step', where each step is a unit; remove it")
        if self.cameras == ():
            raise ValueError("cameras must name at least one camera")
        return self

    @property
    def noisy_last_step(self) -> bool:
        """Whether the last step may be drawn at random; the noise of cps vanishes there."""
        return self.train_last_step and self.sampler != "cps"
