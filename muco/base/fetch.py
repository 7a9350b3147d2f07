"""Fetches one file over http(s) from an untrusted URL, without opening this network to whoever wrote the URL.

A name is resolved once, all its addresses are checked, and the connection goes to a checked address, so that a name
cannot change its address in between. Redirects are checked alike. Only the request is sent: no cookies, credentials or
referrer. Proxies of the environment are not used.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from muco.errors import MucoError

PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
BINARY = ("application/octet-stream", "binary/octet-stream")  # what object storage says of anything
CHUNK = 1 << 16

# Addresses that lead elsewhere than to the public internet, besides those that `is_global` knows in every version of
# Python: cloud metadata on public addresses, relays and translators that reach private IPv4 addresses behind them.
CLOSED = [
    ipaddress.ip_network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",  # Azure's host agent
        *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),  # Teredo, ORCHID, examples, 6to4
    )
]
GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")  # outside are mapped and translated IPv4, local and multicast addresses
PLAIN = "/%:@!$&'()*+,;=~-._"  # characters of a path that stay as they are
NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")  # of a host, as it is looked up
UNSAFE = re.compile(r"[\x00-\x20\x7f\\]")  # parsers disagree about them


class FetchError(MucoError):
    """A URL was not fetched: it is not allowed, cannot be reached, too large, too slow or not an image."""


class UnreachableError(FetchError):
    """No answer: unknown host, no connection, or it took too long."""


def plain_host(text: str) -> str | None:
    """A host name or an address as it is compared: in lower case, in ASCII; None if the text is neither."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        pass
    try:
        name = text.rstrip(".").lower().encode("idna").decode()
    except UnicodeError:
        return None
    return name if NAME.fullmatch(name) else None


def _listed(text: str) -> str:
    """A host of a list, "example.com" or "*.example.com"."""
    star = "*." if text.startswith("*.") else ""
    name = plain_host(text.removeprefix("*."))
    if name is None:
        raise FetchError(f"host {text!r}: write a name as example.com, or *.example.com for those under it")
    return star + name


def _address(text: str) -> tuple[str, int]:
    """The address of "address:port" as sockets write it, and the port."""
    address, _, port = text.rpartition(":")
    try:
        ip = ipaddress.ip_address(address.removeprefix("[").removesuffix("]"))
        if not 0 < int(port) < 1 << 16 or (ip.version == 6) != address.startswith("["):
            raise ValueError
    except ValueError:
        raise FetchError(f"address {text!r}: write address and port, such as 10.0.0.7:9000 or [fd00::7]:9000") from None
    return f"[{ip}]" if ip.version == 6 else str(ip), int(port)


@dataclass(frozen=True)
class FetchLimits:
    """What may be fetched.

    Args:
        max_bytes: Of one file.
        seconds: For everything together: name, redirects, body.
        redirects: How many are followed; from https never to http.
        hosts: Names that may be asked, "example.com" or "*.example.com" for those under it; None: every public one.
        ports: That may be asked.
        content_types: Beginnings of accepted types; a file without one is accepted too.
        allowed_addresses: "address:port", such as "10.0.0.7:9000" or "[fd00::7]:9000", that may be asked although they
            are not public, or their port is none of ``ports``.
    Raises:
        FetchError: If a host or an address is written in another way, so that it would never match.
    """

    max_bytes: int = 20 * 2**20
    seconds: float = 10.0
    redirects: int = 3
    hosts: tuple[str, ...] | None = None
    ports: tuple[int, ...] = (80, 443)
    content_types: tuple[str, ...] = ("image/", *BINARY)
    allowed_addresses: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.hosts is not None:
            object.__setattr__(self, "hosts", tuple(map(_listed, self.hosts)))
        addresses = tuple(map(_address, self.allowed_addresses))
        object.__setattr__(self, "allowed_addresses", tuple(f"{address}:{port}" for address, port in addresses))

    @property
    def address_hosts(self) -> tuple[str, ...]:
        """The allowed addresses as hosts of URLs."""
        return tuple(address.strip("[]") for address, _ in map(_address, self.allowed_addresses))


