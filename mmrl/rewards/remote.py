"""A reward that a server gives: ``mmrl serve-rewards`` on this or another machine (the format is that of mmrl/rewards/wire.py).

Requests of ``batch`` conversations run at the same time and are repeated where that may help. What cannot be had is NaN, with the
reason in ``failure``. The key comes from an environment variable and is sent to the server alone.
"""

from __future__ import annotations

import math
import os
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from urllib.parse import urlsplit

import urllib3
from pydantic import ConfigDict, Field, ValidationError, field_validator
from pydantic.dataclasses import dataclass

from mmrl.errors import ConfigError
from mmrl.rewards.wire import Asked, Replied, packed
from mmrl.transcripts import Transcript

_AGAIN = (0, 408, 425, 429, 500, 502, 503, 504)  # statuses after which another try may succeed; 0: no answer
_LONGEST_PAUSE = 30.0  # seconds between two tries


class Remote:
    """See the module. failure: why the last conversation without a score has none. terms: the server's, meaned over requests."""

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    class Config:
        """Fields of a ``mmrl.rewards.remote:Remote`` block."""

        url: str
        """Address of the server, such as 'http://127.0.0.1:8000'."""
        reward: str | None = None
        """Name of one of its rewards; null: the only one that it has."""
        key_env: str | None = None
        """Environment variable that holds the key; null: the server wants none."""
        batch: int = Field(default=16, ge=1)
        """Conversations in a request."""
        concurrency: int = Field(default=4, ge=1)
        """Requests that run at a time."""
        timeout_s: float = Field(default=120.0, gt=0)
        """Time for one request."""
        retries: int = Field(default=5, ge=0)
        """Repeats after a connection that failed or an answer that says to come again."""
        backoff_s: float = Field(default=0.5, ge=0)
        """Pause before the first repeat; each further one is twice as long, or as long as the server says."""

        @field_validator("url")
        @classmethod
        def _is_address(cls, url: str) -> str:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.username is not None:
                raise ValueError("must begin with http:// or https:// and a host, and hold no query and no user name")
            return url

    def __init__(self, config: Config) -> None:
        self.config = config
        self.failure: str | None = None
        self.terms: dict[str, float] = {}
        self._host = urlsplit(config.url).netloc
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if config.key_env is not None:
            key = os.environ.get(config.key_env, "").strip()
            if not key:
                raise ConfigError(f"{self._host} needs a key: put it into the environment variable {config.key_env}")
            self._headers["Authorization"] = f"Bearer {key}"
        self._http = urllib3.PoolManager(maxsize=config.concurrency, retries=False)
        self._threads = ThreadPoolExecutor(config.concurrency, "remote scoring")
        weakref.finalize(self, self._threads.shutdown, wait=False, cancel_futures=True)

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        return self.begin(transcripts)()

    def begin(self, transcripts: Sequence[Transcript]) -> Callable[[], list[float]]:
        """Send them and return at once, with the function that waits for their scores."""
        size = self.config.batch
        batches = [transcripts[start : start + size] for start in range(0, len(transcripts), size)]
        sent = [self._threads.submit(self._ask, batch) for batch in batches]
        return lambda: self._finish(batches, sent)

    def _finish(self, batches: Sequence[Sequence[Transcript]], sent: Sequence[Future[Replied | str]]) -> list[float]:
        scores: list[float] = []
        sums: dict[str, list[float]] = {}
        for batch, future in zip(batches, sent, strict=True):
            reply = future.result()
            if isinstance(reply, str):
                self.failure = reply
                scores += [math.nan] * len(batch)
                continue
            self.failure = reply.failure or self.failure
            scores += [math.nan if score is None else score for score in reply.scores]
            for name, mean in reply.terms.items():
                sums.setdefault(name, []).append(mean)
        self.terms = {name: sum(means) / len(means) for name, means in sums.items()}
        return scores

    def _ask(self, batch: Sequence[Transcript]) -> Replied | str:
        """The reply, or why there is none."""
        try:
            body = Asked(reward=self.config.reward, samples=[packed(each) for each in batch]).model_dump_json().encode()
        except ValueError as error:
            return f"a question's details cannot be sent as JSON ({' '.join(str(error).split())[:200]})"
        status, content = self._post(body)
        if status != 200:
            return f"{self._host} {self._refusal(status, content)}"
        try:
            reply = Replied.model_validate_json(content)
        except ValidationError:
            return f"{self._host} gave no scores; is 'url' that of `mmrl serve-rewards`?"
        if len(reply.scores) != len(batch):
            return f"{self._host} gave {len(reply.scores)} scores for {len(batch)} conversations"
        return reply

    def _post(self, body: bytes) -> tuple[int, bytes]:
        config, url = self.config, f"{self.config.url.rstrip('/')}/score"
        for attempt in range(config.retries + 1):
            status, content, pause = 0, b"", 0.0
            try:
                reply = self._http.request(
                    "POST", url, body=body, headers=self._headers, timeout=config.timeout_s, redirect=False
                )
                wait = reply.headers.get("Retry-After", "")
                status, content, pause = reply.status, reply.data, float(wait) if wait.isdigit() else 0.0
            except urllib3.exceptions.HTTPError:
                pass
            if status not in _AGAIN or attempt == config.retries:
                return status, content
            time.sleep(min(max(pause, config.backoff_s * 2**attempt), _LONGEST_PAUSE))
        raise AssertionError("the last attempt returns")

    def _refusal(self, status: int, content: bytes) -> str:
        if status == 0:
            return f"did not answer within {self.config.timeout_s:g} s, or could not be reached"
        if status == 401:
            return "refuses the key" if self.config.key_env else "wants a key; set key_env"
        text = " ".join(content[:300].decode(errors="replace").split())
        return f"answered with status {status}: {text}"
