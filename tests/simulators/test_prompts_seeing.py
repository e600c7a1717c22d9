"""Classes and counts, and what all generated questions promise: the same everywhere, checks that tell right from wrong."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mmrl.component import Component, Problems
from mmrl.transcripts import ExpertQuestions, Questions
from simulators.prompts import blind_mark, texts
from simulators.prompts_parts.drawing import COLOURS, SHAPES
from simulators.prompts_parts.seeing import DIGITS, things
from tests.simulators.asking import build, image_tools, picture, text

GENERATED: dict[str, dict[str, Any]] = {
    "DetailQuestions": {"where": "spot", "background": "texture", "turned": ["rotate_90", "flip_vertical"]},
    "OrientationQuestions": {"kinds": ["letter", "word"]},
    "ClassificationQuestions": {},
    "CountingQuestions": {},
}


def summary(name: str, fields: dict[str, Any], ids: tuple[int, ...]) -> list[Any]:
    questions = [build(name, **fields).question(task_id) for task_id in ids]
    return [(question.family, text(question), question.references, picture(question).key) for question in questions]


def _work(queue: Any) -> None:
    queue.put({name: summary(name, fields, (-1, 0, 10**12)) for name, fields in GENERATED.items()})


def test_an_id_gives_the_same_question_in_another_process_and_another_one_in_another_split() -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_work, args=(queue,))
    process.start()
    theirs = queue.get(timeout=120)
    process.join()
    for name, fields in GENERATED.items():
        ours = summary(name, fields, (-1, 0, 10**12))
        assert theirs[name] == ours and len({key for *_, key in ours}) == 3
        assert summary(name, {**fields, "seed": 1}, (-1, 0, 10**12)) != ours
        assert summary(name, {**fields, "split": "held_out"}, (-1, 0, 10**12)) != ours


@pytest.mark.parametrize(("name", "fields"), GENERATED.items())
def test_checks_accept_the_references_and_refuse_the_others(name: str, fields: dict[str, Any]) -> None:
    questions = build(name, **fields)
    assert isinstance(questions, Questions) and isinstance(questions, ExpertQuestions)
    asked = [questions.question(task_id) for task_id in range(60)]
    for question in asked:
        assert question.check(question.references[0]) == 1 == question.check(f" {question.references[0].upper()}.")
        assert question.check("") == 0 == question.check("I do not know.")
        for other in {other.references[0] for other in asked if other.family == question.family} - set(question.references):
            assert question.check(other) == 0
    assert set(texts(questions, 3, image_tools())) >= {text(asked[0]), asked[0].references[0]}


# ---------------------------------------------------------------- classification


def test_training_has_so_many_pictures_of_each_class_and_held_out_others(installed: Callable[[str], None]) -> None:
    installed("sklearn")
    for data, classes in (("shapes", SHAPES), ("digits", DIGITS)):
        train, held_out = (build("ClassificationQuestions", data=data, shots=3, split=split) for split in ("train", "held_out"))
        few, many = ({name: {image.tobytes() for image in q.examples[name]} for name in q.examples} for q in (train, held_out))
        assert set(few) == set(many) == set(classes)
        assert all(len(images) == 3 for images in few.values()) and all(len(images) >= 40 for images in many.values())
        assert not set().union(*few.values()) & set().union(*many.values())
        for questions, known in ((train, few), (held_out, many)):
            for task_id in range(30):
                question = questions.question(task_id)
                assert picture(question).image.tobytes() in known[question.references[0]]
        again = build("ClassificationQuestions", data=data, shots=3, seed=1)
        assert any(again.examples[name] != train.examples[name] for name in classes)


def test_digits_are_what_they_are_called(installed: Callable[[str], None]) -> None:
    """The nearest of the training pictures names nearly all that are held out."""
    installed("sklearn")
    train, held_out = (
        build("ClassificationQuestions", data="digits", shots=40, size=8, split=split) for split in ("train", "held_out")
    )
    known = [(np.asarray(image, float), name) for name, images in train.examples.items() for image in images]
    right = []
    for task_id in range(100):
        question = held_out.question(task_id)
        seen = np.asarray(picture(question).image, float)
        right.append(min(known, key=lambda pair: ((pair[0] - seen) ** 2).sum())[1] == question.references[0])
    assert np.mean(right) > 0.85


def test_options_and_thinking_stand_in_the_question() -> None:
    for thinking, ending in ((True, "First think in <think> </think>, then answer."), (False, "Answer at once.")):
        questions = build("ClassificationQuestions", thinking=thinking, options=3)
        places = Counter[int]()
        for task_id in range(200):
            question = questions.question(task_id)
            options = text(question).removeprefix("What is this: ").partition("?")[0].split(", ")
            assert len(set(options)) == 3 and set(options) <= set(SHAPES) and text(question).endswith(ending)
            places[options.index(question.references[0])] += 1
            assert [question.check(option) for option in options].count(1.0) == 1
            assert question.check("ABC"[options.index(question.references[0])]) == 1
        assert min(places.values()) > 40
    only = build("ClassificationQuestions", classes=["ring", "cross"], options=2)
    assert {only.question(task_id).references[0] for task_id in range(30)} == {"ring", "cross"}


# ---------------------------------------------------------------- counting


def test_counts_are_those_of_the_picture() -> None:
    """Of a colour that one shape alone has, as many pixels as so many of that shape cover, by its area."""
    questions = build("CountingQuestions", others=[0, 0], size=224)
    for task_id in range(60):
        question = questions.question(task_id)
        pixels = np.asarray(picture(question).image).reshape(-1, 3)
        for thing, count in question.details["counts"].items():
            colour, shape = thing.split()
            same = [each for each in question.details["counts"] if each.split()[0] == colour]
            covered = int((pixels == COLOURS[colour]).all(1).sum())
            if len(same) == 1:
                least = {"circle": 0.75, "square": 0.95, "triangle": 0.45, "cross": 0.5, "ring": 0.3}[shape] * (0.55 * 56) ** 2
                most = {"circle": 0.83, "square": 1.1, "triangle": 0.6, "cross": 0.65, "ring": 0.85}[shape] * (0.8 * 56 + 2) ** 2
                assert count * least <= covered <= count * most, (thing, count)
        counts = question.details["counts"]
        if question.family == "counting_count":
            assert question.references == (str(next(iter(counts.values()))),) and "How many" in text(question)
        else:
            colour, shape = max(counts, key=counts.__getitem__).split()
            assert len(set(counts.values())) == 2
            assert question.references[0] == f"{colour} {shape}{'es' if shape == 'cross' else 's'}"


def test_things_held_out_are_never_trained_on() -> None:
    train, held_out = things("train"), things("held_out")
    assert len(train) == 30 and len(held_out) == 10 and not set(train) & set(held_out)
    for part in (0, 1):
        assert {thing[part] for thing in train} == set((COLOURS, SHAPES)[part])
    for split, known in (("train", train), ("held_out", held_out)):
        questions = build("CountingQuestions", split=split)
        asked = {tuple(thing.split()) for task_id in range(400) for thing in questions.question(task_id).details["counts"]}
        assert asked == set(known)


def test_blind_guesses_are_near_chance() -> None:
    assert blind_mark(build("CountingQuestions", families=["count"]), 800) < 0.36  # of one to four
    assert blind_mark(build("CountingQuestions", families=["compare"]), 800) < 0.6
    assert blind_mark(build("ClassificationQuestions"), 800) < 0.36  # of four options


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("ClassificationQuestions", {"options": 6}, "options must be at most the 5 classes, got 6"),
        ("ClassificationQuestions", {"classes": ["ring", "zero"]}, "classes must be names out of circle, square"),
        ("CountingQuestions", {"most": 6, "others": [0, 5]}, r"others must be \[fewest, most\] between 0 and 4; got \[0, 5\]"),
        ("CountingQuestions", {"families": ["count", "count"]}, "families must be distinct"),
    ],
)
def test_settings_that_cannot_be_are_refused(name: str, fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Problems, match=sentence):
        Component.parse({"target": f"simulators.prompts:{name}", **fields})
