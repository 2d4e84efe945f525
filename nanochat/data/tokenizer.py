"""Text to token ids and back: byte-pair encoding over bytes, as GPT-4 does it.

Text is cut into pre-tokens by a regular expression, and inside each the pair of neighbours that was merged first in
training is merged first. rustbpe finds the merges, tiktoken applies them; this module is the file format, the special
tokens and the care around both. Ids: 256 bytes, then the merges in rank order, then nine special tokens, which text can
never become: only `special` gives them.

Source: Sennrich et al. 2016 (arXiv 1508.07909), section 3; byte level: Radford et al. 2019 (GPT-2), section 2.2; the
split pattern and the special tokens: karpathy/nanochat, nanochat/tokenizer.py.
Not covered: Unicode normalisation (decoding gives back the bytes that came in).
"""

import base64
import binascii
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import rustbpe
import tiktoken

from nanochat import storage
from nanochat.config.tokenizer import NUM_SPECIAL_TOKENS, TokenizerConfig
from nanochat.data.corpora import Corpus
from nanochat.data.documents import ReadCounts, read_documents
from nanochat.errors import DataError, excerpt
from nanochat.run_context import RunContext

SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
assert len(SPECIAL_TOKENS) == NUM_SPECIAL_TOKENS

# Scripts that put no spaces between words are cut after at most eight characters. Kana that follow Han are a Japanese
# word's ending; a Thai, Lao, Khmer or Myanmar consonant keeps the vowels before and after it and what is stacked on it.
_KANA = r"\p{Hiragana}" + "\u30fc"
_UNSPACED = rf"\p{{Han}}{_KANA}\p{{Katakana}}\p{{Thai}}\p{{Lao}}\p{{Khmer}}\p{{Myanmar}}"
_SPACED_LETTER = rf"[\p{{L}}&&[^{_UNSPACED}]]"
_SYLLABLE = (
    "[\u0e40-\u0e44\u0ec0-\u0ec4]?" + r"[\p{L}&&[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]]"
    "(?:[\u17d2\u1039]" + r"\p{L}|\p{M}|" + "[\u0e30\u0e32\u0e33\u0e45\u0eb0\u0eb2\u0eb3])*"
)
_PUNCTUATION_AND_SPACE = r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"

SPLIT_PATTERNS = {
    "nanochat": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
    "unspaced": (
        rf"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{{L}}\p{{M}}\p{{N}}]?+{_SPACED_LETTER}[{_SPACED_LETTER}\p{{M}}]*"
        rf"|(?:\p{{Han}}\p{{M}}*){{1,8}}(?:[{_KANA}]\p{{M}}*){{0,8}}|(?:[{_KANA}]\p{{M}}*){{1,8}}"
        "|(?:[\\p{Katakana}\u30fc]\\p{M}*){1,16}|[ \u200b]?" + rf"(?:{_SYLLABLE}){{1,8}}"
        rf"|\p{{N}}{{1,2}}|{_PUNCTUATION_AND_SPACE}"
    ),
}
"""Regular expressions in the syntax of Rust's fancy-regex. `nanochat` is GPT-4's with numbers cut into two digits."""

FORMAT = "nanochat-bpe"
FORMAT_VERSION = 1
NUM_BYTES = 256
LARGEST_FILE_BYTES = 1 << 26
"""Of tokenizer.json: a million tokens take about 20 MB."""
LONGEST_SPACE_RUN = 100_000
"""Longer runs of whitespace are cut: the regex engine gives up at a million (tiktoken raises, rustbpe aborts)."""

REFERENCE_ENCODINGS = ("gpt2", "cl100k_base")
REFERENCE_TIMEOUT_S = 5.0
"""For all references together: a comparison is not worth a long wait."""


