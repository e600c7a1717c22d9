"""What a model is told of a tool, and which arguments pass: both from the tool's type hints and docstring.

A tool is a function, or an object with ``__call__`` (an instance of a component, say). The schema is what
``transformers.utils.get_json_schema`` would write, so that a chat template prints what models were trained on.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, make_dataclass, replace
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter
from pydantic.errors import PydanticUserError

from mmrl.calling.results import short
from mmrl.component import Problems, validate
from mmrl.errors import ConfigError
from mmrl.messages import ToolSchema
from mmrl.registry import GUESS, did_you_mean

SHORT = 200  # characters of what is said about an argument, which holds its value
HIDDEN = "ctx"  # the parameter that takes the ToolContext
_NAME = re.compile(r"[A-Za-z_][\w-]{0,63}")
_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_HEADING = re.compile(r"(Args|Arguments|Parameters|Returns|Raises|Yields|Examples?):\s*")
_ARGUMENT = re.compile(r"(?P<indent>\s*)(?P<names>\w+(, \w+)*)( \([^)]*\))?:\s+(?P<text>.*)")


class BadArguments(Exception):
    """Arguments that do not fit, in a sentence for the model."""


@dataclass(frozen=True)
class _Parameter:
    hint: Any
    required: bool


def describe(tool: Any) -> ToolSchema:
    """Name, description and parameters of ``tool``.

    The docstring's lines ``name: text`` (below ``Args:`` or not, and with their continuation) describe parameters, the rest
    describes the tool. An object that brings ``description`` and ``parameters`` (a JSON schema), as a tool of another program
    does, is taken at its word. Raises ConfigError that names function and parameter where a hint has no JSON schema.
    """
    where, name = place(tool), _name(tool)
    if not _NAME.fullmatch(name):
        raise ConfigError(f"tool {where}: '{name}' is no name for a tool; write letters, digits, _ and - (at most 64)")
    if isinstance(getattr(tool, "parameters", None), Mapping):
        return ToolSchema(name, str(tool.description), tool.parameters)
    parameters = _parameters(tool)
    description, notes = _docstring(tool, {*parameters, HIDDEN})
    if not description:
        raise ConfigError(f"tool {where} has no docstring, which tells the model what the tool does")
    properties = {key: _json_schema(where, key, parameter.hint) for key, parameter in parameters.items()}
    properties = {key: {**schema, "description": notes[key]} if key in notes else schema for key, schema in properties.items()}
    required = [key for key, parameter in parameters.items() if parameter.required]
    schema = {"type": "object", "properties": properties}
    return ToolSchema(name, description, {**schema, "required": required} if required else schema)


def checker(tool: Any) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A function from arguments, as JSON has them, to those that ``tool`` takes; raises BadArguments.

    Types are taken as written: "3" is no number and 2.0 no integer, but an integer is a float and a list a tuple. Of a tool that
    brings its own JSON schema only the names are checked.
    """
    schema = describe(tool)
    if isinstance(getattr(tool, "parameters", None), Mapping):
        return lambda arguments: _named(schema, arguments)
    kind = _dataclass({key: (parameter.hint, parameter.required) for key, parameter in _parameters(tool).items()})
    return lambda arguments: _checked(schema.name, kind, arguments)


def place(tool: Any) -> str:
    """Where a tool is defined, as a YAML file would name it."""
    owner = tool if hasattr(tool, "__qualname__") else type(tool)
    return f"{owner.__module__}:{owner.__qualname__}"


def takes_context(tool: Any) -> bool:
    return HIDDEN in inspect.signature(tool).parameters


def _name(tool: Any) -> str:
    own = getattr(tool, "name", None)
    if isinstance(own, str):
        return own
    return tool.__name__ if hasattr(tool, "__name__") else _WORDS.sub("_", type(tool).__name__).lower()


def _parameters(tool: Any) -> dict[str, _Parameter]:
    where = place(tool)
    try:
        signature = inspect.signature(tool)
        hints = get_type_hints(tool if hasattr(tool, "__name__") else type(tool).__call__, include_extras=True)
    except (NameError, TypeError, ValueError) as error:
        raise ConfigError(f"tool {where}: its type hints cannot be read ({error})") from error
    found: dict[str, _Parameter] = {}
    for key, parameter in signature.parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigError(f"tool {where}: parameter '{key}' is {parameter.kind.description}; a call passes names and values")
        if key == HIDDEN:
            continue
        if key not in hints:
            raise ConfigError(f"tool {where}: parameter '{key}' has no type hint")
        found[key] = _Parameter(hints[key], parameter.default is parameter.empty)
    return found


