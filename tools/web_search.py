"""Search in the web through an HTTP API that answers in JSON; which one is a matter of configuration (Serper, Brave, Tavily).

The key comes from an environment variable. It is sent to the API and goes nowhere else: no message, file or log holds it.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal
from urllib.parse import urlsplit

import urllib3
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from mmrl.caching import Answers, cache_folder
from mmrl.errors import ConfigError
from mmrl.messages import ToolContext, ToolError, ToolResult

_AGAIN = (408, 425, 429, 500, 502, 503, 504)  # statuses after which another try may succeed
_MAX_BYTES = 4_000_000  # of an answer
_LONGEST_PAUSE = 30.0  # seconds between two tries


class WebSearch:
    """See the module. Safe between threads: a query that is under way is asked once; pages on disk are shared by processes."""

    @dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
    class Config:
        """Fields of a ``tools.web_search:WebSearch`` block."""

        url: str
        """Address of the API, such as 'https://google.serper.dev/search'."""
        name: str = "web_search"
        """What the model calls it by."""
        method: Literal["GET", "POST"] = "POST"
        """GET: fields in the address; POST: fields as JSON."""
        key_env: str | None = None
        """Environment variable that holds the key; null: the API wants none."""
        key_header: str = "Authorization"
        """Header that carries the key ('X-API-KEY' for Serper, 'X-Subscription-Token' for Brave)."""
        key_prefix: str = ""
        """What stands before the key in the header ('Bearer ' for Tavily)."""
        query_field: str = "q"
        """Field of the query."""
        fields: dict[str, str | int | bool] = Field(default_factory=dict)
        """Further fields, sent as they are, such as the number of results or the country."""
        results: str = "organic"
        """Where the list of results stands in the answer, dotted ('web.results' for Brave, 'results' for Tavily)."""
        title: str = "title"
        """Field of a result: its title."""
        link: str = "link"
        """Field of a result: its address ('url' for Brave and Tavily)."""
        snippet: str = "snippet"
        """Field of a result: its text ('description' for Brave, 'content' for Tavily)."""
        top_k: int = Field(default=5, ge=1)
        """Results that a search gives."""
        timeout_s: float = Field(default=10.0, gt=0)
        """Time for a search, repeats and waiting included; a call that has less takes less."""
        retries: int = Field(default=3, ge=0)
        """Repeats after a connection that failed or an answer that says to come again."""
        backoff_s: float = Field(default=0.5, ge=0)
        """Pause before the first repeat; each further one is twice as long, or as long as the API says."""
        per_second: float = Field(default=5.0, gt=0)
        """Requests a second of this process, at most."""
        keep: bool = True
        """Whether answers are kept on disk and read from there ever after, so that a rollout can be repeated."""
        cache: str | None = None
        """Folder for what is kept; null: mmrl in the user's cache folder."""

        @model_validator(mode="after")
        def _consistent(self) -> WebSearch.Config:
            parts = urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.netloc:
                raise ValueError(f"url '{self.url}' must begin with http:// or https:// and a host")
            if parts.query or parts.username is not None:
                raise ValueError(
                    "url must hold no query and no user name; put what is sent into fields, and a key into key_env's variable"
                )
            if self.query_field in self.fields:
                raise ValueError(f"fields holds '{self.query_field}', which is the query_field; leave it out of fields")
            return self

    def __init__(self, config: Config) -> None:
        self.config, self.name = config, config.name
        self._key = _key(config)
        self._answers = Answers(cache_folder(config.cache) / "web_search" if config.keep else None)
        self._pool = urllib3.PoolManager(maxsize=16, retries=False)
        self._pace = _Pace(config.per_second)
        self._under_way: dict[str, threading.Lock] = {}
        self._waiting: dict[str, int] = {}
        self._lock = threading.Lock()

    def __call__(self, query: str, ctx: ToolContext) -> ToolResult:
        """Search the web. Gives the best results, numbered, each with its title, its address and a passage.

        query: what to look for, as one would type it into a search engine.
        """
        query = " ".join(query.split())
        if not query:
            raise ToolError("The query is empty; say in a few words what to look for.")
        deadline = time.monotonic() + min(self.config.timeout_s, ctx.timeout_s)
        found, requests = self._ask(query, deadline)
        shown = found[: self.config.top_k]
        lines = [f"[{number}] {item['title']}\n{item['link']}\n{item['snippet']}" for number, item in enumerate(shown, 1)]
        return ToolResult(
            "\n\n".join(lines) or "Nothing was found; try other words.",
            metrics={"hits": float(len(shown)), "requests": float(requests)},
            details={"urls": tuple(item["link"] for item in shown)},
        )

    def close(self) -> None:
        self._pool.clear()

    def _ask(self, query: str, deadline: float) -> tuple[list[dict[str, str]], int]:
        """Results, from the disk or from the API, and how many requests it took."""
        asked = (self.config.url, self.config.method, self.config.query_field, sorted(self.config.fields.items()))
        read = (self.config.results, self.config.title, self.config.link, self.config.snippet)
        name = json.dumps([*asked, *read, query])
        with self._alone(name, deadline):
            found = self._answers.get(name)
            if found is not None:
                return found, 0
            answer, requests = self._request(query, deadline)
            found = self._results(answer)
            self._answers.put(name, found)
            return found, requests

    def _request(self, query: str, deadline: float) -> tuple[Any, int]:
        """The API's answer, and how many requests it took. Raises ToolError."""
        for attempt in range(self.config.retries + 1):
            self._pace.wait(deadline)
            status, body, pause = self._once(query, deadline)
            if status == 200:
                return _decoded(body), attempt + 1
            if status in (401, 403):
                where = f"the key in {self.config.key_env}" if self.config.key_env else "a search without a key; set key_env"
                raise ConfigError(f"{_host(self.config)} refuses {where} (status {status})")
            if status not in (*_AGAIN, 0):
                raise ToolError(f"The search engine refuses the search with status {status}.")
            pause = min(max(pause, self.config.backoff_s * 2**attempt), _LONGEST_PAUSE)
            if attempt == self.config.retries or time.monotonic() + pause >= deadline:
                break
            time.sleep(pause)
        raise ToolError(f"The search engine cannot be reached{f' (status {status})' if status else ''}; try again later.")

    def _once(self, query: str, deadline: float) -> tuple[int, bytes, float]:
        """(status, content, seconds that the API asks to wait); status 0: no answer."""
        config, fields = self.config, {self.config.query_field: query, **self.config.fields}
        headers = {"Accept": "application/json"}
        if self._key is not None:
            headers[config.key_header] = config.key_prefix + self._key
        sent: dict[str, Any] = {"json": fields} if config.method == "POST" else {"fields": _written(fields)}
        left = max(0.01, deadline - time.monotonic())
        try:
            response = self._pool.request(
                config.method, config.url, headers=headers, timeout=left, redirect=False, preload_content=False, **sent
            )
            try:
                body = _read(response, deadline)
            finally:
                response.close()
        except urllib3.exceptions.HTTPError:
            return 0, b"", 0.0
        wait = response.headers.get("Retry-After", "")
        return response.status, body, float(wait) if wait.isdigit() else 0.0

    def _results(self, answer: Any) -> list[dict[str, str]]:
        """title, link and snippet of each result. Raises ConfigError where the answer has no such list."""
        config, place = self.config, answer
        for key in config.results.split("."):
            if not isinstance(place, Mapping):
                break
            place = place.get(key)
        if place is None:
            return []  # engines leave the list out when nothing was found
        if not isinstance(place, list) or not all(isinstance(item, Mapping) for item in place):
            raise ConfigError(
                f"the answer of {_host(config)} holds no list at '{config.results}'; set 'results' to where it stands"
            )
        keys = {"title": config.title, "link": config.link, "snippet": config.snippet}
        return [{name: " ".join(str(item.get(key) or "").split()) for name, key in keys.items()} for item in place]

    @contextmanager
    def _alone(self, name: str, deadline: float) -> Iterator[None]:
        """One thread at a time for one query; those that waited find the answer on disk."""
        with self._lock:
            lock = self._under_way.setdefault(name, threading.Lock())
            self._waiting[name] = self._waiting.get(name, 0) + 1
        try:
            if not lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
                raise ToolError("The search engine took too long to answer.")
            try:
                yield
            finally:
                lock.release()
        finally:
            with self._lock:
                self._waiting[name] -= 1
                if not self._waiting[name]:
                    del self._waiting[name], self._under_way[name]


