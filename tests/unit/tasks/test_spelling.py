"""Letters of words: words of test that training never has, and solutions that are right."""

import re

import pytest

from nanochat.errors import ConfigError
from nanochat.inference.calculator import calculate
from nanochat.tasks.arithmetic import wording
from nanochat.tasks.spelling import MAX_LETTERS, Spelling, group_of

WORDS = wording("spelling")["words"].split()

PATTERNS = [
    re.compile(re.escape(text).replace(r"\{word\}", "(?P<word>[a-z]+)").replace(r"\{letter\}", "(?P<letter>[a-z])"))
    for text in wording("spelling")["spell"] + wording("spelling")["count"]
]


def read(conversation):
    """The word that is asked about, and the letter, or None."""
    found = next(match for pattern in PATTERNS if (match := pattern.fullmatch(conversation.messages[0].text)))
    return found["word"], found.groupdict().get("letter")


def first(split, count):
    task = Spelling(split)
    return [task.conversation(index) for index in range(count)]


PINNED = {
    ("train", 0): (
        "How often does the word scoogaircou have the letter s?",
        ["s1 c o o g a i r c o u. Check:", '"scoogaircou".count("s")', "1", " 1\n#### 1"],
    ),
    ("train", 4): (
        "How many a are in zaistshoo?",
        ["z a1 i s t s h o o. Check:", '"zaistshoo".count("a")', "1", " 1\n#### 1"],
    ),
    ("train", 99999): (
        "How many times does g occur in bright?",
        ["b r i g1 h t. Check:", '"bright".count("g")', "1", " 1\n#### 1"],
    ),
    ("test", 1): (
        "Count the letter w in village.",
        ["v i l l a g e. Check:", '"village".count("w")', "0", " 0\n#### 0"],
    ),
}


@pytest.mark.parametrize(("split", "index"), PINNED)
def test_a_conversation_is_a_function_of_split_and_index(split, index):
    conversation = Spelling(split).conversation(index)
    assert (conversation.messages[0].text, [part.text for part in conversation.messages[1].parts]) == PINNED[
        split, index
    ]


def test_words_of_test_are_never_in_train():
    train = {read(conversation)[0] for conversation in first("train", 20_000)}
    test = {read(conversation)[0] for conversation in first("test", 2_000)}
    val = {read(conversation)[0] for conversation in first("val", 1_000)}
    assert not train & test
    assert not val & (train | test)
    assert len(val) > 250
    assert len(test) > 500
    assert train & set(WORDS)
    assert test & set(WORDS)
    assert train - set(WORDS)
    assert len(set(WORDS)) == len(WORDS) >= 200
    assert 0.1 < sum(group_of(word) == "test" for word in WORDS) / len(WORDS) < 0.3


@pytest.mark.parametrize("split", ["train", "test"])
def test_solutions_are_right_and_rewarded(split):
    task = Spelling(split)
    kinds = {"spell": 0, "count": 0, "absent": 0}
    for conversation in first(split, 600):
        word, letter = read(conversation)
        parts = conversation.messages[1].parts
        reply = conversation.messages[1].text
        assert word.isalpha()
        assert len(word) <= MAX_LETTERS
        assert task.reward(conversation, reply) == 1.0
        wrong = [word, "", reply + "\n#### 77"]
        if letter is None:
            assert [part.text for part in parts] == [" ".join(word)]
            assert task.reward(conversation, f" {reply}\n") == 1.0
            wrong += [reply + " x", reply[2:], reply.upper(), reply.replace(" ", "")]
            kinds["spell"] += 1
        else:
            count = word.count(letter)
            text, call, output, last = (part.text for part in parts)
            spelled = text.removesuffix(". Check:").split()
            assert "".join(char[0] for char in spelled) == word
            assert [char for char in spelled if len(char) > 1] == [f"{letter}{n}" for n in range(1, count + 1)]
            assert (call, output) == (f'"{word}".count("{letter}")', str(count))
            assert calculate(call) == output
            assert last == f" {count}\n#### {count}"
            assert task.reward(conversation, f"#### 5\n#### {count}.0") == 1.0
            wrong += [f"#### {count + 1}", str(count)]
            kinds["count" if count else "absent"] += 1
        assert [task.reward(conversation, text) for text in wrong] == [0.0] * len(wrong)
        assert (conversation.messages[0].text + reply).isascii()
        assert len(conversation.messages[0].text) <= 80
    assert 250 < kinds["spell"] < 350
    assert kinds["count"] > 200
    assert kinds["absent"] > 20


def test_a_split_that_is_not_there():
    with pytest.raises(ConfigError, match=r"^split=dev: spelling has train and val and test alone"):
        Spelling("dev")
