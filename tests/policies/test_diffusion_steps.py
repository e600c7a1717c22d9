"""Which denoising steps of an image generator are drawn at random and trained, and what a group shares before them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from policies.diffusion_parts.options import TrainedSteps
from policies.diffusion_parts.schedule import chosen_steps, possible_steps
from tests.policies import tiny_diffusion as tiny


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_sd3(tmp_path_factory.mktemp("sd3"))


def steps_of(iterations: int, **trained: Any) -> list[list[int]]:
    return [chosen_steps(TrainedSteps(**trained), 9, iteration, seed=0) for iteration in range(iterations)]


def test_a_progressive_window_moves_and_begins_again() -> None:
    assert steps_of(7, which="window", size=3, start=1, stop=7, stride=2) == [
        [1, 2, 3],
        [3, 4, 5],
        [1, 2, 3],
        [3, 4, 5],
        [1, 2, 3],
        [3, 4, 5],
        [1, 2, 3],
    ]
    assert [c[0] for c in steps_of(10, which="window", size=4, every=2)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert steps_of(11, which="window", size=4, every=2)[-1] == [0, 1, 2, 3]


def naive_windows(iterations: int, steps: int, size: int, every: int, stride: int, **decay: Any) -> list[int]:
    """A walk in the manner of MixGRPO's program: how long the window has been here, and whether it moves on. Its first steps."""
    first, here, firsts = 0, 0, []
    for _ in range(iterations):
        firsts.append(first)
        here += 1
        if decay["decay"] == "linear":
            progress = first / (steps - 2)
            wanted = max(decay["least"], int(every * (1 - progress) + decay["least"] * progress))
        else:
            wanted = math.ceil(every * math.exp(-decay["decay_rate"] * max(0, first - decay["decay_from"])))
        if here >= wanted:
            first, here = first + stride, 0
        if first + size > steps - 1:  # the very last step is never drawn
            first = 0
    return firsts


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize(
    "decay",
    [
        {"decay": "linear", "least": 2},
        {"decay": "linear", "least": 5},
        {"decay": "exponential", "decay_from": 4, "decay_rate": 0.3},
    ],
    ids=str,
)
def test_a_window_stays_shorter_the_further_it_has_moved(decay: dict[str, Any], stride: int) -> None:
    trained = TrainedSteps(which="window", size=3, every=7, stride=stride, **decay)
    chosen = [chosen_steps(trained, 13, iteration, seed=0) for iteration in range(160)]
    assert [steps[0] for steps in chosen] == (naive := naive_windows(160, 13, 3, 7, stride, **decay))
    assert all(steps == [steps[0], steps[0] + 1, steps[0] + 2] for steps in chosen)
    assert naive.count(0) > 7 and 0 < naive.count(9) < naive.count(0), "it has come round, and stayed longer at the beginning"


@pytest.mark.parametrize(("decay", "last"), [("linear", 8), ("exponential", 13)])
def test_the_published_decays_worked_by_hand(decay: Any, last: int) -> None:
    """25 steps, a window of 4 that stays 25 iterations at first. At step 20: 25 * 3/23 + 6 * 20/23 = 8.5; 25 exp(-0.7) = 12.4."""
    trained = TrainedSteps(which="window", size=4, every=25, decay=decay)
    firsts = [chosen_steps(trained, 25, iteration, seed=0)[0] for iteration in range(700)]
    stays = [firsts.index(place + 1) - firsts.index(place) for place in range(20)]
    assert stays[0] == 25 and stays == sorted(stays, reverse=True)
    assert firsts[firsts.index(20) :].index(0) == last


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"order": "random", "decay": "linear"}, "decay is not used with order 'random'"),
        ({"least": 2}, "least is not used with decay 'none'"),
        ({"decay": "linear", "decay_rate": 0.2}, "decay_rate is not used with decay 'linear'"),
        ({"decay": "linear", "every": 4, "least": 5}, "least must be at most every"),
    ],
)
def test_decays_that_do_not_fit_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TrainedSteps(which="window", size=2, **fields)
    with pytest.raises(ValueError, match="decay is not used with which 'random'"):
        TrainedSteps(which="random", size=2, decay="linear")


def test_a_random_window_lies_anywhere_in_its_range() -> None:
    chosen = steps_of(60, which="window", size=2, start=2, stop=6, order="random", every=2)
    assert {c[0] for c in chosen} == {2, 3, 4} and all(c[1] == c[0] + 1 for c in chosen)
    assert chosen[::2] == chosen[1::2] and chosen == steps_of(
        60, which="window", size=2, start=2, stop=6, order="random", every=2
    )


