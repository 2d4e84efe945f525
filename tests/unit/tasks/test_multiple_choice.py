"""Multiple choice: one prompt for all sources, letters that are tokens of their own, every shape of file."""

import json
from glob import glob

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.data.tokenizer import SPLIT_PATTERNS, Tokenizer
from nanochat.errors import ConfigError, DataError
from nanochat.tasks import multiple_choice
from nanochat.tasks.multiple_choice import load_arc_challenge, load_arc_easy, load_mmlu
from nanochat.tasks.task import TaskFiles

PROMPT = "Which is even?\n\n1 =>A\n2 =>B\n5, or 7 =>C\n3 =>D\n\nWhich one is right? Answer with its letter only."
CHOICES = ["1", "2", "5, or 7", "3"]


def at(path):
    return TaskFiles(folder="unused", path=str(path))


def write_csv(folder, *lines, name="odd_numbers_test.csv", header="question,choice0,choice1,choice2,choice3,answer"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")


def write_arc(folder, rows, split="test", config="ARC-Easy"):
    """Rows of (question, texts, labels, key)."""
    (folder / config).mkdir(exist_ok=True)
    kind = pa.struct({"text": pa.list_(pa.string()), "label": pa.list_(pa.string())})
    choices = [None if texts is None else {"text": texts, "label": labels} for _, texts, labels, _ in rows]
    table = pa.table({
        "id": [str(number) for number in range(len(rows))], "question": [row[0] for row in rows],
        "choices": pa.array(choices, kind), "answerKey": [row[3] for row in rows],
    })  # fmt: skip
    pq.write_table(table, folder / config / f"{split}-00000-of-00001.parquet")


def write_mmlu(path, rows):
    """Rows of (question, subject, choices, answer)."""
    columns = dict(zip(("question", "subject", "choices", "answer"), map(list, zip(*rows))))
    pq.write_table(pa.table(columns), path)


def write_core(folder, *rows):
    (folder / "arc_easy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_source_gives_the_same_conversation(tmp_path):
    write_csv(tmp_path / "test", 'Which is even?,1,2,"5, or 7",3,1')
    write_mmlu(tmp_path / "validation-00000-of-00001.parquet", [("Which is even?", "odd_numbers", CHOICES, 1)])
    write_arc(tmp_path, [("Which is even?", CHOICES, [*"1234"], "2")], "train")
    write_arc(tmp_path, [(" Which is even?\n", CHOICES, [*"ABCD"], "B")], config="ARC-Challenge")
    write_core(tmp_path, {"query": "Question: Which is even?", "choices": [" 1", "2 ", *CHOICES[2:]], "gold": 1})
    tasks = [
        load_mmlu("test", at(tmp_path)), load_mmlu("val", at(tmp_path)), load_arc_easy("train", at(tmp_path)),
        load_arc_challenge("test", at(tmp_path)), load_arc_easy("test", at(tmp_path)),
    ]  # fmt: skip
    subjects = ["odd_numbers", "odd_numbers", "arc_easy", "arc_challenge", "arc_easy"]
    for task, subject in zip(tasks, subjects):
        assert [message.text for message in task[0].messages] == [PROMPT, "B"]
        assert task[0].facts == {"letters": ("A", "B", "C", "D"), "answer": "B", "subject": subject}
        assert (len(task), task.kind, task.chance) == (1, "choose", 0.25)
    names = [(task.name, task.split) for task in tasks]
    assert names == [
        ("mmlu", "test"), ("mmlu", "val"), ("arc_easy", "train"), ("arc_challenge", "test"), ("arc_easy", "test")
    ]  # fmt: skip


@pytest.mark.parametrize("pattern", list(SPLIT_PATTERNS))
@pytest.mark.parametrize("choice", ["a dog", "5", "it is so.", "'a'", "x =", "f(x) >", "\u4f60\u597d", "\u00e9"])
def test_a_letter_is_the_token_of_the_answer(tmp_path, pattern, choice):
    """Even in a vocabulary that joins letters to all that may stand before them."""
    merges = [b"=>"] + [mark + letter for letter in (b"A", b"B") for mark in (b">", b"=", b" ", b"(", b".", b"'")]
    tokenizer = Tokenizer(merges, SPLIT_PATTERNS[pattern])
    write_arc(tmp_path, [("which?", [choice, "another"], [*"AB"], "B")])
    task = load_arc_easy("test", at(tmp_path))
    ids = tokenizer.encode_ordinary(task[0].messages[0].text)
    for letter in task[0].facts["letters"]:
        (answer,) = tokenizer.encode_ordinary(letter)
        assert ids.count(answer) == 1
        before = ids[ids.index(answer) - 1]
        assert tokenizer.decode([before]).endswith("=>")


def test_chance_is_the_mean_over_questions(tmp_path):
    rows = [("q", [*"abcd"][:count], [*"ABCD"][:count], "A") for count in (2, 4, 4)]
    write_arc(tmp_path, [*rows, ("q", [*"abcde"], [*"12345"], "5")])
    task = load_arc_easy("test", at(tmp_path))
    assert task.chance == pytest.approx((1 / 2 + 1 / 4 + 1 / 4 + 1 / 5) / 4)
    assert task[3].facts["answer"] == task[3].messages[1].text == "E"
    assert task[:2].chance == task.chance


@pytest.mark.parametrize(
    ("reply", "reward"),
    [
        ("B", 1), ("B.", 1), (" (B)\n", 1), ("B) 2", 1), ("**B**", 1), ("A", 0), ("", 0), ("Because", 0), ("b", 0),
        ("The answer is B", 0), ("AB", 0), ("B2", 0), ("=>B", 1), ("?!", 0),
    ],
)  # fmt: skip
def test_a_reply_is_right_if_its_first_word_is_the_letter(tmp_path, reply, reward):
    write_csv(tmp_path / "test", "Which is even?,1,2,5,3,1")
    task = load_mmlu("test", at(tmp_path))
    assert task.reward(task[0], reply) == reward


def test_mmlu_s_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(multiple_choice, "glob", lambda pattern: sorted(glob(pattern), reverse=True))  # any order
    tmp_path /= "[a-z]*"  # no pattern
    tmp_path.mkdir()
    for folder in ("dev", "val", "test"):
        write_csv(tmp_path / folder, f"{folder}?,1,2,3,4,0", f"{folder} 2?,1,2,3,4,3", name=f"b_c_{folder}.csv")
        write_csv(tmp_path / folder, '"A ""quoted""\nquestion?",1,2,3,4,2', name=f"a_{folder}.csv")
    val, test = load_mmlu("val", at(tmp_path)), load_mmlu("test", at(tmp_path))
    assert [conversation.facts["subject"] for conversation in test] == ["a", "b_c", "b_c"]
    assert test[0].messages[0].text.startswith('A "quoted"\nquestion?\n\n1 =>A\n')
    assert [conversation.facts["answer"] for conversation in test] == ["C", "A", "D"]
    assert val[1].messages[0].text.startswith("val?")
    (tmp_path / "val").rename(tmp_path / "valuables")
    assert load_mmlu("val", at(tmp_path))[1].messages[0].text.startswith("dev?")
    with pytest.raises(DataError, match=r"has none of auxiliary_train-00000-of-00001\.parquet, auxiliary_train"):
        load_mmlu("train", at(tmp_path))


def test_a_test_file_never_passes_for_training_data(tmp_path):
    write_core(tmp_path, {"query": "q", "choices": ["a", "b"], "gold": 1})
    assert len(load_arc_easy("test", at(tmp_path / "arc_easy.jsonl"))) == 1
    for load, split in (
        (load_arc_easy, "train"),
        (load_arc_easy, "val"),
        (load_arc_challenge, "test"),
        (load_mmlu, "train"),
    ):
        with pytest.raises(DataError, match="is or has none of"):
            load(split, at(tmp_path / "arc_easy.jsonl"))


@pytest.mark.parametrize("load", [load_mmlu, load_arc_easy, load_arc_challenge])
def test_another_split_names_the_three(tmp_path, load):
    with pytest.raises(ConfigError, match=r"split=dev: .* has train and val and test alone"):
        load("dev", at(tmp_path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((None, ["a", "b"], ["A", "B"], "A"), "question=None"),
        (("q", None, None, "A"), "choices=None: must be a list of texts"),
        (("q", ["a", None], ["A", "B"], "A"), "choices=.*: must be a list of texts"),
        (("q", ["a", "b"], ["A"], "A"), "choices=.*: must be 2 to 26, with a label each"),
        (("q", ["a"], ["A"], "A"), "choices=.*: must be 2 to 26"),
        (("q", ["a"] * 27, [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ1"], "A"), "choices=.*: must be 2 to 26"),
        (("q", ["a", "b"], ["A", "B"], "C"), "answer=C: must be one of"),
        (("q", ["a", "b"], ["A", "B"], None), "answer=None: must be one of"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, row, message):
    write_arc(tmp_path, [("q", ["a", "b"], ["A", "B"], "A"), row])
    with pytest.raises(DataError, match=f"test-00000-of-00001.parquet: row 1: {message}"):
        load_arc_easy("test", at(tmp_path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": ["a", "b"], "gold": 0}, "query=None"),
        ({"query": "q", "choices": "ab", "gold": 0}, "choices=ab: must be a list"),
        ({"query": "q", "choices": ["a", "b"], "gold": 2}, "answer=2"),
        ({"query": "q", "choices": ["a", "b"], "gold": -1}, "answer=-1"),
        ({"query": "q", "choices": ["a", "b"]}, "answer=None"),
        (["q"], "query=None"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, row, message):
    write_core(tmp_path, {"query": "q", "choices": ["a", "b"], "gold": 0}, row)
    with pytest.raises(DataError, match=rf"arc_easy\.jsonl:2: {message}"):
        load_arc_easy("test", at(tmp_path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q,a,b,c,d,4", r"a_test\.csv:3: answer=4"),
        ("q,a,b,c,d,A", r"a_test\.csv:3: answer=A"),
        ("q,a,b,c", r"a_test\.csv:3: choices="),
        (",a,b,c,d,0", r"a_test\.csv:3: question="),
        ('q,a,"b,c,d,0', r"a_test\.csv: cannot be read as CSV"),
        ("q,a,b,c," + "d" * 200_000 + ",0", r"a_test\.csv: cannot be read as CSV"),
    ],
)
def test_a_malformed_csv_line_is_named(tmp_path, line, message):
    write_csv(tmp_path / "test", "q,a,b,c,d,0", line, name="a_test.csv")
    with pytest.raises(DataError, match=message):
        load_mmlu("test", at(tmp_path))


def test_a_csv_without_header_or_in_another_encoding_is_named(tmp_path):
    write_csv(tmp_path / "test", "q,a,b,c,d,0", header="q,a,b,c,d,A")
    with pytest.raises(DataError, match="question=None"):
        load_mmlu("test", at(tmp_path))
    (tmp_path / "test" / "odd_numbers_test.csv").write_bytes(b"question\n\xe9\n")
    with pytest.raises(DataError, match=r"odd_numbers_test\.csv: cannot be read as CSV"):
        load_mmlu("test", at(tmp_path))


def test_a_source_without_questions_is_refused(tmp_path):
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match=r"mmlu=.*test: has no question"):
        load_mmlu("test", at(tmp_path))


def test_real_mmlu(test_data):
    test, val = load_mmlu("test", at(test_data / "mmlu")), load_mmlu("val", at(test_data / "mmlu"))
    assert (len(test), len(val), test.chance) == (14_042, 285, 0.25)
    assert len({conversation.facts["subject"] for conversation in test}) == 57
    answers = [conversation.facts["answer"] for conversation in test]
    assert [answers.count(letter) for letter in "ABCD"] == [3222, 3462, 3582, 3776]
    assert all(task.reward(one, one.messages[1].text) == 1.0 for task in (test, val) for one in task)


@pytest.mark.parametrize(("load", "count"), [(load_arc_easy, 2_376), (load_arc_challenge, 1_172)])
def test_real_arc(test_data, load, count):
    folder = test_data / "core" / "eval_data" / "world_knowledge"
    task = load("test", at(folder))
    rows = [json.loads(line) for line in (folder / f"{task.name}.jsonl").read_text().splitlines()]
    assert (len(task), task.chance) == (count, 0.25)
    for row, conversation in zip(rows, task):
        question, answer = conversation.messages
        assert "Question:" not in question.text.partition("\n")[0]
        right = row["choices"][row["gold"]].strip()
        assert f"\n{right} =>{answer.text}\n" in question.text
