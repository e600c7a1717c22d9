"""States of conversations with tools, and what decisions made in the same one are worth (GiGPO)."""

from __future__ import annotations

import random
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmrl import component
from mmrl.algorithms.grpo import GRPO
from mmrl.columns import Column
from mmrl.messages import Message, Picture
from mmrl.numerics.draws import Draws
from mmrl.rollout import Collector
from mmrl.transcripts import Transcript
from mmrl.types import Decision, Observation
from tests.core import asking, talking_run, tiny_run
from tests.core.talking_run import call

CPU = torch.device("cpu")
FAILS = call("fail", how="tool")


def page(letter: str) -> str:
    """Open a page.

    letter: which
    """
    return f"This is page {letter}."


def paint(colour: str) -> Picture:
    """Paint a square.

    colour: of it
    """
    return Picture(Image.new("RGB", (8, 8), colour))


X, Y, Z = (call("page", letter=letter) for letter in "xyz")


def states(*scripts: list[str], task: int = 3, picture: bool = False) -> list[list[int]]:
    """The keys before the first turn and after each of a script's, whatever stands in the other slots."""
    tasks = torch.full((len(scripts),), task)
    made = asking.environment(page, paint, asking.fail, asking.left_half, num_envs=len(scripts), picture=picture, max_turns=9)
    observations = [made.reset(tasks)]
    for turn in range(max(map(len, scripts))):
        said = [Message("assistant", (script[turn],)) if turn < len(script) else None for script in scripts]
        observations.append(made.step(Column.of(said)).observation)
    keys_TB = torch.stack([seen.anchors_B for seen in observations if seen.anchors_B is not None])
    assert keys_TB.dtype == torch.int64 and len(keys_TB) == len(observations)
    return [keys_TB[: len(script) + 1, slot].tolist() for slot, script in enumerate(scripts)]


def test_a_state_is_what_was_shown_last_and_what_has_been_shown() -> None:
    (x, xy, yx, xyx, yxx, failed, failed_x) = states(
        [X], [X, Y], [Y, X], [X, Y, X], [Y, X, X], [FAILS], [FAILS, X]
    )  # fmt: skip
    assert len({keys[0] for keys in (x, xy, yx, failed)}) == 1 and x[1] != x[0], "all begin in the same one"
    assert xy[1] == x[1] == xyx[1] and yx[1] != x[1]
    assert xy[2] != yx[2], "the last page counts"
    assert yx[2] != x[1], "so does what was seen before it"
    assert xyx[3] == yx[2] == yxx[3], "but neither in which order nor how often"
    assert failed[1] != failed[0] and failed_x[2] == x[1], "what failed taught nothing"


def test_what_was_said_is_no_part_of_a_state_and_the_task_is() -> None:
    thinking, plain, both = states(["I open it. " + X], [X], [X + Y])
    assert thinking == plain and both[1] not in plain
    assert not set(plain) & set(states([X], task=4)[0])


def test_pictures_are_told_apart_by_their_pixels() -> None:
    look, red, blue = call("left_half", image=1), call("paint", colour="red"), call("paint", colour="blue")
    one, again, further = states([look], [look], [look, call("left_half", image=2)], picture=True)
    assert one == again == further[:2] and further[2] not in one
    first, second, other = states([red], [red], [blue])
    assert first == second and other[1] != first[1], "of the same size, and with the same words"


def shown(told: Transcript) -> Any:
    """The state in full, as an object: nothing is hashed or written down."""

    def parts(message: Message) -> tuple[Any, ...]:
        return tuple(part if isinstance(part, str) else part.image.tobytes() for part in message.parts)

    replies = [reply for turn in told.turns for reply in turn.replies]
    calls = [each for turn in told.turns for each in turn.calls]
    seen = frozenset(parts(reply) for each, reply in zip(calls, replies, strict=True) if each.error is None)
    return told.task_id, tuple(parts(reply) for turn in told.turns[-1:] for reply in turn.replies), seen


