"""What evaluation/MODEL.json keeps from call to call, and which work a config is cut into."""

import pytest
from small_bundle import write_bundle

from nanochat.config.evaluation import EvaluationConfig
from nanochat.errors import ConfigError
from nanochat.evaluation.evaluate import Evaluator, Item, Model, _keep, items_of
from nanochat.run_context import RunContext
from nanochat.storage import read_json, write_json
from nanochat.training.checkpoint import FORMAT_VERSION


def evaluator(run_dir, weights: str = "a", **changes) -> Evaluator:
    checkpoint = f"{run_dir}/step_000001"
    write_json(f"{checkpoint}/state.json", {"format_version": FORMAT_VERSION, "world_size": 1})
    write_json(f"{checkpoint}/checksums_00_of_01.json", {"sha256": {"model.safetensors": weights}})
    config = EvaluationConfig(**({"tasks": ("spelling",)} | changes))
    return Evaluator(config, RunContext(), str(run_dir), [Model("sft", checkpoint)])


def score(centered: float) -> dict:
    return {"accuracy": 0.5, "n": 4, "stderr": 0.25, "chance": 0.0, "centered": centered, "examples": {},
            "settings": {}}  # fmt: skip


def test_scores_of_the_same_weights_add_up_and_of_others_replace_them(tmp_path):
    same = evaluator(tmp_path)
    _keep(same, "sft", {"chat": {"gsm8k": score(0.5)}, "bits_per_byte": 1.5})
    kept = _keep(same, "sft", {"chat": {"mmlu": score(0.25)}})
    assert kept["chat"].keys() == {"gsm8k", "mmlu"}
    assert kept["bits_per_byte"] == 1.5
    assert kept["chat_core"]["value"] == pytest.approx(0.375)
    assert read_json(f"{tmp_path}/evaluation/sft.json")["chat"] == kept["chat"]
    again = _keep(same, "sft", {"chat": {"gsm8k": score(0.0)}})
    assert again["chat"]["gsm8k"]["centered"] == 0.0
    other = _keep(evaluator(tmp_path, "b"), "sft", {"chat": {"mmlu": score(1.0)}})
    assert other["chat"].keys() == {"mmlu"}
    assert "bits_per_byte" not in other


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
        ("arithmatic", "task=arithmatic: must be one of .* Did you mean arithmetic"),
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
