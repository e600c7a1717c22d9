"""Rewards that run models, with tiny random weights, against transformers asked plainly, one picture at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmrl.errors import ConfigError
from mmrl.rewards.aesthetic import Aesthetic
from mmrl.rewards.clip_score import ClipScore
from mmrl.rewards.encoders import clip
from mmrl.rewards.hps import HPS, from_open_clip
from mmrl.rewards.pick_score import PickScore
from tests.rewards.tiny_encoders import clip_folder, drawn, noise

PROMPTS = ["a cat", "a red dog", "a blue cat of a photo of a dog of a red object of a blue photo", "b", "a cat"]
DRAWN = [drawn(noise(seed, (32 + 8 * seed, 48)), prompt) for seed, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return clip_folder(tmp_path_factory.mktemp("clip"))


@torch.no_grad()
def plainly(folder: str) -> tuple[list[float], float, list[Tensor]]:
    """(cosines, the model's scale, vectors of pictures) of DRAWN, one at a time, through CLIPModel's own forward."""
    model: Any = CLIPModel.from_pretrained(folder).eval()
    words: Any = AutoTokenizer.from_pretrained(folder)
    sizes: Any = CLIPImageProcessorPil.from_pretrained(folder)
    cosines, vectors = [], []
    for each, prompt in zip(DRAWN, PROMPTS, strict=True):
        pixels = sizes(each.turns[0].message.pictures[0].image, return_tensors="pt")["pixel_values"]
        tokens = words(prompt, return_tensors="pt", truncation=True, max_length=12)
        out = model(**tokens, pixel_values=pixels)
        cosines.append(float(out.logits_per_image) / float(model.logit_scale.exp()))
        vectors.append(out.image_embeds[0])
    return cosines, float(model.logit_scale.exp()), vectors


def test_clip_score_is_the_paper_s(folder: str) -> None:
    cosines, _, _ = plainly(folder)
    assert min(cosines) < 0 < max(cosines) and max(cosines) - min(cosines) > 0.1
    for batch in (1, 2, 16):
        scores = ClipScore(ClipScore.Config(checkpoint=folder, device="cpu", batch=batch))(DRAWN)
        assert scores == pytest.approx([2.5 * max(cosine, 0) for cosine in cosines], abs=1e-5)
    free = ClipScore(ClipScore.Config(checkpoint=folder, device="cpu", floor=False, scale=1.0))(DRAWN)
    assert free == pytest.approx(cosines, abs=1e-5)


def test_a_prefix_stands_before_the_prompt(folder: str) -> None:
    with_it = ClipScore(ClipScore.Config(checkpoint=folder, device="cpu", prefix="a red ", floor=False))([drawn(noise(1), "dog")])
    spelt_out = ClipScore(ClipScore.Config(checkpoint=folder, device="cpu", floor=False))([drawn(noise(1), "a red dog")])
    assert with_it == spelt_out


def test_pick_score_is_the_cosine_by_the_model_s_scale(folder: str) -> None:
    cosines, scale, _ = plainly(folder)
    config = PickScore.Config(checkpoint=folder, processor=folder, device="cpu")
    assert PickScore(config)(DRAWN) == pytest.approx([scale * cosine for cosine in cosines], abs=1e-4)
    divided = PickScore(PickScore.Config(checkpoint=folder, processor=folder, device="cpu", divisor=26))(DRAWN)
    assert divided == pytest.approx([scale * cosine / 26 for cosine in cosines], abs=1e-5)


def test_no_picture_is_no_score_and_the_others_keep_theirs(folder: str) -> None:
    score = ClipScore(ClipScore.Config(checkpoint=folder, device="cpu", batch=2, floor=False))
    mixed = [DRAWN[0], drawn(None), DRAWN[1]]
    found = score(mixed)
    assert math.isnan(found[1])
    assert [found[0], found[2]] == pytest.approx(score(DRAWN)[:2], abs=1e-6)
    assert score([]) == []


def test_a_model_is_loaded_once_and_computes_in_its_dtype(folder: str) -> None:
    assert clip(folder, folder, "cpu", "float32") is clip(folder, folder, "cpu", "float32")
    half = clip(folder, folder, "cpu", "bfloat16")
    assert half.model.dtype == torch.bfloat16
    scores = ClipScore(ClipScore.Config(checkpoint=folder, device="cpu", dtype="bfloat16", floor=False))(DRAWN)
    assert scores == pytest.approx(ClipScore(ClipScore.Config(checkpoint=folder, device="cpu", floor=False))(DRAWN), abs=0.08)


def test_aesthetic_score_is_linear_layers_over_the_unit_vector(folder: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    plain = nn.Sequential(
        nn.Linear(12, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64), nn.Dropout(0.1),
        nn.Linear(64, 16), nn.Linear(16, 1),
    ).eval()  # fmt: skip
    torch.save({f"layers.{name}": value for name, value in plain.state_dict().items()}, tmp_path / "head.pth")
    reward = Aesthetic(Aesthetic.Config(checkpoint=folder, weights=str(tmp_path / "head.pth"), device="cpu", batch=2))
    with torch.no_grad():
        wanted = [float(plain(vector[None])) for vector in plainly(folder)[2]]
    assert reward(DRAWN) == pytest.approx(wanted, abs=1e-5)
    assert max(wanted) - min(wanted) > 1e-3


class OpenClip(nn.Module):
    """One tower of open_clip's CLIP, written down plainly: its names of weights, torch's own attention."""

    def __init__(self, width: int, heads: int, layers: int, inner: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList()
        for _ in range(layers):
            mlp = nn.ModuleDict({"c_fc": nn.Linear(width, inner), "c_proj": nn.Linear(inner, width)})
            attn = nn.MultiheadAttention(width, heads, batch_first=True)
            block = {"ln_1": nn.LayerNorm(width), "attn": attn, "ln_2": nn.LayerNorm(width), "mlp": mlp}
            self.resblocks.append(nn.ModuleDict(block))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            parts: Any = block
            y = parts["ln_1"](x)
            x = x + parts["attn"](y, y, y, need_weights=False, attn_mask=mask)[0]
            x = x + parts["mlp"]["c_proj"](nn.functional.gelu(parts["mlp"]["c_fc"](parts["ln_2"](x))))
        return x


@pytest.fixture
def open_clip(tmp_path: Path, folder: str) -> tuple[str, str, dict[str, Tensor], OpenClip, OpenClip]:
    """(folder of sizes and processor, file of weights, the weights, picture tower, text tower)."""
    torch.manual_seed(5)
    model: Any = CLIPModel.from_pretrained(folder)
    model.config.text_config.hidden_act = model.config.vision_config.hidden_act = "gelu"
    model.save_pretrained(tmp_path / "sizes")
    for part in (AutoTokenizer, CLIPImageProcessorPil):
        part.from_pretrained(folder).save_pretrained(tmp_path / "sizes")
    seeing, reading = OpenClip(16, 2, 2, 24), OpenClip(16, 2, 2, 24)
    own = {f"visual.transformer.{name}": value for name, value in seeing.state_dict().items()}
    own |= {f"transformer.{name}": value for name, value in reading.state_dict().items()}
    shapes = {
        "visual.class_embedding": (16,), "visual.conv1.weight": (16, 3, 8, 8), "visual.positional_embedding": (17, 16),
        "visual.proj": (16, 12), "text_projection": (16, 12), "positional_embedding": (12, 16),
        "token_embedding.weight": (model.config.text_config.vocab_size, 16),
    }  # fmt: skip
    for norm in ("visual.ln_pre", "visual.ln_post", "ln_final"):
        shapes |= {f"{norm}.weight": (16,), f"{norm}.bias": (16,)}
    own |= {name: torch.randn(shape) * 0.4 for name, shape in shapes.items()} | {"logit_scale": torch.tensor(4.6)}
    torch.save({"state_dict": own, "epoch": 3}, tmp_path / "hps.pt")
    return str(tmp_path / "sizes"), str(tmp_path / "hps.pt"), own, seeing, reading


@torch.no_grad()
def test_hps_reads_open_clip_s_weights(open_clip: Any) -> None:
    sizes, file, own, seeing, reading = open_clip
    reward = HPS(HPS.Config(checkpoint=sizes, weights=file, device="cpu"))
    words: Any = AutoTokenizer.from_pretrained(sizes)
    pictures: Any = CLIPImageProcessorPil.from_pretrained(sizes)

    def norm(x: Tensor, name: str) -> Tensor:
        return nn.functional.layer_norm(x, (16,), own[f"{name}.weight"], own[f"{name}.bias"])

    wanted = []
    for each, prompt in zip(DRAWN, PROMPTS, strict=True):
        pixels = pictures(each.turns[0].message.pictures[0].image, return_tensors="pt")["pixel_values"]
        patches = nn.functional.conv2d(pixels, own["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
        x = torch.cat([own["visual.class_embedding"].expand(1, 1, 16), patches], 1) + own["visual.positional_embedding"]
        picture = norm(seeing(norm(x, "visual.ln_pre"))[:, 0], "visual.ln_post") @ own["visual.proj"]
        ids = words(prompt, return_tensors="pt", truncation=True, max_length=12)["input_ids"]
        mask = torch.full((ids.shape[1], ids.shape[1]), -math.inf).triu(1)
        y = reading(own["token_embedding.weight"][ids] + own["positional_embedding"][: ids.shape[1]], mask)
        text = norm(y, "ln_final")[:, -1] @ own["text_projection"]
        wanted.append(float(nn.functional.cosine_similarity(picture, text)))
    assert reward(DRAWN) == pytest.approx(wanted, abs=1e-5)
    assert max(wanted) - min(wanted) > 0.05


def test_hps_without_a_file_is_the_checkpoint_s(folder: str) -> None:
    assert HPS(HPS.Config(checkpoint=folder, weights=None, device="cpu"))(DRAWN) == pytest.approx(plainly(folder)[0], abs=1e-5)


def test_what_cannot_be_opened_is_said_in_a_sentence(folder: str, tmp_path: Path, open_clip: Any) -> None:
    with pytest.raises(ConfigError, match=r"'checkpoint: .*nowhere' cannot be opened: it is no folder"):
        ClipScore(ClipScore.Config(checkpoint=str(tmp_path / "nowhere"), device="cpu"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="the folder does not hold it whole"):
        ClipScore(ClipScore.Config(checkpoint=str(tmp_path / "empty"), device="cpu"))
    with pytest.raises(ConfigError, match="'device: gpu' is no torch device"):
        ClipScore(ClipScore.Config(checkpoint=folder, device="gpu"))
    with pytest.raises(ConfigError, match=r"'weights: .*head.pth' is no file"):
        Aesthetic(Aesthetic.Config(checkpoint=folder, weights=str(tmp_path / "head.pth"), device="cpu"))
    with pytest.raises(ConfigError, match=r"no file of a hub \(owner/repository/file\)"):
        Aesthetic(Aesthetic.Config(checkpoint=folder, weights="no one/knows/this.pth", device="cpu"))
    (tmp_path / "damaged.pt").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="holds no weights that torch can read"):
        HPS(HPS.Config(checkpoint=folder, weights=str(tmp_path / "damaged.pt"), device="cpu"))
    torch.save({name: value for name, value in open_clip[2].items() if name != "visual.proj"}, tmp_path / "less.pt")
    with pytest.raises(ConfigError, match=r"lacks 'visual_projection.weight' \(1 such\)"):
        HPS(HPS.Config(checkpoint=open_clip[0], weights=str(tmp_path / "less.pt"), device="cpu"))
    assert len(from_open_clip(open_clip[2])) == len(CLIPModel.from_pretrained(open_clip[0]).state_dict())
