"""A Python for models: it runs code with NumPy, Pillow and matplotlib on the conversation's pictures, where it can do no harm.

The code runs in a process of its own that can read Python, the libraries it needs and nothing else, reaches no network and no
other process, starts no process, and is killed when its time is up. How strong the walls are depends on the machine; the levels,
from the strongest down, are those of ``shell.MEANING``, and ``ToolResult.details["isolation"]`` names the one that was reached:

- ``bubblewrap``: bubblewrap builds a file system of what Python needs, without network, in namespaces of its own.
- ``namespaces``: the same namespaces, made from Python; what can be read is up to Landlock.
- ``landlock``: where no namespace can be made. The code has no folder to write in.
- ``none``: no walls. Only where ``unsafe: true`` asks for it.

At each but the last a seccomp filter allows a hundred harmless system calls, privileges are dropped and resources limited. Each
call (or conversation, with ``keep_state``) has a process, namespaces and a working folder in memory of its own, forked in
milliseconds from an interpreter that has imported everything and has run nobody's code. Text and raw pixels come back, lengths
checked; nothing is unpickled or decoded. What is not promised: that code cannot tell where it runs (names and sizes of files
may be visible at the levels without bubblewrap), nor that the kernel itself has no hole.
"""

from __future__ import annotations

import functools
import math
import random
import secrets
import threading
import time
from collections.abc import Sequence
from typing import Annotated

from PIL import Image
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from mmrl.errors import EnvironmentMissing
from mmrl.messages import Picture, ToolContext, ToolError, ToolResult
from tools.python_sandbox_parts import pool, wire
from tools.python_sandbox_parts.pool import Job, JobLimits, JobLost
from tools.python_sandbox_parts.shell import Level

TIMEOUT_S, MEMORY_MB = 5.0, 512
PACKAGES = ("matplotlib",)
_STATE = "python_sandbox"  # the key of a conversation's session in ToolContext.state
_NOTHING = "The code ran and printed nothing."
_GONE = "Variables of earlier calls are gone."


class Session:
    """The live interpreter of one conversation; ``close`` ends it."""

    def __init__(self) -> None:
        self.job: Job | None = None
        self.lock = threading.Lock()

    def close(self) -> None:
        if self.job is not None:
            self.job.close()


