"""Conversations on the page: what stands in the list, what a browser shows when one is opened, and what the filters leave."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmrl import report
from mmrl.keeping import write_conversation
from mmrl.messages import Message, Picture, ToolResult
from mmrl.report.charts import chart_data
from mmrl.report.run import load
from mmrl.transcripts import CallRecord, Question, Transcript, Turn
from tests.core.test_report import CONFIG, Inspector, data_of, open_in_chromium, text_of

ATTACK = "<img src=x onerror=\"console.log('attacked')\"></script><script>console.log('attacked')</script> & more"
PICTURE = Picture(Image.new("RGB", (60, 40), (200, 30, 30)))
CUT = PICTURE.derived(Image.new("RGB", (20, 10), (30, 30, 200)), (1, 0, 15, 0, 1, 20), 0)
LONG = "\n".join(f"line {i} of a long result" for i in range(40))


def conversation(
    folder: Path, n: int, *, success: bool, tools: tuple[str, ...] = (), example: tuple[Message, ...] = (), **about: Any
) -> None:
    """Task ``n``, after ``example``: a call of each tool (``fail`` fails) and an answer, with tokens of two letters."""
    asked = Message("user", (PICTURE, f"Question {n}?"))
    calls = tuple(
        CallRecord(
            "" if name == "fail" else name,
            {"box": [1, 2], "text": ATTACK},
            ToolResult(LONG, (CUT,)),
            *(["malformed"] * (name == "fail")),
            seconds=0.25,
        )
        for name in tools
    )
    replies = tuple(Message("tool", (LONG, CUT)) for _ in tools)
    called = [Turn(Message("assistant", ("I look. " + ATTACK,)), calls, replies)] if tools else []
    turns = (*called, Turn(Message("assistant", ("yes" if success else "no",), finish="stop")))
    question = Question("tale", asked.parts, ("yes",), lambda answer: float(answer == "yes"), {"box": (5, 5, 30, 30)})
    opening = (Message("system", ("Be good. " * 200,)), *example, asked)
    told = Transcript(n, question, opening, turns, "yes" if success else "no", "answer")
    worth = 0.5 if success else -0.5
    learned = []
    for turn in turns:
        text = turn.message.text
        pieces = [[text[at : at + 2], -0.25, worth] for at in range(0, len(text), 2)]
        learned.append({"reward": 0.0, "advantage": worth, "tokens": [*pieces, ["<end>", -1.5, None]]})
    facts = {"label": "training", "stage": "improve", "iteration": 1, "task_id": n, "family": "tale", "success": success}
    facts |= {
        "instruction": f"Question {n}?",
        "timed_out": False,
        "return": n / 10,
        "rewards": [{"name": "right", "score": 1.0, "weight": 2.0}],
    }
    write_conversation(folder, f"improve-training-{n:06d}", told, facts | about, learned if about.get("label") != "after" else ())


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "talks"
    run.mkdir()
    (run / "config.yaml").write_text(CONFIG)
    folder = run / "trajectories"
    conversation(folder, 0, success=True, tools=("crop",))
    conversation(folder, 1, success=False)
    once = (Message("user", (PICTURE, "Once?")), Message("assistant", ("yes",)))
    conversation(folder, 2, success=True, tools=("crop", "search"), example=once)
    conversation(folder, 3, success=False, tools=("fail",), iteration=2, instruction=ATTACK)
    conversation(folder, 4, success=True, label="after", iteration=None)
    return run


@pytest.fixture(scope="module")
def page(run_dir: Path) -> str:
    return report.build(run_dir).read_text(encoding="utf-8")


def test_the_list_says_what_each_conversation_came_to(page: str) -> None:
    text = text_of(page)
    assert "Question 2? success · training improve · iteration 1 · tale · task 2 crop search 0.2 reward" in text
    assert "Question 1? failure · training improve · iteration 1 · tale · task 1 0.1 reward" in text
    assert "task 3 1 failed 0.3 reward" in text and "success · after improve · tale · task 4" in text
    assert '<a href="#conversations">' in page and 'href="#rollouts"' not in page


def test_the_page_asks_for_nothing_and_holds_each_picture_once(run_dir: Path, page: str) -> None:
    inspector = Inspector()
    inspector.feed(page)
    assert inspector.outside == [] and inspector.scripts == 2
    data = json.loads(data_of(page))
    assert len(data["conversations"]) == 5 and len(data["pictures"]) == 2
    assert page.count("base64,") == 2
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", page)


def test_hostile_texts_are_data_or_text(page: str) -> None:
    assert html.escape(ATTACK, quote=False) in page.replace("&#34;", '"').replace("&#39;", "'")
    assert ATTACK not in page and "<img src=x" not in page


def test_damaged_conversations_are_counted_and_the_others_shown(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    folder = tmp_path / "trajectories"
    for n in range(6):
        conversation(folder, n, success=True, tools=("crop",))
    secret = tmp_path / "secret.webp"
    secret.write_bytes(b"secret")
    paths = sorted(folder.glob("*.json"))

    def damage(n: int, change: Any) -> None:
        record = json.loads(paths[n].read_text())
        change(record)
        paths[n].write_text(json.dumps(record))

    damage(0, lambda record: record["pictures"][0].update(file="../secret.webp"))
    damage(1, lambda record: record["messages"][1].update(parts=[7]))
    damage(2, lambda record: record["messages"][2]["calls"][0].update(reply=99))
    damage(3, lambda record: record.update(messages=3))
    paths[4].write_text("{")
    damage(5, lambda record: record["messages"][2]["tokens"][0].__setitem__(1, float("nan")))
    for picture in json.loads(paths[5].read_text())["pictures"][:1]:
        (folder / picture["file"]).unlink()
    loaded = load(tmp_path)
    assert [talk.task_id for talk in loaded.recorded.talks.shown] == ["5"]
    assert "4 recorded conversations could not be read." in loaded.notices
    assert "1 recorded rollout could not be read." in loaded.notices
    page = report.build(tmp_path).read_text()
    data = json.loads(data_of(page))
    assert data["conversations"][0]["messages"][2]["tokens"][0][1] is None and len(data["pictures"]) == 1


def test_many_conversations_are_thinned_out_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmrl.report.conversations.MAX_CONVERSATIONS", 4)
    (tmp_path / "config.yaml").write_text(CONFIG)
    for n in range(12):
        conversation(tmp_path / "trajectories", n, success=n % 2 == 0, iteration=1 + n // 6)
    talks = load(tmp_path).recorded.talks
    assert talks.left_out == 8
    assert [(talk.iteration, talk.success) for talk in talks.shown] == [(1, True), (1, False), (2, True), (2, False)]
    assert "8 more in the run's folder trajectories" in text_of(report.build(tmp_path).read_text())


def test_pictures_beyond_the_room_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    conversation(tmp_path / "trajectories", 0, success=True, tools=("crop",))
    sizes = sorted(path.stat().st_size for path in (tmp_path / "trajectories/pictures").iterdir())
    monkeypatch.setattr("mmrl.report.conversations.MAX_PICTURE_BYTES", sizes[0])
    assert len(load(tmp_path).recorded.talks.pictures) == 1


def test_numbers_of_conversations_have_charts_of_their_own() -> None:
    names = {
        "scores": ["reward/correct", "reward/success"],
        "failed": ["reward/correct/failed"],
        "terms": ["reward/correct/answered"],
        "tools": ["agent/faithful_rate", "agent/tool_rate", "agent/tool_success_rate"],
        "endings": ["agent/answered", "agent/truncated"],
        "turns": ["agent/calls", "agent/turns"],
        "tokens": ["agent/tokens_per_turn"],
        "tool_seconds": ["agent/seconds/crop"],
        "tool_errors": ["agent/errors/timeout"],
        "success": ["rollout/success"],
    }
    values = {name: float(i) for i, name in enumerate(name for each in names.values() for name in each)}
    data = chart_data([{"kind": "train", "stage": "a", "iteration": 1, "step": 1, "seconds": 1.0, **values}])
    assert {panel["key"]: [series["name"] for series in panel["series"]] for panel in data["panels"]} == names
    groups = {panel["key"]: panel["group"] for panel in data["panels"]}
    assert (groups["scores"], groups["tools"], groups["failed"], groups["success"]) == ("rewards", "agents", "other", "learning")


# ---------------------------------------------------------------- in a browser


DRIVER = """
;(() => {
  const form = document.querySelector("#conversations .filters"), cards = [...document.querySelectorAll(".talk")];
  const asked = JSON.parse(REQUESTS), answers = [];
  for (const request of asked) {
    form.reset();
    for (const [name, value] of Object.entries(request)) form.elements[name].value = value;
    form.dispatchEvent(new Event("input", { bubbles: true }));
    const task = (card) => Number(card.querySelector(".muted").textContent.match(/task (\\d+)/)[1]);
    answers.push([cards.filter((card) => !card.hidden).map(task).sort(), document.getElementById("count-talks").textContent]);
  }
  document.body.append(Object.assign(document.createElement("pre"), { id: "answers", textContent: JSON.stringify(answers) }));
  for (const card of cards) card.open = true;
  const more = document.getElementById("more-talks");
  if (!more.hidden) more.click();
})();
"""
# What is asked for, and the tasks that fit.
REQUESTS: list[tuple[dict[str, str], list[int]]] = [
    ({}, [0, 1, 2, 3, 4]),
    ({"outcome": "success"}, [0, 2, 4]),
    ({"when": "after improve"}, [4]),
    ({"tool": "tool crop"}, [0, 2]),
    ({"tool": "tool search"}, [2]),
    ({"tool": "any"}, [0, 2]),
    ({"tool": "none"}, [1, 3, 4]),
    ({"tool": "failed"}, [3]),
    ({"low": "0.1", "high": "0.3"}, [1, 2, 3]),
    ({"low": "0.15"}, [2, 3, 4]),
    ({"text": "QUESTION 2"}, [2]),
    ({"text": "long result"}, [0, 2, 3]),
    ({"text": "search("}, [2]),
    ({"text": "nowhere"}, []),
    ({"tool": "any", "outcome": "success", "high": "0.1"}, [0]),
]


def opened(run_dir: Path, profile: Path, monkeypatch: pytest.MonkeyPatch, driver: str) -> tuple[str, list[str]]:
    """The document after ``driver`` ran behind the page's scripts, and the console."""
    real = report._part
    monkeypatch.setattr(report, "_part", lambda name: real(name) + (driver if name == "conversations.js" else ""))
    dom, console = open_in_chromium(report.build(run_dir), profile)
    return re.sub(r"<script\b.*?</script>", "", dom, flags=re.S), console


