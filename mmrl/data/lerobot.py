"""Demonstrations from LeRobot data sets, versions 2.1 and 3.0: any frame at any time, decoded when it is drawn.

Only what meta/ says of the episodes is held in memory, and caches of a bounded size. Several sets in one block are one pool of
frames; to give each a share of its own, make each a part of a ``mmrl.data.mixture:Mixture``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from mmrl.data.lerobot_format import SUCCESS, DataSet, Entry, read
from mmrl.data.lerobot_frames import Frames
from mmrl.data.running import Moments, Quantiles
from mmrl.errors import DataError
from mmrl.protocols import Advance, DataContext
from mmrl.types import Examples, Observation

_LEVELS = {"q01": 0.01, "q99": 0.99}
_AT_ONCE = 8192  # frames that a pass over the set looks at together
_CONSTANT = 1e-6  # a smaller standard deviation is taken for a dimension that never changes


class _Moment(NamedTuple):
    """A frame of an episode of the set with these frames."""

    frames: Frames
    entry: Entry
    time: int


class LeRobot:
    """See the module. Satisfies ExampleSource and StatisticsSource of mmrl.protocols."""

    @dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
    class Config:
        """Fields of a ``mmrl.data.lerobot:LeRobot`` block."""

        path: str | list[str]
        """Folder of the data set, or of several with the same cameras and sizes; every frame of all is as likely as any other."""
        cameras: dict[str, str] | None = None
        """Camera of the data set -> camera of the policy; null: all, called by the last part of their names."""
        image_size: tuple[int, int] | None = None
        """Height and width to which pictures are resized; null: as they are."""
        state: str | None = "observation.state"
        """Column of the robot's state; null: none."""
        action: str = "action"
        """Column of the actions."""
        episodes: str | None = None
        """Range of episodes such as '0:80' (80 is left out), or a split that the data set names; null: all."""
        only_successes: bool = False
        """Leave episodes out that failed; the data set must say which."""
        cache_mb: int = Field(default=128, gt=0)
        """Memory for decoded pictures and rows, for each data set."""

        @model_validator(mode="after")
        def _consistent(self) -> LeRobot.Config:
            if not self.path:
                raise ValueError("path must name at least one data set")
            names = list((self.cameras or {}).values())
            if len(set(names)) < len(names):
                raise ValueError(f"cameras gives one name to two cameras ({', '.join(names)})")
            if self.image_size is not None and min(self.image_size) < 1:
                raise ValueError("image_size must be two positive numbers, height and width")
            return self

    def __init__(self, config: Config, *, context: DataContext) -> None:
        self._config, self._horizon, self._device = config, context.horizon, context.device
        self._sets = [self._open(Path(path)) for path in ([config.path] if isinstance(config.path, str) else config.path)]
        self._refuse_unlike()
        self._moments = [(frames, entry) for frames in self._sets for entry in self._kept(frames)]
        if not self._moments:
            raise DataError(f"{config.path}: no episode that was asked for succeeded; set only_successes: false or record others")
        self._ends = torch.tensor([entry.length for _, entry in self._moments]).cumsum(0)
        self._generator = torch.Generator().manual_seed(context.seed)

    # -- building ------------------------------------------------------------------------------------------------------

    def _open(self, root: Path) -> Frames:
        config, data = self._config, read(root).select(self._config.episodes)
        numbers = [key for key in (config.state, config.action) if key is not None]
        extra = [SUCCESS] if config.only_successes and SUCCESS in data.features else []
        cameras = dict.fromkeys(self._cameras(data), config.image_size)
        return Frames(data, [*numbers, *extra], cameras, config.cache_mb * 2**20)

    def _cameras(self, data: DataSet) -> Mapping[str, str]:
        """Camera of the data set -> ours."""
        if self._config.cameras is not None:
            return self._config.cameras
        return {key: key.rpartition(".")[2] for key, feature in data.features.items() if feature.is_camera}

    def _refuse_unlike(self) -> None:
        """Sets in one block must give examples of one shape."""

        def shapes(frames: Frames) -> dict[str, object]:
            features = frames.data.features
            vectors = {key: features[key].shape for key in (self._config.state, self._config.action) if key is not None}
            return {
                **vectors,
                **{name: self._config.image_size or features[key].image_size for key, name in self._cameras(frames.data).items()},
            }

        first = shapes(self._sets[0])
        for other in self._sets[1:]:
            if (found := shapes(other)) != first:
                raise DataError(
                    f"{other.data.root}: has {found}, but {self._sets[0].data.root} has {first}; choose cameras and image_size "
                    "that both give, or make each a part of a Mixture with fields of its own"
                )

    def _kept(self, frames: Frames) -> Iterator[Entry]:
        """The episodes to draw from."""
        for entry in frames.data.episodes:
            if not self._config.only_successes or _succeeded(frames, entry):
                yield entry

    # -- drawing ---------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return int(self._ends[-1])

    def batch(self, size: int) -> Examples:
        return self.examples(torch.randint(len(self), (size,), generator=self._generator))

    def examples(self, index_N: Tensor) -> Examples:
        """The frames ``index_N`` (int64 [N], below ``len``), in that order.

        After an episode's end its last action repeats and the mask is False.
        """
        episode_N = torch.searchsorted(self._ends, index_N, right=True)
        moments = []
        for index, episode in zip(index_N.tolist(), episode_N.tolist(), strict=True):
            frames, entry = self._moments[episode]
            moments.append(_Moment(frames, entry, index - (int(self._ends[episode]) - entry.length)))
        windows = [self._window(moment) for moment in moments]
        observation = Observation(self._images(moments), self._states(moments), tuple(_instruction(m) for m in moments))
        actions_NHA = torch.stack([actions for actions, _ in windows]).to(self._device)
        return Examples(observation.to(self._device), actions_NHA, torch.stack([mask for _, mask in windows]).to(self._device))

    def _window(self, moment: _Moment) -> tuple[Tensor, Tensor]:
        """The actions [H, A] from this moment on, and which of them are real [H]."""
        frames, entry, time = moment
        real = min(self._horizon, entry.length - time)
        actions_HA = frames.numbers(entry, self._config.action, time, time + real)
        padding = actions_HA[-1:].expand(self._horizon - real, -1)
        return torch.cat([actions_HA, padding]), torch.arange(self._horizon) < real

    def _states(self, moments: Sequence[_Moment]) -> Tensor | None:
        key = self._config.state
        return None if key is None else torch.cat([m.frames.numbers(m.entry, key, m.time, m.time + 1) for m in moments])

    def _images(self, moments: Sequence[_Moment]) -> dict[str, Tensor]:
        """In the order of the files, so that neighbours are read together, and then put where they belong."""
        order = sorted(range(len(moments)), key=lambda i: (str(moments[i].entry.data), moments[i].entry.index, moments[i].time))
        images: dict[str, list[Tensor]] = {name: [torch.empty(0)] * len(moments) for name in self._names()}
        for i in order:
            frames, entry, time = moments[i]
            for key, name in self._cameras(frames.data).items():
                images[name][i] = frames.picture(entry, key, time)
        return {name: torch.stack(pictures) for name, pictures in images.items()}

    def _names(self) -> list[str]:
        return list(self._cameras(self._sets[0].data).values())

    def state_dict(self) -> Mapping[str, Tensor]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._generator.set_state(state["generator"])

    # -- statistics --------------------------------------------------------------------------------------------------------

    def statistics(self, advance: Advance) -> dict[str, list[float]]:
        """See StatisticsSource: each frame counts once, whatever the horizon."""
        columns = {"state": self._config.state, "actions": self._config.action}
        found: dict[str, list[float]] = {}
        moments, quantiles = {}, {}
        for name, key in columns.items():
            if key is not None:
                dim = self._moments[0][0].numbers(self._moments[0][1], key, 0, 1).shape[1]
                moments[name], quantiles[name] = Moments(dim), Quantiles(dim, tuple(_LEVELS.values()))
        for first_pass in (True, False):
            for names_ND, count in self._pass({name: columns[name] for name in moments}):
                for name, x_ND in names_ND.items():
                    if first_pass:
                        moments[name].update(x_ND)
                        quantiles[name].first(x_ND)
                    else:
                        quantiles[name].second(x_ND)
                advance(count)
        for name in moments:
            std_D = moments[name].std_D(unbiased=True)
            found[f"{name}_mean"] = moments[name].mean_D.tolist()
            found[f"{name}_std"] = torch.where(std_D > _CONSTANT, std_D, torch.ones_like(std_D)).tolist()
            for level, values_D in zip(_LEVELS, quantiles[name].result(), strict=True):
                found[f"{name}_{level}"] = values_D.tolist()
            found[f"{name}_min"], found[f"{name}_max"] = moments[name].min_D.tolist(), moments[name].max_D.tolist()
        return found

    def _pass(self, columns: Mapping[str, str | None]) -> Iterator[tuple[dict[str, Tensor], int]]:
        """All frames, some thousand at a time: name -> [N, D], and N."""
        waiting: list[dict[str, Tensor]] = []
        count = 0
        for i, (frames, entry) in enumerate(self._moments):
            waiting.append({name: frames.numbers(entry, key) for name, key in columns.items() if key is not None})
            count += entry.length
            if count >= _AT_ONCE or i + 1 == len(self._moments):
                yield {name: torch.cat([part[name] for part in waiting]) for name in columns}, count
                waiting, count = [], 0


def _succeeded(frames: Frames, entry: Entry) -> bool:
    if entry.success is not None:
        return entry.success
    if SUCCESS not in frames.data.features:
        raise DataError(
            f"{frames.data.root}: does not say whether episode {entry.index} succeeded (there is no {SUCCESS!r}); "
            "set only_successes: false"
        )
    return bool(frames.numbers(entry, SUCCESS).any())


def _instruction(moment: _Moment) -> str:
    frames, entry, time = moment
    task = int(frames.numbers(entry, "task_index", time, time + 1))
    if task not in frames.data.tasks:
        raise DataError(
            f"{entry.data}: episode {entry.index} has task {task}, which meta/ does not name; copy the data set again"
        )
    return frames.data.tasks[task]