class Tokenizer:
    """A trained vocabulary. Equal `hash` means equal ids for every text."""

    def __init__(self, merges: Sequence[bytes], pattern: str) -> None:
        """Build from the merged byte strings in rank order. Raises: ValueError if the pattern is no regex."""
        self.merges = tuple(merges)
        """The byte strings that were merged, in rank order."""
        self.pattern = pattern
        """The regular expression that cuts text into pre-tokens."""
        ranks = {bytes([byte]): byte for byte in range(NUM_BYTES)}
        ranks |= {merge: NUM_BYTES + rank for rank, merge in enumerate(self.merges)}
        self._specials = {name: len(ranks) + number for number, name in enumerate(SPECIAL_TOKENS)}
        self._encoding = tiktoken.Encoding(
            FORMAT, pat_str=pattern, mergeable_ranks=ranks, special_tokens=self._specials
        )
        self.vocab_size = len(ranks) + len(SPECIAL_TOKENS)
        """Ids are 0 .. vocab_size - 1. Smaller than the config's where the training text had too few pairs."""
        self.bos = self.special("<|bos|>")
        """The id that begins every document."""
        self.dtype: type[np.uint16 | np.uint32] = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        """Smallest type that holds every id."""
        self.hash = storage.sha256_json(self._content())
        """SHA-256 of everything that decides the ids, hex."""

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[tuple[bytes, ...], str]]:
        return Tokenizer, (self.merges, self.pattern)

    def special(self, name: str) -> int:
        """Return a special token's id. Raises: KeyError if there is none of that name."""
        return self._specials[name]

    def encode_ordinary(self, text: str) -> list[int]:
        """Return the ids of a text; what looks like a special token in it is text. Lone surrogates become U+FFFD."""
        return [token for part in _encodable(text) for token in self._encoding.encode_ordinary(part)]

    def encode_batch_numpy(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        """Return the ids of each text, as `encode_ordinary` gives them, in arrays of `dtype`."""
        return [self._encode_numpy(text).astype(self.dtype) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; bytes that are no UTF-8 (half a character) become U+FFFD."""
        return self._encoding.decode(ids)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of ids; special tokens give their names. Raises: KeyError for an id out of range."""
        return self._encoding.decode_bytes(ids)

    def token_bytes(self) -> npt.NDArray[np.int32]:
        """Return the bytes that each id stands for, (vocab_size,): what bits per byte divides by; special tokens 0."""
        lengths = [1] * NUM_BYTES + [len(merge) for merge in self.merges] + [0] * len(SPECIAL_TOKENS)
        return np.array(lengths, dtype=np.int32)

    def save(self, folder: str) -> None:
        """Write tokenizer.json into a folder, atomically."""
        storage.write_json(_file_in(folder), self._content() | {"hash": self.hash})

    @classmethod
    def load(cls, folder: str) -> "Tokenizer":
        """Read tokenizer.json of a folder. Raises: DataError if it is missing, damaged or of another format."""
        path = _file_in(folder)
        remedy = "Delete it and run ray_jobs/prepare_data.py again."
        if not storage.exists(path):
            raise DataError(
                f"tokenizer={path}: there is no such file. Run ray_jobs/prepare_data.py with this --run-dir."
            )
        if (size := storage.size_bytes(path)) > LARGEST_FILE_BYTES:
            raise DataError(f"tokenizer={path}: {size} bytes are too many, at most {LARGEST_FILE_BYTES}. {remedy}")
        try:
            content = storage.read_json(path)
        except (ValueError, RecursionError) as err:
            raise DataError(f"tokenizer={path}: is no JSON ({excerpt(err)}). {remedy}") from err
        kind = (content.get("format"), content.get("version")) if isinstance(content, dict) else None
        if kind != (FORMAT, FORMAT_VERSION):
            raise DataError(f"tokenizer={path}: must have format {FORMAT} {FORMAT_VERSION}. {remedy}")
        stored_hash = content.pop("hash", None)
        if stored_hash != storage.sha256_json(content):
            raise DataError(f"tokenizer={path}: its content does not have the hash that it names. {remedy}")
        try:
            return cls(_checked_merges(content), content["pattern"])
        except (KeyError, TypeError, ValueError) as err:
            raise DataError(f"tokenizer={path}: cannot be used ({excerpt(err)}). {remedy}") from err

    def _content(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "pattern": self.pattern,
            "special_tokens": list(SPECIAL_TOKENS),
            "merges": [base64.b64encode(merge).decode() for merge in self.merges],
        }

    def _encode_numpy(self, text: str) -> npt.NDArray[np.uint32]:
        parts = [self._encoding.encode_to_numpy(part, disallowed_special=()) for part in _encodable(text)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def train_tokenizer(config: TokenizerConfig, run: RunContext, corpus: Corpus) -> Tokenizer:
    """Learn the merges of a corpus's training documents, as far as max_chars goes.

    The same text gives the same tokenizer, whatever the number of threads. A corpus with too few distinct pairs gives a
    smaller vocabulary, which is reported. Raises: DataError if there is no training document.
    """
    counts = ReadCounts()
    trainer: Any = rustbpe.Tokenizer()  # pyrefly: ignore[missing-attribute]
    pattern = SPLIT_PATTERNS[config.split_pattern]
    texts = _training_texts(config, corpus, counts)
    trainer.train_from_iterator(texts, config.vocab_size - NUM_SPECIAL_TOKENS, pattern=pattern)
    if not counts.documents:
        raise DataError(f"corpus={corpus.name}: has no training document to learn a tokenizer from. Give it more text.")
    by_rank = sorted((rank, bytes(token)) for token, rank in trainer.get_mergeable_ranks())
    # Two pairs can give the same bytes; the later one is never reached and would leave a hole in the ids.
    merges = list(dict.fromkeys(token for rank, token in by_rank if rank >= NUM_BYTES))
    tokenizer = Tokenizer(merges, pattern)
    reached = "" if tokenizer.vocab_size == config.vocab_size else f" of {config.vocab_size} (no more pairs to merge)"
    run.progress(f"tokenizer: {tokenizer.vocab_size} tokens{reached}, learned from {counts.documents} documents")
    return tokenizer


def compression_report(tokenizer: Tokenizer, corpus: Corpus, max_bytes: int = 10_000_000) -> dict[str, Any]:
    """Return bytes per token on held-out text, beside those of GPT-2's and GPT-4's tokenizers.

    Reads at most about max_bytes. A reference whose files cannot be had says why under "skipped"; to get them
    takes at most REFERENCE_TIMEOUT_S. Raises: DataError if there is no held-out document.
    """
    texts = _held_out_texts(corpus, max_bytes)
    if not texts:
        raise DataError(f"corpus={corpus.name}: has no held-out document to compare on. Raise validation_fraction.")
    size = sum(len(text.encode()) for text in texts)
    encodings: dict[str, dict[str, Any]] = {}
    tokens = sum(map(len, tokenizer.encode_batch_numpy(texts)))
    encodings["ours"] = {"vocab_size": tokenizer.vocab_size, "tokens": tokens, "bytes_per_token": size / tokens}
    for name, reference in _reference_encodings().items():
        if isinstance(reference, str):
            encodings[name] = {"skipped": reference}
            continue
        parts = (part for text in texts for part in _encodable(text))
        tokens = sum(len(reference.encode_to_numpy(part, disallowed_special=())) for part in parts)
        encodings[name] = {"vocab_size": reference.n_vocab, "tokens": tokens, "bytes_per_token": size / tokens}
    return {"documents": len(texts), "text_bytes": size, "tokenizer_hash": tokenizer.hash, "encodings": encodings}


def _file_in(folder: str) -> str:
    return storage.join(folder, "tokenizer.json")


def _checked_merges(content: dict[str, Any]) -> list[bytes]:
    if content["special_tokens"] != list(SPECIAL_TOKENS):
        raise ValueError(f"its special tokens are {content['special_tokens']}")
    if content["pattern"] not in SPLIT_PATTERNS.values():
        # A stranger's could lose text, or end the process: the regex engine panics at some.
        raise ValueError(f"its split pattern is none of {', '.join(SPLIT_PATTERNS)}")
    try:
        merges = [base64.b64decode(merge, validate=True) for merge in content["merges"]]
    except binascii.Error as err:
        raise ValueError(f"merges: {err}") from err
    known, sizes = {bytes([byte]) for byte in range(NUM_BYTES)}, {1}
    for rank, merge in enumerate(merges):
        cuts = (cut for cut in range(1, len(merge)) if cut in sizes and len(merge) - cut in sizes)
        if merge in known or not any(merge[:cut] in known and merge[cut:] in known for cut in cuts):
            raise ValueError(f"merge {rank}, {merge[:40]!r}, must be new and join two tokens before it")
        known.add(merge)
        sizes.add(len(merge))
    return merges


def _encodable(text: str) -> list[str]:
    """Return a text in parts that the encoder takes: one, but for huge runs of whitespace; without lone surrogates."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if len(text) <= LONGEST_SPACE_RUN:
        return [text]
    # A run that is too long covers a whole block of half its length, and isspace stops at the first other character.
    half = LONGEST_SPACE_RUN // 2
    if not any(text[start : start + half].isspace() for start in range(0, len(text), half)):
        return [text]
    parts, begin = [], 0
    for run in re.finditer(rf"(?<!\s)\s{{{LONGEST_SPACE_RUN},}}", text):
        for cut in range(run.start() + LONGEST_SPACE_RUN, run.end(), LONGEST_SPACE_RUN):
            parts.append(text[begin:cut])
            begin = cut
    return [*parts, text[begin:]]


def _training_texts(config: TokenizerConfig, corpus: Corpus, counts: ReadCounts) -> Iterator[str]:
    left = config.max_chars
    for shard in corpus.sources("train"):
        for batch in read_documents(shard, corpus, "train", counts):
            for document in batch:
                text = document[: min(config.max_document_chars, left)]
                yield from _encodable(text)
                left -= len(text)
                if left == 0:
                    return


def _held_out_texts(corpus: Corpus, max_bytes: int) -> list[str]:
    counts = ReadCounts()
    texts: list[str] = []
    for shard in corpus.sources("validation"):
        for batch in read_documents(shard, corpus, "validation", counts):
            texts += batch
            if counts.text_bytes >= max_bytes:
                return texts
    return texts


def _reference_encodings() -> dict[str, tiktoken.Encoding | str]:
    """Load tiktoken's own encodings (fetched at first use); one that cannot be had is the reason why."""
    found: dict[str, tiktoken.Encoding | str] = {}

    def load() -> None:
        for name in REFERENCE_ENCODINGS:  # one after the other: tiktoken holds a lock while it loads
            try:
                found[name] = tiktoken.get_encoding(name)
            except (OSError, ValueError) as err:  # requests' exceptions are OSErrors; ValueError: another hash
                found[name] = f"tiktoken cannot load it: {excerpt(err)[:60]}"

    # tiktoken downloads without a timeout, so a thread that may be left behind.
    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(REFERENCE_TIMEOUT_S)
    return {name: found.get(name, f"no answer within {REFERENCE_TIMEOUT_S:g} s") for name in REFERENCE_ENCODINGS}
