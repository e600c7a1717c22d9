"""GenEval's route through models: what a detector's outputs mean, colours by CLIP, and the verdict on a whole picture."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
    YolosConfig,
    YolosForObjectDetection,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

from mmrl.rewards.geneval import Detector, Found, GenEval, _cut_out
from mmrl.rewards.geneval_rules import COLOURS, Detected
from tests.rewards.tiny_encoders import clip_folder, drawn, noise

LABELS = {0: "dog", 1: "cat", 2: "mouse"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny models: "boxes" (YOLOS), "masks" (Mask2Former) and "clip"."""
    folder = tmp_path_factory.mktemp("geneval")
    torch.manual_seed(0)
    labels: dict[str, Any] = {"id2label": LABELS, "label2id": {name: number for number, name in LABELS.items()}}
    layers = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    boxes = YolosForObjectDetection(YolosConfig(image_size=[32, 40], patch_size=8, num_detection_tokens=6, **layers, **labels))
    for weight in boxes.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.4)
    boxes.save_pretrained(folder / "boxes")
    YolosImageProcessorPil(size={"height": 32, "width": 40}, do_pad=False).save_pretrained(folder / "boxes")
    seeing = SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    masks = Mask2FormerConfig(
        backbone_config=seeing, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=5, **labels,
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(masks).save_pretrained(folder / "masks")
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder / "masks")
    return {"boxes": str(folder / "boxes"), "masks": str(folder / "masks"), "clip": clip_folder(folder / "clip")}


@torch.no_grad()
def test_boxes_are_those_of_transformers_own_route(folders: dict[str, str]) -> None:
    images = [noise(1, (40, 32)), noise(2, (80, 50)), noise(3, (31, 77))]
    found = Detector(folders["boxes"], "cpu", "float32").find(images, 0.3)
    model: Any = YolosForObjectDetection.from_pretrained(folders["boxes"]).eval()
    sizes: Any = YolosImageProcessorPil.from_pretrained(folders["boxes"])
    count = 0
    for image, things in zip(images, found, strict=True):
        out = model(**sizes([image], return_tensors="pt"))
        (wanted,) = sizes.post_process_object_detection(out, threshold=0.3, target_sizes=[(image.height, image.width)])
        assert [each.thing.name for each in things] == [LABELS[label] for label in wanted["labels"].tolist()]
        assert [each.thing.score for each in things] == pytest.approx(wanted["scores"].tolist(), abs=1e-5)
        for each, box in zip(things, wanted["boxes"].tolist(), strict=True):
            assert each.thing.box == pytest.approx(box, abs=1e-3) and each.mask is None
        count += len(things)
    assert count > 3


def test_masks_give_boxes_and_scores(folders: dict[str, str]) -> None:
    detector = Detector(folders["masks"], "cpu", "float32")
    assert detector.names == {"dog", "cat", "mouse"}
    for things, image in zip(detector.find([noise(1), noise(2)], 0.0), [noise(1), noise(2)], strict=True):
        assert all(each.mask is not None and each.mask.shape == (image.height, image.width) for each in things)
    logits = torch.full((1, 2, 4), -20.0)  # two queries; three classes and none
    logits[0, 0, 1], logits[0, 1, 3], logits[0, 1, 0] = 20.0, 1.0, 0.0
    masks = torch.full((1, 2, 8, 8), -9.0)
    masks[0, 0, 2:4, 1:6] = 1.0
    out = SimpleNamespace(class_queries_logits=logits, masks_queries_logits=masks)
    (things,) = detector._segments(out, [(8, 8)], 0.3)
    (cat,) = things
    assert cat.thing.name == "cat" and cat.thing.box == (1, 2, 6, 4)
    assert cat.thing.score == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-5)
    assert cat.mask is not None and cat.mask.nonzero().tolist() == [[y, x] for y in (2, 3) for x in range(1, 6)]
    (both,) = detector._segments(SimpleNamespace(class_queries_logits=logits, masks_queries_logits=masks + 10), [(8, 8)], 0.1)
    assert [each.thing.name for each in both] == ["cat", "dog"]


def geneval(folders: dict[str, str], **fields: Any) -> GenEval:
    return GenEval(GenEval.Config(**{"detector": folders["boxes"], "clip": folders["clip"], "device": "cpu", **fields}))


def with_things(reward: GenEval, monkeypatch: pytest.MonkeyPatch, *things: list[Found]) -> GenEval:
    monkeypatch.setattr(reward._detector, "find", lambda images, threshold: list(things)[: len(images)])
    return reward


def found(name: str, box: tuple[float, float, float, float], score: float = 0.95, mask: Any = None) -> Found:
    return Found(Detected(name, box, None, score), mask)


