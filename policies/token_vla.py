"""Action tokens on a vision-language model: a policy that says its actions in words of its vocabulary, as OpenVLA does.

A chunk of H actions is H x A tokens, one for each number, drawn one after the other from the bins of that dimension (see
``policies.token_vla_parts.bins``; OpenVLA, Kim et al. 2024). RL on such policies: SimpleVLA-RL (Li et al. 2025), RLinf-VLA (Zang
et al. 2025). Any model of transformers' AutoModelForImageTextToText will do; images and prompt are encoded once per decision.

Departures from OpenVLA:
- Everything - drawing, log-probabilities, entropy, imitation loss - is about the distribution over the action tokens alone, which
  is what acts. OpenVLA's loss and greedy decoding are over the whole vocabulary.
- Dimensions that take one or two values in the data have one or two tokens; one value costs no probability and is never trained.
- The prompt is wrapped in the model's chat template, where it has one, and may end in the robot's state, in the same bins and
  tokens.
- Images are resized and normalised as the model's own processor does it, without OpenVLA's crops.

The log-probabilities of a decision come from one pass over its tokens after they were drawn, over the same cache. That pass is
what ``evaluate`` repeats, so that at unchanged weights the numbers are equal bit for bit; a chain of single-token passes rounds
otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from mmrl.errors import MMRLError
from mmrl.numerics.draws import Draws
from mmrl.numerics.losses import Loss
from mmrl.numerics.tokens import token_entropy, token_log_probs
from mmrl.types import Decision, Evaluation, Examples, Observation, Packing, Rollout
from policies.shared.adapters import LoraOptions, add_adapters, frozen_twin, merged
from policies.shared.checkpoints import STATISTICS_FILE, load_heads, load_tokenizer, save_heads
from policies.shared.heads import TIME_FEATURES, CriticHead, time_features
from policies.shared.vision_language import load_model, model_groups
from policies.token_vla_parts.backbone import Backbone, Prompt
from policies.token_vla_parts.bins import Bins, Statistics, load_statistics, only_value
from policies.token_vla_parts.eyes import FAMILIES, ProcessorEyes
from policies.token_vla_parts.options import STRICT, CriticConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
OPENVLA_PROMPT = "In: What action should the robot take to {instruction}?\nOut:"


class _Scores(NamedTuple):
    """What a pass over K tokens says of them: [N, K] each, and the critic's values [N]."""

    log_probs_NK: Tensor
    entropy_NK: Tensor
    values_N: Tensor | None
    correct_NK: Tensor  # whether the token is the likeliest


