"""How a zygote is started at each level of isolation."""

from __future__ import annotations

import json
import shutil
import sys
from typing import Any, Literal, get_args

from tools.python_sandbox_parts.packages import DEVICES, ROOT, Reading

Level = Literal["bubblewrap", "namespaces", "landlock", "none"]
LEVELS: tuple[Level, ...] = get_args(Level)  # from the strongest down
MEANING: dict[Level, str] = {
    "bubblewrap": "bubblewrap: own file system, processes and network, and a filter of system calls",
    "namespaces": "own processes, network and working folder, files hidden by Landlock, and a filter of system calls",
    "landlock": "files hidden by Landlock and a filter of system calls; the code has no folder to write in",
    "none": "no isolation",
}
_BOOT = (
    "import json, sys; settings = json.loads(sys.argv[1]); sys.path += settings['path']; "
    "from tools.python_sandbox_parts.zygote import main; main(settings)"
)

WORK = "/sandbox"  # the jobs' folder within bubblewrap; at /tmp it would hide a project that lies there


def available(level: Level) -> bool:
    """Whether trying ``level`` makes sense here."""
    return sys.platform == "linux" and (level != "bubblewrap" or shutil.which("bwrap") is not None)


def command(level: Level, reading: Reading, control: int, work: str) -> tuple[list[str], dict[str, str]]:
    """Program and arguments, and the whole environment. control: the inherited socket. work: an empty folder of the host."""
    if level == "bubblewrap":
        work = WORK
    python = [reading.python, "-s", "-S", "-P", "-B", "-c", _BOOT, json.dumps(_settings(level, reading, control, work))]
    # One thread, so that a fork takes everything with it; sets in the same order in every run.
    environment = {"HOME": work, "TMPDIR": work, "MPLCONFIGDIR": work, "MPLBACKEND": "agg", "LANG": "C.UTF-8"}
    environment |= {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return (_bubblewrap(reading) if level == "bubblewrap" else []) + python, environment


def _settings(level: Level, reading: Reading, control: int, work: str) -> dict[str, Any]:
    """What ``zygote.main`` is given. enter: make namespaces first. namespaces: one set more for each job.

    own_files: the file system holds nothing but what may be read, so that Landlock need not be there.
    """
    return {
        "control": control,
        "root": str(ROOT),
        "path": [str(ROOT), *reading.site],
        "names": list(reading.names),
        "preload": list(reading.modules),
        "readable": list(reading.readable),
        "listable": list(reading.site),
        "devices": list(DEVICES),
        "work": work,
        "enter": level == "namespaces",
        "namespaces": level in ("bubblewrap", "namespaces"),
        "own_files": level == "bubblewrap",
        "confined": level != "none",
    }


def _bubblewrap(reading: Reading) -> list[str]:
    """The zygote keeps the right to mount (within its own namespace), for the jobs' folders; they give it up."""
    binds = [part for path in reading.readable for part in ("--ro-bind", path, path)]
    devices = [part for path in DEVICES for part in ("--dev-bind", path, path)]
    head = [shutil.which("bwrap") or "bwrap", "--unshare-all", "--die-with-parent", "--new-session"]
    rights = ["--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]
    return [*head, *rights, *binds, *devices, "--proc", "/proc", "--tmpfs", WORK, "--remount-ro", "/", "--chdir", "/", "--"]
