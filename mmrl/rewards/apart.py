"""Another reward, in processes of its own: it scores while the policy goes on, and what kills it takes no run with it.

    - target: mmrl.rewards.apart:Workers
      processes: 2
      reward: {target: "mmrl.rewards.ocr:OCR"}

Conversations are scored ``batch`` at a time by whichever process is free. A process that dies, or does not answer in time, is
replaced, and the conversations that it had are NaN; so is one that made the reward raise, and a score that is no number. A
process that is lost three times in a row without a score in between ends the run (WorkerError), as does a reward that cannot be
built. The reward sees a batch, never a whole group, and a conversation's score must not depend on the others'.
"""

from __future__ import annotations

import logging
import math
import pickle
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Annotated, Any

import numpy as np
import pydantic.dataclasses
from pydantic import AfterValidator, ConfigDict, Field

from mmrl.component import Component
from mmrl.errors import ConfigError, MMRLError
from mmrl.rewards.pictures import Known, number, scores_conversations
from mmrl.transcripts import Transcript
from mmrl.workers.pool import WorkerPool
from mmrl.workers.process import load
from mmrl.workers.shared import SharedArrays

LOG = logging.getLogger("mmrl.rewards")


def _whole(block: Component) -> Component:
    if not scores_conversations(block.cls):
        raise ValueError(f"{block.target} gives no score to a whole conversation; name a reward that does")
    return block


@dataclass
class Scores:
    """Of some conversations. terms: (of how many, name -> mean). failures: why some are NaN. lost: what a process took along."""

    values: list[float]
    terms: list[tuple[int, Mapping[str, float]]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    lost: int = 0

    def add(self, other: Scores) -> None:
        self.values += other.values
        self.terms += other.terms
        self.failures += other.failures
        self.lost += other.lost

    def means(self) -> dict[str, float]:
        """Name -> mean over the conversations of the batches that have it."""
        sums: dict[str, tuple[float, int]] = {}
        for count, terms in self.terms:
            for name, mean in terms.items():
                total, of = sums.get(name, (0.0, 0))
                sums[name] = (total + count * mean, of + count)
        return {name: total / of for name, (total, of) in sums.items()}


class Scoring:
    """What runs in a worker process (see mmrl.workers.process): the reward, built there."""

    def __init__(self, target: str, config: Any, share: None) -> None:
        self._reward = load(target)(config)
        self.description = target

    def score(self, name: str, size: int) -> Scores:
        """The scores of the conversations that lie, pickled, in the shared memory ``name``."""
        memory = SharedArrays({"pickle": ((size,), "uint8")}, name)
        try:
            transcripts = pickle.loads(memory["pickle"].tobytes())
        finally:
            memory.close()
        scores = self._scores(transcripts)
        if scores is None:  # one of them may be to blame for all
            scores = Scores([])
            for each in transcripts:
                scores.add(self._scores([each]) or Scores([math.nan], failures=[self._why]))
        return scores

    def _scores(self, transcripts: Sequence[Transcript]) -> Scores | None:
        """None, and ``_why``, where the reward raised."""
        try:
            values = [number(value) for value in self._reward(transcripts)]
            if len(values) != len(transcripts):
                raise ValueError(f"it gave {len(values)} scores for {len(transcripts)} conversations")
        except MMRLError:
            raise
        except Exception as error:
            self._why = f"{type(error).__name__}: {error}"
            LOG.warning("a reward failed:\n%s", traceback.format_exc())
            return None
        failed = any(map(math.isnan, values))
        why = getattr(self._reward, "failure", None) or "a score was no number"
        return Scores(values, [(len(values), dict(getattr(self._reward, "terms", {})))], [why] if failed else [])


class _Batches:
    """Conversations in batches, which threads take one after the other."""

    def __init__(self, transcripts: Sequence[Transcript], size: int) -> None:
        self.batches = [transcripts[start : start + size] for start in range(0, len(transcripts), size)]
        self.results: dict[int, Scores] = {}
        self._places: SimpleQueue[int] = SimpleQueue()
        for place in range(len(self.batches)):
            self._places.put(place)

    def work(self, pool: WorkerPool) -> None:
        """Have the pool's one process score batches until none is left."""
        while True:
            try:
                place = self._places.get_nowait()
            except Empty:
                return
            self.results[place] = _score(pool, self.batches[place])


def _score(pool: WorkerPool, batch: Sequence[Transcript]) -> Scores:
    try:
        pickled = pickle.dumps([_portable(each) for each in batch])
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"a question cannot be sent to another process ({error}); take the reward out of its Workers"
        ) from error
    # Not through the pipe: a process that hangs does not read it, and writing to it would hang as well.
    memory = SharedArrays({"pickle": ((len(pickled),), "uint8")})
    try:
        memory["pickle"][:] = np.frombuffer(pickled, np.uint8)
        pool.start(0)
        answers = pool.call("score", {0: (memory.name, len(pickled))})
    finally:
        memory.close()
    if 0 in answers:
        return answers[0]
    why = f"the process that had it died, or took longer than {pool.time_limit:g} seconds"
    return Scores([math.nan] * len(batch), failures=[why], lost=len(batch))


