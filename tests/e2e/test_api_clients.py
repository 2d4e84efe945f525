"""Points 43 and 44 of the API's checklist: the clients that people use, as they come from PyPI and Debian."""

import asyncio
import json
import os
import shutil
import socket
import subprocess

import pytest
from api_backends import END, Script, ids_of
from api_server import HELLO, events_of, wait_until

from nanochat.serving.backend import BackendDeadError

openai = pytest.importorskip("openai")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),  # of the clients
]
TEXT = "日本語 and 🙂, twice: 日本語 and 🙂."


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch):
    """No client calls anybody else."""
    connect, strangers = socket.socket.connect, []

    def guarded(self, address):
        if isinstance(address, tuple):
            if address[0] not in ("127.0.0.1", "::1", "localhost"):
                strangers.append(address)
                raise OSError(f"there is no way to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield
    assert not strangers


@pytest.fixture
def server(scripted):
    scripted.backend.script = Script(ids=ids_of(TEXT))
    return scripted


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-none", max_retries=0, timeout=20) as client:
        yield client


def test_43_openai_chat(client, server):
    answer = client.chat.completions.create(
        model="sft", messages=HELLO, temperature=0.5, seed=1, logprobs=True, top_logprobs=2, n=2,
        max_completion_tokens=99,
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "return_token_ids": True},
    )  # fmt: skip
    assert [choice.message.content for choice in answer.choices] == [TEXT, TEXT]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
    assert answer.choices[1].index == 1
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].logprobs.content[0].token == "\ufffd"
    assert answer.choices[0].logprobs.content[0].bytes == [TEXT.encode()[0]]
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    assert answer.usage.completion_tokens == 2 * (len(TEXT.encode()) + 1)
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.choices[0].model_extra["token_ids"] == ids_of(TEXT)
    assert answer._request_id
    request = server.backend.asked[-1][1]
    assert (request.top_k, request.min_p, request.repetition_penalty) == (5, 0.1, 1.2)


def test_43_openai_stream(client):
    chunks = list(
        client.chat.completions.create(model="sft", messages=HELLO, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == TEXT
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(TEXT.encode()) + 1


def test_43_openais_own_accumulator_of_streams(client):
    with client.chat.completions.stream(
        model="sft", messages=HELLO, logprobs=True, stream_options={"include_usage": True}
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == TEXT
    assert final.choices[0].finish_reason == "stop"
    assert final.usage.prompt_tokens == 9
    assert len(final.choices[0].logprobs.content) >= len(TEXT.encode())


def test_43_openai_completions_and_models(client):
    answer = client.completions.create(model="org/base.model", prompt=["a", "b"], max_tokens=5, echo=True, logprobs=1)
    expected = ids_of(TEXT)[:5]
    assert [choice.text for choice in answer.choices] == [
        prompt + bytes(expected).decode("utf-8", "replace") for prompt in "ab"
    ]
    assert answer.choices[0].finish_reason == "length"
    assert "".join(answer.choices[0].logprobs.tokens).startswith("a"), "what was sent; BOS was not"
    assert len(answer.choices[0].logprobs.tokens) == 6
    streamed = client.completions.create(model="org/base.model", prompt="a", max_tokens=200, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == TEXT
    assert [model.id for model in client.models.list()] == ["sft", "org/base.model"]
    assert client.models.retrieve("org/base.model").owned_by == "nanochat"


def test_43_openais_errors(client, server):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert missing.value.code == "model_not_found"
    assert missing.value.request_id
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="sft", messages=HELLO, temperature=3)
    assert bad.value.param == "temperature"
    assert bad.value.type == "invalid_request_error"
    server.backend.waiting = 4
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model="sft", messages=HELLO)
    server.backend.script.fails = {5: BackendDeadError("the engine has died")}
    server.backend.waiting = 0
    with pytest.raises(openai.APIError):
        list(client.chat.completions.create(model="sft", messages=HELLO, stream=True))
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="sft", messages=HELLO)


def test_39_openai_comes_again_after_a_refusal(server):
    server.backend.waiting = 4
    load = server.backend.load

    def once():
        told, server.backend.waiting = load(), 0
        return told

    server.backend.load = once
    try:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="a", max_retries=1, timeout=20) as client:
            assert client.chat.completions.create(model="sft", messages=HELLO).choices[0].message.content == TEXT
    finally:
        del server.backend.load


