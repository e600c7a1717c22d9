"""A model's chat template, applied to what is new in a conversation.

The template writes the opening once. What follows a message of the model is written as the template would write it after some
such message: the part behind that message is taken, so that what the model said need not be written (and perhaps changed, as
templates that drop thoughts do) again.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from jinja2 import TemplateError
from PIL import Image
from transformers import PreTrainedTokenizerBase

from mmrl.errors import MMRLError
from mmrl.messages import Message, Picture, Role

_SAID = "It is what was said"  # stands for a message of the model
_PROBE = "It is what came back"
_INSIDE = "\u200b"  # of no width: written into the name of a special token, it makes plain text of it


class Template:
    """``image``: the text by which the template shows a picture; None for models without eyes.

    tools_speak: whether a message of the role ``tool`` appears; else it is a user's. tools_show: whether its pictures do; else
    they follow in a user's message. Both are found by trying. Raises MMRLError for a tokenizer without a template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image: str | None, where: str) -> None:
        if not tokenizer.chat_template:
            raise MMRLError(f"policy.checkpoint = {where}: its tokenizer has no chat template; use a chat model")
        self._tokenizer, self._image, self.where = tokenizer, image, where
        self._special = names(tokenizer, {*tokenizer.all_special_ids, *_marked_special(tokenizer)})
        self._plain = not self._shows("user", pictures=0, plain=False)  # content must be a string, not a list of parts
        self.tools_speak = self._shows("tool", pictures=0, plain=self._plain)
        self.tools_show = not self._plain and image is not None and self._shows("tool", pictures=1, plain=False)

    def opening(self, messages: Sequence[Message]) -> str:
        """The messages before the model's first own one, and what the template puts before it."""
        return self._render(messages)

    def reply(self, messages: Sequence[Message]) -> str:
        """What stands between a message of the model and its next: the end of its turn, ``messages``, and the next beginning."""
        around = [Message("user", (_PROBE,)), Message("assistant", (_SAID,)), *messages]
        text = self._render(around)
        if _SAID not in text:
            raise MMRLError(f"policy.checkpoint = {self.where}: its chat template does not show what the assistant said")
        return text.partition(_SAID)[2]

    def _render(self, messages: Sequence[Message]) -> str:
        heard = [part for message in messages for part in self._heard(message)]
        return self._apply([self._content(message) for message in heard])

    def _heard(self, message: Message) -> list[Message]:
        """The message as the template can show it, with neutral text."""
        parts = tuple(neutral(part, self._special) if isinstance(part, str) else part for part in message.parts)
        message = replace(message, parts=parts)
        if message.role != "tool":
            return [message]
        if not self.tools_speak:
            return [replace(message, role="user")]
        if self.tools_show or not message.pictures:
            return [message]
        return [replace(message, parts=(message.text,)), Message("user", message.pictures)]

    def _content(self, message: Message) -> dict[str, Any]:
        if not self._plain:
            return _in_parts(message)
        if message.pictures:
            raise MMRLError(f"policy.checkpoint = {self.where}: takes no pictures, but the conversation has one")
        return {"role": message.role, "content": message.text}

    def _apply(self, messages: list[dict[str, Any]]) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except (TemplateError, TypeError, ValueError) as error:
            raise MMRLError(f"policy.checkpoint = {self.where}: its chat template fails ({error})") from error

    def _shows(self, role: Role, *, pictures: int, plain: bool) -> bool:
        """Whether the template writes text and pictures of a ``role``'s message that follows one of the model."""
        blank = Picture(Image.new("RGB", (1, 1)))
        talk = [Message("user", ("Well",)), Message("assistant", (_SAID,)), Message(role, (*[blank] * pictures, _PROBE))]
        made = [{"role": m.role, "content": m.text} if plain else _in_parts(m) for m in talk]
        try:
            after = self._apply(made).partition(_SAID)[2]
        except MMRLError:
            return False
        shown = 0 if self._image is None else after.count(self._image)
        return _PROBE in after and "'type'" not in after and shown == pictures


def names(tokenizer: PreTrainedTokenizerBase, ids: Collection[int]) -> re.Pattern[str]:
    """What finds the names of the tokens ``ids`` in a text, the longest first; one character is not taken for a name."""
    texts = sorted((str(tokenizer.convert_ids_to_tokens(token)) for token in ids), key=len, reverse=True)
    return re.compile("|".join(re.escape(text) for text in texts if len(text) > 1) or r"(?!)")


def neutral(text: str, special: re.Pattern[str]) -> str:
    """``text`` with the names of special tokens spelled so that they are plain text."""
    return special.sub(lambda found: found[0][0] + _INSIDE + found[0][1:], text)


def _marked_special(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that the tokenizer's file marks special, whether or not its config lists them."""
    return [token for token, added in tokenizer.added_tokens_decoder.items() if added.special]


def _in_parts(message: Message) -> dict[str, Any]:
    parts = [{"type": "image"} if isinstance(part, Picture) else {"type": "text", "text": part} for part in message.parts]
    return {"role": message.role, "content": parts}
