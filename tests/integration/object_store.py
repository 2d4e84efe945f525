"""An S3 on loopback: moto's server, and before it a front that is slow and fails as often as a test wants."""

import contextlib
import http.client
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3

from nanochat.cluster.ingress import free_ports

BUCKET = "runs"


class FlakyS3:
    """What stands before the store: of `failing` of the requests 503 Slow Down, before all of them a wait."""

    def __init__(self, port: int) -> None:
        self.store_port, self.failing, self.wait_s = port, 0.0, 0.0
        self.draw, self.refused, self.served = random.Random(0), 0, 0
        front = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                time.sleep(front.wait_s)
                if front.draw.random() < front.failing:
                    front.refused += 1
                    status, headers, answer = 503, {}, b"<Error><Code>SlowDown</Code></Error>"
                else:
                    front.served += 1
                    store = http.client.HTTPConnection("127.0.0.1", front.store_port, timeout=30)
                    store.request(self.command, self.path, body, dict(self.headers))
                    response = store.getresponse()
                    status, headers, answer = response.status, dict(response.getheaders()), response.read()
                    store.close()
                self.send_response(status)
                length = headers.get("Content-Length") if self.command == "HEAD" else None
                skipped = ("content-length", "transfer-encoding", "connection", "date", "server")
                for name, value in headers.items():
                    if name.lower() not in skipped:
                        self.send_header(name, value)
                self.send_header("Content-Length", length or str(len(answer)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

            def log_message(self, *arguments) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """What S3's clients read."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server.server_port}", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        }  # fmt: skip


@contextlib.contextmanager
def flaky_s3() -> Iterator[FlakyS3]:
    """A store with an empty bucket for the time of the block; this process and what it starts find it."""
    (port,) = free_ports(1)
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    front = FlakyS3(port)
    before = {name: os.environ.get(name) for name in front.environment}
    os.environ.update(front.environment)
    try:
        _wait_for(port)
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield front
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        front.server.shutdown()
        server.terminate()
        server.wait(10)


def _wait_for(port: int, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(OSError):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/moto-api/")
            connection.getresponse().read()
            return
        assert time.monotonic() < deadline, "moto's server does not answer"
        time.sleep(0.1)
