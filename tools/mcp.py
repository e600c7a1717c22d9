"""The tools of any MCP server (Model Context Protocol) as tools here, through the official Python SDK.

A server is a program that is started and spoken to over its standard input and output, or a service spoken to over streamable
HTTP. One thread with an event loop of its own holds the connection. When the server dies, the call that was under way fails with
a sentence, and the server is started or connected to again for the next one; a call is never repeated by itself, since nobody
knows what it has done already.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import io
import logging
import os
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import CancelledError
from typing import Any

import httpx2
from mcp.client import Client, Transport
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError
from mcp.types import CONNECTION_CLOSED, CallToolResult, ImageContent, TextContent
from mcp.types import Tool as Description
from PIL import Image
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from mmrl.errors import ConfigError
from mmrl.messages import Picture, ToolContext, ToolError, ToolResult, as_seen

LOG = logging.getLogger("mmrl.tools.mcp")
_PAGES = 100  # of a list of tools; more is a server that never ends


class McpTools:
    """The tools of one server, as ``tools``. Safe between threads. ``close`` ends the server and the thread.

    Raises ConfigError where the server cannot be started or reached, or lacks a tool that is wanted.
    """

    @dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
    class Config:
        """Fields of a ``tools.mcp:McpTools`` block."""

        command: str | None = None
        """Program that is the server; either this or url."""
        args: tuple[str, ...] = ()
        """Its arguments."""
        env: dict[str, str] = Field(default_factory=dict)
        """Environment variables for it; of this process's own it gets PATH, HOME and the like alone."""
        pass_env: tuple[str, ...] = ()
        """Names of environment variables of this process that it gets too (keys, say)."""
        cwd: str | None = None
        """Folder that it is started in."""
        url: str | None = None
        """Address of a server that speaks streamable HTTP; either this or command."""
        header_env: dict[str, str] = Field(default_factory=dict)
        """HTTP header -> environment variable that holds its value (keys, say)."""
        only: tuple[str, ...] | None = None
        """Tools that are offered; null: all."""
        prefix: str = ""
        """What stands before the names of the tools, where two servers have equal ones."""
        start_timeout_s: float = Field(default=30.0, gt=0)
        """Time to start or reach the server and to list its tools."""
        timeout_s: float = Field(default=30.0, gt=0)
        """Time for a call; a call that has less takes less."""
        log: str | None = None
        """File for what the program writes to its standard error; null: it is shown only if the program cannot be started."""

        @model_validator(mode="after")
        def _consistent(self) -> McpTools.Config:
            if (self.command is None) == (self.url is None):
                raise ValueError("set either command (a program to start) or url (a server to reach), and not both")
            programs = [key for key in ("args", "env", "pass_env", "cwd", "log") if getattr(self, key)]
            if self.url is not None and programs:
                raise ValueError(f"{programs[0]} belongs to a program that is started; leave it out, or set command and not url")
            if self.command is not None and self.header_env:
                raise ValueError("header_env belongs to a server that is reached by url; leave it out, or use pass_env")
            return self

    def __init__(self, config: Config) -> None:
        self.config = config
        self._server = _Server(config)
        try:
            self.tools = tuple(self._wanted(self._server.start()))
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[McpTool]:
        return iter(self.tools)

    def __enter__(self) -> McpTools:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def restarts(self) -> int:
        """How often the server was started again."""
        return self._server.restarts

    def close(self) -> None:
        self._server.close()

    def _wanted(self, listed: list[Description]) -> Iterator[McpTool]:
        known, only = [tool.name for tool in listed], self.config.only
        for name in only or ():
            if name not in known:
                raise ConfigError(
                    f"the MCP server {_place(self.config)} has no tool '{name}' (mcp only); it has {', '.join(known)}"
                )
        for tool in listed:
            if only is None or tool.name in only:
                if "ctx" in (tool.input_schema.get("properties") or {}):
                    where = f"tool '{tool.name}' of {_place(self.config)}"
                    raise ConfigError(f"{where} has an argument 'ctx', which is taken; set 'only' without it")
                yield McpTool(self._server, tool, self.config)


