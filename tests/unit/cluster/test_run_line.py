"""The whole line's order of work, with stages that a test makes up and without a Ray."""

import io

from nanochat.cluster import line
from nanochat.cluster.terminal import Terminal
from nanochat.config.evaluation import EvaluationConfig
from nanochat.config.line import LineConfig


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
