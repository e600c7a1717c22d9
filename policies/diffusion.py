"""Image generators as policies: diffusers' own pipelines (Stable Diffusion 3, FLUX, Sana, Qwen-Image) that learn from rewards.

The observation is a prompt (to edit: with a picture), the action a picture, and the units are the denoising steps that are drawn
at random: Flow-GRPO's SDE (arXiv 2505.05470), CPS (2509.05952), DanceGRPO's constant noise (2505.07818), or DDIM with noise for
networks that predict noise (DDPO, 2305.13301). Text encoding, latents, VAE and times are diffusers'; a family
(``diffusion_families``) says how a pipeline's parts are called.

Departures from the papers' programs, each the safer choice:
- Every random number of a picture comes from its own stream, so that a batch split differently gives the same pictures.
- The noise that a group shares (``trained_steps.shared_prefix``) comes from the prompt, the iteration and ``seed``.
- Pictures to imitate are encoded as the VAE's most likely latents, not as a draw of them, so that they can be kept.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmrl.columns import Column
from mmrl.errors import MMRLError
from mmrl.messages import Message, Picture
from mmrl.numerics.draws import Draws
from mmrl.protocols import Check
from mmrl.types import Decision, Evaluation, Loss, Observation, Packing, Rollout, Talks, Trace
from policies.diffusion_families import FAMILIES
from policies.diffusion_families.base import Family
from policies.diffusion_parts.checks import Trial, checks
from policies.diffusion_parts.disk import DiskCache
from policies.diffusion_parts.examples import example_conversations
from policies.diffusion_parts.guided import Guided
from policies.diffusion_parts.loading import lay_out, load_pipeline, pipeline_name, save_pipeline
from policies.diffusion_parts.options import Options
from policies.diffusion_parts.prompts import Embeddings, Kept, Prompt, drawn_in, prompts_of
from policies.diffusion_parts.sampling import Sampler, Walk
from policies.diffusion_parts.schedule import chosen_steps, possible_steps
from policies.shared.adapters import add_adapters, merged

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
_NUMBERS = itertools.count()
_OF_UNITS = ("x_before", "x_after", "step", "apart")  # what a trace holds of every unit
_SHARED = 7  # names the noise that a group shares, among the streams of a seed


class Diffusion(nn.Module):
    """See the module. Satisfies LikelihoodPolicy, SupervisedPolicy (of Talks), VelocityPolicy,
    SchedulingPolicy, AsyncPolicy and SelfCheckingPolicy of mmrl.protocols.

    The state dict is that of the network, and of text encoders that learn; other encoders and the VAE stay as they are.
    """

    Config = Options
    horizon, execute = 1, 1
    has_critic = False
    gives_means = True

    @staticmethod
    def lacks(config: Options) -> dict[str, tuple[str, str]]:
        """What a policy of this config cannot give an algorithm: need -> (field, why); see mmrl.config."""
        lacking = {"critic": ("target", "is policies.diffusion:Diffusion, which has no critic; use an algorithm that needs none")}
        if config.sampler == "ode":
            lacking["likelihood"] = ("sampler", "is 'ode', which draws nothing at random; use 'flow_sde', 'cps' or 'constant'")
        if config.reduction == "sum":
            lacking["means"] = ("reduction", "is 'sum', where a step's log-probability must be a mean; use 'mean'")
        return lacking

    def __init__(self, config: Options, *, device: torch.device) -> None:
        super().__init__()
        self.config, self.version, self.iteration = config, 0, 0
        self._number = next(_NUMBERS)  # of all policies of this process
        name = pipeline_name(config.checkpoint)
        if name not in FAMILIES:
            raise MMRLError(f"policy.checkpoint = {config.checkpoint}: is a {name}, not one of {', '.join(sorted(FAMILIES))}")
        pipeline = load_pipeline(config.checkpoint, config.weights, _DTYPES[config.dtype], config.seed)
        self.family: Family = FAMILIES[name](
            pipeline, height=config.height, width=config.width, max_text_tokens=config.max_text_tokens
        )
        if config.sampler not in self.family.schedule.rules:
            known = ", ".join(sorted(self.family.schedule.rules))
            raise MMRLError(f"policy.sampler = {config.sampler!r} is not for a {name}; use one of {known}")
        self._choose_trainable()
        self.network: nn.Module = self.family.network
        learning = config.train == "text_encoders"
        self.text_encoders = nn.ModuleDict(self.family.text_encoders() if learning else {})
        disk = None if config.prompt_cache is None else DiskCache(config.prompt_cache)
        self._embeddings = Embeddings(self.family, config.cached_prompts, learning=learning, disk=disk)
        self._latents = Kept(config.cached_pictures)
        self._sampler = Sampler(self.family.schedule, rule=config.sampler, level=config.noise_level, reduction=config.reduction)
        lay_out(pipeline.vae, torch.channels_last)
        pipeline.to(device)
        self.to(device)
        self._trained = [p for p in self.parameters() if p.requires_grad]
        self._joint: dict[Hashable, bool] = {}
        self.by_unit = not learning  # text encoders that learn are asked in every pass

    # -- building ------------------------------------------------------------------------------------------------------

    def _choose_trainable(self) -> None:
        config, family = self.config, self.family
        for part in family.pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        network = family.network
        if config.train == "lora":
            lora = config.lora
            add_adapters(network, rank=lora.rank, alpha=lora.alpha, modules=lora.modules, seed=config.seed + 2, whole=True)
        else:
            network.requires_grad_(True)
        if config.train == "text_encoders":
            for encoder in family.text_encoders().values():
                encoder.requires_grad_(True)
        if config.checkpointing:
            network.enable_gradient_checkpointing()

    def __deepcopy__(self, memo: dict[int, Any]) -> Diffusion:
        """A twin with what learns copied, while all that stays as it is belongs to both."""
        learning = {id(parameter) for parameter in self.parameters() if parameter.requires_grad}
        for thing in [*self.parameters(), *self._still(), self._latents, self.family.vae_alone]:
            if id(thing) not in learning:
                memo[id(thing)] = thing
        if self.config.train != "text_encoders":
            memo[id(self._embeddings)] = self._embeddings
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        for name, value in self.__dict__.items():
            twin.__dict__[name] = copy.deepcopy(value, memo)
        twin._number = next(_NUMBERS)
        return twin

    def _still(self) -> list[Any]:
        """The pipeline's parts that do not learn."""
        moving = {id(self.network), *(id(encoder) for encoder in self.text_encoders.values())}
        return [part for part in self.family.pipeline.components.values() if id(part) not in moving]

    # -- what it is ----------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def _dtype(self) -> torch.dtype:
        return _DTYPES[self.config.dtype]

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        """``embedding``: what lies before and behind the network's blocks, which Muon is not for."""
        blocks = {
            id(p) for part in self.network.modules() if isinstance(part, nn.ModuleList) for p in part.parameters() if p.ndim
        }
        trained = [p for p in self.network.parameters() if p.requires_grad]
        groups = {
            "actor": [p for p in trained if id(p) in blocks],
            "embedding": [p for p in trained if id(p) not in blocks],
            "text_encoders": [p for p in self.text_encoders.parameters() if p.requires_grad],
        }
        return {name: parameters for name, parameters in groups.items() if parameters}

    def fingerprint(self) -> str:
        family = self.family
        return (
            f"diffusion {type(family.pipeline).__name__} {family.height}x{family.width} train={self.config.train} "
            f"parameters={sum(p.numel() for p in self.parameters())}"
        )

    @contextmanager
    def compute_mode(self, *, train: bool) -> Iterator[None]:
        """bf16 autocast on a GPU while the weights are float32; no dropout, in training neither."""
        autocast = self.device.type == "cuda" and self.config.dtype == "float32"
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast), torch.set_grad_enabled(train):
            yield

    def train(self, mode: bool = True) -> Diffusion:
        """Modes change nothing: with dropout a decision could not be scored again."""
        return self

    def at_iteration(self, iteration: int) -> None:
        """Which iteration of training begins: windows of trained steps move with it."""
        self.iteration = iteration

    def reference(self) -> Diffusion:
        """A frozen twin; with adapters it holds a copy of these alone."""
        return copy.deepcopy(self).requires_grad_(False)

    def save(self, folder: Path) -> None:
        """A folder that ``checkpoint`` and diffusers' ``DiffusionPipeline.from_pretrained`` open; adapters are merged."""
        folder.mkdir(parents=True, exist_ok=True)
        pipeline, name = self.family.pipeline, self.family.network_name
        try:
            if self.config.train == "lora":
                setattr(pipeline, name, merged(self.network))
            lay_out(pipeline.vae, torch.contiguous_format)
            save_pipeline(pipeline, folder)
        finally:
            setattr(pipeline, name, self.network)
            lay_out(pipeline.vae, torch.channels_last)

    def needs_statistics(self) -> bool:
        return False

    def fit_statistics(self, examples: Any) -> None:
        """There is nothing to fit."""

    # -- acting --------------------------------------------------------------------------------------------------------

    def act(self, observation: Observation, draws: Draws, *, explore: bool) -> Decision:
        """Without exploration by the steps, guidance and sampler of evaluation, where by default every step follows the ODE."""
        return self.begin_act(observation, draws, explore=explore)()

    @torch.no_grad()
    def begin_act(self, observation: Observation, draws: Draws, *, explore: bool) -> Callable[[], Decision]:
        """The latents are there when it returns; what is left is to decode them."""
        if observation.conversations is None:
            raise MMRLError("policy diffusion draws what a conversation asks for, but the environment shows none")
        prompts = prompts_of(observation.conversations)
        with self.compute_mode(train=False):
            walk, chosen = self._explore(prompts, draws) if explore else (self._evaluated(prompts, draws), [])
            # Whatever a graphics card has to do is asked for here, but for the decoding, which then comes in its turn.
            undrawn = self._decision(Column.of(prompts), prompts, walk, chosen, explore=explore)
        return lambda: replace(undrawn, action=self._drawn(walk.clean))

    def _drawn(self, latents: Tensor) -> Column:
        """What it answers: a message with a picture for each row."""
        with self.compute_mode(train=False):
            return Column.of([Message("assistant", (picture,)) for picture in self.pictures(latents)])

    def _noise(self, draws: Draws) -> Tensor:
        kind = torch.promote_types(self._dtype, torch.float32)
        return draws.normal(*self.family.latent_shape, dtype=kind).to(self._dtype)

    def _evaluated(self, prompts: Sequence[Prompt], draws: Draws) -> Walk:
        config = self.config
        steps, scale = config.evaluation_steps or config.steps, config.evaluation_guidance
        guided = self._guided(prompts, config.guidance if scale is None else scale)
        chosen = possible_steps(config.trained_steps, steps) if config.evaluation_sampler == "rollout" else ()
        walk = self._sampler.walk(guided, self._noise(draws), self.family.schedule.grid(steps), draws, chosen)
        return Walk(walk.clean, [], [], [], [])  # nothing is learned from it

    def _explore(self, prompts: Sequence[Prompt], draws: Draws) -> tuple[Walk, list[int]]:
        config, chosen = self.config, self.chosen_steps()
        grid, guided = self.family.schedule.grid(config.steps), self._guided(prompts, config.guidance)
        if not config.trained_steps.shared_prefix:
            return self._sampler.walk(guided, self._noise(draws), grid, draws, chosen), chosen
        numbers = list(dict.fromkeys(prompt.number for prompt in prompts))
        prompt_B = torch.tensor([numbers.index(prompt.number) for prompt in prompts], device=self.device)
        iteration = (self.iteration, self.version)
        shared = Draws.of(config.seed, torch.tensor(numbers, device=self.device), *iteration, _SHARED)
        noise_P = self._noise(shared)
        return self._sampler.walk_from_one_point(guided, noise_P, prompt_B, grid, draws, chosen), chosen

    def chosen_steps(self) -> list[int]:
        """The denoising steps that are drawn at random and trained in this iteration."""
        config = self.config
        if config.sampler == "ode":
            return []
        return chosen_steps(config.trained_steps, config.steps, self.iteration, config.seed)

    def _decision(
        self, action: Column, prompts: Sequence[Prompt], walk: Walk, chosen: Sequence[int], *, explore: bool
    ) -> Decision:
        trace: dict[str, Tensor | Column] = {"clean": walk.clean, "prompt": Column.of(prompts, self.device)}
        if not walk.units:  # one unit that nothing can change: what is learned from such pictures needs no likelihood
            nothing = torch.zeros(len(prompts), 1, device=self.device)
            return Decision(action, trace if explore else {}, nothing, nothing == 0, None, self.version)
        step_BK = torch.tensor(chosen, device=self.device).expand(len(prompts), -1)
        states = {"x_before": torch.stack(walk.before, 1), "x_after": torch.stack(walk.after, 1), "step": step_BK}
        if walk.apart:
            states |= {"apart": torch.stack(walk.apart, 1), "weights": torch.full_like(step_BK[:, 0], self._weights())}
        return Decision(
            action,
            {**states, **trace},
            torch.stack([unit.log_prob_N for unit in walk.units], 1),
            torch.stack([unit.std_N > 0 for unit in walk.units], 1),
            None,
            self.version,
            torch.stack([unit.mean_ND for unit in walk.units], 1),
        )

    def _weights(self) -> int:
        """A number that stands for the weights as they are: no other policy has it, nor this one when they have changed."""
        trained = [(p.data_ptr(), p._version) for p in self._trained]
        return hash((self._number, self.version, *trained))

    def _guided(self, prompts: Sequence[Prompt], scale: float) -> Guided:
        detached = self.config.guidance_detached
        return Guided(self.family, self._embeddings, prompts, scale, detached=detached, joint=self._joint)

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> list[Picture]:
        """What the VAE makes of latents [B, ...], a few at a time."""
        processor = self.family.pipeline.image_processor
        pieces = [self.family.decode(piece) for piece in latents.split(self.config.decode_batch)]
        return [Picture(image) for piece in pieces for image in processor.postprocess(piece.float(), output_type="pil")]

    # -- scoring again -------------------------------------------------------------------------------------------------

    def pack(self, rollout: Rollout) -> Packing:
        return rollout.by_decision()

    def units(self, trace: Trace, piece: slice) -> Trace:
        return {name: values[:, piece] if name in _OF_UNITS else values for name, values in trace.items()}

    def evaluate(self, trace: Trace) -> Evaluation:
        """One pass for each trained step, with the guidance of the rollout.

        The branch without prompt, where it is detached, says what it said in the rollout as long as the weights are those.

        The entropy is that of a number of the latents (or of all, with ``reduction: sum``), and has no gradient.
        """
        clean = _tensor(trace, "clean")
        if "step" not in trace:
            nothing = torch.zeros(len(clean), 1, device=clean.device)
            return Evaluation(nothing, nothing, None)
        before, after, step_NK = (_tensor(trace, name) for name in ("x_before", "x_after", "step"))
        guided = self._guided(_prompts(trace), self.config.guidance)
        grid = self.family.schedule.grid(self.config.steps)
        same = "weights" in trace and bool((_tensor(trace, "weights") == self._weights()).all())
        units = [
            self._sampler.score(
                guided, before[:, k], after[:, k], grid, step_NK[:, k], _tensor(trace, "apart")[:, k] if same else None
            )
            for k in range(step_NK.shape[1])
        ]
        log_probs, means, stds, deltas = (torch.stack(parts, 1) for parts in zip(*units, strict=True))
        return Evaluation(log_probs, self._sampler.entropy(stds, means.shape[2]), None, means, stds, deltas)

    # -- what it says of the flow ------------------------------------------------------------------------------------------

    def clean(self, trace: Trace) -> Tensor:
        return _tensor(trace, "clean").detach()

    def velocity(self, trace: Trace, x_t: Tensor, t_N: Tensor, *, guidance: float | None = None) -> Tensor:
        """guidance: None and 1: the conditional branch alone; for None a distilled network is told ``guidance`` of the config."""
        scale = 1.0 if guidance is None else guidance
        if self.family.distilled and guidance is None:
            scale = self.config.guidance
        guided = self._guided(_prompts(trace), scale)
        return self.family.schedule.velocity(lambda x, time: guided(x, time, None), x_t, t_N)

    @torch.no_grad()
    def examine(self, talks: Talks) -> Trace:
        prompts = prompts_of(talks.conversations)
        with self.compute_mode(train=False):
            return {"clean": self._encoded(talks), "prompt": Column.of(prompts, self.device)}

    @torch.no_grad()
    def _encoded(self, talks: Talks) -> Tensor:
        """The latents of what the assistant shows, [B, ...], in full precision."""
        shown = [drawn_in(talk) for talk in talks.conversations]
        found = {picture.key: self._latents.get(picture.key) for picture in shown}
        missing = list({picture.key: picture for picture in shown if found[picture.key] is None}.values())
        family, size = self.family, self.config.decode_batch
        for first in range(0, len(missing), size):
            images = [picture.image for picture in missing[first : first + size]]
            pixels = family.pipeline.image_processor.preprocess(images, family.height, family.width).to(self.device)
            with torch.autocast(self.device.type, enabled=False):
                latents = family.encode_pixels(pixels).to(self._dtype)
            for picture, latent in zip(missing[first : first + size], latents, strict=True):
                found[picture.key] = self._latents.put(picture.key, latent)
        return torch.stack([found[picture.key] for picture in shown])

    # -- imitation -----------------------------------------------------------------------------------------------------

    def supervised_weight(self, examples: Talks) -> Tensor:
        return torch.ones(len(examples))

    def supervised_loss(self, examples: Talks, generator: torch.Generator) -> Loss:
        """Flow matching: || v(x_t, t) - (noise - x0) ||^2, the mean over a picture's latents and over pictures.

        Networks that predict noise are trained on that: || e(x_t, t) - noise ||^2 (DDPM, arXiv 2006.11239).
        """
        kind, size = torch.promote_types(self._dtype, torch.float32), len(examples)
        clean = self._encoded(examples).to(kind)
        noise = torch.randn(clean.shape, generator=generator, device=self.device, dtype=kind)
        normal_N = torch.randn(size, generator=generator, device=self.device, dtype=kind)
        drop_N = torch.rand(size, generator=generator, device=self.device) < self.config.prompt_dropout
        logit_normal = self.config.flow_times == "logit_normal"
        noised = self.family.schedule.noised(clean, noise, normal_N, logit_normal=logit_normal)
        scale = self.config.guidance if self.family.distilled else 1.0
        prompts = prompts_of(examples.conversations)
        guided = Guided(self.family, self._embeddings, prompts, scale, detached=False, drop_N=drop_N)
        said = guided(noised.x.to(self._dtype), noised.time, None)
        error_N = (said.to(kind) - noised.target).pow(2).flatten(1).mean(1)
        return Loss(error_N.mean(), {"flow_matching": error_N.mean().detach()})

    def checks(self) -> Iterator[Check]:
        return checks(Trial(self, self._sampler, self._embeddings, self._noise))

    def example_observation(self, batch_size: int) -> Observation:
        talks = example_conversations(batch_size, self.family)
        return Observation({}, None, tuple(talk[-1].text for talk in talks), conversations=talks)


def _tensor(trace: Mapping[str, Tensor | Column], name: str) -> Tensor:
    value = trace[name]
    assert isinstance(value, Tensor)
    return value


def _prompts(trace: Mapping[str, Tensor | Column]) -> list[Prompt]:
    column = trace["prompt"]
    assert isinstance(column, Column)
    return column.tolist()
