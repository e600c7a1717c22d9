"""Visiting pages: readable text in parts, and a server that tries everything to be read from where it must not, or for ever."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import re
import socket
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmrl.component import Component, Problems
from mmrl.errors import DataError
from mmrl.messages import ToolContext, ToolError
from mmrl.registry import install_command
from tests.tools.servers import Server, page, redirect, reply, serving

if importlib.util.find_spec("trafilatura") is None and os.environ.get("CI") != "true":
    pytest.skip(f"trafilatura is not installed; install it with: {install_command('trafilatura')}", allow_module_level=True)

from tools.search_parts import fetching
from tools.search_parts.fetching import check, is_public
from tools.search_parts.pages import decode, split
from tools.visit import Visit

ARTICLE = """<html><head><title>Owls &amp; moons</title><script>var hidden = 1;</script></head><body>
<nav><a href="/">Home</a></nav>
<article><h1>Owls</h1><p>The owl of Brinmoor hunts on nights without a moon, and sleeps through the others.</p>
<p>Its nest lies in the third tower of the mill, which was built in 1843 by Ada Quill.</p></article>
<footer>Copyright</footer></body></html>"""


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def visitor(server: Server, tmp_path: Path, **fields: Any) -> Visit:
    own = {"allowed_hosts": (server.host,), "allow_private": True, "keep": False, "cache": str(tmp_path / "cache"), **fields}
    return Visit(Visit.Config(**own))


def refusal(tool: Visit, url: str, **arguments: Any) -> str:
    with pytest.raises(ToolError) as caught:
        tool(url, ToolContext(), **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_main_part_of_a_page_is_read(server: Server, tmp_path: Path) -> None:
    server.answers["/owl"] = page(ARTICLE)
    result = visitor(server, tmp_path)(server.url("/owl?x=1#nest"), ToolContext())
    assert result.text.startswith("Owls & moons\n\n") and "built in 1843 by Ada Quill" in result.text
    assert "hidden" not in result.text and "<p>" not in result.text
    assert server.seen == ["/owl?x=1"]
    assert result.details == {"url": server.url("/owl?x=1"), "page": 1, "pages": 1} and result.metrics["from_disk"] == 0.0


def test_plain_text_is_read_as_it_is(server: Server, tmp_path: Path) -> None:
    server.answers["/t"] = page("a <b> c\n\nd", kind="text/plain; charset=utf-8")
    assert visitor(server, tmp_path)(server.url("/t"), ToolContext()).text == f"{server.url('/t')}\n\na <b> c\n\nd"


def test_a_long_page_comes_in_parts(server: Server, tmp_path: Path) -> None:
    words = [f"word{number}" for number in range(500)]
    server.answers["/long"] = page(" ".join(words), kind="text/plain")
    tool = visitor(server, tmp_path, page_chars=1000)
    pages = tool(server.url("/long"), ToolContext()).details["pages"]
    texts = [tool(server.url("/long"), ToolContext(), page=number).text for number in range(1, pages + 1)]
    assert all(f"(part {number} of {pages})" in text and len(text) < 1100 for number, text in enumerate(texts, 1))
    assert " ".join(text.partition("\n\n")[2] for text in texts).split() == words
    assert refusal(tool, server.url("/long"), page=pages + 1).endswith(f"it has {pages} parts.")
    assert "There is no part 0" in refusal(tool, server.url("/long"), page=0)


@given(st.text(alphabet="ab \n", max_size=200), st.integers(1, 40))
def test_parts_are_short_and_together_the_text(text: str, length: int) -> None:
    parts = split(text, length)
    assert "".join(parts) == text and all(len(part) <= length for part in parts)


@pytest.mark.parametrize(
    ("kind", "body", "text"),
    [
        ("text/html; charset=iso-8859-1", "<p>café – x</p>".encode("cp1252"), "café – x"),
        ("text/html; charset=Shift_JIS", "<p>東京の塔</p>".encode("shift_jis"), "東京の塔"),
        ("text/html", b'<head><meta charset="koi8-r"></head><p>' + "сова".encode("koi8-r") + b"</p>", "сова"),
        ("text/html", "<p>сова é</p>".encode(), "сова é"),
        ("text/html", b"<p>caf\xe9</p>", "café"),
        ("text/html; charset=utf-7-or-so", "<p>é</p>".encode(), "é"),
        ("text/html; charset=hex", "<p>é</p>".encode(), "é"),
        ("text/html; charset=koi8-r", "\ufeff<p>é</p>".encode(), "é"),
    ],
)
def test_charsets(server: Server, tmp_path: Path, kind: str, body: bytes, text: str) -> None:
    server.answers["/c"] = page(body, kind=kind)
    assert text in visitor(server, tmp_path)(server.url("/c"), ToolContext()).text


@given(st.binary(max_size=300), st.sampled_from([None, "utf-8", "utf-16", "idna", "punycode", "\x00", "x" * 300]))
def test_any_bytes_can_be_decoded(body: bytes, charset: str | None) -> None:
    assert isinstance(decode(body, charset), str)


# -------------------------------------------------------------------------------------------------- limits


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "text/html")
    handler.end_headers()
    while True:
        handler.wfile.write(b"<p>more</p>" * 2000)


def drip(start: bytes, byte: bytes) -> Any:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(start)
        while True:
            handler.wfile.write(byte)
            handler.wfile.flush()
            time.sleep(0.02)

    return answer


def test_an_endless_page_is_cut_off(server: Server, tmp_path: Path) -> None:
    server.answers["/e"] = endless
    assert "is larger than 0.1 MB" in refusal(visitor(server, tmp_path, max_bytes=100_000), server.url("/e"))
    assert server.hung_up.wait(5)


def test_a_page_that_says_it_is_large_is_not_read(server: Server, tmp_path: Path) -> None:
    server.answers["/l"] = page(b"x", Content_Length="999999999")
    assert "is larger than" in refusal(visitor(server, tmp_path), server.url("/l"))


@pytest.mark.parametrize(
    ("start", "byte"),
    [
        (
            b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n",
            b"x",
        ),  # no length: the end of the connection must not look like the end
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 999\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
        (b"HTTP/1.1 200 OK\r\nX-Long: ", b"x"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["body", "sized body", "chunk size", "header", "continue"],
)
def test_a_slow_page_ends_at_the_time_limit(server: Server, tmp_path: Path, start: bytes, byte: bytes) -> None:
    server.answers["/s"] = drip(start, byte)
    assert "took too long" in refusal(visitor(server, tmp_path, timeout_s=0.3), server.url("/s"))
    assert server.hung_up.wait(5)  # nothing goes on behind the answer


def test_a_call_with_less_time_takes_less(server: Server, tmp_path: Path) -> None:
    server.answers["/s"] = drip(b"", b"x")
    with pytest.raises(ToolError, match="took too long"):
        visitor(server, tmp_path, timeout_s=600.0)(server.url("/s"), ToolContext(timeout_s=0.2))


@pytest.mark.parametrize("packed", [gzip.compress(bytes(30_000_000)), zlib.compress(bytes(30_000_000))], ids=["gzip", "deflate"])
def test_a_packed_bomb_is_not_unpacked(server: Server, tmp_path: Path, packed: bytes) -> None:
    encoding = "gzip" if packed[0] == 0x1F else "deflate"
    server.answers["/b"] = page(packed, Content_Encoding=encoding)
    assert len(packed) < 100_000
    assert "is larger than 0.1 MB" in refusal(visitor(server, tmp_path, max_bytes=100_000), server.url("/b"))


def test_packed_pages_are_read_and_broken_ones_named(server: Server, tmp_path: Path) -> None:
    packed = gzip.compress(ARTICLE.encode())
    server.answers |= {
        "/whole": page(packed, Content_Encoding="gzip"),
        "/cut": page(packed[:-12], Content_Encoding="gzip"),
        "/not": page(ARTICLE, Content_Encoding="gzip"),
        "/br": page(packed, Content_Encoding="br"),
    }
    tool = visitor(server, tmp_path)
    assert "Ada Quill" in tool(server.url("/whole"), ToolContext()).text
    assert all("the connection failed" in refusal(tool, server.url(path)) for path in ("/cut", "/not"))
    assert "packed as br" in refusal(tool, server.url("/br"))


@pytest.mark.parametrize("kind", ["application/pdf", "image/png", "application/octet-stream", None])
def test_other_types_are_refused(server: Server, tmp_path: Path, kind: str | None) -> None:
    server.answers["/k"] = page("x", kind=kind)
    assert f"of type {kind or 'none'}, which cannot be read" in refusal(visitor(server, tmp_path), server.url("/k"))


def test_what_a_server_refuses_is_said(server: Server, tmp_path: Path) -> None:
    assert "the server answers 404" in refusal(visitor(server, tmp_path), server.url("/nothing"))
    server.answers["/reset"] = lambda handler: handler.connection.shutdown(socket.SHUT_RDWR)
    server.answers["/noise"] = lambda handler: handler.wfile.write(b"\x00\xff" * 50 + b"\r\n\r\n") and None
    server.answers["/length"] = page("x", Content_Length="many")
    for path in ("/reset", "/noise", "/length"):
        assert "cannot be had: the connection failed" in refusal(visitor(server, tmp_path), server.url(path))


# ------------------------------------------------------------------------------------------- redirects and addresses


def test_redirects_are_followed_so_far(server: Server, tmp_path: Path) -> None:
    server.answers |= {"/0": page(ARTICLE), **{f"/{n}": redirect(f"/{n - 1}", 301 + n % 3) for n in range(1, 5)}}
    tool = visitor(server, tmp_path, max_redirects=3)
    result = tool(server.url("/3"), ToolContext())
    assert "Ada Quill" in result.text and result.details["url"] == server.url("/0")
    assert "redirects more than 3 times" in refusal(tool, server.url("/4"))


@pytest.mark.parametrize("chain", [{"/a": "/a"}, {"/a": "/b", "/b": "/a"}, {"/a": ""}])
def test_circles_are_left(server: Server, tmp_path: Path, chain: dict[str, str]) -> None:
    server.answers |= {path: redirect(to) for path, to in chain.items()}
    assert "redirects in a circle" in refusal(visitor(server, tmp_path, max_redirects=50), server.url("/a"))
    assert len(server.seen) == len(chain)


@pytest.mark.parametrize("to", ["http://other.test/", "//other.test/x", "https://other.test", "http://127.0.0.1:1/"])
def test_a_redirect_to_a_host_that_is_not_allowed_is_refused(server: Server, tmp_path: Path, to: str) -> None:
    server.answers["/a"] = redirect(to)
    assert re.search(
        r"The host (other\.test|127\.0\.0\.1:1) is not one that may be visited",
        refusal(visitor(server, tmp_path), server.url("/a")),
    )


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://x/", "gopher://x/", "javascript:alert(1)"])
def test_a_redirect_to_another_scheme_is_refused(server: Server, tmp_path: Path, to: str) -> None:
    server.answers["/a"] = redirect(to)
    assert "must begin with http" in refusal(visitor(server, tmp_path), server.url("/a"))


def answers_of(monkeypatch: pytest.MonkeyPatch, names: dict[str, list[list[str]]]) -> list[str]:
    """A name server of its own: each lookup of a name takes the next of its answers. Returns the names that are looked up."""
    real, asked = socket.getaddrinfo, []

    def look_up(host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        if host not in names:
            return real(host, port, *args, **kwargs)
        asked.append(host)
        found = names[host].pop(0) if len(names[host]) > 1 else names[host][0]
        return [(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in found]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return asked


def test_a_redirect_into_a_private_network_is_refused(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first host counts as public here, so that there is a server to redirect; the second is judged as it is."""
    answers_of(monkeypatch, {"public.test": [["127.0.0.1"]], "inside.test": [["10.0.0.7"]]})
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1" or is_public(address))
    server.answers["/a"] = redirect("http://inside.test/secret")
    tool = visitor(server, tmp_path, allowed_hosts=(f"public.test:{server.port}", "*"), allow_private=False)
    assert "inside.test is not on the public internet" in refusal(tool, f"http://public.test:{server.port}/a")
    assert server.seen == ["/a"]


