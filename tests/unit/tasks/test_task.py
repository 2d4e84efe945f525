"""The contract of tasks: indexing, slices, shuffles, where files are found, and what bad files are called."""

import gzip
import json
import pickle
import re
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.data.conversations import exchange
from nanochat.errors import ConfigError, DataError
from nanochat.tasks import task as task_module
from nanochat.tasks.registry import load_task
from nanochat.tasks.task import (
    Excerpt,
    ListedTask,
    Selection,
    Task,
    TaskFiles,
    of_split,
    parse_json,
    raw_lines,
    read_table,
    text_of,
)  # fmt: skip


class Numbers(Task):
    name, split, kind, chance = "numbers", "val", "choose", 0.25

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def conversation(self, index):
        assert 0 <= index < self.count
        return exchange(str(index), str(index))

    @staticmethod
    def reward(conversation, reply):
        return 0.5 if reply == "half" else Task.reward(conversation, reply)


def lines_of(path):
    """(where, value) of each line."""
    return ((where, parse_json(line, where)) for where, line in raw_lines(path))


def numbers(task):
    return [int(conversation.messages[0].text) for conversation in task]


def test_a_task_is_indexed_like_a_list():
    task = Numbers(5)
    assert numbers(task) == [0, 1, 2, 3, 4]
    assert task[-1] == task[4] == exchange("4", "4")
    for index in (5, -6):
        with pytest.raises(IndexError):
            task[index]
    assert numbers(Numbers(0)) == []


bounds = st.none() | st.integers(-25, 25)
slices = st.builds(slice, bounds, bounds, st.none() | st.integers(-4, 4).filter(bool))


@given(st.integers(0, 20), st.lists(slices, max_size=3))
def test_slices_of_slices_are_those_of_a_list(count, cuts):
    task, expected = Numbers(count), list(range(count))
    for cut in cuts:
        task, expected = task[cut], expected[cut]
    assert numbers(task) == expected
    assert len(task) == len(expected)


@given(st.integers(0, 60), st.integers(0, 2**63))
def test_a_shuffle_is_a_permutation_of_its_seed(count, seed):
    shuffled = numbers(Numbers(count).shuffled(seed))
    assert sorted(shuffled) == list(range(count))
    assert numbers(Numbers(count).shuffled(seed)) == shuffled


def test_a_shuffle_is_the_same_on_every_machine_and_another_for_each_seed():
    assert numbers(Numbers(8).shuffled(1)) == SHUFFLED_BY_1
    orders = {tuple(numbers(Numbers(8).shuffled(seed))) for seed in range(50)}
    assert len(orders) > 45
    assert numbers(Numbers(8).shuffled(1).shuffled(2)) != SHUFFLED_BY_1


SHUFFLED_BY_1 = [3, 0, 2, 4, 5, 7, 6, 1]


@pytest.mark.parametrize("part", [Numbers(5)[1:4], Numbers(5).shuffled(0), Numbers(5).shuffled(0)[::2][1:]])
def test_a_selection_is_the_same_task(part):
    assert (part.name, part.split, part.kind, part.chance) == ("numbers", "val", "choose", 0.25)
    assert part.reward(part[0], "half") == 0.5
    with pytest.raises(IndexError):
        part[len(part)]


def test_a_reply_is_right_if_its_reward_is_one():
    task = Numbers(3)
    assert task.evaluate(task[2], " 2\n")
    assert not task.evaluate(task[2], "2 or 3")
    assert not task.evaluate(task[2], "half")


def test_a_listed_task_holds_its_conversations():
    task = ListedTask("listed", "train", [exchange("a", "b"), exchange("c", "d")])
    assert (len(task), task[-1], task[:1][0]) == (2, exchange("c", "d"), exchange("a", "b"))
    assert (task.name, task.split, task.kind, task.chance) == ("listed", "train", "generate", 0.0)


