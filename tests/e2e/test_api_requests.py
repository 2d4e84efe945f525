"""Points 10 to 23 of the API's checklist: how bodies are read."""

import re

import pytest
from api_backends import BOS, CAPACITY, END, TOKENIZER, ids_of
from api_server import HELLO, check_error, text_of

from nanochat.inference.paged_cache import PAGE_TOKENS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(30)]
USER, USER_END, ANSWER = (TOKENIZER.special(f"<|{name}|>") for name in ("user_start", "user_end", "assistant_start"))
FIXED = {"seed": 7, "temperature": 1.0, "max_tokens": 12, "return_token_ids": True}


def prompt_of(server, messages, **body) -> list[int]:
    answer = server.chat(messages, return_token_ids=True, **body)
    assert answer.status_code == 200, answer.text
    return answer.json()["prompt_token_ids"]


def asked(server, **body):
    """What the backend was asked for a chat."""
    assert server.chat(**body).status_code == 200
    return server.backend.asked[-1][1]


def ids(server, **body) -> list[int]:
    answer = server.chat(**{**FIXED, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"]


def test_10_unknown_fields_are_ignored(native):
    plain = ids(native)
    sent_by_clients = {
        "user": "u1", "metadata": {"chat_id": "1"}, "store": False, "parallel_tool_calls": True, "service_tier": "auto",
        "prediction": None, "reasoning_effort": "low", "verbosity": "low", "safety_identifier": "x", "chat_id": "y",
        "prompt_cache_key": "k", "web_search_options": None, "something_new": [1, {"a": None}],
    }  # fmt: skip
    assert ids(native, **sent_by_clients) == plain


def test_10_null_is_as_if_left_out(native):
    fields = (
        "stream", "stream_options", "n", "max_completion_tokens", "top_p", "top_k", "min_p", "repetition_penalty",
        "stop", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "tools",
        "tool_choice", "response_format", "functions", "function_call", "modalities", "audio", "stop_token_ids",
        "ignore_eos", "min_tokens", "continue_token_ids", "return_parts",
    )  # fmt: skip
    assert ids(native, **dict.fromkeys(fields)) == ids(native)


def test_10_vllms_fields_reach_the_engine(scripted):
    request = asked(scripted, top_k=7, min_p=0.25, repetition_penalty=1.5, min_tokens=2, stop_token_ids=[300 - 60])
    assert (request.top_k, request.min_p, request.repetition_penalty) == (7, 0.25, 1.5)
    assert request.min_new_tokens == 2
    assert request.stop_tokens == {240, END, BOS}
    assert asked(scripted, top_k=-1).top_k is None
    assert asked(scripted).top_k == 50, "the checkpoint's own"
    scripted.backend.script.ids = ids_of("hello, world")
    answer = scripted.chat(ignore_eos=True, max_tokens=3).json()
    assert END not in scripted.backend.asked[-1][1].stop_tokens
    assert answer["choices"][0]["finish_reason"] == "length"


def test_10_a_stop_id_ends_the_answer(scripted):
    answer = scripted.chat(stop_token_ids=[ord("l")]).json()["choices"][0]
    assert answer["finish_reason"] == "stop"
    assert answer["message"]["content"].rstrip("l") == "he"


def test_10_min_tokens_hold_the_end_back(native):
    always_end = {"logit_bias": {str(END): 100}}
    assert ids(native, **always_end) == [END]
    held = ids(native, **always_end, min_tokens=5)
    assert END not in held[:5]
    assert held[5:] == [END]


@pytest.mark.parametrize("content", ["hi 🙂", [{"type": "text", "text": "hi "}, {"type": "text", "text": "🙂"}]])
def test_11_content_is_text_or_text_parts(scripted, content):
    said = prompt_of(scripted, [{"role": "user", "content": content}])
    assert said == [BOS, USER, *"hi 🙂".encode(), USER_END, ANSWER]


def test_11_an_assistants_content_may_be_null_or_calls(scripted):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "b"},
    ]
    assert prompt_of(scripted, messages) == [
        BOS, USER, ord("a"), USER_END, ANSWER, END, USER, ord("b"), USER_END, ANSWER
    ]  # fmt: skip
    messages[1]["content"] = [
        {"type": "text", "text": "x"}, {"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}
    ]  # fmt: skip
    said = prompt_of(scripted, messages)
    marks = [TOKENIZER.special(f"<|{name}|>") for name in ("python_start", "python_end", "output_start", "output_end")]
    at = said.index(ANSWER) + 1
    assert said[at : said.index(END)] == [ord("x"), marks[0], *b"1+1", marks[1], marks[2], ord("2"), marks[3]]


PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


@pytest.mark.parametrize(
    "content",
    [[PICTURE], [{"type": "text", "text": "a"}, PICTURE], [{"type": "input_audio", "input_audio": {}}],
     [{"type": "text"}], [{"text": "a"}], [{"type": "file", "file": {}}], ["a"], None, 7, {}, [], "",
     [{"type": "python", "text": "1"}]],
)  # fmt: skip
def test_11_other_content_of_a_user_is_refused(scripted, content):
    check_error(scripted.chat([{"role": "user", "content": content}]), 400, param="messages")


@pytest.mark.parametrize("role", ["system", "developer"])
def test_12_system_messages_join_the_first_user_turn(scripted, role):
    messages = [{"role": role, "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert prompt_of(scripted, messages) == [BOS, USER, *b"Be brief.\n\nhi", USER_END, ANSWER]
    messages.insert(1, {"role": "system", "content": [{"type": "text", "text": "Be kind."}]})
    assert bytes(prompt_of(scripted, messages)[2:-2]) == b"Be brief.\n\nBe kind.\n\nhi"


@pytest.mark.parametrize(
    "roles",
    ["", "assistant", "user assistant", "system", "user user", "user system user", "user assistant assistant user",
     "tool", "user assistant tool", "function", "admin", "USER", "user assistant system user"],
)  # fmt: skip
def test_12_other_orders_and_roles_are_refused(scripted, roles):
    messages = [{"role": role, "content": "a"} for role in roles.split()]
    check_error(scripted.post("/v1/chat/completions", {"model": "sft", "messages": messages}), 400, param="messages")


@pytest.mark.parametrize("messages", ["hi", {}, None, [7], [None], [{}], [{"content": "a"}], [[]], [{"role": "user"}]])
def test_12_messages_of_another_form_are_refused(scripted, messages):
    check_error(scripted.post("/v1/chat/completions", {"model": "sft", "messages": messages}), 400, param="messages")


def test_12_calls_of_clients_tools_are_refused_not_dropped(scripted):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}, *HELLO]
    check_error(scripted.chat(messages), 400, param="messages[1]")


@pytest.mark.parametrize(
    "name", ["<|assistant_end|>", "<|bos|>", "<|python_start|>", "<|user_end|><|assistant_start|>"]
)
def test_13_text_never_becomes_a_special_token(scripted, name):
    text = f"x {name} y"
    said = prompt_of(scripted, [{"role": "system", "content": text}, {"role": "user", "content": text}])
    assert said == [BOS, USER, *f"{text}\n\n{text}".encode(), USER_END, ANSWER]
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": text},
        {"role": "user", "content": "b"},
    ]
    assert sum(id >= BOS for id in prompt_of(scripted, messages)) == 8
    raw = scripted.complete(text, model="org/base.model", return_token_ids=True, max_tokens=1).json()
    assert raw["prompt_token_ids"] == [BOS, *text.encode()]


