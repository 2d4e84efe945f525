import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.data.packing import Packer

BOS = 9


def pack(documents, row_tokens, buffer_documents, block_rows=3, keep_last=False):
    """Return the rows, the counts, and the most pieces that ever waited."""
    packer = Packer(
        row_tokens=row_tokens, bos=BOS, dtype=np.uint32, buffer_documents=buffer_documents, block_rows=block_rows
    )
    blocks, most_waiting = [], 0
    for document in documents:
        blocks += packer.add(np.array(document, np.uint32))
        most_waiting = max(most_waiting, packer.waiting)
    blocks += packer.finish(keep_last=keep_last)
    assert all(len(block) == block_rows for block in blocks[:-1])
    assert all(0 < len(block) <= block_rows for block in blocks)
    rows = np.concatenate([*blocks, np.empty((0, row_tokens), np.uint32)])
    return rows, packer.counts, most_waiting


def numbered(lengths):
    """Documents in which no token occurs twice: 1000, 1001, ... and never BOS."""
    ends = np.cumsum([0, *lengths]) + 1000
    return [np.arange(begin, end) for begin, end in itertools.pairwise(ends)]


def pieces(rows):
    """Cut rows at each BOS; lone ones vanish."""
    found = []
    for row in rows:
        found += [piece[1:] for piece in np.split(row, np.flatnonzero(row == BOS)) if len(piece) > 1]
    return found


lengths = st.lists(st.integers(0, 70), max_size=60)
row_lengths = st.integers(2, 20)
buffers = st.integers(1, 12)


@settings(deadline=None)
@given(lengths=lengths, row_tokens=row_lengths, buffer_documents=buffers)
def test_documents_are_in_the_rows_once_whole_and_in_order(lengths, row_tokens, buffer_documents):
    documents = numbered(lengths)
    rows, counts, most_waiting = pack(documents, row_tokens, buffer_documents, keep_last=True)
    assert (rows[:, 0] == BOS).all()
    # A document's later pieces stand in later places: concatenated by document they give it back.
    found, ends = {}, np.cumsum(lengths) + 1000
    for piece in pieces(rows):
        number = int(np.searchsorted(ends, piece[0], side="right"))
        found.setdefault(number, []).append(piece)
    for number, document in enumerate(documents):
        assert np.concatenate([*found.get(number, []), []]).tolist() == document.tolist()
    assert (counts.tokens, counts.cropped_tokens) == (sum(lengths), 0)
    assert counts.rows == len(rows)
    assert most_waiting < buffer_documents or buffer_documents == 1


@settings(deadline=None)
@given(lengths=lengths, row_tokens=row_lengths, buffer_documents=buffers)
def test_what_is_cropped_is_the_last_unfinished_row(lengths, row_tokens, buffer_documents):
    documents = numbered(lengths)
    kept, _, _ = pack(documents, row_tokens, buffer_documents, keep_last=True)
    rows, counts, _ = pack(documents, row_tokens, buffer_documents, keep_last=False)
    assert len(kept) - len(rows) in (0, 1)
    assert (kept[: len(rows)] == rows).all()
    dropped = kept[len(rows) :]
    assert counts.cropped_tokens == np.count_nonzero(dropped != BOS) == sum(lengths) - np.count_nonzero(rows != BOS)
    assert counts.cropped_tokens < row_tokens - 1
    assert counts.rows == len(rows)
    if len(dropped):
        assert dropped[0, -1] == BOS, "only a row that is not full is dropped"


@settings(deadline=None)
@given(lengths=lengths, row_tokens=row_lengths, buffer_documents=buffers, block_rows=st.integers(1, 7))
def test_blocks_do_not_change_the_rows(lengths, row_tokens, buffer_documents, block_rows):
    documents = numbered(lengths)
    one, counts_one, _ = pack(documents, row_tokens, buffer_documents, block_rows=1000)
    many, counts_many, _ = pack(documents, row_tokens, buffer_documents, block_rows=block_rows)
    assert one.tolist() == many.tolist()
    assert counts_one == counts_many


