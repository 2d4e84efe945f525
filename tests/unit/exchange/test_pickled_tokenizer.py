"""nanochat's tokenizer.pkl: what tiktoken pickles is read, whatever else a pickle can do is refused and not done."""

import collections
import copyreg
import os
import pickle
import time
import tracemalloc

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from nanochat_files import TEXT, trained

from nanochat.data.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERNS, Tokenizer
from nanochat.errors import DataError
from nanochat.exchange import pickled_tokenizer
from nanochat.exchange.pickled_tokenizer import read_pickled_tokenizer


def encoding(fields: dict[str, object]) -> tiktoken.Encoding:
    return tiktoken.Encoding(**fields)


class Pickled:
    """Pickles as an Encoding of any state would, sound or not."""

    def __init__(self, state: object) -> None:
        self.state = state

    @property
    def __class__(self):
        return tiktoken.Encoding

    def __reduce_ex__(self, protocol):
        return copyreg.__newobj__, (tiktoken.Encoding,), self.state


def put(folder, content: bytes) -> str:
    path = folder / "tokenizer.pkl"
    path.write_bytes(content)
    return str(path)


def refusal(folder, content: bytes) -> str:
    with pytest.raises(DataError) as raised:
        read_pickled_tokenizer(put(folder, content))
    assert str(raised.value).startswith(f"tokenizer={folder}/tokenizer.pkl: ")
    return str(raised.value).split(": ", 1)[1]


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("dumps", [pickle.dumps, pickle._dumps], ids=["C", "Python"])
def test_what_nanochat_writes_gives_the_same_ids(tmp_path, protocol, dumps):
    theirs = encoding(trained())
    ours = read_pickled_tokenizer(put(tmp_path, dumps(theirs, protocol)))
    assert ours.vocab_size == theirs.n_vocab == 300
    for text in (TEXT, "", "  \n\n 1234", "\u4e2d" * 9, "never seen: \u0416\u0001"):
        assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)
    for name in SPECIAL_TOKENS:
        assert ours.special(name) == theirs.encode_single_token(name)
    assert all(ours.decode_bytes([token]) == theirs.decode_bytes([token]) for token in range(300))
    ours.save(str(tmp_path))
    assert Tokenizer.load(str(tmp_path)).hash == ours.hash


