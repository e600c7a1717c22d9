from __future__ import annotations

import io
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


def test_pictures_are_what_a_person_sees() -> None:
    """Transparent pixels are white as qwen-vl-utils has them, whatever they hide, and a grey of 16 bits keeps its steps."""
    half = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    half.paste((255, 0, 0, 128), (2, 0, 4, 2))
    shown = Picture(half).image
    assert shown.mode == "RGB"
    assert [shown.getpixel((x, 0)) for x in (0, 3)] == [(255, 255, 255), (255, 127, 127)]
    file = io.BytesIO()
    half.quantize(8).save(file, "PNG")  # a palette of which some colours are transparent
    assert Picture(Image.open(file)).image.getpixel((0, 0)) == (255, 255, 255)
    grey = Image.fromarray(np.array([[0, 13107, 65535]], np.uint16))
    assert [Picture(grey).image.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (51, 51, 51), (255, 255, 255)]


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
