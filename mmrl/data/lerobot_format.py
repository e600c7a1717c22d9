"""Where a LeRobot data set, version 2.1 or 3.0, keeps what: info.json, tasks, and an entry for each episode.

Version 2.1 has a parquet file and, per camera, a video for each episode; version 3.0 packs many episodes into each. Format:
huggingface/lerobot, src/lerobot/datasets. Nothing here reads frames; see ``lerobot_frames``.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mmrl.errors import DataError

INFO, STATS, TASKS = "meta/info.json", "meta/stats.json", "meta/tasks.parquet"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
TASK_COLUMN = "__index_level_0__"  # pandas' name of an index without a name
SUCCESS = "next.success"
_COPY = "copy or record the data set again"


@dataclass(frozen=True)
class Feature:
    """A column of the frames, as info.json describes it."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    names: Any = None

    @property
    def is_camera(self) -> bool:
        return self.dtype in ("image", "video")

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width; some sets describe their images channels first."""
        channels_first = isinstance(self.names, list) and str(self.names[0]).startswith("channel")
        height, width = self.shape[1:] if channels_first else self.shape[:2]
        return height, width

    @staticmethod
    def parse(key: str, described: Mapping[str, Any]) -> Feature:
        """As info.json has it. Raises what ``_described`` understands where that is no feature."""
        shape = tuple(int(size) for size in described["shape"])
        feature = Feature(key, str(described["dtype"]), shape, described.get("names"))
        if feature.is_camera and min(feature.image_size) < 1:
            raise ValueError(f"{key} has the shape {list(shape)}")
        return feature


class Span(NamedTuple):
    """Where an episode stands in a video: its file, and the seconds at which it begins there."""

    file: Path
    start: float


@dataclass(frozen=True)
class Entry:
    """An episode: its number, how many frames, and where they are. success: None where episodes have no such column."""

    index: int
    length: int
    data: Path
    first_row: int
    videos: Mapping[str, Span]
    success: bool | None = None


@dataclass(frozen=True)
class DataSet:
    """What meta/ says. Paths are whole ones. one_episode_per_file: whether a file may not be longer than its episode either."""

    root: Path
    one_episode_per_file: bool
    fps: float
    features: Mapping[str, Feature]
    tasks: Mapping[int, str]
    splits: Mapping[str, str]
    episodes: tuple[Entry, ...]

    def feature(self, key: str) -> Feature:
        """Raises DataError where the set has no such column."""
        if key not in self.features:
            raise DataError(f"{self.root / INFO}: there is no feature {key!r}; known are {', '.join(sorted(self.features))}")
        return self.features[key]

    def select(self, episodes: str | None) -> DataSet:
        """The episodes of a range ``first:last`` (last excluded, either may be left out) or of a split's name; None: all."""
        if episodes is None:
            return self
        text = self.splits.get(episodes, episodes)
        first, colon, last = text.partition(":")
        if not colon or not all(part == "" or part.isdecimal() for part in (first, last)):
            known = ", ".join(self.splits) or "none"
            raise DataError(f"{self.root}: {episodes!r} is no range such as '0:80', and no split (info.json has {known})")
        chosen = tuple(e for e in self.episodes if int(first or 0) <= e.index < (int(last) if last else e.index + 1))
        if not chosen:
            raise DataError(f"{self.root}: no episode lies in {episodes!r}; the set has {len(self.episodes)}")
        return replace(self, episodes=chosen)

    @cached_property
    def rows_needed(self) -> Mapping[Path, int]:
        """Data file -> the rows that its episodes reach to."""
        needed: dict[Path, int] = defaultdict(int)
        for entry in self.episodes:
            needed[entry.data] = max(needed[entry.data], entry.first_row + entry.length)
        return needed

    @cached_property
    def frames_needed(self) -> Mapping[Path, int]:
        """Video file -> the frames that its episodes reach to."""
        needed: dict[Path, int] = defaultdict(int)
        for entry in self.episodes:
            for span in entry.videos.values():
                needed[span.file] = max(needed[span.file], round(span.start * self.fps) + entry.length)
        return needed


def read(root: Path) -> DataSet:
    """What the folder's meta/ says. Raises DataError where that is missing, damaged or of another version."""
    info_file = root / INFO
    if not info_file.is_file():
        raise DataError(f"{root}: is no LeRobot data set (it has no {INFO}); give the folder that holds meta/ and data/")
    with reading(info_file):
        text = info_file.read_text()
    info = _json(info_file, text)
    with _described(info_file):
        version = str(info["codebase_version"])
        features = {key: Feature.parse(key, described) for key, described in info["features"].items()}
        fps, splits = float(info["fps"]), {name: str(part) for name, part in dict(info.get("splits") or {}).items()}
        if not fps > 0:
            raise ValueError(f"fps is {fps:g}")
    if version not in _LAYOUTS:
        raise DataError(f"{info_file}: the format is {version}, read are {' and '.join(_LAYOUTS)}; convert it with lerobot")
    layout = _LAYOUTS[version]
    videos = [key for key, feature in features.items() if feature.dtype == "video"]
    episodes = tuple(layout.episodes(root, info, videos))
    data = DataSet(root, layout.one_episode_per_file, fps, features, layout.tasks(root), splits, episodes)
    if not data.episodes:
        raise DataError(f"{root}: holds no episode; record some")
    if twice := [index for index, count in Counter(entry.index for entry in episodes).items() if count > 1]:
        raise DataError(f"{root / 'meta'}: has {len(twice)} episodes more than once, such as episode {twice[0]}; {_COPY}")
    _refuse_missing_files(data)
    return data


