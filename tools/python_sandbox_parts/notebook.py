"""Run code as a notebook's cell: its output, the value of its last expression, its pictures, or its traceback.

The code finds ``images`` (a list of PIL images) and ``show(picture)``, which takes a PIL image, a matplotlib figure or an array.
"""

from __future__ import annotations

import ast
import io
import linecache
import mmap
import os
import random
import signal
import sys
import traceback
from collections.abc import Mapping
from types import CodeType, FrameType
from typing import Any

import numpy as np
from PIL import Image

from tools.python_sandbox_parts.wire import FAILED, FINISHED, PICTURE_SIDE, TIMED_OUT, Answer, Limits, Pixels, Request

_RESERVE = 8 << 20  # bytes, never touched, that are let go of when the code has used up its memory, so that this can be said
_SAVED = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


class OutOfTime(BaseException):
    """Raised in the code when its time is up. No Exception, so that ``except Exception`` does not catch it."""


class Output(io.BufferedIOBase):
    """Keeps the first ``limit`` bytes and counts the rest."""

    def __init__(self, limit: int) -> None:
        self.kept, self.left_out, self._limit = bytearray(), 0, limit

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        data = bytes(data)
        room = max(self._limit - len(self.kept), 0)
        self.kept += data[:room]
        self.left_out += max(len(data) - room, 0)
        return len(data)


