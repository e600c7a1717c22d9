"""Zygotes and their jobs, as the trainer holds them: one zygote for each level and choice of packages, shared by all threads."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from mmrl.errors import EnvironmentMissing, MMRLError
from tools.python_sandbox_parts import shell, wire
from tools.python_sandbox_parts.packages import reading
from tools.python_sandbox_parts.shell import LEVELS, Level

GRACE_S = 0.5  # from the moment the code is told that its time is up to the moment its process is killed
_START_S, _JOB_S = 120.0, 20.0  # a zygote may import for so long, a job lock itself up
_MOST_WAITING = 32  # processes of all kinds that wait for a call
_FOLDER = "mmrl-python-"  # of a zygote, in the folder for temporary files
_STALE_S = 24 * 3600.0  # a zygote outlives no trainer; its empty folder does, if the trainer was killed
_ALWAYS = ("numpy", "pillow")


class SandboxError(Exception):
    """A zygote or a job could not be started; says why."""


class JobLost(Exception):
    """The process of a job is gone, or has been ended for what it wrote. timed_out: its time was up."""

    def __init__(self, sentence: str, *, timed_out: bool = False) -> None:
        super().__init__(sentence)
        self.timed_out = timed_out


@dataclass(frozen=True)
class JobLimits:
    """memory_mb, disk_mb: MiB. cpu_s: seconds of processor time in all; None: no limit but that of each call."""

    memory_mb: int
    disk_mb: int
    cpu_s: int | None


class Job:
    """One confined process, which runs one request after another."""

    def __init__(self, stream: socket.socket, handle: int) -> None:
        self._stream, self._handle, self._open = stream, handle, True

    def call(self, request: wire.Request) -> wire.Answer:
        """Raises JobLost, and ends the process, if there is no proper answer in time."""
        deadline = time.monotonic() + request.timeout_s + GRACE_S
        try:
            self._stream.settimeout(_left(deadline))
            self._stream.sendall(wire.pack_request(request))
            return wire.read_answer(lambda count: self._read(count, deadline), request.nonce, request.limits)
        except TimeoutError:
            self.close()
            raise JobLost(f"the code ran longer than {request.timeout_s:g} s and was killed", timed_out=True) from None
        except wire.WireError as error:
            self.close()
            ended = str(error) == wire.ENDED
            raise JobLost("the code ended its interpreter (a crash, or out of memory)" if ended else str(error)) from None
        except OSError:
            self.close()
            raise JobLost("the interpreter was gone before the code began") from None

    def _read(self, count: int, deadline: float) -> bytes:
        self._stream.settimeout(_left(deadline))
        return self._stream.recv(count)

    @property
    def alive(self) -> bool:
        return self._open

    def close(self) -> None:
        """Kill the process, whatever it does."""
        if self._open:
            self._open = False
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)
            os.close(self._handle)
            self._stream.close()

    __del__ = close  # of a conversation that nobody closed


@dataclass(frozen=True)
class Order:
    """A process that has been asked for, and what there is of its stream."""

    limits: JobLimits
    stream: socket.socket

    def job(self) -> Job:
        """Wait until it is confined. Raises SandboxError."""
        try:
            self.stream.settimeout(_JOB_S)
            return Job(self.stream, self._handle())
        except (OSError, SandboxError) as error:
            self.stream.close()
            raise SandboxError(f"no job could be started ({error})") from error

    def _handle(self) -> int:
        """The handle of a process that has confined itself; the two bytes that say so come in any order."""
        handle, confined = None, False
        while handle is None or not confined:
            word, handles, _, _ = socket.recv_fds(self.stream, 1, 1, socket.MSG_CMSG_CLOEXEC)
            if handles:
                handle = handles[0]
            elif word == b"c":
                confined = True
            else:
                if handle is not None:
                    os.close(handle)
                raise SandboxError(self.stream.recv(1000).decode("utf-8", "replace") if word else "it ended at once")
        return handle


class Zygote:
    """A process with everything imported that forks jobs in milliseconds. Raises SandboxError if the level cannot be reached."""

    def __init__(self, level: Level, packages: tuple[str, ...]) -> None:
        self.level, self._owner = level, os.getpid()
        self._orders: list[Order] = []
        self._lock = threading.Lock()
        _sweep()
        self._work = tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getpid()}-")
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        command, environment = shell.command(level, reading((*_ALWAYS, *packages)), theirs.fileno(), self._work)
        self._process: subprocess.Popen[bytes] | None = None
        started = threading.Event()
        # The kernel ends a zygote with the thread that started it, so that thread has to stay.
        self._keeper = threading.Thread(
            target=self._keep, args=(command, environment, theirs, started), daemon=True, name="zygote"
        )
        self._keeper.start()
        started.wait()
        theirs.close()
        self._control.settimeout(_START_S)
        try:
            ready = self._control.recv(64) == b"ready"
        except OSError:
            ready = False
        if not ready:
            complaint = self._complaint()
            self.close()
            raise SandboxError(complaint)
        self._control.settimeout(_JOB_S)

    def _keep(self, command: list[str], environment: dict[str, str], theirs: socket.socket, started: threading.Event) -> None:
        try:
            self._process = subprocess.Popen(
                command,
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._stderr,
                stderr=self._stderr,
            )
        except OSError as error:
            self._stderr.write(f"{command[0]} does not start ({error.strerror})".encode())
        finally:
            started.set()
        if self._process is not None:
            self._process.wait()

    def _complaint(self) -> str:
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else "it ended without a word"

    def job(self, limits: JobLimits, keep: int = 0) -> Job:
        """A process that is confined and waits; ``keep`` more of its kind wait for the next calls. Raises SandboxError."""
        with self._lock:
            waiting = next((order for order in self._orders if order.limits == limits), None)
            if waiting is not None:
                self._orders.remove(waiting)
        order = waiting or self._order(limits)
        with self._lock:
            missing = keep - sum(order.limits == limits for order in self._orders)
            self._orders += [self._order(limits) for _ in range(missing)]
            surplus, self._orders = self._orders[:-_MOST_WAITING], self._orders[-_MOST_WAITING:]
        for old in surplus:
            old.stream.close()  # at the stream's end a job that has run nothing ends itself
        return order.job()

    def alive(self) -> bool:
        self._keeper.join(timeout=0.2)  # it ends with the process, or a moment later
        return self._keeper.is_alive()

    def _order(self, limits: JobLimits) -> Order:
        """Ask for a process and do not wait for it."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(self._control, [json.dumps(asdict(limits)).encode()], [theirs.fileno()])
        except OSError as error:
            ours.close()
            raise SandboxError(f"the interpreter that forks jobs is gone ({error})") from error
        return Order(limits, ours)

    def close(self) -> None:
        """End it and, with it, every job."""
        self._control.close()
        for order in self._orders:
            order.stream.close()
        if os.getpid() == self._owner:
            if self._process is not None:
                with suppress(ProcessLookupError):
                    self._process.kill()
            shutil.rmtree(self._work, ignore_errors=True)


