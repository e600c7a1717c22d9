"""Prompts answered with pictures: what rewards are asked, what an episode is worth, and what is kept of it."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrl import component, config, report
from mmrl.columns import Column
from mmrl.component import Component, Problems
from mmrl.data.conversations import JsonlConversations, ScriptedConversations
from mmrl.errors import ConfigError, DataError, TrainingError
from mmrl.evaluation import result_of
from mmrl.messages import Message
from mmrl.playing import Played, Player
from mmrl.protocols import AsyncEnvironment, DataContext, Environment, ExpertEnvironment
from mmrl.rollout import Collector
from mmrl.transcripts import DrawingQuestions, TalkingEnvironment
from tests.core import painting_run
from tests.core.painting_run import Painter, environment, paint, tasks

CPU = torch.device("cpu")
RED, SLOW, SHAPES = {"target": "fake:Redness"}, {"target": "fake:Slow"}, {"target": "mmrl.rewards.shapes:Shapes"}


@pytest.fixture(autouse=True)
def _fake_components(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(component, "resolve", painting_run.resolve)


def context(*rewards: Any) -> DataContext:
    return DataContext(lambda slots, _: environment(*rewards, num_envs=slots), 1, 0, CPU)


def drawn_red(made: Any, task: int) -> bool:
    """Whether what the prompts draw is red in the middle."""
    made.reset(tasks(task, task, task))
    red, _, blue = made.expert_action().tolist()[0].pictures[0].image.getpixel((16, 16))
    return red > blue


# ---------------------------------------------------------------- an episode


def test_it_is_all_that_it_says() -> None:
    made = environment()
    for promise in (Environment, AsyncEnvironment, ExpertEnvironment, TalkingEnvironment):
        assert isinstance(made, promise)
    assert isinstance(made.prompts, DrawingQuestions)


def test_a_picture_earns_the_weighted_sum_and_the_watch_nothing() -> None:
    made = environment(RED | {"weight": 0.5}, SHAPES | {"weight": 2}, RED | {"name": "watch", "weight": 0}, pass_mark=2.5)
    wanted = next(task for task in range(99) if drawn_red(made, task))
    seen = made.reset(tasks(wanted, wanted, wanted + 1))
    assert seen.conversations is not None and seen.conversations[0][0] is seen.conversations[1][0], "a group shares its prompt"
    assert seen.instructions[0] == made.transcript(0).question.details["prompt"] == seen.conversations[0][0].text
    right = made.expert_action().tolist()
    red = [True, False, drawn_red(environment(), wanted + 1)]
    step = made.step(Column.of([right[0], painting_run.square("blue"), right[2]]))
    assert step.terminated_B.all() and not step.truncated_B.any() and not step.lost_B.any()
    assert step.rewards_BC[:, 0].tolist() == [2 + red[0] / 2, 0.0, 2 + red[2] / 2]
    assert step.metrics["score_redness"].tolist() == step.metrics["score_watch"].tolist() == [float(red[0]), 0.0, float(red[2])]
    assert step.metrics["score_shapes"].tolist() == [1.0, 0.0, 1.0]
    assert step.metrics["success"].tolist() == [float(red[0]), 0.0, float(red[2])]
    told = made.transcript(1)
    assert told.scores == {"redness": 0.0, "shapes": 0.0, "watch": 0.0}
    assert (told.answer, told.ended, len(told.turns), told.turns[0].message.pictures[0].image.size) == ("", "answer", 1, (32, 32))
    assert math.isnan(told.mark), "a picture has no mark"
    assert pickle.loads(pickle.dumps(told)).question.details == told.question.details, "rewards may score in other processes"

    again = made.step(paint("red", "red", "red"))
    assert not again.valid_BC.any() and not again.rewards_BC.any() and again.terminated_B.all(), "what is over stays over"
    assert again.metrics["score_shapes"].tolist() == [1.0, 0.0, 1.0]


def test_slots_are_reset_apart() -> None:
    made = environment(RED)
    made.reset(tasks(1, 2, 3))
    made.step(paint("red", "red", "red"))
    made.reset(tasks(7, 8, 9), torch.tensor([False, True, False]))
    step = made.step(paint("blue", "blue", "blue"))
    assert step.valid_BC[:, 0].tolist() == [False, True, False] and step.terminated_B.all()
    assert step.metrics["score_redness"].tolist() == [1.0, 0.0, 1.0]
    assert [made.transcript(slot).task_id for slot in range(3)] == [1, 8, 3]


def test_what_could_not_be_scored_is_lost_only_if_it_counts() -> None:
    made = environment(RED | {"blind": True}, RED | {"name": "fine"})
    made.reset(tasks(1, 2, 3))
    step = made.step(paint("red", "blue", "red"))
    assert step.lost_B.tolist() == [False, True, False] and step.terminated_B.tolist() == [True, False, True]
    assert step.rewards_BC[:, 0].tolist() == [2.0, 0.0, 2.0] and step.metrics["success"].tolist() == [1.0, 0.0, 1.0]
    assert math.isnan(made.transcript(1).scores["redness"]) and made.transcript(1).scores["fine"] == 0.0

    made = environment(RED | {"blind": True, "weight": 0}, RED | {"name": "fine"})
    made.reset(tasks(1, 2, 3))
    step = made.step(paint("red", "blue", "blue"))
    assert not step.lost_B.any() and step.rewards_BC[:, 0].tolist() == [1.0, 0.0, 0.0]
    assert step.metrics["score_redness"].isnan().tolist() == [False, True, True]


def test_a_reward_that_scores_nothing_ends_the_run_with_its_reason() -> None:
    made = environment(RED | {"blind": True, "name": "eye"})
    made.reset(tasks(1, 2, 3))
    with pytest.raises(TrainingError, match=r"'environment.rewards.eye' could score none of 3 pictures: it is colour-blind"):
        made.step(paint("blue", "blue", "blue"))
    made.reset(tasks(1, 1, 1))
    one = painting_run.square("blue")
    assert made.step(Column.of([one, one, one])).lost_B.all(), "one picture is no pattern"


def test_a_message_without_a_picture_earns_nothing_and_is_not_scored() -> None:
    made = environment(RED)
    made.reset(tasks(1, 2, 3))
    step = made.step(Column.of([Message("assistant", ("no",)), None, *paint("red").tolist()]))
    assert step.terminated_B.tolist() == [True, False, True] and step.valid_BC[:, 0].tolist() == [True, False, True]
    assert step.rewards_BC[:, 0].tolist() == [0.0, 0.0, 1.0] and made.transcript(0).answer is None


def test_scoring_begins_with_the_step_and_is_waited_for_at_its_end() -> None:
    made = environment(SLOW, RED)
    made.reset(tasks(1, 2, 3))
    slow, red = (reward for _, reward in made._rewards)
    end = made.begin_step(paint("red", "blue", "red"))
    assert slow.log == ["begun"] and red.asked == 0
    assert end().rewards_BC[:, 0].tolist() == [2.0, 0.0, 2.0]
    assert slow.log == ["begun", "waited for"] and red.asked == 1


@pytest.mark.parametrize(
    ("rewards", "fields", "words"),
    [
        ((RED, RED), {}, "rewards has 2 rewards called 'redness'; give each a 'name' of its own"),
        ((painting_run.PROMPTS,), {}, "simulators.image_prompts:ShapePrompts is no reward"),
        ((RED | {"bind": True},), {}, "unknown key 'bind'; did you mean 'blind'?"),
        ((), {"pass_mark": 0}, "pass_mark"),
    ],
)
def test_blocks_that_make_no_sense(rewards: Any, fields: Any, words: str) -> None:
    with pytest.raises(Problems) as found:
        environment(*rewards, **fields)
    assert words in str(found.value)


def test_prompts_that_ask_or_draw_nothing() -> None:
    with pytest.raises(ConfigError, match=r"'prompts.target' .* asks nothing"):
        environment(prompts={"target": "fake:Redness"})
    made = environment()
    made.prompts = type("Asks", (), {"question": made.prompts.question})()
    made.reset(tasks(1, 2, 3))
    with pytest.raises(ConfigError, match="draws nothing"):
        made.expert_action()


# ---------------------------------------------------------------- demonstrations


@pytest.mark.parametrize("rewards", [(SHAPES,), ()])
def test_what_the_prompts_draw_is_shown_as_an_example(rewards: Any) -> None:
    source = ScriptedConversations(ScriptedConversations.Config(num_envs=4), context=context(*rewards))
    talks = source.batch(6).conversations
    assert [[message.role for message in talk] for talk in talks] == [["user", "assistant"]] * 6
    assert len({talk[1].pictures[0].key for talk in talks}) == 6, "every scene is another one"
    made = environment(SHAPES, num_envs=1)
    for task, talk in enumerate(talks, 2_000_000):
        assert made.reset(tasks(task)).instructions[0] == talk[0].text
        assert made.step(Column.of([talk[1]])).metrics["success"].item() == 1.0


def test_a_share_of_captions_may_belong_to_another_picture() -> None:
    block, size, prompts = ScriptedConversations.Config(num_envs=50, hasty=0.6), 200, dict(painting_run.PROMPTS)
    prompts["tags"] = ["single_object", "counting"]

    def drawn(hasty: float) -> tuple[Any, ...]:
        source = DataContext(lambda slots, _: environment(SHAPES, num_envs=slots, prompts=prompts), 1, 0, CPU)
        return ScriptedConversations(replace(block, hasty=hasty), context=source).batch(size).conversations

    talks, true = drawn(0.6), drawn(0.0)
    assert [talk[0].text for talk in talks] == [talk[0].text for talk in true], "the same prompts"
    shown, own = ([talk[1].pictures[0].key for talk in of] for of in (talks, true))
    assert 0.5 < sum(a != b for a, b in zip(shown, own, strict=True)) / size < 0.7
    questions = environment(SHAPES, num_envs=1, prompts=prompts).prompts
    tag_of = {key: questions.question(2_000_000 + place).family for place, key in enumerate(own)}
    assert set(tag_of.values()) == set(prompts["tags"])
    assert [tag_of[key] for key in shown] == [tag_of[key] for key in own], "pictures of other prompts with the same tag"


def test_without_rewards_no_other_picture_is_a_success() -> None:
    made = environment()
    made.reset(tasks(1, 2, 3))
    right = made.expert_action().tolist()
    step = made.step(Column.of([right[0], *paint("red", "blue").tolist()]))
    assert step.metrics["success"].tolist() == [1.0, 0.0, 0.0] and not step.rewards_BC.any()


def test_captioned_pictures_are_read_from_a_file_where_the_block_says_so(tmp_path: Path) -> None:
    painting_run.square("red").pictures[0].image.save(tmp_path / "red.png")
    shown = {"role": "assistant", "content": [{"type": "image", "image": "red.png"}]}
    path = tmp_path / "captions.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "a red square"}, shown]}) + "\n")
    (talk,) = JsonlConversations(JsonlConversations.Config(path=path, drawn=True), context=context()).batch(1).conversations
    assert talk[1].pictures[0].image.getpixel((16, 16)) == (225, 35, 35)
    with pytest.raises(DataError, match="set 'drawn' where an image generator is to learn them"):
        JsonlConversations(JsonlConversations.Config(path=path), context=context())


# ---------------------------------------------------------------- evaluation and runs


@pytest.mark.parametrize(
    "changes",
    [["environment.rewards=[]"], ["environment.rewards.0.weight=0"], ["stages.improve.environment={rewards: []}"]],
    ids=lambda changes: changes[0],
)
def test_a_stage_that_would_learn_from_no_reward_is_refused(tmp_path: Path, changes: list[str]) -> None:
    path = tmp_path / "painting.yaml"
    path.write_text(painting_run.RUN)
    with pytest.raises(
        ConfigError, match=r"'stages.improve.algorithm' learns from rewards, and 'environment.rewards' pay nothing"
    ):
        config.load(path, changes)
    config.load(path, [*changes, "stages.improve.rewards=[{target: mmrl.rewards.shapes:Shapes}]"])


def test_an_evaluation_is_the_same_whatever_plays_beside_an_episode() -> None:
    results = []
    for num_envs in (1, 4):
        made = environment(SHAPES | {"graded": True}, RED | {"name": "watch", "weight": 0, "blind": True}, num_envs=num_envs)
        policy: Any = Painter(Painter.Config((0.0, 1.0)), device=CPU)
        played = Player(policy, made, seed=3, act_batch=4, device=CPU).play(range(5, 14), lambda _: None)
        results.append((played, [episode.metrics for episode in played]))
    assert results[0] == results[1]
    played = results[0][0]
    assert all(set(episode.metrics) == {"score_shapes"} for episode in played), "blue has no redness, which is not a number"
    result = result_of(played, 1.0)
    assert result.metrics == {"score_shapes": pytest.approx(sum(e.metrics["score_shapes"] for e in played) / 9)}
    assert 0 < result.metrics["score_shapes"] < 1
    assert result.sentence().endswith(f"score shapes {result.metrics['score_shapes']:.4g}")
    assert "tool rate" not in result.sentence() and result.row()["metrics"] == result.metrics
    assert played[0].row()["metrics"] == played[0].metrics


def test_means_are_over_the_episodes_that_count_and_have_a_number() -> None:
    def one(task: int, outcome: Any, **metrics: float) -> Played:
        return Played(task, "a", "", outcome, 0.0, 1, metrics=metrics)

    result = result_of([one(1, "success", x=1.0), one(2, "failure", x=2.0, y=5.0), one(3, "lost", x=100.0)], 1.0)
    assert result.metrics == {"x": 1.5, "y": 5.0} and result.families["a"].metrics == result.metrics


def test_parts_score_while_others_are_painted() -> None:
    parts: list[Any] = [environment(SLOW, num_envs=4) for _ in range(2)]
    policy: Any = Painter(Painter.Config(), device=CPU)
    collector = Collector(parts, decisions=1, seed=0, device=CPU, group_size=2, auto_reset=False)
    rollout = collector.collect(policy)
    chosen = rollout.trace["choice"][0]
    assert rollout.rewards_TB[0].tolist() == (chosen == 0).float().tolist() and 0 < rollout.rewards_TB.sum() < 8
    assert [told.scores["slow"] for told in rollout.episodes.transcripts] == rollout.rewards_TB[0].tolist()
    assert rollout.episodes.metrics["score_slow"].tolist() == rollout.rewards_TB[0].tolist()


def test_rewards_see_a_picture_as_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def look(self: Any, transcripts: Any) -> list[float]:
        seen.extend(each.answer for each in transcripts)
        return [1.0] * len(transcripts)

    monkeypatch.setattr("mmrl.rewards.shapes.Shapes.__call__", look)
    made = environment(SHAPES)
    made.reset(tasks(0, 1, 2))
    made.step(made.expert_action())
    assert seen == ["", "", ""]


def test_a_run_keeps_pictures_with_their_scores_and_shows_them(tmp_path: Path) -> None:
    folder = painting_run.run(tmp_path)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if row["kind"] == "evaluation"]
    assert all({"score_shapes", "score_watch"} == set(row["metrics"]) for row in measured) and len(measured) == 2
    assert set(measured[0]["families"]) == {"colors"}, "single shapes are not held out"
    trained = [row for row in rows if row["kind"] == "train"]
    assert all({"rollout/score_shapes", "rollout/score_watch"} <= set(row) for row in trained)
    assert not any(name.startswith("agent/") and "rate" in name for row in trained for name in row)

    records = [json.loads(path.read_text()) for path in sorted((folder / "trajectories").glob("*.json"))]
    assert records and all(set(record["scores"]) == {"shapes", "watch"} for record in records)
    for record in records:
        assert (record["mark"], record["answer"], record["messages"][-1]["parts"]) == (None, "", [0])
        assert record["pictures"][0]["width"] == 32 and (folder / "trajectories" / record["pictures"][0]["file"]).is_file()
    page = report.build(folder).read_text()
    data = json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    assert not data.get("conversations"), "pictures stand in a section of their own (test_report_pictures.py)"
    (scores,) = (panel for panel in data["panels"] if panel["key"] == "scores")
    drawn = " = ".join(series["name"] for series in scores["series"])  # equal curves are one
    assert "rollout/score_shapes" in drawn and "rollout/score_watch" in drawn


def test_the_environment_is_built_from_yaml_and_dumped_back() -> None:
    made = environment(RED | {"weight": 0.5})
    block = Component.parse({"target": "mmrl.picturing:PictureEnvironment", "prompts": painting_run.PROMPTS}).override(
        {"rewards": [RED | {"weight": 0.5}]}
    )
    assert block.dump()["rewards"] == [{"name": "redness", "weight": 0.5, "target": "fake:Redness", "blind": False}]
    assert block.config == made.config and block.override({"rewards": []}).config.rewards == []
