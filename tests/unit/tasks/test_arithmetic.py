"""Word problems: what is held out, that the solutions are right, and that nothing ever changes them."""

import re

import pytest

from nanochat.errors import ConfigError
from nanochat.inference.calculator import calculate
from nanochat.tasks.arithmetic import LARGEST, Arithmetic, Draws, group_of, wording

SPLITS = tuple(Arithmetic.sizes)


def question(conversation):
    return conversation.messages[0].text


def solution(conversation):
    """Text, calls in brackets, outputs in angles."""
    marks = {"text": "{}", "python": "[{}]", "python_output": "<{}>"}
    return "".join(marks[part.kind].format(part.text) for part in conversation.messages[1].parts)


def calls(conversation):
    """Expression and output of each call."""
    texts = [part.text for part in conversation.messages[1].parts if part.kind != "text"]
    return list(zip(texts[::2], texts[1::2], strict=True))


def pairs(conversation):
    """The two numbers of each call, whatever their order, as numbers."""
    return {tuple(sorted(map(float, re.split(r"[-+*/]", call)))) for call, _ in calls(conversation)}


def first(split, count):
    task = Arithmetic(split)
    return [task.conversation(index) for index in range(count)]


@pytest.fixture(scope="module")
def train():
    return first("train", 20_000)


@pytest.fixture(scope="module")
def trained(train):
    """All pairs of numbers of train, and of many problems that RL trains on."""
    return set().union(*map(pairs, train + first("two_step", 2_000)))


PINNED = {
    ("train", 0): (
        "A shop sold 4 oranges on Monday and 436 on Tuesday. How many oranges did it sell in total?",
        "Add:[4+436]<440> 440 oranges.\n#### 440",
    ),
    ("train", 123456): (
        "Vera puts 48 leaves into 6 boxes, the same number in each. How many leaves are in each box?",
        "Divide:[48/6]<8> 8 leaves.\n#### 8",
    ),
    ("val", 0): (
        "Carl has 47 bricks and takes 27 more. How many bricks does Carl have now?",
        "Add:[47+27]<74> 74 bricks.\n#### 74",
    ),
    ("test", 0): (
        "Nina has 794 keys and finds 16 more. How many keys does Nina have now?",
        "Add:[794+16]<810> 810 keys.\n#### 810",
    ),
    ("test", 1): (
        "Mia shares 255 pictures equally among 3 friends. How many pictures does each friend get?",
        "Divide:[255/3]<85> 85 pictures.\n#### 85",
    ),
    ("test", 3): (
        "Ines has $1.25 and pays $0.75 for a meal. How much money is left?",
        "Subtract:[1.25-0.75]<0.5> 0.5 dollars.\n#### 0.5",
    ),
    ("test_templates", 0): (
        "Dan gets 25 dollars each hour. How many dollars does Dan get in 8 hours?",
        "Multiply:[25*8]<200> 200 dollars.\n#### 200",
    ),
    ("two_step", 0): (
        "Ruth buys 9 bags of 21 maps and sells 95. How many maps does Ruth have left?",
        "Multiply:[9*21]<189> 189. Subtract:[189-95]<94> 94 maps.\n#### 94",
    ),
    ("two_step_test", 1): (
        "Carl has 55 books and Ella has 17. They pack all of them into bags of 12. How many bags do they fill?",
        "Add:[55+17]<72> 72. Divide:[72/12]<6> 6 bags.\n#### 6",
    ),
}


@pytest.mark.parametrize(("split", "index"), PINNED)
def test_a_problem_is_a_function_of_split_and_index(split, index):
    problem = Arithmetic(split).conversation(index)
    assert (question(problem), solution(problem)) == PINNED[split, index]


def test_draws_are_the_seeded_generator_that_python_promises():
    draws = Draws("arithmetic", "train", 0)
    assert [draws.between(1, 1000) for _ in range(4)] == [441, 159, 115, 146]
    sides = {Draws(number).between(2, 4) for number in range(100)}
    assert sides == {2, 3, 4}


@pytest.mark.parametrize(
    ("split", "count"), [("val", 500), ("test", 1_000), ("test_templates", 1_000), ("two_step_test", 150)]
)
def test_no_pair_of_numbers_that_is_scored_was_trained_on(split, count, trained):
    seen = set().union(*map(pairs, first(split, count)))
    assert len(seen) > count / 2
    assert not seen & trained
    if split != "val":
        assert not seen & set().union(*map(pairs, first("val", 500)))


