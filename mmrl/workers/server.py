"""Imported by the server that worker processes are forked from: it imports what they need, and ends when its parent does.

Python's own fork server ends when the last process that holds its pipe does, and each worker holds it: one that hangs would keep
the server, and with it all workers and the shared memory, long after the run was killed.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from contextlib import suppress

PRELOAD = "MMRL_WORKERS_IMPORT"  # environment variable: the modules to import before anything is forked, comma-separated
_SECONDS = 0.5  # between two looks at the parent


def watch_parent() -> None:
    """Look after the parent from now on, between whatever this process does. A forked process inherits no timer."""
    parent = os.getppid()

    def look(*_: object) -> None:
        if os.getppid() != parent:
            os._exit(1)

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS, _SECONDS)


if sys.argv[:1] == ["-c"] and "multiprocessing.forkserver" in sys.modules:  # how Python starts the server, and only the server
    watch_parent()
    for name in filter(None, os.environ.get(PRELOAD, "").split(",")):
        with suppress(Exception):  # the worker that needs it meets the same error, and can tell its parent
            importlib.import_module(name)
