"""Prompts, what the network is told of them, and pictures as latents: each computed once, and kept as long as there is room."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mmrl.caching import digest
from mmrl.errors import MMRLError
from mmrl.messages import Message, Picture
from mmrl.types import Conversation
from policies.diffusion_families.base import Embedding, Family
from policies.diffusion_parts.disk import DiskCache, encoders_digest


@dataclass(frozen=True)
class Prompt:
    """What a picture is made for: text, and pictures to edit."""

    text: str
    pictures: tuple[Picture, ...] = ()

    @cached_property
    def key(self) -> tuple[str, ...]:
        """Equal where the prompts say the same."""
        return (self.text, *(picture.key for picture in self.pictures))

    @cached_property
    def number(self) -> int:
        """A signed 64-bit number that stands for the key."""
        return int.from_bytes(hashlib.sha256("\0".join(self.key).encode()).digest()[:8], "little", signed=True)


def prompts_of(conversations: Iterable[Conversation]) -> list[Prompt]:
    """What the user said last in each; prompts that say the same are one object."""
    known: dict[tuple[str, ...], Prompt] = {}
    prompts = []
    for conversation in conversations:
        said = [message for message in conversation if message.role == "user"]
        if not said:
            raise MMRLError("a conversation has no message of the user, who says what to draw")
        prompt = Prompt(said[-1].text, said[-1].pictures)
        prompts.append(known.setdefault(prompt.key, prompt))
    return prompts


def drawn_in(conversation: Sequence[Message]) -> Picture:
    """The picture that the assistant shows last."""
    shown = [picture for message in conversation if message.role == "assistant" for picture in message.pictures]
    if not shown:
        raise MMRLError("a conversation to imitate shows no picture of the assistant; its last message must have one")
    return shown[-1]


class Kept:
    """Values by key, at most ``size`` of them: those that were used last."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Any, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: Any) -> bool:
        return key in self._values

    def get(self, key: Any) -> Any:
        """None where it is not kept."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: Any, value: Any) -> Any:
        if self._size:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self._size:
                self._values.popitem(last=False)
        return value


class Embeddings:
    """What the network is told of prompts. ``learning``: the text encoders learn, so they are asked every time, with gradients.

    Each prompt is encoded alone, so that its embedding does not depend on the batch in which it first occurs. ``disk``: where
    embeddings are looked for before an encoder is asked.
    """

    def __init__(self, family: Family, size: int, *, learning: bool, disk: DiskCache | None = None) -> None:
        self._family, self._learning, self._disk = family, learning, disk
        self._kept, self._nothing = Kept(0 if learning else size), Kept(0 if learning else max(size, 1))

    def of(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """[B, ...] each."""
        different = list({prompt.key: prompt for prompt in prompts}.values())
        if self._learning and not any(prompt.pictures for prompt in different):
            table = dict(self._family.encode([prompt.text for prompt in different]))
        else:
            table = self._family.collate([self._known(prompt) for prompt in different])
        places = {prompt.key: place for place, prompt in enumerate(different)}
        rows = [places[prompt.key] for prompt in prompts]
        if rows == list(range(len(different))):
            return table
        index = torch.tensor(rows, device=next(iter(table.values())).device)
        return {name: values[index] for name, values in table.items()}

    def nothing(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """For the branch of guidance without text, [B, ...] each; pictures to edit are shown there as well."""
        if any(prompt.pictures for prompt in prompts):
            return self._family.collate([self._known(Prompt("", prompt.pictures), negative=True) for prompt in prompts])
        empty = self._known(Prompt(""), negative=True)
        return {name: values.expand(len(prompts), *values.shape[1:]) for name, values in empty.items()}

    def _known(self, prompt: Prompt, *, negative: bool = False) -> Embedding:
        kept = self._nothing if negative else self._kept
        return kept.get(prompt.key) or kept.put(prompt.key, self._read(prompt, negative=negative))

    def _read(self, prompt: Prompt, *, negative: bool) -> Embedding:
        with torch.set_grad_enabled(self._learning and torch.is_grad_enabled()):
            if self._disk is None:
                return self._family.read(prompt.text, prompt.pictures, negative=negative)
            name = digest(self._encoders, negative, prompt.key)
            found = self._disk.get(name)
            if found is None:
                made = self._family.read(prompt.text, prompt.pictures, negative=negative)
                self._disk.put(name, made)
                return made
            return {key: values.to(self._family.network.device) for key, values in found.items()}

    @cached_property
    def _encoders(self) -> str:
        return encoders_digest(self._family)