def test_a_pair_belongs_to_one_group_whatever_its_order_and_form():
    numbers = [str(number) for number in range(2, 150)]
    groups = {(left, right): group_of(left, right) for left in numbers for right in numbers}
    assert all(group == groups[right, left] for (left, right), group in groups.items())
    assert group_of("2", "3.50") == group_of("3.5", "2.00")
    shares = {name: list(groups.values()).count(name) / len(groups) for name in ("train", "val", "test")}
    assert shares == pytest.approx({"train": 0.8, "val": 0.1, "test": 0.1}, abs=0.02)


def skeletons(problems):
    """The wordings of questions: numbers, people, things and verbs are taken out."""
    texts = wording("arithmetic")
    words = [*texts["names"].split(), *texts["things"].split(), *texts["gains"], *texts["loses"]]
    pattern = re.compile(rf"[0-9.]*[0-9]|\b(?:{'|'.join(words)})\b")
    return {pattern.sub("_", question(problem)) for problem in problems}


def test_test_has_the_wordings_of_train_and_test_templates_has_others(train):
    seen = skeletons(train[:1_500])
    test, unseen, two_steps = (skeletons(first(split, 300)) for split in ("test", "test_templates", "two_step"))
    assert test == seen - two_steps
    assert len(test) >= 30
    assert len(unseen) >= 10
    assert len(two_steps) >= 10
    assert not unseen & (seen | two_steps)
    assert skeletons(first("two_step_test", 100)) == two_steps


def test_a_small_share_of_train_has_two_steps(train):
    counts = [len(calls(problem)) for problem in train]
    assert set(counts) == {1, 2}
    assert 0.04 < counts.count(2) / len(counts) < 0.06


SIGNS = {
    "/": "equally|the same number|equal|bags of|pages does .* fill",
    "*": "in each|each of them|each day|each hour|One ticket|A pen",
    "-": "left|more .* (than|need)|not red",
    "+": "now|in all|together|total|both|before|two pick",
}
"""What in a question says its operation, to a reader who takes the first that fits."""


@pytest.mark.parametrize("split", ["test", "test_templates"])
def test_the_call_is_what_the_question_asks_for(split):
    for problem in first(split, 400):
        expected = next(sign for sign, words in SIGNS.items() if re.search(words, question(problem)))
        assert re.sub(r"[0-9.]", "", calls(problem)[0][0]) == expected, question(problem)


@pytest.mark.parametrize("split", SPLITS)
def test_solutions_are_right_and_rewarded(split):
    task = Arithmetic(split)
    for problem in first(split, 150):
        results = calls(problem)
        assert len(results) == 2 if split.startswith("two_step") else len(results) in (1, 2)
        for call, output in results:
            assert calculate(call) == output
            assert re.fullmatch(r"\d+(\.\d\d?)?", output)
            assert 0 < float(output) <= LARGEST
        answer = results[-1][1]
        reply = problem.messages[1].text
        assert reply.endswith(f"\n#### {answer}")
        assert task.reward(problem, reply) == 1.0
        assert task.reward(problem, f"#### 1\n#### {float(answer):.2f}") == 1.0
        for wrong in (f"#### {float(answer) + 1:g}", f"#### -{answer}", answer, f"#### {answer}\n#### 0", ""):
            assert task.reward(problem, wrong) == 0.0


@pytest.mark.parametrize("split", SPLITS)
def test_questions_are_short_plain_and_say_every_number(split):
    for problem in first(split, 150):
        text = question(problem)
        assert len(text) <= 116
        assert (text + solution(problem)).isascii()
        assert not set("{}|") & set(text + problem.messages[1].text)
        in_question = set(re.findall(r"\d+(?:\.\d+)?", text))
        used = set(re.findall(r"\d+(?:\.\d+)?", " ".join(call for call, _ in calls(problem))))
        assert used == in_question | {output for _, output in calls(problem)[:-1]}
        assert all(float(number) >= 0.1 for number in in_question)


def test_people_differ():
    shared = [question(problem) for problem in first("test", 1_000) if " than " in question(problem)]
    people = [re.findall(r"[A-Z][a-z]+(?= has)", text) for text in shared]
    assert shared
    assert all(one != other for one, other in people)


def test_a_split_that_is_not_there():
    with pytest.raises(ConfigError, match=r"^split=tests: arithmetic has train and val and test .*two_step_test"):
        Arithmetic("tests")
