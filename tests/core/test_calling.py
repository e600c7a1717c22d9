"""A turn's calls: results in order, concurrent, each within its time; what goes wrong is a sentence, never an exception."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import BaseModel, ConfigDict

from mmrl.calling import MalformedCall, Outcome, ToolBlock, Toolbox, load_tools
from mmrl.calling.timed import Workers
from mmrl.component import Component, Problems, validate
from mmrl.errors import ConfigError
from mmrl.messages import Picture, ToolCall, ToolContext, ToolError, ToolResult
from mmrl.registry import ROOT


def add(first: int, second: int = 1) -> int:
    """Add numbers."""
    return first + second


def draw(ctx: ToolContext) -> str:
    """Draw a number."""
    ctx.emit_reward("drawn", 0.5)
    return str(ctx.generator.random())


def refuse(why: str) -> str:
    """Refuse."""
    raise ToolError(why)


def fail(why: str) -> str:
    """Fail."""
    raise KeyError(why)


def leave() -> str:
    """End the program."""
    sys.exit(3)


BASIC = [add, draw, refuse, fail, leave]
Given = dict[str, Any]


def one(tools: list[Any], name: str, arguments: Given | None = None, **limits: Any) -> Outcome:
    (outcome,) = Toolbox(tools, **limits).run([ToolCall(name, arguments or {})])
    return outcome


@pytest.mark.parametrize(
    ("call", "kind", "sentence"),
    [
        (ToolCall("ad", {}), "unknown_tool", "There is no tool 'ad'; did you mean 'add'?"),
        (ToolCall("zzz", {}), "unknown_tool", "There is no tool 'zzz'; known are add, draw, fail, leave, refuse."),
        (ToolCall("add", {"first": "1"}), "bad_arguments", "add: 'first' must be an integer, got '1'."),
        (
            ToolCall("add", {"frst": 1}),
            "bad_arguments",
            "add: 'first' is missing; unknown argument 'frst'; did you mean 'first'?",
        ),
        (ToolCall("draw", {"ctx": 1}), "bad_arguments", "draw: unknown argument 'ctx'."),
        (ToolCall("refuse", {"why": "There is no page 7."}), "tool_error", "There is no page 7."),
        (ToolCall("fail", {"why": "of\nme"}), "exception", "fail failed with KeyError: 'of\\nme'"),
        (ToolCall("fail", {"why": "x" * 999}), "exception", f"fail failed with KeyError: '{'x' * 296}..."),
        (ToolCall("leave", {}), "exception", "leave failed with SystemExit: 3"),
        (MalformedCall("The call is wrong.", "<tool_call>"), "malformed", "The call is wrong."),
    ],
)
def test_each_failure_has_its_kind_and_sentence_and_harms_no_other(call: Any, kind: str, sentence: str) -> None:
    good = ToolCall("add", {"first": 2})
    before, failed, after = Toolbox(BASIC).run([good, call, good])
    assert (failed.error, failed.result.text, failed.result.error) == (kind, sentence, True)
    assert [(other.error, other.result) for other in (before, after)] == [(None, ToolResult("3"))] * 2


def test_a_result_s_own_error_and_the_calls_beyond_a_turn_s_number() -> None:
    def half() -> ToolResult:
        """Do half."""
        return ToolResult("only half", error=True, metrics={"done": 0.5})

    outcomes = Toolbox([half], max_calls=2).run([ToolCall("half", {}), MalformedCall("Wrong.", ""), ToolCall("half", {})])
    assert [outcome.error for outcome in outcomes] == ["tool_error", "malformed", "too_many_calls"]
    assert outcomes[0].result == ToolResult("only half", error=True, metrics={"done": 0.5})
    assert outcomes[2].result.text == "A turn may have 2 calls at most; this one was not run."


RED, BLUE = Image.new("RGB", (3, 2), "red"), Image.new("RGB", (1, 1), "blue")


@pytest.mark.parametrize(
    ("value", "text", "pictures"),
    [
        ("a\ud800b", "a?b", []),
        (RED, "Image 3 is 3 x 2 pixels.", [RED]),
        (Image.new("L", (3, 2), 7), "Image 3 is 3 x 2 pixels.", [Image.new("RGB", (3, 2), (7, 7, 7))]),
        (Picture(RED, 1), "Image 3 is 3 x 2 pixels.", [RED]),
        (["one", RED, ("two", Picture(BLUE)), 7], "one\ntwo\n7\nImage 3 is 3 x 2 pixels.\nImage 4 is 1 x 1 pixels.", [RED, BLUE]),
        (ToolResult("all", (Picture(BLUE),)), "all\nImage 3 is 1 x 1 pixels.", [BLUE]),
        (["one", "two"], "one\ntwo", []),
        ([1, 2.5], "[1, 2.5]", []),
        ([], "[]", []),
        (True, "true", []),
        ({"a": np.float32(0.5), "b": np.arange(2)}, '{"a": 0.5, "b": [0, 1]}', []),
        (None, "The tool returned nothing.", []),
    ],
)
def test_what_a_tool_may_return(value: Any, text: str, pictures: list[Image.Image]) -> None:
    def give() -> Any:
        """Give it."""
        return value

    shown = [Picture(RED), Picture(RED)]
    (outcome,) = Toolbox([give]).run([ToolCall("give", {})], pictures=shown)
    assert outcome.error is None and outcome.result.text == text
    assert [picture.key for picture in outcome.result.pictures] == [Picture(image).key for image in pictures]


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (object(), "returned a object, which is neither text nor a picture nor JSON"),
        (Image.new("RGB", (0, 4)), "returned a picture of 0 x 4 pixels"),
        ([RED, {1, 2}], "returned a set, which is neither"),
    ],
)
def test_what_a_tool_may_not_return_is_its_failure(value: Any, sentence: str) -> None:
    def give() -> Any:
        """Give it."""
        return value

    outcome = one([give], "give")
    assert outcome.error == "exception" and sentence in outcome.result.text


def test_pictures_are_numbered_through_the_turn_and_long_text_is_cut() -> None:
    def paint(width: int) -> Any:
        """Paint."""
        return ["x" * 50, Image.new("RGB", (width, 1))]

    calls = [ToolCall("paint", {"width": 5}), ToolCall("paint", {}), ToolCall("paint", {"width": 7})]
    texts = [outcome.result.text for outcome in Toolbox([paint], max_text=20).run(calls, pictures=[Picture(RED)])]
    note = f"{'x' * 20}\n[cut: 20 of 50 characters are shown]"
    assert [texts[0], texts[2]] == [f"{note}\nImage 2 is 5 x 1 pixels.", f"{note}\nImage 3 is 7 x 1 pixels."]
    plain = Toolbox([paint], number_pictures=False).run(calls[:1])
    assert plain[0].result.text == "x" * 50


def test_an_exception_is_logged_once_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    box = Toolbox(BASIC)
    with caplog.at_level(logging.ERROR):
        for why in "abc":
            box.run([ToolCall("fail", {"why": why}), ToolCall("refuse", {"why": why})])
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == ["tool fail failed"]
    assert "raise KeyError(why)" in caplog.text


class Meeting:
    """Waits until ``parties`` calls run at the same time."""

    def __init__(self, parties: int) -> None:
        self.barrier = threading.Barrier(parties)

    def __call__(self, place: int) -> str:
        """Meet."""
        self.barrier.wait(timeout=30)
        return str(place)


def test_calls_run_at_the_same_time_and_results_come_in_their_order() -> None:
    outcomes = Toolbox([Meeting(4)], timeout_s=30).run([ToolCall("meeting", {"place": place}) for place in range(4)])
    assert [outcome.result.text for outcome in outcomes] == list("0123")


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What hangs until the test is over."""
    event = threading.Event()
    yield event
    event.set()


