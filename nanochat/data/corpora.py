"""A corpus's name to its source shards: which files a run reads, and which files or documents are held out.

Three kinds: `pydocs`, written from the running Python; recipes, whose shards are downloaded as far as the horizon needs
them; and any path, glob or URI of parquet or JSONL files. Validation text never depends on how much was fetched: it is
a shard pinned by name, always fetched, or a share of the documents by hash where there is one file.

Source: the recipes are karpathy/nanochat's (nanochat/dataset.py and its climbmix successor), shuffled beforehand.
"""

import contextlib
import difflib
import functools
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from nanochat import storage
from nanochat.config.corpus import CorpusConfig
from nanochat.data.documents import check_shard
from nanochat.data.download import RetryPolicy, download
from nanochat.data.pydocs import write_pydocs
from nanochat.errors import ConfigError, DataError, excerpt
from nanochat.run_context import RunContext

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET_MAGIC = b"PAR1"  # a complete parquet file ends in it


@dataclass(frozen=True)
class SourceShard:
    """One file of text."""

    path: str
    """Local path or URI of one parquet or JSONL file."""
    size_bytes: int
    """Size of the file as it lies there."""
    split: Literal["train", "validation", "by_hash"]
    """Whose documents it holds; by_hash: of both, divided by document hash and validation_fraction."""


@dataclass(frozen=True)
class Corpus:
    """The text of a run, on disk or behind URIs, checked to be readable."""

    name: str
    shards: tuple[SourceShard, ...]
    text_column: str
    validation_fraction: float

    def sources(self, split: Literal["train", "validation"]) -> tuple[SourceShard, ...]:
        """Return the shards that hold documents of a split, in order."""
        return tuple(shard for shard in self.shards if shard.split in (split, "by_hash"))


@dataclass(frozen=True)
class Recipe:
    """Where a public corpus lies, and about how much text each of its equally large shards has."""

    base_url: str
    num_shards: int
    validation_shard: str
    shard_text_bytes: int
    shard_bytes: int
    licence: str
    """What the publisher of the text states; the shards are shuffled copies of it."""
    file_pattern: str = "shard_{:05d}.parquet"

    def names(self) -> list[str]:
        """Return the file names of all shards, the validation shard's among them."""
        return [self.file_pattern.format(number) for number in range(self.num_shards)]


RECIPES = {
    "fineweb-edu": Recipe(
        base_url="https://huggingface.co/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main",
        num_shards=1823,
        validation_shard="shard_01822.parquet",
        shard_text_bytes=250_000_000,
        shard_bytes=100_000_000,
        licence="ODC-By-1.0, and Common Crawl's terms of use",  # huggingface.co HuggingFaceFW/fineweb-edu
    ),
    "climbmix": Recipe(
        base_url="https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle/resolve/main",
        num_shards=6543,
        validation_shard="shard_06542.parquet",
        shard_text_bytes=250_000_000,
        shard_bytes=92_000_000,
        licence="CC-BY-NC-4.0",  # huggingface.co nvidia/ClimbMix
    ),
}
PYDOCS_LICENCE = "PSF-2.0"  # of Python and its documentation


def licence_of(corpus: str) -> str | None:
    """Return the licence that a named corpus's publisher states; None of files of one's own."""
    return RECIPES[corpus].licence if corpus in RECIPES else PYDOCS_LICENCE if corpus == "pydocs" else None


