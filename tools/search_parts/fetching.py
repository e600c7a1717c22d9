"""Fetching a page that a model asked for: public pages of allowed hosts and nothing else, in bounded time and size.

A host's name is looked up once; every address must be public, and the connection goes to the address that was checked, so that a
second, different answer of the name server (DNS rebinding) is never asked for. Each redirect is treated like a new request.
Proxies of the environment are not used: they would look the name up themselves.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

from mmrl.messages import ToolError

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")  # a name or IPv4 address, or an IPv6 address, once it is ASCII
_QUERY = "/%:@!$&'()*+,;=~-._?[]"  # signs that stay as they are in a query
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Limits:
    """What may be fetched.

    hosts: 'example.org' (at the ports of http and https), 'example.org:8080', '*.example.org' (any host under it) or '*'.
    types: media types that can be read. allow_private: whether addresses of private networks may be reached.
    """

    hosts: tuple[str, ...]
    types: tuple[str, ...]
    max_bytes: int
    max_redirects: int
    allow_private: bool
    user_agent: str


@dataclass(frozen=True)
class Target:
    """A checked URL."""

    url: str
    scheme: str
    host: str
    port: int
    path: str


@dataclass(frozen=True)
class Fetched:
    """An answer: the URL it came from at last, every URL on the way, its media type, the charset of its header, its content."""

    url: str
    hops: tuple[str, ...]
    media_type: str
    charset: str | None
    body: bytes


def fetch(url: str, limits: Limits, deadline: float) -> Fetched:
    """The page at ``url``, by ``deadline`` (time.monotonic). Raises ToolError with a sentence for the model."""
    hops: list[str] = []
    while True:
        target = check(url, limits.hosts)
        if target.url in hops:
            raise ToolError(f"The page {hops[0]} redirects in a circle.")
        hops.append(target.url)
        if len(hops) > limits.max_redirects + 1:
            raise ToolError(f"The page {hops[0]} redirects more than {limits.max_redirects} times.")
        answer = _request(target, limits, deadline)
        if isinstance(answer, str):
            url = urljoin(target.url, answer)
        else:
            media_type, charset, body = answer
            return Fetched(target.url, tuple(hops), media_type, charset, body)


def check(url: str, hosts: Sequence[str]) -> Target:
    """``url`` taken apart, if it is one that may be asked for. Raises ToolError."""
    if any(sign <= " " or sign in "\\\x7f" for sign in url):
        raise ToolError("The address holds a space, a backslash or a control character; write it percent-encoded.")
    try:
        parts = urlsplit(url)
        port = parts.port or _PORTS.get(parts.scheme, 0)
        host = (parts.hostname or "").rstrip(".")
        host = host if ":" in host else host.encode("idna").decode("ascii")
    except ValueError as error:
        raise ToolError(f"The address {url[:200]} cannot be read.") from error
    if host and not _HOST.fullmatch(host):
        raise ToolError(f"The address {url[:200]} cannot be read.")
    if parts.scheme not in _PORTS or not host:
        raise ToolError("The address must begin with http:// or https:// and a host.")
    if parts.username is not None or parts.password is not None:
        raise ToolError("The address must not hold a user name or a password.")
    if not any(_matches(host, port, pattern) for pattern in hosts):
        where = host if port in _PORTS.values() else f"{host}:{port}"
        raise ToolError(f"The host {where} is not one that may be visited{_known(hosts)}.")
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._") + (f"?{quote(parts.query, safe=_QUERY)}" if parts.query else "")
    place = f"[{host}]" if ":" in host else host
    place += "" if port == _PORTS[parts.scheme] else f":{port}"
    return Target(f"{parts.scheme}://{place}{path}", parts.scheme, host, port, path)


def _matches(host: str, port: int, pattern: str) -> bool:
    name, _, wanted = pattern.lower().rpartition(":") if pattern.rpartition(":")[2].isdigit() else (pattern.lower(), "", "")
    if (str(port) != wanted) if wanted else (port not in _PORTS.values()):
        return False
    return name == "*" or host == name.strip("[]") or (name.startswith("*.") and host.endswith(name[1:]))


def _known(hosts: Sequence[str]) -> str:
    return f"; these may: {', '.join(hosts[:10])}" if hosts else "; there is none that may"


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet: no private, loopback, link-local, multicast or reserved one,
    and no IPv6 address that carries an IPv4 one (mapped: judged by what it carries; 6to4, Teredo, NAT64: never)."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip.sixtofour is not None or ip.teredo is not None or ip.is_site_local:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip.is_loopback or ip.is_link_local)


def addresses(host: str, port: int, allow_private: bool, deadline: float) -> list[str]:
    """The addresses of ``host``, all of which may be reached. Raises ToolError.

    The lookup runs in a thread, since it cannot be interrupted. It understands every form of a number that connecting would
    (2130706433, 0177.0.0.1, 0x7f.1), so what is judged is what would be reached.
    """
    answers: list[list[str] | OSError | UnicodeError] = []

    def look_up() -> None:
        try:
            answers.append([str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)])
        except (OSError, UnicodeError) as error:
            answers.append(error)

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(max(0.0, deadline - time.monotonic()))
    if not answers:
        raise ToolError(f"Looking up the host {host} took too long.")
    found = answers[0]
    if isinstance(found, Exception) or not found:
        raise ToolError(f"There is no host {host}.")
    if not allow_private and not all(is_public(address) for address in found):
        raise ToolError(f"The host {host} is not on the public internet, so it may not be visited.")
    return list(dict.fromkeys(found))


class _Connection(http.client.HTTPConnection):
    """Connects to addresses that were checked; the host's name goes into the request and the certificate's check alone.

    At the deadline the connection is shut, whatever is being waited for: a byte a second cannot go on for ever.
    """

    def __init__(self, target: Target, found: Sequence[str], deadline: float) -> None:
        super().__init__(target.host, target.port)
        self.default_port = _PORTS[target.scheme]
        self._target, self._found, self._deadline = target, found, deadline
        self._timer: threading.Timer | None = None

    def connect(self) -> None:
        raw = self._dial()
        twin = raw.dup()  # TLS takes the socket over, but both are ends of the same connection
        self._timer = threading.Timer(max(0.0, self._deadline - time.monotonic()), _shut, [twin])
        self._timer.daemon = True
        self._timer.twin = twin  # type: ignore[attr-defined]
        self._timer.start()
        self.sock = raw
        if self._target.scheme == "https":
            self.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=self._target.host)

    def end(self) -> None:
        """Unlike ``close``, which http.client calls while the content is still being read."""
        self.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer.twin.close()  # type: ignore[attr-defined]

    def _dial(self) -> socket.socket:
        for address in self._found:
            left = self._deadline - time.monotonic()
            if left <= 0:
                break
            with suppress(OSError):
                return socket.create_connection((address, self._target.port), timeout=left)
        raise ConnectionError


def _shut(twin: socket.socket) -> None:
    with suppress(OSError):
        twin.shutdown(socket.SHUT_RDWR)


def _request(target: Target, limits: Limits, deadline: float) -> str | tuple[str, str | None, bytes]:
    """Where the answer redirects to, or its media type, charset and content. Raises ToolError."""
    found = addresses(target.host, target.port, limits.allow_private, deadline)
    with _sentences(target, deadline), ExitStack() as stack:
        connection = _Connection(target, found, deadline)
        stack.callback(connection.end)
        headers = {
            "User-Agent": limits.user_agent,
            "Accept": ", ".join(limits.types),
            "Accept-Encoding": "gzip",
            "Connection": "close",
        }
        connection.request("GET", target.path, headers=headers)
        response = stack.enter_context(closing(connection.getresponse()))
        if time.monotonic() >= deadline:
            raise TimeoutError  # a header that was cut short looks like a whole one
        if response.status in _REDIRECTS:
            return response.headers.get("Location") or ""
        if response.status != 200:
            raise ToolError(f"The page {target.url} cannot be had: the server answers {response.status} {response.reason[:80]}.")
        media_type = response.headers.get_content_type() if "Content-Type" in response.headers else "none"
        if media_type not in limits.types:
            raise ToolError(f"The page {target.url} is of type {media_type[:80]}, which cannot be read.")
        if int(response.headers.get("Content-Length") or 0) > limits.max_bytes:
            raise ToolError(_too_large(target, limits))
        body = _read(response, target, limits)
        if time.monotonic() >= deadline:
            raise TimeoutError
        return media_type, response.headers.get_content_charset(), body


def _read(response: http.client.HTTPResponse, target: Target, limits: Limits) -> bytes:
    """The content, unpacked. Raises ToolError once it is larger than allowed, packed or unpacked."""
    encoding = (response.headers.get("Content-Encoding") or "identity").lower()
    if encoding not in ("identity", "gzip", "x-gzip", "deflate"):
        raise ToolError(f"The page {target.url} is packed as {encoding[:40]}, which cannot be read.")
    unpack = None if encoding == "identity" else zlib.decompressobj(wbits=47)  # 47: gzip or zlib, as its head says
    body, received = bytearray(), 0
    while chunk := response.read1(_CHUNK):
        received += len(chunk)
        room = limits.max_bytes + 1 - len(body)
        body += chunk[:room] if unpack is None else unpack.decompress(chunk, room)
        if received > limits.max_bytes or len(body) > limits.max_bytes:
            raise ToolError(_too_large(target, limits))
    if unpack is not None and not unpack.eof:
        raise zlib.error("cut short")
    return bytes(body)


def _too_large(target: Target, limits: Limits) -> str:
    return f"The page {target.url} is larger than {limits.max_bytes / 1e6:g} MB, which is too large to be read."


@contextmanager
def _sentences(target: Target, deadline: float) -> Iterator[None]:
    """What may go wrong on the way, as a ToolError."""
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise ToolError(f"The certificate of {target.host} is not valid.") from error
    except (OSError, http.client.HTTPException, zlib.error, ValueError) as error:
        if isinstance(error, TimeoutError) or time.monotonic() >= deadline:
            raise ToolError(f"The page {target.url} took too long to answer.") from error
        raise ToolError(f"The page {target.url} cannot be had: the connection failed.") from error
