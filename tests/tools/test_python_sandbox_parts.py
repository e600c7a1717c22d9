"""The parts of the Python tool: the kernel's numbers, what crosses the wire, and which packages can be read."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tools.python_sandbox_parts import packages, seccomp, wire

HEADERS = {
    "x86_64": ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "__NR_"),
    "aarch64": ("/usr/include/asm-generic/unistd.h", "__NR_"),
}


@pytest.mark.parametrize("machine", HEADERS)
def test_numbers_of_system_calls_are_those_of_the_kernel_s_headers(machine: str) -> None:
    file = Path(HEADERS[machine][0])
    if not file.exists():
        pytest.skip(f"{file} belongs to linux-libc-dev, which is not installed")
    lines = [line.split() for line in file.read_text().splitlines() if line.startswith("#define __NR")]
    known = {words[1].replace("__NR3264_", "__NR_")[5:]: int(words[2]) for words in lines if words[2:3] and words[2].isdigit()}
    known |= {"newfstatat": known["fstatat"]} if machine == "aarch64" else {}
    ours = seccomp.numbers(machine)
    assert ours == {name: known[name] for name in ours}
    assert {"read", "mmap", "futex"} <= set(ours) and not {"execve", "socket", "fork", "ptrace", "mount"} & set(ours)


def test_a_request_and_an_answer_survive_the_wire() -> None:
    request = wire.Request(b"n" * 16, "print('ü')", 1.5, 7, wire.Limits(100, 2, 64), ((2, 1, b"abcdef"),))
    answer = wire.Answer(b"n" * 16, wire.FAILED, "ü", ((1, 2, b"uvwxyz"),))
    assert wire.read_request(Stream(wire.pack_request(request)).read) == request
    assert wire.read_answer(Stream(wire.pack_answer(answer)).read, b"n" * 16, request.limits) == answer


class Stream:
    """Bytes that come in pieces of one to seven."""

    def __init__(self, data: bytes) -> None:
        self.data, self.draws = data, random.Random(0)

    def read(self, count: int) -> bytes:
        piece = self.data[: min(count, self.draws.randint(1, 7))]
        self.data = self.data[len(piece) :]
        return piece


def test_no_bytes_upset_the_reader_of_answers() -> None:
    draws, limits = random.Random(0), wire.Limits(50, 2, 64)
    good = wire.pack_answer(wire.Answer(b"n" * 16, 0, "fine", ((2, 2, bytes(12)),)))
    read = 0
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(draws.randint(1, 4)):
            data[draws.randrange(16, len(data))] = draws.choice((0, 1, 2, 127, 255, draws.randrange(256)))
        stream = Stream(bytes(data[: draws.randint(20, len(data))]))
        try:
            answer = wire.read_answer(stream.read, b"n" * 16, limits)
        except wire.WireError:
            continue
        read += 1
        assert len(answer.text) <= 50 and len(answer.pictures) <= 2
        assert all(0 < w * h <= 64 and len(p) == 3 * w * h for w, h, p in answer.pictures)
    assert read > 20


def test_the_closure_of_matplotlib_leaves_out_extras() -> None:
    found = packages._closure(["matplotlib"])
    assert {"matplotlib", "numpy", "pillow", "contourpy", "python-dateutil"} <= set(found)
    assert not {"pytest", "torch", "sphinx"} & set(found)
