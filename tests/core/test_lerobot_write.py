"""Data sets that mmrl writes: everything comes back, the description is LeRobot's, and nothing is left half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from mmrl.data.lerobot_format import read
from mmrl.data.lerobot_write import LeRobotWriter
from mmrl.errors import DataError
from mmrl.types import Episode, Observation
from tests.core import lerobot_sets as sets

LENGTHS, SUCCESS = (6, 1, 9), (True, False, True)


def smooth_pictures(length: int, size: tuple[int, int], seed: int) -> Tensor:
    """Pictures that a video keeps well: two moving ramps."""
    height, width = size
    down, right = torch.linspace(20, 200, height)[:, None].expand(size), torch.linspace(200, 20, width).expand(size)
    frames = [torch.stack([down, right, torch.full(size, 30.0 + 20 * t + 5 * seed)], -1) for t in range(length)]
    return torch.stack(frames).byte()


def episode(index: int, size: tuple[int, int] = (32, 48), **images: Tensor) -> Episode:
    length = LENGTHS[index % 3]
    generator = torch.Generator().manual_seed(index)
    sentences = tuple("first half" if t < 3 else f"task {index}" for t in range(length))
    seen = Observation(
        images or {"front": smooth_pictures(length, size, index), "wrist": smooth_pictures(length, size, index + 5)},
        torch.randn(length, 3, generator=generator),
        sentences,
    )
    actions, rewards = torch.randn(length, 2, generator=generator), torch.rand(length, generator=generator)
    return Episode(seen, actions, rewards, SUCCESS[index % 3], SUCCESS[index % 3], 70 + index)


def write(folder: Path, episodes: list[Episode], **fields: Any) -> Path:
    with LeRobotWriter(LeRobotWriter.Config(**fields), folder, name="robot") as writer:
        for one in episodes:
            writer.add(one)
        writer.finish()
    return folder


@pytest.fixture(scope="module", params=["image", "video"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("sets") / "mine"
    return request.param, write(folder, [episode(i) for i in range(3)], storage=request.param, fps=20, crf=10)


def test_everything_comes_back(written: tuple[str, Path]) -> None:
    storage, folder = written
    source = sets.source(folder)
    examples = source.examples(torch.arange(len(source)))
    episodes = [episode(i) for i in range(3)]
    expected = Observation.concat([one.observation for one in episodes])
    assert examples.observation.state is not None and torch.equal(examples.observation.state, expected.state)  # type: ignore[arg-type]
    assert examples.observation.instructions == expected.instructions
    assert torch.equal(examples.actions_BHA[:, 0], torch.cat([one.actions_TA for one in episodes]))
    for camera, pictures in expected.images.items():
        difference = (examples.observation.images[camera].int() - pictures.int()).abs()
        assert int(difference.max()) <= (0 if storage == "image" else 16)  # the next frame is 20 away
    assert [entry.success for entry in read(folder).episodes] == list(SUCCESS)
    assert len(sets.source(folder, only_successes=True)) == 6 + 9


def test_the_description_is_lerobot_s(written: tuple[str, Path]) -> None:
    storage, folder = written
    info = json.loads((folder / "meta/info.json").read_text())
    assert {key: info[key] for key in ("codebase_version", "robot_type", "fps", "total_episodes", "total_frames", "splits")} == {
        "codebase_version": "v3.0",
        "robot_type": "robot",
        "fps": 20,
        "total_episodes": 3,
        "total_frames": 16,
        "splits": {"train": "0:3"},
    }
    assert info["features"]["action"] == {"dtype": "float32", "shape": [2], "names": None}
    camera = info["features"]["observation.images.wrist"]
    assert (camera["dtype"], camera["shape"], camera["names"]) == (storage, [32, 48, 3], ["height", "width", "channels"])
    assert ("info" in camera) == (storage == "video")
    assert (info["video_path"] is None) == (storage == "image")
    frames = pq.ParquetFile(folder / "data/chunk-000/file-000.parquet").read()
    assert set(frames.column_names) == {key for key, f in info["features"].items() if f["dtype"] != "video"}
    assert frames["index"].to_pylist() == list(range(16))
    assert frames["frame_index"].to_pylist() == [t for length in LENGTHS for t in range(length)]
    assert frames["timestamp"].to_pylist() == pytest.approx([t / 20 for length in LENGTHS for t in range(length)], abs=1e-7)
    ends = [t == length - 1 for length in LENGTHS for t in range(length)]
    assert frames["next.done"].to_pylist() == ends
    success = [SUCCESS[i] for i, length in enumerate(LENGTHS) for _ in range(length)]
    assert frames["next.success"].to_pylist() == [done and good for done, good in zip(ends, success, strict=True)]
    assert frames["next.reward"].to_pylist() == torch.cat([episode(i).rewards_T for i in range(3)]).tolist()
    tasks = pq.ParquetFile(folder / "meta/tasks.parquet").read()
    assert tasks.to_pydict() == {"task_index": [0, 1, 2], "__index_level_0__": ["first half", "task 0", "task 2"]}
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["__index_level_0__"]


def test_entries_say_where_each_episode_is(written: tuple[str, Path]) -> None:
    storage, folder = written
    rows = pq.ParquetFile(folder / "meta/episodes/chunk-000/file-000.parquet").read().to_pylist()
    assert [row["length"] for row in rows] == list(LENGTHS)
    assert [(row["dataset_from_index"], row["dataset_to_index"]) for row in rows] == [(0, 6), (6, 7), (7, 16)]
    assert [row["tasks"] for row in rows] == [["first half", "task 0"], ["first half"], ["first half", "task 2"]]
    assert [row["task_id"] for row in rows] == [70, 71, 72]
    if storage == "video":
        key = "videos/observation.images.front/"
        assert [(row[f"{key}from_timestamp"], row[f"{key}to_timestamp"]) for row in rows] == [(0, 0.3), (0.3, 0.35), (0.35, 0.8)]


def test_statistics_are_numpy_s(written: tuple[str, Path]) -> None:
    _, folder = written
    everything = json.loads((folder / "meta/stats.json").read_text())
    rows = pq.ParquetFile(folder / "meta/episodes/chunk-000/file-000.parquet").read().to_pylist()
    episodes = [episode(i) for i in range(3)]
    cases = [
        (everything, episodes),
        *(({k: _entry(row, k) for k in everything}, [one]) for row, one in zip(rows, episodes, strict=True)),
    ]
    for found, of in cases:
        actions = torch.cat([one.actions_TA for one in of]).double().numpy()
        pixels = torch.cat([one.observation.images["front"] for one in of]).reshape(-1, 3).double().numpy() / 255
        for key, x in (("action", actions), ("observation.images.front", pixels)):
            expected = {"min": x.min(0), "max": x.max(0), "mean": x.mean(0), "std": x.std(0)}
            expected |= {f"q{round(100 * q):02d}": np.quantile(x, q, axis=0) for q in (0.01, 0.1, 0.5, 0.9, 0.99)}
            assert set(found[key]) == {*expected, "count"}
            assert found[key]["count"] == [sum(len(one) for one in of)]
            for name, value in expected.items():
                actual = np.array(found[key][name]).reshape(-1)
                np.testing.assert_allclose(actual, value, rtol=1e-9, atol=1e-12, err_msg=f"{key} {name}")
            assert np.array(found[key]["mean"]).shape == ((2,) if key == "action" else (3, 1, 1))
    assert everything["next.success"]["mean"] == [pytest.approx(2 / 16)]
    assert everything["index"]["max"] == [15.0]


def _entry(row: dict[str, Any], key: str) -> dict[str, Any]:
    start = f"stats/{key}/"
    return {name.removeprefix(start): value for name, value in row.items() if name.startswith(start)}


def noise(length: int, seed: int) -> Tensor:
    return torch.randint(256, (length, 64, 64, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("storage", ["image", "video"])
def test_large_sets_are_spread_over_files(storage: str, tmp_path: Path) -> None:
    pictures = [noise(60, seed) for seed in range(5)]
    episodes = [
        Episode(Observation({"front": images}, None, ("go",) * 60), torch.zeros(60, 1) + i, torch.zeros(60), True, True, i)
        for i, images in enumerate(pictures)
    ]
    folder = write(tmp_path / "mine", episodes, storage=storage, data_file_mb=1, video_file_mb=1, crf=1)
    files = list((folder / ("data" if storage == "image" else "videos")).rglob("*-00?.*"))
    assert 1 < len([file for file in files if file.is_file()]) < 6
    source = sets.source(folder, state=None)
    examples = source.examples(torch.tensor([0, 59, 60, 130, 299]))
    assert examples.actions_BHA[:, 0, 0].tolist() == [0, 0, 1, 2, 4]
    wanted = torch.cat(pictures)[[0, 59, 60, 130, 299]]
    # Halving the resolution of colours costs noise dearly, but its neighbours would be farther away still.
    difference = (examples.observation.images["front"].float() - wanted.float()).abs().mean((1, 2, 3))
    assert float(difference.max()) <= (0 if storage == "image" else 60)
    assert float((wanted[1].float() - wanted[0].float()).abs().mean()) > 80


def test_an_encoder_that_looks_far_ahead_loses_nothing(tmp_path: Path) -> None:
    large = (64, 64)
    folder = write(tmp_path / "mine", [episode(i, large) for i in range(3)], storage="video", codec="av1", crf=10)
    source = sets.source(folder)
    pictures = torch.cat([episode(i, large).observation.images["front"] for i in range(3)])
    difference = source.examples(torch.arange(16)).observation.images["front"].int() - pictures.int()
    assert int(difference.abs().max()) <= 16


def test_many_entries_are_written_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmrl.data.lerobot_write._ENTRIES_AT_ONCE", 2)
    folder = write(tmp_path / "mine", [episode(i) for i in range(5)], storage="image")
    assert [entry.index for entry in read(folder).episodes] == list(range(5))
    assert len(sets.source(folder)) == 6 + 1 + 9 + 6 + 1


def test_a_set_without_cameras_or_state_is_written_too(tmp_path: Path) -> None:
    bare = Episode(Observation({}, None, ("go",) * 3), torch.tensor([[1.0], [2.0], [3.0]]), torch.zeros(3), False, False, 1)
    source = sets.source(write(tmp_path / "mine", [bare]), state=None)
    assert source.examples(torch.tensor([1])).actions_BHA[0, :, 0].tolist() == [2, 3, 3, 3]


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    class Accident(Exception):
        pass

    folder = tmp_path / "mine"
    for storage in ("image", "video"):
        with pytest.raises(Accident), LeRobotWriter(LeRobotWriter.Config(storage=storage), folder, name="robot") as writer:
            writer.add(episode(0))
            assert not folder.exists()
            raise Accident
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="there is no episode to write"):
        write(folder, [])
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_swept_up(tmp_path: Path) -> None:
    (tmp_path / ".mine.writing/data").mkdir(parents=True)
    (tmp_path / ".mine.writing/data/old").write_text("old")
    folder = write(tmp_path / "mine", [episode(0)], storage="image")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"] and not (folder / "data/old").exists()


def test_a_set_is_not_written_over(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    write(folder, [episode(0)], storage="image")  # an empty folder is no set
    before = sorted(path.name for path in folder.rglob("*"))
    with pytest.raises(DataError, match="is there already and is not written over; remove it or choose another folder"):
        write(folder, [episode(1)])
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_episodes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="camera 'front' has 33x32; set storage: image"):
        write(tmp_path / "a", [episode(0, (32, 33))])
    with pytest.raises(DataError, match="episode 1 has"):
        write(tmp_path / "b", [episode(0), episode(1, (64, 48))])
