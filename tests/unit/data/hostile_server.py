"""A local file server that does to a client what the internet does: cuts, throttles, lies, forgets what it supports.

Each request for a file takes the next `Fault` of the script; when the script is over, answers are honest.
"""

import hashlib
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Fault:
    status: int | None = None
    """Answer this and no file."""
    retry_after: str | None = None
    cut_after: int | None = None
    """Close the connection after this many bytes of the body."""
    pause_after: int | None = None
    """Send this many bytes, then nothing until `HostileServer.go_on` is set."""
    length_lie: int = 0
    """Added to the true Content-Length."""
    flip_at: int | None = None
    """Invert the byte at this offset of the file."""
    ignores_range: bool = False
    wrong_start: bool = False
    """Answer a range with the one that begins a byte later."""
    change_to: bytes | None = None
    """The file is another one from this request on."""


@dataclass
class Request:
    path: str
    range: str | None
    if_range: str | None
    status: int = 0
    sent: int = 0


@dataclass
class HostileServer:
    files: dict[str, bytes] = field(default_factory=dict)
    script: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    like_hugging_face: bool = False
    """Redirect to a storage server, telling size and SHA-256 on the redirect."""
    sends_etag: bool = True
    sends_length: bool = True
    honours_if_range: bool = True
    go_on: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "HostileServer":
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *exc: object) -> None:
        self.go_on.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def sent(self) -> int:
        return sum(request.sent for request in self.requests)


class _Handler(BaseHTTPRequestHandler):
    owner: HostileServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        owner, path = self.owner, urlsplit(self.path).path  # a proxy is sent whole URLs
        name = path.removeprefix("/storage").lstrip("/")
        if name not in owner.files:
            return self._answer(404, {}, b"")
        if owner.like_hugging_face and not path.startswith("/storage"):
            content = owner.files[name]
            linked = {"X-Linked-Size": len(content), "X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            return self._answer(302, {"Location": f"/storage/{name}", **linked}, b"moved")
        request = Request(self.path, self.headers["Range"], self.headers["If-Range"])
        owner.requests.append(request)
        self._serve(name, request, owner.script.pop(0) if owner.script else Fault())

    def _serve(self, name: str, request: Request, fault: Fault) -> None:
        if fault.change_to is not None:
            self.owner.files[name] = fault.change_to
        content = self.owner.files[name]
        if fault.status:
            request.status = fault.status
            return self._answer(fault.status, {"Retry-After": fault.retry_after} if fault.retry_after else {}, b"no")
        headers: dict[str, object] = {}
        etag = f'"{hashlib.md5(content).hexdigest()}"'
        if self.owner.sends_etag:
            headers["ETag"] = etag
        start, request.status = 0, 200
        found = re.fullmatch(r"bytes=(\d+)-", request.range or "")
        matches = not self.owner.honours_if_range or request.if_range in (None, etag)
        if found and matches and not fault.ignores_range:
            start, request.status = int(found[1]), 206
            if start >= len(content):
                request.status = 416
                return self._answer(416, {"Content-Range": f"bytes */{len(content)}"}, b"")
            start += fault.wrong_start
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = bytearray(content)
        if fault.flip_at is not None:
            body[fault.flip_at] ^= 0xFF
        return self._answer(request.status, headers, bytes(body[start:]), request, fault)

    def _answer(
        self, status: int, headers: dict, body: bytes, request: Request | None = None, fault: Fault | None = None
    ) -> None:
        fault = fault or Fault()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        if self.owner.sends_length or request is None:
            self.send_header("Content-Length", str(len(body) + fault.length_lie))
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            for block in self._blocks(body[: fault.cut_after], fault.pause_after):
                self.wfile.write(block)
                if request:
                    request.sent += len(block)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def _blocks(self, body: bytes, pause_after: int | None):
        if pause_after is not None:
            yield body[:pause_after]
            self.owner.go_on.wait(30)
            body = body[pause_after:]
        for start in range(0, len(body), 1 << 16):
            yield body[start : start + (1 << 16)]
