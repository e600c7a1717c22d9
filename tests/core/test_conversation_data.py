"""Conversations to imitate: led by an expert, or read from a file, of which no bad line passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmrl.component import Component
from mmrl.data.conversations import JsonlConversations, ScriptedConversations
from mmrl.data.mixture import Mixture, Part
from mmrl.errors import DataError, MMRLError
from mmrl.messages import Picture
from mmrl.protocols import DataContext
from mmrl.types import Talks
from tests.core import asking

CPU = torch.device("cpu")


def context(seed: int = 0, **fields: Any) -> DataContext:
    return DataContext(lambda slots, _: asking.environment(asking.add, num_envs=slots, **fields), 1, seed, CPU)


def scripted(size: int = 4, seed: int = 0, **fields: Any) -> ScriptedConversations:
    return ScriptedConversations(ScriptedConversations.Config(num_envs=size), context=context(seed, **fields))


def said(talks: Talks) -> list[str]:
    return [" | ".join(message.text.split("\n")[-1] for message in talk[1:]) for talk in talks.conversations]


# ---------------------------------------------------------------- scripted


def test_the_expert_leads_fresh_conversations() -> None:
    source = scripted()
    talks = source.batch(6)
    assert [message.role for message in talks.conversations[0]] == ["system", "user", "assistant", "tool", "assistant"]
    asked = [talk[1].text for talk in talks.conversations] + [talk[1].text for talk in source.batch(3).conversations]
    assert len(set(asked)) == 9, "every question is asked once"
    assert all(talk[3].text == talk[4].text for talk in talks.conversations)
    assert scripted(seed=1).batch(1).conversations[0][1].text not in asked


def test_a_resumed_source_gives_what_an_unbroken_one_would() -> None:
    unbroken, first = scripted(), scripted()
    for size in (3, 2, 6):
        assert said(unbroken.batch(size)) == said(first.batch(size))
    resumed = scripted()
    resumed.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    for size in (1, 5, 4):
        assert said(unbroken.batch(size)) == said(resumed.batch(size))


def test_conversations_that_end_badly_are_left_out() -> None:
    with pytest.raises(MMRLError, match="got none of 64 conversations right"):
        scripted(max_turns=1).batch(1)


def test_only_the_right_ones_of_a_round_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    real = asking.Sums.next_turn

    def careless(self: asking.Sums, question: Any, turns: Any) -> Any:
        return ("wrong", ()) if question.details["a"] % 2 else real(self, question, turns)

    monkeypatch.setattr(asking.Sums, "next_turn", careless)
    talks = scripted().batch(6).conversations
    assert [int(talk[1].text.split()[2]) % 2 for talk in talks] == [0] * 6


def test_hasty_ones_answer_at_once_as_another_conversation_ended() -> None:
    source = ScriptedConversations(ScriptedConversations.Config(num_envs=50, hasty=0.6), context=context())
    talks = source.batch(200).conversations
    hasty = [talk for talk in talks if len(talk) == 3]
    assert all(len(talk) in (3, 5) for talk in talks)
    assert 0.5 < len(hasty) / 200 < 0.7
    right = {talk[1].text: talk[-1].text for talk in scripted(50).batch(200).conversations}
    assert all(talk[-1].text == right[talk[1].text] for talk in talks if len(talk) == 5)
    assert not any(talk[-1].text == right[talk[1].text] for talk in hasty), "the sums all differ"
    assert all(talk[-1].text in right.values() for talk in hasty)


def test_which_are_hasty_does_not_change_on_resume() -> None:
    config = ScriptedConversations.Config(num_envs=8, hasty=0.5)
    unbroken, first = (ScriptedConversations(config, context=context()) for _ in range(2))
    assert said(unbroken.batch(5)) == said(first.batch(5))
    resumed = ScriptedConversations(config, context=context())
    resumed.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    assert said(unbroken.batch(20)) == said(resumed.batch(20))


def test_an_environment_that_does_not_talk_is_refused() -> None:
    nothing = DataContext(lambda slots, _: object(), 1, 0, CPU)  # type: ignore[arg-type, return-value]
    with pytest.raises(MMRLError, match="object leads no conversations"):
        ScriptedConversations(ScriptedConversations.Config(), context=nothing)


def test_conversations_are_mixed_as_examples_are() -> None:
    block = Component("scripted", ScriptedConversations, ScriptedConversations.Config(num_envs=4))
    other = Component("scripted", ScriptedConversations, ScriptedConversations.Config(num_envs=4, first_task=9_000_000))
    mixture = Mixture(Mixture.Config(parts=[Part(block, 3.0), Part(other, 1.0)]), context=context())
    talks = mixture.batch(40)
    assert isinstance(talks, Talks) and len(talks) == 40
    share = sum(int(talk[1].text.split()[2]) >= 9_000_000 for talk in talks.conversations) / 40
    assert 0.05 < share < 0.5
    picked = talks.select(torch.tensor([39, 0]))
    assert picked.conversations == (talks.conversations[39], talks.conversations[0])


def test_the_answers_of_examples_are_not_learned() -> None:
    talks = scripted(demonstrations=2).batch(3)
    for talk in talks.conversations:
        weights = [message.weight for message in talk if message.role == "assistant"]
        assert weights == [0.0] * 4 + [1.0] * 2


# ---------------------------------------------------------------- files

USER = {"role": "user", "content": "What is 1 + 1?"}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 1}'}}
GOOD: list[dict[str, Any]] = [
    USER,
    {"role": "assistant", "content": "I add.", "tool_calls": [CALL]},
    {"role": "tool", "content": [{"type": "text", "text": "2"}], "tool_call_id": "1"},
    {"role": "assistant", "content": "2"},
]


ANSWER = {"role": "assistant", "content": "2"}


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "talks.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path, seed: int = 0) -> JsonlConversations:
    return JsonlConversations(JsonlConversations.Config(path=path), context=context(seed))


def test_lines_become_conversations(tmp_path: Path) -> None:
    Image.new("RGB", (8, 6), (200, 0, 0)).save(tmp_path / "red.png")
    seen = [{"type": "image", "image": "red.png"}, {"type": "text", "text": "Which colour?"}]
    linked = [{"type": "image_url", "image_url": {"url": "red.png"}}]
    source = read(
        write(
            tmp_path,
            {"messages": GOOD},
            "",
            {"messages": [{"role": "user", "content": seen}, {"role": "assistant", "content": "red"}]},
            {"messages": [{"role": "user", "content": linked}, {"role": "assistant", "content": "red"}], "id": 7},
        )
    )
    talks = {len(talk): talk for talk in source.batch(30).conversations}
    assert len(source) == 3 and set(talks) == {2, 4}
    call = talks[4][1]
    assert call.text == 'I add.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 1}}\n</tool_call>'
    assert call.calls[0].arguments == {"a": 1, "b": 1} and talks[4][2].text == "2"
    picture = talks[2][0].pictures[0]
    assert isinstance(picture, Picture) and picture.image.size == (8, 6) and picture.image.getpixel((0, 0)) == (200, 0, 0)


@pytest.mark.parametrize("system", ["Be right.", None])
def test_a_line_s_tools_are_told_as_the_environment_tells_of_its_own(tmp_path: Path, system: str | None) -> None:
    environment = asking.environment(asking.add, num_envs=1, system=system or "")
    told = (environment.reset(torch.tensor([0])).conversations or ())[0][0]
    schemas = [schema.function for schema in environment.toolbox.schemas]
    before = [] if system is None else [{"role": "system", "content": system}]
    (talk,) = read(write(tmp_path, {"messages": [*before, *GOOD], "tools": schemas})).batch(1).conversations
    assert (talk[0].role, talk[0].text) == (told.role, told.text)
    assert [message.role for message in talk[1:]] == ["user", "assistant", "tool", "assistant"]


def test_pictures_stand_as_their_camera_says(tmp_path: Path) -> None:
    turned = Image.new("RGB", (8, 6))
    exif = turned.getexif()
    exif[274] = 6  # turn it by 90 degrees to see it upright
    turned.save(tmp_path / "turned.jpg", exif=exif)
    asked = {"role": "user", "content": [{"type": "image", "image": "turned.jpg"}]}
    (talk,) = read(write(tmp_path, {"messages": [asked, ANSWER]})).batch(1).conversations
    assert talk[0].pictures[0].image.size == (6, 8)


def test_the_order_depends_on_seed_and_cursor_alone(tmp_path: Path) -> None:
    path = write(tmp_path, *({"messages": [USER, {"role": "assistant", "content": str(i)}]} for i in range(9)))
    one, other = read(path), read(path)
    assert said(one.batch(20)) == said(other.batch(20)) != said(read(path, seed=1).batch(20))
    again = read(path)
    again.load_state_dict({name: tensor.clone() for name, tensor in one.state_dict().items()})
    assert said(one.batch(5)) == said(again.batch(5))


def test_messages_weigh_what_their_line_says(tmp_path: Path) -> None:
    first, later = {**ANSWER, "weight": 0}, {**ANSWER, "weight": 0.5}
    source = read(write(tmp_path, {"messages": [USER, first, USER, later, USER, ANSWER]}))
    assert [message.weight for message in source.batch(1).conversations[0]] == [1.0, 0.0, 1.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{", "line 2: is no JSON"),
        ([], "line 2: is no object with a list 'messages'"),
        ({"message": []}, "is no object with a list 'messages'"),
        ({"messages": []}, "'messages' has no assistant"),
        ({"messages": [USER]}, "'messages' has no assistant"),
        ({"messages": [ANSWER, USER]}, "begins with the assistant"),
        ({"messages": [USER, {"role": "assistent", "content": "2"}]}, "'messages[1].role' is 'assistent', not one of system"),
        ({"messages": [USER, {**ANSWER, "loss": 1}]}, "'messages[1]' has an unknown key 'loss'"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "'messages' has no assistant with a weight"),
        ({"messages": [USER, {**ANSWER, "weight": -1}]}, "'messages[1].weight' is -1, no number from 0 on"),
        ({"messages": [USER, {**ANSWER, "weight": True}]}, "'messages[1].weight' is True, no number from 0 on"),
        ({"messages": [{**USER, "weight": 1}, ANSWER]}, "'messages[0].weight': only what an assistant says has a weight"),
        ({"messages": [USER, {"role": "assistant"}]}, "'messages[1]' says nothing"),
        ({"messages": [USER, {"role": "assistant", "content": 2}]}, "'messages[1].content' is neither a string nor a list"),
        ({"messages": [{**USER, "tool_calls": [CALL]}, ANSWER]}, "only an assistant calls tools"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{}]}]}, "'messages[1].tool_calls[0]' has no name"),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [{"function": {"name": "add", "arguments": "{"}}]}]},
            "'messages[1].tool_calls[0].arguments' is no JSON",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}, ANSWER]}, "'messages[0].content[0].type' is 'video'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, "does not say where its picture is"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "none.png"}]}, ANSWER]},
            "'messages[0].content[0]': the picture",
        ),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "image", "image": "red.png"}]}]}, "shows no pictures"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "red.png"}]}, ANSWER]},
            "'messages[0].content[0]' does not say where its picture is",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "a\0b"}]}, ANSWER]},
            "'messages[0].content[0]': the picture",
        ),
        ({"messages": [USER, {**ANSWER, "tool_calls": 1}]}, "'messages[1].tool_calls' is no list"),
        ({"messages": [USER, {**ANSWER, "content": "\ud83d"}]}, "half of a surrogate pair"),
        ('{"messages": [' + "9" * 5000 + "]}", "is no JSON (too many digits"),
        ("[" * 100_000, "is no JSON (too many digits or brackets)"),
        ({"messages": [USER, ANSWER], "tools": "add"}, "'tools' is no list of functions"),
        ({"messages": [USER, ANSWER], "tools": [{"type": "function"}]}, "'tools[0]' has no name"),
        ({"messages": [USER, ANSWER], "tools": [{"name": "add", "parameters": []}]}, "'tools[0].parameters' is no object"),
    ],
)
def test_one_bad_line_is_one_sentence_that_names_it(tmp_path: Path, row: Any, problem: str) -> None:
    Image.new("RGB", (8, 6)).save(tmp_path / "red.png")
    path = write(tmp_path, {"messages": GOOD}, row)
    with pytest.raises(DataError) as caught:
        read(path)
    sentence = str(caught.value)
    assert sentence.startswith(f"{path}, line 2: ") and problem in sentence and "\n" not in sentence


def test_files_that_are_not_there_or_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no conversations"):
        read(write(tmp_path))
