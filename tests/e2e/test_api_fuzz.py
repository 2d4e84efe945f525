"""Bodies that nobody would send: no 500, no hang, every answer in one of the two shapes, the server well afterwards."""

import asyncio
import json
import math

import httpx
import pytest
from api_backends import BOS, TOKENIZER, engine_of, random_model, served
from api_server import check_envelope, events_of, serving, wait_until
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nanochat.inference.tool_loop import ToolLoop
from nanochat.serving.backend import EngineBackend, Hosted

CAPACITY = 96
AT_ONCE = 10
PATHS = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]
FAST = settings(
    max_examples=200, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
)  # fmt: skip

TEXT = st.one_of(
    st.text(max_size=12), st.sampled_from(["", "hi", "日本🙂", "<|assistant_end|>", "a" * 200, "\u0000", "true"])
)
SAID = st.one_of(st.text(min_size=1, max_size=12), st.sampled_from(["日本🙂", "<|bos|>", "\u0000", " "]))
NUMBER = st.one_of(
    st.integers(-3, 300), st.sampled_from([2**31, 2**32, 2**63, 2**64, 10**30, -(2**63)]),
    st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([-0.0, 1e-300, 5e-324, 1e300, 2.0, 1.0]),
)  # fmt: skip
ODD = st.sampled_from([math.nan, math.inf, -math.inf, "\ud800", {"\udfff": 1}])
"""What JSON or UTF-8 does not have."""
JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBER, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)), max_leaves=6,
)  # fmt: skip
ID = st.integers(0, TOKENIZER.vocab_size - 1)
ANY_ID = st.one_of(ID, st.integers(-1, 300), st.sampled_from([BOS, 2**31, 2**40]))
PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "python", "python_output", "image_url"]), "text": st.one_of(TEXT, JUNK)}
)
CONTENT = st.one_of(TEXT, st.lists(PART, max_size=4), st.none(), JUNK)
ROLE = st.sampled_from(["system", "developer", "user", "assistant", "tool", "x"])
MESSAGES = st.one_of(
    SAID.map(lambda text: [{"role": "user", "content": text}]),
    st.tuples(SAID, SAID).map(
        lambda said: [dict(zip(("role", "content"), one)) for one in zip(("system", "user"), said)]
    ),
    st.tuples(SAID, st.one_of(SAID, st.lists(PART, max_size=3)), SAID).map(
        lambda said: [{"role": role, "content": one} for role, one in zip(("user", "assistant", "user"), said)]
    ),
)
ODD_MESSAGES = st.one_of(
    st.lists(st.fixed_dictionaries({"role": ROLE, "content": CONTENT}), max_size=4), st.lists(JUNK, max_size=2), JUNK
)
PROMPT = st.one_of(TEXT, st.lists(TEXT, min_size=1, max_size=4), st.lists(ID, min_size=1, max_size=9),
                   st.lists(st.lists(ID, min_size=1, max_size=5), min_size=1, max_size=3))  # fmt: skip
ODD_PROMPT = st.one_of(st.lists(st.lists(ANY_ID, max_size=3), max_size=3), JUNK)
EVERY = [{str(id): bias for id in range(TOKENIZER.vocab_size)} for bias in (-100, 100, -99.9)]
GOOD = {
    "stream": st.booleans(), "n": st.integers(1, 4), "max_tokens": st.integers(1, 9),
    "max_completion_tokens": st.integers(1, 9), "temperature": st.floats(0, 2), "min_p": st.floats(0, 1),
    "top_p": st.floats(0, 1, exclude_min=True), "top_k": st.integers(-1, 300), "seed": st.integers(-(2**63), 2**63 - 1),
    "repetition_penalty": st.floats(0, 10, exclude_min=True), "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2), "return_parts": st.booleans(), "return_token_ids": st.booleans(),
    "logit_bias": st.one_of(st.dictionaries(ID.map(str), st.floats(-100, 100), max_size=5), st.sampled_from(EVERY)),
    "stop": st.one_of(SAID, st.lists(SAID, max_size=4)), "stop_token_ids": st.lists(ID, max_size=5),
    "ignore_eos": st.booleans(), "min_tokens": st.integers(0, 200), "echo": st.booleans(),
    "continue_token_ids": st.lists(ID, max_size=6), "user": TEXT, "metadata": JUNK,
    "response_format": st.just({"type": "text"}),
}  # fmt: skip
NAMES = sorted([*GOOD, "logprobs", "top_logprobs", "stream_options", "tools", "tool_choice", "best_of", "suffix",
                "modalities", "functions", "model", "messages", "prompt", "response_format", "audio"])  # fmt: skip


