"""Calls in a model's text: whatever the text is, nothing is raised; what is rendered parses back; a mistake has its sentence."""

from __future__ import annotations

import json
from typing import Any

import jinja2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mmrl.calling import CallFormat, CodeCalls, HermesCalls, MalformedCall, describe
from mmrl.messages import ToolCall, ToolSchema

HERMES = HermesCalls(HermesCalls.Config())
CODE = CodeCalls(CodeCalls.Config())

NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**400), 10**400)
WORDS = st.text() | st.sampled_from(
    ["</tool_call>", "<tool_call>", '"}}\n</tool_call>', "\\u003c", "```", "\u2028", "\x00", "\ud7ff"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)
CALLS = st.lists(st.builds(ToolCall, WORDS.filter(bool), st.dictionaries(WORDS, VALUES, max_size=3)), max_size=3)
CODES = st.lists(st.sampled_from(["x = 1", "```", "````", "   ```python", "`", "\r", "", "\t"]) | st.text(), min_size=1).map(
    "\n".join
)

PIECES = [
    "<tool_call>",
    "</tool_call>",
    '{"name": "a", "arguments": {}}',
    "{",
    "}",
    '"',
    "\\u",
    "NaN",
    "1e999",
    "[" * 2000,
    "9" * 5000,
]
PIECES += ["```python", "```", "\n", "````", "~~~", "\ud800", '"name":', '"arguments":', ",", "\\ud800", "<", "tool_call>", " "]
TEXTS = st.text(alphabet=st.characters()) | st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map("".join)


def same(one: Any, other: Any) -> bool:
    """Equal in type, too: 1, 1.0 and True differ."""
    return repr(one) == repr(other)


@given(TEXTS)
@example("<tool_call>" + "[" * 100_000 + "</tool_call>")
@example('<tool_call>{"name": "a", "arguments": {"x": ' + "9" * 5000 + "}}</tool_call>")
@example('<tool_call>{"name": "a", "arguments": {"x": "\\ud800"}}</tool_call>')
@example("```python\n\ud800\n```")
@example("```python")
@example('<tool_call>{"a\\nb": 1}</tool_call>')
def test_no_text_raises_and_every_call_can_be_written(text: str) -> None:
    for form in (HERMES, CODE):
        for call in form.parse(text):
            if isinstance(call, MalformedCall):
                assert call.sentence.endswith((".", "?")) and "\n" not in call.sentence and len(call.sentence) <= 201
                assert call.text in text
            else:
                json.dumps(dict(call.arguments), ensure_ascii=False, allow_nan=False).encode()
                assert same(form.parse(form.render([call])), [call])


@given(CALLS)
def test_hermes_rendered_parses_to_the_same_calls(calls: list[ToolCall]) -> None:
    assert same(HERMES.parse(f"I think so.{HERMES.render(calls)}\nDone."), calls)


@given(st.lists(CODES.filter(str.strip), max_size=3))
def test_code_rendered_parses_to_the_same_calls(codes: list[str]) -> None:
    calls = [ToolCall("python", {"code": code}) for code in codes]
    assert same(CODE.parse(f"I think so.\n{CODE.render(calls)}\nDone."), calls)


def test_several_calls_among_text() -> None:
    text = (
        'Look <b>closer</b>.\n<tool_call>\n{"name": "crop", "arguments": {"image": 1, "box": [1, 2, 3.5, null]}}\n</tool_call>'
        ' and <tool_call>{"arguments":{},"name":"flip"}</tool_call>\n```json\n{"name": "no"}\n```'
    )
    assert HERMES.parse(text) == [ToolCall("crop", {"image": 1, "box": [1, 2, 3.5, None]}), ToolCall("flip", {})]
    assert HERMES.parse("no call") == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "<tool_call>{</tool_call>",
            "The call is not valid JSON: Expecting property name enclosed in double quotes at character 1 of",
        ),
        ("<tool_call></tool_call>", "The call is not valid JSON: Expecting value"),
        (
            '<tool_call>{"name": "a", "arguments": {}} {}</tool_call>',
            "The call is not valid JSON: Extra data at character 31 of 33",
        ),
        ('<tool_call>{"arguments": {}}</tool_call>', "The call lacks the key 'name'."),
        ('<tool_call>{"name": "a"}</tool_call>', "The call lacks the key 'arguments'."),
        (
            '<tool_call>{"name": "a", "argument": {}}</tool_call>',
            "The call has an unknown key 'argument'; did you mean 'arguments'?",
        ),
        ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', "The call must have a string that is not empty as its name."),
        ('<tool_call>{"name": "", "arguments": {}}</tool_call>', "The call must have a string that is not empty as its name."),
        (
            '<tool_call>{"name": "a", "arguments": [1]}</tool_call>',
            "The call must have a JSON object as its arguments, not a list.",
        ),
        (
            '<tool_call>{"name": "a", "arguments": "{}"}</tool_call>',
            "The call must have a JSON object as its arguments, not a string.",
        ),
        ("<tool_call>[]</tool_call>", "The call must be a JSON object with name and arguments, not a list."),
        ("<tool_call>null</tool_call>", "The call must be a JSON object with name and arguments, not null."),
        (
            '<tool_call>{"name": "a", "name": "a", "arguments": {}}</tool_call>',
            "The call has the key 'name' twice in one object.",
        ),
        (
            '<tool_call>{"name": "a", "arguments": {"x": {"y": 1, "y": 1}}}</tool_call>',
            "The call has the key 'y' twice in one object.",
        ),
        ('<tool_call>{"name": "a", "arguments": {"x": NaN}}</tool_call>', "The call has NaN, which is no number in JSON."),
        (
            '<tool_call>{"name": "a", "arguments": {"x": -Infinity}}</tool_call>',
            "The call has -Infinity, which is no number in JSON.",
        ),
        ('<tool_call>{"name": "a", "arguments": {"x": 1e999}}</tool_call>', "The call has the number 1e999, which is too large."),
        ('<tool_call>{"name": "a", "arguments": {}}', "A <tool_call> is not closed with </tool_call>."),
        ("</tool_call>", "There is a </tool_call> without a <tool_call> before it."),
        ("<tool_call><tool_call>{}</tool_call></tool_call>", "A <tool_call> stands within another one."),
        ("<tool_call>{}<tool_call>{}</tool_call>", "A <tool_call> is not closed with </tool_call>."),
    ],
)
def test_a_malformed_call_has_its_sentence_and_harms_no_other(text: str, sentence: str) -> None:
    good = '<tool_call>{"name": "a", "arguments": {}}</tool_call>'
    call, malformed = HERMES.parse(f"{good} then {text}")
    assert call == ToolCall("a", {})
    assert isinstance(malformed, MalformedCall)
    assert malformed.sentence.startswith(sentence) and malformed.text == text


