"""A token VLA against transformers alone: prompts and pixels of the models' own processors, log-probabilities and greedy decoding
of a plain model without padding, images of every size, and models that have no family of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaProcessor,
    PaliGemmaProcessor,
    Qwen2_5_VLProcessor,
)

from assets import make_tiny_paligemma
from assets.make_tiny_token_vla import build_tokenizer
from mmrl.types import Observation
from policies.pi0 import Pi0
from policies.shared.checkpoints import STATISTICS_FILE
from policies.token_vla import TokenVLA
from policies.token_vla_parts import eyes
from policies.token_vla_parts.eyes import PADDING
from policies.token_vla_parts.options import CriticConfig
from tests.policies import tiny, tiny_vla

KINDS = tuple(tiny_vla.WRITERS)
TOKENS = tiny_vla.EXECUTE * tiny_vla.ACTION
close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_vla.write(tmp_path_factory.mktemp(request.param), request.param)


def processor_of(folder: str) -> Callable[[list[Tensor], str], dict[str, Tensor]]:
    """The model's own processor: images and a sentence to the arguments of its ``forward``, one row."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
    if tokenizer.chat_template is None:
        paligemma = PaliGemmaProcessor(images, tokenizer)
        return lambda pictures, text: paligemma(
            images=[[picture.numpy() for picture in pictures]], text=["<image>" * len(pictures) + text], return_tensors="pt"
        )
    qwen: Any = object.__new__(Qwen2_5_VLProcessor)  # its constructor wants torchvision, for videos
    qwen.image_processor, qwen.tokenizer, qwen.chat_template = images, tokenizer, tokenizer.chat_template
    qwen.video_processor, qwen.image_token, qwen.video_token = None, "<|image_pad|>", "<|video_pad|>"
    qwen.image_token_id, qwen.video_token_id = tokenizer.convert_tokens_to_ids([qwen.image_token, qwen.video_token])

    def process(pictures: list[Tensor], text: str) -> dict[str, Tensor]:
        request = qwen.apply_chat_template(eyes.conversation(len(pictures), text), add_generation_prompt=True)
        return qwen(images=[picture.numpy() for picture in pictures], text=[request], return_tensors="pt")

    return process


def pictures_of(seen: Observation, row: int) -> list[Tensor]:
    return [seen.images[camera][row] for camera in tiny_vla.CAMERAS]


def upstream_inputs(policy: TokenVLA, folder: str, seen: Observation, row: int) -> dict[str, Tensor]:
    """What the plain model takes for one row: as its processor gives it, in the policy's precision."""
    made = processor_of(folder)(pictures_of(seen, row), seen.instructions[row])
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "token_type_ids", "mm_token_type_ids")
    return {name: made[name].to(policy.model.dtype) if name == "pixel_values" else made[name] for name in names if name in made}


def extended(inputs: dict[str, Tensor], ids_1K: Tensor) -> dict[str, Tensor]:
    """The same with tokens behind the prompt: text, and of PaliGemma's second kind."""
    behind = {"input_ids": ids_1K, "attention_mask": torch.ones_like(ids_1K), "token_type_ids": torch.ones_like(ids_1K)}
    behind["mm_token_type_ids"] = torch.zeros_like(ids_1K)
    return {name: torch.cat([x, behind[name].to(x)], 1) if name in behind else x for name, x in inputs.items()}


def ids_of(policy: TokenVLA) -> list[int]:
    """Token ids by bin: the tiny tokenizers call their last entries by the bins they stand for."""
    return policy._tokenizer.convert_tokens_to_ids([f"<bin_{b}>" for b in range(tiny_vla.BINS)])  # type: ignore[return-value]