def test_an_excerpt_travels_without_the_task_and_judges_as_it_does():
    excerpt = pickle.loads(pickle.dumps(Excerpt(Selection(Numbers(10), [5, 3, 8]), 2)))
    assert numbers(excerpt) == [5, 3]
    assert (excerpt.name, excerpt.split, excerpt.kind, excerpt.chance) == ("numbers", "val", "choose", 0.25)
    assert excerpt.reward(excerpt[0], "half") == 0.5
    assert len(pickle.dumps(Excerpt(Numbers(10), 3))) < 2000


def test_a_split_that_is_not_there_names_those_that_are():
    assert of_split("t", "val", {"train": 1, "val": 2}) == 2
    with pytest.raises(ConfigError, match=r"split=dev: t has train and val alone"):
        of_split("t", "dev", {"train": 1, "val": 2})


# ---- where files are


def test_a_path_is_the_folder_of_the_files_or_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(task_module, "download", lambda url, path: pytest.fail("downloads"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.jsonl").write_text("{}")
    (tmp_path / "c.csv").write_text("")
    files = TaskFiles(folder=str(tmp_path / "away"), path=str(tmp_path), mirror="http://nowhere.invalid")
    assert (
        files.find("t", "a.jsonl", "http://home.invalid", ["a.jsonl", "in/b.jsonl", "c.csv"])
        == f"{tmp_path}/in/b.jsonl"
    )
    assert files.find("t", "c.csv", "http://home.invalid") == f"{tmp_path}/c.csv"
    one = TaskFiles(folder="away", path=str(tmp_path / "in" / "b.jsonl"))
    assert one.find("t", "a.jsonl", "", ["a.jsonl", "in/b.jsonl"]) == one.path


@pytest.mark.parametrize("path", ["", "b.jsonl", "nowhere"])
def test_a_path_without_the_file_says_which_one_it_needs(tmp_path, path):
    (tmp_path / "b.jsonl").write_text("{}")  # a file of another name may be another split's
    files = TaskFiles(folder="away", path=str(tmp_path / path))
    with pytest.raises(DataError, match=re.escape(f"t={tmp_path / path}: is or has none of a.jsonl, a.csv.")):
        files.find("t", "a.jsonl", "http://home.invalid", ["a.jsonl", "a.csv"])


@pytest.mark.parametrize(
    ("mirror", "home"), [(None, "http://home.invalid/data"), ("http://m.invalid/x/", "http://m.invalid/x/t")]
)
def test_without_a_path_the_file_is_downloaded_from_home_or_mirror(tmp_path, monkeypatch, mirror, home):
    asked = []
    monkeypatch.setattr(task_module, "download", lambda url, path: asked.append((url, path)))
    found = TaskFiles(folder=str(tmp_path), mirror=mirror).find("t", "a.jsonl", "http://home.invalid/data", ["b.jsonl"])
    assert asked == [(f"{home}/a.jsonl", f"{tmp_path}/t/a.jsonl")]
    assert found == f"{tmp_path}/t/a.jsonl"


# ---- lines, records, tables


def test_lines_are_numbered_as_an_editor_does(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xe2\x80\xa8"}\r\n\r\n   \n[2]\r\n3')
    assert list(lines_of(str(path))) == [(f"{path}:1", {"a": "\u2028"}), (f"{path}:4", [2]), (f"{path}:5", 3)]
    zipped = tmp_path / "a.jsonl.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert [value for _, value in lines_of(str(zipped))] == [{"a": "\u2028"}, [2], 3]


@pytest.mark.parametrize(
    "line",
    [b'{"half": "of', b"\xff\xfe", b'{"latin": "\xe9"}', b"[" * 100_000, b"1" * 5_000, b"{} {}", b"\x00", b"'a'"],
)
def test_a_line_that_is_no_json_is_named_and_quoted_in_one_line(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(b"1\n\n" + line + b"\n4\n")
    lines = lines_of(str(tmp_path / "a.jsonl"))
    assert next(lines)[1] == 1
    with pytest.raises(DataError, match=r"a\.jsonl:3: is no (JSON|UTF-8)") as caught:
        next(lines)
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


def test_a_line_may_be_long(tmp_path):
    text = "\U0001f600x" * 2_000_000
    (tmp_path / "a.jsonl").write_text(json.dumps([text], ensure_ascii=False))
    assert next(lines_of(str(tmp_path / "a.jsonl")))[1] == [text]


def cut(content):
    return content[: len(content) // 2]


def torn(content):
    return content[:40] + bytes(40) + content[80:]


@pytest.mark.parametrize("damage", [cut, torn, lambda content: b"no gzip"])
def test_a_damaged_archive_is_named(tmp_path, damage):
    content = gzip.compress(b"".join(b'{"n": %d}\n' % number**3 for number in range(2_000)))
    (tmp_path / "a.jsonl.gz").write_bytes(damage(content))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read after line \d+"):
        list(raw_lines(str(tmp_path / "a.jsonl.gz")))


def test_a_file_that_is_not_there_is_named(tmp_path):
    for path, rule in ((tmp_path, "cannot be read"), (tmp_path / "no.jsonl", "there is no such file")):
        with pytest.raises(DataError, match=f"{path}: {rule}"):
            list(lines_of(str(path)))


@pytest.mark.parametrize("name", ["gsm8k", "arc_easy", "humaneval"])
def test_malformed_rows_are_dropped_and_counted(tmp_path, name):
    rows = {
        "gsm8k": ({"question": "q", "answer": "#### 2"}, {"question": "q", "answer": None}, "train.jsonl"),
        "arc_easy": (
            {"query": "q", "choices": ["a", "b"], "gold": 1}, {"query": "q", "choices": ["a"], "gold": 0},
            "arc_easy.jsonl",
        ),
        "humaneval": (
            dict.fromkeys(("task_id", "prompt", "entry_point", "test", "canonical_solution"), "x"), {"prompt": "x"},
            "HumanEval.jsonl",
        ),
    }  # fmt: skip
    good, bad, file = rows[name]
    (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in (good, bad, good, good)) + "{\n")
    split = "train" if name == "gsm8k" else "test"
    files = TaskFiles(folder="x", path=str(tmp_path), malformed="drop")
    task = load_task(name, split, files)
    assert len(task) == (2 if split == "train" else 3), "of GSM8K the last half is val"
    assert sum(task.dropped.values()) == 2
    with pytest.raises(DataError, match=rf"{file}:2: "):
        load_task(name, split, replace(files, malformed="error"))


def test_json_of_any_kind_is_a_value():
    assert parse_json(b"[1]", "here") == [1]
    with pytest.raises(DataError, match="here: is no JSON"):
        parse_json(b"", "here")


@pytest.mark.parametrize("record", [{"a": None}, {"a": " \n"}, {"a": 1}, {}, [], "a", None])
def test_a_text_is_a_text_and_not_empty(record):
    assert text_of({"a": " x"}, "a", "f:1") == " x"
    with pytest.raises(DataError, match=r"f:1: a=.*: must be a text"):
        text_of(record, "a", "f:1")


def test_a_table_has_the_columns_asked_for(tmp_path):
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"a": [1, 2], "b": [["x"], None], "c": [0, 0]}), path)
    assert read_table(path, ["b", "a"]).select(["a", "b"]).to_pylist() == [{"a": 1, "b": ["x"]}, {"a": 2, "b": None}]
    with pytest.raises(DataError, match=r"a\.parquet: has the columns a, b, c, and needs a, d"):
        read_table(path, ["a", "d"])


@pytest.mark.parametrize("content", [b"", b"PAR1 nothing PAR1", None])
def test_a_damaged_table_is_named(tmp_path, content):
    path = tmp_path / "a.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as parquet"):
        read_table(str(path), ["a"])
