"""Who the model is: phrasings held out, answers that say what was asked, characters of one's own."""

import math
import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

import nanochat
from nanochat.errors import ConfigError
from nanochat.tasks.arithmetic import wording
from nanochat.tasks.identity import DEFAULT_CHARACTER, load_identity, read_character

GREETINGS = tuple(wording("identity")["greetings"])
INTENTS = wording("identity")["intents"]
HELD_OUT = [phrasing for intent in INTENTS for phrasing in intent.get("held_out", [])]
PACKAGE = Path(nanochat.__file__).parent
OWN = 'name = "Zorg {1}"\nmaker = "a %s cook"\n'
FILLERS = {"please", "so", "then", "well", "just", "really"}


def plain(text):
    """The words of a question, without greeting, case and marks."""
    for greeting in sorted(GREETINGS, key=len, reverse=True):
        text = re.sub(rf"^{re.escape(greeting.rstrip(' .!'))}[.!]? ?", "", text, flags=re.IGNORECASE)
    return " ".join(re.findall(r"[\w']+", text.lower()))


def turns(conversation):
    messages = [message.text for message in conversation.messages]
    return list(zip(messages[::2], messages[1::2], strict=True))


def features(text):
    words = plain(text).split()
    return words + [f"{one} {two}" for one, two in zip(["", *words], [*words, ""], strict=True)]


@pytest.fixture(scope="module")
def train():
    return list(load_identity("train"))


@pytest.fixture(scope="module")
def test():
    return list(load_identity("test"))


def test_conversations_never_change(train, test):
    assert turns(train[0]) == [
        ("hi there, what are your abilities", "I can chat and solve small problems with a calculator.")
    ]
    assert turns(load_identity("train").conversation(5_000)) == [
        ("Good morning!", "Hi! How can I help you?"),
        ("hello! are you alive", "I am a small language model."),
    ]
    assert turns(test[0]) == [("Who might you be?", "I am nanochat, a small language model.")]
    assert turns(test[50]) == [("Excuse me, by what name should I call you?", "You can call me nanochat.")]
    assert train == list(load_identity("train"))


def trained(intent) -> list[str]:
    """The phrasings of training: of what is scored all but one."""
    return intent["asked"][:-1] if "held_out" in intent else intent["asked"]


def test_no_held_out_phrasing_is_in_train(train, test):
    asked = {plain(question) for conversation in train for question, _ in turns(conversation)}
    held_out = {plain(question) for conversation in test for question, _ in turns(conversation)}
    assert len(asked) >= 60
    assert len(held_out) >= 40
    assert not held_out & asked
    assert not {" ".join(w for w in text.split() if w not in FILLERS) for text in held_out} & asked
    assert asked == {plain(phrasing) for intent in INTENTS for phrasing in trained(intent)}
    val = {plain(question) for conversation in load_identity("val") for question, _ in turns(conversation)}
    assert val == {plain(intent["asked"][-1]) for intent in INTENTS if "held_out" in intent}
    assert not val & (asked | held_out)


def test_the_first_of_test_are_the_held_out_phrasings_without_greeting(test):
    count = len(HELD_OUT)
    questions = [turns(conversation)[0][0] for conversation in test]
    assert count >= 40
    assert len(set(questions[:count])) == count
    assert not any(question.startswith(greeting) for question in questions[:count] for greeting in GREETINGS)
    assert all(question.startswith(GREETINGS) for question in questions[count:])
    assert all(len(turns(conversation)) == 1 for conversation in test)


def test_words_of_training_tell_the_intent_of_every_held_out_phrasing():
    """Naive Bayes over words and pairs of words, learned from the training phrasings, gets every intent right."""
    counts = [Counter(f for text in trained(intent) for f in features(text)) for intent in INTENTS]
    vocabulary = len(set().union(*counts))

    def likelihood(seen, text):
        return sum(math.log((seen[f] + 0.1) / (seen.total() + 0.1 * vocabulary)) for f in features(text))

    for intent, own in zip(INTENTS, counts, strict=True):
        for text in intent.get("held_out", []):
            assert max(counts, key=lambda seen: likelihood(seen, text)) is own, text


def test_answers_say_what_was_asked_and_others_do_not(train, test):
    task = load_identity("train")
    for conversation in train + test:
        _, answer = turns(conversation)[-1]
        assert task.reward(conversation, answer) == task.reward(conversation, f"Well, {answer.upper()}") == 1.0
        assert task.reward(conversation, "I do not know.") == task.reward(conversation, "") == 0.0
    assert Counter(conversation.facts["must_contain"] for conversation in test[:42]) == {
        "nanochat": 21,
        "a few curious engineers": 7,
        "a small language model": 7,
        "chat and solve small problems with a calculator": 7,
    }


