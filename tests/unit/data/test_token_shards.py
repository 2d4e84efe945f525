import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_corpus import ENGLISH, write_corpus, write_source

from nanochat import storage
from nanochat.config.corpus import CorpusConfig
from nanochat.config.shards import ROW_GROUP_ROWS, ShardsConfig
from nanochat.config.tokenizer import TokenizerConfig
from nanochat.data import document_shards
from nanochat.data.corpora import Corpus, prepare_corpus
from nanochat.data.document_shards import write_token_shards
from nanochat.data.token_shards import TokenShards
from nanochat.data.tokenizer import SPLIT_PATTERNS, Tokenizer, train_tokenizer
from nanochat.errors import DataError, TokenizerMismatchError
from nanochat.run_context import RunContext

LONG = " ".join(f"word {number} of a long document" for number in range(900))
TRAIN = [[*ENGLISH, LONG, *ENGLISH], [f"document {number}, short" for number in range(40)], ENGLISH[::-1]]
VALIDATION = ["Held out, " + text for text in ENGLISH]
CONFIG = ShardsConfig(sequence_len=16, buffer_documents=8)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), TRAIN, VALIDATION)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer(TokenizerConfig(vocab_size=400), RunContext(), corpus)


@pytest.fixture(scope="module")
def packed(corpus, tokenizer, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("shards"))
    return write_token_shards(CONFIG, RunContext(), corpus, tokenizer, folder)


@pytest.fixture
def shards(packed, tmp_path):
    """A copy of the packed shards, to be damaged."""
    shutil.copytree(packed.folder, tmp_path / "shards")
    return TokenShards.load(str(tmp_path / "shards"))


def rows_of(shards, shard):
    return np.concatenate([shards.read_rows(shard, group) for group in range(len(shard.group_sizes()))])


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_every_token_of_the_documents_is_in_the_rows(packed, corpus, tokenizer):
    for texts, shard in zip([*TRAIN, VALIDATION], packed.shards, strict=True):
        rows = rows_of(packed, shard)
        assert rows.shape == (shard.rows, 17)
        assert rows.dtype == np.uint16
        assert (rows[:, 0] == tokenizer.bos).all()
        expected = np.bincount(np.concatenate([tokenizer.encode_ordinary(text) for text in texts]), minlength=400)
        missing = expected - np.bincount(rows[rows != tokenizer.bos], minlength=400)
        assert (missing >= 0).all()
        assert missing.sum() == shard.cropped_tokens < 16
        assert shard.tokens == expected.sum()
        assert shard.text_bytes == sum(len(text.encode()) for text in texts)
        assert shard.documents == len(texts)


def test_validation_bytes_are_all_targets(packed, tokenizer):
    (shard,) = packed.split("validation")
    targets = rows_of(packed, shard)[:, 1:]
    assert shard.cropped_tokens == 0
    assert tokenizer.token_bytes()[targets].sum() == shard.text_bytes == sum(len(text.encode()) for text in VALIDATION)


def test_the_file_format(packed, corpus):
    first = packed.split("train")[0]
    assert first.name == "train/00000-source_0.parquet"
    file = pq.ParquetFile(os.path.join(packed.folder, first.name))
    assert file.schema_arrow.field("tokens").type == pa.list_(pa.field("element", pa.uint16(), nullable=False), 17)
    assert first.rows > ROW_GROUP_ROWS, "the long document is to fill more than a group"
    groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    assert groups == first.group_sizes() == [256, first.rows - 256]
    assert packed.groups("train")[:2] == [(0, 0, 256), (0, 1, first.rows - 256)]
    assert packed.groups("train")[2][:2] == (1, 0)


