"""Answers: where one stands in a model's text, and whether it is right. Pure functions of texts.

A check is a frozen value, called with an answer's text, that gives a mark from 0 (wrong) to 1 (right), the best over its
references.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mmrl.registry import did_you_mean

Check = Callable[[str], float]
Box = tuple[float, float, float, float]

# ---------------------------------------------------------------- where the answer stands


def extract(text: str, tag: str | None = None) -> str | None:
    """The answer within a model's text, without white space around it; None where it gave none.

    tag: the last ``<tag>...</tag>`` counts. None: what follows the last ``</think>``, or everything where nobody thinks aloud;
    thoughts that never end are no answer.
    """
    if tag is not None:
        end = text.rfind(f"</{tag}>")
        start = text.rfind(f"<{tag}>", 0, max(end, 0))
        return None if start < 0 else text[start + len(tag) + 2 : end].strip()
    after = text.rpartition("</think>")[2]
    return None if "<think>" in after else after.strip()


# ---------------------------------------------------------------- texts

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_KEPT = "%#&@"  # punctuation by Unicode, part of the meaning here
_POINT = re.compile(r"\d[.,]\d")


def normalised(text: str) -> str:
    """``text`` without what does not make an answer wrong: case, width, punctuation, English articles, white space.

    As in SQuAD's script, but dashes and slashes part words, a point between digits and a minus before one stay, thousands may be
    grouped by commas, and an answer that is nothing but an article or punctuation stays what it is. Accents count.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).replace("−", "-")
    folded = " ".join(folded.split())
    plain = " ".join("".join(_punctuation(folded, at) for at in range(len(folded))).split())
    plain = _GROUPED.sub(lambda match: match[0].replace(",", ""), plain)
    return " ".join(_ARTICLES.sub(" ", plain).split()) or plain or folded


def _punctuation(text: str, at: int) -> str:
    """What becomes of the sign at ``at``."""
    sign, before, after = text[at], text[at - 1 : at], text[at + 1 : at + 2]
    kind = unicodedata.category(sign)
    if not kind.startswith("P") or sign in _KEPT or (sign in ".," and _POINT.fullmatch(before + sign + after)):
        return sign
    if sign == "-" and after.isdecimal() and not before.isalnum():
        return sign
    return " " if kind == "Pd" or sign in "/\\_" else ""


@dataclass(frozen=True)
class Exact:
    """1 for the very text of a reference, white space around it aside."""

    references: tuple[str, ...]

    def __call__(self, text: str) -> float:
        return float(text.strip() in {reference.strip() for reference in self.references})


@dataclass(frozen=True)
class Normalised:
    """1 for what is a reference once both are ``normalised``."""

    references: tuple[str, ...]

    def __call__(self, text: str) -> float:
        return float(normalised(text) in {normalised(reference) for reference in self.references})


# ---------------------------------------------------------------- choices


@dataclass(frozen=True)
class Choice:
    """1 if the one option that a text names is a reference: "B", "(b)", "B. Paris", "the answer is B", or the option's text.

    references: letters, or texts of options. options: their texts, called A, B, C, ... in this order; without any, only letters
    count. A text that names several options names none, unless it says which of them is the answer.
    """

    references: tuple[str, ...]
    options: tuple[str, ...] = ()

    def __call__(self, text: str) -> float:
        chosen = self.chosen(text)
        return float(chosen is not None and chosen in {self.chosen(reference) for reference in self.references})

    def chosen(self, text: str) -> str | None:
        """The letter, upper case, that ``text`` names."""
        text = unicodedata.normalize("NFKC", text).strip().strip("*`\"'")
        for same in (str.casefold, normalised):
            own = [letter for letter, option in self._lettered if same(option) == same(text)]
            if len(own) == 1:
                return own[0]
            if (bare := _BARE.fullmatch(text)) and self._offered(bare[1]):
                return bare[1].upper()
        for letters in (_ANSWER_IS.findall(text)[-1:], _OPENING.findall(text) + _BRACKETED.findall(text)):
            named = {letter.upper() for letter in letters if self._offered(letter)}
            if len(named) == 1:
                return named.pop()
        return self._mentioned(text)

    @property
    def _lettered(self) -> list[tuple[str, str]]:
        return [(chr(ord("A") + place), option) for place, option in enumerate(self.options)]

    def _offered(self, letter: str) -> bool:
        return not self.options or ord(letter.upper()) - ord("A") < len(self.options)

    def _mentioned(self, text: str) -> str | None:
        """The only option whose text stands within ``text``; one that is part of a longer one that does is not meant."""
        rest, found = f" {normalised(text)} ", []
        for letter, option in sorted(self._lettered, key=lambda pair: -len(normalised(pair[1]))):
            words = f" {normalised(option)} "
            if words in rest:
                found.append(letter)
                rest = rest.replace(words, " | ")
        return found[0] if len(found) == 1 else None


