"""Rewards behind HTTP: ``mmrl serve-rewards CONFIG``. What is asked and replied stands in mmrl/rewards/wire.py.

Bodies that are too large, or more requests at a time than are allowed, are refused before they are read. One reward scores one
request at a time; ``mmrl.rewards.apart:Workers`` around it makes it scale. Anyone who can reach the port may ask, unless there is
a key.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import FrameType
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, model_validator

from mmrl.config import Block
from mmrl.errors import ConfigError
from mmrl.rewarding import RewardBlock
from mmrl.rewards.pictures import scores_conversations
from mmrl.rewards.wire import Asked, Health, reply_of, unpacked

LOG = logging.getLogger("mmrl.serving")
_MIB = 2**20
_LINGER = 2.0  # seconds that a refused asker may go on sending
_PATHS = "there is /health to get, and /score to post to"


class ServingConfig(Block):
    """What ``mmrl serve-rewards`` reads."""

    rewards: list[RewardBlock] = Field(min_length=1)
    """What is offered, by name; a ``target``, its fields and perhaps a ``name``. Weights are the asker's affair."""
    host: str = "127.0.0.1"
    """Address that is listened to; 0.0.0.0 for every network that this machine is on."""
    port: NonNegativeInt = Field(default=8000, le=65535)
    """Port there; 0: any that is free."""
    key_env: str | None = None
    """Environment variable that holds the key which askers must send; null: none."""
    max_body_mb: PositiveFloat = 256.0
    """Largest request, in MiB."""
    max_pixels: PositiveInt = 2**24
    """Largest picture."""
    concurrency: PositiveInt = 8
    """Requests that are read or answered at a time; more are told to come again."""
    timeout_s: PositiveFloat = 60.0
    """For an asker to send its request or take its answer."""

    @model_validator(mode="after")
    def _names(self) -> ServingConfig:
        names = [block.name for block in self.rewards]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"'rewards' has several called '{twice[0]}'; give each a 'name' of its own")
        wrong = next((block for block in self.rewards if not scores_conversations(block.cls)), None)
        if wrong is not None:
            raise ValueError(f"'rewards.{wrong.name}' scores turns; only rewards of whole conversations are served")
        return self


class _Refused(Exception):
    """A request that is not answered with scores. status: HTTP's. The text is for the asker."""

    def __init__(self, status: int, text: str, **headers: str) -> None:
        super().__init__(text)
        self.status, self.headers = status, headers


class RewardServer:
    """The rewards of ``config``, built, and a server for them that listens from now on. ``run`` answers until ``close``."""

    def __init__(self, config: ServingConfig) -> None:
        self.config = config
        self._key = _key(config.key_env)
        self._rewards = {block.name: (block.build(), threading.Lock()) for block in config.rewards}
        self._slots = threading.BoundedSemaphore(config.concurrency)
        self._running, self._count = 0, threading.Lock()
        try:
            self._http = _Listener((config.host, config.port), _handler(self))
        except OSError as error:
            raise ConfigError(f"'host: {config.host}', 'port: {config.port}' cannot be listened to ({error.strerror})") from error

    @property
    def url(self) -> str:
        host, port = self._http.server_address[:2]
        return f"http://{host!s}:{port}"

    def run(self) -> None:
        self._http.serve_forever(poll_interval=0.1)

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def health(self) -> Health:
        return Health(rewards=list(self._rewards), running=self._running)

    def admit(self, headers: Any) -> int:
        """The body's length, of a request that may be read. Raises _Refused."""
        sent = headers.get("Authorization", "").removeprefix("Bearer ")
        if self._key is not None and not hmac.compare_digest(sent.encode(), self._key.encode()):
            raise _Refused(401, "this server wants its key")
        length = headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise _Refused(411, "a request must say how long it is (Content-Length)")
        if int(length) > self.config.max_body_mb * _MIB:
            raise _Refused(413, f"a request may have {self.config.max_body_mb:g} MiB (max_body_mb); send fewer at a time")
        return int(length)

    def enter(self) -> None:
        """Take one of the places; ``leave`` gives it back. Raises _Refused where none is free."""
        if not self._slots.acquire(blocking=False):
            raise _Refused(503, f"{self.config.concurrency} requests are being answered", **{"Retry-After": "1"})
        with self._count:
            self._running += 1

    def leave(self) -> None:
        with self._count:
            self._running -= 1
        self._slots.release()

    def score(self, body: bytes) -> bytes:
        """The answer to a request's body. Raises _Refused."""
        try:
            asked = Asked.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise _Refused(422, f"'{where}': {first['msg']}") from error
        name = asked.reward
        if name is None and len(self._rewards) == 1:
            name = next(iter(self._rewards))
        if name not in self._rewards:
            raise _Refused(404, f"there is no reward '{name}'; there are {', '.join(self._rewards)}")
        try:
            transcripts = [unpacked(sample, self.config.max_pixels) for sample in asked.samples]
        except ValueError as error:
            raise _Refused(422, str(error)) from error
        reward, lock = self._rewards[name]
        with lock:
            try:
                scores = reward(transcripts)
                reply = reply_of(scores, getattr(reward, "failure", None), getattr(reward, "terms", {}))
            except Exception as error:  # a reward's own; the asker is told, and the server goes on
                LOG.exception("'%s' failed", name)
                raise _Refused(500, f"'{name}' failed ({type(error).__name__}: {error})") from error
        return reply.model_dump_json().encode()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


def _handler(server: RewardServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = server.config.timeout_s

        def do_GET(self) -> None:
            if self.path == "/health":
                self._send(200, server.health().model_dump_json().encode())
            else:
                self._send(404, _problem(_PATHS))

        def do_POST(self) -> None:
            if self.path != "/score":
                self._turn_away(_Refused(404, _PATHS))
                return
            try:
                length = server.admit(self.headers)
                server.enter()
            except _Refused as refused:
                self._turn_away(refused)
                return
            try:
                self._answer(lambda: server.score(self.rfile.read(length)))
            finally:
                server.leave()

        def _answer(self, call: Callable[[], bytes]) -> None:
            try:
                self._send(200, call())
            except _Refused as refused:
                self._send(refused.status, _problem(str(refused)), refused.headers)
            except TimeoutError:  # the asker did not send what it promised
                self.close_connection = True

        def _turn_away(self, refused: _Refused) -> None:
            """Answer a request whose body is not read; for a moment what still comes is dropped, or it would reset the answer."""
            self.close_connection = True
            self._send(refused.status, _problem(str(refused)), refused.headers)
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(_LINGER)
            until = time.monotonic() + _LINGER
            with suppress(OSError):
                while time.monotonic() < until and self.connection.recv(_MIB):
                    pass

        def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            closing = {"Connection": "close"} if self.close_connection else {}
            fields = {"Content-Type": "application/json", "Content-Length": str(len(body)), **closing, **(headers or {})}
            for name, value in fields.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            LOG.debug(format, *args)

    return Handler


def _problem(text: str) -> bytes:
    return json.dumps({"error": text}).encode()


def _key(key_env: str | None) -> str | None:
    if key_env is None:
        return None
    key = os.environ.get(key_env, "").strip()
    if not key:
        raise ConfigError(f"'key_env' is {key_env}, which is not set; put the key into it")
    return key


def serve(config: ServingConfig, say: Callable[[str], None]) -> None:
    """Answer until the process is told to end. say: gets the address as soon as there is one."""
    server = RewardServer(config)

    def end(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=server.close).start()  # ``close`` waits for ``run``, which this has interrupted

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    say(f"{', '.join(server.health().rewards)} at {server.url}")
    server.run()
