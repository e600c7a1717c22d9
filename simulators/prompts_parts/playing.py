"""What an expert and real tools say to one another about a question, and what can be known without looking."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from mmrl.messages import Message, Picture, ToolCall
from mmrl.transcripts import CallRecord, ExpertQuestions, Question, Questions, Turn

_MOST_TURNS = 12


class Runner(Protocol):
    """What runs calls, as ``mmrl.calling.Toolbox`` does."""

    def run(self, calls: Sequence[Any], *, pictures: Sequence[Picture], state: dict[str, Any]) -> Sequence[Any]: ...


def play(expert: ExpertQuestions, question: Question, runner: Runner | None = None) -> tuple[Turn, ...]:
    """The turns until the expert answers, which is the last one's text; it has a dozen."""
    turns: tuple[Turn, ...] = ()
    shown = [part for part in question.parts if isinstance(part, Picture)]
    state: dict[str, Any] = {}
    while len(turns) < _MOST_TURNS:
        text, calls = expert.next_turn(question, turns)
        message = Message("assistant", (text,), calls)
        if not calls or runner is None:
            return (*turns, Turn(message))
        outcomes = runner.run(calls, pictures=shown, state=state)
        records = tuple(_record(call, outcome) for call, outcome in zip(calls, outcomes, strict=True))
        shown += [picture for record in records for picture in record.result.pictures]
        replies = tuple(Message("tool", (record.result.text, *record.result.pictures)) for record in records)
        turns = (*turns, Turn(message, records, replies))
    return turns


def _record(call: ToolCall, outcome: Any) -> CallRecord:
    return CallRecord(call.name, call.arguments, outcome.result, outcome.error, outcome.seconds, outcome.rewards)


def texts(questions: Questions, count: int, runner: Runner | None = None) -> Iterator[str]:
    """What is said about the first ``count`` questions, for training a tokenizer: questions, calls, results, answers.

    runner: a Toolbox with the tools that the expert calls; without one, or without an expert, questions and answers alone.
    """
    for task_id in range(count):
        question = questions.question(task_id)
        yield from (part for part in question.parts if isinstance(part, str))
        if not isinstance(questions, ExpertQuestions) or runner is None:
            yield question.references[0]
            continue
        for turn in play(questions, question, runner):
            yield turn.message.text
            yield from (json.dumps({"name": call.name, "arguments": dict(call.arguments)}) for call in turn.message.calls)
            yield from (reply.text for reply in turn.replies)


def blind_mark(questions: Questions, count: int) -> float:
    """The mark of who sees no picture: of each text the most frequent answer of ``count`` questions, tried on as many others.

    A text that did not occur is given the most frequent answer of its family.
    """
    seen: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question in map(questions.question, range(count)):
        for key in (question.family, _asked(question)):
            seen[key][question.references[0]] += 1
    total = 0.0
    for question in map(questions.question, range(count, 2 * count)):
        known = seen.get(_asked(question)) or seen.get(question.family) or Counter({"": 1})
        total += question.check(known.most_common(1)[0][0])
    return total / count


def _asked(question: Question) -> str:
    return "".join(part for part in question.parts if isinstance(part, str))
