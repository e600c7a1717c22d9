"""Rollouts of scripted episodes, against numbers worked out by hand and against advantages computed episode by episode."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmrl.columns import Column
from mmrl.numerics.advantages import gae
from mmrl.numerics.draws import Draws
from mmrl.rollout import Collector, episode_metrics, of_slots
from mmrl.types import ActionSpec, Decision, Observation, Step

CHUNK = 2
TRAP = 99.0  # the reward of an action after the end, which nothing may count


def value_of(task: float, step: float) -> float:
    """What the scripted critic thinks of a task after ``step`` actions: a number that names the moment."""
    return 10.0 * task + step


@dataclass
class Moment:
    """A decision as the environment saw it."""

    slot: int
    task: int
    before: int
    after: int
    reward: float
    terminated: bool
    truncated: bool


@dataclass
class ScriptedEnvironment:
    """Task i plays ``scripts[i % len(scripts)]``: the rewards of its actions, and whether its end is a truncation.

    An action adds its value to the reward, and so does its slot's ``bias``. ``seen``: a list of moments a ``step``.
    """

    scripts: list[tuple[list[float], bool]]
    num_envs: int
    max_steps: int = 100
    action_spec: ActionSpec = field(default_factory=lambda: ActionSpec(1, (-1.0,), (1.0,)))
    bias: list[float] | None = None
    resets: list[tuple[list[int], list[bool]]] = field(default_factory=list)
    seen: list[list[Moment]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.task, self.clock = [0] * self.num_envs, [0] * self.num_envs

    def reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Observation:
        where = [True] * self.num_envs if where_B is None else where_B.tolist()
        self.resets.append((task_ids_B.tolist(), where))
        for slot, chosen in enumerate(where):
            if chosen:
                self.task[slot], self.clock[slot] = int(task_ids_B[slot]), 0
        return self._observe()

    def _observe(self) -> Observation:
        state = torch.tensor([self.task, self.clock], dtype=torch.float64).T
        return Observation({}, state, tuple(f"task {task}" for task in self.task))

    def step(self, actions_BCA: Tensor) -> Step:
        rewards_BC = torch.full((self.num_envs, CHUNK), TRAP, dtype=torch.float64)
        valid_BC = torch.zeros(self.num_envs, CHUNK, dtype=torch.bool)
        terminated, truncated, moments = [], [], []
        for slot in range(self.num_envs):
            rewards, ends_by_time = self.scripts[self.task[slot] % len(self.scripts)]
            before, total = self.clock[slot], 0.0
            for action in range(CHUNK):
                if self.clock[slot] < len(rewards):
                    rewards_BC[slot, action] = rewards[self.clock[slot]] + float(actions_BCA[slot, action, 0])
                    rewards_BC[slot, action] += self.bias[slot] if self.bias else 0.0
                    valid_BC[slot, action] = True
                    total += float(rewards_BC[slot, action])
                    self.clock[slot] += 1
            done = self.clock[slot] == len(rewards)
            terminated.append(done and not ends_by_time)
            truncated.append(done and ends_by_time)
            moments.append(Moment(slot, self.task[slot], before, self.clock[slot], total, terminated[-1], truncated[-1]))
        self.seen.append(moments)
        end = torch.tensor(terminated)
        metrics = {"success": end.float(), "clock": torch.tensor(self.clock, dtype=torch.float32)}
        return Step(self._observe(), rewards_BC, valid_BC, end, torch.tensor(truncated), metrics)

    def family_of(self, task_ids_M: Tensor) -> tuple[str, ...]:
        return ("script",) * len(task_ids_M)

    def close(self) -> None: ...


class ScriptedPolicy:
    """Does nothing and always knows ``value_of``."""

    version, asked = 3, 0

    def act(self, observation: Observation, draws: Draws, *, explore: bool) -> Decision:
        assert explore and not torch.is_grad_enabled()
        b = observation.batch_size
        action = torch.zeros(b, CHUNK, 1, dtype=torch.float64)
        assert observation.state is not None
        state_BS = observation.state
        return Decision(action, {"state": state_BS}, -state_BS, state_BS > 0, self._values(state_BS)[:, None], self.version)

    def _values(self, state_BS: Tensor) -> Tensor:
        return torch.tensor([value_of(*row) for row in state_BS.tolist()], dtype=torch.float64)

    def value(self, observation: Observation, draws: Draws) -> Tensor:
        self.asked += observation.batch_size
        assert observation.state is not None
        return self._values(observation.state)


# Three actions to the end; four actions and the time is up; six actions to the end.
SCRIPTS = [([1.0, 2.0, 3.0], False), ([0.0, 5.0, 0.0, 0.0], True), ([2.0] * 6, False)]


def untyped(policy: ScriptedPolicy) -> Any:
    """A collector needs less of a policy than the protocol promises."""
    return policy


def collect(environment: ScriptedEnvironment, policy: Any, *, value: bool = True, **options: Any) -> tuple[Any, Collector]:
    collector = Collector([environment], seed=0, device=torch.device("cpu"), **options)
    return collector.collect(policy, policy.value if value else None), collector


def test_auto_reset_worked_by_hand() -> None:
    environment, policy = ScriptedEnvironment(SCRIPTS, 2), ScriptedPolicy()
    rollout, collector = collect(environment, policy, decisions=4)
    # Slot 0 ends task 0 with its second decision, after the third action, and goes on with task 2, which the rollout's end cuts.
    # Slot 1 runs out of time in task 1 after two decisions and goes on with task 3 (task 0's script), whose end is the rollout's.
    assert rollout.task_ids_TB.tolist() == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert rollout.rewards_TB.tolist() == [[3, 5], [3, 0], [4, 3], [4, 3]]
    assert rollout.values_TBV[..., 0].tolist() == [[0, 10], [2, 12], [20, 30], [22, 32]]
    assert rollout.terminated_TB.tolist() == [[False, False], [True, False], [False, False], [False, True]]
    assert rollout.truncated_TB.tolist() == [[False, False], [False, True], [False, False], [False, False]]
    following = rollout.next_values_TB
    # (1, 1) is what the critic says of task 1 when its time was up, not of task 3; (3, 0) what it says where the rollout ends.
    assert [float(following[t, b]) for t, b in ((0, 0), (0, 1), (1, 1), (2, 0), (2, 1), (3, 0))] == [2, 12, 14, 22, 32, 24]
    assert policy.asked == 2  # nothing else needs the critic
    assert rollout.valid_TB.all() and rollout.decisions == 8
    assert rollout.env_steps == 14
    episodes = rollout.episodes
    assert episodes.task_ids_M.tolist() == [0, 1, 3]
    assert episodes.returns_M.tolist() == [6, 5, 6]
    assert episodes.lengths_M.tolist() == [3, 4, 3]
    assert episodes.success_M.tolist() == [1, 0, 1]
    assert episodes.metrics["clock"].tolist() == [3, 4, 3]
    assert torch.equal(rollout.trace["state"], -rollout.log_probs_TBK)
    assert rollout.mask_TBK[:, :, 1].tolist() == [[False, False], [True, True], [False, False], [True, True]]
    # The last decision restarts nothing, and the next rollout begins with tasks that nobody has played.
    assert [where for _, where in environment.resets] == [[True, True], [True, True]]
    again = collector.collect(untyped(policy), policy.value)
    assert again.task_ids_TB[0].tolist() == [4, 5]


def test_without_a_critic_nothing_is_bootstrapped() -> None:
    policy = ScriptedPolicy()
    rollout, _ = collect(ScriptedEnvironment(SCRIPTS, 2), policy, decisions=4, value=False)
    assert policy.asked == 0
    assert float(rollout.next_values_TB[1, 1]) == 0 and float(rollout.next_values_TB[3, 0]) == 0


def test_whole_episodes_worked_by_hand() -> None:
    environment = ScriptedEnvironment([SCRIPTS[2], SCRIPTS[0]], 4, bias=[0.0, 1.0, 0.0, 1.0])
    rollout, collector = collect(environment, ScriptedPolicy(), decisions=9, group_size=2, auto_reset=False, value=False)
    assert rollout.task_ids_TB.tolist() == [[0, 0, 1, 1]] * 3  # stops when all are done, and a group is one task
    assert rollout.valid_TB.tolist() == [[True] * 4, [True] * 4, [True, True, False, False]]
    assert rollout.rewards_TB.tolist() == [[4, 6, 3, 5], [4, 6, 3, 4], [4, 6, 0, 0]]  # no trap
    episodes = rollout.episodes
    # Slots 2 and 3 ended first; the record is in the order of the slots all the same.
    assert episodes.task_ids_M.tolist() == [0, 0, 1, 1]
    assert episodes.returns_M.tolist() == [12, 18, 6, 9]
    assert episodes.lengths_M.tolist() == [6, 6, 3, 3]
    assert episodes.metrics["clock"].tolist() == [6, 6, 3, 3]
    assert rollout.decisions == 10 and rollout.env_steps == 18
    assert len(environment.resets) == 1
    again = collector.collect(untyped(ScriptedPolicy()))
    assert again.task_ids_TB[0].tolist() == [2, 2, 3, 3]


def test_an_episode_that_is_not_finished_is_recorded_as_it_stands() -> None:
    environment = ScriptedEnvironment([SCRIPTS[2], SCRIPTS[0]], 2)
    rollout, _ = collect(environment, ScriptedPolicy(), decisions=2, auto_reset=False)
    assert rollout.episodes.task_ids_M.tolist() == [0, 1]
    assert rollout.episodes.returns_M.tolist() == [8, 6]
    assert rollout.episodes.lengths_M.tolist() == [4, 3]
    assert rollout.episodes.success_M.tolist() == [0, 1]
    assert float(rollout.next_values_TB[1, 0]) == value_of(0, 4)  # cut, so bootstrapped


def test_no_finished_episode_is_an_empty_record() -> None:
    rollout, _ = collect(ScriptedEnvironment([SCRIPTS[2]], 2), ScriptedPolicy(), decisions=1)
    assert len(rollout.episodes.task_ids_M) == 0
    assert rollout.episodes.metrics.keys() == {"clock"}
    assert episode_metrics(rollout.episodes) == {"rollout/episodes": 0.0}


def test_means_over_episodes() -> None:
    rollout, _ = collect(ScriptedEnvironment(SCRIPTS, 2), ScriptedPolicy(), decisions=4)
    expected = {"episodes": 3, "success": 2 / 3, "return": 17 / 3, "length": 10 / 3, "clock": 10 / 3}
    assert episode_metrics(rollout.episodes) == pytest.approx({f"rollout/{name}": value for name, value in expected.items()})


@pytest.mark.parametrize(("group_size", "auto_reset"), [(2, True), (3, False)])
def test_groups_that_cannot_be_are_refused(group_size: int, auto_reset: bool) -> None:
    with pytest.raises(ValueError, match="group"):
        collect(ScriptedEnvironment(SCRIPTS, 4), ScriptedPolicy(), decisions=2, group_size=group_size, auto_reset=auto_reset)


class RandomPolicy(ScriptedPolicy):
    """Its actions, and so the rewards, are random numbers."""

    def act(self, observation: Observation, draws: Draws, *, explore: bool) -> Decision:
        decision = super().act(observation, draws, explore=explore)
        return replace(decision, action=draws.normal(CHUNK, 1, dtype=torch.float64))


@pytest.mark.parametrize("auto_reset", [True, False])
def test_a_rollout_does_not_depend_on_how_its_slots_are_shared_out(auto_reset: bool) -> None:
    """Six slots of one environment, or of three environments: the same decisions of the same tasks, bit for bit."""
    rollouts = []
    for sizes in ([6], [2, 2, 2], [4, 2]):
        environments = [ScriptedEnvironment(SCRIPTS, size) for size in sizes]
        policy = RandomPolicy()
        options: Any = {"decisions": 5, "seed": 1, "device": torch.device("cpu"), "auto_reset": auto_reset}
        rollouts.append(Collector(environments, **options).collect(untyped(policy), policy.value))
    for other in rollouts[1:]:
        valid_TB = rollouts[0].valid_TB
        assert torch.equal(other.valid_TB, valid_TB)
        for name in ("rewards_TB", "values_TBV", "next_values_TB", "terminated_TB", "truncated_TB", "task_ids_TB"):
            assert torch.equal(getattr(other, name)[valid_TB], getattr(rollouts[0], name)[valid_TB]), name
        assert torch.equal(other.log_probs_TBK, rollouts[0].log_probs_TBK)
        assert torch.equal(other.trace["state"], rollouts[0].trace["state"])
        assert torch.equal(other.episodes.returns_M, rollouts[0].episodes.returns_M)
        assert torch.equal(other.episodes.task_ids_M, rollouts[0].episodes.task_ids_M)
        assert other.env_steps == rollouts[0].env_steps
    if auto_reset:
        assert len(rollouts[0].episodes.task_ids_M) > 6


def test_parts_that_end_early_are_filled_up() -> None:
    """The first environment's episodes take two decisions, the second's three."""
    environments = [ScriptedEnvironment([SCRIPTS[0]], 2), ScriptedEnvironment([SCRIPTS[2]], 1)]
    collector = Collector(environments, decisions=9, seed=0, device=torch.device("cpu"), auto_reset=False)
    rollout = collector.collect(untyped(ScriptedPolicy()))
    assert rollout.valid_TB.tolist() == [[True] * 3, [True] * 3, [False, False, True]]
    assert rollout.rewards_TB.tolist() == [[3, 3, 4], [3, 3, 4], [0, 0, 4]]
    assert [len(environment.seen) for environment in environments] == [2, 3]


def test_random_numbers_are_those_of_the_episode_and_its_decision() -> None:
    """Every decision has numbers of its own, also within a group and in the next rollout."""
    environment, policy = ScriptedEnvironment(SCRIPTS, 4), RandomPolicy()
    collector = Collector([environment], decisions=2, seed=1, device=torch.device("cpu"), group_size=2, auto_reset=False)
    rewards = torch.cat([collector.collect(untyped(policy)).rewards_TB for _ in range(2)])
    assert len(rewards.flatten().unique()) == rewards.numel() == 16


@pytest.mark.parametrize("auto_reset", [True, False])
def test_policy_and_critic_are_told_how_many_decisions_were_made(auto_reset: bool) -> None:
    """A decision is two actions of the script, so the clock in the state tells the same."""
    told = []

    class Listening(ScriptedPolicy):
        def act(self, observation: Observation, draws: Draws, *, explore: bool) -> Decision:
            self._check(observation)
            return super().act(observation, draws, explore=explore)

        def value(self, observation: Observation, draws: Draws) -> Tensor:
            self._check(observation)
            return super().value(observation, draws)

        def _check(self, observation: Observation) -> None:
            assert observation.state is not None and observation.elapsed_B is not None
            expected_B = (observation.state[:, 1] / CHUNK).ceil()
            assert observation.elapsed_B.tolist() == expected_B.tolist()
            told.extend(observation.elapsed_B.tolist())

    collect(ScriptedEnvironment(SCRIPTS, 3), Listening(), decisions=5, auto_reset=auto_reset)
    assert set(told) >= {0, 1, 2}


def test_nobody_acts_for_slots_that_are_idle() -> None:
    asked = []

    class Counted(ScriptedPolicy):
        def act(self, observation: Observation, draws: Draws, *, explore: bool) -> Decision:
            assert len(draws) == observation.batch_size
            asked.append(observation.batch_size)
            return super().act(observation, draws, explore=explore)

    rollout, _ = collect(ScriptedEnvironment([SCRIPTS[0], SCRIPTS[2]], 4), Counted(), decisions=9, auto_reset=False)
    assert asked == rollout.valid_TB.sum(1).tolist() == [4, 4, 2]
    assert not rollout.mask_TBK[2, [0, 2]].any() and not rollout.trace["state"][2, [0, 2]].any()


def naive_advantages(environment: ScriptedEnvironment, gamma: float, lam: float) -> dict[tuple[int, int, int], float]:
    """(slot, task, step before) -> advantage, from what the environment saw: episode by episode, by the definition."""
    episodes: dict[tuple[int, int], list[Moment]] = {}
    for moments in environment.seen:
        for moment in moments:
            if moment.after > moment.before:
                episodes.setdefault((moment.slot, moment.task), []).append(moment)
    found = {}
    for episode in episodes.values():
        for start, first in enumerate(episode):
            total = 0.0
            for ahead, moment in enumerate(episode[start:]):
                following = 0.0 if moment.terminated else value_of(moment.task, moment.after)
                error = moment.reward + gamma * following - value_of(moment.task, moment.before)
                total += (gamma * lam) ** ahead * error
            found[first.slot, first.task, first.before] = total
    return found


@pytest.mark.parametrize("auto_reset", [True, False])
def test_advantages_over_a_rollout_equal_those_of_its_episodes(auto_reset: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 9, (23,), generator=generator).tolist()
    scripts = [(torch.randn(n, generator=generator).tolist(), n % 2 == 0) for n in lengths]
    environment = ScriptedEnvironment(scripts, 5, bias=[0.1, -0.2, 0.3, 0.0, 1.0])
    rollout, _ = collect(environment, ScriptedPolicy(), decisions=7, auto_reset=auto_reset)
    advantages_TB, _ = gae(
        rollout.rewards_TB,
        rollout.values_TBV[..., 0],
        rollout.next_values_TB,
        rollout.terminated_TB,
        rollout.truncated_TB,
        gamma=0.9,
        lam=0.7,
    )
    naive, seen = naive_advantages(environment, 0.9, 0.7), set()
    for t, b in rollout.valid_TB.nonzero().tolist():
        task, before = (int(x) for x in rollout.trace["state"][t, b])
        seen.add((b, task, before))
        assert float(advantages_TB[t, b]) == pytest.approx(naive[b, task, before], rel=1e-9, abs=1e-9)
    assert seen == naive.keys()  # every decision that did anything, once


class KeyedEnvironment(ScriptedEnvironment):
    """The key of a state is the number of actions so far, whatever the task."""

    def _observe(self) -> Observation:
        return replace(super()._observe(), anchors_B=torch.tensor(self.clock))


def test_a_decision_is_recorded_with_the_state_it_was_made_in() -> None:
    """Of the moment before it, the first of an episode that began within the rollout among them; side by side in two parts."""
    environments: list[Any] = [KeyedEnvironment(SCRIPTS, 2), KeyedEnvironment(SCRIPTS, 1)]
    collector = Collector(environments, decisions=4, seed=0, device=torch.device("cpu"))
    rollout = collector.collect(untyped(ScriptedPolicy()))
    assert rollout.anchor_TB is not None
    assert rollout.anchor_TB.tolist() == [[0, 0, 0], [2, 2, 2], [0, 0, 4], [2, 2, 0]]
    assert torch.equal(rollout.anchor_TB, rollout.trace["state"][..., 1].long())  # what the policy saw
    plain, _ = collect(ScriptedEnvironment(SCRIPTS, 2), ScriptedPolicy(), decisions=2)
    assert plain.anchor_TB is None


def test_slots_of_whole_episodes_are_taken_out_with_their_episodes() -> None:
    environment = KeyedEnvironment([SCRIPTS[2], SCRIPTS[0], SCRIPTS[1]], 3)
    rollout, _ = collect(environment, ScriptedPolicy(), decisions=9, auto_reset=False)
    names = Column.of("abcdefghi").map(lambda x: x.reshape(3, 3))
    keep_B = torch.tensor([True, False, True])
    taken = of_slots(replace(rollout, trace={**rollout.trace, "name": names}), keep_B)
    assert taken.rewards_TB.tolist() == rollout.rewards_TB[:, keep_B].tolist() and taken.task_ids_TB[0].tolist() == [0, 2]
    assert taken.anchor_TB is not None and rollout.anchor_TB is not None
    assert torch.equal(taken.anchor_TB, rollout.anchor_TB[:, keep_B])
    assert taken.trace["name"].tolist() == [["a", "c"], ["d", "f"], ["g", "i"]]
    assert taken.episodes.task_ids_M.tolist() == [0, 2] and taken.episodes.lengths_M.tolist() == [6, 4]
    assert taken.env_steps == 10 and taken.lost == 0
    assert taken.reference_log_probs_TBK is None


class ScriptedGaussian(ScriptedPolicy):
    """It says what the means of its units were: the state, twice."""

    def act(self, observation: Observation, draws: Draws, *, explore: bool) -> Decision:
        decision = super().act(observation, draws, explore=explore)
        assert observation.state is not None
        units = decision.log_probs_BK.shape[1]
        return replace(decision, means_BKD=observation.state[:, None].expand(-1, units, -1))


def test_means_of_units_are_kept_where_they_are_asked_for_and_stay_with_their_slots() -> None:
    def play(keep_means: bool) -> Any:
        environments: list[Any] = [ScriptedEnvironment(SCRIPTS, 2), ScriptedEnvironment(SCRIPTS, 1)]
        collector = Collector(
            environments, decisions=9, seed=0, device=torch.device("cpu"), auto_reset=False, keep_means=keep_means
        )
        return collector.collect(untyped(ScriptedGaussian()))

    assert play(False).means_TBKD is None
    rollout = play(True)
    assert rollout.means_TBKD is not None and rollout.means_TBKD.shape[:3] == rollout.log_probs_TBK.shape
    state_TBS = rollout.trace["state"]
    assert torch.equal(rollout.means_TBKD, state_TBS[:, :, None].expand_as(rollout.means_TBKD)) and state_TBS.any()
    keep_B = torch.tensor([True, False, True])
    taken = of_slots(rollout, keep_B)
    assert taken.means_TBKD is not None and torch.equal(taken.means_TBKD, rollout.means_TBKD[:, keep_B])