PRIVATE = [
    "127.0.0.1", "127.8.8.8", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
    "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "::", "::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "fec0::1",
    "ff02::1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:1::1", "2001:db8::1",
]  # fmt: skip
PUBLIC = ["8.8.8.8", "93.184.216.34", "172.32.0.1", "2606:4700:4700::1111", "::ffff:8.8.8.8"]


def test_which_addresses_are_public() -> None:
    assert [address for address in PRIVATE if is_public(address)] == []
    assert [address for address in PUBLIC if not is_public(address)] == []


@pytest.mark.parametrize("address", PRIVATE)
def test_a_name_that_leads_to_a_private_address_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    answers_of(monkeypatch, {"evil.test": [["8.8.8.8", address]]})  # one good answer does not make up for a bad one
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("connected"))
    tool = Visit(Visit.Config(allowed_hosts=("*",), keep=False, cache=str(tmp_path)))
    assert "evil.test is not on the public internet" in refusal(tool, "http://evil.test/")


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.0.0.1.", "2130706433", "0177.0.0.1", "0x7f.1", "127.1", "１２７.0.0.1", "[::1]", "[::ffff:127.0.0.1]"],
)
def test_every_spelling_of_this_machine_is_refused(server: Server, tmp_path: Path, host: str) -> None:
    tool = Visit(Visit.Config(allowed_hosts=(f"*:{server.port}",), keep=False, cache=str(tmp_path)))
    sentence = refusal(tool, f"http://{host}:{server.port}/")
    assert "not on the public internet" in sentence or "There is no host" in sentence  # not every resolver knows every spelling
    assert server.seen == []


