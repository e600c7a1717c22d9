"""What may be wrong with a LeRobot data set on the disk: one sentence that names the file and the episode."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mmrl.errors import DataError
from tests.core import lerobot_sets as sets

FRONT = sets.CAMERAS[0]
V21_DATA, V21_VIDEO = "data/chunk-000/episode_000001.parquet", f"videos/chunk-000/{FRONT}/episode_000001.mp4"
V30_DATA, V30_VIDEO = "data/chunk-000/file-000.parquet", f"videos/{FRONT}/chunk-000/file-000.mp4"
V30_EPISODES = "meta/episodes/chunk-000/file-000.parquet"


def change_info(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = root / "meta/info.json"
    info = json.loads(file.read_text())
    change(info)
    file.write_text(json.dumps(info))


def change_table(file: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.ParquetFile(file).read()), file)


def without(key: str) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.drop_columns([key])


def with_column(key: str, values: Callable[[int], list[Any]]) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.column_names.index(key), key, pa.array(values(len(table))))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def other_video(file: Path, frames: int, height: int = sets.HEIGHT) -> None:
    sets.write_video(file, [np.zeros((height, sets.WIDTH, 3), np.uint8)] * frames)


Break = Callable[[Path], Any]
CASES: dict[str, tuple[str, str, Break, str, tuple[str, ...]]] = {
    # name: version, storage, what is done to it, the file that the sentence begins with, what else it says
    "no meta": ("v3.0", "image", lambda r: (r / "meta/info.json").unlink(), "", ("is no LeRobot data set",)),
    "info is no json": ("v3.0", "image", lambda r: truncate(r / "meta/info.json"), "meta/info.json", ("no valid json",)),
    "info is a list": ("v3.0", "image", lambda r: (r / "meta/info.json").write_text("[]"), "meta/info.json", ("a list",)),
    "info lacks fps": ("v3.0", "image", lambda r: change_info(r, lambda i: i.pop("fps")), "meta/info.json", ("'fps'",)),
    "no frames a second": ("v3.0", "video", lambda r: change_info(r, lambda i: i.update(fps=0)), "meta/info.json", ("fps is 0",)),
    "info is no text": ("v3.0", "image", lambda r: (r / "meta/info.json").write_bytes(b"\xff\xfe"), "meta/info.json", ("read",)),
    "a camera without a height": (
        "v3.0",
        "image",
        lambda r: change_info(r, lambda i: i["features"][FRONT].update(shape=[32])),
        "meta/info.json",
        ("not as the format wants it",),
    ),
    "chunks of no episode": ("v2.1", "image", lambda r: change_info(r, lambda i: i.update(chunks_size=0)), "meta/", ("zero",)),
    "future version": (
        "v3.0",
        "image",
        lambda r: change_info(r, lambda i: i.update(codebase_version="v4.0")),
        "meta/info.json",
        ("v4.0", "v2.1 and v3.0"),
    ),
    "broken episodes": ("v3.0", "image", lambda r: truncate(r / V30_EPISODES), V30_EPISODES, ("cannot be read",)),
    "episodes lack a key": (
        "v2.1",
        "image",
        lambda r: (r / "meta/episodes.jsonl").write_text('{"length": 3}\n'),
        "meta/",
        ("'episode_index'",),
    ),
    "episodes lack a column": (
        "v3.0",
        "video",
        lambda r: change_table(r / V30_EPISODES, without(f"videos/{FRONT}/from_timestamp")),
        V30_EPISODES,
        (f"videos/{FRONT}/from_timestamp", "is missing"),
    ),
    "an episode too short by a frame": (
        "v3.0",
        "image",
        lambda r: change_table(r / V30_EPISODES, with_column("length", lambda n: [5, 3, 6, 4])),
        V30_EPISODES,
        ("episode 2", "7 rows", "length 6"),
    ),
    "an episode without frames": (
        "v2.1",
        "image",
        lambda r: (r / "meta/episodes.jsonl").write_text('{"episode_index": 1, "length": 0}\n'),
        "meta/episodes.jsonl",
        ("episode 1", "length 0"),
    ),
    "an episode twice": (
        "v3.0",
        "image",
        lambda r: change_table(r / V30_EPISODES, lambda t: pa.concat_tables([t, t[:1]])),
        "meta",
        ("more than once", "episode 0"),
    ),
    "a number of an episode that is none": (
        "v2.1",
        "image",
        lambda r: (r / "meta/episodes.jsonl").write_text('{"episode_index": "a", "length": 3}\n' * 2),
        "meta/episodes.jsonl",
        ("'a'",),
    ),
    "a video from nowhere": (
        "v3.0",
        "video",
        lambda r: change_table(r / V30_EPISODES, with_column(f"videos/{FRONT}/from_timestamp", lambda n: [float("nan")] * n)),
        V30_EPISODES,
        ("episode 0", "nan s"),
    ),
    "a task without words": (
        "v3.0",
        "image",
        lambda r: change_table(
            r / "meta/tasks.parquet", lambda t: t.set_column(1, "__index_level_0__", pa.array([None] * len(t), pa.string()))
        ),
        "meta/tasks.parquet",
        ("task 0", "None"),
    ),
    "no episodes": ("v2.1", "image", lambda r: (r / "meta/episodes.jsonl").write_text(""), "", ("holds no episode",)),
    "no tasks": ("v3.0", "image", lambda r: (r / "meta/tasks.parquet").unlink(), "meta/tasks.parquet", ("is missing",)),
    "no data file": ("v2.1", "image", lambda r: (r / V21_DATA).unlink(), V21_DATA, ("is missing", "episode 1")),
    "broken parquet 2": ("v2.1", "image", lambda r: truncate(r / V21_DATA), V21_DATA, ("cannot be read", "episode 1")),
    "broken parquet 3": ("v3.0", "image", lambda r: truncate(r / V30_DATA), V30_DATA, ("cannot be read", "episode 0")),
    "too few rows 2": (
        "v2.1",
        "image",
        lambda r: change_table(r / V21_DATA, lambda t: t[:2]),
        V21_DATA,
        ("2 rows", "episode 1", "3"),
    ),
    "too few rows 3": (
        "v3.0",
        "image",
        lambda r: change_table(r / V30_DATA, lambda t: t[:14]),
        V30_DATA,
        ("14 rows", "episode 0", "15"),
    ),
    "too many rows": (
        "v2.1",
        "image",
        lambda r: change_table(r / V21_DATA, lambda t: pa.concat_tables([t, t])),
        V21_DATA,
        ("6 rows", "episode 1", "3"),
    ),
    "missing column": (
        "v3.0",
        "image",
        lambda r: change_table(r / V30_DATA, without("action")),
        V30_DATA,
        ("no column 'action'", "episode 0"),
    ),
    "missing pictures": ("v3.0", "image", lambda r: change_table(r / V30_DATA, without(FRONT)), V30_DATA, (FRONT, "episode 0")),
    "wrong action shape": (
        "v3.0",
        "image",
        lambda r: change_table(r / V30_DATA, with_column("action", lambda n: [[1.0, 2.0, 3.0]] * n)),
        V30_DATA,
        ("'action' of episode 0", "says 2 each"),
    ),
    "rows of other lengths that add up": (
        "v3.0",
        "image",
        lambda r: change_table(r / V30_DATA, with_column("action", lambda n: [[1.0], [1.0, 2.0, 3.0], *[[1.0, 2.0]] * (n - 2)])),
        V30_DATA,
        ("'action' of episode 0", "rows of 1 and of 3"),
    ),
    "actions are no numbers": (
        "v3.0",
        "image",
        lambda r: change_table(r / V30_DATA, with_column("action", lambda n: [["up", "on"]] * n)),
        V30_DATA,
        ("'action' of episode 0", "string"),
    ),
    "an action that is not finite": (
        "v3.0",
        "image",
        lambda r: change_table(r / V30_DATA, with_column("action", lambda n: [[1.0, float("nan")]] * n)),
        V30_DATA,
        ("'action' of episode 0", "not finite"),
    ),
    "empty entries": (
        "v3.0",
        "image",
        lambda r: change_table(r / V30_DATA, with_column("timestamp", lambda n: [None] + [0.0] * (n - 1))),
        V30_DATA,
        ("'timestamp' of episode 0", "empty"),
    ),
    "another episode": (
        "v2.1",
        "image",
        lambda r: change_table(r / V21_DATA, with_column("episode_index", lambda n: [7] * n)),
        V21_DATA,
        ("[7]", "episode 1"),
    ),
    "frames out of order": (
        "v2.1",
        "image",
        lambda r: change_table(r / V21_DATA, with_column("frame_index", lambda n: list(range(n))[::-1])),
        V21_DATA,
        ("episode 1", "0 to 2"),
    ),
    "unknown task": (
        "v2.1",
        "image",
        lambda r: change_table(r / V21_DATA, with_column("task_index", lambda n: [9] * n)),
        V21_DATA,
        ("episode 1", "task 9"),
    ),
    "a picture is no picture": (
        "v2.1",
        "image",
        lambda r: change_table(r / V21_DATA, with_column(FRONT, lambda n: [{"bytes": b"no", "path": None}] * n)),
        V21_DATA,
        ("episode 1", "is no image"),
    ),
    "a picture of another size": (
        "v2.1",
        "image",
        lambda r: change_table(
            r / V21_DATA, with_column(FRONT, lambda n: [{"bytes": sets.png(np.zeros((8, 6, 3), np.uint8)), "path": None}] * n)
        ),
        V21_DATA,
        ("episode 1", "6x8", "48x32"),
    ),
    "missing video 2": ("v2.1", "video", lambda r: (r / V21_VIDEO).unlink(), V21_VIDEO, ("is missing", "episode 1")),
    "missing video 3": ("v3.0", "video", lambda r: (r / V30_VIDEO).unlink(), V30_VIDEO, ("is missing", "episode 0")),
    "broken video": ("v2.1", "video", lambda r: truncate(r / V21_VIDEO), V21_VIDEO, ("cannot be decoded", "episode 1")),
    "too few pictures 2": ("v2.1", "video", lambda r: other_video(r / V21_VIDEO, 2), V21_VIDEO, ("2 pictures", "episode 1", "3")),
    "too many pictures": ("v2.1", "video", lambda r: other_video(r / V21_VIDEO, 9), V21_VIDEO, ("9 pictures", "episode 1", "3")),
    "too few pictures 3": ("v3.0", "video", lambda r: other_video(r / V30_VIDEO, 7), V30_VIDEO, ("7 pictures", "episode 0", "8")),
    "a video of another size": (
        "v2.1",
        "video",
        lambda r: other_video(r / V21_VIDEO, 3, 64),
        V21_VIDEO,
        ("episode 1", "48x64", "48x32"),
    ),
    "pictures at other times": (
        "v3.0",
        "video",
        lambda r: change_table(r / V30_DATA, with_column("timestamp", lambda n: [99.0] * n)),
        V30_VIDEO,
        ("no picture at 99.000 s", "episode 0"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_damage_is_a_sentence_with_file_and_episode(name: str, tmp_path: Path) -> None:
    version, storage, damage, file, words = CASES[name]
    root = sets.WRITERS[version](tmp_path / "set", storage)
    damage(root)
    with pytest.raises(DataError) as caught:
        source = sets.source(root)
        source.examples(torch.arange(len(source)))
    sentence = str(caught.value)
    assert sentence.startswith(str(root / file)), sentence
    assert all(word in sentence for word in words), sentence
    assert "\n" not in sentence and len(sentence) < 400


def test_a_file_that_vanishes_later_is_named_too(tmp_path: Path) -> None:
    root = sets.write_v21(tmp_path, "video")
    source = sets.source(root)
    (root / V21_VIDEO).unlink()
    with pytest.raises(DataError, match=r"episode_000001\.mp4: is missing, but episode 1 is in it"):
        source.examples(torch.tensor([6]))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"action": "actions"}, "no feature 'actions'; known are action,"),
        ({"cameras": {"observation.images.top": "top"}}, "no feature 'observation.images.top'"),
        ({"cameras": {"action": "front"}}, "'action' is float32; give cameras and numbers"),
        ({"state": sets.CAMERAS[0]}, "is image; give cameras and numbers"),
        ({"episodes": "test"}, "'test' is no range such as '0:80', and no split"),
        ({"episodes": "\u00b2:3"}, "is no range such as '0:80', and no split"),
        ({"episodes": "4:9"}, "no episode lies in '4:9'; the set has 4"),
    ],
)
def test_what_the_set_does_not_have(fields: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    root = sets.write_v30(tmp_path, "image")
    with pytest.raises(DataError, match=sentence):
        sets.source(root, **fields)
