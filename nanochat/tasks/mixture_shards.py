"""A mixture to token shards: conversations rendered and packed, in parts of PART_CONVERSATIONS, each a task of its own.

A row is conversations one after the other, whole, then BOS to its end. Packing happens before training, so that the
rows of a step are a pure function of (seed, manifest, step), as in pretraining: there is no packer to resume.
"""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from nanochat import storage
from nanochat.data.conversations import as_messages, render, supervised
from nanochat.data.documents import ReadCounts, Split
from nanochat.data.packing import Packer
from nanochat.data.token_shards import SPLITS, PackRecipe, TokenShard, TokenShards, pack_shard, pack_shards
from nanochat.data.tokenizer import Tokenizer
from nanochat.run_context import RunContext
from nanochat.tasks.mixture import MixtureSource, load_mixture

PART_CONVERSATIONS = 8192
WAITING_CONVERSATIONS = 1000


def write_mixture_shards(
    source: MixtureSource, run: RunContext, tokenizer: Tokenizer, sequence_len: int, folder: str
) -> TokenShards:
    """Render and pack a mixture into a folder, as `pack_shards` does.

    Raises: DataError naming a conversation that breaks the form, or if none of a split fits into a row.
    """
    recipe = PackRecipe(
        tokenizer_hash=tokenizer.hash, vocab_size=tokenizer.vocab_size, bos=tokenizer.bos, sequence_len=sequence_len,
        buffer_documents=WAITING_CONVERSATIONS, text_column="messages", validation_fraction=0.0,
    )  # fmt: skip
    mixture = load_mixture(source)
    sizes = {"train": len(mixture), "validation": len(mixture.validation())}
    parts = [(split, first) for split in SPLITS for first in range(0, sizes[split], PART_CONVERSATIONS)]
    empty = (
        f"mixture: no {{split}} conversation is at most {sequence_len} tokens long. Add shorter ones, or begin from a "
        "model with longer rows."
    )
    return pack_shards(
        run, recipe, folder, functools.partial(_pack_part, source, recipe, tokenizer, folder), parts, empty
    )


def _pack_part(
    source: MixtureSource, recipe: PackRecipe, tokenizer: Tokenizer, folder: str, part: tuple[Split, int]
) -> TokenShard:
    """Pack one part; of a joined pair that no row holds, the first conversation alone."""
    mixture, (split, first) = load_mixture(source), part
    if split == "train":
        places = range(first, min(first + PART_CONVERSATIONS, len(mixture)))
        alternatives = [(mixture.joined(index), mixture[index]) for index in places]
    else:
        alternatives = [(one,) for one in mixture.validation()[first : first + PART_CONVERSATIONS]]
    bytes_V = tokenizer.token_bytes()

    def fill(packer: Packer, reads: ReadCounts) -> Iterator[npt.NDArray[Any]]:
        for listed in alternatives:
            rendered = (np.asarray(render(tokenizer, conversation)) for conversation in listed)
            ids = next((ids for ids in rendered if len(ids) <= recipe.sequence_len + 1), None)
            if ids is None:
                reads.longer_than_a_row += 1
                continue
            reads.documents += 1
            reads.text_bytes += int(bytes_V[ids[supervised(tokenizer, ids)]].sum())
            yield from packer.add(ids[1:])  # the packer puts BOS before every piece
        yield from packer.finish(keep_last=True)

    name = f"{split}/{first // PART_CONVERSATIONS:05d}-conversations"
    sha256 = storage.sha256_json([as_messages(conversation) for listed in alternatives for conversation in listed])
    path = storage.join(folder, name)
    return pack_shard(recipe, path, split, fill, source=name, source_sha256=sha256, splits=False)
