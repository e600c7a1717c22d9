"""Answers: tables by hand, properties, boxes against counted pixels, and a sentence for a check that cannot be."""

from __future__ import annotations

import math
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mmrl.answers import BoxIoU, Choice, Exact, Normalised, Number, box, extract, iou, normalised, number, parse_check

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
WHOLE = st.integers(-20, 20)


# ---------------------------------------------------------------- where the answer stands


@pytest.mark.parametrize(
    ("text", "tag", "answer"),
    [
        ("<answer> 7 </answer>", "answer", "7"),
        ("<think><answer>3</answer></think><answer>7</answer>.", "answer", "7"),
        ("<answer>3</answer> no, <answer>7", "answer", "3"),
        ("<answer>it is <answer>7</answer>", "answer", "7"),
        ("<answer></answer>", "answer", ""),
        ("7", "answer", None),
        ("</answer>7<answer>", "answer", None),
        ("<final>7</final>", "final", "7"),
        (" 7\n", None, "7"),
        ("<think>3 or 7?</think>\n7", None, "7"),
        ("3?</think>4?</think> 7", None, "7"),
        ("<think>3 or 7?", None, None),
        ("<think>3</think> 7 <think>", None, None),
        ("", None, ""),
    ],
)
def test_where_an_answer_stands(text: str, tag: str | None, answer: str | None) -> None:
    assert extract(text, tag) == answer


@given(TEXTS, TEXTS, TEXTS)
def test_what_is_tagged_is_found_whatever_stands_around(before: str, answer: str, after: str) -> None:
    if "<answer>" not in answer and "answer>" not in after:
        assert extract(f"{before}<answer>{answer}</answer>{after}", "answer") == answer.strip()
    if "think>" not in answer:
        assert extract(f"{before}</think>{answer}") == answer.strip()


# ---------------------------------------------------------------- texts


def test_exact_is_the_text_itself() -> None:
    check = Exact(("Paris", "paris, France"))
    assert [check(text) for text in ("Paris", " Paris\n", "paris, France", "paris", "Paris.", "")] == [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("The  Eiffel\tTower.", "eiffel tower"),
        ("the", "the"),
        ("A", "a"),
        ("?!", "?!"),
        ("ＡＢＣ１２", "abc12"),
        ("Straße", "strasse"),
        ("ﬁne", "fine"),
        ("U.S.", "us"),
        ("well-known / famous", "well known famous"),
        ("O'Brien", "obrien"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("1,234,567.5", "1234567.5"),
        ("1,23", "1,23"),
        ("−5 °C", "-5 °c"),
        ("5-3", "5 3"),
        ("C#, 50%", "c# 50%"),
        ("«Là-bas»", "là bas"),
        ("theatre", "theatre"),
        ("東京。", "東京"),
    ],
)
def test_what_normalising_leaves(text: str, same: str) -> None:
    assert normalised(text) == same


@given(TEXTS)
@example("İ")
@example("- -5")
@example("1,234,a")
def test_normalising_twice_changes_nothing_more_and_forgives_what_it_should(text: str) -> None:
    once = normalised(text)
    assert normalised(once) == once
    assert normalised(f"  {text}\n") == once
    if text.isascii() and once:
        assert normalised(text.upper()) == once


def test_normalised_has_several_references_and_accents_count() -> None:
    check = Normalised(("Zürich", "the city of Zurich"))
    assert [check(text) for text in ("zürich!", "City of Zurich", "Zurich", "Zürich, Bern", "")] == [1, 1, 0, 0, 0]


# ---------------------------------------------------------------- choices

CITIES = ("Paris", "New York", "York", "A dog")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("[b]", "B"),
        ("B.", "B"),
        ("B)", "B"),
        ("**B**", "B"),
        ("B. New York", "B"),
        ("(B) New York", "B"),
        ("B: because of the bridge", "B"),
        ("The answer is B", "B"),
        ("the answer is (b).", "B"),
        ("Answer: B", "B"),
        ("The correct answer is **B**, not C", "B"),
        ("First I thought the answer is A, but the answer is B.", "B"),
        ("It can only be (B), I think", "B"),
        ("Option C", "C"),
        ("new york", "B"),
        ("The city of New York.", "B"),
        ("York", "C"),
        ("It is Paris", "A"),
        ("a dog", "D"),
        ("The answer is a dog", "D"),
        ("A dog is seen", "D"),
        ("(A) or (B)", None),
        ("Paris or New York", None),
        ("E", None),
        ("the answer is E", None),
        ("", None),
        ("London", None),
        ("Parisian", None),
    ],
)
def test_which_option_a_text_names(text: str, letter: str | None) -> None:
    assert Choice(("A",), CITIES).chosen(text) == letter


