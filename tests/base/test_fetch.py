"""Fetching: what may be asked, where it leads, how much comes back; against real servers on this machine."""

from __future__ import annotations

import ipaddress
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from site_server import PNG, Site, serving

from muco.base.fetch import FetchError, FetchLimits, fetch, is_public

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n"


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as running:
        yield running


@contextmanager
def raw_server(answer: Callable[[socket.socket], None]) -> Iterator[tuple[str, FetchLimits]]:
    """A server that answers each connection by hand, after the request's first bytes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                try:
                    connection.recv(65536)
                    answer(connection)
                except OSError:  # the client hung up, as it should
                    continue

    thread = threading.Thread(target=run)
    thread.start()
    port = listener.getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/a.png", FetchLimits(seconds=20, allowed_addresses=(f"127.0.0.1:{port}",))
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()


# ---------------------------------------------------------------- what comes back


def test_a_file_comes_back_whole_and_nothing_is_told(site, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # nothing listens there
    body = bytes(range(256)) * 3000
    site.pages["/big.png"] = (200, {}, body)
    assert fetch(f"{site.url}/big.png?a=b%20c&d=é#part", site.limits) == body
    [(path, headers)] = site.seen
    assert path == "/big.png?a=b%20c&d=%C3%A9"
    assert headers == {
        "Host": f"127.0.0.1:{site.port}",
        "Accept": "image/*",
        "Accept-Encoding": "identity",
        "User-Agent": "muco",
        "Connection": "close",
    }


@pytest.mark.parametrize("kind", ["image/webp; charset=x", "IMAGE/PNG", "application/octet-stream", None])
def test_types_of_images_are_accepted(site, kind):
    site.pages["/x"] = (200, {"Content-Type": kind}, PNG)
    assert fetch(f"{site.url}/x", site.limits) == PNG


@pytest.mark.parametrize(
    ("page", "says"),
    [
        ((200, {"Content-Type": "text/html"}, b"<html>"), "not an image"),
        ((200, {"Content-Encoding": "gzip"}, PNG), "compressed"),
        ((404, {}, b""), "the server answered 404"),
        ((500, {}, b"secret"), "the server answered 500"),
        ((206, {}, PNG), "the server answered 206"),
        ((302, {"Location": None}, b""), "more than 3 redirects"),  # to itself
        ((304, {}, b""), "the server answered 304"),
    ],
)
def test_other_answers_are_refused(site, page, says):
    site.pages["/x"] = page
    with pytest.raises(FetchError, match=says):
        fetch(f"{site.url}/x", site.limits)


def test_size_is_bounded_announced_or_not(site):
    site.pages["/a.png"] = (200, {}, b"x" * 1001)
    assert len(fetch(f"{site.url}/a.png", replace(site.limits, max_bytes=1001))) == 1001
    with pytest.raises(FetchError, match="more than the 1,000 bytes"):
        fetch(f"{site.url}/a.png", replace(site.limits, max_bytes=1000))

    def endless(connection: socket.socket) -> None:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        while True:
            connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")

    def unannounced(connection: socket.socket) -> None:
        connection.sendall(HEAD + b"\r\n")
        while True:
            connection.sendall(b"x" * 65536)

    for answer in (endless, unannounced):
        with raw_server(answer) as (url, limits), pytest.raises(FetchError, match="more than the 300,000 bytes"):
            fetch(url, replace(limits, max_bytes=300_000))


def test_time_is_bounded_however_slowly_something_comes():
    def slow_body(connection: socket.socket) -> None:
        connection.sendall(HEAD + b"\r\n")
        while True:
            connection.sendall(b"x")
            time.sleep(0.05)

    def slow_head(connection: socket.socket) -> None:
        while True:
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            time.sleep(0.05)

    def silent(connection: socket.socket) -> None:
        connection.recv(1)

    for answer in (slow_body, slow_head, silent):
        start = time.monotonic()
        with raw_server(answer) as (url, limits), pytest.raises(FetchError, match="took longer than 0.5 s"):
            fetch(url, replace(limits, seconds=0.5))
        assert time.monotonic() - start < 10, answer.__name__


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (HEAD + b"Content-Length: 100\r\n\r\nxx", "broke off"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n10\r\nxx", "cannot be fetched"),
        (b"", "cannot be fetched"),
        (b"garbage\r\n\r\n", "cannot be fetched"),
        (HEAD + b"x: y\r\n" * 200 + b"\r\n", "cannot be fetched"),
        (HEAD + b"x: " + b"y" * 70_000 + b"\r\n\r\n", "cannot be fetched"),
        (HEAD + b"Content-Length: -5\r\n\r\n", None),
    ],
)
def test_broken_answers_are_one_sentence(answer, says):
    with raw_server(lambda connection: connection.sendall(answer)) as (url, limits):
        if says is None:
            assert fetch(url, limits) == b""
            return
        with pytest.raises(FetchError, match=says) as caught:
            fetch(url, limits)
    assert "\n" not in str(caught.value)


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(FetchError, match="cannot be fetched"):
        fetch(f"http://127.0.0.1:{port}/", FetchLimits(allowed_addresses=(f"127.0.0.1:{port}",)))


# ---------------------------------------------------------------- redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed_to_a_number(site, status):
    site.redirect("/1", "/2", status)
    site.redirect("/2", f"{site.url}/3?x=ä", status)
    site.redirect("/3", "a.png", status)
    assert fetch(f"{site.url}/1", site.limits) == PNG
    with pytest.raises(FetchError, match="more than 2 redirects"):
        fetch(f"{site.url}/1", replace(site.limits, redirects=2))


@pytest.mark.parametrize(
    "to",
    [
        "http://127.0.0.1:1/",
        "http://169.254.169.254/latest/meta-data/",
        "http://[::1]/",
        "//10.0.0.1/x",
        "file:///etc/passwd",
        "gopher://127.0.0.1/",
        "http://user:password@127.0.0.1/",
        "http://[",
    ],
)
def test_a_redirect_is_checked_like_the_first_url(site, to):
    site.redirect("/1", to)
    with pytest.raises(FetchError, match="public internet|only http|user name|not a URL"):
        fetch(f"{site.url}/1", site.limits)
    assert len(site.seen) == 1


def test_a_redirect_leaves_the_list_of_hosts_no_more_than_a_url(site):
    site.redirect("/1", f"http://localhost:{site.port}/a.png")
    limits = replace(site.limits, hosts=("127.0.0.1",))
    assert fetch(f"{site.url}/a.png", limits) == PNG
    with pytest.raises(FetchError, match="not on the list"):
        fetch(f"{site.url}/1", limits)


# ---------------------------------------------------------------- where it leads


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "10.1.2.3", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.0.1", "169.254.169.254"),
        *("172.16.0.1", "172.31.255.255", "192.0.0.192", "192.168.1.1", "198.18.0.1", "224.0.0.1", "239.1.2.3"),
        *("240.0.0.1", "255.255.255.255", "168.63.129.16", "192.88.99.1", "192.0.2.1", "203.0.113.9"),
        *("::", "::1", "fe80::1", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1", "3fff::1"),
        *("::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::"),
        *("2001:0:7f00:1::", "100::1"),
    ],
)
def test_addresses_that_are_not_public(address):
    assert not is_public(address)
    shown = f"[{address}]" if ":" in address else address
    with pytest.raises(FetchError, match="not on the public internet"):
        fetch(f"http://{shown}/a.png")


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "2606:2800:220:1::1", "2a00:1450:4001::5"])
def test_addresses_that_are_public(address):
    assert is_public(address)


@given(st.ip_addresses())
def test_whatever_python_calls_special_is_not_public(ip):
    special = ip.is_private or ip.is_loopback or ip.is_link_local or ip.is_multicast or ip.is_unspecified
    assert not (is_public(str(ip)) and (special or ip.is_reserved))


@given(st.ip_addresses(v=4), st.sampled_from(["::ffff:0:0", "::", "64:ff9b::", "2002::", "2001::"]))
def test_no_ipv6_form_of_an_ipv4_address_is_public(ip, form):
    shift = 80 if form == "2002::" else 0
    assert not is_public(str(ipaddress.IPv6Address(int(ipaddress.IPv6Address(form)) | int(ip) << shift)))


@pytest.mark.parametrize(
    "host", ["localhost", "127.1", "2130706433", "0x7f.0.0.1", "0177.0.0.1", "LOCALHOST.", "１２７.0.0.1"]
)
def test_names_and_spellings_of_this_machine(site, host):
    with pytest.raises(FetchError, match=r"not on the public internet|unknown host"):
        fetch(f"http://{host}/a.png")
    with pytest.raises(FetchError, match=r"not on the public internet|unknown host"):
        fetch(f"http://{host}:{site.port}/a.png")
    assert site.seen == []


def test_an_allowed_address_is_allowed_at_its_port_only(site):
    with pytest.raises(FetchError, match="not on the public internet"):
        fetch("http://127.0.0.1:80/", site.limits)
    with pytest.raises(FetchError, match="not on the public internet"):
        fetch(f"http://127.0.0.2:{site.port}/a.png", site.limits)


@pytest.fixture
def names(monkeypatch) -> Iterator[dict[str, list[list[str]]]]:
    """A resolver of our own: name -> what it answers the first, second, … time."""
    answers: dict[str, list[list[str]]] = {}

    def getaddrinfo(host: str, port: int, *args: object, **kwargs: object) -> list[tuple]:
        if host not in answers:
            return real(host, port, *args, **kwargs)
        return [(0, 0, 0, "", (address, port)) for address in answers[host].pop(0)]

    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield answers


def test_the_connection_goes_to_the_address_that_was_checked(site, names):
    names["pictures.test"] = [["127.0.0.1"], ["127.0.0.2"]]
    assert fetch(f"http://Pictures.test:{site.port}/a.png", site.limits) == PNG
    assert len(names["pictures.test"]) == 1, "asked once"
    assert site.seen[0][1]["Host"] == f"pictures.test:{site.port}"


def test_a_name_that_changes_its_address_on_a_redirect_is_checked_again(site, names):
    site.redirect("/1", "/a.png")
    names["pictures.test"] = [["127.0.0.1"], ["127.0.0.2"]]
    with pytest.raises(FetchError, match="not on the public internet"):
        fetch(f"http://pictures.test:{site.port}/1", site.limits)
    assert [path for path, _ in site.seen] == ["/1"]


def test_one_closed_address_among_several_closes_the_name(names):
    names["mixed.test"] = [["93.184.216.34", "10.0.0.1"]]
    with pytest.raises(FetchError, match="not on the public internet") as caught:
        fetch("http://mixed.test/a.png")
    assert "10.0.0.1" not in str(caught.value)


def test_the_next_address_is_tried_where_the_first_does_not_answer(site, names):
    names["pictures.test"] = [["127.0.0.9", "127.0.0.1"]]
    limits = replace(site.limits, allowed_addresses=(f"127.0.0.9:{site.port}", *site.limits.allowed_addresses))
    assert fetch(f"http://pictures.test:{site.port}/a.png", limits) == PNG


def test_a_slow_resolver_is_not_waited_for(monkeypatch):
    done = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: done.wait(30) and [])
    start = time.monotonic()
    with pytest.raises(FetchError, match="took longer"):
        fetch("http://pictures.test/a.png", FetchLimits(seconds=0.2))
    done.set()
    assert time.monotonic() - start < 10


def test_ports_and_hosts_can_be_chosen(names):
    names["pictures.test"] = [["93.184.216.34"]]
    with pytest.raises(FetchError, match="only ports 80, 443"):
        fetch("http://pictures.test:22/a.png")
    limits = FetchLimits(hosts=("example.com", "*.images.test"))
    for host in ("pictures.test", "images.test", "badimages.test", "example.com.evil.test", "sub.example.com"):
        with pytest.raises(FetchError, match="not on the list"):
            fetch(f"http://{host}/", limits)
    names |= {"example.com": [["10.0.0.1"]], "a.images.test": [["10.0.0.1"]], "a.b.images.test": [["10.0.0.1"]]}
    for host in ("Example.com", "a.images.test", "a.b.images.test"):
        with pytest.raises(FetchError, match="not on the public internet"):  # listed, and still not private
            fetch(f"http://{host}/", limits)


# ---------------------------------------------------------------- the URL


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "/etc/passwd", "a.png", "", "ftp://example.com/a.png", "data:image/png;base64,AAAA"),
        *("http://", "http:///a.png", "http://exa mple.com/", "http://example.com/a\r\nHost: b", "http://a\\@b/"),
        *("http://example.com:port/", "http://example.com:99999/", "http://[::1", "http://user:pw@example.com/"),
        *(
            "http://[fe80::1%25eth0]/",
            "http://" + "a" * 64 + ".com/",
            "http://a..b/",
            "http://example.com/" + "a" * 9000,
        ),
        "jar:http://example.com/!/",
    ],
)
def test_other_urls_are_one_sentence(url):
    with pytest.raises(FetchError) as caught:
        fetch(url)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


@given(st.text(st.characters(), max_size=40))  # half characters too, which JSON can spell
def test_no_text_is_a_defect(text):
    for url in (text, f"http://[{text}", f"http://127.0.0.1:1/{text}", f"https://{text}@127.0.0.1/"):
        with pytest.raises(FetchError):
            fetch(url, FetchLimits(hosts=("127.0.0.1",)))


def test_messages_hold_no_secret_of_the_url(site):
    with pytest.raises(FetchError) as caught:
        fetch(f"{site.url}/gone.png?signature=secret#secret", site.limits)
    assert "secret" not in str(caught.value) and str(caught.value).startswith(f"{site.url}/gone.png: ")
    with pytest.raises(FetchError) as caught:
        fetch("http://secret:secret@example.com/")
    assert "secret" not in str(caught.value)


# ---------------------------------------------------------------- https


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """A certificate for pictures.test that nobody signed."""
    if not (openssl := shutil.which("openssl")):
        pytest.skip("there is no openssl to make a certificate with")
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    names = "/CN=pictures.test -addext subjectAltName=DNS:pictures.test".split()
    command = f"req -x509 -newkey rsa:2048 -nodes -days 2 -keyout {file} -out {file}.crt -subj".split()
    subprocess.run([openssl, *command, *names], check=True, capture_output=True)
    file.write_text(file.read_text() + Path(f"{file}.crt").read_text())
    return file


@pytest.fixture
def secure(certificate) -> Iterator[Site]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with serving(context) as running:
        yield running


def test_certificates_count(secure, names, certificate, monkeypatch):
    names["pictures.test"] = [["127.0.0.1"]] * 2
    url = f"https://pictures.test:{secure.port}/a.png"
    with pytest.raises(FetchError, match="certificate"):
        fetch(url, secure.limits)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert fetch(url, secure.limits) == PNG
    with pytest.raises(FetchError, match="certificate"):  # of another name
        fetch(f"{secure.url}/a.png", secure.limits)


def test_https_never_becomes_http(secure, site, names, certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    names["pictures.test"] = [["127.0.0.1"]]
    secure.redirect("/1", f"{site.url}/a.png")
    limits = replace(secure.limits, allowed_addresses=secure.limits.allowed_addresses + site.limits.allowed_addresses)
    with pytest.raises(FetchError, match="redirected from https"):
        fetch(f"https://pictures.test:{secure.port}/1", limits)
    assert site.seen == []


def test_a_handshake_that_never_ends_is_given_up():
    def trickle(connection: socket.socket) -> None:
        connection.sendall(b"\x16\x03\x03\x40\x00")  # a record of 16,384 bytes is announced
        while True:
            connection.sendall(b"\x02")
            time.sleep(0.05)

    with raw_server(trickle) as (url, limits), pytest.raises(FetchError, match="took longer"):
        fetch(url.replace("http:", "https:"), replace(limits, seconds=0.5))
