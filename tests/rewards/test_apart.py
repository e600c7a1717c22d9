"""A reward in processes of its own: its scores, and what becomes of those that die, hang, raise or give no number."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from mmrl.component import Component, Problems
from mmrl.errors import ConfigError, MMRLError
from mmrl.rewards.apart import Workers
from mmrl.transcripts import Transcript
from mmrl.workers.pool import WorkerError
from tests.rewards.fickle import fickle
from tests.rewards.tiny_encoders import drawn

Make = Callable[..., Workers]


def red(level: int, prompt: str = "red", size: int = 4) -> Transcript:
    return drawn(Image.new("RGB", (size, size), (level, 0, 0)), prompt)


@pytest.fixture
def make() -> Iterator[Make]:
    opened: list[Workers] = []

    def build(**fields: Any) -> Workers:
        opened.append(Workers(Workers.Config(**{"reward": fickle(), "timeout_s": 30.0, "start_timeout_s": 120.0, **fields})))
        return opened[-1]

    yield build
    for workers in opened:
        workers.close()


def test_scores_are_those_of_the_reward_in_order_whoever_gives_them(make: Make) -> None:
    told = [red(level) for level in range(0, 250, 11)]
    workers = make(processes=2, batch=3)
    wanted = [level / 255 for level in range(0, 250, 11)]
    assert workers(told) == wanted == fickle().build()(told)
    assert workers.terms["lost"] == 0 and workers.failure is None
    assert workers.terms["batch"] == pytest.approx((7 * 3 * 3 + 2 * 2) / 23)  # seven of 3 and one of 2, weighed
    assert workers([]) == []
    assert all(pid != os.getpid() for pid in workers.pids)


def test_work_is_handed_over_before_it_is_waited_for(make: Make) -> None:
    workers = make(processes=2, batch=1)
    start = time.monotonic()
    first = workers.begin([red(51, "wait 0.2"), red(102, "wait 0.2")])
    second = workers.begin([red(153)])
    assert time.monotonic() - start < 0.2
    assert second() == [0.6] and first() == [0.2, 0.4]


def test_a_picture_that_kills_the_process_costs_its_batch_and_no_more(make: Make) -> None:
    workers = make(batch=2)
    (before,) = workers.pids
    scores = workers([red(51), red(102), red(0, "die"), red(153), red(204)])
    assert scores[:2] == [0.2, 0.4] and scores[4] == 0.8
    assert math.isnan(scores[2]) and math.isnan(scores[3])
    assert workers.terms["lost"] == 2 / 5
    assert "died, or took longer" in (workers.failure or "")
    assert workers([red(51)]) == [0.2] and workers.pids != [before]


def test_a_process_killed_between_calls_is_replaced(make: Make) -> None:
    workers = make(processes=2, batch=1)
    for pid in workers.pids:
        os.kill(pid or 0, signal.SIGKILL)
    time.sleep(0.1)
    scores = [score for _ in range(5) for score in workers([red(51), red(51)])]
    lost = sum(math.isnan(score) for score in scores)
    assert 1 <= lost <= 2, "each process loses what it is given first, and one may be quick enough to be given all"
    assert scores.count(0.2) == 10 - lost


def test_a_process_that_hangs_is_replaced_even_where_a_pipe_would_be_full(make: Make) -> None:
    workers = make(batch=2, timeout_s=1.0)
    scores = workers([red(51), red(0, "hang"), red(102, size=400)])
    assert math.isnan(scores[0]) and math.isnan(scores[1]) and scores[2] == 0.4
    os.kill(workers.pids[0] or 0, signal.SIGSTOP)
    assert math.isnan(workers([red(51, size=800)])[0])  # two megabytes, which nobody reads
    assert workers([red(51, size=800)]) == [0.2]


def test_a_process_that_is_lost_again_and_again_ends_the_run(make: Make) -> None:
    with pytest.raises(WorkerError, match="lost 3 times in a row"):
        make(batch=1)([red(0, "die")] * 4)
    assert make(batch=1)([red(51), *[red(0, "die")] * 2, red(51), *[red(0, "die")] * 2, red(51)])[::3] == [0.2, 0.2, 0.2]


def test_what_makes_the_reward_raise_is_no_number_and_its_neighbours_have_theirs(make: Make) -> None:
    workers = make(batch=3)
    scores = workers([red(51), red(0, "raise"), red(102)])
    assert [scores[0], scores[2]] == [0.2, 0.4] and math.isnan(scores[1])
    assert workers.failure == "RuntimeError: the picture is cursed" and workers.terms["lost"] == 0


@pytest.mark.parametrize("what", ["none", "text", "inf", "nan"])
def test_what_is_no_number_is_nan(make: Make, what: str) -> None:
    workers = make()
    scores = workers([red(0, f"give {what}"), red(51)])
    assert math.isnan(scores[0]) and scores[1] == 0.2
    assert workers.failure == "a score was no number"


def test_a_question_s_check_stays_here_and_its_mark_goes_along(make: Make) -> None:
    told = red(0, "mark")
    told = replace(told, answer="yes", question=replace(told.question, check=lambda answer: 0.75 if answer == "yes" else 0.0))
    assert make()([told, replace(told, answer="no"), replace(told, answer=None)]) == [0.75, 0.0, 0.0]


def test_what_cannot_be_sent_is_said(make: Make) -> None:
    told = red(0)
    told = replace(told, question=replace(told.question, details={"secret": lambda: None}))
    with pytest.raises(ConfigError, match="cannot be sent to another process"):
        make()([told])


def test_a_reward_that_cannot_be_built_says_why() -> None:
    with pytest.raises(MMRLError, match="there is no such model"):
        Workers(Workers.Config(reward=fickle(refuse=True), processes=2))


def test_a_reward_of_turns_is_refused() -> None:
    block = {"target": "mmrl.rewards.apart:Workers", "reward": {"target": "mmrl.rewards.tool_rewards:Emitted"}}
    with pytest.raises(Problems, match="gives no score to a whole conversation"):
        Component.parse(block)
