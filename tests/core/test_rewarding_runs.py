"""Runs with rewards: what a YAML may say, what is refused, that the policy learns what they pay, resumes, and the alarm.

The policy says "yes", "no" or "look" with probabilities of its own; "look" is a call, of which an episode has two at most. The
environment pays for "no" and for nothing else.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from mmrl import component, config, metrics
from mmrl.columns import Column
from mmrl.describe import describe
from mmrl.errors import ConfigError, TrainingError
from mmrl.messages import Message, ToolResult
from mmrl.numerics.draws import Draws
from mmrl.progress import Quiet
from mmrl.trainer import resume, train
from mmrl.transcripts import CallRecord, Question, Transcript, Turn
from mmrl.types import Decision, Evaluation, Observation, Packing, Rollout, Step

STRICT = ConfigDict(extra="forbid")
WORDS = ("yes", "no", "look")


class Chooser(nn.Module):
    @dataclass(frozen=True, config=STRICT)
    class Config:
        start: tuple[float, ...] = (0.0, 0.0, 0.0)

    def __init__(self, config: Config, *, device: torch.device) -> None:
        super().__init__()
        self.version = 0
        self.logits = nn.Parameter(torch.tensor(config.start, device=device))

    @torch.no_grad()
    def act(self, observation: Observation, draws: Draws, *, explore: bool) -> Decision:
        b = observation.batch_size
        logits_BV = self.logits.expand(b, -1)
        choice_B = draws.categorical(logits_BV).flatten() if explore else logits_BV.argmax(1)
        trace = {"choice": choice_B}
        log_probs_BK = logits_BV.log_softmax(1).gather(1, choice_B[:, None])
        said = Column.of(Message("assistant", (WORDS[choice],)) for choice in choice_B.tolist())
        return Decision(said, trace, log_probs_BK, torch.ones(b, 1, dtype=torch.bool), None, self.version)

    def pack(self, rollout: Rollout) -> Packing:
        return rollout.by_episode()

    def evaluate(self, trace: Mapping[str, Any]) -> Evaluation:
        log_probs_NK = self.logits.log_softmax(0)[trace["choice"]]
        return Evaluation(log_probs_NK, torch.zeros_like(log_probs_NK), None)

    def trainable(self) -> Mapping[str, list[nn.Parameter]]:
        return {"actor": list(self.parameters())}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "logits.txt").write_text(repr(self.logits.tolist()))

    def fingerprint(self) -> str:
        return "chooser"

    def compute_mode(self, *, train: bool) -> nullcontext[None]:
        return nullcontext()


class Critic(Chooser):
    """The same with a critic, which knows one number."""

    has_critic = True

    def __init__(self, config: Chooser.Config, *, device: torch.device) -> None:
        super().__init__(config, device=device)
        self.worth = nn.Parameter(torch.zeros((), device=device))

    def act(self, observation: Observation, draws: Draws, *, explore: bool) -> Decision:
        return replace(super().act(observation, draws, explore=explore), values_BV=self.value(observation, draws)[:, None])

    def value(self, observation: Observation, draws: Draws) -> Tensor:
        return self.worth.detach().expand(observation.batch_size)

    def evaluate(self, trace: Mapping[str, Any]) -> Evaluation:
        scored = super().evaluate(trace)
        return replace(scored, values_NV=self.worth.expand_as(trace["choice"]))


class Asking:
    action_spec = None
    max_steps = 3

    @dataclass(frozen=True, config=STRICT)
    class Config: ...

    def __init__(self, config: Config, *, num_envs: int, device: torch.device) -> None:
        self.num_envs = num_envs
        self.tasks, self.said = [0] * num_envs, [list[str]() for _ in range(num_envs)]

    def reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Observation:
        for slot in range(self.num_envs):
            if where_B is None or where_B[slot]:
                self.tasks[slot], self.said[slot] = int(task_ids_B[slot]), []
        return self._observe()

    def step(self, actions: Any) -> Step:
        running_B = ~self._over()
        for slot, message in enumerate(actions.tolist()):
            if running_B[slot]:
                self.said[slot].append(message.text)
        ended_B = self._over()
        won_B = torch.tensor([said[-1:] == ["no"] for said in self.said]) & ended_B
        rewards_B1 = (won_B & running_B).float()[:, None]
        never_B = torch.zeros_like(ended_B)
        return Step(self._observe(), rewards_B1, running_B[:, None], ended_B, never_B, {"success": won_B.float()})

    def transcript(self, slot: int) -> Transcript:
        look = (CallRecord("look", {}, ToolResult("seen")),)
        said = self.said[slot]
        turns = tuple(Turn(Message("assistant", (text,)), look if text == "look" else ()) for text in said)
        answer = said[-1] if said and said[-1] != "look" else None
        question = Question("ask", ("?",), ("yes",), lambda text: float(text == "yes"))
        return Transcript(self.tasks[slot], question, (Message("user", ("?",)),), turns, answer, "answer" if answer else "turns")

    def _over(self) -> Tensor:
        return torch.tensor([len(said) == 3 or said[-1:] in (["yes"], ["no"]) for said in self.said])

    def _observe(self) -> Observation:
        talk = ((Message("user", ("?",)),),) * self.num_envs
        return Observation({}, None, ("",) * self.num_envs, conversations=talk)

    def family_of(self, task_ids_M: Tensor) -> tuple[str, ...]:
        return ("ask",) * len(task_ids_M)

    def close(self) -> None: ...


class Mute:
    """An environment without conversations."""

    reset = step = None
    Config = Asking.Config


class Flaky:
    """Pays 1; fails for tasks whose id ends in 3, or for all."""

    failure = "the judge is out"

    @dataclass(frozen=True, config=STRICT)
    class Config:
        always: bool = False
        """Whether it fails for all."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        return [float("nan") if self.config.always or each.task_id % 10 == 3 else 1.0 for each in transcripts]


