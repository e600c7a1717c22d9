"""LeRobot data sets, both versions, with videos and with images: every frame is the one that was recorded."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmrl.component import Component, Problems
from mmrl.data.lerobot import LeRobot
from mmrl.data.lerobot_frames import Cache
from mmrl.data.mixture import Mixture, Part
from mmrl.errors import DataError
from mmrl.protocols import DataContext, ExampleSource, StatisticsSource
from mmrl.types import Examples
from tests.core import lerobot_sets as sets

ALL = [(e, t) for e, length in enumerate(sets.LENGTHS) for t in range(length)]
NAMES = {"front": sets.CAMERAS[0], "wrist": sets.CAMERAS[1]}


@pytest.fixture(scope="module", params=[("v2.1", "image"), ("v2.1", "video"), ("v3.0", "image"), ("v3.0", "video")], ids="-".join)
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    version, storage = request.param
    return sets.WRITERS[version](tmp_path_factory.mktemp("set"), storage)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One set for what does not depend on the layout."""
    return sets.write_v30(tmp_path_factory.mktemp("set"), "image")


def where(examples: Examples) -> list[tuple[int, int]]:
    """(episode, frame) of each example, by its state."""
    assert examples.observation.state is not None
    return [(int(e), int(t)) for e, t, _ in examples.observation.state]


def check(examples: Examples, expected: list[tuple[int, int]], tolerance: int) -> None:
    """Every example against the definition."""
    assert where(examples) == expected
    for n, (e, t) in enumerate(expected):
        last, times = sets.LENGTHS[e] - 1, range(t, t + sets.HORIZON)
        assert examples.actions_BHA[n].tolist() == [sets.action(e, min(time, last)) for time in times]
        assert examples.mask_BH[n].tolist() == [time <= last for time in times]
        assert examples.observation.state is not None and examples.observation.state[n].tolist() == sets.state(e, t)
        assert examples.observation.instructions[n] == sets.task_of(e)
        assert set(examples.observation.images) == set(NAMES)
        for name, key in NAMES.items():
            wanted = torch.from_numpy(sets.picture(key, e, t)).int()
            rows = [*range(12), *range(20, 32)]  # away from the edge between the colours, which a video blurs
            assert int((examples.observation.images[name][n].int() - wanted)[rows].abs().max()) <= tolerance, (name, e, t)


def test_every_frame_is_the_recorded_one(data: Path) -> None:
    source = sets.source(data)
    assert isinstance(source, ExampleSource) and isinstance(source, StatisticsSource)
    assert len(source) == len(ALL)
    order = torch.randperm(len(ALL), generator=torch.Generator().manual_seed(0))
    order = torch.cat([order, order[:3]])  # some twice
    tolerance = 8 if (data / "videos").exists() else 0
    check(source.examples(order), [ALL[i] for i in order.tolist()], tolerance)


def test_a_cache_that_holds_nothing_changes_nothing(data: Path) -> None:
    roomy, tight = sets.source(data), sets.source(data)
    for frames in tight._sets:
        frames._rows, frames._pictures = Cache(1), Cache(1)
        frames._videos._budget = frames._tables._budget = 1
    index = torch.arange(len(ALL)).flip(0)
    one, other = roomy.examples(index), tight.examples(index)
    assert torch.equal(one.actions_BHA, other.actions_BHA)
    assert all(torch.equal(one.observation.images[name], other.observation.images[name]) for name in NAMES)


def test_the_cache_forgets_what_was_used_longest_ago() -> None:
    dropped: list[str] = []
    cache = Cache(10, dropped.append)

    def get(key: str, size: int = 4) -> str:
        return cache.get(key, lambda: (f"{key}{size}", size))

    assert [get("a"), get("b"), get("a"), get("c")] == ["a4", "b4", "a4", "c4"]
    assert dropped == ["b4"] and cache.size == 8
    assert get("a", 7) == "a4"  # still there
    assert get("d", 50) == "d50" and dropped == ["b4", "c4", "a4"] and cache.size == 50  # one may be larger than the budget
    assert get("e") == "e4" and cache.size == 4


def test_frames_are_drawn_uniformly_and_only_from_chosen_episodes(plain: Path) -> None:
    for fields, episodes in (
        ({}, (0, 1, 2, 3)),
        ({"episodes": "1:3"}, (1, 2)),
        ({"episodes": "2:"}, (2, 3)),
        ({"episodes": ":1"}, (0,)),
        ({"episodes": "val"}, (3,)),
        ({"only_successes": True}, (0, 2)),
        ({"episodes": "train", "only_successes": True}, (0, 2)),
        ({"episodes": "1:4", "only_successes": True}, (2,)),
    ):
        source = sets.source(plain, **fields)
        possible = [(e, t) for e in episodes for t in range(sets.LENGTHS[e])]
        assert len(source) == len(possible)
        counts = Counter(where(source.batch(60 * len(possible))))
        assert set(counts) == set(possible), fields
        assert min(counts.values()) > 25 and max(counts.values()) < 110  # about 60 each, standard deviation below 8


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_success_may_stand_with_the_episode_or_nowhere(version: str, tmp_path: Path) -> None:
    root = sets.WRITERS[version](tmp_path, "image", outcome=False)
    with pytest.raises(DataError, match="does not say whether episode 0 succeeded"):
        sets.source(root, only_successes=True)
    assert len(sets.source(root)) == len(ALL)


