"""Whether what a tool gave holds the evidence for an answer, judged from the tool's output and never from what the policy says.

The evidence is what ``Question.details`` know: the ``box`` of a detail in the question's first picture, which must be cut out;
where nothing must be, ``operations`` that put the picture right; and ``evidence``, texts or ids of documents. A picture and texts
are two ways to the same answer (one looks, the other reads): one of them is enough.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from mmrl.messages import Picture
from mmrl.transcripts import CallRecord, Question, Transcript

Box = tuple[float, float, float, float]
Measure = Literal["containment", "iou"]

CONTAINED = 0.8  # share of the box that a picture must show for it to hold the evidence
LARGEST = 0.5  # share of the first picture above which a box is no detail, and a cut shows a detail no better than the picture,
ROOMY = 1.5  # but a cut is never too large that is at most so many times the box
CROP = "crop"
_UPRIGHT = math.cos(math.radians(15))  # how exactly a picture must be turned

# Linear parts (a, b, d, e) of the map from a picture that was turned or mirrored into the one before.
_LINEAR = {
    "rotate_90": (0.0, 1.0, -1.0, 0.0),
    "rotate_180": (-1.0, 0.0, 0.0, -1.0),
    "rotate_270": (0.0, -1.0, 1.0, 0.0),
    "flip_horizontal": (-1.0, 0.0, 0.0, 1.0),
    "flip_vertical": (1.0, 0.0, 0.0, -1.0),
}


def area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def shared_area(one: Box, other: Box) -> float:
    return area((max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3])))


def iou(one: Box, other: Box) -> float:
    """Intersection over union; 0 for boxes without area."""
    shared = shared_area(one, other)
    union = area(one) + area(other) - shared
    return shared / union if union > 0 else 0.0


def listed(question: Question, name: str) -> tuple[str, ...]:
    """A list of the question's details, of which a data set may have one without its brackets; empty where there is none."""
    value = question.details.get(name, ())
    return (value,) if isinstance(value, str) else tuple(value)


def first_picture(question: Question) -> Picture | None:
    return next((part for part in question.parts if isinstance(part, Picture)), None)


def derived_pictures(transcript: Transcript, call: CallRecord) -> list[Picture]:
    """Pictures of a call that were made from the question's first picture."""
    first = first_picture(transcript.question)
    if first is None or call.error is not None:
        return []
    shown = transcript.question.pictures
    numbers = {number for number, picture in enumerate(shown) if picture.key == first.key}  # it may be shown twice
    return [picture for picture in call.result.pictures if picture.source in numbers]


def expected_box(question: Question) -> Box | None:
    """The box of a detail that must be cut out; None where there is none: it is most of the picture, or no crop is named."""
    known, first = question.details.get("box"), first_picture(question)
    if known is None or ("operations" in question.details and CROP not in listed(question, "operations")):
        return None
    left, top, right, bottom = (float(edge) for edge in known)
    box = left, top, right, bottom
    whole = first is not None and area(box) > LARGEST * first.image.width * first.image.height
    return None if whole else box


def picture_score(transcript: Transcript, call: CallRecord, measure: Measure = "containment") -> float | None:
    """How well the call's pictures show the evidence, 0 to 1: the best of them. None: no picture would be evidence.

    containment: the share of the box that a picture shows, 0 for one that shows more than LARGEST of the first picture and more
    than ROOMY boxes. Where operations are known and no box: see ``puts_right``.
    """
    question, box = transcript.question, expected_box(transcript.question)
    if box is None:
        return None if _expected_orientation(question) is None else float(puts_right(transcript, call))
    judge, first = _MEASURES[measure], first_picture(question)
    return max((judge(box, picture.box_in_source(), first) for picture in derived_pictures(transcript, call)), default=0.0)


def puts_right(transcript: Transcript, call: CallRecord) -> bool:
    """Whether a call gave most of the first picture, standing as the question's operations would put it."""
    first, wanted = first_picture(transcript.question), _expected_orientation(transcript.question)
    if first is None or wanted is None:
        return False
    most = LARGEST * first.image.width * first.image.height
    return any(
        _stands(picture, wanted) and area(picture.box_in_source()) > most for picture in derived_pictures(transcript, call)
    )


def texts_found(question: Question, call: CallRecord) -> frozenset[str]:
    """Which of the evidence texts or ids a call brought up: in its text as whole words, or as a value among its details."""
    if call.error is not None:
        return frozenset()
    said, values = f" {_words(call.result.text)} ", set(_strings(call.result.details))
    return frozenset(text for text in _texts(question) if text in values or (_words(text) and f" {_words(text)} " in said))


def can_be_read(question: Question, said: str) -> bool:
    """Whether ``said``, the text in a picture, holds an evidence text, or the answer where no text is known to be evidence."""
    words = f" {_words(said)} "
    return any(_words(text) and f" {_words(text)} " in words for text in _texts(question) or question.references)


def call_score(transcript: Transcript, call: CallRecord, measure: Measure = "containment") -> float:
    """How far a call gets one to the evidence: what its pictures show of it, 1 for an evidence text or a picture put right."""
    brought = bool(texts_found(transcript.question, call)) or puts_right(transcript, call)
    return max(picture_score(transcript, call, measure) or 0.0, float(brought))


def is_known(question: Question) -> bool:
    """Whether the question says what would be evidence."""
    return expected_box(question) is not None or _expected_orientation(question) is not None or bool(_texts(question))


def faithful(transcript: Transcript) -> bool | None:
    """Whether the tools' output holds the evidence: a picture that shows it, or all its texts. None: it is not known."""
    question = transcript.question
    if not is_known(question):
        return None
    if any((picture_score(transcript, call) or 0.0) >= CONTAINED for call in transcript.calls):
        return True
    texts = _texts(question)
    return bool(texts) and set(texts) == {text for call in transcript.calls for text in texts_found(question, call)}


def _contained(box: Box, shown: Box, first: Picture | None) -> float:
    if first is not None:
        limit = max(LARGEST * first.image.width * first.image.height, ROOMY * area(box))
        if area(shown) > limit:
            return 0.0
    return shared_area(box, shown) / area(box) if area(box) > 0 else 0.0


_MEASURES: Mapping[Measure, Callable[[Box, Box, Picture | None], float]] = {
    "containment": _contained,
    "iou": lambda box, shown, first: iou(box, shown),
}


def _expected_orientation(question: Question) -> tuple[float, float, float, float] | None:
    """The linear map of the picture that the operations make, into the first one; None without operations that turn it."""
    turns = [name for name in listed(question, "operations") if name in _LINEAR]
    whole = (1.0, 0.0, 0.0, 1.0)
    for name in turns:
        (a, b, d, e), (p, q, s, t) = whole, _LINEAR[name]
        whole = (a * p + b * s, a * q + b * t, d * p + e * s, d * q + e * t)
    return whole if turns else None


def _stands(picture: Picture, wanted: tuple[float, float, float, float]) -> bool:
    """Whether both axes of the picture point where they should, at any scale."""
    a, b, _, d, e, _ = picture.to_source
    across, down = math.hypot(a, d), math.hypot(b, e)
    if not across or not down:
        return False
    return min((a * wanted[0] + d * wanted[2]) / across, (b * wanted[1] + e * wanted[3]) / down) >= _UPRIGHT


def _texts(question: Question) -> tuple[str, ...]:
    return listed(question, "evidence")


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def _strings(value: Any) -> Iterator[str]:
    """Every string in nested details."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list | tuple | set | frozenset):
        for inner in value:
            yield from _strings(inner)
