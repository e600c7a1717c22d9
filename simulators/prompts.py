"""Questions for conversations: about pictures that must be turned or cropped, about an encyclopedia that must be searched, about
classes and counts that are plain to see, and any JSONL data set.

Each class keeps ``mmrl.transcripts.Questions``; all but the data set also ``ExpertQuestions``. A task id and the config determine
a question, in any process. What is held out, training never asks. ``texts`` writes down what a tokenizer must know of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from mmrl.errors import DataError
from mmrl.registry import resolve
from mmrl.transcripts import Question, Turn
from simulators.prompts_parts.common import Drawn, Said, Split, generator_of
from simulators.prompts_parts.drawing import COLOURS, SHAPES
from simulators.prompts_parts.encyclopedia import CORPUS, FILLERS, SYLLABLES, Settings, World, ensure
from simulators.prompts_parts.lines import read
from simulators.prompts_parts.looking import WIDER, Background, Kind, Where, detail, orientation, painter, picture_turn
from simulators.prompts_parts.playing import blind_mark, play, texts
from simulators.prompts_parts.searching import MOST_HOPS, asked_about, search_question, search_turn
from simulators.prompts_parts.seeing import DIGITS, FIELDS, classification, counting, drawn_examples

__all__ = [
    "ClassificationQuestions",
    "CountingQuestions",
    "DetailQuestions",
    "JsonlQuestions",
    "OrientationQuestions",
    "SearchQuestions",
    "blind_mark",
    "play",
    "texts",
]
_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
Operation = Literal["rotate_90", "rotate_180", "rotate_270", "flip_horizontal", "flip_vertical"]


def _ordered(key: str, value: tuple[int, int], least: int, most: int) -> None:
    if not least <= value[0] <= value[1] <= most:
        raise ValueError(f"{key} must be [fewest, most] between {least} and {most}; got {list(value)}")


def _distinct(key: str, value: tuple[Any, ...]) -> None:
    if not value or len(set(value)) != len(value):
        raise ValueError(f"{key} must be distinct, at least one; got {list(value)}")


class DetailQuestions:
    """What is on a small sign somewhere in a large picture: seen small, it cannot be read; it must be cropped.

    The expert calls ``crop`` (after ``rotate`` or ``flip``). Details: operations, box of the sign, area that the expert crops (in
    the upright picture), place (number of the field). Held out: pairs of place and value, for words and numbers the values;
    photographs.
    """

    @dataclass(frozen=True, kw_only=True, config=_STRICT)
    class Config(Drawn):
        """Fields of a ``simulators.prompts:DetailQuestions`` block; the defaults are the easy setting."""

        kinds: tuple[Kind, ...] = ("digit",)
        """What signs show: digit, letter, colour, number (three digits), word."""
        size: int = Field(default=504, ge=56)
        """Side of the picture, in pixels. Shown a ninth as wide (56), default signs are hardly legible; a third as wide, well."""
        grid: Literal[1, 2, 3] = 3
        """Fields along a side; each sign has a field of its own. With one, the sign is anywhere, and nothing is held out."""
        sign: tuple[int, int] = (28, 40)
        """Smallest and largest height of a sign, in pixels."""
        signs: tuple[int, int] = (1, 3)
        """Fewest and most signs; one of them is asked about."""
        fading: bool = True
        """Whether what is on a sign vanishes where the picture is shown small; else it is black on white."""
        blotches: float = Field(default=45.0, ge=0, le=60)
        """Standard deviation of the grey blotches behind writing that vanishes; fewer make it easier to read, near and far."""
        background: Background = "plain"
        """plain, texture (soft blotches), photograph (of scikit-image; extra ``prompts``)."""
        where: Where = "words"
        """How the question says which sign: words (upper left), cell or box (of its field, of its surroundings: left, top, right,
        bottom), spot (a large spot beside it, of a colour)."""
        turned: tuple[Operation, ...] = ()
        """Operations of which one makes the picture upright, which a bar along its top shows; none: it is upright."""
        enlarge: float = Field(default=1.0, ge=1, le=16)
        """How much the expert enlarges what it crops."""

        @model_validator(mode="after")
        def _possible(self) -> DetailQuestions.Config:
            _distinct("kinds", self.kinds)
            _ordered("signs", self.signs, 1, min(self.grid**2, len(COLOURS)) if self.where == "spot" else self.grid**2)
            room = self.size // self.grid // (2 if self.where == "spot" else 1) - 1
            widest = max(WIDER.get(kind, 1) for kind in self.kinds)
            _ordered("sign", self.sign, 10, min(room, int((self.size // self.grid - 1) / widest)))
            return self

    def __init__(self, config: Config) -> None:
        self.config, self._paint = config, painter(config.background, config.split)

    def question(self, task_id: int) -> Question:
        return detail(self.config, self._paint, generator_of(self.config, task_id))

    def next_turn(self, question: Question, turns: tuple[Turn, ...]) -> Said:
        return picture_turn(question, turns)


class OrientationQuestions:
    """What a picture shows that is turned or mirrored: b, d, p and q are one another then; a bar marks the top.

    The expert calls ``rotate`` or ``flip``. Details: operations (none if it is upright), box (all of it), ink. Held out: inks of
    a letter that an operation makes upright (one of five), words, photographs.
    """

    @dataclass(frozen=True, kw_only=True, config=_STRICT)
    class Config(Drawn):
        """Fields of a ``simulators.prompts:OrientationQuestions`` block."""

        kinds: tuple[Literal["letter", "word", "photograph"], ...] = ("letter",)
        """What is shown: letter, word, photograph (which is asked how it stands; of scikit-image; extra ``prompts``)."""
        operations: tuple[Operation, ...] = ("rotate_90", "rotate_180", "rotate_270")
        """What makes a picture upright, uniformly; for photographs only rotations."""
        upright: float = Field(default=0.2, ge=0, le=1)
        """Share of pictures that stand upright already."""
        letters: str = "bdpq"
        """Letters that are shown, of bdpqun; every one of these is another one turned by 180 degrees or mirrored."""
        size: int = Field(default=84, ge=28)
        """Side of the picture, in pixels."""
        background: Background = "plain"
        """Behind letters and words: plain, texture, photograph."""

        @model_validator(mode="after")
        def _possible(self) -> OrientationQuestions.Config:
            _distinct("kinds", self.kinds)
            _distinct("operations", self.operations)
            _distinct("letters", tuple(self.letters))
            if set(self.letters) - set("bdpqun") or len(self.letters) < 2:
                raise ValueError(f"letters must be at least two of bdpqun; got '{self.letters}'")
            if "photograph" in self.kinds and not any(name.startswith("rotate") for name in self.operations):
                raise ValueError("kinds with photograph need a rotation among operations; nobody sees whether one is mirrored")
            return self

    def __init__(self, config: Config) -> None:
        self.config = config
        self._paint = {
            kind: painter("photograph" if kind == "photograph" else config.background, config.split, kind == "photograph")
            for kind in config.kinds
        }

    def question(self, task_id: int) -> Question:
        return orientation(self.config, self._paint, generator_of(self.config, task_id))

    def next_turn(self, question: Question, turns: tuple[Turn, ...]) -> Said:
        return picture_turn(question, turns)


class SearchQuestions:
    """What an invented encyclopedia says about a device, shown or named; it is written into a folder for the tools to search.

    The expert calls ``tools.image_search:ImageSearch`` with ``images: FOLDER/corpus.jsonl`` and ``tools.text_search:TextSearch``
    with ``corpus: FOLDER/corpus.jsonl``, and reads what they find. Details: operations (the calls' names), evidence (ids of the
    pages to be read, and the answer), path (the facts to follow), name (of a device that is named). Held out: every fifth device
    with its inventor, whose pages are there, but training never asks about them. Raises ConfigError if the folder holds something
    else.
    """

    @dataclass(frozen=True, kw_only=True, config=_STRICT)
    class Config(Drawn):
        """Fields of a ``simulators.prompts:SearchQuestions`` block."""

        folder: str
        """Where the encyclopedia lies; it is made if the folder is empty or not there."""
        start: Literal["picture", "name"] = "picture"
        """How a question says which device it means; by its name, no picture is shown or needs to be searched for."""
        hops: tuple[int, ...] = (1, 2)
        """Pages that must be read, after the search for the picture if there is one, uniformly, of 0 (what is it called) to 3."""
        entities: int = Field(default=100, ge=5)
        """Devices; each has an inventor of its own."""
        towns: int = Field(default=16, ge=2)
        """Towns."""
        rivers: int = Field(default=8, ge=2)
        """Rivers."""
        syllables: int = Field(default=20, ge=4, le=len(SYLLABLES))
        """Of which names are made, two each."""
        picture_size: int = Field(default=84, ge=28)
        """Side of the pictures, in pixels."""
        filler: int = Field(default=0, ge=0, le=len(FILLERS))
        """Further sentences on a page, about nothing in particular; without them a page has about 15 words."""
        world_seed: int = 0
        """Another seed gives another encyclopedia."""
        image_search: str = "image_search"
        """What the expert calls the search for pictures by; that tool's ``name``."""
        text_search: str = "text_search"
        """What the expert calls the search for texts by; that tool's ``name``."""

        @model_validator(mode="after")
        def _possible(self) -> SearchQuestions.Config:
            _distinct("hops", self.hops)
            if not all(0 <= hops <= MOST_HOPS for hops in self.hops):
                raise ValueError(f"hops must be numbers from 0 to {MOST_HOPS}; got {list(self.hops)}")
            if self.start == "name" and 0 in self.hops:
                raise ValueError("hops has 0, which asks for a device's name, but start 'name' says it; take 0 out of hops")
            needed, there = 2 * self.entities + self.towns + self.rivers, self.syllables**2 - 10
            if needed > there:
                raise ValueError(f"syllables {self.syllables} make {there} names, but {needed} are needed; raise syllables")
            return self

    def __init__(self, config: Config) -> None:
        self.config = config
        settings = Settings(
            seed=config.world_seed,
            entities=config.entities,
            towns=config.towns,
            rivers=config.rivers,
            syllables=config.syllables,
            picture_size=config.picture_size,
            filler=config.filler,
        )
        self.world = World(settings)
        self.devices = asked_about(self.world, config.split)
        self.corpus = Path(config.folder) / CORPUS
        ensure(Path(config.folder), self.world)

    def question(self, task_id: int) -> Question:
        return search_question(self.config, self.world, generator_of(self.config, task_id))

    def next_turn(self, question: Question, turns: tuple[Turn, ...]) -> Said:
        return search_turn(question, turns, (self.config.image_search, self.config.text_search))


