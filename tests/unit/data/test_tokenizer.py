import base64
import itertools
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import regex
import requests
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpus import ENGLISH, write_corpus

from nanochat import storage
from nanochat.config.tokenizer import TokenizerConfig
from nanochat.data import tokenizer as tokenizer_module
from nanochat.data.tokenizer import (
    LONGEST_SPACE_RUN,
    SPECIAL_TOKENS,
    SPLIT_PATTERNS,
    Tokenizer,
    compression_report,
    train_tokenizer,
)
from nanochat.errors import DataError
from nanochat.run_context import RunContext

PATTERNS = tuple(SPLIT_PATTERNS)
CHINESE = "\u6211\u6628\u5929\u5728\u5317\u4eac\u5927\u5b66\u7684\u56fe\u4e66\u9986\u91cc\u770b\u4e86\u4e00\u672c\u4e66"
JAPANESE = (
    "\u79c1\u306f\u6628\u65e5\u6771\u4eac\u99c5\u3067\u30e9\u30fc\u30e1\u30f3\u3092\u98df\u3079\u307e\u3057\u305f"
)
THAI = "\u0e09\u0e31\u0e19\u0e23\u0e31\u0e01\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22\u0e41\u0e25\u0e30\u0e2d\u0e22\u0e32\u0e01\u0e40\u0e23\u0e35\u0e22\u0e19\u0e23\u0e39\u0e49"  # fmt: skip # noqa: E501
KHMER = "\u1781\u17d2\u1789\u17bb\u17c6\u1785\u1784\u17cb\u179a\u17c0\u1793\u1797\u17b6\u179f\u17b6\u1781\u17d2\u1798\u17c2\u179a\u1793\u17c5\u1780\u1798\u17d2\u1796\u17bb\u1787\u17b6"  # fmt: skip # noqa: E501
HINDI = "\u0939\u093f\u0928\u094d\u0926\u0940 \u092d\u093e\u0937\u093e \u0915\u093f\u0924\u093e\u092c\u0947\u0902"
UNSPACED_SENTENCES = (CHINESE, JAPANESE, THAI, KHMER)


def train(folder, texts, run=None, **config):
    return train_tokenizer(TokenizerConfig(**config), run or RunContext(), write_corpus(folder, [texts]))


@pytest.fixture(scope="module", params=PATTERNS)
def tokenizer(request, tmp_path_factory):
    texts = [*ENGLISH, *[sentence * 3 for sentence in UNSPACED_SENTENCES], HINDI]
    return train(tmp_path_factory.mktemp("corpus"), texts, vocab_size=500, split_pattern=request.param)


def naive_encode(text, ranks, pattern):
    """Merge, in each pre-token, the pair of lowest rank, until none is left."""
    ids = []
    for pre_token in regex.findall(pattern, text, flags=regex.V1):
        parts = [bytes([byte]) for byte in pre_token.encode()]
        while True:
            pairs = [(ranks.get(a + b, np.inf), place) for place, (a, b) in enumerate(itertools.pairwise(parts))]
            rank, place = min(pairs, default=(np.inf, 0))
            if rank == np.inf:
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def tokens_of(tokenizer):
    return [tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size)]


def test_ids_equal_naive_byte_pair_encoding(tokenizer):
    ranks = {token: rank for rank, token in enumerate(tokens_of(tokenizer)[: -len(SPECIAL_TOKENS)])}
    pattern = json.loads(json.dumps(tokenizer._content()))["pattern"]
    text = " ".join([*ENGLISH, *UNSPACED_SENTENCES, HINDI, "unseen W\u00f6rter, 7 of 1001   \n\n they'LL see"])
    assert tokenizer.encode_ordinary(text) == naive_encode(text, ranks, pattern)


def test_the_most_frequent_pair_is_merged_first(tmp_path):
    tokenizer = train(tmp_path, ["xyz xyz xyq"], vocab_size=300)
    assert tokenizer.decode_bytes([256]) == b"xy"
    assert len(tokenizer.encode_ordinary("xyz xyz")) == 2