def fetch(url: str, limits: FetchLimits = FetchLimits()) -> bytes:
    """The bytes behind an http(s) URL; nothing is said about whether they are a sound image.

    Raises:
        FetchError: If the URL may not be fetched, or cannot be within the limits. The message shows the URL without
            its query, which may hold a signature, and no address.
    """
    name, deadline = _shown(url), time.monotonic() + limits.seconds
    try:
        for _ in range(limits.redirects + 1):
            parts = _checked_url(url, limits)
            with _response(parts, limits, deadline) as response:
                if response.status not in REDIRECTS:
                    return _body(response, limits, deadline)
                location = response.getheader("Location") or ""
            try:
                url = urljoin(url, location.encode("latin-1").decode("utf-8", "replace"))
            except ValueError as error:
                raise FetchError("redirected to what is not a URL") from error
            if parts.scheme == "https" and not url.lower().startswith("https:"):
                raise FetchError("redirected from https to something else")
    except FetchError as error:
        raise type(error)(f"{name}: {error}") from None
    except (OSError, http.client.HTTPException) as error:
        late = isinstance(error, TimeoutError) or time.monotonic() >= deadline
        reason = _too_slow(limits) if late else f"cannot be fetched ({_what_failed(error)})"
        raise UnreachableError(f"{name}: {reason}") from error
    raise FetchError(f"{name}: more than {limits.redirects} redirects")


def is_public(address: str) -> bool:
    """Whether an address, e.g. "93.184.216.34", belongs to the public internet and to nothing behind a translator."""
    ip = ipaddress.ip_address(address)
    closed = (ip.version == 6 and ip not in GLOBAL_IPV6) or any(ip in network for network in CLOSED)
    return ip.is_global and not ip.is_multicast and not ip.is_reserved and not closed


def without_query(url: str) -> str:
    """A URL to show: without its query, which may hold a signature, and without user and password."""
    return re.sub(r"(?<=//)[^/@]*@", "", re.split(r"[?#]", url, maxsplit=1)[0])


def _shown(url: str) -> str:
    """The same, not longer than a line."""
    plain = "".join(c if c.isprintable() else "�" for c in without_query(url))
    return plain if len(plain) <= 80 else plain[:77] + "…"


def _checked_url(url: str, limits: FetchLimits) -> SplitResult:
    if UNSAFE.search(url) or len(url) > 8192:
        raise FetchError("not a URL that can be fetched; write blanks as %20")
    try:
        parts = urlsplit(url)
        port, host = parts.port, (parts.hostname or "").rstrip(".").lower()
        host = (plain_host(host) or host) if ":" in host else host.encode("idna").decode()
        path, query = quote(parts.path or "/", safe=PLAIN), quote(parts.query, safe=PLAIN + "?")
    except ValueError as error:  # a port that is not a number, brackets that do not close, half a character …
        raise FetchError(f"not a URL that can be fetched ({_what_failed(error)})") from error
    if parts.scheme not in PORTS:
        raise FetchError("only http and https URLs are fetched")
    if not host or "%" in host:
        raise FetchError("the URL names no host")
    if parts.username is not None or parts.password is not None:
        raise FetchError("a URL with a user name or password is not fetched")
    names = [host] if limits.hosts is None else limits.hosts
    if host not in names and not any(name.startswith("*.") and host.endswith(name[1:]) for name in names):
        raise FetchError("this host is not on the list of those that may be asked")
    address = f"[{host}]" if ":" in host else host
    return SplitResult(parts.scheme, address if port is None else f"{address}:{port}", path, query, "")