FAKES = {"fake:Chooser": Chooser, "fake:Critic": Critic, "fake:Asking": Asking, "fake:Mute": Mute, "fake:Flaky": Flaky}
REAL = component.resolve
RUN = """
name: asking
threads: 1
tensorboard: false
policy: {target: "fake:Chooser"}
environment: {target: "fake:Asking"}
evaluation: {episodes: 4, num_envs: 4, videos: 0}
checkpoint: {every: 5, keep: 9}
stages:
  - name: improve
    algorithm: {target: "mmrl.algorithms.grpo:GRPO", group_size: 8}
    iterations: 30
    collect: {num_envs: 32}
    optimizer: {lr: 0.1}
    rewards:
      - {target: "mmrl.rewards.answers:Correct"}
      - {name: spare, target: "mmrl.rewards.tool_rewards:CallCost", free: 0, weight: 0.1}
      - {target: "fake:Flaky", weight: 0.5}
"""


@pytest.fixture(autouse=True)
def _fake_components(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(component, "resolve", lambda target: FAKES.get(target) or REAL(target))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "asking.yaml"
    file.write_text(RUN)
    return file


def rows(run_dir: Path) -> list[dict[str, Any]]:
    timed = ("seconds", "speed")
    found = [row for row in metrics.read(run_dir) if row["kind"] == "train"]
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in found]