def prepare_corpus(config: CorpusConfig, run: RunContext, folder: str, needed_text_bytes: int | None) -> Corpus:
    """Make a corpus's files ready to read and say which hold what.

    What is written or downloaded goes into `folder`; what is there already stays. Of a recipe as many training shards
    are fetched as `needed_text_bytes` (UTF-8 bytes of training text that the horizon goes through) and
    `config.max_bytes` allow, the smaller of the two. Every file is opened once, so that an unusable one is found here.

    Raises: ConfigError if the corpus or its validation shard does not exist; DataError if a file cannot be fetched or
    read, or has no text column.
    """
    if storage.is_local(folder):
        folder = os.path.abspath(storage.filesystem(folder)[1])  # a worker elsewhere has another working directory
    if config.corpus == "pydocs":
        shards = _pydocs_shards(config, folder)
    elif config.corpus in RECIPES:
        shards = _recipe_shards(config, run, folder, needed_text_bytes)
    else:
        shards = _path_shards(config, run)
    if not any(shard.split != "validation" for shard in shards):
        raise ConfigError(
            f"validation_shard={storage.name_of(shards[0].path)}: it is the only file of corpus={config.corpus}, which "
            "leaves nothing to train on. Leave validation_shard out to hold out a share of its documents."
        )
    text_column = "text" if config.corpus == "pydocs" else config.text_column
    return Corpus(config.corpus, shards, text_column, config.validation_fraction)


def _pydocs_shards(config: CorpusConfig, folder: str) -> tuple[SourceShard, ...]:
    if config.validation_shard is not None:
        raise ConfigError(
            f"validation_shard={config.validation_shard}: pydocs holds out documents, not files. "
            "Set validation_fraction instead."
        )
    paths = write_pydocs(storage.join(folder, "pydocs"))
    return tuple(SourceShard(path, storage.size_bytes(path), "by_hash") for path in paths)


def _recipe_shards(
    config: CorpusConfig, run: RunContext, folder: str, needed_text_bytes: int | None
) -> tuple[SourceShard, ...]:
    recipe = RECIPES[config.corpus]
    held_out = config.validation_shard or recipe.validation_shard
    names = recipe.names()
    if held_out not in names:
        raise ConfigError(
            f"validation_shard={held_out}: no file of {config.corpus} is called so. They are {names[0]} to {names[-1]}."
        )
    training = [name for name in names if name != held_out][: _num_training_shards(config, recipe, needed_text_bytes)]
    fetch = functools.partial(
        fetch_shard,
        base_url=(config.mirror or recipe.base_url).rstrip("/"),
        folder=storage.join(folder, config.corpus),
        text_column=config.text_column,
    )
    wanted = [held_out, *training]
    run.progress(f"{config.corpus}: {len(training)} training shards and the validation shard {held_out}")
    shards = []
    for number, (name, (path, size)) in enumerate(zip(wanted, run.map(fetch, wanted), strict=True), start=1):
        shards.append(SourceShard(path, size, "validation" if name == held_out else "train"))
        run.progress(f"{config.corpus}: {number} of {len(wanted)} shards are here")
    return (*shards[1:], shards[0])