def _resolved(host: str, port: int, limits: FetchLimits, deadline: float) -> list[str]:
    """All addresses of a host, if every one of them may be asked."""
    answers: SimpleQueue[list[str] | OSError] = SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answers.put(list(dict.fromkeys(str(answer[4][0]).split("%")[0] for answer in found)))
        except (OSError, UnicodeError) as error:
            answers.put(error if isinstance(error, OSError) else OSError("not a name"))

    # The system's resolver takes no time limit; a thread that still waits for it ends with its answer.
    threading.Thread(target=ask, name="muco-resolve", daemon=True).start()
    try:
        answer = answers.get(timeout=max(0.0, deadline - time.monotonic()))
    except Empty:
        raise UnreachableError(_too_slow(limits)) from None
    if isinstance(answer, OSError) or not answer:
        raise UnreachableError("unknown host")
    for address in answer:
        shown = f"[{address}]" if ":" in address else address
        if f"{shown}:{port}" in limits.allowed_addresses:
            continue
        if not is_public(address):
            raise FetchError("this host is not on the public internet")
        if port not in limits.ports:
            raise FetchError(f"only ports {', '.join(map(str, limits.ports))} are asked")
    return answer


@contextmanager
def _response(parts: SplitResult, limits: FetchLimits, deadline: float) -> Iterator[http.client.HTTPResponse]:
    host, port = parts.hostname or "", parts.port or PORTS[parts.scheme]
    addresses = _resolved(host, port, limits, deadline)
    for address in addresses:
        try:
            sock = socket.create_connection((address, port), timeout=max(0.001, deadline - time.monotonic()))
            break
        except OSError:
            if address == addresses[-1]:
                raise

    def shut() -> None:
        with suppress(OSError):  # closed meanwhile
            socket.socket.shutdown(sock, socket.SHUT_RDWR)

    # A server that sends a byte now and then never runs into a socket's timeout: at the deadline the socket is shut.
    clock = threading.Timer(max(0.0, deadline - time.monotonic()), shut)
    clock.daemon = True
    clock.start()
    try:
        if parts.scheme == "https":
            context = ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
            sock.do_handshake()  # now that the clock knows the new socket
        connection = http.client.HTTPConnection(host, port)
        connection.default_port = PORTS[parts.scheme]
        connection.auto_open = 0  # it has a connected socket, and never opens another one
        connection.sock = sock
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        headers = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "muco", "Connection": "close"}
        connection.request("GET", target, headers=headers)
        with connection.getresponse() as response:
            yield response
    finally:
        clock.cancel()
        sock.close()


def _body(response: http.client.HTTPResponse, limits: FetchLimits, deadline: float) -> bytes:
    if response.status != 200:
        raise FetchError(f"the server answered {response.status}")
    kind = (response.getheader("Content-Type") or "").split(";")[0].strip().lower()
    if kind and not kind.startswith(limits.content_types):
        raise FetchError("the answer is not an image but something else, by its Content-Type")
    if (response.getheader("Content-Encoding") or "identity").lower() != "identity":
        raise FetchError("the answer is compressed, which was not asked for")
    announced, parts, total = response.length, [], 0
    while total <= limits.max_bytes and (announced is None or announced <= limits.max_bytes):
        chunk = response.read(CHUNK)
        if not chunk:
            break
        total += len(chunk)
        parts.append(chunk)
    if max(total, announced or 0) > limits.max_bytes:
        raise FetchError(f"more than the {limits.max_bytes:,} bytes that are read of one file")
    if time.monotonic() >= deadline:  # cut by the clock, an answer without a length looks complete
        raise UnreachableError(_too_slow(limits))
    if announced is not None and total < announced:
        raise FetchError("the connection broke off")
    return b"".join(parts)


def _too_slow(limits: FetchLimits) -> str:
    return f"took longer than {limits.seconds:g} s"


def _what_failed(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return "its certificate or encryption is not right"
    return getattr(error, "strerror", None) or type(error).__name__