def test_the_address_that_was_checked_is_the_one_connected_to(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: a second lookup would give another address; there is none, and the name stays in the request."""
    asked = answers_of(monkeypatch, {"rebind.test": [["127.0.0.1"], ["127.0.0.99"]]})
    dialled: list[Any] = []
    real = socket.create_connection
    monkeypatch.setattr(socket, "create_connection", lambda place, **more: dialled.append(place) or real(place, **more))
    hosts: list[str | None] = []
    server.answers["/"] = lambda handler: hosts.append(handler.headers["Host"]) or reply(handler, b"<p>fine</p>")
    tool = visitor(server, tmp_path, allowed_hosts=(f"rebind.test:{server.port}",))
    assert "fine" in tool(f"http://rebind.test:{server.port}/", ToolContext()).text
    assert asked == ["rebind.test"] and dialled == [("127.0.0.1", server.port)] and hosts == [f"rebind.test:{server.port}"]


def test_proxies_of_the_environment_are_not_used(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    server.answers["/"] = page(ARTICLE)
    assert "Ada Quill" in visitor(server, tmp_path)(server.url("/"), ToolContext()).text


@pytest.mark.parametrize(
    ("url", "hosts", "allowed"),
    [
        ("http://a.test/x", ["a.test"], True),
        ("https://A.TEST./x", ["a.test"], True),
        ("http://a.test:8080/", ["a.test"], False),
        ("http://a.test:8080/", ["a.test:8080"], True),
        ("http://b.a.test/", ["a.test"], False),
        ("http://b.a.test/", ["*.a.test"], True),
        ("http://a.test/", ["*.a.test"], False),
        ("http://evila.test/", ["*.a.test"], False),
        ("http://a.test.evil/", ["a.test"], False),
        ("http://a.test:22/", ["*"], False),
        ("http://bücher.test/ä?ö=ü", ["xn--bcher-kva.test"], True),
        ("http://a.test@evil.test/", ["a.test"], False),
        ("http://evil.test#@a.test/", ["a.test"], False),
        ("http://evil.test\\@a.test/", ["a.test"], False),
        ("http://a.test:99999/", ["*"], False),
        ("http://a.test/\r\nX: y", ["*"], False),
        ("http://[::1", ["*"], False),
        ("http://a..test/", ["*"], False),
        ("a.test/x", ["*"], False),
    ],
)
def test_which_addresses_may_be_asked_for(url: str, hosts: list[str], allowed: bool) -> None:
    if allowed:
        assert check(url, hosts).url.isascii()
    else:
        with pytest.raises(ToolError):
            check(url, hosts)


@given(st.text(max_size=60), st.sampled_from(["", "http://", "https://", "http://a.test/"]))
def test_any_address_is_read_or_refused(text: str, start: str) -> None:
    try:
        target = check(start + text, ("*",))
    except ToolError:
        return
    assert target.url.isascii() and not re.search(r"[\x00-\x20\x7f]", target.url + target.host)


# ------------------------------------------------------------------------------------------------ disk and corpus


def test_a_page_is_kept_on_disk(server: Server, tmp_path: Path) -> None:
    server.answers |= {"/a": redirect("/b"), "/b": page(ARTICLE)}
    first = visitor(server, tmp_path, keep=True)(server.url("/a"), ToolContext())
    server.answers.clear()
    again = visitor(server, tmp_path, keep=True)(server.url("/a"), ToolContext())
    assert again.text == first.text and again.details == first.details and again.metrics["from_disk"] == 1.0
    assert server.seen == ["/a", "/b"]
    for file in (tmp_path / "cache").rglob("*.json"):
        file.write_text("{")  # a damaged file counts as none
    assert "404" in refusal(visitor(server, tmp_path, keep=True), server.url("/a"))


def test_what_is_on_disk_obeys_the_hosts_of_today(server: Server, tmp_path: Path) -> None:
    with serving() as other:
        server.answers["/a"] = redirect(other.url("/b"))
        other.answers["/b"] = page(ARTICLE)
        both = visitor(server, tmp_path, keep=True, allowed_hosts=(server.host, other.host))
        assert "Ada Quill" in both(server.url("/a"), ToolContext()).text
        assert "may be visited" in refusal(visitor(server, tmp_path, keep=True), server.url("/a"))


def test_documents_of_a_corpus_are_read_by_id_or_url(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10), "red").save(tmp_path / "owl.png")
    lines = [
        {"id": "owl", "title": "Owl", "text": "One.", "url": "https://wiki.test/owl", "images": ["owl.png"]},
        {"id": "owl-2", "title": "Owl", "text": "Two.", "url": "https://wiki.test/owl"},
        {"id": "bad", "title": "Bad", "text": "x", "images": ["missing.png"]},
    ]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tool = Visit(Visit.Config(corpus=str(corpus), images=2, cache=str(tmp_path / "cache")))
    by_id, by_url = tool("owl", ToolContext()), tool(" https://wiki.test/owl", ToolContext())
    assert by_id.text == "Owl\n\nOne." and by_url.text == "Owl\n\nOne.\n\nTwo."
    assert by_id.details["id"] == "owl" and [picture.image.getpixel((0, 0)) for picture in by_id.pictures] == [(255, 0, 0)]
    assert refusal(tool, "hen") == "There is no document 'hen'; give the id of a document that a search has found."
    with pytest.raises(DataError, match=r"missing\.png: the picture of document 'bad' cannot be read"):
        tool("bad", ToolContext())


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [({}, "nothing can be visited; set allowed_hosts"), ({"allowed_hosts": ["a"], "images": 1}, "set corpus")],
)
def test_a_wrong_block_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Problems, match=sentence):
        Component.parse({"target": "tools.visit:Visit", **fields})
