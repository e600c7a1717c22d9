"""Writes recorded episodes as a LeRobot data set, version 3.0, that LeRobot itself loads.

Everything goes into a hidden folder beside the place asked for and is renamed once it is whole. Departures from what LeRobot
writes: an episode's entry also has ``success`` and ``task_id`` (frames have the usual ``next.success``), the quantiles of
meta/stats.json are those of all frames instead of means over episodes, and image statistics take every picture into account.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from av.error import FFmpegError
from PIL import Image
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from mmrl.data.lerobot_format import DATA_PATH, EPISODES_PATH, INFO, STATS, SUCCESS, TASK_COLUMN, TASKS, VIDEO_PATH
from mmrl.data.running import Moments, Quantiles
from mmrl.errors import DataError
from mmrl.types import Episode

_LEVELS = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
_FILES_PER_CHUNK = 1000
_ENTRIES_AT_ONCE = 100
# A key picture at least every second frame, as LeRobot has it, so that any frame is found fast.
_CODECS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "h264": ("libx264", {"g": "2", "bf": "0", "preset": "veryfast"}),
    "av1": ("libsvtav1", {"g": "2", "preset": "8"}),
}
_SCALARS = {"float32": pa.float32(), "int64": pa.int64(), "bool": pa.bool_()}
_PICTURE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
_OWN = (
    "timestamp",
    "frame_index",
    "episode_index",
    "index",
    "task_index",
)  # columns of every set, which follow the recorded ones


class LeRobotWriter:
    """See the module. Satisfies EpisodeSink of mmrl.protocols."""

    @dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
    class Config:
        """Fields of a ``mmrl.data.lerobot_write:LeRobotWriter`` block."""

        fps: int = Field(default=10, gt=0)
        """Actions per second."""
        storage: Literal["video", "image"] = "video"
        """``video`` is small and lossy; ``image`` keeps every pixel (PNG within the parquet files)."""
        codec: Literal["h264", "av1"] = "h264"
        """Coding of the videos."""
        crf: int = Field(default=23, ge=0, le=63)
        """How much the videos lose: lower is better and larger."""
        data_file_mb: int = Field(default=100, gt=0)
        """Size at which the next parquet file is begun."""
        video_file_mb: int = Field(default=200, gt=0)
        """Size at which the next video file is begun."""

    def __init__(self, config: Config, folder: Path, *, name: str) -> None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError(f"{folder}: is there already and is not written over; remove it or choose another folder")
        self._config, self._final, self._name = config, folder, name
        self._writing = folder.with_name(f".{folder.name}.writing")
        self._features: dict[str, dict[str, Any]] = {}
        self._tasks: dict[str, int] = {}
        self._entries: list[dict[str, Any]] = []
        self._episodes, self._frames = 0, 0
        self._data: _Parquet | None = None
        self._episode_file: _Parquet | None = None
        self._videos: dict[str, _Videos] = {}
        self._pixels: dict[str, Tensor] = {}  # of each camera, how often each value of each channel was seen [3, 256]

    def __enter__(self) -> LeRobotWriter:
        shutil.rmtree(self._writing, ignore_errors=True)  # what a killed process left
        self._writing.mkdir(parents=True)
        return self

    def __exit__(self, *failure: object) -> None:
        with contextlib.suppress(OSError, ValueError, FFmpegError, pa.ArrowException):  # what failed is known already
            self._close()
        shutil.rmtree(self._writing, ignore_errors=True)

    # -- episodes ------------------------------------------------------------------------------------------------------

    def add(self, episode: Episode) -> None:
        features = self._describe(episode)
        if not self._features:
            self._features = features
            self._open()
        elif features != self._features:
            raise DataError(f"{self._final}: episode {self._episodes} has {features}, but those before it have {self._features}")
        assert self._data is not None and self._episode_file is not None
        columns = self._columns(episode)
        self._data.write(pa.table([self._arrow(key, columns[key]) for key in self._stored()], names=self._stored()))
        entry = {
            "episode_index": self._episodes,
            "tasks": list(dict.fromkeys(episode.observation.instructions)),
            "length": len(episode),
            "data/chunk_index": self._data.chunk,
            "data/file_index": self._data.file,
            "dataset_from_index": self._frames,
            "dataset_to_index": self._frames + len(episode),
            "success": episode.success,
            "task_id": episode.task_id,
        }
        for key, videos in self._videos.items():
            entry |= videos.add(columns[key])
        for key in self._features:
            entry |= {f"stats/{key}/{name}": value for name, value in self._statistics(key, columns[key]).items()}
        self._entries.append({**entry, "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
        self._episodes, self._frames = self._episodes + 1, self._frames + len(episode)
        if len(self._entries) >= _ENTRIES_AT_ONCE:
            self._flush()

    def finish(self) -> None:
        """Put the data set in its place. Raises DataError where no episode was added."""
        if not self._episodes:
            raise DataError(f"{self._final}: there is no episode to write")
        self._flush()
        self._close()
        tasks = list(self._tasks)
        table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), TASK_COLUMN: pa.array(tasks, pa.string())})
        pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(_PANDAS)}), self._writing / TASKS)
        self._write_json(STATS, self._all_statistics())
        self._write_json(INFO, self._info())
        if self._final.exists():
            self._final.rmdir()  # an empty one
        self._writing.rename(self._final)

    # -- columns -----------------------------------------------------------------------------------------------------------

    def _describe(self, episode: Episode) -> dict[str, dict[str, Any]]:
        """info.json's ``features`` of this episode."""
        seen, storage = episode.observation, self._config.storage
        vector = {"dtype": "float32", "names": None}
        cameras = {}
        for camera, images in seen.images.items():
            height, width = images.shape[1:3]
            if storage == "video" and (height % 2 or width % 2):
                raise DataError(f"videos need even sizes, but camera {camera!r} has {width}x{height}; set storage: image")
            names = ["height", "width", "channels"]
            cameras[f"observation.images.{camera}"] = {"dtype": storage, "shape": [height, width, 3], "names": names}
        state = {} if seen.state is None else {"observation.state": {**vector, "shape": [seen.state.shape[1]]}}
        outcome = {"next.reward": "float32", "next.done": "bool", SUCCESS: "bool"}
        own = {key: "float32" if key == "timestamp" else "int64" for key in _OWN}
        return {
            **cameras,
            **state,
            "action": {**vector, "shape": [episode.actions_TA.shape[1]]},
            **{key: {"dtype": dtype, "shape": [1], "names": None} for key, dtype in {**outcome, **own}.items()},
        }

    def _columns(self, episode: Episode) -> dict[str, Tensor]:
        """Every feature of every frame: [T, D] numbers, or [T, height, width, 3] pixels."""
        length, seen = len(episode), episode.observation
        frame_T = torch.arange(length)
        last_T = frame_T == length - 1
        tasks = [self._tasks.setdefault(sentence, len(self._tasks)) for sentence in seen.instructions]
        columns = {f"observation.images.{camera}": images.cpu() for camera, images in seen.images.items()}
        if seen.state is not None:
            columns["observation.state"] = seen.state
        columns |= {
            "action": episode.actions_TA,
            "next.reward": episode.rewards_T,
            "next.done": last_T,
            SUCCESS: last_T & episode.success,
            "timestamp": frame_T.double() / self._config.fps,
            "frame_index": frame_T,
            "episode_index": torch.full((length,), self._episodes),
            "index": frame_T + self._frames,
            "task_index": torch.tensor(tasks),
        }
        return {key: value.detach().cpu() if value.ndim > 1 else value.detach().cpu()[:, None] for key, value in columns.items()}

    def _stored(self) -> list[str]:
        """The columns of the parquet files; videos stand apart."""
        return [key for key, feature in self._features.items() if feature["dtype"] != "video"]

    def _arrow(self, key: str, column: Tensor) -> pa.Array:
        feature = self._features[key]
        if feature["dtype"] == "image":
            rows = [{"bytes": _png(image), "path": f"frame-{t:06d}.png"} for t, image in enumerate(column)]
            return pa.array(rows, _PICTURE)
        scalar, [dim] = _SCALARS[feature["dtype"]], feature["shape"]
        flat = pa.array(column.reshape(-1).numpy()).cast(scalar, safe=False)
        return flat if dim == 1 else pa.FixedSizeListArray.from_arrays(flat, dim)

    # -- files -------------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        self._data = _Parquet(self._writing, DATA_PATH, self._config.data_file_mb)
        self._episode_file = _Parquet(self._writing, EPISODES_PATH, None)
        for key, feature in self._features.items():
            if feature["dtype"] == "video":
                self._videos[key] = _Videos(self._writing, key, self._config)
            if feature["dtype"] in ("video", "image"):
                self._pixels[key] = torch.zeros(3, 256, dtype=torch.long)

    def _flush(self) -> None:
        if self._entries and self._episode_file is not None:
            self._episode_file.write(pa.Table.from_pylist(self._entries))
            self._entries = []

    def _close(self) -> None:
        for file in (self._data, self._episode_file, *self._videos.values()):
            if file is not None:
                file.close()

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        (self._writing / name).write_text(json.dumps(content, indent=4) + "\n")

    def _info(self) -> dict[str, Any]:
        features = {key: dict(feature) for key, feature in self._features.items()}
        for key, videos in self._videos.items():
            features[key]["info"] = videos.info()
        return {
            "codebase_version": "v3.0",
            "robot_type": self._name,
            "total_episodes": self._episodes,
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "chunks_size": _FILES_PER_CHUNK,
            "data_files_size_in_mb": self._config.data_file_mb,
            "video_files_size_in_mb": self._config.video_file_mb,
            "fps": self._config.fps,
            "splits": {"train": f"0:{self._episodes}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self._videos else None,
            "features": features,
        }

    # -- statistics --------------------------------------------------------------------------------------------------------

    def _statistics(self, key: str, column: Tensor) -> dict[str, Any]:
        """Of one episode; pixels are counted for the whole set on the way."""
        if key in self._pixels:
            counts_3V = torch.stack([torch.bincount(channel.reshape(-1).long(), minlength=256) for channel in column.unbind(-1)])
            self._pixels[key] += counts_3V
            return _pixel_statistics(counts_3V, len(column))
        moments = Moments(column.shape[1])
        moments.update(column)
        quantiles = torch.quantile(column.double(), torch.tensor(list(_LEVELS.values()), dtype=torch.float64), dim=0)
        return _entry(moments, quantiles)

    def _all_statistics(self) -> dict[str, Any]:
        """Of the whole set, read again from its parquet files."""
        assert self._data is not None
        numbers = {key: feature["shape"][0] for key, feature in self._features.items() if key not in self._pixels}
        moments = {key: Moments(dim) for key, dim in numbers.items()}
        quantiles = {key: Quantiles(dim, tuple(_LEVELS.values())) for key, dim in numbers.items()}
        for first_pass in (True, False):
            for file in self._data.files:
                opened = pq.ParquetFile(file)
                for batch in opened.iter_batches(columns=list(numbers)):
                    for key, dim in numbers.items():
                        x_ND = _numbers(batch.column(key), dim)
                        if first_pass:
                            moments[key].update(x_ND)
                            quantiles[key].first(x_ND)
                        else:
                            quantiles[key].second(x_ND)
                opened.close()
        pictures = {key: _pixel_statistics(counts, self._frames) for key, counts in self._pixels.items()}
        return {**pictures, **{key: _entry(moments[key], quantiles[key].result()) for key in numbers}}


class _Numbered:
    """Files chunk-000/file-000, file-001, ..., of which the next begins once one has ``limit_mb``; None: a single one."""

    def __init__(self, root: Path, pattern: str, limit_mb: int | None) -> None:
        self._root, self._pattern, self._limit = root, pattern, math.inf if limit_mb is None else limit_mb * 2**20
        self.chunk, self.file = 0, -1
        self.files: list[Path] = []

    def _next(self) -> Path:
        self.file += 1
        if self.file == _FILES_PER_CHUNK:
            self.chunk, self.file = self.chunk + 1, 0
        self.files.append(self._root / self._pattern.format(chunk_index=self.chunk, file_index=self.file))
        self.files[-1].parent.mkdir(parents=True, exist_ok=True)
        return self.files[-1]

    def _full(self) -> bool:
        # An encoder may hold its first pictures back, and until it lets them go there is no file.
        return self.files[-1].is_file() and self.files[-1].stat().st_size >= self._limit


class _Parquet(_Numbered):
    """Tables of one schema, each a row group."""

    _writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        if self._writer is not None and self._full():
            self.close()
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._next(), table.schema, compression="snappy")
        self._writer.write_table(table, row_group_size=max(1, len(table)))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class _Videos(_Numbered):
    """The episodes of one camera, one after the other in mp4 files."""

    _output: Any = None
    _stream: Any = None

    def __init__(self, root: Path, key: str, config: LeRobotWriter.Config) -> None:
        pattern = VIDEO_PATH.replace("{video_key}", key)
        super().__init__(root, pattern, config.video_file_mb)
        self._key, self._config, self._frames = key, config, 0

    def add(self, images_THW3: Tensor) -> dict[str, Any]:
        """Encode an episode; where it is, as its entry says it."""
        if self._output is not None and self._full():
            self.close()
        output = self._output or self._begin(*images_THW3.shape[1:3])
        start = self._frames
        for image_HW3 in images_THW3:
            picture = av.VideoFrame.from_ndarray(image_HW3.contiguous().numpy(), format="rgb24")
            picture.pts, picture.time_base = self._frames, Fraction(1, self._config.fps)
            output.mux(self._stream.encode(picture))
            self._frames += 1
        return {
            f"videos/{self._key}/chunk_index": self.chunk,
            f"videos/{self._key}/file_index": self.file,
            f"videos/{self._key}/from_timestamp": start / self._config.fps,
            f"videos/{self._key}/to_timestamp": self._frames / self._config.fps,
        }

    def _begin(self, height: int, width: int) -> Any:
        encoder, options = _CODECS[self._config.codec]
        self._output = av.open(str(self._next()), "w")
        self._stream = self._output.add_stream(encoder, rate=self._config.fps)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        self._stream.options = {**options, "crf": str(self._config.crf)}
        self._frames = 0
        return self._output

    def close(self) -> None:
        if self._output is not None and self._stream is not None:
            self._output.mux(self._stream.encode(None))
            self._output.close()
            self._output = None

    def info(self) -> dict[str, Any]:
        return {
            "video.height": self._stream.height,
            "video.width": self._stream.width,
            "video.codec": self._config.codec,
            "video.pix_fmt": "yuv420p",
            "video.is_depth_map": False,
            "video.fps": self._config.fps,
            "video.channels": 3,
            "has_audio": False,
        }


