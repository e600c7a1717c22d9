"""Rewards of generated pictures that need no model but a reader: words, sizes, brightness, and scores that are there already."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from mmrl.errors import ConfigError
from mmrl.messages import Message, Picture
from mmrl.rewards.brightness import Brightness, Sharpness
from mmrl.rewards.compress import Compress
from mmrl.rewards.ocr import OCR, agreement, edit_distance
from mmrl.rewards.pictures import generated, prompt_of
from mmrl.rewards.scored import Scored
from mmrl.transcripts import Question, Turn
from tests.rewards.tiny_encoders import drawn, noise


def written(*lines: str, size: int = 256, letters: float = 0.2) -> Image.Image:
    """Dark words on light ground; ``letters`` is their height as a share of the picture."""
    image = Image.new("RGB", (size, size), (236, 231, 220))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=round(size * letters))
    for place, line in enumerate(lines):
        draw.text((size * 0.08, size * (0.1 + place * letters * 2)), line, fill=(20, 20, 70), font=font)
    return image


@pytest.fixture(scope="module")
def reader() -> OCR:
    return OCR(OCR.Config())


@pytest.mark.parametrize("size", [64, 128, 512])
def test_words_are_read_at_any_size(reader: OCR, size: int) -> None:
    assert reader([drawn(written("OPEN", size=size), words=("Open",))]) == [1.0]
    assert reader.terms == {"exact": 1.0}


def test_several_lines_and_several_quoted_words(reader: OCR) -> None:
    image = written("GRAND", "SALE")
    scores = reader([drawn(image, words=words) for words in (("grand sale",), ("sale", "grand"), ("grand",), ("sale", "exit"))])
    assert scores == [1.0, 1.0, 1.0, 0.5]
    assert reader.terms == {"exact": 0.75}


def test_a_letter_costs_its_share_and_nothing_is_worth_nothing(reader: OCR) -> None:
    scores = reader([drawn(written("OPEN"), words=("OPER",)), drawn(Image.new("RGB", (96, 96)), words=("OPEN",))])
    assert scores == [0.75, 0.0]


def test_the_whole_picture_as_one_line() -> None:
    reader = OCR(OCR.Config(detect=False))
    assert reader([drawn(written("BOOK", size=64, letters=0.34), words=("book",))]) == [1.0]


def test_an_unsure_line_may_be_left_out() -> None:
    assert OCR(OCR.Config(min_confidence=1.0))([drawn(written("OPEN"), words=("OPEN",))]) == [0.0]


def test_no_words_or_no_picture_is_no_score(reader: OCR) -> None:
    scores = reader([drawn(written("OPEN")), drawn(written("OPEN"), words="OPEN"), drawn(None, words=("OPEN",))])
    assert all(map(math.isnan, scores)) and reader.terms == {}
    assert "have no 'words'" in (reader.failure or "")


@pytest.mark.parametrize(
    ("words", "lines", "contained", "score"),
    [
        (["OPEN"], ["now", "open"], True, 1.0),  # the published reward: words within others are right
        (["OPEN"], ["open24"], False, 0.5),
        (["Open Now"], ["open", "now"], True, 1.0),
        (["OPEN"], ["a very long line of other text"], True, 0.0),  # never below 0
        (["OPEN"], [], True, 0.0),
        (["go", "go"], ["go"], True, 0.5),  # one cannot be read twice
        (["go", "go"], ["gogo"], True, 1.0),
        (["cat", "catnip"], ["catnip"], True, 6 / 9),  # the longest first
        (["exit", "sale"], ["sa1e", "ex1t"], True, 0.75),
        (["exit", "sale"], ["sale", "exit"], False, 1.0),
    ],
)
def test_agreement_by_hand(words: list[str], lines: list[str], contained: bool, score: float) -> None:
    assert agreement(words, lines, contained=contained) == pytest.approx(score)


@settings(max_examples=150, deadline=None)
@given(st.text("abc", max_size=7), st.text("abc", max_size=7))
def test_edit_distance_is_its_recursion(a: str, b: str) -> None:
    @cache
    def steps(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        return min(steps(i - 1, j) + 1, steps(i, j - 1) + 1, steps(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    assert edit_distance(a, b) == steps(len(a), len(b))
    if a:
        assert agreement([a], [b], contained=False) == 1 - min(steps(len(a), len(b)), len(a)) / len(a)


def test_compress_is_the_size_of_the_file() -> None:
    plain, noisy = Image.new("RGB", (64, 64), (9, 99, 199)), noise(0, (64, 64))
    sizes = []
    for image in (plain, noisy):
        file = io.BytesIO()
        image.save(file, format="JPEG", quality=95)
        sizes.append(len(file.getvalue()))
    assert Compress(Compress.Config())([drawn(plain), drawn(noisy)]) == [-sizes[0] / 1000, -sizes[1] / 1000]
    large = Compress(Compress.Config(better="large", unit=500.0))([drawn(noisy)])
    assert large == [sizes[1] / 500] and sizes[1] > 4 * sizes[0]


def test_brightness_and_sharpness() -> None:
    board = Image.fromarray((np.indices((8, 8)).sum(0) % 2 * 255).astype(np.uint8))
    images = [drawn(each) for each in (Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), (255,) * 3), board)]
    assert Brightness(Brightness.Config())(images) == [0.0, 1.0, 0.5]
    assert Sharpness(Sharpness.Config())(images) == [0.0, 0.0, 1.0]
    assert Sharpness(Sharpness.Config())([drawn(Image.new("RGB", (1, 1)))]) == [0.0]
    half = Image.fromarray(np.array([[0, 255], [0, 255]], np.uint8))
    assert Sharpness(Sharpness.Config())([drawn(half)]) == [0.5]


@pytest.mark.parametrize(
    "reward", [Compress(Compress.Config()), Brightness(Brightness.Config())], ids=lambda each: str(type(each))
)
def test_no_picture_is_no_score(reward: Callable[..., list[float]]) -> None:
    scores = reward([drawn(None), drawn(noise(0))])
    assert math.isnan(scores[0]) and not math.isnan(scores[1])


def test_the_last_picture_counts_and_the_prompt_is_the_details_or_the_text() -> None:
    told = drawn(noise(0), "a dog")
    two = replace(told, turns=(*told.turns, Turn(Message("assistant", ("so:", Picture(noise(1)))))))
    assert generated(two) is two.turns[1].message.pictures[0].image
    assert prompt_of(told.question) == "a dog"
    assert prompt_of(Question("edit", (Picture(noise(2)), "make it red"), (), lambda answer: 0.0)) == "make it red"


def test_scores_that_are_there() -> None:
    told = drawn(noise(0))
    reward = Scored(Scored.Config(score="ocr"))
    found = reward([replace(told, scores={"ocr": 0.25, "clip": 1.0}), replace(told, scores={"ocr": math.nan})])
    assert found[0] == 0.25 and math.isnan(found[1]) and reward.failure == "the environment could not score it with 'ocr'"
    with pytest.raises(ConfigError, match="'score: ocr' is no reward of the environment; its 'rewards' are clip, shapes"):
        reward([replace(told, scores={"clip": 1.0, "shapes": 1.0})])
    with pytest.raises(ConfigError, match="it has no 'rewards' of its own"):
        reward([told])
