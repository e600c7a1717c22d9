"""A block ``target: package.module:Name`` of a YAML file, validated: the class it names and that class's own Config.

A component class has a nested ``Config``, a pydantic dataclass, whose fields stand flat beside ``target``:

    target: simulators.tabletop:Tabletop
    families: [reach]

A Config may itself have fields annotated ``Component``. Values are checked strictly (the string "3" is no number, 2.0 is no
integer, an integer is a float), and everything wrong is reported at once as Problems, each with the key it belongs to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, get_args

from pydantic import BaseModel, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, ErrorDetails, core_schema, to_jsonable_python

from mmrl.errors import ConfigError, RegistryError
from mmrl.registry import did_you_mean, resolve

Loc = tuple[str | int, ...]
SHOWN = 5  # problems in one message


@dataclass(frozen=True)
class Problem:
    """One thing wrong at ``loc``; reads ``{before}'dotted.key'{after}``."""

    loc: Loc
    before: str
    after: str

    def sentence(self, data: Any, prefix: str = "") -> str:
        key = ".".join(part for part in (prefix, dotted(self.loc, data)) if part)
        return f"{self.before}'{key}'{self.after}" if key else f"{self.before}the configuration{self.after}"


class Problems(ValueError):
    """Everything wrong with a block; a ValueError, so that pydantic carries it out of a nested component."""

    def __init__(self, items: Sequence[Problem]) -> None:
        super().__init__("; ".join(item.sentence(None) for item in items))
        self.items = list(items)

    def as_config_error(self, data: Any, *, source: str = "", prefix: str = "") -> ConfigError:
        """The first few problems as one ConfigError, a line each; ``source`` is the file, ``prefix`` the block's own key."""
        lines = list(dict.fromkeys(item.sentence(data, prefix) for item in self.items))
        more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        head = f"{source}: " if source else ""
        return ConfigError("\n".join(head + line for line in [*lines[:SHOWN], *more]))


@dataclass(frozen=True)
class Component:
    """A class to build and the config to build it with."""

    target: str
    cls: type
    config: Any

    @classmethod
    def parse(cls, block: Any) -> Component:
        """Validate a mapping of ``target`` and fields. Raises Problems."""
        if isinstance(block, Component):
            return block
        if not isinstance(block, Mapping):
            raise Problems([Problem((), "", f" must be a mapping with a 'target', got {block!r}")])
        target = block.get("target")
        if not isinstance(target, str):
            raise Problems([Problem(("target",), "", " is missing; it names a class, such as 'policies.pi0:Pi0'")])
        try:
            found = resolve(target)
        except RegistryError as error:
            raise Problems([Problem(("target",), "", f": {error}")]) from error
        config_type = getattr(found, "Config", None)
        if config_type is None:
            raise Problems([Problem(("target",), "", f": {target} has no Config, so it is no component")])
        return cls(target, found, validate(config_type, {key: value for key, value in block.items() if key != "target"}))

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """``cls(config, *args, **kwargs)``."""
        return self.cls(self.config, *args, **kwargs)

    def override(self, changes: Mapping[str, Any], where: str = "") -> Component:
        """This component with some fields changed, validated again. ``where`` is the dotted key of ``changes`` in messages."""
        if not changes:
            return self
        block = merge(self.dump(), changes)
        try:
            return Component.parse(block)
        except Problems as error:
            raise error.as_config_error(block, prefix=where) from error

    def dump(self) -> dict[str, Any]:
        """The block that parses to this component, every field spelled out."""
        return {"target": self.target, **jsonable(self.config)}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        dump = core_schema.plain_serializer_function_ser_schema(lambda component: component.dump())
        return core_schema.no_info_plain_validator_function(cls.parse, serialization=dump)


def jsonable(config: Any) -> dict[str, Any]:
    """A pydantic model or dataclass as plain data that ``validate`` turns back into an equal one; infinity survives."""
    return to_jsonable_python(TypeAdapter(type(config)).dump_python(config), inf_nan_mode="constants")


def validate(kind: Any, data: Mapping[str, Any]) -> Any:
    """An instance of ``kind`` (a pydantic model or dataclass) from plain data. Raises Problems with every key that is wrong.

    The detour over JSON is what makes pydantic's strict mode right for YAML: a list may become a tuple and a string a path,
    but no string becomes a number.
    """
    try:
        return TypeAdapter(kind).validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise Problems(list(_problems(kind, error, data))) from error


