"""Pictures that a policy drew: the same prompts at every evaluation of a run, and the best and worst of groups in training."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from mmrl.report.recordings import MIME, evenly

MAX_COLUMNS, MAX_ROWS, MAX_GROUPS = 16, 32, 24
MAX_SIDE = 384  # pixels of an embedded picture; a larger one is shown smaller
MAX_BYTES = 12 * 2**20  # of all; base64 adds a third, and a report should still open at once and travel by mail
TINY = 128  # pixels of a side, up to which enlarged pixels stay sharp
_LABELS = {"before": 0, "during": 1, "after": 2}  # in the order of a stage
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Shown:
    """A picture on the page. image: a data URI; None where there was no room, or no file."""

    file: str
    width: int
    height: int
    image: str | None

    @property
    def tiny(self) -> bool:
        return max(self.width, self.height) <= TINY


@dataclass(frozen=True)
class Score:
    """What a reward gave; None: it failed. watched: whether nothing was trained on it."""

    name: str
    value: float | None
    watched: bool


@dataclass(frozen=True)
class Shot:
    """One picture that was asked for. advantage: None where it is not known, or carried no loss (then ``unused``)."""

    prompt: str
    family: str
    task_id: str
    stage: str
    label: str
    iteration: int | None
    success: bool
    earned: float | None
    scores: tuple[Score, ...]
    advantage: float | None
    unused: bool
    group: Mapping[str, float | None]
    sources: tuple[Shown, ...]
    picture: Shown

    @property
    def when(self) -> str:
        counted = "" if self.iteration is None else f", iteration {self.iteration}"
        return f"{self.label} {self.stage}".strip() + counted

    @property
    def same_as(self) -> tuple[Any, ...]:
        """Equal where the same picture earned the same."""
        return self.picture.file, self.success, self.earned, self.scores


@dataclass(frozen=True)
class Column:
    """An evaluation. success: its rate over all of its episodes, None where that is not known."""

    title: str
    iteration: int | None
    success: float | None


@dataclass(frozen=True)
class Row:
    """A prompt, and what was drawn for it at each evaluation."""

    first: Shot
    shots: tuple[Shot | None, ...]


@dataclass(frozen=True)
class Group:
    """Pictures of a rollout for one prompt, from the best to the worst of those that were kept."""

    first: Shot
    shots: tuple[Shot, ...]


@dataclass(frozen=True)
class Pictures:
    """What the page shows, and of how many evaluations, prompts and groups it shows nothing."""

    columns: list[Column] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    left_out: str = ""

    @property
    def any(self) -> bool:
        return bool(self.rows or self.groups)

    @property
    def watched(self) -> list[str]:
        """Names of the scores that nothing was trained on."""
        shots = [shot for each in (*self.rows, *self.groups) for shot in each.shots if shot is not None]
        return sorted({score.name for shot in shots for score in shot.scores if score.watched})


def is_picture(record: Mapping[str, Any]) -> bool:
    """Whether a kept conversation is a prompt that was answered with one picture."""
    messages = record.get("messages")
    said = [m for m in messages if isinstance(m, Mapping) and "calls" in m] if isinstance(messages, list) else []
    parts = said[0].get("parts") if len(said) == 1 and not said[0]["calls"] else None
    return isinstance(parts, list) and any(isinstance(part, int) for part in parts)


def pictures_of(
    records: Iterable[Mapping[str, Any]],
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    trained: frozenset[str] | None,
    notices: list[str],
) -> Pictures:
    """rows: of metrics.jsonl, which say the order of stages and the success rates. trained: see mmrl.report.trained."""
    album, shots, damaged = _Album(folder), [], 0
    for record in records:
        try:
            shots.append(_shot(record, trained))
        except (KeyError, TypeError, ValueError, IndexError):
            damaged += 1
    if damaged:
        notices.append(f"{damaged} recorded picture{'s' * (damaged > 1)} could not be read.")
    columns, grid, hidden = _grid([shot for shot in shots if shot.label != "training"], rows)
    groups, more = _groups([shot for shot in shots if shot.label == "training"], rows)
    left_out = ", ".join(f"{count} {name}{'s' * (count > 1)}" for name, count in (hidden | more).items() if count)
    grid = [Row(album.filled(row.first), tuple(shot and album.filled(shot) for shot in row.shots)) for row in grid]
    groups = [Group(album.filled(group.first), tuple(map(album.filled, group.shots))) for group in groups]
    return Pictures(columns, grid, groups, left_out)


# ---------------------------------------------------------------- the same prompts at every evaluation


def _grid(shots: Sequence[Shot], rows: Sequence[Mapping[str, Any]]) -> tuple[list[Column], list[Row], dict[str, int]]:
    """Evaluations, prompts, and how many of either are left out."""
    order = _order(rows)
    moments: dict[tuple[Any, ...], dict[tuple[str, str], Shot]] = {}
    for shot in shots:
        moments.setdefault(_moment(shot, order), {})[shot.task_id, shot.prompt] = shot
    found = _without_repeats([moments[moment] for moment in sorted(moments)])
    kept = _thinned(found)
    prompts = {name: shot for column in kept for name, shot in column.items()}
    chosen = evenly([{"family": shot.family, "name": name} for name, shot in sorted(prompts.items(), key=_row_place)], ["family"])
    names = sorted((record["name"] for record in chosen[:MAX_ROWS]), key=lambda name: _row_place((name, prompts[name])))
    grid = [Row(prompts[name], tuple(column.get(name) for column in kept)) for name in names]
    columns = [_column(next(iter(column.values())), rows) for column in kept]
    return columns, grid, {"evaluation": len(found) - len(kept), "prompt": len(prompts) - len(names)}


def _row_place(item: tuple[tuple[str, str], Shot]) -> tuple[Any, ...]:
    (task, prompt), shot = item
    return shot.family, (0, int(task)) if task.isdigit() else (1, 0), task, prompt


def _order(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {stage: place for place, stage in enumerate(dict.fromkeys(str(row["stage"]) for row in rows))}


def _moment(shot: Shot, order: Mapping[str, int]) -> tuple[Any, ...]:
    known = _LABELS.get(shot.label, len(_LABELS))
    return order.get(shot.stage, len(order)), shot.stage, known, shot.label, shot.iteration or 0


def _without_repeats(columns: Sequence[Mapping[Any, Shot]]) -> list[Mapping[Any, Shot]]:
    """Without evaluations that only repeat the one before, as that before a stage repeats the one after the stage before it."""
    found: list[Mapping[Any, Shot]] = []
    for column in columns:
        repeats = found and {n: s.same_as for n, s in found[-1].items()} == {n: s.same_as for n, s in column.items()}
        if not repeats or next(iter(column.values())).label == "after":
            found.append(column)
    return found


def _thinned(columns: Sequence[Mapping[Any, Shot]]) -> list[Mapping[Any, Shot]]:
    """At most MAX_COLUMNS, evenly; evaluations within a stage make room for those before and after one."""
    within = [n for n, column in enumerate(columns) if next(iter(column.values())).label == "during"]
    around = _evenly([n for n in range(len(columns)) if n not in within], MAX_COLUMNS)
    kept = sorted({*around, *_evenly(within, MAX_COLUMNS - len(around))})
    return [columns[n] for n in kept]


def _evenly(items: Sequence[_Item], most: int) -> list[_Item]:
    """The last, and the first if there is room, and others between, equally far apart."""
    if len(items) <= most:
        return list(items)
    if most <= 1:
        return list(items[len(items) - max(most, 0) :])
    return [items[round(n * (len(items) - 1) / (most - 1))] for n in range(most)]


def _column(shot: Shot, rows: Sequence[Mapping[str, Any]]) -> Column:
    known = [row for row in rows if row["kind"] == "evaluation" and (row["stage"], row["label"]) == (shot.stage, shot.label)]
    same = [row for row in known if shot.iteration is None or row["iteration"] == shot.iteration]
    success = _number(same[-1].get("success")) if same else None
    return Column(f"{shot.label} {shot.stage}".strip(), shot.iteration, success)


# ---------------------------------------------------------------- groups of rollouts


def _groups(shots: Sequence[Shot], rows: Sequence[Mapping[str, Any]]) -> tuple[list[Group], dict[str, int]]:
    order = _order(rows)
    found: dict[tuple[Any, ...], list[Shot]] = {}
    for shot in shots:
        found.setdefault((*_moment(shot, order), shot.task_id), []).append(shot)
    kept = _evenly(sorted(found), MAX_GROUPS)
    ranked = [sorted(found[key], key=lambda shot: math.inf if shot.earned is None else -shot.earned) for key in kept]
    return [Group(members[0], tuple(members)) for members in ranked], {"group": len(found) - len(kept)}


# ---------------------------------------------------------------- a record, checked


def _shot(record: Mapping[str, Any], trained: frozenset[str] | None) -> Shot:
    """Raises KeyError, TypeError, ValueError or IndexError where the record is not what mmrl.keeping writes."""
    pictures, messages = record["pictures"], record["messages"]
    place = next(place for place, message in enumerate(messages) if "calls" in message)
    said = messages[place]
    asked = [part for message in messages[:place] for part in message["parts"]]
    iteration, group = record.get("iteration"), record.get("group")
    return Shot(
        prompt=" ".join(str(record["instruction"]).split()),
        family=str(record.get("family", "")),
        task_id=str(record.get("task_id", "")),
        stage=str(record.get("stage", "")),
        label=str(record.get("label", "")),
        iteration=iteration if isinstance(iteration, int) else None,
        success=bool(record["success"]),
        earned=_number(record.get("return")),
        scores=_scores(record, trained),
        advantage=_number(said.get("advantage")),
        unused="advantage" in said and said["advantage"] is None,
        group={str(name): _number(value) for name, value in group.items()} if isinstance(group, Mapping) else {},
        sources=tuple(_picture(pictures[part]) for part in asked if isinstance(part, int)),
        picture=_picture(pictures[[part for part in said["parts"] if isinstance(part, int)][-1]]),
    )


def _scores(record: Mapping[str, Any], trained: frozenset[str] | None) -> tuple[Score, ...]:
    """What the environment's rewards gave, then the stage's; what was trained on first."""
    own = {str(name): _number(value) for name, value in record.get("scores", {}).items()}
    scores = [Score(name, value, trained is not None and name not in trained) for name, value in own.items()]
    for reward in record.get("rewards", ()):
        name = str(reward["name"])
        if name not in own and not name.startswith("("):  # not what the environment paid: that is the sum of its scores
            scores.append(Score(name, _number(reward["score"]), not reward["weight"]))
    return tuple(sorted(scores, key=lambda score: score.watched))


def _picture(record: Mapping[str, Any]) -> Shown:
    file = Path(str(record["file"]))
    if file.suffix not in MIME or file.is_absolute() or ".." in file.parts:  # a record cannot reach outside its folder
        raise ValueError("no picture of this folder")
    return Shown(file.as_posix(), int(record["width"]), int(record["height"]), None)


def _number(value: Any) -> float | None:
    """None for what is no finite number."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else None


class _Album:
    """Pictures as data URIs, as long as there is room."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._room = folder, MAX_BYTES
        self._known: dict[str, str | None] = {}

    def filled(self, shot: Shot) -> Shot:
        """The same with its pictures."""
        sources = tuple(map(self._embedded, shot.sources))
        return replace(shot, sources=sources, picture=self._embedded(shot.picture))

    def _embedded(self, shown: Shown) -> Shown:
        if shown.file not in self._known:
            self._known[shown.file] = self._uri(self._folder / shown.file)
        return replace(shown, image=self._known[shown.file])

    def _uri(self, path: Path) -> str | None:
        try:
            content, kind = _small(path)
        except (OSError, ValueError):
            return None
        if len(content) > self._room:
            return None
        self._room -= len(content)
        return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _small(path: Path) -> tuple[bytes, str]:
    """The file, or a smaller picture of what it shows, and its type. Raises OSError or ValueError."""
    with Image.open(path) as image:
        if max(image.size) <= MAX_SIDE:
            return path.read_bytes(), MIME[path.suffix]
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        file = io.BytesIO()
        image.save(file, "WEBP", quality=80)
        return file.getvalue(), MIME[".webp"]
