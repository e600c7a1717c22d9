"""``mmrl collect`` and ``mmrl statistics``: what is played is what is saved, and a policy learns from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from mmrl import collecting
from mmrl.cli import app
from mmrl.collecting import CollectionConfig, play
from mmrl.config import load_as
from mmrl.data.lerobot_format import read
from mmrl.errors import ConfigError, MMRLError
from mmrl.progress import Quiet
from mmrl.types import Observation
from policies.pi0_parts.weights import load_statistics
from simulators.tabletop import Tabletop
from tests.core import lerobot_sets as sets
from tests.core import tiny_run
from tests.core.test_demonstrations import NumberedEnvironment, length_of

YAML = """
name: expert
output: {output}
threads: 1
episodes: 6
num_envs: 4
environment: {{target: simulators.tabletop:Tabletop, families: [reach], image_size: 32, max_steps: {{reach: 8}}, speed: 0.15}}
data: {{target: mmrl.data.lerobot_write:LeRobotWriter, fps: 5, storage: image}}
"""


def mmrl(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "collect.yaml"
    file.write_text(YAML.format(output=tmp_path))
    return file


@pytest.mark.parametrize("chunk", [1, 3])
def test_every_moment_is_recorded_and_nothing_after_the_end(chunk: int) -> None:
    environment: Any = NumberedEnvironment(5)

    def act(observation: Observation, task_ids_B: Tensor, decision: int) -> Tensor:
        """The expert's actions of this and the next steps, which in these tasks are known."""
        first_B = environment.expert_action()
        ahead = [
            first_B + torch.tensor([[h if environment.clock[b] + h <= length_of(task) else 0] for b, task in tasks])
            for h in range(chunk)
        ]
        return torch.stack(ahead, 1)

    tasks = list(enumerate((3, 4, 0, 2, 1)))
    if chunk > 1:
        environment.step = _obedient(environment)
    episodes = play(environment, act, torch.tensor([task for _, task in tasks]))
    for (_, task), episode in zip(tasks, episodes, strict=True):
        length = length_of(task)
        assert (episode.task_id, len(episode)) == (task, length)
        assert episode.actions_TA[:, 0].tolist() == [100 * task + t for t in range(length)]
        assert episode.observation.state is not None
        assert episode.observation.state.tolist() == [[task, t] for t in range(length)]
        assert episode.observation.instructions == tuple(f"{task}/{t}" for t in range(length))
        assert episode.success == episode.terminated == (task % 5 != 4)


def _obedient(environment: Any) -> Any:
    """``step`` without the check that every slot, also an idle one, gets its expert's action."""
    real, expert = type(environment).step, environment.expert_action

    def step(actions_BCA: Tensor) -> Any:
        valid_B = torch.tensor([c < length_of(t) for c, t in zip(environment.clock, environment.tasks, strict=True)])
        assert torch.equal(actions_BCA[valid_B, 0], expert()[valid_B])
        return real(environment, expert()[:, None])

    return step


class Breaking(NumberedEnvironment):
    """Loses the first slot with its first action and the third with its last."""

    def step(self, actions_BCA: Tensor) -> Any:
        done_B, step = (
            torch.tensor(self.clock) >= torch.tensor([length_of(task) for task in self.tasks]),
            super().step(actions_BCA),
        )
        last_B = torch.tensor(self.clock) == torch.tensor([length_of(task) for task in self.tasks])
        lost_B = torch.tensor([True, False, True, False]) & ~done_B & (last_B | torch.tensor([True, False, False, False]))
        self.lost_B = getattr(self, "lost_B", torch.zeros(4, dtype=torch.bool)) | lost_B
        alive_B = ~self.lost_B
        ends = {"terminated_B": step.terminated_B & alive_B, "truncated_B": step.truncated_B & alive_B}
        return replace(step, valid_BC=step.valid_BC & alive_B[:, None], lost_B=self.lost_B, **ends)


def test_an_episode_that_the_simulator_lost_is_not_saved() -> None:
    environment: Any = Breaking(4)
    tasks = torch.tensor([3, 1, 2, 0])
    episodes = play(environment, lambda *_: environment.expert_action()[:, None], tasks)
    assert [(episode.task_id, len(episode)) for episode in episodes] == [(1, length_of(1)), (0, length_of(0))]
    environment.lost_B[:] = True
    assert play(environment, lambda *_: environment.expert_action()[:, None], tasks) == []


