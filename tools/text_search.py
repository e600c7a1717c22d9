"""Search in a corpus of documents: by words (BM25), by meaning (an encoder), or by both.

BM25 is Lucene's variant (Kamphuis et al. 2020) through bm25s: with tf a term's count in the document, l its length, L the mean,

    score = sum over the query's terms of  log(1 + (N - df + 0.5) / (df + 0.5)) * tf / (tf + k1 (1 - b + b l / L)).

Both together are fused by reciprocal ranks (Cormack et al. 2009): score = sum of 1 / (rrf_k + rank).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import bm25s
import numpy as np
import Stemmer
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from mmrl.caching import cache_folder, digest
from mmrl.messages import ToolContext, ToolError, ToolResult
from tools.search_parts.caching import build_once, shown
from tools.search_parts.corpus import Corpus, Document
from tools.search_parts.encoder import Encoder
from tools.search_parts.words import VERSION, Words

Ranked = list[tuple[int, float]]  # (row of the corpus, score), best first


class Ranker(Protocol):
    """One way to order the documents."""

    def rank(self, query: str, k: int) -> Ranked: ...


class TextSearch:
    """See the module. Safe between threads; the index is shared by processes."""

    @dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
    class Config:
        """Fields of a ``tools.text_search:TextSearch`` block."""

        corpus: str
        """JSONL file with a document a line: {"id", "title", "text", optional "url", "images"}."""
        name: str = "text_search"
        """What the model calls it by."""
        method: Literal["bm25", "dense", "hybrid"] = "bm25"
        """By words, by the encoder's vectors, or by both."""
        top_k: int = Field(default=5, ge=1)
        """Documents that a search gives."""
        snippet_chars: int = Field(default=300, ge=40)
        """Length of what is shown of a document's text, around the passage that matches best."""
        stemmer: str | None = None
        """Snowball stemmer for BM25, such as 'english'; null: words as they are."""
        k1: float = Field(default=1.5, ge=0)
        """BM25: how late further occurrences of a term stop to count."""
        b: float = Field(default=0.75, ge=0, le=1)
        """BM25: how much long documents are held back."""
        encoder: str | None = None
        """Folder or hub id of a sentence encoder, for 'dense' and 'hybrid'; it sees title and text, cut at its maximal length."""
        query_prefix: str = ""
        """What the encoder wants before a query ('query: ' for E5)."""
        document_prefix: str = ""
        """What the encoder wants before a document ('passage: ' for E5)."""
        device: str = "cpu"
        """Where the encoder runs."""
        fused: int = Field(default=100, ge=1)
        """'hybrid': documents of each order that are fused."""
        rrf_k: float = Field(default=60.0, ge=0)
        """'hybrid': the larger, the less the first ranks stand out."""
        cache: str | None = None
        """Folder for the index; null: mmrl in the user's cache folder."""

        @model_validator(mode="after")
        def _consistent(self) -> TextSearch.Config:
            if self.method != "bm25" and self.encoder is None:
                raise ValueError(f"method '{self.method}' needs an encoder; set encoder, or method: bm25")
            if self.method == "bm25" and self.encoder is not None:
                raise ValueError("method 'bm25' uses no encoder; leave encoder out, or set method: hybrid")
            if self.stemmer is not None and self.stemmer not in Stemmer.algorithms():
                raise ValueError(f"stemmer '{self.stemmer}' is unknown; known are {', '.join(Stemmer.algorithms())}")
            return self

    def __init__(self, config: Config) -> None:
        self.config, self.name = config, config.name
        folder = cache_folder(config.cache)
        self._corpus = Corpus(config.corpus, folder)
        self._words = Words(config.stemmer)
        self._rankers = [make(config, self._corpus, self._words, folder) for make in _RANKERS[config.method]]

    def __call__(self, query: str, ctx: ToolContext) -> ToolResult:
        """Search a collection of documents. Gives the best matches, numbered, each with its title, its id and a passage.

        query: what to look for, in a few words.
        """
        if not query.strip():
            raise ToolError("The query is empty; say in a few words what to look for.")
        found = self._rank(query)
        documents = [self._corpus[row] for row, _ in found]
        weights = self._weights(query)
        lines = [self._entry(number, document, weights) for number, document in enumerate(documents, 1)]
        return ToolResult(
            "\n\n".join(lines) or "No document matches; try other words.",
            metrics={"hits": float(len(found))},
            details={"ids": tuple(document.id for document in documents), "scores": tuple(score for _, score in found)},
        )

    def close(self) -> None:
        self._corpus.close()

    def _rank(self, query: str) -> Ranked:
        if len(self._rankers) == 1:
            return self._rankers[0].rank(query, self.config.top_k)
        depth = max(self.config.fused, self.config.top_k)
        return fuse([ranker.rank(query, depth) for ranker in self._rankers], self.config.rrf_k)[: self.config.top_k]

    def _weights(self, query: str) -> Mapping[str, float]:
        rarity = next((ranker.rarity for ranker in self._rankers if isinstance(ranker, Lexical)), lambda term: 1.0)
        return {term: rarity(term) for term in self._words.terms(query)}

    def _entry(self, number: int, document: Document, weights: Mapping[str, float]) -> str:
        passage = self._words.snippet(document.text, weights, self.config.snippet_chars)
        return f"[{number}] {document.title} (id: {document.id})\n{passage}"


