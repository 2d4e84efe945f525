"""Real Ray, started once a module; a tiny run prepared once in this process."""

from pathlib import Path

import pytest

from nanochat.cluster.environment import set_ray_environment

set_ray_environment()


@pytest.fixture(scope="module")
def ray_session(tmp_path_factory):
    from nanochat.cluster.session import session, start_ray
    from nanochat.config.cluster import ClusterConfig

    with session(ClusterConfig(), str(tmp_path_factory.mktemp("ray"))):
        start_ray()
        yield


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """A run directory with tokenizer and token shards: 300 tokens, rows of 64, about 900 training rows."""
    import json
    import random

    from nanochat.config.corpus import CorpusConfig
    from nanochat.config.shards import ShardsConfig
    from nanochat.config.tokenizer import TokenizerConfig
    from nanochat.data.corpora import prepare_corpus
    from nanochat.data.document_shards import write_token_shards
    from nanochat.data.tokenizer import train_tokenizer
    from nanochat.run_context import RunContext
    from nanochat.storage import RunFolder

    root = tmp_path_factory.mktemp("tiny")
    draw = random.Random(0)
    words = ["red", "green", "blue", "apple", "pear", "runs", "sleeps", "over", "under", "the", "a", "quick"]
    for shard in range(3):
        with open(root / f"text_{shard}.jsonl", "w") as file:
            for _ in range(150):
                text = " ".join(draw.choices(words, k=draw.randint(20, 200)))
                file.write(json.dumps({"text": text}) + "\n")
    run, folder = RunContext(), RunFolder(str(root / "run"))
    corpus = prepare_corpus(CorpusConfig(corpus=str(root / "text_*.jsonl")), run, folder.text, None)
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=300), run, corpus)
    tokenizer.save(folder.tokenizer)
    write_token_shards(ShardsConfig(sequence_len=64), run, corpus, tokenizer, folder.shards)
    return root / "run"


@pytest.fixture(scope="session")
def tiny_base(tiny_run, tmp_path_factory) -> Path:
    """A copy of `tiny_run` with a base model of two steps, trained in this process."""
    import shutil

    from nanochat.config.pretrain import PretrainConfig
    from nanochat.data.row_order import RowReader
    from nanochat.data.token_shards import TokenShards
    from nanochat.data.tokenizer import Tokenizer
    from nanochat.run_context import RunContext
    from nanochat.storage import RunFolder
    from nanochat.training.loop import TrainingInputs, local_stream
    from nanochat.training.pretrain import pretrain

    root = tmp_path_factory.mktemp("base") / "run"
    shutil.copytree(tiny_run, root)
    folder = RunFolder(str(root))
    shards = TokenShards.load(folder.shards)
    stream = local_stream(RowReader(shards, "train", 0), 8)
    inputs = TrainingInputs(Tokenizer.load(folder.tokenizer), shards, stream, folder.pretrain)
    config = PretrainConfig(
        depth=2, head_dim=32, n_embd=32, window_pattern="L", num_steps=2, global_batch_tokens=8 * 64, warmup_steps=5,
        dtype="float32", compile="off", evaluate_every=0, sample_every=0, checkpoint_every=0, log_every=1,
    )  # fmt: skip
    assert pretrain(config, RunContext(use_gpu=False), inputs) is not None
    return root
