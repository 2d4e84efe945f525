"""Maths problems: what becomes a call, which split is which, and every way to write a number."""

import json
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.data.conversations import Part, as_messages, parse_conversation
from nanochat.errors import ConfigError, DataError
from nanochat.tasks.gsm8k import extract_answer, load_gsm8k, same_number
from nanochat.tasks.task import TaskFiles

ROW = {"question": "What are 2 + 3, twice?", "answer": "It is <<2+3=5>>5.\nTwice: $<<5*2=10>>10.\n#### 10"}


@pytest.fixture(scope="module")
def real(test_data):
    """Split to its rows as they are in the file, and the task."""
    files = TaskFiles(folder="unused", path=str(test_data / "gsm8k"))
    rows = {
        name: [json.loads(line) for line in (test_data / "gsm8k" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    }
    rows["val"], rows["train"] = rows["train"][-500:], rows["train"][:-500]
    return {split: (rows[split], load_gsm8k(split, files)) for split in ("train", "val", "test")}


def load(tmp_path, rows, split="test"):
    name = "test.jsonl" if split == "test" else "train.jsonl"
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_gsm8k(split, TaskFiles(folder="unused", path=str(tmp_path)))


def test_calls_become_parts(tmp_path):
    question, answer = load(tmp_path, [ROW])[0].messages
    assert question.text == ROW["question"]
    assert answer.parts == (
        Part("text", "It is "), Part("python", "2+3"), Part("python_output", "5"),
        Part("text", "5.\nTwice: $"), Part("python", "5*2"), Part("python_output", "10"), Part("text", "10.\n#### 10"),
    )  # fmt: skip


def test_a_call_may_begin_the_answer_and_say_nothing(tmp_path):
    task = load(tmp_path, [{"question": "?", "answer": "<<1+1=>><<2=2>>\n#### 2 << 3"}])
    assert task[0].messages[1].parts == (
        Part("python", "1+1"), Part("python_output", ""), Part("python", "2"), Part("python_output", "2"),
        Part("text", "\n#### 2 << 3"),
    )  # fmt: skip


def test_every_real_row_is_its_text_again(real):
    without_calls = {}
    for split, (rows, task) in real.items():
        assert task.split == split
        assert len(rows) == len(task)
        without_calls[split] = 0
        for row, conversation in zip(rows, task):
            question, answer = conversation.messages
            outputs = [part.text for part in answer.parts if part.kind == "python_output"]
            assert question.text == row["question"]
            assert answer.text == re.sub("<<.*?>>", "", row["answer"])
            assert outputs == re.findall("=([^=>]*)>>", row["answer"])
            marks = {"text": "{}", "python": "<<{}=", "python_output": "{}>>"}
            assert "".join(marks[part.kind].format(part.text) for part in answer.parts) == row["answer"]
            assert parse_conversation(as_messages(conversation), "row").messages == conversation.messages
            without_calls[split] += not outputs
    assert {split: len(task) for split, (_, task) in real.items()} == {"train": 6973, "val": 500, "test": 1319}
    assert without_calls["train"] + without_calls["val"] == 95
    assert without_calls["test"] == 18


def test_every_real_answer_is_right_and_no_other_number_is(real):
    for rows, task in real.values():
        for row, conversation in zip(rows, task):
            assert task.reward(conversation, conversation.messages[1].text) == 1.0
            assert task.reward(conversation, row["answer"]) == 1.0
            number = row["answer"].rpartition("#### ")[2]
            other = int(number.replace(",", "")) + random.Random(number).choice([-10, -1, 1, 10])
            assert task.reward(conversation, f"So it is {number}.\n#### {other}") == 0.0


@pytest.mark.parametrize(
    ("reply", "reward"),
    [
        ("#### 1200", 1), ("#### 1,200", 1), ("#### $1,200", 1), ("####1200.", 1), ("#### $1,200.00.", 1),
        ("#### 1200.0 dollars", 1), ("#### -1200", 0), ("#### -$1200", 0), ("#### 12000", 0), ("#### 120", 0),
        ("#### 1200.5", 0), ("#### 1.200", 0), ("The answer is 1200", 0), ("### 1200", 0), ("####", 0), ("", 0),
        ("#### x", 0), ("#### 1\n#### 1200", 1), ("#### 1200\n#### 1", 0), ("#### 1200 ####", 1), ("#### 1200/5", 0),
        ("#### 2400/2", 0), ("#### \u0661\u0662\u0660\u0660", 0), ("#### 1_200", 0), ("#### 1-200", 0),
    ],
)  # fmt: skip
def test_a_reply_to_a_real_row(real, reply, reward):
    rows, task = real["train"]
    index = next(index for index, row in enumerate(rows) if row["answer"].endswith("#### 1,200"))
    assert task.reward(task[index], reply) == reward
    assert task.reward(task[index], f"{rows[index]['answer']}\n{reply}\n#### {5 if reward else 1200}") == 1 - reward


def test_a_negative_answer(real):
    rows, task = real["train"]
    index = next(index for index, row in enumerate(rows) if re.search("#### -[0-9]", row["answer"]))
    number = rows[index]["answer"].rpartition("-")[2]
    for reply, reward in (("-", 1), ("-$", 1), ("$-", 1), ("", 0), ("--", 0), ("- ", 0)):
        assert task.reward(task[index], f"#### {reply}{number}") == reward


@given(st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-(10**9), max_value=10**9))
def test_a_number_is_found_however_it_is_written(number):
    for text in (f"{number}", f"{number:,}", f"{number:,}.", f"${number}", f"{number}00"):
        found = extract_answer(f"first #### 7, then #### {text} in all")
        assert found is not None
        assert same_number(found, str(number))
        assert not same_number(found, str(number + 1))


def test_what_is_no_number_is_the_same_as_nothing():
    for text in ("", ".", "-", "x", "sNaN", "NaN", "1.2.3", "--3"):
        assert not same_number(text, text)
    assert same_number("$1,000.", "1e3")
    assert extract_answer("#### .5") == ".5"


def test_a_reply_cannot_make_the_search_slow():
    for reply in ("#### " + "1" * 200_000 + "/2", "####" * 50_000, "#### " + "$-" * 100_000, "#### " + "." * 100_000):
        extract_answer(reply)


def test_val_is_the_end_of_train_and_never_of_test(tmp_path):
    rows = [{"question": f"{number}?", "answer": f"#### {number}"} for number in range(1200)]
    train, val = load(tmp_path, rows, "train"), load(tmp_path, rows, "val")
    asked = [conversation.messages[0].text for task in (train, val) for conversation in task]
    assert asked == [row["question"] for row in rows]
    assert (len(train), len(val)) == (700, 500)
    assert (len(load(tmp_path, rows[:7], "train")), len(load(tmp_path, rows[:7], "val"))) == (4, 3)


def test_another_split_names_the_three(tmp_path):
    with pytest.raises(ConfigError, match="split=dev: gsm8k has train and val and test alone"):
        load_gsm8k("dev", TaskFiles(folder="unused", path=str(tmp_path)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?"}, "answer=None: must be a text"),
        ({"answer": "#### 1"}, "question=None: must be a text"),
        ({"question": "?", "answer": "seven"}, "answer=seven: must end with '#### NUMBER'"),
        (["#### 1"], "answer=None"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, row, message):
    with pytest.raises(DataError, match=rf"test\.jsonl:2: {message}"):
        load(tmp_path, [ROW, row])
