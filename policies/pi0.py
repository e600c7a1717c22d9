"""pi0: a flow-matching vision-language-action policy, around transformers' own ``PI0ForConditionalGeneration``.

A decision denoises a chunk of actions from noise in a few steps. Drawing some of those steps at random gives it a likelihood:
Flow-SDE (the reverse SDE of Flow-GRPO) or Flow-Noise (a learned standard deviation), both as in pi_RL (Chen et al. 2025,
"pi_RL: Online RL fine-tuning for flow-based vision-language-action models"), or CPS (coefficients-preserving sampling).

Departures from pi_RL, each the safer choice:
- The stochastic step k* is drawn for each sample, not once for the batch, from the sample's own random numbers.
- The critic computes the same function when acting, when training and when bootstrapping; its default input is the expert's state
  token, which sees image, text and state but, by pi0's attention mask, no noisy action: its value does not depend on the noise.
- The entropy of Flow-Noise is the mean over its steps, without the constant of the prior.
- ``step_reduction: mean_with_prior`` is pi_RL's 1/(K+1) of prior and steps; ``sum`` is the textbook joint log-likelihood.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmrl.errors import MMRLError
from mmrl.numerics import flow
from mmrl.numerics.draws import Draws
from mmrl.numerics.losses import Loss
from mmrl.types import Decision, Evaluation, Examples, Observation, Packing, Rollout
from policies.pi0_adapters.base import Adapter, Identity
from policies.pi0_parts.heads import NoiseHead
from policies.pi0_parts.options import Options
from policies.pi0_parts.prefix import Prefix, Tokenizer, encode, preprocess
from policies.pi0_parts.sampling import Sampler
from policies.pi0_parts.weights import Statistics, load_model, load_statistics, model_groups
from policies.shared.adapters import add_adapters, frozen_twin, merged
from policies.shared.checkpoints import load_heads, load_tokenizer, save_heads
from policies.shared.heads import TIME_FEATURES, CriticHead, time_features

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

# What a critic may look at, from the prefix [pooled: B, W], the expert's output [B, 1 + H, W] (state token first) and the inputs.
_CRITIC_FEATURES: dict[str, Callable[[Prefix, Tensor, Mapping[str, Tensor]], Tensor]] = {
    "prefix": lambda prefix, hidden, inputs: prefix.pooled,
    "state_token": lambda prefix, hidden, inputs: hidden[:, 0],
    "suffix": lambda prefix, hidden, inputs: hidden[:, 1:].mean(1),
    "time": lambda prefix, hidden, inputs: time_features(inputs["elapsed"]).to(hidden.dtype),
}


class Pi0(nn.Module):
    """See the module. Satisfies LikelihoodPolicy, ValuePolicy and SupervisedPolicy of mmrl.protocols."""

    Config = Options

    @staticmethod
    def lacks(config: Options) -> dict[str, tuple[str, str]]:
        """What a policy of this config cannot give an algorithm: need -> (field, why); see mmrl.config."""
        lacking = {}
        if config.sampler == "ode":
            lacking["likelihood"] = ("sampler", "is 'ode', which draws nothing at random; use 'flow_sde', 'flow_noise' or 'cps'")
        if config.critic is None:
            lacking["critic"] = ("critic", "is null; give the policy one, or use grpo")
        if config.adapter is not None and config.adapter.build().changes:
            why = "makes other numbers of the data's; leave statistics.json out, and training takes them from its first examples"
            lacking["statistics of data"] = ("adapter", why)
        return lacking

    def __init__(self, config: Options, *, device: torch.device) -> None:
        super().__init__()
        self.config, self.version = config, 0
        self.adapter: Adapter = Identity() if config.adapter is None else config.adapter.build()
        self.cameras = config.cameras or self.adapter.cameras
        dtype = _DTYPES[config.dtype]
        self.model = load_model(config.checkpoint, config.weights, dtype, config.attention, config.seed)
        self.statistics = load_statistics(config.checkpoint)
        tokenizer = (
            load_tokenizer(config.tokenizer, key="tokenizer")
            if config.tokenizer
            else load_tokenizer(config.checkpoint, remedy="; name one with policy.tokenizer")
        )
        self._hf_tokenizer, self._tokenizer = tokenizer, Tokenizer(tokenizer, config.max_text_tokens)
        self._arch: Any = (arch := self.model.config)
        self.horizon, self._padded_dim = arch.chunk_size, arch.max_action_dim
        self.execute = config.execute or self.horizon
        if self.statistics is None and config.action_dim is None:
            raise MMRLError(f"{config.checkpoint} has no statistics, so the action size is unknown: set policy.action_dim")
        self.action_dim = config.action_dim or len(self.statistics.actions_mean)  # type: ignore[union-attr]
        self._check_sizes()
        self._sampler = Sampler(
            rule=config.sampler,
            steps=config.denoising_steps,
            noise_level=config.noise_level,
            every_step=config.sampler == "flow_noise" or config.stochastic_steps == "all",
            last_step=config.noisy_last_step,
            granularity=config.granularity,
            step_reduction=config.step_reduction,
            execute=self.execute,
            action_dim=self.action_dim,
        )
        self._build_heads()
        self._choose_trainable()
        self.to(device)

    # -- building ------------------------------------------------------------------------------------------------------

    def _check_sizes(self) -> None:
        checkpoint, most = self.config.checkpoint, self._padded_dim
        if self.execute > self.horizon:
            raise MMRLError(f"policy.execute = {self.execute} is more than the {self.horizon} actions that {checkpoint} predicts")
        if self.statistics is not None and len(self.statistics.actions_mean) < most:
            most = len(self.statistics.actions_mean)
        if self.action_dim > most:
            raise MMRLError(f"policy.action_dim = {self.action_dim} is more than the {most} dimensions that {checkpoint} knows")

    def _build_heads(self) -> None:
        arch = self._arch
        width = arch.dit_config.hidden_size
        sizes = {"prefix": arch.vlm_config.text_config.hidden_size, "state_token": width, "suffix": width, "time": TIME_FEATURES}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed + 1)
            critic = self.config.critic
            self.critic = None if critic is None else CriticHead(sum(sizes[name] for name in critic.inputs), critic.hidden)
            # Always there, so that checkpoints of one policy fit every sampler; trained by flow_noise alone.
            self.noise_head = NoiseHead(width, self._padded_dim, self.config.noise_std_range)
        if self.config.weights == "pretrained":
            load_heads(self._heads(), self.config.checkpoint)
        for _, head in self._heads().values():
            head.to(torch.promote_types(self.model.dtype, torch.float32))

    def _heads(self) -> dict[str, tuple[str, nn.Module]]:
        """The heads in use, each with what it computes in words: a saved one is loaded where the words are the same."""
        heads: dict[str, tuple[str, nn.Module]] = {}
        if self.critic is not None:
            heads["critic"] = (f"value of {self._critic_words()}", self.critic)
        if self.config.sampler == "flow_noise":
            low, high = self.config.noise_std_range
            heads["noise_head"] = (f"standard deviation of {self._padded_dim} dimensions from {low} to {high}", self.noise_head)
        return heads

    def _critic_words(self) -> str:
        assert self.config.critic is not None
        return f"{'+'.join(self.config.critic.inputs)} through {'x'.join(map(str, self.config.critic.hidden))}"

    def _choose_trainable(self) -> None:
        model = self.model
        model.requires_grad_(self.config.train == "all")
        if self.config.train == "lora":
            lora = self.config.lora
            add_adapters(model, rank=lora.rank, alpha=lora.alpha, modules=lora.modules, seed=self.config.seed + 2)
        if self.config.train == "expert":
            model.model.dit.requires_grad_(True)
        for part in (model.embed_action_time, model.action_out_proj):
            part.requires_grad_(True)
        # pi0 never reads the expert's own token embedding.
        model.model.dit.get_input_embeddings().requires_grad_(False)
        self.noise_head.requires_grad_(self.config.sampler == "flow_noise")
        self._frozen_prefix = self.config.train == "expert"

    @property
    def device(self) -> torch.device:
        return self.model.action_out_proj.weight.device

    @property
    def has_critic(self) -> bool:
        return self.critic is not None

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        groups: dict[str, list[nn.Parameter]] = {
            **model_groups(self.model),
            "critic": [] if self.critic is None else list(self.critic.parameters()),
            "noise_head": [p for p in self.noise_head.parameters() if p.requires_grad],
        }
        return {name: parameters for name, parameters in groups.items() if parameters}

    def fingerprint(self) -> str:
        arch = self._arch
        shapes = sum(p.numel() for p in self.parameters())
        critic = "" if self.critic is None else f" critic={self._critic_words().replace(' ', '-')}"
        return (
            f"pi0 width={arch.dit_config.hidden_size} horizon={self.horizon} action_dim={self.action_dim} "
            f"train={self.config.train} parameters={shapes}{critic}"
        )

    @contextmanager
    def compute_mode(self, *, train: bool) -> Iterator[None]:
        """bf16 autocast on a GPU while the weights are float32; nothing else changes (pi0 has no dropout)."""
        autocast = self.device.type == "cuda" and self.config.dtype == "float32"
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast), torch.set_grad_enabled(train):
            yield

    def save(self, folder: Path) -> None:
        """A folder that ``checkpoint`` opens: transformers' format (adapters merged), tokenizer, statistics, heads in use."""
        model = merged(self.model) if self.config.train == "lora" else self.model
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        self._hf_tokenizer.save_pretrained(folder)
        if self.statistics is not None:
            self.statistics.dump(folder)
        save_heads(self._heads(), folder)

    # -- observation to network inputs ---------------------------------------------------------------------------------

    def needs_statistics(self) -> bool:
        return self.statistics is None

    def fit_statistics(self, examples: Examples) -> None:
        """Take state and action statistics from demonstrations; they are saved with the policy."""
        if examples.observation.state is None:
            raise MMRLError("pi0 needs the robot's state, but the examples have none")
        state_BS = self.adapter.state(examples.observation.state)
        actions_BHA = self.adapter.to_policy(examples.actions_BHA, examples.observation.state)
        if (found := actions_BHA.shape[2]) < self.action_dim:
            raise MMRLError(f"policy.action_dim = {self.action_dim}, but the examples' actions have {found} dimensions")
        self.statistics = Statistics.fit(state_BS, actions_BHA[examples.mask_BH])

    def get_extra_state(self) -> Tensor:
        """The statistics as json bytes: they belong to the weights, so a state dict carries them (no pickle)."""
        text = json.dumps(None if self.statistics is None else asdict(self.statistics))
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        raw = json.loads(bytes(state.tolist()))
        self.statistics = None if raw is None else Statistics(**{name: tuple(values) for name, values in raw.items()})

    def _normalize(self, x: Tensor, name: str) -> Tensor:
        x = x.to(self.device, torch.promote_types(self.model.dtype, torch.float32))
        if self.statistics is None:
            return x
        size = self.action_dim if name == "actions" else len(self.statistics.state_mean)
        if x.shape[-1] != size:
            raise MMRLError(f"{self.config.checkpoint} was trained with {size} numbers of {name}, but here are {x.shape[-1]}")
        mean, std = self.statistics.moments(name, size, like=x)
        return (x - mean) / std

    def _actions(self, x_BHD: Tensor) -> Tensor:
        """Denoised chunk [B, H, D] -> executed actions [B, C, A] in the checkpoint's units."""
        chunk = x_BHD[:, : self.execute, : self.action_dim]
        if self.statistics is None:
            return chunk
        mean, std = self.statistics.moments("actions", self.action_dim, like=chunk)
        return chunk * std + mean

    def _inputs(self, observation: Observation) -> dict[str, Tensor]:
        """Everything the network reads of an observation: pixels uint8, token ids, padded normalised state."""
        missing = [camera for camera in self.cameras if camera not in observation.images]
        if missing:
            raise MMRLError(f"policy.cameras names {missing[0]!r}, but the environment shows {sorted(observation.images)}")
        if observation.state is None:
            raise MMRLError("pi0 needs the robot's state, but the environment's observation has none")
        state = self._normalize(self.adapter.state(observation.state), "state")
        width = self._arch.max_state_dim
        if state.shape[1] > width:
            raise MMRLError(
                f"the environment's state has {state.shape[1]} numbers, but {self.config.checkpoint} takes at most {width}"
            )
        images = {f"image_{camera}": observation.images[camera].to(self.device) for camera in self.cameras}
        ids = self._tokenizer(observation.instructions, self.device)
        inputs = {**images, "token_ids": ids, "state": nn.functional.pad(state, (0, width - state.shape[1]))}
        return inputs if observation.elapsed_B is None else {**inputs, "elapsed": observation.elapsed_B.to(self.device)}

    def _encode(self, inputs: Mapping[str, Tensor]) -> Prefix:
        size = self._arch.vlm_config.vision_config.image_size
        dtype = self.model.dtype
        pixels = torch.stack([preprocess(inputs[f"image_{camera}"], size, dtype) for camera in self.cameras], 1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._frozen_prefix):
            return encode(self.model, pixels, inputs["token_ids"])

    def _expert(self, prefix: Prefix, state_BS: Tensor, x_BHD: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """One pass of the action expert over state and noisy chunk: velocity [B, H, D] and hidden states [B, 1 + H, W]."""
        dtype = self.model.dtype
        t_B = t_B.to(torch.promote_types(dtype, torch.float32))
        suffix = self.model.embed_action_time(state_BS.to(dtype), x_BHD.to(dtype), t_B)
        output = self.model.model(action_embeds=suffix, attention_mask=prefix.mask, past_key_values=prefix.cache())
        hidden = output.last_hidden_state
        velocity = self.model.action_out_proj(hidden[:, -self.horizon :])
        return velocity.to(x_BHD.dtype), hidden

    def _value(self, prefix: Prefix, hidden: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """``inputs``: of ``_inputs``, or a trace."""
        assert self.critic is not None and self.config.critic is not None
        if "time" in self.config.critic.inputs and "elapsed" not in inputs:
            raise MMRLError("policy.critic.inputs has 'time', but the observation does not say how many decisions were made")
        features = torch.cat([_CRITIC_FEATURES[name](prefix, hidden, inputs) for name in self.config.critic.inputs], -1)
        return self.critic(features.detach() if self.config.critic.detach else features)

    def _learned_std(self, hidden: Tensor) -> Tensor | None:
        return self.noise_head(hidden[:, -self.horizon :]) if self.config.sampler == "flow_noise" else None

    # -- acting ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, observation: Observation, draws: Draws, *, explore: bool) -> Decision:
        with self.compute_mode(train=False):
            inputs = self._inputs(observation)
            decision = self._denoise(inputs, self._encode(inputs), draws, explore=explore)
            assert observation.state is not None and isinstance(decision.action, Tensor)
            return replace(decision, action=self.adapter.to_simulator(decision.action, observation.state))

    def _denoise(self, inputs: Mapping[str, Tensor], prefix: Prefix, draws: Draws, *, explore: bool) -> Decision:
        batch, sampler = inputs["state"].shape[0], self._sampler
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        explore = explore and self.config.sampler != "ode"
        x = prior = draws.normal(self.horizon, self._padded_dim, dtype=dtype)
        chosen_BJ = sampler.choose(draws) if explore else torch.empty(batch, 0, dtype=torch.long, device=self.device)
        noise_BJHD = draws.normal(chosen_BJ.shape[1], *x.shape[1:], dtype=dtype)
        before, after = torch.zeros_like(noise_BJHD), torch.zeros_like(noise_BJHD)
        log_density = x.new_zeros((*chosen_BJ.shape, self.execute, self.action_dim))
        values = x.new_zeros(chosen_BJ.shape)
        for k in range(sampler.steps):
            step_B = torch.full((batch,), k, device=self.device)
            velocity, hidden = self._expert(prefix, inputs["state"], x, sampler.times(step_B, dtype)[0])
            x_next = sampler.follow(x, velocity, step_B)
            rows, columns = (chosen_BJ == k).nonzero(as_tuple=True)
            if len(rows):
                mean, std = sampler.transition(x, velocity, step_B, self._learned_std(hidden))
                x_next[rows] = mean[rows] + std[rows] * noise_BJHD[rows, columns]
                before[rows, columns], after[rows, columns] = x[rows], x_next[rows]
                log_density[rows, columns] = sampler.score(x_next, mean, std)[rows]
                if self.critic is not None:
                    values[rows, columns] = self._value(prefix, hidden, inputs)[rows].to(values.dtype)
            x = x_next
        log_probs = sampler.units(log_density, prior)
        trace = {"x_before": before, "x_after": after, "prior": prior, "step": chosen_BJ}
        encoded = prefix.trace() if self._keeps_prefix else {}
        kept = {k: v for k, v in inputs.items() if k in ("state", "elapsed") or not encoded} | encoded
        return Decision(
            action=self._actions(x),
            trace={**trace, **kept} if explore else {},
            log_probs_BK=log_probs,
            mask_BK=torch.ones_like(log_probs, dtype=torch.bool),
            values_BV=values.mean(1, keepdim=True) if explore and self.critic is not None else None,
            policy_version=self.version,
        )

    @property
    def _keeps_prefix(self) -> bool:
        return self._frozen_prefix and self.config.cache_prefix

    # -- scoring again -----------------------------------------------------------------------------------------------------

    def pack(self, rollout: Rollout) -> Packing:
        return rollout.by_decision()

    def evaluate(self, trace: Mapping[str, Tensor]) -> Evaluation:
        prefix = Prefix.from_trace(trace) if self._keeps_prefix else self._encode(trace)
        step_BJ = trace["step"]
        densities, values, entropies = [], [], []
        for j in range(step_BJ.shape[1]):
            x, step_B = trace["x_before"][:, j], step_BJ[:, j]
            velocity, hidden = self._expert(prefix, trace["state"], x, self._sampler.times(step_B, x.dtype)[0])
            mean, std = self._sampler.transition(x, velocity, step_B, self._learned_std(hidden))
            densities.append(self._sampler.score(trace["x_after"][:, j], mean, std))
            entropies.append(flow.gaussian_entropy(std[:, : self.execute, : self.action_dim]))
            if self.critic is not None:
                values.append(self._value(prefix, hidden, trace))
        log_probs = self._sampler.units(torch.stack(densities, 1), trace["prior"])
        # Per dimension: the mean over steps, actions and dimensions; constant (no gradient) but for flow_noise.
        entropy = torch.stack(entropies, 1).mean((1, 2, 3)).unsqueeze(1).expand_as(log_probs)
        return Evaluation(log_probs, entropy, torch.stack(values, 1).mean(1, keepdim=True) if values else None)

    @torch.no_grad()
    def value(self, observation: Observation, draws: Draws) -> Tensor:
        if self.critic is None or self.config.critic is None:
            raise MMRLError("the policy has no critic (policy.critic is null)")
        with self.compute_mode(train=False):
            inputs = self._inputs(observation)
            prefix = self._encode(inputs)
            if "suffix" in self.config.critic.inputs:
                decision = self._denoise(inputs, prefix, draws, explore=True)
                assert decision.values_BV is not None
                return decision.values_BV[:, 0]
            # Neither the prefix nor the state token sees the noisy actions: any chunk and time give the same value.
            batch = inputs["state"].shape[0]
            x = inputs["state"].new_zeros(batch, self.horizon, self._padded_dim)
            _, hidden = self._expert(prefix, inputs["state"], x, x.new_ones(batch))
            return self._value(prefix, hidden, inputs)

    def reference(self) -> Pi0:
        """A frozen twin; it shares the weights that do not learn."""
        return frozen_twin(self)

    # -- imitation ---------------------------------------------------------------------------------------------------------

    def supervised_weight(self, examples: Examples) -> Tensor:
        return examples.mask_BH.sum(1)

    def supervised_loss(self, examples: Examples, generator: torch.Generator) -> Loss:
        """Flow matching: || v(x_t, t) - (noise - actions) ||^2 averaged over real actions and dimensions, t as in openpi.

        t = 0.999 Beta(1.5, 1) + 0.001 with the numbers of the checkpoint's config; ``flow_samples`` draws share one prefix.
        """
        if self.statistics is None:
            raise MMRLError(f"{self.config.checkpoint} has no statistics: fit_statistics must see data before training")
        inputs = self._inputs(examples.observation)
        prefix, times = self._encode(inputs), self.config.flow_samples
        if times > 1:
            prefix = prefix.repeat(times)
        assert examples.observation.state is not None
        actions_BHA = self.adapter.to_policy(examples.actions_BHA[:, : self.horizon], examples.observation.state)
        self._check_actions(actions_BHA)
        actions = self._normalize(actions_BHA[..., : self.action_dim], "actions")
        actions = nn.functional.pad(actions, (0, self._padded_dim - self.action_dim)).repeat_interleave(times, 0)
        noise = torch.randn(actions.shape, generator=generator, device=self.device, dtype=actions.dtype)
        t_B = self._flow_times(actions.shape[0], generator, actions.dtype)
        x_t = flow.interpolate(actions, noise, t_B)
        velocity, _ = self._expert(prefix, inputs["state"].repeat_interleave(times, 0), x_t, t_B)
        error_BH = (velocity - (noise - actions))[..., : self.action_dim].pow(2).mean(-1)
        weight_BH = examples.mask_BH[:, : self.horizon].to(self.device).repeat_interleave(times, 0).to(error_BH.dtype)
        value = (error_BH * weight_BH).sum() / weight_BH.sum().clamp(min=1)
        return Loss(value, {"flow_matching": value.detach()})

    def _check_actions(self, actions_BHA: Tensor) -> None:
        """Where ``action_dim`` is below what the statistics know, the first dimensions are taken, but of the same actions."""
        found, known = actions_BHA.shape[2], len(self.statistics.actions_mean) if self.statistics else self.action_dim
        if found > known:
            raise MMRLError(
                f"{self.config.checkpoint} was trained with {known} numbers of actions, but the examples have {found}; name data "
                "of the same robot, or a checkpoint without statistics"
            )

    def _flow_times(self, batch: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        arch = self._arch
        if (beta := arch.time_sampling_beta_beta) != 1.0:
            raise MMRLError(f"{self.config.checkpoint}: config.json has time_sampling_beta_beta = {beta}, only 1.0 is supported")
        # Beta(alpha, 1) has the distribution function t^alpha, so it is drawn exactly, and from our generator, by inversion.
        uniform = torch.rand(batch, generator=generator, device=self.device, dtype=dtype)
        return uniform.pow(1 / arch.time_sampling_beta_alpha) * arch.time_sampling_scale + arch.time_sampling_offset

    def example_observation(self, batch_size: int) -> Observation:
        size = self._arch.vlm_config.vision_config.image_size
        generator = torch.Generator().manual_seed(batch_size)
        images = {
            camera: torch.randint(0, 256, (batch_size, size, size, 3), generator=generator, dtype=torch.uint8)
            for camera in self.cameras
        }
        width = len(self.statistics.state_mean) if self.statistics else self._arch.max_state_dim
        words = sorted(word for word in self._hf_tokenizer.get_vocab() if word.isalpha())[:8] or ["move"]
        sentences = tuple(" ".join(words[: 1 + i % len(words)]) for i in range(batch_size))
        elapsed_B = torch.arange(batch_size) % 7
        return Observation(images, self.adapter.example_state(width, batch_size, generator), sentences, elapsed_B)
