"""Tools of a YAML file: ``tools: [tools.crop:crop, {target: "tools.text_search:TextSearch", corpus: pages.jsonl}]``."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from mmrl.calling.schema import describe
from mmrl.component import Component, Problem, Problems
from mmrl.errors import ConfigError, RegistryError
from mmrl.registry import find


@dataclass(frozen=True)
class ToolBlock:
    """One item of such a list, validated: a function, or a component. A Config may have fields annotated with it."""

    target: str
    function: Any = None
    component: Component | None = None

    @classmethod
    def parse(cls, block: Any) -> ToolBlock:
        """From a target, or a mapping of ``target`` and a component's fields. Raises Problems."""
        if isinstance(block, ToolBlock):
            return block
        fields = {"target": block} if isinstance(block, str) else block
        if not isinstance(fields, Mapping) or not isinstance(fields.get("target"), str):
            raise Problems(
                [Problem((), "", f" must be a target such as 'tools.crop:crop', or a mapping with one, got {block!r}")]
            )
        target = fields["target"]
        try:
            found = find(target, _offered)
            if isinstance(found, type):
                return cls(target, component=Component.parse(fields))
            if not inspect.isfunction(found):
                raise RegistryError(f"target '{target}' is a {type(found).__name__}, but a tool is a function or a component")
            describe(found)
        except (RegistryError, ConfigError) as error:
            raise Problems([Problem((), "", f": {error}")]) from error
        unused = sorted(str(key) for key in fields if key != "target")
        if unused:
            raise Problems([Problem((key,), "unknown key ", f": {target} is a function, which has no fields") for key in unused])
        return cls(target, function=found)

    def build(self) -> list[Any]:
        """The tool, or the tools that a component's ``tools`` lists."""
        if self.component is None:
            return [self.function]
        built = self.component.build()
        several: Any = getattr(built, "tools", None)
        if several is None:
            return [built]
        listed: Any = several() if callable(several) else several
        return list(listed)

    def dump(self) -> str | dict[str, Any]:
        """What parses to this block."""
        return self.target if self.component is None else self.component.dump()

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        dump = core_schema.plain_serializer_function_ser_schema(lambda block: block.dump())
        return core_schema.no_info_plain_validator_function(cls.parse, serialization=dump)


def load_tools(blocks: Sequence[Any], where: str = "tools") -> list[Any]:
    """The tools that ``blocks`` name, built. ``where``: their dotted key. Raises ConfigError with everything that is wrong."""
    parsed: list[ToolBlock] = []
    wrong: list[Problem] = []
    for index, block in enumerate(blocks):
        try:
            parsed.append(ToolBlock.parse(block))
        except Problems as error:
            wrong += [Problem((index, *item.loc), item.before, item.after) for item in error.items]
    if wrong:
        raise Problems(wrong).as_config_error(list(blocks), prefix=where)
    return [tool for block in parsed for tool in block.build()]


def _offered(own: dict[str, Any]) -> Iterable[str]:
    """Of what a module defines: its public functions and its components."""
    return [
        name
        for name, value in own.items()
        if not name.startswith("_") and (inspect.isfunction(value) or (isinstance(value, type) and hasattr(value, "Config")))
    ]