class Notebook:
    """A namespace that lives through any number of cells."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"__name__": "__main__", "show": self.show}
        self.cells = 0
        self._pictures: list[Pixels] = []
        self._notes: list[str] = []
        self._limits = Limits(0, 0, 0)
        Image.Image.show = lambda image, *arguments, **options: self.show(image)  # type: ignore[method-assign]

    def run(self, request: Request) -> Answer:
        """Never raises for what the code did, if it left the interpreter able to say so."""
        self.cells += 1
        self._pictures, self._notes, self._limits = [], [], request.limits
        self.names["images"] = [Image.frombytes("RGB", (width, height), data) for width, height, data in request.pictures]
        random.seed(request.seed)
        np.random.seed(request.seed)
        output = Output(4 * request.limits.characters)
        stream: Any = output  # all that a TextIOWrapper asks of it
        sys.stdout = sys.stderr = io.TextIOWrapper(stream, "utf-8", "backslashreplace", write_through=True)
        reserve = mmap.mmap(-1, _RESERVE)
        outcome, tail, started = FINISHED, "", _modified()
        try:
            signal.signal(signal.SIGALRM, _time_is_up)
            signal.setitimer(signal.ITIMER_REAL, request.timeout_s)
            try:
                tail = self._cell(request.code)
                self._collect(started)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except SystemExit as leaving:
            outcome = FINISHED if leaving.code in (None, 0) else FAILED
            tail = "" if outcome == FINISHED else f"SystemExit: {leaving.code}"
        except OutOfTime as error:
            outcome, tail = TIMED_OUT, _lines(error, f"TimeoutError: the code ran longer than {request.timeout_s:g} s")
        except BaseException as error:
            reserve.close()
            outcome, tail = FAILED, _lines(error)
        if _open_figures():  # of code that failed, too: the next call shall not show them
            sys.modules["matplotlib.pyplot"].close("all")
        text = _text(output, [tail, *self._notes], request.limits.characters)
        return Answer(request.nonce, outcome, text, tuple(self._pictures))

    def show(self, picture: Any) -> None:
        """Give back a PIL image, a matplotlib figure, or an array (height x width, or x 3 or 4; 0 to 255, or floats to 1)."""
        image = _image(picture)
        if image is None:
            raise TypeError(f"show() takes a PIL image, a matplotlib figure or an array, not {type(picture).__name__}")
        width, height = image.size
        if len(self._pictures) >= self._limits.pictures:
            self._note(f"Only the first {self._limits.pictures} pictures are given back.")
        elif not 0 < width * height <= self._limits.pixels or max(width, height) > PICTURE_SIDE:
            self._note(f"A picture of {width} x {height} is left out: at most {self._limits.pixels} pixels are given back.")
        else:
            self._pictures.append((width, height, _as_seen(image).tobytes()))

    def _note(self, sentence: str) -> None:
        if sentence not in self._notes:
            self._notes.append(sentence)

    def _cell(self, code: str) -> str:
        """Run it; the value of its last expression as text, empty where that is None or a picture."""
        name = f"<call {self.cells}>"
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
        tree = ast.parse(code, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(_compiled(tree, name), self.names)
        if not isinstance(last, ast.Expr):
            return ""
        value = eval(_compiled(ast.Expression(last.value), name), self.names)
        if isinstance(value, Image.Image) or _is_figure(value):
            if not _is_open(value):
                self.show(value)
            return ""
        return "" if value is None else repr(value)

    def _collect(self, before: Mapping[str, int]) -> None:
        """Show the open figures; where there is no picture at all, those that were saved."""
        for figure in _open_figures():
            self.show(figure)
        if not self._pictures:
            now = _modified()
            for name in sorted((name for name in now if now[name] != before.get(name)), key=lambda name: (now[name], name)):
                try:
                    with Image.open(name) as image:
                        image.load()
                        self.show(image)
                except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                    self._note(f"{name} is no picture that can be given back: {error}")


def _time_is_up(number: int, frame: FrameType | None) -> None:
    raise OutOfTime


def _compiled(tree: ast.Module | ast.Expression, name: str) -> CodeType:
    return compile(tree, name, "exec" if isinstance(tree, ast.Module) else "eval")


def _is_figure(value: Any) -> bool:
    figure = sys.modules.get("matplotlib.figure")
    return figure is not None and isinstance(value, figure.Figure)


def _open_figures() -> list[Any]:
    pyplot = sys.modules.get("matplotlib.pyplot")
    return [] if pyplot is None else [pyplot.figure(number) for number in pyplot.get_fignums()]


def _is_open(value: Any) -> bool:
    """Whether it is a figure that pyplot holds, which is shown at the end anyway."""
    return any(figure is value for figure in _open_figures())


def _as_seen(image: Image.Image) -> Image.Image:
    """In RGB, transparent pixels white and 16 bits made 8, as elsewhere (``mmrl.messages.as_seen``); mmrl is not loaded here."""
    if image.mode.startswith("I;16"):
        return image.point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white.convert("RGB")


def _image(value: Any) -> Image.Image | None:
    if isinstance(value, Image.Image):
        return value
    if _is_figure(value):
        canvas = sys.modules["matplotlib.backends.backend_agg"].FigureCanvasAgg(value)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba()))
    if isinstance(value, np.ndarray):
        if value.dtype == bool or np.issubdtype(value.dtype, np.floating):
            value = np.nan_to_num(value).clip(0, 1) * 255
        array = np.asarray(value).clip(0, 255).astype(np.uint8)
        return Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)
    return None


def _modified() -> dict[str, int]:
    """Name -> time of the last change of each picture file in the working folder."""
    try:
        with os.scandir() as entries:
            files = [entry for entry in entries if entry.name.lower().endswith(_SAVED) and entry.is_file(follow_symlinks=False)]
            return {entry.name: entry.stat(follow_symlinks=False).st_mtime_ns for entry in files}
    except OSError:  # no working folder
        return {}


def _lines(error: BaseException, last: str = "") -> str:
    """A traceback of the code's own lines. last: a sentence instead of the exception's."""
    trace = traceback.TracebackException.from_exception(error, compact=True)
    seen, level = set(), trace
    while level is not None and id(level) not in seen:
        seen.add(id(level))
        level.stack = traceback.StackSummary.from_list([frame for frame in level.stack if frame.filename.startswith("<call ")])
        level = level.__cause__ or level.__context__
    lines = [line for line in trace.format() if not last or line != f"{_name(error)}\n"]
    if lines == ["Traceback (most recent call last):\n"]:
        lines = []
    return "".join([*lines, last]).rstrip("\n")


def _name(error: BaseException) -> str:
    return f"{type(error).__module__}.{type(error).__qualname__}"


def _text(output: Output, tail: list[str], characters: int) -> str:
    """What was printed and what follows it, in at most ``characters``: what follows is cut last, as it says what went wrong."""
    end = "\n".join(part for part in tail if part)
    if len(end) > characters // 2:
        end = f"{end[: characters // 4]}\n... {len(end) - characters // 2} characters left out ...\n{end[-characters // 4 :]}"
    printed = output.kept.decode("utf-8", "replace").rstrip("\n")
    room = max(characters - len(end) - 80, 0)
    if len(printed) > room or output.left_out:
        left_out = max(len(printed) - room, 0) + output.left_out
        printed = f"{printed[:room]}\n... {left_out} characters left out ..."
    return f"{printed}\n{end}".strip("\n")[:characters]
