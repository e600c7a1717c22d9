"""A run in which a policy paints that a test can afford: fields of one colour, whose mean over all prompts is learned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.distributions import Normal

from mmrl import component, config
from mmrl.columns import Column
from mmrl.messages import Message, Picture
from mmrl.numerics.draws import Draws
from mmrl.progress import Quiet
from mmrl.trainer import train
from mmrl.transcripts import Question, Transcript, unmarked
from mmrl.types import Decision, Evaluation, Observation, Packing, Rollout

STRICT = ConfigDict(extra="forbid")
STD = 0.1
SIDE = 6  # pixels


class Painter(nn.Module):
    """A colour is drawn around ``mean``; in an evaluation too, from the noise of the task."""

    @dataclass(frozen=True, config=STRICT)
    class Config:
        start: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __init__(self, config: Config, *, device: torch.device) -> None:
        super().__init__()
        self.version = 0
        self.mean = nn.Parameter(torch.tensor(config.start, device=device))

    @torch.no_grad()
    def act(self, observation: Observation, draws: Draws, *, explore: bool) -> Decision:
        colour_B3 = self.mean + STD * draws.normal(3)
        shades_B3 = (255 * colour_B3).round().clamp(0, 255).int().tolist()
        said = [Message("assistant", (Picture(Image.new("RGB", (SIDE, SIDE), tuple(shades))),)) for shades in shades_B3]
        log_probs_BK = self._scored(colour_B3)
        return Decision(Column.of(said), {"colour": colour_B3}, log_probs_BK, log_probs_BK < math.inf, None, self.version)

    def _scored(self, colour: Tensor) -> Tensor:
        return Normal(self.mean, STD).log_prob(colour).mean(-1, keepdim=True)

    def pack(self, rollout: Rollout) -> Packing:
        return rollout.by_decision()

    def evaluate(self, trace: Mapping[str, Any]) -> Evaluation:
        log_probs_NK = self._scored(trace["colour"])
        return Evaluation(log_probs_NK, torch.zeros_like(log_probs_NK), None)

    def trainable(self) -> Mapping[str, list[nn.Parameter]]:
        return {"actor": list(self.parameters())}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "mean.txt").write_text(repr(self.mean.tolist()))

    def fingerprint(self) -> str:
        return "painter"

    def compute_mode(self, *, train: bool) -> nullcontext[None]:
        return nullcontext()


class Fields:
    """Every other prompt is to edit a picture."""

    @dataclass(frozen=True, config=STRICT)
    class Config:
        name: str = "field"

    def __init__(self, config: Config) -> None:
        self.config = config

    def question(self, task_id: int) -> Question:
        text = f"a {self.config.name} <b>{task_id}</b>"
        source = Picture(Image.new("RGB", (SIDE, 2 * SIDE), (task_id % 200, 200, 0)))
        parts = (text,) if task_id % 2 else (source, text)
        family = "rare" if task_id % 8 == 6 else "new" if task_id % 2 else "edit"
        return Question(family, parts, (), unmarked)


class Shade:
    """How much of a colour there is, 0 to 1."""

    CHANNEL = 0

    @dataclass(frozen=True, config=STRICT)
    class Config:
        pass

    def __init__(self, config: Config) -> None:
        pass

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        shown = [transcript.shown for transcript in transcripts]
        return [0.0 if picture is None else shade(picture.image, self.CHANNEL) for picture in shown]


class Red(Shade):
    pass


class Blue(Shade):
    CHANNEL = 2


class Broken(Shade):
    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        return [math.nan for _ in transcripts]


def shade(image: Image.Image, channel: int) -> float:
    return image.convert("RGB").getpixel((0, 0))[channel] / 255  # type: ignore[index]


FAKES = {f"fake:{each.__name__}": each for each in (Painter, Fields, Red, Blue, Broken)}
REAL = component.resolve
RUN = """
name: painting
threads: 1
tensorboard: false
policy: {target: "fake:Painter"}
environment:
  target: "mmrl.picturing:PictureEnvironment"
  prompts: {target: "fake:Fields"}
  rewards:
    - {target: "fake:Red"}
    - {name: cold, target: "fake:Blue", weight: 0.0}
    - {target: "fake:Broken", weight: 0.0}
  pass_mark: 0.5
evaluation: {episodes: 8, episodes_during: 4, num_envs: 4, videos: 3, every: 1}
stages:
  - name: paint
    algorithm: {target: "mmrl.algorithms.grpo:GRPO", group_size: 4}
    iterations: 3
    keep_every: 2
    collect: {num_envs: 8}
    optimizer: {lr: 0.05}
  - name: more
    algorithm: {target: "mmrl.algorithms.grpo:GRPO", group_size: 4}
    iterations: 1
    collect: {num_envs: 8}
    optimizer: {lr: 0.05}
"""


def run(folder: Path, *overrides: str) -> Path:
    """Train it; ``mmrl.component.resolve`` must know FAKES."""
    path = folder / "painting.yaml"
    path.write_text(RUN)
    return train(config.load(path, overrides), folder / "run", Quiet())


def resolve(target: str) -> Any:
    return FAKES.get(target) or REAL(target)
