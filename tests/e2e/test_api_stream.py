"""Points 27 to 36 of the API's checklist: streams, event by event, and how they end."""

import json
import socket
import time

import httpx
import openai
import pytest
from api_backends import END, ScriptedBackend, ids_of
from api_server import HELLO, Relay, Stream, check_envelope, check_error, events_of, serving, text_of, wait_until

from nanochat.inference.requests import Event
from nanochat.serving.backend import BackendDeadError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(40)]
USAGE = {"stream_options": {"include_usage": True}}
TEXTS = [
    "hello",
    "",
    "日本語の文章です。",
    "👩‍👩‍👧‍👦 and 🏳️‍🌈🇯🇵",
    "é\u0301\u200d",
    "a\n\ndata: [DONE]\n\n: b\r\n",
    "\u2028\u0085\u0000",
    "🙂" * 30,
]


def raw_stream(port: int, body: dict, path: str = "/v1/chat/completions") -> tuple[socket.socket, bytes]:
    """Send a request by hand; returns the socket and the first bytes of the answer."""
    data = json.dumps({"model": "sft", "messages": HELLO, "stream": True, **body}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(head.encode() + data)
    return connection, connection.recv(1 << 16)


def broken(server, **body) -> tuple[int, bytes, bool]:
    """Read a stream that may break off: status, what came, and whether it ended cleanly."""
    raw = b""
    with server.http.stream("POST", "/v1/chat/completions",
                            json={"model": "sft", "messages": HELLO, "stream": True, **body}) as answer:  # fmt: skip
        try:
            for data in answer.iter_raw():
                raw += data
        except httpx.RemoteProtocolError:
            return answer.status_code, raw, False
    return answer.status_code, raw, True


def test_27_headers_of_a_stream(scripted):
    headers = scripted.chat_stream().headers
    assert headers["content-type"].split(";")[0].strip() == "text/event-stream"
    assert "no-cache" in headers["cache-control"]
    assert headers["x-accel-buffering"] == "no"
    assert headers["x-request-id"]
    assert "content-length" not in headers
    assert "content-encoding" not in headers


def test_27_nothing_is_held_back_until_the_end(scripted):
    scripted.backend.script.ids = ids_of("a" * 20)
    scripted.backend.script.token_s = 0.05
    began_s, came_s = time.monotonic(), []
    with scripted.http.stream("POST", "/v1/chat/completions",
                              json={"model": "sft", "messages": HELLO, "stream": True}) as answer:  # fmt: skip
        for _ in answer.iter_raw():
            came_s.append(time.monotonic() - began_s)
    assert came_s[0] < 0.5
    assert came_s[-1] > 0.9
    assert len(came_s) > 10


def test_27_tokens_are_put_together_but_the_first_is_not_held_back(native):
    body = {"model": "sft", "messages": HELLO, "stream": True, "max_tokens": 100, "logit_bias": {"65": 100},
            "return_token_ids": True}  # fmt: skip
    with serving(native.backend, event_interval_s=1.5) as server:
        began_s, raw, came_s = time.monotonic(), b"", []
        with server.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            for piece in answer.iter_raw():
                raw += piece
                came_s += [time.monotonic() - began_s] * (b'"token_ids":[65' in piece)
    stream = Stream(answer.headers, raw)
    assert stream.token_ids() == [65] * 100
    assert len(came_s) == 2, "the first, and all that came in its interval"
    assert came_s[0] < 0.75
    assert came_s[1] > 1.4


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_28_every_event_is_data_and_json_with_the_same_head(native, path):
    body = {"model": "sft", "max_tokens": 8, "seed": 1} | (
        {"messages": HELLO} if "chat" in path else {"prompt": "hello"}
    )
    stream = native.stream(path, body)
    object_ = "chat.completion.chunk" if "chat" in path else "text_completion"
    assert len(stream.chunks) > 2
    assert {chunk["object"] for chunk in stream.chunks} == {object_}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in stream.chunks}) == 1
    assert stream.chunks[0]["id"].startswith("chatcmpl-" if "chat" in path else "cmpl-")
    assert type(stream.chunks[0]["created"]) is int
    assert stream.chunks[0]["model"] == "sft"


@pytest.mark.parametrize("n", [1, 3])
def test_29_each_choice_begins_with_its_role(scripted, n):
    stream = scripted.chat_stream(n=n)
    for index in range(n):
        deltas = [choice["delta"] for choice in stream.choices(index)]
        assert deltas[0]["role"] == "assistant"
        assert all("role" not in delta or delta["role"] in (None, "assistant") for delta in deltas[1:])
        assert "".join(delta.get("content") or "" for delta in deltas) == "hello"


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("text", TEXTS[:2])
def test_30_one_chunk_ends_each_choice(scripted, n, text):
    scripted.backend.script.ids = ids_of(text)
    stream = scripted.chat_stream(n=n)
    for index in range(n):
        reasons = [choice["finish_reason"] for choice in stream.choices(index)]
        assert reasons[-1] == "stop"
        assert reasons[:-1] == [None] * (len(reasons) - 1)
    assert all(choice["index"] in range(n) for chunk in stream.chunks for choice in chunk["choices"])


