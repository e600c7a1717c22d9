"""Image tools: a dot of the original is found where the result's map says it is, for every tool and for tools after tools."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from mmrl.calling import Toolbox, load_tools
from mmrl.messages import Picture, ToolCall, ToolContext, ToolError
from mmrl.registry import ROOT
from tools.adjust import adjust
from tools.crop import crop
from tools.draw_box import draw_box
from tools.draw_point import draw_point
from tools.flip import flip
from tools.images import MAX_SIDE
from tools.resize import resize
from tools.rotate import rotate

TOOLS: tuple[Callable[..., Picture], ...] = (adjust, crop, draw_box, draw_point, flip, resize, rotate)
EDGE = 10  # pixels at an edge, in which resampling may have mixed something
DOT = 5  # side of the dot, which is odd, so that it has a pixel in the middle


def see(*pictures: Picture) -> ToolContext:
    return ToolContext(pictures=pictures)


def dotted(width: int, height: int, x: int, y: int) -> Picture:
    """White on black: a square dot whose middle is the middle of the pixel (x, y)."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[y - DOT // 2 : y + DOT // 2 + 1, x - DOT // 2 : x + DOT // 2 + 1] = 255
    return Picture(Image.fromarray(pixels))


def centre(image: Image.Image) -> tuple[float, float]:
    """Where the light is, from the upper left corner of the image."""
    light = np.asarray(image.convert("L"), np.float64)
    light[light < 16] = 0  # what resampling leaves around the dot
    ys, xs = np.mgrid[: image.height, : image.width] + 0.5
    return float((light * xs).sum() / light.sum()), float((light * ys).sum() / light.sum())


def ramp(width: int, height: int) -> Picture:
    """A picture that says at each pixel where it is: red is 60 + x, green is 60 + y."""
    ys, xs = np.mgrid[:height, :width]
    return Picture(Image.fromarray(np.stack([60 + xs, 60 + ys, np.full_like(xs, 255)], 2).astype(np.uint8)))


def check_ramp(picture: Picture, times: int) -> int:
    """Every pixel says where it comes from, which must be where ``to_source`` says; how many were looked at.

    Not looked at are those near an edge, of the picture or of what turning left black: resampling mixes them with it. Each of
    ``times`` tools makes whole numbers of what it computes, and turning does so by leaving the rest off.
    """
    pixels = np.asarray(picture.image, np.float64)
    ys, xs = np.mgrid[: picture.image.height, : picture.image.width] + 0.5
    a, b, c, d, e, f = picture.to_source
    whole = ImageOps.expand(Image.fromarray(np.where(pixels[:, :, 2] == 255, 255, 0).astype(np.uint8)), EDGE)
    seen = (
        np.asarray(whole.filter(ImageFilter.BoxBlur(EDGE)))[EDGE:-EDGE, EDGE:-EDGE] == 255
    )  # a whole square around them, that is
    np.testing.assert_allclose(pixels[seen][:, 0] - 60 + 0.5, (a * xs + b * ys + c)[seen], atol=times + 0.05)
    np.testing.assert_allclose(pixels[seen][:, 1] - 60 + 0.5, (d * xs + e * ys + f)[seen], atol=times + 0.05)
    return int(seen.sum())


