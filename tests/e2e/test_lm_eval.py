"""lm-evaluation-harness against the endpoint: the numbers that nanochat's own evaluation has, or a refusal."""

import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from api_backends import BOS, CREATED, END, TOKENIZER, ScriptedBackend, engine_of
from api_server import check_error, serving
from lm_eval_runs import ACCURACY, KINDS, Expected, LmEvalRun, expected_of, run_lm_eval, write_core_task, write_task

from nanochat import storage
from nanochat.data.tokenizer import NUM_BYTES, SPLIT_PATTERNS, Tokenizer
from nanochat.evaluation.core import CoreTask, load_bundle
from nanochat.evaluation.scoring import Option
from nanochat.exchange.hf_tokenizer import tokenizer_config, tokenizer_json
from nanochat.serving.prompts import chat_prompt

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
EXAMPLES = 12
CAPACITY = 1024
BY_TEXT = {"model": "base", "tokenized_requests": False}
"""lm-eval counts with the endpoint's tokenizer and sends texts, which get BOS."""
COLOURS = ("red", "green", "dark green", "dark blue", "light blue", "grey")
NAMES = ("Bob", "Christine", "Zo\u00eb", "\u5bff\u53f8")
SMALL = (
    CoreTask("colours", "multiple_choice", 2, "\nAnswer: ", 0.4, False, tuple(
        {"query": f"Question: Which colour has thing {number}?", "gold": number // 2 % 2,
         "choices": [COLOURS[(number + k) % 6] for k in range(2 + number % 3)]} for number in range(40)
    )),
    CoreTask("pronouns", "schema", 0, " ", 0.5, False, tuple(
        {"context_options": [f"Ann met {name} because Ann", f"Ann met {name} because {name}"],
         "continuation": f"was {mood}.", "gold": len(name + mood) % 2}
        for name in NAMES for mood in ("sad", "rich", "so old", "ill")
    )),
    CoreTask("counting", "language_modeling", 3, " ", 0.0, False, tuple(
        {"context": f"Count on: {n} {n + 1}  ", "continuation": f"{n + 2} {n + 3}"} for n in range(40)
    )),
)  # fmt: skip
"""A task of each kind."""
GENERATED_TOKENS, STOPS = 30, ["\n\n", "9"]
GENERATION = {
    "output_type": "generate_until", "doc_to_text": "{{context}}", "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": STOPS, "max_gen_toks": GENERATED_TOKENS, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip


def tokenizer_of(texts: list[str]) -> Tokenizer:
    import rustbpe

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), 700, pattern=SPLIT_PATTERNS["nanochat"])
    merges = [bytes(token) for token, rank in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])]
    return Tokenizer(merges[NUM_BYTES:], SPLIT_PATTERNS["nanochat"])


def trained_model(tokenizer: Tokenizer, texts: list[str], steps: int = 80):
    """A tiny model that knows some texts by heart: of the examples with exact answers some come out right."""
    import torch

    from nanochat.config.model import ModelConfig
    from nanochat.model.gpt import GPT

    config = ModelConfig(
        sequence_len=CAPACITY, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=64
    )
    model = GPT(config)
    model.initialize(torch.Generator().manual_seed(0))
    rows = [torch.tensor([tokenizer.bos, *tokenizer.encode_ordinary(text)]) for text in texts]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.loss(tokens[:, :-1].clamp(min=0), tokens[:, 1:]) / (tokens[:, 1:] >= 0).sum()
        loss.backward()
        optimizer.step()
    return model.eval()


@dataclass
class Evaluated:
    """Three tasks as files of lm-eval, a base and a chat model that are served, and what nanochat says of them."""

    url: str
    folder: Path
    tasks: dict[str, CoreTask]
    tokenizer: Tokenizer
    scorer: Any
    indices: dict[str, list[int]]

    def expected(self, label: str, *, bos: bool = True) -> list[Expected]:
        return expected_of(self.tasks[label], self.scorer, self.indices[label], bos=bos)

    @property
    def texts(self) -> list[str]:
        """Beginnings, of which the model knows some."""
        *_, task = self.tasks.values()
        return [task.prompts(index)[0] for index in self.indices[task.label]]

    def whole_texts(self) -> list[float]:
        """How likely each of `texts` is after BOS."""
        options = [Option((self.tokenizer.bos, *self.tokenizer.encode_ordinary(text)), 1) for text in self.texts]
        scores = self.scorer.score([[option] for option in options])
        return [-score.mean_nats * (len(option.tokens) - 1) for option, (score,) in zip(options, scores)]

    def answer(self, ids: list[int]) -> str:
        """The likeliest tokens one after the other, each by a forward of the whole row."""
        import torch

        row, model = list(ids), self.scorer.model
        ends = (self.tokenizer.bos, self.tokenizer.special("<|assistant_end|>"))
        with torch.no_grad():
            for _ in range(GENERATED_TOKENS):
                token = int(model.logits(model(torch.tensor([row])))[0, -1].argmax())
                if token in ends:
                    break
                row.append(token)
        return self.tokenizer.decode(row[len(ids) :])


