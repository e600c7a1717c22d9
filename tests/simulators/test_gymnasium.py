"""gymnasium environments against gymnasium itself, stepped by hand, one at a time."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmrl import config, metrics, trainer
from mmrl.errors import ActionError, MMRLError
from mmrl.progress import Quiet
from mmrl.protocols import RenderEnvironment
from mmrl.registry import ROOT, install_command
from mmrl.types import Observation, Step

if importlib.util.find_spec("gymnasium") is None and os.environ.get("CI") != "true":
    pytest.skip(f"gymnasium is not installed; install it with: {install_command('gymnasium')}", allow_module_level=True)

import gymnasium
import numpy as np

from simulators.gymnasium import Gymnasium
from simulators.gymnasium_parts.making import action_spec, native, seed_of
from tests.simulators import pixels

PIXELS = f"{pixels.__name__}:Pixels-v0"
TASKS = (7, 2**41 + 3, 20)


class Maker:
    """Builds environments and closes them at the end."""

    def __init__(self) -> None:
        self.opened: list[Gymnasium] = []

    def __call__(self, num_envs: int = 3, **fields: Any) -> Gymnasium:
        self.opened.append(Gymnasium(Gymnasium.Config(**fields), num_envs=num_envs, device=torch.device("cpu")))
        return self.opened[-1]


@pytest.fixture
def make() -> Iterator[Maker]:
    maker = Maker()
    yield maker
    for environment in maker.opened:
        environment.close()


def play(environment: Gymnasium, actions_TBA: Tensor, tasks: tuple[int, ...] = TASKS) -> list[Step]:
    environment.reset(torch.tensor(tasks))
    return [environment.step(action_BA[:, None]) for action_BA in actions_TBA]


def by_hand(name: str, task: int, actions: list[Any], **arguments: Any) -> list[tuple[Any, float, bool, bool]]:
    """What gymnasium says to one environment's episode: (observation, reward, terminated, truncated), up to its end."""
    environment = gymnasium.make(name, **arguments)
    environment.reset(seed=seed_of(task, 0))
    moments = []
    for action in actions:
        seen, reward, terminated, truncated, _ = environment.step(action)
        moments.append((np.array(seen), float(reward), terminated, truncated))
        if terminated or truncated:
            break
    environment.close()
    return moments


def assert_same_episode(steps: list[Step], slot: int, moments: list[tuple[Any, float, bool, bool]]) -> None:
    """Equal up to the end, and what was seen last stays from then on."""
    for t, step in enumerate(steps):
        seen, reward, terminated, truncated = moments[min(t, len(moments) - 1)]
        state = step.observation.state
        assert state is not None
        torch.testing.assert_close(state[slot], torch.tensor(seen, dtype=torch.float32).flatten(), rtol=0, atol=0)
        assert bool(step.terminated_B[slot]) is terminated and bool(step.truncated_B[slot]) is (truncated and not terminated)
        running = t < len(moments)
        assert bool(step.valid_BC[slot, 0]) is running
        assert float(step.rewards_BC[slot, 0]) == pytest.approx(reward if running else 0.0, rel=1e-6)


# -- the same as gymnasium ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_cartpole_is_gymnasium_s(make: Maker, workers: int) -> None:
    """Random actions let the pole fall at different moments; 40 steps are beyond every end."""
    actions = torch.randint(0, 2, (40, 3, 1), generator=torch.Generator().manual_seed(1)).float()
    steps = play(make(workers=workers, max_steps=30), actions)
    lengths = []
    for slot, task in enumerate(TASKS):
        moments = by_hand("CartPole-v1", task, actions[:, slot, 0].long().tolist(), max_episode_steps=30)
        assert_same_episode(steps, slot, moments)
        lengths.append(len(moments))
    assert len(set(lengths)) > 1


def test_pendulum_is_gymnasium_s_with_actions_clipped(make: Maker) -> None:
    actions = 3 * torch.randn(8, 3, 1, generator=torch.Generator().manual_seed(1))
    assert float(actions.abs().max()) > 2
    steps = play(make(id="Pendulum-v1", max_steps=6), actions)
    for slot, task in enumerate(TASKS):
        clipped = [np.clip(action.numpy(), -2, 2) for action in actions[:, slot]]
        assert_same_episode(steps, slot, by_hand("Pendulum-v1", task, clipped, max_episode_steps=6))
    assert steps[-1].truncated_B.all()


