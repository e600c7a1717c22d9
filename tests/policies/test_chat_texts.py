"""The texts of tokens: together they are the message, whatever tokenizer wrote it."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmrl.protocols import LegiblePolicy
from policies.qwen_vl import QwenVL
from tests.policies import tiny_chat


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> QwenVL:
    return tiny_chat.build(tiny_chat.write(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("text", ["The answer is 12.", " crop image 1 \n\n", "größer 東京 🙂!", "🙂"])
def test_they_are_the_message_with_its_end(policy: QwenVL, text: str) -> None:
    assert isinstance(policy, LegiblePolicy)
    ids = [*policy._tokenizer(text, add_special_tokens=False)["input_ids"], policy.ears.end]  # type: ignore[misc]
    texts = policy.token_texts(ids)
    assert len(texts) == len(ids) and "".join(texts) == f"{text}<|im_end|>" and texts[-1] == "<|im_end|>"


def test_a_character_stands_at_the_token_that_completes_it(policy: QwenVL) -> None:
    ids: Any = policy._tokenizer("a🙂b", add_special_tokens=False)["input_ids"]
    assert policy.token_texts(ids) == ["a", "", "", "", "🙂", "b"]  # each of four bytes is a token of the tiny tokenizer
    assert policy.token_texts(ids[:3]) == ["a", "", "\N{REPLACEMENT CHARACTER}"], "cut in the middle"
    assert policy.token_texts([]) == []


def test_a_tokenizer_that_drops_the_first_space_loses_none(policy: QwenVL, monkeypatch: pytest.MonkeyPatch) -> None:
    words = {"▁left": 0, "▁or": 1, "▁right": 2, "ish": 3}
    inner = Tokenizer(models.WordLevel(words, unk_token="ish"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()  # type: ignore[assignment]
    monkeypatch.setattr(policy, "_tokenizer", PreTrainedTokenizerFast(tokenizer_object=inner))
    assert policy.token_texts([0, 1, 2, 3, 2]) == ["left", " or", " right", "ish", " right"]