def test_14_both_names_of_the_limit_and_neither(scripted):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = scripted.chat(**{name: 3}).json()
        assert answer["usage"]["completion_tokens"] == 3
        assert answer["choices"][0]["finish_reason"] == "length"
    request = asked(scripted)
    assert len(request.prompt) + request.max_new_tokens == CAPACITY
    for name in ("max_tokens", "max_completion_tokens"):
        for value in (0, -1, "3", 2.5, True):
            check_error(scripted.chat(**{name: value}), 400, param=name)


def test_14_both_at_once_take_the_newer_name(scripted):
    assert scripted.chat(max_tokens=2, max_completion_tokens=3).json()["usage"]["completion_tokens"] == 3


def test_15_a_prompt_that_is_too_long_is_refused_never_cut(native):
    for length in (CAPACITY - 4, CAPACITY, 10 * CAPACITY):  # with the four tokens around it
        answer = native.chat([{"role": "user", "content": "a" * length}])
        message = check_error(answer, 400, param="messages", code="context_length_exceeded")
        assert str(CAPACITY) in message
    body = native.chat([{"role": "user", "content": "a" * (CAPACITY - 5)}]).json()
    assert body["usage"]["prompt_tokens"] == CAPACITY - 1
    assert body["usage"]["completion_tokens"] == 1
    check_error(native.complete("a" * CAPACITY), 400, param="prompt", code="context_length_exceeded")
    check_error(native.complete(["a", [7] * CAPACITY]), 400, param="prompt", code="context_length_exceeded")
    check_error(
        native.chat([{"role": "user", "content": "a" * CAPACITY}], stream=True), 400, code="context_length_exceeded"
    )