def test_31_usage_comes_last_if_it_is_asked_for(native):
    body = {"max_tokens": 6, "seed": 2, "n": 2}
    stream = native.chat_stream(**body, **USAGE)
    assert stream.is_done
    *others, last = stream.chunks
    assert last["choices"] == []
    assert last["usage"] == native.chat(**body).json()["usage"] | {
        "prompt_tokens_details": last["usage"]["prompt_tokens_details"]
    }
    assert all(chunk["choices"] for chunk in others)
    assert all(chunk["usage"] is None for chunk in others)


@pytest.mark.parametrize("options", [{}, {"stream_options": None}, {"stream_options": {"include_usage": False}}])
def test_31_no_usage_otherwise(native, options):
    stream = native.chat_stream(max_tokens=3, **options)
    assert all(chunk["choices"] for chunk in stream.chunks)
    assert all(chunk.get("usage") is None for chunk in stream.chunks)
    assert all(chunk.get("usage") is None for chunk in native.complete_stream(max_tokens=3, **options).chunks)


def test_31_completions_have_usage_too(native):
    stream = native.complete_stream(["ab", "cd"], max_tokens=3, **USAGE)
    assert stream.chunks[-1]["choices"] == []
    assert stream.chunks[-1]["usage"]["prompt_tokens"] == 6
    assert stream.chunks[-1]["usage"]["completion_tokens"] == 6


def test_32_done_is_the_last_event(native):
    for stream in (native.chat_stream(max_tokens=3, **USAGE), native.complete_stream(max_tokens=3)):
        assert stream.raw.endswith(b"data: [DONE]\n\n")
        assert stream.raw.count(b"[DONE]") == 1
        assert stream.is_done


@pytest.mark.parametrize("at_once", [1, 2, 3, 7])
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_33_no_character_is_split(scripted, text, at_once):
    scripted.backend.script.ids, scripted.backend.script.at_once = ids_of(text), at_once
    stream = scripted.chat_stream()
    assert "\ufffd" not in stream.text()
    assert stream.text() == text == text_of(scripted.chat().json()["choices"][0])
    for choice in stream.choices():
        json.dumps(choice).encode().decode("utf-8")
        text_of(choice).encode("utf-8")
    raw = scripted.stream("/v1/completions", {"model": "org/base.model", "prompt": "a", "max_tokens": 200,
                                              "stop_token_ids": [END]})  # fmt: skip
    assert raw.text() == text


def test_33_half_a_character_at_the_end_is_told_not_lost(scripted):
    whole = "ab🙂".encode()
    for ids, limit in (([*whole[:-1], END], None), ([*whole, END], 4), ([*whole[:3], *b"c", END], None)):
        scripted.backend.script.ids = list(ids)
        expected = bytes(ids[: limit or -1]).decode("utf-8", "replace")
        stream = scripted.chat_stream(max_tokens=limit)
        assert stream.text() == text_of(scripted.chat(max_tokens=limit).json()["choices"][0]) == expected
        assert "\ufffd" in stream.text()


@pytest.mark.parametrize("seed", range(6))
def test_33_a_stream_of_any_bytes_says_what_the_whole_answer_says(native, seed):
    body = {"seed": seed, "temperature": 1.5, "max_tokens": 120, "return_token_ids": True, "top_k": -1}
    whole = native.chat(**body).json()["choices"][0]
    stream = native.chat_stream(**body)
    assert stream.text() == text_of(whole)
    assert stream.token_ids() == whole["token_ids"]
    assert stream.finish() == whole["finish_reason"]
    raw = native.complete("a", **body).json()["choices"][0]
    assert native.complete_stream("a", **body).text() == text_of(raw)


