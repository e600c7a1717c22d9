"""Data sets of questions: every line is a question of one split, pictures are opened when asked for, bad lines are all named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmrl.answers import Choice, Exact, Normalised, Number
from mmrl.calling import HermesCalls, ToolBlock
from mmrl.columns import Column
from mmrl.component import Component
from mmrl.errors import ConfigError, DataError
from mmrl.messages import Message, ToolCall
from mmrl.rewards.evidence import derived_pictures
from mmrl.tool_use import ToolEnvironment
from tests.simulators.asking import build


def user(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def line(number: int, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"What is {number} + 1?"}], "answer": number + 1, "check": "number", **more}


def write(folder: Path, *lines: Any) -> str:
    file = folder / "questions.jsonl"
    file.write_text("".join(f"{entry if isinstance(entry, str) else json.dumps(entry)}\n" for entry in lines), encoding="utf-8")
    return str(file)


def test_lines_become_questions(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 3), (255, 0, 0)).save(tmp_path / "images" / "red.png")
    Image.new("L", (2, 2)).save(tmp_path / "black.png")
    image, text = {"type": "image", "image": "images/red.png"}, {"type": "text", "text": "Which colour?"}
    url = {"type": "image_url", "image_url": {"url": "black.png"}}
    path = write(
        tmp_path,
        {"messages": user(image, text, url), "answer": "Red", "family": "colours", "details": {"box": [0, 0, 4, 3]}},
        "",
        {"messages": user(text), "answers": ["red", "crimson"], "check": "exact"},
        {"messages": user(text), "answer": "B", "check": {"kind": "choice", "options": ["blue", "red"]}},
        line(3, check={"kind": "number", "tolerance": 0.5}),
    )
    questions = build("JsonlQuestions", path=path, held_out_share=0.0)
    assert len(questions) == 4
    first, second, third, fourth = (questions.question(task_id) for task_id in range(4))
    red, said, black = first.parts
    assert (red.image.size, red.image.getpixel((0, 0)), said, black.image.size) == ((4, 3), (255, 0, 0), "Which colour?", (2, 2))
    assert (first.family, first.references, first.details) == ("colours", ("Red",), {"box": [0, 0, 4, 3]})
    assert first.check == Normalised(("Red",)) and second.check == Exact(("red", "crimson")) and second.family == "questions"
    assert third.check == Choice(("B",), ("blue", "red"))
    assert (fourth.parts, fourth.references, fourth.check) == (("What is 3 + 1?",), ("4",), Number(("4",), absolute=0.5))
    assert questions.question(4).parts == questions.question(-4).parts == questions.question(10**9 * 4).parts
    assert build("JsonlQuestions", path=path, held_out_share=0.0, check="exact").question(0).check == Exact(("Red",))


def test_a_question_may_follow_a_system_message_and_a_conversation(tmp_path: Path) -> None:
    """Calls name all pictures that the line shows; a crop of the question's picture is known as one of it."""
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{name}.png")
    red, blue = ({"type": "image", "image": f"{name}.png"} for name in ("red", "blue"))
    said = [
        {"role": "system", "content": "Be short."},
        *user(red, {"type": "text", "text": "See?"}),
        {"role": "assistant", "content": "Yes."},
    ]
    path = write(tmp_path, {"messages": [*said, *user(blue, {"type": "text", "text": "And this?"})], "answer": "blue"})
    environment = ToolEnvironment(
        ToolEnvironment.Config(
            questions=Component.parse({"target": "simulators.prompts:JsonlQuestions", "path": path, "held_out_share": 0.0}),
            tools=[ToolBlock.parse("tools.crop:crop")],
            system="Be right.",
        ),
        num_envs=1,
        device=torch.device("cpu"),
    )
    ((system, *talk),) = environment.reset(torch.tensor([0])).conversations or ()
    assert system.text.startswith("Be right.\n\nBe short.\n\n# Tools")
    assert [(message.role, message.text) for message in talk] == [("user", "See?"), ("assistant", "Yes."), ("user", "And this?")]
    calls = [ToolCall("crop", {"image": image, "box": [0, 0, 20, 20]}) for image in (1, 2)]
    environment.step(Column.of([Message("assistant", (HermesCalls(HermesCalls.Config()).render(calls),))]))
    transcript = environment.transcript(0)
    shown = [call.result.pictures[0].image.getpixel((0, 0)) for call in transcript.calls]
    assert shown == [(255, 0, 0), (0, 0, 255)] and "Image 3 is" in transcript.calls[0].result.text
    assert [len(derived_pictures(transcript, call)) for call in transcript.calls] == [0, 1]
    environment.close()


