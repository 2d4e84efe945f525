"""Point 45 of the API's checklist: answers beside OpenAI's shapes, field by field, and through its own types."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from api_backends import END, Script, ids_of

openai_types = pytest.importorskip("openai.types")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(30)]
SHAPES = json.loads(Path(__file__).with_name("openai_shapes.json").read_text())
TYPES = {"str": str, "int": int, "float": float, "null": type(None)}
BESIDE = {
    "chat_choice": {"stop_reason"}, "chunk_choice": {"stop_reason"}, "completion_choice": {"stop_reason"},
    "completion_chunk_choice": {"stop_reason"},
    "model": {"root", "kind", "max_model_len", "generation_config"},
}  # fmt: skip
"""Fields that OpenAI does not have: vLLM's and ours, where nothing was asked for that brings more."""


def check(value: Any, shape: Any, at: str, name: str = "") -> None:
    """Every field is there and has its type, and no other field is there."""
    if isinstance(shape, str):
        check_either(value, shape.split("|"), at)
    elif isinstance(shape, list):
        assert type(value) is list, at
        assert value or not shape or at.endswith(("bytes", "top_logprobs")), f"{at} is empty"
        assert not value or shape, f"{at} must be empty"
        for number, one in enumerate(value):
            check(one, shape[0], f"{at}[{number}]")
    else:
        assert type(value) is dict, at
        if "*" in shape:
            shape = dict.fromkeys(value, shape["*"])
        absent = {key for key in shape if key.endswith("?") and key[:-1] not in value}
        shape = {key.removesuffix("?"): of_key for key, of_key in shape.items() if key not in absent}
        missing = [key for key in shape if key not in value]
        assert not missing, f"{at} lacks {missing}"
        allowed = set(shape) | BESIDE.get(name, set())
        if not at.endswith("delta"):
            assert set(value) <= allowed, f"{at} has {set(value) - allowed}"
        for key, of_key in shape.items():
            check(value[key], of_key, f"{at}.{key}")


def check_either(value: Any, options: list[str], at: str) -> None:
    for option in options:
        if option.startswith("@"):
            if type(value) is dict:
                check(value, SHAPES[option[1:]], at, option[1:])
                return
        elif option.startswith("="):
            if value == option[1:]:
                return
        elif type(value) is TYPES[option]:
            return
    raise AssertionError(f"{at} is {value!r}, not {' or '.join(options)}")


def check_as(value: Any, name: str) -> None:
    check(value, SHAPES[name], name, name)


@pytest.fixture
def server(scripted):
    scripted.backend.script = Script(ids=ids_of("hello"))
    return scripted


LOGPROBS = [{}, {"logprobs": True, "top_logprobs": 2}, {"logprobs": True}]


@pytest.mark.parametrize("body", LOGPROBS, ids=str)
@pytest.mark.parametrize("n", [1, 2])
def test_45_chat(server, body, n):
    answer = server.chat(n=n, **body).json()
    check_as(answer, "chat")
    openai_types.chat.ChatCompletion.model_validate(answer, strict=True)
    assert (answer["choices"][0]["logprobs"] is not None) == bool(body)


@pytest.mark.parametrize("body", LOGPROBS, ids=str)
def test_45_chat_stream(server, body):
    for chunk in server.chat_stream(**body).chunks:
        check_as(chunk, "chat_chunk")
        openai_types.chat.ChatCompletionChunk.model_validate(chunk, strict=True)
        delta = chunk["choices"][0]["delta"]
        assert set(delta) <= {"role", "content", "refusal"}
        assert delta.get("role", "assistant") == "assistant"
        assert type(delta.get("content", "")) is str


def test_45_chat_stream_with_usage(server):
    *chunks, last = server.chat_stream(stream_options={"include_usage": True}).chunks
    for chunk in chunks:
        check_as(chunk, "chat_chunk_before_usage")
    check_as(last, "chat_chunk_of_usage")
    openai_types.chat.ChatCompletionChunk.model_validate(last, strict=True)


def test_45_the_transcript_of_a_stream(server):
    """The reference's example: the role, the text, an empty delta with the finish reason, [DONE]."""
    server.backend.script.ids = ids_of("Hi")
    stream = server.chat_stream()
    said = [(choice["delta"], choice["finish_reason"]) for choice in stream.choices()]
    assert said == [
        ({"role": "assistant", "content": ""}, None), ({"content": "H"}, None), ({"content": "i"}, None), ({}, "stop"),
    ]  # fmt: skip
    assert stream.is_done


@pytest.mark.parametrize("body", [{}, {"logprobs": 0}, {"logprobs": 3}, {"logprobs": 2, "echo": True}], ids=str)
def test_45_completion(server, body):
    answer = server.complete(model="org/base.model", **body).json()
    check_as(answer, "completion")
    if not body.get("echo"):  # a first token has no probability: null, which the type does not have
        openai_types.Completion.model_validate(answer, strict=True)
    for chunk in server.complete_stream(model="org/base.model", **body).chunks:
        check_as(chunk, "completion_chunk")


def test_45_models(server):
    check_as(server.get("/v1/models").json(), "models")
    check_as(server.get("/v1/models/sft").json(), "model")
    openai_types.Model.model_validate(server.get("/v1/models/sft").json(), strict=True)


def test_45_errors(server):
    answers = [
        server.chat(temperature=5), server.chat(model="x"), server.get("/x"), server.get("/v1/completions"),
        server.post("/v1/chat/completions", []), server.get("/v1/models/x"), server.chat([{"role": "x"}]),
    ]  # fmt: skip
    for answer in answers:
        check_as(answer.json(), "error")


def test_45_nothing_else_unless_it_is_asked_for(server):
    text = json.dumps([server.chat().json(), server.chat_stream().chunks, server.complete(model="sft").json()])
    for ours in ("token_ids", "prompt_token_ids", '"parts"', "continues"):
        assert ours not in text
    assert str(END) not in re.sub(r'"id": "[^"]*"|"created": \d+', "", text), "in no random id, in no time"


def test_45_the_page_of_the_api(server):
    page = server.get("/openapi.json").json()
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        schema = page["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema["type"] == "object"
        assert schema["properties"]
    fields = page["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"model", "messages"} <= set(fields["required"])
    for place in re.findall(r'"\$ref": "#/([^"]*)"', json.dumps(page)):
        found = page
        for name in place.split("/"):
            assert name in found, f"the page has no {place}"
            found = found[name]
