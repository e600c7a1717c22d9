"""The judge against a local server: what it sends, how it reads replies, repeats and keeps them, fails, and guards its key."""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmrl.errors import ConfigError
from mmrl.messages import Message, Picture
from mmrl.rewards.judge import Judge
from tests.rewards.tales import PICTURE, question, said, tale, used
from tests.rewards.tiny_encoders import drawn, noise
from tests.tools.servers import Server, free_port, reply, serving

KEY = "s3cret-k3y-0815"


class Endpoint:
    """Answers chat completions with what ``say`` makes of the request's text. requests: bodies and headers that came."""

    def __init__(self, server: Server, say: Callable[[str], str] = lambda text: "Score: 1") -> None:
        self.say, self.requests, self.headers = say, [], []
        self.refusals: list[dict[str, Any]] = []  # answers that come first
        self._lock = threading.Lock()
        server.answers["/v1/chat/completions"] = self

    def __call__(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            self.requests.append(body)
            self.headers.append(dict(handler.headers))
            refusal = self.refusals.pop(0) if self.refusals else None
        if refusal is not None:
            reply(handler, b"{}", **refusal)
            return
        text = self.say("".join(part.get("text", "") for part in body["messages"][-1]["content"]))
        reply(handler, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode())


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def judge(server: Server, tmp_path: Path, **fields: Any) -> Judge:
    own = {"url": server.url("/v1"), "model": "sage", "backoff_s": 0.01, "cache": str(tmp_path), **fields}
    return Judge(Judge.Config(**own))


def test_what_is_asked(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    endpoint = Endpoint(server)
    asks = judge(server, tmp_path, key_env="JUDGE_KEY", system="Be fair.", max_tokens=9, fields={"seed": 4})
    assert asks([tale(answer="{question} no")]) == [1.0]
    (body,), (headers,) = endpoint.requests, endpoint.headers
    assert headers["Authorization"] == f"Bearer {KEY}"
    content = body.pop("messages")
    assert body == {"model": "sage", "temperature": 0.0, "max_tokens": 9, "seed": 4}
    assert content[0] == {"role": "system", "content": "Be fair."}
    text, image = content[1]["content"]
    assert "Question: Is it so?\nReference: yes\nAnswer: {question} no\n" in text["text"]
    kind, _, data = image["image_url"]["url"].partition(";base64,")
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/png" and shown.tobytes() == PICTURE.image.tobytes() and shown.size == PICTURE.image.size


def test_pictures_and_conversation_are_shown_if_asked_for(server: Server, tmp_path: Path) -> None:
    endpoint = Endpoint(server)
    call = used("crop", box=(1, 1, 5, 5))
    about = question()
    replied = Message("tool", ("cut", call.result.pictures[0]))
    told = tale([call], about=about, thought="look")
    turn = type(told.turns[0])(told.turns[0].message, told.turns[0].calls, (replied,))
    told = type(told)(0, about, told.opening, (turn, told.turns[1]), told.answer, told.ended)
    for pictures, count in (("none", 0), ("question", 1), ("all", 2)):
        judge(server, tmp_path, pictures=pictures, prompt="{conversation}|{unknown}")([told])
        text, *images = endpoint.requests[-1]["messages"][0]["content"]
        assert len(images) == count
    assert (
        text["text"]
        == "[user] Is it so?\n[assistant] look\n[tool] cut\n[assistant] <think>hm</think><answer>yes</answer>|{unknown}"
    )


@pytest.mark.parametrize(
    ("said", "fields", "score"),
    [
        ("Score: 1", {}, 1.0),
        ("I first thought score: 0.\n**Score:** 0.5", {}, 0.5),
        ("SCORE 0", {}, 0.0),
        ("Score: 7", {"low": 1, "high": 9}, 0.75),
        ("Score: 2", {}, math.nan),
        ("Score: -1", {}, math.nan),
        ("It is right.", {}, math.nan),
        ("", {}, math.nan),
        ("so: Yes", {"score": r"(yes|no)\b", "words": {"yes": 1.0, "no": 0.25}}, 1.0),
        ("yes... but NO", {"score": r"(yes|no)\b", "words": {"yes": 1.0, "no": 0.25}}, 0.25),
        ("perhaps", {"score": r"(\w+)", "words": {"yes": 1.0}}, math.nan),
        ("perhaps", {"score": r"(\w+)"}, math.nan),
    ],
)
def test_replies_are_read(server: Server, tmp_path: Path, said: str, fields: dict[str, Any], score: float) -> None:
    endpoint = Endpoint(server, lambda text: said)
    asks = judge(server, tmp_path, **fields)
    for number in (1, 2):
        (got,) = asks.ask([("?",)])
        assert got == score or (math.isnan(got) and math.isnan(score))
        # What has a score is kept, what has none is asked again.
        assert len(endpoint.requests) == (number if math.isnan(score) else 1)
    assert (asks.failure is None) is not math.isnan(score)


def test_scores_belong_to_their_questions_and_run_at_the_same_time(server: Server, tmp_path: Path) -> None:
    together = threading.Barrier(6, timeout=20)

    def say(text: str) -> str:
        together.wait()  # all are under way at once
        number = int(text.split()[-1])
        time.sleep(0.02 * (6 - number))  # the first answers last
        return f"Score: 0.{number}"

    Endpoint(server, say)
    asks = judge(server, tmp_path, concurrency=6)
    assert asks.ask([(f"number {n}",) for n in (*range(6), 2, 0)]) == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.2, 0.0]
    assert asks.ask([]) == []


def test_the_same_content_is_asked_once_and_other_content_again(server: Server, tmp_path: Path) -> None:
    endpoint = Endpoint(server)
    other = Picture(Image.new("RGB", PICTURE.image.size))
    prompts = [("a", PICTURE), ("a", PICTURE), ("a", other), ("b", PICTURE), ("a",)]
    first = judge(server, tmp_path)
    assert first.ask(prompts) == [1] * 5 and len(endpoint.requests) == 4 and first.terms == {"from_disk": 0.0}
    again = judge(server, tmp_path)
    same = Picture(PICTURE.image.copy())
    assert again.ask([("a", same), ("new",)]) == [1, 1] and len(endpoint.requests) == 5 and again.terms == {"from_disk": 0.5}
    for change in ({"model": "other"}, {"temperature": 0.5}, {"system": "x"}, {"fields": {"seed": 1}}, {"keep": False}):
        judge(server, tmp_path, **change).ask([("a", PICTURE)])
    assert len(endpoint.requests) == 10


def test_a_reply_is_read_anew_with_other_rules(server: Server, tmp_path: Path) -> None:
    endpoint = Endpoint(server, lambda text: "Score: 1, out of 4")
    assert judge(server, tmp_path).ask([("a",)]) == [1.0]
    assert judge(server, tmp_path, high=4.0).ask([("a",)]) == [0.25] and len(endpoint.requests) == 1


def test_failures_are_repeated_where_that_may_help(server: Server, tmp_path: Path) -> None:
    endpoint = Endpoint(server)
    endpoint.refusals = [{"status": 503}, {"status": 429, "Retry_After": "1"}]
    started = time.monotonic()
    assert judge(server, tmp_path, retries=2).ask([("a",)]) == [1.0]
    assert len(endpoint.requests) == 3 and time.monotonic() - started >= 1.0
    endpoint.refusals = [{"status": 500}] * 3
    asks = judge(server, tmp_path, retries=2)
    assert math.isnan(asks.ask([("b",)])[0]) and len(endpoint.requests) == 6
    assert asks.failure == "127.0.0.1 answered with status 500"
    assert asks.ask([("b",)]) == [1.0]  # a failure is not kept


def test_a_refused_key_is_not_tried_again_and_named_nowhere(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    endpoint = Endpoint(server)
    endpoint.refusals = [{"status": 401}]
    asks = judge(server, tmp_path, key_env="JUDGE_KEY")
    with caplog.at_level(logging.DEBUG):
        assert math.isnan(asks.ask([("a",)])[0]) and len(endpoint.requests) == 1
        assert asks.ask([("b",)]) == [1.0]
    assert asks.failure == "127.0.0.1 refuses the key in JUDGE_KEY (status 401)"
    kept = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) == 1 and KEY not in "".join([caplog.text, repr(asks.config), *kept])
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1 needs a key: put it into the environment variable JUDGE_KEY"):
        judge(server, tmp_path, key_env="JUDGE_KEY")


def test_a_redirect_is_not_followed(server: Server, tmp_path: Path) -> None:
    endpoint = Endpoint(server)
    endpoint.refusals = [{"status": 307, "Location": server.url("/elsewhere")}]
    asks = judge(server, tmp_path)
    assert math.isnan(asks.ask([("a",)])[0]) and server.seen == ["/v1/chat/completions"]
    assert asks.failure == "127.0.0.1 answered with status 307"


def test_no_server_a_slow_one_and_one_that_speaks_otherwise(server: Server, tmp_path: Path) -> None:
    away = judge(server, tmp_path, url=f"http://127.0.0.1:{free_port()}/v1", retries=1)
    assert math.isnan(away.ask([("a",)])[0]) and "could not be reached" in (away.failure or "")
    Endpoint(server, lambda text: time.sleep(0.5) or "Score: 1")  # type: ignore[func-returns-value]
    slow = judge(server, tmp_path, retries=0, timeout_s=0.1)
    assert math.isnan(slow.ask([("a",)])[0]) and "within 0.1 s" in (slow.failure or "")
    for content in (b"<html>", b"[]", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}'):
        server.answers["/v1/chat/completions"] = lambda handler, content=content: (
            handler.rfile.read(int(handler.headers["Content-Length"])),
            reply(handler, content),
        )[0]
        other = judge(server, tmp_path)
        assert math.isnan(other.ask([("a",)])[0]) and "gave no chat completion" in (other.failure or "")


def test_one_that_fails_harms_no_other(server: Server, tmp_path: Path) -> None:
    Endpoint(server, lambda text: "who knows" if "2" in text else "Score: 0.5")
    scores = judge(server, tmp_path, prompt="{answer}")([tale(answer="1"), tale(answer="2"), tale(answer="3")])
    assert scores[0] == scores[2] == 0.5 and math.isnan(scores[1])


def test_without_an_answer_nobody_is_asked(server: Server, tmp_path: Path) -> None:
    endpoint = Endpoint(server)
    tales = [tale(answer=None), tale()]
    assert judge(server, tmp_path)(tales) == [0.0, 1.0] and len(endpoint.requests) == 1
    assert judge(server, tmp_path, unanswered=None)(tales) == [1.0, 1.0]
    assert judge(server, tmp_path)([tale([said("x")], answer=None)]) == [0.0]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"url": "ftp://a.test/v1"}, "url must begin with http"),
        ({"url": "http://a.test/v1?key=abc"}, "hold no query"),
        ({"url": "http://me:pw@a.test/v1"}, "no user name"),
        ({"low": 1.0}, r"low is 1, which must be less than high \(1\)"),
        ({"score": "(a"}, "no regular expression"),
        ({"score": "a"}, "must have one group"),
    ],
)
def test_settings_that_do_not_fit(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        Judge.Config(**{"url": "http://a.test/v1", "model": "m", **fields})
    assert (
        "abc" not in str(error.value).replace("abcdef", "").split("[type")[0] and "pw" not in str(error.value).split("[type")[0]
    )


def test_a_generated_picture_is_shown_by_itself(server: Server, tmp_path: Path) -> None:
    endpoint = Endpoint(server, lambda text: "Score: 4")
    asks = judge(server, tmp_path, pictures="answer", prompt="Caption: {prompt}", low=1, high=5)
    edited = drawn(noise(5), "a red cat")
    shown = Picture(noise(6))
    edited = type(edited)(0, edited.question, (Message("user", (shown, "so")),), edited.turns, "", "answer")
    assert asks([edited]) == [0.75]
    text, image = endpoint.requests[-1]["messages"][0]["content"]
    sent = Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].partition(";base64,")[2])))
    assert text["text"] == "Caption: a red cat" and sent.tobytes() == noise(5).tobytes()
