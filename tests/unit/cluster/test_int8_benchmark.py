"""The comparison with 8-bit integers: the same weights, ratios of one round each, nothing where there are none."""

import itertools

import pytest
import torch
from tiny_chat_run import write_tiny_chat_run

from nanochat.cluster import int8_benchmark
from nanochat.cluster.int8_benchmark import measure_int8
from nanochat.config.corpus import CorpusConfig
from nanochat.config.shards import ShardsConfig
from nanochat.data.corpora import prepare_corpus
from nanochat.data.document_shards import write_token_shards
from nanochat.data.token_shards import TokenShards
from nanochat.data.tokenizer import Tokenizer
from nanochat.evaluation.bits_per_byte import bits_per_byte, count_nats_and_bytes
from nanochat.inference.load import load_model
from nanochat.model import int8
from nanochat.model.int8 import multiplies_int8
from nanochat.run_context import RunContext
from nanochat.storage import RunFolder
from nanochat.training.checkpoint import newest_of

able = pytest.mark.skipif(
    not (multiplies_int8(torch.device("cpu")) and torch.cpu.get_capabilities().get("avx512_bf16")),
    reason="needs AVX512-VNNI and AVX512-BF16",
)


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A run whose base model has random weights, with a little text; all of its layers count as large."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(int8, "MIN_WEIGHTS", 0)
    for name, value in {"DEPTH": 1, "VOCABULARY": 300, "ROUNDS": 3, "CONCURRENCY": (1, 3)}.items():
        monkeypatch.setattr(int8_benchmark, name, value)
    write_tiny_chat_run(tmp_path)
    (tmp_path / "sft").rename(tmp_path / "pretrain")
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_text('{"text": "The old man and the fish. The sea is old."}\n' * 200)
    folder, run = RunFolder(str(tmp_path)), RunContext()
    corpus = prepare_corpus(CorpusConfig(corpus=str(tmp_path / "*.jsonl")), run, folder.text, None)
    write_token_shards(ShardsConfig(sequence_len=128), run, corpus, Tokenizer.load(folder.tokenizer), folder.shards)
    return str(tmp_path)


@able
def test_rounds_are_taken_in_turns_and_bits_are_those_of_each_model(run_dir, monkeypatch):
    asked = []
    speeds = itertools.cycle([100.0, 150.0, 200.0, 200.0, 50.0, 100.0])  # of three rounds: 1.5, 1, 2

    def timed(engine, count, seed):
        is_integers = any(linear.int8 is not None for linear in engine.model.fused_linears())
        asked.append((engine.model.config.n_layer, count, seed, is_integers))
        return {"tokens_per_s": 1.0 if seed == 0 else next(speeds)}

    monkeypatch.setattr(int8_benchmark, "timed", timed)
    found = measure_int8(run_dir)
    in_turns = [
        (layers, *one)
        for layers in (2, 1)
        for one in [(1, 0, False), (1, 0, True)]
        + [(count, 1000 * count + number, of) for count in (1, 3) for number in range(3) for of in (False, True)]
    ]
    assert asked == in_turns
    expected = {
        "tokens_per_s_bfloat16": 100.0, "tokens_per_s_int8": 150.0, "int8_over_bfloat16": 1.5, "lowest": 1.0,
        "highest": 2.0,
    }  # fmt: skip
    assert found["base"] == found["depth_1"] == {"c1": expected, "c3": expected}

    folder = RunFolder(run_dir)
    tokenizer = Tokenizer.load(folder.tokenizer)
    bits = {}
    for dtype in ("bfloat16", "int8"):
        model = load_model(newest_of(folder.pretrain, pytest.fail), tokenizer, RunContext(), dtype)
        batches = TokenShards.load(folder.shards).validation_batches(
            rows=8, limit=10**6, padding=tokenizer.bos, rank=0, world_size=1
        )
        token_bytes = torch.from_numpy(tokenizer.token_bytes())
        bits[dtype] = bits_per_byte(*count_nats_and_bytes(model, batches, token_bytes).tolist())
    assert found["bits_per_byte_bfloat16"] == bits["bfloat16"]
    assert found["bits_per_byte_added"] == bits["int8"] - bits["bfloat16"] != 0


def test_nothing_is_measured_where_there_are_no_such_products(tmp_path, monkeypatch):
    monkeypatch.setattr(int8_benchmark, "multiplies_int8", lambda device: False)
    assert measure_int8(str(tmp_path)) == {}