def test_a_choice_may_be_given_by_letter_or_by_text() -> None:
    for reference in ("B", "new york"):
        check = Choice((reference,), CITIES)
        assert [check(text) for text in ("B", "New York", "(C)", "York", "none")] == [1, 1, 0, 0, 0]
    several = Choice(("A", "C"), CITIES)
    assert [several(text) for text in "ABCD"] == [1, 0, 1, 0]
    lettered = Choice(("Z",))
    assert [lettered(text) for text in ("z", "Z.", "the answer is Z", "Y")] == [1, 1, 1, 0]


@given(
    st.lists(st.text("abcdefg ", min_size=3, max_size=9).map(str.strip), min_size=2, max_size=6, unique_by=normalised), st.data()
)
def test_every_option_is_named_by_its_letter_and_by_its_text(options: list[str], data: st.DataObject) -> None:
    if any(len(option) < 2 for option in options):
        return
    place = data.draw(st.integers(0, len(options) - 1))
    letter, check = "ABCDEF"[place], Choice(("ABCDEF"[place],), tuple(options))
    for text in (letter, f"({letter})", f"{letter}. {options[place]}", f"The answer is {letter}.", options[place]):
        assert check(text) == 1
    for other in range(len(options)):
        assert check("ABCDEF"[other]) == float(other == place) == check(options[other])


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("1,234.5", 1234.5),
        ("1,234,567", 1234567),
        ("12,34", 34),
        ("3e2", 300),
        ("2.5E-3", 0.0025),
        ("3 x 10^2", 300),
        ("3×10^-2", 0.03),
        ("3/4", 0.75),
        ("1 3/4 cups", 1.75),
        ("1½", 1.5),
        ("½", 0.5),
        ("50%", 0.5),
        ("12.5 percent", 0.125),
        ("-3", -3),
        ("−3", -3),
        ("x=-3", -3),
        ("+.5", 0.5),
        ("-0.25 m", -0.25),
        ("$1,000", 1000),
        ("-$5", -5),
        ("$-5", -5),
        ("€ 7", 7),
        ("pages 5-3", 3),
        ("- 3 apples", 3),
        ("10 - 3 = 7", 7),
        ("The answer is 12 km.", 12),
        ("3km", 3),
        ("2 and then 9.", 9),
        ("７", 7),
        ("10²", 10),
        ("1/0", None),
        ("H2O", None),
        ("none", None),
        ("", None),
        ("1e999", None),
    ],
)
def test_which_number_a_text_holds(text: str, value: float | None) -> None:
    assert number(text) == (None if value is None else pytest.approx(value, rel=1e-15))


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_what_python_prints_is_read_back(value: float) -> None:
    assert number(repr(value)) == pytest.approx(value, rel=1e-15, abs=0)
    if abs(value) < 1e15:
        assert number(f"about {value:,.3f} of them") == pytest.approx(round(value, 3), rel=1e-12, abs=1e-12)


@given(st.integers(0, 99), st.integers(0, 99), st.integers(1, 99))
def test_fractions_and_percents(whole: int, above: int, below: int) -> None:
    assert number(f"{whole} {above}/{below}") == float(whole + Fraction(above, below))
    assert number(f"-{above}/{below}") == -above / below
    assert number(f"{above}.{below} %") == pytest.approx(float(f"{above}.{below}") / 100)


@given(st.text("0123456789.,-+/e% $x^()", max_size=200))
@example("9" * 6000)
@example("1." + "3" * 6000)
@example("1/" + "9" * 6000)
def test_no_text_breaks_the_reading(text: str) -> None:
    value = number(text)
    assert value is None or math.isfinite(value)
    assert box(text) is None or len(box(text) or ()) == 4


def test_tolerances_are_absolute_or_relative_whichever_allows_more() -> None:
    assert [Number(("10",))(text) for text in ("10", "10.0", "1e1", "10.001", "11", "ten", "")] == [1, 1, 1, 0, 0, 0, 0]
    assert [Number(("0.2",), absolute=0.1)(text) for text in ("0.3", "0.1", "0.31", "0.09")] == [1, 1, 0, 0]
    assert [Number(("200",), relative=0.05)(text) for text in ("190", "210", "211")] == [1, 1, 0]
    assert [Number(("200", "-1"), absolute=20, relative=0.05)(text) for text in ("181", "179", "-20", "20")] == [1, 0, 1, 0]


# ---------------------------------------------------------------- boxes


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[1, 2, 3, 4]", (1, 2, 3, 4)),
        ("(1,2,3.5,4)", (1, 2, 3.5, 4)),
        ("1 2 3 4", (1, 2, 3, 4)),
        ('{"bbox_2d": [1, 2, 3, 4], "label": "cat 5"}', (1, 2, 3, 4)),
        ("[0, 0, 9, 9] or rather [1, 2, 3, 4]", (1, 2, 3, 4)),
        ("[1, 2, 3]", None),
        ("1 2 3 4 5", None),
        ("[3, 2, 1, 4]", None),
        ("[1, 2, 1, 4]", None),
        ("[1, 2, 1e999, 4]", None),
        ("", None),
    ],
)
def test_which_box_a_text_holds(text: str, found: tuple[float, ...] | None) -> None:
    assert box(text) == found