def test_a_late_call_is_left_behind_and_harms_no_other(gate: threading.Event) -> None:
    def hang(ctx: ToolContext) -> str:
        """Hang."""
        ctx.emit_reward("late", 1.0)
        gate.wait()
        ctx.emit_reward("later", 1.0)
        return "at last"

    box = Toolbox([hang, add], timeout_s=0.05, concurrency=1)  # what is late must give its place to the next
    calls = [ToolCall("hang", {}), ToolCall("add", {"first": 1}), ToolCall("hang", {})]
    outcomes: list[Outcome] = []
    waiting = threading.Thread(target=lambda: outcomes.extend(box.run(calls)), daemon=True)
    waiting.start()
    waiting.join(30)
    assert [outcome.error for outcome in outcomes] == ["timeout", None, "timeout"]
    assert outcomes[0].result == ToolResult("hang did not return within 0.05 s.", error=True)
    assert outcomes[0].rewards == () and outcomes[0].seconds >= 0.05
    assert box.left_behind == 2
    gate.set()
    deadline = time.monotonic() + 30
    while box.left_behind and time.monotonic() < deadline:
        time.sleep(0.01)
    assert box.left_behind == 0
    assert one([add], "add", {"first": 1}).error is None


def test_ordered_tools_run_in_order_and_not_beside_one_that_hangs(gate: threading.Event) -> None:
    class Session:
        """Adds to what it keeps."""

        ordered = True

        def __call__(self, word: str, ctx: ToolContext) -> str:
            """Add a word."""
            if word == "hang":
                gate.wait()
            kept = ctx.state.get("kept", "")
            time.sleep(0.01)  # two at the same time would both read what the other has not yet written
            ctx.state["kept"] = kept + word
            return ctx.state["kept"]

    box, state = Toolbox([Session(), add], timeout_s=0.05), {}
    said = [outcome.result.text for outcome in box.run([ToolCall("session", {"word": word}) for word in "abcd"], state=state)]
    assert said == ["a", "ab", "abc", "abcd"]
    calls = [ToolCall("session", {"word": word}) for word in ("e", "hang", "f")]
    outcomes = box.run([*calls, ToolCall("add", {"first": 1})], state=state)
    assert [outcome.error for outcome in outcomes] == [None, "timeout", "not_started", None]
    assert outcomes[2].result.text == "session was not run, because a call before it did not return in time."
    assert state == {"kept": "abcde"}


