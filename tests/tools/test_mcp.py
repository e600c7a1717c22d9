"""MCP: a real server over its standard input and over HTTP; what it offers, what it answers, and what happens when it dies."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mmrl.calling import Toolbox
from mmrl.component import Component, Problems
from mmrl.errors import ConfigError
from mmrl.messages import ToolCall, ToolContext, ToolError, ToolResult
from mmrl.registry import install_command
from tests.tools.servers import free_port

if importlib.util.find_spec("mcp") is None and os.environ.get("CI") != "true":
    pytest.skip(f"mcp is not installed; install it with: {install_command('mcp')}", allow_module_level=True)

from tools.mcp import McpTools

SERVER = str(Path(__file__).with_name("mcp_server.py"))
PROGRAM: dict[str, Any] = {"command": sys.executable, "args": (SERVER,)}


def service(port: int) -> subprocess.Popen[bytes]:
    """The server over HTTP, which answers once this returns."""
    process = subprocess.Popen([sys.executable, SERVER, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    for line in process.stderr:
        if b"running on" in line:
            break
    threading.Thread(target=process.stderr.read, daemon=True).start()  # so that its log never fills the pipe
    return process


@pytest.fixture(scope="module")
def by_stdio() -> Iterator[McpTools]:
    with McpTools(McpTools.Config(**PROGRAM)) as tools:
        yield tools


@pytest.fixture(scope="module")
def by_http() -> Iterator[McpTools]:
    port = free_port()
    process = service(port)
    try:
        with McpTools(McpTools.Config(url=f"http://127.0.0.1:{port}/mcp")) as tools:
            yield tools
    finally:
        process.kill()
        process.wait()


@pytest.fixture(params=["by_stdio", "by_http"])
def tools(request: pytest.FixtureRequest) -> McpTools:
    return request.getfixturevalue(request.param)


def call(tools: McpTools, name: str, timeout_s: float = 20.0, **arguments: Any) -> ToolResult:
    tool = {tool.name: tool for tool in tools}[name]
    return tool(ctx=ToolContext(timeout_s=timeout_s), **arguments)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_tools_are_as_the_server_describes_them(tools: McpTools) -> None:
    assert [tool.name for tool in tools] == ["add", "draw", "broken_picture", "fail", "nap", "die", "who"]
    add = tools.tools[0]
    assert add.description == "Add two numbers."
    assert add.parameters["properties"]["a"]["type"] == "integer" and add.parameters["properties"]["b"]["default"] == 2
    assert add.parameters["required"] == ["a"]


def test_text_and_pictures_come_back(tools: McpTools) -> None:
    assert call(tools, "add", a=40).text == "42" and call(tools, "add", a=1, b=-3).text == "-2"
    assert call(tools, "add", a=40).details == {"structured": {"result": 42}}
    drawn = call(tools, "draw", colour="red")
    assert drawn.text == "before\nafter"
    assert [(picture.image.size, picture.image.getpixel((2, 2))) for picture in drawn.pictures] == [((6, 4), (255, 0, 0))]


def test_errors_are_sentences_for_the_model(tools: McpTools) -> None:
    with pytest.raises(ToolError, match="valid integer"):
        call(tools, "add", a="many")
    with pytest.raises(ToolError, match="required"):
        call(tools, "add")
    with pytest.raises(ToolError, match="fail"):
        call(tools, "fail", why="bad luck")
    with pytest.raises(ToolError, match=r"picture \(image/png\) that cannot be read"):
        call(tools, "broken_picture")
    assert call(tools, "add", a=1).text == "3" and tools.restarts == 0


def test_a_slow_call_ends_and_others_go_on_beside_it(tools: McpTools) -> None:
    with ThreadPoolExecutor(6) as pool:
        slow = pool.submit(call, tools, "nap", 0.4, seconds=30.0)
        quick = [pool.submit(call, tools, "nap", seconds=0.01 * number) for number in range(5)]
        assert [future.result().text for future in quick] == [f"rested {0.01 * number}" for number in range(5)]
        with pytest.raises(ToolError, match=r"did not answer within 0.4 s"):
            slow.result()
    assert call(tools, "add", a=1).text == "3"


def test_a_program_that_dies_is_started_again(caplog: pytest.LogCaptureFixture) -> None:
    with McpTools(McpTools.Config(**PROGRAM)) as tools:
        first = call(tools, "who").text
        with ThreadPoolExecutor(2) as pool:
            beside = pool.submit(call, tools, "nap", seconds=30.0)
            time.sleep(0.1)
            for broken in (pool.submit(call, tools, "die"), beside):
                with pytest.raises(ToolError, match="stopped during the call"):
                    broken.result()
        second = call(tools, "who").text
        assert second != first and not alive(int(first)) and tools.restarts == 1
        assert len([record for record in caplog.records if "has stopped during" in record.message]) == 1
        assert tools.tools[0].name == "add" and call(tools, "add", a=2).text == "4"
    assert not alive(int(second))


def test_a_service_that_dies_is_connected_to_again() -> None:
    port = free_port()
    process = service(port)
    with McpTools(McpTools.Config(url=f"http://127.0.0.1:{port}/mcp")) as tools:
        try:
            assert call(tools, "add", a=1).text == "3"
            process.kill()
            process.wait()
            with pytest.raises(ToolError, match="stopped during the call"):
                call(tools, "add", a=1)
            with pytest.raises(ToolError, match="cannot be started or reached again"):
                call(tools, "add", a=1)
            process = service(port)
            assert call(tools, "add", a=1).text == "3" and tools.restarts == 1
        finally:
            process.kill()
            process.wait()


def test_close_ends_the_program_and_the_thread() -> None:
    before = set(threading.enumerate())
    tools = McpTools(McpTools.Config(**PROGRAM))
    pid = int(call(tools, "who").text)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(call, tools, "nap", seconds=30.0)
        time.sleep(0.1)
        tools.close()
        tools.close()
        with pytest.raises(ToolError):
            running.result()
    assert not alive(pid) and set(threading.enumerate()) <= before
    with pytest.raises(ToolError, match="has been closed"):
        call(tools, "add", a=1)


def test_some_tools_under_names_of_their_own() -> None:
    with McpTools(McpTools.Config(**PROGRAM, only=("add",), prefix="tiny_")) as tools:
        assert [tool.name for tool in tools] == ["tiny_add"] and call(tools, "tiny_add", a=3).text == "5"
    before = set(threading.enumerate())
    with pytest.raises(ConfigError, match=r"has no tool 'sub'.*it has add, draw"):
        McpTools(McpTools.Config(**PROGRAM, only=("sub",)))
    assert set(threading.enumerate()) <= before


def test_a_program_sees_only_the_variables_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWN_SECRET", "s3cret")
    monkeypatch.setenv("PASSED", "yes")
    with McpTools(McpTools.Config(**PROGRAM, env={"GIVEN": "1"}, pass_env=("PASSED",))) as tools:
        assert [call(tools, "who", variable=name).text for name in ("OWN_SECRET", "PASSED", "GIVEN")] == ["unset", "yes", "1"]


SILENT = ("-c", "import time; time.sleep(60)")
LOUD = ("-c", "import sys; sys.exit('the licence has run out')")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"command": "/nowhere/server"}, "No such file"),
        ({"command": sys.executable, "args": LOUD}, "it said: the licence has run out"),
        ({"command": sys.executable, "args": SILENT, "start_timeout_s": 0.3}, r"did not answer within 0.3 s \(start_timeout_s\)"),
        ({"command": sys.executable, "pass_env": ("NO_SUCH_VARIABLE",)}, "environment variable NO_SUCH_VARIABLE is not set"),
        ({"url": f"http://127.0.0.1:{free_port()}/mcp"}, "connection attempts failed"),
        ({"url": "http://127.0.0.1:1/mcp", "header_env": {"Authorization": "NO_SUCH_VARIABLE"}}, "NO_SUCH_VARIABLE is not set"),
    ],
)
def test_a_server_that_cannot_be_used_is_one_sentence(fields: dict[str, Any], sentence: str) -> None:
    before = set(threading.enumerate())
    with pytest.raises(ConfigError, match=sentence) as caught:
        McpTools(McpTools.Config(**fields))
    assert "\n" not in str(caught.value) and set(threading.enumerate()) <= before


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "set either command"),
        ({"command": "x", "url": "http://x"}, "set either command"),
        ({"url": "http://x", "args": ["y"]}, "args belongs to a program"),
        ({"command": "x", "header_env": {"A": "B"}}, "header_env belongs to a server that is reached by url"),
    ],
)
def test_a_wrong_block_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Problems, match=sentence):
        Component.parse({"target": "tools.mcp:McpTools", **fields})


def test_a_server_s_tools_are_called_through_a_toolbox(tools: McpTools) -> None:
    toolbox = Toolbox(list(tools))
    schema = next(schema for schema in toolbox.schemas if schema.name == "add")
    assert schema.description == "Add two numbers." and schema.parameters["required"] == ["a"]
    calls = [ToolCall("add", {"a": 40}), ToolCall("add", {"summand": 1}), ToolCall("draw", {"colour": "red"})]
    right, wrong, drawn = toolbox.run(calls, pictures=[], state={}, seed=0, conversation=0, turn=0)
    assert right.result.text == "42" and right.error is None
    assert wrong.error == "bad_arguments" and "summand" in wrong.result.text
    assert len(drawn.result.pictures) == 1 and "Image 1 is 6 x 4 pixels." in drawn.result.text
    toolbox.close()