@pytest.mark.parametrize("protocol", [3, 4])
def test_large_ids_long_patterns_and_long_tokens_are_read(tmp_path, protocol):
    """More than 65,535 ids, of which pickle writes as four bytes; texts of more than 255."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {bytes([one, other]): 256 + 256 * one + other for one in range(256) for other in range(256)}
    for size in (4, 8, 16, 32, 64, 128, 256, 512):
        ranks[b"-" * size] = len(ranks)
    specials = {name: len(ranks) + number for number, name in enumerate(SPECIAL_TOKENS)}
    assert len(SPLIT_PATTERNS["unspaced"].encode()) > 255
    fields = {"name": "rustbpe", "pat_str": SPLIT_PATTERNS["unspaced"], "mergeable_ranks": ranks}
    content = pickle.dumps(encoding(fields | {"special_tokens": specials}), protocol)
    started_s = time.monotonic()
    ours = read_pickled_tokenizer(put(tmp_path, content))
    assert time.monotonic() - started_s < 20
    assert ours.vocab_size == 65_536 + 256 + 8 + 9
    assert ours.encode_ordinary("-" * 512) == [65_536 + 256 + 7]


class Call:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(tmp_path, protocol):
    witness = tmp_path / "witness"
    content = pickle.dumps(Call(os.system, (f"touch {witness}",)), protocol)
    why = refusal(tmp_path, content)
    assert "asks for posix.system, and only tiktoken.core.Encoding is admitted" in why
    assert "Nothing of it was run." in why
    assert not witness.exists()
    pickle.loads(content)
    assert witness.exists(), "the pickle was dangerous"


def test_a_call_hidden_in_a_field_is_refused_and_runs_nothing(tmp_path):
    witness = tmp_path / "witness"
    fields = trained() | {"name": Call(os.system, (f"touch {witness}",))}
    assert "asks for posix.system" in refusal(tmp_path, pickle.dumps(Pickled(fields)))
    assert not witness.exists()


HEAD = b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (HEAD + b")R.", "has the pickle instruction REDUCE"),
        (HEAD + b")\x81" + b"N" + b"b.", "has the pickle instruction NONE"),
        (HEAD + b"(\x8c\x04texto.", "has the pickle instruction OBJ"),
        (b"(S'touch x'\nios\nsystem\n.", "has the pickle instruction STRING"),
        (b"(ios\nsystem\n.", "has the pickle instruction INST"),
        (b"\x80\x02\x82\x01.", "has the pickle instruction EXT1"),
        (b"\x80\x04\x8c\x01aQ.", "has the pickle instruction BINPERSID"),
        (b"Pname\n.", "has the pickle instruction PERSID"),
        (HEAD + b")}\x92.", "has the pickle instruction NEWOBJ_EX"),
        (b"\x80\x04\x8c\x0dtiktoken.core\x8c\x0fEncoding.decode\x93.", "asks for tiktoken.core.Encoding.decode"),
        (b"\x80\x04}\x8c\x08Encoding\x93.", "asks for dict.Encoding"),
        (b"\x80\x04\x8c\x02os)\x93.", "asks for os.tuple"),
        (b"\x80\x03cos\nsystem\n.", "asks for os.system"),
        (HEAD + b"}b.", "has _EncodingClass where _Encoding must be"),
        (HEAD + b")\x81}b" + HEAD[2:] + b")\x81}b.", "holds something else than one encoding"),
        (HEAD + b".", "holds something else than one encoding"),
        (b"\x80\x04}.", "holds something else than one encoding"),
        (b"\x80\x04.", "holds something else than one encoding"),
        (b"\x80\x04)\x81.", "do not fit together"),
        (b"\x80\x04}}\x81.", "has dict where tuple must be"),
        (b"\x80\x04))\x81.", "has tuple where _EncodingClass must be"),
        (b"\x80\x04h\x05.", "do not fit together"),
        (b"\x80\x04\x94.", "do not fit together"),
        (b"\x80\x03}r\xff\xff\xff\x7f.", "do not fit together"),
        (b"\x80\x04}\x8c\x01aK\x01u.", "do not fit together"),
        (b"\x80\x04(K\x01K\x02u.", "do not fit together"),
        (b"\x80\x04K\x01s.", "do not fit together"),
        (b"\x80\x04}(\x8c\x01au.", "shorter"),
        (b"\x80\x04K\x01(\x8c\x01aK\x01u.", "has int where dict must be"),
        (b"\x80\x04}(}K\x01u.", "has dict where bytes must be"),
        (b"\x80\x04}(K\x01K\x01u.", "has int where bytes must be"),
        (HEAD + b")\x81}b", "exhausted before"),
        (b"", "exhausted before"),
        (b"no pickle", "unknown"),
        (b"\x80\x04\x8d" + b"\xff" * 8, "byte count > sys.maxsize"),
        (b"\x80\x04\x8d\x01" + bytes(7) + b"a.", "has the pickle instruction BINUNICODE8"),
        (b"\x80\x04X\xff\xff\xff\x7f", "expected 2147483647 bytes"),
        (b"\x80\x04" + b"(" * 5000 + b".", "has more than 4096 values on its stack"),
        (b"\x8c\x04\xff\xff\xff\xff.", "decode"),
    ],
)
def test_other_instructions_are_refused_by_name(tmp_path, content, why):
    assert why in refusal(tmp_path, content)


def test_one_of_tiktokens_own_is_refused_by_its_name(tmp_path):
    assert "is tiktoken's own cl100k_base, by name" in refusal(tmp_path, pickle.dumps(Pickled("cl100k_base")))


class SubclassedDict(dict):
    pass


def changed(**values):
    return trained() | values


def with_ranks(change) -> dict[str, object]:
    fields = trained()
    ranks = dict(fields["mergeable_ranks"])
    change(ranks)
    specials = {name: len(ranks) + number for number, name in enumerate(SPECIAL_TOKENS)}
    return fields | {"mergeable_ranks": ranks, "special_tokens": specials}


def swap(ranks, one, other):
    ranks[one], ranks[other] = ranks[other], ranks[one]


def doubled(ranks, longest):
    """Add runs of a byte that no token has, each two of the one before it."""
    for power in range(1, longest.bit_length()):
        ranks[b"\x00" * (1 << power)] = len(ranks)


LAST = max(trained()["mergeable_ranks"], key=trained()["mergeable_ranks"].get)
SPECIALS = trained()["special_tokens"]


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ([1], "EMPTY_LIST"),
        ({"name": "x"}, "has the fields ['name'], not name, pat_str, mergeable_ranks, special_tokens"),
        (changed(explicit_n_vocab=300), "has the fields ['explicit_n_vocab', "),
        (changed(pat_str=b"x"), "has bytes where str must be"),
        (changed(pat_str=r"\p{N}{1,3}"), "has a split pattern that is none of nanochat, unspaced"),
        (changed(mergeable_ranks="x"), "has str where dict must be"),
        (changed(mergeable_ranks=SubclassedDict(trained()["mergeable_ranks"])), "asks for test_pickled_tokenizer."),
        (changed(mergeable_ranks=collections.OrderedDict()), "asks for collections.OrderedDict"),
        (changed(mergeable_ranks=trained()["special_tokens"]), "has str where bytes must be"),
        (changed(mergeable_ranks={}), "has the special token <|assistant_end|> as 295, not 4"),
        (with_ranks(lambda ranks: ranks.clear()), "has 0 tokens, not even one for each byte"),
        (changed(special_tokens={}), "has the special token <|assistant_end|> as None, not 295"),
        (changed(special_tokens=dict(zip(SPECIAL_TOKENS[::-1], range(291, 300)))), "has the special token <|"),
        (changed(special_tokens=SPECIALS | {"<|endoftext|>": 300}), "has the special token <|endoftext|> as 300, not"),
        (changed(special_tokens=SPECIALS | {"<|bos|>": 300}), "has the special token <|bos|> as 300, not 291"),
        (changed(special_tokens=SPECIALS | {"<|bos|>": "291"}), "has str where int must be"),
        (with_ranks(lambda ranks: ranks.update({b"he": "1"})), "has str where int must be"),
        (with_ranks(lambda ranks: swap(ranks, b"a", b"b")), "has b'b' as rank 97, where the byte of that value must"),
        (with_ranks(lambda ranks: swap(ranks, b"a", LAST)), "as rank 97, where the byte of that value must be"),
        (with_ranks(lambda ranks: ranks.pop(b"a")), "has not one token of rank 97"),
        (with_ranks(lambda ranks: ranks.update({b"zz": 257})), "has not one token of rank 258"),
        (with_ranks(lambda ranks: ranks.update({b"zz": len(ranks) + 1})), "has not one token of rank 291"),
        (with_ranks(lambda ranks: ranks.update({b"zz": -1})), "has not one token of rank 0"),
        (with_ranks(lambda ranks: ranks.update({b"zyx": len(ranks)})), "rank 291, b'zyx', must join two tokens"),
        (with_ranks(lambda ranks: ranks.update({b"": len(ranks)})), "rank 291, b'', must join two tokens"),
        (with_ranks(lambda ranks: doubled(ranks, 2048)), "must join two tokens before it"),
    ],
)
def test_an_encoding_that_nanochat_has_not_trained_is_refused(tmp_path, state, why):
    assert why in refusal(tmp_path, pickle.dumps(Pickled(state)))


def test_a_long_token_is_read(tmp_path):
    fields = with_ranks(lambda ranks: doubled(ranks, 1024))
    assert read_pickled_tokenizer(put(tmp_path, pickle.dumps(Pickled(fields)))).vocab_size == 310


def test_a_token_is_joined_of_what_comes_before_it(tmp_path):
    def exchanged(ranks):
        merged = sorted(ranks, key=ranks.get)
        long = next(token for token in merged[256:] if len(token) == 3)
        swap(ranks, long, next(token for token in merged[256:] if token in (long[:2], long[1:])))

    assert "must join two tokens before it" in refusal(tmp_path, pickle.dumps(Pickled(with_ranks(exchanged))))


def test_true_is_no_rank(tmp_path):
    fields = with_ranks(lambda ranks: ranks.update({b"\x01": True}))
    assert "NEWTRUE" in refusal(tmp_path, pickle.dumps(Pickled(fields)))


def test_a_file_that_is_missing_or_too_large_is_refused(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"there is no such file\. Name nanochat's tokenizer\.pkl with --tokenizer"):
        read_pickled_tokenizer(str(tmp_path / "tokenizer.pkl"))
    content = pickle.dumps(encoding(trained()))
    monkeypatch.setattr(pickled_tokenizer, "LARGEST_FILE_BYTES", len(content))
    assert read_pickled_tokenizer(put(tmp_path, content)).vocab_size == 300
    assert f"{len(content) + 1} bytes are too many" in refusal(tmp_path, content + b".")


def test_a_state_whose_text_would_be_endless_costs_nothing(tmp_path):
    state: dict[str, object] = {}
    for _ in range(60):
        state = {"a": state, "b": state}
    assert "has the fields ['a', 'b']" in refusal(tmp_path, pickle.dumps(Pickled(state)))
    assert "has dict where str must be" in refusal(tmp_path, pickle.dumps(Pickled(changed(pat_str=state))))
    assert "has dict where int must be" in refusal(
        tmp_path, pickle.dumps(Pickled(changed(special_tokens={"<|bos|>": state})))
    )
    assert read_pickled_tokenizer(put(tmp_path, pickle.dumps(Pickled(changed(name=state))))).vocab_size == 300


@pytest.mark.parametrize("repeated", [b"\x94", b"\x80\x04", b"h\x00h\x01s", b"(u"])
def test_a_file_of_one_instruction_takes_little_time_and_memory(tmp_path, repeated):
    """The stack stays short: keeping, ignoring, and putting one item again and again."""
    size = 1 << 17
    content = b"\x80\x04\x8c\x01a\x94K\x01\x94}" + repeated * (size // len(repeated))
    tracemalloc.start()
    started_s = time.monotonic()
    refusal(tmp_path, content)
    assert tracemalloc.get_traced_memory()[1] < 64 * size
    tracemalloc.stop()
    assert time.monotonic() - started_s < 30


def test_a_state_that_holds_itself_is_refused(tmp_path):
    state: dict[str, object] = trained()
    state["pat_str"] = state
    assert "has dict where str must be" in refusal(tmp_path, pickle.dumps(Pickled(state)))


REAL = pickle.dumps(encoding(trained(268)))
SAME = encoding(trained(268))


@settings(max_examples=400)
@given(
    st.lists(st.tuples(st.integers(0, len(REAL) - 1), st.integers(0, 3), st.binary(max_size=6)), min_size=1, max_size=4)
)
def test_a_changed_file_gives_a_tokenizer_or_a_data_error(tmp_path_factory, changes):
    content = REAL
    for place, drop, added in changes:
        content = content[:place] + added + content[place + drop :]
    path = put(tmp_path_factory.getbasetemp(), content)
    started_s = time.monotonic()
    try:
        tokenizer = read_pickled_tokenizer(path)
    except DataError:
        pass
    else:
        assert tokenizer.vocab_size == SAME.n_vocab
        assert tokenizer.encode_ordinary("\x00\x01\xfe") == [0, 1, 0xC3, 0xBE]
    assert time.monotonic() - started_s < 5


@settings(max_examples=200)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_give_a_data_error(tmp_path_factory, content, with_head):
    with pytest.raises(DataError):
        read_pickled_tokenizer(put(tmp_path_factory.getbasetemp(), (HEAD + b")\x81" if with_head else b"") + content))