# ---------------------------------------------------------------- schemas


def _json_schema(where: str, key: str, hint: Any) -> dict[str, Any]:
    try:
        schema = TypeAdapter(hint).json_schema()
    except PydanticUserError as error:
        schema, cause = {}, error
    else:
        cause = None
    if not schema or "$defs" in schema or "$ref" in schema:
        raise ConfigError(
            f"tool {where}: parameter '{key}' has a type hint that JSON has no word for, {hint!r}; use int, float, bool, str, "
            "Literal, list, tuple, dict[str, ...] or a union of them"
        ) from cause
    return _like_transformers(schema)


def _like_transformers(schema: Any) -> Any:
    """pydantic's JSON schema in the dialect of chat templates: no titles, ``nullable`` instead of a union with null."""
    if isinstance(schema, list):
        return [_like_transformers(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {key: _like_transformers(value) for key, value in schema.items() if key != "title" and value not in ({}, True)}
    members = plain.pop("anyOf", None)
    if members is not None:
        others = [member for member in members if member != {"type": "null"}]
        plain |= others[0] if len(others) == 1 else {"anyOf": others}
        plain |= {"nullable": True} if len(others) < len(members) else {}
    return {**({"type": plain["type"]} if "type" in plain else {}), **plain}


def _docstring(tool: Any, names: set[str]) -> tuple[str, dict[str, str]]:
    """The tool's description, a line a paragraph, and what its docstring says of each parameter of ``names``."""
    call = None if hasattr(tool, "__name__") else type(tool).__call__
    text = inspect.cleandoc((call and call.__doc__) or tool.__doc__ or "")
    notes: dict[str, str] = {}
    paragraphs: list[list[str]] = [[]]
    current: tuple[str, ...] = ()  # whom a line that continues another one is about
    indent, skipping, after_blank = 0, False, False
    for line in text.splitlines():
        deep = len(line) - len(line.lstrip())
        argument = _ARGUMENT.fullmatch(line)
        if heading := _HEADING.fullmatch(line):
            current, skipping = (), heading[1] not in ("Args", "Arguments", "Parameters")
        elif not line.strip():
            paragraphs.append([])
        elif skipping and deep:
            pass
        elif argument and names.issuperset(argument["names"].split(", ")):
            current, indent = tuple(argument["names"].split(", ")), deep
            notes |= dict.fromkeys(current, argument["text"].strip())
        elif current and (deep > indent or not after_blank):
            notes |= {key: f"{notes[key]} {line.strip()}" for key in current}
        else:
            current, skipping = (), False
            paragraphs[-1].append(line.strip())
        after_blank = not line.strip()
    return "\n".join(" ".join(lines) for lines in paragraphs if lines), notes


# ---------------------------------------------------------------- arguments


def _dataclass(parameters: Mapping[str, tuple[Any, bool]]) -> type:
    """A dataclass with these fields, name -> (hint, required), which pydantic validates."""
    # What is not passed is left to the tool's own default: the field's is never read.
    fields = [(key, hint) if required else (key, hint, field(default=None)) for key, (hint, required) in parameters.items()]
    config = ConfigDict(extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)
    return make_dataclass("Arguments", fields, kw_only=True, namespace={"__pydantic_config__": config})


def _checked(name: str, kind: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    try:
        valid = validate(kind, arguments)
    except Problems as error:
        items = [replace(item, before=item.before.replace("key", "argument")) for item in error.items]
        raise _bad(name, [item.sentence(arguments) for item in items]) from error
    return {key: getattr(valid, key) for key in arguments}


def _named(schema: ToolSchema, arguments: Mapping[str, Any]) -> dict[str, Any]:
    known = schema.parameters.get("properties", {})
    closed = not schema.parameters.get("additionalProperties")
    wrong = [f"unknown argument '{key}'{did_you_mean(key, known, GUESS)}" for key in arguments if closed and key not in known]
    wrong += [f"'{key}' is missing" for key in schema.parameters.get("required", ()) if key not in arguments]
    if wrong:
        raise _bad(schema.name, wrong)
    return dict(arguments)


def _bad(name: str, sentences: list[str]) -> BadArguments:
    said = dict.fromkeys(short(sentence, SHORT).replace("the configuration", "the arguments") for sentence in sentences)
    return BadArguments(full_stop(f"{name}: {'; '.join(said).replace('?;', ';')}"))


def full_stop(sentence: str) -> str:
    return sentence if sentence.endswith(("?", ".", "!")) else f"{sentence}."