class McpTool:
    """One tool. name, description, parameters (JSON schema of its arguments): as the server gives them."""

    def __init__(self, server: _Server, tool: Description, config: McpTools.Config) -> None:
        self._server, self._tool, self._timeout_s = server, tool.name, config.timeout_s
        self.name = config.prefix + tool.name
        self.description = tool.description or tool.title or ""
        self.parameters: Mapping[str, Any] = tool.input_schema

    def __call__(self, /, *, ctx: ToolContext, **arguments: Any) -> ToolResult:
        """Calls the server. Raises ToolError with the server's own words where it refuses or fails."""
        return _result(self._server.call(self._tool, arguments, min(self._timeout_s, ctx.timeout_s)))


class _Server:
    """The connection, in a thread with an event loop; ``_serve`` is the one task that opens and closes it, as the SDK demands.

    Whoever needs a connection awaits ``_attempt``, None if it failed; after a death the next call begins a new one.
    """

    def __init__(self, config: McpTools.Config) -> None:
        self._config, self.restarts, self._closed = config, -1, False
        self._env = config.env | {name: _variable(name) for name in config.pass_env}
        self._headers = {header: _variable(name) for header, name in config.header_env.items()}
        try:
            self._log = tempfile.TemporaryFile("w+") if config.log is None else open(config.log, "a+")  # noqa: SIM115 (until close)
        except OSError as error:
            raise ConfigError(f"{config.log}: cannot be written ({error.strerror}); set 'log' to another file") from error
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=f"mcp {_place(config)}", daemon=True)
        self._attempt: asyncio.Future[Client | None] | None = None
        self._wanted, self._dead = asyncio.Event(), asyncio.Event()  # like _attempt, touched by the loop alone
        self._failure = ""
        self._main = self._loop.create_task(self._serve())

    def start(self) -> list[Description]:
        """Connects. The tools that the server has. Raises ConfigError."""
        self._thread.start()
        tools = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        if tools is None:
            raise ConfigError(f"the MCP server {_place(self._config)} cannot be used: {self._failure}{self._last_words()}")
        return tools

    def call(self, name: str, arguments: Mapping[str, Any], timeout_s: float) -> CallToolResult:
        """Raises ToolError."""
        if self._closed:
            raise ToolError("The tool's server has been closed.")
        try:
            return asyncio.run_coroutine_threadsafe(self._call(name, arguments, timeout_s), self._loop).result()
        except CancelledError as error:
            raise ToolError("The tool's server has been closed.") from error

    def close(self) -> None:
        """Ends the server, the connection and the thread; twice is once."""
        if self._closed:
            return
        self._closed = True
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._main.cancel)
            self._thread.join()
        self._log.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._main)
        while calls := asyncio.all_tasks(self._loop):
            for task in calls:
                task.cancel()
            self._loop.run_until_complete(asyncio.wait(calls))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _start(self) -> list[Description] | None:
        client = await self._connection()
        return None if client is None else await _listed(client)

    def _connection(self) -> asyncio.Future[Client | None]:
        if self._attempt is None:
            self._attempt = self._loop.create_future()
            self._wanted.set()
        return asyncio.shield(self._attempt)

    async def _serve(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            attempt = self._attempt
            assert attempt is not None
            try:
                async with (
                    asyncio.timeout(self._config.start_timeout_s) as limit,
                    self._transport() as transport,
                    Client(transport) as client,
                ):
                    await _listed(client)  # what it reads of a tool it needs for calls
                    limit.reschedule(None)
                    self.restarts += 1
                    attempt.set_result(client)
                    await self._dead.wait()
            except asyncio.CancelledError:
                raise
            except BaseException as error:  # whatever a transport raises; whoever asked for the connection reports it
                self._failure = _reason(error, self._config)
            self._dead.clear()
            if self._attempt is attempt:
                self._attempt = None
            if not attempt.done():
                attempt.set_result(None)

    @contextlib.asynccontextmanager
    async def _transport(self) -> AsyncIterator[Transport]:
        config = self._config
        if config.url is None:
            program = StdioServerParameters(command=config.command or "", args=list(config.args), env=self._env, cwd=config.cwd)
            yield stdio_client(program, errlog=self._log)
            return
        limits = httpx2.Timeout(config.start_timeout_s, read=None)  # calls have limits of their own
        async with httpx2.AsyncClient(headers=self._headers, timeout=limits) as http:
            yield streamable_http_client(config.url, http_client=http)

    async def _call(self, name: str, arguments: Mapping[str, Any], timeout_s: float) -> CallToolResult:
        late = f"The tool did not answer within {timeout_s:g} s."
        attempt = None
        try:
            async with asyncio.timeout(timeout_s):
                connection = self._connection()
                attempt, client = self._attempt, await connection
                if client is None:
                    raise ToolError("The tool's server has stopped and cannot be started or reached again.")
                return await client.call_tool(name, dict(arguments))
        except TimeoutError as error:
            raise ToolError(late) from error
        except MCPError as error:
            if error.code != CONNECTION_CLOSED:
                raise ToolError(f"The tool's server refuses the call: {error.message[:500]}") from error
            if attempt is self._attempt:  # the first of several calls to notice
                LOG.warning("the MCP server %s has stopped during '%s'; it is started again", _place(self._config), name)
                self._attempt = None
                self._dead.set()
            raise ToolError(
                "The tool's server stopped during the call; it is started again, and the call may be repeated."
            ) from error
        except (RuntimeError, ValueError) as error:  # a result that breaks the tool's own schema, or needs a person's answer
            raise ToolError(f"The tool's answer cannot be used: {str(error)[:500]}") from error

    def _last_words(self) -> str:
        """The last line that the program wrote to its standard error."""
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return f"; it said: {lines[-1][:200]}" if lines else ""


async def _listed(client: Client) -> list[Description]:
    found: list[Description] = []
    cursor: str | None = None
    for _ in range(_PAGES):
        page = await client.list_tools(cursor=cursor)
        found += page.tools
        cursor = page.next_cursor
        if cursor is None:
            break
    return found


def _result(answer: CallToolResult) -> ToolResult:
    """Text and images in the server's order; what else it gave is named in the text. Raises ToolError where the tool says so."""
    texts, pictures = [], []
    for part in answer.content:
        if isinstance(part, TextContent):
            texts.append(part.text)
        elif isinstance(part, ImageContent):
            pictures.append(_picture(part))
        else:
            resource = getattr(part, "resource", part)
            texts.append(
                getattr(resource, "text", None)
                or f"[{part.type.replace('_', ' ')} {getattr(resource, 'uri', '')}]".replace(" ]", "]")
            )
    text = "\n".join(texts)
    if answer.is_error:
        raise ToolError(text or "The tool failed without saying why.")
    return ToolResult(text, tuple(pictures), details={"structured": answer.structured_content})


def _picture(part: ImageContent) -> Picture:
    try:
        with Image.open(io.BytesIO(base64.b64decode(part.data, validate=True))) as image:
            return Picture(as_seen(image))
    except (OSError, ValueError, binascii.Error, Image.DecompressionBombError) as error:
        raise ToolError(f"The tool gave a picture ({part.mime_type}) that cannot be read.") from error


def _reason(error: BaseException, config: McpTools.Config) -> str:
    """The first cause of an exception, which task groups wrap."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, TimeoutError):
        return f"it did not answer within {config.start_timeout_s:g} s (start_timeout_s)"
    return str(error) or type(error).__name__


def _place(config: McpTools.Config) -> str:
    return config.url or " ".join((config.command or "", *config.args))[:120]


def _variable(name: str) -> str:
    value = os.environ.get(name)
    if value is None:
        raise ConfigError(f"the environment variable {name} is not set; the MCP server needs it")
    return value
