"""What a trainer and a confined process write to one another: lengths, UTF-8 and raw pixels, nothing that could run code.

The trainer believes nothing of an answer: every length is checked against what was allowed before a byte of it is read, pixels
are never decoded, and whatever does not fit raises WireError.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

Pixels = tuple[int, int, bytes]  # width, height, 3 bytes a pixel
Read = Callable[[int], bytes]  # at most so many bytes; none at the end

_REQUEST = struct.Struct("<16sdIIHIIH")
_ANSWER = struct.Struct("<16sBIH")
_SIZE = struct.Struct("<II")
_PIECE = 1 << 20
FINISHED, FAILED, TIMED_OUT = range(3)
PICTURE_SIDE = 1 << 15
ENDED = "the stream ended"


class WireError(Exception):
    """The other side ended, or wrote what no honest one writes."""


@dataclass(frozen=True)
class Limits:
    """characters of text, pictures, and pixels of each picture that an answer may have."""

    characters: int
    pictures: int
    pixels: int


@dataclass(frozen=True)
class Request:
    """Code to run. nonce: 16 bytes that the answer repeats. seed: of the random numbers of the code."""

    nonce: bytes
    code: str
    timeout_s: float
    seed: int
    limits: Limits
    pictures: tuple[Pixels, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What the code printed and showed. outcome: FINISHED, FAILED or TIMED_OUT."""

    nonce: bytes
    outcome: int
    text: str
    pictures: tuple[Pixels, ...] = ()


def pack_request(request: Request) -> bytes:
    code, limits = request.code.encode("utf-8", "backslashreplace"), request.limits
    sizes = (limits.characters, limits.pictures, limits.pixels, len(code), len(request.pictures))
    head = _REQUEST.pack(request.nonce, request.timeout_s, request.seed, *sizes)
    return b"".join([head, code, *_pack_pixels(request.pictures)])


def read_request(read: Read) -> Request:
    nonce, timeout_s, seed, characters, pictures, pixels, length, count = _REQUEST.unpack(exactly(read, _REQUEST.size))
    code = exactly(read, length).decode()
    shown = tuple(_read_pixels(read) for _ in range(count))
    return Request(nonce, code, timeout_s, seed, Limits(characters, pictures, pixels), shown)


def pack_answer(answer: Answer) -> bytes:
    text = answer.text.encode("utf-8", "backslashreplace")
    head = _ANSWER.pack(answer.nonce, answer.outcome, len(text), len(answer.pictures))
    return b"".join([head, text, *_pack_pixels(answer.pictures)])


def read_answer(read: Read, nonce: bytes, limits: Limits) -> Answer:
    """Raises WireError unless it is the answer to ``nonce`` and keeps ``limits``."""
    got, outcome, length, count = _ANSWER.unpack(exactly(read, _ANSWER.size))
    if got != nonce or outcome not in (FINISHED, FAILED, TIMED_OUT) or length > 4 * limits.characters or count > limits.pictures:
        raise WireError("an answer that does not fit the question")
    text = exactly(read, length).decode("utf-8", "replace")
    if len(text) > limits.characters:
        raise WireError("a text that is longer than allowed")
    return Answer(got, outcome, text, tuple(_read_pixels(read, limits.pixels) for _ in range(count)))


def exactly(read: Read, count: int) -> bytes:
    """``count`` bytes. Raises WireError at the end of the stream."""
    pieces = []
    while count:
        piece = read(min(count, _PIECE))
        if not piece:
            raise WireError(ENDED)
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def _pack_pixels(pictures: tuple[Pixels, ...]) -> list[bytes]:
    return [part for width, height, pixels in pictures for part in (_SIZE.pack(width, height), pixels)]


def _read_pixels(read: Read, limit: int | None = None) -> Pixels:
    width, height = _SIZE.unpack(exactly(read, _SIZE.size))
    if limit is not None and not (0 < width <= PICTURE_SIDE and 0 < height <= PICTURE_SIDE and width * height <= limit):
        raise WireError(f"a picture of {width} x {height}")
    return width, height, exactly(read, 3 * width * height)