@settings(deadline=None)
@given(text=st.text())
def test_decoding_is_the_identity_and_bytes_add_up(tokenizer, text):
    ids = tokenizer.encode_ordinary(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    array = tokenizer.encode_batch_numpy([text, "x"])[0]
    assert array.dtype == np.uint16
    assert array.tolist() == ids


def test_special_tokens_come_last_in_order_and_never_from_text(tokenizer):
    first = tokenizer.vocab_size - 9
    assert [tokenizer.special(name) for name in SPECIAL_TOKENS] == list(range(first, tokenizer.vocab_size))
    assert tokenizer.bos == first
    assert (tokenizer.token_bytes() == 0).nonzero()[0].tolist() == list(range(first, tokenizer.vocab_size))
    for name in SPECIAL_TOKENS:
        text = f"say {name}{name} twice"
        ids = tokenizer.encode_ordinary(text)
        assert max(ids) < first
        assert max(tokenizer.encode_batch_numpy([text])[0]) < first
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([tokenizer.special(name)]) == name
    with pytest.raises(KeyError):
        tokenizer.special("<|pad|>")


def test_lone_surrogates_are_replaced(tokenizer):
    assert tokenizer.decode(tokenizer.encode_ordinary("a\ud800b \ud83d\ude00")) == "a\ufffdb \U0001f600"
    assert tokenizer.encode_batch_numpy(["a\udfffb"])[0].tolist() == tokenizer.encode_ordinary("a\ufffdb")


@pytest.mark.parametrize(
    "unit", ["a", " ", "\t", "\n", "\u3000", "\u4e2d", "\u0e01", "\u0301", "!"], ids=lambda unit: f"U+{ord(unit):04X}"
)
@pytest.mark.slow
def test_a_megabyte_without_a_break(tokenizer, unit):
    text = unit * (1_000_000 // len(unit.encode()) + 1) + "x"
    assert tokenizer.decode_bytes(tokenizer.encode_ordinary(text)) == text.encode()


def test_only_runs_that_are_too_long_are_cut(tokenizer):
    short, long = " " * LONGEST_SPACE_RUN, " " * (3 * LONGEST_SPACE_RUN + 5)
    assert tokenizer_module._encodable(f"a{short}b") == [f"a{short}b"]
    parts = tokenizer_module._encodable(f"\nab{long}cd{short}ef{long}")
    assert "".join(parts) == f"\nab{long}cd{short}ef{long}"
    # Two runs, each cut three times; the run that is just short enough stays whole.
    assert len(parts) == 7
    assert max(len(part) - len(part.strip()) for part in parts) <= 2 * LONGEST_SPACE_RUN
    assert any(short in part and "d" in part for part in parts)


def test_training_on_huge_runs_ends(tmp_path):
    texts = ["a" * 1_000_000, " " * 1_100_000 + "x"]
    tokenizer = train(tmp_path, texts, vocab_size=300, max_document_chars=2_000_000)
    assert tokenizer.decode(tokenizer.encode_ordinary("a" * 999)) == "a" * 999


def test_a_small_corpus_gives_the_vocabulary_that_it_reaches(tmp_path):
    lines = []
    tokenizer = train(tmp_path, ["hello hello"], RunContext(progress=lines.append), vocab_size=1000)
    assert tokenizer.vocab_size == len(set(tokens_of(tokenizer))) == len(tokenizer.token_bytes())
    assert 256 + 9 < tokenizer.vocab_size < 280
    assert f"{tokenizer.vocab_size} tokens of 1000" in lines[0]
    with pytest.raises(KeyError):
        tokenizer.decode_bytes([tokenizer.vocab_size])


def test_the_vocabulary_has_the_size_that_was_asked_for(tmp_path):
    lines = []
    assert train(tmp_path, ENGLISH, RunContext(progress=lines.append), vocab_size=300).vocab_size == 300
    assert lines == ["tokenizer: 300 tokens, learned from 4 documents"]


def test_learns_from_training_documents_within_the_limits(tmp_path):
    corpus = write_corpus(tmp_path, [["kkkkpppp", "mmmmmmmm"], ["wwwwwwww"], ENGLISH], ["vvvvvvvvvvvvvvv"] * 9)
    Path(corpus.shards[2].path).write_bytes(b"never read, since max_chars is reached before it")
    config = TokenizerConfig(vocab_size=400, max_document_chars=4, max_chars=10)
    merges = set(tokens_of(train_tokenizer(config, RunContext(), corpus))[256:-9])
    assert merges == {b"kk", b"kkkk", b"mm", b"mmmm", b"ww"}


def test_no_training_document(tmp_path):
    corpus = write_corpus(tmp_path, [])
    with pytest.raises(DataError, match="corpus=small: has no training document"):
        train_tokenizer(TokenizerConfig(), RunContext(), corpus)


def test_a_source_that_cannot_be_read_is_named(tmp_path):
    corpus = write_corpus(tmp_path, [ENGLISH])
    Path(corpus.shards[0].path).write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"source_0\.parquet"):
        train_tokenizer(TokenizerConfig(), RunContext(), corpus)


def test_the_same_text_gives_the_same_tokenizer_in_another_process(tmp_path):
    program = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[2])\n"
        "from small_corpus import ENGLISH, write_corpus\n"
        "from nanochat.data.tokenizer import RunContext, TokenizerConfig, train_tokenizer\n"
        "corpus = write_corpus(pathlib.Path(sys.argv[1]), [ENGLISH])\n"
        "print(train_tokenizer(TokenizerConfig(vocab_size=600), RunContext(), corpus).hash)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "there"), str(Path(__file__).parent)],
        env=os.environ | {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "3"},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert done.stdout.strip() == train(tmp_path / "here", ENGLISH, vocab_size=600).hash


