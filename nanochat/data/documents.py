"""Source shards to documents: parquet and JSONL files, read in order, a few MB at a time.

What happens with bad input, so that one bad row does not stop a corpus and a bad file does not pass as a good one:
- counted and skipped: a null (or absent) text, text of nothing but whitespace, text that is not valid UTF-8;
- DataError naming the file, and its row group or line: no text column, a text column of another type, a file that is
  damaged or cut short, a line that is not a JSON object, a file without any document at all.

Memory does not grow with files or row groups: batches hold about BATCH_BYTES, or one document where that is longer.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from nanochat import storage
from nanochat.errors import DataError, excerpt

if TYPE_CHECKING:
    from nanochat.data.corpora import Corpus, SourceShard

BATCH_BYTES = 4 << 20
BATCH_DOCUMENTS = 1024
LONGEST_LINE_BYTES = 1 << 30  # a file without line ends must not be read into memory whole
READ_BUFFER_BYTES = 1 << 20
REPLACE = "Replace the file, or leave it out."

Split = Literal["train", "validation"]


@dataclass
class ReadCounts:
    """What was read, and what was passed over and why."""

    documents: int = 0
    """Documents of the split that was asked for."""
    text_bytes: int = 0
    """Their UTF-8 bytes."""
    null_rows: int = 0
    """Rows whose text is null or absent."""
    empty: int = 0
    """Rows of nothing but whitespace."""
    invalid_utf8: int = 0
    """Rows whose text is not UTF-8."""
    other_split: int = 0
    """Documents of files divided by hash that belong to the other split."""
    longer_than_a_row: int = 0
    """Conversations that no row holds; documents are split."""

    def add(self, other: "ReadCounts") -> None:
        """Add another file's counts to these."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


def is_held_out(text: bytes, validation_fraction: float) -> bool:
    """Tell whether a document (UTF-8) is validation text: a pure function of its bytes, so copies stay together."""
    number = int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
    return number < validation_fraction * 2**64


def read_documents(shard: "SourceShard", corpus: "Corpus", split: Split, counts: ReadCounts) -> Iterator[list[str]]:
    """Yield a file's documents of one split in file order, in batches; count them into `counts`.

    Raises: DataError as the module says; for what is found along the way, after the batches before it.
    """
    assert shard.split in (split, "by_hash"), f"{shard.path} holds no {split} documents"
    before = counts.documents + counts.other_split
    fraction = corpus.validation_fraction if shard.split == "by_hash" else None
    batch: list[str] = []
    batch_bytes = 0
    for value in _values(shard.path, corpus.text_column):
        text = _document(value, split, fraction, counts)
        if text is None or value is None:
            continue
        if batch and batch_bytes + len(value) > BATCH_BYTES:
            yield batch
            batch, batch_bytes = [], 0
        batch.append(text)
        batch_bytes += len(value)
        if len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, batch_bytes = [], 0
    if batch:
        yield batch
    if counts.documents + counts.other_split == before:
        raise DataError(f"corpus={shard.path}: no document in it, every row is null, empty or not UTF-8. {REPLACE}")


def check_shard(path: str, text_column: str) -> None:
    """Look at a file's head (and a parquet file's footer) for what would make it unusable.

    Raises: DataError if it is damaged there, has no rows, or has no text column of a text type.
    """
    if is_parquet(path):
        with _open_parquet(path, text_column) as file:
            if not file.metadata.num_rows:
                raise DataError(f"corpus={path}: has no rows. {REPLACE}")
        return
    if next(_jsonl_values(path, text_column), _NOTHING) is _NOTHING:
        raise DataError(f"corpus={path}: has no lines. {REPLACE}")


def is_parquet(path: str) -> bool:
    """Tell a parquet file by its name; all others are JSONL."""
    return path.endswith(".parquet")


_NOTHING = object()


def _document(value: bytes | None, split: Split, fraction: float | None, counts: ReadCounts) -> str | None:
    """Return the text of a row if it is a document of the split, and count it either way."""
    if value is None:
        counts.null_rows += 1
        return None
    try:
        text = value.decode()
    except UnicodeDecodeError:
        counts.invalid_utf8 += 1
        return None
    if not text or text.isspace():
        counts.empty += 1
        return None
    if fraction is not None and is_held_out(value, fraction) != (split == "validation"):
        counts.other_split += 1
        return None
    counts.documents += 1
    counts.text_bytes += len(value)
    return text