def allowed_bins(k: int) -> list[int]:
    """What the k-th number of a chunk may be."""
    choices = tiny_vla.STATISTICS.actions_choices[k % tiny_vla.ACTION]
    return {0: [*range(tiny_vla.BINS)], 1: [tiny_vla.BINS // 2], 2: [0, tiny_vla.BINS - 1]}[len(choices)]


# -- what the model is shown -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 40, 75, 20])
def test_prompts_and_pixels_are_the_processor_s(folder: str, size: int) -> None:
    policy = tiny_vla.build(folder, max_text_tokens=32)
    seen = tiny_vla.observation(3, size)
    trace = policy._inputs(seen)
    shown = policy._backbone.eyes.see(trace)
    process = processor_of(folder)
    rows = [process(pictures_of(seen, b), seen.instructions[b]) for b in range(3)]
    for b, row in enumerate(rows):
        prompt = trace["prompt"][b]
        assert prompt[prompt != PADDING].tolist() == row["input_ids"][0].tolist()
        assert (prompt[row["input_ids"].shape[1] :] == PADDING).all()
    pixels = torch.cat([row["pixel_values"] for row in rows])
    level = float(1 / 255 / min(policy._backbone.eyes.processor.image_std))
    # Where images are resized, PIL computes in fixed point and may round a pixel to the next level.
    torch.testing.assert_close(shown["pixel_values"], pixels, rtol=0, atol=1e-6 if size == 32 else 1.01 * level)
    assert float((shown["pixel_values"] - pixels).abs().mean()) < 0.02 * level
    if "image_grid_thw" in shown:
        assert torch.equal(shown["image_grid_thw"], torch.cat([row["image_grid_thw"] for row in rows]))


def test_the_instruction_is_put_into_the_prompt(folder: str) -> None:
    policy = tiny_vla.build(folder, prompt="push {instruction} cube")
    prompt = policy._inputs(tiny_vla.observation(1))["prompt"][0]
    words = policy._tokenizer.convert_ids_to_tokens(prompt[prompt >= 0].tolist())
    text = [word for word in words if word.isalpha() and word not in ("user", "assistant")]
    assert text == ["push", *tiny_vla.SENTENCES[0].split(), "cube"]


def test_the_state_ends_the_prompt_as_the_tokens_of_its_bins(folder: str) -> None:
    seen = tiny_vla.observation(4)
    without = tiny_vla.build(folder)._inputs(seen)["prompt"]
    policy = tiny_vla.build(folder, state="bins")
    prompt = policy._inputs(seen)["prompt"]
    assert torch.equal(prompt[:, : -tiny_vla.STATE], without)
    assert seen.state is not None
    low, high = tiny_vla.STATISTICS.state_q01, tiny_vla.STATISTICS.state_q99
    assert low is not None and high is not None
    for b, row in enumerate(seen.state.tolist()):
        for s, x in enumerate(row):
            scaled = max(-1.0, min(1.0, 2 * (x - low[s]) / (high[s] - low[s]) - 1)) if high[s] > low[s] else 0.0
            edges = [-1 + 2 * i / (tiny_vla.BINS - 1) for i in range(tiny_vla.BINS)]
            bin_of = sum(edge <= scaled for edge in edges) - 1 if high[s] > low[s] else tiny_vla.BINS // 2
            assert int(prompt[b, s - tiny_vla.STATE]) == ids_of(policy)[bin_of]


# -- what the model says -----------------------------------------------------------------------------------------------


def restricted(policy: TokenVLA, logits_KV: Tensor) -> Tensor:
    """Log-probabilities of the bins that each dimension may use, in their order: [K, bins]."""
    rows = []
    for k, logits_V in enumerate(logits_KV):
        ruled_out = torch.tensor([b not in allowed_bins(k) for b in range(tiny_vla.BINS)])
        rows.append(logits_V[ids_of(policy)].masked_fill(ruled_out, -torch.inf).log_softmax(0))
    return torch.stack(rows)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_log_probs_entropy_and_values_are_the_plain_model_s(folder: str, attention: str) -> None:
    """Cached generation, one pass over the cache, and one pass of the model over prompt and tokens without padding agree."""
    policy = tiny_vla.build(folder, dtype="float64", attention=attention)
    seen = tiny_vla.observation(5)
    inputs = policy._inputs(seen)
    assert (inputs["prompt"] == PADDING).any(), "no padding, so the test would not see it attended to"
    bins_BK, generated_BK = policy._generate(policy._backbone.encode(inputs), TOKENS, tiny.draws(3))
    scored = policy.evaluate({**inputs, "bins": bins_BK})
    assert scored.values_NV is not None and policy.critic is not None
    for b in range(5):
        alone = upstream_inputs(policy, folder, seen, b)
        output = policy.model(**extended(alone, torch.tensor(ids_of(policy))[bins_BK[b : b + 1]]), output_hidden_states=True)
        log_probs_KV = restricted(policy, output.logits[0, -TOKENS - 1 : -1])
        torch.testing.assert_close(log_probs_KV.exp().sum(1), torch.ones(TOKENS, dtype=torch.float64))
        expected_K = log_probs_KV.gather(1, bins_BK[b, :, None]).squeeze(1)
        close(generated_BK[b], expected_K)
        close(scored.log_probs_NK[b], expected_K)
        entropy_K = torch.stack([-(row.exp() * row)[row > -torch.inf].sum() for row in log_probs_KV])
        close(scored.entropy_NK[b], entropy_K)
        close(scored.values_NV[b, 0], policy.critic(output.hidden_states[-1][:, -TOKENS - 1])[0])


@torch.no_grad()
def test_the_critic_may_read_the_first_action_token(folder: str) -> None:
    policy = tiny_vla.build(folder, dtype="float64", critic=CriticConfig(input="first_action"))
    seen = tiny_vla.observation(2)
    decision = policy.act(seen, tiny.draws(1, 2), explore=True)
    assert decision.values_BV is not None and policy.critic is not None
    for b in range(2):
        ids = torch.tensor(ids_of(policy))[decision.trace["bins"][b : b + 1]]
        output = policy.model(**extended(upstream_inputs(policy, folder, seen, b), ids), output_hidden_states=True)
        close(decision.values_BV[b, 0], policy.critic(output.hidden_states[-1][:, -TOKENS])[0])


@torch.no_grad()
def test_acting_without_exploration_is_upstream_s_greedy_generation(folder: str) -> None:
    policy = tiny_vla.build(folder, dtype="float64")
    seen = tiny_vla.observation(5)
    greedy = policy.act(seen, tiny.draws(1), explore=False)
    assert policy.action_bins is not None
    for b in range(5):
        alone = upstream_inputs(policy, folder, seen, b)
        length = alone["input_ids"].shape[1]

        def allowed(_: int, ids: Tensor, length: int = length) -> list[int]:
            return [ids_of(policy)[b] for b in allowed_bins(len(ids) - length)]

        ids = policy.model.generate(
            **alone, do_sample=False, max_new_tokens=TOKENS, prefix_allowed_tokens_fn=allowed, eos_token_id=None
        )
        bins = torch.tensor([ids_of(policy).index(token) for token in ids[0, length:].tolist()])
        expected = policy.action_bins.decode(bins.reshape(tiny_vla.EXECUTE, tiny_vla.ACTION))
        assert torch.equal(greedy.action[b], expected)


@torch.no_grad()
def test_tokens_are_drawn_as_often_as_they_are_likely(folder: str) -> None:
    """The first token of one prompt, drawn 4,000 times: within five standard errors of what the plain model says."""
    policy = tiny_vla.build(folder, dtype="float64")
    seen = tiny_vla.observation(1)
    count = 4000
    prompt = policy._backbone.encode(policy._inputs(seen))
    prompt.last = prompt.last.expand(count, -1)
    bins, _ = policy._generate(prompt, 1, tiny.draws(5, count))
    output = policy.model(**upstream_inputs(policy, folder, seen, 0))
    chances = restricted(policy, output.logits[0, -1:])[0].exp()
    seen_often = torch.bincount(bins[:, 0], minlength=tiny_vla.BINS) / count
    assert ((seen_often - chances).abs() <= 5 * (chances * (1 - chances) / count).sqrt() + 1e-9).all()


@torch.no_grad()
def test_a_row_does_not_depend_on_padding_or_the_rows_beside_it(folder: str) -> None:
    seen = tiny_vla.observation(5)
    narrow = tiny_vla.build(folder, dtype="float64")
    wide = tiny_vla.build(folder, dtype="float64", max_text_tokens=40)
    together = narrow.act(seen, tiny.draws(2), explore=True)
    padded = wide.act(seen, tiny.draws(2), explore=True)
    assert torch.equal(padded.action, together.action)
    close(padded.log_probs_BK, together.log_probs_BK)
    for b in range(5):
        row = torch.tensor([b])
        alone = narrow.act(seen.select(row), tiny.draws(2).select(row), explore=True)
        assert torch.equal(alone.action[0], together.action[b])
        close(alone.log_probs_BK[0], together.log_probs_BK[b])


def test_images_are_encoded_once_for_a_decision(folder: str) -> None:
    policy = tiny_vla.build(folder)
    passes: list[int] = []
    policy.model.base_model.register_forward_hook(
        lambda module, args, kwargs, output: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    decision = policy.act(tiny_vla.observation(5), tiny.draws(1), explore=True)
    length = decision.trace["prompt"].shape[1]
    assert passes == [length, *[1] * (TOKENS - 1), TOKENS - 1]
    passes.clear()
    policy.evaluate(decision.trace)
    assert passes == [length, TOKENS - 1]


# -- any other model ---------------------------------------------------------------------------------------------------


def write_llava(folder: Path) -> str:
    """A tiny LLaVA: CLIP and Llama, which no family is written for."""
    special = ("<pad>", "<bos>", "<unk>", "<image>")
    tokenizer = build_tokenizer(special, words=tiny_vla.WORDS, bins=tiny_vla.BINS, pad="<pad>", bos="<bos>")
    common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**common, "model_type": "llama", "vocab_size": len(tokenizer), "pad_token_id": 0}
    vision = {**common, "model_type": "clip_vision_model", "image_size": 32, "patch_size": 16, "projection_dim": 32}
    LlavaConfig(text_config=text, vision_config=vision, image_token_index=3, image_seq_length=4).save_pretrained(folder)  # type: ignore[arg-type]
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    options: dict[str, Any] = {"patch_size": 16, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(images, tokenizer, **options).save_pretrained(folder)
    (folder / STATISTICS_FILE).write_text(tiny_vla.STATISTICS.text())
    return str(folder)


@torch.no_grad()
def test_a_model_without_a_family_is_shown_what_its_own_processor_makes(tmp_path: Path) -> None:
    llava = write_llava(tmp_path / "llava")
    policy = tiny_vla.build(llava, dtype="float64")
    seen = tiny_vla.observation(3, 40)
    decision = policy.act(seen, tiny.draws(1, 3), explore=True)
    assert torch.equal(policy.evaluate(decision.trace).log_probs_NK, decision.log_probs_BK)
    processor = LlavaProcessor.from_pretrained(llava)
    for b in range(3):
        pictures = [picture.numpy() for picture in pictures_of(seen, b)]
        made = processor(images=pictures, text="<image><image>" + seen.instructions[b], return_tensors="pt")
        alone = {"input_ids": made["input_ids"], "pixel_values": made["pixel_values"].double()}
        alone["input_ids"] = torch.cat([alone["input_ids"], torch.tensor(ids_of(policy))[decision.trace["bins"][b : b + 1]]], 1)
        log_probs_KV = restricted(policy, policy.model(**alone).logits[0, -TOKENS - 1 : -1])
        close(decision.log_probs_BK[b], log_probs_KV.gather(1, decision.trace["bins"][b, :, None]).squeeze(1))
    policy.save(tmp_path / "saved")
    config = tiny_vla.config(str(tmp_path / "saved"), weights="pretrained", dtype="float64")
    again = TokenVLA(config, device=tiny.CPU).act(seen, tiny.draws(1, 3), explore=True)
    assert torch.equal(again.action, decision.action)
    close(again.log_probs_BK, decision.log_probs_BK)


def test_the_paligemma_that_ships_sees_and_reads_as_tiny_pi0_does(tmp_path: Path) -> None:
    """The same values in every layer for the same prompt, which is written in another tokenizer's ids."""
    made = load_file(make_tiny_paligemma.write(tmp_path) / "model.safetensors")
    close(made, load_file(make_tiny_paligemma.ASSETS / "tiny_paligemma" / "model.safetensors"))
    generator = torch.Generator().manual_seed(0)
    pixels_BHWC = torch.randint(0, 256, (2, 64, 64, 3), generator=generator, dtype=torch.uint8)
    seen = Observation({"front": pixels_BHWC}, torch.zeros(2, 4), ("reach the red cube", "move the gripper to the cyan disc"))
    shared: dict[str, Any] = {"max_text_tokens": 12, "attention": "eager"}
    taught = Pi0(Pi0.Config(checkpoint=str(make_tiny_paligemma.TAUGHT), sampler="ode", **shared), device=tiny.CPU)
    options = TokenVLA.Config(checkpoint=str(tmp_path), prompt="{instruction}", action_dim=4, **shared)
    policy = TokenVLA(options, device=tiny.CPU)
    theirs, ours = taught._encode(taught._inputs(seen)), policy._backbone.encode(policy._inputs(seen))
    present_BS = ours.mask.bool()
    assert torch.equal(present_BS, theirs.mask.bool())
    for layer, values_BKSD in enumerate(theirs.values.unbind(1)):
        mine_BKSD = ours.cache.layers[layer].values
        torch.testing.assert_close(
            mine_BKSD.transpose(1, 2)[present_BS], values_BKSD.transpose(1, 2)[present_BS], rtol=1e-4, atol=1e-4
        )