def test_the_splits_share_nothing_and_lose_nothing(tmp_path: Path) -> None:
    def asked(path: str, **fields: Any) -> list[str]:
        questions = build("JsonlQuestions", path=path, **fields)
        return [questions.question(task_id).parts[0] for task_id in range(len(questions))]

    lines = [line(number) for number in range(400)]
    path = write(tmp_path, *lines, *lines[:50])
    train, held_out = (asked(path, split=split, held_out_share=0.25) for split in ("train", "held_out"))
    assert not set(train) & set(held_out)  # though fifty lines occur twice
    assert sorted(train + held_out) == sorted(entry["messages"][0]["content"] for entry in (*lines, *lines[:50]))
    assert 60 < len(set(held_out)) < 140
    assert asked(path, split="held_out", held_out_share=0.25, seed=1) != held_out
    (other := tmp_path / "other").mkdir()
    shuffled = asked(write(other, *lines[::-1]), split="held_out", held_out_share=0.25)
    assert shuffled[::-1] == [each for place, each in enumerate(held_out) if each not in held_out[:place]]
    named = write(other, *(line(number, id=f"pair {number // 2}") for number in range(100)))
    pairs = [
        {int(each.split()[2]) // 2 for each in asked(named, split=split, held_out_share=0.5)} for split in ("train", "held_out")
    ]
    assert not pairs[0] & pairs[1]


def test_pictures_are_opened_when_they_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    path = write(tmp_path, line(1), {"messages": user({"type": "image", "image": "broken.png"}), "answer": "x"})
    questions = build("JsonlQuestions", path=path, held_out_share=0.0)
    assert questions.question(0).references == ("2",)
    with pytest.raises(DataError, match=r"questions\.jsonl, line 2: the picture .*broken\.png cannot be read; mend it"):
        questions.question(1)


USER = {"role": "user", "content": "x"}
BAD: dict[str, Any] = {
    "is not JSON": "{",
    "must be a JSON object, got [1]": [1],
    "unknown key 'anwser'; did you mean 'answer'?": {"messages": user(), "anwser": 1},
    "must have either 'answer' or 'answers'": {"messages": user({"type": "text", "text": "x"})},
    "'answers' must be a list of at least one answer, got []": {"messages": [], "answers": []},
    "'answer' must be text or a number, got null": {"messages": [], "answer": None},
    "check.kind 'numbr' is unknown; did you mean 'number'?": line(1, check={"kind": "numbr"}),
    "'family' must be a string that is not empty, got 3": line(1, family=3),
    "'details' must be a JSON object, got [1]": line(1, details=[1]),
    "'messages' must be a list of messages, got null": {"answer": 1},
    "'messages' must be messages of users and assistants after at most one of the system, and end with a user's, got "
    '["user", "assistant"]': {"messages": [USER, {"role": "assistant", "content": "x"}], "answer": 1},
    "'messages' must be messages of users and assistants after at most one of the system, and end with a user's, got "
    '["user", "system", "user"]': {"messages": [USER, {"role": "system", "content": "x"}, USER], "answer": 1},
    "'messages.1.content' must be text or a list of parts, got null": {
        "messages": [USER, {"role": "assistant"}, USER],
        "answer": 1,
    },
    "holds half of a surrogate pair": line(1, family="\ud83d"),
    "'messages.0.content' must be text or a list of parts, got []": {"messages": user(), "answer": 1},
    "'messages.0.content.0' must be {type: text, text: ...} or {type: image, image: FILE}, got \"x\"": {
        "messages": user("x"),
        "answer": 1,
    },
    "'messages.0.content.1' must name a file beside the data set, got \"https://x/y.png\"": {
        "messages": user({"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "https://x/y.png"}}),
        "answer": 1,
    },
}


@pytest.mark.parametrize("sentence", BAD)
def test_a_bad_line_is_named(sentence: str, tmp_path: Path) -> None:
    path = write(tmp_path, line(1), BAD[sentence])
    with pytest.raises(DataError) as caught:
        build("JsonlQuestions", path=path)
    assert str(caught.value).startswith(f"{path}, line 2: {sentence}") and "\n" not in str(caught.value)


def test_all_bad_lines_are_named_up_to_ten(tmp_path: Path) -> None:
    path = write(tmp_path, *(entry for number in range(12) for entry in (line(number), {"answer": 1, "messages": 3})))
    with pytest.raises(DataError) as caught:
        build("JsonlQuestions", path=path)
    said = str(caught.value).splitlines()
    assert len(said) == 11 and said[-1] == "... and 2 more"
    assert [each.partition(":")[0] for each in said[:-1]] == [f"{path}, line {number}" for number in range(2, 22, 2)]


def test_no_file_a_missing_picture_and_an_empty_split(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl: the data set cannot be read .*set 'path' to a JSONL file"):
        build("JsonlQuestions", path=str(tmp_path / "nowhere.jsonl"))
    path = write(tmp_path, {"messages": user({"type": "image", "image": "gone.png"}), "answer": "x"})
    with pytest.raises(DataError, match=r"line 1: 'messages.0.content.0' names .*gone\.png, which is no file"):
        build("JsonlQuestions", path=path)
    path = write(tmp_path, line(1))
    with pytest.raises(DataError, match="none of its 1 lines is of split 'held_out'; change held_out_share or seed"):
        build("JsonlQuestions", path=path, split="held_out", held_out_share=0.0)
