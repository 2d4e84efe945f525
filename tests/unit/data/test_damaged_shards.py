"""Token shards that are damaged, or a stranger's: refused where they are opened or read, with what is wrong."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_corpus import ENGLISH, write_corpus

from nanochat import storage
from nanochat.config.shards import ROW_GROUP_ROWS, ShardsConfig
from nanochat.config.tokenizer import TokenizerConfig
from nanochat.data.document_shards import write_token_shards
from nanochat.data.row_order import RowReader
from nanochat.data.token_shards import TokenShards
from nanochat.data.tokenizer import train_tokenizer
from nanochat.errors import DataError
from nanochat.run_context import RunContext

LONG = " ".join(f"word {number} of a long document" for number in range(900))


@pytest.fixture
def shards(tmp_path) -> TokenShards:
    corpus = write_corpus(tmp_path / "text", [[*ENGLISH, LONG]])
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=400), RunContext(), corpus)
    config = ShardsConfig(sequence_len=16, buffer_documents=8)
    return write_token_shards(config, RunContext(), corpus, tokenizer, str(tmp_path / "shards"))


def test_a_flipped_bit_is_named(shards):
    shard = shards.split("train")[0]
    path = Path(shards.folder) / shard.name
    sound = path.read_bytes()
    # Places in the data of the first row group, most of which decompress to something.
    for place in range(200, 3000, 200):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        with pytest.raises(DataError, match=r"source_0\.parquet: is damaged \(row group 0"):
            shards.read_rows(shard, 0)


def test_packing_again_mends_a_flipped_bit(tmp_path):
    corpus = write_corpus(tmp_path / "text", [[*ENGLISH, LONG]])
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=400), RunContext(), corpus)
    config = ShardsConfig(sequence_len=16)
    packed = write_token_shards(config, RunContext(), corpus, tokenizer, str(tmp_path / "shards"))
    path = tmp_path / "shards" / packed.split("train")[0].name
    sound = path.read_bytes()
    path.write_bytes(sound[:300] + bytes([sound[300] ^ 1]) + sound[301:])
    again = write_token_shards(config, RunContext(), corpus, tokenizer, str(tmp_path / "shards"))
    assert again.manifest_hash == packed.manifest_hash
    assert path.read_bytes() == sound


def test_a_file_cut_short_is_named(shards):
    shard = shards.split("validation")[0]
    path = Path(shards.folder) / shard.name
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DataError, match=rf"held_out\.parquet: is damaged \(it has \d+ bytes, not {shard.size_bytes}"):
        shards.read_rows(shard, 0)


def test_a_missing_file_is_named(shards):
    shard = shards.split("train")[0]
    (Path(shards.folder) / shard.name).unlink()
    with pytest.raises(DataError, match=r"source_0\.parquet: is damaged .*No such file"):
        shards.read_rows(shard, 0)


def strange(shards, rows, item="uint16", group_rows=ROW_GROUP_ROWS, nullable=False):
    """Put a stranger's rows in the place of the first training shard and return what the manifest would say of it."""
    shard = shards.split("train")[0]
    path = Path(shards.folder) / shard.name
    ids = pa.array(np.ravel(rows).tolist(), item)
    kind = pa.list_(pa.field("element", ids.type, nullable=nullable), np.shape(rows)[1])
    column = pa.FixedSizeListArray.from_arrays(ids, type=kind)
    schema = pa.schema([pa.field("tokens", kind, nullable=nullable)])
    pq.write_table(pa.Table.from_arrays([column], schema=schema), path, row_group_size=group_rows)
    changed = replace(shard, rows=len(rows), size_bytes=path.stat().st_size)
    return replace(shards, shards=(changed, *shards.shards[1:])), changed


ROWS = np.full((300, 17), 7)


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (ROWS, {"item": "int64"}, "columns .*int64.*, not .*uint16"),
        (ROWS[:, :16], {}, r"columns .*\[16\].*, not .*\[17\]"),
        (ROWS, {"nullable": True}, "columns"),
        (ROWS, {"group_rows": 100}, "row group 0 has 100 rows, not 256"),
        (ROWS, {"group_rows": 300}, "row group 0 has 300 rows, not 256"),
    ],
)
def test_shards_of_another_shape_are_refused(shards, rows, options, words):
    shards, shard = strange(shards, rows, **options)
    with pytest.raises(DataError, match=rf"source_0\.parquet: is damaged \(.*{words}"):
        shards.read_rows(shard, 0)


@pytest.mark.parametrize("largest", [399, 400, 65535])
def test_an_id_above_the_vocabulary_is_named(shards, largest):
    rows = ROWS.copy()
    rows[299, 16] = largest
    shards, shard = strange(shards, rows)
    reader = RowReader(shards, "train", seed=0)
    assert (shards.read_rows(shard, 0) == 7).all()
    if largest < 400:
        assert shards.read_rows(shard, 1).max() == largest
        return
    words = rf"source_0\.parquet: is damaged \(row group 1 has the id {largest}, all must be below 400\)\. Delete it"
    with pytest.raises(DataError, match=words):
        shards.read_rows(shard, 1)
    with pytest.raises(DataError, match=words):
        reader.read(0, reader.order.rows_per_epoch)


def test_a_row_group_that_is_not_there_is_named(shards):
    shards, shard = strange(shards, ROWS[:256])
    with pytest.raises(DataError, match=r"source_0\.parquet: is damaged \(row group 1"):
        shards.read_rows(replace(shard, rows=300), 1)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"rows": ', '"rows": 1', "hash"),
        ('"version": 1', '"version": 2', "version"),
        ("{", "", "JSON"),
        ("{", "[" * 100_000 + "{", "JSON"),
    ],
)
def test_a_damaged_manifest_is_refused(shards, old, new, words):
    path = Path(shards.folder) / "manifest.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=words):
        TokenShards.load(shards.folder)


@pytest.mark.parametrize("content", [{}, {"recipe": {"\x1b[2J" * 9_999: 1}}, {"recipe": [], "shards": 7}])
def test_a_manifest_of_other_fields_is_refused(shards, content):
    content = {"version": 1} | content
    path = Path(shards.folder) / "manifest.json"
    right_hash = storage.sha256_json({"recipe": None, "shards": None} | content)
    path.write_text(json.dumps(content | {"hash": right_hash}))
    with pytest.raises(DataError, match=r"manifest\.json: is damaged") as raised:
        TokenShards.load(shards.folder)
    assert len(str(raised.value)) < 500
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    "name",
    ["../../x.parquet", "train/../x.parquet", "train/x.json", "train/.parquet", "validation/x.parquet", "/x.parquet",
     "s3://bucket/x.parquet", "train/" + "x" * 2000 + ".parquet", "train/" + "a://b:" * 20_000 + ".parquet", 7, None],
)  # fmt: skip
def test_a_shard_of_a_manifest_lies_in_its_folder(shards, name):
    path = Path(shards.folder) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["name"] = name
    content = {key: manifest[key] for key in ("version", "recipe", "shards")}
    path.write_text(json.dumps(manifest | {"hash": storage.sha256_json(content)}))
    with pytest.raises(DataError, match=r"manifest\.json: is damaged \(.*") as raised:
        TokenShards.load(shards.folder)
    assert len(str(raised.value)) < 500
