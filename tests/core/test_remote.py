"""A batched environment in a process of its own: supervision, what a crash takes away, and what is refused."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmrl.building import build_parts
from mmrl.component import Component
from mmrl.config import load
from mmrl.errors import MMRLError
from mmrl.registry import resolve
from mmrl.workers import pool
from mmrl.workers.environment import WorkerEnvironment
from mmrl.workers.pool import WorkerError
from mmrl.workers.remote import RemoteEnvironment
from simulators.tabletop import Tabletop
from tests.core import tiny_run
from tests.core.counting import Config as CountingConfig

CPU = torch.device("cpu")
Make = Callable[..., RemoteEnvironment]
LIMIT = 4  # actions of an episode


@pytest.fixture
def make() -> Iterator[Make]:
    opened: list[RemoteEnvironment] = []

    def build(num_envs: int, target: str = "simulators.tabletop:Tabletop", config: Any = None, **options: Any) -> Any:
        config = config or Tabletop.Config(families=("reach",), image_size=32, max_steps={"reach": LIMIT})
        opened.append(RemoteEnvironment(target, config, num_envs=num_envs, device=CPU, **options))
        return opened[-1]

    yield build
    for environment in opened:
        environment.close()


def still(num_envs: int, count: int = 1) -> Tensor:
    return torch.zeros(num_envs, count, 4)


def test_episodes_of_a_killed_process_are_lost_and_those_that_were_over_are_not(make: Make) -> None:
    environment = make(3)
    environment.reset(torch.arange(3))
    environment.step(still(3, 2))
    environment.reset(torch.tensor([0, 7, 2]), torch.tensor([False, True, False]))
    over = environment.step(still(3, 2))
    assert over.truncated_B.tolist() == [True, False, True]
    os.kill(environment.pool.pids[0] or -1, signal.SIGKILL)
    step = environment.step(still(3))
    assert step.lost_B.tolist() == [False, True, False] and step.truncated_B.tolist() == [True, False, True]
    assert not step.valid_BC.any() and not step.rewards_BC.any() and environment.pool.lost == 1
    assert torch.equal(step.observation.images["front"][[0, 2]], over.observation.images["front"][[0, 2]])
    assert not step.observation.images["front"][1].any()
    assert torch.equal(step.metrics["distance"], over.metrics["distance"])
    # One slot starts anew in the new process; of the others' episodes, which it never played, nothing is seen.
    observation = environment.reset(torch.tensor([0, 7, 5]), torch.tensor([False, False, True]))
    fresh = make(1).reset(torch.tensor([5]))
    assert torch.equal(observation.images["front"][2], fresh.images["front"][0])
    assert observation.instructions == (*over.observation.instructions[:2], *fresh.instructions)
    step = environment.step(still(3, 2))
    assert step.valid_BC.tolist() == [[False] * 2, [False] * 2, [True] * 2]
    assert step.lost_B.tolist() == [False, True, False] and step.truncated_B.tolist() == [True, False, False]
    assert torch.equal(step.observation.images["front"][0], over.observation.images["front"][0])
    assert not step.observation.images["front"][1].any()
    assert torch.equal(step.metrics["distance"][:2], over.metrics["distance"][:2])
    assert environment.reset(torch.arange(3)).instructions == make(3).reset(torch.arange(3)).instructions
    assert environment.step(still(3)).valid_BC.all()


def test_a_process_that_hangs_is_replaced_when_its_time_is_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = make(2, time_limit=1000.0)
    environment.reset(torch.arange(2))
    os.kill(environment.pool.pids[0] or -1, signal.SIGSTOP)
    finish = environment.begin_step(still(2, 3))
    waits: list[float] = []
    monkeypatch.setattr(pool, "wait", lambda connections, timeout: waits.append(timeout) or [])
    now = pool.time.monotonic()
    monkeypatch.setattr(pool.time, "monotonic", lambda: now + 2990.0)
    assert finish().lost_B.all()
    # Three actions may take 3000 seconds, counted from their sending: 2990 of them are gone.
    assert len(waits) == 1 and waits[0] == pytest.approx(10, abs=1)


def test_an_answer_that_came_in_time_counts_however_late_it_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = WorkerEnvironment(
        "tests.core.counting:Counting", CountingConfig(), num_envs=2, device=CPU, workers=2, time_limit=100.0
    )
    environment.reset(torch.tensor([5, 7]))
    finish = environment.begin_step(torch.zeros(2, 1, 2))
    assert all(member is not None and member.connection.poll(60) for member in environment.pool._members)
    now = pool.time.monotonic()
    monkeypatch.setattr(pool.time, "monotonic", lambda: now + 1e6)
    assert finish().valid_BC.all() and environment.pool.lost == 0
    monkeypatch.undo()
    environment.close()


def test_a_large_action_does_not_block_on_a_process_that_hangs(make: Make) -> None:
    environment = make(2)
    environment.reset(torch.arange(2))
    environment.pool.time_limit = 0.01
    os.kill(environment.pool.pids[0] or -1, signal.SIGSTOP)
    finish = environment.begin_step(still(2, 200_000))  # 6 MB; a pipe holds far less
    os.kill(environment.pool.pids[0] or -1, signal.SIGKILL)
    assert finish().lost_B.all()


def test_a_process_that_dies_again_and_again_ends_the_run_in_a_sentence(make: Make) -> None:
    environment = make(1)
    with pytest.raises(WorkerError, match=r"lost 3 times in a row; the last one .*mmrl doctor"):
        for _ in range(3):
            os.kill(environment.pool.pids[0] or -1, signal.SIGKILL)
            environment.reset(torch.arange(1))
    assert environment.pool.pids == [None]


def test_families_are_the_environment_s(make: Make) -> None:
    config = Tabletop.Config(image_size=32)
    tasks = torch.arange(20)
    ours = make(2, config=config).family_of(tasks)
    assert ours == Tabletop(config, num_envs=1).family_of(tasks) and len(set(ours)) > 1


def test_closing_ends_the_process_and_frees_the_memory(make: Make) -> None:
    environment = make(2)
    environment.reset(torch.arange(2))
    environment.step(still(2))
    assert environment._actions is not None
    pid, names = environment.pool.pids[0] or -1, [environment._board.name, environment._actions.name]
    assert all(Path("/dev/shm", name).exists() for name in names)
    environment.close()
    environment.close()
    assert environment.pool.pids == [None] and not any(Path("/dev/shm", name).exists() for name in names)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_an_environment_with_processes_of_its_own_is_refused(make: Make, installed: Callable[[str], None]) -> None:
    installed("gymnasium")
    cls: Any = resolve("simulators.gymnasium:Gymnasium")
    with pytest.raises(MMRLError, match=r"^simulators.gymnasium:Gymnasium starts processes of its own.*set 'collect.parts' to 1"):
        make(2, "simulators.gymnasium:Gymnasium", cls.Config(id="CartPole-v1", workers=1))


@pytest.mark.parametrize(("workers", "kind"), [(0, "RemoteEnvironment"), (1, "Gymnasium")])
def test_parts_get_processes_unless_the_config_has_some(
    workers: int, kind: str, tmp_path: Path, installed: Callable[[str], None]
) -> None:
    installed("gymnasium")
    environment = Component.parse({"target": "simulators.gymnasium:Gymnasium", "workers": workers})
    config = load(tiny_run.write_config(tmp_path)).model_copy(update={"environment": environment})
    parts = build_parts(config, 4, 2, CPU)
    try:
        assert [type(part).__name__ for part in parts] == [kind] * 2
    finally:
        for part in parts:
            part.close()


def test_parts_are_built_as_the_simulator_needs_them(tmp_path: Path) -> None:
    config = load(tiny_run.write_config(tmp_path))
    alone = build_parts(config, 6, 1, CPU)
    assert [type(environment) for environment in alone] == [Tabletop] and alone[0].num_envs == 6
    parts = build_parts(config, 6, 3, CPU, ("stages.improve.environment", {"max_steps": {"reach": 3}}))
    try:
        assert [(type(part), part.num_envs, part.max_steps) for part in parts] == [(RemoteEnvironment, 2, 3)] * 3
    finally:
        for part in parts:
            part.close()
