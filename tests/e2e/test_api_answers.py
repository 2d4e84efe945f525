"""Points 24 to 26 of the API's checklist, and what is ours beside it: token ids, parts, answers that are continued."""

import time

import pytest
from api_backends import CALCULATION, CREATED, END, TOKENIZER, ids_of
from api_server import HELLO, check_error, text_of

from nanochat.data.conversations import render_parts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(40)]
CALC = [*render_parts(TOKENIZER, CALCULATION), END]
SAID = "6*7 is , 確か🙂."
PARTS = [{"type": part.kind, "text": part.text} for part in CALCULATION]
OUTPUT_START, OUTPUT_END, CALL_END = (
    TOKENIZER.special(f"<|{name}|>") for name in ("output_start", "output_end", "python_end")
)


def test_24_the_shape_of_a_chat(scripted):
    before = int(time.time())
    body = scripted.chat().json()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert before <= body["created"] <= time.time()
    assert body["model"] == "sft"
    [choice] = body["choices"]
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == "hello"
    assert "token_ids" not in choice
    assert "parts" not in choice["message"]
    assert scripted.chat().json()["id"] != body["id"]
    assert CREATED < body["created"]


def test_24_the_shape_of_a_completion(scripted):
    body = scripted.complete(model="org/base.model").json()
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["model"] == "org/base.model"
    [choice] = body["choices"]
    assert choice["text"] == "hello"
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)


@pytest.mark.parametrize("text", ["", "日本語とエモジ👩‍👩‍👧‍👦", 'a\n\n"b"\\ \t\u0000\u2028 c', "x" * 200])
def test_24_content_is_exactly_what_was_said(scripted, text):
    scripted.backend.script.ids = ids_of(text)
    assert scripted.chat().json()["choices"][0]["message"]["content"] == text
    assert scripted.chat_stream().text() == text


def test_25_usage_counts_every_token_of_the_answer(native, scripted):
    scripted.backend.script.cached = 3
    usage = scripted.chat().json()["usage"]
    assert usage["completion_tokens"] == len(b"hello") + 1, "the end token is one"
    assert usage["prompt_tokens"] == len(b"hello") + 4
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3}
    body = native.chat(model="calc", return_token_ids=True).json()
    assert body["choices"][0]["token_ids"] == CALC
    assert body["usage"]["completion_tokens"] == len(CALC), "the calculator's tokens are tokens of the answer"
    assert body["usage"]["prompt_tokens"] == len(body["prompt_token_ids"])


def test_25_tokens_of_a_prefix_that_was_found_are_cached(native):
    messages = [{"role": "user", "content": "a prefix that nobody else has 4711 " * 4}]
    first = native.chat(messages, max_tokens=2).json()["usage"]
    again = native.chat(messages, max_tokens=2).json()["usage"]
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert 100 < again["prompt_tokens_details"]["cached_tokens"] < again["prompt_tokens"]
    assert again["prompt_tokens"] == first["prompt_tokens"]


def test_25_a_stop_string_leaves_usage_with_the_tokens_that_were_made(scripted):
    scripted.backend.script.ids = ids_of("one two three")
    body = scripted.chat(stop="two", return_token_ids=True).json()
    assert body["usage"]["completion_tokens"] == len("one two") == len(body["choices"][0]["token_ids"])


def test_26_why_an_answer_ended(scripted):
    assert scripted.chat().json()["choices"][0]["finish_reason"] == "stop"
    assert scripted.chat(max_tokens=6).json()["choices"][0]["finish_reason"] == "stop", "the end token just fits"
    assert scripted.chat(max_tokens=5).json()["choices"][0]["finish_reason"] == "length"
    assert scripted.chat(stop="ll").json()["choices"][0]["finish_reason"] == "stop"
    assert scripted.chat(max_tokens=4, stop="ll").json()["choices"][0]["finish_reason"] == "stop"
    assert scripted.chat(max_tokens=3, stop="ll").json()["choices"][0]["finish_reason"] == "length"
    for body, reason in (({}, "stop"), ({"max_tokens": 5}, "length"), ({"stop": "ll"}, "stop")):
        assert scripted.chat_stream(**body).finish() == reason


def test_26_text_that_was_held_back_comes_when_the_answer_ends(scripted):
    scripted.backend.script.ids = ids_of("hello wor")
    for body in ({"stop": "world"}, {"stop": "world", "max_tokens": 9}):
        assert scripted.chat(**body).json()["choices"][0]["message"]["content"] == "hello wor"
        assert scripted.chat_stream(**body).text() == "hello wor"


def test_token_ids_of_a_chunk_are_those_whose_text_is_in_it(scripted):
    scripted.backend.script.ids = ids_of("ab 日本🙂 é")
    stream = scripted.chat_stream(return_token_ids=True)
    assert stream.chunks[0]["prompt_token_ids"][-6:-2] == [*b"ello"[-4:]]
    assert stream.token_ids() == ids_of("ab 日本🙂 é")
    for choice in stream.choices():
        assert TOKENIZER.decode([id for id in choice["token_ids"] if id != END] if "token_ids" in choice else []) == (
            text_of(choice)
        )
    assert all("prompt_token_ids" not in chunk for chunk in stream.chunks[1:])


