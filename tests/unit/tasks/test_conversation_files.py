"""Files of conversations: every form, every malformed record named or counted, SmolTalk's rows on demand."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.data.conversations import Part, as_messages
from nanochat.errors import AbsentFileError, ConfigError, DataError
from nanochat.tasks.conversation_files import load_messages, load_smoltalk
from nanochat.tasks.task import TaskFiles


def at(path, malformed="error"):
    return TaskFiles(folder="unused", path=str(path), malformed=malformed)


def chat(*contents, system=None):
    messages = [{"role": role, "content": content} for role, content in zip(("user", "assistant") * 9, contents)]
    return {"messages": [{"role": "system", "content": system}] * (system is not None) + messages}


def write(path, *records, end="\n"):
    """Write lines; bytes as they are, all else as JSON."""
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    content = b"".join(line + end.encode() for line in lines)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def texts(task):
    return [[message.text for message in conversation.messages] for conversation in task]


# ---- forms


@pytest.mark.parametrize("name", ["my chats.jsonl", "chats.jsonl.gz", "chats"])
def test_messages(tmp_path, name):
    call = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}, {"type": "text", "text": "2"}]
    path = write(tmp_path / name, chat("a", "b", "c", "d"), chat("\u4f60", "e", system="Be brief."), chat("1+1?", call))
    task = load_messages("train", at(path))
    assert texts(task) == [["a", "b", "c", "d"], ["Be brief.\n\n\u4f60", "e"], ["1+1?", "2"]]
    assert task[2].messages[1].parts == (Part("python", "1+1"), Part("python_output", "2"), Part("text", "2"))
    assert (task.name, task.split, task.kind, dict(task.dropped)) == ("messages", "train", "unscored", {})


ALPACA = [
    {"instruction": "Sort.", "input": "b a", "output": "a b"},
    {"instruction": "Hello", "input": "", "output": "Hi", "history": [], "system": ""},
    {"instruction": "Bye", "output": "See you"},
]
ALPACA_TEXTS = [["Sort.\n\nb a", "a b"], ["Hello", "Hi"], ["Bye", "See you"]]


def test_alpaca_as_lines_and_as_a_list(tmp_path):
    lines = write(tmp_path / "a.jsonl", *ALPACA)
    indented = write(tmp_path / "a.json", json.dumps(ALPACA, indent=2).encode())
    assert texts(load_messages("train", at(lines))) == texts(load_messages("train", at(indented))) == ALPACA_TEXTS


def test_messages_as_a_list(tmp_path):
    assert texts(load_messages("train", at(write(tmp_path / "a.json", [chat("a", "b")])))) == [["a", "b"]]


def test_windows_files(tmp_path):
    records = [b"\xef\xbb\xbf" + json.dumps(chat("a", "b\r\nc")).encode(), b"  ", chat("d", "e")]
    assert texts(load_messages("train", at(write(tmp_path / "a.jsonl", *records, end="\r\n")))) == [
        ["a", "b\r\nc"],
        ["d", "e"],
    ]
    listed = write(tmp_path / "b.json", b"\xef\xbb\xbf" + json.dumps(ALPACA, indent=1).replace("\n", "\r\n").encode())
    assert texts(load_messages("train", at(listed))) == ALPACA_TEXTS


def test_a_long_conversation(tmp_path):
    long = "x \U0001f600" * 2_000_000
    assert texts(load_messages("train", at(write(tmp_path / "a.jsonl", chat("a", long), chat("b", "c"))))) == [
        ["a", long], ["b", "c"]
    ]  # fmt: skip


# ---- splits


def test_a_file_is_train_alone(tmp_path):
    with pytest.raises(ConfigError, match=r"split=val: .*a\.jsonl has train alone"):
        load_messages("val", at(write(tmp_path / "a.jsonl", chat("a", "b"))))


def test_a_folder_has_the_splits_of_its_files(tmp_path):
    write(tmp_path / "train.jsonl", chat("t", "r"))
    write(tmp_path / "val.json", [chat("v", "a")])
    write(tmp_path / "other.jsonl", b"not read")
    assert texts(load_messages("train", at(tmp_path))) == [["t", "r"]]
    assert texts(load_messages("val", at(tmp_path))) == [["v", "a"]]
    with pytest.raises(ConfigError, match=r"split=test: .* has train and val alone"):
        load_messages("test", at(tmp_path))


def test_no_path_or_nothing_there_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"path=None: .*Name a file"):
        load_messages("train", TaskFiles(folder=str(tmp_path)))
    with pytest.raises(AbsentFileError, match=r"has no train\.jsonl, train\.jsonl\.gz, train\.json\. Name the file"):
        load_messages("train", at(tmp_path))
    with pytest.raises(DataError, match=r"no\.jsonl: there is no such file"):
        load_messages("train", at(tmp_path / "no.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"empty\.jsonl: has no conversation"):
        load_messages("train", at(tmp_path / "empty.jsonl"))


# ---- what is malformed


MALFORMED = [
    ({"messages": []}, "messages=", "messages"),
    ({"messages": None}, "messages=None", "messages"),
    (ALPACA[0], "messages=None", "messages"),
    ("messages", "messages=None", "messages"),
    (None, "messages=None", "messages"),
    (chat("a"), "messages end with another role", "messages end with another role than assistant"),
    ({"messages": chat("a", "b")["messages"][::-1]}, r"messages\[0\]\.role=assistant", "messages.role"),
    ({"messages": chat("a", "b")["messages"] * 2 + [7]}, r"messages\[4\]\.role=None", "messages.role"),
    (chat("a", None), r"messages\[1\]\.content=None", "messages.content"),
    (chat("a", "b", "", "d"), r"messages\[2\]\.content\[0\]\.text=", "messages.content.text"),
    (chat("a", {"x = 1: y. z": 1}), r"messages\[1\]\.content=", "messages.content"),
    (chat("a", [{"type": "image", "text": "b"}]), r"messages\[1\]\.content\[0\]\.type=image", "messages.content.type"),
    (chat("a", [[[[]]]]), r"messages\[1\]\.content\[0\]\.type=None", "messages.content.type"),
    (b'{"messages": [{"role": "us', "is no JSON", "is no JSON"),
    (b"\xff\xfe\x00", "is no UTF-8", "is no UTF-8"),
    (b'{"messages": ' + b"[" * 50_000, "is no JSON", "is no JSON"),
    (b'{"messages": ' + b"[" * 150 + b"]" * 150 + b"}", r"messages\[0\]\.role=None", "messages.role"),
]


@pytest.mark.parametrize(("record", "message", "reason"), MALFORMED)
def test_a_malformed_line_is_named_or_counted(tmp_path, record, message, reason):
    path = write(tmp_path / "a: b=c\t.jsonl", chat("a", "b"), b"", record, chat("c", "d"))
    with pytest.raises(DataError, match=rf"a: b=c\\t\.jsonl:3: {message}") as caught:
        load_messages("train", at(path))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < len(str(path)) + 500
    task = load_messages("train", at(path, "drop"))
    assert texts(task) == [["a", "b"], ["c", "d"]]
    assert dict(task.dropped) == {reason: 1}


def test_all_that_is_malformed_is_counted_by_reason(tmp_path):
    first = b'{"half": '
    path = write(tmp_path / "a.jsonl", first, *(record for record, _, _ in MALFORMED), chat("a", "b"))
    task = load_messages("train", at(path, "drop"))
    assert texts(task) == [["a", "b"]]
    assert sum(task.dropped.values()) == len(MALFORMED) + 1
    assert task.dropped["is no JSON"] == 3
    assert task.dropped["messages.role"] == 3
    path.write_bytes(first)
    with pytest.raises(DataError, match=r"has no conversation; dropped: {'is no JSON': 1}"):
        load_messages("train", at(path, "drop"))


def test_nesting_near_python_s_own_limit_is_no_crash(tmp_path):
    for depth in range(880, 1000, 3):
        path = write(tmp_path / "a.jsonl", b'{"messages": [%s%s]}' % (b"[" * depth, b"]" * depth), chat("a", "b"))
        assert len(load_messages("train", at(path, "drop"))) == 1


@pytest.mark.parametrize(
    ("record", "message", "reason"),
    [
        ({"instruction": "a"}, "output=None", "output"),
        ({"instruction": " ", "output": "b"}, "instruction=", "instruction"),
        ({"instruction": "a", "input": ["x"], "output": "b"}, "input=", "input"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "history=.*: is not read", "history"),
        ({"instruction": "a", "output": "b", "system": "c"}, "system=c: is not read", "system"),
        (chat("a", "b"), "instruction=None", "instruction"),
        (5, "instruction=None", "instruction"),
    ],
)
def test_a_malformed_alpaca_record_is_named_or_counted(tmp_path, record, message, reason):
    path = write(tmp_path / "a.json", [ALPACA[0], record])
    with pytest.raises(DataError, match=rf"a\.json: record 1: {message}"):
        load_messages("train", at(path))
    task = load_messages("train", at(path, "drop"))
    assert (texts(task), dict(task.dropped)) == (ALPACA_TEXTS[:1], {reason: 1})


@pytest.mark.parametrize(
    ("record", "found"), [({"text": "a", "id": 1}, "text, id"), ([chat("a", "b")], "list"), (1, "int")]
)
def test_another_form_says_what_it_found(tmp_path, record, found):
    with pytest.raises(
        DataError, match=rf"a\.jsonl:1: must be an object with messages or instruction, and is {found}\."
    ):
        load_messages("train", at(write(tmp_path / "a.jsonl", record)))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"messages": []}', "must be a list of records"), (b"[1, ", "is no JSON"), (b"", "is no JSON")],
)
def test_a_json_file_is_a_list(tmp_path, content, message):
    for malformed in ("error", "drop"):
        with pytest.raises(DataError, match=rf"a\.json: {message}"):
            load_messages("train", at(write(tmp_path / "a.json", content), malformed))


# ---- real files


def test_real_conversations(test_data):
    path = test_data / "chat" / "conversations.jsonl"
    task = load_messages("train", at(path))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(task) == len(rows) == 128
    for row, conversation in zip(rows, task):
        messages = row["messages"]
        if messages[0]["role"] == "system":
            system = messages.pop(0)["content"]
            messages[0]["content"] = f"{system}\n\n{messages[0]['content']}"
        assert as_messages(conversation) == row


def test_real_alpaca(test_data):
    path = test_data / "chat" / "alpaca_en_demo.json"
    task = load_messages("train", at(path))
    rows = json.loads(path.read_text())
    assert len(task) == len(rows) == 999
    assert sum(row["input"] != "" for row in rows) == 412
    for row, (question, answer) in zip(rows, texts(task)):
        assert question == row["instruction"] + (f"\n\n{row['input']}" if row["input"] else "")
        assert answer == row["output"]


def test_a_real_file_of_another_form_is_refused(test_data):
    with pytest.raises(DataError, match=r"glaive_toolcall_en_demo\.json: record 0: must be an object with messages"):
        load_messages("train", at(test_data / "chat" / "glaive_toolcall_en_demo.json"))


# ---- SmolTalk


def write_rows(path, *records, row_group_size=2):
    kind = pa.list_(pa.struct({"content": pa.string(), "role": pa.string()}))
    table = pa.table(
        {"messages": pa.array([record["messages"] for record in records], kind), "source": ["s"] * len(records)}
    )
    pq.write_table(table, path, row_group_size=row_group_size)


BROKEN = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}


def test_smoltalk_is_the_rows_of_its_files_in_order(tmp_path):
    tmp_path /= "[a-z]*"  # no pattern
    tmp_path.mkdir()
    write_rows(tmp_path / "train-00001-of-00002.parquet", chat("d", "e"))
    write_rows(
        tmp_path / "train-00000-of-00002.parquet", chat("a", "b", "c", "d"), chat("b", "c", system="S"), chat("c", "d")
    )
    write_rows(tmp_path / "test-00000-of-00001.parquet", chat("x", "y"))
    write_rows(tmp_path / "other.parquet", chat("o", "p"))
    task = load_smoltalk("train", at(tmp_path))
    assert texts(task) == [["a", "b", "c", "d"], ["S\n\nb", "c"], ["c", "d"], ["d", "e"]]
    assert (task.name, task.split, task[-1].messages[0].text) == ("smoltalk", "train", "d")
    assert texts(load_smoltalk("test", at(tmp_path))) == [["x", "y"]]
    assert texts(task[1:].shuffled(3)[:0]) == []


def test_smoltalk_s_malformed_rows_are_named_when_asked_for_or_counted(tmp_path):
    write_rows(tmp_path / "train-0.parquet", chat("a", "b"), BROKEN, chat("c", "d"))
    write_rows(tmp_path / "train-1.parquet", BROKEN, {"messages": None}, chat("e", "f"), chat("g"))
    task = load_smoltalk("train", at(tmp_path))
    assert len(task) == 7
    assert texts(task[::5]) == [["a", "b"], ["e", "f"]]
    for index, where in ((1, r"train-0\.parquet: row 1: messages\[1\]"), (3, r"train-1\.parquet: row 0: messages\[1\]"),
                         (4, r"train-1\.parquet: row 1: messages=None")):  # fmt: skip
        with pytest.raises(DataError, match=where):
            task[index]
    kept = load_smoltalk("train", at(tmp_path, "drop"))
    assert texts(kept) == [["a", "b"], ["c", "d"], ["e", "f"]]
    assert dict(kept.dropped) == {
        "messages.content.text": 2, "messages": 1, "messages end with another role than assistant": 1
    }  # fmt: skip


def test_smoltalk_has_no_val_and_needs_its_files(tmp_path):
    with pytest.raises(ConfigError, match="split=val: smoltalk has train and test alone"):
        load_smoltalk("val", at(tmp_path))
    with pytest.raises(DataError, match=r"has none of train-\*\.parquet"):
        load_smoltalk("train", at(tmp_path))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "train-0.parquet")
    with pytest.raises(DataError, match=r"train-0\.parquet: has the columns text, and needs messages"):
        load_smoltalk("train", at(tmp_path))


def test_smoltalk_s_rows_stay_in_arrow_until_asked_for(tmp_path, monkeypatch):
    write_rows(
        tmp_path / "train-0.parquet", *(chat(f"{number}", "x" * 100) for number in range(2_000)), row_group_size=100
    )
    parsed = []
    from nanochat.tasks import conversation_files

    real = conversation_files.parse_conversation
    monkeypatch.setattr(conversation_files, "parse_conversation", lambda *args: parsed.append(1) or real(*args))
    task = load_smoltalk("train", at(tmp_path))
    assert len(task) == 2_000
    assert not parsed
    assert task[1_234].messages[0].text == "1234"
    assert len(parsed) == 1
