"""CodeVision's reward, term by term, against cases worked out by hand from METHODS 6.1, and the whole against a naive twin."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from mmrl.rewards.code_vision import CodeVision
from mmrl.rewards.operations import operation
from mmrl.transcripts import Transcript
from tests.rewards.tales import question, said, tale, used

BOX = (10, 10, 30, 30)
ALONE: dict[str, float] = {"form": 0.0, "mandatory": 0.0, "necessary": 0.0, "exact": 0.0, "emerging": 0.0, "excess": 0.0}
TURNED, DETAIL, BOTH, PLAIN = (
    question(operations=("rotate_90",)),
    question(box=BOX),
    question(operations=("rotate_90", "crop"), box=BOX),
    question(),
)
RIGHT, LEFT = used("rotate", degrees=90), used("rotate", degrees=270)
EXACT = used("crop", box=BOX)
HALF = used("crop", box=(10, 10, 30, 50))  # twice the box: IoU 1/2
FAR = used("crop", box=(60, 60, 90, 75))
MIRROR = used("flip", direction="horizontal")
OTHER = said("read_text", "abc")
FAILED = used("rotate", degrees=90, image=7)


def scores(*tales: Transcript, **fields: Any) -> list[float]:
    return CodeVision(CodeVision.Config(**fields))(tales)


def one(term: str, transcript: Transcript, weight: float = 1.0) -> float:
    """A term by itself: what it adds to a reward whose other weights are 0."""
    return scores(transcript, **{**ALONE, term: weight})[0] - scores(transcript, **ALONE)[0]


def test_defaults_are_the_codes() -> None:
    config = CodeVision.Config()
    assert (config.mandatory, config.necessary, config.excess) == (0.5, 0.2, 0.2)
    assert (config.form, config.exact, config.emerging) == (0.1, 0.1, 0.2)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("<think>a</think><answer>yes</answer>", True),
        (" <think>a</think> b <think>c</think> <answer>yes</answer>\n", True),
        ("<answer>yes</answer>", False),
        ("a <think>b</think><answer>yes</answer>", False),
        ("<think>a<answer>yes</answer>", False),
        ("<think>a<think>b</think></think><answer>yes</answer>", False),
        ("<think>a</think><answer>yes</answer> or so", False),
        ("<think>a</think><answer>no</answer><answer>yes</answer>", False),
        ("<think>a</think><answer>yes", False),
    ],
)
def test_form(text: str, good: bool) -> None:
    assert one("form", tale(text=text), 0.25) == (0.25 if good else 0.0)


@pytest.mark.parametrize(
    ("about", "calls", "value"),
    [
        (TURNED, [], 0.0),
        (TURNED, [RIGHT], 1.0),
        (TURNED, [LEFT], 0.0),
        (TURNED, [used("rotate", degrees=-270)], 1.0),
        (TURNED, [used("rotate", degrees=450)], 1.0),
        (TURNED, [FAILED], 0.0),
        (DETAIL, [EXACT], 1.0),
        (DETAIL, [HALF], 0.5),
        (DETAIL, [HALF, EXACT], 1.0),
        (DETAIL, [FAR], 0.0),
        (BOTH, [RIGHT], 0.5),
        (BOTH, [RIGHT, HALF], 0.75),
        (BOTH, [HALF], 0.25),
        (BOTH, [RIGHT, MIRROR, EXACT], 1.0),
        (PLAIN, [RIGHT], 0.0),
        (question(operations=("flip_vertical",)), [used("flip", direction="vertical")], 1.0),
        (question(operations=("flip_vertical",)), [MIRROR], 0.0),
    ],
)
def test_mandatory(about: Any, calls: list[Any], value: float) -> None:
    # A wrong answer: no gate disturbs it.
    assert one("mandatory", tale(calls, about=about, answer="no")) == pytest.approx(value)


def test_a_tool_of_that_name_from_elsewhere_is_another_operation() -> None:
    assert operation(said("rotate")) == "rotate" and operation(said("flip")) == "flip_None"
    assert operation(used("rotate", degrees=-90)) == "rotate_270" and operation(used("rotate", degrees=22.5)) == "rotate_22.5"


def test_a_crop_of_the_turned_picture_is_found_in_the_first() -> None:
    turned = RIGHT.result.pictures[0]  # (x, y) of the first is (80 - y, x) there
    crop = used("crop", on=(turned,), box=(50, 10, 70, 30))
    assert one("mandatory", tale([RIGHT], [crop], about=BOTH, answer="no")) == pytest.approx(1.0)
    astray = used("crop", on=(turned,), box=BOX)
    assert one("mandatory", tale([RIGHT], [astray], about=BOTH, answer="no")) == pytest.approx(0.5)


def test_exact() -> None:
    cases = [
        (TURNED, [RIGHT], 1),
        (TURNED, [RIGHT, RIGHT], 1),
        (TURNED, [RIGHT, MIRROR], 0),
        (TURNED, [RIGHT, OTHER], 1),
        (TURNED, [], 0),
        (BOTH, [RIGHT, FAR], 1),
        (BOTH, [RIGHT], 0),
        (PLAIN, [], 0),
        (PLAIN, [RIGHT], 0),
    ]
    for about, calls, value in cases:
        assert one("exact", tale(calls, about=about, answer="no"), 0.1) == pytest.approx(0.1 * value), (about.details, calls)


def test_emerging() -> None:
    assert one("emerging", tale([OTHER], about=PLAIN), 0.2) == pytest.approx(0.2)
    assert one("emerging", tale([OTHER], about=PLAIN, answer="no"), 0.2) == 0
    assert one("emerging", tale([RIGHT], about=TURNED), 0.2) == 0
    assert one("emerging", tale([said("read_text", error="timeout")], about=PLAIN), 0.2) == 0


def test_usage_and_spurious() -> None:
    def cost(about: Any, *calls: Any) -> float:
        return -one("excess", tale(calls, about=about, answer="no"))

    assert cost(TURNED, RIGHT, RIGHT) == 0
    assert cost(TURNED, RIGHT, RIGHT, RIGHT, RIGHT) == 2  # beyond max(2, 1)
    assert cost(TURNED, RIGHT, FAILED, FAILED) == 1  # failed ones are calls
    three = question(operations=("rotate_90", "flip_horizontal", "crop"), box=BOX)
    assert cost(three, RIGHT, RIGHT, RIGHT) == 0 and cost(three, RIGHT, RIGHT, RIGHT, RIGHT) == 1
    assert cost(PLAIN, RIGHT) == 1 and cost(PLAIN, RIGHT, MIRROR) == 2 and cost(PLAIN, EXACT) == 0
    assert cost(DETAIL, EXACT, MIRROR) == 1
    assert cost(TURNED, LEFT, MIRROR) == 0  # some turn was expected
    assert cost(PLAIN, FAILED) == 0


def test_the_gate() -> None:
    def accuracy(*calls: Any, about: Any = DETAIL) -> float:
        return scores(tale(calls, about=about), **ALONE)[0]

    assert accuracy() == 0 and accuracy(FAR) == 0
    sliver = used("crop", box=(28, 10, 30, 30))  # IoU 1/10: not below it
    assert accuracy(sliver) == pytest.approx(1.0)
    narrow = used("crop", box=(29, 10, 30, 30))
    assert accuracy(narrow) == pytest.approx(0.05)
    assert accuracy(RIGHT, about=BOTH) == 1.0  # R_mand is 1/2 without a crop
    assert accuracy(LEFT, about=TURNED) == 1.0  # no crop is expected
    # The gate closes R_nec, too.
    group = [tale([FAR], about=DETAIL), tale(about=DETAIL, answer="no")]
    assert scores(*group, **{**ALONE, "necessary": 1.0})[0] == 0
    group[0] = tale([EXACT], about=DETAIL)
    assert scores(*group, **{**ALONE, "necessary": 1.0})[0] == pytest.approx(1 + 1)


def test_necessary_compares_the_group() -> None:
    def gains(*tales: Transcript) -> list[float]:
        with_term, without = scores(*tales, **{**ALONE, "necessary": 1.0}), scores(*tales, **ALONE)
        return [a - b for a, b in zip(with_term, without, strict=True)]

    def yes(*calls: Any, task: int = 0) -> Transcript:
        return tale(calls, about=TURNED, task=task)

    def no(*calls: Any, task: int = 0) -> Transcript:
        return tale(calls, about=TURNED, answer="no", task=task)

    # With tools 2 of 3 are right, without 1 of 4.
    group = [yes(RIGHT), yes(LEFT), no(RIGHT), yes(), no(), no(), no()]
    assert gains(*group) == pytest.approx([2 / 3 - 1 / 4] * 2 + [0] * 5)
    assert gains(yes(RIGHT), yes(), yes(), no(), no(), no()) == [0] * 6  # two were right without
    assert gains(yes(RIGHT), no(RIGHT)) == [0, 0]  # none did without
    assert gains(yes(RIGHT), no(RIGHT), no(RIGHT), yes()) == [0] * 4  # tools did not help
    # Groups do not mix, whatever the order.
    mixed = [yes(RIGHT), no(task=1), no(), yes(RIGHT, task=1), yes(task=1)]
    assert gains(*mixed) == pytest.approx([1, 0, 0, 0.5, 0])


def naive(tales: list[Transcript], used_names: list[list[str]], ious: list[float]) -> list[float]:
    """METHODS 6.1 as it is written, for names and IoUs that are known."""
    alpha, beta, gamma, w_f, w_e = 0.5, 0.2, 0.2, 0.1, 0.2
    out = []
    for t, names, best in zip(tales, used_names, ious, strict=True):
        mates = [(m, u) for m, u in zip(tales, used_names, strict=True) if m.task_id == t.task_id]
        expected = set(t.question.details.get("operations", ())) | ({"crop"} if "box" in t.question.details else set())
        r_acc = 1.0 if t.answer == "yes" else 0.0
        r_mand = 0.0
        if expected:
            r_mand = len((expected - {"crop"}) & set(names)) / len(expected)
            if "crop" in expected:
                r_mand += best / len(expected)
        tool = [m.answer == "yes" for m, u in mates if u]
        bare = [m.answer == "yes" for m, u in mates if not u]
        r_nec = 0.0
        if r_acc and names and bare and sum(bare) < 2:
            r_nec = max(0.0, sum(tool) / len(tool) - sum(bare) / len(bare))
        if "crop" in expected and r_mand < 0.1:
            r_acc, r_nec = r_acc * r_mand, 0.0
        core = {n for n in names if n == "crop" or n[:4] in ("rota", "flip")}
        r_exact = 0.1 if expected and core == expected else 0.0
        r_emerge = w_e if t.answer == "yes" and set(names) - core else 0.0
        c_usage = max(0, len(names) - max(2, len(expected)))
        wants_turn = any(n != "crop" for n in expected)
        r_spur = 0 if wants_turn else sum(n[:4] in ("rota", "flip") for n in names)
        out.append(r_acc + w_f + alpha * r_mand + beta * r_nec + r_exact + r_emerge - gamma * (c_usage + r_spur))
    return out


def test_the_whole_is_a_naive_twin() -> None:
    kit = {"rotate_90": RIGHT, "rotate_270": LEFT, "flip_horizontal": MIRROR, "read_text": OTHER}
    crops = [(EXACT, 1.0), (HALF, 0.5), (FAR, 0.0)]
    draw = random.Random(3)
    for _ in range(60):
        abouts = [draw.choice([TURNED, DETAIL, BOTH, PLAIN]) for _ in range(2)]
        tales, names, ious = [], [], []
        for _ in range(8):
            task, calls, own, best = draw.randrange(2), [], [], 0.0
            for _ in range(draw.choice([0, 0, 1, 2, 3, 4])):
                if draw.random() < 0.4:
                    call, overlap = draw.choice(crops)
                    best, name = max(best, overlap), "crop"
                else:
                    name, call = draw.choice(list(kit.items()))
                calls.append([call])
                own.append(name)
            tales.append(
                tale(*calls, task=task, about=abouts[task], answer=draw.choice(["yes", "no"]), thought="<think>a</think>")
            )
            names.append(own)
            ious.append(best)
        assert scores(*tales) == pytest.approx(naive(tales, names, ious))


def test_terms_are_their_means() -> None:
    reward = CodeVision(CodeVision.Config())
    reward([tale([RIGHT], about=TURNED), tale(about=TURNED, answer="no")])
    assert reward.terms == pytest.approx(
        {
            "accuracy": 0.5,
            "form": 1.0,
            "mandatory": 0.5,
            "necessary": 0.5,
            "exact": 0.05,
            "emerging": 0.0,
            "usage": 0.0,
            "spurious": 0.0,
        }
    )


@pytest.mark.parametrize("details", [{"box": (0, 0, 100, 80)}, {"box": BOX}, {}])
def test_no_crop_is_expected_that_the_operations_do_not_name(details: Any) -> None:
    about = question(operations=("rotate_90",), **details)
    assert scores(tale([RIGHT], about=about), **{**ALONE, "mandatory": 1.0, "exact": 0.1}) == pytest.approx([2.1])
    assert scores(tale(about=question(box=(0, 0, 100, 80))), **{**ALONE, "mandatory": 1.0}) == [1.0]  # nor for a whole picture


def test_an_answer_that_cannot_be_judged_is_no_number_and_no_mate(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = CodeVision(CodeVision.Config(**{**ALONE, "necessary": 1.0}))
    marks = [1.0, math.nan, 0.0]
    monkeypatch.setattr(reward._answers, "marks", lambda transcripts: marks)
    got = reward([tale([RIGHT], about=TURNED), tale(about=TURNED), tale(about=TURNED)])
    assert got[0] == pytest.approx(2.0) and math.isnan(got[1]) and got[2] == 0
