"""A tiny random GPT-2 through the harness, against transformers alone, one option at a time."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from naive_core import naive_is_right, naive_prompts, naive_scores, naive_spans
from small_bundle import CHOICE_ROWS, COPY_ROWS, SCHEMA_ROWS, write_bundle

from nanochat.config.evaluation import EvaluationConfig
from nanochat.errors import ConfigError, DataError
from nanochat.evaluation.core import core_result, load_bundle, score_examples
from nanochat.evaluation.evaluate import Evaluator, Model, evaluate
from nanochat.evaluation.hf_model import HFScorer, weights_of
from nanochat.evaluation.scoring import Option
from nanochat.run_context import RunContext

MAX_TOKENS = 160


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A GPT-2 of two layers and a byte-level BPE tokenizer, as save_pretrained writes them."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator([str(row) for row in (*CHOICE_ROWS, *SCHEMA_ROWS, *COPY_ROWS)], trainer)
    path = str(tmp_path_factory.mktemp("gpt2"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(path)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=MAX_TOKENS, n_embd=32, n_layer=2, n_head=2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def alone(folder):
    """What transformers gives by itself: ids of a text with BOS, and the (T, V) logits of ids."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, local_files_only=True).eval()

    def forward(ids):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0]

    return lambda text: [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]], forward


@pytest.mark.parametrize("batch_tokens", [1, 300, None])
def test_core_is_that_of_transformers_alone(batch_tokens, folder, alone, tmp_path):
    encode, forward = alone
    bundle, scorer = load_bundle(write_bundle(tmp_path)), HFScorer(folder, batch_tokens)
    outcomes: dict[str, list[bool]] = {}
    for label, task in bundle.tasks.items():
        examples = range(len(task.rows))
        scores = scorer.score(task.groups(scorer, examples))
        verdicts = []
        for index, row in enumerate(task.rows):
            texts = naive_prompts(task.rows, index, task.kind, task.num_fewshot, task.delimiter)
            expected = naive_scores(forward, naive_spans(task.kind, [encode(text) for text in texts]))
            assert [score.mean_nats for score in scores[index]] == pytest.approx([n for n, _ in expected], abs=1e-4)
            assert [score.is_greedy for score in scores[index]] == [greedy for _, greedy in expected]
            verdicts.append(naive_is_right(task.kind, row, expected))
        outcomes[label] = score_examples(task, examples, scorer)
        assert outcomes[label] == verdicts
    assert 0 < sum(outcomes["colours"]) < 11
    assert core_result(bundle, outcomes)["title"] == "CORE on 3 of 22 tasks, a sample of the examples"


def test_evaluate_scores_a_transformers_model_on_core_alone(folder, tmp_path):
    bundle = write_bundle(tmp_path / "bundle")
    config = EvaluationConfig(
        models=(), hf=folder, core=bundle, tasks=("arithmetic",), bits_per_byte=True, batch_tokens=300
    )
    run = RunContext(use_gpu=False)
    found = evaluate(Evaluator(config, run, str(tmp_path / "run"), [Model("gpt2", None)]), run)["gpt2"]
    tasks, scorer = load_bundle(bundle).tasks, HFScorer(folder)
    expected = {label: score_examples(task, range(len(task.rows)), scorer) for label, task in tasks.items()}
    assert {label: score["accuracy"] for label, score in found["core"]["tasks"].items()} == {
        label: sum(right) / len(right) for label, right in expected.items()
    }
    assert found["chat"] == {}
    assert "bits_per_byte" not in found
    assert found["weights"] == weights_of(folder) != weights_of(str(tmp_path))


def test_greedy_equal_and_cropped_options(folder, alone):
    encode, forward = alone
    scorer = HFScorer(folder)
    assert scorer.max_tokens == MAX_TOKENS
    assert scorer.bos == encode("")[0]
    ids = encode("Which colour has thing")
    start = len(ids)
    for _ in range(3):
        ids.append(int(forward(ids)[-1].argmax()))
    likeliest = Option(tuple(ids), start)
    other = Option((*ids[:-1], (ids[-1] + 1) % 300), start)
    scores = scorer.score([[likeliest, other, likeliest], []])
    assert [score.is_greedy for score in scores[0]] == [True, False, True]
    assert scores[0][0] == scores[0][2]
    assert scores[1] == []
    filling = tuple(place % 200 for place in range(MAX_TOKENS))
    long = Option((scorer.bos, *filling, *ids[1:]), MAX_TOKENS + start)
    by_hand = [scorer.bos, *[*filling, *ids[1:]][-(MAX_TOKENS - 1) :]]
    ((nats, _),) = naive_scores(forward, [(by_hand, MAX_TOKENS - 3)])
    assert scorer.score([[long]])[0][0].mean_nats == pytest.approx(nats, abs=1e-4)
    with pytest.raises(DataError, match=f"max_tokens={MAX_TOKENS}"):
        scorer.score([[Option((scorer.bos, *filling), 1)]])


def test_without_transformers_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"model=gpt2: needs the package transformers\. pip install transformers"):
        HFScorer("gpt2")


def test_what_is_no_model_is_refused_without_asking_a_server(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match="is no model on this disk"):
        HFScorer(str(tmp_path))


def one_more_layer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 3}))


def pickled(folder: Path) -> None:
    torch.save(safetensors.torch.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def with_code_of_its_own(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    (folder / "own.py").write_text("raise SystemExit('the code of a model was run')\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "is no model on this disk"),
        (lambda f: os.truncate(f / "model.safetensors", 20_000), "is no model on this disk"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "is no model on this disk"),
        (lambda f: [path.unlink() for path in f.glob("tokenizer*")], "lacks weights or a tokenizer. Fetch all files"),
        (pickled, "is no model on this disk .*safetensors"),
        (with_code_of_its_own, "is no model on this disk .*contains custom code"),
        (one_more_layer, "lacks weights or a tokenizer. Fetch all files"),
    ],
)
def test_half_a_model_is_refused(folder, tmp_path, damage, message):
    """Of a lost file transformers makes a tokenizer without tokens, or a layer of random weights."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    damage(copy)
    with pytest.raises(ConfigError, match=message):
        HFScorer(str(copy))