def test_tasks_are_counted_on_the_device_of_the_run(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy there draws its random numbers from them."""
    seen: list[Tensor] = []
    monkeypatch.setattr(collecting, "play", lambda environment, act, task_ids_B: seen.append(task_ids_B) or [None])
    loaded, environment = load_as(CollectionConfig, config, ["only_successes=false", "episodes=1"]), NumberedEnvironment(3)
    with pytest.raises(AttributeError):  # the episode, which is none
        next(collecting._wanted(loaded, environment, lambda *_: torch.zeros(1), torch.device("meta")))
    assert [(tasks_B.device.type, tuple(tasks_B.shape)) for tasks_B in seen] == [("meta", (3,))]


def test_the_expert_s_episodes_are_saved_as_they_were_played(config: Path, tmp_path: Path) -> None:
    result = mmrl("collect", str(config))
    assert result.exit_code == 0 and result.stdout.splitlines()[-1] == str(tmp_path / "expert")
    environment = Tabletop(load_as(CollectionConfig, config).environment.config, num_envs=12)
    played = [
        e for e in play(environment, lambda *_: environment.expert_action()[:, None], torch.arange(500_000, 500_012)) if e.success
    ]
    source = sets.source(tmp_path / "expert", horizon=1)
    examples = source.examples(torch.arange(len(source)))
    wanted = Observation.concat([episode.observation for episode in played[:6]])
    assert torch.equal(examples.actions_BHA[:, 0], torch.cat([episode.actions_TA for episode in played[:6]]))
    assert torch.equal(examples.observation.images["front"], wanted.images["front"])
    assert torch.equal(examples.observation.state, wanted.state)  # type: ignore[arg-type]
    assert examples.observation.instructions == wanted.instructions
    assert [entry.success for entry in read(tmp_path / "expert").episodes] == [True] * 6
    again = mmrl("collect", str(config))
    assert again.exit_code == 2 and "is not written over" in again.stderr and len(again.stderr.splitlines()) == 1


def test_videos_are_close(config: Path, tmp_path: Path) -> None:
    mmrl("collect", str(config))
    assert mmrl("collect", str(config), "name=film", "data.storage=video", "data.crf=12").exit_code == 0
    exact, film = sets.source(tmp_path / "expert"), sets.source(tmp_path / "film")
    index = torch.arange(len(exact))
    one, other = exact.examples(index), film.examples(index)
    assert torch.equal(one.actions_BHA, other.actions_BHA)
    difference = (one.observation.images["front"].float() - other.observation.images["front"].float()).abs()
    assert 0 < float(difference.mean()) < 3


def test_a_policy_s_episodes_are_saved_with_their_failures(config: Path, tmp_path: Path) -> None:
    architecture = tiny_run.write_architecture(tmp_path / "architecture")
    fields = f"target: 'policies.pi0:Pi0', checkpoint: '{architecture}', weights: random, sampler: ode, critic: null"
    policy = f"policy={{{fields}, denoising_steps: 2, execute: 3, action_dim: 4, max_text_tokens: 16}}"
    assert mmrl("collect", str(config), policy, "only_successes=false").exit_code == 0
    data = read(tmp_path / "expert")
    assert [entry.length for entry in data.episodes if not entry.success] == [8] * sum(not e.success for e in data.episodes)
    assert len(data.episodes) == 6 and not all(entry.success for entry in data.episodes)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["explore=true"], "'explore' is true, but there is no 'policy'"),
        (["data={target: 'mmrl.data.lerobot:LeRobot', path: x}"], "keeps no episodes; use mmrl.data.lerobot_write:LeRobotWriter"),
        (["episode=3"], "unknown key 'episode'; did you mean 'episodes'?"),
        (["data.codec=theora"], "'data.codec' must be 'h264' or 'av1'"),
    ],
)
def test_mistakes_are_a_sentence_and_leave_nothing(config: Path, tmp_path: Path, overrides: list[str], sentence: str) -> None:
    result = mmrl("collect", str(config), *overrides)
    assert result.exit_code == 2 and sentence in result.stderr and len(result.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["collect.yaml"]


def test_an_interrupt_leaves_nothing(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return play(*arguments)

    monkeypatch.setattr(collecting, "play", interrupted)
    result = mmrl("collect", str(config), "num_envs=2")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (130, "Interrupted; nothing was saved.")
    assert [path.name for path in tmp_path.iterdir()] == ["collect.yaml"]


def test_an_expert_that_never_succeeds_is_given_up(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "HOPELESS", 8)
    hopeless = load_as(CollectionConfig, config, ["environment.max_steps.reach=1", "environment.render=false"])
    with pytest.raises(MMRLError, match="none of the last 8 episodes succeeded"):
        collecting.collect(hopeless, Quiet())


def test_an_environment_without_an_expert_needs_a_policy(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"'policy' is missing, and simulators\.tabletop:Tabletop has no scripted expert"):
        collecting._actor(load_as(CollectionConfig, config), object(), torch.device("cpu"))  # type: ignore[arg-type]


@pytest.fixture
def run_config(config: Path, tmp_path: Path) -> tuple[Path, str]:
    """A run's config, and the override by which it imitates the collected episodes."""
    assert mmrl("collect", str(config)).exit_code == 0
    data = f"stages.warm_start.data={{target: 'mmrl.data.lerobot:LeRobot', path: '{tmp_path / 'expert'}'}}"
    return tiny_run.write_config(tmp_path), data


def test_pi0_learns_from_collected_episodes(run_config: tuple[Path, str]) -> None:
    config, data = run_config
    run = tiny_run.run(config, "imitation", data, "stages.improve.iterations=1")
    rows = [row for row in tiny_run.rows(run) if "loss/flow_matching" in row]
    assert len(rows) == 2 and all(0 < row["loss/flow_matching"] < 20 for row in rows)
    assert load_statistics(str(run / "policy")) is not None  # taken from the data, for this policy had none


def test_statistics_of_a_folder_and_of_a_run(run_config: tuple[Path, str], tmp_path: Path) -> None:
    config, data = run_config
    folder = mmrl("statistics", str(tmp_path / "expert"))
    assert folder.exit_code == 0
    of_run = mmrl("statistics", str(config), data, "--output", str(tmp_path / "architecture"))
    file = tmp_path / "architecture/statistics.json"
    assert of_run.exit_code == 0 and of_run.stdout.splitlines()[-1] == str(file)
    found = json.loads(file.read_text())
    assert json.loads(folder.stdout) == found
    source = sets.source(tmp_path / "expert", horizon=1)
    examples = source.examples(torch.arange(len(source)))
    actions = examples.actions_BHA[:, 0].double()
    assert found["actions_mean"] == pytest.approx(actions.mean(0).tolist())
    spread = [value if value > 1e-6 else 1.0 for value in actions.std(0).tolist()]
    assert found["actions_std"] == pytest.approx(spread)
    assert found["actions_q99"] == pytest.approx(actions.quantile(0.99, dim=0).tolist())
    statistics = load_statistics(str(tmp_path / "architecture"))  # as the policy reads them
    assert statistics is not None and list(statistics.actions_mean) == found["actions_mean"]
    again = mmrl("statistics", str(config), data, "--output", str(tmp_path / "architecture"))
    assert again.exit_code == 2 and "is there already; remove it to compute it again" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "whose frames are made as they are needed; statistics are for stored data"),
        (["--stage", "improve"], "improve has no data; choose one of warm_start with --stage"),
        ([tiny_run.SUPERVISED], "several stages have data; choose one of warm_start, improve with --stage"),
    ],
)
def test_statistics_of_what_is_not_stored(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    result = mmrl("statistics", str(tiny_run.write_config(tmp_path)), *arguments)
    assert result.exit_code == 2 and sentence in result.stderr


def test_statistics_are_not_those_of_data_that_an_adapter_changes(run_config: tuple[Path, str]) -> None:
    """An adapter of the same sizes would have the policy normalise by another's numbers, without a word."""
    config, data = run_config
    libero = "policy.adapter={{target: 'policies.pi0_adapters.libero:Libero', relative: {}}}"
    refused = mmrl("statistics", str(config), data, libero.format("true"))
    assert refused.exit_code == 2 and "'policy.adapter' makes other numbers of the data's" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert mmrl("statistics", str(config), data, libero.format("false")).exit_code == 0
    maniskill = "policy.adapter={{target: 'policies.pi0_adapters.maniskill:ManiSkill', state: {}}}"
    assert mmrl("statistics", str(config), data, maniskill.format("hand")).exit_code == 2
    assert mmrl("statistics", str(config), data, maniskill.format("all")).exit_code == 0


def test_statistics_of_what_is_no_data_set(tmp_path: Path) -> None:
    assert "is no LeRobot data set" in mmrl("statistics", str(tmp_path)).stderr
    assert "takes no overrides (seed=1)" in mmrl("statistics", str(tmp_path), "seed=1").stderr
