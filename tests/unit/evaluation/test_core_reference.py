"""CORE by the library against the second implementation of naive_core.py: texts, scored tokens, scores, answers."""

import dataclasses
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from naive_core import gpt_forward, naive_choice, naive_is_right, naive_prompts, naive_scores, naive_spans, randomise
from small_bundle import TASKS, write_bundle

from nanochat.config.model import ModelConfig
from nanochat.data.tokenizer import SPLIT_PATTERNS, Tokenizer
from nanochat.evaluation.core import Bundle, WorkItem, load_bundle, score_examples
from nanochat.evaluation.scoring import GPTScorer
from nanochat.model.gpt import GPT

MERGES = [b"th", b" a", b"er", b" th", b"in", b"re", b" the", b"ing", b" s", b"is"]  # some cross a choice's border
TOKENIZER = Tokenizer(MERGES, SPLIT_PATTERNS["nanochat"])
CONFIG = ModelConfig(
    sequence_len=4096, vocab_size=TOKENIZER.vocab_size, n_layer=2, n_head=2, n_kv_head=1, n_embd=32,
    window_pattern="SL", smear=True,
)  # fmt: skip
LETTERS = b"bcdfg"
"""In no merge, so that grown tokens are what their text is encoded to."""


@pytest.fixture(scope="module")
def model() -> GPT:
    return randomise(GPT(CONFIG)).eval()


def read_rows(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    random.Random(1337).shuffle(rows)
    return rows


def agreed_answers(
    model: GPT, bundle: Bundle, entry: dict[str, Any], rows: list[dict[str, Any]], indices: Iterable[int]
) -> list[bool]:
    """Compare all that leads to the answers of a task's examples; return which are right."""
    task, kind, scorer = bundle.tasks[entry["label"]], entry["icl_task_type"], GPTScorer(model, TOKENIZER)
    answers = []
    for index in indices:
        texts = naive_prompts(rows, index, kind, entry["num_fewshot"][0], entry.get("continuation_delimiter", " "))
        assert task.prompts(index) == texts
        spans = naive_spans(kind, [[TOKENIZER.bos, *TOKENIZER.encode_ordinary(text)] for text in texts])
        (group,) = task.groups(scorer, [index])
        assert [(list(option.tokens), option.start) for option in group] == spans
        expected = naive_scores(gpt_forward(model), spans)
        (found,) = scorer.score([group])
        assert [score.mean_nats for score in found] == pytest.approx([nats for nats, _ in expected], abs=1e-4)
        assert [score.is_greedy for score in found] == [greedy for _, greedy in expected]
        if kind != "language_modeling":
            asked = [dataclasses.replace(task, rows=(rows[index] | {"gold": gold},)) for gold in range(len(found))]
            chosen = [gold for gold, one in enumerate(asked) if one.is_right(0, found)]
            assert chosen == [naive_choice(expected)]
        answers.append(naive_is_right(kind, rows[index], expected))
        assert score_examples(bundle, WorkItem(task.label, index, 1), scorer) == answers[-1:]
    return answers


@pytest.fixture(scope="module")
def core(test_data) -> Bundle:
    return load_bundle(str(test_data / "core"))


@pytest.mark.parametrize(
    ("label", "file"),
    [
        ("arc_easy", "world_knowledge/arc_easy"),
        ("winograd", "language_understanding/winograd_wsc"),
        ("bigbench_qa_wikidata", "world_knowledge/bigbench_qa_wikidata"),
    ],
)
def test_examples_of_real_tasks(model, core, test_data, label, file):
    entries = yaml.safe_load((test_data / "core/mmlu_and_lowvar.yaml").read_text())["icl_tasks"]
    entry = next(entry for entry in entries if entry["label"] == label)
    rows = read_rows(test_data / f"core/eval_data/{file}.jsonl")
    agreed_answers(model, core, entry, rows, (0, 1, len(rows) - 1))


@pytest.mark.parametrize(("number", "file"), [(1, "a/colours"), (2, "b/pronouns_4"), (3, "b/counting")])
def test_every_example_of_a_small_bundle(model, tmp_path, number, file):
    bundle = load_bundle(write_bundle(tmp_path))
    rows = read_rows(tmp_path / f"eval_data/{file}.jsonl")
    answers = agreed_answers(model, bundle, TASKS[number], rows, range(len(rows)))
    assert (True in answers) == (number != 3), "random letters are never the likeliest"


def test_continuations_that_the_model_would_write(tmp_path):
    """Every second one is grown by the likeliest letters, the others have one of them exchanged."""
    model = randomise(GPT(CONFIG), seed=1).eval()
    with torch.no_grad():
        model.lm_head.weight[sorted({*range(TOKENIZER.vocab_size)} - {*LETTERS})] = 0
    folder = Path(write_bundle(tmp_path))
    entry = TASKS[3] | {"num_fewshot": [0], "continuation_delimiter": "="}
    (folder / "tasks.yaml").write_text(yaml.safe_dump({"icl_tasks": [entry]}))
    rows = []
    for number in range(10):
        context = f"{number} and {number + 1}"
        tokens = [TOKENIZER.bos, *TOKENIZER.encode_ordinary(context + "=")]
        for _ in range(3):
            tokens.append(int(gpt_forward(model)(tokens)[-1].argmax()))
        grown = bytes(tokens[-3:])
        if number % 2:
            grown = grown[:1] + LETTERS.replace(grown[1:2], b"")[:1] + grown[2:]
        rows.append({"context": context, "continuation": grown.decode()})
    path = folder / "eval_data/b/counting.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    shuffled = read_rows(path)
    answers = agreed_answers(model, load_bundle(str(folder)), entry, shuffled, range(len(rows)))
    assert answers == [rows.index(row) % 2 == 0 for row in shuffled]
