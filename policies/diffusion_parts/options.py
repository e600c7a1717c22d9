"""The fields of a Diffusion block, and its nested blocks."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
NOISY = ("flow_sde", "cps", "constant", "ddim")
# Which fields of ``trained_steps`` each kind reads, beside ``which``.
_READS: dict[str, tuple[str, ...]] = {
    "all": (),
    "all_but_last": (),
    "window": (
        "size",
        "start",
        "stop",
        "every",
        "stride",
        "order",
        "decay",
        "least",
        "decay_from",
        "decay_rate",
        "shared_prefix",
    ),
    "random": ("size", "start", "stop", "every"),
}


@dataclass(frozen=True, config=STRICT)
class LoraOptions:
    """Low-rank adapters (peft) on linear layers of the denoising network; the defaults are Flow-GRPO's."""

    rank: int = Field(default=32, gt=0)
    """Rank of the adapters."""
    alpha: int = 64
    """Their output is multiplied by alpha / rank."""
    modules: str = r".*\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    """Regular expression over module names."""


@dataclass(frozen=True, config=STRICT)
class PromptCache:
    """Embeddings of prompts on disk, which several runs may share; another encoder never reads them (diffusion_parts/disk.py)."""

    folder: str | None = None
    """Where; null: mmrl/embeddings in the user's cache folder."""
    gigabytes: float = Field(default=10.0, gt=0)
    """Room they may take; what was used longest ago goes first. SD3's with T5 take 3 megabytes a prompt in bfloat16."""


