"""Conversations kept for the report: a json file each, and their pictures, each picture once, in a folder beside.

A file holds what is said ``about`` its episode, then ``answer``, ``references``, ``mark``, ``scores`` (what the environment's own
rewards gave, by name; null where one failed), ``ended``, ``evidence`` (a box of the first picture, or null), ``pictures`` and
``messages``. Pictures have the numbers, from 0, in which the conversation showed them: ``file``, the original's ``width`` and
``height``, ``source`` (the number of the one it was made from, or null) and ``box`` there.

An episode that was answered with a picture also has, after training, ``group``: ``episodes``, ``mean`` and ``std`` (unbiased) of
what the episodes of its task earned in that rollout.

A message has its ``role`` and ``parts`` (text, or the number of a picture). One of the policy also has ``finish`` and ``calls``:
``name``, ``arguments``, ``error``, ``seconds``, ``rewards``, ``metrics`` and ``reply``, the place of the message that says what
the call gave; where there is none, ``text`` says it. After training it has ``reward``, ``advantage`` and ``tokens`` as well: of
each its text, its log-probability when it was drawn, and its advantage. An advantage of null carries no loss.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmrl.checkpoint import atomic_write_bytes, atomic_write_text
from mmrl.config import StageConfig
from mmrl.messages import Message, Picture
from mmrl.protocols import Advantages, LegiblePolicy
from mmrl.rewarding import ENVIRONMENT
from mmrl.transcripts import CallRecord, Transcript, Turn, by_task
from mmrl.types import EpisodeRecord, Rollout

PICTURES = "pictures"  # the folder of pictures, beside the conversations
MAX_SIDE = 640  # of a kept picture, in pixels: as much as a reader needs
TINY = 64  # pixels of a side, up to which every pixel counts
LABEL = "training"  # of conversations from rollouts
ROUNDS = 10  # rollouts of a stage whose conversations are kept, unless its config says how often

Learned = Mapping[str, Any]  # what training adds to a message of the policy: reward, advantage, tokens


def write_conversation(
    folder: Path, name: str, transcript: Transcript, about: Mapping[str, Any], learned: Sequence[Learned] = ()
) -> None:
    """``folder``/``name``.json, whole or not at all, after its pictures; ``learned``: of each turn. Raises TrainingError."""
    numbers = iter(range(sum(len(message.pictures) for message in transcript.messages)))
    messages = [_message(message, numbers) for message in transcript.opening]
    for place, turn in enumerate(transcript.turns):
        calls = [_call(call, reply) for call, reply in zip(turn.calls, _replies(turn, len(messages) + 1), strict=True)]
        more = learned[place] if learned else {}
        messages.append({**_message(turn.message, numbers), "finish": turn.message.finish, "calls": calls, **more})
        messages += [_message(reply, numbers) for reply in turn.replies]
    box = transcript.question.details.get("box")
    record = {
        **about,
        "answer": transcript.answer,
        "references": list(transcript.question.references),
        "mark": _known(transcript.mark),
        "scores": {name: _known(score) for name, score in transcript.scores.items()},
        "ended": transcript.ended,
        "evidence": None if box is None else [float(side) for side in box],
        "pictures": _pictures(transcript, folder),
        "messages": messages,
    }
    atomic_write_text(folder / f"{name}.json", json.dumps(record, ensure_ascii=False, default=str) + "\n")


def _message(message: Message, numbers: Iterator[int]) -> dict[str, Any]:
    return {"role": message.role, "parts": [part if isinstance(part, str) else next(numbers) for part in message.parts]}


def _replies(turn: Turn, first: int) -> list[int | None]:
    """The places of the messages that answer the calls, of which the first is ``first``."""
    answered = len(turn.replies) == len(turn.calls)
    return [first + place if answered else None for place in range(len(turn.calls))]


def _call(call: CallRecord, reply: int | None) -> dict[str, Any]:
    return {
        "name": call.name,
        "arguments": dict(call.arguments),
        "error": call.error,
        "seconds": round(call.seconds, 4),
        "rewards": dict(call.rewards),
        "metrics": dict(call.result.metrics),
        "reply": reply,
        **({"text": call.result.text} if reply is None else {}),
    }


def _pictures(transcript: Transcript, folder: Path) -> list[dict[str, Any]]:
    """Their entries. ``number`` is what calls name a picture by: they count from the question on, as examples do too."""
    kept: list[dict[str, Any]] = []
    before = 0
    for place, message in enumerate(transcript.messages):
        before = len(kept) if message.role == "user" and place <= transcript.begins else before
        for picture in message.pictures:
            source = None if picture.source is None else before + picture.source
            kept.append({**_keep(picture, folder), "number": len(kept) - before + 1, "source": source})
    return kept


def _keep(picture: Picture, folder: Path) -> dict[str, Any]:
    """What is known of it alone; the file is written unless it is there."""
    path = folder / PICTURES / f"{picture.key[:24]}.webp"
    if not path.exists():
        image = picture.image.copy()
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        ways = (True,) if max(image.size) <= TINY else (True, False)
        atomic_write_bytes(path, min((_webp(image, lossless=way) for way in ways), key=len))
    about = {"file": f"{PICTURES}/{path.name}", "width": picture.image.width, "height": picture.image.height}
    box = None if picture.source is None else [round(side, 2) for side in picture.box_in_source()]
    return {**about, "box": box}


def _webp(image: Image.Image, *, lossless: bool) -> bytes:
    """Flat drawings are smaller without loss, photographs with it."""
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=lossless, quality=85)
    return file.getvalue()


# ---------------------------------------------------------------- of rollouts


class Keeper:
    """Keeps conversations of a stage's rollouts in ``folder``, as its config asks; ``weights``: of its rewards, by name."""

    def __init__(self, stage: StageConfig, policy: Any, weights: Mapping[str, float], folder: Path) -> None:
        self._stage, self._weights, self._folder = stage, weights, folder
        self._legible = policy if isinstance(policy, LegiblePolicy) else None
        self._most, self._every = stage.keep_conversations, stage.keep_every or max(1, stage.iterations // ROUNDS)

    def see(self, iteration: int, rollout: Rollout, advantages: Advantages) -> None:
        """The rollout of an iteration, counted from 0, and what it was worth. Raises TrainingError where it cannot be written."""
        due = iteration % self._every == 0 or iteration == self._stage.iterations - 1
        if not due or not rollout.episodes.transcripts:
            return
        for rank, place in enumerate(chosen(rollout.episodes, self._most), 1):
            transcript = rollout.episodes.transcripts[place]
            name = f"{self._stage.name}-{LABEL}-{iteration + 1:06d}-{rank}"
            about = {"label": LABEL, "stage": self._stage.name, "iteration": iteration + 1}
            about |= self._about(rollout.episodes, place)
            write_conversation(self._folder, name, transcript, about, self._learned(rollout, advantages, place))

    def _about(self, episodes: EpisodeRecord, place: int) -> dict[str, Any]:
        transcript, success = episodes.transcripts[place], bool(episodes.success_M[place] > 0.5)
        cut = transcript.ended in ("turns", "length")
        earned = _known(episodes.returns_M[place])
        paid = {name: float(score_M[place]) for name, score_M in episodes.scores.items()} or {ENVIRONMENT: earned}
        group = {} if transcript.shown is None else {"group": _group(episodes, transcript.task_id)}
        return {
            **group,
            "task_id": transcript.task_id,
            "family": transcript.question.family,
            "instruction": transcript.opening[-1].text if transcript.opening else "",
            "outcome": "success" if success else "timeout" if cut else "failure",
            "success": success,
            "timed_out": cut and not success,
            "steps": int(episodes.lengths_M[place]),
            "return": earned,
            "rewards": [
                {"name": name, "score": _known(score), "weight": self._weights.get(name, 0.0)} for name, score in paid.items()
            ],
        }

    def _learned(self, rollout: Rollout, advantages: Advantages, place: int) -> list[Learned]:
        """What each turn of an episode was worth."""
        spans_M3, transcript = rollout.episodes.spans_M3, rollout.episodes.transcripts[place]
        assert spans_M3 is not None
        slot, first, _ = spans_M3[place].tolist()
        learned = []
        for t, turn in enumerate(transcript.turns, first):
            kept = bool(advantages.keep_TB[t, slot] & rollout.valid_TB[t, slot])
            worth = _known(advantages.advantages_TB[t, slot]) if kept else None
            about: dict[str, Any] = {"reward": _known(rollout.rewards_TB[t, slot]), "advantage": worth}
            ids = turn.message.token_ids
            if self._legible is not None and ids:
                trained_K = rollout.mask_TBK[t, slot, : len(ids)].tolist()
                log_probs_K = rollout.log_probs_TBK[t, slot, : len(ids)].tolist()
                units_TBK = advantages.units_TBK
                worth_K = [worth] * len(ids) if units_TBK is None else units_TBK[t, slot, : len(ids)].tolist()
                told = zip(self._legible.token_texts(ids), log_probs_K, worth_K, trained_K, strict=True)
                about["tokens"] = [
                    [text, _known(score), _known(value) if kept and trained else None] for text, score, value, trained in told
                ]
            learned.append(about)
        return learned


def chosen(episodes: EpisodeRecord, most: int) -> list[int]:
    """At most ``most`` episodes of one task: the best, the worst, the second best and so on.

    The task is the one whose episodes' returns differ most, as from such a group most is learned; where every task was played
    once, all of them count as one.
    """
    returns = episodes.returns_M.tolist()
    groups = [members for members in by_task(episodes.transcripts).values() if len(members) > 1] or [list(range(len(returns)))]
    group = max(groups, key=lambda members: max(returns[m] for m in members) - min(returns[m] for m in members))
    ranked = sorted(group, key=lambda m: -returns[m])
    turns = [ranked[place // 2 if place % 2 == 0 else -1 - place // 2] for place in range(len(ranked))]
    return turns[:most]


def _group(episodes: EpisodeRecord, task: int) -> dict[str, float | int | None]:
    """What the episodes of a task earned."""
    returns = episodes.returns_M[episodes.task_ids_M == task].double()
    spread = returns.std() if len(returns) > 1 else 0.0
    return {"episodes": len(returns), "mean": _known(returns.mean()), "std": _known(spread)}


def _known(number: Any) -> float | None:
    """Five digits; None for what is no number."""
    value = float(number)
    return float(f"{value:.5g}") if math.isfinite(value) else None