def test_keys_are_equal_where_states_are() -> None:
    """Random walks of two groups, against a dict of the states themselves; in other slots the keys are the same."""
    dice = random.Random(0)
    tasks = [1, 1, 1, 1, 1, 2, 2, 2, 2, 2]
    lines = [X, Y, Z, FAILS, X + Y, call("left_half", image=1), call("left_half", image=2), "a word and " + X]
    walks = [[dice.choice(lines) for _ in range(4)] for _ in tasks]
    met: dict[Any, set[int]] = defaultdict(set)
    for order in (list(range(10)), dice.sample(range(10), 10)):
        made = asking.environment(page, asking.fail, asking.left_half, num_envs=10, picture=True, max_turns=9)
        observation = made.reset(torch.tensor([tasks[walk] for walk in order]))
        for turn in range(5):
            assert observation.anchors_B is not None
            for slot, key in enumerate(observation.anchors_B.tolist()):
                met[shown(made.transcript(slot))].add(key)
            if turn < 4:
                observation = made.step(Column.of(Message("assistant", (walks[walk][turn],)) for walk in order)).observation
    assert all(len(keys) == 1 for keys in met.values()) and 20 < len(met) < 100
    assert all(not a & b for a, b in combinations(met.values(), 2))


class Reader:
    """Says what its script says, by the slot and the turn."""

    version = 0

    def __init__(self, scripts: list[list[str]]) -> None:
        self.scripts, self.turn = scripts, -1
        self.left = list(range(len(scripts)))

    def act(self, observation: Observation, draws: Draws, *, explore: bool) -> Decision:
        self.turn += 1
        said = [script[self.turn] for script in self.scripts if len(script) > self.turn]
        assert observation.batch_size == len(said)
        nothing_B1 = torch.zeros(len(said), 1)
        action = Column.of(Message("assistant", (text,)) for text in said)
        return Decision(action, {}, nothing_B1, nothing_B1 == 0, None)


def test_two_of_four_replicas_open_the_same_page() -> None:
    """By hand. Asked for 3 + 1, the first and the third open page x, the second page y, the fourth answers at once, and wrongly.

    The first and the second then answer rightly: returns 1, 1, 0, 0, so 1/2, 1/2, -1/2, -1/2 for the episodes. All four began in
    the same state, in which the returns from then on are the same: once more as much. On page x 1 and 0 are compared, so 1/2 and
    -1/2; on page y there is nobody to compare with.
    """
    policy: Any = Reader([[X, "4"], [Y, "4"], [X, "5"], ["5"]])
    environment: Any = asking.environment(page, num_envs=4, max_turns=3)
    collector = Collector([environment], decisions=3, seed=0, device=CPU, group_size=4, auto_reset=False)
    collector.next_task = 3
    result = GRPO(GRPO.Config(group_size=4, credit="gigpo", scale="none")).advantages(collector.collect(policy))
    assert result.keep_TB.tolist() == [[True] * 4, [True, True, True, False]]
    assert result.advantages_TB[0].tolist() == [1, 1, -1, -1] and result.advantages_TB[1, :3].tolist() == [1, 0.5, -1]
    assert result.metrics["states"] == 3 and result.metrics["states_shared"] == 2
    assert result.metrics["decisions_without_peers"] == pytest.approx(1 / 7)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_run_compares_states_at_one_word_of_its_yaml(parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four groups of four: the first state of each is shared; who adds rightly, and who fails, meets again."""
    monkeypatch.setattr(component, "resolve", talking_run.resolve)
    fields = "credit=gigpo", "gamma=0.95", "scale=none"
    run = talking_run.run(
        tmp_path, *(f"stages.improve.algorithm.{each}" for each in fields), f"stages.improve.collect.parts={parts}"
    )
    trained = [row for row in tiny_run.rows(run) if row["kind"] == "train"]
    assert len(trained) == 5
    for row in trained:
        assert 4 < row["advantages/states_shared"] <= row["advantages/states"] <= 16 * 4
        assert 0 <= row["advantages/decisions_without_peers"] < 1
