"""Reinforcement learning to the report's section: before and after, curves over updates, best and worst rollouts.

A value that is missing or no finite number is left out, so a run that is under way, or diverged, has its section too.
"""

import math
import re
import statistics
from typing import Any, Literal

from markupsafe import Markup

from nanochat import storage
from nanochat.evaluation.statistics import standard_error
from nanochat.pages.charts import Series, line_chart, smooth
from nanochat.storage import RunFolder

SHOWN_NOTES = 3
"""So many of the newest notes of rollouts are shown."""
CONFIG = ("base", "task", "reward", "held_out", "num_steps", "groups_per_step", "samples_per_group", "max_new_tokens")
ROLLOUT = {"which": "", "question": "", "reply": "", "reward": None, "tokens": None, "truncated": False}
SHARE: dict[str, Any] = {"from_zero": True, "percent": True, "y_max": 0.01}
CURVES: tuple[tuple[str, tuple[str, ...], dict[str, Any]], ...] = (
    ("Length of a completion (tokens)", ("completion_tokens",), {}),
    ("Cut off before their end (share of the samples)", ("truncated_share",), SHARE),
    ("All rewards equal (share of the groups)", ("zero_variance_share",), SHARE),
    ("Staleness (updates; faint: the most)", ("staleness_max", "staleness"), {"from_zero": True}),
    ("Mismatch (KL of sampling and learning)", ("mismatch_kl",), {"from_zero": True}),
    ("Entropy (nats per token)", ("entropy",), {"from_zero": True}),
    ("Learner waits (share of the time; faint: rollouts wait)", ("rollout_idle_share", "learner_idle_share"), SHARE),
    ("Sampled tokens per second", ("tokens_per_s",), {"from_zero": True}),
)
"""Titles, columns of the records, and how the axis is; of two lines the first is faint."""
Record = dict[str, Any]


def rl_values(folder: RunFolder) -> Record:
    """Return what the report's section on reinforcement learning shows; None and empty where it has not begun."""
    if not storage.exists(folder.rl.config):
        return {"rl": None, "rl_charts": [], "rollouts": []}
    written = storage.read_json(folder.rl.config)
    known = written.get("config", {}).get("rl", {}) | written.get("resolved", {})
    records, notes = _records(folder.rl.metrics), [str(record.get("note")) for record in _records(folder.rl.notes)]
    return {
        "rl": {name: known.get(name) for name in CONFIG} | rl_figures(records, notes),
        "rl_charts": rl_charts(records) if records else [],
        "rollouts": noted_rollouts(_records(folder.rl.samples)),
    }


def rl_figures(records: list[Record], notes: list[str]) -> Record:
    """Return the numbers of the section's head; None where there is no record of one.

    Before is the score on held-out problems at step 0, after the last one; the rate is a median without the first.
    """
    updates = [record for record in records if "loss" in record]
    scores = [
        {"step": step, "accuracy": right, "n": n, "stderr": standard_error(right, n)}
        for step, right, n in _rows(records, "step", "held_out_pass_at_1", "held_out_n")
        if 0 <= right <= 1 and n >= 1
    ]
    rates = [rate for (rate,) in _rows(updates[1:] or updates, "tokens_per_s")]
    deaths = [int(count) for (count,) in _rows(updates, "rollout_deaths")]  # those since the last start; notes have all
    return {
        "before": next((score for score in scores if score["step"] == 0), None),
        "after": next((score for score in reversed(scores) if score["step"] > 0), None),
        "updates": max((int(step) + 1 for (step,) in _rows(updates, "step")), default=0),
        "samples": sum(int(count) for (count,) in _rows(updates, "samples")),
        "training_s": max((seconds for (seconds,) in _rows(updates, "training_s")), default=None),
        "tokens_per_s": statistics.median(rates) if rates else None,
        "starts": sum(note.startswith("a worker group starts at step") for note in notes),
        "deaths": max(sum(note.startswith("a rollout actor died") for note in notes), *deaths, 0),
    }


def noted_rollouts(records: list[Record]) -> list[Record]:
    """Return the newest notes, the newest first, each with its step and its rollouts."""
    notes = [
        {"step": record.get("step"), "rollouts": [ROLLOUT | one for one in record["samples"] if isinstance(one, dict)]}
        for record in records
        if isinstance(record.get("samples"), list)
    ]
    return [note for note in notes if note["rollouts"]][: -SHOWN_NOTES - 1 : -1]


def rl_charts(records: list[Record]) -> list[Markup]:
    """Return the pictures of reinforcement learning, over updates."""
    reward = _series(records, "reward", "faint")
    smoothed = zip([step for step, _ in reward.points], smooth([value for _, value in reward.points]), strict=True)
    tries = sorted({int(k) for record in records for name in record for k in re.findall(r"^pass_at_(\d+)$", name)})
    named = "pass@k of the samples" + (f", upwards k = {', '.join(map(str, tries))}" if tries else "")
    whole = SHARE | {"y_max": 1.0}
    charts = [
        line_chart(
            "Reward, mean of the samples (dots: held-out problems)",
            [reward, Series("smoothed", list(smoothed)), _series(records, "held_out_reward", "dotted")],
        ),
        line_chart("Right on held-out problems", [_series(records, "held_out_pass_at_1", "dotted")], **whole),
        line_chart(named, [_series(records, f"pass_at_{k}") for k in tries], **whole),
    ]
    for title, names, options in CURVES:
        lines = [_series(records, name, "line" if name == names[-1] else "faint") for name in names]
        charts.append(line_chart(title, lines, **options))
    return charts


def _records(path: str) -> list[Record]:
    return [record for record in storage.read_jsonl(path) if isinstance(record, dict)]


def _rows(records: list[Record], *names: str) -> list[Any]:
    """Return the named values of each record that has them all as finite numbers."""
    rows = [tuple(record.get(name) for name in names) for record in records]
    return [row for row in rows if all(isinstance(value, int | float) and math.isfinite(value) for value in row)]


def _series(records: list[Record], name: str, style: Literal["line", "faint", "dotted"] = "line") -> Series:
    return Series(name, _rows(records, "step", name), style)