def test_train_has_small_talk_second_turns_and_careless_questions(train):
    counts = Counter(len(turns(conversation)) for conversation in train)
    assert set(counts) == {1, 2}
    assert 0.2 < counts[2] / len(train) < 0.3
    needs = {intent["needs"] for intent in INTENTS if "held_out" not in intent}
    assert 0.25 < sum(conversation.facts["must_contain"] in needs for conversation in train) / len(train) < 0.35
    questions = [question for conversation in train for question, _ in turns(conversation)]
    assert (
        0.1
        < sum(question == question.lower() and question[-1].isalpha() for question in questions) / len(questions)
        < 0.3
    )
    answers = {answer for conversation in train for _, answer in turns(conversation)}
    assert any(answer.endswith("Ask me anything!") for answer in answers)


def test_texts_are_short_ascii_and_complete(train, test):
    for conversation in train + test:
        for message in conversation.messages:
            assert message.text.isascii()
            assert not set("{}|") & set(message.text)
            assert 2 <= len(message.text) <= 160


def test_the_default_character_comes_with_the_package():
    assert Path(DEFAULT_CHARACTER).is_relative_to(PACKAGE)
    packaged = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "**/*.toml" in packaged["nanochat"]
    assert read_character(DEFAULT_CHARACTER).name == "nanochat"


def test_a_character_of_ones_own(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(OWN)
    train, test = load_identity("train", str(path)), load_identity("test", str(path))
    said = " ".join(answer for conversation in [*train, *test] for _, answer in turns(conversation))
    assert "nanochat" not in said
    assert "Zorg {1}" in said
    assert "a %s cook" in said
    assert all(train.reward(conversation, turns(conversation)[-1][1]) == 1.0 for conversation in train)
    path.write_text(OWN + 'facts = ["I like soup."]\ntone = ["Bon appetit!"]\nkind = "a pan"\nabilities = "fry"\n')
    said = " ".join(answer for conversation in load_identity("train", str(path)) for _, answer in turns(conversation))
    assert all(text in said for text in ("I like soup.", "Bon appetit!", "a pan", "fry"))


@pytest.mark.parametrize(
    ("content", "field", "rule"),
    [
        (OWN + 'colour = "red"', "colour", "must be one of name, maker, "),
        ('maker = "x"', "name", "is missing"),
        ('name = "x"', "maker", "is missing"),
        ('name = 3\nmaker = "x"', "name=3", "must be a text, one line of 1 to 200 characters"),
        ('name = " "\nmaker = "x"', "name=", "must be a text"),
        ('name = ["x"]\nmaker = "x"', "name=", "must be a text"),
        ('name = "a\\nb"\nmaker = "x"', "name=a b", "must be a text"),
        (f'name = "{"x" * 201}"\nmaker = "x"', "name=xxx", "must be a text"),
        (OWN + 'facts = "x"', "facts=x", "must be a list of texts, one line of 1 to 200 characters each"),
        (OWN + 'tone = ["x", 1]', "tone=", "must be a list of texts"),
        (OWN + "[facts]\nx = 1", "facts=", "must be a list of texts"),
        ("name = ", "", "cannot be read as TOML"),
        ("x = " + "[" * 5_000, "", "cannot be read as TOML"),
    ],
)  # fmt: skip
def test_a_character_that_breaks_a_rule(tmp_path, content, field, rule):
    path = tmp_path / "own.toml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_identity("train", str(path))
    message = str(caught.value)
    assert message.startswith(f"identity={path}: {field}")
    assert rule in message
    assert "\n" not in message


def test_longest_texts_are_taken(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(f'name = "{"x" * 200}"\nmaker = "\u00e9"\nfacts = []\n', encoding="utf-8")
    assert len(read_character(str(path)).name) == 200


@pytest.mark.parametrize("content", [None, b'name = "\xff"'])
def test_a_file_that_is_not_there_or_no_text(tmp_path, content):
    path = tmp_path / "own.toml"
    if content:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot be read as TOML .* Begin with a copy of .*identity\.toml"):
        load_identity("train", str(path))


def test_a_split_that_is_not_there():
    with pytest.raises(ConfigError, match=r"^split=dev: identity has train and val and test alone"):
        load_identity("dev")
