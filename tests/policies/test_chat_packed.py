"""Conversations end to end in a line: the numbers of each of them alone, and nothing read twice or in vain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import FalconConfig, FalconForCausalLM, modeling_flash_attention_utils

from mmrl.columns import apply, stack
from mmrl.errors import MMRLError
from mmrl.messages import Message
from mmrl.types import Talks
from policies.chat_parts.network import Network
from policies.chat_parts.pieces import Heard, Line, Piece, Said, Stretch, lay_out, line_up
from policies.chat_parts.scoring import filled, score
from policies.language_model import LanguageModel
from tests.policies import chat_play, tiny_chat
from tests.policies.chat_scores import CHUNK, conversations, counted, gradients, loss, one_by_one, same

ALL = (*tiny_chat.FAMILIES, "llama")
PICTURES = (0, 3, 1, 2)  # of the questions
APART, IN_GROUPS = (1, 1, 1, 1), (2, 3, 1, 2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    templates = {"llama": "strings"}
    return {name: tiny_chat.write(tmp_path_factory.mktemp(name), name, templates.get(name, "any_role")) for name in ALL}


@pytest.fixture
def build(folders: dict[str, Path]) -> Callable[..., Any]:
    def make(family: str = "qwen2_5_vl", **fields: Any) -> Any:
        if family != "llama":
            return tiny_chat.build(folders[family], **fields)
        return language_model(folders[family], dtype="float64", **fields)

    return make


def language_model(folder: Path, **fields: Any) -> LanguageModel:
    return LanguageModel(LanguageModel.Config(checkpoint=str(folder), **fields), device=tiny_chat.CPU)


@contextmanager
def lines(network: Network) -> Iterator[list[Line]]:
    """The lines that are read within it."""
    read: list[Line] = []
    inner = network.hidden_of_line

    def reading(line: Line) -> Tensor:
        read.append(line)
        return inner(line)

    network.hidden_of_line = reading  # type: ignore[method-assign]
    try:
        yield read
    finally:
        del network.hidden_of_line


def length(pieces: Sequence[Piece]) -> int:
    return sum(map(len, pieces))


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [APART, IN_GROUPS], ids=["apart", "in_groups"])
@pytest.mark.parametrize("family", ALL)
def test_a_line_has_the_numbers_of_each_conversation_alone(build: Callable[..., Any], family: str, sizes: Sequence[int]) -> None:
    """Log-probs, entropies, hidden states where turns begin, gradients; what a group begins with is in the line once."""
    policy = build(family)
    rows = conversations(policy, sizes, pictures=PICTURES)
    with lines(policy.network) as read, counted(policy.network) as padded:
        ours = score(policy.network, rows, policy.engine.sampling, CHUNK, 10_000)
    assert padded == [] and [line.branches for line in read] == [sizes is IN_GROUPS]
    once = {row[0] for row in rows}
    assert len(read[0].ids_T) == length(list(once)) + sum(length(row[1:]) for row in rows)
    same(ours, one_by_one(policy, rows), policy)


@pytest.mark.parametrize("room", [1, 150])
def test_several_lines_have_them_too(build: Callable[..., Any], room: int) -> None:
    policy = build()
    rows = conversations(policy, IN_GROUPS, pictures=PICTURES)
    with lines(policy.network) as read:
        ours = score(policy.network, rows, policy.engine.sampling, CHUNK, room)
    found = sorted(len(line.ids_T) for line in read)
    assert found == sorted(map(length, rows)) if room == 1 else 1 < len(found) < len(rows) and max(found) <= room
    same(ours, one_by_one(policy, rows), policy)


def test_positions_are_those_that_tokens_have_alone(build: Callable[..., Any]) -> None:
    """In what goes on behind a question as well; places begin again with each stretch."""
    policy = build()
    network, rows = policy.network, conversations(policy, (1, 2), pictures=(2, 1))
    line = line_up([Stretch(rows[0]), Stretch(rows[1][:1]), Stretch(rows[1][1:], 1), Stretch(rows[2][1:], 1)], 3, tiny_chat.CPU)
    alone = [lay_out([row], [0], network.axes, network.pad, network.device) for row in rows]
    head = len(rows[1][0])
    positions = [alone[0].positions_ANL, alone[1].positions_ANL, alone[2].positions_ANL[:, :, head:]]
    assert torch.equal(line.positions_AT, torch.cat(positions, 2)[:, 0])
    assert torch.equal(line.ids_T, torch.cat([alone[0].ids_NL, alone[1].ids_NL, alone[2].ids_NL[:, head:]], 1)[0])
    lengths = [length(rows[0]), head, length(rows[1]) - head, length(rows[2]) - head]
    assert line.places_T.tolist() == [place for count in lengths for place in range(count)]
    assert [seen.key for seen in line.pictures] == [seen.key for laid in alone[:2] for seen in laid.pictures] + [
        seen.key for piece in rows[2][1:] if isinstance(piece, Heard) for seen in piece.pictures
    ]


def test_attention_that_is_written_out_takes_lines_too(build: Callable[..., Any]) -> None:
    """transformers' eager attention rounds its softmax to float32."""
    policy = build(attention="eager")
    rows = conversations(policy, IN_GROUPS, pictures=PICTURES)
    ours, theirs = score(policy.network, rows, policy.engine.sampling, CHUNK, 10_000), one_by_one(policy, rows)
    torch.testing.assert_close(ours.log_probs_M, theirs.log_probs_M, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.entropy_M, theirs.entropy_M, rtol=0, atol=1e-4)


