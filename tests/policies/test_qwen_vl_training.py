"""Imitation, adapters, what is frozen, checkpoints of talking policies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer

from mmrl.errors import MMRLError
from mmrl.messages import Message
from mmrl.types import Conversation, Talks
from policies.chat_parts.pieces import Said
from policies.chat_parts.policy import SpanOptions
from tests.policies import chat_play, tiny_chat
from tests.policies.chat_play import ids_of, play


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: tiny_chat.write(tmp_path_factory.mktemp(family), family) for family in tiny_chat.FAMILIES}


@pytest.fixture(params=tiny_chat.FAMILIES)
def make(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Callable[..., Any]:
    return lambda **fields: tiny_chat.build(folders[request.param], **fields)


@pytest.fixture
def build(folders: dict[str, Path]) -> Callable[..., Any]:
    return lambda **fields: tiny_chat.build(folders["qwen2_5_vl"], **fields)


def lesson(seed: int, turns: int = 2) -> Conversation:
    talk = list(tiny_chat.opening(seed, seed % 3))
    for turn in range(turns):
        talk += [Message("assistant", (f"call crop {seed * 17 + turn} <answer>left</answer>",)), tiny_chat.answer(seed, turn % 2)]
    return tuple(talk[:-1] if seed % 2 else talk)


LESSONS = Talks(tuple(lesson(seed, 1 + seed % 3) for seed in range(5)))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def transformers_loss(policy: Any, conversations: tuple[Conversation, ...], weigh: Callable[[int, int], float]) -> Tensor:
    """transformers' own logits of each conversation, and the mean cross entropy of what the assistant says in it.

    ``weigh``: of the character from which and to which a token reaches in what is said, for the end of a turn (-1, -1).
    """
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for talk in conversations:
        pieces = policy.ears.study(talk)
        inputs = chat_play.inputs(policy, pieces)
        if hasattr(policy.model.base_model, "rope_deltas"):
            policy.model.base_model.rope_deltas = None
        labels, weights = torch.full_like(inputs["input_ids"], -100), torch.zeros(inputs["input_ids"].shape)
        spoken = [message for message in talk if message.role == "assistant"]
        at = 0
        for piece in pieces:
            if isinstance(piece, Said):
                labels[0, at : at + len(piece)] = piece.ids
                encoded = policy.ears.tokenizer(spoken.pop(0).text, return_offsets_mapping=True)
                assert piece.ids.tolist() == [*encoded["input_ids"], chat_play.END]
                reach = [*encoded["offset_mapping"], (-1, -1)]
                weights[0, at : at + len(piece)] = torch.tensor([weigh(first, last) for first, last in reach])
            at += len(piece)
        logits = policy.model(**inputs).logits.index_fill(-1, policy.engine.sampling.forbidden, -torch.inf)
        each = F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="none")
        total = total + (each * weights[0, 1:]).sum()
        count += float(weights.sum())
    return total / count


# -- imitation ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_transformers_cross_entropy_of_what_the_assistant_says(make: Callable[..., Any]) -> None:
    """Also at a temperature, which is for exploring alone."""
    policy = make(temperature=0.5)
    theirs = transformers_loss(policy, LESSONS.conversations, lambda first, last: 1.0)
    ours = policy.supervised_loss(LESSONS, generator())
    torch.testing.assert_close(ours.value, theirs, rtol=0, atol=1e-10)
    assert 0 < float(ours.metrics["token_probability"]) < 1
    grads = []
    for loss in (ours.value, theirs):
        policy.zero_grad(set_to_none=True)
        loss.backward()
        grads.append({name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, gradient in grads[1].items():
        torch.testing.assert_close(grads[0][name], gradient, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_spans_weigh_the_tokens_that_they_touch(build: Callable[..., Any]) -> None:
    policy = build(spans=(SpanOptions(pattern=r"<answer>.*?</answer>", weight=3.0), SpanOptions(pattern=r"\d+", weight=0.5)))
    plain = build()
    texts = {m.text for talk in LESSONS.conversations for m in talk if m.role == "assistant"}
    assert len({text.index("<answer>") for text in texts}) > 1

    def weights_of(talk: Conversation) -> list[list[float]]:
        rows = []
        for message in talk:
            if message.role != "assistant":
                continue
            encoded = policy.ears.tokenizer(message.text, return_offsets_mapping=True)
            answer, end = message.text.index("<answer>"), len(message.text)
            digits = {i for i, letter in enumerate(message.text) if letter.isdigit()}
            row = [
                (3.0 if first < end and last > answer else 1.0) * (0.5 if digits & set(range(first, last)) else 1.0)
                for first, last in encoded["offset_mapping"]
            ]
            rows.append([*row, 1.0])
        return rows

    for talk in LESSONS.conversations:
        said = [piece for piece in policy.ears.study(talk) if isinstance(piece, Said)]
        assert [piece.weights.tolist() for piece in said if piece.weights is not None] == weights_of(talk)
    each = torch.tensor([sum(map(sum, weights_of(talk))) for talk in LESSONS.conversations])
    assert torch.equal(policy.supervised_weight(LESSONS), each)
    assert not torch.equal(plain.supervised_weight(LESSONS), each)
    with torch.no_grad():
        losses = [
            policy.supervised_loss(Talks((talk,)), generator()).value * weight
            for talk, weight in zip(LESSONS.conversations, each, strict=True)
        ]
        whole = policy.supervised_loss(LESSONS, generator()).value
    torch.testing.assert_close(sum(losses) / each.sum(), whole, rtol=1e-6, atol=0)  # micro-batches add up
    assert abs(float(whole - plain.supervised_loss(LESSONS, generator()).value.detach())) > 1e-3


@pytest.mark.parametrize("spans", [(), (SpanOptions(pattern=r"<answer>.*?</answer>", weight=3.0),)], ids=["no spans", "spans"])
def test_a_message_without_weight_is_heard_and_not_learned(build: Callable[..., Any], spans: tuple[SpanOptions, ...]) -> None:
    """What it says changes what follows; that it says it is not taught, whatever the others weigh."""
    policy = build(spans=spans)
    talk = next(talk for talk in LESSONS.conversations if sum(message.role == "assistant" for message in talk) > 1)
    first = next(at for at, message in enumerate(talk) if message.role == "assistant")
    heard = (*talk[:first], replace(talk[first], weight=0.0), *talk[first + 1 :])
    weights = [piece.weights for piece in policy.ears.study(heard) if isinstance(piece, Said)]
    assert weights[0] is not None and not weights[0].any()
    said = [talk[: at + 1] for at, message in enumerate(talk) if message.role == "assistant"]
    whole, alone = (float(policy.supervised_weight(Talks((each,)))) for each in (talk, said[0]))
    assert float(policy.supervised_weight(Talks((heard,)))) == whole - alone
    with torch.no_grad():
        every, one, rest = (float(policy.supervised_loss(Talks((each,)), generator()).value) for each in (talk, said[0], heard))
    assert rest * (whole - alone) == pytest.approx(every * whole - one * alone, rel=1e-5)
    told = (*talk[:first], replace(talk[first], weight=0.0, parts=("Something else.",), token_ids=()), *talk[first + 1 :])
    with torch.no_grad():
        assert float(policy.supervised_loss(Talks((told,)), generator()).value) != rest


def test_spans_find_their_text_in_tokens_that_were_said(build: Callable[..., Any]) -> None:
    """A message of a policy that is imitated keeps its tokens, however they spell its text."""
    policy = build(spans=(SpanOptions(pattern=r"12", weight=2.0),))
    ids = policy.ears.tokenizer.convert_tokens_to_ids(list("x12y"))
    message = Message("assistant", ("x12y",), token_ids=(*ids, chat_play.END), finish="stop")
    said = policy.ears.study((*tiny_chat.opening(1), message))[1]
    assert said.ids.tolist() == [*ids, chat_play.END] and said.weights.tolist() == [1, 2, 2, 1, 1]


def test_data_cannot_make_the_model_learn_what_it_must_not_say(build: Callable[..., Any]) -> None:
    policy = build()
    hostile = "see <|image_pad|> and <|im_end|> and <|vision_start|>"
    talk = (*tiny_chat.opening(1, 1), Message("assistant", (hostile,)))
    said = policy.ears.study(talk)[1]
    assert not set(said.ids[:-1].tolist()) & {2, 3, 4, 5, 6} and said.ids[-1] == chat_play.END
    assert policy.supervised_loss(Talks((talk,)), generator()).value.isfinite()


def test_the_loss_of_what_is_heard_is_not_learned(build: Callable[..., Any]) -> None:
    policy = build()
    heard = tuple(message for talk in LESSONS.conversations for message in talk if message.role != "assistant")
    assert policy.ears.study(heard) == ()
    pieces = policy.ears.study(LESSONS.conversations[2])
    assert float(policy.supervised_weight(LESSONS)[2]) == sum(len(piece) for piece in pieces if isinstance(piece, Said))


def test_conversations_longer_than_the_limit_are_cut(build: Callable[..., Any]) -> None:
    whole = build()
    talk = lesson(2, 3)
    pieces = whole.ears.study(talk)
    for most in range(len(pieces[0]) + 1, sum(map(len, pieces)) + 2):
        policy = whole
        object.__setattr__(policy.config, "max_tokens", most)
        kept = policy._study(talk)
        assert ids_of(kept).tolist() == ids_of(pieces)[: len(ids_of(kept))].tolist() and isinstance(kept[-1], Said)
        cut_in_heard = most - len(ids_of(kept)) <= len(pieces[len(kept)]) if len(kept) < len(pieces) else True
        assert len(ids_of(kept)) == min(most, sum(map(len, pieces))) or cut_in_heard
    object.__setattr__(whole.config, "max_tokens", len(pieces[0]))
    with pytest.raises(MMRLError, match=r"policy\.max_tokens = \d+, but a conversation begins with more"):
        whole.supervised_loss(Talks((talk,)), generator())


def test_it_can_be_taught(build: Callable[..., Any]) -> None:
    """What it says after imitation, without exploring, is what it was shown: an answer for each picture's colour."""
    policy = build(dtype="float32", max_new_tokens=12)
    lessons = Talks(
        tuple((*tiny_chat.opening(seed, 1), Message("assistant", (word,))) for seed, word in enumerate(("left", "12 up")))
    )
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for _ in range(40):
        with policy.compute_mode(train=True):
            loss = policy.supervised_loss(lessons, generator())
            optimizer.zero_grad()
            loss.value.backward()
        optimizer.step()
    said = policy.act(chat_play.observe([talk[:-1] for talk in lessons.conversations]), chat_play.draws(2), explore=False)
    assert [message.text for message in said.action.tolist()] == ["left", "12 up"]
    assert [message.finish for message in said.action.tolist()] == ["stop", "stop"]


