"""A seccomp filter that lets a process compute, and work with the files it may open, and nothing else.

Every system call that TABLE does not name fails with EPERM: no new process or program, no socket, no signal to another process,
no change of owner, mode or time of a file, no mount, no key, no trace, no asynchronous ring. Threads are allowed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Mapping

# name, its number on x86_64, its number on aarch64 ("-": it has none)
TABLE = """
read 0 63            write 1 64            readv 19 65           writev 20 66          pread64 17 67         pwrite64 18 68
lseek 8 62           open 2 -              openat 257 56         close 3 57            close_range 436 436   stat 4 -
fstat 5 80           lstat 6 -             newfstatat 262 79     statx 332 291         statfs 137 43         fstatfs 138 44
access 21 -          faccessat 269 48      faccessat2 439 439    readlink 89 -         readlinkat 267 78     getcwd 79 17
chdir 80 49          fchdir 81 50          getdents 78 -         getdents64 217 61     mkdir 83 -            mkdirat 258 34
rmdir 84 -           unlink 87 -           unlinkat 263 35       rename 82 -           renameat 264 38       renameat2 316 276
ftruncate 77 46      fsync 74 82           fdatasync 75 83       dup 32 23             dup2 33 -             dup3 292 24
pipe 22 -            pipe2 293 59          poll 7 -              ppoll 271 73          select 23 -           pselect6 270 72
mmap 9 222           mprotect 10 226       munmap 11 215         mremap 25 216         madvise 28 233        msync 26 227
brk 12 214           futex 202 98          set_robust_list 273 99                      get_robust_list 274 100
rseq 334 293         set_tid_address 218 96                      membarrier 324 283    getcpu 309 168        sched_yield 24 124
sched_getaffinity 204 123                  getpid 39 172         gettid 186 178        getppid 110 173       getuid 102 174
geteuid 107 175      getgid 104 176        getegid 108 177       getresuid 118 148     getresgid 120 150     getgroups 115 158
getpgrp 111 -        getpgid 121 155       getsid 124 156        uname 63 160          sysinfo 99 179        umask 95 166
getrandom 318 278    getrusage 98 165      getrlimit 97 163      times 100 153         time 201 -            gettimeofday 96 169
clock_gettime 228 113                      clock_getres 229 114  clock_nanosleep 230 115                     nanosleep 35 101
restart_syscall 219 128                    alarm 37 -            setitimer 38 103      getitimer 36 102      rt_sigaction 13 134
rt_sigprocmask 14 135                      rt_sigreturn 15 139   rt_sigpending 127 136 rt_sigtimedwait 128 137
rt_sigsuspend 130 133                      sigaltstack 131 132   exit 60 93            exit_group 231 94     arch_prctl 158 -
kill 62 129          tgkill 234 131        clone 56 220          clone3 435 435        ioctl 16 29           fcntl 72 25
prctl 157 167        prlimit64 302 261
"""
_ARCHITECTURES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}  # AUDIT_ARCH_*, column of TABLE
# What may be asked of calls that can do many things: (number of the argument, its allowed values).
_IOCTL = (
    0x5401,
    0x5413,
    0x541B,
    0x5421,
    0x5450,
    0x5451,
    0x802C542A,
)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIO(N)CLEX, TCGETS2
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030)  # F_DUPFD to F_SETLKW, without F_SETOWN, which signals; F_DUPFD_CLOEXEC
_PRCTL = (15, 16)  # PR_SET_NAME, PR_GET_NAME
_THREAD = 0x00010000
_NEW_NAMESPACES = 0x7E020080  # CLONE_NEWNS, CGROUP, UTS, IPC, USER, PID, NET, TIME

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2


def supported() -> bool:
    """Whether the filter exists for this machine's processor."""
    return platform.machine() in _ARCHITECTURES


def numbers(machine: str) -> dict[str, int]:
    """Name -> number of every system call of TABLE that ``machine`` has."""
    column = _ARCHITECTURES[machine][1]
    words = TABLE.split()
    rows = (words[i : i + 3] for i in range(0, len(words), 3))
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


def program(machine: str, pid: int) -> bytes:
    """The filter in BPF, for a process that knows itself as ``pid``: 8 bytes an instruction (struct sock_filter)."""
    known = numbers(machine)
    special = _special(pid)
    code = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _ARCHITECTURES[machine][0]), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    for name, number in known.items():
        block = special.get(name, [(_RETURN, 0, 0, _ALLOW)])
        code += [(_EQUAL, 0, len(block), number), *block]
    code.append(_deny(errno.EPERM))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def install(pid: int) -> None:
    """Put the filter on this thread and all that it starts, for good. Raises OSError. Needs no_new_privs."""
    code = program(platform.machine(), pid)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(header), 0, 0) != 0:
        code_ = ctypes.get_errno()
        raise OSError(code_, f"seccomp: {os.strerror(code_)}")


_Block = list[tuple[int, int, int, int]]


def _special(pid: int) -> Mapping[str, _Block]:
    allow, deny = (_RETURN, 0, 0, _ALLOW), _deny(errno.EPERM)
    return {
        "kill": _one_of(0, (pid,)),
        "tgkill": _one_of(0, (pid,)),
        "ioctl": _one_of(1, _IOCTL),
        "fcntl": _one_of(1, _FCNTL),
        "prctl": _one_of(0, _PRCTL),
        "clone3": [_deny(errno.ENOSYS)],  # its flags lie in memory, where a filter cannot look; the C library then uses clone
        "clone": [_argument(0), (_ANY_BIT, 0, 1, _NEW_NAMESPACES), deny, (_ANY_BIT, 0, 1, _THREAD), allow, deny],
        # only to read one's own limits: process 0, and no new value (both halves of the pointer are 0)
        "prlimit64": [
            _argument(0),
            (_EQUAL, 0, 5, 0),
            _argument(2),
            (_EQUAL, 0, 3, 0),
            (_LOAD, 0, 0, 16 + 8 * 2 + 4),
            (_EQUAL, 0, 1, 0),
            allow,
            deny,
        ],
    }


def _one_of(argument: int, values: tuple[int, ...]) -> _Block:
    block: _Block = [_argument(argument)]
    for value in values:
        block += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
    return [*block, _deny(errno.EPERM)]


def _argument(index: int) -> tuple[int, int, int, int]:
    """Load the lower half of an argument (little endian), which is all that the kernel reads of an int."""
    return _LOAD, 0, 0, 16 + 8 * index


def _deny(code: int) -> tuple[int, int, int, int]:
    return _RETURN, 0, 0, 0x00050000 | code