# With this, pandas takes the sentences for the index of tasks.parquet, as LeRobot wants it.
_PANDAS = {
    "index_columns": [TASK_COLUMN],
    "column_indexes": [],
    "columns": [
        {"name": name, "field_name": field, "pandas_type": kind, "numpy_type": stored, "metadata": None}
        for name, field, kind, stored in (
            ("task_index", "task_index", "int64", "int64"),
            (None, TASK_COLUMN, "unicode", "object"),
        )
    ],
}


def _png(image_HW3: Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image_HW3.contiguous().numpy()).save(file, "PNG", compress_level=6)
    return file.getvalue()


def _numbers(column: Any, dim: int) -> Tensor:
    flat = column.flatten() if pa.types.is_fixed_size_list(column.type) else column
    return torch.from_numpy(flat.to_numpy(zero_copy_only=False).copy()).reshape(-1, dim).double()


def _entry(moments: Moments, quantiles_QD: Tensor) -> dict[str, Any]:
    levels = {name: values_D.tolist() for name, values_D in zip(_LEVELS, quantiles_QD, strict=True)}
    std_D = moments.std_D(unbiased=False)
    return {
        "min": moments.min_D.tolist(),
        "max": moments.max_D.tolist(),
        "mean": moments.mean_D.tolist(),
        "std": std_D.tolist(),
        "count": [moments.count],
        **levels,
    }


