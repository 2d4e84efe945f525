"""Our byte-pair encoding to the files of Hugging Face's tokenizers and back; every text keeps its ids.

Where tiktoken joins any two neighbours that make a known token, the first-learned token first, `tokenizers` joins pairs
of a list: so every way to make a token of two others is listed, at the token's place. Bytes are spelled with GPT-2's
256 printable characters. The split patterns mean the same to its regex engine, Oniguruma, as to Rust's.
Encoding puts <|bos|> first, as rows of training begin; the chat template writes it itself.

Source: the characters for bytes: openai/gpt-2, encoder.py; all pairs instead of the trained ones: transformers'
TikTokenConverter.
Not covered, because `tokenizers` cannot: a special token's name as text (it becomes the token, so the chat template
refuses it), lone surrogates, and runs of LONGEST_SPACE_RUN whitespace and more, which our encoder cuts.
"""

import itertools
from collections.abc import Mapping
from importlib import resources
from typing import Any

from nanochat.data.tokenizer import NUM_BYTES, SPECIAL_TOKENS, SPLIT_PATTERNS, Tokenizer
from nanochat.errors import ConfigError, DataError, excerpt

MOST_TOKENS = 1 << 20
MOST_SQUARED_BYTES = 1 << 32
"""Of all tokens together: finding the ways to make a token takes the square of its length. 65,536 tokens of 256 bytes
are as many; a trained vocabulary of that size has about 4 million."""

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_CHARACTERS = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(0x100 + number) for number, byte in enumerate(sorted(set(range(NUM_BYTES)) - set(_PRINTABLE)))
}
_BYTES = {character: byte for byte, character in _CHARACTERS.items()}
_SPLIT, _BYTE_LEVEL = "pre_tokenizer.pretokenizers.0", "pre_tokenizer.pretokenizers.1"
_REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "normalizer": (None,),
    "pre_tokenizer.type": ("Sequence",),
    f"{_SPLIT}.type": ("Split",),
    f"{_SPLIT}.pattern.Regex": tuple(SPLIT_PATTERNS.values()),
    f"{_SPLIT}.behavior": ("Isolated",),
    f"{_SPLIT}.invert": (False,),
    f"{_BYTE_LEVEL}.type": ("ByteLevel",),
    f"{_BYTE_LEVEL}.add_prefix_space": (False,),
    f"{_BYTE_LEVEL}.use_regex": (False,),
    "pre_tokenizer.pretokenizers.2": (None,),
    "decoder.type": ("ByteLevel",),
    "model.type": ("BPE",),
    "model.dropout": (None,),
    "model.continuing_subword_prefix": (None, ""),
    "model.end_of_word_suffix": (None, ""),
    "model.ignore_merges": (True,),
}
"""What decides ids in tokenizer.json beside vocabulary and merges, and the values with which they are ours."""


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of tokenizer.json.

    Raises: ConfigError if the split pattern is none of ours, or a token is spelled like a special one.
    """
    merges, pattern = tokenizer.merges, tokenizer.pattern  # all that a copy is made of
    if pattern not in SPLIT_PATTERNS.values():
        raise ConfigError(
            f"split_pattern={excerpt(pattern)}: only {' and '.join(SPLIT_PATTERNS)} are known to cut alike in "
            "Hugging Face's tokenizers. Train the tokenizer with one of them."
        )
    if named := [name for name in SPECIAL_TOKENS if name.encode() in merges]:
        raise ConfigError(
            f"vocabulary={named[0]}: is text as well as a special token, which Hugging Face's tokenizers cannot tell "
            "apart. Train the tokenizer on other text."
        )
    ranks = {bytes([byte]): byte for byte in range(NUM_BYTES)}
    ranks |= {merge: NUM_BYTES + rank for rank, merge in enumerate(merges)}
    first, then = ({"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": tokenizer.special(name), **_special(name)} for name in SPECIAL_TOKENS],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, then],
            "pair": [
                first, then,
                {"SpecialToken": {"id": "<|bos|>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [tokenizer.bos], "tokens": ["<|bos|>"]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
            "vocab": {_spelled(token): rank for token, rank in ranks.items()},
            "merges": [" ".join(pair) for merge in merges for pair in _pairs(merge, ranks)],
        },
    }  # fmt: skip


def tokenizer_from_json(content: object, where: str) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json: ours, or one that was made of a karpathy/nanochat tokenizer.

    What it puts around a text (post_processor) and cuts off it (truncation, padding) is not read. `where` names the
    file in errors. Raises: DataError naming the field if any text would get other ids, or special tokens.
    """
    for field, allowed in _REQUIRED.items():
        if (value := _at(content, field)) not in allowed:
            name = f"one of split_pattern's, {' or '.join(SPLIT_PATTERNS)}" if field.endswith("Regex") else ""
            raise _refused(where, field, value, name or " or ".join(map(repr, allowed)))
    tokens = _tokens(_at(content, "model.vocab"), where)
    specials = [(name, len(tokens) + number) for number, name in enumerate(SPECIAL_TOKENS)]
    added = _at(content, "added_tokens")
    found = [(_at(one, "content"), _at(one, "id")) for one in added] if isinstance(added, list) else []
    for wanted, given in itertools.zip_longest(specials, found):
        if given != wanted:
            rule = f"{wanted[0]} with id {wanted[1]} here, in nanochat's order" if wanted else "these nine and no other"
            raise _refused(where, "added_tokens", given and given[0], rule)
    _check_merges(_at(content, "model.merges"), tokens, where)
    return Tokenizer(tokens[NUM_BYTES:], _at(content, f"{_SPLIT}.pattern.Regex"))