@given(st.tuples(WHOLE, WHOLE, WHOLE, WHOLE), st.tuples(WHOLE, WHOLE, WHOLE, WHOLE))
def test_iou_is_what_counting_pixels_gives(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    boxes = [(min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]) + 1, max(b[1], b[3]) + 1) for b in (one, other)]
    first, second = np.zeros((2, 50, 50), bool)
    for plane, (left, top, right, bottom) in zip((first, second), boxes, strict=True):
        plane[top + 25 : bottom + 25, left + 25 : right + 25] = True
    expected = (first & second).sum() / (first | second).sum()
    assert iou(boxes[0], boxes[1]) == pytest.approx(expected)
    assert BoxIoU((str(boxes[0]),))(f"It is at {list(boxes[1])}.") == pytest.approx(expected)
    assert BoxIoU((str(boxes[0]),), threshold=0.5)(str(boxes[1])) == float(expected >= 0.5)


def test_the_best_of_several_boxes_counts() -> None:
    check = BoxIoU(("[0, 0, 10, 10]", "[20, 0, 30, 10]"))
    assert check("[20, 0, 30, 5]") == pytest.approx(0.5)
    assert check("nowhere") == 0 == check("[5, 20, 6, 21]")


# ---------------------------------------------------------------- checks of data sets


def test_checks_of_data_sets() -> None:
    assert parse_check("exact", ["7"]) == Exact(("7",))
    assert parse_check({"kind": "normalised"}, ["7"]) == Normalised(("7",))
    assert parse_check({"kind": "choice", "options": ["x", "y"]}, ["B"]) == Choice(("B",), ("x", "y"))
    assert parse_check({"kind": "number", "tolerance": 0.01}, ["7", "8"]) == Number(("7", "8"), absolute=0.01)
    assert parse_check({"kind": "number", "relative": 0.1}, ["7"]) == Number(("7",), relative=0.1)
    assert parse_check({"kind": "box", "threshold": 0.5}, ["1 2 3 4"]) == BoxIoU(("1 2 3 4",), 0.5)


@pytest.mark.parametrize(
    ("block", "references", "sentence"),
    [
        (None, ["7"], "'check' must be a mapping with a 'kind', such as {kind: number, tolerance: 0.01}, got null"),
        ({"tolerance": 1}, ["7"], "'check' must be a mapping"),
        ("numbr", ["7"], "check.kind 'numbr' is unknown; did you mean 'number'?"),
        ("zzz", ["7"], "check.kind 'zzz' is unknown; known are box, choice, exact, normalised, number"),
        ({"kind": "number", "tolerence": 1}, ["7"], "check.tolerence is no key of kind 'number'; did you mean 'tolerance'?"),
        ({"kind": "exact", "tolerance": 1}, ["7"], "check.tolerance is no key of kind 'exact'; it has no keys but 'kind'"),
        ({"kind": "number", "tolerance": "1"}, ["7"], 'check.tolerance must be a number that is not negative, got "1"'),
        ({"kind": "number", "tolerance": -1}, ["7"], "check.tolerance must be a number that is not negative, got -1"),
        ({"kind": "number", "relative": True}, ["7"], "check.relative must be a number"),
        ({"kind": "box", "threshold": 2}, ["1 2 3 4"], "check.threshold must be above 0 and at most 1, got 2"),
        ({"kind": "choice", "options": "xy"}, ["A"], 'check.options must be a list of 2 to 26 texts, got "xy"'),
        ({"kind": "choice", "options": ["x", "y"]}, ["C"], "the answer \"C\" cannot be read as check.kind 'choice' wants"),
        ("number", ["7", "seven"], "the answer \"seven\" cannot be read as check.kind 'number' wants"),
        ("box", ["1 2 3"], 'the answer "1 2 3" cannot be read'),
        ("exact", [], "there is no reference to check against"),
    ],
)
def test_a_check_that_cannot_be_is_refused_in_a_sentence(block: Any, references: list[str], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_check(block, references)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    "check", [Exact(("a",)), Normalised(("a",)), Choice(("A",), ("x", "y")), Number(("1",), 0.1), BoxIoU(("1 2 3 4",), 0.5)]
)
def test_checks_are_values_that_travel_between_processes(check: Any) -> None:
    assert pickle.loads(pickle.dumps(check)) == check
    assert hash(check) == hash(pickle.loads(pickle.dumps(check)))
