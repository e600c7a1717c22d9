"""Which denoising steps of an image generator are drawn at random and trained, and what a group shares before them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from policies.diffusion_parts.options import TrainedSteps
from policies.diffusion_parts.schedule import chosen_steps
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
