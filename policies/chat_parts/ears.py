"""From messages to pieces: what a model hears is written by its chat template, tokenised, and its pictures cut into patches."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mmrl.errors import MMRLError
from mmrl.messages import Message, Picture
from mmrl.types import Conversation
from policies.chat_parts.network import Network
from policies.chat_parts.pieces import Heard, Piece, Said, Seen
from policies.chat_parts.template import Template, names, neutral

Value = TypeVar("Value", Heard, Seen)
KEPT_BYTES = 2**31  # of pieces, and of pictures, that are remembered at most; what traces hold is theirs


class Recent(Generic[Value]):
    """The values last asked for, of ``most`` bytes together (one of them in any case)."""

    def __init__(self, most: int) -> None:
        self._most, self._held, self._values = most, 0, OrderedDict[Any, Value]()

    def get(self, key: Any) -> Value | None:
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: Any, value: Value) -> Value:
        self._values[key] = value
        self._held += value.nbytes
        while self._held > self._most and len(self._values) > 1:
            self._held -= self._values.popitem(last=False)[1].nbytes
        return value


@dataclass(frozen=True)
class SpanWeight:
    """Parts of what is said that count more or less in imitation."""

    pattern: re.Pattern[str]
    weight: float


class Ears:
    """``tokenizer`` and chat template of a model, and what turns pictures into patches.

    image_id: the token that stands for a piece of a picture; None for a model without eyes. unsayable: tokens that the model
    must not say. spans: for imitation.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        network: Network,
        image_id: int | None,
        where: str,
        *,
        unsayable: Collection[int] = (),
        spans: Sequence[SpanWeight] = (),
    ) -> None:
        self.tokenizer, self.network, self.image_id, self.spans = tokenizer, network, image_id, spans
        image = None if image_id is None else str(tokenizer.convert_ids_to_tokens(image_id))
        self.template = Template(tokenizer, image, where)
        self.end = self._turn_end(where)
        self._never = names(tokenizer, {*unsayable, self.end})
        self._heard: Recent[Heard] = Recent(KEPT_BYTES)
        self._seen: Recent[Seen] = Recent(KEPT_BYTES)

    def _turn_end(self, where: str) -> int:
        """The token with which the template ends a message of the model."""
        text = self.template.reply([Message("user", ("Well",))])
        first: list[int] = self._ids(text)[:1]
        if not first or first[0] not in [*self.tokenizer.all_special_ids, self.tokenizer.eos_token_id]:
            raise MMRLError(f"policy.checkpoint = {where}: its chat template does not end a turn with a special token")
        return first[0]

    # -- pieces --------------------------------------------------------------------------------------------------------

    def listen(self, conversation: Conversation) -> tuple[tuple[Piece, ...], Message | None]:
        """The pieces of a conversation that the model is to continue, and its own last message in it."""
        pieces: list[Piece] = []
        previous: Message | None = None
        begin = 0
        for at, message in enumerate(conversation):
            if message.token_ids:
                pieces += [self.hear(conversation[begin:at], previous), Said(torch.tensor(message.token_ids))]
                previous, begin = message, at + 1
        pieces.append(self.hear(conversation[begin:], previous))
        return tuple(pieces), previous

    def study(self, conversation: Conversation) -> tuple[Piece, ...]:
        """The pieces of a conversation that is to be imitated: what the assistant says was said, up to the last of it."""
        pieces: list[Piece] = []
        previous: Message | None = None
        begin = 0
        for at, message in enumerate(conversation):
            if message.role == "assistant":
                pieces += [self.hear(conversation[begin:at], previous), self.say(message)]
                previous, begin = message, at + 1
        return tuple(pieces)

    def hear(self, messages: Sequence[Message], previous: Message | None) -> Heard:
        """What was said to the model after ``previous`` (None: at the beginning). Equal messages are one object."""
        ended = previous is not None and (not previous.token_ids or previous.token_ids[-1] == self.end)
        key = (previous is None, ended, *map(_content, messages))
        known = self._heard.get(key)
        return known or self._heard.put(key, self._hear(messages, begins=previous is None, ended=ended))

    def _hear(self, messages: Sequence[Message], *, begins: bool, ended: bool) -> Heard:
        ids = self._ids(self.template.opening(messages) if begins else self.template.reply(messages))
        if ended:  # the model ended its turn itself
            ids = ids[1:]
        seen = [self._see(picture) for message in messages for picture in message.pictures]
        if ids.count(self.image_id) != len(seen):  # type: ignore[arg-type]
            shown = ids.count(self.image_id)  # type: ignore[arg-type]
            raise MMRLError(f"policy.checkpoint = {self.template.where}: its chat template shows {shown} of {len(seen)} pictures")
        pictures = iter(seen)
        flat: list[int] = []
        offsets: list[Tensor] = []
        at = begin = 0
        for place, token in enumerate(ids):
            if token != self.image_id:
                flat.append(token)
                continue
            offsets.append(self._words(place - begin) + at)
            at, begin = at + place - begin, place + 1
            picture = next(pictures)
            places, span = self.network.place(picture)
            offsets.append(places + at)
            at += span
            flat += [token] * picture.tokens
        offsets.append(self._words(len(ids) - begin) + at)
        return Heard(torch.tensor(flat), torch.cat(offsets, 1), at + len(ids) - begin, tuple(seen))

    def say(self, message: Message) -> Said:
        """A message that is to be imitated, as far as its weight says: its tokens, or as the model would say it.

        The names of tokens that it must not say, or that end its turn, are plain text.
        """
        text = message.text if message.token_ids else neutral(message.text, self._never)
        ids, offsets = self._spelled(message.token_ids) if message.token_ids else self._spell(text)
        if not self.spans and message.weight == 1:
            return Said(torch.tensor(ids))
        weights = torch.full((len(ids),), float(message.weight))
        for span in self.spans:
            for found in span.pattern.finditer(text):
                for place, (first, last) in enumerate(offsets):
                    if first < found.end() and last > found.start():
                        weights[place] *= span.weight
        return Said(torch.tensor(ids), weights)

    def _spell(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens, the end of the turn included, and (where they matter) the characters from and to which they reach."""
        encoded: Any = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=bool(self.spans))
        return [*encoded["input_ids"], self.end], encoded["offset_mapping"] if self.spans else []

    def _spelled(self, ids: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
        reach = [len(self.text(ids[:count])) for count in range(len(ids) + 1)] if self.spans else []
        return list(ids), list(pairwise(reach))

    def text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _words(self, count: int) -> Tensor:
        return torch.arange(count).expand(self.network.axes, -1)

    def _ids(self, text: str) -> list[int]:
        ids: Any = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _see(self, picture: Picture) -> Seen:
        """Equal pictures are one object: they are stored, and encoded in a pass, once."""
        return self._seen.get(picture.key) or self._seen.put(picture.key, self.network.see(picture))


def _content(message: Message) -> tuple[Any, ...]:
    """What the template shows of a message, to be compared."""
    return message.role, *(part if isinstance(part, str) else (part.key,) for part in message.parts)
