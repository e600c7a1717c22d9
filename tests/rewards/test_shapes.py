"""Scenes of shapes, read by two scorers: against what was drawn, sharp, noisy and blurred, and against what was not."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from mmrl.component import Component, Problems
from mmrl.messages import Message, Picture
from mmrl.rewards.geneval_rules import Detected, Rules, judge
from mmrl.rewards.shape_match import match
from mmrl.rewards.shape_reading import INSIDE, PALETTE, blurred, pieces, read, rendered
from mmrl.transcripts import Question, Transcript, Turn, unmarked
from simulators.image_prompts import ShapePrompts
from simulators.image_prompts_parts.scenes import TAGS, Thing, arrange, paint

Reader = Callable[..., list[Detected]]
ALL, WHITE, RULES = tuple(INSIDE), (255, 255, 255), Rules(threshold=0.0, counting_threshold=0.0)
SHARP, NOISY, BLURRED = (0.0, 0.0), (12.0, 0.0), (0.0, 0.7)


def damaged(image: Image.Image, noise: float, blur: float, seed: int) -> Image.Image:
    soft = np.asarray(image.filter(ImageFilter.GaussianBlur(blur)) if blur else image, float)
    grain = np.random.default_rng(seed).normal(0, noise, soft.shape) if noise else 0
    return Image.fromarray((soft + grain).clip(0, 255).astype(np.uint8))


def scenes(tag: str, number: int, size: int = 32, shapes: Sequence[str] = ALL) -> list[tuple[Question, list[Thing], Image.Image]]:
    """Prompts of a tag with pictures of them, on paper of a light colour."""
    config = ShapePrompts.Config(tags=(tag,), shapes=tuple(shapes), colours=tuple(PALETTE), size=size, background="pale")
    prompts, made = ShapePrompts(config), []
    for task in range(number):
        question = prompts.question(task)
        things = arrange(question.details["include"], size, prompts._colours, random.Random(task))
        made.append((question, things, prompts.draw(question, random.Random(task)).image))
    return made


def right(reader: Reader, question: Question, image: Image.Image) -> bool:
    return judge(question.details, reader(image, PALETTE, ALL), RULES).correct


def told(details: Any, image: Image.Image | None) -> Transcript:
    question = Question("x", (details.get("prompt", ""),), (), unmarked, details)
    parts = ("",) if image is None else (Picture(image),)
    return Transcript(0, question, (Message("user", question.parts),), (Turn(Message("assistant", parts)),), "", "answer")


def build(name: str, **fields: Any) -> Any:
    return Component.parse({"target": f"mmrl.rewards.{name}", **fields}).build()


def scene(*things: tuple[str, str, tuple[float, float, float, float]], size: int = 32) -> Image.Image:
    return paint([Thing(*thing) for thing in things], size, WHITE)


# ---------------------------------------------------------------- reading what was drawn


@pytest.mark.parametrize(("noise", "blur"), [SHARP, NOISY, BLURRED, (25.0, 0.0)])
@pytest.mark.parametrize("tag", TAGS)
def test_what_was_drawn_is_read(tag: str, noise: float, blur: float) -> None:
    made = scenes(tag, 60)
    wrong = [question.details["prompt"] for i, (question, _, image) in enumerate(made)
             if not right(read, question, damaged(image, noise, blur, i))]  # fmt: skip
    assert len(wrong) <= noise // 20, wrong


@pytest.mark.parametrize(("noise", "blur", "allowed"), [(*SHARP, 2), (*NOISY, 3), (*BLURRED, 5)])
def test_the_second_scorer_reads_it_as_well(noise: float, blur: float, allowed: int) -> None:
    made = [each for tag in TAGS for each in scenes(tag, 14, shapes=("circle", "square", "triangle", "star"))]
    wrong = [question.details["prompt"] for i, (question, _, image) in enumerate(made)
             if not right(match, question, damaged(image, noise, blur, i))]  # fmt: skip
    assert len(wrong) <= allowed, (len(made), wrong)


@pytest.mark.parametrize(("reader", "allowed"), [(read, 0), (match, 6)])
def test_a_scene_is_right_for_another_prompt_only_if_it_fulfils_that(reader: Reader, allowed: int) -> None:
    made = [each for tag in TAGS for each in scenes(tag, 12)]
    others = [question for question, _, _ in made]
    wrong, fulfilled = [], 0
    for _, things, image in made:
        truth = [Detected(thing.shape, thing.box, thing.colour) for thing in things]
        seen = reader(image, PALETTE, ALL)
        for question in others:
            verdicts = judge(question.details, truth, RULES).correct, judge(question.details, seen, RULES).correct
            fulfilled += verdicts[0]
            if verdicts[0] != verdicts[1]:
                wrong.append((question.details["prompt"], things))
    assert 0.02 * len(others) ** 2 < fulfilled < 0.5 * len(others) ** 2, "both happen"
    assert len(wrong) <= allowed, wrong[:3]


@pytest.mark.parametrize("reader", [read, match])
@pytest.mark.parametrize("size", [32, 64, 200])
def test_boxes_are_in_pixels_of_the_picture(reader: Reader, size: int) -> None:
    one, other = (0.1, 0.15, 0.45, 0.5), (0.55, 0.6, 0.9, 0.95)
    boxes = [tuple(edge * size for edge in box) for box in (one, other)]
    image = scene(("star", "red", boxes[0]), ("ring", "blue", boxes[1]), size=size)  # type: ignore[arg-type]
    seen = {thing.name: thing for thing in reader(image, PALETTE, ALL)}
    assert {name: thing.colour for name, thing in seen.items()} == {"star": "red", "ring": "blue"}
    for name, box in zip(("star", "ring"), boxes, strict=True):
        assert seen[name].box == pytest.approx(box, abs=max(1.3, 0.04 * size))


def test_things_of_two_colours_that_touch_are_two() -> None:
    image = scene(("square", "red", (4, 10, 16, 22)), ("square", "blue", (16, 10, 28, 22)))
    assert sorted((thing.name, thing.colour) for thing in read(image, PALETTE, ALL)) == [("square", "blue"), ("square", "red")]


@pytest.mark.parametrize("reader", [read, match])
def test_what_is_no_shape_is_no_thing(reader: Reader) -> None:
    grain = np.random.default_rng(0)
    flat = Image.new("RGB", (32, 32), (200, 210, 220))
    static = Image.fromarray(grain.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    bar = scene()
    ImageDraw.Draw(bar).rectangle((2, 14, 30, 18), fill=PALETTE["red"])
    bow = scene()
    ImageDraw.Draw(bow).polygon(((4, 4), (28, 28), (28, 4), (4, 28)), fill=PALETTE["blue"])
    speck = scene(("square", "black", (3, 3, 5, 5)))
    assert [reader(image, PALETTE, ALL) for image in (flat, bar, bow, speck)] == [[]] * 4
    assert len(reader(static, PALETTE, ALL)) <= 1


def test_pieces_are_what_is_connected() -> None:
    mask = np.array([[1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1], [1, 0, 0, 1]], bool)
    found = sorted(pieces(mask), key=lambda piece: -int(piece.sum()))
    assert [int(piece.sum()) for piece in found] == [5, 2, 1] and (sum(found) == mask).all()
    assert pieces(np.zeros((3, 3), bool)) == []


@pytest.mark.parametrize("density", [0.3, 0.5, 0.65])
def test_pieces_are_those_of_a_flood(density: float) -> None:
    mask = np.random.default_rng(1).random((24, 31)) < density
    flooded, left = [], mask.copy()
    while left.any():
        pile, piece = [tuple(np.argwhere(left)[0])], np.zeros_like(mask)
        while pile:
            y, x = pile.pop()
            if 0 <= y < 24 and 0 <= x < 31 and left[y, x]:
                left[y, x], piece[y, x] = False, True
                pile += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        flooded.append(piece.tobytes())
    assert sorted(piece.tobytes() for piece in pieces(mask)) == sorted(flooded)


def test_exact_shapes_have_the_areas_of_geometry() -> None:
    star = 5 * math.sin(math.pi / 5) * 0.45 / (2 * math.sin(2 * math.pi / 5) * (1 + math.cos(math.pi / 5)))
    areas = {"circle": math.pi / 4, "square": 1, "triangle": 0.5, "star": star, "cross": 5 / 9}
    areas["ring"] = math.pi * (0.25 - 0.24**2)
    for name, area in areas.items():
        share = rendered(name, 30.0, (0.3, 0.6))
        assert share.sum() / 900 == pytest.approx(area, rel=0.01), name
        soft = blurred(share, 0.7)
        assert soft.sum() == pytest.approx(share.sum(), rel=1e-3) and soft.max() <= 1 + 1e-9
        assert np.asarray(soft).std() < share.std()


# ---------------------------------------------------------------- rewards

TWO = {
    "tag": "color_attr",
    "include": [{"class": "circle", "count": 1, "color": "red"}, {"class": "star", "count": 1, "color": "blue"}],
    "exclude": [{"class": "circle", "count": 2}, {"class": "star", "count": 2}],
    "prompt": "a red circle and a blue star",
}
CIRCLE, STAR = ("circle", "red", (2.0, 3.0, 13.0, 14.0)), ("star", "blue", (17.0, 16.0, 29.0, 28.0))


def test_strict_and_graded_scores() -> None:
    green = ("star", "green", STAR[2])
    pictures = [
        scene(CIRCLE, STAR),
        scene(CIRCLE, green),
        scene(CIRCLE),
        scene(),
        scene(CIRCLE, STAR, ("circle", "red", (17.0, 2.0, 27.0, 12.0))),
    ]
    transcripts = [told(TWO, image) for image in pictures]
    strict = build("shapes:Shapes")
    assert strict(transcripts) == [1.0, 0.0, 0.0, 0.0, 0.0] and strict.terms == {"correct": 0.2} and strict.failure is None
    graded = build("shapes:Shapes", graded=True)(transcripts)
    # of number and colour of the circle, number and colour of the star; two circles for one are worth nothing
    assert graded == [1.0, 0.75, 0.5, 0.0, 0.5]


def test_the_watch_wants_nothing_else_in_the_picture() -> None:
    more = ("triangle", "black", (18.0, 2.0, 28.0, 12.0))
    transcripts = [told(TWO, scene(CIRCLE, STAR)), told(TWO, scene(CIRCLE, STAR, more))]
    watch = build("shape_match:ShapeMatch")
    assert build("shapes:Shapes")(transcripts) == [1.0, 1.0], "GenEval does not mind"
    assert watch(transcripts) == [1.0, 0.0] and watch.terms == {"things": 2.5}


@pytest.mark.parametrize("name", ["shapes:Shapes", "shape_match:ShapeMatch"])
def test_what_cannot_be_judged_is_no_number_and_says_why(name: str) -> None:
    reward = build(name)
    scores = reward([told({"prompt": "a dog"}, scene()), told(TWO, scene(CIRCLE, STAR))])
    assert math.isnan(scores[0]) and scores[1] == 1.0
    assert reward.failure == "the prompt 'a dog' cannot be judged: 'include' must be a list of at least one clause"
    assert math.isnan(reward([told(TWO, None)])[0]) and "there is no picture" in reward.failure
    with pytest.raises(Problems, match="shapes must be names out of circle"):
        build(name, shapes=["dog"])
    with pytest.raises(Problems, match="colours must be names out of red, orange"):
        build(name, colours={"beige": [1, 2, 3]})


def test_other_colours_can_be_told_apart() -> None:
    image = Image.new("RGB", (32, 32), WHITE)
    ImageDraw.Draw(image).rectangle((8, 8, 22, 22), fill=(255, 105, 180))
    details = {"tag": "colors", "include": [{"class": "square", "count": 1, "color": "pink"}], "prompt": "a pink square"}
    colours = {"pink": [255, 105, 180], "red": [225, 35, 35]}
    assert build("shapes:Shapes", colours=colours)([told(details, image)]) == [1.0]