@pytest.mark.parametrize("size", [1, 2, 5, 64, None], ids=str)
def test_34_events_split_over_reads_or_many_in_one(scripted, size):
    text = "ab 日本🙂 \n\n é"
    scripted.backend.script.ids = ids_of(text)
    relay = Relay(scripted.port, size)
    client = openai.OpenAI(base_url=f"{relay.url}/v1", api_key="none", max_retries=0, timeout=20)
    try:
        chunks = list(client.chat.completions.create(model="sft", messages=HELLO, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
        assert chunks[-1].choices[0].finish_reason == "stop"
    finally:
        client.close()
        relay.close()


@pytest.mark.parametrize(
    ("body", "status"),
    [({"temperature": 9}, 400), ({"model": "none"}, 404), ({"messages": []}, 400), ({"tools": [{}]}, 400),
     ({"messages": [{"role": "user", "content": "a" * 999}]}, 400)], ids=str,
)  # fmt: skip
def test_35_an_error_before_the_first_byte_has_its_status(scripted, body, status):
    check_error(scripted.chat(**{"stream": True, **body}) if "messages" not in body else scripted.post(
        "/v1/chat/completions", {"model": "sft", "stream": True, **body}), status)  # fmt: skip


@pytest.mark.parametrize("n", [1, 2])
def test_35_an_engine_that_fails_before_the_first_token_is_no_200(scripted, n):
    scripted.backend.script.fails = {0: BackendDeadError("the engine has died")}
    check_error(scripted.chat(stream=True, n=n), 503)
    check_error(scripted.chat(n=n), 503)
    scripted.backend.script.fails = {0: RuntimeError("who knows")}
    check_error(scripted.chat(stream=True, n=n), 500)
    check_error(scripted.chat(n=n), 500)


FAILURES = [BackendDeadError("the engine has died"), RuntimeError("secret detail"), ValueError("who knows")]


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_36_an_error_after_the_first_byte_is_an_event_and_no_normal_end(scripted, failure, n):
    scripted.backend.script.fails = {3: failure}
    status, raw, _ = broken(scripted, n=n)
    assert status == 200
    assert b"[DONE]" not in raw
    *chunks, last = [json.loads(event) for event in events_of(raw)]
    check_envelope(last)
    assert "secret" not in last["error"]["message"]
    assert all(choice["finish_reason"] is None for chunk in chunks for choice in chunk["choices"])
    assert Stream(httpx.Headers(), raw.rpartition(b"data: ")[0]).text() == "hel"
    assert scripted.chat(max_tokens=2).status_code == 200, "others are served"


def test_36_the_connection_closes_behind_an_error(scripted):
    scripted.backend.script.fails = {3: BackendDeadError("the engine has died")}
    connection, data = raw_stream(scripted.port, {})
    began_s = time.monotonic()
    with connection:
        while more := connection.recv(1 << 16):
            data += more
            assert b"[DONE]" not in data
    assert b'data: {"error":' in data
    assert time.monotonic() - began_s < 2, "the next request would be sent on a connection that is given up"


@pytest.mark.parametrize("n", [1, 2])
def test_36_a_whole_answer_that_fails_is_an_error(scripted, n):
    scripted.backend.script.fails = {3: BackendDeadError("the engine has died")}
    check_error(scripted.chat(n=n), 503)
    scripted.backend.script.fails = {3: RuntimeError("secret detail")}
    assert "secret" not in check_error(scripted.chat(n=n), 500)


def test_36_clients_raise_at_an_error_event(scripted):
    scripted.backend.script.fails = {3: BackendDeadError("the engine has died")}
    with openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        stream = client.chat.completions.create(model="sft", messages=HELLO, stream=True)
        with pytest.raises(openai.APIError, match="the engine has died"):
            list(stream)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("limit", ["stall_s", "request_s"])
def test_36_an_answer_that_stalls_ends_in_an_error(is_stream, limit):
    with serving(ScriptedBackend(), **{limit: 0.3}) as server:
        server.backend.script.stalls_at = 3
        began_s = time.monotonic()
        if is_stream:
            status, raw, _ = broken(server)
            assert status == 200
            check_envelope(json.loads(events_of(raw)[-1]))
            assert b"[DONE]" not in raw
            assert b'"stop"' not in raw
        else:
            answer = server.chat()
            assert answer.status_code >= 500
            check_error(answer, answer.status_code)
        assert 0.25 < time.monotonic() - began_s < 3
        wait_until(lambda: server.backend.running == 0, 2)
        assert server.backend.aborted == 1


def test_36_one_of_several_answers_that_stalls_takes_the_others_with_it():
    with serving(ScriptedBackend(), stall_s=0.3) as server:
        generate = server.backend.generate

        async def second_stalls(model, request):
            server.backend.script.stalls_at = 3 if request.seed == 6 else None
            async for events in generate(model, request):
                yield events

        server.backend.generate = second_stalls
        _, raw, _ = broken(server, n=2, seed=5)
        assert b"[DONE]" not in raw
        check_envelope(json.loads(events_of(raw)[-1]))


def test_36_an_engine_that_ends_without_a_reason_is_no_success():
    class Short(ScriptedBackend):
        async def generate(self, model, request):
            yield [Event(1, 104)]

    with serving(Short()) as server:
        _, raw, _ = broken(server)
        assert b"[DONE]" not in raw
        assert b'"stop"' not in raw
        assert server.chat().status_code >= 500
