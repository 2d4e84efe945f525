"""A tiny random GPT-2 from disk: batched scores against transformers alone, one option at a time."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from naive_core import naive_scores, naive_spans
from small_bundle import SCHEMA_ROWS, write_bundle

from nanochat.errors import ConfigError, DataError
from nanochat.evaluation.core import WorkItem, load_bundle, score_examples
from nanochat.evaluation.hf_model import HFScorer
from nanochat.evaluation.scoring import Option

TEXTS = [row["context_options"][0] + " " + row["continuation"] for row in SCHEMA_ROWS]
POSITIONS = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A GPT-2 of two layers whose logits are far apart, and a byte-level BPE tokenizer, as transformers saves them."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    path = str(tmp_path_factory.mktemp("gpt2"))
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(TEXTS, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained, bos_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=POSITIONS
    )
    tokenizer.save_pretrained(path)
    sizes = {"n_positions": POSITIONS, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **sizes))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def forward(folder):
    """A function from ids to (T, V) logits, by transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logits(ids):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0]

    return logits


def groups_of_every_shape(forward) -> list[list[Option]]:
    """Options of 2 to 60 tokens scored from the first place to the last, one of them what the model would write."""
    generator = torch.Generator().manual_seed(5)
    groups = []
    for length in (2, 3, 9, 20, 20, 41, 60):
        first, second = torch.randint(1, 250, (2, length), generator=generator).tolist()
        groups.append([Option((0, *first[1:]), max(1, length // 2)), Option((0, *second[1:]), length - 1)])
    grown = [0, 70, 71]
    for _ in range(4):
        grown.append(int(forward(grown)[-1].argmax()))
    return [*groups, [Option(tuple(grown), 3), groups[2][0], Option(tuple(grown), 3)], []]


@pytest.mark.parametrize("batch_tokens", [1, 45, 10_000, None])
def test_scores_are_those_of_transformers_alone(folder, forward, batch_tokens):
    groups = groups_of_every_shape(forward)
    scores = HFScorer(folder, batch_tokens).score(groups)
    for group, found in zip(groups, scores, strict=True):
        expected = naive_scores(forward, [(list(option.tokens), option.start) for option in group])
        assert [score.mean_nats for score in found] == pytest.approx([nats for nats, _ in expected], abs=1e-4)
        assert [score.is_greedy for score in found] == [greedy for _, greedy in expected]
    assert scores[-2][0].is_greedy
    assert scores[-2][0] == scores[-2][2]
    assert scores[-1] == []


def test_texts_go_through_its_own_tokenizer(folder, forward, tmp_path):
    from transformers import AutoTokenizer

    scorer, tokenizer = HFScorer(folder), AutoTokenizer.from_pretrained(folder)
    assert (scorer.bos, scorer.max_tokens) == (tokenizer.bos_token_id, POSITIONS)
    assert scorer.encode("Ann met Bob") == tokenizer("Ann met Bob")["input_ids"]
    task = load_bundle(write_bundle(tmp_path)).tasks["pronouns"]
    expected = []
    for index, row in enumerate(task.rows):
        sequences = [[scorer.bos, *tokenizer(text)["input_ids"]] for text in task.prompts(index)]
        first, second = naive_scores(forward, naive_spans("schema", sequences))
        expected.append((1 if second[0] < first[0] else 0) == row["gold"])
    assert score_examples(load_bundle(str(tmp_path)), WorkItem("pronouns", 0, 4), scorer) == expected


def test_long_options_lose_context(folder, forward):
    tokens = tuple(torch.randint(1, 250, (80,), generator=torch.Generator().manual_seed(7)).tolist())
    (score,) = HFScorer(folder).score([[Option((0, *tokens), 78)]])[0]
    ((nats, _),) = naive_scores(forward, [([0, *tokens[-63:]], 61)])
    assert score.mean_nats == pytest.approx(nats, abs=1e-4)
    with pytest.raises(DataError, match="max_tokens=64: an option has 17 tokens too many"):
        HFScorer(folder).score([[Option((0, *tokens), 17)]])


def test_without_transformers_the_remedy_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=f"model={folder}: needs the package transformers. pip install transformers"):
        HFScorer(folder)


def test_what_is_no_model_is_refused(tmp_path):
    for path in (str(tmp_path / "nothing"), str(tmp_path)):
        with pytest.raises(ConfigError, match=rf"model={path}: is no model on this disk \(.*\)\. Fetch it first"):
            HFScorer(path)


def one_more_layer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 3}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "is no model on this disk"),
        (lambda f: os.truncate(f / "model.safetensors", 20_000), "is no model on this disk"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "is no model on this disk"),
        (lambda f: [path.unlink() for path in f.glob("tokenizer*")], "lacks weights or a tokenizer. Fetch all files"),
        (one_more_layer, "lacks weights or a tokenizer"),
    ],
)
def test_half_a_model_is_refused(folder, tmp_path, damage, message):
    """Of a lost file transformers makes a tokenizer without tokens, or a layer of random weights."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    damage(copy)
    with pytest.raises(ConfigError, match=message):
        HFScorer(str(copy))
