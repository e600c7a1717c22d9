"""Evaluation counts each task once, tells families apart, films without changing anything, and is the same every time."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmrl.config import MeasuringConfig
from mmrl.errors import ConfigError, MMRLError, TrainingError
from mmrl.evaluation import EvaluationResult, choose_tasks, evaluate, result_of
from mmrl.numerics.draws import Draws
from mmrl.playing import Played, Reel, stage_reel
from mmrl.progress import Quiet
from mmrl.report.summary import Rate
from mmrl.types import ActionSpec, Decision, Observation, Step

FAMILIES = ("easy", "hard", "never")
FIRST = 100


def length_of(task: int) -> int:
    return 1 + task % 5


def solved(task: int) -> bool:
    """All easy tasks, every second hard one, none of the others."""
    return (task % 3 == 0) or (task % 3 == 1 and task % 2 == 0)


def late(task: int) -> bool:
    """Whether the time limit ends it: some of the solved ones (solved with their last action) and most of the others."""
    return task % 4 == 0 if solved(task) else task % 4 != 1


class Judged:
    """Task i takes ``length_of(i)`` actions, each of which pays what the action says; what a slot says afterwards is a trap."""

    max_steps = 5
    action_spec = ActionSpec(1, (0.0,), (1.0,))

    def __init__(self, num_envs: int) -> None:
        self.num_envs, self.calls = num_envs, 0
        self.played: list[int] = []

    def reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Observation:
        assert where_B is None
        self.tasks, self.clock = task_ids_B.tolist(), [0] * self.num_envs
        self.played += self.tasks
        return self._observe()

    def _observe(self) -> Observation:
        state = torch.tensor([self.tasks, self.clock], dtype=torch.float32).T
        return Observation({}, state, tuple(f"do {task}" for task in self.tasks))

    def step(self, actions_BCA: Tensor) -> Step:
        self.calls += 1
        rewards_BC = torch.full(actions_BCA.shape[:2], 99.0)
        valid_BC = torch.zeros(actions_BCA.shape[:2], dtype=torch.bool)
        ended, success = [], []
        for slot, task in enumerate(self.tasks):
            was_done = self.clock[slot] == length_of(task)
            for action in range(actions_BCA.shape[1]):
                if self.clock[slot] < length_of(task):
                    rewards_BC[slot, action] = actions_BCA[slot, action, 0]
                    valid_BC[slot, action] = True
                    self.clock[slot] += 1
            ended.append(self.clock[slot] == length_of(task))
            success.append(float(ended[-1] and solved(task)) if not was_done else 1.0 - solved(task))
        done_B, late_B = torch.tensor(ended), torch.tensor([late(task) for task in self.tasks])
        return Step(self._observe(), rewards_BC, valid_BC, done_B & ~late_B, done_B & late_B, {"success": torch.tensor(success)})

    def family_of(self, task_ids_M: Tensor) -> tuple[str, ...]:
        return tuple(FAMILIES[task % 3] for task in task_ids_M.tolist())

    def close(self) -> None: ...


class Filmed(Judged):
    """Frames whose every byte is 10 x slot + clock."""

    def render_video(self, index_M: Tensor) -> Tensor:
        numbers = torch.tensor([10 * slot + self.clock[slot] for slot in index_M.tolist()], dtype=torch.uint8)
        return numbers[:, None, None, None].expand(-1, 32, 32, 3).clone()


class Deterministic:
    """Pays (task % 7) + step for the first action of a chunk and 0.5 more for the second, and a bit of noise."""

    version = 0

    def __init__(self, noise: float = 0.0) -> None:
        self.noise = noise

    def act(self, observation: Observation, draws: Draws, *, explore: bool) -> Decision:
        assert not explore and not torch.is_grad_enabled()
        state = observation.state
        assert state is not None
        first_B = state[:, 0] % 7 + state[:, 1] + self.noise * draws.uniform()
        nothing = torch.zeros(len(state), 0)
        return Decision(torch.stack([first_B, first_B + 0.5], 1)[..., None], {}, nothing, nothing > 0, None)


def pay(task: int) -> float:
    """What an episode earns, two actions a decision."""
    return sum(task % 7 + step // 2 * 2 + 0.5 * (step % 2) for step in range(length_of(task)))


def play(environment: Any, episodes: int, *, noise: float = 0.0, reel: Reel | None = None, **options: Any) -> EvaluationResult:
    policy: Any = Deterministic(noise)
    settings = MeasuringConfig(episodes=episodes, first_task=FIRST, **options)
    return evaluate(policy, environment, settings, seed=4, device=torch.device("cpu"), progress=Quiet(), reel=reel)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson (1927), with the normal distribution's 97.5 % quantile."""
    z, share = 1.959963984540054, successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