def merge(old: Any, new: Any, where: str = "") -> Any:
    """``new`` laid over ``old``, both plain data; neither is changed.

    Mappings merge key by key, except that a mapping with another ``target`` replaces the whole block. A mapping laid over a list
    addresses its items, by index, by their ``name`` or, where they have none, by the ``class_name`` of their target. Anything
    else replaces. Raises ConfigError if a mapping names no item, or more than one.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        if "target" in new and new["target"] != old.get("target"):
            return dict(new)
        merged = {str(key): merge(old.get(key), value, f"{where}.{key}" if where else str(key)) for key, value in new.items()}
        return {**old, **merged}
    if isinstance(old, list) and isinstance(new, Mapping):
        items = list(old)
        for key, value in new.items():
            index = _index(items, str(key), where)
            items[index] = merge(items[index], value, f"{where}.{key}")
        return items
    return new


def dotted(loc: Loc, data: Any) -> str:
    """``loc`` as the user would write it: list items by name, and without pydantic's tags for the members of a union.

    >>> dotted(("stages", 0, "weight", "list[float]", 1), {"stages": [{"name": "improve", "weight": [0, "x"]}]})
    'stages.improve.weight.1'
    """
    parts: list[str] = []
    for position, part in enumerate(loc):
        if isinstance(data, Mapping) and part in data:
            data = data[part]
            parts.append(str(part))
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
            parts.append(str(data["name"]) if isinstance(data, Mapping) and "name" in data else str(part))
        elif position == len(loc) - 1 and (data is None or isinstance(data, Mapping)):
            parts.append(str(part))  # a key that is missing; every other part that data lacks is a union's tag
    return ".".join(parts)


def class_name(target: str) -> str:
    """What a block is called that has no name of its own, after its class (``mmrl.rewards.form:FormOfAll``: form_of_all)."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", target.rpartition(":")[2]).lower()


def _item_name(item: Any, index: int) -> str:
    """How overrides address an item of a list: by its name, or else its class, or else its place."""
    if not isinstance(item, Mapping):
        return str(index)
    if "name" in item:
        return str(item["name"])
    return class_name(item["target"]) if isinstance(item.get("target"), str) else str(index)


def _index(items: list[Any], key: str, where: str) -> int:
    names = [_item_name(item, index) for index, item in enumerate(items)]
    if names.count(key) > 1:
        places = ", ".join(str(index) for index, name in enumerate(names) if name == key)
        raise ConfigError(f"'{where}.{key}' may mean any of {names.count(key)} items; address one by its place, {places}")
    if key in names:
        return names.index(key)
    if key.isdigit() and int(key) < len(items):
        return int(key)
    raise ConfigError(f"unknown key '{where}.{key}'{did_you_mean(key, names)}")


def _problems(kind: Any, error: ValidationError, data: Any) -> Iterator[Problem]:
    """Pydantic's errors as Problems; those of one key in a union (float | list[float]) become one."""
    seen: dict[str, Problem] = {}
    for details in error.errors(include_url=False):
        for problem in _translate(kind, details):
            key = problem.before + dotted(problem.loc, data)
            if key in seen and problem.after not in seen[key].after:
                alternative = problem.after.removeprefix(" must be").rpartition(", got")[0]
                problem = replace(seen[key], after=seen[key].after.replace(", got", f" or{alternative}, got", 1))
            seen[key] = problem
    yield from seen.values()


def _translate(kind: Any, details: ErrorDetails) -> Iterator[Problem]:
    loc, code, message = details["loc"], details["type"], details["msg"]
    cause = details.get("ctx", {}).get("error")
    if isinstance(cause, Problems):
        for inner in cause.items:
            yield Problem((*loc, *inner.loc), inner.before, inner.after)
    elif code in ("extra_forbidden", "unexpected_keyword_argument"):
        yield Problem(loc, "unknown key ", did_you_mean(str(loc[-1]), field_types(_type_at(kind, loc[:-1]))))
    elif code == "missing" and isinstance(loc[-1], int):  # of a tuple
        yield Problem(loc[:-1], "", f" {_WISHES['too_short']}")
    elif code in ("missing", "missing_argument"):
        yield Problem(loc, "", " is missing")
    elif cause is not None or code == "value_error":
        yield Problem(loc, "", f": {message.removeprefix('Value error, ')}")
    else:
        yield Problem(loc, "", f" {_wish(code, message)}, got {details['input']!r}")


# Pydantic's words, which are JSON's, in YAML's and in this project's.
_WISHES = {
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "dataclass_type": "must be a mapping",
    "int_from_float": "must be an integer",
    "too_short": "has too few items",
    "too_long": "has too many items",
}


def _wish(code: str, message: str) -> str:
    own = message.replace("Input should be a valid", "must be a").replace("Input should", "must").replace("String should", "must")
    return _WISHES.get(code) or own.replace("a integer", "an integer")


def field_types(kind: Any) -> dict[str, Any]:
    """Field name -> annotation of a pydantic model or dataclass; empty for anything else."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: info.annotation for name, info in kind.model_fields.items()}
    if hasattr(kind, "__pydantic_fields__"):
        return {name: info.annotation for name, info in kind.__pydantic_fields__.items()}
    if isinstance(kind, type) and is_dataclass(kind):
        return {f.name: f.type for f in fields(kind)}
    return {}


def _type_at(kind: Any, loc: Loc) -> Any:
    """The model at ``loc`` inside ``kind``: through optionals, lists and mappings; None where there is none."""
    for member in [kind, *get_args(kind)]:
        known = field_types(member)
        if known and not loc:
            return member
        if loc and loc[0] in known:
            return _type_at(known[str(loc[0])], loc[1:])
    inner = [_type_at(member, rest) for member in get_args(kind) for rest in (loc, loc[1:]) if member is not type(None)]
    return next((found for found in inner if found is not None), None)
