"""Text search: BM25 by the formula in float64, recall, snippets, both orders fused, an index built once, and damaged corpora."""

from __future__ import annotations

import importlib.util
import json
import math
import multiprocessing
import os
import random
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from mmrl.component import Component, Problems
from mmrl.errors import ConfigError, DataError
from mmrl.messages import ToolContext, ToolError
from mmrl.registry import install_command

if importlib.util.find_spec("bm25s") is None and os.environ.get("CI") != "true":
    pytest.skip(f"bm25s is not installed; install it with: {install_command('bm25s')}", allow_module_level=True)

from tools.search_parts import caching
from tools.search_parts.corpus import Corpus
from tools.search_parts.encoder import Encoder
from tools.search_parts.words import Words
from tools.text_search import TextSearch, best, fuse

SYLLABLES = ("ba", "ke", "lo", "mi", "nu", "ra", "so", "ti", "vu", "zo")
DOCUMENTS = 300


def vocabulary(count: int) -> list[str]:
    generator = random.Random(1)
    return sorted({"".join(generator.choices(SYLLABLES, k=3)) for _ in range(3 * count)})[:count]


def documents(count: int = DOCUMENTS) -> list[dict[str, Any]]:
    """Entries about one thing each: a title of two words of its own, among words that are all over the corpus."""
    generator, words = random.Random(2), vocabulary(400)
    common, rare = words[:100], words[100:]
    made = []
    for number in range(count):
        title = " ".join(generator.sample(rare, 2))
        weights = [1 / (rank + 1) for rank in range(len(common))]
        text = " ".join([*generator.choices(common, weights, k=generator.randint(5, 60)), *generator.sample(rare, 3), title])
        made.append({"id": f"doc-{number}", "title": title.title(), "text": text, "url": f"https://wiki.test/{number}"})
    return made


def write(path: Path, entries: Sequence[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in entries), encoding="utf-8")
    return path


def search(tmp_path: Path, entries: Sequence[Any], **fields: Any) -> TextSearch:
    corpus = write(tmp_path / "corpus.jsonl", entries)
    return TextSearch(TextSearch.Config(corpus=str(corpus), cache=str(tmp_path / "cache"), **fields))


def found(tool: TextSearch, query: str) -> list[tuple[str, float]]:
    details = tool(query, ToolContext()).details
    return list(zip(details["ids"], details["scores"], strict=True))


def naive_bm25(entries: Sequence[dict[str, Any]], query: str, k1: float, b: float) -> dict[str, float]:
    """Scores above 0 by the formula of the module, term by term, in float64. The texts are ASCII."""
    bags = [Counter(re.findall(r"[a-z0-9]+", f"{entry['title']} {entry['text']}".lower())) for entry in entries]
    lengths = [sum(bag.values()) for bag in bags]
    mean, total = sum(lengths) / len(lengths), len(bags)
    terms = [(term, sum(term in bag for bag in bags)) for term in re.findall(r"[a-z0-9]+", query.lower())]
    scores: dict[str, float] = {}
    for entry, bag, length in zip(entries, bags, lengths, strict=True):
        score = 0.0
        for term, frequency in terms:
            if bag[term]:
                idf = math.log(1 + (total - frequency + 0.5) / (frequency + 0.5))
                score += idf * bag[term] / (bag[term] + k1 * (1 - b + b * length / mean))
        if score:
            scores[entry["id"]] = score
    return scores


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.4), (1.2, 0.0)])
def test_scores_are_those_of_the_formula(tmp_path: Path, k1: float, b: float) -> None:
    entries = documents()
    tool = search(tmp_path, entries, k1=k1, b=b, top_k=DOCUMENTS)
    generator, words = random.Random(3), vocabulary(400)
    for _ in range(8):
        query = " ".join([*generator.choices(words, k=generator.randint(1, 6)), "unheardof"])
        expected = naive_bm25(entries, query, k1, b)
        scores = dict(found(tool, query))
        assert scores.keys() == expected.keys()
        assert [scores[name] for name in expected] == pytest.approx(list(expected.values()), rel=1e-5)
        assert list(scores.values()) == sorted(scores.values(), reverse=True)