def test_the_manifest_names_what_it_was_made_from(packed, corpus, tokenizer):
    manifest = json.loads((Path(packed.folder) / "manifest.json").read_text())
    assert manifest["recipe"]["tokenizer_hash"] == tokenizer.hash
    assert manifest["recipe"]["sequence_len"] == 16
    for source, shard in zip(corpus.shards, manifest["shards"], strict=True):
        assert shard["source"] == Path(source.path).name
        assert shard["source_bytes"] == Path(source.path).stat().st_size
    for split, texts in (("train", [text for source in TRAIN for text in source]), ("validation", VALIDATION)):
        totals = manifest["totals"][split]
        assert totals["documents"] == len(texts)
        assert totals["text_bytes"] == sum(len(text.encode()) for text in texts)
        assert totals["tokens"] == sum(len(tokenizer.encode_ordinary(text)) for text in texts)
        assert totals["rows"] == packed.rows(split)
        assert totals["cropped_share"] == totals["cropped_tokens"] / totals["tokens"]


def test_the_number_of_workers_changes_no_byte(packed, corpus, tokenizer, tmp_path):
    with ThreadPoolExecutor(3) as pool:
        run = RunContext(map=pool.map)
        again = write_token_shards(CONFIG, run, corpus, tokenizer, str(tmp_path))
    assert files(tmp_path) == files(packed.folder)
    assert again.manifest_hash == packed.manifest_hash


def test_where_the_corpus_lies_changes_no_byte(packed, corpus, tokenizer, tmp_path):
    moved = write_corpus(tmp_path / "elsewhere", TRAIN, VALIDATION)
    write_token_shards(CONFIG, RunContext(), moved, tokenizer, str(tmp_path / "shards"))
    assert files(tmp_path / "shards") == files(packed.folder)


@pytest.fixture
def counted(monkeypatch):
    """Names of the sources that are tokenised."""
    names = []
    read = document_shards.read_documents

    def count(shard, *arguments):
        names.append(Path(shard.path).name)
        return read(shard, *arguments)

    monkeypatch.setattr(document_shards, "read_documents", count)
    return names


def test_what_is_finished_stays(shards, corpus, tokenizer, counted):
    before = files(shards.folder)
    assert write_token_shards(CONFIG, RunContext(), corpus, tokenizer, shards.folder) == shards
    assert counted == []
    assert files(shards.folder) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.with_suffix(".json").unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.with_suffix(".json").write_bytes(path.with_suffix(".json").read_bytes()[:40]),
        lambda path: path.with_suffix(".json").write_text('{"version": 0, "recipe": {}, "shard": {}}'),
    ],
    ids=["no file", "no record", "file cut", "record cut", "old record"],
)
def test_only_what_is_unfinished_is_made_again(shards, corpus, tokenizer, counted, damage):
    before = files(shards.folder)
    damage(Path(shards.folder) / shards.split("train")[1].name)
    write_token_shards(CONFIG, RunContext(), corpus, tokenizer, shards.folder)
    assert counted == ["source_1.parquet"]
    assert files(shards.folder) == before


def dying_map(fn, items):
    yield fn(items[0])
    raise KeyboardInterrupt


def test_a_job_that_dies_is_taken_up(corpus, tokenizer, packed, tmp_path, counted):
    with pytest.raises(KeyboardInterrupt):
        write_token_shards(CONFIG, RunContext(map=dying_map), corpus, tokenizer, str(tmp_path))
    counted.clear()
    write_token_shards(CONFIG, RunContext(), corpus, tokenizer, str(tmp_path))
    assert counted == ["source_1.parquet", "source_2.parquet", "held_out.parquet"]
    assert files(tmp_path) == files(packed.folder)


def test_while_shards_are_replaced_no_manifest_describes_them(shards, corpus, tokenizer):
    with pytest.raises(KeyboardInterrupt):
        write_token_shards(ShardsConfig(sequence_len=20), RunContext(map=dying_map), corpus, tokenizer, shards.folder)
    with pytest.raises(DataError, match="there is no such file"):
        TokenShards.load(shards.folder)


