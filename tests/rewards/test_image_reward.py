"""ImageReward read from a file of the published form, against the same network written down plainly."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BlipConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmrl.errors import ConfigError
from mmrl.rewards.image_reward import ImageReward
from tests.rewards.tiny_encoders import WORDS, drawn, noise, tokenizer

SEEN, READ, HEADS = 12, 16, 2  # widths of the picture's and the text's encoder
PROMPTS = ["a cat", "a red dog of a photo", "b", "a cat"]
DRAWN = [drawn(noise(seed, (30 + 6 * seed, 40)), prompt) for seed, prompt in enumerate(PROMPTS)]


def shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Of the published file's weights, at a tiny size: pictures of 32 pixels in patches of 8, one layer each."""
    see, read = "blip.visual_encoder", "blip.text_encoder"
    sizes: dict[str, tuple[int, ...]] = {
        f"{see}.cls_token": (1, 1, SEEN),
        f"{see}.pos_embed": (1, 17, SEEN),
        f"{see}.patch_embed.proj.weight": (SEEN, 3, 8, 8),
        f"{see}.patch_embed.proj.bias": (SEEN,),
        f"{read}.embeddings.word_embeddings.weight": (vocabulary, READ),
        f"{read}.embeddings.position_embeddings.weight": (40, READ),
    }

    def linear(name: str, out: int, into: int) -> None:
        sizes[f"{name}.weight"], sizes[f"{name}.bias"] = (out, into), (out,)

    block, layer = f"{see}.blocks.0", f"{read}.encoder.layer.0"
    for norm in (f"{see}.norm", f"{block}.norm1", f"{block}.norm2"):
        sizes[f"{norm}.weight"] = sizes[f"{norm}.bias"] = (SEEN,)
    linear(f"{block}.attn.qkv", 3 * SEEN, SEEN)
    linear(f"{block}.attn.proj", SEEN, SEEN)
    linear(f"{block}.mlp.fc1", 20, SEEN)
    linear(f"{block}.mlp.fc2", SEEN, 20)
    for kind, into in (("attention", READ), ("crossattention", SEEN)):
        linear(f"{layer}.{kind}.self.query", READ, READ)
        linear(f"{layer}.{kind}.self.key", READ, into)
        linear(f"{layer}.{kind}.self.value", READ, into)
        linear(f"{layer}.{kind}.output.dense", READ, READ)
    linear(f"{layer}.intermediate.dense", 24, READ)
    linear(f"{layer}.output.dense", READ, 24)
    for norm in (
        "embeddings",
        "encoder.layer.0.attention.output",
        "encoder.layer.0.crossattention.output",
        "encoder.layer.0.output",
    ):
        sizes[f"{read}.{norm}.LayerNorm.weight"] = sizes[f"{read}.{norm}.LayerNorm.bias"] = (READ,)
    for place, (into, out) in {0: (READ, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}.items():
        linear(f"mlp.layers.{place}", out, into)
    return sizes


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, dict[str, Tensor]]:
    """(BLIP's folder, the file, its weights)."""
    folder = tmp_path_factory.mktemp("image_reward")
    words = tokenizer(WORDS)
    layers = {"num_hidden_layers": 1, "num_attention_heads": HEADS}
    BlipConfig(
        text_config={
            **layers, "hidden_size": READ, "intermediate_size": 24, "vocab_size": len(words), "max_position_embeddings": 40,
            "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": words.pad_token_id, "sep_token_id": 1,
        },
        vision_config={**layers, "hidden_size": SEEN, "intermediate_size": 20, "image_size": 64, "patch_size": 8},
    ).save_pretrained(folder)  # fmt: skip
    words.save_pretrained(folder)
    torch.manual_seed(1)
    weights = {name: torch.randn(shape) / math.sqrt(shape[-1]) for name, shape in shapes(len(words)).items()}
    torch.save({**weights, "blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}, folder / "ImageReward.pt")
    return str(folder), str(folder / "ImageReward.pt"), weights


class Plain:
    """The network, one picture and prompt at a time."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.w = weights

    def linear(self, x: Tensor, name: str) -> Tensor:
        return nn.functional.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[T, D] each, by head."""
        size = q.shape[1] // HEADS
        out = []
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            out.append((q[:, part] @ k[:, part].T / math.sqrt(size)).softmax(-1) @ v[:, part])
        return torch.cat(out, 1)

    def see(self, pixels: Tensor) -> Tensor:
        name = "blip.visual_encoder"
        w, b = self.w[f"{name}.patch_embed.proj.weight"], self.w[f"{name}.patch_embed.proj.bias"]
        patches = nn.functional.conv2d(pixels, w, b, stride=8)[0].flatten(1).T
        x = torch.cat([self.w[f"{name}.cls_token"][0], patches]) + self.w[f"{name}.pos_embed"][0]
        q, k, v = self.linear(self.norm(x, f"{name}.blocks.0.norm1", 1e-6), f"{name}.blocks.0.attn.qkv").chunk(3, 1)
        x = x + self.linear(self.attend(q, k, v), f"{name}.blocks.0.attn.proj")
        y = self.linear(self.norm(x, f"{name}.blocks.0.norm2", 1e-6), f"{name}.blocks.0.mlp.fc1")
        return self.norm(x + self.linear(nn.functional.gelu(y), f"{name}.blocks.0.mlp.fc2"), f"{name}.norm", 1e-6)

    def read(self, ids: Tensor, seen: Tensor) -> Tensor:
        name, layer = "blip.text_encoder", "blip.text_encoder.encoder.layer.0"
        words = self.w[f"{name}.embeddings.word_embeddings.weight"][ids]
        x = self.norm(
            words + self.w[f"{name}.embeddings.position_embeddings.weight"][: len(ids)], f"{name}.embeddings.LayerNorm", 1e-12
        )
        for kind, other in (("attention", None), ("crossattention", seen)):
            of = x if other is None else other
            q, (k, v) = (
                self.linear(x, f"{layer}.{kind}.self.query"),
                (self.linear(of, f"{layer}.{kind}.self.{each}") for each in ("key", "value")),
            )
            y = self.linear(self.attend(q, k, v), f"{layer}.{kind}.output.dense")
            x = self.norm(x + y, f"{layer}.{kind}.output.LayerNorm", 1e-12)
        y = nn.functional.gelu(self.linear(x, f"{layer}.intermediate.dense"))
        return self.norm(x + self.linear(y, f"{layer}.output.dense"), f"{layer}.output.LayerNorm", 1e-12)

    def score(self, pixels: Tensor, ids: Tensor) -> float:
        x = self.read(ids, self.see(pixels))[0]
        for place in (0, 2, 4, 6, 7):
            x = self.linear(x, f"mlp.layers.{place}")
        return (float(x) - 0.16717362830052426) / 1.0333394966054072


@torch.no_grad()
def test_scores_are_those_of_the_network_written_down_plainly(stored: tuple[str, str, dict[str, Tensor]]) -> None:
    folder, file, weights = stored
    words, plain = tokenizer(WORDS), Plain(weights)
    sizes: Any = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    wanted = [
        plain.score(
            sizes(each.turns[0].message.pictures[0].image, return_tensors="pt")["pixel_values"],
            words(prompt, return_tensors="pt")["input_ids"][0],
        )
        for each, prompt in zip(DRAWN, PROMPTS, strict=True)
    ]
    assert max(wanted) - min(wanted) > 0.01
    for batch in (1, 3):
        reward = ImageReward(ImageReward.Config(weights=file, blip=folder, device="cpu", batch=batch))
        assert reward(DRAWN) == pytest.approx(wanted, abs=1e-4)


def test_a_prompt_is_cut_off_at_35_tokens(stored: tuple[str, str, dict[str, Tensor]]) -> None:
    folder, file, _ = stored
    reward = ImageReward(ImageReward.Config(weights=file, blip=folder, device="cpu"))
    long = "a cat " * 16 + "a"
    scores = reward([drawn(noise(0), text) for text in (long, long + " dog", long + " blue dog")])
    assert scores[0] == pytest.approx(scores[1], abs=1e-6) and scores[1] == pytest.approx(scores[2], abs=1e-6)
    assert math.isnan(reward([drawn(None)])[0])


def test_another_file_is_refused(stored: tuple[str, str, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, _, weights = stored
    torch.save({name: value for name, value in weights.items() if "cls_token" not in name}, tmp_path / "less.pt")
    with pytest.raises(ConfigError, match=r"'weights: .*less.pt' lacks 'embeddings.class_embedding'"):
        ImageReward(ImageReward.Config(weights=str(tmp_path / "less.pt"), blip=folder, device="cpu"))