def test_parts_keep_the_calculator_apart_from_the_text(native):
    message = native.chat(model="calc", return_parts=True).json()["choices"][0]["message"]
    assert message["parts"] == PARTS
    assert message["content"] == SAID
    assert native.chat(model="calc").json()["choices"][0]["message"]["content"] == SAID
    stream = native.chat_stream(model="calc", return_parts=True)
    assert stream.parts() == PARTS
    assert stream.text() == SAID


def test_parts_can_be_sent_back_as_an_assistants_content(native):
    body = native.chat(model="calc", return_parts=True, return_token_ids=True).json()
    messages = [*HELLO, {"role": "assistant", "content": body["choices"][0]["message"]["parts"]}, *HELLO]
    prompt = native.chat(messages, model="calc", return_token_ids=True).json()["prompt_token_ids"]
    assert prompt[: len(body["prompt_token_ids"]) + len(CALC)] == body["prompt_token_ids"] + CALC


def test_two_calls_in_a_row_are_two_parts(scripted):
    from nanochat.data.conversations import Part

    twice = (Part("python", "1"), Part("python_output", "1"), Part("python", "2"), Part("python_output", "2"))
    scripted.backend.script.ids = [*render_parts(TOKENIZER, twice), END]
    expected = [{"type": part.kind, "text": part.text} for part in twice]
    assert scripted.chat(return_parts=True).json()["choices"][0]["message"]["parts"] == expected
    assert scripted.chat_stream(return_parts=True).parts() == expected
    assert scripted.chat().json()["choices"][0]["message"]["content"] == ""


SAMPLED = {"temperature": 1.2, "top_p": 0.97, "seed": 12, "frequency_penalty": 0.5, "presence_penalty": 0.2,
           "repetition_penalty": 1.1, "max_tokens": 40, "return_token_ids": True}  # fmt: skip


@pytest.mark.parametrize("is_stream", [False, True])
def test_an_answer_goes_on_from_every_cut_as_if_it_had_not_been_cut(native, is_stream):
    whole = native.chat(**SAMPLED).json()
    said = whole["choices"][0]["token_ids"]
    assert len(said) > 20
    for cut in range(1, len(said)):
        rest = {**SAMPLED, "continue_token_ids": said[:cut]}
        if is_stream:
            stream = native.chat_stream(**rest, stream_options={"include_usage": True})
            ids, usage, finish = stream.token_ids(), stream.chunks[-1]["usage"], stream.finish()
            assert stream.chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
        else:
            body = native.chat(**rest).json()
            [choice] = body["choices"]
            ids, usage, finish = choice["token_ids"], body["usage"], choice["finish_reason"]
        assert said[:cut] + ids == said, cut
        assert finish == whole["choices"][0]["finish_reason"]
        for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert usage[count] == whole["usage"][count], (cut, count)


@pytest.mark.parametrize("stop", [[], ["é!x", "本x"], [" é"], ["日本🙂 ?"]])
def test_a_stream_that_was_cut_between_its_chunks_goes_on_with_the_next_character(scripted, stop):
    scripted.backend.script.ids = ids_of("ab 日本🙂 é!")
    stream = scripted.chat_stream(return_token_ids=True, stop=stop)
    text = stream.text()
    seen, had = "", []
    for choice in stream.choices()[:-1]:
        seen += text_of(choice)
        had += choice.get("token_ids") or []
        if had:
            assert seen + scripted.chat_stream(continue_token_ids=had, stop=stop).text() == text


def test_an_answer_with_a_call_goes_on_from_every_cut_outside_the_tools_output(native):
    first, last = CALC.index(CALL_END), CALC.index(OUTPUT_END)
    for cut in range(1, len(CALC)):
        answer = native.chat(model="calc", continue_token_ids=CALC[:cut], return_token_ids=True, return_parts=True)
        if first + 1 < cut <= last:  # right after the call the tool is asked again
            check_error(answer, 400, param="continue_token_ids")
            continue
        body = answer.json()
        assert CALC[:cut] + body["choices"][0]["token_ids"] == CALC
        assert body["usage"]["completion_tokens"] == len(CALC)


def test_completions_go_on_too(native):
    options = {**SAMPLED, "max_tokens": 20}
    said = native.complete("once", **options).json()["choices"][0]["token_ids"]
    for cut in (1, 7, len(said) - 1):
        answer = native.complete("once", **options, continue_token_ids=said[:cut]).json()
        assert said[:cut] + answer["choices"][0]["token_ids"] == said


@pytest.mark.parametrize(
    "ids",
    [[END], [65, END], [10**6], [-1], ["a"], "abc", [OUTPUT_START], [OUTPUT_END],
     [65, OUTPUT_START, 66], [CALL_END, 65], [CALL_END, OUTPUT_START, 65], [TOKENIZER.bos], [65] * 300, [1.5], [True]],
    ids=str,
)  # fmt: skip
def test_ids_that_no_answer_begins_with_are_refused(native, ids):
    check_error(native.chat(continue_token_ids=ids), 400, param="continue_token_ids")


def test_only_one_answer_can_go_on(native):
    check_error(native.chat(continue_token_ids=[65], n=2), 400, param="continue_token_ids")
    check_error(native.complete(["a", "b"], continue_token_ids=[65]), 400, param="continue_token_ids")
    assert native.chat(continue_token_ids=[], max_tokens=2).status_code == 200