def test_random_numbers_belong_to_the_call_and_not_to_its_threads() -> None:
    box, calls = Toolbox(BASIC), [ToolCall("draw", {})] * 3

    def texts(**where: Any) -> list[str]:
        return [outcome.result.text for outcome in box.run(calls, **where)]

    first = texts(seed=1, conversation=2, turn=3)
    assert first == texts(seed=1, conversation=2, turn=3) and len(set(first)) == 3
    assert [outcome.result.text for outcome in Toolbox(BASIC, concurrency=1).run(calls, seed=1, conversation=2, turn=3)] == first
    for other in (texts(seed=2, conversation=2, turn=3), texts(seed=1, conversation="2a", turn=3), texts(seed=1, conversation=2)):
        assert not set(other) & set(first)
    assert [outcome.rewards for outcome in box.run(calls)] == [(("drawn", 0.5),)] * 3


def test_a_tool_sees_the_conversation() -> None:
    def look(image: int, ctx: ToolContext) -> str:
        """Look."""
        ctx.state["seen"] = image
        return f"{ctx.picture(image).image.size} {ctx.timeout_s}"

    state: dict[str, Any] = {}
    box = Toolbox([look], timeout_s=4)
    good, bad = box.run(
        [ToolCall("look", {"image": 2}), ToolCall("look", {"image": 3})], pictures=[Picture(BLUE), Picture(RED)], state=state
    )
    assert good.result.text == "(3, 2) 4" and state["seen"] in (2, 3)
    assert bad.error == "tool_error" and "no image 3; the conversation has images 1 to 2" in bad.result.text


NAMES = st.sampled_from(["add", "draw", "refuse", "fail", "leave", "ad", ""]) | st.text()
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=5)
ARGUMENTS = st.dictionaries(st.sampled_from(["first", "second", "why", "ctx", "self"]) | st.text(), VALUES, max_size=3)


@settings(max_examples=50)
@given(st.lists(st.builds(ToolCall, NAMES, ARGUMENTS) | st.builds(MalformedCall, st.text(), st.text()), max_size=4))
def test_whatever_is_called_every_call_has_a_result(calls: list[Any]) -> None:
    outcomes = Toolbox(BASIC, max_calls=3).run(calls)
    assert len(outcomes) == len(calls)
    for outcome in outcomes:
        assert outcome.result.error == (outcome.error is not None)
        outcome.result.text.encode()


