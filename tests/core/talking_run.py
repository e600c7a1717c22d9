"""A run in which a policy talks that a test can afford: it chooses what to say from three lines, in tokens of four characters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from mmrl import component, config
from mmrl.columns import Column
from mmrl.messages import Message
from mmrl.numerics.draws import Draws
from mmrl.progress import Quiet
from mmrl.tool_use import ToolEnvironment
from mmrl.trainer import train
from mmrl.types import Conversation, Decision, Evaluation, Observation, Packing, Rollout
from tests.core import asking

STRICT = ConfigDict(extra="forbid")
TOKENS = 40  # of a message at most


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def lines(heard: Conversation) -> tuple[str, str, str]:
    """What there is to say: what helps, a guess, and a call that fails."""
    last, failing = heard[-1], call("fail", how="tool")
    if heard[1].pictures:
        return ("It is <b>red</b>" if last.role == "tool" else call("left_half", image=1)), "red", failing
    asked = heard[1].text.split()
    return (last.text if last.role == "tool" else call("add", a=int(asked[2]), b=1)), "0", failing


class Chooser(nn.Module):
    """The choice has a log-probability, which stands at the first token; the last token of a message is not trained."""

    @dataclass(frozen=True, config=STRICT)
    class Config:
        start: tuple[float, ...] = (1.0, 0.5, 0.0)

    def __init__(self, config: Config, *, device: torch.device) -> None:
        super().__init__()
        self.version = 0
        self.logits = nn.Parameter(torch.tensor(config.start, device=device))
        self.words: list[str] = ["<end>"]

    @torch.no_grad()
    def act(self, observation: Observation, draws: Draws, *, explore: bool) -> Decision:
        talks = observation.conversations or ()
        logits_BV = self.logits.expand(len(talks), -1)
        choice_B = draws.categorical(logits_BV).flatten() if explore else logits_BV.argmax(1)
        said = [self._say(lines(talk)[choice]) for talk, choice in zip(talks, choice_B.tolist(), strict=True)]
        counts_B1 = torch.tensor([[len(message.token_ids)] for message in said])
        mask_BK = torch.arange(TOKENS) < counts_B1 - 1
        return Decision(Column.of(said), {"choice": choice_B}, self._scored(choice_B), mask_BK, None, self.version)

    def _say(self, text: str) -> Message:
        pieces = [text[at : at + 4] for at in range(0, len(text), 4)]
        self.words += [piece for piece in dict.fromkeys(pieces) if piece not in self.words]
        return Message("assistant", (text,), token_ids=(*map(self.words.index, pieces), 0), finish="stop")

    def _scored(self, choice: Tensor) -> Tensor:
        """[..., TOKENS] of choices [...]."""
        log_probs = self.logits.log_softmax(0)[choice][..., None]
        return torch.cat([log_probs, log_probs.new_zeros(*choice.shape, TOKENS - 1)], -1)

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        return [self.words[token] for token in ids]

    def pack(self, rollout: Rollout) -> Packing:
        return rollout.by_episode()

    def evaluate(self, trace: Mapping[str, Any]) -> Evaluation:
        log_probs_NK = self._scored(trace["choice"]).flatten(1)
        return Evaluation(log_probs_NK, torch.zeros_like(log_probs_NK), None)

    def trainable(self) -> Mapping[str, list[nn.Parameter]]:
        return {"actor": list(self.parameters())}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "logits.txt").write_text(repr(self.logits.tolist()))

    def fingerprint(self) -> str:
        return "chooser"

    def compute_mode(self, *, train: bool) -> nullcontext[None]:
        return nullcontext()


class Mumbler(Chooser):
    """The same, but nobody can read its tokens."""

    token_texts: Any = None

    def act(self, observation: Observation, draws: Draws, *, explore: bool) -> Decision:
        decision = super().act(observation, draws, explore=explore)
        assert isinstance(decision.action, Column)
        unsaid = tuple(replace(message, token_ids=()) for message in decision.action.items)
        return replace(decision, action=replace(decision.action, items=unsaid))


class Sums(ToolEnvironment):
    """Sums with a calculator, or colours with a look at the left half; and a tool that fails."""

    @dataclass(frozen=True, config=STRICT)
    class Config:
        picture: bool = False
        examples: int = 0

    def __init__(self, config: Config, *, num_envs: int, device: torch.device) -> None:
        tools = (asking.add, asking.left_half, asking.fail)
        made = asking.environment(*tools, picture=config.picture, demonstrations=config.examples)
        super().__init__(made.config, num_envs=num_envs, device=device)


FAKES = {"fake:Chooser": Chooser, "fake:Mumbler": Mumbler, "fake:Sums": Sums}
REAL = component.resolve
RUN = """
name: talking
threads: 1
tensorboard: false
policy: {target: "fake:Chooser"}
environment: {target: "fake:Sums"}
evaluation: {episodes: 6, num_envs: 4, videos: 3}
stages:
  - name: improve
    algorithm: {target: "mmrl.algorithms.grpo:GRPO", group_size: 4}
    iterations: 5
    keep_every: 2
    collect: {num_envs: 16}
    optimizer: {lr: 0.1}
    rewards:
      - {target: "mmrl.rewards.answers:Correct"}
      - {name: spare, target: "mmrl.rewards.tool_rewards:CallCost", free: 0, weight: 0.1}
"""


def run(folder: Path, *overrides: str) -> Path:
    """Train it; ``mmrl.component.resolve`` must know FAKES."""
    path = folder / "talking.yaml"
    path.write_text(RUN)
    return train(config.load(path, overrides), folder / "run", Quiet())


def resolve(target: str) -> Any:
    return FAKES.get(target) or REAL(target)