class ClassificationQuestions:
    """Which of several classes a picture shows, learnt from few examples, with or without thinking (CLS-RL: Li et al. 2025).

    Held out: other pictures of the same classes; other classes are another ``classes``. The expert answers at once.
    """

    @dataclass(frozen=True, kw_only=True, config=_STRICT)
    class Config(Drawn):
        """Fields of a ``simulators.prompts:ClassificationQuestions`` block."""

        data: Literal["shapes", "digits"] = "shapes"
        """shapes are drawn; digits are scikit-learn's handwritten ones (extra ``prompts``)."""
        classes: tuple[str, ...] | None = None
        """Classes that there are; null: all of circle, square, triangle, cross, ring, or of zero to nine."""
        shots: int = Field(default=4, ge=1)
        """Pictures of each class that training has; digits have 130 at most."""
        options: int = Field(default=4, ge=2)
        """Classes that a question names."""
        thinking: bool = True
        """Whether the question asks for a thought before the answer."""
        size: int = Field(default=56, ge=8)
        """Side of the picture, in pixels."""

        @model_validator(mode="after")
        def _possible(self) -> ClassificationQuestions.Config:
            known = DIGITS if self.data == "digits" else SHAPES
            classes = known if self.classes is None else self.classes
            _distinct("classes", classes)
            if set(classes) - set(known):
                raise ValueError(f"classes must be names out of {', '.join(known)}; got {list(classes)}")
            if self.options > len(classes):
                raise ValueError(f"options must be at most the {len(classes)} classes, got {self.options}")
            return self

    def __init__(self, config: Config) -> None:
        self.config = config
        what = (config.size, config.split, config.shots, config.seed)
        if config.data == "digits":
            digits: Any = resolve("simulators.prompts_parts.digits:Digits")
            examples = digits(*what).examples
        else:
            examples = drawn_examples(SHAPES, *what)
        self.examples = {name: examples[name] for name in config.classes or examples}

    def question(self, task_id: int) -> Question:
        return classification(self.config, self.examples, generator_of(self.config, task_id))

    def next_turn(self, question: Question, turns: tuple[Turn, ...]) -> Said:
        return question.references[0], ()


