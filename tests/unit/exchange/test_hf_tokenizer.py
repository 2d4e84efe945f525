"""tokenizer.json and its config: the ids that Hugging Face's own libraries make of them are ours."""

import base64
import itertools
import json
from functools import cache

import pyarrow.parquet as pq
import pytest
import tiktoken
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_tokenizer import TEXTS, anything, auto_tokenizer, ids_of, loaded, ours, trained, write_folder
from tokenizers import Regex, pre_tokenizers
from transformers.convert_slow_tokenizer import TikTokenConverter

from nanochat.data.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERNS, Tokenizer
from nanochat.errors import ConfigError, DataError
from nanochat.exchange import hf_tokenizer
from nanochat.exchange.hf_tokenizer import tokenizer_from_json, tokenizer_json

CLASSES = (
    r"\p{L}", r"\p{M}", r"\p{N}", r"\s", r"\p{Han}", r"\p{Hiragana}", r"\p{Katakana}", r"\p{Thai}", r"\p{Lao}",
    r"\p{Khmer}", r"\p{Myanmar}", "(?i:[sdmt])", "(?i:[lver])",
)  # fmt: skip
BYTES_ONLY = {bytes([byte]): byte for byte in range(256)}


@cache
def theirs(name: str = "nanochat") -> tokenizers.Tokenizer:
    """The same, of which a special token's name in a text is text: so that all texts can be compared."""
    tokenizer = loaded(ours(name))
    tokenizer.encode_special_tokens = True
    return tokenizer


# Cutting: two engines, one meaning.


def cut_by_fancy_regex(pattern: str, text: str) -> list[str]:
    """Return the pieces that tiktoken cuts: where every stretch of a text is a token, each piece is one."""
    stretches = {text[start:end].encode() for start, end in itertools.combinations(range(len(text) + 1), 2)}
    ranks = BYTES_ONLY | {token: 256 + rank for rank, token in enumerate(stretches - BYTES_ONLY.keys())}
    encoding = tiktoken.Encoding("cuts", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return [encoding.decode_bytes([token]).decode() for token in encoding.encode_ordinary(text)]


def cut_by_oniguruma(pattern: str, text: str) -> list[str]:
    return [piece for piece, _ in pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text)]


@pytest.mark.parametrize("name", SPLIT_PATTERNS)
@settings(max_examples=150)
@given(text=anything)
@example(text="it's IT'S'\u017f'LLama 'Re're'x \t\n\n  \r\n x\u3000 \n")
@example(
    text="\u0e40\u0e01\u0e32\u200b\u1780\u17d2\u1780\u0301\u4e00\u0301\u3042\u30fc\u30a2\u30fc\u3099 \u0301a\u0301"
)
def test_both_engines_cut_alike(name, text):
    assert cut_by_oniguruma(SPLIT_PATTERNS[name], text) == cut_by_fancy_regex(SPLIT_PATTERNS[name], text)


@cache
def blocks_of_unicode() -> list[str]:
    codes = [*range(0xD800), *range(0xE000, 0x110000)]
    return ["".join(map(chr, codes[start : start + 4096])) for start in range(0, len(codes), 4096)]


@pytest.mark.parametrize("pattern", CLASSES)
def test_both_engines_know_the_same_characters(pattern):
    """The two may be built of different versions of Unicode: then a new script's letters would be cut apart in one."""
    encoding = tiktoken.Encoding("class", pat_str=pattern, mergeable_ranks=BYTES_ONLY, special_tokens={})
    splitter = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    count = 0
    for block in blocks_of_unicode():
        found = bytes(encoding.encode_ordinary(block)).decode()  # of what matches nothing it makes no token
        assert "".join(piece for piece, _ in splitter.pre_tokenize_str(block)) == found
        count += len(found)
    assert count >= 8


# Ids.


@pytest.mark.parametrize("name", SPLIT_PATTERNS)
@settings(max_examples=300)
@given(text=anything | st.lists(st.sampled_from([*TEXTS, *SPECIAL_TOKENS, "  ", "\n"])).map("".join))
def test_every_text_has_the_same_ids(name, text):
    assert ids_of(theirs(name), text) == ours(name).encode_ordinary(text)
    assert theirs(name).decode(ours(name).encode_ordinary(text)) == text


