import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpus import ENGLISH, write_corpus

from nanochat.config.shards import ShardsConfig
from nanochat.data import row_order as row_order_module
from nanochat.data.document_shards import write_token_shards
from nanochat.data.row_order import RowOrder, RowReader
from nanochat.data.token_shards import TokenShards
from nanochat.data.tokenizer import SPLIT_PATTERNS, Tokenizer
from nanochat.errors import DataError
from nanochat.run_context import RunContext


def groups(sizes):
    return [(number // 3, number % 3, rows) for number, rows in enumerate(sizes)]


sizes = st.lists(st.integers(1, 9), min_size=1, max_size=30)


@settings(deadline=None)
@given(sizes=sizes, seed=st.integers(0, 2**40), window_groups=st.integers(1, 9), epoch=st.integers(0, 10**6))
def test_every_epoch_has_every_row_once(sizes, seed, window_groups, epoch):
    order = RowOrder(groups(sizes), seed, window_groups)
    assert order.rows_per_epoch == sum(sizes)
    rows = order.locate(epoch * sum(sizes), sum(sizes))
    assert sorted(rows.tolist()) == list(range(sum(sizes)))


@settings(deadline=None)
@given(sizes=sizes, first=st.integers(0, 400), counts=st.lists(st.integers(0, 40), max_size=12), seed=st.integers(0, 9))
def test_any_slices_join_to_the_whole(sizes, first, counts, seed):
    whole = RowOrder(groups(sizes), seed, 3).locate(0, first + sum(counts))
    order, place = RowOrder(groups(sizes), seed, 3), first
    for count in counts:
        assert order.locate(place, count).tolist() == whole[place : place + count].tolist()
        place += count


@settings(deadline=None)
@given(sizes=sizes, first=st.integers(0, 10**12))
def test_reads_and_rows_are_the_same_places(sizes, first):
    order = RowOrder(groups(sizes), 5)
    in_manifest_order = [(shard, group, row) for shard, group, rows in groups(sizes) for row in range(rows)]
    expected = [in_manifest_order[row] for row in order.locate(first, 20)]
    assert [tuple(read) for read in order.reads(first, 20).tolist()] == expected


def test_windows_are_made_of_whole_groups():
    order = RowOrder([(0, group, 10) for group in range(20)], seed=1, window_groups=8)
    rows = order.locate(0, 200)
    windows = [set((rows[begin : begin + 80] // 10).tolist()) for begin in (0, 80, 160)]
    assert [len(window) for window in windows] == [8, 8, 4]
    assert set.union(*windows) == set(range(20))
    assert sorted(windows[0]) != list(range(8)), "groups are shuffled"
    assert len(set((rows[:10] // 10).tolist())) > 1, "rows of a window are shuffled"


def test_epochs_and_seeds_differ():
    def order(seed, epoch):
        return tuple(RowOrder([(0, group, 8) for group in range(20)], seed).locate(160 * epoch, 160).tolist())

    assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9


def test_within_a_single_window_epochs_differ():
    order = RowOrder([(0, 0, 50)], seed=0)
    assert order.locate(0, 50).tolist() != order.locate(50, 50).tolist()


def test_the_order_is_pinned():
    # Another order would train resumed runs on rows that they have seen: a change needs a new manifest version.
    order = RowOrder([(0, 0, 4), (0, 1, 2), (1, 0, 4), (2, 0, 1)], seed=42, window_groups=2)
    assert order.locate(0, 22).tolist() == [5, 4, 10, 7, 6, 2, 9, 8, 0, 1, 3, 5, 6, 9, 7, 4, 8, 2, 0, 10, 1, 3]
    assert order.locate(10**15, 3).tolist() == [9, 2, 10]


def by_hand(sizes, seed, epoch, window_groups):
    """One epoch, from the contract alone."""

    def permutation(size, *seeds):
        keys = np.random.PCG64(np.random.SeedSequence([seed, epoch, *seeds])).random_raw(size).tolist()
        return sorted(range(size), key=keys.__getitem__)

    starts = np.cumsum([0, *sizes])
    rows, order = [], permutation(len(sizes))
    for window, begin in enumerate(range(0, len(order), window_groups)):
        inside = [starts[group] + row for group in order[begin : begin + window_groups] for row in range(sizes[group])]
        rows += [int(inside[place]) for place in permutation(len(inside), window)]
    return rows


@settings(deadline=None)
@given(sizes=sizes, seed=st.integers(0, 99), window_groups=st.integers(1, 9))
def test_the_order_is_the_one_of_the_contract(sizes, seed, window_groups):
    order = RowOrder(groups(sizes), seed, window_groups)
    expected = by_hand(sizes, seed, 0, window_groups) + by_hand(sizes, seed, 1, window_groups)
    assert order.locate(0, len(expected)).tolist() == expected


def test_a_far_position_is_found_without_replay(monkeypatch):
    calls = []
    permutation = row_order_module._permutation
    monkeypatch.setattr(row_order_module, "_permutation", lambda *a: calls.append(a) or permutation(*a))
    order = RowOrder([(0, group, 256) for group in range(1000)], seed=0)
    order.locate(256_000 * 10**6 + 4_000, 16)
    assert len(calls) == 2
    order.locate(256_000 * 10**6 + 4_016, 16)
    assert len(calls) == 2, "the window is kept"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    texts = [" ".join(f"{number} rows" for number in range(length)) for length in (2000, 3, 1500)]
    corpus = write_corpus(folder / "text", [[text, *ENGLISH] for text in texts])
    tokenizer = Tokenizer([], SPLIT_PATTERNS["nanochat"])
    return write_token_shards(ShardsConfig(sequence_len=8), RunContext(), corpus, tokenizer, str(folder / "shards"))


def test_the_reader_gives_the_rows_of_the_order(shards):
    everything = np.concatenate(
        [shards.read_rows(shard, group) for shard in shards.split("train") for group in range(len(shard.group_sizes()))]
    )
    reader = RowReader(shards, "train", seed=3)
    total = reader.order.rows_per_epoch
    assert total == len(everything) == shards.rows("train")
    assert len(shards.groups("train")) > 16
    # A whole epoch in steps that do not divide it, and into the next one.
    for first in range(0, total + 100, 100):
        rows = reader.read(first, 100)
        assert rows.dtype == np.uint16
        assert (rows == everything[RowOrder(shards.groups("train"), 3).locate(first, 100)]).all()


def test_reading_in_order_reads_each_group_once(shards, monkeypatch):
    read = []
    original = TokenShards.read_group
    monkeypatch.setattr(
        TokenShards, "read_group", lambda self, *arguments: read.append(arguments) or original(self, *arguments)
    )
    reader = RowReader(shards, "train", seed=3)
    for first in range(0, reader.order.rows_per_epoch - 16, 16):
        reader.read(first, 16)
    assert len(read) == len(shards.groups("train"))
    assert len(reader._groups) <= 16


def test_a_reader_survives_pickling_after_use(shards):
    reader = RowReader(shards, "train", seed=3)
    expected = reader.read(50, 20)
    assert (pickle.loads(pickle.dumps(reader)).read(50, 20) == expected).all()


def test_a_damaged_shard_is_named(shards, tmp_path):
    moved = type(shards)(
        folder=str(tmp_path), recipe=shards.recipe, shards=shards.shards, manifest_hash=shards.manifest_hash
    )
    with pytest.raises(DataError, match=r"train/0000\d-source_\d\.parquet: is damaged"):
        RowReader(moved, "train", seed=0).read(0, 1)