def test_a_write_that_fails_leaves_no_file(corpus, tokenizer, tmp_path, monkeypatch):
    def broken(shard, *arguments):
        yield [LONG]
        raise OSError("the disk is gone")

    monkeypatch.setattr(document_shards, "read_documents", broken)
    with pytest.raises(DataError, match=r"source_0\.parquet.*the disk is gone"):
        write_token_shards(CONFIG, RunContext(), corpus, tokenizer, str(tmp_path))
    assert files(tmp_path) == {}


def test_a_changed_source_is_packed_again(tokenizer, tmp_path, counted):
    corpus = write_corpus(tmp_path / "text", [["one document here"] * 9, ["another one"] * 9])
    first = write_token_shards(CONFIG, RunContext(), corpus, tokenizer, str(tmp_path / "shards"))
    path = Path(corpus.shards[1].path)
    stat = path.stat()
    changed = write_source(path, ["anotheR one"] * 9, "train")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert changed.size_bytes == stat.st_size, "only the content tells them apart"
    counted.clear()
    second = write_token_shards(CONFIG, RunContext(), corpus, tokenizer, str(tmp_path / "shards"))
    assert counted == ["source_1.parquet"]
    assert second.manifest_hash != first.manifest_hash


@pytest.mark.parametrize("change", ["tokenizer", "sequence_len", "buffer_documents", "validation_fraction"])
def test_another_recipe_packs_everything_again(shards, corpus, tokenizer, counted, change):
    config = CONFIG
    if change == "tokenizer":
        tokenizer = train_tokenizer(TokenizerConfig(vocab_size=300), RunContext(), corpus)
    elif change == "validation_fraction":
        corpus = Corpus(corpus.name, corpus.shards, corpus.text_column, 0.2)
    else:
        config = ShardsConfig(**{"sequence_len": 16, "buffer_documents": 8, change: 20})
    other = write_token_shards(config, RunContext(), corpus, tokenizer, shards.folder)
    assert len(counted) == 4
    assert other.manifest_hash != shards.manifest_hash


def test_a_source_without_rows_is_fine_and_an_empty_split_is_not(tokenizer, tmp_path):
    corpus = write_corpus(tmp_path / "text", [["a"], ["enough text for a row, and for another one"]])
    shards = write_token_shards(CONFIG, RunContext(), corpus, tokenizer, str(tmp_path / "shards"))
    empty, full = shards.split("train")
    assert (empty.rows, empty.tokens, empty.cropped_tokens, empty.group_sizes()) == (0, 1, 1, [])
    assert full.rows > 0
    assert shards.groups("train")[0][0] == 1
    short = write_corpus(tmp_path / "short", [["a"]])
    with pytest.raises(DataError, match="its train documents fill no row of 17 tokens"):
        write_token_shards(CONFIG, RunContext(), short, tokenizer, str(tmp_path / "other"))


def test_documents_divided_by_hash_come_once(tokenizer, tmp_path):
    texts = [f"document number {number} of them" for number in range(200)]
    source = write_source(tmp_path / "all.parquet", texts, "by_hash")
    corpus = Corpus("one file", (source,), "text", 0.3)
    shards = write_token_shards(CONFIG, RunContext(), corpus, tokenizer, str(tmp_path / "shards"))
    train, validation = shards.shards
    assert train.documents + validation.documents == 200
    assert train.skipped["other_split"] == validation.documents > 20


def test_what_is_cropped_is_reported(tokenizer, tmp_path):
    lines = []
    corpus = write_corpus(tmp_path / "text", [["a few tokens that fill a row of seventeen and no more of them"]] * 3)
    write_token_shards(CONFIG, RunContext(progress=lines.append), corpus, tokenizer, str(tmp_path / "shards"))
    assert lines[0].startswith("shards 1/4: train/00000-source_0.parquet, ")
    assert "of the training tokens are cropped" in lines[-1]


