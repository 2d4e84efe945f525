"""The whole line's order of work, with stages that a test makes up and without a Ray."""

import io

from nanochat.cluster import line
from nanochat.cluster.terminal import Terminal
from nanochat.config.evaluation import EvaluationConfig
from nanochat.config.line import LineConfig
from nanochat.config.rl import RLConfig


def test_every_model_that_there_is_is_scored_base_and_chat_models_each_their_own_way(tmp_path, monkeypatch):
    scored: list[tuple] = []
    monkeypatch.setattr(line, "evaluate_models", lambda _, how, *rest: scored.append((how.tasks, how.models)))
    monkeypatch.setattr(line, "write_report", lambda run_dir: "")
    monkeypatch.setattr(line, "write_walk", lambda run_dir: "")
    base, chat = (EvaluationConfig(tasks=(name,)) for name in ("of_base", "of_chat"))
    asked = LineConfig(run_dir=str(tmp_path), stages=("evaluate",), score_base=base, score_chat=chat)
    expected = {
        "pretrain": [(("of_base",), ("pretrain",))],
        "sft": [(("of_base",), ("pretrain",)), (("of_chat",), ("sft",))],
        "rl": [(("of_base",), ("pretrain",)), (("of_chat",), ("sft", "rl"))],
    }
    for stage, both in expected.items():
        (tmp_path / stage / "checkpoints").mkdir(parents=True)
        scored.clear()
        line.run_line(asked, Terminal(io.StringIO()))
        assert scored == both


def test_what_chat_stages_read_is_ready_before_pretraining_begins(tmp_path, monkeypatch):
    """So no node with GPUs is there while text is downloaded and packed; a stage that has begun is left alone."""
    did: list[str] = []

    class Scored:
        def __init__(self, how, *rest) -> None:
            self.how = how

        @property
        def tasks(self) -> None:
            did.append(f"load {self.how.tasks[0]}")

    monkeypatch.setattr(line, "prepared_before", lambda *made_from: None)
    monkeypatch.setattr(line, "Evaluator", Scored)
    for name in ("prepare_data", "pack_mixture", "load_practice", "pretrain_base", "finetune_chat", "practise"):
        monkeypatch.setattr(line, name, lambda *arguments, name=name: did.append(name))
    monkeypatch.setattr(line, "prepare_practice", lambda *arguments: None)
    for name in ("write_report", "write_walk"):
        monkeypatch.setattr(line, name, lambda run_dir: "")
    base, chat = (EvaluationConfig(tasks=(name,)) for name in ("of_base", "of_chat"))
    asked = LineConfig(
        run_dir=str(tmp_path), stages=("data", "pretrain", "sft", "rl", "evaluate"), rl=RLConfig(task="arithmetic"),
        score_base=base, score_chat=chat,
    )  # fmt: skip
    line.run_line(asked, Terminal(io.StringIO()))
    stages = ["pretrain_base", "finetune_chat", "practise"]
    assert did == ["prepare_data", "pack_mixture", "load_practice", "load of_base", "load of_chat", *stages]
    for name in ("sft", "rl"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "evaluation").mkdir()
    did.clear()
    line.run_line(asked, Terminal(io.StringIO()))
    assert did == ["prepare_data", *stages]