def evaluated(folder: Path, tasks: Sequence[CoreTask]) -> Iterator[Evaluated]:
    from nanochat.evaluation.scoring import GPTScorer
    from nanochat.inference.tool_loop import ToolLoop
    from nanochat.serving.backend import EngineBackend, Hosted, ServedModel

    tokenizer = tokenizer_of([" ".join(map(str, row.values())) for task in tasks for row in task.rows[:300]])
    cutter = GPTScorer(trained_model(tokenizer, ["nothing"], steps=0), tokenizer)
    indices = {task.label: write_core_task(folder, task, cutter, tokenizer, EXAMPLES) for task in tasks}
    known = tasks[-1]
    model = trained_model(tokenizer, [known.prompts(index)[1] for index in indices[known.label][::2]])
    engines = [engine_of(model, max_running=8) for _ in range(2)]

    def served(name: str, is_chat: bool) -> ServedModel:
        return ServedModel(name, tokenizer, is_chat, CAPACITY, CREATED, f"runs/{name}/checkpoint")

    backend = EngineBackend([Hosted(served("base", False), engines[0], engines[0]),
                             Hosted(served("chat", True), engines[1], ToolLoop(engines[1], tokenizer))])  # fmt: skip
    with serving(backend, max_n=4) as server:
        scorer = GPTScorer(model, tokenizer)
        found = Evaluated(server.url, folder, {task.label: task for task in tasks}, tokenizer, scorer, indices)
        write_other_tasks(found)
        yield found
    backend.close()


def write_other_tasks(it: Evaluated) -> None:
    """Texts to continue, to answer as a chat, to score whole, and one that no model reads."""
    rows: dict[str, list[dict]] = {"base_answers": [], "chat_answers": []}
    for text in it.texts:
        as_text = [it.tokenizer.bos, *it.tokenizer.encode_ordinary(text)]
        as_chat = chat_prompt(it.tokenizer, [{"role": "user", "content": text}], 1)
        for name, prompt in zip(rows, (as_text, as_chat), strict=True):
            whole = it.answer(prompt)
            answer = re.split("|".join(STOPS), whole)[0]
            rows[name].append({"context": text, "answer": answer, "is_cut": answer != whole})
    for name, of_one in rows.items():
        write_task(it.folder, name, GENERATION, of_one)
    whole = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
             "metric_list": [{"metric": "bits_per_byte"}]}  # fmt: skip
    write_task(it.folder, "whole_texts", whole, [{"text": text} for text in it.texts])
    too_long = {"context": "Once again. " * CAPACITY, "continuation": " The end."}
    write_task(it.folder, "too_long", KINDS["language_modeling"] | ACCURACY, [too_long])


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Iterator[Evaluated]:
    yield from evaluated(tmp_path_factory.mktemp("small"), SMALL)


@pytest.fixture(scope="module")
def core(tmp_path_factory, test_data) -> Iterator[Evaluated]:
    bundle = load_bundle(str(test_data / "core"))
    tasks = [bundle.tasks[label] for label in ("arc_easy", "winograd", "bigbench_qa_wikidata")]
    yield from evaluated(tmp_path_factory.mktemp("core"), tasks)


def check_alike(it: Evaluated, run: LmEvalRun, *, bos: bool = True) -> None:
    assert run.code == 0, run.output[-3000:]
    for label in it.tasks:
        expected = it.expected(label, bos=bos)
        found = run.likelihoods(label)
        assert len(found) == len(expected) == EXAMPLES
        for one, said in zip(expected, found):
            assert [logprob for logprob, _ in said] == pytest.approx(one.logprobs, rel=0, abs=1e-4), (label, one)
            assert [is_greedy for _, is_greedy in said] == one.is_greedy, (label, one)
        accuracy = sum(one.is_right for one in expected) / EXAMPLES
        assert run.accuracy[label] == pytest.approx(accuracy, abs=1e-9), label
        if bos:
            assert 0 < accuracy < 1, f"{label}: all or none right tells nothing"


