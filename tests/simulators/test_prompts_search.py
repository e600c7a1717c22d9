"""Search: the real tools find what the questions need, the folder is this encyclopedia's or refused, none held out is asked."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import re
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mmrl.component import Component, Problems
from mmrl.errors import ConfigError, DataError
from mmrl.messages import Message, ToolResult
from mmrl.registry import install_command
from mmrl.transcripts import CallRecord, Turn
from simulators.prompts import blind_mark, texts
from simulators.prompts_parts.encyclopedia import RELATIONS
from simulators.prompts_parts.searching import ASKED
from tests.simulators.asking import build, picture, played, search_tools, text

if importlib.util.find_spec("bm25s") is None and os.environ.get("CI") != "true":
    pytest.skip(f"bm25s is not installed; install it with: {install_command('bm25s')}", allow_module_level=True)

WORLDS: dict[str, dict[str, Any]] = {
    "easy": {},
    "larger": {"entities": 300, "syllables": 30, "filler": 4, "world_seed": 3},
}


@pytest.mark.parametrize("fields", WORLDS.values(), ids=WORLDS)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_expert_answers_with_the_real_tools(fields: dict[str, Any], split: str, tmp_path: Path) -> None:
    questions = build("SearchQuestions", folder=str(tmp_path / "world"), hops=[0, 1, 2, 3], split=split, **fields)
    tools, right, paths = search_tools(questions.corpus, tmp_path), 0.0, Counter[tuple[str, ...]]()
    for task_id in range(200):
        question = questions.question(task_id)
        answer, calls = played(questions, question, tools)
        assert [call.error for call in calls] == [None] * len(calls)
        paths[question.details["path"]] += 1
        found = {name for call in calls for name in call.result.details["ids"]}
        *pages, last = question.details["evidence"]
        assert (last,) == question.references
        if question.check(answer) and found.issuperset(pages):  # another page may say the same by chance
            right += 1
            assert tuple(call.name for call in calls) == question.details["operations"]
    assert right >= 198
    assert set(paths) == set(ASKED)


def test_by_name_the_expert_needs_no_picture(tmp_path: Path) -> None:
    folder = str(tmp_path / "world")
    shown = build("SearchQuestions", folder=folder, hops=[1, 2, 3])
    named = build("SearchQuestions", folder=folder, hops=[1, 2, 3], start="name")
    tools, right = search_tools(named.corpus, tmp_path), 0
    for task_id in range(100):
        question, same = named.question(task_id), shown.question(task_id)
        assert (question.references, question.details["evidence"]) == (same.references, same.details["evidence"])
        (words,) = question.parts
        assert f"the device {question.details['name']}" in str(words) and question.details["name"] in named.devices
        assert text(same) == str(words).replace(f"the device {question.details['name']}", "this device")
        answer, calls = played(named, question, tools)
        assert {call.name for call in calls} == {"text_search"} and calls[0].arguments == {"query": question.details["name"]}
        if question.check(answer):
            right += 1
            assert tuple(call.name for call in calls) == question.details["operations"]
            assert len(calls) == len(question.details["path"])
    assert right >= 99


def test_the_expert_believes_what_the_tools_say_and_nothing_else(tmp_path: Path) -> None:
    questions = build("SearchQuestions", folder=str(tmp_path / "world"), hops=[2])
    question = questions.question(0)

    def told(name: str, arguments: dict[str, Any], said: str, error: str | None = None) -> Turn:
        return Turn(Message("assistant", ("",)), (CallRecord(name, arguments, ToolResult(said), error),))

    assert questions.next_turn(question, ())[1][0].name == "image_search"
    lost = told("image_search", {"image": 1}, "late", "timeout")
    assert questions.next_turn(question, (lost,)) == questions.next_turn(question, ())
    looked = told("image_search", {"image": 1}, "[1] Xyz (id: xyz, similarity 0.9)\n[2] Abc (id: abc, similarity 0.8)")
    said, (call,) = questions.next_turn(question, (lost, looked))
    assert said == "I search for Xyz." and call.arguments == {"query": "Xyz"}
    page = "\n\n".join(
        f"[{rank}] {name} (id: x)\nIt was invented by {inventor} in the town of {town}."
        for rank, name, inventor, town in ((1, "Abc", "Not", "Not"), (2, "Xyz", "Foo", "Bar"))
    )
    searched = told("text_search", {"query": "Xyz"}, page)
    _, (call,) = questions.next_turn(question, (looked, searched))
    assert call.arguments["query"] in ("Foo", "Bar") and len(question.details["path"]) == 2
    for nothing in ("No document matches; try other words.", "[1] Abc (id: abc)\nAbc is a device."):
        assert questions.next_turn(question, (looked, told("text_search", {"query": "Xyz"}, nothing))) == ("unknown", ())
    assert questions.next_turn(question, (told("image_search", {"image": 1}, "nothing"),)) == ("unknown", ())


def test_answers_are_what_the_pages_say(tmp_path: Path) -> None:
    """Read from the corpus file by regular expressions of their own."""
    questions = build("SearchQuestions", folder=str(tmp_path / "world"), hops=[1, 2, 3])
    pages = {page["title"]: page["text"] for page in map(json.loads, questions.corpus.read_text().splitlines())}
    words = {
        "inventor": r"invented by ([A-Z]\w+) ",
        "town": r"town of ([A-Z]\w+) ",
        "year": r"year (\d{4})\.",
        "colour": r"case is ([a-z]+)\.",
        "home": r"born in ([A-Z]\w+) ",
        "river": r"river ([A-Z]\w+) ",
    }
    assert set(words) == set(RELATIONS)
    for page in pages.values():
        assert all(len(re.findall(pattern, page)) <= 1 for pattern in words.values())
        assert 10 <= len(page.split()) <= 24
    for task_id in range(100):
        question = questions.question(task_id)
        read = question.details["evidence"][:-1]
        name = next(title for title in pages if title.lower() == read[0])
        assert len(read) == len(question.details["path"])
        for relation in question.details["path"]:
            name = re.findall(words[relation], pages[name])[0]
        assert (name,) == question.references
        assert question.references[0] not in text(question)


def test_devices_held_out_have_pages_and_are_never_asked_about(tmp_path: Path) -> None:
    folder = str(tmp_path / "world")
    train, held_out = (build("SearchQuestions", folder=folder, split=split) for split in ("train", "held_out"))
    assert len(train.devices) == 80 and len(held_out.devices) == 20
    assert set(train.devices) | set(held_out.devices) == set(train.world.devices)
    asked = [{questions.question(task_id).details["evidence"][0] for task_id in range(800)} for questions in (train, held_out)]
    assert asked[0] == {name.lower() for name in train.devices} and asked[1] == {name.lower() for name in held_out.devices}


def test_a_picture_is_never_the_encyclopedia_s_own(tmp_path: Path) -> None:
    questions = build("SearchQuestions", folder=str(tmp_path / "world"))
    keys = {questions.world.picture(name, 84).tobytes() for name in questions.devices}
    assert len(keys) == len(questions.devices)
    assert all(picture(questions.question(task_id)).image.tobytes() not in keys for task_id in range(50))


def test_nobody_knows_the_answers_by_heart(tmp_path: Path) -> None:
    questions = build("SearchQuestions", folder=str(tmp_path / "world"), hops=[1, 2])
    assert blind_mark(questions, 600) < 0.25


def test_the_words_are_few(tmp_path: Path) -> None:
    questions = build("SearchQuestions", folder=str(tmp_path / "world"), hops=[0, 1, 2, 3])
    said = list(texts(questions, 100, search_tools(questions.corpus, tmp_path)))
    assert any(line.startswith("[1] ") for line in said) and any('"query"' in line for line in said)
    words = set(re.findall(r"[a-z]+", " ".join(said).lower()))
    assert len(words - {name.lower() for name in questions.world.entries} - _rivers(questions)) < 75


def _rivers(questions: Any) -> set[str]:
    return {entry.facts["river"].lower() for entry in questions.world.entries.values() if "river" in entry.facts}


# ---------------------------------------------------------------- the folder


def settings(folder: Path, **fields: Any) -> dict[str, Any]:
    return {"folder": str(folder), "entities": 10, "towns": 3, "rivers": 2, "syllables": 8, **fields}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_folder_is_written_once(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "world"
    build("SearchQuestions", **settings(folder))
    before, age = contents(folder), (folder / "corpus.jsonl").stat().st_mtime_ns
    assert len(before) == 12 and list(folder.parent.iterdir()) == [folder]
    build("SearchQuestions", **settings(folder, split="held_out", seed=5, hops=[3]))
    assert contents(folder) == before and (folder / "corpus.jsonl").stat().st_mtime_ns == age
    empty = tmp_path / "empty"
    empty.mkdir()
    build("SearchQuestions", **settings(empty))
    assert contents(empty) == before


def test_what_is_not_this_encyclopedia_s_is_refused_and_left_alone(tmp_path: Path) -> None:
    folder, mine = tmp_path / "world", tmp_path / "mine"
    build("SearchQuestions", **settings(folder))
    before = contents(folder)
    with pytest.raises(
        ConfigError, match=r"world: holds the encyclopedia of other settings \(entities 10 instead of 11\); set 'fol"
    ):
        build("SearchQuestions", **settings(folder, entities=11))
    assert contents(folder) == before
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"mine: holds something else than an encyclopedia of questions; set 'folder' to one"):
        build("SearchQuestions", **settings(mine))
    assert contents(mine) == {"thesis.txt": b"years of work"}
    for name in ("corpus.jsonl", "pictures/" + next((folder / "pictures").iterdir()).name):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(kept + b"\n")
        with pytest.raises(DataError, match=r"world: files of the encyclopedia were changed; delete the folder"):
            build("SearchQuestions", **settings(folder))
        (folder / name).write_bytes(kept)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file"):
        build("SearchQuestions", **settings(tmp_path / "file"))
    with pytest.raises(ConfigError, match="cannot be written"):
        build("SearchQuestions", **settings(tmp_path / "file" / "below"))


def test_several_at_once_write_one_folder(tmp_path: Path) -> None:
    folder, failures = tmp_path / "world", []

    def one() -> None:
        try:
            build("SearchQuestions", **settings(folder))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and list(tmp_path.iterdir()) == [folder]
    build("SearchQuestions", **settings(folder))


def _first(fields: dict[str, Any], queue: Any) -> None:
    question = build("SearchQuestions", **fields).question(7)
    queue.put((question.parts[1], question.references, picture(question).key))


def test_another_process_asks_and_writes_the_same(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_first, args=(settings(tmp_path / "theirs"), queue))
    process.start()
    theirs = queue.get(timeout=120)
    process.join()
    question = build("SearchQuestions", **settings(tmp_path / "ours")).question(7)
    assert theirs == (question.parts[1], question.references, picture(question).key)
    assert contents(tmp_path / "theirs") == contents(tmp_path / "ours")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"hops": [4]}, r"hops must be numbers from 0 to 3; got \[4\]"),
        ({"hops": []}, "hops must be distinct"),
        ({"hops": [0, 1], "start": "name"}, "hops has 0, which asks for a device's name, but start 'name' says it"),
        ({"entities": 200}, "syllables 20 make 390 names, but 424 are needed; raise syllables"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Problems, match=sentence):
        Component.parse({"target": "simulators.prompts:SearchQuestions", "folder": "somewhere", **fields})
