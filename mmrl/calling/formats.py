"""How calls of tools are written in a model's text: read from it, and written for training data.

A format is an object with

    parse(text) -> the calls in it, in order, a MalformedCall for each that cannot be read; never an exception
    render(calls) -> a text that parses to exactly these calls
    instructions(schemas) -> what the system prompt must say where the model's chat template does not say it itself
    stop -> strings at which generation may end, because nothing that counts comes after them

A call is read wherever it stands, also amid the model's thoughts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Any, ClassVar, Protocol

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from mmrl.calling.results import short
from mmrl.calling.schema import SHORT, full_stop
from mmrl.messages import ToolCall, ToolSchema, encodable
from mmrl.registry import GUESS, did_you_mean


@plain_dataclass(frozen=True)
class MalformedCall:
    """Something that was meant as a call. sentence: what is wrong, for the model. text: as the model wrote it."""

    sentence: str
    text: str


class CallFormat(Protocol):
    """See the module. Built as ``cls(config)``."""

    stop: ClassVar[tuple[str, ...]]

    def parse(self, text: str) -> list[ToolCall | MalformedCall]: ...

    def render(self, calls: Sequence[ToolCall]) -> str: ...

    def instructions(self, schemas: Sequence[ToolSchema]) -> str: ...


class HermesCalls:
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, as Hermes, Qwen2.5 and Qwen3 write it."""

    stop: ClassVar[tuple[str, ...]] = ()  # another call may follow a call
    _TAG: ClassVar = re.compile(r"</?tool_call>")

    @dataclass(frozen=True, config=ConfigDict(extra="forbid"))
    class Config:
        """Fields of a ``mmrl.calling:HermesCalls`` block: none."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def parse(self, text: str) -> list[ToolCall | MalformedCall]:
        return list(self._calls(text))

    def render(self, calls: Sequence[ToolCall]) -> str:
        """Byte for byte what Qwen's chat template prints, unless a string holds one of the tags, which is then escaped."""
        return "\n".join(f"<tool_call>\n{self._json(call)}\n</tool_call>" for call in calls)

    def instructions(self, schemas: Sequence[ToolSchema]) -> str:
        """The words of Qwen's own chat templates."""
        tools = "".join(f"\n{_dump(schema.function)}" for schema in schemas)
        return (
            "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
            f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>{tools}\n</tools>\n\n"
            "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
            'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
        )

    def _json(self, call: ToolCall) -> str:
        line = f'{{"name": {_dump(call.name)}, "arguments": {_dump(dict(call.arguments))}}}'
        return self._TAG.sub(lambda tag: "\\u003c" + tag[0][1:], line)  # a tag within JSON stands in a string

    def _calls(self, text: str) -> Iterator[ToolCall | MalformedCall]:
        start, depth, nested = 0, 0, False
        for tag in self._TAG.finditer(text):
            if tag[0] == "<tool_call>":
                start, nested, depth = (start, True, depth + 1) if depth else (tag.start(), False, 1)
            elif depth == 0:
                yield MalformedCall("There is a </tool_call> without a <tool_call> before it.", tag[0])
            elif depth > 1:
                depth -= 1
            else:
                depth, whole = 0, text[start : tag.end()]
                inner = whole.removeprefix("<tool_call>").removesuffix("</tool_call>")
                yield MalformedCall("A <tool_call> stands within another one.", whole) if nested else _read(inner, whole)
        if depth:
            yield MalformedCall("A <tool_call> is not closed with </tool_call>.", text[start:])


