"""Image search: features against loops, pictures found again after changes, CLIP against the model's own scores, damaged sets."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from mmrl.component import Component, Problems
from mmrl.errors import ConfigError, DataError
from mmrl.messages import Picture, ToolContext, ToolError, ToolResult
from mmrl.registry import install_command

if importlib.util.find_spec("bm25s") is None and os.environ.get("CI") != "true":
    pytest.skip(f"bm25s is not installed; install it with: {install_command('bm25s')}", allow_module_level=True)

from tools.image_search import ClipImageSearch, ImageSearch
from tools.search_parts import features
from tools.search_parts.features import CELL, DIRECTIONS, SIDE, Classical, colours, edges


def drawing(seed: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """Shapes of random colours on a random ground."""
    generator = random.Random(seed)
    image = Image.new("RGB", size, tuple(generator.randrange(256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(5):
        x, y, r = generator.randrange(size[0]), generator.randrange(size[1]), generator.randrange(8, 30)
        shape = generator.choice((draw.ellipse, draw.rectangle))
        shape((x - r, y - r // 2, x + r, y + r // 2), fill=tuple(generator.randrange(256) for _ in range(3)))
    return image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures/more").mkdir(parents=True)
    for seed in range(12):
        drawing(seed).save(tmp_path / "pictures" / ("more" if seed % 2 else ".") / f"thing_{seed}.png")
    (tmp_path / "pictures/readme.txt").write_text("no picture")
    return tmp_path / "pictures"


def see(*images: Image.Image) -> ToolContext:
    return ToolContext(pictures=[Picture(image) for image in images])


def search(images: Path, **fields: Any) -> ImageSearch:
    return ImageSearch(ImageSearch.Config(images=str(images), cache=str(images.parent / "cache"), **fields))


# ------------------------------------------------------------------------------------------------------ features


def test_colours_are_counted() -> None:
    image = drawing(3, (16, 12))
    counts: dict[tuple[int, int, int], int] = {}
    for h, s, v in np.asarray(image.convert("HSV")).reshape(-1, 3).tolist():
        place = (h * 12 // 256, s * 3 // 256, v * 3 // 256)
        counts[place] = counts.get(place, 0) + 1
    expected = np.zeros((12, 3, 3))
    for place, count in counts.items():
        expected[place] = math.sqrt(count / (16 * 12))
    np.testing.assert_allclose(colours(image), expected.ravel(), atol=1e-12)


def naive_edges(image: Image.Image) -> np.ndarray:
    grey, side = image.convert("L"), SIDE // CELL
    cells = [[[0.0] * DIRECTIONS for _ in range(side)] for _ in range(side)]

    def slope(before: int, here: int, after: int, first: bool, last: bool) -> float:
        return after - here if first else here - before if last else (after - before) / 2

    for y in range(SIDE):
        for x in range(SIDE):
            at = lambda dx, dy, x=x, y=y: grey.getpixel((min(max(x + dx, 0), SIDE - 1), min(max(y + dy, 0), SIDE - 1)))  # noqa: E731
            dx = slope(at(-1, 0), at(0, 0), at(1, 0), x == 0, x == SIDE - 1)
            dy = slope(at(0, -1), at(0, 0), at(0, 1), y == 0, y == SIDE - 1)
            place = math.degrees(math.atan2(dy, dx)) % 180 / 20
            lower = int(place)
            cells[y // CELL][x // CELL][lower % DIRECTIONS] += math.hypot(dx, dy) * (1 - (place - lower))
            cells[y // CELL][x // CELL][(lower + 1) % DIRECTIONS] += math.hypot(dx, dy) * (place - lower)
    out: list[float] = []
    for row in range(side - 1):
        for column in range(side - 1):
            block = cells[row][column] + cells[row][column + 1] + cells[row + 1][column] + cells[row + 1][column + 1]
            length = math.sqrt(sum(value**2 for value in block) + 1)
            out += [value / length for value in block]
    return np.array(out) / math.sqrt(sum(value**2 for value in out))


def test_edges_are_histograms_of_gradients() -> None:
    image = drawing(4).resize((SIDE, SIDE))
    np.testing.assert_allclose(edges(image), naive_edges(image), atol=1e-9)
    assert not edges(Image.new("RGB", (SIDE, SIDE), "gray")).any()


def test_shares_of_colour_and_edges() -> None:
    one, two = drawing(1), drawing(2)
    for colour in (0.0, 0.3, 1.0):
        a, b = Classical(colour).pictures([one, two])
        small = [image.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for image in (one, two)]
        expected = colour * colours(small[0]) @ colours(small[1]) + (1 - colour) * edges(small[0]) @ edges(small[1])
        assert float(a @ b) == pytest.approx(float(expected), abs=1e-6)
        assert float(np.linalg.norm(a)) == pytest.approx(1, abs=1e-6)


# -------------------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image,
        lambda image: image.resize((200, 150), Image.Resampling.BICUBIC),
        lambda image: ImageEnhance.Brightness(image).enhance(1.15),
        lambda image: image.crop((3, 3, image.width - 3, image.height - 3)),
    ],
    ids=["same", "larger", "brighter", "cropped"],
)
def test_a_picture_is_found_again(folder: Path, change: Any) -> None:
    tool = search(folder, top_k=3)
    for seed in range(12):
        result = tool(1, see(change(drawing(seed))))
        assert result.details["ids"][0] == f"{'more/' if seed % 2 else ''}thing_{seed}.png"
        assert list(result.details["scores"]) == sorted(result.details["scores"], reverse=True)


def test_the_model_sees_titles_ids_and_thumbnails(folder: Path) -> None:
    result = search(folder, top_k=2, thumbnail=48)(2, see(drawing(0), drawing(5)))
    assert result.text.startswith("[1] thing 5 (id: more/thing_5.png, similarity 1.000)\n[2] thing ")
    assert [picture.image.size for picture in result.pictures] == [(48, 36)] * 2
    assert all(picture.source is None for picture in result.pictures)
    assert search(folder, thumbnail=0)(1, see(drawing(0))).pictures == ()
    with pytest.raises(ToolError, match="There is no image 2; the conversation has images 1 to 1"):
        search(folder)(2, see(drawing(0)))


def test_entries_of_a_file_show_their_best_picture(folder: Path) -> None:
    lines = [
        {"id": "owl", "title": "Owl", "caption": "at night", "image": "pictures/thing_0.png"},
        {"id": "hen", "title": "Hen", "text": "a document", "images": ["pictures/more/thing_1.png", "pictures/thing_2.png"]},
        {"id": "elk", "title": "Elk", "text": "a document without a picture", "images": []},
    ]
    file = folder.parent / "set.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = search(file, top_k=5)(1, see(drawing(2)))
    assert result.details["ids"] == ("hen", "owl")  # each once, and none without a picture
    assert result.text.splitlines()[0] == "[1] Hen (id: hen, similarity 1.000)" and "Owl: at night (id: owl" in result.text
    assert np.array_equal(np.asarray(result.pictures[0].image), np.asarray(drawing(2)))


def test_the_index_is_kept_for_a_content(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = search(folder)(1, see(drawing(3)))
    read: list[int] = []
    own = Classical.pictures
    monkeypatch.setattr(Classical, "pictures", lambda self, images: read.append(len(images)) or own(self, images))
    assert search(folder)(1, see(drawing(3))).text == before.text and read == [1]
    drawing(77).save(folder / "thing_4.png")
    assert search(folder)(1, see(drawing(77))).details["ids"][0] == "thing_4.png"
    search(folder, colour=0.9)(1, see(drawing(3)))
    assert read == [1, 12, 1, 12, 1]


def clip(folder: Path) -> Path:
    """A tiny random CLIP whose tokens are letters."""
    torch.manual_seed(3)
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    names = {name: number for number, name in enumerate(tokens)}
    start, end = names["<|startoftext|>"], names["<|endoftext|>"]
    part = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.3,
    }
    text = {
        **part,
        "vocab_size": len(names),
        "max_position_embeddings": 16,
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    config = CLIPConfig(text_config=text, vision_config={**part, "image_size": 32, "patch_size": 8}, projection_dim=24)
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, CLIPTokenizer(vocab=names, merges=[], model_max_length=16)).save_pretrained(folder)
    return folder


def similarities(path: Path, images: list[Image.Image], text: str | None, image: Image.Image | None) -> list[float]:
    """Cosines as the model's own forward pass has them."""
    model, processor = CLIPModel.from_pretrained(path).eval(), CLIPProcessor.from_pretrained(path)
    with torch.no_grad():
        inputs = processor(text=[text or "x"], images=[*images, *([image] if image else [])], return_tensors="pt")
        out = model(**inputs)
    if image is None:
        return (out.logits_per_image[:, 0] / model.logit_scale.exp()).tolist()
    return (out.image_embeds[:-1] @ out.image_embeds[-1]).tolist()


