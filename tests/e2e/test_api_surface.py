"""Points 1 to 9 of the API's checklist: what paths there are, and what they say."""

import re

import pytest
from api_backends import BOS, CAPACITY, CREATED, TOKENIZER, ScriptedBackend
from api_server import check_error, serving

import nanochat

pytestmark = [pytest.mark.slow, pytest.mark.timeout(30)]
GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
COUNTERS = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total",
            "vllm:request_success_total", "vllm:num_preemptions_total",
            "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total")  # fmt: skip
HISTOGRAMS = ("vllm:time_to_first_token_seconds", "vllm:e2e_request_latency_seconds")


def test_01_models_are_listed(native):
    answer = native.get("/v1/models")
    assert answer.status_code == 200
    body = answer.json()
    assert body["object"] == "list"
    assert [model["id"] for model in body["data"]] == ["sft", "pretrain", "calc"]
    for model in body["data"]:
        assert model["object"] == "model"
        assert type(model["created"]) is int
        assert model["owned_by"] == "nanochat"
        assert model["max_model_len"] == CAPACITY
        assert model["root"] == f"runs/{model['id']}/checkpoint"
    kinds = {model["id"]: model["kind"] for model in body["data"]}
    assert kinds == {"sft": "chat", "pretrain": "base", "calc": "chat"}
    assert body["data"][0]["generation_config"] == {"temperature": 0.9, "top_k": 200}


def test_02_one_model_is_shown_and_another_name_is_404(scripted):
    one = scripted.get("/v1/models/sft").json()
    assert one == scripted.get("/v1/models").json()["data"][0]
    assert one["created"] == CREATED
    # Names may have slashes and dots, as they are and as clients quote them.
    for name in ("org/base.model", "org%2Fbase.model"):
        assert scripted.get(f"/v1/models/{name}").json()["id"] == "org/base.model"
    check_error(scripted.get("/v1/models/other"), 404, code="model_not_found")


def test_03_chat_completions(native):
    body = native.chat(max_tokens=3, seed=1).json()
    assert body["object"] == "chat.completion"
    assert type(body["choices"][0]["message"]["content"]) is str
    check_error(native.chat(model="pretrain"), 400, param="model")


PROMPTS = [
    ("hello", ["hello"]),
    (["hello", "world"], ["hello", "world"]),
    ([104, 105], [[104, 105]]),
    ([[104, 105], [106]], [[104, 105], [106]]),
]


@pytest.mark.parametrize(("prompt", "alone"), PROMPTS, ids=["text", "texts", "ids", "lists of ids"])
def test_04_completions_take_four_kinds_of_prompt(native, prompt, alone):
    options = {"temperature": 0, "max_tokens": 6, "return_token_ids": True}
    body = native.complete(prompt, **options).json()
    assert body["object"] == "text_completion"
    assert [choice["index"] for choice in body["choices"]] == list(range(len(alone)))
    single = [native.complete(one, **options).json() for one in alone]
    assert [choice["token_ids"] for choice in body["choices"]] == [one["choices"][0]["token_ids"] for one in single]
    total = sum(one["usage"]["prompt_tokens"] for one in single)
    assert body["usage"]["prompt_tokens"] == total


def test_04_ids_are_taken_as_they_are_and_text_begins_a_document(native):
    assert native.complete([104, 105], return_token_ids=True).json()["prompt_token_ids"] == [104, 105]
    assert native.complete("hi", return_token_ids=True).json()["prompt_token_ids"] == [BOS, 104, 105]
    assert native.complete("hi", max_tokens=None).json()["usage"]["completion_tokens"] <= 16


def test_04_the_same_prompt_twice_counts_twice(native):
    one = native.complete("hello", max_tokens=1).json()["usage"]["prompt_tokens"]
    assert native.complete(["hello", "hello"], max_tokens=1).json()["usage"]["prompt_tokens"] == 2 * one


@pytest.mark.parametrize("prompt", [[], [[]], ["a", 1], [[1], "a", [True]], [1.5], [-1], [10**9], {"a": 1}, 7, None])
def test_04_no_other_prompt_is_taken(native, prompt):
    check_error(native.complete(prompt), 400, param="prompt")