class CountingQuestions:
    """How many red circles there are, and whether these or those are more. Held out: pairs of colour and shape.

    Details: counts. The expert answers at once.
    """

    @dataclass(frozen=True, kw_only=True, config=_STRICT)
    class Config(Drawn):
        """Fields of a ``simulators.prompts:CountingQuestions`` block."""

        families: tuple[Literal["count", "compare"], ...] = ("count", "compare")
        """count asks for a number, compare for the larger of two."""
        most: int = Field(default=4, ge=2, le=6)
        """Largest number of things of one kind."""
        others: tuple[int, int] = (0, 4)
        """Fewest and most things that are not asked about."""
        size: int = Field(default=112, ge=56)
        """Side of the picture, in pixels."""

        @model_validator(mode="after")
        def _possible(self) -> CountingQuestions.Config:
            _distinct("families", self.families)
            _ordered("others", self.others, 0, FIELDS - 2 * self.most)
            return self

    def __init__(self, config: Config) -> None:
        self.config = config

    def question(self, task_id: int) -> Question:
        return counting(self.config, generator_of(self.config, task_id))

    def next_turn(self, question: Question, turns: tuple[Turn, ...]) -> Said:
        return question.references[0], ()


class JsonlQuestions:
    """A JSONL data set of messages, pictures and answers; ``prompts_parts/lines.py`` says what a line holds.

    A task id counts round through the split's lines, in the file's order. Held out: a share of the lines, by a hash of what each
    says (or of its ``id``), so that equal lines stay together. Raises ConfigError or DataError, naming file, line and key.
    """

    @dataclass(frozen=True, config=_STRICT)
    class Config:
        """Fields of a ``simulators.prompts:JsonlQuestions`` block."""

        path: str
        """The file; pictures are looked for beside it."""
        split: Split = "train"
        """Which lines."""
        held_out_share: float = Field(default=0.1, ge=0, le=1)
        """Share of the lines that are held out."""
        seed: int = 0
        """Another seed holds out other lines."""
        check: Literal["exact", "normalised", "choice", "number", "box"] = "normalised"
        """How an answer is checked where a line does not say."""

    def __init__(self, config: Config) -> None:
        self.config = config
        lines = read(config.path, config.check, config.seed)
        self._lines = [line for line in lines if (line.share < config.held_out_share) == (config.split == "held_out")]
        if not self._lines:
            raise DataError(
                f"{config.path}: none of its {len(lines)} lines is of split '{config.split}'; change held_out_share or seed"
            )

    def __len__(self) -> int:
        return len(self._lines)

    def question(self, task_id: int) -> Question:
        return self._lines[task_id % len(self._lines)].question()
