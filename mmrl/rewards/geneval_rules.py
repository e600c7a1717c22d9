"""GenEval's rules: from the things that were found in a picture to whether it shows what its prompt asks for.

    metadata = {"tag": "position", "include": [{"class": "dog", "count": 1},
                {"class": "cat", "count": 1, "color": "red", "position": ["left of", 0]}],
                "exclude": [{"class": "dog", "count": 2}]}

GenEval (Ghosh et al. 2023, arXiv 2310.11513, evaluation/evaluate_images.py). Of each class the 16 surest things count, if they
are surer than 0.3 (0.9 where the tag is "counting"). Every ``include`` must hold, and no ``exclude`` may. An ``include`` looks
at the ``count`` surest things of its class: there must be as many, all of its colour, and each in its ``position`` to each thing
of the clause that it names. A is left of B if, with both ways between their centres shortened by a tenth of their added sizes,
the way to the left is more than half of the distance between the centres.

``graded`` is the reward that Flow-GRPO learns from (Liu et al. 2025, arXiv 2505.05470): the mean over what is asked of
1 - |wanted - found| / wanted, of all things that were found, 1 or 0 for a position, and 0 for colour or position where the number
is wrong. ``exact`` is its test: as GenEval's, but more things than wanted are wrong too, and ``exclude`` is not read. Departures:
where a position is wrong, the reward server of Flow-GRPO counts a 0 and then also a 1, here it is a 0; and no demand is worth
less than 0, however many things were found (there 5 for 1 are -3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

Box = tuple[float, float, float, float]

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")
COUNTING = "counting"  # the tag with a threshold of its own


@dataclass(frozen=True)
class Detected:
    """A thing in a picture. name: its class. box: left, top, right, bottom in pixels, from the upper left corner.

    colour: one of COLOURS; None where nobody looked, or none of them. score: how sure the detector is, 0 to 1.
    """

    name: str
    box: Box
    colour: str | None = None
    score: float = 1.0


@dataclass(frozen=True)
class Rules:
    """GenEval's numbers."""

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    position_threshold: float = 0.1


@dataclass(frozen=True)
class Verdict:
    """correct: GenEval's own. exact: with not one thing too many. graded: 0 to 1. reasons: what is wrong, in GenEval's words."""

    correct: bool
    exact: bool
    graded: float
    reasons: tuple[str, ...] = ()


GENEVAL = Rules()


def kept(metadata: Mapping[str, Any], objects: Sequence[Detected], rules: Rules = GENEVAL) -> dict[str, list[Detected]]:
    """The things that count, by class, the surest first."""
    threshold = rules.counting_threshold if metadata.get("tag") == COUNTING else rules.threshold
    by_class: dict[str, list[Detected]] = {}
    for thing in sorted(objects, key=lambda thing: -thing.score):
        of_class = by_class.setdefault(thing.name, [])
        if thing.score > threshold and len(of_class) < rules.max_objects:
            of_class.append(thing)
    return {name: things for name, things in by_class.items() if things}


def judge(metadata: Mapping[str, Any], objects: Sequence[Detected], rules: Rules = GENEVAL) -> Verdict:
    """What GenEval says of a picture of these things. Raises ValueError where ``metadata`` is none of its (see ``problem``)."""
    wrong = problem(metadata)
    if wrong is not None:
        raise ValueError(wrong)
    things = kept(metadata, objects, rules)
    lenient, exact = _Judge(things, rules, exact=False), _Judge(things, rules, exact=True)
    for clause in metadata["include"]:
        lenient.include(clause)
        exact.include(clause)
    for clause in metadata.get("exclude", []):
        lenient.exclude(clause)
    correct, strict = not lenient.reasons, not exact.reasons
    return Verdict(correct, strict, fmean(exact.marks), tuple(lenient.reasons))


def relations(box: Box, other: Box, position_threshold: float = GENEVAL.position_threshold) -> frozenset[str]:
    """Where the first box lies to the second: none, one or two of POSITIONS."""
    offset, shortened = [], []
    for low, high in ((0, 2), (1, 3)):
        way = (box[low] + box[high] - other[low] - other[high]) / 2
        sizes = abs(box[high] - box[low]) + abs(other[high] - other[low])
        offset.append(way)
        shortened.append(math.copysign(max(abs(way) - position_threshold * sizes, 0.0), way))
    if max(map(abs, shortened)) < 1e-3:
        return frozenset()
    x, y = (way / math.hypot(*offset) for way in shortened)
    found = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return frozenset(name for name, holds in found.items() if holds)


