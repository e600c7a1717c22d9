"""From the bytes of a web page to readable text, and from a long text to pages."""

from __future__ import annotations

import codecs
import re
from contextlib import suppress

import trafilatura
from trafilatura.utils import load_html

_META = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([\w.:-]{1,40})""", re.IGNORECASE)
_BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_MEANT = {"iso8859-1": "cp1252", "ascii": "cp1252"}  # what pages mean that say so (WHATWG, Encoding Standard)
_HEAD = 4096  # bytes in which a page must name its charset


def decode(body: bytes, charset: str | None) -> str:
    """Text by byte order mark, by ``charset`` (of the header), by the page's own <meta>, as UTF-8, else as Windows-1252."""
    mark = next((name for start, name in _BOMS.items() if body.startswith(start)), None)
    meta = _META.search(body[:_HEAD])
    said = [name for name in (mark, charset, meta[1].decode("ascii", "replace") if meta else None) if name is not None]
    for name, errors in (*((name, "replace") for name in said), ("utf-8", "strict")):
        with suppress(LookupError, ValueError):  # unknown, no encoding of text, or not what the bytes are
            known = codecs.lookup(name).name
            return body.decode(_MEANT.get(known, known), errors)
    return body.decode("cp1252", "replace")


def readable(html: str, url: str, links: bool) -> tuple[str, str]:
    """(title, text) of an HTML page: its main part, else all of its text."""
    tree = load_html(html)
    if tree is None:
        return "", " ".join(re.sub(r"<[^>]*>", " ", html).split())
    title = " ".join((tree.findtext(".//title") or "").split())
    text = trafilatura.extract(
        html, url=url, output_format="markdown", favor_recall=True, include_comments=False, include_links=links
    )
    return title, (text or trafilatura.html2txt(html) or "").strip()


def split(text: str, length: int) -> list[str]:
    """``text`` in pieces of at most ``length`` characters, which together are ``text``; cut after a line, else after a word."""
    pieces, at = [], 0
    while len(text) - at > length:
        window = text[at : at + length]
        cut = next((place + 1 for sign in ("\n", " ") if (place := window.rfind(sign)) >= length // 2), length)
        pieces.append(window[:cut])
        at += cut
    return [*pieces, text[at:]]