def test_the_entry_that_is_asked_for_is_found(tmp_path: Path) -> None:
    entries = documents()
    tool = search(tmp_path, entries, top_k=3)
    hits = [entry["id"] in [name for name, _ in found(tool, f"Where is {entry['title']}?")] for entry in entries]
    assert sum(hits) / len(hits) > 0.97  # two entries may share a title's word
    assert dict(found(tool, entries[7]["title"])).keys() != dict(found(tool, entries[8]["title"])).keys()


def test_the_model_reads_titles_ids_and_passages(tmp_path: Path) -> None:
    entries = [
        {"id": "a", "title": "Owl", "text": "An owl hunts at night."},
        {"id": "b", "title": "Hen", "text": "A hen sleeps at night."},
        {"id": "c", "title": "Elk", "text": "Eats leaves."},
    ]
    result = search(tmp_path, entries)("OWLS? owl, night!", ToolContext())
    assert result.text == "[1] Owl (id: a)\nAn owl hunts at night.\n\n[2] Hen (id: b)\nA hen sleeps at night."
    assert result.details["ids"] == ("a", "b") and result.metrics == {"hits": 2.0}
    nothing = search(tmp_path, entries)("walrus", ToolContext())
    assert nothing.details["ids"] == () and "No document matches" in nothing.text and not nothing.error
    with pytest.raises(ToolError, match="query is empty"):
        search(tmp_path, entries)("  ", ToolContext())


def test_stemming_finds_other_forms_of_a_word(tmp_path: Path) -> None:
    entries = [{"id": "a", "title": "", "text": "Owls are hunting mice"}, {"id": "b", "title": "", "text": "Hens eat corn"}]
    assert found(search(tmp_path, entries), "owl hunts") == []
    assert [name for name, _ in found(search(tmp_path, entries, stemmer="english"), "owl hunts")] == ["a"]


def test_words_of_any_script() -> None:
    words = Words()
    assert words.terms("Straße STRASSE ｆｕｌｌ cafe\u0301 café") == ["strasse", "strasse", "full", "café", "café"]
    assert words.terms("北京の塔 2049年") == ["北", "京", "の", "塔", "2049", "年"]
    assert words.terms("it's x_1, 3.5—no") == ["it", "s", "x_1", "3", "5", "no"]


def naive_window(text: str, weights: dict[str, float], length: int) -> float:
    """The largest weight of the different terms inside any ``length`` characters that begin with a word."""
    places = [(match[0].lower(), *match.span()) for match in re.finditer(r"\w+", text)]
    return max(
        (
            sum(weights.get(t, 0.0) for t in {t for t, s, e in places if s >= first and e <= first + length})
            for _, first, _ in places
        ),
        default=0.0,
    )


@given(
    st.lists(st.sampled_from(["red", "owl", "of", "the", "moon", "at", "night"]), min_size=1, max_size=120), st.integers(40, 120)
)
def test_a_snippet_shows_the_best_window(words: list[str], length: int) -> None:
    text, weights = " ".join(words), {"owl": 3.0, "moon": 2.0, "red": 1.5}
    shown = Words().snippet(text, weights, length)
    inner = shown.removeprefix("… ").removesuffix(" …")
    assert inner in text and len(inner) <= length
    assert shown.startswith("… ") != text.startswith(inner) or text.count(inner) > 1
    weight = sum(weights[term] for term in {*inner.split()} & weights.keys())
    assert weight >= naive_window(text, weights, length) - 1e-9