def _sweep() -> None:
    """Remove folders that trainers which were killed have left."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        with suppress(OSError, ValueError):
            owner = int(folder.name.removeprefix(_FOLDER).partition("-")[0])
            if not Path(f"/proc/{owner}").exists() and time.time() - folder.stat().st_mtime > _STALE_S:
                shutil.rmtree(folder)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


_ZYGOTES: dict[tuple[Level, tuple[str, ...]], Zygote] = {}
_REASONS: dict[tuple[Level, tuple[str, ...]], str] = {}  # why a level cannot be reached
_LOCK = threading.Lock()


def zygote(level: Level, packages: tuple[str, ...]) -> Zygote:
    """The zygote of this process for that level, started if there is none. Raises SandboxError; a second time at once."""
    key = (level, packages)
    with _LOCK:
        if key in _REASONS:
            raise SandboxError(_REASONS[key])
        if key not in _ZYGOTES:
            try:
                _ZYGOTES[key] = _tried(level, packages)
            except SandboxError as error:
                _REASONS[key] = str(error)
                raise
        return _ZYGOTES[key]


def _tried(level: Level, packages: tuple[str, ...]) -> Zygote:
    """A zygote that has shown that its jobs can confine themselves."""
    if not shell.available(level):
        raise SandboxError("it is not installed" if level == "bubblewrap" else "it needs Linux")
    made = Zygote(level, packages)
    try:
        made.job(JobLimits(memory_mb=64, disk_mb=1, cpu_s=5)).close()
    except SandboxError:
        made.close()
        raise
    return made


def start_job(level: Level, packages: tuple[str, ...], limits: JobLimits, keep: int) -> Job:
    """See ``Zygote.job``; a zygote that has died since is started again, once."""
    first = zygote(level, packages)
    try:
        return first.job(limits, keep)
    except SandboxError:
        if first.alive():  # it only had no time, and others have their conversations there
            raise
        with _LOCK:
            if _ZYGOTES.get((level, packages)) is first:
                del _ZYGOTES[level, packages]
        first.close()
        return zygote(level, packages).job(limits, keep)


def strongest(packages: tuple[str, ...], unsafe: bool) -> Level:
    """The first level, from the strongest down, that this machine reaches. Raises EnvironmentMissing if there is none."""
    for level in LEVELS if unsafe else LEVELS[:-1]:
        with suppress(SandboxError):
            zygote(level, packages)
            return level
    raise EnvironmentMissing("Isolation for the Python tool (bubblewrap, or Landlock with seccomp)", "apt-get install bubblewrap")


def require(level: Level, packages: tuple[str, ...]) -> None:
    """Raises MMRLError, saying why, if this machine does not reach ``level``."""
    try:
        zygote(level, packages)
    except SandboxError as error:
        raise MMRLError(
            f"isolation '{level}' is out of reach here ({error}); without the field the strongest is taken"
        ) from error


def _forget() -> None:
    """In a child that the trainer forked: the zygotes are the parent's."""
    global _LOCK
    _LOCK = threading.Lock()
    for inherited in _ZYGOTES.values():
        inherited.close()
    _ZYGOTES.clear()


def _close_all() -> None:
    for known in _ZYGOTES.values():
        known.close()
    _ZYGOTES.clear()


os.register_at_fork(after_in_child=_forget)
atexit.register(_close_all)
