"""Rewards behind HTTP: a real server process, the reward that asks it, and everything that either may be given wrongly."""

from __future__ import annotations

import http.client
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmrl.component import Component
from mmrl.config import load_as
from mmrl.errors import ConfigError
from mmrl.messages import Message, Picture
from mmrl.registry import ROOT
from mmrl.rewarding import RewardBlock
from mmrl.rewards.compress import Compress
from mmrl.rewards.remote import Remote
from mmrl.rewards.wire import packed, png, unpacked
from mmrl.serving import RewardServer, ServingConfig
from mmrl.transcripts import Question, Transcript, Turn
from tests.rewards.fickle import fickle
from tests.rewards.tiny_encoders import drawn, noise
from tests.tools.servers import free_port, reply, serving

KEY = "s3cret-k3y-0816"
Serve = Callable[..., RewardServer]


def block(component: Component, name: str) -> RewardBlock:
    return RewardBlock(component.target, component.cls, component.config, name, 1.0)


@pytest.fixture
def serve() -> Iterator[Serve]:
    opened: list[RewardServer] = []

    def build(**fields: Any) -> RewardServer:
        server = RewardServer(ServingConfig(**{"rewards": [block(fickle(), "fickle")], "port": 0, **fields}))
        threading.Thread(target=server.run, daemon=True).start()
        opened.append(server)
        return server

    yield build
    for server in opened:
        server.close()


def red(level: int, prompt: str = "red") -> Transcript:
    return drawn(Image.new("RGB", (4, 4), (level, 0, 0)), prompt)


def remote(url: str, **fields: Any) -> Remote:
    return Remote(Remote.Config(**{"url": url, "backoff_s": 0.01, "retries": 1, "timeout_s": 20.0, **fields}))


def ask(server: RewardServer, body: Any, path: str = "/score", method: str = "POST", **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
    connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body).encode(), headers)
    answer = connection.getresponse()
    content = json.loads(answer.read() or b"null")
    connection.close()
    return answer.status, content


def sample(level: int = 51, **fields: Any) -> dict[str, Any]:
    return {"turns": [[{"png": png(Image.new("RGB", (4, 4), (level, 0, 0)))}]], **fields}


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """(address, process) of ``mmrl serve-rewards``."""
    folder = tmp_path_factory.mktemp("serving")
    config = folder / "serve.yaml"
    config.write_text("port: 0\nrewards: [{name: small, target: 'mmrl.rewards.compress:Compress', quality: 80}]\n")
    command = [sys.executable, "-m", "mmrl", "serve-rewards", str(config), "rewards.small.quality=90"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as run:
        assert run.stdout is not None
        line = run.stdout.readline().strip()
        assert line.startswith("small at http://127.0.0.1:"), line
        yield line.removeprefix("small at "), run
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=20) == 0


def test_a_server_process_gives_the_scores_that_the_reward_gives_here(process: tuple[str, Any]) -> None:
    told = [drawn(noise(seed, (24, 16 + seed))) for seed in range(7)]
    here = Compress(Compress.Config(quality=90))
    asks = remote(process[0], batch=3, concurrency=2)
    assert asks([*told, drawn(None)])[:7] == here(told)
    assert asks.failure is None
    waits = [asks.begin(told[:2]), asks.begin(told[2:])]
    assert waits[1]() == here(told[2:]) and waits[0]() == here(told[:2])


def test_health(process: tuple[str, Any], serve: Serve) -> None:
    connection = http.client.HTTPConnection(process[0].removeprefix("http://"), timeout=20)
    connection.request("GET", "/health")
    assert json.loads(connection.getresponse().read()) == {"status": "ok", "rewards": ["small"], "running": 0}
    connection.close()
    assert ask(serve(), b"", "/nowhere", "GET")[0] == 404


def test_the_example_s_config_is_one() -> None:
    config = load_as(ServingConfig, ROOT / "configs/serve/rewards.yaml")
    assert [block.name for block in config.rewards] == ["ocr", "small"]


# ---------------------------------------------------------------- what travels