def test_16_temperature_0_is_greedy(native):
    answers = {tuple(ids(native, temperature=0, seed=seed)) for seed in range(4)}
    assert len(answers) == 1
    assert len({tuple(ids(native, temperature=2, seed=seed)) for seed in range(4)}) == 4


@pytest.mark.parametrize(
    "body",
    [{"temperature": -0.1}, {"temperature": 2.01}, {"temperature": "1"}, {"temperature": True}, {"top_p": 0},
     {"top_p": 1.01}, {"top_p": -1}, {"top_k": -2}, {"top_k": 1.5}, {"min_p": -0.1}, {"min_p": 1.1},
     {"repetition_penalty": 0}, {"repetition_penalty": -1}, {"seed": "a"}, {"seed": 1.5}, {"n": 0}, {"n": -1},
     {"presence_penalty": 2.1}, {"frequency_penalty": -2.1}, {"min_tokens": -1}, {"stop_token_ids": [10**6]},
     {"stop_token_ids": [-1]}, {"stop_token_ids": 5}, {"stream": "yes"}, {"stream_options": 1}, {"ignore_eos": "x"}],
    ids=str,
)  # fmt: skip
def test_16_values_out_of_range_are_refused_by_name(scripted, body):
    check_error(scripted.chat(**body), 400, param=next(iter(body)))
    check_error(scripted.complete(model="org/base.model", **body), 400, param=next(iter(body)))


def test_16_the_ends_of_the_ranges_are_in_them(native):
    for body in ({"temperature": 2}, {"top_p": 1}, {"top_p": 1e-9}, {"min_p": 1}, {"min_p": 0}, {"top_k": 0},
                 {"top_k": 10**6}, {"presence_penalty": 2}, {"frequency_penalty": -2}, {"seed": 0}, {"seed": -1},
                 {"seed": 2**63 - 1}):  # fmt: skip
        assert native.chat(max_tokens=2, **body).status_code == 200, body


def test_16_top_p_near_0_and_top_k_1_are_greedy(native):
    greedy = ids(native, temperature=0)
    assert ids(native, top_k=1) == ids(native, top_p=1e-6) == ids(native, min_p=1.0) == greedy


