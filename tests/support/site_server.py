"""A server of fixed pages on this machine, for tests of what is fetched from the web."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from muco.base.fetch import FetchLimits

PNG = b"\x89PNG and so on"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers)))
        status, headers, body = self.server.pages.get(self.path.split("?")[0], (404, {}, b""))
        self.send_response(status)
        for key, value in {"Content-Type": "image/png", "Content-Length": str(len(body)), **headers}.items():
            if value is not None:
                self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


class Site:
    """A server of fixed pages: path -> (status, headers, body)."""

    def __init__(self, server: ThreadingHTTPServer, scheme: str) -> None:
        self.server, self.port = server, server.server_address[1]
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        self.limits = FetchLimits(seconds=20, allowed_addresses=(f"127.0.0.1:{self.port}",))
        self.seen: list[tuple[str, dict[str, str]]] = server.seen
        self.pages: dict[str, tuple[int, dict[str, str | None], bytes]] = server.pages

    def redirect(self, path: str, to: str, status: int = 302) -> None:
        self.pages[path] = (status, {"Location": to}, b"")


@contextmanager
def serving(context: ssl.SSLContext | None = None) -> Iterator[Site]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.seen, server.pages = True, [], {"/a.png": (200, {}, PNG)}
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        server.handle_error = lambda *_: None  # a client that does not trust us hangs up
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield Site(server, "http" if context is None else "https")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
