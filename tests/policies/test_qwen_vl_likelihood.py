"""What a talking policy says, scores and learns, against transformers' own models on the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmrl.algorithms.grpo import GRPO
from mmrl.algorithms.ppo import PPO
from mmrl.batching import make_batch
from mmrl.errors import MMRLError
from mmrl.messages import Message
from mmrl.rollout import Collector
from mmrl.types import Batch, Step
from policies.chat_parts.pieces import Heard
from tests.policies import chat_play, tiny_chat
from tests.policies.chat_play import play

HALF = {"temperature": 1.5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    written: dict[tuple[Any, ...], Path] = {}

    def folder(family: str, template: str = "any_role", **options: Any) -> Path:
        key = (family, template, *options.items())
        if key not in written:
            written[key] = tiny_chat.write(tmp_path_factory.mktemp("chat"), family, template, **options)
        return written[key]

    return folder


@pytest.fixture(params=tiny_chat.FAMILIES)
def make(request: pytest.FixtureRequest, folders: Callable[..., Path]) -> Callable[..., Any]:
    return lambda **fields: chat_play.quick(tiny_chat.build(folders(request.param, rows=5), **(HALF | fields)))


@pytest.fixture
def policy(make: Callable[..., Any]) -> Any:
    return make()


TALKS = tuple(tiny_chat.opening(seed, pictures) for seed, pictures in ((0, 0), (1, 1), (2, 2), (1, 1), (3, 1), (1, 1)))


def naive(policy: Any, rows: list[tuple[Any, ...]]) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probabilities and entropies of all that each conversation said, one conversation at a time."""
    log_probs, entropies = [], []
    for pieces in rows:
        places = chat_play.said_places(pieces)
        log_probs_LV = chat_play.plain_log_probs(policy, pieces)[places - 1]
        log_probs.append(log_probs_LV.gather(1, chat_play.ids_of(pieces)[places][:, None])[:, 0])
        entropies.append(torch.distributions.Categorical(logits=log_probs_LV).entropy())
    return log_probs, entropies


# -- acting ------------------------------------------------------------------------------------------------------------


def test_what_is_said_has_the_log_probs_of_transformers_own_model(policy: Any) -> None:
    """Three turns of no, one and two pictures, rows that leave the batch, prompts that are the same."""
    played = play(policy, TALKS)
    counts_TB = torch.stack([decision.trace["count"] for decision in played.decisions])
    assert len(counts_TB.unique()) >= 4 and (counts_TB == 8).any() and (counts_TB < 4).any(), "rows must differ"
    with torch.no_grad():
        log_probs, _ = naive(policy, played.rows())
    for b, theirs in enumerate(log_probs):
        torch.testing.assert_close(played.log_probs(b), theirs, rtol=0, atol=1e-10)


def test_keys_and_values_of_earlier_turns_change_nothing(policy: Any) -> None:
    with_cache, without = play(policy, TALKS), play(policy, TALKS, forget=True)
    for ours, theirs in zip(with_cache.decisions, without.decisions, strict=True):
        assert torch.equal(ours.trace["said"], theirs.trace["said"]) and torch.equal(ours.mask_BK, theirs.mask_BK)  # type: ignore
        torch.testing.assert_close(ours.log_probs_BK, theirs.log_probs_BK, rtol=0, atol=1e-10)


def test_earlier_turns_are_not_read_again(policy: Any) -> None:
    read = count_tokens(policy)
    played = play(policy, TALKS, turns=2)
    heard = sum(len(piece) for piece in played.decisions[1].trace["heard"].tolist())  # type: ignore[union-attr]
    first_pass_of_second_turn = read[1 + int(played.decisions[0].trace["count"].max()) - 1]  # type: ignore[union-attr]
    assert first_pass_of_second_turn == heard + len(TALKS)  # and the last token that each has said