@pytest.mark.parametrize("by_text", [True, False], ids=["text", "picture"])
def test_clip_orders_as_the_model_itself_does(folder: Path, tmp_path: Path, by_text: bool) -> None:
    path = clip(tmp_path / "clip")
    tool = ClipImageSearch(ClipImageSearch.Config(images=str(folder), clip=str(path), top_k=12, cache=str(tmp_path / "cache")))
    result = tool(see(drawing(40)), query="an owl") if by_text else tool(see(drawing(40)), image=1)
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.png"))
    expected = similarities(
        path, [Image.open(folder / name) for name in names], "an owl" if by_text else None, None if by_text else drawing(40)
    )
    assert dict(zip(result.details["ids"], result.details["scores"], strict=True)) == pytest.approx(
        dict(zip(names, expected, strict=True)), abs=1e-5
    )


@pytest.mark.parametrize("arguments", [{}, {"image": 1, "query": "owl"}, {"query": "  "}])
def test_clip_wants_one_of_both(folder: Path, tmp_path: Path, arguments: dict[str, Any]) -> None:
    tool = ClipImageSearch(
        ClipImageSearch.Config(images=str(folder), clip=str(clip(tmp_path / "clip")), cache=str(tmp_path / "cache"))
    )
    with pytest.raises(ToolError, match="either 'image' or 'query'"):
        tool(see(drawing(0)), **arguments)
    assert isinstance(tool(see(), query="a very long question about an owl at night"), ToolResult)  # longer than the model reads


