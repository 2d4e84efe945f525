"""What evaluation/MODEL.json keeps from call to call, and which work a config is cut into."""

import pytest
from small_bundle import write_bundle

from nanochat.config.evaluation import EvaluationConfig
from nanochat.errors import ConfigError, DamagedFileError
from nanochat.evaluation.chat import Verdict
from nanochat.evaluation.evaluate import Evaluator, Item, Model, evaluate, items_of, scored_before
from nanochat.run_context import RunContext
from nanochat.storage import read_json, write_json
from nanochat.training.checkpoint import FORMAT_VERSION


def evaluator(run_dir, weights: str = "a", **changes) -> Evaluator:
    checkpoint = f"{run_dir}/step_000001"
    write_json(f"{checkpoint}/state.json", {"format_version": FORMAT_VERSION, "world_size": 1})
    write_json(f"{checkpoint}/checksums_00_of_01.json", {"sha256": {"model.safetensors": weights}})
    config = EvaluationConfig(**({"tasks": ("spelling",)} | changes))
    return Evaluator(config, RunContext(), str(run_dir), [Model("sft", checkpoint)])


def scores_of(run_dir, monkeypatch, verdicts, note=print, **changes) -> dict:
    """Evaluate with verdicts made up for each item."""
    one = evaluator(run_dir, **changes)
    one.run = RunContext(note=note)
    monkeypatch.setattr(Evaluator, "__call__", lambda self, item: verdicts(item))
    return evaluate(one, RunContext())["sft"]


def all_right(item: Item) -> list:
    return [Verdict(item.first + n, "q", "a", "r", True) for n in range(item.count)]


def all_wrong(item: Item) -> list:
    return [Verdict(item.first + n, "q", "a", "r", False) for n in range(item.count)]


def test_scores_of_the_same_weights_add_up_and_of_others_replace_them(tmp_path, monkeypatch):
    found = scores_of(tmp_path, monkeypatch, all_right, tasks=("spelling",), max_per_task=8)
    assert found["chat"]["spelling"]["accuracy"] == 1.0
    assert found["chat_core"]["value"] == 1.0
    found = scores_of(tmp_path, monkeypatch, all_wrong, tasks=("arithmetic",), max_per_task=8)
    assert {name: score["accuracy"] for name, score in found["chat"].items()} == {"spelling": 1.0, "arithmetic": 0.0}
    assert read_json(f"{tmp_path}/evaluation/sft.json")["chat"] == found["chat"]
    again = scores_of(tmp_path, monkeypatch, all_wrong, tasks=("spelling",), max_per_task=8)
    assert again["chat"]["spelling"]["accuracy"] == again["chat_core"]["value"] == 0.0
    said = []
    other = scores_of(tmp_path, monkeypatch, all_right, said.append, weights="b", tasks=("arithmetic",), max_per_task=8)
    assert other["chat"].keys() == {"arithmetic"}
    assert other["chat_core"] is None
    assert read_json(f"{tmp_path}/evaluation/earlier/sft_a.json")["chat"] == again["chat"]
    assert len(said) == 1
    assert said[0].endswith(f"go to {tmp_path}/evaluation/earlier/sft_a.json")


def test_what_was_scored_before_is_known_by_weights_and_all_that_was_asked(tmp_path, monkeypatch):
    asked = {"tasks": ("spelling", "arithmetic"), "max_per_task": 8}
    assert scored_before(evaluator(tmp_path, **asked)) is None
    found = scores_of(tmp_path, monkeypatch, all_right, **asked)
    before = scored_before(evaluator(tmp_path, **asked, actors=3, batch_tokens=7))
    assert before["sft"]["chat"] == found["chat"]
    for change in ({"weights": "b"}, {"max_per_task": 9}, {"tasks": ("spelling",)}, {"seed": 1}, {"samples": 2}):
        one = asked | change | ({"temperature": 1.0} if "samples" in change else {})
        assert scored_before(evaluator(tmp_path, **one)) is None, change
    scores_of(tmp_path, monkeypatch, all_right, tasks=("identity",), max_per_task=8)
    assert scored_before(evaluator(tmp_path, **asked)) is not None, "another task's score changes nothing"
    scores_of(tmp_path, monkeypatch, all_right, tasks=("spelling",), max_per_task=4)
    assert scored_before(evaluator(tmp_path, **asked)) is None, "one of its scores is of fewer problems now"