class TokenVLA(nn.Module):
    """See the module. Satisfies LikelihoodPolicy, ValuePolicy and SupervisedPolicy of mmrl.protocols."""

    @dataclass(frozen=True, config=STRICT)
    class Config:
        """Fields of a ``policies.token_vla:TokenVLA`` block."""

        checkpoint: str
        """Folder or hub id of a vision-language model in transformers' format, with tokenizer and image processor."""
        weights: Literal["pretrained", "random"] = "pretrained"
        """``random`` takes only architecture, tokenizer, image processor and statistics from the checkpoint."""
        chunk: int = Field(default=1, ge=1)
        """Actions that imitation teaches to predict from one observation (H)."""
        execute: int | None = Field(default=None, ge=1)
        """Actions of a chunk that are drawn, executed and scored (C); None: all."""
        action_dim: int | None = Field(default=None, ge=1)
        """Action dimensions (A); None: those of the checkpoint's statistics."""
        bins: int = Field(default=256, ge=2)
        """Tokens for each dimension (V): the last entries of the vocabulary, the lowest bin at the very end."""
        vocabulary_end: Literal["tokenizer", "head"] = "tokenizer"
        """Where the vocabulary ends: with the tokenizer's entries (as in OpenVLA; added ones do not count), or with the head's
        rows, of which there are often more."""
        granularity: Literal["token", "action", "chunk"] = "token"
        """Units of the log-probability: each token, each executed action, or the whole chunk."""
        state: Literal["none", "bins"] = "none"
        """Whether the prompt ends in the robot's state, each number as the token of its bin."""
        critic: CriticConfig | None = field(default_factory=CriticConfig)
        """The value head; null for algorithms that need none."""
        train: Literal["all", "lora"] = "all"
        """Which weights learn: everything, or low-rank adapters."""
        lora: LoraOptions = field(default_factory=LoraOptions)
        """Used with ``train: lora``."""
        cameras: tuple[str, ...] = ("front",)
        """The cameras the policy looks at, in order."""
        prompt: str = OPENVLA_PROMPT
        """What the model is asked; {instruction} stands for the task's sentence."""
        max_text_tokens: int = Field(default=64, ge=1)
        """Prompts are padded to this many tokens, those of images and state not counted."""
        attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
        """transformers' attention implementation; eager is the fastest for tiny models on a CPU."""
        dtype: Literal["float32", "bfloat16", "float64"] = "float32"
        """Storage type of the weights; probabilities are computed in float32 or better in any case."""
        seed: int = 0
        """Seed of fresh weights (the critic, adapters, and everything with ``weights: random``)."""

        @model_validator(mode="after")
        def _consistent(self) -> TokenVLA.Config:
            if not self.cameras:
                raise ValueError("cameras must name at least one camera")
            if self.execute is not None and self.execute > self.chunk:
                raise ValueError(f"execute = {self.execute} is more than the chunk of {self.chunk} actions that are predicted")
            if "{instruction}" not in self.prompt:
                raise ValueError("prompt must say where the task's sentence goes: {instruction}")
            return self

    @staticmethod
    def lacks(config: Config) -> dict[str, tuple[str, str]]:
        """What a policy of this config cannot give an algorithm: need -> (field, why); see mmrl.config."""
        return {} if config.critic else {"critic": ("critic", "is null; give the policy one, or use grpo")}

    def __init__(self, config: Config, *, device: torch.device) -> None:
        super().__init__()
        self.config, self.version = config, 0
        self.horizon, self.execute = config.chunk, config.execute or config.chunk
        self.model = load_model(config.checkpoint, config.weights, _DTYPES[config.dtype], config.attention, config.seed)
        self._tokenizer = load_tokenizer(config.checkpoint)
        self.statistics = load_statistics(config.checkpoint)
        if self.statistics is None and config.action_dim is None:
            raise MMRLError(f"{config.checkpoint} has no statistics, so the action size is unknown: set policy.action_dim")
        self.action_dim = config.action_dim or len(self.statistics.actions_q01)  # type: ignore[union-attr]
        self._make_bins()
        if config.train == "lora":
            lora = config.lora
            add_adapters(self.model, rank=lora.rank, alpha=lora.alpha, modules=lora.modules, seed=config.seed + 2)
        self._backbone = self._build_backbone()
        self._build_critic()
        self.to(device)

    # -- building ------------------------------------------------------------------------------------------------------

    def _build_backbone(self) -> Backbone:
        config, head = self.config, self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise MMRLError(
                f"policy.lora.modules = {config.lora.modules!r} adapts the output head, which cannot be; leave it out"
            )
        end = self._tokenizer.vocab_size if config.vocabulary_end == "tokenizer" else head.out_features
        if not config.bins < end <= head.out_features:
            raise MMRLError(
                f"policy.bins = {config.bins} does not fit into the {end} entries of {config.checkpoint}'s vocabulary"
            )
        taken = {self.model.config.image_token_id, *self._tokenizer.all_special_ids} & set(range(end - config.bins, end))
        if taken:
            where = "head" if config.vocabulary_end == "tokenizer" else "tokenizer"
            raise MMRLError(
                f"the last {config.bins} tokens of the vocabulary include special ones; try policy.vocabulary_end: {where}"
            )
        family = FAMILIES.get(self.model.config.model_type, ProcessorEyes)
        eyes = family(
            self.model,
            self._tokenizer,
            config.checkpoint,
            cameras=config.cameras,
            prompt=config.prompt,
            max_text_tokens=config.max_text_tokens,
        )
        return Backbone(self.model, eyes, bins=config.bins, end=end, most_tokens=self.horizon * self.action_dim)

    def _build_critic(self) -> None:
        critic = self.config.critic
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed + 1)
            features = self._backbone.width + (TIME_FEATURES if critic is not None and critic.time else 0)
            self.critic = None if critic is None else CriticHead(features, critic.hidden)
        if self.config.weights == "pretrained":
            load_heads(self._heads(), self.config.checkpoint)
        if self.critic is not None:
            self.critic.to(torch.promote_types(self.model.dtype, torch.float32))

    def _heads(self) -> dict[str, tuple[str, nn.Module]]:
        """The heads in use, each with what it computes in words: a saved one is loaded where the words are the same."""
        return {} if self.critic is None else {"critic": (f"value of {self._critic_words()}", self.critic)}

    def _critic_words(self) -> str:
        assert self.config.critic is not None
        time = "+time" if self.config.critic.time else ""
        return f"{self.config.critic.input}{time} through {'x'.join(map(str, self.config.critic.hidden))}"

    def _make_bins(self) -> None:
        """The bins that the statistics say, on the policy's device; none before there are statistics."""
        self.action_bins = self.state_bins = None
        if (known := self.statistics) is None:
            return
        if len(known.actions_q01) < self.action_dim:
            most = len(known.actions_q01)
            raise MMRLError(f"policy.action_dim = {self.action_dim}, but the statistics are of actions with {most} dimensions")
        a = self.action_dim
        bins = Bins(known.actions_q01[:a], known.actions_q99[:a], known.actions_choices[:a], self.config.bins)
        self.action_bins = bins.to(self.device)
        if self.config.state == "bins":
            if known.state_q01 is None or known.state_q99 is None:
                raise MMRLError("policy.state is 'bins', but the statistics know no states; use 'none', or compute them again")
            fixed = only_value(known.state_q01, known.state_q99)
            self.state_bins = Bins(known.state_q01, known.state_q99, fixed, self.config.bins).to(self.device)

    # -- what it is ----------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def has_critic(self) -> bool:
        return self.critic is not None

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        critic = [] if self.critic is None else list(self.critic.parameters())
        groups = {**model_groups(self.model), "critic": critic}
        return {name: parameters for name, parameters in groups.items() if parameters}

    def fingerprint(self) -> str:
        config = self.config
        critic = "" if self.critic is None else f" critic={self._critic_words().replace(' ', '-')}"
        return (
            f"token_vla {self.model.config.model_type} width={self._backbone.width} chunk={self.horizon} "
            f"action_dim={self.action_dim} bins={config.bins} state={config.state} train={config.train} "
            f"parameters={sum(p.numel() for p in self.parameters())}{critic}"
        )

    @contextmanager
    def compute_mode(self, *, train: bool) -> Iterator[None]:
        """bf16 autocast on a GPU while the weights are float32; no dropout, in training neither."""
        autocast = self.device.type == "cuda" and self.config.dtype == "float32"
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast), torch.set_grad_enabled(train):
            yield

    def train(self, mode: bool = True) -> TokenVLA:
        """Modes change nothing: with dropout a decision could not be scored again."""
        return self

    def save(self, folder: Path) -> None:
        """A folder that ``checkpoint`` opens: transformers' format (adapters merged), tokenizer, processor, statistics, heads."""
        model = merged(self.model) if self.config.train == "lora" else self.model
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        self._backbone.eyes.save(folder)
        self._tokenizer.save_pretrained(folder)
        if self.statistics is not None:
            (folder / STATISTICS_FILE).write_text(self.statistics.text())
        save_heads(self._heads(), folder)

    def get_extra_state(self) -> Tensor:
        """The statistics as json bytes: they belong to the weights, so a state dict carries them (no pickle)."""
        text = json.dumps(None if self.statistics is None else asdict(self.statistics))
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        raw = json.loads(bytes(state.tolist()))
        self.statistics = None if raw is None else Statistics.parse(raw)
        self._make_bins()

    def needs_statistics(self) -> bool:
        return self.statistics is None

    def fit_statistics(self, examples: Examples) -> None:
        """Take the quantiles of actions and states from demonstrations; they are saved with the policy."""
        if self.config.state == "bins" and examples.observation.state is None:
            raise MMRLError("policy.state is 'bins', but the examples have no states; use 'none'")
        self._check_actions(examples)
        actions_NA = examples.actions_BHA[examples.mask_BH][:, : self.action_dim]
        self.statistics = Statistics.fit(actions_NA, examples.observation.state)
        self._make_bins()

    def _check_actions(self, examples: Examples) -> None:
        found = examples.actions_BHA.shape[2]
        if found < self.action_dim:
            raise MMRLError(f"policy.action_dim = {self.action_dim}, but the examples' actions have {found} dimensions")

    # -- observation to tokens -----------------------------------------------------------------------------------------

    def _inputs(self, observation: Observation) -> dict[str, Tensor]:
        """Everything the network reads of an observation: images, and the prompt's token ids."""
        missing = [camera for camera in self.config.cameras if camera not in observation.images]
        if missing:
            raise MMRLError(f"policy.cameras names {missing[0]!r}, but the environment shows {sorted(observation.images)}")
        images = {camera: observation.images[camera].to(self.device) for camera in self.config.cameras}
        inputs = self._backbone.eyes.read(images, observation.instructions)
        if self.config.state == "bins":
            inputs["prompt"] = torch.cat([inputs["prompt"], self._state_ids(observation)], 1)
        if self.config.critic is not None and self.config.critic.time and observation.elapsed_B is not None:
            inputs["elapsed"] = observation.elapsed_B.to(self.device)
        return inputs

    def _state_ids(self, observation: Observation) -> Tensor:
        if observation.state is None:
            raise MMRLError("policy.state is 'bins', but the environment's observation has no state; use 'none'")
        bins = self._fitted(self.state_bins)
        found, known = observation.state.shape[1], len(bins.low_A)
        if found != known:
            raise MMRLError(f"the policy was trained with {known} numbers of state, but here are {found}")
        return self._backbone.ids(bins.encode(observation.state.to(self.device)))

    def _fitted(self, bins: Bins | None) -> Bins:
        if bins is None:
            raise MMRLError(
                f"{self.config.checkpoint} has no statistics: fit_statistics must see data first (an sft stage does it)"
            )
        return bins

    # -- acting --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, observation: Observation, draws: Draws, *, explore: bool) -> Decision:
        with self.compute_mode(train=False):
            inputs = self._inputs(observation)
            prompt = self._backbone.encode(inputs)
            bins_BK, log_probs_BK = self._generate(prompt, self.execute * self.action_dim, draws if explore else None)
            values_B = None
            if explore:
                prompt.cache.crop(1 - bins_BK.shape[1])  # back to the prompt
                log_probs_BK, _, values_B, _ = self._score(prompt, bins_BK, inputs)
        units_BK = self._units(log_probs_BK)
        return Decision(
            action=self._fitted(self.action_bins).decode(bins_BK.unflatten(1, (-1, self.action_dim))),
            trace={**inputs, "bins": bins_BK} if explore else {},
            log_probs_BK=units_BK,
            mask_BK=self._trained(units_BK),
            values_BV=None if values_B is None else values_B[:, None],
            policy_version=self.version,
        )

    def _generate(self, prompt: Prompt, count: int, draws: Draws | None) -> tuple[Tensor, Tensor]:
        """``count`` (K) bins, drawn one after the other, or the likeliest where ``draws`` is None; their log-probabilities."""
        allowed_KV = self._allowed(count)
        hidden_BW, bins, log_probs = prompt.last, [], []
        for k in range(count):
            logits_BV = self._backbone.logits(hidden_BW).masked_fill(~allowed_KV[k], -torch.inf)
            chosen_B = logits_BV.argmax(-1) if draws is None else draws.categorical(logits_BV)
            bins.append(chosen_B)
            log_probs.append(token_log_probs(logits_BV[:, None], chosen_B[:, None])[:, 0])
            if k + 1 < count:
                hidden_BW = self._backbone.extend(prompt, chosen_B[:, None], k)[:, 0]
        return torch.stack(bins, 1), torch.stack(log_probs, 1)

    def _allowed(self, count: int) -> Tensor:
        """Which tokens each of the first ``count`` numbers of a chunk may be: bool [K, V]."""
        return self._fitted(self.action_bins).allowed_AV.repeat(-(-count // self.action_dim), 1)[:count]

    # -- scoring again -------------------------------------------------------------------------------------------------

    def _score(self, prompt: Prompt, bins_NK: Tensor, inputs: Mapping[str, Tensor] | None) -> _Scores:
        """One pass over given tokens; the prompt must have been extended by none. ``inputs`` (or a trace) is for the critic."""
        count = bins_NK.shape[1]
        fed = max(count - 1, 1) if self._sees_first_action else count - 1  # what follows the last token is never asked
        hidden_NKW = prompt.last[:, None]
        if fed:
            hidden_NKW = torch.cat([hidden_NKW, self._backbone.extend(prompt, bins_NK[:, :fed], 0)], 1)
        logits_NKV = self._backbone.logits(hidden_NKW[:, :count]).masked_fill(~self._allowed(count), -torch.inf)
        return _Scores(
            token_log_probs(logits_NKV, bins_NK),
            token_entropy(logits_NKV),
            None if inputs is None else self._value(hidden_NKW[:, 1 if self._sees_first_action else 0], inputs),
            logits_NKV.argmax(-1) == bins_NK,
        )

    @property
    def _sees_first_action(self) -> bool:
        return self.config.critic is not None and self.config.critic.input == "first_action"

    def _value(self, hidden_NW: Tensor, inputs: Mapping[str, Tensor]) -> Tensor | None:
        critic = self.config.critic
        if self.critic is None or critic is None:
            return None
        features = hidden_NW.detach() if critic.detach else hidden_NW
        if critic.time:
            if "elapsed" not in inputs:
                raise MMRLError("policy.critic.time is true, but the observation does not say how many decisions were made")
            features = torch.cat([features, time_features(inputs["elapsed"]).to(features.dtype)], 1)
        return self.critic(features)

    def _units(self, numbers_NK: Tensor) -> Tensor:
        """Numbers of tokens, summed over those of a unit: [N, K'] with K' = K (token), C (action) or 1 (chunk)."""
        sizes = {"token": 1, "action": self.action_dim, "chunk": numbers_NK.shape[1]}
        return numbers_NK.unflatten(1, (-1, sizes[self.config.granularity])).sum(2)

    def _trained(self, units_NK: Tensor) -> Tensor:
        """Where a unit has a choice: everywhere but at the tokens of dimensions that never vary."""
        mask_NK = torch.ones_like(units_NK, dtype=torch.bool)
        if self.config.granularity == "token":
            mask_NK &= self._fitted(self.action_bins).varies_A.repeat(units_NK.shape[1] // self.action_dim)
        return mask_NK

    def pack(self, rollout: Rollout) -> Packing:
        return rollout.by_decision()

    def evaluate(self, trace: Mapping[str, Tensor]) -> Evaluation:
        """The entropy of an action or chunk is the sum over its tokens, each given those before it: unbiased for its own."""
        scores = self._score(self._backbone.encode(trace), trace["bins"], trace)
        values_NV = None if scores.values_N is None else scores.values_N[:, None]
        return Evaluation(self._units(scores.log_probs_NK), self._units(scores.entropy_NK), values_NV)

    @torch.no_grad()
    def value(self, observation: Observation, draws: Draws) -> Tensor:
        if self.critic is None:
            raise MMRLError("the policy has no critic (policy.critic is null)")
        with self.compute_mode(train=False):
            inputs = self._inputs(observation)
            prompt = self._backbone.encode(inputs)
            hidden_BW = prompt.last
            if self._sees_first_action:
                first_B1, _ = self._generate(prompt, 1, draws)
                hidden_BW = self._backbone.extend(prompt, first_B1, 0)[:, 0]
            values_B = self._value(hidden_BW, inputs)
        assert values_B is not None
        return values_B

    def reference(self) -> TokenVLA:
        """A frozen twin; it shares the weights that do not learn."""
        return frozen_twin(self)

    # -- imitation -----------------------------------------------------------------------------------------------------

    def supervised_weight(self, examples: Examples) -> Tensor:
        return examples.mask_BH.sum(1)

    def supervised_loss(self, examples: Examples, generator: torch.Generator) -> Loss:
        """Cross entropy of the tokens of the demonstrated actions, the mean over real actions and dimensions that vary."""
        bins = self._fitted(self.action_bins)
        self._check_actions(examples)
        actions_BHA = examples.actions_BHA[:, : self.horizon, : self.action_dim].to(self.device)
        bins_BK = bins.encode(actions_BHA).flatten(1)
        scores = self._score(self._backbone.encode(self._inputs(examples.observation)), bins_BK, None)
        real_BH = examples.mask_BH[:, : self.horizon].to(self.device)
        weight_BK = (real_BH[..., None] & bins.varies_A).flatten(1).to(scores.log_probs_NK.dtype)
        total = weight_BK.sum().clamp(min=1)
        value = -(scores.log_probs_NK * weight_BK).sum() / total
        accuracy = (scores.correct_NK * weight_BK).sum() / total
        return Loss(value, {"cross_entropy": value.detach(), "token_accuracy": accuracy})

    def example_observation(self, batch_size: int) -> Observation:
        generator = torch.Generator().manual_seed(batch_size)
        size = getattr(getattr(self.model.config, "vision_config", None), "image_size", None) or 56
        images = {
            camera: torch.randint(0, 256, (batch_size, size, size, 3), generator=generator, dtype=torch.uint8)
            for camera in self.config.cameras
        }
        state_low = None if self.statistics is None else self.statistics.state_q01
        state = None if state_low is None else torch.rand(batch_size, len(state_low), generator=generator)
        words = sorted(word for word in self._tokenizer.get_vocab() if word.isalpha())[:8] or ["move"]
        sentences = tuple(" ".join(words[: 1 + i % len(words)]) for i in range(batch_size))
        return Observation(images, state, sentences, torch.arange(batch_size) % 7)
