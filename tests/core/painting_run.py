"""A run in which a policy paints that a test can afford: a flat square of a colour it chooses; and rewards made by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from mmrl import component, config
from mmrl.columns import Column
from mmrl.component import Component
from mmrl.messages import Message, Picture
from mmrl.numerics.draws import Draws
from mmrl.picturing import PictureEnvironment
from mmrl.progress import Quiet
from mmrl.trainer import train
from mmrl.transcripts import Transcript
from mmrl.types import Decision, Evaluation, Observation, Packing, Rollout

STRICT = ConfigDict(extra="forbid")
COLOURS = {"red": (225, 35, 35), "blue": (40, 70, 225)}
PROMPTS = {"target": "simulators.image_prompts:ShapePrompts", "tags": ["colors"], "shapes": ["circle", "square"]}
PROMPTS |= {"colours": ["red", "blue", "green", "black"]}


def square(colour: str) -> Message:
    image = Image.new("RGB", (32, 32), "white")
    image.paste(COLOURS[colour], (8, 8, 24, 24))
    return Message("assistant", (Picture(image),))


class Painter(nn.Module):
    """Paints a red square or a blue one."""

    @dataclass(frozen=True, config=STRICT)
    class Config:
        start: tuple[float, float] = (0.5, 0.0)

    def __init__(self, config: Config, *, device: torch.device) -> None:
        super().__init__()
        self.version = 0
        self.logits = nn.Parameter(torch.tensor(config.start, device=device))
        self.painted = [square(name) for name in COLOURS]

    @torch.no_grad()
    def act(self, observation: Observation, draws: Draws, *, explore: bool) -> Decision:
        logits_BV = self.logits.expand(observation.batch_size, -1)
        choice_B = draws.categorical(logits_BV).flatten() if explore else logits_BV.argmax(1)
        mask_BK = torch.ones(len(choice_B), 1, dtype=torch.bool)
        action = Column.of([self.painted[choice] for choice in choice_B.tolist()])
        return Decision(action, {"choice": choice_B}, self.logits.log_softmax(0)[choice_B][:, None], mask_BK, None, self.version)

    def pack(self, rollout: Rollout) -> Packing:
        return rollout.by_decision()

    def evaluate(self, trace: Mapping[str, Any]) -> Evaluation:
        log_probs_NK = self.logits.log_softmax(0)[trace["choice"]][:, None]
        return Evaluation(log_probs_NK, torch.zeros_like(log_probs_NK), None)

    def trainable(self) -> Mapping[str, list[nn.Parameter]]:
        return {"actor": list(self.parameters())}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)

    def fingerprint(self) -> str:
        return "painter"

    def compute_mode(self, *, train: bool) -> nullcontext[None]:
        return nullcontext()


class Redness:
    """The red share of a picture's middle; NaN where it is blue and ``blind``; counts how often it was asked."""

    failure = "it is colour-blind"

    @dataclass(frozen=True, config=STRICT)
    class Config:
        blind: bool = False

    def __init__(self, config: Config) -> None:
        self.config, self.asked = config, 0

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        self.asked += 1
        return [self._score(each) for each in transcripts]

    def _score(self, transcript: Transcript) -> float:
        red, _, blue = transcript.turns[-1].message.pictures[-1].image.getpixel((16, 16))
        return math.nan if self.config.blind and blue > red else float(red > blue)


class Slow(Redness):
    """Scores in the background: what it was told, and what was waited for, stand in ``log``."""

    log: list[str]

    @dataclass(frozen=True, config=STRICT)
    class Config:
        blind: bool = False

    def begin(self, transcripts: Sequence[Transcript]) -> Callable[[], list[float]]:
        self.log = ["begun"]

        def wait() -> list[float]:
            self.log.append("waited for")
            return self(transcripts)

        return wait


FAKES = {"fake:Painter": Painter, "fake:Redness": Redness, "fake:Slow": Slow}
REAL = component.resolve
RUN = """
name: painting
threads: 1
tensorboard: false
policy: {target: "fake:Painter"}
environment:
  target: mmrl.picturing:PictureEnvironment
  prompts: {target: "simulators.image_prompts:ShapePrompts", tags: [single_object, colors]}
  rewards:
    - {target: "mmrl.rewards.shapes:Shapes", graded: true}
    - {name: watch, target: "mmrl.rewards.shape_match:ShapeMatch", weight: 0}
evaluation: {episodes: 6, num_envs: 4, videos: 3, environment: {prompts: {split: held_out}}}
stages:
  - name: improve
    algorithm: {target: "mmrl.algorithms.grpo:GRPO", group_size: 4}
    iterations: 2
    collect: {num_envs: 16, decisions: 1, parts: 2}
    optimizer: {lr: 0.1}
"""


def resolve(target: str) -> Any:
    return FAKES.get(target) or REAL(target)


def run(folder: Path, *overrides: str) -> Path:
    """Train it; ``mmrl.component.resolve`` must know FAKES."""
    path = folder / "painting.yaml"
    path.write_text(RUN)
    return train(config.load(path, overrides), folder / "run", Quiet())


def environment(*rewards: Mapping[str, Any], num_envs: int = 3, **fields: Any) -> PictureEnvironment:
    """``mmrl.component.resolve`` must know FAKES."""
    block = {"target": "mmrl.picturing:PictureEnvironment", "prompts": PROMPTS, "rewards": list(rewards), **fields}
    return Component.parse(block).build(num_envs=num_envs, device=torch.device("cpu"))


def paint(*colours: str | None) -> Column:
    return Column.of([None if colour is None else square(colour) for colour in colours])


def tasks(*ids: int) -> Tensor:
    return torch.tensor(ids)