@pytest.mark.parametrize("kind", ["task", "identity", "core"])
def test_what_was_scored_before_is_known_by_the_content_of_files(tmp_path, monkeypatch, kind):
    file = tmp_path / "character.toml"
    file.write_text('name = "Ada"\nmaker = "us"\n')
    asked = {"task": {"tasks": (f"identity={file}",)}, "identity": {"tasks": ("identity",), "identity": str(file)}}
    if kind == "core":
        bundle = write_bundle(tmp_path / "bundle")
        file, asked["core"] = tmp_path / "bundle/eval_data/b/counting.jsonl", {"tasks": (), "core": bundle}
    asked = asked[kind] | {"max_per_task": 2}
    scores_of(tmp_path, monkeypatch, lambda item: all_right(item) if item.kind == "chat" else [True] * 2, **asked)
    assert scored_before(evaluator(tmp_path, **asked)) is not None
    file.write_text(file.read_text() + "\n")
    assert scored_before(evaluator(tmp_path, **asked)) is None
    file.unlink()
    assert scored_before(evaluator(tmp_path, **asked)) is None, "whoever reads it says that it is not there"


def test_a_result_that_was_being_scored_again_is_not_complete(tmp_path, monkeypatch):
    scores_of(tmp_path, monkeypatch, all_right, tasks=("spelling", "arithmetic"), max_per_task=8)

    def dies(item: Item) -> list:
        if item.task == "arithmetic":
            raise RuntimeError("lost")
        return all_wrong(item)

    with pytest.raises(RuntimeError, match="lost"):
        scores_of(tmp_path, monkeypatch, dies, tasks=("spelling", "arithmetic"), max_per_task=4)
    assert scored_before(evaluator(tmp_path, tasks=("spelling", "arithmetic"), max_per_task=8)) is None


@pytest.mark.parametrize("kind", ["core", "bits_per_byte"])
def test_core_or_bits_per_byte_scored_again_in_another_way_replace_what_was_complete(tmp_path, monkeypatch, kind):
    asked = {"tasks": (), kind: write_bundle(tmp_path / "bundle") if kind == "core" else True}
    scores_of(tmp_path, monkeypatch, lambda item: [True] * item.count, **asked)
    scores_of(tmp_path, monkeypatch, all_right, tasks=("spelling",), max_per_task=8)
    assert scored_before(evaluator(tmp_path, **asked)) is not None, "another task's score changes nothing"
    scores_of(tmp_path, monkeypatch, lambda item: [True] * item.count, dtype="float32", **asked)
    assert scored_before(evaluator(tmp_path, **asked)) is None
    assert scored_before(evaluator(tmp_path, dtype="float32", **asked)) is not None


def test_what_was_asked_for_reaches_the_judge(tmp_path, monkeypatch):
    changes = {"samples": 2, "temperature": 0.5, "max_new_tokens": 7, "seed": 3, "batch_tokens": 5}
    one, asked = evaluator(tmp_path, **changes), []
    monkeypatch.setattr("nanochat.evaluation.evaluate.judge", lambda *_, **options: asked.append(options))
    monkeypatch.setattr(Evaluator, "model", lambda self, name: None)
    one.tokenizer = None
    one(Item("sft", "chat", "spelling", 0, 4))
    assert asked == [changes]


def test_each_model_is_scored_with_its_own_weights_and_one_is_held_at_a_time(tmp_path, monkeypatch):
    loaded = []

    def load(checkpoint, *_):
        loaded.append(checkpoint.folder)
        return checkpoint.folder

    monkeypatch.setattr("nanochat.evaluation.evaluate.load_model", load)
    models = [Model("a", "folder/a"), Model("b", "folder/b")]
    one = Evaluator(EvaluationConfig(), RunContext(), str(tmp_path), models)
    one.tokenizer = None
    assert [one.model(name) for name in "aabba"] == [f"folder/{name}" for name in "aabba"]
    assert loaded == ["folder/a", "folder/b", "folder/a"]


def test_settings_stand_beside_each_score(tmp_path, monkeypatch):
    changes = {"max_per_task": 8, "samples": 2, "temperature": 0.5, "max_new_tokens": 7, "seed": 3, "dtype": "float32"}
    found = scores_of(tmp_path, monkeypatch, lambda item: all_right(item) * 2, **changes)
    assert found["chat"]["spelling"]["settings"] == changes


def test_what_was_scored_before_a_failure_stays(tmp_path, monkeypatch):
    def broken(item: Item) -> list:
        if item.task == "arithmetic":
            raise KeyboardInterrupt
        return all_right(item)

    with pytest.raises(KeyboardInterrupt):
        scores_of(tmp_path, monkeypatch, broken, tasks=("spelling", "arithmetic"))
    assert read_json(f"{tmp_path}/evaluation/sft.json")["chat"]["spelling"]["n"] == 500


