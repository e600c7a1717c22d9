"""Policies that answer in messages pass through collecting, batching and playing as those that move arms do.

The policy says the question's number and how often it has spoken; the environment ends an episode of task t after t % 3 + 1
answers and checks that each message arrived in the slot that it was said for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmrl.algorithms.grpo import GRPO
from mmrl.batching import make_batch
from mmrl.columns import Column
from mmrl.messages import Message
from mmrl.numerics.draws import Draws
from mmrl.playing import Player
from mmrl.rollout import Collector
from mmrl.transcripts import Question, Transcript, Turn
from mmrl.types import Conversation, Decision, Observation, Packing, Rollout, Step

CPU = torch.device("cpu")
K = 2


class Talker:
    version = 0

    def act(self, observation: Observation, draws: Draws, *, explore: bool) -> Decision:
        assert observation.conversations is not None
        said = [f"{c[0].text} {len(c) // 2}" for c in observation.conversations]
        numbers_B = torch.tensor([float(c[0].text) for c in observation.conversations])
        trace = {"heard": Column.of(c[-1] for c in observation.conversations)}
        return Decision(
            Column.of(Message("assistant", (text,)) for text in said),
            trace if explore else {},
            numbers_B[:, None].expand(-1, K),
            torch.ones(len(said), K, dtype=torch.bool),
            None,
        )

    def pack(self, rollout: Rollout) -> Packing:
        return rollout.by_episode()


class Listener:
    action_spec = None
    max_steps = 3

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self.conversations: list[Conversation] = [()] * num_envs
        self.tasks_B = torch.zeros(num_envs, dtype=torch.long)
        self.done_B = torch.ones(num_envs, dtype=torch.bool)

    def reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Observation:
        for b in range(self.num_envs):
            if where_B is None or where_B[b]:
                self.tasks_B[b], self.done_B[b] = task_ids_B[b], False
                self.conversations[b] = (Message("user", (str(int(task_ids_B[b])),)),)
        return self.observe()

    def observe(self) -> Observation:
        return Observation({}, None, ("",) * self.num_envs, conversations=tuple(self.conversations))

    def step(self, actions: Any) -> Step:
        running_B = ~self.done_B
        for b, message in enumerate(actions.tolist()):
            if running_B[b]:
                answers = len(self.conversations[b]) // 2
                assert message.text == f"{int(self.tasks_B[b])} {answers}", "a message reached another slot"
                self.conversations[b] = (*self.conversations[b], message, Message("user", (f"and then {answers}?",)))
                self.done_B[b] = answers + 1 == int(self.tasks_B[b]) % 3 + 1
        metrics = {"success": self.done_B.float()}
        ended_B, never_B = self.done_B.clone(), torch.zeros_like(self.done_B)
        rewards_B1 = (running_B & ended_B).float()[:, None] * (1 + torch.arange(self.num_envs)[:, None])
        return Step(self.observe(), rewards_B1, running_B[:, None], ended_B, never_B, metrics)

    def transcript(self, slot: int) -> Transcript:
        """The answer is the last message; even tasks are answered rightly."""
        task, said = int(self.tasks_B[slot]), self.conversations[slot]
        turns = tuple(Turn(message, replies=(reply,)) for message, reply in zip(said[1::2], said[2::2], strict=True))
        question = Question("talk", (str(task),), ("even",), lambda answer: float(int(answer.split()[0]) % 2 == 0))
        over = bool(self.done_B[slot])
        answer = turns[-1].message.text if over else None
        return Transcript(task, question, said[:1], turns, answer, "answer" if over else "running")

    def family_of(self, task_ids_M: Tensor) -> tuple[str, ...]:
        return ("talk",) * len(task_ids_M)

    def close(self) -> None: ...


def test_conversations_are_collected_and_become_samples() -> None:
    collector = Collector(
        [Listener(4), Listener(2)],  # type: ignore[list-item]
        decisions=3,
        seed=0,
        device=CPU,
        group_size=2,
        auto_reset=False,
    )
    policy: Any = Talker()
    rollout = collector.collect(policy)
    assert rollout.valid_TB.sum(0).tolist() == [1, 1, 2, 2, 3, 3]
    advantages = GRPO(GRPO.Config(group_size=2)).advantages(rollout)
    batch = make_batch(rollout, advantages, policy)
    heard = [[None if m is None else m.text for m in row] for row in batch.trace["heard"].tolist()]
    assert heard[0] == heard[1] == ["0", None, None]
    assert heard[2] == heard[3] == ["1", "and then 0?", None]
    assert heard[4] == heard[5] == ["2", "and then 0?", "and then 1?"]
    assert batch.mask_NK.sum(1).tolist() == [2, 2, 4, 4, 6, 6]
    assert batch.old_log_probs_NK[4].tolist() == [2.0] * 6 and batch.old_log_probs_NK[2].tolist() == [1.0] * 4 + [0.0] * 2
    for n, valid in enumerate((1, 1, 2, 2, 3, 3)):  # the second of a group earns more
        assert (batch.advantages_NJ[n, :valid] > 0).all() if n % 2 else (batch.advantages_NJ[n, :valid] < 0).all()


def spans(rollout: Rollout) -> list[list[int]]:
    assert rollout.episodes.spans_M3 is not None
    return rollout.episodes.spans_M3.tolist()


def test_an_episode_has_its_transcript_slot_and_decisions() -> None:
    collector = Collector([Listener(4), Listener(2)], decisions=3, seed=0, device=CPU, group_size=2, auto_reset=False)  # type: ignore[list-item]
    policy: Any = Talker()
    rollout = collector.collect(policy)
    assert spans(rollout) == [[0, 0, 0], [1, 0, 0], [2, 0, 1], [3, 0, 1], [4, 0, 2], [5, 0, 2]]
    transcripts = rollout.episodes.transcripts
    assert [t.task_id for t in transcripts] == [0, 0, 1, 1, 2, 2]
    assert [t.answer for t in transcripts] == ["0 0", "0 0", "1 1", "1 1", "2 2", "2 2"]
    assert [turn.message.text for turn in transcripts[4].turns] == ["2 0", "2 1", "2 2"]
    assert [t.mark for t in transcripts] == [1, 1, 0, 0, 1, 1]


def test_an_episode_that_was_cut_has_its_transcript_as_it_stands() -> None:
    policy: Any = Talker()
    rollout = Collector([Listener(3)], decisions=2, seed=0, device=CPU, auto_reset=False).collect(policy)  # type: ignore[list-item]
    assert spans(rollout) == [[0, 0, 0], [1, 0, 1], [2, 0, 1]]
    assert [t.ended for t in rollout.episodes.transcripts] == ["answer", "answer", "running"]
    assert rollout.episodes.transcripts[2].answer is None and len(rollout.episodes.transcripts[2].turns) == 2


def test_episodes_that_follow_one_another_have_their_own_transcripts() -> None:
    policy: Any = Talker()
    rollout = Collector([Listener(2), Listener(1)], decisions=7, seed=0, device=CPU).collect(policy)  # type: ignore[list-item]
    assert len(spans(rollout)) > 6
    for (slot, first, last), transcript in zip(spans(rollout), rollout.episodes.transcripts, strict=True):
        assert rollout.task_ids_TB[first : last + 1, slot].tolist() == [transcript.task_id] * len(transcript.turns)
        assert transcript.ended == "answer" and bool(rollout.terminated_TB[last, slot])
        assert not rollout.terminated_TB[first:last, slot].any()


def test_conversations_are_played_whatever_the_seats() -> None:
    policy: Any = Talker()
    for slots, act_batch in ((1, 1), (3, 2), (8, 5)):
        environment: Any = Listener(slots)
        player = Player(policy, environment, seed=0, act_batch=act_batch, device=CPU)
        played = player.play(range(10, 17), lambda _: None)
        assert [(p.talk.turns, p.talk.correct, p.talk.faithful) for p in played if p.talk] == [
            (t % 3 + 1, t % 2 == 0, None) for t in range(10, 17)
        ]
        assert [(p.task_id, p.outcome, p.steps) for p in played] == [(t, "success", t % 3 + 1) for t in range(10, 17)]


def test_observations_that_talk_select_and_join_rows() -> None:
    said: list[Conversation] = [(Message("user", (text,)),) for text in "abc"]
    whole = Observation({}, None, ("",) * 3, conversations=tuple(said))
    picked = whole.select(torch.tensor([2, 0]))
    assert picked.conversations == (said[2], said[0])
    assert Observation.concat([picked.to(CPU), whole]).conversations == (said[2], said[0], *said)
