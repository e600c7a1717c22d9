"""A multi-layer perceptron over the state: Gaussian or categorical actions, with a critic. The classic PPO policy.

Sizes, initialisation (orthogonal, gain sqrt 2 in hidden layers, 0.01 before the actions, 1 before the value; zero biases), the
state-independent standard deviation and the treatment of bounds (the environment clips, the log-probability is of what was drawn)
are those of CleanRL's ppo.py and ppo_continuous_action.py (Huang et al. 2022, JMLR 23).

Departure from CleanRL: running statistics of the states move between rollouts, not while one is collected, so that a decision
scored again has the log-probability it was drawn with; and the critic reads the same statistics.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmrl.errors import MMRLError
from mmrl.numerics.draws import Draws
from mmrl.numerics.flow import gaussian_entropy, gaussian_log_prob
from mmrl.numerics.losses import Loss
from mmrl.numerics.tokens import token_entropy, token_log_probs
from mmrl.types import Decision, Evaluation, Examples, Observation, Packing, Rollout

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}
_LARGEST_INPUT = 10.0  # standard deviations, as CleanRL bounds normalised observations
_FREE = ("checkpoint", "seed", "log_std")  # fields that a saved policy does not fix
Count = Annotated[int, Field(ge=1)]
Choices = Annotated[int, Field(ge=2)]


class MLP(nn.Module):
    """See the module. Satisfies LikelihoodPolicy, ValuePolicy, SupervisedPolicy and AdaptivePolicy of mmrl.protocols.

    A decision is one action (C = 1) and one unit of log-probability (K = 1): the sum over the action's dimensions.
    """

    @dataclass(frozen=True, config=ConfigDict(extra="forbid"))
    class Config:
        """Fields of a ``policies.mlp:MLP`` block."""

        state_dim: Count
        """Numbers in the state (S)."""
        action_dim: Count | None = None
        """Gaussian actions: numbers in one (A). Give this or ``choices``."""
        choices: tuple[Choices, ...] | None = None
        """Categorical actions: how many choices each of its A components has, such as [2] for CartPole."""
        hidden: tuple[Count, ...] = (64, 64)
        """Widths of the hidden layers, of actor and critic alike."""
        activation: Literal["tanh", "relu"] = "tanh"
        """What follows each hidden layer."""
        critic: Literal["separate", "shared"] | None = "separate"
        """The critic has hidden layers of its own, shares the actor's, or is not there (null)."""
        log_std: float = 0.0
        """Gaussian actions: where the logarithm of the standard deviations starts; they are learned, and alike in every state."""
        normalize: bool = False
        """Whether states are standardised by their running mean and variance, and cut at ten standard deviations."""
        checkpoint: str | None = None
        """Folder that ``save`` wrote, to start from; null: random weights."""
        seed: int = 0
        """Seed of random weights."""

        @model_validator(mode="after")
        def _one_kind(self) -> MLP.Config:
            if (self.action_dim is None) == (self.choices is None):
                raise ValueError("give either action_dim (Gaussian actions) or choices (categorical ones), not both or neither")
            if self.choices is not None and not self.choices:
                raise ValueError("choices is empty; name the number of choices of each component, such as [2]")
            if self.choices is not None and self.log_std != 0:
                raise ValueError("log_std is not used by categorical actions; remove it")
            return self

    @staticmethod
    def lacks(config: Config) -> dict[str, tuple[str, str]]:
        """What a policy of this config cannot give an algorithm: need -> (field, why); see mmrl.config."""
        return {} if config.critic else {"critic": ("critic", "is null; use 'separate' or 'shared', or grpo")}

    def __init__(self, config: Config, *, device: torch.device) -> None:
        super().__init__()
        self.config, self.version = config, 0
        self.horizon = self.execute = 1
        sizes = (config.state_dim, *config.hidden)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.trunk = _layers(sizes, config.activation)
            self.actions: _Gaussian | _Categorical = (
                _Categorical(sizes[-1], config.choices)
                if config.choices is not None
                else _Gaussian(sizes[-1], config.action_dim or 0, config.log_std)
            )
            self.critic_trunk = _layers(sizes, config.activation) if config.critic == "separate" else None
            self.critic = _linear(sizes[-1], 1, gain=1.0) if config.critic else None
        self.moments = _RunningMoments(config.state_dim) if config.normalize else None
        if config.checkpoint is not None:
            self._load(Path(config.checkpoint))
        self.to(device)

    # -- what it is ----------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def has_critic(self) -> bool:
        return self.critic is not None

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        actor = [*self.trunk.parameters(), *self.actions.parameters()]
        critic = [p for part in (self.critic_trunk, self.critic) if part is not None for p in part.parameters()]
        return {"actor": actor, "critic": critic} if critic else {"actor": actor}

    def fingerprint(self) -> str:
        return "mlp " + " ".join(f"{name}={_word(value)}" for name, value in _architecture(self.config).items())

    @contextmanager
    def compute_mode(self, *, train: bool) -> Iterator[None]:
        """Nothing but gradients on or off: too small for autocast to pay, and without dropout."""
        with torch.set_grad_enabled(train):
            yield

    def save(self, folder: Path) -> None:
        """A folder that ``checkpoint`` opens: weights and statistics, and the fields they belong to."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(_architecture(self.config), indent=1) + "\n")

    def _load(self, folder: Path) -> None:
        try:
            saved: Any = json.loads((folder / CONFIG_FILE).read_text())
            for name, value in _architecture(self.config).items():
                if saved[name] != value:
                    raise MMRLError(f"policy.{name} is {value!r}, but {folder} was saved with {saved[name]!r}; use that")
            self.load_state_dict(load_file(folder / WEIGHTS_FILE))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise MMRLError(f"policy.checkpoint = {folder}: cannot be loaded as an MLP ({reason})") from error

    def example_observation(self, batch_size: int) -> Observation:
        generator = torch.Generator().manual_seed(batch_size)
        return Observation({}, torch.randn(batch_size, self.config.state_dim, generator=generator), ("act",) * batch_size)

    # -- acting --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, observation: Observation, draws: Draws, *, explore: bool) -> Decision:
        state_BS = self._state(observation)
        output, values_B = self._forward(state_BS, critic=explore)
        action_BA = self.actions.draw(output, draws) if explore else self.actions.mode(output)
        log_probs_BK = self.actions.log_prob(output, action_BA)[:, None]
        return Decision(
            action=action_BA[:, None].to(state_BS.dtype),
            trace={"state": state_BS, "action": action_BA} if explore else {},
            log_probs_BK=log_probs_BK,
            mask_BK=torch.ones_like(log_probs_BK, dtype=torch.bool),
            values_BV=None if values_B is None else values_B[:, None],
            policy_version=self.version,
        )

    @torch.no_grad()
    def value(self, observation: Observation, draws: Draws) -> Tensor:
        values_B = self._forward(self._state(observation), critic=True)[1]
        if values_B is None:
            raise MMRLError("the policy has no critic (policy.critic is null)")
        return values_B

    # -- scoring again -------------------------------------------------------------------------------------------------

    def pack(self, rollout: Rollout) -> Packing:
        return rollout.by_decision()

    def evaluate(self, trace: Mapping[str, Tensor]) -> Evaluation:
        output, values_N = self._forward(trace["state"], critic=True)
        log_probs_N = self.actions.log_prob(output, trace["action"])
        return Evaluation(
            log_probs_N[:, None], self.actions.entropy(output)[:, None], None if values_N is None else values_N[:, None]
        )

    def reference(self) -> MLP:
        return copy.deepcopy(self).requires_grad_(False)

    # -- learning apart from rollouts' gradients -----------------------------------------------------------------------

    def adapt(self, trace: Mapping[str, Tensor]) -> None:
        if self.moments is not None:
            self.moments.update(trace["state"])

    def needs_statistics(self) -> bool:
        return self.moments is not None and not bool(self.moments.count)

    def fit_statistics(self, examples: Examples) -> None:
        if self.moments is not None:
            self.moments.update(self._state(examples.observation))

    def supervised_weight(self, examples: Examples) -> Tensor:
        return examples.mask_BH.sum(1)

    def supervised_loss(self, examples: Examples, generator: torch.Generator) -> Loss:
        """Behaviour cloning: the mean of -log p(action | state) over the examples whose first action is real."""
        output, _ = self._forward(self._state(examples.observation), critic=False)
        action_BA = examples.actions_BHA[:, 0].to(self.device)
        if action_BA.shape[1] != self.actions.dim:
            raise MMRLError(f"the policy's actions have {self.actions.dim} numbers, but the examples' have {action_BA.shape[1]}")
        real_B = examples.mask_BH[:, 0].to(self.device, action_BA.dtype)
        surprise_B = -self.actions.log_prob(output, action_BA.to(self.actions.dtype))
        value = (surprise_B * real_B).sum() / real_B.sum().clamp(min=1)
        return Loss(value, {"negative_log_likelihood": value.detach()})

    # -- inside --------------------------------------------------------------------------------------------------------

    def _state(self, observation: Observation) -> Tensor:
        if observation.state is None:
            raise MMRLError("an MLP needs a state, but the environment shows images only; use a policy that looks at them")
        found = observation.state.shape[1]
        if found != self.config.state_dim:
            raise MMRLError(f"policy.state_dim is {self.config.state_dim}, but the environment's state has {found} numbers")
        return observation.state.to(self.device, torch.float32)

    def _forward(self, state_BS: Tensor, *, critic: bool) -> tuple[Tensor, Tensor | None]:
        """What the distribution of actions needs, and the values [B] where ``critic`` and there is one."""
        inputs_BS = state_BS if self.moments is None else self.moments.standardize(state_BS)
        features_BW = self.trunk(inputs_BS)
        output = self.actions(features_BW)
        if self.critic is None or not critic:
            return output, None
        seen_BW = features_BW if self.critic_trunk is None else self.critic_trunk(inputs_BS)
        return output, self.critic(seen_BW).squeeze(-1)


class _Gaussian(nn.Module):
    """Independent normal actions; the standard deviations are parameters."""

    dtype = torch.float32

    def __init__(self, width: int, dim: int, log_std: float) -> None:
        super().__init__()
        self.dim = dim
        self.mean = _linear(width, dim, gain=0.01)
        self.log_std = nn.Parameter(torch.full((dim,), log_std))

    def forward(self, features_BW: Tensor) -> Tensor:
        return self.mean(features_BW)

    def draw(self, mean_BA: Tensor, draws: Draws) -> Tensor:
        return mean_BA + self.log_std.exp() * draws.normal(self.dim, dtype=mean_BA.dtype)

    def mode(self, mean_BA: Tensor) -> Tensor:
        return mean_BA

    def log_prob(self, mean_BA: Tensor, action_BA: Tensor) -> Tensor:
        return gaussian_log_prob(action_BA, mean_BA, self.log_std.exp().expand_as(mean_BA)).sum(1)

    def entropy(self, mean_BA: Tensor) -> Tensor:
        return gaussian_entropy(self.log_std.exp().expand_as(mean_BA)).sum(1)


class _Categorical(nn.Module):
    """Independent choices; components with fewer choices than the largest have logits of -inf."""

    dtype = torch.int64

    def __init__(self, width: int, choices: tuple[int, ...]) -> None:
        super().__init__()
        self.dim = len(choices)
        self.logits = _linear(width, self.dim * max(choices), gain=0.01)
        absent_AV = torch.arange(max(choices)) >= torch.tensor(choices)[:, None]
        self.register_buffer("absent_AV", absent_AV, persistent=False)

    def forward(self, features_BW: Tensor) -> Tensor:
        absent_AV: Any = self.absent_AV
        return self.logits(features_BW).unflatten(1, absent_AV.shape).masked_fill(absent_AV, -math.inf)

    def draw(self, logits_BAV: Tensor, draws: Draws) -> Tensor:
        return draws.categorical(logits_BAV)

    def mode(self, logits_BAV: Tensor) -> Tensor:
        return logits_BAV.argmax(-1)

    def log_prob(self, logits_BAV: Tensor, action_BA: Tensor) -> Tensor:
        return token_log_probs(logits_BAV, action_BA).sum(1)

    def entropy(self, logits_BAV: Tensor) -> Tensor:
        return token_entropy(logits_BAV).sum(1)


class _RunningMoments(nn.Module):
    """Mean and (population) variance of everything seen, merged batch by batch (Chan, Golub and LeVeque 1979)."""

    count: Tensor
    mean_S: Tensor
    var_S: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean_S", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("var_S", torch.ones(size, dtype=torch.float64))

    @torch.no_grad()
    def update(self, x_NS: Tensor) -> None:
        if not len(x_NS):
            return
        x_NS, n = x_NS.double(), len(x_NS)
        total, delta_S = self.count + n, x_NS.mean(0) - self.mean_S
        squares_S = self.var_S * self.count + x_NS.var(0, correction=0) * n + delta_S**2 * self.count * n / total
        self.mean_S += delta_S * n / total
        self.var_S.copy_(squares_S / total)
        self.count.copy_(total)

    def standardize(self, x_BS: Tensor) -> Tensor:
        scaled = (x_BS - self.mean_S) / (self.var_S + 1e-8).sqrt()
        return scaled.clamp(-_LARGEST_INPUT, _LARGEST_INPUT).to(x_BS.dtype)


def _linear(width_in: int, width_out: int, *, gain: float) -> nn.Linear:
    layer = nn.Linear(width_in, width_out)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def _layers(sizes: tuple[int, ...], activation: str) -> nn.Sequential:
    layers = (_linear(before, after, gain=math.sqrt(2)) for before, after in pairwise(sizes))
    return nn.Sequential(*(part for layer in layers for part in (layer, _ACTIVATIONS[activation]())))


def _architecture(config: MLP.Config) -> dict[str, Any]:
    """The fields that weights belong to, as json gives them back."""
    return json.loads(json.dumps({name: value for name, value in asdict(config).items() if name not in _FREE}))


def _word(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)