class _Pace:
    """Lets at most ``per_second`` callers a second through."""

    def __init__(self, per_second: float) -> None:
        self._gap, self._next, self._lock = 1 / per_second, 0.0, threading.Lock()

    def wait(self, deadline: float) -> None:
        """Until it is this caller's turn. Raises ToolError if that is after the deadline."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            if turn >= deadline:
                raise ToolError("Too many searches are waiting; try again later.")
            self._next = turn + self._gap
        time.sleep(turn - now)


def _read(response: urllib3.BaseHTTPResponse, deadline: float) -> bytes:
    """The content, or as much of it as shows that it is too large; TimeoutError of urllib3 at the deadline."""
    body = bytearray()
    while len(body) <= _MAX_BYTES and (chunk := response.read1(1 << 16, decode_content=True)):
        body += chunk
        if time.monotonic() >= deadline:
            raise urllib3.exceptions.TimeoutError
    return bytes(body)


def _key(config: WebSearch.Config) -> str | None:
    if config.key_env is None:
        return None
    key = os.environ.get(config.key_env, "").strip()
    if not key:
        raise ConfigError(f"{_host(config)} needs a key: put it into the environment variable {config.key_env}, which is not set")
    return key


def _host(config: WebSearch.Config) -> str:
    return urlsplit(config.url).hostname or config.url


def _written(fields: Mapping[str, str | int | bool]) -> dict[str, str]:
    return {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in fields.items()}


def _decoded(body: bytes) -> Any:
    if len(body) > _MAX_BYTES:
        raise ToolError("The search engine's answer is too large to be read.")
    try:
        return json.loads(body)
    except ValueError as error:
        raise ToolError("The search engine's answer is not JSON.") from error
