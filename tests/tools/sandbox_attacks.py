"""Attacks on the Python tool as data; ``test_python_sandbox_escapes`` runs them. PREFIX stands before the code of each.

Before PREFIX stand the names SECRET (a file), TRAINER and VICTIM (processes), PORT (of a server), ABSTRACT and SOCKET (unix
sockets), PROJECT (a folder) and NUMPY (a file of a package).
"""

from __future__ import annotations

from dataclasses import dataclass

PREFIX = """
import ctypes, errno, fcntl, glob, io, mmap, os, resource, signal, socket, struct, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def escaped(yes, note=""):
    print("ESCAPED" if yes else "held", note)
def call(number, *arguments):
    result = libc.syscall(number, *arguments)
    escaped(result >= 0, errno.errorcode.get(ctypes.get_errno(), ""))
def attempt(function, *arguments):
    try:
        function(*arguments)
    except (OSError, ValueError, RuntimeError, subprocess.SubprocessError) as error:
        escaped(False, f"{type(error).__name__} {errno.errorcode.get(getattr(error, 'errno', None), '')}")
    else:
        escaped(True)
def header(**changes):
    import gc
    from tools.python_sandbox_parts import wire
    request = next(thing for thing in gc.get_objects() if isinstance(thing, wire.Request) and thing.nonce)
    values = {"nonce": request.nonce, "outcome": 0, "length": 0, "count": 0} | changes
    return wire._ANSWER.pack(*values.values())
"""
DENIED = "EPERM|EACCES|ENOENT|EROFS"
ENDED = "ended its interpreter"
KILLED = "was killed"
NO_PICTURE = "bomb.png is no picture|Permission"
PNG = """
import zlib
def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
def png(side, chunks):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    with open("bomb.png", "wb") as file:
        file.write(b"\\x89PNG\\r\\n\\x1a\\n" + head + chunks + chunk(b"IEND", b""))
"""


@dataclass(frozen=True)
class Attack:
    """expect: what the result says instead, as a regular expression. control: it succeeds without isolation, and harms nobody.

    timeout_s, memory_mb: of the call. x86: whether it names system calls by their numbers on x86_64.
    """

    code: str
    expect: str = f"held.*({DENIED})"
    control: bool = False
    timeout_s: float = 5.0
    memory_mb: int = 256
    x86: bool = False


def denied(number: str, control: bool = False) -> Attack:
    """A system call that the filter refuses, for whatever arguments."""
    return Attack(f"call({number})", "held EPERM", control, x86=True)