def test_rows_that_heard_the_same_are_read_once(policy: Any) -> None:
    """Also where an environment makes the messages of each slot anew."""
    read = count_tokens(policy)
    talks = [tiny_chat.opening(seed, 2) for seed in (1, 2, 1, 1)]
    played = play(policy, talks, turns=1)
    heard = played.decisions[0].trace["heard"].tolist()  # type: ignore[union-attr]
    assert heard[0] is heard[2] is heard[3] and read[0] == len(heard[0]) + len(heard[1])
    assert len({tuple(row) for row in played.decisions[0].trace["said"][[0, 2, 3]].tolist()}) >= 2  # type: ignore[union-attr]


def count_tokens(policy: Any) -> list[int]:
    """Tokens, without padding, of each pass through the network from now on."""
    read: list[int] = []
    inner = policy.network.hidden

    def hidden(rows: Any, **options: Any) -> Tensor:
        read.append(int(rows.mask_NL.sum()))
        return inner(rows, **options)

    policy.network.hidden = hidden
    return read


def test_rows_that_have_finished_leave_the_batch(policy: Any) -> None:
    sizes: list[int] = []
    inner = policy.network.hidden
    policy.network.hidden = lambda rows, **options: (sizes.append(len(rows.ids_NL)), inner(rows, **options))[1]
    played = play(policy, TALKS, turns=1)
    count_B = played.decisions[0].trace["count"]
    running = [int((count_B > k).sum()) for k in range(1, 8)]  # type: ignore[operator]
    assert min(running[: len(sizes) - 1]) <= len(TALKS) // 2, "rows must differ"
    assert all(left <= size < 2 * max(left, 1) or size == len(TALKS) for left, size in zip(running, sizes[1:], strict=False))


@pytest.mark.parametrize("exploring", [True, False])
def test_a_row_does_not_depend_on_the_rows_beside_it(policy: Any, exploring: bool) -> None:
    together = play(policy, TALKS, explore=exploring)
    for b in (1, 4, 5):
        talks = TALKS[b : b + 1]
        for turn, decision in enumerate(together.decisions):
            alone = policy.act(
                chat_play.observe(talks), chat_play.draws(len(TALKS), turn).select(torch.tensor([b])), explore=exploring
            )
            said = decision.action.tolist()[b]
            assert alone.action.tolist()[0].token_ids == said.token_ids
            torch.testing.assert_close(alone.log_probs_BK[0], decision.log_probs_BK[b], rtol=0, atol=1e-10)
            talks = [(*talks[0], alone.action.tolist()[0], tiny_chat.answer(b + 10 * turn, (b + turn) % 3))]


def test_conversations_may_meet_in_new_batches(policy: Any) -> None:
    """Rows whose keys and values stand in two batches, or in none, go on together; one conversation may also stop."""
    left, right = play(policy, TALKS[:3], turns=1), play(policy, TALKS[3:], turns=2)
    talks = [*left.talks[-1][:2], *right.talks[-1][1:], TALKS[2]]
    mixed = policy.act(chat_play.observe(talks), chat_play.draws(5, 7), explore=True)
    policy.engine.forget()
    fresh = policy.act(chat_play.observe(talks), chat_play.draws(5, 7), explore=True)
    assert torch.equal(mixed.trace["said"], fresh.trace["said"])
    torch.testing.assert_close(mixed.log_probs_BK, fresh.log_probs_BK, rtol=0, atol=1e-10)
    further = [(*talk, said, tiny_chat.answer(3)) for talk, said in zip(talks, fresh.action.tolist(), strict=True)][::-2]
    again = policy.act(chat_play.observe(further), chat_play.draws(3, 8), explore=True)
    policy.engine.forget()
    fresh = policy.act(chat_play.observe(further), chat_play.draws(3, 8), explore=True)
    torch.testing.assert_close(again.log_probs_BK, fresh.log_probs_BK, rtol=0, atol=1e-10)


