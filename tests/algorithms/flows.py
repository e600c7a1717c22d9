"""A flow model of a few weights in float64, and a task of one decision: to aim at a point that the prompt names."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from safetensors.torch import save_file
from torch import Tensor, nn

from mmrl.messages import Message
from mmrl.numerics.draws import Draws
from mmrl.numerics.flow import gaussian_entropy, gaussian_log_prob, guarded_time, interpolate, time_grid, transition
from mmrl.transcripts import Question, Transcript, Turn
from mmrl.types import ActionSpec, Decision, Evaluation, Loss, Observation, Packing, Rollout, Step, Talks

S, D = 2, 3  # numbers of a prompt and of a "picture"
STRICT = ConfigDict(extra="forbid")


class Field(nn.Module):
    """v(x, t | prompt) = W [x, t, prompt] + b. Units are all steps but the last."""

    horizon = execute = 1
    has_critic = False
    gives_means = True

    @dataclass(frozen=True, config=STRICT)
    class Config:
        sampler: Literal["flow_sde", "cps", "ode"] = "flow_sde"
        steps: int = 4
        noise_level: float = 0.6
        seed: int = 3
        checkpoint: str | None = None

    @staticmethod
    def lacks(config: Config) -> dict[str, tuple[str, str]]:
        return {"likelihood": ("sampler", "is 'ode'; use 'flow_sde'")} if config.sampler == "ode" else {}

    def __init__(self, config: Config | None = None, *, device: torch.device | None = None) -> None:
        super().__init__()
        self.config, self.version, self.told = config or self.Config(), 0, list[int]()
        generator = torch.Generator().manual_seed(self.config.seed)
        self.net = nn.Linear(D + 1 + S, D, dtype=torch.float64)
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def velocity(self, trace: Mapping[str, Any], x_t: Tensor, t_N: Tensor, *, guidance: float | None = None) -> Tensor:
        def branch(prompt: Tensor) -> Tensor:
            return self.net(torch.cat([x_t.double(), t_N.double()[:, None], prompt], 1))

        v = branch(trace["prompt"])
        if guidance in (None, 1):
            return v
        free = branch(torch.zeros_like(trace["prompt"]))
        return free + guidance * (v - free)

    def clean(self, trace: Mapping[str, Any]) -> Tensor:
        return trace["clean"]

    def examine(self, talks: Talks) -> dict[str, Tensor]:
        """The prompt's and the picture's numbers are what is said."""
        prompt, clean = ([[float(word) for word in talk[i].text.split()] for talk in talks.conversations] for i in (0, 1))
        return {"prompt": torch.tensor(prompt, dtype=torch.float64), "clean": torch.tensor(clean, dtype=torch.float64)}

    def at_iteration(self, iteration: int) -> None:
        self.told.append(iteration)

    def _grid(self) -> Tensor:
        return time_grid(self.config.steps, dtype=torch.float64)

    def _step(self, trace: Mapping[str, Any], x: Tensor, t: Tensor, t_next: Tensor, rule: str) -> Any:
        level = None if rule == "ode" else self.config.noise_level
        return transition(x, self.velocity(trace, x, t), t, t_next, rule=rule, noise_level=level, t_star=guarded_time(t, t_next))

    @torch.no_grad()
    def act(self, observation: Observation, draws: Draws, *, explore: bool) -> Decision:
        assert observation.state is not None
        trace: dict[str, Any] = {"prompt": observation.state.double()}
        rule, x, n = self.config.sampler if explore else "ode", draws.normal(D, dtype=torch.float64), len(draws)
        before, after, means = [], [], []
        for k, (t, t_next) in enumerate(pairwise(self._grid())):
            noisy = rule != "ode" and k < self.config.steps - 1
            step = self._step(trace, x, t.expand(n), t_next.expand(n), rule if noisy else "ode")
            drawn = step.mean + step.std * draws.normal(D, dtype=torch.float64)
            if noisy:
                before, after, means = [*before, x], [*after, drawn], [*means, step.mean]
            x = drawn
        trace["clean"] = x
        if not before:
            nothing = torch.zeros(n, 0, dtype=torch.float64)
            return Decision(x[:, None], trace, nothing, nothing == 0, None, self.version)
        trace |= {"before": torch.stack(before, 1), "after": torch.stack(after, 1)}
        log_probs_BK = self.evaluate(trace).log_probs_NK
        means_BKD = torch.stack(means, 1)
        return Decision(x[:, None], trace, log_probs_BK, torch.ones_like(log_probs_BK).bool(), None, self.version, means_BKD)

    def pack(self, rollout: Rollout) -> Packing:
        return rollout.by_decision()

    def evaluate(self, trace: Mapping[str, Any]) -> Evaluation:
        grid, n = self._grid(), len(trace["before"])
        steps = [
            self._step(trace, trace["before"][:, k], grid[k].expand(n), grid[k + 1].expand(n), self.config.sampler)
            for k in range(self.config.steps - 1)
        ]
        mean = torch.stack([step.mean for step in steps], 1)
        std = torch.stack([step.std.expand(n, 1) for step in steps], 1)
        log_probs_NK = gaussian_log_prob(trace["after"], mean, std).mean(-1)
        deltas_NK = (grid[:-2] - grid[1:-1]).expand(n, -1)
        return Evaluation(log_probs_NK, gaussian_entropy(std[..., 0]), None, mean, std[..., 0], deltas_NK)

    def reference(self) -> Field:
        return copy.deepcopy(self).requires_grad_(False)

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        return {"actor": list(self.parameters())}

    def needs_statistics(self) -> bool:
        return False

    def fit_statistics(self, examples: Any) -> None: ...

    def supervised_weight(self, examples: Talks) -> Tensor:
        return torch.ones(len(examples))

    def supervised_loss(self, examples: Talks, generator: torch.Generator) -> Loss:
        trace = self.examine(examples)
        noise = torch.randn(trace["clean"].shape, generator=generator, dtype=torch.float64)
        t_N = torch.rand(len(noise), generator=generator, dtype=torch.float64)
        v = self.velocity(trace, interpolate(trace["clean"], noise, t_N), t_N)
        return Loss((v - (noise - trace["clean"])).pow(2).mean())

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(self.state_dict()), folder / "model.safetensors")

    def fingerprint(self) -> str:
        return "field"

    @contextmanager
    def compute_mode(self, *, train: bool) -> Any:
        with torch.set_grad_enabled(train):
            yield

    def example_observation(self, batch_size: int) -> Observation:
        return Observation({}, torch.randn(batch_size, S), ("aim",) * batch_size)


class Aim:
    """One step: the reward is minus the squared distance from where the prompt points."""

    max_steps = 1
    action_spec = ActionSpec(D, (-9.0,) * D, (9.0,) * D)

    @dataclass(frozen=True, config=STRICT)
    class Config:
        pass

    def __init__(self, config: Config, *, num_envs: int, device: torch.device) -> None:
        self.num_envs, self.state = num_envs, torch.zeros(num_envs, S, dtype=torch.float64)

    def reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Observation:
        where_B = torch.ones_like(task_ids_B, dtype=torch.bool) if where_B is None else where_B
        self.state = torch.where(where_B[:, None], Draws.of(5, task_ids_B).normal(S, dtype=torch.float64), self.state)
        return Observation({}, self.state, ("aim",) * self.num_envs)

    def step(self, actions_BCA: Tensor) -> Step:
        goal = torch.cat([self.state, self.state.sum(1, keepdim=True)], 1)
        reward_B = -(actions_BCA[:, 0] - goal).pow(2).sum(1)
        yes = torch.ones(self.num_envs, dtype=torch.bool)
        success = {"success": (reward_B > -1).float()}
        observation = Observation({}, self.state, ("aim",) * self.num_envs)
        return Step(observation, reward_B[:, None], yes[:, None], yes, ~yes, success)

    def family_of(self, task_ids_M: Tensor) -> tuple[str, ...]:
        return ("aim",) * len(task_ids_M)

    def close(self) -> None: ...


class Prompted(Aim):
    """The same for three prompts that come again, and that are told."""

    def reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Observation:
        self.tasks = task_ids_B
        return super().reset(task_ids_B % 3, where_B)

    def transcript(self, slot: int) -> Transcript:
        question = Question("aim", (f"prompt {int(self.tasks[slot]) % 3}",), (), lambda answer: 0.0)
        turn = Turn(Message("assistant", ("there",)))
        return Transcript(int(self.tasks[slot]), question, (Message("user", question.parts),), (turn,), "", "answer")


class Examples:
    """Conversations that show where prompts point."""

    @dataclass(frozen=True, config=STRICT)
    class Config:
        seed: int = 1

    def __init__(self, config: Config, *, context: Any) -> None:
        self._seed, self._next = config.seed, torch.zeros((), dtype=torch.long)

    def batch(self, size: int) -> Talks:
        ids = self._next + torch.arange(size)
        self._next = self._next + size
        prompts = Draws.of(self._seed, ids).normal(S, dtype=torch.float64)
        return talks(prompts, torch.cat([prompts, prompts.sum(1, keepdim=True)], 1))

    def state_dict(self) -> dict[str, Tensor]:
        return {"next": self._next}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._next = state["next"]


def talks(prompts: Tensor, clean: Tensor) -> Talks:
    def said(numbers: Tensor) -> tuple[str]:
        return (" ".join(map(repr, numbers.tolist())),)

    return Talks(tuple((Message("user", said(a)), Message("assistant", said(b))) for a, b in zip(prompts, clean, strict=True)))