def check_answers(run: LmEvalRun, task: str) -> None:
    samples = run.samples[task]
    assert [sample["filtered_resps"][0] for sample in samples] == [sample["doc"]["answer"] for sample in samples]
    assert {sample["doc"]["is_cut"] for sample in samples} == {True, False}, (
        "stops must be seen at work, and be missing"
    )


@needs_lm_eval
def test_texts_have_the_numbers_of_our_own_evaluation(small):
    run = run_lm_eval(small.folder, small.url, [*small.tasks, "base_answers"], "--batch_size", "4", **BY_TEXT)
    check_alike(small, run)
    check_answers(run, "base_answers")


@needs_lm_eval
def test_core_tasks_have_the_numbers_of_our_own_evaluation(core):
    check_alike(core, run_lm_eval(core.folder, core.url, [*core.tasks], "--batch_size", "4", **BY_TEXT))


@needs_lm_eval
def test_ids_of_an_exported_tokenizer_have_the_numbers_too(small):
    pytest.importorskip("transformers")
    folder = small.folder / "tokenizer"
    storage.write_json(f"{folder}/tokenizer.json", tokenizer_json(small.tokenizer))
    storage.write_json(f"{folder}/tokenizer_config.json", tokenizer_config(small.tokenizer, CAPACITY, is_chat=False))
    run = run_lm_eval(
        small.folder, small.url, [*small.tasks, "base_answers"], model="base", tokenizer=folder,
        tokenizer_backend="huggingface", add_bos_token=True, num_concurrent=3,
    )  # fmt: skip
    check_alike(small, run)
    check_answers(run, "base_answers")


@needs_lm_eval
def test_ids_are_scored_as_they_come_so_without_bos_the_numbers_are_others(small):
    """What lm-eval does if it is told nothing: the endpoint's tokenizer, ids, and no BOS but before whole texts."""
    run = run_lm_eval(
        small.folder, small.url, [*small.tasks, "whole_texts"], model="base", num_concurrent=3,
        custom_prefix_token_id=small.tokenizer.bos,
    )  # fmt: skip
    check_alike(small, run, bos=False)
    label = next(iter(small.tasks))
    assert run.likelihoods(label)[0][0][0] != pytest.approx(small.expected(label)[0].logprobs[0], abs=0.01)
    said = [float(sample["filtered_resps"][0]) for sample in run.samples["whole_texts"]]
    assert said == pytest.approx(small.whole_texts(), rel=0, abs=1e-4)


@needs_lm_eval
def test_chats_have_the_answers_of_the_model(small):
    run = run_lm_eval(
        small.folder, small.url, ["chat_answers"], "--apply_chat_template", kind="local-chat-completions", model="chat"
    )
    assert run.code == 0, run.output[-3000:]
    check_answers(run, "chat_answers")
    run = run_lm_eval(
        small.folder, small.url, ["counting"], "--apply_chat_template", kind="local-chat-completions", model="chat"
    )
    assert run.code != 0, "chats have no likelihoods of what was sent"
    assert "NotImplementedError" in run.output


@needs_lm_eval
@pytest.mark.parametrize(
    ("task", "arguments", "error"),
    [("too_long", BY_TEXT, f"this model reads {CAPACITY}, answer included"),
     ("whole_texts", {"model": "base"}, "/tokenize failed after 3 attempts: 400"),
     ("whole_texts", {**BY_TEXT, "custom_prefix_token_id": "BOS"}, "begins with <|bos|>, which as text is seven")],
    ids=["longer than the model reads", "BOS of the name of BOS", "BOS as text"],
)  # fmt: skip
def test_what_cannot_be_scored_ends_the_run(small, task, arguments, error):
    """Instead of a number that is not the text's."""
    given = {name: small.tokenizer.bos if value == "BOS" else value for name, value in arguments.items()}
    run = run_lm_eval(small.folder, small.url, [task], **given)
    assert run.code != 0
    assert error in run.output


