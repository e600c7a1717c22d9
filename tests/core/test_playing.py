"""An episode is the same bit for bit, however many are played beside it, and whether it is filmed or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrl import component
from mmrl.component import Component
from mmrl.numerics.draws import Draws
from mmrl.playing import Played, Player, Reel, reel_within, seats
from mmrl.types import Decision, Observation
from tests.core import picture_run, tiny_run
from tests.core.test_evaluation import Filmed, length_of

CPU = torch.device("cpu")


def play(policy: Any, environment: Any, tasks: list[int], *, act_batch: int = 32, reel: Reel | None = None) -> list[Played]:
    try:
        player = Player(policy, environment, seed=4, act_batch=act_batch, device=CPU)
        return player.play(tasks, lambda n: None, reel, tasks[::3] if reel else ())
    finally:
        environment.close()


@pytest.mark.parametrize("size", [1, 4, 7])
@pytest.mark.parametrize("count", [1, 3, 20])
def test_everyone_has_the_seat_of_its_id(size: int, count: int) -> None:
    ids_N = torch.randperm(1000)[:count] + 10**12
    place_N, occupant_PS = seats(ids_N, size)
    wanted = [task % size for task in ids_N.tolist()]
    assert occupant_PS.shape == (max(wanted.count(seat) for seat in wanted), size)  # no batch more than it takes
    assert [place % size for place in place_N.tolist()] == wanted
    assert torch.equal(occupant_PS.flatten()[place_N], torch.arange(count))
    empty = torch.ones(occupant_PS.numel(), dtype=torch.bool).index_fill(0, place_N, False)
    assert not occupant_PS.flatten()[empty].any()


class Fussy:
    """What it does hangs on how many rows it sees and where among them a row stands, as rounding does, only more so."""

    version = 0

    def act(self, observation: Observation, draws: Draws, *, explore: bool) -> Decision:
        assert observation.state is not None
        rows = len(observation.state)
        place_B = torch.arange(rows) / (1 + rows)
        action_B = observation.state[:, 1] + place_B + draws.uniform()
        nothing = torch.zeros(rows, 0)
        return Decision(torch.stack([action_B, action_B / 3, action_B / 7], 1)[..., None], {}, nothing, nothing > 0, None)


def test_rows_and_places_do_not_depend_on_num_envs(tmp_path: Path) -> None:
    tasks = [*range(100, 117), 205, 301]
    ones = play(Fussy(), Filmed(1), tasks, act_batch=4)
    assert [episode.steps for episode in ones] == [length_of(task) for task in tasks]
    assert len({episode.return_ for episode in ones}) == len(tasks)
    for num_envs in (2, 3, 7, 40):
        assert play(Fussy(), Filmed(num_envs), tasks, act_batch=4) == ones
        assert play(Fussy(), Filmed(num_envs), tasks, act_batch=4, reel=Reel(tmp_path, "film", {})) == ones
    assert play(Fussy(), Filmed(3), tasks[5:9], act_batch=4) == ones[5:9]  # nor on which tasks are played
    assert play(Fussy(), Filmed(3), tasks, act_batch=5) != ones


def test_between_iterations_nothing_is_filmed(tmp_path: Path) -> None:
    class Unseen(Filmed):
        def render_video(self, index_M: torch.Tensor) -> torch.Tensor:
            raise AssertionError("a film costs time")

    tasks = [*range(100, 110)]
    assert play(Fussy(), Unseen(3), tasks, act_batch=4, reel=reel_within(tmp_path, "improve", 7)) == play(
        Fussy(), Filmed(3), tasks, act_batch=4
    )
    assert not list(tmp_path.iterdir())


def test_pictures_are_kept_between_iterations_and_do_not_hang_on_num_envs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(component, "resolve", picture_run.resolve)
    painter: Any = picture_run.Painter(picture_run.Painter.Config(), device=CPU)
    block = {"target": "mmrl.picturing:PictureEnvironment", "prompts": {"target": "fake:Fields"}}
    block["rewards"] = [{"target": "fake:Red"}]  # type: ignore[assignment]
    tasks, kept = [*range(100, 107)], {}
    for num_envs in (1, 3):
        world = Component.parse(block).build(num_envs=num_envs, device=CPU)
        folder = tmp_path / str(num_envs)
        played = play(painter, world, tasks, act_batch=2, reel=reel_within(folder, "improve", 7))
        kept[num_envs] = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
        assert sorted(kept[num_envs]) == [f"improve-during-000007-{task}.json" for task in (100, 103, 106)]
        for episode in played[::3]:
            told = kept[num_envs][f"improve-during-000007-{episode.task_id}.json"]
            assert (told["label"], told["stage"], told["iteration"]) == ("during", "improve", 7)
            assert told["scores"]["red"] == pytest.approx(episode.metrics["score_red"], abs=1e-4)
    assert kept[1] == kept[3]


def _pi0(tmp_path: Path) -> tuple[Any, Callable[[int], Any]]:
    policy = Component.parse(
        {
            "target": "policies.pi0:Pi0",
            "checkpoint": str(tiny_run.write_architecture(tmp_path / "architecture")),
            "weights": "random",
            "sampler": "ode",
            "denoising_steps": 2,
            "execute": 3,
            "action_dim": 4,
            "max_text_tokens": 16,
            "attention": "eager",
            "critic": None,
        }
    )
    tabletop = Component.parse(
        {
            "target": "simulators.tabletop:Tabletop",
            "reward": "dense",
            "domain": "real",
            "image_size": 32,
            "max_steps": {"reach": 6, "push": 7, "pick_place": 8, "sort": 9},
            "tolerance": 0.3,
        }
    )
    return policy.build(device=CPU), lambda num_envs: tabletop.build(num_envs=num_envs, device=CPU)


def _mlp(environment: str, **fields: Any) -> tuple[Any, Callable[[int], Any]]:
    policy = Component.parse({"target": "policies.mlp:MLP", "hidden": [33, 17], "seed": 3, **fields})
    world = Component.parse({"target": "simulators.gymnasium:Gymnasium", "id": environment, "max_steps": 60})
    return policy.build(device=CPU), lambda num_envs: world.build(num_envs=num_envs, device=CPU)


@pytest.mark.parametrize("case", ["pi0 on the tabletop", "mlp on CartPole", "mlp on Pendulum"])
def test_real_policies_play_the_same_episodes_bit_for_bit(case: str, tmp_path: Path, installed: Callable[[str], None]) -> None:
    if case == "pi0 on the tabletop":
        policy, build = _pi0(tmp_path)
    else:
        installed("gymnasium")
        fields: dict[str, Any] = {"CartPole": {"state_dim": 4, "choices": [2]}, "Pendulum": {"state_dim": 3, "action_dim": 1}}
        name = case.rpartition(" ")[2]
        policy, build = _mlp(f"{name}-v1", **fields[name])
        with torch.no_grad():  # as far from zero as a trained one's
            for parameter in policy.actions.parameters():
                parameter.mul_(100)
    tasks = list(range(1_000_000, 1_000_034))
    threes = play(policy, build(3), tasks)
    assert len({(episode.return_, episode.steps) for episode in threes}) > 5
    assert play(policy, build(16), tasks) == threes
    assert play(policy, build(64), tasks, reel=Reel(tmp_path / "films", "film", {})) == threes