@pytest.mark.parametrize(("episodes", "num_envs"), [(12, 4), (11, 4), (3, 4), (1, 1)])
def test_every_task_counts_once(episodes: int, num_envs: int) -> None:
    environment = Judged(num_envs)
    result = play(environment, episodes)
    tasks = range(FIRST, FIRST + episodes)
    assert result.episodes == episodes
    assert set(environment.played) == set(tasks)
    assert result.success == pytest.approx(sum(map(solved, tasks)) / episodes)
    assert result.return_ == pytest.approx(sum(map(pay, tasks)) / episodes)
    spread = statistics.stdev(map(pay, tasks)) if episodes > 1 else 0.0
    assert result.return_std == pytest.approx(spread)
    assert result.length == pytest.approx(sum(map(length_of, tasks)) / episodes)


def test_families_and_their_intervals() -> None:
    result = play(Judged(8), 40)
    assert list(result.families) == sorted(FAMILIES)
    for index, name in enumerate(FAMILIES):
        outcomes = [solved(task) for task in range(FIRST, FIRST + 40) if task % 3 == index]
        family = result.families[name]
        assert family.episodes == len(outcomes) and family.success == pytest.approx(sum(outcomes) / len(outcomes))
        earned = [pay(task) for task in range(FIRST, FIRST + 40) if task % 3 == index]
        assert (family.return_, family.return_std) == pytest.approx((statistics.fmean(earned), statistics.stdev(earned)))
        assert (family.low, family.high) == pytest.approx(wilson(sum(outcomes), len(outcomes)), abs=1e-9)
        unsolved = [task for task in range(FIRST, FIRST + 40) if task % 3 == index and not solved(task)]
        assert family.successes == sum(outcomes) and family.timeouts == sum(map(late, unsolved))
        assert family.failures == len(unsolved) - family.timeouts and family.lost == 0
    successes = sum(solved(task) for task in range(FIRST, FIRST + 40))
    assert (result.low, result.high) == pytest.approx(wilson(successes, 40), abs=1e-9)
    assert min(result.successes, result.failures, result.timeouts) > 0
    assert result.successes + result.failures + result.timeouts == 40
    row = result.row()
    assert (row["failures"], row["timeouts"]) == (result.failures, result.timeouts)
    assert row["return"] == result.return_ and "return_" not in row
    assert row["families"]["easy"]["success"] == 1.0 and row["families"]["never"]["success"] == 0.0
    assert row["families"]["easy"]["return"] == result.families["easy"].return_
    assert f"{100 * result.success:.1f}%" in result.sentence() and "40 episodes" in result.sentence()


def numbers(result: EvaluationResult) -> dict[str, Any]:
    return {name: value for name, value in result.row().items() if name != "seconds"}


def test_the_same_policy_gets_the_same_numbers_filmed_or_not(tmp_path: Path) -> None:
    environment = Filmed(4)
    plain = play(environment, 10, noise=0.3)
    chunks = environment.calls
    assert numbers(play(environment, 10, noise=0.3)) == numbers(plain)
    assert numbers(play(Filmed(4), 10, noise=0.3, videos=3, reel=Reel(tmp_path, "film", {}))) == numbers(plain)
    assert environment.calls == 2 * chunks and chunks <= 3 * 3  # chunks are executed whole where nobody watches


