"""What is let go of an answer is never taken back, and is the same however the tokens came."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.data.conversations import Part, parse_parts
from nanochat.data.tokenizer import SPLIT_PATTERNS, Tokenizer
from nanochat.inference.requests import Event
from nanochat.inference.text_stream import Piece, StreamPart, TextStream

TOKENIZER = Tokenizer([], SPLIT_PATTERNS["nanochat"])  # bytes alone: every other character takes several tokens
END, CALL, CALLED, OUTPUT, TOLD = (
    TOKENIZER.special(f"<|{name}|>")
    for name in ("assistant_end", "python_start", "python_end", "output_start", "output_end")
)


def events_of(ids: list[int]) -> list[Event]:
    return [Event(1, id, "stop" if id == END else None) for id in ids]


def spelled(text: str) -> list[int]:
    return list(text.encode())


def run(ids: list[int], stops=(), sizes=(1,), begun=()) -> list[Piece]:
    """Push tokens in groups of the given sizes, until the stream says that the answer has ended."""
    stream = TextStream(TOKENIZER, stops, begun)
    pieces, events, turn = [], events_of(ids), 0
    while events:
        size = sizes[turn % len(sizes)]
        pieces.append(stream.push(events[:size]))
        events, turn = events[size:], turn + 1
        if pieces[-1].finish_reason:
            break
    return pieces


def text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def parts(pieces: list[Piece]) -> tuple[Part, ...]:
    joined: list[Part] = []
    for part in (part for piece in pieces for part in piece.parts):
        if part.continues:
            assert joined[-1].kind == part.kind
            joined[-1] = Part(part.kind, joined[-1].text + part.text)
        else:
            joined.append(Part(part.kind, part.text))
    return tuple(joined)


@given(st.text(max_size=20), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_characters_come_whole_however_the_tokens_come(said, sizes):
    ids = [*said.encode("utf-8", "replace"), END]
    pieces = run(ids, sizes=sizes)
    assert text(pieces) == said.encode("utf-8", "replace").decode()
    assert [event.token for piece in pieces for event in piece.events] == ids
    assert "\ufffd" not in "".join(piece.text for piece in pieces) or "\ufffd" in said
    assert [piece.finish_reason for piece in pieces][-1] == "stop"


def test_half_a_character_is_flushed_at_the_end_and_before_a_call():
    assert text(run([*spelled("a"), 0xE2, 0x82, END])) == "a\ufffd"
    pieces = run([0xE2, CALL, *spelled("1"), CALLED, END])
    assert parts(pieces) == (Part("text", "\ufffd"), Part("python", "1"))
    length = TextStream(TOKENIZER)
    assert length.push([Event(1, 0xF0)]).parts == []
    assert length.push([Event(1, 0x9F, "length")]) == Piece(
        [StreamPart("text", "\ufffd", False)], [Event(1, 0xF0), Event(1, 0x9F, "length")], "length"
    )


@given(
    st.text("ab<", max_size=14), st.lists(st.text("ab<", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
)  # fmt: skip
def test_a_stop_string_ends_the_answer_and_is_not_in_it(said, stops, sizes):
    pieces = run([*spelled(said), END], stops, sizes)
    ends = sorted((said.find(stop) + len(stop), said.find(stop)) for stop in stops if stop in said)
    assert text(pieces) == (said[: ends[0][1]] if ends else said), "the first to be complete ends the answer"
    assert pieces[-1].finish_reason == "stop"
    assert (pieces[-1].stop in stops) == bool(ends)
    assert all(stop not in text(pieces) for stop in stops)


def test_what_may_become_a_stop_string_is_held_back_and_given_when_it_does_not():
    stream = TextStream(TOKENIZER, ["<end>"])
    given = [stream.push([Event(1, id)]).text for id in spelled("a<en<end!")]
    assert given == ["a", "", "", "", "<en", "", "", "", "<end!"]


def test_stop_strings_are_looked_for_in_the_text_alone():
    ids = [*spelled("x"), CALL, *spelled("STOP"), CALLED, OUTPUT, *spelled("STOP"), TOLD, *spelled("yST"), END]
    pieces = run(ids, ["STOP"])
    assert parts(pieces) == (
        Part("text", "x"), Part("python", "STOP"), Part("python_output", "STOP"), Part("text", "yST")
    )  # fmt: skip
    assert text(pieces) == "xyST"


def random_answer(draw: random.Random) -> list[int]:
    ids: list[int] = []
    for _ in range(draw.randint(1, 4)):
        ids += spelled("".join(draw.choices("ab<é漢😀", k=draw.randint(0, 5))))
        if draw.random() < 0.5:
            ids += [CALL, *spelled("1+1"), CALLED, OUTPUT, *spelled("2"), TOLD]
    return [*ids, END]


@pytest.mark.parametrize("seed", range(30))
def test_an_answer_is_continued_from_the_ids_that_were_let_go(seed):
    """At every point where a reader can have been cut off: its text and parts, and the rest, are the whole."""
    draw = random.Random(seed)
    ids, stops = random_answer(draw), draw.choice([[], ["<a"], ["b<", "漢😀"]])
    whole = run(ids, stops, sizes=[draw.randint(1, 3)])
    for cut in range(len(whole)):
        had = whole[:cut]
        begun = [event.token for piece in had for event in piece.events]
        rest = run(ids[len(begun) :], stops, begun=begun)
        assert text(had) + text(rest) == text(whole)
        assert parts(had + rest) == parts(whole)
        assert [e.token for piece in had + rest for e in piece.events] == [e.token for p in whole for e in p.events]
        assert rest[-1].finish_reason == whole[-1].finish_reason


@pytest.mark.parametrize("seed", range(10))
def test_the_parts_are_those_that_the_whole_answer_has(seed):
    ids = random_answer(random.Random(seed))
    assert parts(run(ids)) == parse_parts(TOKENIZER, ids)
