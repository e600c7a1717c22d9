"""Questions and tools as an environment: a policy talks, its calls are run, and its answer is marked.

A turn is a message of the policy. Calls in it are run, of all conversations and calls side by side, and each result is a message
of the role ``tool``; whatever goes wrong with a call is such a message too. A message without calls is the answer and ends the
conversation. So do, without an answer, a message that was cut (``finish`` is "length"), and calls in the last of ``max_turns``.

The reward is the answer's mark at the end; a stage's ``rewards`` replace it. One step is one turn.

For credit by state (GiGPO), the state of a conversation is its task, what was shown last, and all that has been shown (see
``state_key``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass as plain_dataclass
from dataclasses import field, replace
from typing import Any

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from mmrl.answers import extract
from mmrl.calling import CallFormat, MalformedCall, Outcome, ToolBlock, Toolbox, load_tools
from mmrl.columns import Column
from mmrl.component import Component
from mmrl.errors import ConfigError
from mmrl.messages import Message, ToolCall
from mmrl.transcripts import CallRecord, Ending, ExpertQuestions, Question, Questions, Transcript, Turn
from mmrl.types import Conversation, Observation, Step

_HERMES = {"target": "mmrl.calling.formats:HermesCalls"}
_DEMONSTRATED = 7 << 40  # ids of the tasks that are shown as examples: far from those that are asked


@plain_dataclass
class _Slot:
    """A running conversation. state: what tools keep in it."""

    task_id: int
    question: Question
    opening: Conversation
    turns: tuple[Turn, ...] = ()
    answer: str | None = None
    ended: Ending = "running"
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def transcript(self) -> Transcript:
        return Transcript(self.task_id, self.question, self.opening, self.turns, self.answer, self.ended)

    def close(self) -> None:
        """Close what tools keep."""
        for kept in self.state.values():
            if hasattr(kept, "close"):
                kept.close()
        self.state.clear()


class ToolEnvironment:
    """See the module. Satisfies Environment, AsyncEnvironment, ExpertEnvironment and TalkingEnvironment."""

    action_spec: Any = None

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
    class Config:
        """Fields of a ``mmrl.tool_use:ToolEnvironment`` block."""

        questions: Component
        """What is asked, such as ``simulators.prompts:Details``."""
        tools: list[ToolBlock] = field(default_factory=list)
        """Tools on offer, such as ``tools.crop:crop``; none: every message is an answer."""
        calls: Component = field(default_factory=lambda: Component.parse(_HERMES))
        """How calls are written."""
        max_turns: int = Field(default=4, ge=1)
        """Messages of the policy at most."""
        system: str = ""
        """The system message, before the question's own and what is said of the tools; where all are empty there is none."""
        describe_tools: bool = True
        """Whether the system message describes the tools; without it a policy must know them from training."""
        answer_tag: str | None = None
        """The answer is what stands within <tag>...</tag>; null: all that is said after any thoughts."""
        pass_mark: float = Field(default=1.0, gt=0, le=1)
        """Marks from which an answer counts as a success."""
        demonstrations: int = Field(default=0, ge=0)
        """Examples in front of the question, solved by the questions' scripted expert with the same tools; lower it from stage to
        stage, down to 0 (ICRL, 2603.08068). In each of them, and in the question, pictures are numbered from 1."""
        timeout_s: float = Field(default=10.0, gt=0)
        """Time of a call; a late one is an error message to the model."""
        max_calls: int = Field(default=4, ge=1)
        """Calls of a turn at most; more are refused."""
        max_text: int = Field(default=8000, ge=1)
        """Characters of a result that the model is shown."""
        concurrency: int = Field(default=16, ge=1)
        """Calls that run at a time."""
        number_pictures: bool = True
        """Whether a result says the number and size of each picture in it, by which later calls name them."""

    def __init__(self, config: Config, *, num_envs: int, device: torch.device) -> None:
        self.config, self.num_envs, self.device, self.max_steps = config, num_envs, device, config.max_turns
        questions: Any = config.questions.build()  # before the tools, which may read what it writes
        if not isinstance(questions, Questions):
            raise ConfigError(f"'questions.target' ({config.questions.target}) asks nothing; use one of simulators.prompts")
        self.questions: Questions = questions
        self.format: CallFormat = config.calls.build()
        self.toolbox = Toolbox(
            load_tools(config.tools),
            timeout_s=config.timeout_s,
            max_calls=config.max_calls,
            max_text=config.max_text,
            concurrency=config.concurrency,
            number_pictures=config.number_pictures,
        )
        self._threads = ThreadPoolExecutor(config.concurrency, "conversation")
        self._slots: list[_Slot] = []
        self._examples: tuple[Message, ...] | None = None

    # -- episodes ------------------------------------------------------------------------------------------------------

    def reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Observation:
        begun: dict[int, tuple[Question, Conversation]] = {}
        slots: list[_Slot] = []
        for slot, task in enumerate(task_ids_B.tolist()):
            if where_B is not None and not where_B[slot]:
                slots.append(self._slots[slot])
                continue
            if slot < len(self._slots):
                self._slots[slot].close()
            if task not in begun:  # a group shares its question, and the very messages that open it
                question = self.questions.question(task)
                begun[task] = question, self._opening(question)
            slots.append(_Slot(task, *begun[task]))
        self._slots = slots
        return self._observe()

    def step(self, actions: Any, /) -> Step:
        return self.begin_step(actions)()

    def begin_reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Callable[[], Observation]:
        observation = self.reset(task_ids_B, where_B)
        return lambda: observation

    def begin_step(self, actions: Any, /) -> Callable[[], Step]:
        """The calls of all conversations start to run."""
        running: dict[int, Future[Turn]] = {}
        for slot, message in enumerate(actions.tolist()):
            if self._slots[slot].ended == "running" and message is not None:
                running[slot] = self._threads.submit(self._turn, self._slots[slot], message)
        return lambda: self._end_step({slot: future.result() for slot, future in running.items()})

    def _end_step(self, turns: dict[int, Turn]) -> Step:
        ran_B = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        for slot, turn in turns.items():
            running, ran_B[slot] = self._slots[slot], True
            running.turns = (*running.turns, turn)
            running.ended = self._ending(running, turn)
            if running.ended == "answer":
                running.answer = extract(turn.message.text, self.config.answer_tag)
            if running.ended != "running":
                running.close()
        marks_B = torch.tensor([slot.transcript.mark for slot in self._slots], device=self.device)
        truncated_B = self._where("turns") | self._where("length")
        metrics = {"success": (marks_B >= self.config.pass_mark).float(), "mark": marks_B}
        return Step(self._observe(), (marks_B * ran_B)[:, None], ran_B[:, None], self._where("answer"), truncated_B, metrics)

    def _ending(self, slot: _Slot, turn: Turn) -> Ending:
        if turn.message.finish == "length":
            return "length"
        if not turn.calls:
            return "answer"
        return "turns" if len(slot.turns) == self.config.max_turns else "running"

    def _where(self, ending: Ending) -> Tensor:
        return torch.tensor([slot.ended == ending for slot in self._slots], device=self.device)

    def _turn(self, slot: _Slot, message: Message) -> Turn:
        """What follows a message: its calls are run, unless it was cut, in which case they may be as well."""
        calls = [] if message.finish == "length" or not self.config.tools else self.format.parse(message.text)
        if not calls:
            return Turn(message)
        outcomes = self.toolbox.run(
            calls,
            pictures=slot.transcript.pictures,
            state=slot.state,
            conversation=slot.task_id,
            turn=len(slot.turns),
        )
        replies = tuple(_reply(outcome) for outcome in outcomes)
        return Turn(message, tuple(map(_record, calls, outcomes)), replies)

    # -- what is said before the first turn ------------------------------------------------------------------------------

    def _opening(self, question: Question) -> Conversation:
        system = self._system(question)
        first = (Message("system", (system,)),) if system else ()
        if self.config.demonstrations and self._examples is None:
            self._examples = self._demonstrated()
        return (*first, *(self._examples or ()), *question.before, Message("user", question.parts))

    def _system(self, question: Question) -> str:
        schemas = self.toolbox.schemas
        about = self.format.instructions(schemas) if schemas and self.config.describe_tools else ""
        return "\n\n".join(part for part in (self.config.system, question.system, about) if part)

    def _demonstrated(self) -> tuple[Message, ...]:
        """Solved examples, as messages that nobody learns from."""
        messages: list[Message] = []
        for example in range(self.config.demonstrations):
            question = self.questions.question(_DEMONSTRATED + example)
            slot = _Slot(_DEMONSTRATED + example, question, (Message("user", question.parts),))
            while slot.ended == "running":
                turn = self._turn(slot, self._expert_message(slot))
                slot.turns = (*slot.turns, turn)
                slot.ended = self._ending(slot, turn)
            slot.close()
            messages += (replace(message, weight=0.0) for message in slot.transcript.messages)
        return tuple(messages)

    # -- what else it can tell -------------------------------------------------------------------------------------------

    def expert_action(self) -> Any:
        """What the questions' scripted expert says next in each slot: a Column of messages, nothing where none runs.

        Without tools it says the answer, which it knows.
        """
        return Column.of([self._expert_message(slot) if slot.ended == "running" else None for slot in self._slots], self.device)

    def _expert_message(self, slot: _Slot) -> Message:
        if not isinstance(self.questions, ExpertQuestions):
            raise ConfigError(f"'questions.target' ({self.config.questions.target}) has no scripted expert")
        text, calls = (
            self.questions.next_turn(slot.question, slot.turns) if self.config.tools else (slot.question.references[0], ())
        )
        if not calls:
            answer = text if self.config.answer_tag is None else f"<{self.config.answer_tag}>{text}</{self.config.answer_tag}>"
            return Message("assistant", (answer,))
        written = self.format.render(calls)
        return Message("assistant", (f"{text}\n{written}" if text else written,), calls=calls)

    def transcript(self, slot: int) -> Transcript:
        return self._slots[slot].transcript

    def family_of(self, task_ids_M: Tensor) -> tuple[str, ...]:
        known = {slot.task_id: slot.question.family for slot in self._slots}
        return tuple(known.get(task) or self.questions.question(task).family for task in task_ids_M.tolist())

    def close(self) -> None:
        for slot in self._slots:
            slot.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.toolbox.close()

    def _observe(self) -> Observation:
        asked = tuple(slot.opening[-1].text for slot in self._slots)
        told = [slot.transcript for slot in self._slots]
        anchors_B = torch.tensor([state_key(each) for each in told], dtype=torch.long, device=self.device)
        return Observation({}, None, asked, conversations=tuple(each.messages for each in told), anchors_B=anchors_B)