def test_an_environment_gets_nothing_beyond_its_bounds(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pendulum would clip by itself, others would not; what a slot that is done is told does not reach its environment either."""
    environment, given = make(id="Pendulum-v1", max_steps=2), []
    inner: Any = environment._inner
    step = inner._vector.step
    monkeypatch.setattr(inner._vector, "step", lambda actions: (given.append(actions.copy()), step(actions))[1])
    play(environment, torch.tensor([[[5.0], [-9.0], [1.0]], [[-2.5], [0.5], [2.0]]]))
    assert [actions[:, 0].tolist() for actions in given] == [[2.0, -2.0, 1.0], [-2.0, 0.5, 2.0]]
    inner._terminated_B[1] = True
    inner._truncated_B[:] = [False, False, False]
    environment.step(torch.tensor([0.1, float("nan"), 9.0]).view(3, 1, 1))
    assert given[-1][:, 0].tolist() == pytest.approx([0.1, 0.0, 2.0])


def test_a_slot_that_is_done_can_be_reset_while_others_run(make: Maker) -> None:
    """gymnasium restarts the slot that fell by itself; the reset here still begins the episode of its task."""
    environment = make(num_envs=2)
    environment.reset(torch.tensor([1, 2]))
    actions = torch.tensor([[[1.0]], [[0.0]]])
    tilt = [1.0, 0.0]
    for t in range(40):
        actions[1, 0, 0] = tilt[t % 2]  # left and right in turn keeps the second one up for longer
        step = environment.step(actions)
        if bool(step.done_B[0]):
            break
    assert step.done_B.tolist() == [True, False]
    environment.step(actions)
    before = environment.step(actions).observation.state
    after = environment.reset(torch.tensor([9, 9]), torch.tensor([True, False])).state
    seen, _ = gymnasium.make("CartPole-v1").reset(seed=seed_of(9, 0))
    assert before is not None and after is not None
    assert torch.equal(after[0], torch.from_numpy(seen)) and torch.equal(after[1], before[1])
    moments = by_hand("CartPole-v1", 9, [1] * 3)
    for moment in moments:
        step = environment.step(actions)
        assert step.observation.state is not None
        assert torch.equal(step.observation.state[0], torch.from_numpy(moment[0])) and step.valid_BC[0, 0]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_end_by_itself_at_the_time_limit_is_no_truncation(make: Maker, workers: int) -> None:
    """Seven times down reaches the last row with the last action that the limit allows."""
    step = play(make(id=PIXELS, max_steps=7, workers=workers), torch.tensor([[0.0, 1.0]]).expand(7, 3, 2))[-1]
    assert step.terminated_B.all() and not step.truncated_B.any()
    step = play(make(id=PIXELS, max_steps=6, workers=workers), torch.tensor([[0.0, 1.0]]).expand(6, 3, 2))[-1]
    assert step.truncated_B.all() and not step.terminated_B.any()


def test_another_seed_gives_other_episodes(make: Maker) -> None:
    seen = [make(seed=seed).reset(torch.tensor(TASKS)).state for seed in (0, 0, 1)]
    assert seen[0] is not None and seen[1] is not None and seen[2] is not None
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


# -- spaces ------------------------------------------------------------------------------------------------------------


def test_images_come_as_images_and_choices_start_at_zero(make: Maker) -> None:
    """Pixels itself asserts that its actions are in its space, which starts at (1, 5)."""
    environment = make(id=PIXELS)
    assert environment.action_spec.discrete and environment.action_spec.high == (2.0, 1.0)
    first = environment.reset(torch.tensor(TASKS))
    assert first.state is None and first.images["camera"].shape == (3, 8, 8, 3)
    second = environment.step(torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0]])[:, None]).observation
    for slot, (down, right) in enumerate([(1, 0), (0, 1), (0, -1)]):
        moved = first.images["camera"][slot].roll((down, right), (0, 1))
        assert torch.equal(second.images["camera"][slot], moved)


def test_other_observations_are_flattened_as_gymnasium_does(make: Maker) -> None:
    state = make(id="FrozenLake-v1").reset(torch.tensor(TASKS)).state
    assert state is not None and torch.equal(state, torch.eye(16)[:1].expand(3, 16))


@pytest.mark.parametrize("workers", [0, 2])
def test_actions_that_are_none_are_refused(make: Maker, workers: int) -> None:
    """Before any environment is stepped, so that it can go on; of a slot that is done nothing is asked."""
    environment = make(workers=workers, max_steps=2)
    environment.reset(torch.tensor(TASKS))
    for wrong in (2.0, -1.0, 0.5, float("nan")):
        with pytest.raises(ActionError, match=r"whole numbers from \[0\.0\] to \[1\.0\]; .*'policy\.choices'"):
            environment.step(torch.tensor([0.0, wrong, 1.0]).view(3, 1, 1))
    assert environment.step(torch.zeros(3, 2, 1)).truncated_B.all()
    environment.reset(torch.tensor(TASKS), torch.tensor([True, False, True]))
    assert environment.step(torch.tensor([0.0, 7.5, 1.0]).view(3, 1, 1)).valid_BC[:, 0].tolist() == [True, False, True]


def test_spaces_that_no_policy_could_act_in_are_refused(make: Maker) -> None:
    with pytest.raises(MMRLError, match="Thing-v0 has actions of Text"):
        action_spec(gymnasium.spaces.Text(3), "Thing-v0")
    whole = gymnasium.spaces.Box(0, 3, (2,), np.int64)
    with pytest.raises(MMRLError, match="wrap it into one with Box"):
        action_spec(whole, "Thing-v0")


# -- success, film, mistakes -------------------------------------------------------------------------------------------


def test_success_is_what_the_environment_says_and_stays_as_it_ended(make: Maker) -> None:
    steps = play(make(8, id=PIXELS), torch.tensor([[0.0, 1.0]]).expand(9, 8, 2), tuple(range(8)))
    columns = [int(np.random.default_rng(seed_of(task, 0)).integers(pixels.SIZE)) for task in range(8)]
    assert {column % 2 for column in columns} == {0, 1}
    wanted = [float(column % 2 == 0) for column in columns]
    assert [step.metrics["success"].tolist() for step in steps] == [[0.0] * 8] * 6 + [wanted] * 3


def test_success_is_a_return_where_the_environment_says_nothing(make: Maker) -> None:
    alternating = torch.tensor([[0.0], [1.0]]).repeat(4, 1)[:, None].expand(8, 3, 1)
    steps = play(make(success_return=5.0), alternating)
    assert [step.metrics["success"].tolist() for step in steps] == [[float(t >= 5)] * 3 for t in range(1, 9)]
    assert not play(make(), alternating)[-1].metrics["success"].any()  # registered with 475
    assert not play(make(id="Pendulum-v1"), torch.zeros(2, 3, 1))[-1].metrics["success"].any()  # registered without


@pytest.mark.parametrize("workers", [0, 2])
def test_it_can_be_filmed_only_if_asked_to(make: Maker, workers: int) -> None:
    assert not isinstance(make(id=PIXELS, workers=workers), RenderEnvironment)
    environment = make(id=PIXELS, render=True, workers=workers)
    assert isinstance(environment, RenderEnvironment)
    board = environment.reset(torch.tensor(TASKS)).images["camera"]
    frames = environment.render_video(torch.tensor([2, 0]))
    assert torch.equal(frames, board[[2, 0]].repeat_interleave(4, 1).repeat_interleave(4, 2))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"id": "NoSuchThing-v1"}, r"environment\.id = NoSuchThing-v1: .*doesn't exist"),
        ({"id": "no_such_package_here:Thing-v0"}, r"environment\.id = no_such_package_here:Thing-v0: "),
        ({"kwargs": {"gravity_of_the_moon": 1}}, r"environment\.kwargs = \{'gravity_of_the_moon': 1\} do not fit CartPole-v1"),
        ({"id": "Blackjack-v1"}, r"Blackjack-v1 is registered without a time limit: set environment\.max_steps"),
        ({"id": f"{pixels.__name__}:Odd-v0", "kwargs": {"seen": "grows"}}, r"Odd-v0 has observations of Sequence\(.*with a Box"),
        ({"id": f"{pixels.__name__}:Odd-v0", "kwargs": {"done": "text"}}, r"Odd-v0 has actions of Text\(.*flat MultiDiscrete"),
    ],
)
def test_mistakes_end_in_a_sentence(fields: dict[str, Any], sentence: str, workers: int) -> None:
    with pytest.raises(MMRLError, match=f"^.*{sentence}"):
        Gymnasium(Gymnasium.Config(**fields, workers=workers), num_envs=2, device=torch.device("cpu"))


# -- workers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("CartPole-v1", {"max_steps": 30, "success_return": 20.0}),
        ("Pendulum-v1", {"max_steps": 14}),
        (PIXELS, {}),
        (f"{pixels.__name__}:Odd-v0", {"success_return": 2.5}),
    ],
)
def test_workers_play_the_same_episodes_bit_for_bit(make: Maker, name: str, fields: dict[str, Any]) -> None:
    """Chunks of three actions, some beyond the bounds; slots are done in the middle of a chunk and wait there, or start again."""
    alone, apart = make(5, id=name, **fields), make(5, id=name, workers=2, **fields)
    spec, generator = alone.action_spec, torch.Generator().manual_seed(3)
    assert (spec, alone.max_steps) == (apart.action_spec, apart.max_steps)
    low_A, high_A = torch.tensor(spec.low), torch.tensor(spec.high)
    tasks_B = torch.tensor([7, 2**41 + 3, 20, 7, 0])
    assert_same(alone.reset(tasks_B), apart.reset(tasks_B))
    ended, waited = 0, False
    for moment in range(24):
        draws = torch.rand(5, 3, spec.dim, generator=generator)
        actions = (low_A + (high_A - low_A) * draws).round() if spec.discrete else 1.5 * (low_A + (high_A - low_A) * draws)
        ours, theirs = alone.step(actions), apart.step(actions)
        assert_same(ours.observation, theirs.observation)
        for key in ("rewards_BC", "valid_BC", "terminated_B", "truncated_B", "lost_B"):
            assert torch.equal(getattr(ours, key), getattr(theirs, key)), key
        assert torch.equal(ours.metrics["success"], theirs.metrics["success"])
        waited |= bool((~ours.valid_BC[:, 0]).any())
        if moment % 2 and ours.done_B.any():
            ended += int(ours.done_B.sum())
            tasks_B = torch.where(ours.done_B, tasks_B + 10, tasks_B)
            assert_same(alone.reset(tasks_B, ours.done_B), apart.reset(tasks_B, ours.done_B))
    assert ended > 5 and waited


def assert_same(ours: Observation, theirs: Observation) -> None:
    assert ours.instructions == theirs.instructions and ours.images.keys() == theirs.images.keys()
    assert all(torch.equal(image, theirs.images[camera]) for camera, image in ours.images.items())
    if ours.state is None or theirs.state is None:
        assert ours.state is theirs.state
    else:
        assert ours.state.dtype == theirs.state.dtype and torch.equal(ours.state, theirs.state)


@pytest.mark.parametrize("workers", [0, 2])
def test_success_of_a_slot_is_its_own_environment_s_to_tell(make: Maker, workers: int) -> None:
    """Odd says at its end that it was no success. Until then it is silent, and the return decides, whatever others say."""
    environment = make(2, id=f"{pixels.__name__}:Odd-v0", success_return=2.0, workers=workers)
    environment.reset(torch.tensor([0, 1]))
    said = []
    for down in ([0.0, 1.0], [0.0, 1.0], [0.0, 0.0]):
        said.append(environment.step(torch.tensor(down).view(2, 1, 1)).metrics["success"].tolist())
    assert said == [[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_reset_may_be_of_some_slots(make: Maker, workers: int) -> None:
    environment = make(3, workers=workers)
    state = environment.reset(torch.tensor(TASKS), torch.tensor([False, True, False])).state
    whole = make(3).reset(torch.tensor(TASKS)).state
    assert state is not None and whole is not None
    assert torch.equal(state[1], whole[1]) and not state[[0, 2]].any()
    step = environment.step(torch.ones(3, 1, 1))
    assert step.valid_BC[:, 0].tolist() == [False, True, False] and step.rewards_BC[:, 0].tolist() == [0.0, 1.0, 0.0]


def test_bounds_that_are_none_in_float32_hold_exactly() -> None:
    space = gymnasium.spaces.Box(np.array([-0.7, -0.3]), np.array([0.3, 0.7]), dtype=np.float64)
    taken = native(space, np.array([[9.0, 9.0], [-9.0, -9.0], [0.25, -0.25]], np.float32))
    as_workers_clip = np.array([0.3, 0.7], np.float32)
    assert taken.dtype == np.float64 and all(space.contains(row) for row in taken) and taken[2].tolist() == [0.25, -0.25]
    assert native(space, as_workers_clip).tolist() == taken[0].tolist() and taken[0, 0] == 0.3


@pytest.mark.parametrize("stop", ["SIGKILL", "SIGSTOP"])
def test_a_worker_that_dies_or_hangs_is_replaced_and_its_episodes_are_lost(make: Maker, stop: str) -> None:
    environment = make(3, workers=2, time_limit=2.0 if stop == "SIGSTOP" else 60.0)
    pool = environment._inner.pool
    assert pool.time_limit == environment.config.time_limit
    environment.reset(torch.tensor(TASKS))
    environment.step(torch.zeros(3, 1, 1))
    os.kill(pool.pids[0] or -1, getattr(signal, stop))  # it holds the first two slots
    step = environment.step(torch.ones(3, 1, 1))
    assert step.lost_B.tolist() == [True, True, False] and step.valid_BC[:, 0].tolist() == [False, False, True]
    assert not step.rewards_BC[:2].any() and not step.done_B[2] and pool.lost == 1
    pool.time_limit = 60.0  # for a new process on a busy machine
    after = environment.reset(torch.tensor([5, 6, 20]), torch.tensor([True, True, False]))
    fresh = make(3).reset(torch.tensor([5, 6, 20])).state
    assert after.state is not None and fresh is not None and torch.equal(after.state[:2], fresh[:2])
    step = environment.step(torch.zeros(3, 1, 1))
    assert not step.lost_B.any() and step.valid_BC.all() and step.rewards_BC[:, 0].tolist() == [1.0] * 3


@pytest.mark.parametrize("workers", [0, 2])
def test_closing_ends_every_process(workers: int) -> None:
    environment = Gymnasium(Gymnasium.Config(workers=workers), num_envs=2, device=torch.device("cpu"))
    environment.reset(torch.tensor([1, 2]))
    pids = environment._inner.pool.pids if workers else []
    assert len(multiprocessing.active_children()) >= len(pids) == workers
    environment.close()
    environment.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid or -1, 0)


def test_fields_can_be_read_without_gymnasium() -> None:
    """As those of every simulator: only its parts import it, and with workers not even the run's process does."""
    script = "import sys, simulators.gymnasium; raise SystemExit('gymnasium' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False, timeout=120).returncode == 0


@pytest.mark.parametrize("task", ["cartpole", "pendulum"])
def test_the_shipped_configs_train(task: str, tmp_path: Path) -> None:
    """Two short iterations of each, with videos; ratios are 1 on the first update and the return is measured."""
    small = ["evaluation.episodes=3", "evaluation.num_envs=3", "evaluation.videos=1", "environment.max_steps=12"]
    stage = ["iterations=2", "collect.num_envs=4", "collect.decisions=12", "algorithm.minibatches=2", "algorithm.epochs=2"]
    changes = [*small, *(f"stages.improve.{change}" for change in stage), "tensorboard=false"]
    loaded = config.load(ROOT / "configs" / "gymnasium" / f"ppo_{task}.yaml", changes)
    run = trainer.train(loaded, tmp_path / "run", Quiet())
    rows = metrics.read(run)
    trained = [row for row in rows if row["kind"] == "train"]
    assert [row["policy/log_prob_mismatch_max"] < 1e-5 for row in trained] == [True, True]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    assert [row["label"] for row in evaluations] == ["before", "after"]
    for row in evaluations:  # CartPole pays 1 a step, Pendulum costs up to 16.3
        expected = pytest.approx(row["length"]) if task == "cartpole" else pytest.approx(-8.0 * row["length"], rel=1)
        assert row["return"] == expected and row["families"][loaded.environment.config.id]["return"] == row["return"]
    assert list((run / "trajectories").glob("*.webp"))
