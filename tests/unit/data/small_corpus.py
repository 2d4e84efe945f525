"""Corpora of a few documents, as parquet files in a test's folder."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.data.corpora import Corpus, SourceShard

ENGLISH = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind: it's asleep. " * 3,
    "In 1984 there were 12345 reasons to read the book; today there are the same reasons and then some.\n\n",
    "def function(argument):\n    return argument + 1  # the next one\n" * 4,
    "Na\u00efve caf\u00e9 r\u00e9sum\u00e9, \u4f60\u597d, \u043f\u0440\u0438\u0432\u0435\u0442, \U0001f600!",
]


def write_source(path: Path, texts: list[str], split: str) -> SourceShard:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path)
    return SourceShard(str(path), path.stat().st_size, split)


def write_corpus(folder: Path, train: list[list[str]], validation: list[str] | None = None) -> Corpus:
    """Write one training source per list, and one validation source."""
    shards = [write_source(folder / f"source_{number}.parquet", texts, "train") for number, texts in enumerate(train)]
    shards.append(write_source(folder / "held_out.parquet", validation or ["The held-out dog reads."], "validation"))
    return Corpus("small", tuple(shards), "text", 0.1)
