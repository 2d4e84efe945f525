"""Pages are never two sequences' unless they hold the same tokens, and every one comes back."""

from hypothesis import given
from hypothesis import strategies as st

from nanochat.inference.page_pool import ROOT, PagePool

SIZE = 2


def fill(pool: PagePool, tokens: list[int]) -> list[int]:
    """Hold pages for tokens, found or taken, and publish those that are full."""
    pages, name = pool.find(tokens)
    for first in range(len(pages) * SIZE, len(tokens), SIZE):
        pages.append(pool.take())
        part = tokens[first : first + SIZE]
        if len(part) == SIZE:
            name = pool.publish(pages[-1], name, part)
    return pages


def test_who_begins_alike_shares_full_pages_alone():
    pool = PagePool(20, SIZE)
    first = fill(pool, [1, 2, 3, 4, 5])
    second = fill(pool, [1, 2, 3, 4, 6])
    assert second[:2] == first[:2]
    assert second[2] != first[2]
    assert pool.find([1, 2, 9, 4])[0] == first[:1]
    assert pool.find([3, 4])[0] == [], "the same tokens after another beginning"
    assert pool.find([]) == ([], ROOT)


def test_pages_stay_findable_until_they_are_needed_the_last_of_a_sequence_first():
    pool = PagePool(5, SIZE)
    pages = fill(pool, [1, 2, 3, 4, 5, 6])
    assert pool.free == 1
    pool.release(pages)
    assert pool.free == 4
    assert pool.find([1, 2, 3, 4, 5, 6])[0] == pages
    pool.release(pages)
    taken = [pool.take() for _ in range(2)]
    assert taken[1] == pages[2], "first the page that never had anything, then the end of the sequence"
    assert pool.find([1, 2, 3, 4, 5, 6])[0] == pages[:2]


def test_a_page_that_is_given_away_is_not_found_any_more_nor_what_stood_after_it():
    pool = PagePool(4, SIZE)
    pages = fill(pool, [1, 2, 3, 4, 5, 6])
    pool.release(pages[:1])
    assert pool.take() == pages[0]
    assert pool.find([1, 2, 3, 4, 5, 6])[0] == []


def test_twins_are_published_once():
    pool = PagePool(9, SIZE)
    one, other = pool.take(), pool.take()
    name = pool.publish(one, ROOT, [1, 2])
    assert pool.publish(other, ROOT, [1, 2]) == name
    pool.release([one, other])
    assert pool.find([1, 2])[0] == [one]


@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 1), min_size=1, max_size=7)), max_size=60))
def test_pages_are_held_once_or_by_equals_and_all_come_back(actions):
    pool = PagePool(12, SIZE)
    held: list[tuple[list[int], list[int]]] = []
    for ends, tokens in actions:
        if ends and held:
            pool.release(held.pop(len(tokens) % len(held))[1])
        elif -(-len(tokens) // SIZE) <= pool.free:
            held.append((tokens, fill(pool, tokens)))
        contents: dict[int, list[int]] = {}
        for tokens_of, pages in held:
            assert len(pages) == -(-len(tokens_of) // SIZE)
            assert 0 not in pages
            for number, page in enumerate(pages):
                beginning = tokens_of[: (number + 1) * SIZE]
                assert contents.setdefault(page, beginning) == beginning
        assert pool.free == 11 - len(contents)
    for _, pages in held:
        pool.release(pages)
    assert pool.free == 11
    assert sorted(pool.take() for _ in range(11)) == list(range(1, 12))
