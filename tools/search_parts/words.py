"""Words of a text as the index knows them, and the part of a text that shows best why it was found."""

from __future__ import annotations

import re
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import Stemmer

VERSION = 1  # of what a word is; another number builds every index anew
_CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # written without spaces: each sign is a word
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")


class Word(NamedTuple):
    """A word and where it stands in the (NFC) text."""

    term: str
    start: int
    end: int


class Words:
    """Runs of letters and digits, folded for case and width, stemmed if wanted; nothing is left out. Safe between threads.

    stemmer: a Snowball language such as "english", or None.
    """

    def __init__(self, stemmer: str | None = None) -> None:
        self._stemmer = None if stemmer is None else Stemmer.Stemmer(stemmer)
        self._lock = threading.Lock()  # a Snowball stemmer has a cache of its own

    def terms(self, text: str) -> list[str]:
        found = [_folded(match[0]) for match in _WORD.finditer(unicodedata.normalize("NFC", text))]
        if self._stemmer is None:
            return found
        with self._lock:
            return self._stemmer.stemWords(found)

    def places(self, text: str) -> Iterator[Word]:
        """The terms of an NFC text with their places."""
        matches = list(_WORD.finditer(text))
        return (Word(term, *match.span()) for term, match in zip(self.terms(text), matches, strict=True))

    def snippet(self, text: str, weights: Mapping[str, float], length: int) -> str:
        """At most about ``length`` characters of ``text``, around the passage whose different terms weigh most together.

        weights: of the terms that were asked for. Of equals the earliest; without any, the beginning. "…" marks what is cut.
        """
        text = unicodedata.normalize("NFC", text)
        if len(text) <= length:
            return " ".join(text.split())
        start, end = self._window(text, weights, length)
        spare = max(0, length - (end - start))
        start = max(0, min(start - spare // 2, len(text) - length))
        end = min(len(text), max(end, start + length))
        start, end = _whole_words(text, start, end)
        body = " ".join(text[start:end].split())
        return f"{'… ' if start > 0 else ''}{body}{' …' if end < len(text) else ''}"

    def _window(self, text: str, weights: Mapping[str, float], length: int) -> tuple[int, int]:
        hits = [word for word in self.places(text) if weights.get(word.term, 0) > 0]
        best, place, first = 0.0, (0, 0), 0
        inside: Counter[str] = Counter()
        for hit in hits:
            inside[hit.term] += 1
            while hit.end - hits[first].start > length and hits[first] is not hit:
                inside[hits[first].term] -= 1
                first += 1
            weight = sum(weights[term] for term, count in inside.items() if count)
            if weight > best * (1 + 1e-9):
                best, place = weight, (hits[first].start, hit.end)
        return place


def _folded(word: str) -> str:
    return unicodedata.normalize("NFKC", word).casefold()


def _whole_words(text: str, start: int, end: int) -> tuple[int, int]:
    """The span without the halves of words at its edges, if anything is left then."""
    left, right = start, end
    while 0 < left < end and text[left - 1].isalnum() and text[left].isalnum():
        left += 1
    while left < right < len(text) and text[right - 1].isalnum() and text[right].isalnum():
        right -= 1
    return (left, right) if left < right else (start, end)
