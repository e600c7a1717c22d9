"""Whether a picture shows the words that its prompt quotes, read by PP-OCR (rapidocr and onnxruntime).

    score = 1 - min(distance(read, words), len(words)) / len(words)

The OCR reward of Flow-GRPO (Liu et al. 2025, arXiv 2505.05470): Levenshtein's distance, in lower case and without any spaces,
which is 0 where the words stand within what was read. The words are ``question.details["words"]``. Departures: several quoted
words (the published reward reads the first alone) are looked for one by one, the longest first: a word that stands in what was
read takes its letters away; each other is compared with the lines that are left, and takes the nearest. The score is then the
share of letters. PP-OCR comes from rapidocr, not PaddleOCR, and small pictures are enlarged before they are read.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from rapidocr import RapidOCR

from mmrl.rewards.pictures import each_picture
from mmrl.transcripts import Question, Transcript


class OCR:
    """See the module. terms: ``exact``, the share of pictures in which every word was read without a fault."""

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
    class Config:
        """Fields of a ``mmrl.rewards.ocr:OCR`` block."""

        detect: bool = True
        """Whether lines of text are looked for; false reads the whole picture as one line, at half the cost or less."""
        contained: bool = True
        """Whether text beside words that were read without a fault is free, as in Flow-GRPO; false: it counts as wrong."""
        min_confidence: float = Field(default=0.0, ge=0, le=1)
        """Lines that the reader is less sure of are left out."""
        enlarge_to: int = Field(default=256, ge=32)
        """Pictures whose shorter side has fewer pixels are read enlarged to it; only with ``detect``."""
        max_side: int = Field(default=960, ge=64)
        """Pictures whose longer side has more pixels are read scaled down to it; only with ``detect``."""
        threads: int = Field(default=1, ge=1)
        """Of onnxruntime."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.failure: str | None = None
        self.terms: dict[str, float] = {}
        onnx = "EngineConfig.onnxruntime"
        own = {f"{onnx}.intra_op_num_threads": config.threads, f"{onnx}.inter_op_num_threads": 1, "Global.log_level": "critical"}
        # rapidocr would enlarge small pictures to 736 pixels; what is read is scaled here instead
        sizes = {"Global.use_preprocess_img": False, "Det.limit_type": "max", "Global.use_cls": False}
        self._engine = RapidOCR(params={**own, **sizes, "Global.text_score": 0.0})

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        scores = each_picture(transcripts, self._score)
        known = [score for score in scores if not math.isnan(score)]
        self.terms = {"exact": sum(score == 1 for score in known) / len(known)} if known else {}
        return scores

    def _score(self, image: Image.Image, question: Question) -> float:
        words = question.details.get("words", ())
        if isinstance(words, str) or not any(plain(word) for word in words):
            self.failure = f"the question's details have no 'words' (a list of quoted texts) to look for: {question.parts!r:.80}"
            return math.nan
        return agreement(words, self.read(image), contained=self.config.contained)

    def read(self, image: Image.Image) -> list[str]:
        """The lines of text in a picture, from top to bottom."""
        pixels = np.ascontiguousarray(np.asarray(self._sized(image))[:, :, ::-1])  # blue first, as OpenCV has it
        found: Any = self._engine(pixels, use_det=self.config.detect)
        lines = zip(found.txts or (), found.scores or (), strict=True)
        return [text for text, confidence in lines if float(confidence) >= self.config.min_confidence]

    def _sized(self, image: Image.Image) -> Image.Image:
        if not self.config.detect:
            return image  # the recogniser brings every line to its own height
        scale = max(1.0, self.config.enlarge_to / min(image.size))
        scale = min(scale, self.config.max_side / max(image.size))
        if scale == 1:
            return image
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        return image.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS)


def plain(text: str) -> str:
    """In lower case, without spaces; letters of full width are like any other.

    >>> plain("Open  24ｈ")
    'open24h'
    """
    return "".join(unicodedata.normalize("NFKC", text).lower().split())


def agreement(words: Sequence[str], lines: Sequence[str], *, contained: bool = True) -> float:
    """How well ``words`` were read in ``lines``, 0 to 1. Raises ZeroDivisionError without words.

    >>> agreement(["OPEN"], ["open", "24h"]), agreement(["OPEN"], ["0pen"]), agreement(["OPEN"], [])
    (1.0, 0.75, 0.0)
    """
    wanted = sorted(filter(None, map(plain, words)), key=len, reverse=True)
    left = [line for line in map(plain, lines) if line]
    if len(wanted) == 1:
        left = ["".join(left)]  # one quoted text may go over several lines
    total, wrong, rest = sum(map(len, wanted)), 0, []
    for word in wanted:
        place = next((place for place, line in enumerate(left) if word in line), None) if contained else None
        if place is None:
            rest.append(word)
        else:
            before, _, after = left[place].partition(word)
            left[place : place + 1] = [before, after]
    for word in rest:
        distances = [edit_distance(word, line) for line in left]
        nearest = min(range(len(left)), key=distances.__getitem__, default=None)
        wrong += len(word) if nearest is None else min(distances[nearest], len(word))
        if nearest is not None:
            del left[nearest]
    return 1 - wrong / total


def edit_distance(a: str, b: str) -> int:
    """Letters to put in, take out or replace to make ``b`` of ``a`` (Levenshtein).

    >>> edit_distance("kitten", "sitting")
    3
    """
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        above, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (letter != other))
    return row[-1]