_BARE = re.compile(r"[(\[{<]?\s*([A-Za-z])\s*[)\]}>]?\s*[.:,)]?")
# A small letter that stands by itself may be the article.
_ANSWER_IS = re.compile(
    r"(?i:\b(?:answer|option|choice)\s*(?:is|:|=)?\s*:?\s*(?:option\s+)?)[*(\[{\"']*([A-Z]|[a-z](?=[)\]}]|\W*\Z))(?![\w'])"
)
_OPENING = re.compile(r"\A[(\[]?([A-Za-z])(?:[)\]][.:]?|[.:])(?=\s)")
_BRACKETED = re.compile(r"[(\[]([A-Za-z])[)\]]")

# ---------------------------------------------------------------- numbers

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"(?<![\w.])(?P<sign>(?<!\))[+-])?(?:[$€£¥]\s?(?P<inner>[+-])?)?"
    rf"(?:(?P<whole>\d+)\s+(?=\d+\s?/\s?\d))?(?P<first>{_DIGITS})"
    rf"(?:\s?/\s?(?P<second>{_DIGITS})|(?:e|\s?[x×*]\s?10\s?\^\s?)(?P<power>[+-]?\d{{1,3}}))?(?P<percent>\s?(?:%|percent\b))?",
    re.IGNORECASE,
)


def number(text: str) -> float | None:
    """The last number of ``text``; None where there is none.

    Read are 1,234.5, -.5, 3e2, 3 x 10^2, 3/4, 1 3/4, 50 % (which is 0.5), currency signs and any unit behind.
    """
    matches = list(_NUMBER.finditer("".join(map(_digit, text))))
    return _value(matches[-1]) if matches else None


def _digit(sign: str) -> str:
    """Digits and signs of any width as ASCII; "½" as " 1/2", but no superscript as a digit."""
    plain = unicodedata.normalize("NFKC", sign).replace("−", "-").replace("⁄", "/")
    if unicodedata.category(sign) == "No":
        return f" {plain}" if "/" in plain else sign
    return plain


def _value(match: re.Match[str]) -> float | None:
    whole, first, second = (Fraction(_short_enough(match[key])) for key in ("whole", "first", "second"))
    if match["second"] and not second:
        return None
    value = whole + (first / second if match["second"] else first)
    value *= Fraction(10) ** int(match["power"] or 0)
    value /= 100 if match["percent"] else 1
    try:
        return float(-value if "-" in (match["sign"], match["inner"]) else value)
    except OverflowError:
        return None


def _short_enough(digits: str | None) -> str:
    """``digits`` without commas, "0" for none; of more digits than floats need, the first ones and a power of ten."""
    whole, point, decimals = (digits or "0").replace(",", "").partition(".")
    kept, rest = whole[:400], len(whole) - 400
    return f"{kept}e{rest}" if rest > 0 else f"{kept or '0'}{point}{decimals[:400]}"


@dataclass(frozen=True)
class Number:
    """1 if the last number of a text is one of the references, up to ``absolute`` or up to ``relative`` times the reference."""

    references: tuple[str, ...]
    absolute: float = 0.0
    relative: float = 0.0

    def __call__(self, text: str) -> float:
        value = number(text)
        right = [number(reference) for reference in self.references]
        near = (one is not None and value is not None and self._near(value, one) for one in right)
        return float(any(near))

    def _near(self, value: float, reference: float) -> bool:
        # A hair more than asked for, so that 0.3 is within 0.1 of 0.2 although floats say otherwise.
        allowed = max(self.absolute, self.relative * abs(reference))
        return abs(value - reference) <= allowed + 1e-9 * max(abs(value), abs(reference))


# ---------------------------------------------------------------- boxes

_BRACKETS = re.compile(r"[(\[]([^()\[\]]*)[)\]]")
_DECIMAL = re.compile(r"[+-]?(?:\d+(?:\.\d+)?|\.\d+)(?:e[+-]?\d+)?", re.IGNORECASE)