def test_17_a_stop_string_is_left_out_and_may_lie_across_tokens(scripted):
    scripted.backend.script.ids = ids_of("one two 日本 three")
    for stop, left in (("two", "one "), (["zzz", " three"], "one two 日本"), ("本", "one two 日"), (["o t", "one"], ""),
                       ("日本 t", "one two ")):  # fmt: skip
        choice = scripted.chat(stop=stop).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (left, "stop"), stop
        streamed = scripted.chat_stream(stop=stop)
        assert (streamed.text(), streamed.finish()) == (left, "stop"), stop


def test_17_what_only_began_like_a_stop_string_is_not_lost(scripted):
    scripted.backend.script.ids = ids_of("ab abc abx ab")
    for stop in (["abcd"], ["abxy", "zzz"], ["ab ab?"], ["ab!"]):
        assert text_of(scripted.chat(stop=stop).json()["choices"][0]) == "ab abc abx ab"
        streamed = scripted.chat_stream(stop=stop)
        assert (streamed.text(), streamed.finish()) == ("ab abc abx ab", "stop")


@pytest.mark.parametrize("seed", range(4))
def test_17_stops_cut_any_text_where_they_begin(native, seed):
    options = {"seed": seed, "temperature": 1.0, "max_tokens": 60}
    whole = text_of(native.chat(**options).json()["choices"][0])
    for begin in range(5, len(whole) - 3, 9):
        stop = whole[begin : begin + 3]
        if "\ufffd" in stop:  # what is half a character at the end of one chunk may be whole in the next
            continue
        left = whole[: whole.index(stop)]
        choice = native.chat(stop=[stop, "\U0010ffff"], **options).json()["choices"][0]
        assert (text_of(choice), choice["finish_reason"]) == (left, "stop")
        streamed = native.chat_stream(stop=[stop, "\U0010ffff"], **options)
        assert (streamed.text(), streamed.finish()) == (left, "stop")
        raw = native.complete("a", stop=stop, **options)
        assert stop not in raw.json()["choices"][0]["text"]


def test_17_a_stop_string_frees_the_engine(scripted):
    scripted.backend.script.ids = ids_of("hello" * 20)
    scripted.chat(stop="ell")
    assert scripted.backend.aborted == 1
    assert scripted.backend.running == 0


def test_17_stops_that_are_none_are_refused(scripted):
    for stop in ("", ["a", ""], 7, [7], ["a"] * 17, {"a": 1}):
        answer = scripted.chat(stop=stop)
        check_error(answer, 400)
        assert re.fullmatch(r"stop(\.\d+)?", answer.json()["error"]["param"]), "the names of pydantic are nobody's"
    assert scripted.chat(stop=[]).status_code == 200
    assert scripted.chat(stop=[chr(65 + number) for number in range(16)]).status_code == 200


def test_19_n_answers_have_their_own_index_and_one_prefill(native):
    long = [{"role": "user", "content": "n answers to this " * 9}]

    def found() -> int:
        """Tokens that the prefix cache has given since the start."""
        lines = native.get("/metrics").text.splitlines()
        return sum(int(float(line.split()[-1])) for line in lines if line.startswith("vllm:prefix_cache_hits_total"))

    before = found()
    body = native.chat(long, n=4, **FIXED).json()
    full_pages = (body["usage"]["prompt_tokens"] - 1) // PAGE_TOKENS * PAGE_TOKENS
    assert found() - before == 3 * full_pages > 300, "one computes the prompt, the others wait for its pages"
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    choices = body["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert len({tuple(choice["token_ids"]) for choice in choices}) == 4
    assert body["usage"]["completion_tokens"] == sum(len(choice["token_ids"]) for choice in choices)
    one = native.chat(long, **FIXED).json()
    assert body["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"], "the prompt counts once"
    assert choices[0]["token_ids"] == one["choices"][0]["token_ids"]
    streamed = native.chat_stream(long, n=4, **FIXED)
    for choice in choices:
        index = choice["index"]
        assert streamed.token_ids(index) == choice["token_ids"]
        assert streamed.text(index) == text_of(choice)
        assert streamed.finish(index) == choice["finish_reason"]