@torch.no_grad()
def colour_plainly(folder: str, crop: Image.Image, name: str) -> str:
    """Zero-shot classification with three templates, as clip_benchmark does it."""
    model: Any = CLIPModel.from_pretrained(folder).eval()
    words: Any = AutoTokenizer.from_pretrained(folder)
    sizes: Any = CLIPImageProcessorPil.from_pretrained(folder)
    pixels, similar = sizes(crop, return_tensors="pt")["pixel_values"], []
    for colour in COLOURS:
        total = 0
        for text in (f"a photo of a {colour} {name}", f"a photo of a {colour}-colored {name}", f"a photo of a {colour} object"):
            out = model(**words(text, return_tensors="pt", truncation=True, max_length=12), pixel_values=pixels)
            total = total + out.text_embeds[0] / out.text_embeds[0].norm()
        mean: Any = total / 3
        similar.append(float(out.image_embeds[0] @ (mean / mean.norm())))
    return COLOURS[max(range(len(COLOURS)), key=similar.__getitem__)]


def test_colours_are_those_of_clip(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    image, mask = noise(4, (40, 32)), torch.zeros(32, 40, dtype=torch.bool)
    mask[4:20, 6:18] = True
    mask[9, 9] = False
    boxed, masked = found("dog", (5.4, 3.7, 30.2, 28.6)), found("dog", (6, 4, 18, 20), 0.9, mask)
    painted = Image.new("RGB", image.size, "#999")
    painted.paste(image, mask=Image.fromarray(mask.numpy()))
    wanted = [
        colour_plainly(folders["clip"], image.crop((5, 4, 30, 29)), "dog"),
        colour_plainly(folders["clip"], painted.crop((6, 4, 18, 20)), "dog"),
    ]
    assert _cut_out(image, masked).tobytes() == painted.crop((6, 4, 18, 20)).tobytes()
    reward = geneval(folders)
    asks = {"include": [{"class": "dog", "count": 2, "color": "red"}], "tag": "colors"}
    things = reward._coloured(image, asks, [boxed, masked, found("cat", (0, 0, 9, 9)), found("dog", (0, 0, 9, 9), 0.2)])
    assert [thing.colour for thing in things] == [*wanted, None, None]
    for colour in COLOURS:
        told = drawn(image, include=[{"class": "dog", "count": 1, "color": colour}], tag="colors")
        score = with_things(geneval(folders, score="correct"), monkeypatch, [boxed])([told])
        assert score == [float(colour == wanted[0])]


def test_a_picture_gets_the_verdict_of_the_rules(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    three = {"include": [{"class": "computer mouse", "count": 3}], "exclude": [{"class": "computer mouse", "count": 4}]}
    mice = [found("mouse", (9.0 * place, 0, 9 * place + 5, 5), 0.95) for place in range(4)]
    told = [drawn(noise(seed), tag="counting", **three) for seed in range(3)]
    things = (mice[:3], mice, [*mice[:1], found("mouse", (0, 9, 9, 19), 0.85)])
    for score, wanted in (("graded", [1, 2 / 3, 1 / 3]), ("correct", [1, 0, 0]), ("exact", [1, 0, 0])):
        reward = with_things(geneval(folders, score=score), monkeypatch, *things)
        assert reward(told) == pytest.approx(wanted)
        assert reward.terms == {"correct": pytest.approx(1 / 3), "exact": pytest.approx(1 / 3)}
    two = drawn(noise(0), tag="", include=[{"class": "computer mouse", "count": 2}])
    assert with_things(geneval(folders, score="correct"), monkeypatch, mice)([two]) == [1.0]
    assert with_things(geneval(folders, score="exact"), monkeypatch, mice)([two]) == [0.0]


def test_what_cannot_be_judged_is_no_score(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    reward = with_things(geneval(folders), monkeypatch, [], [], [])
    scores = reward([drawn(noise(0), include=[{"class": "sofa", "count": 1}]), drawn(noise(1)), drawn(None)])
    assert all(map(math.isnan, scores))
    assert reward.failure == "the question's details are not GenEval's: 'include' must be a list of at least one clause"
    reward([drawn(noise(0), include=[{"class": "sofa", "count": 1}])])
    assert "does not know 'sofa'; give 'names' its word for it" in (reward.failure or "")


def test_the_whole_route_runs(folders: dict[str, str], tmp_path: Path) -> None:
    for kind in ("boxes", "masks"):
        reward = geneval(folders, detector=folders[kind], batch=2, threshold=0.0)
        told = [drawn(noise(seed), include=[{"class": "dog", "count": 1, "color": "red"}], tag="colors") for seed in range(3)]
        scores = reward(told)
        assert len(scores) == 3 and all(0 <= score <= 1 for score in scores)
