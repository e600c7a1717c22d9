"""How a process locks itself up, in Python alone: namespaces, private folders, Landlock, capabilities, limits.

Sources: unshare(2), mount(2), capset(2), prctl(2), landlock(7), setrlimit(2).
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
from collections.abc import Sequence

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 1, 2, 4, 8, 0x4000, 0x40000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _CLEAR_ALL = 1, 4, 38, 47, 4
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF, _VERSION, _PATH_BENEATH = 444, 445, 446, 1, 1  # Landlock; the same on every processor
_READ, _READ_DIR = 0b1100, 0b1000  # READ_FILE and READ_DIR; READ_DIR
_OF_FILES = 1 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15  # EXECUTE, WRITE_FILE, READ_FILE, TRUNCATE, IOCTL_DEV
_WRITE_FILE = 1 << 1
_IN_WORK = 0b1111_1110 & ~(1 << 6) | 1 << 8 | 1 << 13 | 1 << 14  # all but devices, sockets, pipes, links and execution

libc = ctypes.CDLL(None, use_errno=True)


def _succeed(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def unshare(flags: int) -> None:
    """Raises OSError where this process may not."""
    _succeed(libc.unshare(flags), "unshare")


def enter_user_namespace() -> None:
    """New namespaces of every kind, as the only user of one of them; the process namespace is that of the next child."""
    user, group = os.geteuid(), os.getegid()
    unshare(NEWUSER | NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET)
    for name, line in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)
    keep_mounts_private()


def keep_mounts_private() -> None:
    _succeed(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None), "mount --make-rprivate")


def mount_memory(folder: str, size_mb: int, *, writable: bool = True) -> None:
    """An empty file system of at most ``size_mb`` MiB over ``folder``, visible in this mount namespace alone."""
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC | (0 if writable else _MS_RDONLY)
    options = f"size={size_mb}m,nr_inodes=1024,mode=0700".encode()
    _succeed(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", flags, options), f"mount on {folder}")


def die_with_parent() -> None:
    """Raises ProcessLookupError if the parent is gone already. Beware: the parent is the thread that started this process."""
    parent = os.getppid()
    _succeed(libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        raise ProcessLookupError("the parent has ended")


def drop_privileges() -> None:
    """No capability, none to be had from a program either, no core dump, no tracer."""
    _succeed(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    libc.prctl(_PR_CAP_AMBIENT, _CLEAR_ALL, 0, 0, 0)
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))
    _succeed(libc.capset(ctypes.byref(header), ctypes.byref(ctypes.create_string_buffer(24))), "capset")
    _succeed(libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl(PR_SET_DUMPABLE)")


def limit(*, memory_bytes: int, file_bytes: int, cpu_s: int | None, open_files: int = 64) -> None:
    """memory_bytes: address space beyond what this process has now. cpu_s: processor time in all; None: as much as it likes."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    limits = {
        resource.RLIMIT_AS: now + memory_bytes,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: open_files,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_STACK: 8 << 20,
    }
    if cpu_s is not None:
        limits[resource.RLIMIT_CPU] = cpu_s
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def landlock_version() -> int:
    """The version of Landlock's interface, 0 where the kernel has none."""
    return max(0, libc.syscall(_CREATE_RULESET, None, 0, _VERSION))


def landlock(readable: Sequence[str], listable: Sequence[str], devices: Sequence[str], work: str | None) -> None:
    """From now on only ``readable`` can be read, ``listable`` listed, ``devices`` read and written, and ``work`` worked in.

    No TCP and, from version 6 of the interface on, no signal and no abstract socket leaves this process. Raises OSError.
    """
    version = landlock_version()
    bits = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    handled = (1 << bits) - 1
    attributes = struct.pack("=QQQ", handled, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _succeed(libc.syscall(_CREATE_RULESET, attributes, size, 0), "landlock_create_ruleset")
    for path in readable:
        _allow(ruleset, path, _READ & handled)
    for path in listable:
        _allow(ruleset, path, _READ_DIR & handled)
    for path in devices:
        _allow(ruleset, path, (_READ | _WRITE_FILE) & handled)
    if work is not None:
        _allow(ruleset, work, _IN_WORK & handled)
    _succeed(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    _succeed(libc.syscall(_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def _allow(ruleset: int, path: str, access: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        access = access if os.path.isdir(path) else access & _OF_FILES
        rule = struct.pack("=Qi", access, descriptor)
        _succeed(libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0), f"landlock_add_rule({path})")
    finally:
        os.close(descriptor)
