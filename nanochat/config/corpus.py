"""Which text a run reads, and which of it is held out."""

from dataclasses import dataclass

from nanochat.config.identity import Identity
from nanochat.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """A named corpus, or a path, glob or URI of parquet or JSONL files."""

    corpus: Identity[str] = "pydocs"
    """pydocs (inside every Python), fineweb-edu, climbmix, or a path, glob or URI of .parquet / .jsonl files."""
    text_column: Identity[str] = "text"
    """Column or JSON key that holds the document (pydocs has its own)."""
    max_bytes: int | None = None
    """Keep to about this many bytes of training shards (whole files, at least one); none = what the horizon needs."""
    validation_fraction: Identity[float] = 0.1
    """Share of documents held out, by hash, where a corpus has no validation shard of its own."""
    validation_shard: Identity[str | None] = None
    """File name of the held-out shard; none = a corpus's own, or the last by name of several files."""
    mirror: str | None = None
    """Base URL to download named corpora from; none = their public home."""

    def __post_init__(self) -> None:
        if not 0.0 < self.validation_fraction < 1.0:
            raise ConfigError(
                f"validation_fraction={self.validation_fraction}: must lie between 0 and 1. 0.1 holds out a tenth."
            )
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ConfigError(f"max_bytes={self.max_bytes}: must be positive. Leave it out to read what is needed.")