def test_deciding_without_exploring_is_transformers_own_greedy_generation(policy: Any) -> None:
    played = play(policy, TALKS, explore=False)
    forbidden = policy.engine.sampling.forbidden.tolist()
    assert {policy.model.config.image_token_id, len(policy.ears.tokenizer)} <= set(forbidden)
    for turn, decision in enumerate(played.decisions):
        assert decision.trace == {}
        for b, message in enumerate(decision.action.tolist()):
            pieces, _ = policy.ears.listen(played.talks[turn][b])
            policy.model.base_model.rope_deltas = None
            made = policy.model.generate(
                **chat_play.inputs(policy, pieces),
                do_sample=False,
                max_new_tokens=8,
                suppress_tokens=forbidden,
                eos_token_id=chat_play.END,
                pad_token_id=chat_play.PAD,
            )
            assert tuple(made[0, sum(map(len, pieces)) :].tolist()) == message.token_ids, (turn, b)


def test_tokens_are_drawn_with_their_probabilities(folders: Callable[..., Path]) -> None:
    """4000 first tokens of one conversation against the distribution that scores them."""
    policy = chat_play.quick(tiny_chat.build(folders("qwen2_5_vl", rows=5), temperature=1.5, max_new_tokens=1))
    size = 4000
    decision = policy.act(chat_play.observe(TALKS[1:2] * size), chat_play.draws(size), explore=True)
    pieces, _ = policy.ears.listen(TALKS[1])
    with torch.no_grad():
        p_V = chat_play.plain_log_probs(policy, (*pieces, chat_play.Said(torch.tensor([9]))))[-1].exp()
    counts_V = torch.bincount(decision.trace["said"][:, 0], minlength=len(p_V))  # type: ignore[index]
    assert counts_V[p_V == 0].sum() == 0
    often = p_V * size >= 5
    chi = ((counts_V - p_V * size) ** 2 / (p_V * size))[often].sum()
    freedom = int(often.sum()) - 1
    assert float(chi) < freedom + 4 * (2 * freedom) ** 0.5


# -- scoring again -----------------------------------------------------------------------------------------------------


GRANULARITIES = pytest.mark.parametrize("granularity", ["turn", "token"])


@GRANULARITIES
def test_scoring_whole_conversations_gives_the_numbers_of_acting(granularity: str, make: Callable[..., Any]) -> None:
    """Through the collector: conversations of one to three turns, packed by episode; log-probs, mask and values."""
    policy = make(critic={"hidden": (8,), "granularity": granularity}, score_chunk=7)
    torch.nn.init.normal_(policy.critic.net[-1].weight)
    rollout = chat_play.collect(policy)
    packing = policy.pack(rollout)
    assert sorted((packing.index_NJ >= 0).sum(1).tolist()) == [1, 1, 2, 2, 3, 3]
    evaluation = policy.evaluate(packing.trace)
    batch = batch_of(policy, rollout)
    there = batch.mask_NK
    assert int(there.sum()) == int(packing.trace["count"].sum())  # type: ignore[union-attr]
    torch.testing.assert_close(evaluation.log_probs_NK[there], batch.old_log_probs_NK[there], rtol=0, atol=1e-10)
    assert (evaluation.log_probs_NK[~there] == 0).all() and (evaluation.entropy_NK[~there] == 0).all()
    torch.testing.assert_close(evaluation.values_NV.float(), batch.old_values_NV, rtol=0, atol=1e-6)
    assert batch.old_values_NV[there if granularity == "token" else packing.index_NJ >= 0].std() > 0.1
    assert torch.equal(batch.trained_NV, there if granularity == "token" else packing.index_NJ >= 0)


def speaker(folder: Path, granularity: str = "token", **fields: Any) -> Any:
    policy = chat_play.quick(tiny_chat.build(folder, critic={"hidden": (8,), "granularity": granularity}, **(HALF | fields)))
    torch.nn.init.normal_(policy.critic.net[-1].weight)
    return policy