@st.composite
def vocabularies(draw):
    """Tokens that join any two before them: what no training makes, but a file can hold."""
    known = [b"a", b"b"]
    for _ in range(draw(st.integers(1, 14))):
        token = draw(st.sampled_from(known)) + draw(st.sampled_from(known))
        if token not in known and len(token) <= 16:
            known.append(token)
    return known[2:]


@settings(max_examples=200)
@given(merges=vocabularies(), texts=st.lists(st.text("ab", max_size=40), min_size=1, max_size=10))
@example(merges=[b"aa", b"aab", b"ab"], texts=["aab", "ab", "aaab"])
@example(merges=[b"bc", b"abc", b"ab"], texts=["abc"])
def test_any_vocabulary_has_the_same_ids(merges, texts):
    tokenizer = Tokenizer(merges, SPLIT_PATTERNS["nanochat"])
    other = loaded(tokenizer)
    for text in texts:
        assert ids_of(other, text) == tokenizer.encode_ordinary(text)


def test_every_pair_is_listed_at_the_place_of_what_it_makes():
    model = tokenizer_json(Tokenizer([b" a", b"bc", b" abc", b" ab"], SPLIT_PATTERNS["nanochat"]))["model"]
    assert model["merges"] == ["\u0120 a", "b c", "\u0120a bc", "\u0120ab c", "\u0120a b"]
    assert [model["vocab"][token] for token in ("\u0120", "!", "\u0100", "\u00ff", "\u0143")] == [32, 33, 0, 255, 173]


@pytest.mark.parametrize("name", SPLIT_PATTERNS)
@pytest.mark.parametrize("unit", ["a", " ", "\n", "\u4e2d", "\u0e01", "\u0301", "!"], ids=ascii)
def test_a_long_text_without_a_break_has_the_same_ids(name, unit):
    text = unit * 50_000 + "x"
    assert ids_of(theirs(name), text) == ours(name).encode_ordinary(text)


@pytest.mark.parametrize("name", SPLIT_PATTERNS)
def test_real_text_has_the_same_ids(test_data, name):
    paths = sorted((test_data / "text" / "web_text").glob("*.parquet"))
    seen, unseen = (pq.read_table(path)["text"].to_pylist() for path in (paths[0], paths[-1]))
    tokenizer = trained(seen, 8192, SPLIT_PATTERNS[name])
    other = loaded(tokenizer)
    other.encode_special_tokens = True
    for text in [*seen, *unseen, (test_data / "text" / "tinyshakespeare.txt").read_text()[:200_000]]:
        assert ids_of(other, text) == tokenizer.encode_ordinary(text)
    assert tokenizer_from_json(tokenizer_json(tokenizer), "x").hash == tokenizer.hash


def test_bos_begins_what_is_encoded_with_special_tokens_and_names_become_them():
    tokenizer, other = ours(), loaded(ours())
    plain = tokenizer.encode_ordinary("a b")
    assert other.encode("a b").ids == [tokenizer.bos, *plain]
    assert other.encode("a b", "a b").ids == [tokenizer.bos, *plain, tokenizer.bos, *plain]
    for name in SPECIAL_TOKENS:
        assert ids_of(other, f"a b{name} a b") == [*plain, tokenizer.special(name), *tokenizer.encode_ordinary(" a b")]
        assert other.decode([*plain, tokenizer.special(name)], skip_special_tokens=False) == f"a b{name}"
        assert other.decode([*plain, tokenizer.special(name)]) == "a b"
    assert other.get_vocab_size() == tokenizer.vocab_size


def test_what_cannot_be_expressed_is_refused():
    with pytest.raises(ConfigError, match=r"^split_pattern=\\w\+\|\\W\+: only nanochat and unspaced"):
        tokenizer_json(Tokenizer([b"ab"], r"\w+|\W+"))
    name = b"<|bos|>"
    with pytest.raises(ConfigError, match=r"^vocabulary=<\|bos\|>: is text as well as"):
        tokenizer_json(Tokenizer([name[: end + 1] for end in range(1, len(name))], SPLIT_PATTERNS["nanochat"]))


# Back.