@st.composite
def bodies(draw, path: str) -> dict:
    """A body that is good, but for some of its fields in every third one."""
    is_chat = path == PATHS[0]
    names = draw(st.lists(st.sampled_from(sorted(GOOD)), max_size=6, unique=True))
    body = {"max_tokens": 5} | {name: draw(GOOD[name]) for name in names}
    body["model"] = "sft" if is_chat else draw(st.sampled_from(["sft", "pretrain"]))
    if draw(st.booleans()):
        body |= {"logprobs": True, "top_logprobs": draw(st.integers(0, 20))} if is_chat else {
            "logprobs": draw(st.integers(0, 5))}  # fmt: skip
    if body.get("stream"):
        body["stream_options"] = {"include_usage": draw(st.booleans())}
    if is_chat:
        body["messages"] = draw(MESSAGES)
    elif path == PATHS[3]:
        body["tokens"] = draw(st.lists(ID, max_size=9))
    else:
        body["prompt"] = draw(PROMPT if path == PATHS[1] else TEXT)
    if draw(st.integers(0, 2)) == 0:
        odd = {"messages": st.one_of(ODD_MESSAGES, JUNK), "prompt": ODD_PROMPT, "continue_token_ids": st.lists(ANY_ID)}
        for name in draw(st.lists(st.sampled_from([*NAMES, *body]), min_size=1, max_size=3, unique=True)):
            body[name] = draw(odd.get(name, JUNK))
    return body


@st.composite
def requests(draw) -> tuple[str, bytes]:
    path = draw(st.sampled_from(PATHS[:2] * 5 + PATHS[2:]))
    kind = draw(st.integers(0, 29))
    if kind == 29:
        return path, draw(st.binary(max_size=40))
    body = draw(JUNK) if kind == 28 else draw(bodies(path))
    if kind == 27:
        body[draw(st.sampled_from(NAMES))] = draw(ODD)
    data = json.dumps(body).encode()
    return path, data[: draw(st.integers(0, len(data)))] if kind == 26 else data


@pytest.fixture(scope="module")
def server():
    engines = [engine_of(random_model(seed, CAPACITY), 16) for seed in range(2)]
    backend = EngineBackend(
        [
            Hosted(served("sft", is_chat=True, capacity=CAPACITY), engines[0], ToolLoop(engines[0], TOKENIZER)),
            Hosted(served("pretrain", is_chat=False, capacity=CAPACITY), engines[1], engines[1]),
        ]
    )
    with serving(backend, max_waiting=10_000, max_n=4, max_messages=20, request_s=10.0) as server:
        yield server
    backend.close()


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def check_body(path: str, sent: bytes, answer: httpx.Response) -> None:
    assert answer.status_code in (200, 400, 404, 413), (answer.status_code, answer.text)
    assert answer.headers["x-request-id"]
    if answer.headers["content-type"].startswith("text/event-stream"):
        *chunks, last = events_of(answer.content)
        assert last == "[DONE]"
        bodies = [json.loads(chunk, parse_constant=no_constant) for chunk in chunks]
        reasons = [choice["finish_reason"] for body in bodies for choice in body["choices"] if choice["finish_reason"]]
        assert len(reasons) == len({choice["index"] for body in bodies for choice in body["choices"]})
        return
    body = json.loads(answer.content, parse_constant=no_constant)
    if answer.status_code != 200:
        error = check_envelope(body)
        assert len(error["message"]) < 1000
        return
    if path not in PATHS[:2]:
        return
    asked, usage = json.loads(sent), body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] >= 0
    stops = [asked["stop"]] if isinstance(asked.get("stop"), str) else asked.get("stop") or []
    for choice in body["choices"]:
        assert choice["finish_reason"] in ("stop", "length")
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        if not asked.get("echo") and not asked.get("continue_token_ids"):
            assert not any(stop in text for stop in stops)
        for entry in (choice["logprobs"] or {}).get("content") or ():
            assert math.isfinite(entry["logprob"])


def run(server, sent: list[tuple[str, bytes]]) -> None:
    async def main() -> None:
        limits = httpx.Limits(max_connections=AT_ONCE)
        async with httpx.AsyncClient(base_url=server.url, timeout=15, limits=limits, trust_env=False) as http:

            async def one(path: str, data: bytes) -> None:
                answer = await http.post(path, content=data, headers={"Content-Type": "application/json"})
                try:
                    check_body(path, data, answer)
                except Exception as err:
                    raise AssertionError(f"POST {path} {data!r} -> {answer.status_code} {answer.text[:500]}") from err

            await asyncio.gather(*(one(path, data) for path, data in sent))

    asyncio.run(main())


def check_well(server) -> None:
    wait_until(lambda: server.backend.load().running == server.backend.load().waiting == 0, 5)
    load = server.backend.load()
    assert load.kv_tokens_free == load.kv_tokens
    assert server.get("/health").status_code == 200
    assert server.chat(max_tokens=3).status_code == 200
    assert server.complete(max_tokens=3).status_code == 200


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_two_thousand_bodies(server):
    @FAST
    @given(st.lists(requests(), min_size=AT_ONCE, max_size=AT_ONCE))
    def fuzz(sent):
        run(server, sent)

    fuzz()
    check_well(server)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_ten_thousand_bodies(server):
    @settings(FAST, max_examples=1000, derandomize=False)
    @given(st.lists(requests(), min_size=AT_ONCE, max_size=AT_ONCE))
    def fuzz(sent):
        run(server, sent)

    fuzz()
    check_well(server)