def test_a_question_is_read_once_where_activations_are_computed_again(build: Callable[..., Any]) -> None:
    """There is no cache to be dropped."""
    plain, saving = build(), build(checkpointing=True)
    rows = [conversations(policy, (3, 1)) for policy in (plain, saving)]
    with saving.compute_mode(train=True), lines(saving.network) as read:
        ours = score(saving.network, rows[1], saving.engine.sampling, CHUNK, 10_000)
        found = gradients(saving, loss(ours))
    assert read[0].branches
    wanted = gradients(plain, loss(one_by_one(plain, rows[0])))
    for name, gradient in wanted.items():
        assert float((found[name] - gradient).abs().max()) < 3e-6 * (1 + float(gradient.abs().max())), name


# -- flash attention, of which there is only a slow twin here ------------------------------------------------------------


class Flash:
    """What the package flash-attn would compute, in a loop; ``begins``: where sequences began, of each causal call."""

    def __init__(self) -> None:
        self.begins: list[list[int]] = []

    def whole(self, q_NLHD: Tensor, k_NLHD: Tensor, v_NLHD: Tensor, *, causal: bool, softmax_scale: float) -> Tensor:
        return torch.stack([_attend(*row, causal, softmax_scale) for row in zip(q_NLHD, k_NLHD, v_NLHD, strict=True)])

    def packed(
        self, q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool, softmax_scale: float
    ) -> Tensor:
        """[T, H, D] each."""
        if causal:
            self.begins.append(cu_seqlens_q.tolist())
        of_q, of_k = (borders.tolist() for borders in (cu_seqlens_q, cu_seqlens_k))
        spans = zip(of_q, of_q[1:], of_k, of_k[1:], strict=False)
        return torch.cat([_attend(q[a:b], k[c:d], v[c:d], causal, softmax_scale) for a, b, c, d in spans])

    def functions(self, *_: Any, **__: Any) -> Any:
        """As lazy_import_flash_attention gives them."""

        def options(*, is_causal: bool, softmax_scale: float, **_: Any) -> dict[str, Any]:
            return {"causal": is_causal, "softmax_scale": softmax_scale}

        attend = self.whole, self.packed, None
        return (*attend, modeling_flash_attention_utils._pad_input, modeling_flash_attention_utils._unpad_input), (
            options,
            options,
        )


