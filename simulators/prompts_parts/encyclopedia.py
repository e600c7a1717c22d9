"""An invented world of devices, inventors, towns and rivers: its facts, its pages and pictures, and the folder that holds them.

Devices have a picture and a page; inventors and towns a page. What a page says is true nowhere else, so nobody knows it by heart.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from mmrl.errors import ConfigError, DataError
from simulators.prompts_parts.drawing import COLOURS, SHAPES, Colour, shape

CORPUS, PICTURES, SETTINGS = "corpus.jsonl", "pictures", "settings.json"
_VERSION = 1  # of the facts, pages and pictures below; another number refuses older folders
SYLLABLES = tuple(consonant + vowel for vowel in "aoiue" for consonant in "bklmnrstvdgpz")
_PAPERS: tuple[Colour, ...] = ((250, 250, 245), (225, 235, 250), (250, 235, 215), (225, 245, 225))
_CELLS = 4  # of a picture, each with a shape
_APART = 3  # cells, at least, in which two pictures differ
FILLERS = (
    "It is known in many lands.",
    "There are songs about it.",
    "Few have seen it at night.",
    "It was once on a coin.",
    "Children learn of it at school.",
    "A book tells its story.",
    "It was lost and found again.",
    "Its name is older than its fame.",
)


@dataclass(frozen=True)
class Relation:
    """A fact of a page. of: whose page it stands on. lead: the words before its value, the only such on the page."""

    of: str
    lead: str

    def read(self, page: str) -> str | None:
        """The value, from the text of a page or from what a search shows of it."""
        found = re.search(rf"\b{self.lead} (\w+)", page)
        return found[1] if found else None


RELATIONS = {
    "inventor": Relation("device", "invented by"),
    "town": Relation("device", "in the town of"),
    "year": Relation("device", "in the year"),
    "colour": Relation("device", "case is"),
    "home": Relation("inventor", "born in"),
    "river": Relation("town", "on the river"),
}
_PAGES = {
    "device": "{name} is a device. It was invented by {inventor} in the town of {town} in the year {year}. Its case is {colour}.",
    "inventor": "{name} is an inventor. {name} was born in {home} and had many ideas.",
    "town": "{name} is a town. It lies on the river {river} and has a market.",
}


@dataclass(frozen=True)
class Settings:
    """What decides the folder's files."""

    seed: int
    entities: int
    towns: int
    rivers: int
    syllables: int
    picture_size: int
    filler: int


@dataclass(frozen=True)
class Entry:
    """A page. facts: relation -> value. glyphs, paper: what a device's picture shows, (shape, colour) by cell, and on what."""

    name: str
    kind: str
    facts: Mapping[str, str]
    text: str
    glyphs: tuple[tuple[str, str], ...] = ()
    paper: int = 0

    @property
    def id(self) -> str:
        return self.name.lower()