# -- which weights learn -----------------------------------------------------------------------------------------------


def test_adapters_learn_alone_and_are_merged_when_saved(make: Callable[..., Any], tmp_path: Path) -> None:
    policy = make(train="lora", lora={"rank": 2}, checkpointing=True)
    assert all("lora_" in name for name, p in policy.named_parameters() if p.requires_grad)
    before = play(policy, [tiny_chat.opening(1, 1)])
    with policy.compute_mode(train=True):
        policy.supervised_loss(LESSONS, generator()).value.backward()
    moved = list(policy.trainable()["actor"])
    assert moved and list(policy.trainable()) == ["actor"]
    with torch.no_grad():
        for p in moved:
            assert p.grad is not None
            p += torch.randn_like(p)
    policy.engine.forget()
    after = play(policy, [tiny_chat.opening(1, 1)])
    assert not torch.allclose(before.log_probs(0)[:1], after.log_probs(0)[:1])
    policy.save(tmp_path)
    loaded = tiny_chat.build(tmp_path)
    assert not any("lora" in name for name, _ in loaded.named_parameters())
    again = play(loaded, [tiny_chat.opening(1, 1)])
    torch.testing.assert_close(again.log_probs(0), after.log_probs(0), rtol=0, atol=1e-9)


def test_checkpointed_adapters_have_the_same_gradients(build: Callable[..., Any]) -> None:
    grads = []
    for checkpointing in (False, True):
        policy = build(train="lora", lora={"rank": 2}, checkpointing=checkpointing)
        with policy.compute_mode(train=True):
            policy.supervised_loss(LESSONS, generator()).value.backward()
        grads.append({name: p.grad for name, p in policy.named_parameters() if p.requires_grad})
    for name, gradient in grads[0].items():
        torch.testing.assert_close(grads[1][name], gradient, rtol=1e-9, atol=1e-12)
    assert max(float(gradient.abs().max()) for gradient in grads[0].values()) > 1e-4


