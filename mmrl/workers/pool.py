"""Worker processes under supervision: every call has a time limit, and a worker that dies or exceeds it is replaced."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
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
GRACE = 5.0  # seconds a worker gets to end by itself
PATIENCE = 3  # times in a row a worker may be lost without having finished a call of ``step`` in between
# Processes are forked from a server that is started apart: no thread, GPU context or lock of the parent's gets into them, and
# what the server has imported (see ``preload``) need not be imported again.
_CONTEXT = multiprocessing.get_context("forkserver")


class WorkerError(MMRLError):
    """Workers are lost again and again, or one cannot be started."""


_CONTEXT.set_forkserver_preload(["mmrl.workers.server"])


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


class WorkerPool:
    """A worker for each entry of ``slots``, each with the single environments of these slots.

    target, config: the class of one environment (``package.module:Name``) and what it is built with. time_limit: seconds that a
    call may take, counted for each action of a chunk or each reset. start_limit: seconds to start, imports included.
    ``lost`` counts workers that were replaced. Raises WorkerError where a worker cannot be kept alive, MMRLError with the
    worker's own sentence, and RuntimeError with the worker's traceback where an environment raised anything else.
    """

    def __init__(
        self, target: str, config: Any, slots: Sequence[Sequence[int]], *, time_limit: float, start_limit: float
    ) -> None:
        self._target, self._config, self._slots = target, config, [list(part) for part in slots]
        self.time_limit, self._start_limit = time_limit, start_limit
        self.lost = 0
        self._failures = [0] * len(self._slots)
        self._board: tuple[str, int] | None = None
        self._members: list[_Member | None] = [None] * len(self._slots)
        preload(target.partition(":")[0])
        try:
            self._members = [self._spawn(index) for index in range(len(self._slots))]
            descriptions = [self.start(index) for index in range(len(self._slots))]
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
        self.call("attach", dict.fromkeys(range(len(self._slots)), self._board))

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
        try:
            answers = self._call(command, arguments, self.time_limit * max(units, 1))
        except BaseException:  # the answers of the other workers are still on their way: the pool is of no use any more
            self.close()
            raise
        if command == "step":
            for index in answers:
                self._failures[index] = 0
        return answers

    def _call(self, command: str, arguments: Mapping[int, tuple[Any, ...]], seconds: float) -> dict[int, Any]:
        deadline = time.monotonic() + seconds
        waiting: dict[Any, int] = {}
        for index, given in arguments.items():
            member = self._members[index]
            if member is None:
                continue
            try:
                member.connection.send((command, given))
                waiting[member.connection] = index
            except OSError:
                self._lose(index, f"died before '{command}'")
        answers: dict[int, Any] = {}
        while waiting:
            ready = wait(list(waiting), timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                for index in waiting.values():
                    self._lose(index, f"did not finish '{command}' within {seconds:g} seconds")
                break
            for connection in ready:
                index = waiting.pop(connection)
                answer = self._receive(index, command)
                if answer is not None:
                    answers[index] = answer[0]
        return answers

    def close(self) -> None:
        """End all workers; those that do not within GRACE are killed."""
        members = [member for member in self._members if member is not None]
        self._members = [None] * len(self._slots)
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
            target=main, args=(theirs, self._target, self._config, self._slots[index]), daemon=True, name=f"worker {index}"
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
        LOG.warning("worker %d %s and is restarted; its episodes are dropped", index, why)


@contextmanager
def _without_main() -> Iterator[None]:
    """Keep multiprocessing from running the user's script again in a process that starts here.

    Workers need nothing of what it defines, and it may not be made for that (no ``if __name__ == "__main__"``).
    """
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