@dataclass(frozen=True, config=STRICT)
class TrainedSteps:
    """Which denoising steps are drawn at random and trained; the others follow the ODE. The same for all pictures of a rollout.

    ``window`` is that of Flow-GRPO-Fast (order random) and of MixGRPO (arXiv 2507.21802; order progressive): ``size`` steps in a
    row. ``random`` is any ``size`` steps, drawn without replacement.
    """

    which: Literal["all", "all_but_last", "window", "random"] = "all_but_last"
    """The last step ends in the picture itself; its log-density dwarfs the others', so it is better left out."""
    size: int | None = Field(default=None, ge=1)
    """window, random: how many steps."""
    start: int = Field(default=0, ge=0)
    """window, random: the first step that may be chosen."""
    stop: int | None = Field(default=None, ge=1)
    """window, random: the step before which all chosen ones lie; null: the last one, which is never chosen."""
    every: int = Field(default=1, ge=1)
    """window, random: iterations for which a choice stands."""
    stride: int = Field(default=1, ge=1)
    """window, progressive: by how many steps the window moves; behind the end it begins again."""
    order: Literal["progressive", "random"] = "progressive"
    """window: whether it moves on, or is placed anew, anywhere between start and stop."""
    decay: Literal["none", "linear", "exponential"] = "none"
    """window, progressive: whether it stays ``every`` iterations at each place, or fewer the further it has moved (MixGRPO):
    linear: every (1 - f / m) + least f / m, rounded down, with f its first step and m the last step that may be chosen;
    exponential: every exp(-decay_rate max(f - decay_from, 0)), rounded up."""
    least: int | None = Field(default=None, ge=1)
    """decay linear: iterations at the last step; null: a quarter of ``every``."""
    decay_from: int = Field(default=13, ge=0)
    """decay exponential: the first step up to which the window stays as long as at the beginning."""
    decay_rate: float = Field(default=0.1, gt=0)
    """decay exponential: how fast it then falls, per step."""
    shared_prefix: bool = False
    """window: pictures of one prompt share their first noise, so that the steps before the window are computed once for all."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainedSteps:
        for name in _READS["window"]:
            if name not in _READS[self.which] and name != "order" and getattr(self, name) != _default(name):
                raise ValueError(f"{name} is not used with which '{self.which}'; remove it")
        if "size" in _READS[self.which] and self.size is None:
            raise ValueError(f"size is missing: with which '{self.which}' it says how many steps are trained")
        for name in ("stride", "decay"):
            if getattr(self, name) != _default(name) and self.order == "random":
                raise ValueError(f"{name} is not used with order 'random'; remove it")
        for name, decay in {"least": "linear", "decay_from": "exponential", "decay_rate": "exponential"}.items():
            if getattr(self, name) != _default(name) and self.decay != decay:
                raise ValueError(f"{name} is not used with decay '{self.decay}'; remove it")
        if self.least is not None and self.least > self.every:
            raise ValueError(f"least must be at most every ({self.every}), from which the iterations at a place fall")
        if self.size is not None and self.stop is not None and self.start + self.size > self.stop:
            raise ValueError(f"{self.size} steps do not fit between start {self.start} and stop {self.stop}")
        return self


def _default(name: str) -> Any:
    """Of a field of TrainedSteps."""
    return TrainedSteps.__pydantic_fields__[name].default  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    """Fields of a ``policies.diffusion:Diffusion`` block."""

    checkpoint: str
    """Folder or hub id in diffusers' format; the class in its model_index.json says which family it is."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """``random`` takes architecture, tokenizers and scheduler from the checkpoint, and of weights only those of a VAE it has."""
    height: int | None = Field(default=None, ge=1)
    """Height of the pictures in pixels; null: what the checkpoint was made for."""
    width: int | None = Field(default=None, ge=1)
    """Width of the pictures in pixels; null: what the checkpoint was made for."""
    steps: int = Field(default=10, ge=1)
    """Denoising steps when pictures are collected for training."""
    evaluation_steps: int | None = Field(default=None, ge=1)
    """Denoising steps in evaluation; null: as ``steps``."""
    guidance: float = Field(default=4.5, ge=0)
    """Scale of classifier-free guidance, in collecting and in scoring; 1 is none. An input of guidance-distilled networks."""
    evaluation_guidance: float | None = Field(default=None, ge=0)
    """Scale of guidance in evaluation; null: as ``guidance``."""
    evaluation_sampler: Literal["ode", "rollout"] = "ode"
    """How evaluation draws: without noise, or as rollouts do, with noise in all steps that ``trained_steps`` may choose. With
    few steps the two differ, and what is learned for one need not serve the other."""
    guidance_detached: bool = False
    """Whether no gradient flows through the branch without prompt."""
    sampler: Literal["flow_sde", "cps", "constant", "ode", "ddim"] = "flow_sde"
    """How the chosen steps are drawn: rules of mmrl.numerics.flow, or ddim for networks that predict noise (DDPO)."""
    noise_level: float | None = None
    """Noise of the chosen steps: a of flow_sde (0.7 for SD3), cps (at most 1) and constant, eta of ddim; refused by ode."""
    trained_steps: TrainedSteps = field(default_factory=TrainedSteps)
    """Which steps are drawn at random and trained."""
    reduction: Literal["mean", "sum"] = "mean"
    """A unit's log-probability over its latent numbers. The clip ranges of image papers, 1e-5 to 1e-3, belong to mean."""
    train: Literal["all", "lora", "text_encoders"] = "all"
    """What learns: the denoising network, adapters of it, or the network and the text encoders (for training from scratch)."""
    lora: LoraOptions = field(default_factory=LoraOptions)
    """Used with ``train: lora``."""
    max_text_tokens: int | None = Field(default=None, ge=0)
    """``max_sequence_length`` of diffusers' pipeline; null: its default. 0 spares an SD3 without T5 the zeros in its place."""
    cached_prompts: int = Field(default=1024, ge=0)
    """Prompts whose embeddings are kept, those used last; text encoders that learn are asked every time."""
    prompt_cache: PromptCache | None = None
    """Embeddings that are kept on disk as well; null: in memory alone."""
    cached_pictures: int = Field(default=0, ge=0)
    """Pictures to imitate whose latents are kept, those used last; worth it where a data set comes round again."""
    decode_batch: int = Field(default=16, ge=1)
    """Pictures that the VAE makes, or reads, at a time."""
    flow_times: Literal["logit_normal", "uniform"] = "logit_normal"
    """How times are drawn in imitation, before the scheduler's shift; those of networks that predict noise are always uniform."""
    prompt_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of the pictures to imitate that are shown without their prompt, which classifier-free guidance needs."""
    checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third more time."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Storage type of weights and latents; densities are computed in float32 or better in any case."""
    seed: int = 0
    """Seed of fresh weights, of the choice of steps, and of noise that a group shares."""

    @model_validator(mode="after")
    def _consistent(self) -> Options:
        noisy = self.sampler in NOISY
        if noisy and not (self.noise_level and self.noise_level > 0):
            raise ValueError(f"noise_level must be above 0 with sampler '{self.sampler}' (it has no likelihood without noise)")
        if not noisy and self.noise_level is not None:
            raise ValueError(f"noise_level is not used by sampler '{self.sampler}'; remove it")
        if self.sampler in ("cps", "ddim") and self.noise_level is not None and self.noise_level > 1:
            raise ValueError(f"noise_level must be at most 1 with sampler '{self.sampler}'")
        if not noisy and self.trained_steps != TrainedSteps():
            raise ValueError("trained_steps is not used by sampler 'ode', which draws nothing at random; remove it")
        if self.evaluation_sampler == "rollout" and not noisy:
            raise ValueError("evaluation_sampler must be 'ode' with sampler 'ode', which draws nothing at random")
        if self.evaluation_sampler == "rollout" and self.evaluation_steps not in (None, self.steps):
            raise ValueError("evaluation_steps is not used with evaluation_sampler 'rollout', which takes steps; remove it")
        if self.prompt_cache is not None and self.train == "text_encoders":
            raise ValueError("prompt_cache is not used with train 'text_encoders', whose embeddings change; remove it")
        self._check_steps()
        return self

    def _check_steps(self) -> None:
        chosen, free = self.trained_steps, self.steps - 1
        if self.sampler != "ode" and chosen.which != "all" and free < 1:
            raise ValueError("steps must be at least 2, because the last one is not trained")
        if chosen.stop is not None and chosen.stop > free:
            raise ValueError(f"trained_steps.stop must be at most {free}: the last of {self.steps} steps is not trained")
        if chosen.size is not None and chosen.start + chosen.size > free:
            raise ValueError(
                f"trained_steps: {chosen.size} steps from {chosen.start} on are more than the {free} that may be trained"
            )
