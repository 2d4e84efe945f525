"""Points 18 and 20 to 23 of the API's checklist: seeds, penalties, bias, log probabilities; what is refused instead."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
from api_backends import BOS, END, TOKENIZER, ids_of, logprobs_of, random_model
from api_server import HELLO, check_error, text_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(40)]
CLOSE = {"rel": 1e-4, "abs": 2e-4}


@pytest.fixture(scope="module")
def models():
    """The models behind the names, as they were made."""
    return {"sft": random_model(0), "pretrain": random_model(1)}


def whole(answer) -> dict:
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_18_a_seed_gives_the_same_answer_in_any_company(native):
    options = {"temperature": 1.1, "top_p": 0.98, "max_tokens": 40, "return_token_ids": True, "frequency_penalty": 0.3}
    prompts = [[{"role": "user", "content": f"question {number} " * (1 + number % 5)}] for number in range(6)]

    def ask(number: int) -> list[int]:
        answer = whole(native.chat(prompts[number % 6], seed=number, **options))
        return answer["choices"][0]["token_ids"]

    alone = [ask(number) for number in range(6)]
    with ThreadPoolExecutor(24) as pool:
        company = [pool.submit(native.chat, max_tokens=50, seed=number) for number in range(6)]
        together = list(pool.map(ask, list(range(6)) * 3))
        assert all(one.result().status_code == 200 for one in company)
    assert together == alone * 3
    assert len(set(map(tuple, alone))) == 6


def test_18_a_seed_is_of_its_answer_and_others_differ(native):
    options = {"temperature": 1.0, "max_tokens": 12, "return_token_ids": True}
    drawn = [tuple(whole(native.chat(**options))["choices"][0]["token_ids"]) for _ in range(4)]
    assert len(set(drawn)) == 4, "without a seed, each has another"
    seeded = [tuple(whole(native.chat(seed=seed, **options))["choices"][0]["token_ids"]) for seed in (1, 2, 1)]
    assert seeded[0] == seeded[2] != seeded[1]


def test_18_streams_and_completions_have_seeds_too(native):
    options = {"seed": 5, "temperature": 1.0, "max_tokens": 20, "return_token_ids": True}
    answer = whole(native.complete("abc", **options))["choices"][0]
    assert native.complete_stream("abc", **options).token_ids() == answer["token_ids"]
    assert whole(native.complete([BOS, *b"abc"], **options))["choices"][0]["token_ids"] == answer["token_ids"]


def test_20_logit_bias_bans_and_forces(native):
    options = {"max_tokens": 8, "return_token_ids": True, "temperature": 1.0, "seed": 1}
    forced = whole(native.chat(logit_bias={"65": 100}, **options))["choices"][0]
    assert forced["message"]["content"] == "A" * 8
    drawn = whole(native.chat(**options))["choices"][0]["token_ids"]
    banned = whole(native.chat(logit_bias={str(id): -100 for id in drawn}, **options))["choices"][0]["token_ids"]
    assert not set(drawn) & set(banned)


def test_20_penalties_leave_nothing_to_repeat(native):
    bias = {str(id): 40 for id in range(65, 73)}
    options = {"temperature": 0, "max_tokens": 8, "return_token_ids": True, "logit_bias": bias}
    plain = whole(native.chat(**options))["choices"][0]["token_ids"]
    assert len(set(plain)) < 8
    frequency = whole(native.chat(**options, frequency_penalty=2))["choices"][0]["token_ids"]
    repetition = whole(native.chat(**options, repetition_penalty=10))["choices"][0]["token_ids"]
    assert len(set(repetition)) > len(set(plain)) or len(set(frequency)) > len(set(plain))


def test_20_the_first_token_under_penalties_is_what_the_formula_says(native, models):
    prompt = [BOS, *b"penalties"]
    logprobs = logprobs_of(models["pretrain"], prompt)[-1]
    best = max(range(len(logprobs)), key=logprobs.__getitem__)
    bias = {str(best): -1.0}
    expected = max(range(len(logprobs)), key=lambda id: logprobs[id] - (id == best))
    options = {"max_tokens": 1, "temperature": 0, "return_token_ids": True}
    assert whole(native.complete(prompt, **options))["choices"][0]["token_ids"] == [best]
    assert whole(native.complete(prompt, logit_bias=bias, **options))["choices"][0]["token_ids"] == [expected]
    # Presence and frequency are of the answer alone: they do not move its first token.
    moved = whole(native.complete(prompt, presence_penalty=2, frequency_penalty=2, **options))
    assert moved["choices"][0]["token_ids"] == [best]


@pytest.mark.parametrize(
    "bias", [{"x": 1}, {"-1": 1}, {"1000000": 1}, {"65": 101}, {"65": "1"}, {"65": None}, [1], 5, {"1.5": 0}]
)
def test_20_bias_of_another_form_is_refused(native, bias):
    check_error(native.chat(logit_bias=bias), 400, param="logit_bias")


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_21_logprobs_are_those_of_the_models_own_forward(native, models, temperature, seed):
    body = whole(native.chat(logprobs=True, top_logprobs=5, max_tokens=24, temperature=temperature, seed=seed,
                             return_token_ids=True))  # fmt: skip
    choice, prompt = body["choices"][0], body["prompt_token_ids"]
    content = choice["logprobs"]["content"]
    said = choice["token_ids"]
    rows = logprobs_of(models["sft"], prompt + said)[len(prompt) - 1 :]
    # What the calculator said was not drawn: it has no log probability.
    start, end = (TOKENIZER.special(f"<|output_{name}|>") for name in ("start", "end"))
    assert not {start, end} & set(said), "choose another seed: this one calls the calculator"
    assert len(content) == len(said)
    for entry, id, row in zip(content, said, rows):
        assert entry["logprob"] == pytest.approx(row[id], **CLOSE)
        assert entry["bytes"] == list(TOKENIZER.decode_bytes([id]))
        best = sorted(row, reverse=True)[:5]
        assert [one["logprob"] for one in entry["top_logprobs"]] == pytest.approx(best, **CLOSE)
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
        for one in entry["top_logprobs"]:
            assert set(one) == {"token", "logprob", "bytes"}
            assert row[ids_of_bytes(one["bytes"])] == pytest.approx(one["logprob"], **CLOSE)


def ids_of_bytes(data: list[int]) -> int:
    name = bytes(data).decode("latin-1")
    return TOKENIZER.special(name) if len(data) > 1 else data[0]


def test_21_a_stream_has_the_same_logprobs(native):
    options = {"logprobs": True, "top_logprobs": 3, "max_tokens": 30, "temperature": 1.0, "seed": 4}
    content = whole(native.chat(**options))["choices"][0]["logprobs"]["content"]
    choices = native.chat_stream(**options).choices()
    streamed = [entry for choice in choices for entry in (choice.get("logprobs") or {"content": []})["content"]]
    for one, other in zip(streamed, content, strict=True):
        assert one["bytes"] == other["bytes"]
        assert one["logprob"] == pytest.approx(other["logprob"], **CLOSE)


def test_21_bytes_put_together_are_the_text(scripted):
    scripted.backend.script.ids = ids_of("é日本🙂!")
    choice = whole(scripted.chat(logprobs=True, top_logprobs=0))["choices"][0]
    content = choice["logprobs"]["content"]
    assert (
        bytes(byte for entry in content for byte in entry["bytes"] if len(entry["bytes"]) == 1).decode() == "é日本🙂!"
    )
    assert all(entry["top_logprobs"] == [] for entry in content)


def test_21_no_logprobs_unless_asked_for(scripted):
    assert whole(scripted.chat())["choices"][0]["logprobs"] is None
    assert whole(scripted.chat(logprobs=False))["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("count", [0, 20])
def test_21_so_many_top_logprobs_as_asked(native, count):
    content = whole(native.chat(logprobs=True, top_logprobs=count, max_tokens=2))["choices"][0]["logprobs"]["content"]
    assert all(len(entry["top_logprobs"]) == count for entry in content)


@pytest.mark.parametrize(
    "body", [{"top_logprobs": 21, "logprobs": True}, {"top_logprobs": -1, "logprobs": True}, {"top_logprobs": 2},
             {"logprobs": 3}, {"logprobs": "true"}], ids=str,
)  # fmt: skip
def test_21_other_logprobs_are_refused(scripted, body):
    check_error(scripted.chat(**body), 400, param=next(iter(body)))


def test_21_echo_gives_the_prompts_logprobs(native, models):
    prompt = [BOS, *"echo this 🙂 ".encode() * 10]
    body = whole(native.complete(prompt, echo=True, logprobs=3, max_tokens=5, temperature=0, return_token_ids=True))
    choice = body["choices"][0]
    told = choice["logprobs"]
    row_ids = prompt + choice["token_ids"]
    rows = logprobs_of(models["pretrain"], row_ids)
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["top_logprobs"]) == len(row_ids)
    assert len(told["text_offset"]) == len(row_ids)
    assert told["token_logprobs"][0] is None
    assert told["top_logprobs"][0] is None
    expected = [rows[place][id] for place, id in enumerate(row_ids[1:])]
    assert told["token_logprobs"][1:] == pytest.approx(expected, **CLOSE)
    for top, row in zip(told["top_logprobs"][1:], rows):
        assert sorted(top.values(), reverse=True)[:3] == pytest.approx(sorted(row, reverse=True)[:3], **CLOSE)


def test_21_echo_without_an_answer_scores_a_text_as_lm_eval_does(native, models):
    """Context and continuation as ids, max_tokens 0 or 1, logprobs 1: how likely, and whether the likeliest."""
    ids = [BOS, *b"The sea is wide."]
    rows = logprobs_of(models["pretrain"], ids)
    expected = [rows[place][id] for place, id in enumerate(ids[1:])]
    for max_tokens in (0, 1):
        body = whole(
            native.complete([ids, ids], echo=True, logprobs=1, max_tokens=max_tokens, temperature=0, seed=1234)
        )
        for choice in body["choices"]:
            told = choice["logprobs"]
            assert told["token_logprobs"][1 : len(ids)] == pytest.approx(expected, **CLOSE)
            assert len(told["tokens"]) == len(ids) + max_tokens
            for place, (token, top) in enumerate(zip(told["tokens"][1 : len(ids)], told["top_logprobs"][1 : len(ids)])):
                is_greedy = max(rows[place]) == rows[place][ids[place + 1]]
                assert is_greedy == (token == max(top, key=top.get))


def test_21_completions_report_the_chosen_token_beside_the_likeliest(native):
    """OpenAI: `the API will always return the logprob of the sampled token, so up to logprobs+1 elements`."""
    body = whole(native.complete("abc", logprobs=2, max_tokens=20, temperature=2.0, seed=3))
    told = body["choices"][0]["logprobs"]
    for token, logprob, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert len(top) in (2, 3)
        assert top[token] == pytest.approx(logprob)


def test_21_text_offsets_are_where_the_tokens_texts_begin(scripted):
    scripted.backend.script.ids = ids_of("xyz")
    body = whole(scripted.complete("ab", model="org/base.model", logprobs=1, echo=True))
    choice = body["choices"][0]
    assert choice["text"] == "abxyz"
    told = choice["logprobs"]
    for token, offset in zip(told["tokens"], told["text_offset"]):
        if len(token) == 1:
            assert choice["text"][offset] == token
    assert told["text_offset"] == sorted(told["text_offset"])


def test_21_no_number_that_json_lacks(native):
    answer = native.chat(logprobs=True, top_logprobs=20, max_tokens=4, logit_bias={"65": -100})
    for entry in whole(answer)["choices"][0]["logprobs"]["content"]:
        assert all(math.isfinite(one["logprob"]) for one in [entry, *entry["top_logprobs"]])


@pytest.mark.parametrize("kind", ["json_object", "json_schema", "grammar"])
def test_22_response_formats_are_refused_by_name(scripted, kind):
    check_error(scripted.chat(response_format={"type": kind, "json_schema": {"name": "a", "schema": {}}}), 400,
                param="response_format")  # fmt: skip


def test_22_the_format_text_is_what_there_is(scripted):
    assert text_of(whole(scripted.chat(response_format={"type": "text"}))["choices"][0]) == "hello"


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    "body",
    [{"tools": [TOOL]}, {"tools": [TOOL], "tool_choice": "auto"}, {"functions": [{"name": "f"}]},
     {"tool_choice": "required"}, {"tool_choice": {"type": "function", "function": {"name": "f"}}},
     {"function_call": {"name": "f"}}, {"modalities": ["text", "audio"]},
     {"audio": {"voice": "alloy", "format": "wav"}}],
    ids=lambda body: ",".join(body),
)  # fmt: skip
def test_23_tools_and_sound_are_refused_by_name(scripted, body):
    error = scripted.chat(**body)
    check_error(error, 400)
    assert error.json()["error"]["param"] in body
    check_error(scripted.chat(**body, stream=True), 400)


@pytest.mark.parametrize(
    "body", [{"tools": []}, {"tool_choice": "none"}, {"modalities": ["text"]}, {"functions": None}]
)
def test_23_no_tools_are_no_error(scripted, body):
    assert text_of(whole(scripted.chat(HELLO, **body))["choices"][0]) == "hello"


def test_23_tools_that_must_not_be_called_are_no_error(scripted):
    """OpenAI: with tool_choice none `the model will not call any tool`: nothing is lost."""
    assert scripted.chat(tools=[TOOL], tool_choice="none").status_code == 200


def test_20_ids_beyond_the_end_are_not_drawn(native):
    ids = whole(native.chat(max_tokens=60, temperature=2.0, top_k=-1, seed=9, return_token_ids=True))["choices"][0][
        "token_ids"
    ]
    assert max(ids) < TOKENIZER.vocab_size
    assert END not in ids[:-1]