def test_only_failures_are_refused(plain: Path) -> None:
    with pytest.raises(DataError, match="no episode that was asked for succeeded"):
        sets.source(plain, episodes="val", only_successes=True)


def test_cameras_are_chosen_named_and_resized(plain: Path) -> None:
    source = sets.source(plain, cameras={sets.CAMERAS[1]: "hand"}, image_size=(20, 24), state=None)
    examples = source.examples(torch.tensor([9]))
    assert examples.observation.state is None and list(examples.observation.images) == ["hand"]
    whole = Image.fromarray(sets.picture(sets.CAMERAS[1], 2, 1)).resize((24, 20), Image.Resampling.BILINEAR)
    difference = examples.observation.images["hand"][0].int() - torch.from_numpy(np.array(whole)).int()
    assert int(difference.abs().max()) <= 1  # Pillow's bilinear filter is the same, but for its rounding


def test_several_sets_are_one_pool(plain: Path, tmp_path: Path) -> None:
    other = sets.write_v21(tmp_path, "image")
    source = sets.source([plain, other], episodes="0:2")
    assert len(source) == 2 * (5 + 3)
    check(source.examples(torch.arange(16)), ALL[:8] * 2, 0)
    with pytest.raises(DataError, match="choose cameras and image_size"):
        info = (other / "meta/info.json").read_text()
        (other / "meta/info.json").write_text(info.replace('"shape": [3, 32, 48]', '"shape": [3, 32, 44]'))
        sets.source([plain, other])


def test_a_mixture_takes_data_sets_by_weight(plain: Path) -> None:
    parts = [Part(Component.parse(_block(plain, episodes="0:1")), 1.0), Part(Component.parse(_block(plain, episodes="2:3")), 3.0)]
    context: Any = DataContext(lambda n, o: None, 2, 0, torch.device("cpu"))  # type: ignore[arg-type,return-value]
    counts = Counter(e for e, _ in where(Mixture(Mixture.Config(parts=parts), context=context).batch(800)))
    assert set(counts) == {0, 2} and counts[2] == pytest.approx(600, abs=50)


def _block(path: Path, **fields: Any) -> dict[str, Any]:
    return {"target": "mmrl.data.lerobot:LeRobot", "path": str(path), **fields}


def test_a_source_goes_on_from_its_state(plain: Path) -> None:
    unbroken = sets.source(plain)
    unbroken.batch(13)
    state = {name: tensor.clone() for name, tensor in unbroken.state_dict().items()}
    resumed = sets.source(plain)
    resumed.load_state_dict(state)
    for size in (5, 30):
        assert where(resumed.batch(size)) == where(unbroken.batch(size))
    assert where(sets.source(plain, seed=1).batch(30)) != where(sets.source(plain).batch(30))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"path": []}, "path must name at least one data set"),
        ({"path": "x", "cameras": {"a": "front", "b": "front"}}, "cameras gives one name to two cameras"),
        ({"path": "x", "image_size": [0, 4]}, "image_size must be two positive numbers"),
        ({"path": "x", "cache_mb": 0}, "cache_mb"),
        ({"path": "x", "episode": "0:4"}, "did you mean 'episodes'"),
    ],
)
def test_a_wrong_block_is_refused_by_key(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Problems, match=sentence):
        Component.parse({"target": "mmrl.data.lerobot:LeRobot", **fields})


def naive_statistics(column: Tensor, name: str) -> dict[str, list[float]]:
    x = column.numpy().astype(np.float64)
    std = x.std(0, ddof=1)
    return {
        f"{name}_mean": x.mean(0).tolist(),
        f"{name}_std": np.where(std > 1e-6, std, 1.0).tolist(),
        f"{name}_q01": np.quantile(x, 0.01, axis=0).tolist(),
        f"{name}_q99": np.quantile(x, 0.99, axis=0).tolist(),
        f"{name}_min": x.min(0).tolist(),
        f"{name}_max": x.max(0).tolist(),
    }


@pytest.mark.parametrize("fields", [{}, {"only_successes": True}, {"state": None}], ids=str)
def test_statistics_are_those_of_all_chosen_frames(data: Path, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmrl.data.lerobot._AT_ONCE", 5)  # several episodes together, and several times
    chosen = [(e, t) for e, t in ALL if sets.SUCCESS[e] or not fields.get("only_successes")]
    advanced: list[int] = []
    found = sets.source(data, **fields).statistics(advanced.append)
    expected = naive_statistics(torch.tensor([sets.action(e, t) for e, t in chosen]), "actions")
    if "state" not in fields:
        expected |= naive_statistics(torch.tensor([sets.state(e, t) for e, t in chosen]), "state")
    assert set(found) == set(expected)
    assert all(found[name] == pytest.approx(expected[name], rel=1e-9, abs=1e-9) for name in expected)
    assert sum(advanced) == 2 * len(chosen) and len(advanced) > 2


def test_it_is_a_component_of_a_stage(plain: Path) -> None:
    assert isinstance(Component.parse(_block(plain)).config, LeRobot.Config)
