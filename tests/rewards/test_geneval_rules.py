"""GenEval's rules against cases made by hand, and against its published program written down again, plainly, with numpy."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from mmrl.rewards.geneval_rules import COLOURS, POSITIONS, Detected, Rules, judge, problem, relations


def thing(name: str, x: float = 10, y: float = 10, colour: str | None = None, score: float = 1.0, size: float = 10) -> Detected:
    return Detected(name, (x, y, x + size, y + size), colour, score)


def asks(*clauses: Mapping[str, Any], tag: str = "", exclude: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    return {"tag": tag, "include": list(clauses), "exclude": list(exclude)}


DOG, CAT = {"class": "dog", "count": 1}, {"class": "cat", "count": 1}


def test_a_thing_must_be_there() -> None:
    assert judge(asks(DOG), [thing("dog")]).correct
    missing = judge(asks(DOG), [thing("cat")])
    assert (missing.correct, missing.exact, missing.graded) == (False, False, 0.0)
    assert missing.reasons == ("expected dog>=1, found 0",)
    assert judge(asks(DOG, CAT), [thing("dog")]).graded == 0.5


@pytest.mark.parametrize(
    ("found", "correct", "exact", "graded"),
    [(0, False, False, 0.0), (2, False, False, 2 / 3), (3, True, True, 1.0), (4, False, False, 2 / 3), (9, False, False, 0.0)],
)
def test_counting(found: int, correct: bool, exact: bool, graded: float) -> None:
    three = asks({"class": "dog", "count": 3}, exclude=[{"class": "dog", "count": 4}], tag="counting")
    verdict = judge(three, [thing("dog", x=20 * place) for place in range(found)])
    assert (verdict.correct, verdict.exact, verdict.graded) == (correct, exact, pytest.approx(graded))


def test_more_things_than_wanted_are_right_for_geneval_and_not_exact() -> None:
    verdict = judge(asks(DOG), [thing("dog"), thing("dog", x=40)])
    assert (verdict.correct, verdict.exact, verdict.graded, verdict.reasons) == (True, False, 0.0, ())


def test_thresholds_are_0_3_and_for_counting_0_9() -> None:
    for score, tag, there in ((0.3, "", False), (0.31, "", True), (0.9, "counting", False), (0.91, "counting", True)):
        assert judge(asks(DOG, tag=tag), [thing("dog", score=score)]).correct is there
    assert not judge(asks(DOG), [thing("dog", score=0.31)], Rules(threshold=0.5)).correct


def test_at_most_16_things_of_a_class_count() -> None:
    many = [thing("dog", x=place) for place in range(20)]
    assert judge(asks({"class": "dog", "count": 16}), many).exact
    assert not judge(asks({"class": "dog", "count": 17}), many).correct


def test_colour_is_that_of_the_surest_things() -> None:
    red = asks({**DOG, "color": "red"})
    two = [thing("dog", colour="blue", score=0.5), thing("dog", colour="red", score=0.8)]
    assert judge(red, two).correct
    assert not judge(red, [two[0], thing("dog", colour="red", score=0.4)]).correct
    wrong = judge(red, [thing("dog", colour="blue")])
    assert (wrong.correct, wrong.graded) == (False, 0.5)
    assert wrong.reasons == ("expected red dog>=1, found 0 red; and 1 blue",)
    assert not judge(red, [thing("dog")]).correct
    assert judge(asks({"class": "dog", "count": 2, "color": "red"}), [thing("dog", colour="red")] * 2).graded == 1
    half = judge(asks({"class": "dog", "count": 2, "color": "red"}), [thing("dog", colour="red"), thing("dog", colour="pink")])
    assert (half.correct, half.graded) == (False, 0.75)
    assert judge(red, []).graded == 0  # a colour of nothing is worth 0 as well


def test_colours_may_not_be_swapped() -> None:
    both = asks({**DOG, "color": "red"}, {**CAT, "color": "blue"})
    assert judge(both, [thing("dog", colour="red"), thing("cat", colour="blue")]).correct
    assert judge(both, [thing("dog", colour="blue"), thing("cat", colour="red")]).graded == 0.5


def test_position_is_of_the_second_to_the_first() -> None:
    left = asks(DOG, {**CAT, "position": ["left of", 0]})
    assert judge(left, [thing("dog", x=60), thing("cat", x=10)]).correct
    wrong = judge(left, [thing("dog", x=10), thing("cat", x=60)])
    assert (wrong.correct, wrong.graded) == (False, pytest.approx(2 / 3))
    assert wrong.reasons == ("expected cat left of target, found right of target",)
    lost = judge(left, [thing("cat")])
    assert lost.reasons == ("expected dog>=1, found 0", "no target for cat to be left of")
    assert lost.graded == pytest.approx(1 / 3)


def test_position_has_a_margin_and_may_be_slanted() -> None:
    box = (0.0, 0.0, 10.0, 10.0)
    assert relations(box, box) == frozenset()
    assert relations((2.0, 0, 12, 10), box) == frozenset()  # 2 = a tenth of 10 + 10
    assert relations((4.1, 0, 14.1, 10), box) == {"right of"}  # (4.1 - 2) / 4.1 > 1 / 2
    assert relations((3.9, 0, 13.9, 10), box) == frozenset()
    assert relations((100.0, 100, 110, 110), box) == {"right of", "below"}
    assert relations((-100.0, -100, -90, -90), box) == {"left of", "above"}
    assert relations((4.1, 0, 14.1, 10), box, position_threshold=0.2) == frozenset()


def plainly(metadata: Mapping[str, Any], objects: Sequence[Detected]) -> tuple[bool, bool, float]:
    """correct, exact, graded, as the published programs say, clause by clause."""
    threshold = 0.9 if metadata["tag"] == "counting" else 0.3
    found: dict[str, list[Detected]] = {}
    for item in sorted(objects, key=lambda item: item.score, reverse=True):
        if item.score > threshold:
            found.setdefault(item.name, []).append(item)
    found = {name: items[:16] for name, items in found.items()}

    def place(a: Detected, b: Detected) -> set[str]:
        a_22, b_22 = np.array(a.box).reshape(2, 2), np.array(b.box).reshape(2, 2)
        offset = a_22.mean(0) - b_22.mean(0)
        sizes = np.abs(a_22[1] - a_22[0]) + np.abs(b_22[1] - b_22[0])
        short = np.maximum(np.abs(offset) - 0.1 * sizes, 0) * np.sign(offset)
        if np.all(np.abs(short) < 1e-3):
            return set()
        dx, dy = short / np.linalg.norm(offset)
        tests = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
        return {name for name, holds in tests.items() if holds}

    def run(exact: bool) -> tuple[bool, list[float]]:
        right, marks, groups = True, [], []
        for clause in metadata["include"]:
            n = clause["count"]
            items = found.get(clause["class"], []) if exact else found.get(clause["class"], [])[:n]
            good = len(items) == n
            marks.append(max(0, 1 - abs(n - len(items)) / n))
            if not good and ("color" in clause or "position" in clause):
                marks.append(0)
            if good and "color" in clause:
                colours = [item.colour for item in items].count(clause["color"])
                marks.append(1 - abs(n - colours) / n)
                good = colours == n
            if good and "position" in clause:
                others = groups[clause["position"][1]]
                good = others is not None and all(clause["position"][0] in place(a, b) for a in items for b in others)
                marks.append(float(good))
            groups.append(items if good else None)
            right &= good
        return right, marks

    correct, _ = run(False)
    exact, marks = run(True)
    for clause in metadata["exclude"]:
        correct &= len(found.get(clause["class"], [])) < clause["count"]
    return correct, exact, sum(marks) / len(marks)


def test_verdicts_are_those_of_the_published_program() -> None:
    chance, seen = random.Random(0), set()
    for _ in range(3000):
        clauses = []
        for place in range(chance.randint(1, 2)):
            clause: dict[str, Any] = {"class": chance.choice(["dog", "cat"]), "count": chance.choice([1, 1, 2, 3])}
            if chance.random() < 0.4:
                clause["color"] = chance.choice(COLOURS[:2])
            if place and chance.random() < 0.5:
                clause["position"] = [chance.choice(POSITIONS), 0]
            clauses.append(clause)
        exclude = [{"class": clauses[0]["class"], "count": clauses[0]["count"] + 1}] if chance.random() < 0.5 else []
        metadata = asks(*clauses, tag=chance.choice(["", "counting"]), exclude=exclude)
        objects = [
            thing(
                chance.choice(["dog", "cat"]),
                chance.uniform(0, 40),
                chance.uniform(0, 40),
                chance.choice(COLOURS[:2]),
                chance.choice([0.2, 0.5, 0.95, 0.97, 0.99]) + chance.random() * 1e-3,
            )
            for _ in range(chance.randint(0, 5))
        ]
        verdict = judge(metadata, objects)
        wanted = plainly(metadata, objects)
        assert (verdict.correct, verdict.exact, pytest.approx(verdict.graded)) == wanted
        assert verdict.correct == (not verdict.reasons)
        seen.add(wanted[:2])
    assert len(seen) == 3  # what is exact is correct


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "'include' must be a list"),
        ({"include": []}, "at least one"),
        (asks({"class": "dog"}), "'include.0' must have a 'count'"),
        (asks({"count": 1}), "with a 'class'"),
        (asks({**DOG, "color": "mauve"}), "'mauve'; known are red"),
        (asks({**DOG, "position": ["left of", 0]}), "an earlier one"),
        (asks(DOG, {**CAT, "position": ["beside", 0]}), "'position' of one of left of"),
        (asks(DOG, exclude=[{"class": "dog", "count": 0}]), "'exclude.0'"),
    ],
)
def test_metadata_that_is_none_is_refused(metadata: Mapping[str, Any], words: str) -> None:
    assert words in (problem(metadata) or "")
    with pytest.raises(ValueError, match="'"):
        judge(metadata, [])
