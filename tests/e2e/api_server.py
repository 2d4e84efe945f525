"""The real endpoint on a loopback port, and a client that is strict about what it reads."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn

from nanochat.config.serving import ServingConfig
from nanochat.serving.app import create_app

HELLO = [{"role": "user", "content": "hello"}]


@dataclass
class Server:
    url: str
    """Without a slash at its end."""
    backend: Any
    app: Any
    http: httpx.Client

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(path, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def chat(self, messages: Any = None, **body: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"model": "sft", "messages": messages or HELLO, **body})

    def complete(self, prompt: Any = "hello", **body: Any) -> httpx.Response:
        return self.post("/v1/completions", {"model": "pretrain", "prompt": prompt, **body})

    def chat_stream(self, messages: Any = None, **body: Any) -> "Stream":
        return self.stream("/v1/chat/completions", {"model": "sft", "messages": messages or HELLO, **body})

    def complete_stream(self, prompt: Any = "hello", **body: Any) -> "Stream":
        return self.stream("/v1/completions", {"model": "pretrain", "prompt": prompt, **body})

    def stream(self, path: str, body: dict[str, Any]) -> "Stream":
        with self.http.stream("POST", path, json={"stream": True, **body}) as answer:
            raw = b"".join(answer.iter_raw())
        assert answer.status_code == 200, raw
        return Stream(answer.headers, raw)


@dataclass
class Stream:
    """A stream that has ended."""

    headers: httpx.Headers
    raw: bytes
    chunks: list[dict[str, Any]] = field(default_factory=list)
    is_done: bool = False
    """Whether [DONE] was the last event."""

    def __post_init__(self) -> None:
        for event in events_of(self.raw):
            assert not self.is_done, "something came after [DONE]"
            if event == "[DONE]":
                self.is_done = True
            else:
                self.chunks.append(json.loads(event))

    def choices(self, index: int = 0) -> list[dict[str, Any]]:
        return [choice for chunk in self.chunks for choice in chunk["choices"] if choice["index"] == index]

    def text(self, index: int = 0) -> str:
        return "".join(text_of(choice) for choice in self.choices(index))

    def token_ids(self, index: int = 0) -> list[int]:
        return [id for choice in self.choices(index) for id in choice.get("token_ids") or ()]

    def finish(self, index: int = 0) -> str:
        """The one finish reason, which the choice's last chunk has."""
        reasons = [choice["finish_reason"] for choice in self.choices(index)]
        assert all(reason is None for reason in reasons[:-1]), reasons
        return reasons[-1]

    def parts(self, index: int = 0) -> list[dict[str, str]]:
        """The parts put together again."""
        parts: list[dict[str, str]] = []
        for choice in self.choices(index):
            for part in choice["delta"].get("parts") or ():
                if part.get("continues"):
                    assert parts[-1]["type"] == part["type"]
                    parts[-1]["text"] += part["text"]
                else:
                    parts.append({"type": part["type"], "text": part["text"]})
        return parts


def text_of(choice: dict[str, Any]) -> str:
    return choice["text"] if "text" in choice else choice.get("delta", choice.get("message", {})).get("content") or ""


def events_of(raw: bytes) -> list[str]:
    """The data of server-sent events; everything else than `data: X`, comments and blank lines is an error."""
    assert raw.endswith(b"\n\n"), raw[-80:]
    assert b"\r" not in raw
    events = []
    for block in raw[:-2].split(b"\n\n"):
        lines = [line for line in block.decode("utf-8").split("\n") if not line.startswith(":")]
        if lines:
            assert len(lines) == 1, block
            assert lines[0].startswith("data: "), block
            events.append(lines[0].removeprefix("data: "))
    return events


def check_error(answer: httpx.Response, status: int, *, param: str | None = None, code: str | None = None) -> str:
    """An error in OpenAI's envelope; returns its message."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].split(";")[0] == "application/json"
    assert answer.headers["x-request-id"]
    error = check_envelope(answer.json())
    if param is not None:
        assert error["param"] is not None, error
        assert error["param"].startswith(param), error
    if code is not None:
        assert error["code"] == code, error
    if status in (429, 503):
        assert int(answer.headers["retry-after"]) >= 1
    return error["message"]


def check_envelope(body: Any) -> dict[str, Any]:
    assert set(body) == {"error"}, body
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}, error
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert error["type"]
    assert error["param"] is None or isinstance(error["param"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    return error


@contextlib.contextmanager
def serving(backend: Any, **fields: Any) -> Iterator[Server]:
    app = create_app(backend, ServingConfig(**{"event_interval_s": 0.0, **fields}))
    runner = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical"))
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    wait_until(lambda: runner.started or not thread.is_alive())
    url = f"http://127.0.0.1:{runner.servers[0].sockets[0].getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=10, trust_env=False) as http:
            yield Server(url, backend, app, http)
    finally:
        runner.should_exit = runner.force_exit = True
        thread.join(10)


def wait_until(condition: Callable[[], bool], timeout_s: float = 10) -> float:
    """Wait for something to become so, and return the seconds that it took."""
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < timeout_s, "it has not become so"
        time.sleep(0.005)
    return time.monotonic() - began_s


class Relay:
    """Passes connections on to a server, whose answers it cuts into pieces of `size` bytes, or sends all at once."""

    def __init__(self, port: int, size: int | None) -> None:
        self.size, self._to = size, port
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                server = socket.create_connection(("127.0.0.1", self._to))
                threading.Thread(target=self._forward, args=(client, server), daemon=True).start()
                threading.Thread(target=self._back, args=(server, client), daemon=True).start()

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                # One answer to a connection, so that its end is seen.
                server.sendall(data.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))

    def _back(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, server:
            if self.size is None:
                client.sendall(b"".join(iter(lambda: server.recv(1 << 16), b"")))
                return
            while data := server.recv(1 << 16):
                for begin in range(0, len(data), self.size):
                    client.send(data[begin : begin + self.size])
