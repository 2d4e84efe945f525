import gzip
import hashlib
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.data.corpora import Corpus, SourceShard
from nanochat.data.documents import BATCH_BYTES, ReadCounts, check_shard, is_held_out, read_documents
from nanochat.errors import DataError


def read(path, split="train", column="text", shard_split="by_hash", fraction=1e-9):
    """Read a file whole; return its batches and counts. With that fraction every document is a training one."""
    corpus = Corpus("c", (SourceShard(str(path), 0, shard_split),), column, fraction)
    counts = ReadCounts()
    return list(read_documents(corpus.shards[0], corpus, split, counts)), counts


def flat(batches):
    return [text for batch in batches for text in batch]


def write_parquet(path, values, kind=None, **options):
    kind = kind or pa.string()
    pq.write_table(pa.table({"other": list(range(len(values))), "text": pa.array(values, kind)}), path, **options)
    return path


def write_jsonl(path, values):
    data = "".join(json.dumps({"text": value, "n": 1}) + "\n" for value in values).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = pa.compress(data, "zstd", asbytes=True)
    path.write_bytes(data)
    return path


TEXTS = [f"document {number}: " + "é" * (number % 7) for number in range(500)]
KINDS = [pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.string_view()]
KINDS += [pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_parquet_of_every_text_type_comes_in_order(tmp_path, kind):
    values = pa.array(TEXTS).cast(kind) if not pa.types.is_dictionary(kind) else pa.array(TEXTS).dictionary_encode()
    path = write_parquet(tmp_path / "a.parquet", values, kind=values.type, row_group_size=33)
    check_shard(str(path), "text")
    batches, counts = read(path)
    assert flat(batches) == TEXTS
    assert counts == ReadCounts(documents=500, text_bytes=sum(len(text.encode()) for text in TEXTS))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_jsonl_comes_in_order(tmp_path, name):
    path = write_jsonl(tmp_path / name, TEXTS)
    check_shard(str(path), "text")
    batches, counts = read(path)
    assert flat(batches) == TEXTS
    assert counts.text_bytes == sum(len(text.encode()) for text in TEXTS)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_files_behind_a_uri(tmp_path, name):
    write = write_parquet if name.endswith("parquet") else write_jsonl
    content = write(tmp_path / name, TEXTS).read_bytes()
    fsspec.filesystem("memory").pipe_file(f"/documents/{name}", content)
    assert flat(read(f"memory://documents/{name}")[0]) == TEXTS


def test_split_by_hash_is_a_partition_fixed_by_the_bytes(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", TEXTS, row_group_size=50)
    training, counts = read(path, "train", fraction=0.3)
    held_out, other = read(path, "validation", fraction=0.3)
    expected = [int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) < 0.3 * 2**64 for text in TEXTS]
    assert flat(held_out) == [text for text, held in zip(TEXTS, expected) if held]
    assert flat(training) == [text for text, held in zip(TEXTS, expected) if not held]
    assert 110 < len(flat(held_out)) < 190
    assert (counts.documents, counts.other_split) == (other.other_split, other.documents)
    # SHA-256 of "abc" begins with ba7816bf: 0.72839 of the range
    assert is_held_out(b"abc", 0.7284)
    assert not is_held_out(b"abc", 0.7283)


def test_whole_shards_are_not_split(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    assert flat(read(path, "validation", shard_split="validation", fraction=0.3)[0]) == TEXTS
    with pytest.raises(AssertionError):
        read(path, "validation", shard_split="train")


ROWS = st.lists(
    st.one_of(
        st.none(),
        st.just(b""),
        st.just(b" \n\t"),
        st.binary(max_size=8),
        st.text(max_size=20).map(lambda text: text.encode("utf-8", "replace")),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 9))
def test_every_row_is_a_document_or_counted(rows, group):
    rows = [*rows, b"one good document"]
    content = io.BytesIO()
    pq.write_table(pa.table({"text": pa.array(rows, pa.binary())}), content, row_group_size=group)
    fsspec.filesystem("memory").pipe_file("/rows.parquet", content.getvalue())
    batches, counts = read("memory://rows.parquet")
    good = []
    for row in rows:
        try:
            if row and not row.decode().isspace():
                good.append(row.decode())
        except UnicodeDecodeError:
            pass
    assert flat(batches) == good
    assert counts.null_rows == rows.count(None)
    assert counts.documents + counts.null_rows + counts.empty + counts.invalid_utf8 == len(rows)


def invalid_strings(values: list[bytes]) -> pa.Array:
    """A string column with bytes that are not UTF-8, as faulty writers leave it."""
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


def test_invalid_utf8_is_skipped_and_counted(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", invalid_strings([b"good", b"\xff\xfe", b"cut \xe2\x82", b"also"]))
    batches, counts = read(path)
    assert flat(batches) == ["good", "also"]
    assert counts.invalid_utf8 == 2
    lines = [b'{"text": "good"}', b'{"text": "\xff"}', b'{"text": "\\ud800"}', b"", b'\xef\xbb\xbf{"text": "also"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    batches, counts = read(tmp_path / "a.jsonl")
    assert flat(batches) == ["good", "also"]
    assert counts.invalid_utf8 == 2


def test_null_absent_and_empty_json_texts_are_counted(tmp_path):
    lines = ['{"text": null}', '{"n": 1}', '{"text": ""}', '{"text": "  "}', '{"text": "x"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    batches, counts = read(tmp_path / "a.jsonl")
    assert flat(batches) == ["x"]
    assert (counts.null_rows, counts.empty) == (2, 2)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
@pytest.mark.parametrize("values", [[], [None, None], ["", " \n"]], ids=["none", "nulls", "blank"])
def test_a_file_without_a_document_is_an_error(tmp_path, name, values):
    path = (write_parquet if name.endswith("parquet") else write_jsonl)(tmp_path / name, values)
    with pytest.raises(DataError, match=rf"{name}: no document"):
        read(path)
    if not values:
        with pytest.raises(DataError, match=rf"{name}: has no"):
            check_shard(str(path), "text")


def test_a_file_of_only_the_other_split_is_none(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["a training document"])
    batches, counts = read(path, "validation")
    assert (batches, counts.other_split) == ([], 1)


@pytest.mark.parametrize("look", [lambda path: check_shard(str(path), "body"), lambda path: read(path, column="body")])
def test_a_missing_column_names_those_there_are(tmp_path, look):
    with pytest.raises(DataError, match=r"text_column=body: .*a\.parquet .*other, text"):
        look(write_parquet(tmp_path / "a.parquet", ["x"]))
    with pytest.raises(DataError, match=r"text_column=body: .*a\.jsonl .*text, n"):
        look(write_jsonl(tmp_path / "a.jsonl", ["x"]))


def test_a_column_of_another_type_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [1, 2], kind=pa.int64())
    with pytest.raises(DataError, match=r"a\.parquet has int64"):
        check_shard(str(path), "text")
    path = write_jsonl(tmp_path / "a.jsonl", ["x", 5])
    with pytest.raises(DataError, match=r"line 2 of .*a\.jsonl has int"):
        read(path)


HOSTILE = "\x1b[2J\x1b]0;owned\x07" * 5_000


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
@pytest.mark.parametrize("keys", [{HOSTILE: "x"}, {f"{number}\x1b": "x" for number in range(9_999)}])
def test_names_in_a_file_come_short_and_printable_into_the_message(tmp_path, name, keys):
    path = tmp_path / name
    if name == "a.jsonl":
        path.write_text(json.dumps(keys))
    else:
        pq.write_table(pa.table({key: [value] for key, value in keys.items()}), path)
    with pytest.raises(DataError, match=r"text_column=text: .* columns|keys: .*x1b.*\.\.\.") as caught:
        check_shard(str(path), "text")
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


def test_a_type_in_a_file_comes_short_and_printable_into_the_message(tmp_path):
    pq.write_table(pa.table({"text": [{HOSTILE: 1}], HOSTILE: [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"has struct<\\x1b.* there, not text\. Its columns: text, ") as caught:
        check_shard(str(tmp_path / "a.parquet"), "text")
    assert len(str(caught.value)) < 700
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "line", ['{"text": "cut', "not json", "[1, 2]", "[" * 100_000, '{"text": ' + "9" * 9_999 + "}"]
)
def test_a_broken_line_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl: line 3 ") as caught:
        read(tmp_path / "a.jsonl")
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 3, 100, -1, -10, -5000])
def test_truncated_parquet_is_named(tmp_path, keep):
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as parquet"):
        check_shard(str(path), "text")


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_damaged_row_group_is_named_after_the_good_ones(tmp_path, compression):
    path = write_parquet(
        tmp_path / "a.parquet", TEXTS, row_group_size=100, compression=compression, write_page_checksum=True
    )
    start = pq.ParquetFile(path).metadata.row_group(3).column(1).dictionary_page_offset
    content = bytearray(path.read_bytes())
    content[start + 60] ^= 0xFF
    path.write_bytes(content)
    check_shard(str(path), "text")
    corpus = Corpus("c", (SourceShard(str(path), 0, "train"),), "text", 0.1)
    counts = ReadCounts()
    with pytest.raises(DataError, match=r"a\.parquet: row group 3 cannot be read"):
        list(read_documents(corpus.shards[0], corpus, "train", counts))
    assert counts.documents == 300


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_truncated_compression_is_named(tmp_path, name):
    path = write_jsonl(tmp_path / name, TEXTS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=rf"{name}: (cannot be read after line \d+|line \d+ is not JSON)"):
        read(path)


def test_batches_are_bounded_by_bytes_and_number(tmp_path):
    values = ["x" * 1000] * 3000 + ["y" * (BATCH_BYTES // 2 - 1)] * 5 + ["z" * (2 * BATCH_BYTES)]
    for path in (write_parquet(tmp_path / "a.parquet", values), write_jsonl(tmp_path / "a.jsonl", values)):
        batches, _ = read(path)
        assert flat(batches) == values
        assert max(len(batch) for batch in batches) <= 1024
        assert all(len(batch) == 1 or sum(map(len, batch)) <= BATCH_BYTES for batch in batches)
        assert len(batches) < 12


MEASURE = """
import sys
from pathlib import Path
from nanochat.data.corpora import Corpus, SourceShard
from nanochat.data.documents import ReadCounts, read_documents
corpus = Corpus("c", (SourceShard(sys.argv[1], 0, "train"),), "text", 0.1)
def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
before, counts = peak(), ReadCounts()
for batch in read_documents(corpus.shards[0], corpus, "train", counts):
    pass
print(counts.text_bytes, peak() - before)
"""


def measure(path) -> tuple[int, int]:
    """Return the text bytes read by a fresh process and what its peak memory grew by."""
    out = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True).stdout
    text_bytes, grown = map(int, out.split())
    return text_bytes, grown


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_a_row_group(tmp_path):
    words = random.Random(0).randbytes(1 << 16).hex()
    values = [words[start % 60_000 :][:4000] for start in range(0, 24_000 * 7, 7)]
    options = {"row_group_size": 1 << 30, "compression": "none", "use_dictionary": False}
    small = measure(write_parquet(tmp_path / "a.parquet", values[:3_000], **options))
    large = measure(write_parquet(tmp_path / "b.parquet", values, **options))
    assert large[0] > 7 * small[0] > 80e6
    assert large[1] < 1.3 * small[1] + 10e6


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_one_document_of_50_mb_goes_through(tmp_path, name):
    values = ["short", "word " * 10_000_000, "end"]
    path = (write_parquet if name.endswith("parquet") else write_jsonl)(tmp_path / name, values)
    text_bytes, grown = measure(path)
    assert text_bytes == 50_000_008
    assert grown < 6 * 50e6


def test_counts_add_up():
    counts = ReadCounts(documents=1, text_bytes=2, null_rows=3, empty=4, invalid_utf8=5, other_split=6)
    counts.add(ReadCounts(documents=10, text_bytes=20, null_rows=30, empty=40, invalid_utf8=50, other_split=60))
    assert counts == ReadCounts(11, 22, 33, 44, 55, 66)


def test_real_web_text_reads_through():
    data = os.environ.get("NANOCHAT_TEST_DATA")
    if not data:
        pytest.skip("NANOCHAT_TEST_DATA is not set")
    total = ReadCounts()
    for path in sorted(Path(data, "text", "web_text").glob("*.parquet")):
        total.add(read(path)[1])
    assert total.documents == 456
    assert total.null_rows == total.empty == total.invalid_utf8 == 0
