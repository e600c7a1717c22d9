"""Workers: the trajectories of a loop; what dies is replaced and its episode lost; nobody outlives the parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmrl.data.demonstrations import record
from mmrl.errors import MMRLError, RegistryError
from mmrl.protocols import Environment, ExpertEnvironment, RenderEnvironment
from mmrl.registry import ROOT
from mmrl.types import Observation, Step
from mmrl.workers.environment import WorkerEnvironment
from mmrl.workers.pool import PATIENCE, WorkerError
from mmrl.workers.process import load
from tests.core.counting import Config, Counting

TARGET = "tests.core.counting:Counting"
CPU = torch.device("cpu")
Make = Callable[..., WorkerEnvironment]


@pytest.fixture
def make() -> Iterator[Make]:
    opened: list[WorkerEnvironment] = []

    def build(num_envs: int, workers: int, time_limit: float = 60.0, **fields: Any) -> WorkerEnvironment:
        environment = WorkerEnvironment(
            TARGET, Config(**fields), num_envs=num_envs, device=CPU, workers=workers, time_limit=time_limit, start_limit=60.0
        )
        opened.append(environment)
        return environment

    yield build
    for environment in opened:
        environment.close()


def actions(moment: int, num_envs: int, chunk: int) -> Tensor:
    generator = torch.Generator().manual_seed(moment)
    return torch.rand(num_envs, chunk, 2, generator=generator) * 2.4 - 1.2  # some are out of bounds


class Serial:
    """The oracle: the same single environments in this process, one after the other, by the words of the contract."""

    def __init__(self, num_envs: int, **fields: Any) -> None:
        self.single = [Counting(Config(**fields)) for _ in range(num_envs)]
        self.sentence, self.last = [""] * num_envs, [(False, False, 0.0, 0.0)] * num_envs

    def reset(self, tasks: list[int], where: list[bool]) -> Observation:
        for b, chosen in enumerate(where):
            if chosen:
                self.sentence[b], self.last[b] = self.single[b].reset(tasks[b]), (False, False, 0.0, 0.0)
        return self.observe()

    def observe(self) -> Observation:
        views = [single.observe() for single in self.single]
        images = {name: torch.tensor(np.stack([v.images[name] for v in views])) for name in ("left", "right")}
        return Observation(images, torch.tensor(np.stack([v.state for v in views])), tuple(self.sentence))  # type: ignore[arg-type]

    def step(self, actions_BCA: Tensor) -> Step:
        rewards, valid = torch.zeros(actions_BCA.shape[:2]), torch.zeros(actions_BCA.shape[:2], dtype=torch.bool)
        for b, single in enumerate(self.single):
            for c, action in enumerate(actions_BCA[b]):
                if not (self.last[b][0] or self.last[b][1]):
                    outcome = single.step(action.clamp(-1, 1).numpy())
                    rewards[b, c], valid[b, c] = outcome.reward, True
                    self.last[b] = (outcome.terminated, outcome.truncated, outcome.metrics["success"], outcome.metrics["clock"])
        ended, late, success, clock = (list(column) for column in zip(*self.last, strict=True))
        metrics = {"success": torch.tensor(success), "clock": torch.tensor(clock, dtype=torch.float32)}
        return Step(self.observe(), rewards, valid, torch.tensor(ended), torch.tensor(late), metrics)


def assert_same(ours: Step, theirs: Step, rows: list[int]) -> None:
    assert ours.observation.select(torch.tensor(rows)).instructions == theirs.observation.select(torch.tensor(rows)).instructions
    for name, image in theirs.observation.images.items():
        assert torch.equal(ours.observation.images[name][rows], image[rows])
    assert ours.observation.state is not None and theirs.observation.state is not None
    assert torch.equal(ours.observation.state[rows], theirs.observation.state[rows])
    for name in ("rewards_BC", "valid_BC", "terminated_B", "truncated_B", "lost_B"):
        assert torch.equal(getattr(ours, name)[rows], getattr(theirs, name)[rows]), name
    for name, value in theirs.metrics.items():
        assert torch.equal(ours.metrics[name][rows], value[rows]), name


# -- the same as without workers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "chunk"), [(1, 1), (2, 4), (5, 2)])
def test_workers_give_the_trajectories_of_a_loop(make: Make, workers: int, chunk: int) -> None:
    ours, theirs = make(5, workers), Serial(5)
    tasks, where = [4, 7, 300, 9, 10], [True] * 5
    first = ours.reset(torch.tensor(tasks))
    assert first.instructions == theirs.reset(tasks, where).instructions
    for moment in range(10):
        step = ours.step(actions(moment, 5, chunk))
        assert_same(step, theirs.step(actions(moment, 5, chunk)), list(range(5)))
        if moment == 2:
            tasks, where = [4, 70, 300, 90, 10], [False, True, False, True, False]
            observation = ours.reset(torch.tensor(tasks), torch.tensor(where))
            expected = theirs.reset(tasks, where)
            assert observation.instructions == expected.instructions
            assert all(torch.equal(observation.images[name], image) for name, image in expected.images.items())
    assert step.done_B.all() and ours.pool.lost == 0


def test_it_keeps_the_protocols_and_tells_families(make: Make) -> None:
    environment = make(3, 2)
    assert isinstance(environment, Environment) and isinstance(environment, ExpertEnvironment)
    assert isinstance(environment, RenderEnvironment)
    assert environment.family_of(torch.tensor([3, 4, 1000])) == ("odd", "even", "even")
    assert len(environment.pool.pids) == 2 and os.getpid() not in environment.pool.pids
    environment.reset(torch.tensor([5, 6, 7]))
    assert environment.render_video(torch.tensor([2, 0]))[:, 0, 0, 0].tolist() == [7, 5]
    assert environment.expert_action().tolist() == [[0.5, 0.0]] * 3


def test_expert_episodes_become_examples(make: Make) -> None:
    examples = record(make(2, 2), torch.tensor([0, 2]), 2, only_successes=True)
    assert examples.observation.state is not None
    # Task 0 takes six actions and task 2 four; the second number of an action is a tenth of the moment.
    assert examples.observation.state[:, :2].tolist() == [[0, t] for t in range(6)] + [[2, t] for t in range(4)]
    assert examples.actions_BHA[:, 0, 1].tolist() == pytest.approx([t / 10 for t in (*range(6), *range(4))])


@pytest.mark.parametrize("shape", [(3, 1, 2), (2, 1, 3), (2, 2)], ids=str)
def test_actions_of_another_shape_are_refused(make: Make, shape: tuple[int, ...]) -> None:
    environment = make(2, 1)
    environment.reset(torch.tensor([1, 2]))
    with pytest.raises(MMRLError, match=r"takes, 2 \('policy\.action_dim'"):
        environment.step(torch.zeros(shape))


# -- breakdowns --------------------------------------------------------------------------------------------------------


def play(environment: WorkerEnvironment, theirs: Serial, tasks: list[int], lost: list[int]) -> None:
    """An episode in each slot, in which the slots ``lost`` go with the third action and the others as ever."""
    kept = [b for b in range(len(tasks)) if b not in lost]
    environment.reset(torch.tensor(tasks))
    theirs.reset(tasks, [True] * len(tasks))
    for moment in range(6):
        step, expected = environment.step(actions(moment, len(tasks), 1)), theirs.step(actions(moment, len(tasks), 1))
        assert_same(step, expected, kept)
        assert step.lost_B.tolist() == [b in lost and moment >= 2 for b in range(len(tasks))]
        assert not (step.lost_B & (step.terminated_B | step.truncated_B)).any()
        assert not step.valid_BC[step.lost_B].any() and not step.rewards_BC[step.lost_B].any()
    assert step.done_B.all()


@pytest.mark.parametrize(("trouble", "time_limit"), [("kill", 60.0), ("exit", 60.0), ("stop", 4.0)])
def test_a_worker_that_dies_or_hangs_is_replaced(
    make: Make, trouble: str, time_limit: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    environment = make(4, 3, time_limit, trouble={11: trouble}, once=str(tmp_path))
    before = environment.pool.pids
    play(environment, Serial(4), [5, 11, 6, 8], lost=[0, 1])  # slots 0 and 1 share the first worker
    assert environment.pool.lost == 1 and "worker 0" in caplog.text
    play(environment, Serial(4), [5, 11, 6, 8], lost=[])  # it happens once; the slots are as good as new
    assert environment.pool.pids[0] != before[0] and environment.pool.pids[1:] == before[1:]
    with pytest.raises(ProcessLookupError):
        os.kill(before[0] or -1, 0)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_a_worker_may_be_hit_from_outside(make: Make, name: str) -> None:
    environment = make(2, 2, time_limit=4.0)
    environment.reset(torch.tensor([5, 7]))
    environment.step(actions(0, 2, 1))
    os.kill(environment.pool.pids[1] or -1, getattr(signal, name))
    step = environment.step(actions(1, 2, 1))
    assert step.lost_B.tolist() == [False, True] and step.valid_BC.tolist() == [[True], [False]]
    assert environment.render_video(torch.tensor([0, 1]))[:, 0, 0, 0].tolist() == [5, 0]
    assert environment.expert_action().tolist() == [[0.5, pytest.approx(0.2)], [0, 0]]
    observation = environment.reset(torch.tensor([5, 8]), torch.tensor([False, True]))
    assert observation.instructions == ("count 5", "count 8")
    assert environment.step(actions(2, 2, 1)).valid_BC.all()


def test_an_episode_that_was_over_is_not_lost(make: Make) -> None:
    environment = make(2, 1, length=2)
    environment.reset(torch.tensor([0, 2]))  # task 2 ends with its first action
    done = environment.step(actions(0, 2, 1))
    assert done.terminated_B.tolist() == [False, True]
    os.kill(environment.pool.pids[0] or -1, signal.SIGKILL)
    step = environment.step(actions(1, 2, 1))
    assert step.lost_B.tolist() == [True, False] and step.terminated_B.tolist() == [False, True]
    assert torch.equal(step.observation.images["left"][1], done.observation.images["left"][1])
    assert not step.observation.images["left"][0].any()


def test_a_reset_that_a_worker_does_not_survive_is_tried_again(make: Make, tmp_path: Path) -> None:
    environment = make(2, 2, trouble={4: "reset:kill"}, once=str(tmp_path))
    assert environment.reset(torch.tensor([3, 4])).instructions == ("count 3", "count 4")
    assert environment.pool.lost == 1 and not environment.step(actions(0, 2, 1)).lost_B.any()


def test_workers_that_die_again_and_again_end_the_run_in_a_sentence(make: Make) -> None:
    environment = make(2, 2, trouble={4: "reset:kill"})
    with pytest.raises(WorkerError, match=r"lost 3 times in a row; the last one was killed by SIGKILL in 'reset'.*mmrl doctor"):
        environment.reset(torch.tensor([3, 4]))
    assert PATIENCE == 3 and environment.pool.pids == [None, None]


def test_a_worker_that_does_not_start_in_time_is_given_up() -> None:
    with pytest.raises(WorkerError, match=r"did not start within 0.2 seconds"):
        WorkerEnvironment(TARGET, Config(slow_start=60), num_envs=1, device=CPU, start_limit=0.2)


def test_what_a_worker_raises_reaches_the_user(make: Make) -> None:
    environment = make(2, 2, trouble={4: "bug", 5: "reset:sentence"})
    environment.reset(torch.tensor([4, 6]))
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*counting.py.*a bug of the simulator"):
        environment.step(actions(0, 2, 3))
    other = make(1, 1, trouble={5: "reset:sentence"})
    with pytest.raises(MMRLError, match=r"^Vulkan is missing; install it$"):
        other.reset(torch.tensor([5]))


def test_a_missing_package_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_nothing_real.py").write_text("import no_such_package_anywhere.part\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        RegistryError, match=r"needs the package 'no_such_package_anywhere'.*pip install no-such-package-anywhere"
    ):
        load("needs_nothing_real:Thing")


# -- nobody outlives the parent ----------------------------------------------------------------------------------------

PARENT = """
import sys, time
import torch
from mmrl.workers.environment import WorkerEnvironment
from tests.core.counting import Config
# No guard against being imported: workers leave the script alone.
environment = WorkerEnvironment("tests.core.counting:Counting", Config(), num_envs=2, device=torch.device("cpu"), workers=2)
environment.reset(torch.tensor([1, 2]))
print(*environment.pool.pids, environment._board.name, flush=True)
time.sleep(600 if sys.argv[1] == "sleep" else 0)
raise SystemExit(3)
"""


@pytest.mark.parametrize("end", ["SIGKILL", "SIGTERM", "exit"])
def test_workers_end_with_their_parent_and_leave_nothing(end: str, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    command = [sys.executable, str(script), "exit" if end == "exit" else "sleep"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as parent:
        assert parent.stdout is not None
        first, second, memory = parent.stdout.readline().split()
        if end != "exit":
            os.kill(int(second), signal.SIGSTOP)  # one that cannot notice by itself
            parent.send_signal(getattr(signal, end))
    left = [Path(f"/proc/{first}"), Path(f"/proc/{second}"), Path(f"/dev/shm/{memory}")]
    deadline = time.monotonic() + 30
    while any(path.exists() for path in left) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [str(path) for path in left if path.exists()] == []


def test_closing_ends_the_workers(make: Make) -> None:
    environment = make(3, 3)
    pids = environment.pool.pids
    environment.close()
    environment.close()
    assert environment.pool.pids == [None] * 3
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid or -1, 0)