def _portable(transcript: Transcript) -> Transcript:
    """The same for a reward, without the question's check, which may be any function."""
    return replace(transcript, question=replace(transcript.question, check=Known(transcript.mark)))


class Workers:
    """See the module. failure: why the last conversation that has no score has none. terms: the reward's own, and ``lost``."""

    @pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    class Config:
        """Fields of a ``mmrl.rewards.apart:Workers`` block."""

        reward: Annotated[Component, AfterValidator(_whole)]
        """What scores: a ``target`` and its fields."""
        processes: int = Field(default=1, ge=1)
        """That score at the same time, each with a copy of the reward and one thread of torch."""
        batch: int = Field(default=16, ge=1)
        """Conversations that a process scores at a time."""
        timeout_s: float = Field(default=120.0, gt=0)
        """For a batch; a process that takes longer is replaced."""
        start_timeout_s: float = Field(default=600.0, gt=0)
        """For a process to start and load its models."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.failure: str | None = None
        self.terms: dict[str, float] = {}
        self._pools: list[WorkerPool] = []
        self._threads = [ThreadPoolExecutor(1, f"scoring {place}") for place in range(config.processes)]
        self.close = weakref.finalize(self, _close, self._threads, self._pools)
        starting = [thread.submit(_pool, config) for thread in self._threads]  # all at once: they may have much to load
        try:
            for pool in starting:
                self._pools.append(pool.result())
        except BaseException:
            self._pools[:] = [pool.result() for pool in starting if pool.exception() is None]
            self.close()
            raise

    @property
    def pids(self) -> list[int | None]:
        """Of the processes."""
        return [pid for pool in self._pools for pid in pool.pids]

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        return self.begin(transcripts)()

    def begin(self, transcripts: Sequence[Transcript]) -> Callable[[], list[float]]:
        """Hand them over and return at once, with the function that waits for their scores.

        More may be handed over before that; they are scored in this order.
        """
        batches = _Batches(transcripts, self.config.batch)
        done = [thread.submit(batches.work, pool) for thread, pool in zip(self._threads, self._pools, strict=True)]
        return lambda: self._finish(batches, done)

    def _finish(self, batches: _Batches, done: Sequence[Future[None]]) -> list[float]:
        for future in done:
            future.result()
        scores = Scores([])
        for place in range(len(batches.batches)):
            scores.add(batches.results[place])
        if scores.failures:
            self.failure = scores.failures[-1]
        self.terms = {**scores.means(), **({"lost": scores.lost / len(scores.values)} if scores.values else {})}
        return scores.values


def _pool(config: Workers.Config) -> WorkerPool:
    block, limits = config.reward, {"time_limit": config.timeout_s, "start_limit": config.start_timeout_s}
    return WorkerPool(Scoring, block.target, block.config, [None], **limits)


def _close(threads: Sequence[ThreadPoolExecutor], pools: Sequence[WorkerPool]) -> None:
    for thread in threads:
        thread.shutdown(wait=True, cancel_futures=True)
    for pool in pools:
        pool.close()
