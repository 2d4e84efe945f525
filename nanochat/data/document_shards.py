"""Documents to token shards: every source file of a corpus tokenised and packed, one task per file and split.

Not covered: what a shard is and when it counts (token_shards.py), how rows are filled (packing.py).
"""

import functools
import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy.typing as npt
import pyarrow as pa

from nanochat import storage
from nanochat.config.shards import ShardsConfig
from nanochat.data.corpora import Corpus, SourceShard
from nanochat.data.documents import ReadCounts, Split, read_documents
from nanochat.data.packing import Packer
from nanochat.data.token_shards import (
    MANIFEST,
    SPLITS,
    PackRecipe,
    TokenShard,
    TokenShards,
    finished,
    stored_dtype,
    write_blocks,
    write_manifest,
    write_record,
)
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import DataError, excerpt
from nanochat.run_context import RunContext


def write_token_shards(
    config: ShardsConfig, run: RunContext, corpus: Corpus, tokenizer: Tokenizer, folder: str
) -> TokenShards:
    """Tokenise and pack a corpus into a folder, one task per source file and split, and write the manifest.

    What an earlier call finished from the same sources stays. The result is the same for every number of workers.
    Raises: DataError naming the source that cannot be read, or if a split fills no row.
    """
    recipe = PackRecipe(
        tokenizer_hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        bos=tokenizer.bos,
        sequence_len=config.sequence_len,
        buffer_documents=config.buffer_documents,
        text_column=corpus.text_column,
        validation_fraction=corpus.validation_fraction,
    )
    # While files may be replaced, no manifest describes them.
    storage.remove(storage.join(folder, MANIFEST))
    sources = [(split, number, source) for split in SPLITS for number, source in enumerate(corpus.sources(split))]
    pack = functools.partial(_pack_numbered, recipe, corpus, tokenizer, folder)
    shards = []
    for shard in run.map(pack, sources):
        shards.append(shard)
        run.progress(
            f"shards {len(shards)}/{len(sources)}: {shard.name}, {shard.rows} rows, {shard.tokens} tokens, "
            f"{shard.cropped_tokens} cropped"
        )
    for split in SPLITS:
        if not any(shard.rows for shard in shards if shard.split == split):
            raise DataError(
                f"corpus={corpus.name}: its {split} documents fill no row of {config.sequence_len + 1} tokens. "
                "Give it more text or a smaller sequence_len."
            )
    return write_manifest(run, recipe, shards, folder)


def pack_source(
    recipe: PackRecipe, corpus: Corpus, tokenizer: Tokenizer, source: SourceShard, split: Split, path: str
) -> TokenShard:
    """Tokenise and pack one source file's documents of a split into path.parquet, then write its record path.json.

    Nothing is done if both are there and were made from the same bytes in the same way. Memory does not grow with the
    file. Training drops what does not fill the last row; validation pads it with BOS, so that each token counts once.
    Raises: DataError naming the source.
    """
    try:
        source_sha256 = storage.sha256_file(source.path)
        done = finished(path, recipe, storage.name_of(source.path), source_sha256)
        return done or _pack(recipe, corpus, tokenizer, source, source_sha256, split, path)
    except (pa.ArrowException, OSError) as err:
        raise DataError(f"corpus={source.path}: could not be packed into {path} ({excerpt(err)}).") from err


def _pack_numbered(
    recipe: PackRecipe, corpus: Corpus, tokenizer: Tokenizer, folder: str, item: tuple[Split, int, SourceShard]
) -> TokenShard:
    split, number, source = item
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", storage.name_of(source.path).split(".")[0])[:80]
    return pack_source(recipe, corpus, tokenizer, source, split, storage.join(folder, split, f"{number:05d}-{stem}"))


def _pack(
    recipe: PackRecipe,
    corpus: Corpus,
    tokenizer: Tokenizer,
    source: SourceShard,
    source_sha256: str,
    split: Split,
    path: str,
) -> TokenShard:
    storage.remove(f"{path}.json")
    reads = ReadCounts()
    packer = Packer(
        row_tokens=recipe.sequence_len + 1,
        bos=recipe.bos,
        dtype=stored_dtype(recipe),
        buffer_documents=recipe.buffer_documents,
        block_rows=recipe.group_rows,
    )
    write_blocks(f"{path}.parquet", recipe, _blocks(packer, corpus, tokenizer, source, split, reads))
    skipped = {reason: count for reason, count in asdict(reads).items() if reason not in ("documents", "text_bytes")}
    shard = TokenShard(
        name=f"{split}/{storage.name_of(path)}.parquet",
        split=split,
        source=storage.name_of(source.path),
        source_bytes=source.size_bytes,
        source_sha256=source_sha256,
        rows=packer.counts.rows,
        group_rows=recipe.group_rows,
        documents=reads.documents,
        tokens=packer.counts.tokens,
        text_bytes=reads.text_bytes,
        cropped_tokens=packer.counts.cropped_tokens,
        skipped=skipped,
        size_bytes=storage.size_bytes(f"{path}.parquet"),
        sha256=storage.sha256_file(f"{path}.parquet"),
    )
    write_record(path, recipe, shard)
    return shard


def _blocks(
    packer: Packer, corpus: Corpus, tokenizer: Tokenizer, source: SourceShard, split: Split, reads: ReadCounts
) -> Iterator[npt.NDArray[Any]]:
    for texts in read_documents(source, corpus, split, reads):
        for tokens in tokenizer.encode_batch_numpy(texts):
            yield from packer.add(tokens)
    yield from packer.finish(keep_last=split == "validation")