def test_films_show_the_first_round_one_frame_an_action(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    films: dict[str, tuple[Tensor, bool]] = {}

    def keep(path: Path, frames_THWC: Tensor, fps: float, success: bool) -> None:
        films[path.name] = frames_THWC[:, 0, 0, 0].clone(), success
        path.write_bytes(b"film")

    monkeypatch.setattr("mmrl.playing.write_animation", keep)
    folder = tmp_path / "films"
    play(Filmed(7), 14, videos=5, reel=stage_reel(folder, "improve", "after"))
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    # Tasks 100 to 106 are hard, never, easy, hard, never, easy, hard: five films, from the families in turn.
    assert [(record["task_id"], record["family"]) for record in records] == [
        (100, "hard"),
        (101, "never"),
        (102, "easy"),
        (103, "hard"),
        (105, "easy"),
    ]
    for record in records:
        task, slot = record["task_id"], record["task_id"] - FIRST
        assert record["video"] == f"improve-after-{task}.webp"
        assert record["instruction"] == f"do {task}" and record["steps"] == length_of(task)
        assert record["timed_out"] is (late(task) and not solved(task))
        assert record["success"] is solved(task) and record["return"] == pytest.approx(pay(task))
        assert (record["label"], record["stage"]) == ("after", "improve")
        frames, success = films[record["video"]]
        assert frames.tolist() == [10 * slot + clock for clock in range(length_of(task) + 1)] and success is solved(task)
    assert len(films) == 5


def test_an_environment_that_cannot_be_filmed_is_played_all_the_same(tmp_path: Path) -> None:
    assert numbers(play(Judged(4), 6, videos=2, reel=Reel(tmp_path, "film", {}))) == numbers(play(Judged(4), 6))
    assert list(tmp_path.iterdir()) == []


def test_a_film_that_cannot_be_written_ends_in_a_sentence(tmp_path: Path) -> None:
    blocked = tmp_path / "improve-after-100.webp"
    blocked.mkdir()
    with pytest.raises(MMRLError, match=r"improve-after-100\.webp"):
        play(Filmed(2), 2, videos=1, reel=stage_reel(tmp_path, "improve", "after"))


def test_so_many_of_each_task() -> None:
    class Rare(Judged):
        """Of ten ids one is hard and two are easy; one in 10,000 is of a fourth family."""

        def family_of(self, task_ids_M: Tensor) -> tuple[str, ...]:
            names = ("hard", "easy", "easy", *["never"] * 7)
            return tuple("once" if task % 10_000 == 9_999 else names[task % 10] for task in task_ids_M.tolist())

    def chosen(episodes: int) -> list[int]:
        return choose_tasks(Rare(4), MeasuringConfig(episodes=episodes, first_task=FIRST, per_task=True))

    assert chosen(2) == [100, 101, 102, 103, 104, 110]
    many = Rare(4).family_of(torch.tensor(chosen(1000)))  # more than 4096 ids hold of the hard ones
    assert {name: many.count(name) for name in many} == {"hard": 1000, "easy": 1000, "never": 1000}
    with pytest.raises(ConfigError, match=r"'evaluation\.episodes' is 200000 of each task.* are of hard; ask for fewer"):
        chosen(200_000)
    result = play(Rare(4), 3, per_task=True)
    assert result.episodes == 9 and [family.episodes for family in result.families.values()] == [3, 3, 3]


def test_what_the_simulator_loses_is_neither_failure_nor_time_out() -> None:
    episodes = [
        Played(0, "a", "", "success", 1.0, 2),
        Played(1, "a", "", "lost", 9.0, 9),
        Played(2, "b", "", "lost", 9.0, 9),
        Played(3, "a", "", "timeout", 3.0, 4),
    ]
    result = result_of(episodes, seconds=1.0)
    assert (result.episodes, result.successes, result.failures, result.timeouts, result.lost) == (2, 1, 0, 1, 2)
    assert (result.return_, result.length) == (2.0, 3.0)
    gone = result.families["b"]
    assert (gone.episodes, gone.lost, gone.success, gone.low, gone.high) == (0, 1, 0.0, 0.0, 1.0)
    assert Rate.of(gone.row()) is None  # the report shows no rate
    with pytest.raises(TrainingError, match="lost each of 1 evaluation episodes 3 times"):
        result_of(episodes[1:2], seconds=1.0)
