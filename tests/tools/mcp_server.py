"""A tiny MCP server, written with the official SDK: over standard input and output, or over HTTP at a port that is given."""

from __future__ import annotations

import asyncio
import io
import os
import sys

from mcp.server.mcpserver import Image, MCPServer
from PIL import Image as Pictures

server = MCPServer("tiny")


@server.tool()
def add(a: int, b: int = 2) -> int:
    """Add two numbers."""
    return a + b


@server.tool(structured_output=False)
def draw(colour: str) -> list[str | Image]:
    """A picture of one colour between two lines of text."""
    data = io.BytesIO()
    Pictures.new("RGB", (6, 4), colour).save(data, "PNG")
    return ["before", Image(data=data.getvalue(), format="png"), "after"]


@server.tool(structured_output=False)
def broken_picture() -> Image:
    return Image(data=b"no picture", format="png")


@server.tool()
def fail(why: str) -> str:
    raise ValueError(why)


@server.tool()
async def nap(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return f"rested {seconds}"


@server.tool()
def die() -> str:
    os._exit(3)


@server.tool()
def who(variable: str = "") -> str:
    """This process, or an environment variable of it."""
    return os.environ.get(variable, "unset") if variable else str(os.getpid())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        server.run()
