"""A Python with everything imported that forks a confined process for each job; started by ``shell``, never by hand.

Over its control socket a zygote says that it is ready and then receives jobs: limits as JSON, and one end of a stream. On that
stream the trainer gets a handle (pidfd) of the new process, a byte that says that it is confined, and then an answer a request.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import sys
from functools import partial
from typing import Any, NoReturn

from tools.python_sandbox_parts import confine, seccomp
from tools.python_sandbox_parts.notebook import Notebook
from tools.python_sandbox_parts.wire import FAILED, FINISHED, Limits, Request, WireError, pack_answer, read_request

CHANNEL = 3  # where a job finds its stream
CONFINED, REFUSED = b"c", b"r"
JOB_NAMESPACES = confine.NEWNS | confine.NEWPID | confine.NEWIPC | confine.NEWUTS


class Absent:
    """Lets packages that must not be read look as if they were not installed, where their files can be seen."""

    def __init__(self, settings: dict[str, Any]) -> None:
        seen = {name.partition(".")[0] for folder in settings["listable"] for name in os.listdir(folder)}
        self._names = seen - set(settings["names"])

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name in self._names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main(settings: dict[str, Any]) -> NoReturn:
    """settings: see ``shell.settings``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the trainer decides when this ends
    if settings["enter"]:
        _enter_namespaces(settings)
    else:
        confine.die_with_parent()
    control = socket.socket(fileno=settings["control"])
    for module in settings["preload"]:
        importlib.import_module(module)
    sys.path.remove(settings["root"])  # what is needed of this project is imported
    sys.meta_path.insert(0, Absent(settings))
    _warm_up()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for jobs, so the kernel shall bury them
    gc.collect()
    gc.freeze()
    control.send(b"ready")
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 4096, 1, socket.MSG_CMSG_CLOEXEC)
        if not message:
            os._exit(0)
        (channel,) = descriptors
        _start(settings, json.loads(message), channel)
        os.close(channel)


def _enter_namespaces(settings: dict[str, Any]) -> None:
    """Go on as process 1 of new namespaces, which the kernel empties when it ends; the process outside waits for it."""
    confine.enter_user_namespace()
    confine.die_with_parent()  # only now: entering a user namespace would undo it
    pid = os.fork()
    if pid:
        os.close(settings["control"])
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
    confine.die_with_parent()
    confine.mount_memory(settings["work"], 16)


def _warm_up() -> None:
    """Run a cell, so that what Python, NumPy and matplotlib do at their first use is done before the forks."""
    code = "import io, math, numpy as np\nfrom PIL import Image, ImageDraw\nnp.random.rand(3)\nshow(images[0].rotate(90))\n"
    if "matplotlib" in sys.modules:
        pyplot: Any = importlib.import_module("matplotlib.pyplot")
        pyplot.show = lambda *arguments, **options: None  # open figures are given back at the end
        code += "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.title('warm')\n"
    stdout, stderr = sys.stdout, sys.stderr
    limits, picture = Limits(1000, 9, 1 << 22), (2, 2, bytes(12))
    good, bad = (Notebook().run(Request(b"", cell, 60.0, 0, limits, (picture,))) for cell in (code, "1 / 0"))
    sys.stdout, sys.stderr = stdout, stderr
    if good.outcome != FINISHED or bad.outcome != FAILED:
        raise RuntimeError(good.text)


def _start(settings: dict[str, Any], job: dict[str, Any], channel: int) -> None:
    """Fork the process of a job, with another in between where only a child can be in a new process namespace."""
    pid = os.fork()
    if pid == 0:
        try:
            if settings["namespaces"]:
                confine.unshare(JOB_NAMESPACES)
                inner = os.fork()
                if inner:
                    _send_handle(channel, inner)
                    os._exit(0)
            else:
                confine.die_with_parent()
            _job(settings, job, channel)
        except BaseException as error:
            _complain(channel, error)
        os._exit(1)
    if not settings["namespaces"]:
        _send_handle(channel, pid)


def _send_handle(channel: int, pid: int) -> None:
    try:
        handle = os.pidfd_open(pid)
        with socket.socket(fileno=os.dup(channel)) as stream:
            socket.send_fds(stream, [b"h"], [handle])
        os.close(handle)
    except OSError:  # the trainer hung up, or the process has ended: the stream's end says so
        return


def _complain(channel: int, error: BaseException) -> None:
    try:
        os.write(channel, REFUSED + f"{type(error).__name__}: {error}".encode())
    except OSError:
        return


def _job(settings: dict[str, Any], job: dict[str, Any], channel: int) -> NoReturn:
    if channel != CHANNEL:
        os.dup2(channel, CHANNEL, inheritable=False)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.closerange(CHANNEL + 1, os.sysconf("SC_OPEN_MAX"))
    for number in (signal.SIGCHLD, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    try:
        _confine(settings, job)
    except Exception as error:
        _complain(CHANNEL, error)
        os._exit(1)
    os.write(CHANNEL, CONFINED)
    notebook, read = Notebook(), partial(os.read, CHANNEL)
    while True:
        try:
            request = read_request(read)
        except WireError:  # the conversation is over
            os._exit(0)
        answer = memoryview(pack_answer(notebook.run(request)))
        while answer:
            answer = answer[os.write(CHANNEL, answer) :]


def _confine(settings: dict[str, Any], job: dict[str, Any]) -> None:
    """From here on this process can do little but compute. The order matters: a step takes what the next no longer needs."""
    work, disk = settings["work"], job["disk_mb"]
    confine.limit(memory_bytes=job["memory_mb"] << 20, file_bytes=disk << 20, cpu_s=job["cpu_s"])
    if settings["namespaces"]:
        confine.keep_mounts_private()
        confine.mount_memory(work, disk)
        confine.mount_memory("/proc", 1, writable=False)
        os.chdir(work)
    else:
        os.chdir("/" if settings["confined"] else work)
    if not settings["confined"]:
        return
    if confine.landlock_version():
        confine.landlock(
            settings["readable"], settings["listable"], settings["devices"], work if settings["namespaces"] else None
        )
    elif not settings["own_files"]:
        raise OSError("Landlock is not in this kernel")
    confine.drop_privileges()
    seccomp.install(os.getpid())