def test_04_echo_puts_the_prompt_before_the_answer(native):
    plain = native.complete("日本 🙂", max_tokens=4, temperature=0).json()["choices"][0]["text"]
    assert native.complete("日本 🙂", max_tokens=4, temperature=0, echo=True).json()["choices"][0]["text"] == (
        "日本 🙂" + plain
    )
    streamed = native.complete_stream("日本 🙂", max_tokens=4, temperature=0, echo=True)
    assert streamed.text() == "日本 🙂" + plain
    two = native.complete(["ab", "cd"], max_tokens=2, echo=True, n=2).json()["choices"]
    assert [choice["text"][:2] for choice in two] == ["ab", "ab", "cd", "cd"]


def test_04_echo_alone_makes_no_tokens(native):
    body = native.complete("hello", echo=True, max_tokens=0).json()
    assert body["choices"][0]["text"] == "hello"
    assert body["usage"]["completion_tokens"] == 0
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"]


@pytest.mark.parametrize("body", [{"suffix": "end"}, {"best_of": 3}, {"logprobs": 6}, {"logprobs": -1}, {"echo": "x"}])
def test_04_what_is_not_here_is_refused_by_its_name(native, body):
    check_error(native.complete("a", **body), 400, param=next(iter(body)))


def test_05_health(scripted):
    assert scripted.get("/health").status_code == 200
    scripted.backend.is_healthy = False
    check_error(scripted.get("/health"), 503)


def test_06_ready_says_no_while_draining_or_dead():
    with serving(ScriptedBackend()) as server:
        assert server.get("/ready").status_code == 200
        server.app.state.draining = True
        check_error(server.get("/ready"), 503)
        assert server.get("/health").status_code == 200, "it lives, and ends what it has begun"
        server.app.state.draining = False
        server.backend.is_healthy = False
        check_error(server.get("/ready"), 503)


def test_07_metrics_have_vllms_names(native):
    native.chat(max_tokens=3)
    native.chat_stream(max_tokens=3)
    answer = native.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    text = answer.text
    for name in GAUGES:
        assert re.search(rf"^# TYPE {name} gauge$", text, re.M), name
        assert re.search(rf"^{name}(\{{.*\}})? [\d.e+-]+$", text, re.M), name
    for name in COUNTERS:
        assert re.search(rf"^{name}(\{{.*\}})? [\d.e+-]+$", text, re.M), name
    for name in HISTOGRAMS:
        assert re.search(rf"^{name}_bucket\{{.*le=\"\+Inf\".*\}} [1-9]", text, re.M), name
    assert re.search(r'^vllm:request_success_total\{finished_reason="length",model_name="sft"\} [1-9]', text, re.M)


def test_07_metrics_count_what_was_done():
    with serving(ScriptedBackend()) as server:
        usage = server.chat().json()["usage"]
        text = server.get("/metrics").text
    for name, key in (("prompt", "prompt_tokens"), ("generation", "completion_tokens")):
        assert f'vllm:{name}_tokens_total{{model_name="sft"}} {float(usage[key])}' in text


def test_08_version(scripted):
    assert scripted.get("/version").json() == {
        "version": nanochat.__version__, "backend": "native", "dtype": "auto"
    }  # fmt: skip


@pytest.mark.parametrize("text", ["hello", "日本語 🙂 é", "", " <|assistant_end|>"])
def test_08_tokenize_and_back(scripted, text):
    body = scripted.post("/tokenize", {"model": "sft", "prompt": text}).json()
    ids = [BOS, *text.encode()]
    assert (body["tokens"], body["count"], body["max_model_len"]) == (ids, len(ids), CAPACITY)
    bare = scripted.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()
    assert bare["tokens"] == ids[1:]
    back = scripted.post("/detokenize", {"model": "sft", "tokens": bare["tokens"]}).json()
    assert back == {"prompt": text}


def test_08_the_name_of_a_special_token_is_no_text_to_who_wants_its_id(scripted):
    """lm-eval asks so for the token before a text, and would take the first id of the name as text."""
    message = check_error(scripted.post("/tokenize", {"prompt": "<|bos|>", "add_special_tokens": False}), 400,
                          param="prompt")  # fmt: skip
    assert str(BOS) in message
    assert scripted.post("/tokenize", {"prompt": "<|bos|>"}).json()["tokens"] == [BOS, *b"<|bos|>"]


