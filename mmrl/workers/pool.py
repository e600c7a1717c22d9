"""Worker processes under supervision: every call has a time limit, and a worker that dies or exceeds it is replaced."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from types import ModuleType
from typing import Any

from mmrl.errors import MMRLError
from mmrl.workers.process import Failure, main
from mmrl.workers.server import PRELOAD
from mmrl.workers.single import Description

LOG = logging.getLogger("mmrl.workers")
TIME_LIMIT, START_LIMIT = 120.0, 600.0  # seconds, where nobody says otherwise
GRACE = 5.0  # seconds a worker gets to end by itself
PATIENCE = 3  # times in a row a worker may be lost without having finished a call of PROGRESS in between
PROGRESS = ("step", "score")
# Processes are forked from a server that is started apart: no thread, GPU context or lock of the parent's gets into them, and
# what the server has imported (see ``preload``) need not be imported again.
_CONTEXT = multiprocessing.get_context("forkserver")


class WorkerError(MMRLError):
    """Workers are lost again and again, or one cannot be started."""


_CONTEXT.set_forkserver_preload(["mmrl.workers.server"])
_STARTING = threading.Lock()  # of what ``_without_main`` changes for the whole process


def preload(*modules: str) -> None:
    """Import these once for all workers instead of once in each. Works until the first worker of this process has started."""
    wanted = [*filter(None, os.environ.get(PRELOAD, "").split(",")), "mmrl.workers.process", *modules]
    os.environ[PRELOAD] = ",".join(dict.fromkeys(wanted))


@dataclass
class _Member:
    """One worker. Its description is the first that it sends, before ``deadline``."""

    process: ForkServerProcess
    connection: Connection
    deadline: float
    description: Description | None = None


@dataclass
class Call:
    """A call that was sent. waiting: connection -> index of the workers that may answer it until ``deadline``."""

    command: str
    seconds: float
    deadline: float
    waiting: dict[Any, int]


class WorkerPool:
    """A worker for each entry of ``shares``, each of which is a ``kind(target, config, share)`` whose methods can be called.

    kind: Worker with a list of slots as its share, or Batch (see their modules). target, config: the class of the environment
    (``package.module:Name``) and what it is built with. time_limit: seconds that a call may take, counted from its sending and
    for each action of a chunk or each reset. start_limit: seconds to start, imports included.
    ``lost`` counts workers that were replaced. Raises WorkerError where a worker cannot be kept alive, MMRLError with the
    worker's own sentence, and RuntimeError with the worker's traceback where an environment raised anything else.
    """

    def __init__(
        self, kind: type, target: str, config: Any, shares: Sequence[Any], *, time_limit: float, start_limit: float
    ) -> None:
        self._kind, self._target, self._config, self._shares = kind, target, config, list(shares)
        self.time_limit, self._start_limit = time_limit, start_limit
        self.lost = 0
        self._failures = [0] * len(self._shares)
        self._board: tuple[str, int] | None = None
        self._members: list[_Member | None] = [None] * len(self._shares)
        self._sent: Call | None = None
        preload(kind.__module__, target.partition(":")[0])
        try:
            self._members = [self._spawn(index) for index in range(len(self._shares))]
            descriptions = [self.start(index) for index in range(len(self._shares))]
        except BaseException:
            self.close()
            raise
        self.description = descriptions[0]

    @property
    def pids(self) -> list[int | None]:
        """The workers' process ids."""
        return [member.process.pid if member else None for member in self._members]

    def attach(self, name: str, num_envs: int) -> None:
        """Give every worker, and each that will replace one, the memory to write observations to."""
        self._board = (name, num_envs)
        self.call("attach", dict.fromkeys(range(len(self._shares)), self._board))

    def start(self, index: int) -> Description:
        """Wait until worker ``index`` can be called; one that was lost is replaced. Raises WorkerError after PATIENCE tries."""
        while True:
            member = self._members[index]
            if member is None:
                member = self._members[index] = self._spawn(index)
            if member.description is None:
                self._greet(index, member)
            if member.description is not None:
                return member.description

    def call(self, command: str, arguments: Mapping[int, tuple[Any, ...]], *, units: int = 1) -> dict[int, Any]:
        """Worker index -> its answer, of the workers that answered; the others were lost, and are replaced when next started.

        units: how many times ``time_limit`` the call may take. Workers that are not there are not called.
        """
        return self.collect(self.send(command, arguments, units=units))

    def send(self, command: str, arguments: Mapping[int, tuple[Any, ...]], *, units: int = 1) -> Call:
        """The first half of ``call``, which does not wait; ``collect`` is the second, and must follow before the next call."""
        if self._sent is not None:
            raise RuntimeError(f"'{command}' was begun before '{self._sent.command}' was finished")
        seconds = self.time_limit * max(units, 1)
        call = self._sent = Call(command, seconds, time.monotonic() + seconds, {})
        with self._whole_or_closed():
            for index, given in arguments.items():
                member = self._members[index]
                if member is None:
                    continue
                try:
                    member.connection.send((command, given))
                    call.waiting[member.connection] = index
                except OSError:
                    self._lose(index, f"died before '{command}'")
        return call

    def collect(self, call: Call) -> dict[int, Any]:
        """Wait for the answers to what was sent."""
        self._sent = None
        answers: dict[int, Any] = {}
        with self._whole_or_closed():
            while call.waiting:
                # What came in time counts, however late it is looked at.
                ready = wait(list(call.waiting), timeout=max(call.deadline - time.monotonic(), 0))
                if not ready:
                    for index in call.waiting.values():
                        self._lose(index, f"did not finish '{call.command}' within {call.seconds:g} seconds")
                    break
                for connection in ready:
                    index = call.waiting.pop(connection)
                    answer = self._receive(index, call.command)
                    if answer is not None:
                        answers[index] = answer[0]
        if call.command in PROGRESS:
            for index in answers:
                self._failures[index] = 0
        return answers

    @contextmanager
    def _whole_or_closed(self) -> Iterator[None]:
        """After an exception other answers are still on their way, and the pool is of no use any more."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all workers; those that do not within GRACE are killed."""
        members = [member for member in self._members if member is not None]
        self._members, self._sent = [None] * len(self._shares), None
        for member in members:
            with suppress(OSError):
                member.connection.close()
        deadline = time.monotonic() + GRACE
        for member in members:
            member.process.join(max(deadline - time.monotonic(), 0))
            if member.process.is_alive():
                member.process.kill()
                member.process.join()
            member.process.close()

    def _spawn(self, index: int) -> _Member:
        ours, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(
            target=main,
            args=(theirs, self._kind, self._target, self._config, self._shares[index]),
            daemon=True,
            name=f"worker {index}",
        )
        with _without_main():
            process.start()
        theirs.close()  # so that the worker's death is the end of the pipe
        return _Member(process, ours, time.monotonic() + self._start_limit)

    def _greet(self, index: int, member: _Member) -> None:
        """Wait for the description of a new worker; it stays None where the worker was lost."""
        if not member.connection.poll(max(member.deadline - time.monotonic(), 0)):
            self._lose(index, f"did not start within {self._start_limit:g} seconds")
            return
        answer = self._receive(index, "start")
        if answer is not None and (self._board is None or index in self.call("attach", {index: self._board})):
            member.description = answer[0]

    def _receive(self, index: int, command: str) -> tuple[Any] | None:
        """The answer that is waiting, in a tuple; None where the worker died instead."""
        member = self._members[index]
        assert member is not None
        try:
            answer = member.connection.recv()
        except (EOFError, OSError):
            member.process.join(GRACE)
            self._lose(index, f"{_end_of(member.process)} in '{command}'")
            return None
        if isinstance(answer, Failure):
            raise MMRLError(answer.text) if answer.user else RuntimeError(f"in '{command}' of a worker:\n{answer.text}")
        return (answer,)

    def _lose(self, index: int, why: str) -> None:
        member = self._members[index]
        assert member is not None
        self._members[index] = None
        member.process.kill()
        member.process.join()
        member.process.close()
        member.connection.close()
        self.lost += 1
        self._failures[index] += 1
        if self._failures[index] >= PATIENCE:
            raise WorkerError(
                f"a worker of {self._target} was lost {PATIENCE} times in a row; the last one {why}; "
                "see what it printed, and what `mmrl doctor` says"
            )
        LOG.warning("worker %d %s and is restarted; what it was at is dropped", index, why)


@contextmanager
def _without_main() -> Iterator[None]:
    """Keep multiprocessing from running the user's script again in a process that starts here.

    Workers need nothing of what it defines, and it may not be made for that (no ``if __name__ == "__main__"``).
    """
    with _STARTING:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def _end_of(process: ForkServerProcess) -> str:
    code = process.exitcode
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with {code}"
