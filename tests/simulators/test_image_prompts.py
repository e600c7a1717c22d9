"""Prompts for image generators: what is asked, what is held out, and whether what is drawn is what was asked for."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from mmrl.component import Component, Problems
from mmrl.errors import ConfigError, DataError
from mmrl.messages import Picture
from mmrl.rewards.geneval_rules import Detected, judge, problem
from mmrl.rewards.shape_reading import INSIDE, PALETTE
from mmrl.transcripts import DrawingQuestions, Question, Questions
from simulators.image_prompts import WordPrompts
from simulators.image_prompts_parts.scenes import COLOURS, OPPOSITE, SHAPES, TAGS, Tag, Thing, arrange, paint, said
from simulators.prompts_parts.common import Split

ALL = {"shapes": list(SHAPES), "colours": list(COLOURS)}


def build(name: str, **fields: Any) -> Any:
    return Component.parse({"target": f"simulators.image_prompts:{name}", **fields}).build()


def asked(prompts: Any, number: int = 400) -> list[Question]:
    return [prompts.question(task) for task in range(number)]


def pixels(picture: Picture) -> np.ndarray:
    return np.asarray(picture.image, int)


# ---------------------------------------------------------------- scenes of shapes


def test_prompts_are_geneval_s() -> None:
    assert get_args(Tag) == TAGS
    questions = asked(build("ShapePrompts", **ALL), 300)
    assert {question.family for question in questions} == set(TAGS)
    for question in questions:
        details = question.details
        assert problem(details) is None and question.parts == (details["prompt"],) and question.references == ()
        assert details["tag"] == question.family
        assert details["prompt"] == f"a picture of {said(details['include'])}"
        assert details["exclude"] == [{"class": c["class"], "count": c["count"] + 1} for c in details["include"]]
    assert isinstance(build("ShapePrompts"), Questions) and isinstance(build("ShapePrompts"), DrawingQuestions)


@pytest.mark.parametrize(
    ("include", "words"),
    [
        ([{"class": "star", "count": 1}], "a star"),
        ([{"class": "cross", "count": 3}], "three crosses"),
        ([{"class": "circle", "count": 1, "color": "orange"}], "an orange circle"),
        ([{"class": "ring", "count": 1}, {"class": "star", "count": 1}], "a ring and a star"),
        ([{"class": "ring", "count": 1}, {"class": "star", "count": 1, "position": ["above", 0]}], "a star above a ring"),
    ],
)
def test_what_a_prompt_says(include: Any, words: str) -> None:
    assert said(include) == words


def combinations(question: Question) -> list[tuple[Any, ...]]:
    """What the question combines, of which each must be of its split alone; scenes, whichever of their shapes is named first."""
    tag, include = question.family, question.details["include"]
    names = [clause["class"] for clause in include]
    if tag == "two_object":
        return [(tag, *sorted(names))]
    if tag == "counting":
        return [(tag, names[0], include[0]["count"])]
    if tag == "position":
        where = include[1]["position"][0]
        first, second = names[1], names[0]
        if where not in OPPOSITE:
            where, first, second = next(key for key, value in OPPOSITE.items() if value == where), second, first
        return [(tag, first, where, second)]
    return [("colour", clause["color"], clause["class"]) for clause in include if "color" in clause]


@pytest.mark.parametrize("fields", [{}, ALL, {"shapes": ["circle", "star"], "colours": ["red", "blue", "black"]}])
def test_what_is_held_out_training_never_asks_and_each_part_of_it_is_trained(fields: Any) -> None:
    train, held = (
        {each for question in asked(build("ShapePrompts", split=split, **fields), 1500) for each in combinations(question)}
        for split in ("train", "held_out")
    )
    assert held and train and not train & held
    assert {part for each in held for part in each[1:]} <= {part for each in train for part in each[1:]}
    for tag in {each[0] for each in held}:
        of_tag = [sum(each[0] == tag for each in split) for split in (train, held)]
        assert of_tag[1] <= 0.34 * sum(of_tag), (tag, of_tag)


def test_nothing_is_held_out_that_would_then_not_be_trained_at_all() -> None:
    held = asked(build("ShapePrompts", split="held_out", most=2), 200)
    assert "counting" not in {question.family for question in held}, "each shape is counted in one way alone"
    counted = asked(build("ShapePrompts", tags=["counting"], most=2), 100)
    assert {question.details["include"][0]["class"] for question in counted} == {"circle", "square", "triangle", "star"}


def test_the_held_out_split_has_five_tags_and_another_seed_holds_out_the_same() -> None:
    held = asked(build("ShapePrompts", split="held_out"), 600)
    assert {question.family for question in held} == set(TAGS) - {"single_object"}
    assert min(Counter(question.family for question in held).values()) > 600 / 5 / 2
    other = asked(build("ShapePrompts", split="held_out", seed=7), 600)
    assert [q.details for q in held] != [q.details for q in other]
    assert {c for q in held for c in combinations(q)} == {c for q in other for c in combinations(q)}


def test_a_shape_of_any_colour_has_one_that_is_trained() -> None:
    train = build("ShapePrompts", tags=["colors"])
    known = {combinations(question)[0][1:] for question in asked(train, 600)}
    for split in get_args(Split):
        prompts = build("ShapePrompts", tags=["two_object", "counting"], split=split)
        for question in asked(prompts, 60):
            things = arrange(question.details["include"], 32, prompts._colours, random.Random(0))
            assert {(thing.colour, thing.shape) for thing in things} <= known


@pytest.mark.parametrize(("size", "most"), [(32, 4), (64, 6)])
def test_every_scene_is_what_its_prompt_says(size: int, most: int) -> None:
    prompts = build("ShapePrompts", size=size, most=most, **ALL)
    for task, question in enumerate(asked(prompts, 300)):
        things = arrange(question.details["include"], size, prompts._colours, random.Random(task))
        truth = [Detected(thing.shape, thing.box, thing.colour) for thing in things]
        verdict = judge(question.details, truth)
        assert verdict.correct and verdict.exact, (question.details["prompt"], verdict.reasons)
        for i, one in enumerate(things):
            left, top, right, bottom = one.box
            assert 0.02 * size < left < right < 0.98 * size and 0.02 * size < top < bottom < 0.98 * size
            assert right - left == pytest.approx(bottom - top) and right - left >= 9
            for other in things[:i]:
                gap = max(left - other.box[2], other.box[0] - right, top - other.box[3], other.box[1] - bottom)
                assert gap >= 0.08 * size


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_fills_its_box_as_the_exact_one_does(shape: str) -> None:
    drawn = np.asarray(paint([Thing(shape, "black", (8.0, 8.0, 40.0, 40.0))], 48, (255, 255, 255)), float).mean(2)
    covered = (255 - drawn) / (255 - 25)
    points = (np.arange(48 * 8) + 0.5) / 8
    u, v = np.meshgrid((points - 8) / 32, (points - 8) / 32)
    inside = INSIDE[shape](u, v) & (abs(u - 0.5) <= 0.5) & (abs(v - 0.5) <= 0.5)
    exact = inside.reshape(48, 8, 48, 8).mean((1, 3))
    assert abs(covered - exact).mean() < 0.012 and abs(covered.sum() / exact.sum() - 1) < 0.03
    assert len(np.unique(drawn)) > 2 or shape in ("square", "cross"), "its edges are smoothed"


def test_the_colours_are_those_that_the_reward_knows() -> None:
    assert dict(PALETTE) == COLOURS and tuple(INSIDE) == SHAPES
    for name, colour in COLOURS.items():
        image = paint([Thing("square", name, (4.0, 4.0, 28.0, 28.0))], 32, (250, 240, 230))
        assert image.getpixel((16, 16)) == colour and image.getpixel((1, 1)) == (250, 240, 230)


def test_a_prompt_and_a_generator_make_the_picture() -> None:
    prompts, other = build("ShapePrompts", background="pale"), build("ShapePrompts")
    question = prompts.question(11)
    first, again, third = (prompts.draw(question, random.Random(seed)) for seed in (1, 1, 2))
    assert first.key == again.key and first.key != third.key and first.image.size == (32, 32) and first.image.mode == "RGB"
    assert first.image.getpixel((0, 0)) != (255, 255, 255) == other.draw(question, random.Random(1)).image.getpixel((0, 0))


@pytest.mark.parametrize("name", ["ShapePrompts", "WordPrompts"])
def test_another_process_asks_and_draws_the_same(name: str) -> None:
    code = (
        "import random, sys; from mmrl.component import Component\n"
        f"p = Component.parse({{'target': 'simulators.image_prompts:{name}', 'seed': 5}}).build()\n"
        "print([(p.question(t).details['prompt'], p.draw(p.question(t), random.Random(t)).key) for t in (0, 3, 2**41)])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "9"})
    here = build(name, seed=5)
    tasks = (0, 3, 2**41)
    assert told.stdout.strip() == str(
        [(here.question(t).details["prompt"], here.draw(here.question(t), random.Random(t)).key) for t in tasks]
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"shapes": ["circle", "hexagon"]}, "shapes must be distinct names out of circle, square"),
        ({"colours": ["red", "red"]}, "colours must be distinct names out of red, green"),
        ({"shapes": ["circle"]}, "shapes and colours must be two at least"),
        ({"size": 24}, "most 4 makes shapes 7.2 pixels wide, too small; raise size or lower most"),
        ({"tags": ["single_object"], "split": "held_out"}, "have nothing in split 'held_out'; add tags, shapes or colours"),
    ],
)
def test_scenes_that_cannot_be(fields: Any, words: str) -> None:
    with pytest.raises(Problems, match=words):
        build("ShapePrompts", **fields)


# ---------------------------------------------------------------- words


def test_words_are_of_one_split() -> None:
    train, held = (WordPrompts(WordPrompts.Config(split=split)) for split in get_args(Split))
    assert not set(train.words) & set(held.words) and len(held.words) >= 30 and len(train.words) >= 150
    assert {letter for word in held.words for letter in word} <= {letter for word in train.words for letter in word}
    assert all(3 <= len(word) <= 4 and word.isupper() for word in (*train.words, *held.words))
    question = train.question(2)
    (word,) = question.details["words"]
    assert question.parts == (f'a sign that says "{word}"',) and word in train.words and question.family == "words"


@pytest.mark.parametrize("background", ["white", "pale"])
def test_a_sign_shows_all_of_its_word_and_nothing_else(background: Any) -> None:
    prompts = build("WordPrompts", background=background, words=["MMW", "IT", "OIL"])
    for task in range(30):
        question = prompts.question(task)
        page = pixels(prompts.draw(question, random.Random(task)))
        assert page.shape == (32, 64, 3)
        ink = abs(page - page[0, 0]).sum(2) > 60
        assert not ink[0].any() and not ink[-1].any() and not ink[:, 0].any() and not ink[:, -1].any(), "cut off"
        rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        assert rows[-1] - rows[0] >= 8 and columns[-1] - columns[0] >= 12
        letters = np.flatnonzero(np.diff(ink.any(0).astype(int)) == 1)
        assert 1 <= len(letters) <= len(question.details["words"][0])
    with pytest.raises(Problems, match="width 20 is too little for 3 letters; make it 27 or more"):
        build("WordPrompts", words=["ABC"], width=20)


# ---------------------------------------------------------------- files

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
    {
        "tag": "position",
        "include": [{"class": "teddy bear", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
        "prompt": "a photo of a dog right of a teddy bear",
    },
]


def written(folder: Path, *lines: Any) -> str:
    path = folder / "prompts.txt"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


def test_geneval_s_file(tmp_path: Path) -> None:
    prompts = build("GenEvalPrompts", path=written(tmp_path, *GENEVAL, ""))
    assert len(prompts) == 3 and isinstance(prompts, Questions) and not isinstance(prompts, DrawingQuestions)
    for task, line in enumerate(GENEVAL):
        question = prompts.question(task + 3)
        assert question.details == line and question.family == line["tag"] and question.parts == (line["prompt"],)


def test_ocr_prompts(tmp_path: Path) -> None:
    lines = ['A sign that says "ONE WAY".', '"Hi" above “Bye”, in neon', 'Un café "Über"']
    prompts = build("OcrPrompts", path=written(tmp_path, *lines))
    assert [prompts.question(task).details["words"] for task in range(3)] == [("ONE WAY",), ("Hi", "Bye"), ("Über",)]
    assert [prompts.question(task).parts for task in range(3)] == [(line,) for line in lines]


def test_prompts_with_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (8, 6), (9, 99, 199)).save(tmp_path / "car.png")
    lines = [
        {"prompt": "make the car red", "image": "car.png", "words": ["A"], "details": {"requirement": "red"}},
        {"prompt": "join them", "image": ["car.png", "car.png"], "tag": "join"},
        {"prompt": "a dog", "include": [{"class": "dog", "count": 1}]},
    ]
    prompts = build("PicturePrompts", path=written(tmp_path, *lines))
    first, second, third = asked(prompts, 3)
    assert first.parts[0] == "make the car red" and first.details == {
        "prompt": "make the car red",
        "words": ("A",),
        "requirement": "red",
    }
    (shown,) = (part for part in first.parts if isinstance(part, Picture))
    assert shown.image.getpixel((3, 3)) == (9, 99, 199) and first.family == "editing"
    assert (len(second.parts), second.family, third.parts, third.family) == (3, "join", ("a dog",), "prompts")
    assert third.details["include"] == [{"class": "dog", "count": 1}]


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("GenEvalPrompts", {"tag": "counting", "include": []}, "lacks the key 'prompt'"),
        ("GenEvalPrompts", {"prompt": "a", "tag": "b"}, "lacks the key 'include'"),
        ("GenEvalPrompts", {**GENEVAL[0], "include": [{"count": 1}]}, "'include.0' must be an object with a 'class'"),
        ("GenEvalPrompts", {**GENEVAL[0], "include": [{"class": "a", "count": 0}]}, "'include.0.count' must be a number"),
        ("GenEvalPrompts", {**GENEVAL[0], "exclude": [{"class": "a"}]}, "'exclude.0.count' must be a number from 1 on, got null"),
        (
            "GenEvalPrompts",
            {**GENEVAL[0], "include": [{"class": "a", "count": 1, "position": ["above", 0]}]},
            "'include.0.position' must be like",
        ),
        ("GenEvalPrompts", "{", "is not JSON"),
        ("GenEvalPrompts", "[1]", "must be a JSON object"),
        ("OcrPrompts", "a sign without words", "has no text in double quotes"),
        ("PicturePrompts", {"promt": "a"}, "unknown key 'promt'; did you mean 'prompt'?"),
        ("PicturePrompts", {"prompt": " "}, "'prompt' must be a text that is not empty"),
        ("PicturePrompts", {"prompt": "a", "image": "none.png"}, "none.png, which is no file"),
        ("PicturePrompts", {"prompt": "a", "words": [1]}, "'words' must be texts that are not empty"),
        ("PicturePrompts", {"prompt": "a", "details": []}, "'details' must be an object"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, name: str, line: Any, words: str) -> None:
    good = {"GenEvalPrompts": GENEVAL[0], "OcrPrompts": '"A"', "PicturePrompts": {"prompt": "a"}}[name]
    path = written(tmp_path, good, "", line, good)
    with pytest.raises(DataError) as found:
        build(name, path=path)
    assert str(found.value).startswith(f"{path}, line 3: ") and words in str(found.value) and "\n" not in str(found.value)


def test_a_picture_that_cannot_be_read_is_named_when_it_is_shown(tmp_path: Path) -> None:
    (tmp_path / "car.png").write_bytes(b"no picture")
    prompts = build("PicturePrompts", path=written(tmp_path, {"prompt": "a", "image": "car.png"}))
    with pytest.raises(DataError, match=r"prompts.txt, line 1: the picture .*car.png cannot be read"):
        prompts.question(0)


def test_lines_are_split_by_what_they_say(tmp_path: Path) -> None:
    lines = [f'say "{i}"' for i in range(200)]
    fields = {"path": written(tmp_path, *lines), "held_out_share": 0.25}
    train, held = (build("OcrPrompts", split=split, **fields) for split in ("train", "held_out"))
    texts = [{each.question(task).parts[0] for task in range(len(each))} for each in (train, held)]
    assert not texts[0] & texts[1] and texts[0] | texts[1] == set(lines) and 30 <= len(held) <= 70
    moved = {**fields, "path": written(tmp_path, *reversed(lines))}
    again = build("OcrPrompts", split="held_out", **moved)
    assert {again.question(task).parts[0] for task in range(len(again))} == texts[1]
    with pytest.raises(DataError, match="none of its 200 lines is of split 'held_out'; change held_out_share or seed"):
        build("OcrPrompts", path=fields["path"], split="held_out")
    with pytest.raises(DataError, match=r"prompts.txt: has no prompts; set 'path'"):
        build("OcrPrompts", path=written(tmp_path, "", " "))
    with pytest.raises(ConfigError, match=r"nothing.txt: the prompts cannot be read"):
        build("OcrPrompts", path=str(tmp_path / "nothing.txt"))


def test_what_cannot_be_drawn_is_said() -> None:
    line = {"include": [{"class": "star", "count": 7}]}
    with pytest.raises(ValueError, match="a scene of 7 stars cannot be drawn"):
        build("ShapePrompts").draw(Question("x", ("",), (), lambda _: 0.0, line), random.Random(0))
