"""How conversations and their scores travel over HTTP, as JSON that pydantic checks: what ``mmrl serve-rewards`` takes and gives.

    GET  /health  ->  {"status": "ok", "rewards": ["ocr", "clip"], "running": 0}
    POST /score   {"reward": "ocr", "samples": [{"turns": [[{"png": "iVBORw0..."}]], "details": {"words": ["OPEN"]}}]}
                  ->  {"scores": [0.75], "failure": null, "terms": {"exact": 0.0}}

A score that is null could not be given; ``failure`` says why the last such one could not. Calls of tools do not travel.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field

from mmrl.messages import Message, Picture
from mmrl.rewards.pictures import Known, number
from mmrl.transcripts import Question, Transcript, Turn


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Text(_Wire):
    """A part that is text."""

    text: str


class Png(_Wire):
    """A part that is a picture: a PNG file in base64."""

    png: str


Part = Text | Png


class Sample(_Wire):
    """A conversation. question: what the user asks. turns: what the policy said, message by message; its last picture is scored.

    mark: of ``answer``, by the question's own check. details: what the reward wants to know, such as GenEval's ``include``.
    """

    task: int = 0
    family: str = ""
    question: list[Part] = Field(default_factory=list)
    references: list[str] = Field(default_factory=list)
    details: dict[str, Any] = Field(default_factory=dict)
    turns: Annotated[list[list[Part]], Field(min_length=1)]
    answer: str | None = ""
    mark: float = 0.0
    ended: Literal["answer", "turns", "length", "running"] = "answer"


class Asked(_Wire):
    """A request. reward: a name of the server's ``rewards``; it may be left out where there is one only."""

    reward: str | None = None
    samples: Annotated[list[Sample], Field(min_length=1)]


class Replied(_Wire):
    """The answer: a score for each sample, null where there is none."""

    scores: list[float | None]
    failure: str | None = None
    terms: dict[str, float] = Field(default_factory=dict)


class Health(_Wire):
    """running: requests that are answered now."""

    status: Literal["ok"] = "ok"
    rewards: list[str]
    running: int


def packed(transcript: Transcript) -> Sample:
    """Raises ValueError (pydantic's) where the question's details are nothing that JSON has."""
    question = transcript.question
    return Sample(
        task=transcript.task_id,
        family=question.family,
        question=_parts(question.parts),
        references=list(question.references),
        details=dict(question.details),
        turns=[_parts(turn.message.parts) for turn in transcript.turns],
        answer=transcript.answer,
        mark=transcript.mark,
        ended=transcript.ended,
    )


def unpacked(sample: Sample, max_pixels: int) -> Transcript:
    """Raises ValueError, as a sentence, for a picture that is none or has more than ``max_pixels``."""
    parts = tuple(_part(part, max_pixels) for part in sample.question)
    question = Question(sample.family, parts, tuple(sample.references), Known(sample.mark), sample.details)
    turns = [tuple(_part(part, max_pixels) for part in turn) for turn in sample.turns]
    said = tuple(Turn(Message("assistant", each)) for each in turns)
    return Transcript(sample.task, question, (Message("user", parts),), said, sample.answer, sample.ended)


def reply_of(scores: Sequence[Any], failure: str | None, terms: Mapping[str, float]) -> Replied:
    numbers = [number(score) for score in scores]
    known = [None if math.isnan(score) else score for score in numbers]
    finite = {name: float(mean) for name, mean in terms.items() if math.isfinite(mean)}
    return Replied(scores=known, failure=failure if None in known else None, terms=finite)


def _parts(parts: Sequence[str | Picture]) -> list[Part]:
    return [Text(text=part) if isinstance(part, str) else Png(png=png(part.image)) for part in parts]


def png(image: Image.Image) -> str:
    """A PNG file in base64."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


def _part(part: Part, max_pixels: int) -> str | Picture:
    if isinstance(part, Text):
        return part.text
    try:
        image = Image.open(io.BytesIO(base64.b64decode(part.png, validate=True)), formats=["PNG"])
        if image.width * image.height > max_pixels:  # before a pixel of it is unpacked
            raise ValueError(f"a picture has {image.width} x {image.height} pixels; this server takes {max_pixels}")
        image.load()
    except (binascii.Error, UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"a picture is no PNG file in base64 ({error})") from error
    return Picture(image.convert("RGB"))