def test_a_snippet_lies_around_the_rarest_terms(tmp_path: Path) -> None:
    filler = "the river bends and the road follows it " * 40
    text = f"{filler}The lighthouse was built by Ada Quill in 1843. {filler}"
    entries = [{"id": "a", "title": "Cape", "text": text}, *({"id": f"b{i}", "title": "", "text": filler} for i in range(9))]
    shown = search(tmp_path, entries, top_k=1, snippet_chars=150)("lighthouse quill", ToolContext()).text
    assert "lighthouse was built by Ada Quill in 1843" in shown and len(shown) < 190


def test_of_equal_scores_the_earlier_row_comes_first() -> None:
    scores = np.array([0, 2, 1, 2, 2, 0, 3], np.float32)
    assert best(scores, 3) == [(6, 3.0), (1, 2.0), (3, 2.0)]
    assert best(scores, 9, above=0.0) == [(6, 3.0), (1, 2.0), (3, 2.0), (4, 2.0), (2, 1.0)]
    assert best(np.zeros(4), 2, above=0.0) == []


def test_fusion_adds_reciprocal_ranks() -> None:
    fused = fuse([[(3, 9.0), (1, 8.0), (2, 7.0)], [(2, 0.9), (3, 0.8)]], 60.0)
    assert [row for row, _ in fused] == [3, 2, 1]
    assert [score for _, score in fused] == pytest.approx([1 / 61 + 1 / 62, 1 / 63 + 1 / 61, 1 / 62])


# ---------------------------------------------------------------------------------------------------- encoders