@pytest.mark.parametrize("name", SPLIT_PATTERNS)
def test_it_comes_back_with_its_hash(name):
    content = json.loads(json.dumps(tokenizer_json(ours(name))))
    assert tokenizer_from_json(content, "x").hash == ours(name).hash
    saved = json.loads(loaded(ours(name)).to_str())  # as the library writes it, merges as lists of two
    assert saved["model"]["merges"][0] == content["model"]["merges"][0].split(" ")
    assert tokenizer_from_json(saved, "x").hash == ours(name).hash


@settings(max_examples=50)
@given(merges=vocabularies())
def test_any_vocabulary_comes_back(merges):
    tokenizer = Tokenizer(merges, SPLIT_PATTERNS["unspaced"])
    assert tokenizer_from_json(tokenizer_json(tokenizer), "x").hash == tokenizer.hash


def converted(folder) -> dict:
    """Return what transformers' converter makes of nanochat's tokenizer: the form of NanoChat models elsewhere."""
    tokens = [ours().decode_bytes([token]) for token in range(ours().bos)]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (folder / "tokenizer.tiktoken").write_text("".join(lines))
    converter = TikTokenConverter(
        str(folder / "tokenizer.tiktoken"), SPLIT_PATTERNS["nanochat"], extra_special_tokens=list(SPECIAL_TOKENS)
    )
    return json.loads(converter.converted().to_str())


def test_a_file_made_of_nanochats_own_tokenizer_is_read(tmp_path):
    content = converted(tmp_path)
    assert tokenizer_from_json(content, "x").hash == ours().hash
    content["model"]["vocab"] |= {name: ours().special(name) for name in SPECIAL_TOKENS}
    content["truncation"] = {"max_length": 4}
    assert tokenizer_from_json(content, "x").hash == ours().hash
    content["model"]["vocab"]["<|bos|>"] = 5
    with pytest.raises(DataError, match=rf"model.vocab id of <\|bos\|>=5: must be {ours().bos}, after all other"):
        tokenizer_from_json(content, "x")


SMALL = Tokenizer([b" a", b"bc", b" abc", b" ab"], SPLIT_PATTERNS["nanochat"])
MISSING = object()
CUT = ("pre_tokenizer", "pretokenizers")
NO_REGEX = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def changed(content, path, value):
    """Return a copy of a JSON value with another one at a path; MISSING takes the key away."""
    content = json.loads(json.dumps(content))
    at = content
    for key in path[:-1]:
        at = at[key]
    if value is MISSING:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return content


def exchanged(content, first, second):
    """Return a copy with the ids of two tokens exchanged."""
    vocab = content["model"]["vocab"]
    vocab = vocab | {first: vocab[second], second: vocab[first]}
    return changed(content, ("model", "vocab"), vocab)


