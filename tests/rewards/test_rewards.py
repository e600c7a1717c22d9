"""Answers, form, DeepEyes, MMSearch-R1, evidence, faithfulness and calls, against cases worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image, ImageDraw, ImageFont
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from mmrl.component import Component, Problems, validate
from mmrl.messages import Message, Picture
from mmrl.rewards import evidence
from mmrl.rewards.answers import Correct
from mmrl.rewards.deep_eyes import DeepEyes
from mmrl.rewards.faithful import Faithful, FaithfulTurns
from mmrl.rewards.form import Form, Penalties, balanced
from mmrl.rewards.mm_search import MMSearch
from mmrl.rewards.tool_rewards import CallCost, CallOutcomes, Emitted
from mmrl.transcripts import Transcript
from tests.rewards.tales import PICTURE, WELL, question, said, tale, used

BOX = (10, 10, 30, 30)


class Oracle:
    """A judge that says what it is told, in turn, and remembers what it was asked."""

    asked: list[Any]

    @dataclass(frozen=True, config=ConfigDict(extra="forbid"))
    class Config:
        replies: tuple[float, ...]

    def __init__(self, config: Config) -> None:
        self.replies, self.failure = list(config.replies), "it is asleep"
        Oracle.asked = []

    def ask(self, prompts: Sequence[Any]) -> list[float]:
        Oracle.asked += prompts
        return [self.replies.pop(0) for _ in prompts]

    __call__ = ask


def oracle(*replies: float) -> Component:
    return Component("fake:Oracle", Oracle, Oracle.Config(replies))


# ---------------------------------------------------------------- answers


def test_answers_are_marked_by_the_question() -> None:
    tales = [tale(), tale(answer="maybe"), tale(answer="no"), tale(answer=None)]
    assert Correct(Correct.Config())(tales) == [1, 0.5, 0, 0]
    assert Correct(Correct.Config(partial=False))(tales) == [1, 0, 0, 0]
    reward = Correct(Correct.Config(partial=False, correct_above=0.4))
    assert reward(tales) == [1, 1, 0, 0] and reward.terms == {"answered": 0.75}


def test_a_judge_is_asked_about_what_the_check_doubts() -> None:
    tales = [tale(), tale(answer="maybe"), tale(answer="no"), tale(answer="well"), tale(answer=None)]
    reward = Correct(Correct.Config(judge=oracle(0.25, 1.0, math.nan)))
    scores = reward(tales)
    assert scores[:3] == [1, 0.5, 1] and math.isnan(scores[3]) and scores[4] == 0
    assert Oracle.asked == tales[1:4] and reward.failure == "it is asleep"


def test_a_judge_must_be_one() -> None:
    block = {"target": "mmrl.rewards.form:Form"}
    with pytest.raises(Problems) as error:
        validate(Correct.Config, {"judge": block})
    assert str(error.value) == ("'judge': mmrl.rewards.form:Form cannot be asked; name a judge, such as mmrl.rewards.judge:Judge")


# ---------------------------------------------------------------- form


def test_tags_are_balanced() -> None:
    good = ["", "a", "<t></t>", "x<t>a</t>y<t>\n</t>", "<b>"]
    bad = ["<t>", "</t>", "</t><t>", "<t><t></t></t>", "<t></t></t>", "<t></t><t>"]
    assert all(balanced(text, "t") for text in good) and not any(balanced(text, "t") for text in bad)


def test_form_has_its_scores_and_tags() -> None:
    tales = [tale(text=WELL), tale(text="yes"), tale(text=WELL, answer=None)]
    assert Form(Form.Config())(tales) == [1, 0, 1]
    assert Form(Form.Config(good=0.0, bad=-1.0))(tales) == [0, -1, 0]
    assert Form(Form.Config(think=None))([tale(text="hm <answer>yes</answer>"), tales[1]]) == [1, 0]
    assert Form(Form.Config(answer=None))([tale(text="<think>a</think>yes"), tales[1], tales[2]]) == [1, 0, 0]
    assert Form(Form.Config(think="reason"))([tale(text="<reason>a</reason><answer>b</answer>"), tales[0]]) == [1, 0]


def test_all_messages_are_one_text() -> None:
    calls = [used("rotate", degrees=90)]
    form = Form(Form.Config())
    assert form([tale(calls, thought="<think>look</think>"), tale(calls, thought="look")]) == [1, 0]
    assert form([tale(calls, thought="<think>a</think><answer>x</answer>")]) == [0]


@pytest.mark.parametrize(
    ("text", "searched", "flaws"),
    [
        (WELL, True, 0.0),
        (WELL, False, 0.1),
        ("<think>a</think> yes", True, 0.5),
        ("yes", False, 0.5 + 0.15 + 0.1),
        ("<think>a</think><answer>yes", True, 0.2),
        ("<think>a</think>yes</answer>", True, 0.2),
        ("<answer>yes</answer>", True, 0.15),
        ("<think>a<answer>yes</answer>", True, 0.1),
        ("<think>a</think><answer> \n</answer>", True, 0.2),
        ("<think>a<answer></answer><answer>", False, 0.2 + 0.2 + 0.1 + 0.1),
    ],
)
def test_penalties_are_those_of_icrl(text: str, searched: bool, flaws: float) -> None:
    rounds = [[said("text_search", "x")]] if searched else []
    assert Penalties(Penalties.Config())([tale(*rounds, text=text)]) == [pytest.approx(1 - flaws)]


# ---------------------------------------------------------------- DeepEyes, MMSearch-R1


def test_deep_eyes() -> None:
    crop, astray, turn = used("crop", box=BOX), used("crop", box=(9, 9, 2, 2)), used("rotate", degrees=90)
    assert astray.error == "tool_error"
    thought = "<think>a</think>"
    cases = [
        (tale(), 0.8),
        (tale(text="yes"), 0.8 - 0.2),
        (tale([crop], thought=thought), 0.8 + 1.2),
        (tale([crop], text="yes"), 0.8 - 0.2 + 1.2),
        (tale([turn], thought=thought), 0.8),
        (tale([astray], thought=thought), 0.8),
        (tale([crop], answer="no", thought=thought), 0.0),
        (tale([crop], answer="maybe", thought=thought), 0.4),  # 0.5 is not above 0.5
        (tale(answer=None, text="..."), -0.2),
    ]
    assert DeepEyes(DeepEyes.Config())([each for each, _ in cases]) == pytest.approx([value for _, value in cases])
    maths = DeepEyes(DeepEyes.Config(accuracy=1.2, form=0.4, bonus=0.0))
    assert maths([tale(), tale([crop], text="no")]) == pytest.approx([1.2, 1.2 - 0.4])


def test_mm_search() -> None:
    image, text, web, other = said("image_search"), said("text_search"), said("web_search"), said("visit")
    thought = "<think>a</think>"

    def score(*rounds: Any, **more: Any) -> float:
        fields = {name: more.pop(name) for name in ("each_search", "form", "search") if name in more}
        return MMSearch(MMSearch.Config(**fields))([tale(*rounds, thought=thought, **more)])[0]

    assert score() == pytest.approx(0.9 * 1 + 0.1)
    for rounds in ([[image]], [[text]], [[web]], [[image], [text]]):
        assert score(*rounds) == pytest.approx(0.9 * 0.9 + 0.1)
        assert score(*rounds, answer="no") == pytest.approx(0.1)
        assert score(*rounds, answer="no", text="no") == 0
    for rounds in ([[text], [image]], [[image], [image]], [[text], [text]], [[image, text]], [[image], [text], [text]]):
        assert score(*rounds) == pytest.approx(0.9 * 0.9)
    assert score([image], [text], each_search=True) == pytest.approx(0.9 * 0.9**2 + 0.1)
    assert score([image], [text], form=0.2, search=0.3) == pytest.approx(0.8 * 0.7 + 0.2)
    assert score([other]) == pytest.approx(0.9)  # no search, but no round that is asked for either
    assert score(text="yes") == pytest.approx(0.9)


# ---------------------------------------------------------------- evidence


def test_areas_by_hand() -> None:
    assert evidence.iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert evidence.iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0 and evidence.iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0
    assert evidence.iou((0, 0, 4, 4), (1, 1, 3, 2)) == pytest.approx(2 / 16)


def test_a_cut_holds_the_box_that_it_contains_unless_it_is_hardly_a_cut() -> None:
    about = question(box=BOX)

    def shown(box: Any, measure: Any = "containment") -> float | None:
        call = used("crop", box=box)
        return evidence.picture_score(tale([call], about=about), call, measure)

    assert shown((0, 0, 50, 40)) == 1 and shown((20, 10, 60, 60)) == 0.5 and shown((40, 40, 60, 60)) == 0
    assert shown((0, 0, 100, 40)) == 1 and shown((0, 0, 100, 41)) == 0  # half of 100 x 80, and more
    assert shown((0, 0, 100, 80), "iou") == pytest.approx(400 / 8000) and shown((10, 10, 30, 50), "iou") == 0.5
    large = question(box=(0, 0, 60, 60))  # 3600 of 8000: a cut may be 1.5 times that
    for box, value in (((0, 0, 66, 80), 1.0), ((0, 0, 68, 80), 0.0)):
        call = used("crop", box=box)
        assert evidence.picture_score(tale([call], about=large), call) == value


def test_a_call_that_failed_and_pictures_from_elsewhere_show_nothing() -> None:
    about = question(box=BOX)
    good = used("crop", box=BOX)
    failed = type(good)(good.name, good.arguments, good.result, "timeout")
    own = said("image_search")
    stranger = type(own)("image_search", {}, type(own.result)(pictures=(PICTURE,)))
    for call in (failed, stranger):
        assert evidence.picture_score(tale([call], about=about), call) == 0
    # Calls do not count an example's picture that stands before the question; the question may show its picture twice.
    other = Picture(Image.new("RGB", (100, 80)))
    opening = (Message("user", (other, "once")), Message("user", about.parts))
    assert evidence.picture_score(tale([good], about=about, opening=opening), good) == 1
    asked = question((PICTURE, other, PICTURE), box=BOX)
    for number, value in ((1, 1.0), (2, 0.0), (3, 1.0)):
        call = used("crop", on=(PICTURE, other, PICTURE), image=number, box=BOX)
        assert evidence.picture_score(tale([call], about=asked), call) == value


@pytest.mark.parametrize(
    ("operations", "calls", "right"),
    [
        (["rotate_90"], [("rotate", {"degrees": 90})], True),
        (["rotate_90"], [("rotate", {"degrees": 80})], True),
        (["rotate_90"], [("rotate", {"degrees": 70})], False),
        (["rotate_90"], [("rotate", {"degrees": 270})], False),
        (["rotate_90"], [("flip", {"direction": "horizontal"})], False),
        (["rotate_270"], [("rotate", {"degrees": -90})], True),
        (["rotate_180"], [("flip", {"direction": "horizontal"}), ("flip", {"direction": "vertical"})], True),
        (["flip_vertical"], [("flip", {"direction": "vertical"})], True),
        (["rotate_90", "flip_horizontal"], [("rotate", {"degrees": 90}), ("flip", {"direction": "horizontal"})], True),
        (["rotate_90", "flip_horizontal"], [("flip", {"direction": "horizontal"}), ("rotate", {"degrees": 90})], False),
        (["rotate_90", "flip_horizontal"], [("rotate", {"degrees": 270}), ("flip", {"direction": "vertical"})], True),
    ],
)
def test_a_picture_that_stands_as_it_should(operations: list[str], calls: list[Any], right: bool) -> None:
    about = question(operations=operations)
    pictures, records = [PICTURE], []
    for name, arguments in calls:
        records.append(used(name, on=pictures, image=len(pictures), **arguments))
        pictures += records[-1].result.pictures
    assert evidence.picture_score(tale(records, about=about), records[-1]) == float(right)
    assert evidence.faithful(tale(records, about=about)) is right


def test_texts_are_found_as_words_and_ids_as_values() -> None:
    about = question(evidence=("Grey Cat", "doc-7"))
    found = evidence.texts_found
    assert found(about, said("s", "the GREY\n cat.")) == {"Grey Cat"}
    assert found(about, said("s", "the greycat, grey cats")) == set()
    assert found(about, said("s", details={"ids": ("doc-1", "doc-7")})) == {"doc-7"}
    assert found(about, said("s", details={"ids": ("doc-77",)})) == set()
    assert found(about, said("s", "grey cat doc-7", error="timeout")) == set()
    assert found(question(evidence="Grey Cat"), said("s", "a grey cat")) == {"Grey Cat"}


def test_a_box_is_evidence_where_a_crop_is_expected_and_the_turn_where_not() -> None:
    turned, cut = used("rotate", degrees=90), used("crop", box=BOX)
    only_turn, both = (question(operations=names, box=BOX) for names in (("rotate_90",), ("rotate_90", "crop")))
    assert evidence.faithful(tale([turned], about=only_turn)) is True and evidence.faithful(tale([cut], about=only_turn)) is False
    assert evidence.faithful(tale([turned], about=both)) is False and evidence.faithful(tale([cut], about=both)) is True
    assert evidence.faithful(tale([cut], about=question(operations=(), box=BOX))) is None
    # On the way to a cut, putting the picture right is a step in the right direction; a cut elsewhere is none, however it stands.
    picture = turned.result.pictures[0]
    crops = [used("crop", on=(picture,), box=box) for box in ((50, 10, 70, 30), (0, 0, 9, 9))]
    steps = FaithfulTurns(FaithfulTurns.Config()).per_turn([tale([turned], *[[each] for each in crops], about=both)])
    assert steps == [[1, 1, 0, 0]]
    assert FaithfulTurns(FaithfulTurns.Config()).per_turn([tale([turned], about=question(box=BOX))]) == [[0, 0]]


def test_faithful_is_a_picture_or_all_texts_or_not_known() -> None:
    faithful = evidence.faithful
    two = question(evidence=("a", "b"))
    assert faithful(tale(about=question())) is None and faithful(tale(about=question(box=(0, 0, 100, 80)))) is None
    assert faithful(tale(about=two)) is False
    assert faithful(tale([said("s", "a")], about=two)) is False
    assert faithful(tale([said("s", "a")], [said("s", "b")], about=two)) is True
    either = question(evidence=("a",), box=BOX)
    assert faithful(tale([said("s", "a")], about=either)) is True
    assert faithful(tale([used("crop", box=BOX)], about=either)) is True
    assert faithful(tale([used("crop", box=(10, 10, 26, 30))], about=either)) is True  # 0.8 of the box
    assert faithful(tale([used("crop", box=(10, 10, 25, 30))], about=either)) is False


# ---------------------------------------------------------------- faithfulness as a reward


def test_steps_are_scored_by_what_their_tools_gave() -> None:
    about = question(box=BOX)
    half, whole, off = used("crop", box=(20, 10, 40, 40)), used("crop", box=BOX), used("crop", box=(50, 50, 60, 60))
    tales = [tale([half], [off, whole], [off], about=about), tale(about=about), tale([half], about=about, answer="no")]
    assert FaithfulTurns(FaithfulTurns.Config()).per_turn(tales) == [[0.5, 1, 0, 0], [0], [0.5, 0]]
    assert Faithful(Faithful.Config())(tales) == [pytest.approx(1.5 / 3), 0, 0.5]
    assert Faithful(Faithful.Config(only_correct=True))(tales) == [pytest.approx(0.5), 0, 0]
    iou = FaithfulTurns(FaithfulTurns.Config(measure="iou")).per_turn(tales)
    assert iou[0] == pytest.approx([200 / (400 + 600 - 200), 1, 0, 0])


def test_a_judge_sees_the_output_and_not_the_policy_s_words() -> None:
    crop, text = used("crop", box=BOX), said("read_text", "NO 42")
    tales = [
        tale([crop], [text], thought="I see it clearly"),
        tale(thought="I see"),
        tale([said("x", error="timeout")]),
        tale([text]),
    ]
    reward = Faithful(Faithful.Config(judge=oracle(1.0, 0.0, math.nan)))
    scores = reward(tales)
    assert scores[:3] == [0.5, 0, 0] and math.isnan(scores[3]) and reward.failure == "it is asleep"
    first, second, _ = Oracle.asked
    assert "Question: Is it so?" in first[0] and "known to be right: yes" in first[0] and "clearly" not in str(first)
    assert first[1:] == ("The question's pictures:", PICTURE, "The tool's pictures:", crop.result.pictures[0])
    assert "What the tool gave: NO 42" in second[0] and second[-1] is PICTURE


def test_what_can_be_read_in_a_picture_that_a_tool_made_is_evidence(installed: Callable[[str], None]) -> None:
    """Of the question's picture the text is in the right half; the tool must show it, not the question."""
    installed("rapidocr")
    whole = Picture(sign("CAT 42", (260, 80)))
    reader = Component.parse({"target": "mmrl.rewards.ocr:OCR"})
    for about in (question((whole,), evidence=("cat 42", "dog")), replace(question((whole,)), references=("42",))):
        right, left = (used("crop", on=(whole,), box=box) for box in ((60, 0, 260, 80), (0, 0, 50, 80)))
        same = used("crop", on=(whole,), box=(0, 0, 260, 80))
        failed = replace(right, error="timeout")
        tales = [tale([left], [left, right], [same], [failed], about=about)]
        assert FaithfulTurns(FaithfulTurns.Config(reader=reader)).per_turn(tales) == [[0, 1, 0, 0, 0]]
        assert FaithfulTurns(FaithfulTurns.Config()).per_turn(tales) == [[0] * 5]
    other = question((whole,), evidence=("at 4",))
    assert not evidence.can_be_read(other, "CAT 42"), "words are whole"
    with pytest.raises(ValueError, match=r"Oracle reads no pictures; use mmrl\.rewards\.ocr:OCR"):
        Faithful.Config(reader=oracle())
    with pytest.raises(ValueError, match="reader and judge are both set"):
        Faithful.Config(reader=reader, judge=oracle())