def box(text: str) -> Box | None:
    """The last four numbers in brackets, or the four numbers of a text that has no others: left, top, right, bottom."""
    groups = [_DECIMAL.findall(inside) for inside in _BRACKETS.findall(text)]
    fours = [group for group in groups if len(group) == 4] or [group for group in (_DECIMAL.findall(text),) if len(group) == 4]
    if not fours:
        return None
    left, top, right, bottom = (float(value) for value in fours[-1])
    whole = left < right and top < bottom and all(map(math.isfinite, (left, top, right, bottom)))
    return (left, top, right, bottom) if whole else None


def iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes (left, top, right, bottom) that have an area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(0.0, width) * max(0.0, height)
    return both / (sum((each[2] - each[0]) * (each[3] - each[1]) for each in (one, other)) - both)


@dataclass(frozen=True)
class BoxIoU:
    """The intersection over union with the best reference; with a threshold, 1 from there on and 0 below."""

    references: tuple[str, ...]
    threshold: float | None = None

    def __call__(self, text: str) -> float:
        answer, right = box(text), [box(reference) for reference in self.references]
        if answer is None:
            return 0.0
        best = max((iou(answer, one) for one in right if one is not None), default=0.0)
        return best if self.threshold is None else float(best >= self.threshold)


# ---------------------------------------------------------------- checks of data sets


def parse_check(block: Any, references: Sequence[str]) -> Check:
    """The check that a data set's line asks for: ``{kind: number, tolerance: 0.01}``, or just ``number``.

    Kinds and their keys: exact; normalised; choice (options); number (tolerance, relative); box (threshold). Raises ValueError
    with a sentence that names the key, also where a reference cannot be read as what its kind wants.
    """
    block = {"kind": block} if isinstance(block, str) else block
    if not isinstance(block, Mapping) or not isinstance(block.get("kind"), str):
        example = "{kind: number, tolerance: 0.01}"
        raise ValueError(f"'check' must be a mapping with a 'kind', such as {example}, got {_short(block)}")
    if not references:
        raise ValueError("there is no reference to check against; give 'answer' or 'answers'")
    kind, fields = block["kind"], {key: value for key, value in block.items() if key != "kind"}
    if kind not in _KINDS:
        raise ValueError(f"check.kind '{kind}' is unknown{did_you_mean(kind, _KINDS)}")
    make, known, readable = _KINDS[kind]
    for key, value in fields.items():
        if key not in known:
            hint = did_you_mean(str(key), known) if known else "; it has no keys but 'kind'"
            raise ValueError(f"check.{key} is no key of kind '{kind}'{hint}")
        known[key][1](f"check.{key}", value)
    check = make(tuple(references), **{known[key][0]: _frozen(value) for key, value in fields.items()})
    for reference in references:
        if not readable(check, reference):
            raise ValueError(f"the answer {_short(reference)} cannot be read as check.kind '{kind}' wants; mend it or the kind")
    return check


def _amount(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{key} must be a number that is not negative, got {_short(value)}")


def _share(key: str, value: Any) -> None:
    _amount(key, value)
    if not 0 < value <= 1:
        raise ValueError(f"{key} must be above 0 and at most 1, got {_short(value)}")


def _texts(key: str, value: Any) -> None:
    if not isinstance(value, list | tuple) or not 2 <= len(value) <= 26 or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{key} must be a list of 2 to 26 texts, got {_short(value)}")


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."


# Kind -> the check, its keys (the field that each sets, and what refuses a wrong value), and whether a reference makes sense.
_Keys = Mapping[str, tuple[str, Callable[[str, Any], None]]]
_KINDS: Mapping[str, tuple[Callable[..., Any], _Keys, Callable[[Any, str], bool]]] = {
    "exact": (Exact, {}, lambda check, reference: True),
    "normalised": (Normalised, {}, lambda check, reference: True),
    "choice": (Choice, {"options": ("options", _texts)}, lambda check, reference: check.chosen(reference) is not None),
    "number": (
        Number,
        {"tolerance": ("absolute", _amount), "relative": ("relative", _amount)},
        lambda check, reference: number(reference) is not None,
    ),
    "box": (BoxIoU, {"threshold": ("threshold", _share)}, lambda check, reference: box(reference) is not None),
}
