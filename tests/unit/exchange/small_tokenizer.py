"""A trained tokenizer as ours and as Hugging Face's, and texts of all scripts."""

import json
from functools import cache

import rustbpe
import tokenizers
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nanochat.data.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERNS, Tokenizer
from nanochat.exchange.hf_tokenizer import chat_template, tokenizer_config, tokenizer_json

TEXTS = [
    "The quick brown fox isn't lazy; they'LL see 1234 reasons \u2014 don't they?  \n\n\tdef f(x):\n    return x ** 2\r",
    "\u79c1\u306f\u6628\u65e5\u6771\u4eac\u99c5\u3067\u30e9\u30fc\u30e1\u30f3\u3092\u98df\u3079\u307e\u3057\u305f",
    "\u0e09\u0e31\u0e19\u0e23\u0e31\u0e01\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22",
    "\u0939\u093f\u0928\u094d\u0926\u0940 na\u00efve cafe\u0301 \u043f\u0440\u0438\u0432\u0435\u0442",
    "\U0001f469\u200d\U0001f680\ufe0f aaaaaaaaaaa <|bos|> <|end",
]
BLOCKS = (
    (0x0E00, 0x0E5F), (0x0E80, 0x0EDF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3000, 0x30FF), (0x4E00, 0x4E1F),
    (0xAC00, 0xAC1F), (0x0900, 0x097F), (0x0590, 0x06FF), (0x0300, 0x036F), (0x1F3F0, 0x1F64F), (0xFE00, 0xFE0F),
    (0xFF60, 0xFFA0), (0x2000, 0x206F),
)  # fmt: skip
scripts = st.one_of(st.characters(min_codepoint=first, max_codepoint=last) for first, last in BLOCKS)
spaces = st.sampled_from(" \n\r\t\x0b\x0c\x85\xa0\u1680\u180e\u2003\u2028\u200b\u3000\ufeff")
ascii_characters = st.sampled_from("'aAsStTdDmMlLvVeErR\u017f\u2019019.,;!?<|>_-")
anything = st.text(st.one_of(ascii_characters, spaces, scripts, st.characters(exclude_categories=["Cs"])), max_size=30)


def trained(texts: list[str], vocab_size: int, pattern: str) -> Tokenizer:
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(texts, vocab_size - len(SPECIAL_TOKENS), pattern=pattern)
    by_rank = sorted((rank, bytes(token)) for token, rank in trainer.get_mergeable_ranks())
    return Tokenizer([token for rank, token in by_rank if rank >= 256], pattern)


@cache
def ours(name: str = "nanochat") -> Tokenizer:
    return trained([text * 3 for text in TEXTS], 700, SPLIT_PATTERNS[name])


def loaded(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer)))


def ids_of(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def write_folder(folder, tokenizer: Tokenizer, config: dict, is_chat: bool = True) -> None:
    files = {"tokenizer": tokenizer_json(tokenizer), "tokenizer_config": tokenizer_config(tokenizer, 64, is_chat)}
    for name, content in (files | {"config": config}).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    if is_chat:
        (folder / "chat_template.jinja").write_text(chat_template())


def auto_tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
