"""A server on 127.0.0.1 that misbehaves as a test asks: one fault per request, then well."""

from __future__ import annotations

import hashlib
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MAX_REQUESTS = 2000
"""after which the server answers 410 to everything: a client that never stops asking is stopped"""
HTML = b"<html>please log in</html>"


@dataclass
class Served:
    """What lies under a path, and what goes wrong when it is asked for."""

    data: bytes
    faults: list[str] = field(default_factory=list)
    """of the first requests, in order"""
    always: str = "good"
    """what happens from then on"""
    later: bytes = b""
    """what the file becomes by the fault `changed` or `changed_unasked`"""

    weak: bool = False
    """whether its ETag is a weak one, which no range may rest on"""

    @property
    def etag(self) -> str:
        prefix = "W/" if self.weak else ""
        return f'{prefix}"{hashlib.sha256(self.data).hexdigest()[:16]}"'


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        server: HostileServer = self.server.hostile  # type: ignore[attr-defined]
        path = self.path.partition("?")[0]
        server.log.append((path, self.headers.get("Range"), self.headers.get("If-Range")))
        served = server.files.get(path)
        if served is None or len(server.log) > MAX_REQUESTS:
            self.answer(404 if served is None else 410)
            return
        fault = served.faults.pop(0) if served.faults else served.always
        with suppress(OSError):  # the client has gone
            FAULTS[fault](self, served)

    def answer(self, status: int, **headers: object) -> None:
        """An answer without a body."""
        self.send_response(status)
        for name, value in {"Content-Length": 0, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def span(self, served: Served, *, heed: bool = True) -> tuple[int, bool]:
        """The first byte to send, and whether the answer is a part."""
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        stale = heed and self.headers.get("If-Range", served.etag) != served.etag
        return (0, False) if match is None or stale else (int(match[1]), True)

    def begin(self, served: Served, first: int, part: bool, **headers: object) -> bytes:
        """Send the head of an answer from byte `first` on; returns the body."""
        size = len(served.data)
        if first >= size and part:
            self.answer(416, Content_Range=f"bytes */{size}")
            return b""
        self.send_response(206 if part else 200)
        body = served.data[first:]
        usual: dict[str, object] = {"ETag": served.etag, "Content_Length": len(body)}
        if part:
            usual["Content_Range"] = f"bytes {first}-{size - 1}/{size}"
        for name, value in (usual | headers).items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        return body

    def leave(self) -> None:
        """Close the connection."""
        self.wfile.flush()
        self.close_connection = True


def good(handler: Handler, served: Served) -> None:
    handler.wfile.write(handler.begin(served, *handler.span(served)))


def cut(handler: Handler, served: Served) -> None:
    body = handler.begin(served, *handler.span(served))
    handler.wfile.write(body[: len(body) // 2])
    handler.leave()


def cut_at_once(handler: Handler, served: Served) -> None:
    handler.leave()


def stall(handler: Handler, served: Served) -> None:
    """Half, and then nothing for as long as the server runs."""
    body = handler.begin(served, *handler.span(served))
    handler.wfile.write(body[: len(body) // 2])
    handler.wfile.flush()
    handler.server.hostile.closed.wait()  # type: ignore[attr-defined]
    handler.leave()


def drip(handler: Handler, served: Served) -> None:
    """A byte now and then, each of them in time."""
    for byte in handler.begin(served, *handler.span(served)):
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
        if handler.server.hostile.closed.wait(0.02):  # type: ignore[attr-defined]
            return


def drip_fast(handler: Handler, served: Served) -> None:
    """The whole in five seconds or so."""
    body = handler.begin(served, *handler.span(served))
    for start in range(0, len(body), 400):
        handler.wfile.write(body[start : start + 400])
        handler.wfile.flush()
        if handler.server.hostile.closed.wait(0.01):  # type: ignore[attr-defined]
            return


def no_range(handler: Handler, served: Served) -> None:
    handler.wfile.write(handler.begin(served, 0, False))


def no_range_cut(handler: Handler, served: Served) -> None:
    body = handler.begin(served, 0, False)
    handler.wfile.write(body[: len(body) // 2])
    handler.leave()


def other_range(handler: Handler, served: Served) -> None:
    first, part = handler.span(served)
    handler.wfile.write(handler.begin(served, max(0, first - 1), part))


def corrupt(handler: Handler, served: Served) -> None:
    first, part = handler.span(served)
    body = handler.begin(served, first, part)
    handler.wfile.write(bytes([body[0] ^ 1]) + body[1:])


def longer(handler: Handler, served: Served) -> None:
    """Promises more than it has."""
    first, part = handler.span(served)
    size = len(served.data) - first + 100
    handler.wfile.write(handler.begin(served, first, part, Content_Length=size))
    handler.leave()


def shorter(handler: Handler, served: Served) -> None:
    """A shorter file, in good order."""
    half = Served(served.data[: len(served.data) // 2])
    handler.wfile.write(handler.begin(half, 0, False))


def no_length(handler: Handler, served: Served) -> None:
    first, part = handler.span(served)
    handler.wfile.write(handler.begin(served, first, part, Content_Length=None))
    handler.leave()


def too_much(handler: Handler, served: Served) -> None:
    """More bytes than a part of the file has, in chunks."""
    first, part = handler.span(served)
    body = handler.begin(served, first, part, Content_Length=None, Transfer_Encoding="chunked")
    for block in (body, b"and more"):
        handler.wfile.write(b"%x\r\n%b\r\n" % (len(block), block))
    handler.wfile.write(b"0\r\n\r\n")


def gzip(handler: Handler, served: Served) -> None:
    handler.wfile.write(handler.begin(served, 0, False, Content_Encoding="gzip"))


def captive(handler: Handler, served: Served) -> None:
    """A portal's page in place of the file."""
    handler.wfile.write(handler.begin(Served(HTML), 0, False))


def changed(handler: Handler, served: Served) -> None:
    """From here on it is another file."""
    served.data = served.later
    good(handler, served)


def changed_unasked(handler: Handler, served: Served) -> None:
    """Another file, whose part is sent although If-Range forbids it."""
    served.data = served.later
    handler.wfile.write(handler.begin(served, *handler.span(served, heed=False)))


def redirect(target: str) -> Callable[[Handler, Served], None]:
    return lambda handler, served: handler.answer(302, Location=target.format(handler.path))


def status(code: int, **headers: object) -> Callable[[Handler, Served], None]:
    return lambda handler, served: handler.answer(code, **headers)


FAULTS: dict[str, Callable[[Handler, Served], None]] = {
    "good": good,
    "cut": cut,
    "cut_at_once": cut_at_once,
    "stall": stall,
    "drip": drip,
    "drip_fast": drip_fast,
    "no_range": no_range,
    "no_range_cut": no_range_cut,
    "other_range": other_range,
    "corrupt": corrupt,
    "longer": longer,
    "shorter": shorter,
    "no_length": no_length,
    "too_much": too_much,
    "gzip": gzip,
    "captive": captive,
    "changed": changed,
    "changed_unasked": changed_unasked,
    "404": status(404),
    "500": status(500),
    "503": status(503, Retry_After=0),
    "429": status(429, Retry_After="Sat, 01 Jan 2000 00:00:00 GMT"),
    "416": status(416),
    "come_tomorrow": status(503, Retry_After=86400),
    "nonsense_after": status(503, Retry_After="soon"),
    "to_file": redirect("/file"),
    "to_itself": redirect("{}"),
    "in_a_circle": redirect("{}?again"),
    "to_ftp": redirect("ftp://127.0.0.1/file"),
    "to_https": redirect("https://127.0.0.1/file"),
    "to_disk": redirect("file:///etc/passwd"),
    "to_nowhere": redirect("http://[/"),
}


class HostileServer:
    """The running server; `files` may be changed at any time."""

    def __init__(self, http: ThreadingHTTPServer) -> None:
        self._http = http
        self.url = f"http://127.0.0.1:{http.server_address[1]}"
        self.files: dict[str, Served] = {}
        self.log: list[tuple[str, str | None, str | None]] = []
        """path, Range and If-Range of every request"""
        self.closed = threading.Event()

    def serve(self, path: str, data: bytes, *faults: str, **options: Any) -> str:
        """Put a file under a path; returns its URL."""
        self.files[path] = Served(data, list(faults), **options)
        return self.url + path

    def encrypt(self, key: Path, certificate: Path) -> None:
        """Speak TLS from here on."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self._http.socket = context.wrap_socket(self._http.socket, server_side=True)

    def ranges(self, path: str) -> list[str | None]:
        """The Range header of every request for a path."""
        return [wanted for asked, wanted, _ in self.log if asked == path]


class _Threads(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that are killed


@contextmanager
def hostile_server() -> Iterator[HostileServer]:
    """A server of one block, on a free port of 127.0.0.1."""
    with _Threads(("127.0.0.1", 0), Handler) as http:
        hostile = HostileServer(http)
        http.hostile = hostile  # type: ignore[attr-defined]
        thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield hostile
        finally:
            hostile.closed.set()
            http.shutdown()
            thread.join(5)
