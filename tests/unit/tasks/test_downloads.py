"""Tasks with a public home: fetched once from a server, in the form that they have there; and where that home is."""

import functools
import gzip
import http.server
import json
import threading

import pytest
from test_conversation_files import chat, write_rows
from test_gsm8k import ROW as GSM8K_ROW
from test_humaneval import ROW as HUMANEVAL_ROW
from test_multiple_choice import write_arc, write_mmlu

from nanochat.errors import DataError
from nanochat.tasks import task as task_module
from nanochat.tasks.conversation_files import load_smoltalk
from nanochat.tasks.gsm8k import load_gsm8k
from nanochat.tasks.humaneval import load_humaneval
from nanochat.tasks.multiple_choice import load_arc_challenge, load_arc_easy, load_mmlu
from nanochat.tasks.task import TaskFiles

HUB = "https://huggingface.co/datasets"
OPENAI = "https://raw.githubusercontent.com/openai"
GSM8K = f"{OPENAI}/grade-school-math/master/grade_school_math/data"
SMOLTALK = f"{HUB}/HuggingFaceTB/smol-smoltalk/resolve/main/data"


class Quiet(http.server.SimpleHTTPRequestHandler):
    asked: list[str]

    def log_message(self, format, *args):
        self.asked.append(self.path)


@pytest.fixture
def served(tmp_path):
    """A folder, its URL, and the paths that were asked for."""
    folder, asked = tmp_path / "served", []
    folder.mkdir()
    handler = functools.partial(type("Handler", (Quiet,), {"asked": asked}), directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def put_gsm8k(folder, name):
    (folder / name).write_text(2 * (json.dumps(GSM8K_ROW) + "\n"))


def put_arc(folder, name):
    write_arc(folder, [("q?", ["a", "b"], [*"AB"], "B")] * 2, name.partition("-")[0], config="")


def put_mmlu(folder, name):
    write_mmlu(folder / name, [("q?", "s", [*"abcd"], 1)] * 2)


def put_humaneval(folder, name):
    (folder / name).write_bytes(gzip.compress(2 * (json.dumps(HUMANEVAL_ROW).encode() + b"\n")))


def put_smoltalk(folder, name):
    write_rows(folder / name, chat("a", "b"), chat("c", "d"))


def part(name, count=1):
    return [f"{name}-{number:05}-of-{count:05}.parquet" for number in range(count)]


HOMES = [
    (load_gsm8k, "train", GSM8K, ["train.jsonl"], put_gsm8k, 1),
    (load_gsm8k, "val", GSM8K, ["train.jsonl"], put_gsm8k, 1),
    (load_gsm8k, "test", GSM8K, ["test.jsonl"], put_gsm8k, 2),
    (load_mmlu, "train", f"{HUB}/cais/mmlu/resolve/main/all", part("auxiliary_train"), put_mmlu, 2),
    (load_mmlu, "val", f"{HUB}/cais/mmlu/resolve/main/all", part("validation"), put_mmlu, 2),
    (load_mmlu, "test", f"{HUB}/cais/mmlu/resolve/main/all", part("test"), put_mmlu, 2),
    (load_arc_easy, "train", f"{HUB}/allenai/ai2_arc/resolve/main/ARC-Easy", part("train"), put_arc, 2),
    (load_arc_easy, "val", f"{HUB}/allenai/ai2_arc/resolve/main/ARC-Easy", part("validation"), put_arc, 2),
    (load_arc_challenge, "test", f"{HUB}/allenai/ai2_arc/resolve/main/ARC-Challenge", part("test"), put_arc, 2),
    (load_humaneval, "test", f"{OPENAI}/human-eval/master/data", ["HumanEval.jsonl.gz"], put_humaneval, 2),
    (load_smoltalk, "train", SMOLTALK, part("train", 4), put_smoltalk, 8),
    (load_smoltalk, "test", SMOLTALK, part("test"), put_smoltalk, 2),
]
IDS = [f"{load.__name__}-{split}" for load, split, *_ in HOMES]


@pytest.mark.parametrize(("load", "split", "home", "names", "put", "count"), HOMES, ids=IDS)
def test_a_task_is_downloaded_once(tmp_path, served, load, split, home, names, put, count):
    folder, url, asked = served
    task_name = load.__name__.removeprefix("load_")
    (folder / task_name).mkdir()
    for name in names:
        put(folder / task_name, name)
    files = TaskFiles(folder=str(tmp_path / "run"), mirror=url)
    for _ in range(2):
        task = load(split, files)
        assert len(task) == count
        assert task.evaluate(task[0], task[0].messages[-1].text)
    assert [path.split()[0] for path in asked] == [f"/{task_name}/{name}" for name in names]
    assert all((tmp_path / "run" / task_name / name).exists() for name in names)


@pytest.mark.parametrize(("load", "split", "home", "names", "put", "count"), HOMES, ids=IDS)
def test_where_a_task_is_at_home(tmp_path, monkeypatch, load, split, home, names, put, count):
    asked = []

    def fetch(url, path):
        asked.append(url)
        (tmp_path / load.__name__.removeprefix("load_")).mkdir(exist_ok=True)
        put(tmp_path / load.__name__.removeprefix("load_"), path.rpartition("/")[2])

    monkeypatch.setattr(task_module, "download", fetch)
    assert len(load(split, TaskFiles(folder=str(tmp_path)))) == count
    assert asked == [f"{home}/{name}" for name in names]


def test_a_mirror_without_the_file_is_named(tmp_path, served):
    with pytest.raises(DataError, match=r"/gsm8k/test\.jsonl: the server answered 404"):
        load_gsm8k("test", TaskFiles(folder=str(tmp_path), mirror=served[1]))