def _refuse_missing_files(data: DataSet) -> None:
    seen: set[Path] = set()
    for entry in data.episodes:
        for file in (entry.data, *(span.file for span in entry.videos.values())):
            if file not in seen and not file.is_file():
                raise DataError(f"{file}: is missing, but episode {entry.index} is in it; {_COPY}")
            seen.add(file)


# ---------------------------------------------------------------- version 2.1


def _tasks_v21(root: Path) -> dict[int, str]:
    file = root / "meta/tasks.jsonl"
    lines = _json_lines(file)
    with _described(file):
        return _sentences((line["task_index"], line["task"]) for line in lines)


def _episodes_v21(root: Path, info: Mapping[str, Any], videos: list[str]) -> Iterator[Entry]:
    file = root / "meta/episodes.jsonl"
    with _described(file):
        lines = sorted(_json_lines(file), key=lambda line: int(line["episode_index"]))
    for line in lines:
        with _described(file):
            index = int(line["episode_index"])
            length = _length(index, line["length"])
            where = {"episode_chunk": index // int(info["chunks_size"]), "episode_index": index}
            spans = {key: Span(root / info["video_path"].format(video_key=key, **where), 0.0) for key in videos}
            success = None if line.get("success") is None else bool(line["success"])
            yield Entry(index, length, root / info["data_path"].format(**where), 0, spans, success)


# ---------------------------------------------------------------- version 3.0


def _tasks_v30(root: Path) -> dict[int, str]:
    file = root / TASKS
    table = read_table(file)
    with _described(file):
        text = next(name for name in (TASK_COLUMN, "task") if name in table.column_names)
        return _sentences(zip(table["task_index"].to_pylist(), table[text].to_pylist(), strict=True))


def _episodes_v30(root: Path, info: Mapping[str, Any], videos: list[str]) -> Iterator[Entry]:
    rows = [(file, row) for file in sorted((root / "meta/episodes").glob("*/*.parquet")) for row in _episode_rows(file)]
    starts: dict[Path, int] = {}  # of each data file, the frame of the whole set at which it begins
    located = []
    for file, row in rows:
        with _described(file):
            where = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
            data, first = root / info["data_path"].format(**where), int(row["dataset_from_index"])
            starts[data] = min(first, starts.get(data, first))
            located.append((file, row, data, first))
    for file, row, data, first in located:
        with _described(file):
            spans = {key: _span_v30(root, info, key, row) for key in videos}
            success = None if row.get("success") is None else bool(row["success"])
            index = int(row["episode_index"])
            length = _length(index, row["length"])
            if length != (rows_there := int(row["dataset_to_index"]) - first):
                raise ValueError(f"episode {index} has {rows_there} rows and length {length}")
            yield Entry(index, length, data, first - starts[data], spans, success)


def _span_v30(root: Path, info: Mapping[str, Any], key: str, row: Mapping[str, Any]) -> Span:
    where = {name: row[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")}
    start = float(row[f"videos/{key}/from_timestamp"])
    if not 0 <= start < math.inf:
        raise ValueError(f"episode {row['episode_index']} begins at {start:g} s in a video")
    return Span(root / info["video_path"].format(video_key=key, **where), start)


def _episode_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of meta/episodes, without the statistics, which are most of it."""
    with reading(file):
        names = [name for name in pq.read_schema(file).names if not name.startswith("stats/")]
    return read_table(file, names).to_pylist()


def _sentences(tasks: Iterable[tuple[Any, Any]]) -> dict[int, str]:
    """Number of a task -> its sentence."""
    found = {int(number): sentence for number, sentence in tasks}
    if wrong := [number for number, sentence in found.items() if not isinstance(sentence, str)]:
        raise ValueError(f"task {wrong[0]} is {found[wrong[0]]!r}")
    return found


def _length(index: int, length: Any) -> int:
    if int(length) < 1:
        raise ValueError(f"episode {index} has length {length}")
    return int(length)


class _Layout(NamedTuple):
    tasks: Callable[[Path], Mapping[int, str]]
    episodes: Callable[[Path, Mapping[str, Any], list[str]], Iterator[Entry]]
    one_episode_per_file: bool


_LAYOUTS: Mapping[str, _Layout] = {
    "v2.1": _Layout(_tasks_v21, _episodes_v21, one_episode_per_file=True),
    "v3.0": _Layout(_tasks_v30, _episodes_v30, one_episode_per_file=False),
}

# ---------------------------------------------------------------- reading


def read_table(file: Path, columns: list[str] | None = None) -> pa.Table:
    with reading(file):
        return pq.ParquetFile(file).read(columns=columns)


@contextmanager
def reading(file: Path, who: str = "") -> Iterator[None]:
    """Turn what parquet says of a damaged file into a DataError with its name; ``who`` is the episode in it, if one is known."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{file}: is missing{who and f', but {who} is in it'}; {_COPY}") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        why = str(error).strip().partition("\n")[0]
        raise DataError(f"{file}: cannot be read{who and f', but {who} is in it'} ({why}); {_COPY}") from error


@contextmanager
def _described(file: Path) -> Iterator[None]:
    """Turn an entry that is missing or of the wrong kind into a DataError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration, ZeroDivisionError) as error:
        what = f"the entry {error}" if isinstance(error, KeyError) else f"an entry ({error})"
        raise DataError(f"{file}: {what} is missing or not as the format wants it; {_COPY}") from error


def _json(file: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise DataError(f"{file}: is no valid json ({error}); {_COPY}") from error
    if not isinstance(found, dict):
        raise DataError(f"{file}: must hold a mapping, got a {type(found).__name__}; {_COPY}")
    return found


def _json_lines(file: Path) -> list[dict[str, Any]]:
    with reading(file):
        text = file.read_text()
    return [_json(file, line) for line in text.splitlines() if line.strip()]
