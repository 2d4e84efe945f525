"""How fast CORE is scored, beside one example at a time over whole sequences; the numbers that the README quotes.

Three ways score the same options with the same model and dtype, taking turns on each task: ours in batches, ours with
one example a call, and nanochat's: the options of one example as one padded batch, every token computed for every
option, logits at all positions (karpathy/nanochat core_eval.py@92d63d4). Tokenising is in none of the times.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F

from nanochat.data.tokenizer import Tokenizer
from nanochat.evaluation.core import load_bundle
from nanochat.evaluation.scoring import GPTScorer, Group, cropped
from nanochat.inference.load import load_model
from nanochat.model.gpt import GPT
from nanochat.run_context import RunContext
from nanochat.storage import RunFolder
from nanochat.training.checkpoint import newest_of

WARM_UP_EXAMPLES = 4
Dtype = Literal["bfloat16", "float32"]


def measure_core(
    run_dir: str,
    bundle_folder: str,
    max_per_task: int = 32,
    rounds: int = 3,
    dtypes: tuple[Dtype, ...] = ("bfloat16", "float32"),
) -> dict[str, Any]:
    """Time the run's newest pretrained model on the first examples of each few-shot multiple-choice task.

    Returns, by dtype, the median over rounds of each task's seconds by way, and of the ratios of all tasks together.
    Raises: CheckpointError or DataError if a part of the run or the bundle is missing.
    """
    folder = RunFolder(run_dir)
    tokenizer, checkpoint = Tokenizer.load(folder.tokenizer), newest_of(folder.pretrain, print)
    tasks = [
        task for task in load_bundle(bundle_folder).tasks.values()
        if task.kind == "multiple_choice" and task.num_fewshot
    ]  # fmt: skip
    results: dict[str, Any] = {}
    for dtype in dtypes:
        scorer = GPTScorer(load_model(checkpoint, tokenizer, RunContext(), dtype), tokenizer)
        groups: dict[str, list[Group]] = {
            task.label: [
                cropped(group, scorer.max_tokens, scorer.bos)
                for group in task.groups(scorer, range(min(max_per_task, len(task.rows))))
            ]
            for task in tasks
        }
        results[dtype] = _compare(scorer, groups, rounds)
    return results


@torch.no_grad()
def score_as_nanochat_does(model: GPT, group: Group) -> list[float]:
    """Return the mean nats of one example's options from the logits of every position of every option."""
    width = max(len(option.tokens) for option in group)
    rows = [[*option.tokens, *[0] * (width - len(option.tokens))] for option in group]
    tokens_BT = torch.tensor(rows, device=model.lm_head.weight.device)
    logits_BTV = model.logits(model(tokens_BT))
    targets_BT = torch.roll(tokens_BT, -1, dims=1)
    nats_BT = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none").view_as(targets_BT)
    logits_BTV.argmax(dim=-1)  # it asks for the greedy tokens of every task
    return [nats_BT[row, option.start - 1 : len(option.tokens) - 1].mean().item() for row, option in enumerate(group)]


def _compare(scorer: GPTScorer, groups: dict[str, list[Group]], rounds: int) -> dict[str, Any]:
    """Let the ways take turns on every task, `rounds` times."""

    def batched(groups: list[Group]) -> list[list[float]]:
        return [[score.mean_nats for score in scores] for scores in scorer.score(groups)]

    ways: dict[str, Callable[[list[Group]], list[list[float]]]] = {
        "batched": batched,
        "one_at_a_time": lambda groups: [batched([group])[0] for group in groups],
        "nanochat": lambda groups: list(map(functools.partial(score_as_nanochat_does, scorer.model), groups)),
    }
    seconds: dict[str, dict[str, list[float]]] = {label: {way: [] for way in ways} for label in groups}
    answers: dict[str, list[int]] = {way: [] for way in ways}
    for way in ways.values():
        way(next(iter(groups.values()))[:WARM_UP_EXAMPLES])
    for _ in range(rounds):
        for label, some in groups.items():
            for name, way in ways.items():
                start_s = time.perf_counter()
                found = way(some)
                seconds[label][name].append(time.perf_counter() - start_s)
                answers[name] += [nats.index(min(nats)) for nats in found]
    totals = {way: [sum(seconds[label][way][number] for label in groups) for number in range(rounds)] for way in ways}
    examples = sum(map(len, groups.values()))
    return {
        "examples": examples,
        "examples_per_s": {way: examples / statistics.median(total) for way, total in totals.items()},
        "speedup_over_nanochat": _ratio(totals["nanochat"], totals["batched"]),
        "speedup_over_one_at_a_time": _ratio(totals["one_at_a_time"], totals["batched"]),
        "same_answers": statistics.mean(map(int.__eq__, answers["batched"], answers["nanochat"])),
        "task_seconds": {
            label: {way: statistics.median(windows) for way, windows in by_way.items()}
            for label, by_way in seconds.items()
        },
    }


def _ratio(slow_s: list[float], fast_s: list[float]) -> float:
    return statistics.median(slow / fast for slow, fast in zip(slow_s, fast_s, strict=True))
