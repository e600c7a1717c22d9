"""A resolved configuration for a reader: YAML with what each field means beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from mmrl.component import Component
from mmrl.config import RunConfig, plain

_COLUMN = 52  # where comments begin


def describe(config: RunConfig) -> str:
    """``config`` as YAML, every field spelled out, each followed by its description as a comment."""
    return "\n".join(_mapping(plain(config), config, "")) + "\n"


def _mapping(block: Mapping[str, Any], owner: Any, indent: str) -> Iterator[str]:
    """Lines of ``block``, the plain form of ``owner`` (a model, a component, or anything without descriptions)."""
    owner = owner.config if isinstance(owner, Component) else owner
    described: Mapping[str, FieldInfo] = getattr(type(owner), "__pydantic_fields__", {})
    for key, value in block.items():
        child = owner.get(key) if isinstance(owner, Mapping) else getattr(owner, key, None)
        info = described.get(key)
        yield from _entry(f"{indent}{key}:", value, child, indent, info.description if info else None)


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
        text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).removesuffix("...\n").strip()
        yield _with_note(f"{head} {text}", note)


def _with_note(line: str, note: str | None) -> str:
    return f"{line:<{_COLUMN}} # {' '.join(note.split())}" if note else line
