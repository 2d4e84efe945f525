"""Functions to write: which part of a reply is run, and that only code which passes the tests is right."""

import ast
import gzip
import json

import pytest

from nanochat.errors import ConfigError, DataError
from nanochat.tasks.humaneval import load_humaneval, program
from nanochat.tasks.task import TaskFiles

ROW = {
    "task_id": "T/0",
    "prompt": "import math\n\n\ndef half(x):\n    return x / 2\n\n\ndef area(r):\n    '''Area of a disc.'''\n",
    "entry_point": "area",
    "canonical_solution": "    return math.pi * r ** 2\n",
    "test": "def check(candidate):\n    assert abs(candidate(2) - half(8 * math.pi)) < 1e-6\n",
}
WHOLE = "def area(r):\n    return math.pi * r * r\n"
BODY = ROW["canonical_solution"]


def load(tmp_path, *rows, name="HumanEval.jsonl"):
    text = "".join(json.dumps(row) + "\n" for row in rows or [ROW])
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return load_humaneval("test", TaskFiles(folder="unused", path=str(tmp_path)))


@pytest.mark.parametrize("name", ["HumanEval.jsonl", "HumanEval.jsonl.gz"])
def test_a_problem_asks_for_the_whole_function(tmp_path, name):
    task = load(tmp_path, name=name)
    (conversation,) = task
    question, answer = conversation.messages
    assert f"\n```python\n{ROW['prompt'].rstrip()}\n```" in question.text
    assert answer.text == f"```python\n{ROW['prompt']}{ROW['canonical_solution']}```"
    assert conversation.facts == {key: ROW[key] for key in ("task_id", "prompt", "entry_point", "test")}
    assert (task.name, task.split, task.kind, task.chance) == ("humaneval", "test", "generate", 0.0)


@pytest.mark.parametrize(
    ("reply", "reward"),
    [
        (WHOLE, 1), (BODY, 1), (f"```python\n{WHOLE}```", 1), (f"Like so:\n\n```py\n{WHOLE}```\n\nGood?", 1),
        (f"```\n{BODY}```", 1), (f"```python\n{WHOLE}", 1), (f"```sh\nls\n```\n```python\n{WHOLE}```", 1),
        (f"```python\n{WHOLE}```\n```python\nassert area(1) == 3\n```", 1), (f"Here it is:\n{WHOLE}", 0), ("", 0),
        ("```python\n```", 0), (WHOLE.replace("* r\n", "* r + 1\n"), 0), (f"{WHOLE}exit()\n", 0),
        ("    raise SystemExit(0)", 0), (f"{WHOLE}raise ValueError\n", 0), ("def area(r", 0), ("\ud800", 0),
    ],
)  # fmt: skip
def test_a_reply_is_right_if_its_code_passes(tmp_path, reply, reward):
    task = load(tmp_path)
    assert task.reward(task[0], reply) == reward


def test_an_endless_reply_is_wrong(tmp_path, monkeypatch):
    from nanochat.inference.sandbox import Limits, run_python
    from nanochat.tasks import humaneval

    monkeypatch.setattr(humaneval, "run_python", lambda code: run_python(code, limits=Limits(timeout_s=0.5)))
    task = load(tmp_path)
    assert task.reward(task[0], "    while True: pass") == 0.0


def test_only_test_is_there(tmp_path):
    with pytest.raises(ConfigError, match="split=train: humaneval has test alone"):
        load_humaneval("train", TaskFiles(folder="unused", path=str(tmp_path)))


@pytest.mark.parametrize("key", [*ROW])
def test_a_malformed_row_is_named(tmp_path, key):
    with pytest.raises(DataError, match=rf"HumanEval\.jsonl:2: {key}=None"):
        load(tmp_path, ROW, {**ROW, key: None})


# ---- the real problems


@pytest.fixture(scope="module")
def real(test_data):
    return load_humaneval("test", TaskFiles(folder="unused", path=str(test_data / "humaneval")))


def test_there_are_164_and_every_program_parses(real):
    assert [conversation.facts["task_id"] for conversation in real] == [f"HumanEval/{n}" for n in range(164)]
    for conversation in real:
        tree = ast.parse(program(conversation, conversation.messages[1].text))
        defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        assert defined.count(conversation.facts["entry_point"]) == 2  # the prompt's, then the reply's


def passes_only_when_right(task, index):
    conversation = task[index]
    solution = conversation.messages[1].text
    name = conversation.facts["entry_point"]
    assert task.reward(conversation, solution) == 1.0, index
    assert task.reward(conversation, f"{solution.removesuffix('```')}\n{name} = lambda *a: object()\n```") == 0.0, index


@pytest.mark.parametrize("index", [0, 32, 38, 50, 64, 81, 134, 163])
def test_a_canonical_solution_passes_and_a_broken_one_does_not(real, index):
    """Among them: 32, 38 and 50, whose tests call another function of the prompt; 64, which begins with a string."""
    passes_only_when_right(real, index)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_canonical_solution_passes_and_no_broken_one(real):
    for index in range(len(real)):
        passes_only_when_right(real, index)
