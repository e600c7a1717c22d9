from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmrl.messages import IDENTITY, Message, Picture, ToolContext, ToolError, compose

NUMBERS = st.floats(-8, 8, width=16)
AFFINES = st.tuples(*[NUMBERS] * 6)


def matrix(affine: tuple[float, ...]) -> np.ndarray:
    return np.vstack([np.reshape(affine, (2, 3)), [0, 0, 1]])


@given(AFFINES, AFFINES)
def test_compose_is_the_product_of_the_matrices(outer: tuple[float, ...], inner: tuple[float, ...]) -> None:
    assert np.allclose(matrix(compose(outer, inner)), matrix(outer) @ matrix(inner))  # type: ignore[arg-type]


def test_a_picture_made_of_a_picture_points_into_the_first() -> None:
    photo = Picture(Image.new("RGB", (100, 50)))
    # turned by 90 degrees clockwise: the point (x, y) of the turned picture is (y, 50 - x) of the photograph
    turned = photo.derived(Image.new("RGB", (50, 100)), (0, 1, 0, -1, 0, 50), number=3)
    cropped = turned.derived(Image.new("RGB", (10, 20)), (1, 0, 30, 0, 1, 40), number=4)
    assert (turned.source, cropped.source) == (3, 3)
    assert turned.point_in_source(0, 0) == (0, 50)
    assert cropped.point_in_source(0, 0) == turned.point_in_source(30, 40) == (40, 20)
    assert cropped.box_in_source() == (40, 10, 60, 20)
    assert photo.box_in_source() == (0, 0, 100, 50)


def test_the_key_is_of_size_and_pixels() -> None:
    red = Image.new("RGB", (4, 2), (255, 0, 0))
    others = [Image.new("RGB", (2, 4), (255, 0, 0)), Image.new("RGB", (4, 2), (255, 0, 1)), Image.new("L", (4, 2), 76)]
    keys = [Picture(image).key for image in (red, *others)]
    assert all(one != other for one, other in itertools.combinations(keys, 2))
    assert Picture(red.convert("RGBA")).key == Picture(red.copy(), source=1).key == keys[0]


def test_pictures_are_numbered_from_one() -> None:
    first, second = Picture(Image.new("RGB", (1, 1))), Picture(Image.new("RGB", (2, 2)))
    context = ToolContext(pictures=(first, second))
    assert context.picture(1) is first and context.picture(2) is second
    for number in (0, 3, -1):
        with pytest.raises(ToolError, match=f"no image {number}; the conversation has images 1 to 2"):
            context.picture(number)
    with pytest.raises(ToolError, match="has no image"):
        ToolContext().picture(1)


def test_a_message_has_its_text_and_pictures_apart() -> None:
    picture = Picture(Image.new("RGB", (1, 1)))
    message = Message("user", ("What is ", picture, "this?"))
    assert message.text == "What is this?" and message.pictures == (picture,)
    assert picture.to_source == IDENTITY
