"""A resolved configuration for a reader: YAML with what each field means beside it."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from mmrl.component import Component
from mmrl.config import RunConfig, plain, written

_COLUMN = 52  # where comments begin


def describe(config: RunConfig) -> str:
    """``config`` as YAML, every field spelled out, each followed by its description as a comment."""
    return "\n".join(_mapping(plain(config), config, "")) + "\n"


@functools.cache
def descriptions(kind: type) -> dict[str, str]:
    """Field -> first paragraph of the string under it in the source of ``kind``, or of a class that it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        for field, below in itertools.pairwise(_statements(base)):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(inspect.cleandoc(text).split("\n\n")[0].split())
    return found


def _statements(kind: type) -> list[ast.stmt]:
    """The body of a class, or nothing where Python has no source of it."""
    try:
        parsed = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    except (OSError, TypeError):
        return []
    return parsed.body if isinstance(parsed, ast.ClassDef) else []


def _mapping(block: Mapping[str, Any], owner: Any, indent: str) -> Iterator[str]:
    """Lines of ``block``, the plain form of ``owner`` (a model, a component, or anything without descriptions)."""
    owner = owner.config if isinstance(owner, Component) else owner
    notes = descriptions(type(owner))
    for key, value in block.items():
        child = owner.get(key) if isinstance(owner, Mapping) else getattr(owner, key, None)
        yield from _entry(f"{indent}{key}:", value, child, indent, notes.get(key))


def _entry(head: str, value: Any, owner: Any, indent: str, note: str | None) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        yield _with_note(head, note)
        yield from _mapping(value, owner, indent + "  ")
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        yield _with_note(head, note)
        for item, item_owner in zip(value, owner, strict=True):
            lines = list(_mapping(item, item_owner, indent + "    "))
            yield f"{indent}  - {lines[0].strip()}"
            yield from lines[1:]
    else:
        text = written(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
        yield _with_note(f"{head} {text}", note)


def _with_note(line: str, note: str | None) -> str:
    return f"{line:<{_COLUMN}} # {note}" if note else line