@settings(deadline=None)
@given(lengths=lengths, row_tokens=row_lengths, buffer_documents=buffers)
def test_rows_agree_with_best_fit_by_exhaustive_search(lengths, row_tokens, buffer_documents):
    documents = numbered(lengths)
    rows, _, _ = pack(documents, row_tokens, buffer_documents, keep_last=True)
    assert rows.tolist() == best_fit(documents, row_tokens, buffer_documents)


def best_fit(documents, row_tokens, buffer_documents):
    """The rule of the module's docstring over plain lists."""
    waiting, rows, open_row = [], [], []

    def fill():
        nonlocal open_row
        while len(open_row) < row_tokens:
            gap = row_tokens - len(open_row)
            if gap == 1:
                open_row.append(BOS)
            elif not waiting:
                return
            else:
                # max gives the first of the longest, which is the one that has waited longest.
                piece = max((p for p in waiting if len(p) < gap), key=len, default=None) or max(waiting, key=len)
                waiting[:] = [p for p in waiting if p is not piece]
                if len(piece) >= gap:
                    waiting.append(piece[gap - 1 :])
                open_row += [BOS, *piece[: gap - 1]]
        rows.append(open_row)
        open_row = []

    for document in documents:
        rest = list(document)
        while len(rest) >= row_tokens - 1:
            rows.append([BOS, *rest[: row_tokens - 1]])
            rest = rest[row_tokens - 1 :]
        if rest:
            waiting.append(rest)
        while len(waiting) >= buffer_documents:
            fill()
    while waiting:
        fill()
    if open_row:
        rows.append(open_row + [BOS] * (row_tokens - len(open_row)))
    return rows


def test_rows_by_hand():
    documents = [[1, 1, 1], [2], [3, 3, 3, 3, 3, 3, 3], [4, 4, 4, 4], [5, 5]]
    rows, counts, _ = pack(documents, row_tokens=6, buffer_documents=100, keep_last=True)
    assert rows.tolist() == [
        [9, 3, 3, 3, 3, 3],  # a long document's whole row
        [9, 4, 4, 4, 4, 9],  # the largest first; a lone BOS fills a gap of one
        [9, 1, 1, 1, 9, 2],  # the largest that fits
        [9, 3, 3, 9, 5, 5],  # first come, first packed among equals
    ]
    assert (counts.rows, counts.tokens, counts.cropped_tokens) == (4, 17, 0)


def test_the_longest_is_split_by_hand():
    rows, counts, _ = pack([[1, 1, 1], [2, 2, 2], [3, 3]], row_tokens=6, buffer_documents=100, keep_last=True)
    assert rows.tolist() == [[9, 1, 1, 1, 9, 2], [9, 3, 3, 9, 2, 2]]
    rows, counts, _ = pack([[1, 1, 1], [2, 2, 2], [3, 3]], row_tokens=7, buffer_documents=100)
    assert (rows.tolist(), counts.cropped_tokens) == ([[9, 1, 1, 1, 9, 3, 3]], 3)


def test_a_piece_keeps_no_long_document_in_memory():
    packer = Packer(row_tokens=8, bos=BOS, dtype=np.uint16, buffer_documents=10, block_rows=4)
    document = np.full(70_001, 5, np.uint16)
    assert sum(map(len, packer.add(document))) == 10_000
    (waiting,) = [piece for pieces in packer._waiting._by_length for piece in pieces]
    assert not np.shares_memory(waiting, document)


@pytest.mark.parametrize("keep_last", [True, False])
def test_no_document_gives_no_row(keep_last):
    rows, counts, _ = pack([[], []], row_tokens=4, buffer_documents=3, keep_last=keep_last)
    assert (len(rows), counts.rows, counts.tokens, counts.cropped_tokens) == (0, 0, 0, 0)