def test_what_is_frozen_does_not_learn(build: Callable[..., Any]) -> None:
    policy = build(frozen=".*visual.*")
    policy.supervised_loss(LESSONS, generator()).value.backward()
    learned = {name for name, p in policy.named_parameters() if p.grad is not None}
    assert learned and not any("visual" in name for name in learned)
    assert sum(map(len, policy.trainable().values())) == sum(p.requires_grad for p in policy.parameters())
    with pytest.raises(MMRLError, match=r"policy\.frozen = 'nothing' fits no weight"):
        build(frozen="nothing")
    with pytest.raises(MMRLError, match="is no regular expression"):
        build(frozen="(")
    with pytest.raises(MMRLError, match=r"policy\.lora\.modules = 'nothing' fits no layer"):
        build(train="lora", lora={"modules": "nothing"})


def test_a_detached_critic_s_loss_stops_at_the_head(build: Callable[..., Any]) -> None:
    for detach in (True, False):
        policy = build(critic={"hidden": (8,), "detach": detach})
        torch.nn.init.normal_(policy.critic.net[-1].weight)
        trace = policy.pack(chat_play.collect(policy)).trace
        policy.evaluate(trace).values_NV.square().sum().backward()
        assert all(p.grad is not None for p in policy.critic.parameters())
        assert any(p.grad is not None for p in policy.model.parameters()) == (not detach)