def test_a_block_has_a_name_a_weight_and_its_class_s_fields(path: Path) -> None:
    loaded = config.load(path, ["stages.improve.rewards.spare.weight=0.25", "stages.improve.rewards.0.partial=false"])
    first, spare, flaky = loaded.stages[0].rewards
    assert (first.name, first.weight, first.config.partial) == ("correct", 1.0, False)
    assert (spare.name, spare.weight, spare.config.free) == ("spare", 0.25, 0)
    assert (flaky.name, flaky.config.always) == ("flaky", False)
    again = path.with_name("again.yaml")
    again.write_text(config.dump(loaded))
    assert config.load(again) == loaded
    assert "free: 0" in describe(loaded) and "# Calls that cost nothing." in describe(loaded)
    # Spelled out, every reward has its name: overrides find it there.
    assert config.load(again, ["stages.improve.rewards.correct.weight=3"]).stages[0].rewards[0].weight == 3


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["rewards.spare.fre=1"], "unknown key 'stages.improve.rewards.spare.fre'; did you mean 'free'?"),
        (["rewards.spare.weight=x"], "'stages.improve.rewards.spare.weight' must be a number, got 'x'"),
        (["rewards.spare.weight=.inf"], "'stages.improve.rewards.spare.weight' must be a finite number, got inf"),
        (["rewards.spare.free=-1"], "'stages.improve.rewards.spare.free' must be greater than or equal to 0, got -1"),
        (["rewards.sparse.weight=1"], "unknown key 'stages.improve.rewards.sparse'; did you mean 'spare'?"),
        (["rewards.0.name='a b'"], "'stages.improve.rewards.a b.name' must match pattern"),
        (["rewards=[{weight: 1.0}]"], "'stages.improve.rewards.0.target' is missing"),
        (["rewards=[3]"], "'stages.improve.rewards.0' must be a mapping with a 'target', got 3"),
        (["rewards=3"], "'stages.improve.rewards' must be a list, got 3"),
        (["rewards.0={target: 'mmrl.rewards.answers:Corect'}"], "did you mean 'Correct'?"),
        (["rewards.0={target: 'fake:Mute'}"], "rewards.0.target': fake:Mute is no reward; it has neither __call__ nor per_turn"),
        (["rewards.0.name=spare"], "'stages.improve.rewards' has 2 rewards called 'spare'; give each a 'name' of its own"),
        (["scoring={combine: mean}"], "'stages.improve.scoring.combine' must be 'sum' or 'normalised', got 'mean'"),
        (["rewards=[]", "scoring={combine: sum}"], "unused key 'stages.improve.scoring'"),
        (["collect.auto_reset=true"], "'stages.improve.collect.auto_reset' is true, but 'stages.improve.rewards' judge whole"),
        (["collect.parts=2"], "'stages.improve.collect.parts' needs processes that hand over no conversation"),
    ],
)
def test_what_is_wrong_is_named(path: Path, overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.load(path, [f"stages.improve.{override}" for override in overrides])
    assert sentence in str(error.value)


def test_rewards_need_conversations_and_rollouts(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rewards' judge conversations, and 'environment.target' \(fake:Mute\) has none"):
        config.load(path, ["environment.target=fake:Mute"])
    sft = "stages.improve.algorithm={target: 'mmrl.algorithms.sft:SFT'}"
    with pytest.raises(ConfigError, match=r"unused key 'stages\.improve\.rewards'"):
        config.load(path, [sft])


def test_the_policy_learns_what_rewards_pay(path: Path, tmp_path: Path) -> None:
    found = rows(train(config.load(path), tmp_path / "run", Quiet()))
    first, last = found[0], found[-1]
    assert first["reward/correct"] < 0.7 < 0.9 < last["reward/correct"]
    assert last["rollout/success"] < 0.1  # what the environment pays for
    assert first["agent/tool_rate"] > 0.2 and last["agent/tool_rate"] < first["agent/tool_rate"]
    assert first["reward/spare"] == pytest.approx(-first["agent/calls"])
    failed = [row["rollout/unscored_episodes"] for row in found]
    assert set(failed) <= {0, 8, 16} and any(failed)
    for row in found:
        assert row["reward/flaky"] == 1 and row["reward/flaky/failed"] == row["rollout/unscored_episodes"] / 32
        assert row["advantages/groups_incomplete"] == row["rollout/unscored_episodes"] / 32
        if not row["rollout/unscored_episodes"]:
            total = row["reward/correct"] + 0.1 * row["reward/spare"] + 0.5
            assert row["rollout/return"] == pytest.approx(total, abs=1e-5)
    evaluated = [row for row in metrics.read(tmp_path / "run") if row["kind"] == "evaluation"]
    assert evaluated[-1]["tool_rate"] == 0 and evaluated[-1]["answered"] == 1


def test_groups_that_are_played_anew_are_judged_as_well(path: Path, tmp_path: Path) -> None:
    overrides = ["stages.improve.algorithm.max_refills=3", "stages.improve.rewards.spare.weight=0", "stages.improve.iterations=8"]
    found = rows(train(config.load(path, [*overrides, "policy.start=[2.0, 0.0, -9.0]"]), tmp_path / "run", Quiet()))
    assert any(row["rollout/refills"] for row in found)
    for row in found:  # all that was played is counted, in all its rounds
        played = row["rollout/episodes"] + row["rollout/unscored_episodes"]
        assert played == 32 * (1 + row["rollout/refills"]) and row["rollout/lost_episodes"] == 0
        assert row["rollout/return"] == pytest.approx(1 - row["rollout/success"] + 0.5, abs=1e-5)  # yes or no, and never a look


def test_the_environment_s_own_reward_can_count_too(path: Path, tmp_path: Path) -> None:
    found = rows(train(config.load(path, ["stages.improve.scoring={environment: 5.0}"]), tmp_path / "run", Quiet()))
    assert found[-1]["rollout/success"] > 0.9 > 0.1 > found[-1]["reward/correct"]


@pytest.mark.parametrize("overrides", [[], ["stages.improve.scoring={combine: normalised}"]])
def test_a_resumed_run_is_the_unbroken_one(path: Path, tmp_path: Path, overrides: list[str]) -> None:
    loaded = config.load(path, ["stages.improve.iterations=12", *overrides])
    whole = train(loaded, tmp_path / "whole", Quiet())
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    for saved in sorted((broken / "checkpoints").iterdir())[2:]:
        shutil.rmtree(saved)
    resume(broken, Quiet())
    assert rows(broken) == rows(whole) and len(rows(whole)) == 12
    assert (broken / "policy/logits.txt").read_text() == (whole / "policy/logits.txt").read_text()


def test_a_reward_that_always_fails_stops_the_run(path: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as error:
        train(config.load(path, ["stages.improve.rewards.2.always=true"]), tmp_path / "run", Quiet())
    assert str(error.value) == (
        "stage 'improve', iteration 1: 'stages.improve.rewards.flaky' could score none of 32 episodes: the judge is out"
    )


def test_an_algorithm_that_cuts_episodes_plays_them_whole_for_rewards(path: Path, tmp_path: Path) -> None:
    ppo = "stages.improve.algorithm={target: 'mmrl.algorithms.ppo:PPO'}"
    overrides = [ppo, "stages.improve.iterations=2", "policy.target=fake:Critic"]
    found = rows(train(config.load(path, overrides), tmp_path / "run", Quiet()))
    assert [row["rollout/episodes"] + row["rollout/unscored_episodes"] for row in found] == [32, 32]


class Noting(Quiet):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        if "tools" in text:
            self.notes.append(text)


def test_the_alarm_is_raised_once_also_in_a_resumed_run(path: Path, tmp_path: Path) -> None:
    overrides = ["policy.start=[0.0, 0.0, 2.0]", "stages.improve.rewards.spare.weight=2.0", "stages.improve.optimizer.lr=0.3"]
    unbroken = Noting()
    run = train(config.load(path, overrides), tmp_path / "run", unbroken)
    assert len(unbroken.notes) == 1 and "the policy stops using its tools" in unbroken.notes[0]
    for kept, notes in ((5, []), (2, unbroken.notes)):  # from iteration 20, after the alarm, and from 5, before it
        broken = tmp_path / f"from_{kept}"
        shutil.copytree(run, broken)
        for saved in sorted((broken / "checkpoints").iterdir())[kept:]:
            shutil.rmtree(saved)
        again = Noting()
        resume(broken, again)
        assert again.notes == notes