def test_random_steps_are_any_but_the_last() -> None:
    chosen = steps_of(60, which="random", size=3)
    assert {step for c in chosen for step in c} == set(range(8))
    assert all(c == sorted(set(c)) and len(c) == 3 for c in chosen) and len({tuple(c) for c in chosen}) > 10


@pytest.mark.parametrize(
    "trained",
    [
        {"which": "all"},
        {"which": "all_but_last"},
        {"which": "window", "size": 2, "start": 1, "stop": 6},
        {"which": "window", "size": 1, "start": 3, "order": "random"},
        {"which": "window", "size": 1, "stride": 3},
        {"which": "window", "size": 2, "start": 1, "stride": 4},
        {"which": "random", "size": 2, "start": 2, "stop": 7},
    ],
    ids=lambda trained: " ".join(map(str, trained.values())),
)
def test_possible_steps_are_all_that_some_iteration_chooses(trained: dict[str, Any]) -> None:
    assert possible_steps(TrainedSteps(**trained), 9) == sorted({step for steps in steps_of(200, **trained) for step in steps})


def test_evaluation_may_draw_as_rollouts_do(sd3: str) -> None:
    """The same pictures from the same draws; a window that moves has noise wherever it may be, in any iteration."""
    for trained in ({}, {"which": "window", "size": 2, "start": 1, "stop": 3}):
        policy = tiny.build(sd3, trained_steps=trained, evaluation_sampler="rollout")
        judged = policy.act(tiny.observe(), tiny.draws(), explore=False)
        explored = policy.act(tiny.observe(), tiny.draws(), explore=True)
        assert torch.equal(tiny.pixels(judged.action), tiny.pixels(explored.action)) and not judged.trace
        still = tiny.build(sd3, trained_steps=trained).act(tiny.observe(), tiny.draws(), explore=False)
        assert not torch.equal(tiny.pixels(judged.action), tiny.pixels(still.action))
    moving = tiny.build(sd3, trained_steps={"which": "window", "size": 1}, evaluation_sampler="rollout")
    every = tiny.build(sd3, trained_steps={"which": "all_but_last"}).act(tiny.observe(), tiny.draws(), explore=True)
    for iteration in (0, 1):
        moving.at_iteration(iteration)
        judged = moving.act(tiny.observe(), tiny.draws(), explore=False)
        assert torch.equal(tiny.pixels(judged.action), tiny.pixels(every.action))


def test_steps_outside_the_window_follow_the_ode(sd3: str) -> None:
    policy = tiny.build(sd3, trained_steps={"which": "window", "size": 1, "start": 2}, noise_level=1e-7)
    made = policy.act(tiny.observe(), tiny.draws(), explore=True)
    assert made.trace["step"].tolist() == [[2]] * 5
    plain = tiny.build(sd3, sampler="ode").act(tiny.observe(), tiny.draws(), explore=True)
    torch.testing.assert_close(made.trace["clean"], plain.trace["clean"], rtol=0, atol=1e-5)


def test_a_shared_prefix_is_walked_once_and_shared_by_the_pictures_of_a_prompt(sd3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = {"which": "window", "size": 1, "start": 2, "shared_prefix": True}
    policy = tiny.build(sd3, trained_steps=trained)
    rows: list[int] = []
    predict = policy.family.predict
    monkeypatch.setattr(policy.family, "predict", lambda x, *rest: (rows.append(len(x)), predict(x, *rest))[1])
    made = policy.act(tiny.observe(), tiny.draws(), explore=True)
    assert rows == [8, 8, 10, 10]  # four prompts of five pictures; both branches of guidance
    before, after = made.trace["x_before"], made.trace["x_after"]
    assert torch.equal(before[0], before[2]) and not torch.equal(before[0], before[1])
    assert not torch.allclose(after[0], after[2])
    # The prefix is the ODE from noise of the prompt's own: the same as of each prompt alone.
    for b, text in enumerate(tiny.TEXTS):
        alone = policy.act(tiny.observe((text,)), tiny.draws().select(torch.tensor([b])), explore=True)
        torch.testing.assert_close(alone.trace["x_after"][0], after[b], rtol=1e-5, atol=1e-5)
    policy.at_iteration(1)
    assert not torch.allclose(policy.act(tiny.observe(), tiny.draws(), explore=True).trace["x_before"], before)


def test_the_policy_is_told_the_iteration(sd3: str) -> None:
    policy = tiny.build(sd3, trained_steps={"which": "window", "size": 1})
    for iteration, wanted in enumerate(([0], [1], [2], [0])):
        policy.at_iteration(iteration)
        assert policy.chosen_steps() == wanted
        assert policy.act(tiny.observe(), tiny.draws(), explore=True).trace["step"].tolist() == [wanted] * 5
