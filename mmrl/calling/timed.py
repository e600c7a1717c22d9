"""Work in threads of its own, each piece within a time limit, and what is late left behind.

Python cannot end a thread. One that is left behind goes on until it returns by itself: what it gives is dropped, and it holds up
neither other work nor the end of the program (it is a daemon).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass
class Timed:
    """A piece of work: what it returned, how long it ran, and whether it did in time ("skipped": it was never begun)."""

    status: Literal["waiting", "running", "done", "late", "skipped"] = "waiting"
    value: Any = None
    started: float = 0.0
    seconds: float = 0.0


class Workers:
    """At most ``concurrency`` pieces of work at a time, over all threads that ask for some; late ones do not count."""

    def __init__(self, concurrency: int) -> None:
        self._free = threading.Semaphore(concurrency)
        self._late: set[threading.Thread] = set()
        self._lock = threading.Lock()

    @property
    def left_behind(self) -> int:
        """Threads that were not waited for and still run."""
        with self._lock:
            self._late = {thread for thread in self._late if thread.is_alive()}
            return len(self._late)

    def run(self, chains: Sequence[Sequence[Callable[[], Any]]], limit_s: float) -> list[list[Timed]]:
        """Every piece of every chain: the chains side by side, the pieces of one in order. No piece may raise.

        A piece's time begins when it does, not while it waits for its turn. After one that is late its chain is skipped.
        """
        turn = [[Timed() for _ in chain] for chain in chains]
        changed = threading.Condition()
        threads = [
            threading.Thread(target=self._work, args=(chain, mine, changed), name="tool call", daemon=True)
            for chain, mine in zip(chains, turn, strict=True)
        ]
        for thread, mine in zip(threads, turn, strict=True):
            try:
                thread.start()
            except RuntimeError:  # the system has no thread left
                for piece in mine:
                    piece.status = "skipped"
        with changed:
            while True:
                now = time.monotonic()
                for thread, mine in zip(threads, turn, strict=True):
                    if self._leave(mine, now, limit_s):
                        with self._lock:
                            self._late.add(thread)
                ends = [piece.started + limit_s for mine in turn for piece in mine if piece.status == "running"]
                if not ends and all(piece.status != "waiting" for mine in turn for piece in mine):
                    return turn
                changed.wait(min(ends) - now if ends else None)

    def _leave(self, mine: Sequence[Timed], now: float, limit_s: float) -> bool:
        """Whether the chain's running piece is late; its place is then given back here, since its thread may never do it."""
        late = [place for place, piece in enumerate(mine) if piece.status == "running" and now >= piece.started + limit_s]
        for place in late:
            mine[place].status, mine[place].seconds = "late", now - mine[place].started
            for piece in mine[place + 1 :]:
                piece.status = "skipped"
            self._free.release()
        return bool(late)

    def _work(self, chain: Sequence[Callable[[], Any]], mine: Sequence[Timed], changed: threading.Condition) -> None:
        for piece, timed in zip(chain, mine, strict=True):
            self._free.acquire()
            with changed:
                timed.status, timed.started = "running", time.monotonic()
                changed.notify()
            value = piece()
            with changed:
                if timed.status == "late":
                    return
                timed.status, timed.value, timed.seconds = "done", value, time.monotonic() - timed.started
                self._free.release()
                changed.notify()
