"""What goes wrong to OpenAI's error envelope: `{"error": {"message", "type", "param", "code"}}`."""

from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from pydantic import ValidationError

from nanochat.errors import excerpt

RETRY_AFTER_S = 2
"""What a client that came at a bad time is told to wait."""

_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 404: "invalid_request_error",
    405: "invalid_request_error", 413: "invalid_request_error", 429: "rate_limit_error",
}  # fmt: skip


_PYDANTIC_WORDS = ("str", "int", "constrained-str")
"""What pydantic puts into the place of an error to tell the members of a union apart."""


@dataclass
class ApiError(Exception):
    """An answer that is no success."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None

    @property
    def body(self) -> dict[str, Any]:
        """The envelope."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with it."""
        retried = {"Retry-After": str(RETRY_AFTER_S)} if self.status in (429, 503) else {}
        if self.status in (408, 413):  # the rest of the body is not waited for
            return {"Connection": "close"}
        return retried | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def refused(param: str, rule: str, code: str | None = None) -> ApiError:
    """Return the 400 of a field that breaks a rule."""
    return ApiError(400, f"{param}: {rule}", param, code)


def overloaded(message: str) -> ApiError:
    """Return the 429 of a server that has too much to do."""
    return ApiError(429, f"{message} Try again after the seconds of Retry-After.", code="overloaded")


def http_error(status: int) -> ApiError:
    """Return the error of a plain HTTP status, as an unknown path gives."""
    code = {404: "not_found", 405: "method_not_allowed"}.get(status)
    return ApiError(
        status, f"{HTTPStatus(status).phrase}. The API is under /v1, its description on /openapi.json.", code=code
    )


def invalid_body(err: ValidationError) -> ApiError:
    """Return the 400 of a body that is no JSON, or whose fields are of other types or out of range."""
    found = err.errors(include_url=False, include_context=False)
    # Of a union that takes a text or a list of them, what is wrong within the list, not that it is no text.
    first = max((one for one in found if one["loc"][:1] == found[0]["loc"][:1]), key=lambda one: len(one["loc"]))
    if first["type"] == "json_invalid":
        return ApiError(400, f"body: {first['msg']}. Send one JSON object.", code="invalid_json")
    place = [part for part in first["loc"] if isinstance(part, int) or not ("[" in part or part in _PYDANTIC_WORDS)]
    param = ".".join(str(part) for part in place) or "body"
    return refused(param, f"{first['msg']} (it is {excerpt(first.get('input'))}).", "invalid_value")