def test_the_small_file_is_read_before_it_is_damaged():
    assert tokenizer_from_json(tokenizer_json(SMALL), "x").hash == SMALL.hash


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("normalizer",), {"type": "NFC"}, "normalizer=dict: must be None"),
        (("pre_tokenizer",), NO_REGEX, "pre_tokenizer.type=ByteLevel: must be 'Sequence'"),
        (("pre_tokenizer",), MISSING, "pre_tokenizer.type=None"),
        ((*CUT, 0, "pattern"), {"Regex": r"\w+"}, r"Regex=\w+: must be one of split_pattern's, nanochat or unspaced"),
        ((*CUT, 0, "pattern"), {"String": SPLIT_PATTERNS["nanochat"]}, "Regex=None"),
        ((*CUT, 0, "behavior"), "Removed", "behavior=Removed: must be 'Isolated'"),
        ((*CUT, 0, "invert"), True, "invert=True: must be False"),
        ((*CUT, 1, "type"), "Metaspace", "pretokenizers.1.type=Metaspace: must be 'ByteLevel'"),
        ((*CUT, 1, "add_prefix_space"), True, "add_prefix_space=True"),
        ((*CUT, 1, "use_regex"), MISSING, "use_regex=None: must be False"),
        (CUT, [], "pretokenizers.0.type=None"),
        (CUT, [*tokenizer_json(SMALL)["pre_tokenizer"]["pretokenizers"], {"type": "Digits"}], "pretokenizers.2=dict"),
        (("decoder",), None, "decoder.type=None: must be 'ByteLevel'"),
        (("model", "type"), "Unigram", "model.type=Unigram: must be 'BPE'"),
        (("model", "ignore_merges"), False, "ignore_merges=False: must be True"),
        (("model", "dropout"), 0.1, "dropout=0.1: must be None"),
        (("model", "continuing_subword_prefix"), "##", "prefix=##: must be None or ''"),
        (("model", "end_of_word_suffix"), "</w>", "end_of_word_suffix=</w>"),
        (("model", "vocab"), None, "model.vocab=None: must be an object of 256 to"),
        (("model", "vocab"), {"a": 0}, "model.vocab=dict: must be an object of 256 to"),
        (("model", "vocab", "\u0120abc"), 300, "model.vocab id=300: must be one of 0 to 259, each once"),
        (("model", "vocab", "\u0120abc"), 256, "each once"),
        (("model", "vocab", "\u0120abc"), -1, "each once"),
        (("model", "vocab", "\u0120abc"), "258", "id=258: must be one of"),
        (("model", "vocab", "\u0120abc"), 258.0, "each once"),
        (("model", "vocab", "\u0120abc"), MISSING, "must be one of 0 to 258"),
        (("model", "vocab", "a b"), 260, "token=a b: must be spelled with GPT-2's characters"),
        (("model", "vocab", "\u4e2d"), 260, "token=\u4e2d: must be spelled"),
        (("model", "vocab", "<|user_end|>"), 260, "id of <|user_end|>=260: must be 262, after all other tokens"),
        (("added_tokens",), [], "added_tokens=None: must be <|bos|> with id 260 here"),
        (("added_tokens",), {}, "must be <|bos|> with id 260 here"),
        (("added_tokens", 0, "id"), 261, "must be <|bos|> with id 260 here"),
        (("added_tokens", 3, "content"), "<|pad|>", "=<|pad|>: must be <|assistant_start|> with id 263 here"),
        (("added_tokens", 8), MISSING, "must be <|output_end|> with id 268 here"),
        (("added_tokens", 8), {"id": [], "content": {}}, "=dict: must be <|output_end|> with id 268"),
        (("model", "merges"), None, "model.merges=None: must be a list"),
        (("model", "merges", 4), MISSING, "merges[4]=None: must be all 1 pairs of token 259, in its place"),
        (("model", "merges", 3), MISSING, "merges[2]=\u0120a bc: must be all 2 pairs of token 258"),
        (("model", "merges", 0), "b c", "merges[0]=b c: must be all 1 pairs of token 256"),
        (("model", "merges", 2), "\u0120 abc", "merges[2]="),
        (("model", "merges", 1), ["b", "c", ""], "merges[1]=list"),
        (("model", "merges", 1), ["b", 7], "merges[1]=list"),
        (("model", "merges", 1), 7, "merges[1]=7"),
    ],
)  # fmt: skip
def test_what_would_give_other_ids_is_refused(path, value, words):
    with pytest.raises(DataError) as caught:
        tokenizer_from_json(changed(tokenizer_json(SMALL), path, value), "models/x/tokenizer.json")
    message = str(caught.value)
    assert message.startswith("models/x/tokenizer.json: ")
    assert words in message
    assert message.endswith(" Name the tokenizer.json of a nanochat model.")
    assert message.isprintable()


def test_another_order_is_refused():
    content = tokenizer_json(SMALL)
    with pytest.raises(DataError, match="ids 0 to 255=list: must be the 256 bytes in order"):
        tokenizer_from_json(exchanged(content, "a", "b"), "x")
    with pytest.raises(DataError, match="token=\u0120abc: must be a join of two tokens before it"):
        tokenizer_from_json(exchanged(content, "bc", "\u0120abc"), "x")
    for other in ("xyz", ""):
        vocab = {other if rank == 259 else token: rank for token, rank in content["model"]["vocab"].items()}
        with pytest.raises(DataError, match=f"token={other}: must be a join of two tokens before it"):
            tokenizer_from_json(changed(content, ("model", "vocab"), vocab), "x")
    added = content["added_tokens"]
    with pytest.raises(DataError, match=r"added_tokens=<\|user_start\|>: must be <\|bos\|> with id 260"):
        tokenizer_from_json(changed(content, ("added_tokens",), [added[1], added[0], *added[2:]]), "x")
    more = [*added, {"id": 269, "content": "<|pad|>"}]
    with pytest.raises(DataError, match=r"added_tokens=<\|pad\|>: must be these nine and no other"):
        tokenizer_from_json(changed(content, ("added_tokens",), more), "x")
    merges = [*content["model"]["merges"], "\u0120 ab"]
    with pytest.raises(DataError, match=r"merges\[5\]=\u0120 ab: must be the end"):
        tokenizer_from_json(changed(content, ("model", "merges"), merges), "x")