# -------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "line 2: not JSON"),
        ('{"image": "a.png"}', "line 2: 'id' must be a string"),
        ('{"id": "b"}', "line 2: 'image' must be a file name, or 'images' a list of some, got null"),
        ('{"id": "b", "image": 3}', "line 2: 'image' must be a file name"),
        ('{"id": "b", "image": "a.png", "title": 3}', "line 2: 'title' must be a string, but it is 3"),
        ('{"id": "a", "image": "a.png"}', "line 2: has the id of line 1"),
        ('{"id": "b", "image": "none.png"}', "line 2: the picture .*none.png cannot be read"),
        ('{"id": "b", "image": "broken.png"}', "line 2: the picture .*broken.png cannot be read; mend it"),
    ],
)
def test_a_broken_line_or_picture_is_named(tmp_path: Path, line: str, sentence: str) -> None:
    drawing(0).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:80])
    file = tmp_path / "set.jsonl"
    file.write_text(f'{{"id": "a", "image": "a.png"}}\n{line}\n')
    with pytest.raises(DataError, match=f"{re.escape(str(file))}, {sentence}"):
        search(file)


def test_missing_pictures_and_models_are_sentences(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match="there are no pictures; set 'images'"):
        search(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no picture"):
        search(tmp_path / "empty")
    (tmp_path / "no_clip").mkdir()
    with pytest.raises(ConfigError, match=r"clip '.*no_clip' cannot be loaded"):
        features.Clip(str(tmp_path / "no_clip"), "cpu")
    with pytest.raises(Problems, match="clip' is missing"):
        Component.parse({"target": "tools.image_search:ClipImageSearch", "images": str(folder)})
