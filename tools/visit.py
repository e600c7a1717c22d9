"""Reading a page: of the web, from hosts that are allowed, or of a corpus, by id or url."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from mmrl.caching import Answers, cache_folder
from mmrl.errors import DataError
from mmrl.messages import Picture, ToolContext, ToolError, ToolResult, as_seen
from tools.search_parts.corpus import Corpus, Document
from tools.search_parts.fetching import Limits, check, fetch
from tools.search_parts.pages import decode, readable, split

_HTML = ("text/html", "application/xhtml+xml")
_PLAIN = ("text/plain", "text/markdown")
_VERSION = 1  # of what is kept on disk


class Visit:
    """See the module. Safe between threads; what was read is kept on disk and shared by processes."""

    @dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
    class Config:
        """Fields of a ``tools.visit:Visit`` block."""

        name: str = "visit"
        """What the model calls it by."""
        allowed_hosts: tuple[str, ...] = ()
        """'example.org', 'example.org:8080', '*.example.org' or '*' (any public host); redirects must lead to them too."""
        corpus: str | None = None
        """JSONL file of documents that can be read by id or url, as TextSearch takes it; they come before the web."""
        page_chars: int = Field(default=4000, ge=200)
        """Longer texts are given in parts of this length."""
        images: int = Field(default=0, ge=0)
        """Pictures of a corpus document that are shown with its first part, at most."""
        links: bool = False
        """Whether the addresses of a web page's links are kept in its text."""
        timeout_s: float = Field(default=10.0, gt=0)
        """Time for a web page, redirects included; a call that has less takes less."""
        max_bytes: int = Field(default=2_000_000, ge=1)
        """Larger web pages are refused, packed or unpacked."""
        max_redirects: int = Field(default=5, ge=0)
        """Redirects that are followed."""
        allow_private: bool = False
        """Whether hosts of private networks and of this machine may be reached; only for tests."""
        user_agent: str = "mmrl"
        """What the server is told of who asks."""
        keep: bool = True
        """Whether web pages are kept on disk and read from there ever after, so that a rollout can be repeated."""
        cache: str | None = None
        """Folder for what is kept; null: mmrl in the user's cache folder."""

        @model_validator(mode="after")
        def _consistent(self) -> Visit.Config:
            if not self.allowed_hosts and self.corpus is None:
                raise ValueError("nothing can be visited; set allowed_hosts, corpus or both")
            if self.images and self.corpus is None:
                raise ValueError("images are those of a corpus document; set corpus, or leave images out")
            return self

    def __init__(self, config: Config) -> None:
        self.config, self.name = config, config.name
        folder = cache_folder(config.cache)
        self._corpus = None if config.corpus is None else Corpus(config.corpus, folder)
        self._pages = Answers(folder / "pages" if config.keep else None)
        self._limits = Limits(
            config.allowed_hosts,
            (*_HTML, *_PLAIN),
            config.max_bytes,
            config.max_redirects,
            config.allow_private,
            config.user_agent,
        )

    def __call__(self, url: str, ctx: ToolContext, page: int = 1) -> ToolResult:
        """Read a page or a document. Gives its text; a long one comes in parts.

        url: address of a web page (http:// or https://), or the id of a document that a search has found.
        page: which part to read, from 1.
        """
        url = url.strip()
        documents = [] if self._corpus is None else self._corpus.find(url)
        if documents:
            text = "\n\n".join(document.text for document in documents)
            pictures = self._pictures(documents) if page == 1 else ()
            return self._part(url, documents[0].title, text, page, pictures, {"id": documents[0].id}, kept=True)
        if not self.config.allowed_hosts:
            raise ToolError(f"There is no document '{url[:200]}'; give the id of a document that a search has found.")
        return self._web(url, page, ctx)

    def close(self) -> None:
        if self._corpus is not None:
            self._corpus.close()

    def _web(self, url: str, page: int, ctx: ToolContext) -> ToolResult:
        target = check(url.partition("#")[0], self.config.allowed_hosts)
        name = f"{_VERSION} {self.config.links} {target.url}"
        found = self._kept(name)
        kept = found is not None
        if found is None:
            deadline = time.monotonic() + min(self.config.timeout_s, ctx.timeout_s)
            fetched = fetch(target.url, self._limits, deadline)
            text = decode(fetched.body, fetched.charset)
            title, text = readable(text, fetched.url, self.config.links) if fetched.media_type in _HTML else ("", text.strip())
            found = {"url": fetched.url, "hops": fetched.hops, "title": title, "text": text}
            self._pages.put(name, found)
        return self._part(found["url"], found["title"], found["text"], page, (), {}, kept=kept)

    def _kept(self, name: str) -> dict[str, Any] | None:
        """What is on disk, if every redirect that led to it would be followed today."""
        found = self._pages.get(name)
        for hop in found["hops"] if found else ():
            check(hop, self.config.allowed_hosts)
        return found

    def _part(
        self, url: str, title: str, text: str, page: int, pictures: tuple[Picture, ...], details: dict[str, Any], *, kept: bool
    ) -> ToolResult:
        parts = split(text, self.config.page_chars)
        if not 1 <= page <= len(parts):
            raise ToolError(f"There is no part {page} of {url}; it has {_count(len(parts))}.")
        head = f"{title or url}" + (f" (part {page} of {len(parts)})" if len(parts) > 1 else "")
        return ToolResult(
            f"{head}\n\n{parts[page - 1].strip() or 'The page holds no text.'}",
            pictures,
            metrics={"from_disk": float(kept), "characters": float(len(parts[page - 1]))},
            details={"url": url, "page": page, "pages": len(parts), **details},
        )

    def _pictures(self, documents: list[Document]) -> tuple[Picture, ...]:
        assert self._corpus is not None
        paths = [self._corpus.path.parent / name for document in documents for name in document.images]
        return tuple(_picture(path, documents[0].id) for path in paths[: self.config.images])


def _picture(path: Path, owner: str) -> Picture:
    try:
        with Image.open(path) as image:
            return Picture(as_seen(image))
    except (OSError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: the picture of document '{owner}' cannot be read; mend the file or the document") from error


def _count(parts: int) -> str:
    return "one part" if parts == 1 else f"{parts} parts"
