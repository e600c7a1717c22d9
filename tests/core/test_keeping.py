"""Conversations that are kept: what the files say of evaluations and of rollouts, against what was said and what it was worth."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from mmrl import component, metrics
from mmrl.errors import TrainingError
from mmrl.keeping import MAX_SIDE, Keeper, chosen, write_conversation
from mmrl.measuring import load_measurement, measure
from mmrl.messages import Message, Picture, ToolResult
from mmrl.playing import Player, Reel, reel_within
from mmrl.progress import Quiet
from mmrl.protocols import Advantages, LegiblePolicy
from mmrl.rollout import Collector
from mmrl.transcripts import CallRecord, Turn
from mmrl.types import EpisodeRecord, Rollout
from tests.core import talking_run
from tests.core.talking_run import Chooser, Mumbler, Sums
from tests.rewards.tales import question, tale

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fake_components(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(component, "resolve", talking_run.resolve)


def read(folder: Path, pattern: str = "*.json") -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(pattern))]


def play(folder: Path, environment: Any, tasks: list[int], kept: list[int], start: tuple[float, ...] = (1.0, 0.0, 0.0)) -> None:
    policy: Any = Chooser(Chooser.Config(start), device=CPU)
    player = Player(policy, environment, seed=0, act_batch=4, device=CPU)
    player.play(tasks, lambda n: None, Reel(folder, "film", {"label": "before", "stage": "s"}), kept)


# ---------------------------------------------------------------- evaluations


def test_pictures_have_the_numbers_that_calls_name_them_by(tmp_path: Path) -> None:
    """In each example before the question, and in the question, from 1; a source is a place among all that are kept."""
    play(tmp_path, Sums(Sums.Config(picture=True, examples=2), num_envs=1, device=CPU), [4], [4])
    (record,) = read(tmp_path)
    assert [picture["number"] for picture in record["pictures"]] == [1, 2] * 3
    assert [picture["source"] for picture in record["pictures"]] == [None, 0, None, 2, None, 4]


def test_an_episode_that_is_a_conversation_is_written_down(tmp_path: Path) -> None:
    play(tmp_path, Sums(Sums.Config(picture=True), num_envs=2, device=CPU), [3, 4, 5, 6], [4, 5])
    assert [path.name for path in sorted(tmp_path.glob("*.json"))] == ["film-4.json", "film-5.json"]
    record, _ = read(tmp_path)
    about = {name: record[name] for name in ("label", "stage", "task_id", "family", "outcome", "success", "return", "answer")}
    assert about == {
        "label": "before",
        "stage": "s",
        "task_id": 4,
        "family": "colour",
        "outcome": "failure",
        "success": False,
        "return": 0.0,
        "answer": "It is <b>red</b>",
    }
    assert (record["references"], record["mark"], record["ended"]) == (["green"], 0.0, "answer")
    first, second = record["pictures"]
    assert (first["width"], first["height"], first["source"], first["box"]) == (40, 32, None, None)
    assert (second["width"], second["height"], second["source"], second["box"]) == (20, 32, 0, [0, 0, 20, 32])
    assert (first["number"], second["number"]) == (1, 2)
    system, asked, looked, seen, answered = record["messages"]
    assert system["role"] == "system" and system["parts"][0].startswith("# Tools")
    assert asked == {"role": "user", "parts": [0, "Which colour?"]}
    assert (looked["role"], looked["parts"]) == ("assistant", [talking_run.call("left_half", image=1)])
    (call,) = looked["calls"]
    assert call | {"seconds": 0} == {
        "name": "left_half",
        "arguments": {"image": 1},
        "error": None,
        "seconds": 0,
        "rewards": {},
        "metrics": {},
        "reply": 3,
    }
    assert seen == {"role": "tool", "parts": ["Image 2 is 20 x 32 pixels.", 1]}
    assert (answered["parts"], answered["finish"], answered["calls"]) == (["It is <b>red</b>"], "stop", [])
    assert "tokens" not in answered and "advantage" not in answered


def test_calls_that_fail_say_how(tmp_path: Path) -> None:
    play(tmp_path, Sums(Sums.Config(), num_envs=1, device=CPU), [3], [3], start=(0.0, 0.0, 1.0))
    (record,) = read(tmp_path)
    assert record["ended"] == "turns" and record["outcome"] == "timeout" and record["answer"] is None
    calls = [call for message in record["messages"] for call in message.get("calls", ())]
    assert [(call["name"], call["error"]) for call in calls] == [("fail", "tool_error")] * 4
    assert [record["messages"][call["reply"]]["parts"] for call in calls] == [["It cannot be done."]] * 4


def test_a_picture_is_stored_once_and_shows_what_was_seen(tmp_path: Path) -> None:
    play(tmp_path, Sums(Sums.Config(picture=True), num_envs=2, device=CPU), [3, 4, 6, 7], [3, 4, 6, 7])
    files = {picture["file"] for record in read(tmp_path) for picture in record["pictures"]}
    assert len(files) == 4  # two colours, whole and in half, in four conversations
    assert sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "pictures").iterdir()) == sorted(files)
    with Image.open(tmp_path / read(tmp_path)[0]["pictures"][0]["file"]) as image:
        assert image.size == (40, 32) and image.convert("RGB").getcolors() == [(40 * 32, (30, 30, 220))]  # flat: no loss


def test_a_large_picture_is_kept_smaller_and_remembers_its_size(tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (900, 2000, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    about = question([Picture(Image.fromarray(noise.numpy()))], box=(1, 2, 3, 4))
    write_conversation(tmp_path, "big", tale(about=about), {})
    (record,) = read(tmp_path)
    (picture,) = record["pictures"]
    assert (picture["width"], picture["height"]) == (2000, 900) and record["evidence"] == [1, 2, 3, 4]
    with Image.open(tmp_path / picture["file"]) as image:
        assert image.size == (MAX_SIDE, 288)


def test_tiny_pictures_lose_nothing(tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (32, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(noise.numpy())
    write_conversation(tmp_path, "tiny", tale(about=question([Picture(image)])), {})
    with Image.open(tmp_path / read(tmp_path)[0]["pictures"][0]["file"]) as kept:
        assert kept.convert("RGB").tobytes() == image.tobytes()


def test_between_iterations_conversations_are_not_written_down(tmp_path: Path) -> None:
    policy: Any = Chooser(Chooser.Config((1.0, 0.0, 0.0)), device=CPU)
    environment: Any = Sums(Sums.Config(picture=True), num_envs=2, device=CPU)
    player = Player(policy, environment, seed=0, act_batch=4, device=CPU)
    player.play([3, 4], lambda n: None, reel_within(tmp_path, "improve", 2), [3, 4])
    assert not list(tmp_path.iterdir())


def test_a_group_that_was_answered_with_pictures_says_what_it_earned(tmp_path: Path) -> None:
    shown = Picture(Image.new("RGB", (8, 8), (1, 2, 3)))
    told = [replace(tale(task=task), turns=(Turn(Message("assistant", (shown,))),)) for task in (1, 2, 1, 1)]
    returns_M, zeros_M = torch.tensor([0.5, 9.0, 2.0, 0.5]), torch.zeros(4, dtype=torch.long)
    spans_M3 = torch.tensor([[slot, 0, 0] for slot in range(4)])
    record = EpisodeRecord(torch.tensor([1, 2, 1, 1]), returns_M, zeros_M, zeros_M, {}, spans_M3, tuple(told))
    rewards_TB, true_TB = returns_M[None], torch.ones(1, 4, dtype=torch.bool)
    rollout: Any = SimpleNamespace(episodes=record, rewards_TB=rewards_TB, valid_TB=true_TB)
    keep_TB = torch.tensor([[True, True, True, False]])
    records = keep(object(), rollout, Advantages(rewards_TB - 1, rewards_TB, keep_TB, {}), tmp_path)
    assert [each["group"] for each in records] == [{"episodes": 3, "mean": 1.0, "std": 0.86603}] * 3
    assert [each["messages"][-1]["advantage"] for each in records] == [1.0, None, -0.5]
    assert [each["return"] for each in records] == [2.0, 0.5, 0.5]


def test_calls_without_a_message_each_say_themselves_what_they_gave(tmp_path: Path) -> None:
    calls = (
        CallRecord("look", {}, ToolResult("seen"), seconds=0.5, rewards=(("sharp", 0.25),)),
        CallRecord("x", {}, ToolResult()),
    )
    told = tale()
    turns = (Turn(Message("assistant", ("both",)), calls, (Message("tool", ("seen",)),)), *told.turns)
    write_conversation(tmp_path, "odd", type(told)(0, told.question, told.opening, turns, "yes", "answer"), {})
    look = read(tmp_path)[0]["messages"][1]["calls"][0]
    assert (look["reply"], look["text"], look["rewards"], look["seconds"]) == (None, "seen", {"sharp": 0.25}, 0.5)


def test_a_conversation_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "pictures").write_text("in the way")
    with pytest.raises(TrainingError, match="cannot write"):
        write_conversation(tmp_path, "a", tale(), {})
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_lost_episodes_are_not_kept_and_talk_goes_before_pictures(tmp_path: Path) -> None:
    class Losing(Sums):
        def step(self, actions: Any, /) -> Any:
            step = super().step(actions)
            lost_B = torch.tensor([slot.task_id == 4 for slot in self._slots])
            return type(step)(step.observation, step.rewards_BC, step.valid_BC, step.terminated_B & ~lost_B,
                              step.truncated_B & ~lost_B, step.metrics, lost_B)  # fmt: skip

        def render_video(self, index_M: torch.Tensor) -> torch.Tensor:
            raise AssertionError("a conversation is no film")

    play(tmp_path, Losing(Sums.Config(), num_envs=2, device=CPU), [3, 4], [3, 4])
    assert [path.name for path in tmp_path.iterdir()] == ["film-3.json"]


def test_measuring_keeps_conversations_in_its_folder(tmp_path: Path) -> None:
    run = talking_run.run(tmp_path, "stages.improve.iterations=1")
    folder = tmp_path / "measured"
    measure(str(run), load_measurement(tmp_path / "talking.yaml", ()), folder, Quiet())
    records = read(folder / "trajectories")
    rows = {row["task_id"]: row for row in map(json.loads, (folder / "episodes.jsonl").read_text().splitlines())}
    assert len(records) == 3 and all(record["messages"] for record in records)
    for record in records:
        assert {name: record[name] for name in rows[record["task_id"]]} == rows[record["task_id"]]
    assert "Conversations" in (folder / "report.html").read_text()


# ---------------------------------------------------------------- rollouts


def rows(run: Path) -> list[dict[str, Any]]:
    clocks = ("seconds", "speed/", "agent/seconds/")
    return [{name: value for name, value in row.items() if not name.startswith(clocks)} for row in metrics.read(run)]


def test_a_run_keeps_the_best_and_the_worst_of_a_group(tmp_path: Path) -> None:
    run = talking_run.run(tmp_path, "stages.improve.keep_conversations=3")
    folder = run / "trajectories"
    names = [path.stem for path in sorted(folder.glob("improve-training-*.json"))]
    assert names == [f"improve-training-{iteration:06d}-{rank}" for iteration in (1, 3, 5) for rank in (1, 2, 3)]
    assert len(list(folder.glob("*-before-*.json"))) == len(list(folder.glob("*-after-*.json"))) == 3
    for iteration in (1, 3, 5):
        best, worst, second = read(folder, f"improve-training-{iteration:06d}-*.json")
        assert best["task_id"] == worst["task_id"] == second["task_id"] and best["iteration"] == iteration
        assert best["return"] >= second["return"] >= worst["return"] < best["return"]
    for record in read(folder, "improve-training-*.json"):
        scores = {reward["name"]: reward["score"] for reward in record["rewards"]}
        weights = {reward["name"]: reward["weight"] for reward in record["rewards"]}
        assert weights == {"correct": 1.0, "spare": 0.1, "(environment)": 0.0}
        calls = [call for message in record["messages"] for call in message.get("calls", ())]
        assert scores == {"correct": record["mark"], "spare": -len(calls), "(environment)": record["mark"]}
        assert record["return"] == pytest.approx(scores["correct"] + 0.1 * scores["spare"], abs=1e-5)
        said = [message for message in record["messages"] if "calls" in message]
        assert [message["reward"] for message in said] == [0.0] * (len(said) - 1) + [record["return"]]
    (tmp_path / "none").mkdir()
    none = talking_run.run(tmp_path / "none", "stages.improve.keep_conversations=0", "evaluation.videos=0")
    assert rows(none) == rows(run) and not (none / "trajectories").exists()


def rollout_of(policy: Any) -> Rollout:
    environment: Any = Sums(Sums.Config(), num_envs=6, device=CPU)
    return Collector([environment], decisions=4, seed=3, device=CPU, group_size=3, auto_reset=False).collect(policy)


def keep(policy: Any, rollout: Rollout, advantages: Advantages, folder: Path) -> list[dict[str, Any]]:
    stage: Any = SimpleNamespace(name="improve", keep_every=1, keep_conversations=9, iterations=1)
    Keeper(stage, policy, {}, folder).see(0, rollout, advantages)
    return read(folder)


def test_tokens_have_the_numbers_of_the_rollout(tmp_path: Path) -> None:
    policy: Any = Chooser(Chooser.Config((0.3, 0.2, 0.1)), device=CPU)
    assert isinstance(policy, LegiblePolicy) and not isinstance(Sums, LegiblePolicy)
    rollout = rollout_of(policy)
    t, b = rollout.rewards_TB.shape
    advantages_TB = torch.arange(t * b).reshape(t, b) / 8 - 1.0
    keep_TB = rollout.valid_TB.clone()
    keep_TB[0, :] = False
    records = keep(policy, rollout, Advantages(advantages_TB, advantages_TB, keep_TB, {}), tmp_path)
    assert rollout.episodes.spans_M3 is not None
    places = chosen(rollout.episodes, 9)
    logits = policy.logits.detach().log_softmax(0).tolist()
    for m, record in zip(places, records, strict=True):
        slot, first, last = rollout.episodes.spans_M3[m].tolist()
        transcript = rollout.episodes.transcripts[m]
        said = [message for message in record["messages"] if "calls" in message]
        assert len(said) == last - first + 1
        for t, (message, turn) in enumerate(zip(said, transcript.turns, strict=True), first):
            texts = [text for text, _, _ in message["tokens"]]
            assert "".join(texts) == turn.message.text + "<end>" and len(texts) == len(turn.message.token_ids)
            chances = [score for _, score, _ in message["tokens"]]
            assert any(chances[0] == pytest.approx(score, abs=1e-4) for score in logits) and not any(chances[1:])
            worth = None if t == 0 else float(advantages_TB[t, slot])
            assert message["advantage"] == worth
            assert [each for _, _, each in message["tokens"]] == [worth] * (len(texts) - 1) + [None]


@pytest.mark.parametrize(
    ("iterations", "every", "due"),
    [(5, 2, [0, 2, 4]), (5, None, [0, 1, 2, 3, 4]), (25, None, [*range(0, 25, 2)]), (4, 9, [0, 3]), (40, 30, [0, 30, 39])],
)
def test_when_conversations_are_kept(tmp_path: Path, iterations: int, every: int | None, due: list[int]) -> None:
    policy: Any = Mumbler(Mumbler.Config(), device=CPU)
    rollout = rollout_of(policy)
    advantages = Advantages(rollout.rewards_TB, rollout.rewards_TB, rollout.valid_TB, {})
    stage: Any = SimpleNamespace(name="s", keep_every=every, keep_conversations=1, iterations=iterations)
    keeper = Keeper(stage, policy, {}, tmp_path)
    for iteration in range(iterations):
        keeper.see(iteration, rollout, advantages)
    assert [record["iteration"] - 1 for record in read(tmp_path)] == due


def test_where_tokens_of_a_message_differ_each_has_its_own_worth(tmp_path: Path) -> None:
    policy: Any = Chooser(Chooser.Config(), device=CPU)
    rollout = rollout_of(policy)
    units_TBK = torch.arange(rollout.mask_TBK.numel()).reshape(rollout.mask_TBK.shape) / 8 + 1.0
    nothing_TB = torch.zeros_like(rollout.rewards_TB)
    records = keep(policy, rollout, Advantages(nothing_TB, nothing_TB, rollout.valid_TB, {}, units_TBK), tmp_path)
    assert rollout.episodes.spans_M3 is not None
    for m, record in zip(chosen(rollout.episodes, 9), records, strict=True):
        slot, first, _ = rollout.episodes.spans_M3[m].tolist()
        for t, message in enumerate((message for message in record["messages"] if "calls" in message), first):
            count = len(message["tokens"])
            assert [each for _, _, each in message["tokens"]] == [*units_TBK[t, slot, : count - 1].tolist(), None]


def test_a_policy_that_nobody_can_read_has_no_tokens(tmp_path: Path) -> None:
    policy: Any = Mumbler(Mumbler.Config(), device=CPU)
    rollout = rollout_of(policy)
    nothing_TB = torch.zeros_like(rollout.rewards_TB)
    nothing_TB[:, 0] = math.nan
    for record in keep(policy, rollout, Advantages(nothing_TB, nothing_TB, rollout.valid_TB, {}), tmp_path):
        assert record["rewards"] == [{"name": "(environment)", "score": record["return"], "weight": 0.0}]
        said = [message for message in record["messages"] if "calls" in message]
        assert all("tokens" not in message and message["advantage"] in (0.0, None) for message in said)


def episodes(returns: list[float], tasks: list[int]) -> EpisodeRecord:
    count = torch.zeros(len(tasks), dtype=torch.long)
    transcripts = tuple(tale(task=task) for task in tasks)
    return EpisodeRecord(torch.tensor(tasks), torch.tensor(returns), count, count, transcripts=transcripts)


@pytest.mark.parametrize(
    ("returns", "tasks", "most", "places"),
    [
        ([0.0, 1.0, 5.0, 5.0], [1, 1, 2, 2], 4, [1, 0]),  # the group of task 2 has nothing to tell apart
        ([3.0, 1.0, 2.0, 0.0, 4.0], [1] * 5, 5, [4, 3, 0, 1, 2]),  # best, worst, second best, second worst, the rest
        ([3.0, 1.0, 2.0, 0.0, 4.0], [1] * 5, 2, [4, 3]),
        ([3.0, 1.0, 2.0], [1, 2, 3], 9, [0, 1, 2]),  # no groups: one of all
        ([3.0, 1.0, 2.0, 2.5], [1, 2, 3, 3], 9, [3, 2]),
        ([1.0, 1.0], [1, 1], 1, [0]),
        ([1.0], [1], 4, [0]),
        ([1.0], [1], 0, []),
    ],
)
def test_who_is_chosen(returns: list[float], tasks: list[int], most: int, places: list[int]) -> None:
    assert chosen(episodes(returns, tasks), most) == places
