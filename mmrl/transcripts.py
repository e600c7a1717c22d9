"""Questions, and the whole story of a conversation about one: what rewards judge and reports show."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from mmrl.messages import Message, Picture, ToolCall, ToolResult

Ending = Literal["answer", "turns", "length", "running"]


@dataclass(frozen=True)
class Question:
    """What a conversation is about.

    family: the name under which it is reported. parts: what the user says, text and pictures. references: right answers, the
    one that an expert would give first. check: from an answer's text to its mark, 0 (wrong) to 1 (right). details: what a
    process reward may want to know, where it is known: ``operations`` (names of the operations that undo what was done to the
    first picture, of rotate_90, rotate_180, rotate_270, flip_horizontal, flip_vertical and crop), ``box`` (left, top, right,
    bottom of the evidence, in pixels of the first picture), ``evidence`` (texts, or ids of documents, that a tool must bring up).
    system: what the system message says beside what the environment has to say. before: what was said before the question, by
    users and assistants; nobody learns from it.

    Where a picture is asked for, there is no right answer, ``check`` is ``unmarked``, and what rewards may want to know is
    ``prompt`` (what is to be seen, in words), ``tag``, ``include`` and ``exclude`` (as in GenEval's metadata) and ``words``
    (texts that the picture must show). A picture is an empty answer.
    """

    family: str
    parts: tuple[str | Picture, ...]
    references: tuple[str, ...]
    check: Callable[[str], float]
    details: Mapping[str, Any] = field(default_factory=dict)
    system: str = ""
    before: tuple[Message, ...] = ()

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All that it shows, in order, as calls count them."""
        parts = (*(part for message in self.before for part in message.parts), *self.parts)
        return tuple(part for part in parts if isinstance(part, Picture))


def unmarked(answer: str) -> float:
    """The check of a question that is answered with a picture: NaN, for a picture has no mark; rewards judge it."""
    return math.nan


@runtime_checkable
class Questions(Protocol):
    """Unlimited questions, or a data set's. Built as ``cls(config)``; the config says which split."""

    def question(self, task_id: int) -> Question:
        """The same id gives the same question, also in another process. Any id is allowed; a data set counts round."""
        ...


@runtime_checkable
class ExpertQuestions(Protocol):
    """Questions that know how they are answered with tools."""

    def next_turn(self, question: Question, turns: tuple[Turn, ...]) -> tuple[str, tuple[ToolCall, ...]]:
        """What a scripted expert says after ``turns``: text (a thought, or the answer) and calls; without calls, it answers."""
        ...


@runtime_checkable
class DrawingQuestions(Protocol):
    """Questions that ask for a picture and can draw one that is right."""

    def draw(self, question: Question, generator: random.Random) -> Picture:
        """A picture as the question asks for it; what it leaves open is the generator's choice."""
        ...


@dataclass(frozen=True)
class CallRecord:
    """A call of a turn, and what became of it. error: the kind of failure (see mmrl.calling.ErrorKind), None: there is none.

    name and arguments: empty for a call that could not be read. seconds: that the tool ran. rewards: what the tool emitted.
    """

    name: str
    arguments: Mapping[str, Any]
    result: ToolResult
    error: str | None = None
    seconds: float = 0.0
    rewards: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Turn:
    """A message of the policy, the calls in it, and the messages that followed."""

    message: Message
    calls: tuple[CallRecord, ...] = ()
    replies: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Transcript:
    """A conversation as it ended (or stands). Those of one ``task_id`` in a rollout are a group.

    opening: the messages before the first turn. answer: the text that was checked, None where none was given. ended: "turns" and
    "length" are limits of turns and of tokens. scores: what the environment's own rewards gave it, by name.
    """

    task_id: int
    question: Question
    opening: tuple[Message, ...]
    turns: tuple[Turn, ...]
    answer: str | None
    ended: Ending
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def calls(self) -> tuple[CallRecord, ...]:
        return tuple(call for turn in self.turns for call in turn.calls)

    @property
    def shown(self) -> Picture | None:
        """The picture that the policy answered with: the last of its last message; None where it gave none."""
        pictures = self.turns[-1].message.pictures if self.turns else ()
        return pictures[-1] if pictures else None

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Those that calls name, from the question on, with what was said before it. Examples count their own."""
        return tuple(picture for message in self.messages[self.begins :] for picture in message.pictures)

    @property
    def begins(self) -> int:
        """The place of the message with which the question begins: it is the opening's last one, or what stands before it."""
        return max(len(self.opening) - 1 - len(self.question.before), 0)

    @property
    def mark(self) -> float:
        """Of the answer: 0 (wrong, or none) to 1; NaN for a picture."""
        return 0.0 if self.answer is None else float(self.question.check(self.answer))

    @property
    def messages(self) -> tuple[Message, ...]:
        return (*self.opening, *(message for turn in self.turns for message in (turn.message, *turn.replies)))


def by_task(transcripts: Sequence[Transcript]) -> dict[int, list[int]]:
    """The places of the transcripts of each task: a rollout's groups."""
    groups: dict[int, list[int]] = {}
    for place, transcript in enumerate(transcripts):
        groups.setdefault(transcript.task_id, []).append(place)
    return groups


@runtime_checkable
class TalkingEnvironment(Protocol):
    """An environment whose episodes are conversations, a turn for each decision."""

    def transcript(self, slot: int) -> Transcript:
        """The conversation in ``slot``, as it stands; after its end, until the slot is reset."""
        ...
