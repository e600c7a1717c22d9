"""What can be counted in conversations, whatever they are rewarded for: who used tools, with what success, at what length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from mmrl.rewards.evidence import faithful
from mmrl.transcripts import Transcript

CORRECT = 0.5  # an answer with a higher mark counts as correct
WINDOW = 5  # rollouts over which the tool rate is averaged before it may raise the alarm


@dataclass(frozen=True)
class Talk:
    """The numbers of one conversation.

    faithful: whether what its tools gave holds the evidence; None where the evidence is not known. seconds: by tool.
    errors: by kind. drawn: whether the policy's part is a picture, of which none of this says much.
    """

    turns: int
    calls: int
    failed_calls: int
    tokens: int
    correct: bool
    answered: bool
    truncated: bool
    faithful: bool | None
    seconds: Mapping[str, float]
    errors: Mapping[str, int]
    drawn: bool = False

    @classmethod
    def of(cls, transcript: Transcript) -> Talk:
        calls = transcript.calls
        seconds: Counter[str] = Counter()
        for call in calls:
            if call.name and call.error != "unknown_tool":  # a model's inventions are no names for a log
                seconds[call.name] += call.seconds  # pyright: ignore[reportArgumentType]
        return cls(
            turns=len(transcript.turns),
            calls=len(calls),
            failed_calls=sum(call.error is not None for call in calls),
            tokens=sum(len(turn.message.token_ids) for turn in transcript.turns),
            correct=transcript.mark > CORRECT,
            answered=transcript.answer is not None,
            truncated=transcript.ended == "length",
            faithful=faithful(transcript),
            seconds=dict(seconds),
            errors=Counter(call.error for call in calls if call.error is not None),
            drawn=any(turn.message.pictures for turn in transcript.turns),
        )

    def row(self) -> dict[str, Any]:
        """As it stands beside an episode that was played: what is the same every time."""
        return {"turns": self.turns, "calls": self.calls, "answered": self.answered, "faithful": self.faithful}


def summary(talks: Sequence[Talk]) -> dict[str, float]:
    """Shares and means over conversations; none where there are none, or pictures alone.

    tool_rate: of conversations with a call. tool_success_rate: of calls. faithful_rate: of correct answers whose evidence is
    known, those whose tools brought it up. Rates of nothing are left out.
    """
    talks = [talk for talk in talks if not talk.drawn]
    if not talks:
        return {}
    calls, turns = sum(talk.calls for talk in talks), sum(talk.turns for talk in talks)
    known = [talk.faithful for talk in talks if talk.correct and talk.faithful is not None]
    shares = {
        "tool_rate": fmean(talk.calls > 0 for talk in talks),
        "calls": calls / len(talks),
        "turns": turns / len(talks),
        "tokens_per_turn": sum(talk.tokens for talk in talks) / max(turns, 1),
        "answered": fmean(talk.answered for talk in talks),
        "truncated": fmean(talk.truncated for talk in talks),
    }
    if calls:
        shares["tool_success_rate"] = 1 - sum(talk.failed_calls for talk in talks) / calls
    if known:
        shares["faithful_rate"] = fmean(known)
    return shares


def talk_metrics(transcripts: Sequence[Transcript]) -> dict[str, float]:
    """``summary`` as it is logged, under ``agent/``, with the mean seconds of a call of each tool and counts of each error."""
    talks = [Talk.of(transcript) for transcript in transcripts]
    calls = Counter(call.name for transcript in transcripts for call in transcript.calls)
    seconds, errors = Counter[str](), Counter[str]()
    for talk in talks:
        seconds.update(talk.seconds)  # pyright: ignore[reportArgumentType, reportCallIssue]
        errors.update(talk.errors)
    return {
        **{f"agent/{name}": value for name, value in summary(talks).items()},
        **{f"agent/seconds/{name}": float(total) / calls[name] for name, total in sorted(seconds.items())},
        **{f"agent/errors/{kind}": float(count) for kind, count in sorted(errors.items())},
    }


class ToolWatch:
    """Notices when a policy gives up its tools.

    The tool rate is averaged over the last WINDOW rollouts. The alarm is raised once when that falls below a third of the highest
    it has been, and again only after it has been back above half of it.
    """

    def __init__(self) -> None:
        self._recent: list[float] = []
        self._highest, self._raised = 0.0, False

    def see(self, rate: float | None) -> str | None:
        """The tool rate of a rollout (None: nobody talks there); a sentence for the user, if there is a reason."""
        if rate is None:
            return None
        self._recent = [*self._recent, rate][-WINDOW:]
        if len(self._recent) < WINDOW:
            return None
        mean = fmean(self._recent)
        self._highest = max(self._highest, mean)
        if self._raised:
            self._raised = mean <= self._highest / 2
            return None
        self._raised = mean < self._highest / 3
        if not self._raised:
            return None
        return (
            f"the policy stops using its tools: {mean:.0%} of the conversations of the last {WINDOW} rollouts have a call, "
            f"at best it was {self._highest:.0%}; reward what tools are needed for, or lower the learning rate"
        )

    def state(self) -> dict[str, Any]:
        return {"recent": self._recent, "highest": self._highest, "raised": self._raised}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._recent, self._highest, self._raised = list(state["recent"]), float(state["highest"]), bool(state["raised"])