def test_a_conversation_arrives_as_it_was_sent() -> None:
    parts = (Picture(noise(1)), "make it red")
    details = {"prompt": "red", "words": ("OPEN", "24h"), "include": [{"class": "dog", "count": 1}], "tag": "colors"}
    question = Question("edit", parts, ("so",), lambda answer: 0.25, details)
    turns = (Turn(Message("assistant", ("first", Picture(noise(2))))), Turn(Message("assistant", (Picture(noise(3)),))))
    told = Transcript(7, question, (Message("user", parts),), turns, "x", "length")
    got = unpacked(packed(told), 2**20)
    assert (got.task_id, got.answer, got.ended, got.mark) == (7, "x", "length", 0.25)
    assert got.question.details == {**details, "words": ["OPEN", "24h"]} or got.question.details == details
    assert (got.question.family, got.question.references) == ("edit", ("so",))

    def plain(conversation: Transcript) -> list[Any]:
        parts = [part for message in conversation.messages for part in message.parts]
        return [part if isinstance(part, str) else part.key for part in parts]

    assert plain(got) == plain(told)
    assert (
        unpacked(type(packed(told)).model_validate_json(packed(told).model_dump_json()), 2**20).question.details["tag"]
        == "colors"
    )


def test_what_is_no_number_travels_as_null(serve: Serve) -> None:
    server = serve()
    told = [red(51), red(0, "give nan"), red(0, "give inf"), red(0, "give none"), red(102)]
    scores = remote(server.url)(told)
    assert [scores[0], scores[4]] == [0.2, 0.4] and all(map(math.isnan, scores[1:4]))


def test_one_of_several_rewards_is_named(serve: Serve) -> None:
    small = Component.parse({"target": "mmrl.rewards.compress:Compress"})
    server = serve(rewards=[block(fickle(), "fickle"), block(small, "small")])
    assert remote(server.url, reward="fickle")([red(51)]) == [0.2]
    asks = remote(server.url, reward="large")
    assert math.isnan(asks([red(51)])[0])
    assert "there is no reward 'large'; there are fickle, small" in (asks.failure or "")
    assert ask(server, {"samples": [sample()]})[0] == 404


# ---------------------------------------------------------------- what goes wrong


def test_a_reward_that_raises_is_answered_with_why_and_the_server_goes_on(serve: Serve) -> None:
    asks = remote(serve().url, batch=1)
    scores = asks([red(51), red(0, "raise"), red(102)])
    assert [scores[0], scores[2]] == [0.2, 0.4] and math.isnan(scores[1])
    assert "status 500: " in (asks.failure or "") and "the picture is cursed" in (asks.failure or "")


def test_a_server_that_is_not_there_or_is_another() -> None:
    asks = remote(f"http://127.0.0.1:{free_port()}")
    assert math.isnan(asks([red(51)])[0]) and "could not be reached" in (asks.failure or "")
    with serving() as other:
        other.answers["/score"] = lambda handler: reply(handler, b"<html>", status=200)
        asks = remote(other.url(""))
        assert math.isnan(asks([red(51)])[0]) and "gave no scores" in (asks.failure or "")
        other.answers["/score"] = lambda handler: reply(handler, b'{"scores": [1.0, 2.0]}')
        assert math.isnan(asks([red(51)])[0]) and "gave 2 scores for 1" in (asks.failure or "")
        for status, times in ((503, 2), (422, 1)):
            other.seen.clear()
            other.answers["/score"] = lambda handler, status=status: reply(handler, b"{}", status=status)
            assert math.isnan(asks([red(51)])[0]) and f"status {status}" in (asks.failure or "")
            assert len(other.seen) == times


def test_a_late_server_is_not_waited_for(serve: Serve) -> None:
    asks = remote(serve().url, timeout_s=0.2, retries=0)
    assert math.isnan(asks([red(51, "wait 1")])[0]) and "within 0.2 s" in (asks.failure or "")


