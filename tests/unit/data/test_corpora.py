import dataclasses
import functools
import io
import json
import os
import pickle
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_server import Fault, HostileServer

from nanochat.config.corpus import CorpusConfig
from nanochat.data import corpora, download
from nanochat.data.corpora import RECIPES, prepare_corpus
from nanochat.data.documents import ReadCounts, read_documents
from nanochat.errors import ConfigError, DataError
from nanochat.run_context import RunContext

RUN = RunContext()


def parquet(*texts: str, column: str = "text") -> bytes:
    content = io.BytesIO()
    pq.write_table(pa.table({column: list(texts)}), content)
    return content.getvalue()


def put(folder: Path, *names: str) -> Path:
    """Write files of one document each, the file's own name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            (folder / name).write_bytes(parquet(name))
        else:
            (folder / name).write_text(json.dumps({"text": name}) + "\n")
    return folder


def prepare(corpus, tmp_path, needed=None, run=RUN, **options):
    return prepare_corpus(CorpusConfig(corpus=str(corpus), **options), run, str(tmp_path / "run"), needed)


def names(corpus, split):
    return [Path(shard.path).name for shard in corpus.sources(split)]


def texts(corpus, split):
    counts = ReadCounts()
    return [
        t for shard in corpus.sources(split) for batch in read_documents(shard, corpus, split, counts) for t in batch
    ]


# ---- paths, folders, globs, URIs


def test_a_folder_means_its_text_files_and_holds_out_the_last(tmp_path):
    put(
        tmp_path / "in",
        "b.parquet",
        "a.jsonl",
        "c.parquet",
        "notes.txt",
        "_hidden.parquet",
        ".tmp.parquet",
        "d/z.jsonl",
    )
    corpus = prepare(tmp_path / "in", tmp_path)
    assert names(corpus, "train") == ["a.jsonl", "b.parquet"]
    assert names(corpus, "validation") == ["c.parquet"]
    assert texts(corpus, "train") == ["a.jsonl", "b.parquet"]
    assert [shard.size_bytes for shard in corpus.shards] == [os.path.getsize(shard.path) for shard in corpus.shards]


def test_globs_reach_into_folders(tmp_path):
    put(tmp_path / "in", "a/1.parquet", "b/2.parquet", "b/c/0.parquet", "b/x.jsonl")
    corpus = prepare(tmp_path / "in" / "**" / "*.parquet", tmp_path)
    assert names(corpus, "train") == ["1.parquet", "2.parquet"]
    assert names(corpus, "validation") == ["0.parquet"]  # the last by path


def test_the_validation_shard_is_pinned_by_name(tmp_path):
    put(tmp_path / "in", "a.parquet", "b.parquet", "c.parquet")
    corpus = prepare(tmp_path / "in", tmp_path, validation_shard="a.parquet")
    assert names(corpus, "train") == ["b.parquet", "c.parquet"]
    assert names(corpus, "validation") == ["a.parquet"]
    with pytest.raises(ConfigError, match=r"validation_shard=q\.parquet: no file is called so.*a\.parquet, b\.parquet"):
        prepare(tmp_path / "in", tmp_path, validation_shard="q.parquet")


def test_names_of_files_cannot_steer_the_terminal(tmp_path):
    put(tmp_path / "in", *(f"\x1b[2J{'x' * 200}{number}.parquet" for number in range(4)))
    with pytest.raises(ConfigError, match=r"There are 4 files: \\x1b\[2Jxxx") as caught:
        prepare(tmp_path / "in", tmp_path, validation_shard="q.parquet")
    assert str(caught.value).isprintable()
    lines = []
    prepare_corpus(CorpusConfig(corpus=str(tmp_path / "in")), RunContext(progress=lines.append), "", None)
    assert lines[-1].isprintable()


def test_one_file_is_divided_by_hash(tmp_path):
    documents = [f"document {number}" for number in range(200)]
    (tmp_path / "one.parquet").write_bytes(parquet(*documents))
    corpus = prepare(tmp_path / "one.parquet", tmp_path, validation_fraction=0.2)
    assert [shard.split for shard in corpus.shards] == ["by_hash"]
    assert sorted(texts(corpus, "train") + texts(corpus, "validation")) == sorted(documents)
    assert 20 < len(texts(corpus, "validation")) < 60
    with pytest.raises(ConfigError, match="nothing to train on"):
        prepare(tmp_path / "one.parquet", tmp_path, validation_shard="one.parquet")


def test_relative_paths_become_absolute_and_links_count(tmp_path, monkeypatch):
    put(tmp_path / "blobs", "1", "2")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").symlink_to(tmp_path / "blobs" / "1")
    (tmp_path / "in" / "b.jsonl").symlink_to(tmp_path / "blobs" / "2")
    monkeypatch.chdir(tmp_path)
    corpus = prepare("in", tmp_path)
    assert [shard.path for shard in corpus.shards] == [str(tmp_path / "in" / name) for name in ("a.jsonl", "b.jsonl")]
    assert corpus.shards[0].size_bytes == len('{"text": "1"}\n')


@pytest.mark.parametrize("corpus", ["memory://bucket", "memory://bucket/*.parquet"])
def test_uris(tmp_path, corpus):
    memory = fsspec.filesystem("memory")
    for name in ("x.parquet", "y.parquet"):
        memory.pipe_file(f"/bucket/{name}", parquet(name))
    prepared = prepare(corpus, tmp_path)
    assert [shard.path for shard in prepared.shards] == ["memory:///bucket/x.parquet", "memory:///bucket/y.parquet"]
    assert texts(prepared, "validation") == ["y.parquet"]


def test_every_file_is_looked_at_through_the_run_s_map(tmp_path):
    put(tmp_path / "in", "a.parquet", "b.jsonl")
    mapped = []
    prepare(tmp_path / "in", tmp_path, run=RunContext(map=lambda fn, items: map(fn, mapped.extend(items) or items)))
    assert [Path(path).name for path in mapped] == ["a.parquet", "b.jsonl"]


def test_max_bytes_keeps_whole_files_and_at_least_one(tmp_path):
    put(tmp_path / "in", *(f"{letter}.parquet" for letter in "abcdef"))
    size = os.path.getsize(tmp_path / "in" / "a.parquet")
    for max_bytes, count in ((1, 1), (2 * size, 2), (3 * size - 1, 2), (99 * size, 5)):
        corpus = prepare(tmp_path / "in", tmp_path, max_bytes=max_bytes)
        assert names(corpus, "train") == [f"{letter}.parquet" for letter in "abcde"[:count]]
        assert names(corpus, "validation") == ["f.parquet"]


@pytest.mark.parametrize("corpus", ["fineweb", "/nowhere/at/all", "memory://no/such", "/nowhere/*.parquet"])
def test_what_does_not_exist_is_named_with_the_choices(tmp_path, corpus):
    with pytest.raises(ConfigError, match=r"corpus=.*pydocs, fineweb-edu, climbmix"):
        prepare(corpus, tmp_path)


def test_a_folder_without_text_files_says_which_would_do(tmp_path):
    put(tmp_path / "in", "a.txt", "b.csv")
    with pytest.raises(DataError, match=r"none of its 2 files ends in \.parquet, \.jsonl"):
        prepare(tmp_path / "in", tmp_path)


@pytest.mark.parametrize(("uri", "package"), [("hf://datasets/a/b", "huggingface_hub"), ("s3://a/b", "s3fs")])
def test_a_scheme_without_its_package_names_it(tmp_path, uri, package):
    try:
        __import__(package)
        pytest.skip(f"{package} is installed")
    except ImportError:
        pass
    with pytest.raises(ConfigError, match=package):
        prepare(uri, tmp_path)


def test_unusable_files_are_found_while_preparing(tmp_path):
    put(tmp_path / "in", "a.parquet", "b.parquet")
    with pytest.raises(DataError, match=r"text_column=body: .*a\.parquet"):
        prepare(tmp_path / "in", tmp_path, text_column="body")
    (tmp_path / "in" / "b.parquet").write_bytes(b"PAR1 garbage PAR1")
    with pytest.raises(DataError, match=r"b\.parquet: cannot be read as parquet"):
        prepare(tmp_path / "in", tmp_path)


def test_pydocs_is_written_and_divided_by_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "write_pydocs", functools.partial(write_two, tmp_path))
    corpus = prepare("pydocs", tmp_path, text_column="body")
    assert [shard.split for shard in corpus.shards] == ["by_hash", "by_hash"]
    assert corpus.text_column == "text"
    with pytest.raises(ConfigError, match="validation_fraction"):
        prepare("pydocs", tmp_path, validation_shard="pydocs_00000.parquet")


def write_two(tmp_path, folder):
    assert folder == str(tmp_path / "run" / "pydocs")
    put(Path(folder), "0.parquet", "1.parquet")
    return [f"{folder}/0.parquet", f"{folder}/1.parquet"]


def test_real_web_text_holds_out_its_last_shard(tmp_path):
    data = os.environ.get("NANOCHAT_TEST_DATA")
    if not data:
        pytest.skip("NANOCHAT_TEST_DATA is not set")
    corpus = prepare(Path(data, "text", "web_text"), tmp_path)
    assert names(corpus, "validation") == ["shard_00003.parquet"]
    assert len(texts(corpus, "train")) == 342
    assert len(texts(corpus, "validation")) == 114


# ---- recipes


@pytest.fixture
def mirror(monkeypatch):
    """A server with a small corpus named climbmix: eight shards, of which the last is held out."""
    recipe = dataclasses.replace(
        RECIPES["climbmix"],
        num_shards=8,
        validation_shard="shard_00007.parquet",
        shard_text_bytes=1000,
        shard_bytes=500,
    )
    monkeypatch.setitem(RECIPES, "climbmix", recipe)
    quick = dataclasses.replace(download.RetryPolicy(), first_wait_s=0.001)
    monkeypatch.setattr(download, "RetryPolicy", lambda: quick)
    with HostileServer({name: parquet(name, "x" * 5000) for name in recipe.names()}) as server:
        yield server


@pytest.mark.parametrize(
    ("needed", "max_bytes", "count"),
    [
        (1, None, 1),
        (1000, None, 1),
        (1001, None, 2),
        (3500, None, 4),
        (10**9, None, 7),
        (None, 1600, 3),
        (None, 1, 1),
        (3500, 1600, 3),
        (1500, 10**9, 2),
    ],
)
def test_as_many_shards_as_the_horizon_needs_and_always_the_validation_shard(
    mirror, tmp_path, needed, max_bytes, count
):
    corpus = prepare("climbmix", tmp_path, needed, mirror=mirror.url + "/", max_bytes=max_bytes)
    assert names(corpus, "train") == [f"shard_{number:05d}.parquet" for number in range(count)]
    assert names(corpus, "validation") == ["shard_00007.parquet"]
    assert len(mirror.requests) == count + 1
    assert texts(corpus, "validation") == ["shard_00007.parquet", "x" * 5000]


def test_workers_elsewhere_write_where_the_driver_said(mirror, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def from_elsewhere(fn, items):
        monkeypatch.chdir(tmp_path / "elsewhere")
        return map(fn, items)

    config = CorpusConfig(corpus="climbmix", mirror=mirror.url)
    corpus = prepare_corpus(config, RunContext(map=from_elsewhere), "run/text", 1)
    assert corpus.shards[0].path == str(tmp_path / "run/text/climbmix/shard_00000.parquet")
    assert os.path.exists(corpus.shards[0].path)


def test_a_second_call_fetches_only_what_is_new(mirror, tmp_path):
    first = prepare("climbmix", tmp_path, 1000, mirror=mirror.url)
    again = prepare("climbmix", tmp_path, 3000, mirror=mirror.url)
    assert len(mirror.requests) == 4
    assert set(first.shards) < set(again.shards)
    assert again.shards[-1].split == "validation"


def test_shards_are_fetched_through_the_run_s_map(mirror, tmp_path):
    mapped, lines = [], []

    def through_pickle(fn, items):
        items = list(items)
        mapped.extend(items)
        return map(pickle.loads(pickle.dumps(fn)), items)

    run = RunContext(map=through_pickle, progress=lines.append)
    prepare("climbmix", tmp_path, 2000, run, mirror=mirror.url)
    assert mapped == ["shard_00007.parquet", "shard_00000.parquet", "shard_00001.parquet"]
    assert "3 of 3" in lines[-1]


def test_a_run_directory_behind_a_uri(mirror):
    config = CorpusConfig(corpus="climbmix", mirror=mirror.url)
    corpus = prepare_corpus(config, RUN, "memory://runs/demo/text", 1)
    assert corpus.shards[0].path == "memory://runs/demo/text/climbmix/shard_00000.parquet"
    assert texts(corpus, "train") == ["shard_00000.parquet", "x" * 5000]
    asked = len(mirror.requests)
    prepare_corpus(config, RUN, "memory://runs/demo/text", 1)
    assert len(mirror.requests) == asked


def test_a_cut_connection_is_survived_and_a_missing_shard_is_named(mirror, tmp_path):
    mirror.script = [Fault(cut_after=100), Fault(status=503)]
    prepare("climbmix", tmp_path, 1, mirror=mirror.url)
    del mirror.files["shard_00003.parquet"]
    with pytest.raises(DataError, match=r"shard_00003\.parquet: the server answered 404"):
        prepare("climbmix", tmp_path, 5000, mirror=mirror.url)


def test_another_validation_shard_is_kept_out_of_training(mirror, tmp_path):
    corpus = prepare("climbmix", tmp_path, 2000, mirror=mirror.url, validation_shard="shard_00000.parquet")
    assert names(corpus, "train") == ["shard_00001.parquet", "shard_00002.parquet"]
    assert names(corpus, "validation") == ["shard_00000.parquet"]
    with pytest.raises(ConfigError, match=r"validation_shard=x: .*shard_00000\.parquet to shard_00007\.parquet"):
        prepare("climbmix", tmp_path, 2000, validation_shard="x")


def test_a_recipe_is_never_fetched_whole_by_accident(tmp_path):
    with pytest.raises(ConfigError, match="max_bytes=None: fineweb-edu is 182 GB"):
        prepare("fineweb-edu", tmp_path)


def test_recipes_are_as_published():
    assert RECIPES["fineweb-edu"].names()[-1] == RECIPES["fineweb-edu"].validation_shard == "shard_01822.parquet"
    assert RECIPES["climbmix"].names()[-1] == RECIPES["climbmix"].validation_shard == "shard_06542.parquet"


def test_an_empty_file_among_others_is_left_out_and_said(tmp_path):
    for name, content in (("a", b'{"text": "one"}\n'), ("b", b""), ("c", b'{"text": "two"}\n'), ("d", b"")):
        (tmp_path / f"{name}.jsonl").write_bytes(content)
    said: list[str] = []
    corpus = prepare_corpus(CorpusConfig(corpus=str(tmp_path)), RunContext(progress=said.append), str(tmp_path), None)
    assert [Path(shard.path).name for shard in corpus.shards] == ["a.jsonl", "c.jsonl"]
    assert corpus.shards[-1].split == "validation"
    assert f"{tmp_path}: 2 empty files are left out" in said


def test_a_misspelt_corpus_is_guessed(tmp_path):
    with pytest.raises(ConfigError, match=r"corpus=fineweb: must be .* one of pydocs.*\. Did you mean fineweb-edu\?"):
        prepare_corpus(CorpusConfig(corpus="fineweb"), RUN, str(tmp_path), None)