@st.composite
def steps(draw: st.DrawFn, width: int, height: int) -> Callable[[ToolContext, int], Picture]:
    """A tool that moves pixels, with arguments that fit a picture of this size and keep most of it."""
    left, top = draw(st.integers(0, width // 3)), draw(st.integers(0, height // 3))
    right, bottom = draw(st.integers(width - width // 4, width)), draw(st.integers(height - height // 4, height))
    choices: list[Callable[[ToolContext, int], Picture]] = []
    enlarge, degrees = draw(st.floats(1, 2)), draw(st.floats(-720, 720) | st.sampled_from([0, 90, 180, 270, -90, 45]))
    expand, direction = draw(st.booleans()), draw(st.sampled_from(["horizontal", "vertical"]))
    new_width = draw(st.integers(width * 2 // 3, width * 2))
    new_height = draw(st.none() | st.integers(height * 2 // 3, height * 2))
    choices.append(lambda ctx, image: crop(image, (left, top, right, bottom), ctx, enlarge))
    choices.append(lambda ctx, image: rotate(image, degrees, ctx, expand))
    choices.append(lambda ctx, image: flip(image, direction, ctx))
    choices.append(lambda ctx, image: resize(image, new_width, ctx, new_height))
    return draw(st.sampled_from(choices))


def apply(first: Picture, drawn: st.DataObject, times: int) -> list[Picture]:
    """``times`` tools one after the other, each on the last one's picture: what each made."""
    pictures = [Picture(Image.new("RGB", (1, 1))), first]
    for _ in range(times):
        step = drawn.draw(steps(*pictures[-1].image.size))
        pictures.append(step(see(*pictures), len(pictures)))
        assert pictures[-1].source == 1  # the first picture's number, counted from 0
    return pictures[2:]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(100, 190), st.integers(100, 190), st.integers(1, 3))
def test_every_pixel_is_where_the_map_says(drawn: st.DataObject, width: int, height: int, times: int) -> None:
    assume(check_ramp(apply(ramp(width, height), drawn, times)[-1], times) > 100)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(40, 150), st.integers(40, 150), st.integers(1, 3))
def test_a_dot_is_found_where_the_map_says(drawn: st.DataObject, width: int, height: int, times: int) -> None:
    x, y = drawn.draw(st.integers(5, width - 6)), drawn.draw(st.integers(5, height - 6))
    made = apply(dotted(width, height, x, y), drawn, times)
    assume(all(_is_whole(picture, x, y) for picture in made))  # what is cut off by one comes back by none
    result = made[-1]
    assert result.point_in_source(*centre(result.image)) == pytest.approx((x + 0.5, y + 0.5), abs=0.3)


def _is_whole(picture: Picture, x: int, y: int) -> bool:
    """Whether the dot and its surroundings lie in the picture."""
    left, top, right, bottom = _dot_in(picture, x, y)
    return left >= 1 and top >= 1 and right <= picture.image.width - 1 and bottom <= picture.image.height - 1


def _dot_in(result: Picture, x: int, y: int) -> tuple[float, float, float, float]:
    """The box of the dot in the result, by the inverse of its map."""
    a, b, c, d, e, f = result.to_source
    inverse = np.linalg.inv([[a, b], [d, e]])
    reach = DOT / 2 + 2
    corners = np.array([[x + 0.5 + i * reach, y + 0.5 + j * reach] for i in (-1, 1) for j in (-1, 1)])
    inside = (corners - (c, f)) @ inverse.T
    return (*inside.min(0), *inside.max(0))


PHOTO = Picture(Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)))
PIXELS = np.asarray(PHOTO.image)


@pytest.mark.parametrize(
    ("result", "pixels"),
    [
        (crop(1, (5, 10, 15, 30), see(PHOTO)), PIXELS[10:30, 5:15]),
        (crop(1, (0, 0, 40, 30), see(PHOTO)), PIXELS),
        (rotate(1, 0, see(PHOTO)), PIXELS),
        (rotate(1, 90, see(PHOTO)), np.rot90(PIXELS, -1)),
        (rotate(1, -90, see(PHOTO)), np.rot90(PIXELS)),
        (rotate(1, 540, see(PHOTO)), np.rot90(PIXELS, 2)),
        (rotate(1, 180, see(PHOTO), expand=False), np.rot90(PIXELS, 2)),
        (flip(1, "horizontal", see(PHOTO)), PIXELS[:, ::-1]),
        (flip(1, "vertical", see(PHOTO)), PIXELS[::-1]),
        (resize(1, 40, see(PHOTO)), PIXELS),
        (adjust(1, see(PHOTO)), PIXELS),
        (adjust(1, see(PHOTO), brightness=0.5), PIXELS // 2),
    ],
)
def test_what_can_be_exact_is(result: Picture, pixels: np.ndarray) -> None:
    assert np.array_equal(np.asarray(result.image), pixels)
    assert result.source == 0
    left, top, right, bottom = result.box_in_source()
    assert result.image.size == pytest.approx((pixels.shape[1], pixels.shape[0]))
    assert 0 <= left < right <= 40 and 0 <= top < bottom <= 30


def test_the_corners_of_exact_maps() -> None:
    assert crop(1, (5, 10, 15, 30), see(PHOTO), enlarge=3).box_in_source() == pytest.approx((5, 10, 15, 30))
    assert rotate(1, 90, see(PHOTO)).point_in_source(0, 0) == (0, 30)  # the lower left corner comes to the upper left
    assert flip(1, "horizontal", see(PHOTO)).point_in_source(0, 0) == (40, 0)
    assert resize(1, 80, see(PHOTO)).image.size == (80, 60)
    assert resize(1, 80, see(PHOTO), 30).point_in_source(80, 30) == (40, 30)
    tall = rotate(1, 45, see(PHOTO))
    assert tall.image.size == (50, 50)  # 70 / sqrt(2), rounded up
    assert tall.point_in_source(25, 25) == pytest.approx((20, 15))


def test_a_turn_loses_nothing_unless_it_keeps_the_size() -> None:
    white = Picture(Image.new("RGB", (61, 33), "white"))
    for degrees in (10, 45, 100, 200, 333):
        light = np.asarray(rotate(1, degrees, see(white)).image, np.float64).mean(2).sum() / 255
        assert light == pytest.approx(61 * 33, rel=0.03)
    kept = rotate(1, 45, see(white), expand=False)
    assert kept.image.size == (61, 33) and np.asarray(kept.image).mean() < 0.8 * 255


def test_contrast_spreads_around_the_mean_and_brightness_scales() -> None:
    grey = Picture(Image.fromarray(np.repeat(np.array([[90, 110]], np.uint8), 3).reshape(1, 2, 3)))
    assert np.asarray(adjust(1, see(grey), contrast=2).image)[0, :, 0].tolist() == [80, 120]
    assert np.asarray(adjust(1, see(grey), contrast=0).image)[0, :, 0].tolist() == [100, 100]
    assert np.asarray(adjust(1, see(grey), brightness=2).image)[0, :, 0].tolist() == [180, 220]


@given(st.integers(0, 19), st.integers(0, 14), st.integers(1, 20), st.integers(1, 15), st.integers(1, 9))
def test_a_box_is_drawn_on_its_edges_inwards(left: int, top: int, width: int, height: int, thickness: int) -> None:
    right, bottom = min(20, left + width), min(15, top + height)
    result = draw_box(1, (left, top, right, bottom), see(Picture(Image.new("RGB", (20, 15)))), "white", thickness)
    ys, xs = np.mgrid[:15, :20]
    inside = (left <= xs) & (xs < right) & (top <= ys) & (ys < bottom)
    expected = inside & (np.minimum.reduce([xs - left, right - 1 - xs, ys - top, bottom - 1 - ys]) < thickness)
    assert np.array_equal(np.asarray(result.image)[:, :, 0] > 0, expected)
    assert (result.source, result.to_source) == (0, (1, 0, 0, 0, 1, 0))


@given(st.integers(0, 19), st.integers(0, 14), st.integers(0, 6))
def test_a_dot_is_drawn_around_its_pixel(x: int, y: int, radius: int) -> None:
    result = draw_point(1, (x, y), see(Picture(Image.new("RGB", (20, 15)))), "white", radius)
    lit = np.asarray(result.image)[:, :, 0] > 0
    ys, xs = np.mgrid[:15, :20]
    distance = np.hypot(xs - x, ys - y)
    assert lit[y, x] and lit[distance <= radius - 1].all() and not lit[distance > radius + 0.5].any()


def test_drawing_leaves_the_original_as_it_was() -> None:
    before = PHOTO.image.tobytes()
    draw_box(1, (1, 1, 9, 9), see(PHOTO))
    draw_point(1, (3, 3), see(PHOTO))
    assert PHOTO.image.tobytes() == before


@pytest.mark.parametrize(
    ("tool", "arguments", "sentence"),
    [
        (
            crop,
            {"box": (0, 0, 41, 30)},
            r"The box \[0, 0, 41, 30\] must have .* lie within the image, which is 40 wide and 30 high",
        ),
        (crop, {"box": (5, 5, 5, 9)}, "must have left < right"),
        (crop, {"box": (-1, 5, 5, 9)}, "must have left < right"),
        (crop, {"box": (0, 0, 9, 9), "enlarge": 0.5}, "'enlarge' must be from 1 to 16, got 0.5"),
        (crop, {"box": (0, 0, 9, 9), "enlarge": float("inf")}, "'enlarge' must be from 1 to 16"),
        (resize, {"width": 0}, "would be 0 wide and 1 high; each must be from 1 to 4096"),
        (resize, {"width": MAX_SIDE + 1, "height": 3}, "would be 4097 wide and 3 high"),
        (adjust, {"contrast": -1}, "'contrast' must be from 0 to 10, got -1"),
        (adjust, {"brightness": 11}, "'brightness' must be from 0 to 10"),
        (draw_box, {"box": (0, 0, 4, 31)}, "must have left < right"),
        (draw_box, {"box": (0, 0, 4, 4), "thickness": 0}, "'thickness' must be from 1 to 100"),
        (draw_point, {"point": (40, 0)}, r"The point \[40, 0\] must lie within the image, which is 40 wide and 30 high"),
        (draw_point, {"point": (4, 0), "radius": -1}, "'radius' must be from 0 to 100"),
    ],
)
def test_what_a_tool_cannot_do_is_a_sentence(tool: Callable[..., Any], arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ToolError, match=sentence):
        tool(image=1, ctx=see(PHOTO), **arguments)


ENOUGH: dict[str, dict[str, Any]] = {
    "crop": {"box": [1, 2, 30, 20]},
    "rotate": {"degrees": 30},
    "flip": {"direction": "vertical"},
    "resize": {"width": 20},
    "draw_box": {"box": [1, 2, 30, 20]},
    "draw_point": {"point": [1, 2]},
    "adjust": {},
}


def test_a_model_can_call_them_all_and_is_told_the_new_image_s_size() -> None:
    box = Toolbox(TOOLS)
    calls = [ToolCall(name, {"image": 1, **arguments}) for name, arguments in ENOUGH.items()]
    for number, outcome in enumerate(box.run(calls, pictures=[PHOTO]), start=2):
        assert outcome.error is None
        (picture,) = outcome.result.pictures
        assert outcome.result.text == f"Image {number} is {picture.image.width} x {picture.image.height} pixels."
    wrong = box.run([ToolCall(name, {"image": 2, **arguments}) for name, arguments in ENOUGH.items()], pictures=[PHOTO])
    assert {outcome.result.text for outcome in wrong} == {"There is no image 2; the conversation has images 1 to 1."}


def test_every_parameter_is_described() -> None:
    for schema in Toolbox(TOOLS).schemas:
        assert all(parameter.get("description") for parameter in schema.parameters["properties"].values()), schema.name
        assert schema.parameters["properties"]["image"] == {"type": "integer", "description": "number of the image, from 1."}


def test_the_readme_lists_every_tool() -> None:
    readme = (ROOT / "tools" / "README.md").read_text()
    for tool in TOOLS:
        assert f"| `{tool.__module__}:{tool.__name__}` |" in readme
        assert inspect.getdoc(tool)


# ---------------------------------------------------------------- text


@pytest.fixture(scope="module")
def reader(installed: Callable[[str], None]) -> Any:
    installed("rapidocr")
    (tool,) = load_tools(["tools.read_text:ReadText"])
    return tool


def written(words: Sequence[tuple[str, int, int]], size: tuple[int, int]) -> tuple[Picture, list[tuple[int, int, int, int]]]:
    """A picture with words at places, and the boxes of their ink."""
    image = Image.new("RGB", size, "white")
    boxes = []
    for word, x, y in words:
        single = Image.new("L", size, 0)
        ImageDraw.Draw(single).text((x, y), word, fill=255, font=ImageFont.load_default(40))
        image.paste("black", mask=single)
        bounds = single.getbbox()
        assert bounds is not None
        boxes.append(bounds)
    return Picture(image), boxes


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(0, width) * max(0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return both / (sum(areas) - both)


def test_text_is_read_with_its_boxes(reader: Any) -> None:
    picture, boxes = written([("CAT 42", 30, 20), ("house", 200, 120)], (400, 200))
    result = reader(1, see(picture))
    lines = result.details["lines"]
    assert [line["text"] for line in lines] == ["CAT 42", "house"]
    assert result.text == "\n".join(f"{line['text']} {line['box']}" for line in lines)
    assert result.metrics == {"lines": 2} and result.details["source"] == 0
    for line, box in zip(lines, boxes, strict=True):
        assert overlap(line["box"], box) > 0.5 and line["box_in_source"] == pytest.approx(line["box"], abs=0.51)


def test_boxes_of_a_picture_made_from_another_point_into_it(reader: Any) -> None:
    upright, (box,) = written([("CAT 42", 90, 60)], (400, 200))
    fallen = rotate(1, 90, see(upright))  # the question's picture; its own coordinates are what counts
    fallen = Picture(fallen.image)
    straight = rotate(1, -90, see(fallen))
    cut = crop(2, (60, 40, 340, 150), see(fallen, straight), enlarge=1.5)
    result = reader(3, see(fallen, straight, cut))
    (line,) = result.details["lines"]
    assert line["text"] == "CAT 42" and result.details["source"] == 0
    left, top, right, bottom = box
    assert overlap(line["box_in_source"], (200 - bottom, left, 200 - top, right)) > 0.5


def test_a_large_picture_is_read_scaled_down_and_a_tiny_one_at_all(reader: Any) -> None:
    picture, (box,) = written([("CAT 42", 90, 60)], (400, 200))
    large = resize(1, 2000, see(picture))
    (line,) = reader(2, see(picture, large)).details["lines"]
    assert line["text"] == "CAT 42" and overlap(line["box_in_source"], box) > 0.5
    for size in ((1, 1), (1, 900), (900, 2)):
        assert reader(1, see(Picture(Image.new("RGB", size)))).text == "There is no text in the image."


def test_calls_at_the_same_time_read_the_same(reader: Any) -> None:
    rng = random.Random(0)
    pictures = [written([(f"CAT {rng.randrange(100, 999)}", 30, 10)], (260, 80))[0] for _ in range(3)]
    calls = [ToolCall("read_text", {"image": number}) for number in (1, 2, 3)]
    together = Toolbox([reader], timeout_s=60).run(calls, pictures=pictures)
    assert [outcome.result.text for outcome in together] == [reader(number, see(*pictures)).text for number in (1, 2, 3)]
    assert len({outcome.result.text for outcome in together}) == 3