def test_details_that_json_has_not(serve: Serve) -> None:
    told = red(51)
    told = replace(told, question=replace(told.question, details={"secret": object()}))
    asks = remote(serve().url)
    assert math.isnan(asks([told])[0]) and "cannot be sent as JSON" in (asks.failure or "")


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 422, "JSON"),
        ({"samples": []}, 422, "'samples'"),
        ({"samples": [{"turns": []}]}, 422, "'samples.0.turns'"),
        ({"samples": [sample()], "extra": 1}, 422, "'extra'"),
        ({"samples": [{"turns": [[{"png": "????"}]]}]}, 422, "no PNG file"),
        ({"samples": [{"turns": [[{"png": "aGVsbG8="}]]}]}, 422, "no PNG file"),
        ({"samples": [sample(task="one")]}, 422, "'samples.0.task'"),
        ({"samples": [{"turns": [[{"png": png(Image.new("RGB", (40, 40)))}]]}]}, 422, "40 x 40 pixels; this server takes 1000"),
    ],
)
def test_a_request_that_is_none_is_answered_with_a_sentence(serve: Serve, body: Any, status: int, words: str) -> None:
    server = serve(max_pixels=1000)
    got, content = ask(server, body)
    assert got == status and words in content["error"]
    assert ask(server, {"samples": [sample()]}) == (200, {"scores": [0.2], "failure": None, "terms": content_terms()})


def content_terms() -> dict[str, float]:
    return {"batch": 1.0, "pid": float(os.getpid())}


def test_a_body_may_not_be_larger_than_allowed_nor_of_unknown_length(serve: Serve) -> None:
    server = serve(max_body_mb=0.001)
    status, content = ask(server, b"x" * 3_000_000)
    assert status == 413 and "max_body_mb" in content["error"]
    assert ask(server, {"samples": [sample()]})[0] == 200
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
    connection.request("POST", "/score", iter([b"x"]), encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
    assert connection.getresponse().status == 411
    connection.close()
    asks = remote(server.url)
    assert math.isnan(asks([drawn(noise(0, (60, 60)))])[0]) and "status 413" in (asks.failure or "")


def test_more_requests_than_allowed_are_told_to_come_again(serve: Serve) -> None:
    server = serve(concurrency=1)
    busy = threading.Thread(target=ask, args=(server, {"samples": [sample(details={"prompt": "wait 1"})]}))
    busy.start()
    until = time.monotonic() + 10
    while server.health().running == 0 and time.monotonic() < until:
        time.sleep(0.01)
    assert ask(server, {"samples": [sample()]})[0] == 503
    assert ask(server, b"", "/health", "GET") == (200, {"status": "ok", "rewards": ["fickle"], "running": 1})
    assert remote(server.url, retries=5)([red(102)]) == [0.4]  # it comes again
    busy.join()
    assert server.health().running == 0


def test_a_key_is_asked_for(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORES_KEY", KEY)
    server = serve(key_env="SCORES_KEY")
    assert remote(server.url, key_env="SCORES_KEY")([red(51)]) == [0.2]
    asks = remote(server.url)
    assert math.isnan(asks([red(51)])[0]) and "wants a key; set key_env" in (asks.failure or "")
    monkeypatch.setenv("SCORES_KEY", "another")
    asks = remote(server.url, key_env="SCORES_KEY")
    assert math.isnan(asks([red(51)])[0]) and asks.failure == f"{server.url.removeprefix('http://')} refuses the key"
    monkeypatch.delenv("SCORES_KEY")
    for make in (lambda: remote(server.url, key_env="SCORES_KEY"), lambda: serve(key_env="SCORES_KEY")):
        with pytest.raises(ConfigError, match="SCORES_KEY"):
            make()


def test_configs_that_cannot_be(tmp_path: Path, serve: Serve) -> None:
    def load(text: str) -> ServingConfig:
        (tmp_path / "serve.yaml").write_text(text)
        return load_as(ServingConfig, tmp_path / "serve.yaml")

    with pytest.raises(ConfigError, match="several called 'compress'"):
        load("rewards: [{target: 'mmrl.rewards.compress:Compress'}, {target: 'mmrl.rewards.compress:Compress'}]")
    with pytest.raises(ConfigError, match=r"'rewards.emitted' scores turns"):
        load("rewards: [{target: 'mmrl.rewards.tool_rewards:Emitted'}]")
    with pytest.raises(ConfigError, match="'rewards'"):
        load("rewards: []")
    with pytest.raises(ConfigError, match=r"'rewards.0.qality'"):
        load("rewards: [{target: 'mmrl.rewards.compress:Compress', qality: 3}]")
    taken = int(serve().url.rpartition(":")[2])
    with pytest.raises(ConfigError, match="cannot be listened to"):
        serve(port=taken)
