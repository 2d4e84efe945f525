"""How documents become rows of tokens."""

from dataclasses import dataclass

from nanochat.config.identity import Identity
from nanochat.errors import ConfigError

ROW_GROUP_ROWS = 256
"""Rows of one parquet row group: the unit that is read at once and shuffled."""


@dataclass(frozen=True, kw_only=True)
class ShardsConfig:
    """Offline tokenisation and best-fit packing into rows of sequence_len + 1 tokens."""

    sequence_len: Identity[int] = 2048
    """Tokens that a row trains on; a stored row has one more, its last target."""
    buffer_documents: Identity[int] = 1000
    """Pieces waiting to be packed, among which the best fit is sought."""

    def __post_init__(self) -> None:
        if self.sequence_len < 8:
            raise ConfigError(f"sequence_len={self.sequence_len}: must be at least 8. 512 suits a laptop.")
        if self.buffer_documents < 1:
            raise ConfigError(f"buffer_documents={self.buffer_documents}: must be at least 1.")
