"""Small LeRobot data sets in both layouts, written here by hand, with the numbers that they must give back.

Frame t of episode e has actions (100 e + t, -t), state (e, t, 0.5) and pictures of one colour, so that each can be recognised.
"""

from __future__ import annotations

import io
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from mmrl.data.lerobot import LeRobot
from mmrl.protocols import DataContext

LENGTHS = (5, 3, 7, 4)
SUCCESS = (True, False, True, False)
TASKS = ("reach the red cube", "push the blue disc")
FPS, HEIGHT, WIDTH, HORIZON = 10, 32, 48, 4
CAMERAS = ("observation.images.front", "observation.images.wrist")


def task_of(episode: int) -> str:
    return TASKS[episode % 2]


def action(episode: int, t: int) -> list[float]:
    return [100.0 * episode + t, -float(t)]


def state(episode: int, t: int) -> list[float]:
    return [float(episode), float(t), 0.5]


def picture(camera: str, episode: int, t: int) -> np.ndarray:
    """uint8 [HEIGHT, WIDTH, 3]: the upper half tells the episode, the lower the frame, blue the camera."""
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[: HEIGHT // 2] = (40 + 50 * episode, 90, 60 + 120 * CAMERAS.index(camera))
    image[HEIGHT // 2 :] = (90, 40 + 25 * t, 60 + 120 * CAMERAS.index(camera))
    return image


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def write_video(file: Path, images: list[np.ndarray], gop: int = 2) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as output:
        stream: Any = output.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = *images[0].shape[:2], "yuv420p"
        stream.options = {"g": str(gop), "crf": "10"}
        for t, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = t, Fraction(1, FPS)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def frames_table(episodes: list[int], storage: str, *, outcome: bool) -> pa.Table:
    """The rows of these episodes, as a parquet file of the format has them."""
    where = [(e, t) for e in episodes for t in range(LENGTHS[e])]
    columns: dict[str, pa.Array] = {
        "observation.state": pa.array([state(e, t) for e, t in where], pa.list_(pa.float32())),
        "action": pa.FixedSizeListArray.from_arrays(pa.array([x for e, t in where for x in action(e, t)], pa.float32()), 2),
        "timestamp": pa.array([t / FPS for _, t in where], pa.float32()),
        "frame_index": pa.array([t for _, t in where]),
        "episode_index": pa.array([e for e, _ in where]),
        "index": pa.array([sum(LENGTHS[:e]) + t for e, t in where]),
        "task_index": pa.array([e % 2 for e, _ in where]),
    }
    if outcome:
        columns["next.success"] = pa.array([SUCCESS[e] and t == LENGTHS[e] - 1 for e, t in where])
    if storage == "image":
        for camera in CAMERAS:
            columns[camera] = pa.array([{"bytes": png(picture(camera, e, t)), "path": None} for e, t in where])
    return pa.table(columns)


def _info(version: str, storage: str, outcome: bool, **more: Any) -> dict[str, Any]:
    scalar = {"shape": [1], "names": None}
    features: dict[str, Any] = {
        # One camera is described channels first, as some sets of version 2 are.
        CAMERAS[0]: {"dtype": storage, "shape": [HEIGHT, WIDTH, 3], "names": ["height", "width", "channels"]},
        CAMERAS[1]: {"dtype": storage, "shape": [3, HEIGHT, WIDTH], "names": ["channels", "height", "width"]},
        "observation.state": {"dtype": "float32", "shape": [3], "names": None},
        "action": {"dtype": "float32", "shape": [2], "names": {"motors": ["x", "y"]}},
        "timestamp": {"dtype": "float32", **scalar},
        **{name: {"dtype": "int64", **scalar} for name in ("frame_index", "episode_index", "index", "task_index")},
    }
    if outcome:
        features["next.success"] = {"dtype": "bool", **scalar}
    splits = {"train": "0:3", "val": "3:4"}
    counts = {"total_episodes": len(LENGTHS), "total_frames": sum(LENGTHS), "total_tasks": len(TASKS)}
    return {
        "codebase_version": version,
        "fps": FPS,
        "chunks_size": 1000,
        "splits": splits,
        "features": features,
        **counts,
        **more,
    }


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def _write_table(file: Path, table: pa.Table, row_group: int = 1000) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=row_group)


def write_v21(root: Path, storage: str, *, outcome: bool = True) -> Path:
    """A file for each episode; two episodes in a chunk."""
    data = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    video = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    info = _info("v2.1", storage, outcome, data_path=data, video_path=video) | {"chunks_size": 2}
    _write(root / "meta/info.json", json.dumps(info))
    tasks = [{"task_index": i, "task": task} for i, task in enumerate(TASKS)]
    _write(root / "meta/tasks.jsonl", "".join(f"{json.dumps(task)}\n" for task in tasks))
    episodes = [{"episode_index": e, "tasks": [task_of(e)], "length": n} for e, n in enumerate(LENGTHS)]
    _write(root / "meta/episodes.jsonl", "".join(f"{json.dumps(episode)}\n" for episode in episodes))
    for e, length in enumerate(LENGTHS):
        where = {"episode_chunk": e // 2, "episode_index": e}
        _write_table(root / data.format(**where), frames_table([e], storage, outcome=outcome))
        for camera in CAMERAS if storage == "video" else ():
            write_video(root / video.format(video_key=camera, **where), [picture(camera, e, t) for t in range(length)], gop=12)
    return root


def write_v30(root: Path, storage: str, *, outcome: bool = True) -> Path:
    """Episodes 0 to 2 in a first file, in row groups that cut through them, and 3 in a second; videos are split after 0 and 1."""
    data, video = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet", "videos/{video_key}/chunk-{chunk_index:03d}/"
    video += "file-{file_index:03d}.mp4"
    _write(root / "meta/info.json", json.dumps(_info("v3.0", storage, outcome, data_path=data, video_path=video)))
    table = pa.table({"task_index": pa.array(range(len(TASKS))), "__index_level_0__": pa.array(TASKS)})
    _write_table(root / "meta/tasks.parquet", table)
    for file, episodes in enumerate(([0, 1, 2], [3])):
        table = frames_table(episodes, storage, outcome=outcome)
        _write_table(root / data.format(chunk_index=0, file_index=file), table, row_group=4)
    rows = []
    for e, length in enumerate(LENGTHS):
        first = sum(LENGTHS[:e])
        row: dict[str, Any] = {"episode_index": e, "tasks": [task_of(e)], "length": length, "stats/action/mean": [1.0, 2.0]}
        row |= {"data/chunk_index": 0, "data/file_index": e // 3, "dataset_from_index": first, "dataset_to_index": first + length}
        for camera in CAMERAS if storage == "video" else ():
            start = 0 if e % 2 == 0 else LENGTHS[e - 1]
            row |= {f"videos/{camera}/chunk_index": 0, f"videos/{camera}/file_index": e // 2}
            row |= {f"videos/{camera}/from_timestamp": start / FPS, f"videos/{camera}/to_timestamp": (start + length) / FPS}
        rows.append(row)
    _write_table(root / "meta/episodes/chunk-000/file-000.parquet", pa.Table.from_pylist(rows))
    for camera in CAMERAS if storage == "video" else ():
        for file in range(2):
            images = [picture(camera, e, t) for e in (2 * file, 2 * file + 1) for t in range(LENGTHS[e])]
            write_video(root / video.format(video_key=camera, chunk_index=0, file_index=file), images)
    return root


WRITERS = {"v2.1": write_v21, "v3.0": write_v30}


def source(path: Path | list[Path], *, seed: int = 0, horizon: int = HORIZON, **fields: Any) -> LeRobot:
    def none(num_envs: int, changes: Any) -> Any:
        raise AssertionError("a data set needs no environment")

    where = [str(p) for p in path] if isinstance(path, list) else str(path)
    return LeRobot(LeRobot.Config(path=where, **fields), context=DataContext(none, horizon, seed, torch.device("cpu")))
