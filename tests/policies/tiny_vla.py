"""Token VLAs so small that a test can afford them, on both backbones; their shapes are chosen so that every slice matters.

Fewer actions are executed (2) than predicted (3), there are two cameras, sentences differ in length, and of the four dimensions
of an action one has two values and one never varies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assets.make_tiny_token_vla import write_paligemma, write_qwen
from mmrl.types import Examples, Observation
from policies.shared.checkpoints import STATISTICS_FILE
from policies.token_vla import TokenVLA
from policies.token_vla_parts.bins import Statistics
from tests.policies import tiny

CAMERAS, SENTENCES, CPU, generator = tiny.CAMERAS, tiny.SENTENCES, tiny.CPU, tiny.generator
CHUNK, EXECUTE, ACTION, STATE, BINS, IMAGE = 3, 2, 4, 3, 16, 32
WORDS = sorted({word for sentence in SENTENCES for word in sentence.split()})
STATISTICS = Statistics(
    actions_q01=(-0.5, 0.0, 0.25, -2.0),
    actions_q99=(1.0, 1.0, 0.25, 2.0),
    actions_choices=((), (0.0, 1.0), (0.25,), ()),
    state_q01=(-1.0, -1.0, 0.0),
    state_q99=(1.0, 2.0, 0.0),
)
WRITERS: dict[str, Callable[..., Path]] = {
    "paligemma": functools.partial(write_paligemma, image=IMAGE, patch=16),
    "qwen": functools.partial(write_qwen, patch=4),
}


def write(folder: Path, kind: str, *, statistics: bool = True, **sizes: Any) -> str:
    """Architecture, tokenizer, image processor and statistics of a tiny backbone, without weights."""
    sizes = {"words": WORDS, "width": 32, "layers": 2, "vision_layers": 1, "bins": BINS, **sizes}
    WRITERS[kind](folder, **sizes)
    if statistics:
        (folder / STATISTICS_FILE).write_text(STATISTICS.text())
    return str(folder)


def config(checkpoint: str, **fields: Any) -> TokenVLA.Config:
    defaults: dict[str, Any] = {
        "weights": "random",
        "chunk": CHUNK,
        "execute": EXECUTE,
        "action_dim": ACTION,
        "bins": BINS,
        "cameras": CAMERAS,
        "prompt": "{instruction}",
        "max_text_tokens": 24,
        "attention": "eager",
    }
    return TokenVLA.Config(checkpoint=checkpoint, **{**defaults, **fields})


def build(checkpoint: str, **fields: Any) -> TokenVLA:
    """A policy whose heads and norms are stirred, so that no output is zero just because it starts there."""
    return tiny.stir(TokenVLA(config(checkpoint, **fields), device=CPU))


@functools.cache
def observation(batch: int = 5, size: int = IMAGE) -> Observation:
    seen = tiny.observation(batch, size)
    assert seen.state is not None
    return Observation(seen.images, seen.state[:, :STATE], seen.instructions)


def actions(*shape: int, seed: int = 0) -> Tensor:
    """Actions as the statistics know them: [*shape, A]."""
    draw = generator(seed)
    x = torch.rand(*shape, ACTION, generator=draw)
    low, high = torch.tensor(STATISTICS.actions_q01), torch.tensor(STATISTICS.actions_q99)
    x[..., 1] = x[..., 1].round()
    return low + x * (high - low)


@functools.cache
def examples(batch: int = 5, *, ended: bool = True) -> Examples:
    lengths_B = torch.arange(batch) % CHUNK + 1 if ended else torch.full((batch,), CHUNK)
    return Examples(observation(batch), actions(batch, CHUNK, seed=batch), torch.arange(CHUNK) < lengths_B[:, None])