class PythonSandbox:
    """The tool ``python``; see the module. Raises EnvironmentMissing or MMRLError where the isolation is out of reach."""

    @dataclass(frozen=True, config=ConfigDict(extra="forbid"))
    class Config:
        """Fields of a ``tools.python_sandbox:PythonSandbox`` block."""

        timeout_s: Annotated[float, Field(gt=0)] = TIMEOUT_S
        """Seconds after which code is interrupted; code that goes on is killed half a second later."""
        memory_mb: Annotated[int, Field(ge=16)] = MEMORY_MB
        """MiB that code may use beyond what the interpreter and its libraries take."""
        disk_mb: Annotated[int, Field(ge=1)] = 64
        """MiB of files in the working folder, which lies in memory and ends with the call (or the conversation)."""
        output_characters: Annotated[int, Field(ge=200)] = 8000
        """Characters of text that come back; of more, the beginning."""
        output_pictures: Annotated[int, Field(ge=0, le=1000)] = 8
        """Pictures that come back from a call."""
        output_pixels: Annotated[int, Field(ge=1, lt=2**32)] = 2048 * 2048
        """Pixels of each of them; a larger one is left out, and the model is told so."""
        parallel: Annotated[int, Field(ge=1)] = 16
        """Calls that run at a time; others wait."""
        warm: Annotated[int, Field(ge=0, le=16)] = 4
        """Interpreters that wait, confined, for the next calls; it is they that make a call cost milliseconds."""
        keep_state: bool = False
        """Whether variables live on from call to call of a conversation."""
        packages: tuple[str, ...] = PACKAGES
        """Distributions that code can import beside NumPy and Pillow, with all that they need."""
        isolation: Level | None = None
        """The level to insist on: bubblewrap, namespaces, landlock or none; otherwise the strongest that can be had."""
        unsafe: bool = False
        """Whether code may run without isolation where none can be had. It can then do whatever this user can."""

        @model_validator(mode="after")
        def _said_aloud(self) -> PythonSandbox.Config:
            if self.isolation == "none" and not self.unsafe:
                raise ValueError("isolation 'none' lets code do whatever this user can; set 'unsafe' to true if that is meant")
            return self

    def __init__(self, config: Config) -> None:
        self.config = config
        self.name = "python"
        self.ordered = config.keep_state  # a variable that one call of a turn sets is there for the next
        self.level: Level = config.isolation or pool.strongest(config.packages, config.unsafe)
        pool.require(self.level, config.packages)
        self._running = threading.BoundedSemaphore(config.parallel)
        self._limits = wire.Limits(config.output_characters, config.output_pictures, config.output_pixels)

    def __call__(self, code: str, ctx: ToolContext) -> ToolResult:
        """Run Python code and see what it prints, the value of its last expression, and pictures.

        NumPy, Pillow and matplotlib are installed. `images` is the list of all pictures so far, as PIL images: images[0] is
        image 1. show(picture) gives a PIL image, a figure or an array back to you, and open matplotlib figures come back too.

        Args:
            code: The Python code.
        """
        session = ctx.state.setdefault(_STATE, Session()) if self.config.keep_state else None
        return self.run(code, ctx.pictures, session=session, timeout_s=ctx.timeout_s, generator=ctx.generator)

    def run(
        self,
        code: str,
        images: Sequence[Picture | Image.Image] = (),
        *,
        session: Session | None = None,
        timeout_s: float = math.inf,
        generator: random.Random | None = None,
    ) -> ToolResult:
        """Run ``code`` on ``images``, in the interpreter of ``session`` if there is one, for no longer than ``timeout_s`` either.

        Random numbers of the code follow from ``generator``; without one they are the same in every call. Raises ToolError if
        ``timeout_s`` pass before it is this call's turn.
        """
        request = wire.Request(
            secrets.token_bytes(16),
            code,
            min(self.config.timeout_s, timeout_s),
            generator.getrandbits(32) if generator is not None else 0,
            self._limits,
            tuple(map(_pixels, images)),
        )
        if not self._running.acquire(timeout=min(timeout_s, threading.TIMEOUT_MAX)):
            raise ToolError("Python is busy; try again later.")
        started = time.perf_counter()
        try:
            answer = self._once(request) if session is None else self._within(session, request)
        finally:
            self._running.release()
        metrics = {"python_seconds": time.perf_counter() - started, "python_timeout": float(answer.outcome == wire.TIMED_OUT)}
        pictures = tuple(Picture(Image.frombytes("RGB", (width, height), pixels)) for width, height, pixels in answer.pictures)
        text = answer.text or ("" if pictures else _NOTHING)
        return ToolResult(text, pictures, answer.outcome != wire.FINISHED, metrics, {"isolation": self.level})

    def _start(self, cpu_s: int | None) -> Job:
        config = self.config
        limits = JobLimits(config.memory_mb, config.disk_mb, cpu_s)
        return pool.start_job(self.level, config.packages, limits, config.warm)

    def _once(self, request: wire.Request) -> wire.Answer:
        job = self._start(math.ceil(request.timeout_s) + 1)
        try:
            return job.call(request)
        except JobLost as lost:
            return _lost(request, lost)
        finally:
            job.close()

    def _within(self, session: Session, request: wire.Request) -> wire.Answer:
        with session.lock:
            if session.job is None or not session.job.alive:
                session.job = self._start(None)
            try:
                return session.job.call(request)
            except JobLost as lost:
                return _lost(request, lost, _GONE)


def run_python(
    code: str,
    *,
    images: Sequence[Picture | Image.Image] = (),
    timeout_s: float = TIMEOUT_S,
    memory_mb: int = MEMORY_MB,
) -> ToolResult:
    """Run ``code`` on ``images`` (in the code a list of PIL images), at the strongest isolation that can be had here.

    Returns what the code printed, the value of its last expression, and the pictures that it gave to ``show`` or left as open
    matplotlib figures; an error of the code is a result. Raises EnvironmentMissing where this machine cannot isolate code.
    """
    return _sandbox(timeout_s, memory_mb).run(code, images)


def isolation_level() -> Level | None:
    """The strongest level that this machine reaches; None if it reaches none."""
    try:
        return pool.strongest((), unsafe=False)
    except EnvironmentMissing:
        return None


@functools.lru_cache(maxsize=32)
def _sandbox(timeout_s: float, memory_mb: int) -> PythonSandbox:
    return PythonSandbox(PythonSandbox.Config(timeout_s=timeout_s, memory_mb=memory_mb))


def _pixels(picture: Picture | Image.Image) -> wire.Pixels:
    image = (picture if isinstance(picture, Picture) else Picture(picture)).image
    return image.width, image.height, image.tobytes()


def _lost(request: wire.Request, lost: JobLost, consequence: str = "") -> wire.Answer:
    outcome = wire.TIMED_OUT if lost.timed_out else wire.FAILED
    sentence = str(lost)
    return wire.Answer(request.nonce, outcome, f"{sentence[0].upper()}{sentence[1:]}. {consequence}".strip())
