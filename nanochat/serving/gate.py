"""What every request passes first: an id, the key, a line in the log. Plain ASGI, so streams pass untouched."""

import hmac
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat import storage
from nanochat.config.serving import ServingConfig
from nanochat.errors import ConfigError
from nanochat.serving.errors import ApiError
from nanochat.serving.metrics import Metrics

LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEYS_VARIABLE = "NANOCHAT_API_KEYS"
PROBES = ("/health", "/ready")
OPEN_PATHS = ("/", *PROBES)
"""What is answered without a key."""
_GIVEN_ID = re.compile(r"[\w.:-]{1,128}")
log = logging.getLogger("nanochat.serving")


def api_keys(config: ServingConfig) -> list[bytes]:
    """Return the keys of the file, or of the environment.

    Raises: ConfigError if others than this machine can reach the endpoint and there are none.
    """
    if config.api_keys_file is not None:
        try:
            with storage.open_read(config.api_keys_file) as file:
                lines = file.read().decode().splitlines()
        except (OSError, UnicodeDecodeError) as err:
            raise ConfigError(f"api_keys_file={config.api_keys_file}: cannot be read ({err}). Name another.") from err
    else:
        lines = os.environ.get(KEYS_VARIABLE, "").split(",")
    keys = [line.strip().encode() for line in lines if line.strip()]
    if not keys and (config.api_keys_file is not None or not config.is_loopback):
        raise ConfigError(
            f"host={config.host}: others could reach the endpoint without a key. Put one into --api-keys-file, or "
            f"set {KEYS_VARIABLE}."
        )
    return keys


class Gate:
    """ASGI middleware: `X-Request-Id`, authorisation, one JSON line for each response."""

    def __init__(self, app: ASGIApp, keys: list[bytes], origins: Sequence[str], metrics: Metrics) -> None:
        self.app, self.keys, self.origins, self.metrics = app, keys, origins, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began_s = time.monotonic()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        id = given if _GIVEN_ID.fullmatch(given) else secrets.token_hex(16)
        facts: dict[str, Any] = {}
        scope["state"] = {**scope.get("state", {}), "request_id": id, "facts": facts}
        root = scope.get("root_path", "")
        path = scope["path"].removeprefix(root) if root else scope["path"]
        if len(path) > 1 and path.endswith("/"):
            path = path.rstrip("/") or "/"
            scope["path"] = root + path
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", id.encode())]
            await send(message)

        try:
            if err := self._refusal(scope["method"], path, headers):
                facts["error"] = err.code
                await JSONResponse(err.body, err.status, err.headers)(scope, receive, send_on)
            else:
                try:
                    await self.app(scope, receive, send_on)
                except ClientDisconnect:
                    facts["error"] = "the client hung up before its body was whole"
                except Exception:  # the edge of a request: it fails alone, and the log says why
                    if status:
                        raise
                    log.exception("request %s failed", id)
                    err = ApiError(500, f"an error that nobody foresaw; the log has it as {id}.")
                    facts["error"] = "internal_error"
                    await JSONResponse(err.body, 500)(scope, receive, send_on)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.responses.labels(route, str(status or 499)).inc()
            if path.startswith("/v1") or status >= 400:
                elapsed_s = round(time.monotonic() - began_s, 4)
                line = {"time": round(time.time(), 3), "request_id": id, "method": scope["method"], "path": path}
                line |= {"status": status or 499, "elapsed_s": elapsed_s, **facts}
                log.info(json.dumps(line, ensure_ascii=False))

    def _refusal(self, method: str, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        if not self.keys and path not in PROBES and not self._is_from_here(headers):
            message = "without API keys only pages and programs of this machine are answered. Set keys."
            return ApiError(403, message, code="foreign_origin")
        if self.keys and not self._may_pass(method, path, headers):
            return ApiError(401, "a valid API key is needed, as `Authorization: Bearer KEY`.", code="invalid_api_key")
        return None

    def _is_from_here(self, headers: dict[bytes, bytes]) -> bool:
        """Tell whether neither Host nor Origin name another machine, as they do when a web page attacks its reader."""
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and origin not in self.origins and urlsplit(origin).hostname not in LOOPBACK:
            return False
        return urlsplit("//" + headers.get(b"host", b"localhost").decode("latin-1")).hostname in LOOPBACK

    def _may_pass(self, method: str, path: str, headers: dict[bytes, bytes]) -> bool:
        if path in OPEN_PATHS or method == "OPTIONS":
            return True
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        # All keys are compared, each in constant time.
        matches = [hmac.compare_digest(key.strip(), known) for known in self.keys]
        return kind.lower() == b"bearer" and any(matches)
