"""The frames of a LeRobot data set, any of them at any time: parquet rows and pictures, through caches of a bounded size."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from av.error import FFmpegError
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mmrl.data.lerobot_format import DataSet, Entry, Feature, reading
from mmrl.errors import DataError

_OPEN_FILES = 16
_AGAIN = "copy or record the data set again"


class Cache:
    """The most recently used values, at most ``budget`` of their summed sizes (but always the last one)."""

    def __init__(self, budget: int, drop: Callable[[Any], None] = lambda value: None) -> None:
        self._budget, self._drop = budget, drop
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self.size = 0

    def get(self, key: Hashable, make: Callable[[], tuple[Any, int]]) -> Any:
        """The value of ``key``; where it is not there, ``make`` gives it and its size."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key][0]
        value, size = make()
        self._values[key] = value, size
        self.size += size
        while self.size > self._budget and len(self._values) > 1:
            old, freed = self._values.popitem(last=False)[1]
            self.size -= freed
            self._drop(old)
        return value


class Frames:
    """The frames of ``data``: numbers of the columns ``numbers``, pictures of the cameras in ``sizes``.

    sizes: camera key -> (height, width) to resize to, None for as they are. budget: bytes of the caches together.
    """

    def __init__(self, data: DataSet, numbers: Sequence[str], sizes: Mapping[str, tuple[int, int] | None], budget: int) -> None:
        self.data, self._sizes = data, sizes
        self._numbers = [*dict.fromkeys((*numbers, "episode_index", "frame_index", "task_index", "timestamp"))]
        for key, wants_camera in [*((key, False) for key in self._numbers), *((key, True) for key in sizes)]:
            if data.feature(key).is_camera != wants_camera:
                raise DataError(f"{data.root}: {key!r} is {data.feature(key).dtype}; give cameras and numbers where each belongs")
        # Rows are small, pictures are not: a quarter of the memory is plenty for them.
        self._rows, self._pictures = Cache(budget // 4), Cache(budget - budget // 4)
        self._tables = Cache(_OPEN_FILES, lambda file: file[0].close())
        self._videos = Cache(_OPEN_FILES, lambda container: container.close())

    # -- numbers -----------------------------------------------------------------------------------------------------------

    def numbers(self, entry: Entry, key: str, first: int = 0, last: int | None = None) -> Tensor:
        """Column ``key`` of the episode's frames [first, last), all by default: [N, D], float32 or int64."""
        return self._rows.get(entry.index, lambda: self._episode(entry))[key][first:last]

    def _episode(self, entry: Entry) -> tuple[Mapping[str, Tensor], int]:
        """Every column of one episode, and how many bytes they are."""
        groups = self._groups(entry, entry.first_row, entry.first_row + entry.length)
        parts = [{key: column[i:j] for key, column in self._row_group(entry, group).items()} for group, i, j in groups]
        # A copy, so that a part does not keep a large row group in memory.
        columns = {key: torch.cat([part[key] for part in parts]) for key in self._numbers}
        indices_N, frames_N = columns["episode_index"][:, 0], columns["frame_index"][:, 0]
        if not bool((indices_N == entry.index).all()):
            found = sorted(set(indices_N.tolist()))[:3]
            raise DataError(f"{entry.data}: holds episode {found} where episode {entry.index} should be; {_AGAIN}")
        if not torch.equal(frames_N, torch.arange(entry.length)):
            raise DataError(
                f"{entry.data}: the frames of episode {entry.index} are not numbered 0 to {entry.length - 1}; {_AGAIN}"
            )
        return columns, sum(column.nbytes for column in columns.values())

    def _groups(self, entry: Entry, first: int, last: int) -> list[tuple[int, int, int]]:
        """The row groups that hold the file's rows [first, last): (number, first row within it, last row)."""
        _, starts = self._table(entry)
        group = int(np.searchsorted(starts, first, side="right")) - 1
        found = []
        while first < last:
            end = min(last, int(starts[group + 1]))
            found.append((group, first - int(starts[group]), end - int(starts[group])))
            group, first = group + 1, end
        return found

    def _table(self, entry: Entry) -> tuple[pq.ParquetFile, np.ndarray]:
        """The open file, and the row at which each of its row groups starts, the end of the last one included."""

        def load() -> tuple[Any, int]:
            with reading(entry.data, f"episode {entry.index}"):
                file = pq.ParquetFile(entry.data)
                sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
                names = set(file.schema_arrow.names)
            rows, wanted = sum(sizes), self.data.rows_needed[entry.data]
            if rows < wanted or (rows > wanted and self.data.one_episode_per_file):
                raise DataError(f"{entry.data}: has {rows} rows, but with episode {entry.index} it needs {wanted}; {_AGAIN}")
            pictures = [key for key in self._sizes if self.data.features[key].dtype == "image"]
            for key in (*self._numbers, *pictures):
                if key not in names:
                    raise DataError(f"{entry.data}: has no column {key!r}, but episode {entry.index} needs it; {_AGAIN}")
            return (file, np.cumsum([0, *sizes])), 1

        return self._tables.get(entry.data, load)

    def _row_group(self, entry: Entry, group: int) -> Mapping[str, Tensor]:
        def load() -> tuple[Any, int]:
            file, _ = self._table(entry)
            with reading(entry.data, f"episode {entry.index}"):
                table = file.read_row_group(group, columns=self._numbers, use_threads=False)
            columns = {key: self._column(entry, table[key], self.data.features[key]) for key in self._numbers}
            return columns, sum(column.nbytes for column in columns.values())

        return self._rows.get((entry.data, group), load)

    def _column(self, entry: Entry, column: pa.ChunkedArray, feature: Feature) -> Tensor:
        """[N, D] of a column of lists of D numbers, or of single ones."""
        array = column.combine_chunks()
        dim = int(np.prod(feature.shape))
        who = f"{entry.data}: {feature.key!r} of episode {entry.index}"
        while pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
            fixed = pa.types.is_fixed_size_list(array.type)
            if not fixed and len(sizes := array.value_lengths().drop_null().unique()) > 1:
                raise DataError(f"{who} or its neighbours has rows of {sizes[0]} and of {sizes[1]} entries; {_AGAIN}")
            array = array.flatten()
        if len(array) != len(column) * dim:
            raise DataError(f"{who} has {len(array)} numbers in {len(column)} rows, but info.json says {dim} each; {_AGAIN}")
        if array.null_count:
            raise DataError(f"{who} or its neighbours has {array.null_count} empty entries; {_AGAIN}")
        if not (pa.types.is_floating(array.type) or pa.types.is_integer(array.type) or pa.types.is_boolean(array.type)):
            raise DataError(f"{who} holds entries of type {array.type}, which are no numbers; {_AGAIN}")
        values = torch.from_numpy(array.to_numpy(zero_copy_only=False).copy()).reshape(len(column), dim)
        if not bool(values.isfinite().all()):
            raise DataError(f"{who} or its neighbours has numbers that are not finite; {_AGAIN}")
        return values.float() if values.is_floating_point() else values.long()

    # -- pictures ----------------------------------------------------------------------------------------------------------

    def picture(self, entry: Entry, key: str, frame: int) -> Tensor:
        """What camera ``key`` saw at a frame of the episode: uint8 [height, width, 3]."""
        read = self._from_video if self.data.features[key].dtype == "video" else self._from_row

        def load() -> tuple[Tensor, int]:
            image_HW3 = fitted(read(entry, key, frame), self._sizes[key])
            return image_HW3, image_HW3.nbytes

        return self._pictures.get((entry.index, key, frame), load)

    def _from_row(self, entry: Entry, key: str, frame: int) -> Tensor:
        [(group, row, _)] = self._groups(entry, entry.first_row + frame, entry.first_row + frame + 1)

        def load() -> tuple[Any, int]:
            file, _ = self._table(entry)
            with reading(entry.data, f"episode {entry.index}"):
                column = file.read_row_group(group, columns=[key], use_threads=False)[key]
            return column, column.nbytes

        stored = self._rows.get((entry.data, group, key), load)[row].as_py()
        try:
            content = stored["bytes"] or (self.data.root / stored["path"]).read_bytes()
            picture = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
        except (OSError, KeyError, TypeError, UnidentifiedImageError) as error:
            raise DataError(f"{entry.data}: {key!r}, frame {frame} of episode {entry.index} is no image; {_AGAIN}") from error
        return self._right_size(entry, key, torch.from_numpy(picture), entry.data)

    def _from_video(self, entry: Entry, key: str, frame: int) -> Tensor:
        span, fps = entry.videos[key], self.data.fps
        seconds = span.start + float(self.numbers(entry, "timestamp", frame, frame + 1))
        try:
            container = self._video(entry, key)
            stream = container.streams.video[0]
            assert stream.time_base is not None
            container.seek(round(seconds / stream.time_base), stream=stream)
            for picture in container.decode(stream):
                # From the key frame before it to the first that is not clearly earlier.
                if picture.time is not None and picture.time > seconds - 0.5 / fps:
                    if picture.time < seconds + 0.5 / fps:
                        return self._right_size(entry, key, torch.from_numpy(picture.to_ndarray(format="rgb24")), span.file)
                    break
        except (FFmpegError, IndexError) as error:
            raise DataError(f"{span.file}: cannot be decoded at frame {frame} of episode {entry.index}; {_AGAIN}") from error
        raise DataError(f"{span.file}: has no picture at {seconds:.3f} s, frame {frame} of episode {entry.index}; {_AGAIN}")

    def _video(self, entry: Entry, key: str) -> Any:
        file = entry.videos[key].file

        def load() -> tuple[Any, int]:
            if not file.is_file():
                raise DataError(f"{file}: is missing, but episode {entry.index} is in it; {_AGAIN}")
            container = av.open(str(file))
            frames, wanted = container.streams.video[0].frames, self.data.frames_needed[file]
            if frames and (frames < wanted or (frames > wanted and self.data.one_episode_per_file)):
                container.close()
                raise DataError(f"{file}: has {frames} pictures, but with episode {entry.index} it needs {wanted}; {_AGAIN}")
            return container, 1

        return self._videos.get(file, load)

    def _right_size(self, entry: Entry, key: str, picture_HW3: Tensor, file: Path) -> Tensor:
        expected = self.data.features[key].image_size
        if tuple(picture_HW3.shape[:2]) != expected:
            height, width = picture_HW3.shape[:2]
            raise DataError(
                f"{file}: the pictures of episode {entry.index} are {width}x{height}, but info.json says "
                f"{expected[1]}x{expected[0]} for {key!r}; {_AGAIN}"
            )
        return picture_HW3


def fitted(picture_HW3: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Resized (without keeping its aspect, smoothed where it shrinks) to height and width ``size``; None: as it is."""
    if size is None or tuple(picture_HW3.shape[:2]) == tuple(size):
        return picture_HW3
    pixels = picture_HW3.permute(2, 0, 1)[None].float()
    pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)
    return pixels[0].permute(1, 2, 0).round().clamp(0, 255).byte()
