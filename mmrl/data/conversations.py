"""Conversations to imitate: played by a scripted expert with real tools, or read from a JSONL file of OpenAI-style messages."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image, ImageOps
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from mmrl.component import Component
from mmrl.errors import DataError, MMRLError
from mmrl.messages import Message, Picture, Role, ToolCall, ToolSchema, as_seen, encodable
from mmrl.protocols import DataContext, ExpertEnvironment
from mmrl.transcripts import TalkingEnvironment, Transcript
from mmrl.types import Conversation, Talks

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
_BLANK = Picture(Image.new("RGB", (1, 1)))
_FAILED = 64  # conversations in a row that the expert may get wrong


class ScriptedConversations:
    """Endless fresh conversations in the run's environment, which its scripted expert leads and gets right.

    ``hasty`` mixes in those of somebody who does not look: one message, which answers as another conversation of the same kind
    ended. That is how models talk before they are taught tools, and what reinforcement learning has to overcome. Where prompts
    draw, those are pictures whose caption belongs to another one, as captions that were found beside pictures often do.
    """

    @dataclass(frozen=True, config=_STRICT)
    class Config:
        """Fields of a ``mmrl.data.conversations:ScriptedConversations`` block."""

        num_envs: int = Field(default=64, ge=1)
        """Conversations that are led at once."""
        first_task: int = 2_000_000
        """Task id of the first one."""
        hasty: float = Field(default=0.0, ge=0, le=1)
        """Share of conversations that are answered at once, with the answer to another question."""
        environment: dict[str, Any] = field(default_factory=dict)
        """Overrides of the run's environment block."""

    def __init__(self, config: Config, *, context: DataContext) -> None:
        self._environment: Any = context.make_environment(config.num_envs, config.environment)
        if not (isinstance(self._environment, TalkingEnvironment) and isinstance(self._environment, ExpertEnvironment)):
            raise MMRLError(
                f"{type(self._environment).__name__} leads no conversations; use mmrl.tool_use:ToolEnvironment or mmrl.picturing"
            )
        self._next_task = config.first_task + context.seed * 100_000_000  # another seed of the run means other conversations
        self._hasty = config.hasty
        self._spare: list[Conversation] = []  # of the last round, not given yet
        self._round = self._next_task  # the task with which that round began

    def batch(self, size: int) -> Talks:
        while len(self._spare) < size:
            self._round = self._next_task if not self._spare else self._round
            self._spare += self._lead()
        given, self._spare = self._spare[:size], self._spare[size:]
        return Talks(tuple(given))

    def _lead(self) -> list[Conversation]:
        """One round: the conversations that end well."""
        environment, failed = self._environment, 0
        while True:
            tasks_B = torch.arange(self._next_task, self._next_task + environment.num_envs)
            self._next_task += environment.num_envs
            environment.reset(tasks_B)
            for _ in range(environment.max_steps):
                step = environment.step(environment.expert_action())
                if bool(step.done_B.all()):
                    break
            right = (step.metrics["success"] > 0.5).tolist()
            if any(right):
                return self._conversations([environment.transcript(slot) for slot, well in enumerate(right) if well])
            failed += environment.num_envs
            if failed >= _FAILED:
                raise MMRLError(f"the scripted expert got none of {failed} conversations right; raise environment.max_turns")

    def _conversations(self, led: list[Transcript]) -> list[Conversation]:
        """What was said in them, some of them made hasty; which ones their tasks determine."""
        conversations = []
        for transcript in led:
            generator = random.Random(f"hasty {transcript.task_id}")
            others = [other for other in led if other is not transcript and other.question.family == transcript.question.family]
            if others and generator.random() < self._hasty:
                conversations.append((*transcript.opening, generator.choice(others).turns[-1].message))
            else:
                conversations.append(transcript.messages)
        return conversations

    def state_dict(self) -> Mapping[str, Tensor]:
        return {
            "round": torch.tensor(self._round),
            "spare": torch.tensor(len(self._spare)),
            "next": torch.tensor(self._next_task),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The rounds that are not used up are led again."""
        self._next_task, self._spare = int(state["round"]), []
        spare, end = int(state["spare"]), int(state["next"])
        self._round = self._next_task
        while self._next_task < end:
            self._spare += self._lead()
        self._spare = self._spare[len(self._spare) - spare :]


class JsonlConversations:
    """Conversations of a file, a line each; all are checked when the run begins, and their pictures loaded when they are drawn.

    A line is an object with ``messages``: OpenAI's, with ``role`` and ``content`` (a string, or parts of type ``text``,
    ``image`` with a path relative to the file, or ``image_url`` with such a path as its ``url``), and an assistant's
    ``tool_calls``, which are written as ``calls`` says. ``tools``: functions as OpenAI's API takes them, of which the system
    message tells as that of an environment does. Other keys are not read. What assistants say is learned, but for messages with
    ``"weight": 0``, as in OpenAI's files; another weight is that of each token of the message.
    """

    @dataclass(frozen=True, config=_STRICT)
    class Config:
        """Fields of a ``mmrl.data.conversations:JsonlConversations`` block."""

        path: Path
        """The file."""
        calls: Component = field(default_factory=lambda: Component.parse({"target": "mmrl.calling.formats:HermesCalls"}))
        """How an assistant's calls are written in its text; that of the environment, if tools are to be used."""
        drawn: bool = False
        """Whether assistants may show pictures: captioned pictures, from which an image generator learns."""

    def __init__(self, config: Config, *, context: DataContext) -> None:
        self._path, self._format, self._drawn = config.path, config.calls.build(), config.drawn
        self._lines = list(self._read())
        for number, line in self._lines:
            self._conversation(number, line, load=False)
        if not self._lines:
            raise DataError(f"{config.path}: holds no conversations")
        self._generator = torch.Generator().manual_seed(context.seed)

    def __len__(self) -> int:
        return len(self._lines)

    def batch(self, size: int) -> Talks:
        chosen = torch.randint(len(self), (size,), generator=self._generator).tolist()
        return Talks(tuple(self._conversation(*self._lines[i], load=True) for i in chosen))

    def state_dict(self) -> Mapping[str, Tensor]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._generator.set_state(state["generator"])

    # -- reading -------------------------------------------------------------------------------------------------------

    def _read(self) -> Iterator[tuple[int, str]]:
        try:
            with self._path.open(encoding="utf-8") as file:
                yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self._path}: cannot be read ({error})") from error

    def _conversation(self, number: int, line: str, *, load: bool) -> Conversation:
        """A line's conversation; without ``load`` its pictures are only looked for, and blank."""
        try:
            row = json.loads(line)
            _expect(isinstance(row, dict) and isinstance(row.get("messages"), list), "is no object with a list 'messages'")
            _expect(encodable(json.dumps(row, ensure_ascii=False)), "holds half of a surrogate pair, which no tokenizer takes")
            messages = tuple(self._message(at, message, load) for at, message in enumerate(row["messages"]))
            _expect(
                any(message.role == "assistant" and message.weight for message in messages),
                "'messages' has no assistant with a weight, so nothing is learned",
            )
            _expect(messages[0].role != "assistant", "'messages' begins with the assistant, before anything was asked")
            about = self._about(row.get("tools") or [])
        except json.JSONDecodeError as error:
            raise DataError(f"{self._path}, line {number}: is no JSON ({error.msg} at character {error.pos})") from error
        except _BadLineError as error:
            raise DataError(f"{self._path}, line {number}: {error}") from error
        except (ValueError, RecursionError) as error:  # an integer of thousands of digits; thousands of brackets
            raise DataError(f"{self._path}, line {number}: is no JSON (too many digits or brackets)") from error
        return self._told(messages, about)

    def _told(self, messages: Conversation, about: str) -> Conversation:
        """With what the system message says of tools."""
        if not about:
            return messages
        if messages[0].role != "system":
            return (Message("system", (about,)), *messages)
        return (replace(messages[0], parts=(*messages[0].parts, f"\n\n{about}")), *messages[1:])

    def _about(self, tools: Any) -> str:
        """What a model is told of a line's tools."""
        _expect(isinstance(tools, list), "'tools' is no list of functions")
        schemas = [_schema(f"tools[{place}]", tool) for place, tool in enumerate(tools)]
        try:
            return self._format.instructions(schemas) if schemas else ""
        except ValueError as error:
            raise _BadLineError(f"'tools': {error}") from error

    def _message(self, at: int, message: Any, load: bool) -> Message:
        key = f"messages[{at}]"
        _expect(isinstance(message, dict), f"'{key}' is no object")
        roles = get_args(Role)
        _expect(message.get("role") in roles, f"'{key}.role' is {message.get('role')!r}, not one of {', '.join(roles)}")
        unknown = sorted(set(message) - {"role", "content", "tool_calls", "tool_call_id", "name", "weight"})
        _expect(not unknown, f"'{key}' has an unknown key '{unknown[0] if unknown else ''}'")
        content = message.get("content")
        parts = [content] if isinstance(content, str) else [] if content is None else content
        _expect(isinstance(parts, list), f"'{key}.content' is neither a string nor a list")
        read = [self._part(f"{key}.content[{place}]", part, load) for place, part in enumerate(parts)]
        asked = message.get("tool_calls") or []
        _expect(isinstance(asked, list), f"'{key}.tool_calls' is no list")
        calls = tuple(_call(f"{key}.tool_calls[{place}]", call) for place, call in enumerate(asked))
        _expect(not calls or message["role"] == "assistant", f"'{key}.tool_calls': only an assistant calls tools")
        if calls:
            try:
                written = self._format.render(calls)
            except ValueError as error:
                raise _BadLineError(f"'{key}.tool_calls': {error}") from error
            read.append(f"\n{written}" if read else written)
        _expect(bool(read), f"'{key}' says nothing")
        shown = any(isinstance(part, Picture) for part in read)
        allowed = self._drawn or not shown or message["role"] != "assistant"
        _expect(
            allowed, f"'{key}.content': an assistant shows no pictures; set 'drawn' where an image generator is to learn them"
        )
        return Message(message["role"], tuple(read), calls, weight=self._weight(key, message))

    def _weight(self, key: str, message: Mapping[str, Any]) -> float:
        """How much the message counts."""
        if "weight" not in message:
            return 1.0
        weight = message["weight"]
        _expect(
            isinstance(weight, int | float) and not isinstance(weight, bool) and 0 <= weight < math.inf,
            f"'{key}.weight' is {weight!r}, no number from 0 on",
        )
        _expect(message["role"] == "assistant" and not self._drawn, f"'{key}.weight': only what an assistant says has a weight")
        return float(weight)

    def _part(self, key: str, part: Any, load: bool) -> str | Picture:
        if isinstance(part, str):
            return part
        _expect(isinstance(part, dict), f"'{key}' is neither a string nor an object")
        kind = part.get("type")
        if kind == "text":
            _expect(isinstance(part.get("text"), str), f"'{key}.text' is no string")
            return part["text"]
        _expect(kind in ("image", "image_url"), f"'{key}.type' is {kind!r}, not one of text, image, image_url")
        linked = part.get("image_url")
        place = part.get("image") if kind == "image" else linked.get("url") if isinstance(linked, Mapping) else None
        _expect(isinstance(place, str), f"'{key}' does not say where its picture is")
        path = self._path.parent / str(place).removeprefix("file://")
        try:
            with Image.open(path) as image:
                return Picture(as_seen(ImageOps.exif_transpose(image))) if load else _BLANK
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise _BadLineError(f"'{key}': the picture {path} cannot be read ({error})") from error


class _BadLineError(ValueError):
    """What is wrong with a line, in words that follow its number."""


def _expect(good: bool, problem: str) -> None:
    if not good:
        raise _BadLineError(problem)


def _schema(key: str, tool: Any) -> ToolSchema:
    _expect(isinstance(tool, dict), f"'{key}' is no object")
    about = tool.get("function", tool)
    _expect(isinstance(about, dict) and isinstance(about.get("name"), str), f"'{key}' has no name")
    description, parameters = about.get("description", ""), about.get("parameters", {})
    _expect(isinstance(description, str), f"'{key}.description' is no string")
    _expect(isinstance(parameters, dict), f"'{key}.parameters' is no object")
    return ToolSchema(about["name"], description, parameters)


def _call(key: str, call: Any) -> ToolCall:
    _expect(isinstance(call, dict), f"'{key}' is no object")
    about = call.get("function", call)
    _expect(isinstance(about, dict) and isinstance(about.get("name"), str), f"'{key}' has no name")
    arguments = about.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise _BadLineError(f"'{key}.arguments' is no JSON ({error.msg})") from error
    _expect(isinstance(arguments, dict), f"'{key}.arguments' is no object")
    return ToolCall(about["name"], arguments)