def test_a_vocabulary_that_would_take_hours_is_refused(monkeypatch):
    long = Tokenizer([b"a" * (1 << power) for power in range(1, 13)], SPLIT_PATTERNS["nanochat"])
    assert tokenizer_from_json(tokenizer_json(long), "x").hash == long.hash
    monkeypatch.setattr(hf_tokenizer, "MOST_SQUARED_BYTES", 1 << 24)
    with pytest.raises(DataError, match="squared lengths of tokens sum to at most 16777216"):
        tokenizer_from_json(tokenizer_json(long), "x")
    monkeypatch.setattr(hf_tokenizer, "MOST_TOKENS", 267)
    with pytest.raises(DataError, match="an object of 256 to 267 tokens"):
        tokenizer_from_json(tokenizer_json(long), "x")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just("\x1b[2J" * 999),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=9,
)


@given(content=json_values)
def test_any_json_is_refused_without_a_crash(content):
    with pytest.raises(DataError, match=r"^x: "):
        tokenizer_from_json(content, "x")


def paths_of(content, depth=5):
    keys = list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in list(keys)[-12:] if depth else ():
        yield (key,)
        yield from ((key, *path) for path in paths_of(content[key], depth - 1))


@settings(max_examples=300)
@given(path=st.sampled_from(list(paths_of(tokenizer_json(SMALL)))), value=json_values)
def test_any_change_is_refused_or_changes_nothing(path, value):
    message = ""
    try:
        found = tokenizer_from_json(changed(tokenizer_json(SMALL), path, value), "x")
    except DataError as err:
        found, message = SMALL, str(err)
    assert found.hash == SMALL.hash
    assert len(message) < 500
    assert message.isprintable()


def test_what_cannot_be_written_is_refused_without_a_crash():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    paths = (("normalizer",), ("model", "merges", 0), ("model", "vocab", "\u0120abc"), ("added_tokens", 0))
    for path, value in itertools.product(paths, (deep, 10**5000)):
        content = at = tokenizer_json(SMALL)
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        with pytest.raises(DataError):
            tokenizer_from_json(content, "x")


# A folder in transformers.


@pytest.mark.parametrize("model_type", ["nanochat", "nanochat_on_ray"])
@pytest.mark.parametrize("is_chat", [True, False])
def test_a_folder_loads_with_its_special_tokens(tmp_path, model_type, is_chat):
    tokenizer = ours()
    write_folder(tmp_path, tokenizer, {"model_type": model_type}, is_chat)
    loaded_one = auto_tokenizer(tmp_path)
    end = tokenizer.special("<|assistant_end|>" if is_chat else "<|bos|>")
    found = (loaded_one.bos_token_id, loaded_one.eos_token_id, loaded_one.pad_token_id)
    assert found == (tokenizer.bos, end, tokenizer.bos)
    assert sorted(loaded_one.all_special_ids) == list(range(tokenizer.bos, tokenizer.vocab_size))
    assert (len(loaded_one), loaded_one.model_max_length) == (tokenizer.vocab_size, 64)
    ids = tokenizer.encode_ordinary(" don 't , you .")
    assert dict(loaded_one(" don 't , you .")) == {
        "input_ids": [tokenizer.bos, *ids], "attention_mask": [1] * (len(ids) + 1),
    }  # fmt: skip
    assert loaded_one.decode([*ids, end], skip_special_tokens=True) == " don 't , you ."
    assert bool(loaded_one.chat_template) is is_chat
    assert loaded_one.clean_up_tokenization_spaces is False
    loaded_one.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "tokenizer.json").read_text())
    assert tokenizer_from_json(again, "x").hash == tokenizer.hash
    assert auto_tokenizer(tmp_path / "again")(" don 't , you .")["input_ids"] == [tokenizer.bos, *ids]