def sign(text: str, size: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).text((70, 16), text, "black", ImageFont.load_default(44))
    return image


# ---------------------------------------------------------------- calls


def test_tools_emit_rewards_at_their_turn() -> None:
    one = said("a", rewards=(("found", 0.5), ("late", -0.25)))
    tales: list[Transcript] = [tale([one, one], [said("b")]), tale()]
    assert Emitted(Emitted.Config()).per_turn(tales) == [[0.5, 0, 0], [0]]
    assert Emitted(Emitted.Config(names=("found",))).per_turn(tales) == [[1.0, 0, 0], [0]]


def test_outcomes_and_costs_of_calls() -> None:
    good, late, torn = said("a"), said("a", error="timeout"), said("", error="malformed")
    tales = [tale([good, late], [torn], [good]), tale()]
    assert CallOutcomes(CallOutcomes.Config()).per_turn(tales) == [[-0.05, -0.05, 0, 0], [0]]
    paid = CallOutcomes(CallOutcomes.Config(success=0.1, error=-1.0, kinds=("malformed",)))
    assert paid.per_turn(tales) == [[0.1, -1, 0.1, 0], [0]]
    assert CallCost(CallCost.Config())(tales) == [-2, 0] and CallCost(CallCost.Config(free=4))(tales) == [0, 0]