class CodeCalls:
    """Fenced code blocks in one language, each run by one tool. Blocks in another language, or in none, are only text."""

    stop: ClassVar[tuple[str, ...]] = ()  # the end of a block looks like the beginning of one

    @dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
    class Config:
        """Fields of a ``mmrl.calling:CodeCalls`` block."""

        tool: str = "python"
        """Name of the tool that runs a block."""
        argument: str = "code"
        """Its argument that takes the code."""
        language: str = "python"
        """The word behind the opening fence."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def parse(self, text: str) -> list[ToolCall | MalformedCall]:
        return list(self._calls(text))

    def render(self, calls: Sequence[ToolCall]) -> str:
        """Raises ValueError for a call that no block of code can say."""
        return "\n".join(self._block(call) for call in calls)

    def instructions(self, schemas: Sequence[ToolSchema]) -> str:
        """Raises ValueError if the tool that runs blocks is not among ``schemas``."""
        about = next((schema.description for schema in schemas if schema.name == self.config.tool), None)
        if about is None:
            raise ValueError(f"tool '{self.config.tool}', which is to run blocks of code, is not among the tools")
        opening = f"```{self.config.language}"
        how = f"To run code, write it in a block that begins with {opening} and ends with ```:"
        return f"# Code\n\n{about}\n\n{how}\n{opening}\n<code>\n```"

    def _block(self, call: ToolCall) -> str:
        code = call.arguments.get(self.config.argument)
        if call.name != self.config.tool or set(call.arguments) != {self.config.argument} or not isinstance(code, str):
            wants = f"'{self.config.tool}' with the one argument '{self.config.argument}', a string"
            raise ValueError(f"a block of code is a call of {wants}, not of '{call.name}' with {sorted(call.arguments)}")
        if not code.strip():
            raise ValueError("a block of code must not be empty")
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
        return f"{fence}{self.config.language}\n{code}\n{fence}"

    def _calls(self, text: str) -> Iterator[ToolCall | MalformedCall]:
        """Fences as in CommonMark: a block ends at a line of nothing but at least as many backticks as it began with."""
        lines = text.split("\n")
        at = 0
        while at < len(lines):
            opening = _FENCE.fullmatch(lines[at])
            at += 1
            if opening is None:
                continue
            begin, closing = at, re.compile(rf" {{0,3}}`{{{len(opening[1])},}}\s*")
            while at < len(lines) and not closing.fullmatch(lines[at]):
                at += 1
            if opening[2].lower().split()[:1] == [self.config.language.lower()]:
                yield self._read(lines[begin - 1 : at], closed=at < len(lines))
            at += 1

    def _read(self, lines: list[str], *, closed: bool) -> ToolCall | MalformedCall:
        """The call of a block: its opening line and its code."""
        code, block = "\n".join(lines[1:]), f"A block of {self.config.language} code"
        if not closed:
            return MalformedCall(f"{block} is not closed with ```.", "\n".join(lines))
        if not code.strip():
            return MalformedCall(f"{block} is empty.", "\n".join(lines))
        if not encodable(code):
            return MalformedCall(f"{block} holds {_HALF}.", "\n".join(lines))
        return ToolCall(self.config.tool, {self.config.argument: code})


_FENCE = re.compile(r" {0,3}(`{3,})([^`]*)")
_HALF = "a character that cannot be written (half of a surrogate pair)"
_KEYS = ("name", "arguments")


class _Refused(ValueError):
    """JSON that is not what a call may be, in words that follow 'The call'."""


def _read(content: str, whole: str) -> ToolCall | MalformedCall:
    """The call that ``content``, a JSON object, stands for; whole: with its tags."""
    try:
        call = json.loads(content, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
        return _call(call)
    except _Refused as error:
        return MalformedCall(full_stop(short(f"The call {error}", SHORT)), whole)
    except json.JSONDecodeError as error:
        return MalformedCall(f"The call is not valid JSON: {error.msg} at character {error.pos} of {len(content)}.", whole)
    except (ValueError, RecursionError):  # an integer of thousands of digits; thousands of brackets
        return MalformedCall("The call is not valid JSON: it has too many digits or brackets.", whole)


def _call(call: Any) -> ToolCall:
    if not isinstance(call, dict):
        raise _Refused(f"must be a JSON object with name and arguments, not {_kind(call)}")
    for key in call:
        if key not in _KEYS:
            raise _Refused(f"has an unknown key '{key[:40]}'{did_you_mean(key, _KEYS, GUESS)}")
    missing = [key for key in _KEYS if key not in call]
    if missing:
        raise _Refused(f"lacks the key '{missing[0]}'")
    name, arguments = call["name"], call["arguments"]
    if not isinstance(name, str) or not name:
        raise _Refused("must have a string that is not empty as its name")
    if not isinstance(arguments, dict):
        raise _Refused(f"must have a JSON object as its arguments, not {_kind(arguments)}")
    if not encodable(_dump(call)):
        raise _Refused(f"holds {_HALF}")
    return ToolCall(name, arguments)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Refused(f"has the key '{key[:40]}' twice in one object")
        found[key] = value
    return found


def _constant(word: str) -> Any:
    raise _Refused(f"has {word}, which is no number in JSON")


def _float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _Refused(f"has the number {digits[:40]}, which is too large")
    return number


def _kind(value: Any) -> str:
    return {str: "a string", list: "a list", bool: "a boolean", type(None): "null"}.get(type(value), "a number")


def _dump(value: Any) -> str:
    """JSON as ``tojson`` of chat templates writes it. Raises ValueError for numbers that JSON lacks."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
