"""Runs the calls of a turn and turns whatever happens into something that the model can read.

What the time limit does and does not: a call that is late becomes an error result and its thread is left behind (``timed.py``),
still using the processor if it computes. A tool that may run for ever belongs into a process, which it kills after
``ctx.timeout_s``; it has GRACE_S more to say so itself. Tools are shared by all conversations and called from several threads.
"""

from __future__ import annotations

import logging
import random
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mmrl.calling.formats import MalformedCall
from mmrl.calling.results import as_result, cut, short
from mmrl.calling.schema import HIDDEN, BadArguments, checker, describe, full_stop, place, takes_context
from mmrl.calling.timed import Timed, Workers
from mmrl.errors import ConfigError
from mmrl.messages import Picture, ToolCall, ToolContext, ToolError, ToolResult, ToolSchema
from mmrl.registry import GUESS, did_you_mean

ErrorKind = Literal[
    "malformed", "unknown_tool", "bad_arguments", "tool_error", "exception", "timeout", "not_started", "too_many_calls"
]
GRACE_S = 0.5
SHORT = 300  # characters of an exception's message that a model is shown
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What became of a call. result: for the model. seconds: that the tool ran. error: the kind of failure; None: there is none.

    rewards: (name, value) pairs that the tool emitted; none of a tool that failed or was late.
    """

    result: ToolResult
    error: ErrorKind | None = None
    seconds: float = 0.0
    rewards: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class _Offer:
    """A tool, and what is known of it before any call."""

    tool: Any
    schema: ToolSchema
    check: Callable[[Mapping[str, Any]], dict[str, Any]]
    takes_context: bool
    ordered: bool


@dataclass(frozen=True)
class _Job:
    """A call that is fit to run. place: in its turn."""

    place: int
    offer: _Offer
    arguments: Mapping[str, Any]
    context: ToolContext


class Toolbox:
    """The tools of an environment, for all of its conversations.

    timeout_s: of a call, from when it begins. max_calls: of a turn; what is beyond them is refused. max_text: characters of a
    result. concurrency: calls that run at a time, over all conversations. number_pictures: whether a result's text says the
    number and size of each picture that it brings. Raises ConfigError for a tool that cannot be described, or two of one name.

    The calls of a turn run at the same time and see the same pictures, those that were shown before the turn. Calls of tools with
    an attribute ``ordered = True``, which is for those that keep something in ``ctx.state``, run one after the other.
    """

    def __init__(
        self,
        tools: Iterable[Any],
        *,
        timeout_s: float = 10.0,
        max_calls: int = 8,
        max_text: int = 8000,
        concurrency: int = 16,
        number_pictures: bool = True,
    ) -> None:
        self.timeout_s, self.max_calls, self.max_text, self.number_pictures = timeout_s, max_calls, max_text, number_pictures
        self._offers: dict[str, _Offer] = {}
        for tool in tools:
            offer = _Offer(tool, describe(tool), checker(tool), takes_context(tool), bool(getattr(tool, "ordered", False)))
            other = self._offers.setdefault(offer.schema.name, offer)
            if other is not offer:
                both = f"{place(other.tool)} and {place(tool)}"
                raise ConfigError(f"tools {both} are both called '{offer.schema.name}'; each needs a name of its own")
        self._workers = Workers(concurrency)
        self._logged: set[tuple[str, ...]] = set()

    @property
    def schemas(self) -> list[ToolSchema]:
        return [offer.schema for offer in self._offers.values()]

    @property
    def left_behind(self) -> int:
        """Calls that were late and still run."""
        return self._workers.left_behind

    def run(
        self,
        calls: Sequence[ToolCall | MalformedCall],
        *,
        pictures: Sequence[Picture] = (),
        state: dict[str, Any] | None = None,
        seed: int = 0,
        conversation: int | str = 0,
        turn: int = 0,
    ) -> list[Outcome]:
        """What became of each call of a turn, in their order; whatever a model wrote and a tool does, nothing is raised.

        pictures: those that the conversation showed before. state: the conversation's own. The random numbers of a call are
        determined by (seed, conversation, turn, its place in the turn).
        """
        shown, state = tuple(pictures), {} if state is None else state
        outcomes: dict[int, Outcome] = {}
        jobs: list[_Job] = []
        for index, call in enumerate(calls):
            context = ToolContext(shown, state, random.Random(f"{seed}/{conversation}/{turn}/{index}"), self.timeout_s)
            admitted = self._admit(index, call, context)
            if isinstance(admitted, _Job):
                jobs.append(admitted)
            else:
                outcomes[index] = admitted
        chains = [[job] for job in jobs if not job.offer.ordered] + [[job for job in jobs if job.offer.ordered]]
        done = self._workers.run([[self._piece(job) for job in chain] for chain in chains if chain], self.timeout_s + GRACE_S)
        for chain, pieces in zip((chain for chain in chains if chain), done, strict=True):
            outcomes |= {job.place: self._outcome(job, timed) for job, timed in zip(chain, pieces, strict=True)}
        in_order = [self._cut(outcomes[index]) for index in range(len(calls))]
        return _numbered(in_order, len(shown)) if self.number_pictures else in_order

    def close(self) -> None:
        """Close the tools that hold something."""
        for offer in self._offers.values():
            if hasattr(offer.tool, "close"):
                offer.tool.close()

    def _admit(self, index: int, call: ToolCall | MalformedCall, context: ToolContext) -> _Job | Outcome:
        if index >= self.max_calls:
            return _failed("too_many_calls", f"A turn may have {self.max_calls} calls at most; this one was not run.")
        if isinstance(call, MalformedCall):
            return _failed("malformed", call.sentence)
        offer = self._offers.get(call.name)
        if offer is None:
            hint = did_you_mean(call.name, self._offers, GUESS)
            return _failed("unknown_tool", full_stop(f"There is no tool '{short(call.name, SHORT)}'{hint}"))
        try:
            return _Job(index, offer, offer.check(call.arguments), context)
        except BadArguments as error:
            return _failed("bad_arguments", str(error))
        except Exception as error:
            return self._exception(call.name, error)

    def _piece(self, job: _Job) -> Callable[[], Outcome]:
        return lambda: self._call(job)

    def _call(self, job: _Job) -> Outcome:
        name = job.offer.schema.name
        hidden = {HIDDEN: job.context} if job.offer.takes_context else {}
        try:
            result = as_result(job.offer.tool(**job.arguments, **hidden))
        except ToolError as error:
            return _failed("tool_error", str(error))
        except BaseException as error:  # also SystemExit, which would end the thread without a word
            return self._exception(name, error)
        return Outcome(result, "tool_error" if result.error else None, rewards=tuple(job.context.rewards))

    def _outcome(self, job: _Job, timed: Timed) -> Outcome:
        name = job.offer.schema.name
        if timed.status == "done":
            return replace(timed.value, seconds=timed.seconds)
        if timed.status == "late":
            return replace(_failed("timeout", f"{name} did not return within {self.timeout_s:g} s."), seconds=timed.seconds)
        return _failed("not_started", f"{name} was not run, because a call before it did not return in time.")

    def _exception(self, name: str, error: BaseException) -> Outcome:
        """What the model is told. The log has the traceback, the first time that ``name`` fails at this place."""
        at = traceback.extract_tb(error.__traceback__)[-1:]
        key = (name, type(error).__name__, *(f"{frame.filename}:{frame.lineno}" for frame in at))
        if key not in self._logged:
            self._logged.add(key)
            _log.error("tool %s failed; more failures at this place are not logged", name, exc_info=error)
        return _failed("exception", f"{name} failed with {type(error).__name__}: {short(str(error), SHORT)}")

    def _cut(self, outcome: Outcome) -> Outcome:
        return replace(outcome, result=replace(outcome.result, text=cut(outcome.result.text, self.max_text)))


def _failed(kind: ErrorKind, sentence: str) -> Outcome:
    return Outcome(as_result(ToolResult(sentence, error=True)), kind)


def _numbered(outcomes: Sequence[Outcome], shown: int) -> list[Outcome]:
    """A line about each picture below a result's text: ``Image 3 is 640 x 480 pixels.`` ``shown``: pictures before the turn."""
    numbered: list[Outcome] = []
    for outcome in outcomes:
        lines = [outcome.result.text] if outcome.result.text else []
        for picture in outcome.result.pictures:
            shown += 1
            lines.append(f"Image {shown} is {picture.image.width} x {picture.image.height} pixels.")
        numbered.append(replace(outcome, result=replace(outcome.result, text="\n".join(lines))))
    return numbered
