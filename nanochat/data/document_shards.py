"""Documents to token shards: every source file of a corpus tokenised and packed, one task per file and split.

Not covered: what a shard is and when it counts (token_shards.py), how rows are filled (packing.py).
"""

import functools
import re
from collections.abc import Iterator
from typing import Any

import numpy.typing as npt
import pyarrow as pa

from nanochat import storage
from nanochat.config.shards import ShardsConfig
from nanochat.data.corpora import Corpus, SourceShard
from nanochat.data.documents import ReadCounts, Split, read_documents
from nanochat.data.packing import Packer
from nanochat.data.token_shards import SPLITS, PackRecipe, TokenShard, TokenShards, pack_shard, pack_shards
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import DataError, excerpt
from nanochat.run_context import RunContext


def write_token_shards(
    config: ShardsConfig, run: RunContext, corpus: Corpus, tokenizer: Tokenizer, folder: str
) -> TokenShards:
    """Tokenise and pack a corpus into a folder, as `pack_shards` does.

    Raises: DataError naming the source that cannot be read, or if a split fills no row.
    """
    recipe = PackRecipe(
        tokenizer_hash=tokenizer.hash, vocab_size=tokenizer.vocab_size, bos=tokenizer.bos,
        sequence_len=config.sequence_len, buffer_documents=config.buffer_documents, text_column=corpus.text_column,
        validation_fraction=corpus.validation_fraction,
    )  # fmt: skip
    sources = [(split, number, source) for split in SPLITS for number, source in enumerate(corpus.sources(split))]
    empty = (
        f"corpus={corpus.name}: its {{split}} documents fill no row of {config.sequence_len + 1} tokens. "
        "Give it more text or a smaller sequence_len."
    )
    pack = functools.partial(_pack_numbered, recipe, corpus, tokenizer, folder)
    return pack_shards(run, recipe, folder, pack, sources, empty)


def pack_source(
    recipe: PackRecipe, corpus: Corpus, tokenizer: Tokenizer, source: SourceShard, split: Split, path: str
) -> TokenShard:
    """Tokenise and pack one source file's documents of a split into path.parquet, as `pack_shard` does.

    Memory does not grow with the file. Training drops what does not fill the last row; validation pads it with BOS, so
    that each token counts once. Raises: DataError naming the source.
    """

    def fill(packer: Packer, reads: ReadCounts) -> Iterator[npt.NDArray[Any]]:
        for texts in read_documents(source, corpus, split, reads):
            for tokens in tokenizer.encode_batch_numpy(texts):
                yield from packer.add(tokens)
        yield from packer.finish(keep_last=split == "validation")

    try:
        return pack_shard(
            recipe, path, split, fill, source=storage.name_of(source.path), source_bytes=source.size_bytes,
            source_sha256=storage.sha256_file(source.path),
        )  # fmt: skip
    except (pa.ArrowException, OSError) as err:
        raise DataError(f"corpus={source.path}: could not be packed into {path} ({excerpt(err)}).") from err


def _pack_numbered(
    recipe: PackRecipe, corpus: Corpus, tokenizer: Tokenizer, folder: str, item: tuple[Split, int, SourceShard]
) -> TokenShard:
    split, number, source = item
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", storage.name_of(source.path).split(".")[0])[:80]
    return pack_source(recipe, corpus, tokenizer, source, split, storage.join(folder, split, f"{number:05d}-{stem}"))