def _num_training_shards(config: CorpusConfig, recipe: Recipe, needed_text_bytes: int | None) -> int:
    limits = []
    if needed_text_bytes is not None:
        limits.append(math.ceil(needed_text_bytes / recipe.shard_text_bytes))
    if config.max_bytes is not None:
        limits.append(config.max_bytes // recipe.shard_bytes)
    if not limits:
        raise ConfigError(
            f"max_bytes=None: {config.corpus} is {recipe.num_shards * recipe.shard_bytes / 1e9:.0f} GB. "
            "Say how much of it to fetch, for example 1000000000."
        )
    return max(1, min(limits))


def fetch_shard(
    name: str, *, base_url: str, folder: str, text_column: str, retry: RetryPolicy | None = None
) -> tuple[str, int]:
    """Fetch one parquet shard into a folder, unless it is there, and open it once; return its path and size.

    For a folder behind a URI the file passes through this machine's temporary folder and appears only when complete.
    Raises: DataError if it cannot be fetched or read.
    """
    path = storage.join(folder, name)
    if storage.is_local(path):
        download(f"{base_url}/{name}", path, ends_with=PARQUET_MAGIC, retry=retry)
        check_shard(path, text_column)
    elif not storage.exists(path):
        with tempfile.TemporaryDirectory() as temporary:
            local = os.path.join(temporary, name)
            download(f"{base_url}/{name}", local, ends_with=PARQUET_MAGIC, retry=retry)
            check_shard(local, text_column)
            with open(local, "rb") as source, storage.atomic_write(path) as target:
                shutil.copyfileobj(source, target)
    return path, storage.size_bytes(path)


def _path_shards(config: CorpusConfig, run: RunContext) -> tuple[SourceShard, ...]:
    sizes = _usable_files(config.corpus)
    paths = sorted(path for path in sizes if sizes[path]) or sorted(sizes)  # an empty file among others is left out
    if len(paths) < len(sizes):
        run.progress(f"{config.corpus}: {len(sizes) - len(paths)} empty files are left out")
    for _ in run.map(functools.partial(check_shard, text_column=config.text_column), paths):
        pass
    if len(paths) == 1 and config.validation_shard is None:
        return (SourceShard(paths[0], sizes[paths[0]], "by_hash"),)
    held_out = [path for path in paths if storage.name_of(path) == config.validation_shard]
    if config.validation_shard is None:
        held_out = paths[-1:]
    if len(held_out) != 1:
        found = "no file is" if not held_out else f"{len(held_out)} files are"
        some = excerpt(", ".join(storage.name_of(path) for path in paths[:4]))
        raise ConfigError(
            f"validation_shard={config.validation_shard}: {found} called so in corpus={config.corpus}. "
            f"There are {len(paths)} files: {some}{', ...' if len(paths) > 4 else ''}"
        )
    training = [SourceShard(path, sizes[path], "train") for path in paths if path != held_out[0]]
    training = list(_within(training, config.max_bytes))
    run.progress(f"{config.corpus}: {len(training)} training shards, {excerpt(storage.name_of(held_out[0]))} held out")
    return (*training, SourceShard(held_out[0], sizes[held_out[0]], "validation"))


def _within(shards: list[SourceShard], max_bytes: int | None) -> Iterator[SourceShard]:
    """Yield the first shards that together keep to a number of bytes, at least one."""
    total = 0
    for number, shard in enumerate(shards):
        total += shard.size_bytes
        if number and max_bytes is not None and total > max_bytes:
            return
        yield shard


def _usable_files(corpus: str) -> dict[str, int]:
    """Return path and size of each text file that a path, folder, glob or URI means."""
    fs, inner = storage.filesystem(corpus)
    found: list[dict[str, Any]]
    with _listing_errors(corpus):
        if fs.isfile(inner):
            found = [fs.info(inner)]
        elif fs.isdir(inner):
            found = fs.ls(inner, detail=True)
        else:
            found = list(fs.glob(inner, detail=True).values())
    files = [info for info in found if info["type"] != "directory"]
    if not files:
        names = ["pydocs", *RECIPES]
        meant = "".join(f" Did you mean {name}?" for name in difflib.get_close_matches(corpus, names, 1))
        raise ConfigError(
            f"corpus={corpus}: must be a file, folder or glob that has files, or one of {', '.join(names)}.{meant}"
        )
    usable = [info for info in files if _is_usable(storage.name_of(info["name"]))]
    if not usable:
        raise DataError(
            f"corpus={corpus}: none of its {len(files)} files ends in {', '.join(SUFFIXES)}. "
            "Name a folder or a glob (for example data/**/*.parquet) of such files."
        )
    local = storage.is_local(corpus)
    return {info["name"] if local else fs.unstrip_protocol(info["name"]): int(info["size"]) for info in usable}


def _is_usable(name: str) -> bool:
    return name.endswith(SUFFIXES) and not name.startswith((".", "_"))


@contextlib.contextmanager
def _listing_errors(corpus: str) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        raise DataError(
            f"corpus={corpus}: cannot be listed ({excerpt(err)}). Check the address and your access to it."
        ) from err
