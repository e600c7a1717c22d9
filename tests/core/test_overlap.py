"""The policy acts for one part of the environments while the others simulate, and the rollout is that of one part."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmrl.config import load
from mmrl.data.demonstrations import record
from mmrl.numerics.draws import Draws
from mmrl.protocols import AsyncEnvironment, Environment
from mmrl.rollout import Collector
from mmrl.types import Decision, Observation, Rollout, Step
from mmrl.workers.environment import WorkerEnvironment
from mmrl.workers.remote import RemoteEnvironment
from policies.mlp import MLP
from simulators.tabletop import Tabletop
from tests.core import tiny_run
from tests.core.counting import Config as CountingConfig
from tests.core.test_rollout import SCRIPTS, ScriptedEnvironment, ScriptedPolicy

CPU = torch.device("cpu")
TABLETOP: dict[str, Any] = {"families": ("reach", "push"), "image_size": 32, "max_steps": {"reach": 5, "push": 7}, "speed": 0.15}


# -- the order of things -----------------------------------------------------------------------------------------------


class Logged(ScriptedEnvironment):
    """Simulates only when it is waited for, and logs both halves of what it is asked, under the number of its slots."""

    def __init__(self, log: list[str], num_envs: int, scripts: Any = SCRIPTS) -> None:
        super().__init__(scripts, num_envs)
        self.log = log

    def begin_reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Callable[[], Observation]:
        return self._begin("reset", lambda: self.reset(task_ids_B, where_B))

    def begin_step(self, actions_BCA: Tensor) -> Callable[[], Step]:
        return self._begin("step", lambda: self.step(actions_BCA))

    def _begin(self, what: str, simulate: Callable[[], Any]) -> Callable[[], Any]:
        self.log.append(f"begin {what} {self.num_envs}")

        def finish() -> Any:
            self.log.append(f"end {what} {self.num_envs}")
            return simulate()

        return finish


class LoggedPolicy(ScriptedPolicy):
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def act(self, observation: Observation, draws: Draws, *, explore: bool) -> Decision:
        self.log.append(f"act {observation.batch_size}")
        return super().act(observation, draws, explore=explore)


def collect(environments: Sequence[Environment], policy: Any, value: Any = None, **options: Any) -> Rollout:
    return Collector(environments, **{"decisions": 6, "seed": 1, "device": CPU, **options}).collect(policy, value)


def test_the_policy_acts_while_the_other_part_simulates() -> None:
    log: list[str] = []
    policy: Any = LoggedPolicy(log)
    long = [([0.0] * 20, False)]
    collect([Logged(log, 1, long), Logged(log, 2, long)], policy, decisions=2)
    first = ["begin reset 1", "begin reset 2", "end reset 1", "act 1", "begin step 1", "end reset 2", "act 2", "begin step 2"]
    second = ["end step 1", "act 1", "begin step 1", "end step 2", "act 2", "begin step 2"]
    assert log == [*first, *second, "end step 1", "end step 2"]


def test_a_part_that_starts_anew_is_waited_for_when_it_is_acted_for() -> None:
    """Task 0 ends with the second decision, and only its own part is asked for another."""
    log: list[str] = []
    policy: Any = LoggedPolicy(log)
    collect([Logged(log, 1, SCRIPTS[:1]), Logged(log, 2, [([0.0] * 20, False)])], policy, decisions=3)
    position = log.index("begin reset 1", 1)
    assert log[position - 1 : position + 4] == ["end step 1", "begin reset 1", "end reset 1", "act 1", "begin step 1"]
    assert log.count("begin reset 1") == 2 and log.count("begin reset 2") == 1


# -- the same rollout --------------------------------------------------------------------------------------------------


class Wanderer:
    """Its actions, log-probabilities and values are functions of a row's image, state and random numbers; sums are exact."""

    version = 0

    def __init__(self, dim: int, on_act: Callable[[], None] = lambda: None) -> None:
        self.dim, self.on_act = dim, on_act

    def act(self, observation: Observation, draws: Draws, *, explore: bool) -> Decision:
        self.on_act()
        assert observation.state is not None
        seen_B = self._seen(observation)
        action_BCA = draws.normal(2, self.dim) * 0.6 + seen_B[:, None, None] * 1e-3
        words_B = torch.tensor([len(sentence) for sentence in observation.instructions])
        trace = {"state": observation.state, "words": words_B, **observation.images}
        values_BV = self.value(observation, draws)[:, None]
        return Decision(action_BCA, trace, action_BCA[:, :, 0], action_BCA[:, :, 0] > 0, values_BV, self.version)

    def value(self, observation: Observation, draws: Draws) -> Tensor:
        return self._seen(observation) + draws.uniform()

    def _seen(self, observation: Observation) -> Tensor:
        assert observation.state is not None
        pixels = sum(image.long().sum((1, 2, 3)) for image in observation.images.values())
        return (torch.as_tensor(pixels) % 1000).float() + observation.state[:, 0]