def _attend(q_LHD: Tensor, k_SHD: Tensor, v_SHD: Tensor, causal: bool, scale: float) -> Tensor:
    """The last query sees all keys, as in flash-attn 2.1 and later."""
    k_SHD, v_SHD = (x.repeat_interleave(q_LHD.shape[1] // x.shape[1], 1) for x in (k_SHD, v_SHD))
    scores_HLS = torch.einsum("lhd,shd->hls", q_LHD, k_SHD) * scale
    if causal:
        behind = torch.ones(scores_HLS.shape[1:], dtype=torch.bool).tril(len(k_SHD) - len(q_LHD))
        scores_HLS = scores_HLS.masked_fill(~behind, -torch.inf)
    return torch.einsum("hls,shd->lhd", scores_HLS.softmax(-1), v_SHD)


@pytest.mark.parametrize("family", ALL)
def test_flash_attention_is_told_where_conversations_begin(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    policy, flash = build(family), Flash()
    apart, group = (conversations(policy, sizes, pictures=PICTURES) for sizes in (APART, (5,)))
    theirs = [one_by_one(policy, rows) for rows in (apart, group)]
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", flash.functions)
    policy.model.config._attn_implementation = "flash_attention_2"
    network = policy._network()
    assert not network.branches
    flash.begins.clear()
    with lines(network) as read:
        ours = score(network, apart, policy.engine.sampling, CHUNK, 10_000)
    order = sorted(range(len(apart)), key=lambda n: -length(apart[n]))
    borders = torch.tensor([0, *(length(apart[n]) for n in order)]).cumsum(0).tolist()
    assert flash.begins == [borders] * policy.model.config.get_text_config().num_hidden_layers and len(read) == 1
    same(ours, theirs[0], policy)
    with lines(network) as read, counted(network) as padded:  # where all share a question, side by side
        ours = score(network, group, policy.engine.sampling, CHUNK, 10_000)
    assert read == [] and sum(padded) < 0.7 * sum(map(length, group))
    same(ours, theirs[1], policy)


# -- which stand in a line ---------------------------------------------------------------------------------------------


def words(count: int) -> Heard:
    return Heard(torch.zeros(count, dtype=torch.long), torch.arange(count)[None], count)


def test_lines_are_filled_where_least_is_left() -> None:
    rows = [(words(count),) for count in (3, 9, 2, 5, 12, 1)]
    assert filled(rows, 10, share=False) == [[4], [1, 5], [3, 0, 2]]
    assert filled(rows, 1000, share=False) == [[4, 1, 3, 0, 2, 5]]


def test_what_is_shared_is_counted_once_in_a_line() -> None:
    first, second = words(6), words(4)
    said = [Said(torch.zeros(count, dtype=torch.long)) for count in range(5)]
    rows = [(second, said[1]), (first, said[2]), (second, said[3]), (first, said[4]), (first, said[2]), (words(1), said[1])]
    assert filled(rows, 14, share=True) == [[3, 1, 4], [2, 0, 5]]
    assert filled(rows, 14, share=False) == [[3, 5], [1, 0], [4], [2]]


# -- the option --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_vl", "llama"])
def test_a_policy_that_packs_learns_the_same(build: Callable[..., Any], family: str) -> None:
    """From rollouts, with a critic that reaches the model, and from conversations to imitate."""
    plain, packing = (build(family, critic={"hidden": (8,), "detach": False}, pack_tokens=pack) for pack in (None, 10_000))
    for policy in (plain, packing):
        torch.manual_seed(0)
        torch.nn.init.normal_(policy.critic.net[-1].weight)
    sees = plain.ears.image_id is not None
    talks = [tiny_chat.opening(seed, seed % 3 if sees else 0) for seed in (0, 1, 1, 2)]
    played = chat_play.play(plain, talks, answers=lambda row, turn: (tiny_chat.answer(row, (row + turn) % 2 if sees else 0),))
    traces = [decision.trace for decision in played.decisions]
    trace: Any = {name: apply(stack([some[name] for some in traces]), lambda x: x.transpose(0, 1)) for name in traces[0]}
    lessons = Talks(tuple((*talk, Message("assistant", ("It is 12. " * (1 + n),))) for n, talk in enumerate(talks)))
    found: list[tuple[Tensor, ...]] = []
    for policy in (plain, packing):
        with lines(policy.network) as read:
            evaluation = policy.evaluate(trace)
            lesson = policy.supervised_loss(lessons, torch.Generator())
        assert [line.branches for line in read] == ([] if policy is plain else [True, True])
        units = evaluation.log_probs_NK.sum() + 0.3 * evaluation.entropy_NK.sum() + evaluation.values_NV.square().sum()
        grads = gradients(policy, units + lesson.value)
        found.append((evaluation.log_probs_NK, evaluation.entropy_NK, evaluation.values_NV, lesson.value, *grads.values()))
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert float((ours - theirs).detach().abs().max()) < 3e-6 * (1 + float(theirs.detach().abs().max()))


def test_a_model_that_cannot_is_refused(tmp_path: Path) -> None:
    """Falcon's distances come from a mask of rows, which a line has not."""
    tokens = tiny_chat.tokenizer("strings")
    config = FalconConfig(
        vocab_size=len(tokens),
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        alibi=True,
        new_decoder_architecture=False,
        multi_query=False,
    )
    FalconForCausalLM(config).save_pretrained(tmp_path)
    tokens.save_pretrained(tmp_path)
    language_model(tmp_path)
    with pytest.raises(MMRLError, match=r"policy\.pack_tokens: .* reads conversations .* otherwise than alone .*; omit it"):
        language_model(tmp_path, pack_tokens=100)