def test_a_token_s_value_is_read_where_it_is_drawn_from(folders: Callable[..., Path]) -> None:
    """Off the hidden states of transformers' own model at the tokens before, which know nothing of the token."""
    policy = speaker(folders("qwen2_5_vl"))
    played = play(policy, TALKS)
    for b, pieces in enumerate(played.rows()):
        policy.model.base_model.rope_deltas = None
        with torch.no_grad():
            hidden_LW = policy.model.base_model(**chat_play.inputs(policy, pieces)).last_hidden_state[0]
            theirs = policy.critic(hidden_LW[chat_play.said_places(pieces) - 1])
        ours = torch.cat([decision.values_BV[b][decision.mask_BK[b]] for decision in played.decisions])  # type: ignore[index]
        torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=1e-6)
        assert ours.std() > 0.01


@GRANULARITIES
def test_values_are_the_same_where_an_engine_shows_no_hidden_states(granularity: str, folders: Callable[..., Path]) -> None:
    policy = speaker(folders("qwen2_5_vl"), granularity)
    shown = play(policy, TALKS, forget=True)
    generate = policy.engine.generate
    policy.engine.generate = lambda *args: replace(generate(*args), hidden_BW=None, values_BK=None)
    hidden = play(policy, TALKS, forget=True)
    for ours, theirs in zip(hidden.decisions, shown.decisions, strict=True):
        assert ours.values_BV is not None and theirs.values_BV is not None
        torch.testing.assert_close(ours.values_BV, theirs.values_BV, rtol=0, atol=1e-6)


class Cut(chat_play.Quiz):
    """Its odd tasks end because time is up."""

    def step(self, actions: Any) -> Step:
        step, odd_B = super().step(actions), self.tasks_B % 2 == 1
        return replace(step, terminated_B=step.terminated_B & ~odd_B, truncated_B=step.terminated_B & odd_B)