def assert_same(ours: Rollout, theirs: Rollout, tolerance: float = 0.0) -> None:
    valid_TB = theirs.valid_TB
    assert torch.equal(ours.valid_TB, valid_TB) and ours.env_steps == theirs.env_steps and ours.lost == theirs.lost
    named = {
        name: (getattr(ours, name), getattr(theirs, name))
        for name in (
            "rewards_TB",
            "values_TBV",
            "next_values_TB",
            "terminated_TB",
            "truncated_TB",
            "task_ids_TB",
            "log_probs_TBK",
        )
    }
    assert ours.trace.keys() == theirs.trace.keys()
    named |= {f"trace of {name}": (ours.trace[name], theirs.trace[name]) for name in theirs.trace}
    for name, (our, their) in named.items():
        torch.testing.assert_close(
            our[valid_TB], their[valid_TB], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name in ("task_ids_M", "returns_M", "success_M", "lengths_M"):
        torch.testing.assert_close(getattr(ours.episodes, name), getattr(theirs.episodes, name), rtol=tolerance, atol=tolerance)
    assert ours.episodes.metrics.keys() == theirs.episodes.metrics.keys()
    for name, value in theirs.episodes.metrics.items():
        torch.testing.assert_close(ours.episodes.metrics[name], value, rtol=tolerance, atol=tolerance)


Open = Callable[..., Any]


@pytest.fixture
def opened() -> Iterator[Callable[[Any], Any]]:
    """Closes what it is given at the end of the test."""
    kept: list[Any] = []

    def keep(environment: Any) -> Any:
        kept.append(environment)
        return environment

    yield keep
    for environment in kept:
        environment.close()


def remote(num_envs: int, **options: Any) -> RemoteEnvironment:
    config = Tabletop.Config(**TABLETOP)
    return RemoteEnvironment("simulators.tabletop:Tabletop", config, num_envs=num_envs, device=CPU, **options)


def tabletop(num_envs: int) -> Tabletop:
    return Tabletop(Tabletop.Config(**TABLETOP), num_envs=num_envs, device=CPU)


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize(
    "options", [{"auto_reset": True}, {"auto_reset": False}, {"auto_reset": False, "group_size": 2}], ids=str
)
def test_parts_in_processes_give_the_serial_rollout(parts: int, options: dict[str, Any], opened: Open) -> None:
    policy = Wanderer(4)
    serial = Collector([opened(tabletop(12))], decisions=6, seed=1, device=CPU, **options)
    pipelined = Collector([opened(remote(12 // parts)) for _ in range(parts)], decisions=6, seed=1, device=CPU, **options)
    assert all(isinstance(environment, AsyncEnvironment) for environment in pipelined.environments)
    for _ in range(2):  # the second rollout begins with what the first left
        assert_same(pipelined.collect(policy, policy.value), expected := serial.collect(policy, policy.value))  # type: ignore[arg-type]
        assert len(expected.episodes.task_ids_M) >= 12 and expected.truncated_TB.any()


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("auto_reset", [True, False])
def test_parts_of_worker_processes_give_the_serial_rollout(parts: int, auto_reset: bool, opened: Open) -> None:
    def workers(num_envs: int, count: int) -> WorkerEnvironment:
        target = "tests.core.counting:Counting"
        return opened(WorkerEnvironment(target, CountingConfig(), num_envs=num_envs, device=CPU, workers=count))

    policy, options = Wanderer(2), {"decisions": 5, "auto_reset": auto_reset}
    serial = collect([workers(6, 2)], policy, policy.value, **options)
    assert_same(collect([workers(6 // parts, 1) for _ in range(parts)], policy, policy.value, **options), serial)
    assert len(serial.episodes.task_ids_M) > 5


def test_a_perceptron_decides_the_same_in_parts(opened: Open) -> None:
    policy: Any = MLP(MLP.Config(state_dim=4, action_dim=4, hidden=(16,)), device=CPU)
    serial = collect([opened(tabletop(6))], policy, policy.value)
    assert_same(collect([opened(remote(3)) for _ in range(2)], policy, policy.value), serial, tolerance=1e-6)


def test_pi0_decides_the_same_in_parts(tmp_path: Path, opened: Open) -> None:
    config = load(tiny_run.write_config(tmp_path))
    policy = config.policy.build(device=CPU)
    policy.fit_statistics(record(tabletop(2), torch.arange(2), policy.horizon, only_successes=False))
    serial = collect([opened(tabletop(6))], policy, policy.value, decisions=3)
    pipelined = collect([opened(remote(2)) for _ in range(3)], policy, policy.value, decisions=3)
    assert_same(pipelined, serial, tolerance=1e-4)


def test_a_run_in_parts_is_the_run_in_one(tmp_path: Path) -> None:
    """Until rounding errors grow: the first rollout of its second stage."""
    config = tiny_run.write_config(tmp_path)
    rows = {}
    for parts in (1, 2):
        overrides = [f"stages.improve.collect.parts={parts}", "stages.improve.iterations=1", "evaluation.videos=0"]
        rows[parts] = [row for row in tiny_run.rows(tiny_run.run(config, f"parts-{parts}", *overrides)) if row["kind"] == "train"]
        assert multiprocessing.active_children() == []
    first, second = (found[-1] for found in rows.values())
    assert first["stage"] == "improve" and first["rollout/decisions"] > 0
    shared = [name for name in first if name.startswith("rollout/")]
    assert [first[name] for name in shared] == pytest.approx([second[name] for name in shared], rel=1e-4)


# -- breakdowns --------------------------------------------------------------------------------------------------------


class Saboteur(Wanderer):
    """With its third decision (the second of the first part) it stops that part's process, and with the next one kills it."""

    def __init__(self, victim: RemoteEnvironment) -> None:
        super().__init__(4, self.count)
        self.victim, self.seen = victim, 0

    def count(self) -> None:
        self.seen += 1
        if self.seen in (3, 4):
            os.kill(self.victim.pool.pids[0] or -1, signal.SIGSTOP if self.seen == 3 else signal.SIGKILL)


@pytest.mark.parametrize("auto_reset", [True, False])
def test_a_process_killed_in_the_middle_of_a_step_is_replaced_and_the_run_goes_on(auto_reset: bool, opened: Open) -> None:
    environments = [opened(remote(2)), opened(remote(3))]
    before = [environment.pool.pids for environment in environments]
    collector = Collector(environments, decisions=4, seed=1, device=CPU, auto_reset=auto_reset)
    serial = Collector([opened(tabletop(5))], decisions=4, seed=1, device=CPU, auto_reset=auto_reset)
    policy: Any = Saboteur(environments[0])
    rollout, calm = collector.collect(policy, policy.value), serial.collect(Wanderer(4))  # type: ignore[arg-type]
    assert rollout.lost == 2
    assert not rollout.valid_TB[:2, :2].any()  # lost with the second decision
    assert bool(rollout.valid_TB[2:, :2].all()) is auto_reset
    assert torch.equal(rollout.rewards_TB[:2, 2:], calm.rewards_TB[:2, 2:])  # nothing happened to the others
    assert not set(rollout.episodes.task_ids_M.tolist()) & {0, 1}
    after = collector.collect(policy, policy.value)
    assert after.lost == 0 and after.valid_TB[0].all()
    assert environments[0].pool.pids != before[0] and environments[1].pool.pids == before[1]
    serial.next_task = int(after.task_ids_TB[0, 0])
    assert_same(after, serial.collect(policy, policy.value))


def test_what_is_begun_must_be_finished(opened: Open) -> None:
    environment = opened(remote(2))
    environment.begin_reset(torch.arange(2))
    with pytest.raises(RuntimeError, match=r"'step' was begun before 'reset' was finished"):
        environment.begin_step(torch.zeros(2, 1, 4))