def _pixel_statistics(counts_3V: Tensor, pictures: int) -> dict[str, Any]:
    """From how often each value of each channel was seen; in [0, 1] and shaped [3, 1, 1], as LeRobot has them."""
    value_V = torch.arange(256, dtype=torch.float64) / 255
    total_3 = counts_3V.sum(1)
    mean_3 = (counts_3V * value_V).sum(1) / total_3
    ends_3V = counts_3V.cumsum(1)
    found: dict[str, Sequence[float] | Tensor] = {
        "min": value_V[(counts_3V > 0).int().argmax(1)],
        "max": value_V[255 - (counts_3V > 0).int().flip(1).argmax(1)],
        "mean": mean_3,
        "std": ((counts_3V * (value_V - mean_3[:, None]).square()).sum(1) / total_3).sqrt(),
    }
    for name, level in _LEVELS.items():
        place_3 = level * (total_3 - 1).double()
        below_3, above_3 = (
            value_V[torch.searchsorted(ends_3V, rank_3.long()[:, None], right=True)[:, 0]]
            for rank_3 in (place_3.floor(), place_3.ceil())
        )
        found[name] = below_3 + (place_3 - place_3.floor()) * (above_3 - below_3)
    return {**{name: [[[float(x)]] for x in values] for name, values in found.items()}, "count": [pictures]}