def test_08_tokenize_messages_as_chat_does(scripted):
    messages = [{"role": "user", "content": "hi"}]
    said = scripted.chat(messages, return_token_ids=True).json()["prompt_token_ids"]
    assert scripted.post("/tokenize", {"messages": messages}).json()["tokens"] == said
    start = TOKENIZER.special("<|assistant_start|>")
    assert said[-1] == start
    bare = scripted.post("/tokenize", {"messages": messages, "add_generation_prompt": False}).json()
    assert [*bare["tokens"], start] == said
    told = scripted.post("/tokenize", {"prompt": "é", "return_token_strs": True}).json()
    assert len(told["token_strs"]) == told["count"]


def test_08_tokenizers_refuse_what_they_cannot_read(scripted):
    check_error(scripted.post("/tokenize", {}), 400)
    check_error(scripted.post("/tokenize", {"prompt": "a", "messages": []}), 400)
    check_error(scripted.post("/tokenize", {"prompt": 1}), 400, param="prompt")
    check_error(scripted.post("/tokenize", {"model": "other", "prompt": "a"}), 404, code="model_not_found")
    check_error(scripted.post("/detokenize", {"tokens": [10**6]}), 400, param="tokens")
    check_error(scripted.post("/detokenize", {"tokens": [-1]}), 400, param="tokens")
    check_error(scripted.post("/detokenize", {"tokens": "abc"}), 400, param="tokens")


def test_08_tokenizer_info_has_what_lm_eval_reads(scripted):
    body = scripted.get("/tokenizer_info").json()
    assert {"tokenizer_class", "eos_token", "bos_token", "chat_template", "vocab_size", "max_model_len"} <= set(body)
    assert body["bos_token"] == "<|bos|>"
    assert body["eos_token"] == "<|assistant_end|>"
    assert body["vocab_size"] == TOKENIZER.vocab_size


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/sft", "/health", "/ready", "/metrics", "/version"])
def test_09_a_slash_at_the_end_changes_nothing(scripted, path):
    assert scripted.get(path + "/").status_code == scripted.get(path).status_code == 200


@pytest.mark.parametrize("slashes", ["/", "//"])
def test_09_posts_with_a_slash_at_the_end_work_too(scripted, slashes):
    body = {"model": "sft", "messages": [{"role": "user", "content": "hello"}]}
    assert scripted.post(f"/v1/chat/completions{slashes}", body).status_code == 200


@pytest.mark.parametrize("path", ["/", "/v1/models", "/health", "/ready", "/metrics", "/version"])
def test_09_head_is_get_without_a_body(scripted, path):
    answer = scripted.http.head(path)
    assert answer.status_code == 200
    assert not answer.content
    assert answer.headers["content-type"] == scripted.get(path).headers["content-type"]


def test_09_browsers_of_named_origins_may_come_and_no_others():
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    with serving(ScriptedBackend(), cors_origins=("https://example.org",)) as server:
        good = server.http.options("/v1/chat/completions", headers={"Origin": "https://example.org", **asks})
        assert good.status_code == 200
        assert good.headers["access-control-allow-origin"] == "https://example.org"
        assert "POST" in good.headers["access-control-allow-methods"]
        assert "authorization" in good.headers["access-control-allow-headers"].lower()
        bad = server.http.options("/v1/chat/completions", headers={"Origin": "https://evil.example", **asks})
        assert "access-control-allow-origin" not in bad.headers
        error = server.get("/v1/models/other", headers={"Origin": "https://example.org"})
        assert error.headers["access-control-allow-origin"] == "https://example.org", "a page may read its errors"
    with serving(ScriptedBackend()) as server:
        none = server.http.options("/v1/models", headers={"Origin": "https://example.org", **asks})
        assert "access-control-allow-origin" not in none.headers
        assert none.status_code < 500


@pytest.mark.parametrize("path", ["/nothing", "/v1", "/v1/nothing", "/v1/chat", "/v1/chat/completions/x", "/%00", "/é"])
def test_09_unknown_paths_are_404_in_json(scripted, path):
    check_error(scripted.get(path), 404)
    check_error(scripted.post(path, {}), 404)


def test_09_other_methods_are_405_in_json(scripted):
    check_error(scripted.get("/v1/chat/completions"), 405)
    check_error(scripted.http.delete("/v1/models"), 405)
    check_error(scripted.http.put("/v1/completions", json={}), 405)
