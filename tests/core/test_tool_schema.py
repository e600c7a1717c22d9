"""What a model is told of a tool: as transformers tells it, and a sentence for a tool of which nothing can be told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
from PIL import Image
from transformers.utils import get_json_schema

from mmrl.calling import describe
from mmrl.calling.schema import BadArguments, checker
from mmrl.errors import ConfigError
from mmrl.messages import ToolContext


def plain(count: int, share: float, sure: bool, word: str) -> str:
    """
    Do something with each kind of value.

    Args:
        count: how many
        share: of the whole,
            as a fraction
        sure: whether it is so
        word: any text
    """
    return ""


def nested(words: list[str], table: dict[str, int], grid: list[list[float]], mode: Literal["fast", "slow"]) -> str:
    """
    Take what holds other things.

    Args:
        words: some
        table: a number for each
        grid: rows of numbers
        mode: how
    """
    return ""


def optional(count: int | None, other: list[int] | None = None, either: list[int] | dict[str, int] | None = None) -> str:
    """
    Take what may be left out.

    Args:
        count: how many
        other: more
        either: of two
    """
    return ""


@pytest.mark.parametrize("tool", [plain, nested, optional])
def test_the_schema_is_the_one_of_transformers(tool: Callable[..., Any]) -> None:
    theirs = get_json_schema(tool)
    theirs["function"].pop("return", None)
    assert describe(tool).function == theirs


def crop(image: int, box: tuple[int, int, int, int], left: float, right: float, ctx: ToolContext, fast: bool = True) -> str:
    """Cut a rectangle out,
    to see it better.

    image: number of the image, from 1.
    box: left, top, right, bottom:
    all of them in pixels.
    left, right (number): how much more.
    ctx: is not the model's affair.

    The image is not changed.

    Returns:
        nothing that the model needs to know
    """
    return ""


def test_lines_of_the_docstring_describe_parameters_and_the_context_is_hidden() -> None:
    schema = describe(crop)
    assert schema.name == "crop"
    assert schema.description == "Cut a rectangle out, to see it better.\nThe image is not changed."
    assert schema.parameters["required"] == ["image", "box", "left", "right"]
    assert list(schema.parameters["properties"]) == ["image", "box", "left", "right", "fast"]
    assert schema.parameters["properties"]["box"] == {
        "type": "array",
        "prefixItems": [{"type": "integer"}] * 4,
        "minItems": 4,
        "maxItems": 4,
        "description": "left, top, right, bottom: all of them in pixels.",
    }
    assert schema.parameters["properties"]["left"] == {"type": "number", "description": "how much more."}
    assert schema.parameters["properties"]["right"] == {"type": "number", "description": "how much more."}
    assert schema.parameters["properties"]["fast"] == {"type": "boolean"}


class PageReader:
    """Reads a page."""

    def __call__(self, page: int) -> str:
        return ""


class Named(PageReader):
    name = "turn"

    def __call__(self, page: int) -> str:
        """Turn to a page."""
        return ""


class Foreign:
    """A tool of another program."""

    name, description = "add", "Add numbers."
    parameters: Any = {  # noqa: RUF012
        "type": "object",
        "properties": {"first-number": {"type": "integer"}, "from": {"type": "integer"}},
        "required": ["from"],
    }

    def __call__(self, **arguments: int) -> int:
        return sum(arguments.values())


def test_an_object_is_a_tool_under_its_name_or_its_class_s() -> None:
    assert (describe(PageReader()).name, describe(PageReader()).description) == ("page_reader", "Reads a page.")
    assert (describe(Named()).name, describe(Named()).description) == ("turn", "Turn to a page.")
    assert describe(PageReader()).parameters["properties"] == {"page": {"type": "integer"}}


def test_a_tool_that_brings_a_schema_is_taken_at_its_word() -> None:
    schema = describe(Foreign())
    assert (schema.name, schema.description, schema.parameters) == ("add", "Add numbers.", Foreign.parameters)
    check = checker(Foreign())
    assert check({"from": 1, "first-number": 2}) == {"from": 1, "first-number": 2}
    with pytest.raises(BadArguments) as error:
        check({"frm": 1})
    assert str(error.value) == "add: unknown argument 'frm'; did you mean 'from'; 'from' is missing."


def picture(image: Image.Image) -> str:
    """Take a picture."""
    return ""


def anything(value: Any) -> str:
    """Take anything."""
    return ""


def bare(value) -> str:  # type: ignore[no-untyped-def]
    """Take something."""
    return ""


def several(*values: int) -> str:
    """Take many."""
    return ""


def silent(value: int) -> str:
    return ""


def lost(value: Missing) -> str:  # type: ignore[name-defined]  # noqa: F821
    """Take what nobody knows."""
    return ""


@pytest.mark.parametrize(
    ("tool", "sentence"),
    [
        (picture, r"picture: parameter 'image' has a type hint that JSON has no word for, .*Image"),
        (anything, "anything: parameter 'value' has a type hint that JSON has no word for"),
        (bare, "bare: parameter 'value' has no type hint"),
        (several, "several: parameter 'values' is variadic positional"),
        (silent, "silent has no docstring"),
        (lost, "lost: its type hints cannot be read .*Missing"),
        (type("Spaced", (PageReader,), {"name": "two words"})(), "'two words' is no name"),
    ],
)
def test_a_tool_that_cannot_be_described_is_refused_by_name(tool: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        describe(tool)


def everything(
    number: int,
    share: float = 0.5,
    word: str = "",
    pair: tuple[int, float] = (0, 0),
    mode: Literal["a", "b"] = "a",
    rows: list[list[int]] | None = None,
) -> str:
    """Take everything."""
    return ""


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ({"number": 3}, {"number": 3}),
        ({"number": 3, "share": 2}, {"number": 3, "share": 2.0}),
        ({"number": 3, "pair": [1, 2]}, {"number": 3, "pair": (1, 2.0)}),
        (
            {"number": -1, "mode": "b", "rows": [[1], []], "word": "ä"},
            {"number": -1, "mode": "b", "rows": [[1], []], "word": "ä"},
        ),
        ({"number": 3, "rows": None}, {"number": 3, "rows": None}),
    ],
)
def test_arguments_pass_as_json_has_them_and_defaults_stay_the_tool_s(arguments: dict[str, Any], given: dict[str, Any]) -> None:
    checked = checker(everything)(arguments)
    assert checked == given
    assert [type(value) for value in checked.values()] == [type(value) for value in given.values()]


DEEP: Any = []
for _ in range(250):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"number": "3"}, "everything: 'number' must be an integer, got '3'."),
        ({"number": 3.0}, "everything: 'number' must be an integer, got 3.0."),
        ({"number": True}, "everything: 'number' must be an integer, got True."),
        ({"number": 1, "share": "x"}, "everything: 'share' must be a number, got 'x'."),
        ({"number": 1, "share": float("nan")}, "everything: 'share' must be a finite number, got nan."),
        ({"number": 1, "word": 7}, "everything: 'word' must be a string, got 7."),
        ({"number": 1, "pair": [1]}, "everything: 'pair' has too few items."),
        ({"number": 1, "pair": [1, 2, 3]}, "everything: 'pair' has too many items"),
        ({"number": 1, "pair": [1, "x"]}, "everything: 'pair.1' must be a number, got 'x'."),
        ({"number": 1, "mode": "c"}, "everything: 'mode' must be 'a' or 'b', got 'c'."),
        ({"number": 1, "rows": [[1], ["2"]]}, "everything: 'rows.1.0' must be an integer, got '2'."),
        ({}, "everything: 'number' is missing."),
        ({"number": 1, "shar": 2}, "everything: unknown argument 'shar'; did you mean 'share'?"),
        ({"nmber": 1}, "everything: 'number' is missing; unknown argument 'nmber'; did you mean 'number'?"),
        ({"number": 1, "rows": DEEP}, "everything: the arguments"),
        ({"number": "x" * 5000}, "everything: 'number' must be an integer, got 'xxx"),
    ],
)
def test_a_wrong_argument_has_its_sentence(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadArguments) as error:
        checker(everything)(arguments)
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
