"""Conversations of a report: what of ``trajectories`` fits on the page, as plain values that its script shows."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrl.report.recordings import MIME, evenly

MAX_CONVERSATIONS = 200
MAX_TEXT = 12 * 2**20  # characters of all conversations together
MAX_PICTURE_BYTES = 16 * 2**20  # base64 adds a third, and a report should still open at once and travel by mail
MAX_SUMMARY = 160  # characters of a question in the list
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Talk:
    """One conversation as the list shows it; ``body``: as the script does. earned: its reward, None where that is not known."""

    label: str
    stage: str
    iteration: int | None
    task_id: str
    family: str
    question: str
    success: bool
    timed_out: bool
    earned: float | None
    tools: list[str]
    failed_calls: int
    turns: int
    body: Mapping[str, Any]

    @property
    def when(self) -> str:
        return f"{self.label} {self.stage}".strip()

    @property
    def outcome(self) -> str:
        return "success" if self.success else "out of time" if self.timed_out else "failure"


@dataclass(frozen=True)
class Talks:
    """What the page shows, how many it leaves out, and pictures by file name as data URIs."""

    shown: list[Talk]
    left_out: int
    pictures: Mapping[str, str]

    @property
    def learned(self) -> bool:
        """Whether the tokens of any are known, and what they were worth."""
        return any("tokens" in message for talk in self.shown for message in talk.body["messages"])

    def data(self) -> dict[str, Any]:
        """For the script, in the order of the list."""
        return {"conversations": [talk.body for talk in self.shown], "pictures": self.pictures}


def is_conversation(record: Mapping[str, Any]) -> bool:
    return "messages" in record


def talks_of(records: Iterable[Mapping[str, Any]], folder: Path, stages: Sequence[str], notices: list[str]) -> Talks:
    """As many as fit, evenly from each stage, label, iteration, family and outcome; ``stages`` in the order of the run."""
    talks, damaged = [], 0
    for record in evenly(records, ("stage", "label", "iteration", "family", "success")):
        try:
            talks.append(_talk(record))
        except (KeyError, TypeError, ValueError, IndexError):
            damaged += 1
    if damaged:
        notices.append(f"{damaged} recorded conversation{'s' * (damaged > 1)} could not be read.")
    room, shown = MAX_TEXT, []
    for talk in talks:
        size = len(str(talk.body))
        if len(shown) < MAX_CONVERSATIONS and size <= room:
            room -= size
            shown.append(talk)
    files = dict.fromkeys(picture["file"] for talk in shown for picture in talk.body["pictures"])
    return Talks(_in_order(shown, stages), len(talks) - len(shown), _embedded(files, folder))


def _in_order(talks: Iterable[Talk], stages: Sequence[str]) -> list[Talk]:
    """From the beginning of the run to its end; those of one task from the best to the worst."""
    order = {stage: position for position, stage in enumerate(dict.fromkeys(stages))}
    labels = {"before": 0, "training": 1}

    def place(talk: Talk) -> tuple[Any, ...]:
        moment = order.get(talk.stage, len(order)), labels.get(talk.label, 2), talk.iteration or 0
        return *moment, talk.family, talk.task_id, -math.inf if talk.earned is None else -talk.earned

    return sorted(talks, key=place)


def _embedded(files: Iterable[str], folder: Path) -> dict[str, str]:
    """Those that are there, as long as there is room."""
    embedded, room = {}, MAX_PICTURE_BYTES
    for file in files:
        path = folder / file
        size = path.stat().st_size if path.is_file() else None
        if size is not None and size <= room:
            room -= size
            embedded[file] = f"data:{MIME[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
    return embedded


# ---------------------------------------------------------------- a record, checked


def _talk(record: Mapping[str, Any]) -> Talk:
    """Raises KeyError, TypeError, ValueError or IndexError where the record is not what mmrl.keeping writes."""
    pictures = [_picture(picture, place + 1) for place, picture in enumerate(record["pictures"])]
    messages = [_message(message, len(pictures)) for message in record["messages"]]
    calls = [call for message in messages for call in message.get("calls", ())]
    if any(call["reply"] is not None and not 0 <= call["reply"] < len(messages) for call in calls):
        raise ValueError("a call whose reply is no message")
    rewards = [
        {"name": str(r["name"]), "score": _number(r["score"]), "weight": _number(r["weight"])} for r in record.get("rewards", ())
    ]
    known = {reward["name"] for reward in rewards}
    scores = {str(name): _number(score) for name, score in record.get("scores", {}).items()}
    rewards += [{"name": name, "score": score, "weight": None} for name, score in scores.items() if name not in known]
    body = {
        "answer": None if record.get("answer") is None else str(record["answer"]),
        "references": [str(reference) for reference in record.get("references", ())],
        "mark": _number(record.get("mark")),
        "ended": str(record.get("ended", "")),
        "evidence": _box(record.get("evidence")),
        "rewards": rewards,
        "total": _number(record.get("return")),
        "pictures": pictures,
        "asked": max((place for place, picture in enumerate(pictures) if picture["number"] == 1), default=0),
        "messages": messages,
    }
    iteration = record.get("iteration")
    return Talk(
        label=str(record.get("label", "")),
        stage=str(record.get("stage", "")),
        iteration=iteration if isinstance(iteration, int) else None,
        task_id=str(record.get("task_id", "")),
        family=str(record.get("family", "")),
        question=_shortened(str(record["instruction"])),
        success=bool(record["success"]),
        timed_out=record.get("timed_out") is True,
        earned=body["total"],
        tools=list(dict.fromkeys(call["name"] for call in calls if call["name"])),
        failed_calls=sum(call["error"] is not None for call in calls),
        turns=sum("calls" in message for message in messages),
        body=body,
    )


def _picture(record: Mapping[str, Any], number: int) -> dict[str, Any]:
    file = Path(str(record["file"]))
    if file.suffix not in MIME or file.is_absolute() or ".." in file.parts:  # a record cannot reach outside its folder
        raise ValueError("no picture of this folder")
    source = record.get("source")
    return {
        "file": file.as_posix(),
        "width": int(record["width"]),
        "height": int(record["height"]),
        "number": int(record.get("number", number)),  # of records that are older, its place
        "source": None if source is None else int(source),
        "box": _box(record.get("box")),
    }


def _message(record: Mapping[str, Any], pictures: int) -> dict[str, Any]:
    if record["role"] not in _ROLES:
        raise ValueError("no role")
    parts = [part if isinstance(part, int) else str(part) for part in record["parts"]]
    if not all(0 <= part < pictures for part in parts if isinstance(part, int)):
        raise IndexError("no such picture")
    message: dict[str, Any] = {"role": record["role"], "parts": parts}
    if "calls" in record:
        message |= {"finish": str(record.get("finish", "")), "calls": [_call(call) for call in record["calls"]]}
    if "advantage" in record:
        message |= {"advantage": _number(record["advantage"]), "reward": _number(record.get("reward"))}
    if "tokens" in record:
        message["tokens"] = [[str(text), _number(log_prob), _number(worth)] for text, log_prob, worth in record["tokens"]]
    return message


def _call(record: Mapping[str, Any]) -> dict[str, Any]:
    error, reply = record.get("error"), record.get("reply")
    numbers = {**record.get("rewards", {}), **record.get("metrics", {})}
    return {
        "name": str(record["name"]),
        "arguments": {str(name): _plain(value) for name, value in record["arguments"].items()},
        "error": None if error is None else str(error),
        "seconds": _number(record.get("seconds")),
        "numbers": {str(name): _number(value) for name, value in numbers.items()},
        "reply": None if reply is None else int(reply),
        "text": str(record.get("text", "")),
    }


def _plain(value: Any) -> Any:
    """JSON without NaN and infinities, which a browser cannot read."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def _box(value: Any) -> list[float] | None:
    if value is None:
        return None
    left, top, right, bottom = (float(side) for side in value)
    return [left, top, right, bottom]


def _number(value: Any) -> float | None:
    """None for what is no finite number."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if number else None


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_SUMMARY else f"{line[: MAX_SUMMARY - 1]}…"