def test_at_most_so_many_run_at_a_time_over_all_threads() -> None:
    workers, lock, now, most = Workers(2), threading.Lock(), 0, 0

    def piece() -> None:
        nonlocal now, most
        with lock:
            now, most = now + 1, max(most, now + 1)
        time.sleep(0.005)
        with lock:
            now -= 1

    threads = [threading.Thread(target=workers.run, args=([[piece, piece]] * 3, 30.0)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (now, most) == (0, 2)


def test_a_late_call_that_returns_at_last_frees_no_second_place() -> None:
    workers, gate = Workers(1), threading.Event()
    assert [[piece.status for piece in chain] for chain in workers.run([[gate.wait]], 0.01)] == [["late"]]
    gate.set()
    deadline = time.monotonic() + 30
    while workers.left_behind and time.monotonic() < deadline:
        time.sleep(0.01)
    meeting = threading.Barrier(2)

    def meet() -> bool:
        try:
            meeting.wait(timeout=0.3)
        except threading.BrokenBarrierError:
            return False
        return True

    assert [chain[0].value for chain in workers.run([[meet], [meet]], 30.0)] == [False, False]


def test_what_hangs_does_not_keep_the_program_from_ending() -> None:
    code = (
        "import threading\nfrom mmrl.calling import Toolbox\nfrom mmrl.messages import ToolCall\n"
        "def hang() -> str:\n    '''Hang.'''\n    threading.Event().wait()\n"
        "print(Toolbox([hang], timeout_s=0.01).run([ToolCall('hang', {})])[0].error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, check=True)
    assert done.stdout.strip() == "timeout"


def test_two_tools_of_one_name_are_refused_and_closing_reaches_those_that_hold_something() -> None:
    with pytest.raises(ConfigError, match=r"tools .*:add and .*:add are both called 'add'"):
        Toolbox([add, add])

    class Held:
        """Holds something."""

        closed = 0

        def __call__(self) -> str:
            return ""

        def close(self) -> None:
            self.closed += 1

    held = Held()
    Toolbox([add, held]).close()
    assert held.closed == 1


# ---------------------------------------------------------------- tools of a YAML file


class Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    tools: list[ToolBlock]


def test_tools_are_functions_and_components() -> None:
    crop, wait = load_tools(["tools.crop:crop", {"target": "tools.crop:crop"}])
    assert crop is wait and crop.__name__ == "crop"
    assert [schema.name for schema in Toolbox([crop]).schemas] == ["crop"]


def test_a_component_may_list_several_tools() -> None:
    class Server:
        """Two tools, as a program that serves tools has them."""

        tools = (add, draw)

        def __init__(self, config: None) -> None:
            assert config is None

    block = ToolBlock("tools.server:Server", component=Component("tools.server:Server", Server, None))
    assert block.build() == load_tools([block]) == [add, draw]


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        ("tools.crop:corp", "'tools.0': target 'tools.crop:corp': tools.crop has no 'corp'; did you mean 'crop'?"),
        ("tools.crp:crop", "'tools.0': target 'tools.crp:crop': there is no module 'tools.crp'; did you mean 'tools.crop'?"),
        ("crop", "'tools.0': target 'crop' is not of the form 'package.module:Name', such as 'policies.pi0:Pi0'"),
        (
            "tools.crop:MAX_ENLARGE",
            "'tools.0': target 'tools.crop:MAX_ENLARGE' is a int, but a tool is a function or a component",
        ),
        (
            {"target": "tools.crop:crop", "box": 1},
            "unknown key 'tools.0.box': tools.crop:crop is a function, which has no fields",
        ),
        ({"box": 1}, "'tools.0' must be a target such as 'tools.crop:crop', or a mapping with one, got {'box': 1}"),
        (
            "tools.images:check_box",
            "'tools.0': tool tools.images:check_box: parameter 'picture' has a type hint that JSON has no word",
        ),
        ("mmrl.messages:ToolCall", "'tools.0': mmrl.messages:ToolCall has no Config, so it is no component"),
    ],
)
def test_a_wrong_block_has_its_sentence_with_its_key(block: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_tools([block])
    assert str(error.value).startswith(sentence)
    with pytest.raises(Problems) as problems:
        validate(Block, {"tools": [block]})
    assert str(problems.value.as_config_error({"tools": [block]})) == str(error.value)


def test_blocks_are_fields_of_a_config() -> None:
    config = validate(Block, {"tools": ["tools.crop:crop", {"target": "tools.flip:flip"}]})
    assert config.model_dump() == {"tools": ["tools.crop:crop", "tools.flip:flip"]}
    assert load_tools(config.tools) == load_tools(["tools.crop:crop", "tools.flip:flip"])
    with pytest.raises(ConfigError) as error:
        load_tools(["tools.crop:corp", "tools.crop:crop", "tools.flp:flip"], where="environment.tools")
    assert [line.partition(":")[0] for line in str(error.value).splitlines()] == [
        "'environment.tools.0'",
        "'environment.tools.2'",
    ]