def test_filters_and_opened_conversations_in_a_browser(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = DRIVER.replace("REQUESTS", json.dumps(json.dumps([request for request, _ in REQUESTS])))
    dom, console = opened(run_dir, tmp_path / "profile", monkeypatch, driver)
    assert console == []
    found = re.search(r'<pre id="answers">(.*?)</pre>', dom, flags=re.S)
    assert found is not None
    answers = json.loads(html.unescape(found[1]))
    assert answers == [[tasks, f"{len(tasks)} of 5 conversations match"] for _, tasks in REQUESTS]
    cards = dom.split('<details class="talk')[1:]
    by_task = {int(re.search(r"task (\d+)", card)[1]): card for card in cards}  # type: ignore[index]
    text = text_of(by_task[2])
    assert "policy · turn 1 advantage +0.5" in text and "policy · turn 2" in text and "× 2" in text
    assert "crop(" in text and "search(" in text and "0.25 s" in text and f"{len(LONG)} characters" in text
    assert by_task[2].count('class="fold"') == 3  # the system message and two results
    pieces = (len(f"I look. {ATTACK}") + 1) // 2 + 2  # of two letters, of both messages
    assert len(re.findall(r'<span class="t up" data-i="\d+">', by_task[2])) == pieces
    assert len(re.findall(r'<span class="t " data-i="\d+">&lt;end&gt;</span>', by_task[2])) == 2
    assert 'class="t down"' in by_task[1] and 'class="t up"' not in by_task[1] and "data-i" not in by_task[4]
    assert "✕ malformed" in text_of(by_task[3]) and "a call that could not be read" in by_task[3]
    assert "left: 25%; top: 50%; width: 33.33%; height: 25%" in by_task[2]  # the crop in what it was cut from
    images = by_task[2].split("<img")[1:]  # an example's, the question's, and what two calls gave
    assert ["box evidence" in image for image in images] == [False, True, False, False], "the evidence is the question's"
    assert ["image 1 · 60 × 40" in images[at] for at in (0, 1)] == [True, True] and "image 2 · 20 × 10 · of image 1" in images[2]
    assert "attacked" in html.unescape(text) and "<img src=" not in re.sub(r'<img src="data:', "", dom)


def test_two_hundred_conversations_open_at_once_and_show_thirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    for n in range(200):
        conversation(tmp_path / "trajectories", n, success=n % 3 == 0, tools=("crop",) * (n % 2), iteration=1 + n // 20)
    shown = "const seen = document.querySelectorAll('.talk:not([hidden])').length, more = document.getElementById('more-talks');"
    driver = f"\n;{shown} document.body.dataset.seen = `${{seen}} ${{more.textContent}}`; more.click();"
    driver += " document.body.dataset.all = document.querySelectorAll('.talk:not([hidden])').length;"
    dom, console = opened(tmp_path, tmp_path / "profile", monkeypatch, driver)
    assert console == []
    assert 'data-seen="30 Show 170 more"' in dom and 'data-all="200"' in dom and "200 of 200 conversations match" in dom
