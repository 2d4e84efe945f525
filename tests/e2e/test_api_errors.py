"""Points 37 to 42 of the API's checklist: errors, keys, limits."""

import contextlib
import json
import logging
import re
import socket
import threading
import time

import pytest
from api_backends import CAPACITY, ScriptedBackend, ids_of
from api_server import HELLO, check_envelope, check_error, serving, wait_until

from nanochat.config.serving import ServingConfig
from nanochat.errors import ConfigError
from nanochat.serving.app import create_app

pytestmark = [pytest.mark.slow, pytest.mark.timeout(40)]
JSON = {"Content-Type": "application/json"}
BODIES = [b"", b"{", b"null", b"[]", b'"a"', b"7", b"\xff\xfe", b"[" * 100_000,
          b'{"model":"sft","messages":[' + b"[" * 5000, b'{"model": NaN}', b'{"model":"\\ud800"}', b"{'model': 1}",
          b"a=b&c=d"]  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_37_bodies_that_are_none_are_400(scripted, path, body):
    check_error(scripted.http.post(path, content=body, headers=JSON), 400)


def test_37_required_fields_are_named(scripted):
    check_error(scripted.post("/v1/chat/completions", {"messages": HELLO}), 400, param="model")
    check_error(scripted.post("/v1/chat/completions", {"model": "sft"}), 400, param="messages")
    assert "at least 1 character" in check_error(scripted.chat(stop=[""]), 400, param="stop.0")
    check_error(scripted.post("/v1/completions", {"model": "sft"}), 400, param="prompt")
    check_error(scripted.post("/v1/chat/completions", {"model": 7, "messages": HELLO}), 400, param="model")
    check_error(scripted.post("/v1/chat/completions", {"model": None, "messages": HELLO}), 400, param="model")


def test_37_types_of_errors_are_openais(scripted):
    for answer, kind in (
        (scripted.chat(temperature=9), "invalid_request_error"),
        (scripted.chat(model="x"), "invalid_request_error"),
        (scripted.get("/nothing"), "invalid_request_error"),
        (scripted.get("/v1/completions"), "invalid_request_error"),
    ):
        assert answer.json()["error"]["type"] == kind
    assert "Allow" in scripted.get("/v1/completions").headers


def test_37_an_error_that_nobody_foresaw_says_nothing_of_the_inside(scripted):
    def load():
        raise RuntimeError("secret detail")

    scripted.backend.load = load
    try:
        for answer in (scripted.chat(), scripted.get("/metrics"), scripted.chat(stream=True)):
            assert "secret" not in check_error(answer, 500)
            assert answer.json()["error"]["type"] == "server_error"
    finally:
        del scripted.backend.load