def _values(path: str, column: str) -> Iterator[bytes | None]:
    return _parquet_values(path, column) if is_parquet(path) else _jsonl_values(path, column)


def _arrow_filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    fs, inner = storage.filesystem(path)
    if isinstance(fs, LocalFileSystem):
        return pafs.LocalFileSystem(), inner
    return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), inner


def _open_parquet(path: str, column: str) -> pq.ParquetFile:
    fs, inner = _arrow_filesystem(path)
    try:
        file = pq.ParquetFile(
            inner, filesystem=fs, buffer_size=READ_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
        )
    except (pa.ArrowException, OSError) as err:
        raise DataError(f"corpus={path}: cannot be read as parquet ({excerpt(err)}). {REPLACE}") from err
    try:
        _check_column(path, file.schema_arrow, column)
    except DataError:
        file.close()
        raise
    return file


def _check_column(path: str, schema: pa.Schema, column: str) -> None:
    index = schema.get_field_index(column)
    found = excerpt(", ".join(schema.names) or "none")
    if index < 0:
        raise DataError(f"text_column={column}: {path} has no such column, or two. Its columns: {found}.")
    kind = schema.field(index).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if value not in _TEXT_TYPES:
        raise DataError(f"text_column={column}: {path} has {excerpt(kind)} there, not text. Its columns: {found}.")


_TEXT_TYPES = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view())


def _parquet_values(path: str, column: str) -> Iterator[bytes | None]:
    """Yield the column as bytes; UTF-8 is checked by the caller, row by row, since parquet files can hold anything."""
    with _open_parquet(path, column) as file:
        for group in range(file.num_row_groups):
            try:
                for batch in file.iter_batches(_batch_rows(file, group, column), [group], [column], use_threads=False):
                    yield from batch.column(0).cast(pa.large_binary()).to_pylist()
            except (pa.ArrowException, OSError) as err:
                raise DataError(f"corpus={path}: row group {group} cannot be read ({excerpt(err)}). {REPLACE}") from err


def _batch_rows(file: pq.ParquetFile, group: int, column: str) -> int:
    """Rows of average length that make a batch: a row group may hold gigabytes."""
    metadata = file.metadata.row_group(group)
    chunks = [metadata.column(index) for index in range(metadata.num_columns)]
    size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)
    return max(1, min(BATCH_DOCUMENTS, BATCH_BYTES * metadata.num_rows // max(size, 1)))


def _jsonl_values(path: str, column: str) -> Iterator[bytes | None]:
    """Yield each line's text as bytes; a line that is not UTF-8 comes as it is, to be counted as such."""
    fs, inner = _arrow_filesystem(path)
    number = records = 0
    try:
        # "detect" decompresses .gz, .zst and .bz2 by the name's end
        with fs.open_input_stream(inner, compression="detect", buffer_size=READ_BUFFER_BYTES) as stream:
            for line in _lines(stream):
                number += 1
                if len(line) > LONGEST_LINE_BYTES:
                    raise DataError(f"corpus={path}: line {number} is longer than 1 GiB. Split its document.")
                if line.strip():
                    records += 1
                    yield _line_value(line, path, number, column, is_first=records == 1)
    except (pa.ArrowException, OSError) as err:
        raise DataError(f"corpus={path}: cannot be read after line {number} ({excerpt(err)}). {REPLACE}") from err


def _lines(stream: pa.NativeFile) -> Iterator[bytes]:
    reader = io.BufferedReader(stream, READ_BUFFER_BYTES)
    while line := reader.readline(LONGEST_LINE_BYTES + 1):
        yield line


def _line_value(line: bytes, path: str, number: int, column: str, *, is_first: bool) -> bytes | None:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return line
    except (ValueError, RecursionError) as err:
        raise DataError(f"corpus={path}: line {number} is not JSON ({excerpt(err)}). Repair or drop the line.") from err
    if not isinstance(record, dict):
        raise DataError(f"corpus={path}: line {number} is not a JSON object with the key {column}. {REPLACE}")
    if is_first and column not in record:
        found = excerpt(", ".join(record) or "none")
        raise DataError(f"text_column={column}: {path} has no such key. Its keys: {found}.")
    value = record.get(column)
    if value is not None and not isinstance(value, str):
        kind = type(value).__name__
        raise DataError(f"text_column={column}: line {number} of {path} has {kind} there, not text. {REPLACE}")
    return None if value is None else value.encode("utf-8", "surrogatepass")