class World:
    """Everything there is, from the settings alone. entries: by name; devices: their names, in order."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        generator = random.Random(f"world/{settings.seed}")
        names = iter(_names(generator, settings))
        rivers = [next(names) for _ in range(settings.rivers)]
        towns = [next(names) for _ in range(settings.towns)]
        self.devices = tuple(next(names) for _ in range(settings.entities))
        self.entries: dict[str, Entry] = {}
        for town in towns:
            self._add(generator, town, "town", {"river": generator.choice(rivers)})
        seen: list[tuple[tuple[str, str], ...]] = []
        for device in self.devices:
            inventor = next(names)
            self._add(generator, inventor, "inventor", {"home": generator.choice(towns)})
            facts = {
                "inventor": inventor,
                "town": generator.choice(towns),
                "year": str(generator.randint(1800, 1999)),
                "colour": generator.choice(list(COLOURS)),
            }
            self._add(generator, device, "device", facts, _glyphs(generator, seen), generator.randrange(len(_PAPERS)))

    def follow(self, device: str, path: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
        """Where the relations of ``path`` lead from a device, and the ids of the pages that say so."""
        name, read = device, []
        for relation in path:
            entry = self.entries[name]
            read.append(entry.id)
            name = entry.facts[relation]
        return name, tuple(read)

    def picture(self, device: str, size: int, generator: random.Random | None = None) -> Image.Image:
        """A device as the encyclopedia shows it; with a generator as somebody else took it: moved, larger, in other light."""
        entry = self.entries[device]
        vary = (lambda low, high: 0.0) if generator is None else generator.uniform
        scale, light = 1 + vary(-0.06, 0.06), 1 + vary(-0.12, 0.12)
        x, y = size * (0.5 + vary(-0.03, 0.03)), size * (0.5 + vary(-0.03, 0.03))
        image = Image.new("RGB", (size, size), _lit(_PAPERS[entry.paper], light))
        pen, step = ImageDraw.Draw(image), size * 0.23 * scale
        for place, (name, colour) in enumerate(entry.glyphs):
            left, top = x - 2 * step + (place % 2) * 2 * step, y - 2 * step + (place // 2) * 2 * step
            box = (left + step * 0.15, top + step * 0.15, left + step * 1.85, top + step * 1.85)
            shape(pen, name, box, _lit(COLOURS[colour], light))
        return image

    def _add(self, generator: random.Random, name: str, kind: str, facts: dict[str, str], *picture: Any) -> None:
        more = generator.sample(FILLERS, self.settings.filler)
        text = " ".join([_PAGES[kind].format(name=name, **facts), *more])
        self.entries[name] = Entry(name, kind, facts, text, *picture)


def _names(generator: random.Random, settings: Settings) -> list[str]:
    """All names of two syllables that no page has as a word, in random order."""
    syllables, words = SYLLABLES[: settings.syllables], set(re.findall(r"\w+", " ".join((*_PAGES.values(), *FILLERS)).lower()))
    names = [(first + second).capitalize() for first in syllables for second in syllables if first + second not in words]
    generator.shuffle(names)
    return names


def _glyphs(generator: random.Random, seen: list[tuple[tuple[str, str], ...]]) -> tuple[tuple[str, str], ...]:
    """Shapes and colours that differ from all seen before; added to them."""
    while True:
        made = tuple((generator.choice(SHAPES), generator.choice(list(COLOURS))) for _ in range(_CELLS))
        if all(sum(one != other for one, other in zip(made, glyphs, strict=True)) >= _APART for glyphs in seen):
            seen.append(made)
            return made


def _lit(colour: Colour, light: float) -> Colour:
    red, green, blue = (min(255, max(0, round(part * light))) for part in colour)
    return red, green, blue


# ---------------------------------------------------------------- on disk


def ensure(folder: Path, world: World) -> None:
    """The folder holds the world's corpus and pictures afterwards, and did if it was there already.

    It is filled under another name and renamed when whole; of two processes that do so at once, one throws its own away. Raises
    ConfigError if it holds anything else or cannot be written, DataError if a file of it was changed.
    """
    if not _holds_nothing(folder):
        _verify(folder, world.settings)
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror}); set 'folder' to one that can") from error
    try:
        part.chmod(0o755)  # mkdtemp's folders are for one user alone
        _write(part, world)
        os.replace(part, folder)  # only over nothing, or an empty folder
    except OSError as error:
        if _holds_nothing(folder):
            raise ConfigError(f"{folder}: cannot be written ({error.strerror}); set 'folder' to one that can") from error
        _verify(folder, world.settings)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _holds_nothing(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def _write(folder: Path, world: World) -> None:
    (folder / PICTURES).mkdir()
    lines = []
    for entry in world.entries.values():
        images = [f"{PICTURES}/{entry.id}.png"] if entry.kind == "device" else []
        for image in images:
            world.picture(entry.name, world.settings.picture_size).save(folder / image)
        lines.append(json.dumps({"id": entry.id, "title": entry.name, "text": entry.text, "images": images}))
    (folder / CORPUS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    about = {"version": _VERSION, "settings": dataclasses.asdict(world.settings), "content": _content(folder)}
    (folder / SETTINGS).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _verify(folder: Path, settings: Settings) -> None:
    try:
        about = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        version, found, content = about["version"], dict(about["settings"]), about["content"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = "set 'folder' to one that is empty or not there yet"
        raise ConfigError(f"{folder}: holds something else than an encyclopedia of questions; {remedy}") from error
    wanted = dataclasses.asdict(settings)
    other = [f"{key} {found.get(key)} instead of {value}" for key, value in wanted.items() if found.get(key) != value]
    other += [f"version {version} instead of {_VERSION}"] if version != _VERSION else []
    if other:
        raise ConfigError(f"{folder}: holds the encyclopedia of other settings ({', '.join(other)}); set 'folder' to another one")
    if content != _content(folder):
        raise DataError(f"{folder}: files of the encyclopedia were changed; delete the folder, and it is made anew")


def _content(folder: Path) -> str:
    """A hash of the names and bytes of the corpus and the pictures."""
    whole = hashlib.sha256()
    for file in sorted([folder / CORPUS, *(folder / PICTURES).glob("*")]):
        try:
            data = file.read_bytes()
        except OSError:
            data = b""
        whole.update(f"{file.relative_to(folder).as_posix()}:{len(data)}:".encode() + data)
    return whole.hexdigest()
