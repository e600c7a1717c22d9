"""What all sides of benchmarks/t2i_step.py do: the same pipeline, prompts, reward and numbers."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from policies.diffusion_parts.loading import load_pipeline
from policies.diffusion_parts.options import LoraOptions, TrainedSteps
from policies.diffusion_parts.schedule import chosen_steps
from simulators.image_prompts import ShapePrompts

_PROMPTS = ShapePrompts(ShapePrompts.Config())
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Task:
    """What is measured. size: of the pictures' sides, in pixels. pictures: of a step. batch: pictures that the network sees at a
    time. window: how many steps in a row are drawn at random and trained; 0: all but the last."""

    checkpoint: str
    weights: str
    device: str
    dtype: str
    train: str
    size: int
    steps: int
    window: int
    pictures: int
    group: int
    batch: int
    threads: int
    guidance: float = 4.5
    noise: float = 0.7
    lr: float = 3e-4
    max_text_tokens: int | None = None
    clip: float = 1e-4
    weight_decay: float = 1e-4
    lora: LoraOptions = field(default_factory=LoraOptions)

    @property
    def prompts(self) -> int:
        return self.pictures // self.group

    def written(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def read(text: str) -> Task:
        fields = json.loads(text)
        return Task(**{**fields, "lora": LoraOptions(**fields["lora"])})

    @property
    def trained_steps(self) -> TrainedSteps:
        """A window moves on by three places with each step, so that a few steps see it everywhere."""
        return TrainedSteps("window", size=self.window, stride=3, shared_prefix=True) if self.window else TrainedSteps()

    def trained(self, iteration: int) -> list[int]:
        """The steps that are drawn at random and trained."""
        return chosen_steps(self.trained_steps, self.steps, iteration, 0)

    def texts(self, iteration: int) -> list[str]:
        """Of each picture, group by group."""
        tasks = range(iteration * self.prompts, (iteration + 1) * self.prompts)
        return [text for task in tasks for text in [_PROMPTS.question(task).details["prompt"]] * self.group]

    def pipeline(self) -> Any:
        made = load_pipeline(self.checkpoint, self.weights, DTYPES[self.dtype], 0).to(self.device)
        for part in made.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        stir(made.transformer)
        return made

    def probe(self, shape: Sequence[int]) -> tuple[Tensor, Tensor, int]:
        """A state, the state after it and which step leads there: all sides must find it equally likely."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.group, *shape, generator=generator)
        after = x + 0.1 * torch.randn(x.shape, generator=generator)
        return x.to(self.device, DTYPES[self.dtype]), after.to(self.device, DTYPES[self.dtype]), 1


@torch.no_grad()
def stir(network: nn.Module) -> None:
    """Numbers in place of the zeros that a fresh network begins with, by the names of weights: else it would say nothing."""
    for name, parameter in network.named_parameters():
        if "lora" not in name and not parameter.any():
            seed = int.from_bytes(hashlib.sha256(name.replace(".base_layer", "").encode()).digest()[:4], "big")
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.copy_(0.02 * noise)


def reward(image: Image.Image) -> float:
    """Any will do that differs within a group: the brightness, as mmrl/rewards/brightness.py has it."""
    return float((np.asarray(image.convert("L"), np.float64) / 255).mean())


def begin() -> Task:
    """The task that the command line names."""
    task = Task.read(sys.argv[1])
    torch.set_num_threads(task.threads)
    torch.manual_seed(0)
    return task