def state_key(transcript: Transcript) -> int:
    """A key of the state that a conversation is in, as credit by state compares it: int64, the same in every run.

    Equal are the task, what the calls of the last turn showed, in their order, and the set of what calls have shown so far:
    texts and pixels. So whoever gets to a page by the same other pages, in whatever order and however often, gets to the same
    state. What was said on the way does not count, and a call that failed only while its message is the last one: it taught
    nothing. What tools keep to themselves (a Python session) is not in it, nor how many turns are left.
    """
    pairs = [pair for turn in transcript.turns for pair in zip(turn.calls, turn.replies, strict=True)]
    last = [_content(reply) for turn in transcript.turns[-1:] for reply in turn.replies]
    seen = sorted({_content(reply) for call, reply in pairs if call.error is None})
    digest = hashlib.sha256(json.dumps([transcript.task_id, last, seen]).encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def _content(message: Message) -> str:
    """A name for what a message shows: equal where texts and pixels are."""
    return json.dumps([part if isinstance(part, str) else {"picture": part.key} for part in message.parts])


def _reply(outcome: Outcome) -> Message:
    text, pictures = outcome.result.text, outcome.result.pictures
    return Message("tool", (*([text] if text else []), *pictures))


def _record(call: ToolCall | MalformedCall, outcome: Outcome) -> CallRecord:
    read = isinstance(call, ToolCall)
    name, arguments = (call.name, call.arguments) if read else ("", {})
    return CallRecord(name, arguments, outcome.result, outcome.error, outcome.seconds, outcome.rewards)