def test_texts_that_are_no_unicode_are_kept_as_far_as_they_go(tmp_path, monkeypatch):
    lone = [Verdict(0, "half \ud83d", "a", "r", False)]
    found = scores_of(tmp_path, monkeypatch, lambda item: lone, max_per_task=1)
    assert found["chat"]["spelling"]["n"] == 1
    written = read_json(f"{tmp_path}/evaluation/sft.json")["chat"]["spelling"]["examples"]["wrong"]
    assert written[0]["question"] == "half ?"


@pytest.mark.parametrize("text", ["[1]", "{}", '{"chat": {"a": {}}, "weights": "a", "checkpoint": "x"}', '{"chat": {'])
def test_a_stray_file_is_named_before_anything_is_scored(tmp_path, monkeypatch, text):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "sft.json").write_text(text)
    asked = []
    with pytest.raises(DamagedFileError, match=r"evaluation/sft\.json"):
        scores_of(tmp_path, monkeypatch, asked.append)
    assert not asked


def test_nothing_to_score_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="there is nothing to score"):
        scores_of(tmp_path, monkeypatch, all_right, tasks=())


def test_a_task_that_is_named_twice_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="spelling is there twice"):
        list(items_of(evaluator(tmp_path, tasks=("spelling", "spelling:test"))))


def test_items_cover_every_problem_once(tmp_path):
    one = evaluator(tmp_path, tasks=("spelling", "identity"), max_per_task=150, bits_per_byte=True)
    items = list(items_of(one))
    for label in ("spelling", "identity"):
        spans = [(item.first, item.count) for item in items if item.task == label]
        covered = [place for first, count in spans for place in range(first, first + count)]
        assert covered == list(range(150))
    assert [item for item in items if item.kind == "bits_per_byte"] == [
        Item("sft", "bits_per_byte", "validation", part, 4) for part in range(4)
    ]


@pytest.mark.parametrize(("limit", "sizes"), [(None, (11, 4, 7)), (5, (5, 4, 5))])
def test_items_of_core_cover_its_first_examples_once(tmp_path, monkeypatch, limit, sizes):
    monkeypatch.setattr("nanochat.evaluation.evaluate.PROBLEMS_OF_ITEM", 3)
    one = evaluator(tmp_path, tasks=(), core=write_bundle(tmp_path / "bundle"), max_per_task=limit)
    items = list(items_of(one))
    for label, size in zip(("colours", "pronouns", "counting"), sizes, strict=True):
        spans = [(item.first, item.count) for item in items if item.task == label]
        assert [place for first, count in spans for place in range(first, first + count)] == list(range(size))
        assert all(count <= 3 for _, count in spans)


def test_a_limit_draws_problems_by_the_seed_and_changes_none(tmp_path):
    whole = evaluator(tmp_path).tasks["spelling"]
    some, again, other = (
        evaluator(tmp_path, max_per_task=40, seed=seed).tasks["spelling"] for seed in (1, 1, 2)
    )  # fmt: skip
    asked = [[conversation.messages[0].text for conversation in task] for task in (some, again, other)]
    assert asked[0] == asked[1] != asked[2]
    assert set(asked[0]) <= {conversation.messages[0].text for conversation in whole}
    assert asked[0] != [conversation.messages[0].text for conversation in whole[:40]]


@pytest.mark.parametrize(
    ("task", "rule"),
    [
        ("arithmatic", "tasks=arithmatic: must be one of .* Did you mean arithmetic"),
        ("arithmetic:tset", "tset"),
        ("a b", "tasks=a b: must be NAME"),
        ("", "tasks=: must be NAME"),
    ],
)
def test_a_task_that_is_none_is_refused(tmp_path, task, rule):
    with pytest.raises(ConfigError, match=rule):
        list(items_of(evaluator(tmp_path, tasks=(task,))))


def test_conversations_without_a_right_answer_are_not_scored(tmp_path):
    folder = tmp_path / "chats"
    folder.mkdir()
    line = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    (folder / "test.jsonl").write_text(line)
    with pytest.raises(ConfigError, match="has no right answers to score"):
        list(items_of(evaluator(tmp_path, tasks=(f"messages={folder}",))))


def test_a_password_in_an_address_comes_into_no_file_of_scores(tmp_path):
    with pytest.raises(ConfigError, match=r"^task_mirror=https://\*\*\*@example\.org/x: an address must not hold"):
        evaluator(tmp_path, task_mirror="https://me:Secret@example.org/x")