def test_a_reference_stays_as_it_was(make: Callable[..., Any]) -> None:
    """Also with what it remembers of conversations: it hears what it is told, not what the policy heard."""
    policy = make()
    trace = policy.pack(chat_play.collect(policy)).trace
    reference = policy.reference()
    before = reference.evaluate(trace).log_probs_NK
    assert torch.equal(before, policy.evaluate(trace).log_probs_NK) and not any(p.requires_grad for p in reference.parameters())
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.1
    assert torch.equal(reference.evaluate(trace).log_probs_NK, before)
    assert not torch.allclose(policy.evaluate(trace).log_probs_NK, before)
    for seed in range(30):
        talk = tiny_chat.opening(seed, 0)
        assert talk[-1].text in reference.ears.text(reference.ears.listen(talk)[0][0].ids.tolist())


def test_a_reference_is_a_copy_of_what_learns_alone(build: Callable[..., Any]) -> None:
    for fields in ({"train": "lora"}, {"frozen": ".*visual.*"}):
        policy = build(**fields)
        still = {name for name, p in policy.named_parameters() if not p.requires_grad}
        theirs = {id(p) for p in policy.reference().parameters()}
        assert {name for name, p in policy.named_parameters() if id(p) in theirs} == still != set()


def test_a_reference_may_be_the_model_without_its_adapters(build: Callable[..., Any]) -> None:
    policy, plain = build(train="lora", reference="base"), build()
    trace = policy.pack(chat_play.collect(policy)).trace
    adapters = [p for p in policy.parameters() if p.requires_grad]
    for p in adapters:
        torch.nn.init.normal_(p)
    reference = policy.reference()
    expected = plain.evaluate(trace).log_probs_NK
    assert torch.equal(reference.evaluate(trace).log_probs_NK, expected)
    own = policy.evaluate(trace).log_probs_NK
    assert not torch.allclose(own, expected) and own.requires_grad, "the policy keeps its adapters, and they learn"
    assert not torch.allclose(build(train="lora").reference().evaluate(trace).log_probs_NK, own)
    with pytest.raises(MMRLError, match=r"policy\.reference = 'base' is the model without adapters, but policy\.train = 'all'"):
        build(reference="base")


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_transformers_own_folder_and_opens_again(make: Callable[..., Any], tmp_path: Path) -> None:
    policy = make(critic={"hidden": (8,)}, min_pixels=512, max_pixels=2048)
    torch.nn.init.normal_(policy.critic.net[-1].weight)
    policy.save(tmp_path)
    assert not list(tmp_path.glob("*.bin")) and (tmp_path / "model.safetensors").is_file()
    loaded = tiny_chat.build(tmp_path, critic={"hidden": (8,)})
    assert loaded.fingerprint() == policy.fingerprint()
    ours, theirs = (play(some, [tiny_chat.opening(2, 2)]) for some in (policy, loaded))
    torch.testing.assert_close(ours.log_probs(0), theirs.log_probs(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.decisions[0].values_BV, theirs.decisions[0].values_BV, rtol=0, atol=1e-6)
    assert loaded.critic is not None and loaded.critic.net[-1].weight.any()
    other = tiny_chat.build(tmp_path, critic={"hidden": (8,), "granularity": "token"})
    assert other.critic is not None and not other.critic.net[-1].weight.any(), "values of turns are none of tokens"
    plain, words = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert words.chat_template == policy.ears.tokenizer.chat_template
    state = policy.model.state_dict()
    assert all(torch.equal(state[name], tensor.to(state[name].dtype)) for name, tensor in plain.state_dict().items())


def test_a_state_dict_carries_the_policy(make: Callable[..., Any]) -> None:
    first, second = make(critic={"hidden": (8,)}), make(critic={"hidden": (8,)}, weights="random", seed=5)
    assert first.fingerprint() == second.fingerprint() != make(critic=None).fingerprint()
    talks = [tiny_chat.opening(1, 1)]
    ours, theirs = play(first, talks), play(second, talks, turns=1)
    assert not torch.equal(ours.log_probs(0)[:1], theirs.log_probs(0)[:1])
    second.load_state_dict(first.state_dict())
    continued = play(second, talks)  # nothing of the old weights' keys and values is left
    torch.testing.assert_close(continued.log_probs(0), ours.log_probs(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("change", ["load_state_dict", "train"])
def test_new_weights_forget_what_the_old_ones_kept(build: Callable[..., Any], change: str) -> None:
    """A conversation that goes on is read again, by the weights that there are now."""
    policy, other = build(), build(weights="random", seed=5)
    played = play(policy, [tiny_chat.opening(1, 1)], turns=1)
    if change == "train":
        with policy.compute_mode(train=True), torch.no_grad():
            for ours, theirs in zip(policy.parameters(), other.parameters(), strict=True):
                ours.copy_(theirs)
    else:
        policy.load_state_dict(other.state_dict())
    ours, theirs = (some.act(chat_play.observe(played.talks[-1]), chat_play.draws(1), explore=True) for some in (policy, other))
    torch.testing.assert_close(ours.log_probs_BK, theirs.log_probs_BK, rtol=0, atol=1e-12)


def test_bfloat16_weights_score_what_they_said(make: Callable[..., Any]) -> None:
    """Probabilities are float32; what rounding of hidden states does to them stays small."""
    policy = chat_play.quick(make(dtype="bfloat16", temperature=2.0))
    rollout = chat_play.collect(policy)
    assert rollout.log_probs_TBK.dtype == torch.float32
    packing = policy.pack(rollout)
    evaluation = policy.evaluate(packing.trace)
    old = rollout.log_probs_TBK.flatten(0, 1)[packing.index_NJ.clamp(min=0)].flatten(1)
    there = evaluation.log_probs_NK != 0
    assert evaluation.log_probs_NK.dtype == torch.float32
    difference = (evaluation.log_probs_NK.detach() - old)[there].abs()
    assert float(difference.mean()) < 0.05 and float(difference.max()) < 0.5


def test_what_cannot_be_loaded_is_a_sentence(build: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(MMRLError, match=r"policy\.checkpoint = .*nowhere"):
        tiny_chat.build(tmp_path / "nowhere")
    llama = tiny_chat.write(tmp_path / "llama", "llama", "strings")
    with pytest.raises(MMRLError, match=r"policy\.checkpoint"):
        tiny_chat.build(llama)
    build().save(tmp_path / "blind")
    (tmp_path / "blind" / "preprocessor_config.json").unlink()
    (tmp_path / "blind" / "processor_config.json").unlink(missing_ok=True)
    with pytest.raises(MMRLError, match="has no image processor"):
        tiny_chat.build(tmp_path / "blind")