FILES = {
    "secret file": Attack("attempt(open, SECRET)", control=True),
    "secret by a path with dots": Attack("attempt(open, '/usr/lib/../../' + SECRET)", control=True),
    "secret by /proc/self/root": Attack("attempt(open, '/proc/self/root' + SECRET)", control=True),
    "secret by a symbolic link": Attack("attempt(lambda: (os.symlink(SECRET, 'link'), open('link')))", control=True),
    "secret by a hard link": Attack("attempt(lambda: (os.link(SECRET, 'link'), open('link')))"),
    "secret by rename": Attack("attempt(os.rename, SECRET, 'mine')", f"held.*({DENIED}|EXDEV)"),
    "secret by a handle": Attack("call(304, -100, ctypes.create_string_buffer(128), 0)", "held EPERM", x86=True),
    "secret by a descriptor of the root": Attack(
        "attempt(lambda: open(os.open(SECRET, os.O_RDONLY, dir_fd=os.open('/', os.O_PATH))))"
    ),
    "deleting the secret": Attack("attempt(os.unlink, SECRET)"),
    "truncating the secret": Attack("attempt(os.truncate, SECRET, 0)"),
    "shadow": Attack("attempt(open, '/etc/shadow')"),
    "passwd": Attack("attempt(open, '/etc/passwd')", control=True),
    "listing the project": Attack(
        "attempt(lambda: {'mmrl': 1}[next(n for n in os.listdir(PROJECT) if n == 'mmrl')])",
        f"held.*({DENIED})|StopIteration",
        control=True,
    ),
    "listing home folders": Attack("attempt(lambda: [os.listdir('/root'), os.listdir('/home')])"),
    "settings of the project": Attack("attempt(open, PROJECT + '/pyproject.toml')", control=True),
    "writing into a package": Attack("attempt(open, NUMPY, 'a')"),
    "writing beside a package": Attack("attempt(open, os.path.dirname(NUMPY) + '/evil.py', 'w')"),
    "writing into the standard library": Attack("attempt(open, os.__file__, 'a')"),
    "writing at the root": Attack("attempt(open, '/evil', 'w')"),
    "making folders anywhere": Attack("attempt(os.mkdir, '/usr/lib/evil')"),
    "chmod": Attack("attempt(os.chmod, SECRET, 0o777)"),
    "chown": Attack("attempt(os.chown, SECRET, 65534, 65534)"),
    "changing times": Attack("attempt(os.utime, SECRET, (0, 0))"),
    "extended attributes": Attack("attempt(os.setxattr, SECRET, 'user.evil', b'x')"),
    "a device made": Attack("attempt(os.mknod, 'disk', 0o60600, os.makedev(254, 0))"),
    "a set-user-id program made": Attack(
        "open('evil', 'w').close()\nattempt(os.chmod, 'evil', 0o4777)", f"held.*({DENIED})|Permission"
    ),
    "devices": Attack(
        "found = [p for p in glob.glob('/dev/*') + ['/dev/mem', '/dev/kmsg'] if os.access(p, os.W_OK)]\n"
        "attempt(lambda: [open(p, 'rb') for p in ('/dev/mem', '/dev/vda', '/dev/sda', '/dev/kmsg')])"
    ),
    "shared memory files": Attack("attempt(open, '/dev/shm/evil', 'w')"),
    "shared memory of Python": Attack(
        "from multiprocessing import shared_memory\nattempt(lambda: shared_memory.SharedMemory(create=True, size=9))"
    ),
    "kernel settings": Attack("attempt(open, '/proc/sys/kernel/core_pattern', 'w')"),
    "control groups": Attack("attempt(os.listdir, '/sys/fs/cgroup')", control=True),
}
PROCESSES = {
    "environment": Attack(
        "known = {'HOME', 'TMPDIR', 'MPLCONFIGDIR', 'MPLBACKEND', 'LANG', 'PYTHONHASHSEED', 'OMP_NUM_THREADS', "
        "'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS', 'PWD', 'LC_CTYPE'}\nescaped(set(os.environ) - known)",
        "held",
    ),
    "environment of the trainer": Attack("attempt(open, f'/proc/{TRAINER}/environ')", control=True),
    "memory of the trainer": Attack("attempt(open, f'/proc/{TRAINER}/mem', 'r+b')", control=True),
    "list of processes": Attack("attempt(lambda: print(os.listdir('/proc')[0]))", "held.*|IndexError", control=True),
    "descriptors of the parent": Attack("attempt(os.listdir, f'/proc/{os.getppid()}/fd')", control=True),
    "signal to the trainer": Attack("attempt(os.kill, TRAINER, 0)", "held.*(EPERM|ESRCH)", control=True),
    "killing a process": Attack("attempt(os.kill, VICTIM, signal.SIGKILL)", "held.*(EPERM|ESRCH)"),
    "killing everybody": Attack("attempt(os.kill, -1, signal.SIGKILL)", "held.*EPERM"),
    "killing the parent": Attack("attempt(os.kill, os.getppid() or -1, signal.SIGKILL)", f"held.*EPERM|{ENDED}"),
    "killing the group": Attack("attempt(os.killpg, 0, signal.SIGTERM)", "held.*EPERM"),
    "tkill": Attack("call(200, VICTIM, 9)", "held EPERM", x86=True),
    "queued signal": Attack("call(129, VICTIM, 9, ctypes.create_string_buffer(128))", "held EPERM", x86=True),
    "signal by a handle": Attack("attempt(os.pidfd_open, TRAINER)", "held.*EPERM", control=True),
    "signal by the owner of a pipe": Attack(
        "attempt(fcntl.fcntl, os.pipe()[0], fcntl.F_SETOWN, VICTIM)", "held.*EPERM", control=True
    ),
    "signal by an ioctl": Attack("attempt(fcntl.ioctl, os.pipe()[0], 0x8901, struct.pack('i', VICTIM))", "held.*EPERM"),
    "signal by a timer": denied("222, 0, 0, 0"),
    "signal of the parent's death": Attack("escaped(libc.prctl(1, 9, 0, 0, 0) == 0)", "held", control=True),
    "outliving the parent": Attack("escaped(libc.prctl(1, 0, 0, 0, 0) == 0)", "held", control=True),
    "dumpable": Attack("escaped(libc.prctl(4, 1, 0, 0, 0) == 0)", "held", control=True),
    "ptrace": Attack("call(101, 16, VICTIM, 0, 0)", "held EPERM", x86=True),
    "asking to be traced": denied("101, 0, 0, 0, 0"),
    "reading another's memory": Attack(
        "buffer = ctypes.create_string_buffer(8)\ncall(310, TRAINER, buffer, 0, buffer, 0, 0)",
        "held EPERM",
        control=True,
        x86=True,
    ),
    "writing another's memory": denied("311, 1, 0, 0, 0, 0, 0"),
    "fork": Attack("def child():\n    if os.fork() == 0: os._exit(0)\nattempt(child)", "held.*EPERM", control=True),
    "fork bomb": Attack("def bomb():\n    while True: os.fork()\nattempt(bomb)", "held.*EPERM"),
    "vfork": denied("58"),
    "clone without the C library": Attack("call(56, 17, 0, 0, 0, 0)", "held EPERM", x86=True),
    "clone3": Attack("call(435, ctypes.create_string_buffer(88), 88)", "held ENOSYS", x86=True),
    "a thread in new namespaces": Attack("call(56, 0x10D00 | 0x20000000, 0, 0, 0, 0)", "held EPERM", x86=True),
    "a program": Attack("attempt(subprocess.run, ['/bin/true'])", control=True),
    "a shell": Attack("escaped(os.system('true') == 0)", "held", control=True),
    "becoming a program": Attack("attempt(os.execv, sys.executable, ['python', '-c', 'print(1)'])"),
    "becoming a set-user-id program": Attack("attempt(os.execv, '/bin/su', ['su'])"),
    "the C library's spawn": Attack("attempt(os.posix_spawn, '/bin/true', ['true'], {})", control=True),
    "multiprocessing": Attack(
        "import multiprocessing\np = multiprocessing.get_context('fork').Process(target=print)\nattempt(p.start)", control=True
    ),
    "daemon by a double fork": Attack(
        "def daemon():\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0: time.sleep(9)\n"
        "        os._exit(0)\nattempt(daemon)"
    ),
    "a session of its own": Attack("attempt(os.setsid)", "held.*EPERM"),
    "priority of the trainer": Attack("attempt(os.setpriority, os.PRIO_PROCESS, TRAINER, 19)", "held.*EPERM"),
    "priority of its own": Attack("attempt(os.nice, -5)", "held.*EPERM"),
    "real-time priority": Attack("attempt(os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(1))", "held.*EPERM"),
    "processors of the trainer": Attack("attempt(os.sched_setaffinity, TRAINER, {0})", "held.*EPERM"),
    "limits of the trainer": Attack("attempt(resource.prlimit, TRAINER, resource.RLIMIT_NOFILE)", "held.*EPERM", control=True),
    "raising its limits": Attack(
        "attempt(resource.setrlimit, resource.RLIMIT_CORE, (0, 0))", "held.*(EPERM|ValueError)", control=True
    ),
    "becoming another user": Attack("attempt(os.setuid, 65534)", "held.*EPERM"),
    "becoming root": Attack("attempt(os.setresuid, 0, 0, 0)", "held.*EPERM"),
}
NETWORK = {
    "connection to a server": Attack("attempt(socket.create_connection, ('127.0.0.1', PORT), 2)", control=True),
    "name server": Attack("attempt(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)", control=True),
    "looking up a name": Attack("attempt(socket.getaddrinfo, 'example.com', 80)", "held"),
    "listening": Attack("attempt(socket.create_server, ('127.0.0.1', 0))", control=True),
    "abstract socket": Attack("s = socket.socket(socket.AF_UNIX)\nattempt(s.connect, ABSTRACT)", "PermissionError"),
    "socket in a folder": Attack("attempt(lambda: socket.socket(socket.AF_UNIX).connect(SOCKET))"),
    "raw socket": Attack("attempt(socket.socket, socket.AF_PACKET, socket.SOCK_RAW)"),
    "netlink": Attack("attempt(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW)", control=True),
    "a pair of sockets": Attack("attempt(socket.socketpair)", control=True),
    "a descriptor sent to the trainer": Attack(
        "attempt(socket.send_fds, socket.socket(fileno=3), [b'x'], [0])", "held.*|PermissionError"
    ),
}
KERNEL = {
    "mount": Attack(
        "escaped(libc.mount(b'none', b'/', b'tmpfs', 0, None) == 0, errno.errorcode.get(ctypes.get_errno()))", "held EPERM"
    ),
    "umount": Attack("escaped(libc.umount2(b'/proc', 2) == 0, errno.errorcode.get(ctypes.get_errno()))", "held EPERM"),
    "new mount interface": denied("428, -100, b'/', 0"),
    "chroot": Attack("attempt(os.chroot, '/')", "held.*EPERM"),
    "pivot_root": denied("155, b'/', b'/'"),
    "unshare": Attack(
        "escaped(libc.unshare(0x10000000) == 0, errno.errorcode.get(ctypes.get_errno()))", "held EPERM", control=True
    ),
    "setns": denied("308, 3, 0"),
    "kexec": denied("246, 0, 0, 0, 0"),
    "module": denied("175, 0, 0, b''"),
    "reboot": denied("169, 0, 0, 0, 0"),
    "swap": denied("167, b'/swap', 0"),
    "host name": denied("170, b'evil', 4"),
    "clock": denied("227, 0, 0"),
    "kernel log": denied("103, 3, 0, 0"),
    "bpf": denied("321, 0, 0, 0"),
    "perf_event_open": denied("298, 0, 0, -1, -1, 0"),
    "add_key": denied("248, b'user', b'evil', b'x', 1, -2"),
    "keyctl": denied("250, 0, -3, 1", control=True),
    "io_uring": Attack("call(425, 4, ctypes.create_string_buffer(120))", "held EPERM", x86=True),
    "userfaultfd": denied("323, 1"),
    "memfd": denied("319, b'evil', 0", control=True),
    "fanotify": denied("300, 0, 0"),
    "inotify": denied("294, 0", control=True),
    "personality": denied("135, 0xffffffff", control=True),
    "System V shared memory": denied("29, 0, 4096, 0o1600", control=False),
    "System V messages": denied("68, 0, 0o1600"),
    "System V semaphores": denied("64, 0, 1, 0o1600"),
    "POSIX messages": denied("240, b'evil', 66, 0o600, 0"),
    "another filter": denied("317, 0, 0, 0"),
    "system calls of 32 bits": Attack(
        "code = mmap.mmap(-1, 4096, prot=7)\ncode.write(bytes.fromhex('b814000000cd80c3'))\n"  # getpid of i386; return
        "address = ctypes.addressof(ctypes.c_char.from_buffer(code))\nescaped(ctypes.CFUNCTYPE(ctypes.c_int)(address)() > 0)",
        f"{ENDED}|held",
        control=False,
        x86=True,
    ),
    "system calls of x32": Attack("call(0x40000000 | 41, 2, 1, 0)", "held (EPERM|ENOSYS)", x86=True),
    "typing into the terminal": Attack("attempt(fcntl.ioctl, 0, 0x5412, b'x')", "held.*EPERM"),
}
RESOURCES = {
    "memory": Attack(
        "hoard = []\nwhile True: hoard.append(bytearray(1 << 20))", "MemoryError|ended its interpreter", memory_mb=64
    ),
    "memory in one piece": Attack("import numpy as np\nnp.ones(1 << 33)", "MemoryError", memory_mb=64),
    "shared memory without a name": Attack("attempt(mmap.mmap, -1, 1 << 32)", "held.*ENOMEM", memory_mb=64),
    "list of itself": Attack("x = [0]\nwhile True: x += x", "MemoryError|ended its interpreter", memory_mb=64),
    "threads": Attack(
        "def start():\n    for _ in range(2000): threading.Thread(target=time.sleep, args=(5,)).start()\nattempt(start)",
        "held RuntimeError|MemoryError|ended its interpreter",
        memory_mb=64,
    ),
    "a full disk": Attack(
        "def fill():\n    for i in range(200): open(f'f{i}', 'wb').write(bytes(1 << 20))\nattempt(fill)",
        "held.*(ENOSPC|EFBIG|EACCES)",
    ),
    "a large file": Attack(
        "def grow():\n    with open('f', 'wb') as f: f.truncate(1 << 40)\nattempt(grow)", "held.*(EFBIG|EACCES)"
    ),
    "many files": Attack(
        "def many():\n    for i in range(3000): open(f'f{i}', 'w').close()\nattempt(many)", "held.*(ENOSPC|EACCES)"
    ),
    "many descriptors": Attack("def many():\n    for i in range(300): os.pipe()\nattempt(many)", "held.*EMFILE"),
    "endless output": Attack("while True: print('x' * 1000)", "longer than 0.3 s", timeout_s=0.3),
    "endless output below Python": Attack("while True: os.write(1, b'x' * 1000)", "longer than 0.3 s", timeout_s=0.3),
    "one enormous line": Attack("print('x' * (30 << 20))", "characters left out"),
    "an enormous value": Attack("'x' * (30 << 20)", "characters left out"),
    "an enormous error": Attack("raise ValueError('x' * (10 << 20))", "characters left out"),
    "endless loop": Attack("while True: pass", "longer than 0.3 s", timeout_s=0.3),
    "endless loop that catches everything": Attack(
        "while True:\n    try:\n        for _ in iter(int, 1): time.sleep(0.001)\n    except BaseException: continue",
        KILLED,
        timeout_s=0.3,
    ),
    "sleeping": Attack("time.sleep(60)", "longer than 0.3 s", timeout_s=0.3),
    "sleeping without a timer": Attack("signal.setitimer(signal.ITIMER_REAL, 0)\ntime.sleep(60)", KILLED, timeout_s=0.3),
    "deaf to signals": Attack("signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass", KILLED, timeout_s=0.3),
    "an endless regular expression": Attack(
        "import re\nre.match('(a*)*b', 'a' * 40)", "longer than 0.3 s|was killed", timeout_s=0.3
    ),
    "threads that go on": Attack(
        "def spin():\n    while True: time.sleep(0.001)\nthreading.Thread(target=spin).start()\nprint('held')", "held"
    ),
    "a stop": Attack("os.kill(os.getpid(), signal.SIGSTOP)\nprint('held')", "held|was killed", timeout_s=0.3),
    "deep recursion": Attack(
        "sys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)\nf(0)",
        "MemoryError|ended its interpreter|longer",
        memory_mb=64,
        timeout_s=0.5,
    ),
    "deep recursion in C": Attack("x = []\nfor _ in range(10**6): x = [x]\nrepr(x)", "RecursionError|ended its interpreter"),
}
CRASHES = {
    "sys.exit": Attack("sys.exit('held')", "SystemExit: held"),
    "os._exit": Attack("os._exit(0)", ENDED),
    "abort": Attack("os.abort()", ENDED),
    "segmentation fault": Attack("ctypes.string_at(0)", ENDED),
    "stack overflow": Attack("ctypes.memset(ctypes.addressof(ctypes.c_int()), 0, 64 << 20)", ENDED),
    "killing itself": Attack("signal.raise_signal(signal.SIGSEGV)\nos.kill(os.getpid(), signal.SIGKILL)\nos._exit(9)", ENDED),
    "core dump": Attack("print('held' if resource.getrlimit(resource.RLIMIT_CORE) == (0, 0) else 'ESCAPED')", "held"),
    "output closed": Attack("sys.stdout.close(); sys.stderr.close()\nfor d in (0, 1, 2): os.close(d)", "printed nothing"),
    "output replaced": Attack("sys.stdout = sys.stderr = None\nprint('lost')\n1", "1"),
    "builtins removed": Attack("import builtins\nfor name in list(vars(builtins)): delattr(builtins, name)", f"{ENDED}|Error"),
    "modules removed": Attack("sys.modules.clear()\nprint('held')", f"held|{ENDED}|Error"),
    "a value that cannot be written": Attack("class Bad:\n    def __repr__(self): raise SystemExit(3)\nBad()", "SystemExit: 3"),
    "an error that cannot be written": Attack("class Bad(Exception):\n    def __str__(self): os._exit(1)\nraise Bad", ENDED),
    "garbage in the code": Attack("\\x00 ((((", "SyntaxError|ValueError"),
    "code that nests too deep": Attack("print(" + "(" * 5000 + ")" * 5000 + ")", "SyntaxError|MemoryError|RecursionError"),
}
RESULTS = {
    "a pickled result": Attack(
        "import pickle\nclass Evil:\n    def __reduce__(self): return (os.system, ('touch ' + SECRET + '.evil',))\n"
        "os.write(3, pickle.dumps(Evil()) * 9)",
        "does not fit the question|a picture of",
    ),
    "garbage as the answer": Attack("os.write(3, b'\\xff' * 4096)", "does not fit the question"),
    "another's answer": Attack("os.write(3, header(nonce=bytes(16)))", "does not fit the question"),
    "an answer of four gigabytes": Attack("os.write(3, header(length=2**32 - 1))", "does not fit the question"),
    "an answer of too many pictures": Attack("os.write(3, header(count=65535))", "does not fit the question"),
    "an answer with an enormous picture": Attack(
        "os.write(3, header(count=1) + struct.pack('<II', 2**31, 2**31))", "A picture of 2147483648"
    ),
    "an answer with an empty picture": Attack("os.write(3, header(count=1) + struct.pack('<II', 0, 5))", "A picture of 0"),
    "an answer that is no text": Attack("os.write(3, header(length=4) + b'\\xff\\xfe\\xfd\\xfc')\nos._exit(0)", "\ufffd"),
    "half an answer": Attack(
        "signal.setitimer(signal.ITIMER_REAL, 0)\nos.write(3, header(length=100) + b'x')\ntime.sleep(60)", KILLED, timeout_s=0.3
    ),
    "half an answer and an end": Attack("os.write(3, header(length=100) + b'x')\nos._exit(0)", ENDED),
    "an endless answer": Attack("os.write(3, header(length=100))\nwhile True: os.write(3, b'x' * 65536)", "x{100}"),
    "no answer": Attack("os.close(3)\ntime.sleep(60)", f"{ENDED}|{KILLED}", timeout_s=0.3),
    "level of isolation forged": Attack("os.write(3, header(length=4) + b'fine')\nos._exit(0)", "fine"),
    "inherited descriptors": Attack(
        "open_ = []\nfor d in range(64):\n    try: os.fstat(d)\n    except OSError: continue\n    open_.append(d)\n"
        "escaped(open_ != [0, 1, 2, 3], open_)",
        "held",
    ),
    "a picture of too many pixels": Attack("from PIL import Image\nshow(Image.new('L', (9000, 9000)))", "is left out"),
    "a bomb of an image file": Attack(PNG + "png(50000, chunk(b'IDAT', zlib.compress(bytes(1 << 20))))", NO_PICTURE),
    "a bomb of a text in an image file": Attack(
        PNG + "png(1, chunk(b'zTXt', b'a\\0\\0' + zlib.compress(bytes(60 << 20))) + chunk(b'IDAT', zlib.compress(bytes(2))))",
        NO_PICTURE,
    ),
    "a thousand pictures": Attack(
        "from PIL import Image\nfor _ in range(1000): show(Image.new('RGB', (9, 9)))", "Only the first 8"
    ),
    "a picture outside through a link": Attack("os.symlink(SECRET, 'x.png')", "Permission"),
}
ATTACKS = FILES | PROCESSES | NETWORK | KERNEL | RESOURCES | CRASHES | RESULTS
