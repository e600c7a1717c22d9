"""Details and orientation: the expert's calls bring up what the question says, near and far, and the splits share nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmrl.answers import iou
from mmrl.component import Component, Problems
from mmrl.messages import Message, Picture, ToolCall, ToolResult
from mmrl.transcripts import CallRecord, Turn
from simulators.prompts import blind_mark
from simulators.prompts_parts.drawing import turning_letters
from simulators.prompts_parts.looking import PLACES, mark_top
from simulators.prompts_parts.turning import TURNINGS, box_before, undo
from tests.simulators.asking import build, image_tools, picture, played, text

DETAILS: dict[str, dict[str, Any]] = {
    "easy": {},
    "corners": {"grid": 2, "size": 224, "kinds": ["digit", "letter", "colour"], "fading": False},
    "words in boxes": {"kinds": ["word", "number"], "where": "box", "background": "texture", "enlarge": 2},
    "turned": {"turned": list(TURNINGS), "where": "cell", "signs": [2, 9]},
    "beside a spot": {"where": "spot", "kinds": ["digit", "word"], "signs": [3, 5]},
}


@pytest.mark.parametrize("fields", DETAILS.values(), ids=DETAILS)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_expert_crops_what_the_question_is_about(fields: dict[str, Any], split: str) -> None:
    questions, tools = build("DetailQuestions", split=split, **fields), image_tools()
    for task_id in range(40):
        question = questions.question(task_id)
        answer, calls = played(questions, question, tools)
        assert question.check(answer) == 1 and answer == question.references[0]
        assert [call.error for call in calls] == [None] * len(calls)
        assert len(calls) == len(question.details["operations"])
        (shown,) = calls[-1].result.pictures
        assert shown.source == 0
        left, top, right, bottom = shown.box_in_source()
        box = question.details["box"]
        assert left <= box[0] + 1e-6 and top <= box[1] + 1e-6 and right >= box[2] - 1e-6 and bottom >= box[3] - 1e-6
        assert iou((left, top, right, bottom), box) > (0.15 if fields.get("where") == "box" else 0.01)
        assert shown.image.width * shown.image.height >= (right - left) * (bottom - top) * fields.get("enlarge", 1) ** 2 * 0.98


@pytest.mark.parametrize("fields", DETAILS.values(), ids=DETAILS)
def test_the_sign_lies_in_its_box_and_nowhere_else(fields: dict[str, Any]) -> None:
    """Of two questions that differ in nothing but what the sign shows, the pictures differ within the box alone."""
    plain = {**fields, "background": "plain", "signs": [1, 1]}
    questions = build("DetailQuestions", **plain)
    for task_id in range(20):
        question = questions.question(task_id)
        pixels = np.asarray(picture(question).image, int)
        left, top, right, bottom = question.details["box"]
        paper = np.median(pixels.reshape(-1, 3), axis=0)
        other = np.abs(pixels - paper).max(2) > 0
        if fields.get("where") == "spot" or fields.get("turned"):
            assert other[top:bottom, left:right].mean() > 0.9
            continue
        rows, columns = np.nonzero(other)
        assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (left, top, right, bottom)


def test_words_name_the_field() -> None:
    questions = build("DetailQuestions")
    for task_id in range(60):
        question = questions.question(task_id)
        left, top, right, bottom = question.details["box"]
        row, column = (top + bottom) * 3 // (2 * 504), (left + right) * 3 // (2 * 504)
        assert text(question) == f"What digit is on the sign at the {PLACES[3][3 * row + column]}?"


def seen(question: Any, side: int, area: tuple[int, ...] | None) -> np.ndarray:
    """What is to be seen of the sign by who knows where it is, in a picture (or its ``area``) that is shown ``side`` wide."""
    image, box = picture(question).image, question.details["box"]
    if area is not None:
        image, box = image.crop(area), tuple(value - area[place % 2] for place, value in enumerate(box))
    small = image.resize((side, side), Image.Resampling.BICUBIC)
    window = small.resize((10, 10), Image.Resampling.BICUBIC, box=tuple(value * side / image.width for value in box))
    return np.asarray(window, float).mean(2).ravel()


def linear_accuracy(values: list[np.ndarray], answers: list[str], train: int) -> float:
    """Of ridge regression onto the answers."""
    features = np.stack(values)
    features = np.hstack([(features - features[:train].mean(0)) / 50, np.ones((len(features), 1))])
    names = sorted(set(answers))
    targets = np.array([[answer == name for name in names] for answer in answers], float)
    gram = features[:train].T @ features[:train] + 5 * np.eye(features.shape[1])
    weights = np.linalg.solve(gram, features[:train].T @ targets[:train])
    return float(
        np.mean([names[best] == answer for best, answer in zip((features @ weights).argmax(1), answers, strict=True)][train:])
    )


def test_the_easy_sign_is_legible_in_the_crop_and_hardly_in_the_whole() -> None:
    """Even knowing where it is, a classifier of the same pixels reads what the model is shown of the crop, not of the whole."""
    questions = build("DetailQuestions", signs=[1, 1])
    asked = [questions.question(task_id) for task_id in range(900)]
    answers = [question.references[0] for question in asked]
    near = linear_accuracy([seen(question, 56, question.details["area"]) for question in asked], answers, 700)
    far = linear_accuracy([seen(question, 56, None) for question in asked], answers, 700)
    assert near > 0.9 and far < 0.3, (near, far)


def test_details_held_out_are_never_trained_on() -> None:
    def asked(split: str, **fields: Any) -> set[tuple[Any, str]]:
        questions = build("DetailQuestions", split=split, **fields)
        alone = "word" in fields.get("kinds", ())
        made = (questions.question(task_id) for task_id in range(600))
        return {(None if alone else question.details["place"], question.references[0]) for question in made}

    train, held_out = asked("train"), asked("held_out")
    assert len(train) == 72 and len(held_out) == 18 and not train & held_out  # 9 places and 10 digits
    assert {digit for _, digit in held_out} == {digit for _, digit in train} == set("0123456789")
    words, other_words = asked("train", kinds=["word", "number"]), asked("held_out", kinds=["word", "number"])
    assert words and other_words and not words & other_words


def test_photographs_held_out_are_others(installed: Callable[[str], None]) -> None:
    installed("skimage")
    names = [
        set(build("DetailQuestions", background="photograph", split=split)._paint.__self__.names)
        for split in ("train", "held_out")
    ]
    assert all(names) and not names[0] & names[1]
    for kind in ("DetailQuestions", "OrientationQuestions"):
        fields = {"kinds": ["photograph", "letter"]} if kind == "OrientationQuestions" else {}
        questions = build(kind, background="photograph", **fields)
        assert np.asarray(picture(questions.question(3)).image, float).std() > 5


# ---------------------------------------------------------------- orientation

ORIENTATIONS: dict[str, dict[str, Any]] = {
    "easy": {},
    "half turns": {"operations": ["rotate_180"], "letters": "bq"},
    "everything": {
        "kinds": ["letter", "word"],
        "operations": list(TURNINGS),
        "letters": "bdpqun",
        "background": "texture",
        "size": 168,
    },
}


def upright(image: Image.Image) -> bool:
    """Whether the bar is at the top and its red end at the left."""
    blank = Image.new("RGB", image.size, (255, 255, 255))
    mark_top(blank)
    high = max(4, image.height // 12)
    return np.array_equal(np.asarray(image)[:high], np.asarray(blank)[:high])


@pytest.mark.parametrize("fields", ORIENTATIONS.values(), ids=ORIENTATIONS)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_expert_s_calls_make_it_upright(fields: dict[str, Any], split: str) -> None:
    questions, tools = build("OrientationQuestions", split=split, **fields), image_tools()
    counts = {True: 0, False: 0}
    for task_id in range(80):
        question = questions.question(task_id)
        answer, calls = played(questions, question, tools)
        assert question.check(answer) == 1
        image = calls[-1].result.pictures[0].image if calls else picture(question).image
        assert upright(image)
        assert upright(picture(question).image) == (not question.details["operations"])
        counts[bool(calls)] += 1
    assert counts[False] >= 5 and counts[True] >= 50


def test_a_photograph_is_turned_as_the_answer_says(installed: Callable[[str], None]) -> None:
    installed("skimage")
    questions, tools = build("OrientationQuestions", kinds=["photograph"], operations=list(TURNINGS)), image_tools()
    plain = build("OrientationQuestions", kinds=["photograph"], operations=list(TURNINGS), upright=1.0)
    assert plain.question(0).references == ("nothing",)
    answers = set()
    for task_id in range(40):
        question = questions.question(task_id)
        answer, calls = played(questions, question, tools)
        answers.add(answer)
        assert question.check(answer) == 1 == question.check(f"The answer is {answer}.")
        assert answer == (calls[0].name + f" {calls[0].arguments['degrees']}" if calls else "nothing")
    assert answers == {"nothing", "rotate 90", "rotate 180", "rotate 270"}


def test_each_letter_is_another_one_turned() -> None:
    letters = {name: np.asarray(image) for name, image in turning_letters(40).items()}
    for one, other, turn in [
        ("b", "q", lambda a: np.rot90(a, 2)),
        ("d", "p", lambda a: np.rot90(a, 2)),
        ("b", "d", np.fliplr),
        ("b", "p", np.flipud),
        ("u", "n", lambda a: np.rot90(a, 2)),
        ("u", "u", np.fliplr),
    ]:
        assert np.array_equal(turn(letters[one]), letters[other])
    assert len({array.tobytes() for array in letters.values()}) == 6


@pytest.mark.parametrize("name", TURNINGS)
def test_boxes_follow_the_picture(name: str) -> None:
    image, box = Image.new("L", (30, 20)), (3, 5, 11, 9)
    image.paste(255, box)
    left, top, right, bottom = box_before(name, box, image.size)
    pixels = np.asarray(undo(name, image))
    assert pixels[top:bottom, left:right].min() == 255 and pixels.sum() == np.asarray(image, int).sum()
    assert np.array_equal(np.asarray(undo(name, image).transpose(TURNINGS[name].transpose)), np.asarray(image))


def test_orientations_held_out_are_never_trained_on() -> None:
    for fields in ({}, {"operations": ["rotate_180"], "letters": "bq"}, {"letters": "bdpqun", "operations": list(TURNINGS)}):
        asked: list[set[Any]] = []
        for split in ("train", "held_out"):
            questions = build("OrientationQuestions", split=split, **fields)
            made = [questions.question(task_id) for task_id in range(1000)]
            asked.append({(question.references[0], question.details["operations"], question.details["ink"]) for question in made})
        train, held_out = asked
        assert train and held_out and not train & held_out
        # neither a letter nor what makes it upright says anything of the other, in either split
        pairs = {(letter, turn) for letter in fields.get("letters", "bdpq") for turn in {turn for _, turn, _ in train}}
        assert {each[:2] for each in train} == {each[:2] for each in held_out} == pairs
        assert all(len({ink for *pair, ink in held_out if tuple(pair) == each}) == 1 for each in pairs)


# ---------------------------------------------------------------- both


def test_a_failed_call_is_said_again() -> None:
    questions = build("DetailQuestions", turned=["rotate_90"])
    question = questions.question(0)
    text, calls = questions.next_turn(question, ())
    failed = Turn(Message("assistant", (text,), calls), (CallRecord("rotate", {}, ToolResult("late", error=True), "timeout"),))
    assert questions.next_turn(question, (failed,)) == (text, calls)
    done = CallRecord("rotate", {}, ToolResult(pictures=(Picture(Image.new("RGB", (4, 4))),)))
    _, (call,) = questions.next_turn(question, (failed, Turn(failed.message, (done,))))
    assert call == ToolCall("crop", {"image": 2, "box": list(question.details["area"])})


@pytest.mark.parametrize(("name", "chance"), [("DetailQuestions", 0.1), ("OrientationQuestions", 0.25)])
def test_blind_guesses_are_near_chance(name: str, chance: float) -> None:
    for split in ("train", "held_out"):
        mark = blind_mark(build(name, split=split), 800)
        # held-out digits are two in each place, which a text names
        allowed = 0.5 if (name, split) == ("DetailQuestions", "held_out") else chance
        assert mark < allowed + 3.5 * (allowed * (1 - allowed) / 800) ** 0.5 + 0.03


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("DetailQuestions", {"kinds": []}, "kinds must be distinct, at least one"),
        ("DetailQuestions", {"signs": [0, 2]}, r"signs must be \[fewest, most\] between 1 and 9; got \[0, 2\]"),
        ("DetailQuestions", {"signs": [1, 9], "where": "spot"}, "signs must be .* between 1 and 8"),
        ("DetailQuestions", {"size": 112, "kinds": ["word"]}, "sign must be .* between 10 and 15"),
        ("OrientationQuestions", {"letters": "bx"}, "letters must be at least two of bdpqun; got 'bx'"),
        ("OrientationQuestions", {"kinds": ["photograph"], "operations": ["flip_vertical"]}, "need a rotation"),
    ],
)
def test_settings_that_cannot_be_are_refused(name: str, fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Problems, match=sentence):
        Component.parse({"target": f"simulators.prompts:{name}", **fields})
