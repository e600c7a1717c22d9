"""Pictures are decoded and scored while the policy draws the next ones, and the rollout is that of one thing after the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from mmrl import component
from mmrl.building import build_parts
from mmrl.columns import Column
from mmrl.config import load
from mmrl.errors import TrainingError
from mmrl.messages import Message, Picture
from mmrl.numerics.draws import Draws
from mmrl.picturing import PictureEnvironment
from mmrl.playing import Played, Player
from mmrl.protocols import AsyncPolicy, GradualEnvironment
from mmrl.rewards.apart import Workers
from mmrl.rollout import Collector
from mmrl.transcripts import Question, unmarked
from mmrl.types import Decision, Observation, Rollout
from tests.core import painting_run
from tests.core.painting_run import environment
from tests.core.test_overlap import assert_same
from tests.policies import tiny_diffusion
from tests.rewards.fickle import Fickle

CPU, FICKLE = torch.device("cpu"), "tests.rewards.fickle:Fickle"
PATIENCE = 120.0  # seconds after which what should have happened has not


class Words:
    """Asks for the words of its config in turn."""

    @dataclass(frozen=True, config=ConfigDict(extra="forbid"))
    class Config:
        words: tuple[str, ...]

    def __init__(self, config: Config) -> None:
        self.config = config

    def question(self, task_id: int) -> Question:
        word = self.config.words[task_id % len(self.config.words)]
        return Question("words", (word,), (), unmarked, {"prompt": word})


class Dyer:
    """A picture of one red, drawn at random. seen: who acted for how many, and who finished them."""

    version = 0

    def __init__(self, before_acting: Callable[[int], None] = lambda turn: None) -> None:
        self.seen: list[tuple[str, int, str]] = []
        self._before, self._turn = before_acting, 0

    def begin_act(self, observation: Observation, draws: Draws, *, explore: bool) -> Callable[[], Decision]:
        self._turn += 1
        self._before(self._turn)
        self.seen.append(("act", observation.batch_size, threading.current_thread().name))
        red_B = draws.uniform()

        def finish() -> Decision:
            self.seen.append(("finish", len(red_B), threading.current_thread().name))
            images = [Image.new("RGB", (4, 4), (int(255 * red), 0, 0)) for red in red_B.tolist()]
            action = Column.of([Message("assistant", (Picture(image),)) for image in images])
            mask_BK = torch.ones(len(red_B), 1, dtype=torch.bool)
            return Decision(action, {"red": red_B}, red_B[:, None], mask_BK, None, self.version, red_B[:, None, None])

        return finish

    def act(self, observation: Observation, draws: Draws, *, explore: bool) -> Decision:
        return self.begin_act(observation, draws, explore=explore)()


@pytest.fixture(autouse=True)
def _fake_components(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes: dict[str, Any] = {"fake:Words": Words, FICKLE: Fickle}
    monkeypatch.setattr(component, "resolve", lambda target: fakes.get(target) or painting_run.resolve(target))


@pytest.fixture
def asking() -> Iterator[Callable[..., PictureEnvironment]]:
    """Eight slots and what pays them: the reward ``fickle`` here, or in processes of its own."""
    opened: list[PictureEnvironment] = []

    def build(*words: str, apart: bool = True, **fields: Any) -> PictureEnvironment:
        reward: dict[str, Any] = {"target": FICKLE}
        if apart:
            reward = {"target": "mmrl.rewards.apart:Workers", "reward": reward, "batch": 2, "start_timeout_s": 300.0, **fields}
        block = reward | {"name": "fickle"}
        opened.append(environment(block, num_envs=8, prompts={"target": "fake:Words", "words": list(words)}))
        return opened[-1]

    yield build
    for each in opened:
        each.close()


def collect(environments: Any, policy: Any, pieces: int = 1, **options: Any) -> Rollout:
    fields: dict[str, Any] = {"decisions": 1, "seed": 3, "device": CPU, "group_size": 2, "auto_reset": False, "keep_means": True}
    return Collector(environments, pieces=pieces, **(fields | options)).collect(policy)


def until(scored: Path) -> Callable[[int], None]:
    """Before it acts for the third time, the policy waits for this file."""

    def wait(turn: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while turn == 3 and not scored.exists():
            assert time.monotonic() < deadline, "nothing is scored while the policy acts"
            time.sleep(0.01)

    return wait


def scores(rollout: Rollout) -> list[tuple[int, float]]:
    return [(told.task_id, told.scores["fickle"]) for told in rollout.episodes.transcripts]


@pytest.mark.parametrize("pieces", [2, 3, 8])
def test_pieces_scored_apart_are_the_rollout_of_one_thing_after_the_other(asking: Any, pieces: int) -> None:
    policy = Dyer()
    serial = collect([asking("a", "b", apart=False)], policy)
    rollout = collect([asking("a", "b", processes=2)], policy, pieces)
    assert_same(rollout, serial)
    assert scores(rollout) == scores(serial) and len({score for _, score in scores(serial)}) == 8
    for ours, theirs in ((rollout.means_TBKD, serial.means_TBKD), (rollout.episodes.spans_M3, serial.episodes.spans_M3)):
        assert ours is not None and theirs is not None and torch.equal(ours, theirs)


def test_slots_that_do_not_run_are_not_acted_for(asking: Any) -> None:
    policy = Dyer()
    rollout = collect([asking("a", apart=False)], policy, 4, decisions=2)
    assert [size for what, size, _ in policy.seen if what == "act"] == [2] * 4
    assert rollout.valid_TB.tolist() == [[True] * 8] == rollout.terminated_TB.tolist()
    again = collect([asking("a", apart=False)], policy, 4, decisions=2, auto_reset=True, group_size=1)
    assert again.valid_TB.all() and len(again.episodes.task_ids_M.unique()) == 16


def test_a_scorer_that_fails_dies_or_hangs_masks_its_pictures_and_is_counted(asking: Any) -> None:
    rollout = collect([asking("a", "raise", "die", "hang", timeout_s=5.0)], Dyer(), 4)
    assert rollout.valid_TB.tolist() == [[True] * 2 + [False] * 6] and rollout.lost == 6
    assert [task for task, _ in scores(rollout)] == [0, 0] and not any(score != score for _, score in scores(rollout))
    with pytest.raises(TrainingError, match=r"'environment.rewards.fickle' could score none of 8 pictures: .*cursed"):
        collect([asking("raise")], Dyer(), 4)


def test_scoring_ends_before_the_policy_has_drawn_the_last_picture(asking: Any, tmp_path: Path) -> None:
    """The policy does not go on before what it drew first is scored: one after the other, it would wait for ever."""
    scored = tmp_path / "scored"
    policy = Dyer(until(scored))
    made = asking(f"leave {scored}", "b", "c", "d")
    assert isinstance(made, GradualEnvironment) and isinstance(policy, AsyncPolicy)
    rollout = collect([made], policy, 4)
    assert scored.exists() and rollout.valid_TB.all()
    threads = {what: {who for did, _, who in policy.seen if did == what} for what in ("act", "finish")}
    assert threads["act"] == {threading.current_thread().name} and not threads["act"] & threads["finish"]


class Whole:
    """An environment that takes all actions at once."""

    def __init__(self, inner: PictureEnvironment) -> None:
        self.num_envs, self.reset, self.step = inner.num_envs, inner.reset, inner.step
        self.family_of, self.transcript = inner.family_of, inner.transcript


def test_an_evaluation_scores_while_it_draws_and_gives_the_same(asking: Any, tmp_path: Path) -> None:
    scored, tasks = tmp_path / "scored", [0, 4, 1, 2, 3, 5, 6, 7, 8, 11]  # ten in eight slots, and 0 and 4 want the same seat

    def play(policy: Any, environment: Any) -> list[Played]:
        return Player(policy, environment, seed=0, act_batch=2, device=CPU).play(tasks, lambda count: None)

    words = (f"leave {scored}", "b")
    serial = play(Dyer(), Whole(asking(*words, apart=False)))
    scored.unlink()
    assert play(policy := Dyer(until(scored)), asking(*words)) == serial and scored.exists()
    assert len({each.return_ for each in serial}) == 10 and [size for what, size, _ in policy.seen if what == "act"] == [2] * 5


def test_what_goes_wrong_beside_ends_the_rollout(asking: Any) -> None:
    class Clumsy(Dyer):
        def begin_act(self, observation: Observation, draws: Draws, *, explore: bool) -> Callable[[], Decision]:
            super().begin_act(observation, draws, explore=explore)

            def finish() -> Decision:
                raise RuntimeError("the paint is dry")

            return finish

    with pytest.raises(RuntimeError, match="the paint is dry"):
        collect([asking("a", apart=False)], Clumsy(), 2)


def test_one_set_of_processes_scores_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []
    monkeypatch.setattr(Workers, "__init__", lambda self, config: built.append(config))
    monkeypatch.setattr(Workers, "close", lambda self: None, raising=False)
    path = tmp_path / "painting.yaml"
    apart = '{target: "mmrl.rewards.apart:Workers", reward: {target: "mmrl.rewards.shapes:Shapes", graded: true}}'
    path.write_text(painting_run.RUN.replace('{target: "mmrl.rewards.shapes:Shapes", graded: true}', apart))
    config = load(path, [])
    (made,) = build_parts(config, 16, 2, CPU)
    assert made.num_envs == 16 and len(built) == 1


def test_diffusion_decodes_while_it_denoises_and_draws_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first denoising step of the second piece waits for the first piece to be decoded."""
    policy = tiny_diffusion.build(tiny_diffusion.write_sd3(tmp_path))
    made: Any = environment(num_envs=4)
    serial = collect([environment(num_envs=2) for _ in range(2)], policy)
    decoded, steps, threads = threading.Event(), 0, set()
    decode, predict = policy.family.decode, policy.family.predict

    def decoding(latents: Any) -> Any:
        threads.add(threading.get_ident())
        decoded.set()
        return decode(latents)

    def predicting(*inputs: Any) -> Any:
        nonlocal steps
        steps += 1
        assert steps != tiny_diffusion.STEPS + 1 or decoded.wait(PATIENCE), "nothing is decoded while the network works"
        return predict(*inputs)

    monkeypatch.setattr(policy.family, "decode", decoding)
    monkeypatch.setattr(policy.family, "predict", predicting)
    assert isinstance(policy, AsyncPolicy)
    rollout = collect([made], policy, 2)
    assert steps == 2 * tiny_diffusion.STEPS and threading.get_ident() not in threads
    assert all(torch.equal(rollout.trace[name], values) for name, values in serial.trace.items() if name != "prompt")  # type: ignore[arg-type]
    assert torch.equal(rollout.log_probs_TBK, serial.log_probs_TBK) and not rollout.log_probs_TBK.requires_grad
    ours, theirs = ([told.shown.key for told in each.episodes.transcripts] for each in (rollout, serial))  # type: ignore[union-attr]
    assert ours == theirs and len(set(ours)) == 4