def test_saved_and_loaded_and_pickled_is_the_same(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    assert base64.b64decode(content["merges"][0]) == tokenizer.decode_bytes([256])
    for other in (Tokenizer.load(str(tmp_path)), pickle.loads(pickle.dumps(tokenizer))):
        assert other.hash == tokenizer.hash == content["hash"]
        assert other.vocab_size == tokenizer.vocab_size
        assert other.encode_ordinary(" ".join(ENGLISH)) == tokenizer.encode_ordinary(" ".join(ENGLISH))


def test_the_hash_tells_tokenizers_apart():
    pattern = SPLIT_PATTERNS["nanochat"]
    merges = [b"ab", b"abc"]
    variants = [Tokenizer(merges, pattern), Tokenizer(merges[:1], pattern), Tokenizer([b"ab", b"abd"], pattern)]
    variants += [Tokenizer(merges[::-1], pattern), Tokenizer(merges, SPLIT_PATTERNS["unspaced"])]
    assert len({variant.hash for variant in variants}) == len(variants)


def test_ids_above_16_bits_get_a_wider_type():
    merges = [bytes([first, second]) for first in range(256) for second in range(256)]
    fits = Tokenizer(merges[: (1 << 16) - 256 - 9], SPLIT_PATTERNS["nanochat"])
    assert (fits.vocab_size, fits.dtype) == (1 << 16, np.uint16)
    wider = Tokenizer(merges[: (1 << 16) - 256 - 8], SPLIT_PATTERNS["nanochat"])
    assert (wider.vocab_size, wider.dtype) == ((1 << 16) + 1, np.uint32)
    assert wider.encode_batch_numpy(["a"])[0].dtype == np.uint32


def with_right_hash(content):
    return content | {"hash": storage.sha256_json({key: value for key, value in content.items() if key != "hash"})}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: b"\xff{", "is no JSON"),
        (lambda content: b"[]", "must have format"),
        (lambda content: content | {"version": 2}, "must have format"),
        (lambda content: content | {"merges": content["merges"][:-1]}, "hash"),
        (lambda content: content | {"hash": None}, "hash"),
        (lambda content: with_right_hash(content | {"merges": ["!"]}), "merges"),
        (lambda content: with_right_hash(content | {"merges": [7]}), "cannot be used"),
        (lambda content: with_right_hash(content | {"merges": ["YWI=", "YWI="]}), "must be new"),
        (lambda content: with_right_hash(content | {"merges": ["YWJj", "YWI="]}), "merge 0, b'abc', must .* join two"),
        (lambda content: with_right_hash(content | {"merges": ["YQ=="]}), "merge 0"),
        (lambda content: with_right_hash(content | {"merges": ["YWFh" * 1_000_000]}), "merge 0"),
        (lambda content: with_right_hash(content | {"merges": None}), "cannot be used"),
        (lambda content: with_right_hash(content | {"pattern": 7}), "split pattern"),
        (lambda content: with_right_hash(content | {"pattern": ""}), "split pattern is none of nanochat, unspaced"),
        (lambda content: with_right_hash(content | {"pattern": r"\w+"}), "split pattern"),
        (lambda content: with_right_hash(content | {"pattern": ["("]}), "split pattern"),
        (lambda content: with_right_hash(content | {"special_tokens": ["\x1b[2J" * 50_000]}), "special tokens"),
        (lambda content: b"[" * 100_000, "is no JSON"),
        (lambda content: b"9" * 10_000, "is no JSON"),
        (lambda content: b'{"format": [1, 2], "version": {}}', "must have format"),
        (lambda content: b" " * (1 << 26) + b"{}", "bytes are too many"),
        (lambda content: with_right_hash(content | {"special_tokens": ["<|bos|>"]}), "special tokens"),
        (lambda content: with_right_hash({key: content[key] for key in ("format", "version")}), "cannot be used"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage, words):
    path = tmp_path / "tokenizer.json"
    Tokenizer([b"ab", b"abc"], SPLIT_PATTERNS["nanochat"]).save(str(tmp_path))
    damaged = damage(json.loads(path.read_text()))
    path.write_bytes(damaged if isinstance(damaged, bytes) else json.dumps(damaged).encode())
    with pytest.raises(DataError, match=words) as caught:
        Tokenizer.load(str(tmp_path))
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer\.json: there is no such file\. Run ray_jobs/prepare_data"):
        Tokenizer.load(str(tmp_path))