def problem(metadata: Mapping[str, Any]) -> str | None:
    """What is wrong with the metadata of a prompt, in the words of a sentence; None: nothing."""
    include = metadata.get("include")
    if not isinstance(include, list | tuple) or not include:
        return "'include' must be a list of at least one clause"
    for key, clauses in (("include", include), ("exclude", metadata.get("exclude", []))):
        if not isinstance(clauses, list | tuple):
            return f"'{key}' must be a list of clauses"
        for place, clause in enumerate(clauses):
            wrong = _wrong_clause(clause, place)
            if wrong is not None:
                return f"'{key}.{place}' {wrong}"
    return None


def _wrong_clause(clause: Any, place: int) -> str | None:
    if not isinstance(clause, Mapping) or not isinstance(clause.get("class"), str):
        return "must be a mapping with a 'class'"
    count = clause.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        return f"must have a 'count' of at least 1, not {count!r}"
    if "color" in clause and clause["color"] not in COLOURS:
        return f"has the color {clause['color']!r}; known are {', '.join(COLOURS)}"
    if "position" in clause:
        position = clause["position"]
        if not isinstance(position, list | tuple) or len(position) != 2 or position[0] not in POSITIONS:
            return (
                f"must have a 'position' of one of {', '.join(POSITIONS)} and the number of an earlier clause, not {position!r}"
            )
        if not isinstance(position[1], int) or not 0 <= position[1] < place:
            return f"has a position to the clause {position[1]!r}, which must be the number (from 0) of an earlier one"
    return None


@dataclass
class _Judge:
    """Goes through the clauses. groups: the things of each clause that holds, else None. marks: what each demand is worth."""

    things: Mapping[str, Sequence[Detected]]
    rules: Rules
    exact: bool
    groups: list[Sequence[Detected] | None] = field(default_factory=list)
    marks: list[float] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def include(self, clause: Mapping[str, Any]) -> None:
        name, count = clause["class"], clause["count"]
        found = self.things.get(name, ())
        if not self.exact:
            found = found[:count]
        self.marks.append(_share(count, len(found)))
        if len(found) != count:
            if "color" in clause or "position" in clause:
                self.marks.append(0.0)
            self.reasons.append(f"expected {name}{'==' if self.exact else '>='}{count}, found {len(found)}")
            self.groups.append(None)
            return
        holds = self._coloured(clause, found) and self._placed(clause, found)
        self.groups.append(found if holds else None)

    def _coloured(self, clause: Mapping[str, Any], found: Sequence[Detected]) -> bool:
        if "color" not in clause:
            return True
        name, count, colour = clause["class"], clause["count"], clause["color"]
        colours = [thing.colour for thing in found]
        right = colours.count(colour)
        self.marks.append(_share(count, right))
        if right == count:
            return True
        listed = ", ".join(f"{colours.count(each)} {each or 'of no colour'}" for each in dict.fromkeys(colours))
        self.reasons.append(f"expected {colour} {name}>={count}, found {right} {colour}; and {listed}")
        return False

    def _placed(self, clause: Mapping[str, Any], found: Sequence[Detected]) -> bool:
        if "position" not in clause:
            return True
        wanted, target = clause["position"]
        others = self.groups[target]
        reason = None if others else f"no target for {clause['class']} to be {wanted}"
        for thing, other in ((thing, other) for thing in found for other in others or ()):
            places = relations(thing.box, other.box, self.rules.position_threshold)
            if wanted not in places:
                reason = f"expected {clause['class']} {wanted} target, found {' and '.join(sorted(places))} target"
                break
        self.marks.append(float(reason is None))
        if reason is not None:
            self.reasons.append(reason)
        return reason is None

    def exclude(self, clause: Mapping[str, Any]) -> None:
        name, count, number = clause["class"], clause["count"], len(self.things.get(clause["class"], ()))
        if number >= count:
            self.reasons.append(f"expected {name}<{count}, found {number}")


def _share(wanted: int, found: int) -> float:
    return max(0.0, 1 - abs(wanted - found) / wanted)