def test_wide_ids_are_stored_in_32_bits(tmp_path):
    merges = [bytes([first, second]) for first in range(256) for second in range(256)]
    wide = Tokenizer(merges, SPLIT_PATTERNS["nanochat"])
    corpus = write_corpus(tmp_path / "text", [["abcdefgh " * 20]])
    shards = write_token_shards(CONFIG, RunContext(), corpus, wide, str(tmp_path / "shards"))
    rows = shards.read_rows(shards.split("train")[0], 0)
    assert rows.dtype == shards.dtype == np.uint32
    assert (rows[:, 0] == wide.bos).all()
    assert wide.bos > 1 << 16


def test_shards_in_an_object_store(packed, corpus, tokenizer):
    folder = "memory://bucket/shards"
    stored = write_token_shards(CONFIG, RunContext(), corpus, tokenizer, folder)
    assert stored.manifest_hash == packed.manifest_hash
    for here, there in zip(packed.shards, stored.shards, strict=True):
        assert (rows_of(packed, here) == rows_of(stored, there)).all()
    storage.remove("memory://bucket")


@pytest.mark.skipif("NANOCHAT_TEST_DATA" not in os.environ, reason="NANOCHAT_TEST_DATA is not set")
def test_real_text_loses_little(tmp_path):
    config = CorpusConfig(corpus=os.path.join(os.environ["NANOCHAT_TEST_DATA"], "text", "web_text"))
    corpus = prepare_corpus(config, RunContext(), str(tmp_path / "text"), None)
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=8192), RunContext(), corpus)
    assert tokenizer.vocab_size == 8192
    shards = write_token_shards(
        ShardsConfig(sequence_len=512), RunContext(), corpus, tokenizer, str(tmp_path / "shards")
    )
    train = shards.split("train")
    assert sum(shard.documents for shard in train) == 342
    assert sum(shard.cropped_tokens for shard in train) < 0.002 * sum(shard.tokens for shard in train)
    # What the rows hold beside tokens of documents is BOS: about one for each document and one for each row.
    assert shards.rows("train") * 513 < 1.005 * sum(shard.tokens for shard in train)
    targets = np.concatenate(list(shards.validation_batches(rows=8, limit=10**9, padding=tokenizer.bos)))[:, 1:]
    text_bytes = sum(
        len(text.encode()) for text in pq.read_table(corpus.sources("validation")[0].path)["text"].to_pylist()
    )
    assert tokenizer.token_bytes()[targets].sum() == text_bytes


def test_another_tokenizer_is_refused(packed, tokenizer):
    packed.check_tokenizer(tokenizer)
    with pytest.raises(TokenizerMismatchError, match=f"not with {Tokenizer([], 'x').hash[:12]}"):
        packed.check_tokenizer(Tokenizer([], "x"))
    liar = replace(packed, recipe=replace(packed.recipe, vocab_size=401))
    with pytest.raises(TokenizerMismatchError, match=r"of 401 tokens, not with .* of 400\."):
        liar.check_tokenizer(tokenizer)


@pytest.mark.parametrize("limit", [1, 5, 6, 300, 10**9])
@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_batches_hold_each_row_once_over_the_workers(tokenizer, tmp_path, limit, world_size):
    corpus = write_corpus(tmp_path / "text", [[LONG]], [LONG, LONG])
    shards = write_token_shards(CONFIG, RunContext(), corpus, tokenizer, str(tmp_path / "shards"))
    expected = rows_of(shards, shards.split("validation")[0])[:limit]
    assert limit <= 300 or len(expected) > 2 * ROW_GROUP_ROWS
    shares = [
        list(shards.validation_batches(rows=5, limit=limit, padding=7, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    num_batches = -(-len(expected) // 5)
    batches = [shares[number % world_size][number // world_size] for number in range(num_batches)]
    assert sum(map(len, shares)) == num_batches
    assert all(batch.shape == (5, 17) for batch in batches)
    rows = np.concatenate(batches)
    assert (rows[: len(expected)] == expected).all()
    assert (rows[len(expected) :] == 7).all()
