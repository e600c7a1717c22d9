"""Conversations about questions, with tools that work and tools that do not."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import torch

from mmrl.columns import Column
from mmrl.errors import ConfigError
from mmrl.messages import Message
from mmrl.playing import Player
from mmrl.protocols import AsyncEnvironment, Environment, ExpertEnvironment
from mmrl.rewards.evidence import derived_pictures
from mmrl.transcripts import TalkingEnvironment
from mmrl.types import Step
from tests.core import asking

TASKS = torch.tensor([3, 3, 8])


def say(*texts: str | None, finish: Any = "stop") -> Column:
    return Column.of([None if text is None else Message("assistant", (text,), token_ids=(1,), finish=finish) for text in texts])


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def texts(step: Step, slot: int) -> list[str]:
    assert step.observation.conversations is not None
    return [f"{message.role}: {message.text}" for message in step.observation.conversations[slot]]


def test_it_is_all_that_it_says() -> None:
    made = asking.environment(asking.add)
    for promise in (Environment, AsyncEnvironment, ExpertEnvironment, TalkingEnvironment):
        assert isinstance(made, promise)


def test_calls_are_run_and_answers_marked() -> None:
    made = asking.environment(asking.add, system="Be right.")
    observation = made.reset(TASKS)
    assert observation.instructions == ("What is 3 + 1?", "What is 3 + 1?", "What is 8 + 1?")
    assert observation.conversations is not None
    system, asked = observation.conversations[0]
    assert system.text.startswith("Be right.\n\n# Tools") and '"name": "add"' in system.text
    assert observation.conversations[1][1] is asked, "a group shares the messages of its opening"

    step = made.step(say(call("add", a=3, b=1), "5", call("add", a=8, b=1)))
    assert step.terminated_B.tolist() == [False, True, False] and not step.truncated_B.any()
    assert step.valid_BC.tolist() == [[True]] * 3 and step.rewards_BC.tolist() == [[0.0]] * 3
    assert texts(step, 0)[-1] == "tool: 4" and texts(step, 2)[-1] == "tool: 9"

    step = made.step(say("4", "4", "8"))
    assert step.terminated_B.tolist() == [True] * 3
    assert step.rewards_BC.tolist() == [[1.0], [0.0], [0.0]], "an answer counts once, and only the first"
    assert step.valid_BC.tolist() == [[True], [False], [True]]
    assert step.metrics["success"].tolist() == [1.0, 0.0, 0.0]
    assert [made.transcript(slot).answer for slot in range(3)] == ["4", "5", "8"]
    assert [len(made.transcript(slot).turns) for slot in range(3)] == [2, 1, 2]
    assert made.transcript(0).calls[0].arguments == {"a": 3, "b": 1}


@pytest.mark.parametrize(
    ("said", "error", "reply"),
    [
        ("<tool_call>{}</tool_call>", "malformed", "lacks the key 'name'"),
        (call("ad", a=1, b=2), "unknown_tool", "did you mean 'add'"),
        (call("add", a=1), "bad_arguments", "'b' is missing"),
        (call("add", a=1, b="two"), "bad_arguments", "'b'"),
        (call("fail", how="tool"), "tool_error", "It cannot be done."),
        (call("fail", how="loudly"), "exception", "RuntimeError: broken"),
    ],
)
def test_what_goes_wrong_with_a_call_is_a_message(said: str, error: str, reply: str) -> None:
    made = asking.environment(asking.add, asking.fail, num_envs=1)
    made.reset(torch.tensor([1]))
    step = made.step(say(said))
    assert not step.done_B.any() and reply in texts(step, 0)[-1]
    record = made.transcript(0).calls[0]
    assert record.error == error and record.result.error


def test_the_ways_in_which_a_conversation_ends() -> None:
    made = asking.environment(asking.add, num_envs=3, max_turns=2)
    made.reset(TASKS)
    long, short = call("add", a=3, b=1), "4"
    step = made.step(Column.of([*say(long, long).tolist(), *say(call("add", a=8, b=1), finish="length").tolist()]))
    assert step.truncated_B.tolist() == [False, False, True] and made.transcript(2).ended == "length"
    assert not made.transcript(2).calls, "a message that was cut calls nothing"
    step = made.step(say(long, short, None))
    assert step.truncated_B.tolist() == [True, False, True] and step.terminated_B.tolist() == [False, True, False]
    assert [made.transcript(slot).ended for slot in range(3)] == ["turns", "answer", "length"]
    assert made.transcript(0).turns[1].replies[0].text == "4", "what the last call gave is known, though nobody reads it"
    assert [made.transcript(slot).mark for slot in range(3)] == [0.0, 1.0, 0.0]


def test_an_answer_may_stand_within_a_tag_and_marks_may_be_partial() -> None:
    made = asking.environment(num_envs=3, answer_tag="answer")
    made.reset(TASKS)
    step = made.step(say("It is <answer>4</answer>", "4", "<answer>4</answer> no <answer>9</answer>"))
    assert step.metrics["success"].tolist() == [1.0, 0.0, 1.0] and step.terminated_B.all()
    assert made.transcript(1).answer is None


def test_without_tools_everything_is_an_answer() -> None:
    made = asking.environment(num_envs=1)
    assert made.reset(torch.tensor([1])).conversations == ((Message("user", ("What is 1 + 1?",)),),)
    assert made.step(say(call("add", a=1, b=1))).terminated_B.all()


def test_tools_keep_things_for_their_conversation_alone() -> None:
    made = asking.environment(asking.count, num_envs=2)
    closed: list[int] = []

    class Kept:
        def __init__(self, number: int) -> None:
            self.number = number

        def close(self) -> None:
            closed.append(self.number)

    made.reset(torch.tensor([1, 2]))
    step = made.step(say(call("count") + call("count"), call("count")))
    assert [message.text for message in made.transcript(0).turns[0].replies] == ["1", "2"]
    assert texts(step, 1)[-1] == "tool: 1"
    assert made.transcript(0).calls[1].rewards == (("counted", 0.5),)
    for number, slot in enumerate(made._slots):
        slot.state["kept"] = Kept(number)
    made.step(say("2", call("count")))
    assert closed == [0], "what ended is closed"
    made.reset(torch.tensor([5, 6]))
    assert closed == [0, 1]
    made.step(say(call("count"), None))
    assert made.transcript(0).turns[0].replies[0].text == "1"


def test_pictures_of_tools_can_be_named_in_later_calls() -> None:
    made = asking.environment(asking.left_half, num_envs=1, picture=True)
    made.reset(torch.tensor([0]))
    made.step(say(call("left_half", image=1)))
    step = made.step(say(call("left_half", image=2)))
    assert texts(step, 0)[-1] == "tool: Image 3 is 10 x 32 pixels."
    made.step(say(call("left_half", image=9)))
    assert "There is no image 9; the conversation has images 1 to 3." in made.transcript(0).turns[2].replies[0].text


def test_part_of_the_slots_can_begin_again() -> None:
    made = asking.environment(asking.add)
    made.reset(TASKS)
    made.step(say("4", call("add", a=1, b=1), "9"))
    observation = made.reset(torch.tensor([5, 0, 0]), torch.tensor([True, False, False]))
    assert observation.instructions == ("What is 5 + 1?", "What is 3 + 1?", "What is 8 + 1?")
    step = made.step(say("6", "4", "9"))
    assert step.valid_BC[:, 0].tolist() == [True, True, False]


def test_the_two_halves_of_a_step_are_a_step_and_calls_run_side_by_side() -> None:
    both = threading.Barrier(2, timeout=5)

    def meet() -> str:
        """Wait for the other conversation."""
        both.wait()
        return "met"

    made = asking.environment(meet, num_envs=2)
    made.reset(torch.tensor([1, 2]))
    wait = made.begin_step(say(call("meet"), call("meet")))
    assert [texts(wait(), slot)[-1] for slot in range(2)] == ["tool: met", "tool: met"]


def test_the_expert_is_right_and_says_it_in_the_right_form() -> None:
    made = asking.environment(asking.left_half, num_envs=3, picture=True, answer_tag="answer")
    made.reset(torch.tensor([0, 1, 2]))
    made.step(made.expert_action())
    step = made.step(made.expert_action())
    assert step.metrics["success"].tolist() == [1.0] * 3
    assert made.transcript(1).turns[0].message.text.startswith("I look.\n<tool_call>\n")
    assert made.transcript(1).turns[1].message.text == "<answer>green</answer>"
    assert made.expert_action().tolist() == [None] * 3


def test_without_tools_the_expert_knows_the_answer() -> None:
    made = asking.environment(num_envs=2)
    made.reset(torch.tensor([4, 9]))
    assert [message.text for message in made.expert_action().tolist()] == ["5", "10"]
    assert made.step(made.expert_action()).metrics["success"].tolist() == [1.0, 1.0]


def test_examples_stand_before_the_question_and_nobody_asks_for_their_tasks() -> None:
    made = asking.environment(asking.add, num_envs=1, demonstrations=2)
    conversation = (made.reset(torch.tensor([4])).conversations or ())[0]
    assert [message.role for message in conversation] == ["system", *("user", "assistant", "tool", "assistant") * 2, "user"]
    assert all(not message.token_ids for message in conversation) and conversation[-1].text == "What is 4 + 1?"
    assert conversation[3].text == conversation[4].text != "5"


def test_pictures_are_numbered_from_1_in_every_example_and_in_the_question() -> None:
    """Else an example would teach to look at another example's picture, and numbers would change as examples become fewer."""
    made = asking.environment(asking.left_half, num_envs=1, picture=True, demonstrations=2)
    for colour, task in ((name, sorted(asking.COLOURS).index(name)) for name in asking.COLOURS):
        made.reset(torch.tensor([task]))
        step = made.step(made.expert_action())
        (call_made,) = made.transcript(0).calls
        (half,) = call_made.result.pictures
        assert half.image.getpixel((0, 0)) == asking.COLOURS[colour] and half.source == 0
        shown = [text for text in texts(step, 0) if text.startswith("tool")]
        assert shown == ["tool: Image 2 is 20 x 32 pixels."] * 3
        assert derived_pictures(made.transcript(0), call_made) == [half], "rewards know it as one of the question's"


def test_episodes_do_not_depend_on_the_seats() -> None:
    class Adder:
        version = 0

        def act(self, observation: Any, draws: Any, *, explore: bool) -> Any:
            said = []
            for talk in observation.conversations:
                asked, last = talk[1].text, talk[-1]
                number = int(asked.split()[2])
                said.append(last.text if last.role == "tool" else call("add", a=number, b=1 + (number % 3 == 0)))
            return type("D", (), {"action": say(*said)})()

    rows = []
    for slots, act_batch in ((1, 1), (4, 3)):
        player = Player(
            Adder(),  # type: ignore[arg-type]
            asking.environment(asking.add, num_envs=slots),  # type: ignore[arg-type]
            seed=0,
            act_batch=act_batch,
            device=torch.device("cpu"),
        )
        rows.append([episode.row() for episode in player.play(range(1, 8), lambda _: None)])
    assert rows[0] == rows[1]
    assert [row["success"] for row in rows[0]] == [True, True, False, True, True, False, True]
    assert rows[0][0]["family"] == "sum1" and rows[0][0]["steps"] == 2


def test_two_tools_of_one_name_and_questions_that_are_none() -> None:
    with pytest.raises(ConfigError, match="both called 'add'"):
        asking.environment(asking.add, asking.add)