SCORED = {"echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1234}
"""What lm-eval sends beside prompt and model."""


@pytest.mark.parametrize("prompt", [[BOS, *b"The sea"], "The sea", "\u5bff\u53f8"])
@pytest.mark.parametrize("model", ["sft", "pretrain"])
@pytest.mark.parametrize("next_id", [END, BOS, "\u5bff".encode()[0], TOKENIZER.special("<|python_start|>"), 65])
def test_an_echo_has_what_was_sent_and_one_token_of_answer(native, prompt, model, next_id):
    """lm-eval cuts the last one off, whatever it is."""
    body = native.complete(prompt, model=model, **SCORED, logit_bias={str(next_id): 100}).json()
    sent = [*prompt.encode()] if isinstance(prompt, str) else prompt
    told = body["choices"][0]["logprobs"]
    assert {len(told[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")} == {len(sent) + 1}
    assert told["tokens"][-1] == native.complete([next_id], **SCORED).json()["choices"][0]["logprobs"]["tokens"][0]
    assert (told["token_logprobs"][0] is None) == isinstance(prompt, list), "a text's first token comes after BOS"
    assert all(isinstance(logprob, float) for logprob in told["token_logprobs"][1:])
    both = native.complete([prompt, [BOS, 65]], model=model, n=2, **SCORED).json()["choices"]
    counts = [len(choice["logprobs"]["tokens"]) for choice in both]
    assert counts == [len(sent) + 1, len(sent) + 1, 3, 3], "each prompt by its own kind"


@pytest.mark.parametrize("path", ["chat", "complete"])
@pytest.mark.parametrize(
    ("name", "value", "harmless"),
    [("prompt_logprobs", 1, None), ("truncate_prompt_tokens", 8, None), ("use_beam_search", True, False),
     ("num_beams", 4, 1), ("allowed_token_ids", [65], []), ("bad_words", ["a"], []), ("guided_choice", ["a"], []),
     ("guided_json", {"type": "object"}, None), ("guided_regex", "a*", None), ("guided_grammar", "root ::= x", None),
     ("structured_outputs", {"choice": ["a"]}, None), ("include_stop_str_in_output", True, False),
     ("skip_special_tokens", False, True), ("add_generation_prompt", False, True), ("chat_template", "{{x}}", None),
     ("continue_final_message", True, False)],
)  # fmt: skip
def test_what_would_change_the_answer_is_refused_by_name(scripted, path, name, value, harmless):
    ask = scripted.chat if path == "chat" else partial(scripted.complete, model="org/base.model")
    assert name in check_error(ask(**{name: value}), 400, param=name)
    check_error(ask(**{name: value}, stream=True), 400, param=name)
    assert ask(**{name: harmless}).status_code == 200
    assert ask(**{name: None}).status_code == 200


def test_chats_have_no_echo_and_texts_always_bos(scripted):
    check_error(scripted.chat(echo=True), 400, param="echo")
    assert scripted.chat(echo=False).status_code == 200
    base = partial(scripted.complete, model="org/base.model")
    check_error(base(add_special_tokens=False), 400, param="add_special_tokens")
    assert base(add_special_tokens=True).status_code == 200
    for prompt in ("<|bos|>The sea", ["The sea", "<|bos|>"]):
        check_error(base(prompt, **SCORED), 400, param="prompt")
        assert base(prompt).status_code == 200, "a text like any other"


@pytest.mark.parametrize(
    ("body", "code"), [({"prompt": [[BOS, 65]] * 5}, None), ({"prompt": "a" * 300}, "context_length_exceeded"),
                       ({"prompt": [BOS] * 256}, "context_length_exceeded"), ({"logprobs": 6}, "invalid_value")],
)  # fmt: skip
def test_more_than_is_scored_at_once_is_refused(native, body, code):
    check_error(native.complete(**{**SCORED, **body}), 400, param=next(iter(body)), code=code)


def test_a_tokenizer_must_be_named_where_there_are_several():
    """lm-eval names none, and would count the tokens of another model."""
    backend = ScriptedBackend()
    other = Tokenizer([b"he"], SPLIT_PATTERNS["nanochat"])
    backend.models["org/base.model"] = replace(backend.models["org/base.model"], tokenizer=other)
    with serving(backend) as server:
        check_error(server.get("/tokenizer_info"), 400, param="model")
        check_error(server.post("/tokenize", {"prompt": "hello"}), 400, param="model")
        check_error(server.post("/detokenize", {"tokens": [65]}), 400, param="model")
        named = server.post("/tokenize", {"prompt": "hello", "model": "org/base.model"})
        assert named.json()["tokens"] == [other.bos, *other.encode_ordinary("hello")]
        assert server.get("/tokenizer_info?model=sft").status_code == 200
