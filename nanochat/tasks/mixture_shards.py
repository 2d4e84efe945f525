"""A mixture to token shards: conversations rendered and packed, in parts of PART_CONVERSATIONS, each a task of its own.

A row is conversations one after the other, whole, then BOS to its end. Packing happens before training, so that the
rows of a step are a pure function of (seed, manifest, step), as in pretraining: there is no packer to resume.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nanochat import storage
from nanochat.data.conversations import as_messages, render, supervised
from nanochat.data.packing import Packer
from nanochat.data.token_shards import (
    MANIFEST,
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
from nanochat.errors import DataError
from nanochat.run_context import RunContext
from nanochat.tasks.mixture import MixtureSource, load_mixture

PART_CONVERSATIONS = 8192
WAITING_CONVERSATIONS = 1000


@dataclass(frozen=True)
class _Part:
    """Some conversations of a mixture: what one task packs."""

    split: str
    first: int
    last: int

    @property
    def name(self) -> str:
        return f"{self.split}/{self.first // PART_CONVERSATIONS:05d}-conversations"


def write_mixture_shards(
    source: MixtureSource, run: RunContext, tokenizer: Tokenizer, sequence_len: int, folder: str
) -> TokenShards:
    """Render and pack a mixture into a folder and write the manifest; what an earlier call finished stays.

    Raises: DataError naming a conversation that breaks the form, or if none of a split fits into a row.
    """
    mixture = load_mixture(source)
    recipe = PackRecipe(
        tokenizer_hash=tokenizer.hash, vocab_size=tokenizer.vocab_size, bos=tokenizer.bos, sequence_len=sequence_len,
        buffer_documents=WAITING_CONVERSATIONS, text_column="messages", validation_fraction=0.0,
    )  # fmt: skip
    storage.remove(storage.join(folder, MANIFEST))  # while files may be replaced, no manifest describes them
    sizes = {"train": len(mixture), "validation": len(mixture.validation())}
    parts = [
        _Part(split, first, min(first + PART_CONVERSATIONS, size))
        for split, size in sizes.items()
        for first in range(0, size, PART_CONVERSATIONS)
    ]
    shards: list[TokenShard] = []
    for shard in run.map(functools.partial(_pack_part, source, recipe, tokenizer, folder), parts):
        shards.append(shard)
        run.progress(f"conversations: {len(shards)} of {len(parts)} parts are packed")
    for split in sizes:
        if not any(shard.rows for shard in shards if shard.split == split):
            raise DataError(
                f"mixture: no {split} conversation is at most {sequence_len} tokens long. Add shorter ones, or begin "
                "from a model with longer rows."
            )
    return write_manifest(run, recipe, shards, folder)


def _pack_part(source: MixtureSource, recipe: PackRecipe, tokenizer: Tokenizer, folder: str, part: _Part) -> TokenShard:
    """Pack one part, unless it was packed from the same conversations before."""
    mixture, places = load_mixture(source), range(part.first, part.last)
    if part.split == "train":
        alternatives = [(mixture.joined(index), mixture[index]) for index in places]
    else:
        held_out = mixture.validation()
        alternatives = [(held_out[index],) for index in places]
    path = storage.join(folder, part.name)
    sha256 = storage.sha256_json([as_messages(conversation) for listed in alternatives for conversation in listed])
    done = finished(path, recipe, part.name, sha256)
    if done is not None:
        return done
    storage.remove(f"{path}.json")
    rendered = [[render(tokenizer, conversation) for conversation in listed] for listed in alternatives]
    firsts = [next((ids for ids in listed if len(ids) <= recipe.sequence_len + 1), None) for listed in rendered]
    fitting = [ids for ids in firsts if ids is not None]
    packer = Packer(
        row_tokens=recipe.sequence_len + 1, bos=recipe.bos, dtype=stored_dtype(recipe),
        buffer_documents=recipe.buffer_documents, block_rows=recipe.group_rows, splits=False,
    )  # fmt: skip
    write_blocks(f"{path}.parquet", recipe, _blocks(packer, fitting))
    bytes_V = tokenizer.token_bytes()
    said = [np.asarray(ids)[supervised(tokenizer, np.asarray(ids))] for ids in fitting]
    shard = TokenShard(
        name=f"{part.name}.parquet", split="train" if part.split == "train" else "validation", source=part.name,
        source_bytes=0, source_sha256=sha256, rows=packer.counts.rows, group_rows=recipe.group_rows,
        documents=len(fitting), tokens=packer.counts.tokens, text_bytes=sum(int(bytes_V[ids].sum()) for ids in said),
        cropped_tokens=0, skipped={"longer_than_a_row": len(rendered) - len(fitting)},
        size_bytes=storage.size_bytes(f"{path}.parquet"), sha256=storage.sha256_file(f"{path}.parquet"),
    )  # fmt: skip
    write_record(path, recipe, shard)
    return shard


def _blocks(packer: Packer, rendered: Sequence[Sequence[int]]) -> Iterator[npt.NDArray[np.int64]]:
    for ids in rendered:
        yield from packer.add(np.asarray(ids[1:]))  # the packer puts BOS before every piece
    yield from packer.finish(keep_last=True)
