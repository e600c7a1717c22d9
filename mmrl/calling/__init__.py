"""Between a model's text and a tool's result: how tools are described, calls read and written, and calls run."""

from mmrl.calling.formats import CallFormat, CodeCalls, HermesCalls, MalformedCall
from mmrl.calling.loading import ToolBlock, load_tools
from mmrl.calling.schema import describe
from mmrl.calling.toolbox import ErrorKind, Outcome, Toolbox

__all__ = [
    "CallFormat",
    "CodeCalls",
    "ErrorKind",
    "HermesCalls",
    "MalformedCall",
    "Outcome",
    "ToolBlock",
    "Toolbox",
    "describe",
    "load_tools",
]