def test_37_what_is_no_http_is_400_and_the_server_goes_on(scripted):
    for data in (b"GARBAGE\r\n\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\nBad Header\r\n\r\n",
                 b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n"):  # fmt: skip
        with socket.create_connection(("127.0.0.1", scripted.port), timeout=5) as connection:
            connection.sendall(data)
            assert connection.recv(1 << 12).startswith(b"HTTP/1.1 400")
    assert scripted.get("/health").status_code == 200


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    """An endpoint with keys."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("first-key\n\n  second-key  \nschlüssel\n")
    with serving(ScriptedBackend(), api_keys_file=str(file)) as server:
        yield server


def bearer(key: str) -> dict[bytes, bytes]:
    return {b"Authorization": b"Bearer " + key.encode()}


@pytest.mark.parametrize("key", ["first-key", "second-key", "schlüssel"])
def test_38_each_key_opens(locked, key):
    assert locked.get("/v1/models", headers=bearer(key)).status_code == 200
    body = {"model": "sft", "messages": HELLO}
    assert locked.post("/v1/chat/completions", body, headers=bearer(key)).status_code == 200
    assert locked.get("/v1/models", headers={"authorization": f"bearer {key}".encode()}).status_code == 200


@pytest.mark.parametrize(
    "value", [None, b"", b"Bearer", b"Bearer wrong", b"first-key", b"Basic first-key", b"Bearer first-ke",
              b"Bearer first-key2", b"Bearer \xff", b"Bearer first-key,second-key"],
)  # fmt: skip
def test_38_anything_else_is_401(locked, value):
    headers = {} if value is None else {b"Authorization": value}
    for path in (
        "/v1/models",
        "/v1/models/sft",
        "/metrics",
        "/v1/nothing",
        "/tokenizer_info",
        "/docs",
        "/openapi.json",
    ):
        answer = locked.get(path, headers=headers)
        check_error(answer, 401, code="invalid_api_key")
        assert "www-authenticate" in answer.headers
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "//v1/models", "/V1/models"):
        check_error(locked.post(path, {}, headers=headers), 401, code="invalid_api_key")


def test_38_what_needs_no_key(locked):
    for path in ("/health", "/ready", "/"):
        assert locked.get(path).status_code == 200


def test_38_the_version_is_not_told_to_strangers(locked):
    check_error(locked.get("/version"), 401)


def test_38_keys_are_not_told(locked):
    text = json.dumps([locked.get("/v1/models").json(), locked.get("/v1/models", headers=bearer("wrong-key")).json()])
    assert "first-key" not in text
    assert "wrong-key" not in text


def test_38_keys_of_the_environment(monkeypatch):
    monkeypatch.setenv("NANOCHAT_API_KEYS", "one, two")
    with serving(ScriptedBackend()) as server:
        check_error(server.get("/v1/models"), 401)
        assert server.get("/v1/models", headers=bearer("two")).status_code == 200


def test_38_no_keys_on_loopback_only(monkeypatch, tmp_path):
    monkeypatch.delenv("NANOCHAT_API_KEYS", raising=False)
    for host in ("0.0.0.0", "10.0.0.1", "::", "example.org"):
        with pytest.raises(ConfigError, match="key"):
            create_app(ScriptedBackend(), ServingConfig(host=host))
    for host in ("127.0.0.1", "localhost", "::1"):
        create_app(ScriptedBackend(), ServingConfig(host=host))
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(ConfigError):
        create_app(ScriptedBackend(), ServingConfig(api_keys_file=str(tmp_path / "empty")))


@pytest.mark.parametrize("is_stream", [False, True])
def test_39_overload_is_429_with_retry_after(scripted, is_stream):
    scripted.backend.waiting = 4
    check_error(scripted.chat(stream=is_stream), 429)
    scripted.backend.waiting = 3
    assert scripted.chat(stream=is_stream).status_code == 200
    check_error(scripted.chat(stream=is_stream, n=2), 429)


def test_39_who_waits_too_long_is_sent_away():
    with serving(ScriptedBackend(), first_token_s=0.2) as server:
        server.backend.script.stalls_at = 0
        for is_stream in (False, True):
            check_error(server.chat(stream=is_stream), 429)
        wait_until(lambda: server.backend.running == 0, 2)


def test_39_a_dead_engine_is_503_with_retry_after(scripted):
    scripted.backend.is_healthy = False
    check_error(scripted.chat(), 503)
    check_error(scripted.chat(stream=True), 503)
    assert scripted.get("/v1/models").status_code == 200


def test_39_a_small_cache_refuses_long_prompts_before_the_answers_are_too_many():
    with serving(ScriptedBackend(), max_running=4, max_waiting=4) as server:  # 1,024 tokens, so 1,024 may be open
        server.backend.script.ids, server.backend.script.token_s = ids_of("a" * 60), 0.02
        long = [{"role": "user", "content": "b" * 140}]
        statuses: list[int] = []
        threads = [threading.Thread(target=lambda: statuses.append(server.chat(long).status_code)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sorted(statuses) == [200] * 7 + [429]
        assert server.chat(long).status_code == 200, "what has ended makes room"
    longer = [{"role": "user", "content": "c" * 200}]
    with serving(ScriptedBackend(), max_running=64, max_waiting=0) as server:
        assert server.chat(longer).status_code == 200, "alone it always comes in"


def test_39_a_real_engine_refuses_what_is_too_much_and_serves_the_rest():
    from api_backends import MAX_RUNNING, engine_backend

    backend = engine_backend()
    statuses: list[int] = []
    with serving(backend, max_waiting=4, max_running=MAX_RUNNING) as server:

        def ask() -> None:
            answer = server.chat(max_tokens=100, min_tokens=100)
            statuses.append(answer.status_code)
            if answer.status_code != 200:
                check_error(answer, 429)

        threads = [threading.Thread(target=ask) for _ in range(60)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    backend.close()
    assert len(statuses) == 60, "an assertion failed in a thread"
    assert set(statuses) == {200, 429}
    assert MAX_RUNNING <= statuses.count(200) <= MAX_RUNNING + 4


def test_40_request_ids_are_echoed_or_made(scripted):
    given = scripted.get("/health", headers={"X-Request-Id": "mine-1"})
    assert given.headers.get_list("x-request-id") == ["mine-1"]
    made = [scripted.get("/health").headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1]
    for headers in ({"X-Request-Id": "a" * 5000}, {"X-Request-Id": "a b<script>"}, {"X-Request-Id": ""}):
        answer = scripted.get("/health", headers=headers)
        assert answer.headers["x-request-id"] not in headers.values()
    stream = scripted.http.post(
        "/v1/chat/completions",
        json={"model": "sft", "messages": HELLO, "stream": True},
        headers={"X-Request-Id": "s-2"},
    )
    assert stream.headers["x-request-id"] == "s-2"
    assert scripted.get("/nothing", headers={"X-Request-Id": "e-3"}).headers["x-request-id"] == "e-3"


def test_40_the_log_has_the_id_and_no_contents(scripted, caplog):
    caplog.set_level(logging.INFO, logger="nanochat.serving")
    scripted.backend.script.ids = ids_of("an answer of gold")
    messages = [{"role": "user", "content": "a question of silver"}]
    for is_stream in (False, True):
        scripted.http.post("/v1/chat/completions", json={"model": "sft", "messages": messages, "stream": is_stream},
                           headers={"X-Request-Id": f"log-{is_stream}"})  # fmt: skip
    scripted.post("/v1/chat/completions", {"model": "sft", "messages": [{"role": "x", "content": "silver"}]})
    wait_until(lambda: "log-True" in caplog.text, 2)
    assert "log-False" in caplog.text
    assert "silver" not in caplog.text
    assert "gold" not in caplog.text
    lines = [json.loads(record.getMessage()) for record in caplog.records if "log-" in record.getMessage()]
    for line in lines:
        assert line["status"] == 200
        assert line["completion_tokens"] == len("an answer of gold") + 1


def test_40_the_log_says_which_answer_it_was_and_why_one_was_refused(scripted, caplog):
    caplog.set_level(logging.INFO, logger="nanochat.serving")
    id = scripted.chat().json()["id"]
    scripted.chat(temperature=9)
    scripted.chat(model="x")
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    assert [(line["status"], line.get("error"), line.get("param"), line.get("id")) for line in lines] == [
        (200, None, None, id),
        (400, "invalid_value", "temperature", None),
        (404, "model_not_found", "model", None),
    ]


def test_40_a_client_that_hangs_up_within_its_body_is_no_error_of_the_server(scripted, caplog):
    caplog.set_level(logging.INFO, logger="nanochat.serving")
    with socket.create_connection(("127.0.0.1", scripted.port), timeout=5) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    wait_until(lambda: caplog.records, 5)
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert json.loads(record.getMessage())["status"] == 499


def test_40_contents_are_logged_if_one_asks_for_it(caplog):
    caplog.set_level(logging.INFO, logger="nanochat.serving")
    with serving(ScriptedBackend(), log_contents=True) as server:
        server.chat([{"role": "user", "content": "a question of silver"}])
        wait_until(lambda: "silver" in caplog.text, 2)
    assert "hello" in caplog.text


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize"])
def test_41_bodies_that_are_too_large_are_413(native, path):
    data = json.dumps(
        {"model": "sft", "prompt": "a" * 300_000, "messages": [{"role": "user", "content": "a" * 300_000}]}
    )
    check_error(native.http.post(path, content=data, headers=JSON), 413)

    def pieces():
        for begin in range(0, len(data), 10_000):
            yield data[begin : begin + 10_000].encode()

    check_error(native.http.post(path, content=pieces(), headers=JSON), 413)
    assert native.get("/health").status_code == 200


def test_41_an_announced_size_is_enough_to_be_refused(native):
    with socket.create_connection(("127.0.0.1", native.port), timeout=5) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n{")
        assert connection.recv(1 << 12).startswith(b"HTTP/1.1 413")


def test_41_too_many_messages_or_answers_or_prompts(native):
    turns = [{"role": ("user", "assistant")[number % 2], "content": "a"} for number in range(51)]
    check_error(native.chat(turns), 400, param="messages")
    check_error(native.chat(n=5), 400, param="n")
    check_error(native.chat(n=10**9), 400, param="n")
    check_error(native.complete(["a"] * 5), 400)
    check_error(native.complete(["a"] * 3, n=2), 400)


def test_41_more_tokens_than_the_model_has_are_refused(native):
    for name in ("max_tokens", "max_completion_tokens"):
        check_error(native.chat(**{name: CAPACITY + 1}), 400, param=name)
        check_error(native.chat(**{name: 10**30}), 400, param=name)
    check_error(native.complete(max_tokens=CAPACITY + 1), 400, param="max_tokens")


def test_41_a_limit_that_does_not_fit_behind_the_prompt_is_never_passed(native):
    answer = native.chat([{"role": "user", "content": "a" * 200}], max_tokens=CAPACITY, ignore_eos=True, seed=1)
    if answer.status_code == 400:
        check_error(answer, 400)
    else:
        assert answer.json()["usage"]["total_tokens"] == CAPACITY
        assert answer.json()["choices"][0]["finish_reason"] == "length"


def test_41_a_body_that_never_comes_is_408_and_the_connection_closes(native, monkeypatch):
    monkeypatch.setattr("nanochat.serving.app.BODY_TIMEOUT_S", 0.2)
    with socket.create_connection(("127.0.0.1", native.port), timeout=5) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        answer = b""
        while data := connection.recv(1 << 12):
            answer += data
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"body_timeout" in answer


def test_41_a_body_that_never_comes_does_not_stop_others(native):
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", native.port), timeout=5))
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        began_s = time.monotonic()
        assert native.chat(max_tokens=2).status_code == 200
        assert time.monotonic() - began_s < 2


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("name", ["other", "", "SFT", "sft/", "a" * 10_000, "<script>", "\u0000"])
def test_42_a_model_that_is_not_here_is_404(scripted, path, name):
    body = {"model": name, "messages": HELLO, "prompt": "a"}
    message = check_error(scripted.post(path, body), 404, code="model_not_found")
    assert len(message) < 500
    assert scripted.post(path, {**body, "stream": True}).status_code == 404
    assert re.search("model", message)
    check_envelope(scripted.post(path, body).json())