def test_43_a_stream_that_is_closed_early_ends_on_the_server(client, server):
    server.backend.script.token_s = 0.01
    stream = client.chat.completions.create(model="sft", messages=HELLO, stream=True)
    for _, _ in zip(range(4), stream):
        assert server.backend.running == 1
    stream.close()
    assert wait_until(lambda: server.backend.running == 0, 2) < 1
    assert server.backend.aborted == 1


def test_43_openai_async(server):
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1/", api_key="a", max_retries=0, timeout=20) as client:

            async def text() -> str:
                stream = await client.chat.completions.create(model="sft", messages=HELLO, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            whole = client.chat.completions.create(model="sft", messages=HELLO)
            texts = await asyncio.gather(*(text() for _ in range(8)))
            assert texts == [TEXT] * 8
            assert (await whole).choices[0].message.content == TEXT

            server.backend.script.token_s = 0.01
            stream = await client.chat.completions.create(model="sft", messages=HELLO, stream=True)
            await anext(aiter(stream))
            await stream.close()
            task = asyncio.create_task(client.chat.completions.create(model="sft", messages=HELLO))
            await asyncio.sleep(0.1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())
    assert wait_until(lambda: server.backend.running == 0, 2) < 1
    assert server.backend.aborted == 2


@pytest.fixture
def litellm(monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it fetches prices at import
    litellm = pytest.importorskip("litellm")
    litellm.telemetry = False
    litellm.suppress_debug_info = True
    return litellm


def litellm_options(server) -> dict:
    return {"model": "openai/sft", "messages": HELLO, "api_base": f"{server.url}/v1", "api_key": "a", "num_retries": 0}


def test_44_litellm(litellm, server):
    answer = litellm.completion(**litellm_options(server), max_tokens=99, seed=1, top_p=0.9)
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(TEXT.encode()) + 1
    chunks = list(litellm.completion(**litellm_options(server), stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
    counts = [chunk.usage.completion_tokens for chunk in chunks if getattr(chunk, "usage", None)]
    assert counts[-1] == len(TEXT.encode()) + 1


def test_44_litellm_sees_errors_also_inside_a_stream(litellm, server):
    with pytest.raises(litellm.exceptions.BadRequestError, match="temperature"):
        litellm.completion(**litellm_options(server), temperature=3)
    with pytest.raises(litellm.exceptions.NotFoundError):
        litellm.completion(**{**litellm_options(server), "model": "openai/none"})
    server.backend.script.fails = {5: BackendDeadError("the engine has died")}
    with pytest.raises(Exception, match="the engine has died"):
        list(litellm.completion(**litellm_options(server), stream=True))


@pytest.fixture
def langchain(server, monkeypatch):
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    module = pytest.importorskip("langchain_openai")

    def make(**options):
        return module.ChatOpenAI(
            model="sft", base_url=f"{server.url}/v1", api_key="a", max_retries=0, timeout=20, **options
        )

    return make


def test_44_langchain(langchain, server):
    chat = langchain(max_tokens=99, temperature=0.3, stop=["zzz"])
    answer = chat.invoke([("system", "Be brief."), ("human", "hello")])
    assert answer.content == TEXT
    assert answer.usage_metadata["output_tokens"] == len(TEXT.encode()) + 1
    assert answer.response_metadata["finish_reason"] == "stop"
    request = server.backend.asked[-1][1]
    assert request.max_new_tokens == 99, "under whichever name the client sent it"
    assert b"Be brief." in bytes(id for id in request.prompt if id < 256)


def test_44_langchain_streams_with_usage(langchain):
    chunks = list(langchain(stream_usage=True).stream("hello"))
    assert "".join(chunk.content for chunk in chunks) == TEXT
    total = sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks)
    assert total == len(TEXT.encode()) + 1

    async def main() -> str:
        return "".join([chunk.content async for chunk in langchain().astream("hello")])

    assert asyncio.run(main()) == TEXT


def test_44_langchain_sees_errors(langchain, server):
    with pytest.raises(openai.BadRequestError, match="tools"):
        langchain().bind_tools([{"type": "function", "function": {"name": "f", "parameters": {}}}]).invoke("hello")
    server.backend.script.fails = {5: BackendDeadError("the engine has died")}
    with pytest.raises(openai.APIError, match="the engine has died"):
        list(langchain().stream("hello"))


CURL = shutil.which("curl")


def curl(server, body: dict, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [CURL, "-sN", "--max-time", "20", *options, f"{server.url}/v1/chat/completions", "-H",
         "Content-Type: application/json", "-d", json.dumps({"model": "sft", "messages": HELLO, **body})],
        capture_output=True, timeout=30, env={**os.environ, "no_proxy": "127.0.0.1"},
    )  # fmt: skip


@pytest.mark.skipif(CURL is None, reason="there is no curl")
def test_44_curl(server):
    done = curl(server, {"stream": True})
    assert done.returncode == 0
    *chunks, last = events_of(done.stdout)
    assert last == "[DONE]"
    assert "".join(json.loads(chunk)["choices"][0]["delta"].get("content") or "" for chunk in chunks) == TEXT
    done = curl(server, {}, "-w", "%{http_code}")
    assert json.loads(done.stdout[:-3])["choices"][0]["message"]["content"] == TEXT
    assert done.stdout[-3:] == b"200"


@pytest.mark.skipif(CURL is None, reason="there is no curl")
def test_44_curl_that_is_stopped_ends_on_the_server(server):
    server.backend.script.token_s = 0.05
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([CURL, "-sN", f"{server.url}/v1/chat/completions", "-d",
                        json.dumps({"model": "sft", "messages": HELLO, "stream": True})],
                       capture_output=True, timeout=0.5)  # fmt: skip
    assert wait_until(lambda: server.backend.running == 0, 2) < 1
    assert server.backend.aborted == 1


def test_44_open_webui(server):
    """What Open WebUI sends for one message: the list of models, the stream, then a title and tags that are whole."""
    key = {"Authorization": "Bearer sk-anything"}
    models = server.get("/v1/models", headers=key).json()["data"]
    assert models[0]["id"] == "sft"
    stream = server.http.post(
        "/v1/chat/completions",
        headers=key | {"X-OpenWebUI-User-Name": "a", "X-OpenWebUI-Chat-Id": "1"},
        json={"stream": True, "model": "sft", "messages": HELLO, "stream_options": {"include_usage": True},
              "params": {}, "tool_servers": [], "features": {}, "variables": {}, "session_id": "s", "chat_id": "c",
              "id": "i", "background_tasks": {"title_generation": True}},
    )  # fmt: skip
    assert stream.headers["content-type"].startswith("text/event-stream")
    *chunks, last = [json.loads(data) for data in events_of(stream.content)[:-1]]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == TEXT
    assert last["usage"]["completion_tokens"] == len(TEXT.encode()) + 1
    for metadata in ({"task": "title_generation"}, {"task": "tags_generation"}, {"task": "follow_up_generation"}):
        answer = server.http.post(
            "/v1/chat/completions",
            headers=key,
            json={"model": "sft", "messages": HELLO, "stream": False, "max_completion_tokens": 1000 // 8,
                  "metadata": metadata, "temperature": 0.1},
        )  # fmt: skip
        assert answer.json()["choices"][0]["message"]["content"] == TEXT
    for stream in (False, True):  # what is no JSON it would show as it is
        body = {"model": "gone", "messages": HELLO, "stream": stream}
        error = server.http.post("/v1/chat/completions", headers=key, json=body)
        assert error.headers["content-type"].startswith("application/json")
        assert "gone" in error.json()["error"]["message"]
    assert END not in server.backend.asked[-1][1].prompt
