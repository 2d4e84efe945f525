"""CORE against a second implementation (naive_core.py): prompts, spans, mean nats and verdicts of single examples."""

import dataclasses

import pytest
import rustbpe
import torch
from naive_core import gpt_forward, naive_choice, naive_is_right, naive_prompts, naive_scores, naive_spans, randomise
from small_bundle import write_bundle

from nanochat.config.model import ModelConfig
from nanochat.data.tokenizer import NUM_BYTES, SPLIT_PATTERNS, Tokenizer
from nanochat.evaluation.core import CoreTask, load_bundle, score_examples
from nanochat.evaluation.scoring import GPTScorer
from nanochat.model.gpt import GPT


def tokenizer_of(texts: list[str], vocab_size: int) -> Tokenizer:
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size, pattern=SPLIT_PATTERNS["nanochat"])
    merges = [bytes(token) for token, rank in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])]
    return Tokenizer(merges[NUM_BYTES:], SPLIT_PATTERNS["nanochat"])


def all_texts(tasks) -> list[str]:
    return [" ".join(map(str, row.values())) for task in tasks for row in task.rows[:300]]


def random_scorer(tasks, sequence_len: int) -> GPTScorer:
    """Every part of the architecture on, every parameter random."""
    tokenizer = tokenizer_of(all_texts(tasks), 700)
    config = ModelConfig(
        sequence_len=sequence_len, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_kv_head=1, n_embd=32,
        window_pattern="SL", smear=True,
    )  # fmt: skip
    return GPTScorer(randomise(GPT(config)).eval(), tokenizer, 3000)


def compare(task: CoreTask, scorer: GPTScorer, count: int) -> list[bool]:
    """Assert that the first examples come out as the naive way has them, and return the verdicts."""
    tokenizer, forward, verdicts = scorer._tokenizer, gpt_forward(scorer.model), []
    groups = task.groups(scorer, range(count))
    scores = scorer.score(groups)
    for index in range(count):
        texts = naive_prompts(task.rows, index, task.kind, task.num_fewshot, task.delimiter)
        assert task.prompts(index) == texts
        sequences = [[tokenizer.bos, *tokenizer.encode_ordinary(text)] for text in texts]
        spans = naive_spans(task.kind, sequences)
        assert [(list(option.tokens), option.start) for option in groups[index]] == spans
        expected = naive_scores(forward, spans)
        assert [score.mean_nats for score in scores[index]] == pytest.approx([nats for nats, _ in expected], abs=1e-4)
        assert [score.is_greedy for score in scores[index]] == [greedy for _, greedy in expected]
        if task.kind != "language_modeling":
            asked = [dataclasses.replace(task, rows=(task.rows[index] | {"gold": gold},)) for gold in range(len(texts))]
            chosen = [gold for gold, one in enumerate(asked) if one.is_right(0, scores[index])]
            assert chosen == [naive_choice(expected)]
        verdicts.append(naive_is_right(task.kind, task.rows[index], expected))
    assert score_examples(task, range(count), scorer) == verdicts
    return verdicts


@pytest.mark.parametrize("label", ["colours", "pronouns", "counting"])
def test_a_small_bundle(label, tmp_path):
    bundle = load_bundle(write_bundle(tmp_path))
    scorer = random_scorer(bundle.tasks.values(), 400)
    task = bundle.tasks[label]
    verdicts = compare(task, scorer, len(task.rows))
    if task.kind != "language_modeling":
        assert {True, False} == set(verdicts)


@pytest.mark.parametrize(
    ("label", "count"),
    [("arc_easy", 3), ("bigbench_language_identification", 2), ("winograd", 8), ("bigbench_qa_wikidata", 4)],
)
def test_real_tasks(label, count, test_data):
    bundle = load_bundle(str(test_data / "core"))
    compare(bundle.tasks[label], random_scorer([bundle.tasks[label]], 3000), count)


def test_language_modelling_is_right_where_every_token_is_the_likeliest():
    """A model that speaks in letters alone writes the continuations; in every second one a letter is exchanged."""
    tokenizer = Tokenizer([], SPLIT_PATTERNS["nanochat"])
    config = ModelConfig(
        sequence_len=64, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, smear=True
    )
    model = randomise(GPT(config)).eval()
    with torch.no_grad():
        for token in range(tokenizer.vocab_size):
            if not chr(token).islower() or token >= 128:
                model.lm_head.weight[token] = 0.0
    forward, rows = gpt_forward(model), []
    for number in range(10):
        text = f"Line {number} of the text: "
        ids = [tokenizer.bos, *tokenizer.encode_ordinary(text.strip())]
        for _ in range(1 + number % 4):
            ids.append(int(forward(ids)[-1].argmax()))
        continuation = tokenizer.decode(ids)[len("<|bos|>" + text.strip()) :]
        if number % 2:
            place = number % len(continuation)
            other = "z" if continuation[place] != "z" else "a"
            continuation = continuation[:place] + other + continuation[place + 1 :]
        rows.append({"context": text, "continuation": continuation})
    task = CoreTask("letters", "language_modeling", 0, "", 0.0, False, tuple(rows))
    verdicts = compare(task, GPTScorer(model, tokenizer), len(rows))
    assert verdicts == [True, False] * 5
