"""How the tokenizer is trained."""

from dataclasses import dataclass
from typing import Literal

from nanochat.config.identity import Identity
from nanochat.errors import ConfigError

NUM_SPECIAL_TOKENS = 9


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Byte-pair encoding over bytes, in the style of GPT-4."""

    vocab_size: Identity[int] = 32_768
    """Tokens in all: 256 bytes, merges, and nine special tokens."""
    split_pattern: Identity[Literal["nanochat", "unspaced"]] = "nanochat"
    """How text is cut before merging: nanochat's pattern, or one for scripts without spaces (Chinese, Thai, ...)."""
    max_chars: Identity[int] = 2_000_000_000
    """Train on at most this many characters of the training text."""
    max_document_chars: Identity[int] = 10_000
    """Use at most this many characters of each document, so that no long one dominates."""

    def __post_init__(self) -> None:
        if not 256 + NUM_SPECIAL_TOKENS <= self.vocab_size <= 1 << 20:
            raise ConfigError(
                f"vocab_size={self.vocab_size}: must lie between {256 + NUM_SPECIAL_TOKENS} and {1 << 20}. "
                "8192 suits a small corpus, 32768 a large one."
            )
        for name in ("max_chars", "max_document_chars"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be positive.")