def encoder(folder: Path, *, pooling: str | None = "mean", legacy: bool = True) -> Path:
    """A tiny random BERT as sentence-transformers stores one."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *vocabulary(400)]
    words = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=len(names), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    if pooling is not None:
        kinds = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling"), ("2", "2_Normalize", "Normalize")]
        modules = [
            {"idx": int(i), "name": i, "path": path, "type": f"sentence_transformers.models.{kind}"} for i, path, kind in kinds
        ]
        flags = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "lasttoken": "pooling_mode_lasttoken"}
        mode = {flag: name == pooling for name, flag in flags.items()} if legacy else {"pooling_mode": pooling}
        (folder / "1_Pooling").mkdir()
        (folder / "2_Normalize").mkdir()
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 32, **mode}))
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 48, "do_lower_case": False}))
    return folder


TEXTS = ["", *(entry["text"] for entry in documents(6))]


def naive_vector(folder: Path, text: str, pooling: str) -> np.ndarray:
    """One text by itself, without padding, token by token."""
    names = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    ids = [names.get(word, names["[UNK]"]) for word in text.lower().split()][:48]
    with torch.no_grad():
        rows = BertModel.from_pretrained(folder).eval()(torch.tensor([ids])).last_hidden_state[0].double().numpy()
    vector = {"mean": sum(rows) / len(rows), "cls": rows[0], "lasttoken": rows[-1]}[pooling]
    return vector / math.sqrt(sum(x * x for x in vector))


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_vectors_are_pooled_over_a_text_s_own_tokens(tmp_path: Path, pooling: str, legacy: bool) -> None:
    folder = encoder(tmp_path / "model", pooling=pooling, legacy=legacy)
    vectors = Encoder(str(folder), device="cpu").encode(TEXTS[1:])
    expected = np.stack([naive_vector(folder, text, pooling) for text in TEXTS[1:]])
    np.testing.assert_allclose(vectors, expected, atol=2e-5)
    many = Encoder(str(folder), device="cpu").encode_many([*TEXTS, *TEXTS * 6], "")
    np.testing.assert_allclose(many[1 : len(TEXTS)], expected, atol=2e-5)


@pytest.mark.skipif(importlib.util.find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed")
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken", None])
def test_vectors_are_those_of_sentence_transformers(tmp_path: Path, pooling: str | None) -> None:
    upstream = pytest.importorskip("sentence_transformers")
    folder = encoder(tmp_path / "model", pooling=pooling)
    expected = upstream.SentenceTransformer(str(folder), device="cpu").encode(TEXTS[1:], normalize_embeddings=True)
    np.testing.assert_allclose(Encoder(str(folder), device="cpu").encode(TEXTS[1:]), expected, atol=1e-5)


def test_dense_and_hybrid_order_by_cosines_and_by_both(tmp_path: Path) -> None:
    entries, folder = documents(40), encoder(tmp_path / "model")
    vectors = np.stack([naive_vector(folder, f"{entry['title']} {entry['text']}", "mean") for entry in entries])
    dense = search(tmp_path, entries, method="dense", encoder=str(folder), top_k=40)
    hybrid = search(tmp_path, entries, method="hybrid", encoder=str(folder), top_k=40)
    query = f"{entries[11]['title']} {entries[12]['text'][:40]}"
    cosines = vectors @ naive_vector(folder, query, "mean")
    scores = dict(found(dense, query))
    assert [scores[entry["id"]] for entry in entries] == pytest.approx(list(cosines), abs=1e-5)
    words = naive_bm25(entries, query, 1.5, 0.75)
    orders = [sorted(words, key=words.__getitem__, reverse=True), list(scores)]
    expected = {name: sum(1 / (61 + order.index(name)) for order in orders if name in order) for name in scores}
    assert dict(found(hybrid, query)) == pytest.approx(expected)


def test_prefixes_reach_the_encoder(tmp_path: Path) -> None:
    entries, folder, first = documents(5), encoder(tmp_path / "model"), vocabulary(400)[0]
    plain = search(tmp_path, entries, method="dense", encoder=str(folder), top_k=5)
    prefixed = search(
        tmp_path, entries, method="dense", encoder=str(folder), top_k=5, query_prefix=f"{first} ", document_prefix=f"{first} "
    )
    scores = dict(found(prefixed, "owl"))
    query = naive_vector(folder, f"{first} owl", "mean")
    for entry in entries:
        document = naive_vector(folder, f"{first} {entry['title']} {entry['text']}", "mean")
        assert scores[entry["id"]] == pytest.approx(float(document @ query), abs=1e-5)
    assert scores != dict(found(plain, "owl"))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            {"1_Pooling/config.json": {"pooling_mode_max_tokens": True}},
            "pools by pooling_mode_max_tokens; one of mean, cls, lasttoken",
        ),
        ({"modules.json": [{"type": "sentence_transformers.models.Dense"}]}, "has a part Dense"),
        ({"config.json": {"model_type": "no_such_model"}}, "cannot be loaded"),
    ],
)
def test_an_encoder_of_another_kind_is_refused(tmp_path: Path, damage: dict[str, Any], sentence: str) -> None:
    folder = encoder(tmp_path / "model")
    for name, content in damage.items():
        (folder / name).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=sentence):
        Encoder(str(folder), device="cpu")


# ------------------------------------------------------------------------------------------------ index and corpus


def test_an_index_is_built_once_for_a_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = documents(20)
    before = found(search(tmp_path, entries), entries[3]["title"])
    folders = {path.name for path in (tmp_path / "cache").iterdir()}
    built: list[str] = []
    monkeypatch.setattr("tools.text_search.Lexical._build", lambda *_: built.append("words"))
    monkeypatch.setattr(Corpus, "_build", lambda *_: built.append("corpus"))
    tool = search(tmp_path, entries)
    assert found(tool, entries[3]["title"]) == before and built == []
    assert isinstance(tool._rankers[0]._index.scores["data"], np.memmap) and isinstance(tool._corpus._starts, np.memmap)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == folders  # nothing is left half-built
    monkeypatch.undo()
    entries[3]["text"] = "walrus"
    assert [name for name, _ in found(search(tmp_path, entries), "walrus")] == ["doc-3"]
    assert found(search(tmp_path, entries, b=0.2), entries[5]["title"]) != found(search(tmp_path, entries), entries[5]["title"])


def build_slowly(cache: Path, barrier: Any, results: Any) -> None:
    def build(folder: Path) -> None:
        barrier.wait(20)  # both are building
        for number in range(5):
            (folder / str(number)).write_text(str(os.getpid()))

    folder = caching.build_once(cache, "index", build)
    results.put({file.read_text() for file in folder.iterdir()})


def test_two_processes_that_build_at_once_end_with_one_whole_index(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    barrier, results = fork.Barrier(2), fork.Queue()
    processes = [fork.Process(target=build_slowly, args=(tmp_path, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    seen = [results.get(timeout=20) for _ in processes]
    for process in processes:
        process.join(20)
    assert seen[0] == seen[1] and len(seen[0]) == 1  # five files of one writer
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("")
        raise DataError("broken")

    with pytest.raises(DataError):
        caching.build_once(tmp_path, "index", build)
    assert list(tmp_path.iterdir()) == []


def test_several_threads_search_as_one_would(tmp_path: Path) -> None:
    entries = documents(60)
    tool = search(tmp_path, entries, stemmer="english")
    titles = [entry["title"] for entry in entries]
    expected = [tool(title, ToolContext()) for title in titles]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda title: tool(title, ToolContext()), titles)) == expected


GOOD = '{"id": "a", "title": "t", "text": "x"}'


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"id": "b", "title": "t"', "line 3: not JSON"),
        ('["b"]', "line 3: must be a JSON object"),
        ('{"id": "b", "title": "t"}', "line 3: 'text' must be a string, but it is missing"),
        ('{"id": 7, "title": "t", "text": "x"}', "line 3: 'id' must be a string, but it is 7"),
        ('{"id": "", "title": "t", "text": "x"}', "line 3: 'id' is empty"),
        ('{"id": "b", "title": "t", "text": "x", "url": 3}', "line 3: 'url' must be a string, but it is 3"),
        ('{"id": "b", "title": "t", "text": "x", "images": "b.png"}', "line 3: 'images' must be a list"),
        ('{"id": "a", "title": "t", "text": "x"}', "line 3: has the id of line 1"),
        ('{"id": "\udcff"}', "line 3: not UTF-8"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, sentence: str) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(f"{GOOD}\n\n{line}\n".encode(errors="surrogateescape"))
    with pytest.raises(DataError) as caught:
        Corpus(str(corpus), tmp_path / "cache")
    assert str(caught.value).startswith(f"{corpus}, {sentence}") and "\n" not in str(caught.value)


def test_documents_are_found_by_id_and_by_url(tmp_path: Path) -> None:
    entries = [*documents(30), {"id": "x", "title": "é", "text": "ü\u2028ß", "url": "https://wiki.test/3", "images": ["a.png"]}]
    corpus = Corpus(str(write(tmp_path / "corpus.jsonl", entries)), tmp_path / "cache")
    assert [(d.id, d.title, d.text, d.url) for d in corpus] == [(e["id"], e["title"], e["text"], e["url"]) for e in entries]
    assert [document.id for document in corpus.find("https://wiki.test/3")] == ["doc-3", "x"]
    assert corpus.find("x")[0].images == ("a.png",) and corpus.find("y") == []


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"method": "dense"}, "method 'dense' needs an encoder; set encoder"),
        ({"encoder": "some/model"}, "method 'bm25' uses no encoder"),
        ({"stemmer": "klingon"}, "stemmer 'klingon' is unknown; known are arabic"),
        ({"top_k": 0}, "top_k"),
    ],
)
def test_a_wrong_block_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Problems, match=re.escape(sentence)):
        Component.parse({"target": "tools.text_search:TextSearch", "corpus": "x.jsonl", **fields})


def test_a_missing_or_empty_corpus_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing.jsonl: the corpus cannot be read .*set 'corpus'"):
        TextSearch(TextSearch.Config(corpus=str(tmp_path / "nothing.jsonl"), cache=str(tmp_path)))
    with pytest.raises(DataError, match="holds no document"):
        search(tmp_path, [])