@pytest.mark.parametrize("sentence", UNSPACED_SENTENCES)
def test_unspaced_sentences_are_cut_where_marks_stay_with_their_letters(tmp_path, sentence):
    pre_tokens = regex.findall(SPLIT_PATTERNS["unspaced"], sentence, flags=regex.V1)
    assert "".join(pre_tokens) == sentence
    assert len(pre_tokens) > 1
    for pre_token in pre_tokens:
        assert not regex.match(r"\p{M}|[\u0e30\u0e32]", pre_token), "a mark or a following vowel is cut off"
        assert not regex.search(r"[\u0e40-\u0e44\u17d2]$", pre_token), "a leading vowel or a joiner is cut off"
    # The whole sentence as one token is what the pattern is to prevent.
    tokenizer = train(tmp_path, [sentence] * 3, vocab_size=2000, split_pattern="unspaced")
    assert max(map(len, tokens_of(tokenizer)[:-9])) < len(sentence.encode())


def test_kana_after_han_stays_with_it():
    pre_tokens = regex.findall(SPLIT_PATTERNS["unspaced"], JAPANESE, flags=regex.V1)
    assert pre_tokens == [
        JAPANESE[0:2], JAPANESE[2:8], JAPANESE[8:12], JAPANESE[12:13], JAPANESE[13:],
    ]  # fmt: skip


def test_words_with_marks_are_whole_in_unspaced_only(tmp_path):
    unspaced, nanochat = (
        train(tmp_path / name, [HINDI] * 9, vocab_size=2000, split_pattern=name) for name in ("unspaced", "nanochat")
    )
    assert len(unspaced.encode_ordinary(HINDI)) == 3
    assert len(nanochat.encode_ordinary(HINDI)) > 3


HELD_OUT = ("The dog sleeps. ", "caf\u00e9 " * 3)


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path, [ENGLISH], list(HELD_OUT))


def test_report_bytes_per_token(corpus, monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: bytes_only(name))
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=400), RunContext(), corpus)
    report = compression_report(tokenizer, corpus)
    size = sum(len(text.encode()) for text in HELD_OUT)
    tokens = sum(len(tokenizer.encode_ordinary(text)) for text in HELD_OUT)
    assert (report["documents"], report["text_bytes"]) == (2, size)
    assert report["encodings"]["ours"] == {"vocab_size": 400, "tokens": tokens, "bytes_per_token": size / tokens}
    for name in ("gpt2", "cl100k_base"):
        assert report["encodings"][name] == {"vocab_size": 256, "tokens": size, "bytes_per_token": 1.0}
    json.dumps(report, allow_nan=False)


def test_report_without_network_the_references_say_why(corpus, monkeypatch):
    def refuse(name):
        raise requests.ConnectionError(f"no route to {name}")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    encodings = compression_report(Tokenizer([], SPLIT_PATTERNS["nanochat"]), corpus)["encodings"]
    assert encodings["ours"]["bytes_per_token"] == 1.0
    assert "no route to gpt2" in encodings["gpt2"]["skipped"]


def test_report_a_server_that_never_answers_does_not_hang(corpus, monkeypatch):
    released = threading.Event()
    asked = []
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: asked.append(name) or released.wait(30))
    assert tokenizer_module.REFERENCE_TIMEOUT_S <= 5
    monkeypatch.setattr(tokenizer_module, "REFERENCE_TIMEOUT_S", 0.01)
    encodings = compression_report(Tokenizer([], SPLIT_PATTERNS["nanochat"]), corpus)["encodings"]
    assert asked == ["gpt2"], "one wait is enough to know"
    released.set()
    assert "no answer" in encodings["gpt2"]["skipped"]
    assert "no answer" in encodings["cl100k_base"]["skipped"]


def test_report_reads_no_more_than_it_is_told(corpus, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "REFERENCE_ENCODINGS", ())
    monkeypatch.setattr(
        tokenizer_module, "read_documents", lambda shard, corpus, split, counts: one_by_one(HELD_OUT, counts)
    )
    assert compression_report(Tokenizer([], SPLIT_PATTERNS["nanochat"]), corpus, max_bytes=5)["documents"] == 1


def test_report_without_held_out_text(corpus):
    empty = SimpleNamespace(name="small", sources=lambda split: ())
    with pytest.raises(DataError, match="held-out"):
        compression_report(Tokenizer([], SPLIT_PATTERNS["nanochat"]), empty)


def bytes_only(name):
    ranks = {bytes([byte]): byte for byte in range(256)}
    return tiktoken.Encoding(name, pat_str=r"\s+|\S+", mergeable_ranks=ranks, special_tokens={})


def one_by_one(texts, counts):
    for text in texts:
        counts.text_bytes += len(text.encode())
        yield [text]
