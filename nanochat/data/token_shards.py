"""Token shards on storage: parquet files of packed rows, and the manifest that lists them.

Each is made from one source by itself (document_shards.py, tasks/mixture_shards.py), so that the work fans out and
each result depends on nothing but its source, the tokenizer and the recipe. A file `X.parquet` counts if its record
`X.json`, written after it, agrees with all three and its bytes; a killed job, run again, redoes the rest. Readers start
from `manifest.json`, made last.

Rows are stored as fixed_size_list<uint16 or uint32>[sequence_len + 1] in groups of ROW_GROUP_ROWS, lz4: of the
encodings tried (8,192 words, T=512, 2 EPYC cores, 2026-11) it reads at 250 M tok/s and 2 bytes a token, uncompressed
at 330 M and 4 bytes, zstd at 110 M and 1.4 bytes.
Not covered: the order in which rows are trained on (row_order.py).
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat import storage
from nanochat.config.shards import ROW_GROUP_ROWS
from nanochat.data.documents import ReadCounts, Split
from nanochat.data.packing import PACKING_VERSION, Packer
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import DataError, TokenizerMismatchError, excerpt
from nanochat.run_context import RunContext

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
CROPPED_SHARE_LIMIT = 0.05
SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True, kw_only=True)
class PackRecipe:
    """Everything but the text that decides what a token shard holds."""

    tokenizer_hash: str
    vocab_size: int
    bos: int
    sequence_len: int
    buffer_documents: int
    text_column: str
    validation_fraction: float
    group_rows: int = ROW_GROUP_ROWS
    packing_version: int = PACKING_VERSION


@dataclass(frozen=True, kw_only=True)
class TokenShard:
    """One parquet file of rows, and where they came from: its record X.json, and its entry in the manifest."""

    name: str
    """Path in the shards folder, as train/00000-X.parquet."""
    split: Split
    source: str
    """Name of the source file, without its folder: moving a corpus changes nothing."""
    source_bytes: int
    source_sha256: str
    rows: int
    group_rows: int
    """Rows of each row group; the last one may have fewer."""
    documents: int
    tokens: int
    """Tokens of the documents, BOS not counted."""
    text_bytes: int
    cropped_tokens: int
    """Those of the tokens that are in no row."""
    skipped: dict[str, int]
    """Rows of the source that gave no document of this split, by reason."""
    size_bytes: int
    sha256: str

    def group_sizes(self) -> list[int]:
        """Return the rows of each row group."""
        return [min(self.group_rows, self.rows - first) for first in range(0, self.rows, self.group_rows)]


@dataclass(frozen=True, kw_only=True)
class TokenShards:
    """The shards of a folder, as its manifest has them."""

    folder: str
    recipe: PackRecipe
    shards: tuple[TokenShard, ...]
    manifest_hash: str
    """SHA-256 of the manifest's content: two folders with the same hash hold the same rows."""

    @property
    def sequence_len(self) -> int:
        """Tokens that a row trains on; a stored row has one more."""
        return self.recipe.sequence_len

    @property
    def dtype(self) -> type[np.uint16 | np.uint32]:
        """Type of the stored ids."""
        return stored_dtype(self.recipe)

    def split(self, split: Split) -> tuple[TokenShard, ...]:
        """Return a split's shards in manifest order."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def groups(self, split: Split) -> list[tuple[int, int, int]]:
        """Return (shard's place in `split`, row group, rows) of every row group of a split, in manifest order."""
        return [
            (number, group, rows)
            for number, shard in enumerate(self.split(split))
            for group, rows in enumerate(shard.group_sizes())
        ]

    def rows(self, split: Split) -> int:
        """Return the rows of a split."""
        return sum(shard.rows for shard in self.split(split))

    def read_rows(self, shard: TokenShard, group: int) -> npt.NDArray[Any]:
        """Return a row group, (rows, sequence_len + 1). Raises: DataError naming a shard that cannot be read."""
        with self.open(shard) as file:
            return self.read_group(file, shard, group)

    def validation_batches(
        self, *, rows: int, limit: int, padding: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[npt.NDArray[Any]]:
        """Yield this worker's share of the first `limit` validation rows, in manifest order, (rows, sequence_len + 1).

        Batch j goes to worker j % world_size; what the last batch lacks is filled with `padding`.
        """
        number, filled = 0, 0
        batch = np.full((rows, self.sequence_len + 1), padding, self.dtype)
        for block in self._first_rows("validation", limit):
            while len(block):
                part = block[: rows - filled]
                batch[filled : filled + len(part)] = part
                block, filled = block[len(part) :], filled + len(part)
                if filled == rows:
                    if number % world_size == rank:
                        yield batch
                    number, filled = number + 1, 0
                    batch = np.full_like(batch, padding)
        if filled and number % world_size == rank:
            yield batch

    def _first_rows(self, split: Split, limit: int) -> Iterator[npt.NDArray[Any]]:
        for shard in self.split(split):
            for group in range(len(shard.group_sizes())):
                if limit <= 0:
                    return
                block = self.read_rows(shard, group)[:limit]
                limit -= len(block)
                yield block

    def open(self, shard: TokenShard) -> pq.ParquetFile:
        """Open a shard for `read_group`. Raises: DataError if it is missing, or not what the manifest says."""
        fs, path = storage.filesystem(storage.join(self.folder, shard.name))
        try:
            if (size := int(fs.size(path))) != shard.size_bytes:
                raise _damaged(self.folder, shard.name, f"it has {size} bytes, not {shard.size_bytes}")
            # Not as a memory map: a file that is cut short would kill the process.
            file = pq.ParquetFile(path, filesystem=fs, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as err:
            raise _damaged(self.folder, shard.name, excerpt(err)) from err
        if not (found := file.schema_arrow).equals(expected := _schema(self.recipe)):
            file.close()
            raise _damaged(self.folder, shard.name, f"it has the columns {excerpt(found)}, not {excerpt(expected)}")
        return file

    def read_group(self, file: pq.ParquetFile, shard: TokenShard, group: int) -> npt.NDArray[Any]:
        """Return a row group of an open shard, (rows, sequence_len + 1), every id below the vocabulary's size.

        Raises: DataError naming shard and row group if it is damaged.
        """
        try:
            column = file.read_row_group(group, columns=["tokens"], use_threads=False).column("tokens").combine_chunks()
        except (pa.ArrowException, OSError) as err:
            raise _damaged(self.folder, shard.name, f"row group {group}: {excerpt(err)}") from err
        if len(column) != (expected := shard.group_sizes()[group]):
            raise _damaged(self.folder, shard.name, f"row group {group} has {len(column)} rows, not {expected}")
        rows = column.flatten().to_numpy().reshape(len(column), -1)
        if (largest := rows.max()) >= (limit := self.recipe.vocab_size):
            raise _damaged(
                self.folder, shard.name, f"row group {group} has the id {largest}, all must be below {limit}"
            )
        return rows

    @classmethod
    def load(cls, folder: str) -> "TokenShards":
        """Read a folder's manifest. Raises: DataError if it is missing, damaged or of another version."""
        path = storage.join(folder, MANIFEST)
        if not storage.exists(path):
            raise DataError(f"shards={path}: there is no such file. Run ray_jobs/prepare_data.py with this --run-dir.")
        manifest = _read_record(path)
        if manifest is None or manifest.get("version") != MANIFEST_VERSION:
            raise _damaged(folder, MANIFEST, f"it is not JSON, or not of version {MANIFEST_VERSION}")
        content = {key: manifest.get(key) for key in ("version", "recipe", "shards")}
        if manifest.get("hash") != storage.sha256_json(content):
            raise _damaged(folder, MANIFEST, "its content does not have the hash that it names")
        try:
            recipe = PackRecipe(**manifest["recipe"])
            shards = tuple(TokenShard(**shard) for shard in manifest["shards"])
            for shard in shards:
                if shard.split not in SPLITS or not re.fullmatch(rf"{shard.split}/[^/]{{1,1000}}\.parquet", shard.name):
                    raise _damaged(folder, MANIFEST, f"{excerpt(shard.name)} is not SPLIT/NAME.parquet")
        except (KeyError, TypeError) as err:
            raise _damaged(folder, MANIFEST, excerpt(err)) from err
        return cls(folder=folder, recipe=recipe, shards=shards, manifest_hash=manifest["hash"])

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises: TokenizerMismatchError if the shards were made with another tokenizer."""
        made_with = (self.recipe.tokenizer_hash, self.recipe.vocab_size)
        if made_with != (tokenizer.hash, tokenizer.vocab_size):
            raise TokenizerMismatchError(
                f"shards={self.folder}: made with tokenizer {made_with[0][:12]} of {made_with[1]} tokens, not with "
                f"{tokenizer.hash[:12]} of {tokenizer.vocab_size}. Pack them again, or use their tokenizer."
            )


def pack_shards(
    run: RunContext,
    recipe: PackRecipe,
    folder: str,
    pack: Callable[[Any], TokenShard],
    sources: Sequence[Any],
    empty: str,
) -> TokenShards:
    """Pack every source, a task each, and write the manifest; what an earlier call finished from the same stays.

    The result is the same for every number of workers. Raises: DataError, `empty` with {split}, if one fills no row.
    """
    storage.remove(storage.join(folder, MANIFEST))  # while files may be replaced, no manifest describes them
    shards: list[TokenShard] = []
    for shard in run.map(pack, sources):
        shards.append(shard)
        run.progress(
            f"shards {len(shards)}/{len(sources)}: {shard.name}, {shard.rows} rows, {shard.tokens} tokens, "
            f"{shard.cropped_tokens} cropped"
        )
    for split in SPLITS:
        if not any(shard.rows for shard in shards if shard.split == split):
            raise DataError(empty.format(split=split))
    content = {"version": MANIFEST_VERSION, "recipe": asdict(recipe), "shards": [asdict(shard) for shard in shards]}
    totals = {split: _totals(shard for shard in shards if shard.split == split) for split in SPLITS}
    storage.write_json(
        storage.join(folder, MANIFEST), content | {"totals": totals, "hash": storage.sha256_json(content)}
    )
    if (share := totals["train"]["cropped_share"]) > CROPPED_SHARE_LIMIT:
        run.progress(
            f"shards: {share:.1%} of the training tokens are cropped, since each source file loses its last, "
            "unfinished row. Fewer and larger files, or a smaller sequence_len, lose less."
        )
    return TokenShards.load(folder)


def pack_shard(
    recipe: PackRecipe,
    path: str,
    split: Split,
    fill: Callable[[Packer, ReadCounts], Iterator[npt.NDArray[Any]]],
    *,
    source: str,
    source_sha256: str,
    source_bytes: int = 0,
    splits: bool = True,
) -> TokenShard:
    """Write the blocks that `fill` gets from a packer to path.parquet, then the record path.json.

    Nothing is done if both are there and were made from the same bytes in the same way. `fill` counts what it reads.
    """
    if (done := _finished(path, recipe, source, source_sha256)) is not None:
        return done
    storage.remove(f"{path}.json")
    reads = ReadCounts()
    packer = Packer(
        row_tokens=recipe.sequence_len + 1, bos=recipe.bos, dtype=stored_dtype(recipe),
        buffer_documents=recipe.buffer_documents, block_rows=recipe.group_rows, splits=splits,
    )  # fmt: skip
    _write_blocks(f"{path}.parquet", recipe, fill(packer, reads))
    skipped = {reason: count for reason, count in asdict(reads).items() if reason not in ("documents", "text_bytes")}
    shard = TokenShard(
        name=f"{split}/{storage.name_of(path)}.parquet", split=split, source=source, source_bytes=source_bytes,
        source_sha256=source_sha256, rows=packer.counts.rows, group_rows=recipe.group_rows, documents=reads.documents,
        tokens=packer.counts.tokens, text_bytes=reads.text_bytes, cropped_tokens=packer.counts.cropped_tokens,
        skipped=skipped, size_bytes=storage.size_bytes(f"{path}.parquet"),
        sha256=storage.sha256_file(f"{path}.parquet"),
    )  # fmt: skip
    storage.write_json(f"{path}.json", {"version": MANIFEST_VERSION, "recipe": asdict(recipe), "shard": asdict(shard)})
    return shard


def _write_blocks(path: str, recipe: PackRecipe, blocks: Iterable[npt.NDArray[Any]]) -> None:
    schema = _schema(recipe)
    with (
        storage.atomic_write(path) as file,
        pq.ParquetWriter(
            file,
            schema,
            compression="lz4",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        ) as writer,
    ):
        for block in blocks:
            assert block.max() < recipe.vocab_size, "the tokenizer gives ids of its vocabulary"
            column = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), type=schema.field("tokens").type)
            writer.write_table(pa.Table.from_arrays([column], schema=schema), row_group_size=recipe.group_rows)


def _finished(path: str, recipe: PackRecipe, source: str, source_sha256: str) -> TokenShard | None:
    """Return the record of path.parquet if it need not be made again: source, recipe and bytes are as recorded."""
    if not storage.exists(f"{path}.json") or not storage.exists(f"{path}.parquet"):
        return None
    record = _read_record(f"{path}.json")
    if record is None or record.get("version") != MANIFEST_VERSION or record.get("recipe") != asdict(recipe):
        return None
    shard = TokenShard(**record["shard"])
    same = shard.source_sha256 == source_sha256 and shard.source == source
    return shard if same and shard.sha256 == storage.sha256_file(f"{path}.parquet") else None


def _read_record(path: str) -> dict[str, Any] | None:
    """Read a JSON object; None if the file is damaged."""
    try:
        record = storage.read_json(path)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _totals(shards: Iterable[TokenShard]) -> dict[str, Any]:
    names = ("rows", "documents", "tokens", "text_bytes", "cropped_tokens")
    listed = list(shards)
    totals: dict[str, Any] = {name: sum(getattr(shard, name) for shard in listed) for name in names}
    return totals | {"cropped_share": totals["cropped_tokens"] / max(totals["tokens"], 1)}


def stored_dtype(recipe: PackRecipe) -> type[np.uint16 | np.uint32]:
    """Return the smallest type that holds every id."""
    return np.uint16 if recipe.vocab_size <= 1 << 16 else np.uint32


def _schema(recipe: PackRecipe) -> pa.Schema:
    ids = pa.field("element", pa.from_numpy_dtype(stored_dtype(recipe)), nullable=False)
    return pa.schema([pa.field("tokens", pa.list_(ids, recipe.sequence_len + 1), nullable=False)])


def _damaged(folder: str, name: str, what: str) -> DataError:
    remedy = "Delete it and run ray_jobs/prepare_data.py again."
    return DataError(f"shards={storage.join(folder, name)}: is damaged ({what}). {remedy}")