def tokenizer_config(tokenizer: Tokenizer, capacity: int, is_chat: bool) -> dict[str, Any]:
    """Return the content of tokenizer_config.json: `capacity` positions; a chat model's reply ends its text."""
    ends = "<|assistant_end|>" if is_chat else "<|bos|>"
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": ends,
        "pad_token": "<|bos|>",
        "additional_special_tokens": [name for name in SPECIAL_TOKENS if name not in ("<|bos|>", ends)],
        "added_tokens_decoder": {str(tokenizer.special(name)): _special(name) for name in SPECIAL_TOKENS},
        "model_max_length": capacity,
        "clean_up_tokenization_spaces": False,
    }


def chat_template() -> str:
    """Return chat_template.jinja: what `nanochat.serving.prompts.chat_prompt` makes of messages, as text."""
    return resources.files("nanochat.exchange").joinpath("chat_template.jinja").read_text("utf-8")


def _special(name: str) -> dict[str, Any]:
    return {
        "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True,
    }  # fmt: skip


def _spelled(token: bytes) -> str:
    return "".join(map(_CHARACTERS.__getitem__, token))


def _pairs(token: bytes, ranks: Mapping[bytes, int], below: int | None = None) -> list[tuple[str, str]]:
    """Return every pair of known tokens, of ranks under `below`, that a token is the join of, as it is spelled."""
    limit = len(ranks) if below is None else below
    cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
    return [
        (_spelled(left), _spelled(right)) for left, right in cuts
        if ranks.get(left, limit) < limit and ranks.get(right, limit) < limit
    ]  # fmt: skip


def _tokens(vocab: object, where: str) -> list[bytes]:
    """Return the tokens by id, without special ones. Raises: DataError if one is no byte string or its id is not so."""
    field = "model.vocab"
    if not isinstance(vocab, dict) or not NUM_BYTES <= len(vocab) <= MOST_TOKENS:
        raise _refused(where, field, vocab, f"an object of {NUM_BYTES} to {MOST_TOKENS} tokens")
    ordinary = {spelled: rank for spelled, rank in vocab.items() if spelled not in SPECIAL_TOKENS}
    by_rank: dict[int, bytes] = {}
    for spelled, rank in ordinary.items():
        if type(rank) is not int or not 0 <= rank < len(ordinary) or rank in by_rank:
            raise _refused(where, f"{field} id", rank, f"one of 0 to {len(ordinary) - 1}, each once")
        if not isinstance(spelled, str) or not _BYTES.keys() >= set(spelled):
            raise _refused(where, f"{field} token", spelled, "spelled with GPT-2's characters for bytes")
        by_rank[rank] = bytes(map(_BYTES.__getitem__, spelled))
    for number, name in enumerate(SPECIAL_TOKENS):
        if (rank := vocab.get(name, len(ordinary) + number)) != len(ordinary) + number:
            raise _refused(where, f"{field} id of {name}", rank, f"{len(ordinary) + number}, after all other tokens")
    tokens = [by_rank[rank] for rank in range(len(ordinary))]
    if tokens[:NUM_BYTES] != [bytes([byte]) for byte in range(NUM_BYTES)]:
        raise _refused(where, f"{field} ids 0 to 255", tokens, "the 256 bytes in order")
    if sum(len(token) ** 2 for token in tokens) > MOST_SQUARED_BYTES:
        raise _refused(where, field, vocab, f"shorter: squared lengths of tokens sum to at most {MOST_SQUARED_BYTES}")
    return tokens


def _check_merges(merges: object, tokens: list[bytes], where: str) -> None:
    """Raise DataError if merges are other than all pairs of each token in order, or a token joins no two before it."""
    field = "model.merges"
    if not isinstance(merges, list):
        raise _refused(where, field, merges, "a list")
    given = [_pair(merge) for merge in merges]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    place = 0
    for rank, token in enumerate(tokens[NUM_BYTES:], NUM_BYTES):
        if not _pairs(token, ranks, below=rank):
            raise _refused(where, "model.vocab token", _spelled(token), "a join of two tokens before it")
        pairs = _pairs(token, ranks)
        if sorted(given[place : place + len(pairs)]) != sorted(pairs):
            shown = merges[place] if place < len(merges) else None
            raise _refused(where, f"{field}[{place}]", shown, f"all {len(pairs)} pairs of token {rank}, in its place")
        place += len(pairs)
    if place != len(given):
        raise _refused(where, f"{field}[{place}]", merges[place], "the end: all tokens are made")


def _pair(merge: object) -> tuple[str, ...]:
    """Return a merge, a text or a list of two, as a tuple; of what is neither an empty one."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        return ()
    return tuple(parts)


def _at(content: object, field: str) -> Any:
    """Return what lies at the end of a dotted path through JSON; None if it is not there."""
    for key in field.split("."):
        if isinstance(content, list) and key.isdigit():
            content = content[int(key)] if int(key) < len(content) else None
        else:
            content = content.get(key) if isinstance(content, dict) else None
    return content


def _refused(where: str, field: str, value: object, rule: str) -> DataError:
    # An int can be too long to be written, a list too deep.
    is_plain = value is None or isinstance(value, str | float) or (isinstance(value, int) and value.bit_length() < 64)
    shown = excerpt(value) if is_plain else type(value).__name__
    return DataError(f"{where}: {field}={shown}: must be {rule}. Name the tokenizer.json of a nanochat model.")
