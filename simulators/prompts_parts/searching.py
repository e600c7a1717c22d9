"""Questions that start from a device of the encyclopedia, and how an expert answers them with its searches."""

from __future__ import annotations

import random
import re
from typing import Any

from mmrl.answers import Normalised
from mmrl.messages import Picture, ToolCall, ToolResult
from mmrl.transcripts import Question, Turn
from simulators.prompts_parts.common import Said, Split
from simulators.prompts_parts.encyclopedia import RELATIONS, World

# Path from the device -> the question. The number of relations is that of pages to read.
ASKED: dict[tuple[str, ...], str] = {
    (): "What is the name of {device}?",
    ("inventor",): "Who invented {device}?",
    ("town",): "In which town was {device} invented?",
    ("year",): "In which year was {device} invented?",
    ("colour",): "Which colour is the case of {device}?",
    ("inventor", "home"): "In which town was the inventor of {device} born?",
    ("town", "river"): "On which river is the town where {device} was invented?",
    ("inventor", "home", "river"): "On which river is the town where the inventor of {device} was born?",
}
MOST_HOPS = max(map(len, ASKED))
UNKNOWN = "unknown"
_LOOK, _SEARCH = "I search for the picture.", "I search for {name}."
_HIT = re.compile(r"^\[\d+\] (?P<title>.+?) \(id: ", re.MULTILINE)  # as tools/text_search.py and image_search.py write one


def asked_about(world: World, split: Split) -> tuple[str, ...]:
    """The devices that a split asks about: every fifth is held out."""
    return tuple(name for rank, name in enumerate(world.devices) if (rank % 5 == 4) == (split == "held_out"))


def search_question(config: Any, world: World, generator: random.Random) -> Question:
    """A question of ``simulators.prompts:SearchQuestions``."""
    hops = generator.choice(config.hops)
    path = generator.choice([path for path in ASKED if len(path) == hops])
    device = generator.choice(asked_about(world, config.split))
    answer, pages = world.follow(device, path)
    evidence = (*pages, answer)  # the search for the picture alone brings up the device's id, but not what its page says
    searches = tuple(config.text_search for _ in path)
    details: dict[str, Any] = {"operations": searches, "evidence": evidence, "path": path}
    if config.start == "name":
        parts: tuple[str | Picture, ...] = (ASKED[path].format(device=f"the device {device}"),)
        details["name"] = device
    else:
        picture = Picture(world.picture(device, config.picture_size, generator))
        parts = (picture, ASKED[path].format(device="this device"))
        details["operations"] = (config.image_search, *searches)
    return Question(f"search_{hops}", parts, (answer,), Normalised((answer,)), details)


def search_turn(question: Question, turns: tuple[Turn, ...], names: tuple[str, str]) -> Said:
    """What an expert says: it searches for the picture if there is one, then for one page after the other, and reads each result.

    names: of the search for pictures and of that for texts. It reads what the tools have said and nothing else; where they have
    not found the page, it answers UNKNOWN.
    """
    found = [call for turn in turns for call in turn.calls if call.error is None and call.name in names]
    picture, pages = (next((call.result for call in found if call.name == names[0]), None)), _pages(found, names[1])
    name = str(question.details.get("name", ""))
    if not name:
        if picture is None:
            return _LOOK, (ToolCall(names[0], {"image": 1}),)
        titles = _HIT.findall(picture.text)
        if not titles:
            return UNKNOWN, ()
        name = titles[0]
    for relation in question.details["path"]:
        if name not in pages:
            return _SEARCH.format(name=name), (ToolCall(names[1], {"query": name}),)
        value = RELATIONS[relation].read(_passage(pages[name], name))
        if value is None:
            return UNKNOWN, ()
        name = value
    return name, ()


def _pages(calls: list[Any], tool: str) -> dict[str, ToolResult]:
    """What was searched for, and what came."""
    return {str(call.arguments.get("query")): call.result for call in calls if call.name == tool}


def _passage(result: ToolResult, title: str) -> str:
    """The text below the hit of this title; empty where there is none."""
    hits = list(_HIT.finditer(result.text))
    ends = [*(hit.start() for hit in hits), len(result.text)][1:]
    return next((result.text[hit.end() : end] for hit, end in zip(hits, ends, strict=True) if hit["title"] == title), "")