def test_blocks_of_another_language_are_text() -> None:
    text = "First\n```python\nprint(1)\n```\n````json\n```python\nno\n```\n````\n```\nno\n```\n  ```Python 3\r\nx\r\n  ```  \n"
    assert CODE.parse(text) == [ToolCall("python", {"code": "print(1)"}), ToolCall("python", {"code": "x\r"})]
    assert CODE.parse("then ```python\nprint(0)\n```") == []  # the opening is no line of its own


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("```python\nprint(1)", "A block of python code is not closed with ```."),
        ("````python\nprint(1)\n```", "A block of python code is not closed with ```."),
        ("```python\n```", "A block of python code is empty."),
        ("```python\n  \n\n```", "A block of python code is empty."),
        ("```python\n'\ud800'\n```", "A block of python code holds a character that cannot be written"),
    ],
)
def test_a_malformed_block_has_its_sentence(text: str, sentence: str) -> None:
    (malformed,) = CODE.parse(text)
    assert isinstance(malformed, MalformedCall) and malformed.sentence.startswith(sentence)


@pytest.mark.parametrize(
    "call", [ToolCall("crop", {"code": "x"}), ToolCall("python", {"code": "x", "y": 1}), ToolCall("python", {})]
)
def test_what_no_block_can_say_is_not_rendered(call: ToolCall) -> None:
    with pytest.raises(ValueError, match="a block of code is a call of 'python' with the one argument 'code'"):
        CODE.render([call])


def test_another_language_and_tool() -> None:
    form = CodeCalls(CodeCalls.Config(tool="shell", argument="script", language="bash"))
    call = ToolCall("shell", {"script": "ls\n"})
    assert form.render([call]) == "```bash\nls\n\n```" and form.parse(form.render([call])) == [call]


# What Qwen2.5's chat template says of tools and calls (its tokenizer_config.json, the parts that matter here)
_TOOLS = (
    r'{{- "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n'
    r'You are provided with function signatures within <tools></tools> XML tags:\n<tools>" }}'
    r'{%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}'
    r'{{- "\n</tools>\n\nFor each function call, return a json object with function name and arguments within '
    r"<tool_call></tool_call> XML tags:\n<tool_call>\n"
    r'{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>" }}'
)
_CALLS = (
    '{%- for tool_call in calls %}{{- \'\\n<tool_call>\\n{"name": "\' }}{{- tool_call.name }}{{- \'", "arguments": \' }}'
    "{{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}"
)


def qwen(template: str, **values: Any) -> str:
    environment = jinja2.Environment()
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)  # as transformers defines it
    return environment.from_string(template).render(**values)


def zoom(image: int, factor: float = 2.0) -> str:
    """Show “more” of it.

    factor: how much.
    """
    return ""


def test_hermes_is_what_qwen_s_template_prints() -> None:
    schemas = [describe(zoom), ToolSchema("empty", "Nothing.", {"type": "object", "properties": {}})]
    assert HERMES.instructions(schemas) == qwen(_TOOLS, tools=[schema.function for schema in schemas])
    calls = [ToolCall("zoom", {"image": 1, "factor": 2.0, "why": "ä <b> '\""}), ToolCall("empty", {})]
    assert "\n" + HERMES.render(calls) == qwen(_CALLS, calls=calls)


def test_code_instructions_are_about_the_tool_that_runs_it() -> None:
    schema = ToolSchema("python", "Run Python with Pillow.", {"type": "object", "properties": {}})
    assert "Run Python with Pillow." in CODE.instructions([describe(zoom), schema])
    with pytest.raises(ValueError, match="tool 'python', which is to run blocks of code, is not among the tools"):
        CODE.instructions([describe(zoom)])


@pytest.mark.parametrize("form", [HERMES, CODE])
def test_instructions_hold_no_call_that_could_be_run(form: CallFormat) -> None:
    schema = ToolSchema("python", "Run it.", {"type": "object", "properties": {}})
    found = form.parse(form.instructions([schema]))
    assert all(isinstance(call, MalformedCall) or call.arguments == {"code": "<code>"} for call in found)