class Lexical:
    """BM25 over titles and texts."""

    def __init__(self, config: TextSearch.Config, corpus: Corpus, words: Words, folder: Path) -> None:
        self._corpus, self._words = corpus, words
        self._settings = {"k1": config.k1, "b": config.b, "method": "lucene", "backend": "numpy"}
        key = digest(corpus.digest, config.stemmer, self._settings, VERSION, bm25s.__version__)
        self._index = bm25s.BM25.load(build_once(folder, f"bm25-{key}", self._build), mmap=True, show_progress=False)

    def rank(self, query: str, k: int) -> Ranked:
        """Documents with a score above 0, which share a term with the query."""
        terms = [term for term in self._words.terms(query) if term in self._index.vocab_dict]
        return best(self._index.get_scores(terms), k, above=0.0) if terms else []

    def rarity(self, term: str) -> float:
        """The term's weight in the formula above; 0 if no document has it."""
        number = self._index.vocab_dict.get(term)
        if number is None:
            return 0.0
        ends = self._index.scores["indptr"]
        frequency = int(ends[number + 1]) - int(ends[number])
        return math.log(1 + (len(self._corpus) - frequency + 0.5) / (frequency + 0.5))

    def _build(self, folder: Path) -> None:
        numbers: defaultdict[str, int] = defaultdict(lambda: len(numbers))
        documents = shown(self._corpus, "Indexing words", len(self._corpus))
        ids = [[numbers[term] for term in self._words.terms(_searched(document))] for document in documents]
        index = bm25s.BM25(**self._settings)
        index.index((ids, dict(numbers)), show_progress=False)
        index.save(folder, show_progress=False)


class Dense:
    """Cosines of the encoder's vectors; every document has one."""

    def __init__(self, config: TextSearch.Config, corpus: Corpus, words: Words, folder: Path) -> None:
        assert config.encoder is not None
        self._encoder, self._corpus, self._config = Encoder(config.encoder, device=config.device), corpus, config
        key = digest(corpus.digest, self._encoder.digest, config.document_prefix)
        self._vectors_ND = np.load(build_once(folder, f"dense-{key}", self._build) / "vectors.npy", mmap_mode="r")

    def rank(self, query: str, k: int) -> Ranked:
        return best(self._vectors_ND @ self._encoder.encode([self._config.query_prefix + query])[0], k)

    def _build(self, folder: Path) -> None:
        texts = [self._config.document_prefix + _searched(document) for document in self._corpus]
        np.save(folder / "vectors.npy", self._encoder.encode_many(texts, "Encoding documents"))


_RANKERS: Mapping[str, tuple[Callable[..., Any], ...]] = {"bm25": (Lexical,), "dense": (Dense,), "hybrid": (Lexical, Dense)}


def best(scores_N: np.ndarray, k: int, above: float = -math.inf) -> Ranked:
    """The ``k`` highest scores above ``above``; of equals the lower row."""
    rows = np.flatnonzero(scores_N > above)
    if len(rows) > k:
        least = np.partition(scores_N[rows], len(rows) - k)[len(rows) - k]
        rows = rows[scores_N[rows] >= least]
    order = np.lexsort((rows, -scores_N[rows]))[:k]
    return [(int(row), float(scores_N[row])) for row in rows[order]]


def fuse(orders: Sequence[Ranked], rrf_k: float) -> Ranked:
    """Several orders as one, by reciprocal ranks; of equals the lower row."""
    scores: defaultdict[int, float] = defaultdict(float)
    for order in orders:
        for rank, (row, _) in enumerate(order, 1):
            scores[row] += 1 / (rrf_k + rank)
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


def _searched(document: Document) -> str:
    return f"{document.title}\n{document.text}"
