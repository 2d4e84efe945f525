"""Real Ray, started once a module; a tiny run prepared once in this process."""

from pathlib import Path

import pytest

from nanochat.cluster.environment import set_ray_environment

set_ray_environment()


@pytest.fixture(scope="module")
def ray_session(tmp_path_factory):
    from nanochat.cluster.session import session
    from nanochat.config.cluster import ClusterConfig

    with session(ClusterConfig(), str(tmp_path_factory.mktemp("ray") / "ray.log")):
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
