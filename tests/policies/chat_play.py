"""Conversations with tiny chat models, and what transformers' own models say about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmrl.messages import Message
from mmrl.numerics.draws import Draws
from mmrl.rollout import Collector
from mmrl.types import Conversation, Decision, Observation, Rollout, Step
from policies.chat_parts.pieces import Heard, Piece, Said, lay_out
from policies.chat_parts.policy import ChatPolicy
from tests.policies import tiny_chat

END = 2  # <|im_end|>
PAD = 0  # <|endoftext|>


def quick(policy: Any, share: float = 0.2) -> Any:
    """The same policy, which after ``share`` of the tokens it says ends its turn."""
    words = policy.model.get_input_embeddings().weight
    dice = torch.Generator().manual_seed(1)
    with torch.no_grad():
        words *= 0.5
        hidden = torch.cat([_spoken(policy, seed, dice) for seed in range(8)])
        words[END] = 0
        others = (hidden @ words.T / policy.config.temperature).logsumexp(-1)
        low, high = 0.0, 100.0
        for _ in range(40):  # how long the word for the end must be
            words[END] = hidden.mean(0) * (low + high) / 2
            ends = (hidden @ words[END] / policy.config.temperature - others).sigmoid().mean()
            low, high = ((low + high) / 2, high) if ends < share else (low, (low + high) / 2)
    policy.engine.forget()
    return policy


def _spoken(policy: Any, seed: int, dice: torch.Generator) -> Tensor:
    """Hidden states [12, W] at tokens said at random."""
    pieces = policy.ears.listen(tiny_chat.opening(seed, seed % 3 if policy.ears.image_id else 0))[0]
    rows = (*pieces, Said(torch.randint(7, 250, (12,), generator=dice)))
    network = policy.network
    return network.hidden(lay_out([rows], [0], network.axes, network.pad, network.device))[0, -12:]


def observe(talks: Sequence[Conversation]) -> Observation:
    return Observation({}, None, ("",) * len(talks), conversations=tuple(talks))


def draws(size: int, turn: int = 0, seed: int = 0) -> Draws:
    return Draws.of(seed, torch.arange(size), turn)


@dataclass
class Played:
    """T decisions of B conversations that end never, the conversations before each, and their streams."""

    decisions: list[Decision]
    talks: list[list[Conversation]]

    def rows(self) -> list[tuple[Piece, ...]]:
        """Each conversation in pieces, from the traces alone."""
        rows = []
        for b in range(len(self.talks[0])):
            pieces: list[Piece] = []
            for decision in self.decisions:
                count = int(decision.trace["count"][b])  # type: ignore[arg-type]
                if count:
                    pieces += [decision.trace["heard"].tolist()[b], Said(decision.trace["said"][b, :count])]  # type: ignore
            rows.append(tuple(pieces))
        return rows

    def log_probs(self, b: int) -> Tensor:
        """Of all that conversation ``b`` said."""
        return torch.cat([d.log_probs_BK[b][d.mask_BK[b]] for d in self.decisions])


def play(
    policy: ChatPolicy,
    talks: Sequence[Conversation],
    turns: int = 3,
    *,
    explore: bool = True,
    forget: bool = False,
    answers: Any = lambda row, turn: (tiny_chat.answer(row + 10 * turn, (row + turn) % 3),),
) -> Played:
    """``turns`` of every conversation, with ``answers`` of no, one and two pictures in between."""
    talks = [tuple(talk) for talk in talks]
    played = Played([], [])
    for turn in range(turns):
        if forget:
            policy.engine.forget()
        decision = policy.act(observe(talks), draws(len(talks), turn), explore=explore)
        played.decisions.append(decision)
        played.talks.append(talks)
        said = decision.action.tolist()
        talks = [(*talk, said[row], *answers(row, turn)) for row, talk in enumerate(talks)]
    played.talks.append(talks)
    return played


def ids_of(pieces: Sequence[Piece]) -> Tensor:
    return torch.cat([piece.ids for piece in pieces])


def inputs(policy: Any, pieces: Sequence[Piece]) -> dict[str, Tensor]:
    """A conversation as transformers' model takes it, which finds the positions itself."""
    ids_1L = ids_of(pieces)[None]
    pictures = [seen for piece in pieces if isinstance(piece, Heard) for seen in piece.pictures]
    if not pictures:
        return {"input_ids": ids_1L}
    return {
        "input_ids": ids_1L,
        "mm_token_type_ids": (ids_1L == policy.model.config.image_token_id).int(),
        "pixel_values": torch.cat([seen.patches for seen in pictures]),
        "image_grid_thw": torch.tensor([seen.grid for seen in pictures]),
    }


def plain_log_probs(policy: Any, pieces: Sequence[Piece]) -> Tensor:
    """log softmax over all that may be said, at every place for what follows it: [L - 1, V]."""
    if hasattr(policy.model.base_model, "rope_deltas"):
        policy.model.base_model.rope_deltas = None
    logits_LV = policy.model(**inputs(policy, pieces)).logits[0, :-1] / policy.config.temperature
    for name in ("image", "video", "vision_start", "vision_end"):
        if hasattr(policy.model.config, f"{name}_token_id"):
            logits_LV[:, getattr(policy.model.config, f"{name}_token_id")] = -torch.inf
    logits_LV[:, len(policy.ears.tokenizer) :] = -torch.inf
    return logits_LV.log_softmax(-1)


def said_places(pieces: Sequence[Piece]) -> Tensor:
    """Where in the conversation something was said: places of its tokens."""
    said = [torch.full((len(piece),), isinstance(piece, Said)) for piece in pieces]
    return torch.cat(said).nonzero()[:, 0]


class Quiz:
    """Conversations about pictures: task t begins as ``tiny_chat.opening`` does and ends after t % 3 + 1 answers."""

    action_spec = None
    max_steps = 3

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self.talks: list[Conversation] = [(Message("user", ("nothing",)),)] * num_envs
        self.tasks_B = torch.zeros(num_envs, dtype=torch.long)
        self.age_B = torch.zeros(num_envs, dtype=torch.long)

    def reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Observation:
        for b, task in enumerate(task_ids_B.tolist()):
            if where_B is None or where_B[b]:
                self.tasks_B[b], self.age_B[b] = task, 0
                self.talks[b] = tiny_chat.opening(task % 5, task % 3)
        return observe(self.talks)

    @property
    def done_B(self) -> Tensor:
        return self.age_B >= self.tasks_B % 3 + 1

    def step(self, actions: Any) -> Step:
        running_B = ~self.done_B
        for b, message in enumerate(actions.tolist()):
            if running_B[b]:
                self.talks[b] = (*self.talks[b], message, tiny_chat.answer(int(self.tasks_B[b]), int(self.age_B[b]) % 2))
        self.age_B = self.age_B + running_B
        success_B = self.done_B.float()
        rewards_B1 = (running_B & self.done_B).float()[:, None] * torch.arange(1, self.num_envs + 1)[:, None]
        ended_B, never_B = self.done_B, torch.zeros_like(running_B)
        return Step(observe(self.talks), rewards_B1, running_B[:, None], ended_B, never_B, {"success": success_B})

    def family_of(self, task_ids_M: Tensor) -> tuple[str, ...]:
        return ("quiz",) * len(task_ids_M)

    def close(self) -> None: ...


def collect(policy: Any, slots: int = 6, group: int = 2) -> Rollout:
    quiz: Any = Quiz(slots)
    collector = Collector([quiz], decisions=3, seed=0, device=tiny_chat.CPU, group_size=group, auto_reset=False)
    return collector.collect(policy)
