"""Web search against a local API: each engine's form, the key kept secret, one request for one query, repeats, pace, limits."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from mmrl.component import Component, Problems
from mmrl.errors import ConfigError
from mmrl.messages import ToolContext, ToolError
from tests.tools.servers import Server, free_port, page, reply, serving
from tools.web_search import WebSearch

KEY = "s3cret-k3y-0815"
FOUND = [{"title": f"T{n}", "link": f"https://t.test/{n}", "snippet": f"S  {n}\n."} for n in range(9)]
TEXT = "[1] T0\nhttps://t.test/0\nS 0 .\n\n[2] T1\nhttps://t.test/1\nS 1 ."


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def tool(server: Server, tmp_path: Path, **fields: Any) -> WebSearch:
    own = {
        "url": server.url("/search"),
        "top_k": 2,
        "per_second": 1000.0,
        "backoff_s": 0.01,
        "cache": str(tmp_path / "cache"),
        **fields,
    }
    return WebSearch(WebSearch.Config(**own))


def results(content: Any) -> Any:
    return page(json.dumps(content), kind="application/json")


ENGINES = {
    "serper": ({"key_header": "X-API-KEY", "fields": {"num": 3}}, {"organic": FOUND}),
    "brave": (
        {
            "method": "GET",
            "key_header": "X-Subscription-Token",
            "results": "web.results",
            "link": "url",
            "snippet": "description",
        },
        {"web": {"results": [{"title": r["title"], "url": r["link"], "description": r["snippet"]} for r in FOUND]}},
    ),
    "tavily": (
        {
            "key_prefix": "Bearer ",
            "query_field": "query",
            "results": "results",
            "link": "url",
            "snippet": "content",
            "fields": {"deep": True},
        },
        {"results": [{"title": r["title"], "url": r["link"], "content": r["snippet"]} for r in FOUND]},
    ),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_each_engine_is_a_matter_of_configuration(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    fields, content = ENGINES[engine]
    seen: dict[str, Any] = {}

    def answer(handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        query = {key: values[0] for key, values in parse_qs(urlsplit(handler.path).query).items()}
        seen.update(method=handler.command, headers=dict(handler.headers), fields=json.loads(body) if body else query)
        reply(handler, json.dumps(content).encode(), kind="application/json")

    server.answers["/search"] = answer
    monkeypatch.setenv("ENGINE_KEY", KEY)
    result = tool(server, tmp_path, key_env="ENGINE_KEY", **fields)(" two  owls? ", ToolContext())
    assert result.text == TEXT and result.details["urls"] == ("https://t.test/0", "https://t.test/1")
    assert result.metrics == {"hits": 2.0, "requests": 1.0}
    config = WebSearch.Config(url="http://x.test", **fields)
    assert seen["method"] == config.method and seen["headers"][config.key_header] == config.key_prefix + KEY
    assert seen["fields"] == {config.query_field: "two owls?", **config.fields}


def test_the_key_goes_nowhere_else(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("ENGINE_KEY", KEY)
    server.answers["/search"] = results({"organic": FOUND})
    search = tool(server, tmp_path, key_env="ENGINE_KEY")
    told = [search("owl", ToolContext()).text, repr(search.config)]
    for status in (401, 400, 503):
        server.answers["/search"] = lambda handler, status=status: reply(
            handler, handler.headers["Authorization"].encode(), status=status
        )
        with pytest.raises((ToolError, ConfigError)) as caught:
            search(f"owl {status}", ToolContext())
        told.append(str(caught.value))
    told += [file.read_text() for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert KEY not in "".join([*told, caplog.text, *capfd.readouterr()])


@pytest.mark.parametrize("value", [None, " "])
def test_a_missing_key_is_one_sentence(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("ENGINE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("ENGINE_KEY", value)
    with pytest.raises(ConfigError) as caught:
        tool(server, tmp_path, key_env="ENGINE_KEY")
    assert str(caught.value) == "127.0.0.1 needs a key: put it into the environment variable ENGINE_KEY, which is not set"


def test_a_key_that_is_refused_names_its_variable(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_KEY", KEY)
    server.answers["/search"] = page("", status=403)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"refuses the key in ENGINE_KEY \(status 403\)"):
        tool(server, tmp_path, key_env="ENGINE_KEY")("owl", ToolContext())
    assert len(server.seen) == 1  # no use in asking again


def test_answers_are_kept_on_disk(server: Server, tmp_path: Path) -> None:
    server.answers["/search"] = results({"organic": FOUND})
    first = tool(server, tmp_path)("owl", ToolContext())
    again = tool(server, tmp_path)("owl ", ToolContext())
    assert again.text == first.text and again.metrics["requests"] == 0.0 and len(server.seen) == 1
    tool(server, tmp_path, fields={"num": 3})("owl", ToolContext())
    tool(server, tmp_path, keep=False)("owl", ToolContext())
    assert len(server.seen) == 3


def test_one_query_of_many_threads_is_one_request(server: Server, tmp_path: Path) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.1)
        reply(handler, json.dumps({"organic": FOUND}).encode(), kind="application/json")

    server.answers["/search"] = answer
    search = tool(server, tmp_path)
    with ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(lambda number: search(f"owl {number % 3}", ToolContext()).text, range(12)))
    assert set(texts) == {TEXT} and len(server.seen) == 3
    assert search._under_way == {} and search._waiting == {}


def failing(times: int, status: int, **headers: str) -> Any:
    left = [times]

    def answer(handler: BaseHTTPRequestHandler) -> None:
        left[0] -= 1
        if left[0] >= 0:
            reply(handler, b"busy", status=status, **headers) if status else handler.connection.close()
        else:
            reply(handler, json.dumps({"organic": FOUND}).encode(), kind="application/json")

    return answer


@pytest.mark.parametrize("status", [429, 500, 503, 0])
def test_what_passes_is_asked_again(server: Server, tmp_path: Path, status: int) -> None:
    server.answers["/search"] = failing(2, status)
    result = tool(server, tmp_path)("owl", ToolContext())
    assert result.text == TEXT and result.metrics["requests"] == 3.0 and len(server.seen) == 3
    server.answers["/search"] = failing(9, status)
    with pytest.raises(ToolError, match="cannot be reached"):
        tool(server, tmp_path, retries=1)("hen", ToolContext())
    assert len(server.seen) == 5
    server.answers["/search"] = results({"organic": FOUND})
    assert tool(server, tmp_path)("hen", ToolContext()).text == TEXT  # a failure is not kept


def test_pauses_double_and_obey_the_engine(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("tools.web_search.time.sleep", pauses.append)
    server.answers["/search"] = failing(3, 503)
    tool(server, tmp_path, backoff_s=0.5, per_second=1e9)("owl", ToolContext(timeout_s=60.0))
    assert [pause for pause in pauses if pause > 0.1] == [0.5, 1.0, 2.0]
    pauses.clear()
    server.answers["/search"] = failing(1, 429, Retry_After="4")
    tool(server, tmp_path, backoff_s=0.5, per_second=1e9)("hen", ToolContext(timeout_s=60.0))
    assert [pause for pause in pauses if pause > 0.1] == [4.0]


def test_the_time_limit_holds_over_all_tries(server: Server, tmp_path: Path) -> None:
    server.answers["/search"] = failing(99, 503)
    begin = time.monotonic()
    with pytest.raises(ToolError, match="cannot be reached"):
        tool(server, tmp_path, retries=50, backoff_s=0.05, timeout_s=0.4)("owl", ToolContext())
    assert len(server.seen) < 6 and time.monotonic() - begin < 30  # 0.05 + 0.1 + 0.2 are in, 0.4 is not

    stop = threading.Event()

    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while not stop.wait(0.02):
            handler.wfile.write(b" ")

    server.answers["/search"] = drip
    with pytest.raises(ToolError, match="cannot be reached"):
        tool(server, tmp_path, retries=0)("owl", ToolContext(timeout_s=0.2))
    stop.set()


def test_searches_keep_their_pace(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("tools.web_search.time.monotonic", lambda: clock[0])
    waits: list[float] = []
    monkeypatch.setattr("tools.web_search.time.sleep", waits.append)
    server.answers["/search"] = results({"organic": FOUND})
    search = tool(server, tmp_path, per_second=2.0)
    for number in range(4):
        search(f"owl {number}", ToolContext())
    assert waits == pytest.approx([0.0, 0.5, 1.0, 1.5])
    clock[0] += 100
    search("later", ToolContext())
    assert waits[-1] == 0.0
    for number in range(3):
        search(f"hen {number}", ToolContext(timeout_s=1.6))
    with pytest.raises(ToolError, match="Too many searches are waiting"):
        search("one too many", ToolContext(timeout_s=1.6))


@pytest.mark.parametrize(
    ("content", "error", "sentence"),
    [
        ("{", ToolError, "not JSON"),
        ("x" * 4_000_001, ToolError, "too large"),
        ('{"organic": {"a": 1}}', ConfigError, "holds no list at 'organic'; set 'results'"),
        ('{"organic": ["a"]}', ConfigError, "holds no list at 'organic'"),
    ],
    ids=["json", "size", "mapping", "strings"],
)
def test_an_answer_of_another_form_is_a_sentence(
    server: Server, tmp_path: Path, content: str, error: type, sentence: str
) -> None:
    server.answers["/search"] = page(content)
    with pytest.raises(error, match=sentence):
        tool(server, tmp_path)("owl", ToolContext())


def test_nothing_found_and_nothing_asked(server: Server, tmp_path: Path) -> None:
    for number, content in enumerate(({}, {"organic": []}, {"organic": None}, [])):
        server.answers["/search"] = results(content)
        assert "Nothing was found" in tool(server, tmp_path)(f"owl {number}", ToolContext()).text
    server.answers["/search"] = results({"organic": [{"title": None, "link": 3}]})
    assert tool(server, tmp_path)("odd", ToolContext()).text == "[1] \n3\n"
    with pytest.raises(ToolError, match="query is empty"):
        tool(server, tmp_path)("  ", ToolContext())


def test_redirects_are_not_followed(server: Server, tmp_path: Path) -> None:
    """A key would go along."""
    server.answers["/search"] = page("", status=302, Location=server.url("/other"))  # type: ignore[arg-type]
    with pytest.raises(ToolError, match="refuses the search with status 302"):
        tool(server, tmp_path)("owl", ToolContext())
    assert len(server.seen) == 1


def test_an_engine_that_is_not_there(tmp_path: Path) -> None:
    search = WebSearch(WebSearch.Config(url=f"http://127.0.0.1:{free_port()}/", retries=1, backoff_s=0.01, keep=False))
    with pytest.raises(ToolError, match="cannot be reached; try again later"):
        search("owl", ToolContext())


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"url": "ftp://x"}, "must begin with http"),
        ({"url": "https://x/?key=abc"}, "url must hold no query"),
        ({"url": "https://x/", "fields": {"q": "x"}}, "fields holds 'q', which is the query_field"),
        ({"url": "https://x/", "per_second": 0.0}, "per_second"),
    ],
)
def test_a_wrong_block_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Problems, match=sentence):
        Component.parse({"target": "tools.web_search:WebSearch", **fields})