@pytest.mark.parametrize("bootstrap", [True, False])
def test_what_follows_a_token_is_the_next_one_that_the_policy_says(bootstrap: bool, folders: Callable[..., Path]) -> None:
    """Advantages of tokens, from the collector to the batch, against lists of all that each conversation said."""
    policy = speaker(folders("qwen2_5_vl"))
    quiz: Any = Cut(6)
    collector = Collector([quiz], decisions=3, seed=0, device=tiny_chat.CPU, auto_reset=False)
    rollout = collector.collect(policy, policy.value)
    rollout = replace(rollout, rewards_TB=rollout.rewards_TB + 0.1 * rollout.valid_TB)  # every turn is paid
    config = PPO.Config(gamma=0.9, lam=0.8, normalize_advantages=None, bootstrap_truncated=bootstrap)
    batch = make_batch(rollout, PPO(config).advantages(rollout), policy)
    for n, (task, places) in enumerate(zip(range(6), policy.pack(rollout).index_NJ, strict=True)):
        turns = [(int(place) // 6, int(place) % 6) for place in places if place >= 0]
        assert [slot for _, slot in turns] == [task] * (task % 3 + 1)
        rewards, values = [], []
        for t, slot in turns:
            said = rollout.values_TBV[t, slot][rollout.mask_TBK[t, slot]].tolist()
            values += said
            rewards += [*[0.0] * (len(said) - 1), float(rollout.rewards_TB[t, slot])]
        end = policy.value(chat_play.observe([quiz.talks[task]]), chat_play.draws(1))
        values.append(float(end) if bootstrap and task % 2 else 0.0)
        worth = 0.0
        expected = []
        for i in reversed(range(len(rewards))):
            worth = rewards[i] + 0.9 * values[i + 1] - values[i] + 0.9 * 0.8 * worth
            expected.insert(0, worth)
        there_K = batch.mask_NK[n]
        assert batch.advantages_NK[n][there_K].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
        returns = [a + v for a, v in zip(expected, values, strict=False)]
        assert batch.returns_NV[n][there_K].tolist() == pytest.approx(returns, rel=1e-4, abs=1e-5)


def batch_of(policy: Any, rollout: Any) -> Batch:
    return make_batch(rollout, GRPO(GRPO.Config(group_size=2)).advantages(rollout), policy)


def test_entropies_and_gradients_are_a_naive_loop_s(make: Callable[..., Any]) -> None:
    policy = make(score_chunk=5)
    rollout = chat_play.collect(policy)
    trace = policy.pack(rollout).trace
    rows = [
        tuple(
            piece
            for heard, said, count in zip(pieces, said_JK, counts, strict=True)
            if heard is not None
            for piece in (heard, chat_play.Said(said[:count]))
        )
        for pieces, said_JK, counts in zip(trace["heard"].tolist(), trace["said"], trace["count"].tolist(), strict=True)
    ]
    log_probs, entropies = naive(policy, rows)
    evaluation = policy.evaluate(trace)
    there = evaluation.log_probs_NK != 0
    torch.testing.assert_close(evaluation.log_probs_NK[there], torch.cat(log_probs), rtol=0, atol=1e-10)
    torch.testing.assert_close(evaluation.entropy_NK[there], torch.cat(entropies), rtol=0, atol=1e-10)
    weights = torch.randn(int(there.sum()), dtype=torch.float64)
    naive_loss = (torch.cat(log_probs) * weights).sum() + 0.3 * torch.cat(entropies).sum()
    theirs = gradients(policy, naive_loss)
    ours = gradients(policy, (evaluation.log_probs_NK[there] * weights).sum() + 0.3 * evaluation.entropy_NK.sum())
    assert any("visual" in name and float(g.abs().max()) > 1e-6 for name, g in theirs.items()), "pictures must matter"
    same(ours, theirs)


def gradients(policy: Any, loss: Tensor) -> dict[str, Tensor]:
    policy.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Equal but for rounding (transformers' norms are in float32, and so is what turns patches); no gradient is one of zero."""
    assert max(float(g.abs().max()) for g in theirs.values()) > 1e-3, "a gradient of zero would pass"
    for name in ours.keys() | theirs.keys():
        zero = torch.zeros(())
        a, b = ours.get(name, zero), theirs.get(name, zero)
        assert float((a - b).abs().max()) < 1e-6 * (1 + float(b.abs().max())), name


@GRANULARITIES
def test_micro_batches_add_up_to_the_whole_gradient(granularity: str, make: Callable[..., Any]) -> None:
    policy = make(critic={"hidden": (8,), "detach": False, "granularity": granularity})
    torch.nn.init.normal_(policy.critic.net[-1].weight)
    batch = batch_of(policy, chat_play.collect(policy))

    def loss(part: Batch) -> Tensor:
        evaluation = policy.evaluate(part.trace)
        units = evaluation.log_probs_NK * part.per_unit(part.advantages_NJ) * part.mask_NK
        return units.sum() + 0.1 * evaluation.entropy_NK.sum() + (evaluation.values_NV - 1).square()[part.trained_NV].sum()

    whole = gradients(policy, loss(batch))
    parts = [gradients(policy, loss(batch.select(torch.tensor(rows)))) for rows in ([4, 0], [1], [5, 2, 3])]
    same({name: sum(part[name] for part in parts if name in part) for name in whole}, whole)


def test_scoring_with_checkpoints_of_activations_is_the_same(make: Callable[..., Any]) -> None:
    plain, saving = make(), make(checkpointing=True)
    for module in saving.model.modules():  # what a config could ask for: it must not be heard
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    trace = plain.pack(chat_play.collect(plain)).trace
    found = []
    for policy in (plain, saving):
        with policy.compute_mode(train=True):
            evaluation = policy.evaluate(trace)
            found.append(gradients(policy, evaluation.log_probs_NK.sum() + evaluation.entropy_NK.sum()))
        assert not any(module.training for module in policy.model.modules())
    same(found[1], found[0])


@GRANULARITIES
def test_values_of_what_is_seen_are_those_of_acting(granularity: str, make: Callable[..., Any]) -> None:
    policy = make(critic={"hidden": (8,), "granularity": granularity})
    torch.nn.init.normal_(policy.critic.net[-1].weight)
    played = play(policy, TALKS)
    for turn, decision in enumerate(played.decisions):
        values_B = policy.value(chat_play.observe(played.talks[turn]), chat_play.draws(len(TALKS), turn))
        assert decision.values_BV is not None
        torch.testing.assert_close(values_B.float(), decision.values_BV[:, 0], rtol=0, atol=1e-6)
        assert decision.values_BV.std() > 0


def test_the_temperature_divides_what_is_drawn_and_what_is_scored(folders: Callable[..., Path]) -> None:
    cold, hot = (tiny_chat.build(folders("qwen2_5_vl"), temperature=t) for t in (0.5, 2.0))
    played = [play(policy, TALKS, turns=1, explore=True) for policy in (cold, hot)]
    entropies = [
        policy.evaluate({name: x[:, None] for name, x in some.decisions[0].trace.items()}).entropy_NK.sum()
        for policy, some in zip((cold, hot), played, strict=True)
    ]
    assert entropies[1] > 1.5 * entropies[0]


def test_tokens_that_stand_for_pictures_are_never_said(folders: Callable[..., Path]) -> None:
    """Even where the model holds nothing else likely."""
    policy = tiny_chat.build(folders("qwen2_5_vl", rows=5))
    never = [3, 4, 5, 6, *range(len(policy.ears.tokenizer), len(policy.ears.tokenizer) + 5)]
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[never] *= 1000
    played = play(policy, TALKS)
    said = {token for turn in played.decisions for message in turn.action.tolist() for token in message.token_ids}
    assert said and not said & set(never)
    for pieces in played.rows():
        seen = sum(picture.tokens for piece in pieces if isinstance(piece, Heard) for picture in piece.pictures)
        assert int((chat_play.ids_of(pieces) == policy.model.config.image_token_id).sum()) == seen


def test_a_turn_that_ends_by_another_token_is_over(folders: Callable[..., Path]) -> None:
    """generation_config.json may list several; the template's own end is then written by the next message."""
    policy = chat_play.quick(tiny_chat.build(folders("qwen2_5_vl"), temperature=1.5))
    policy.model.generation_config.eos_token_id = [chat_play.END, 40, 41, *range(60, 120)]
    policy.engine.sampling = policy._sampling(1.5)
    played = play(policy, TALKS)
    others = [
        m for turn in played.decisions for m in turn.action.tolist() if m.finish == "stop" and m.token_ids[-1] != chat_play.END
    ]
    assert others and all(policy.ears.text(m.token_ids[:-1]) == m.text for m in others)
    with torch.no_grad():
        log_probs, _ = naive(policy, played.rows())
    for b, theirs in enumerate(log_probs):
        torch.testing.assert_close(played.log_probs(b), theirs, rtol=0, atol=1e-10)
        pieces = played.rows()[b]
        for before, after in zip(pieces[1::2], pieces[2::2], strict=False):
            assert (before.ids[-1] == chat_play.END) != (after.ids[0] == chat_play.END)


def test_an_environment_without_conversations_is_refused(folders: Callable[..., Path]) -> None:
    policy = tiny_chat.build(folders("qwen2_5_vl"))
    seen = policy.example_observation(2)
    silent = type(seen)({}, None, ("", ""))
    with pytest.raises(MMRLError, match="talks, but the environment shows no conversations"):
        policy.act(silent, chat_play.draws(2), explore=True)


def test_the_message_that_was_said_is_found_by_what_it_is(policy: Any) -> None:
    """A copy of a message (out of another process, say) goes on as well, from its tokens."""
    played = play(policy, TALKS, turns=1)
    copied = [tuple(Message(m.role, m.parts, m.calls, m.token_ids, m.finish) for m in talk) for talk in played.talks[-1]]
    fresh = policy.act(chat_play.observe(copied), chat_play.draws(len(TALKS), 1), explore=True)
    kept = policy.act(chat_play.observe(played.talks[-1]), chat_play.draws(len(TALKS), 1), explore=True)
    assert torch.equal(fresh.trace["said"], kept.trace["said"])
    torch.testing.assert_close(fresh.log_probs_BK, kept.log_probs_BK, rtol=0, atol=1e-10)
