"""CORE tasks as local tasks of lm-eval, its runs as a child process, and what nanochat's own evaluation says.

Each example becomes one line of JSON: the whole prompt with its solved examples, cut where nanochat begins to score.
lm-eval cuts between texts, and moves spaces at the end of a context behind the cut; examples whose cut it could not
make are left out.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from nanochat.data.tokenizer import Tokenizer
from nanochat.evaluation.core import CoreTask
from nanochat.evaluation.scoring import GPTScorer, Option

SHARED = {"dataset_path": "json", "test_split": "test", "target_delimiter": "", "metadata": {"version": 1}}
ACCURACY = {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
BY_MEAN = "process_results: !function by_mean.by_mean\n"
BY_MEAN_CODE = """
def by_mean(doc, results):
    nats = [-logprob / tokens for (logprob, _), tokens in zip(results, doc["tokens"])]
    return {"acc": float(nats.index(min(nats)) == doc["gold"])}
"""
"""CORE compares options by the mean of their tokens' nats; lm-eval's own metrics by sum, characters or bytes."""
KINDS = {
    "multiple_choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "continuations",
        "doc_to_target": "gold",
    },
    "schema": {
        "output_type": "multiple_choice", "doc_to_text": "gold", "doc_to_choice": "contexts",
        "doc_to_target": "{{continuation}}",
    },
    "language_modeling": {
        "output_type": "loglikelihood", "doc_to_text": "{{context}}", "doc_to_target": "{{continuation}}",
    },
}  # fmt: skip


@dataclasses.dataclass
class Expected:
    """What nanochat says of an example."""

    index: int
    logprobs: list[float]
    """Of each option's scored tokens together."""
    is_greedy: list[bool]
    is_right: bool


def write_task(folder: Path, name: str, kind: dict, rows: Sequence[dict], tail: str = "") -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    task = {"task": name, "dataset_kwargs": {"data_files": {"test": str(data)}}, **SHARED, **kind}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task) + tail, "utf-8")


def write_core_task(folder: Path, task: CoreTask, scorer: GPTScorer, tokenizer: Tokenizer, count: int) -> list[int]:
    """Write the first examples that lm-eval can cut where nanochat does, and return their numbers."""
    (folder / "by_mean.py").write_text(BY_MEAN_CODE)
    rows: list[dict] = []
    indices: list[int] = []
    for index in range(len(task.rows)):
        options = task.groups(scorer, [index])[0]
        cuts = [_cut(option, tokenizer) for option in options]
        if any(cut is None for cut in cuts) or max(len(option.tokens) for option in options) >= scorer.max_tokens:
            continue
        contexts, continuations = zip(*cuts)
        row = {
            "tokens": [len(option.tokens) - option.start for option in options],
            "gold": task.rows[index].get("gold"),
        }
        rows.append(row | {"context": contexts[0], "contexts": contexts, "continuations": continuations,
                           "continuation": continuations[0]})  # fmt: skip
        indices.append(index)
        if len(rows) == count:
            break
    assert len(rows) == count, f"lm-eval can cut {len(rows)} of {len(task.rows)} examples of {task.label} alike"
    tail = "" if task.kind == "language_modeling" else BY_MEAN
    write_task(folder, task.label, KINDS[task.kind] | ACCURACY, rows, tail)
    return indices


def _cut(option: Option, tokenizer: Tokenizer) -> tuple[str, str] | None:
    context, continuation = (tokenizer.decode(ids) for ids in (option.tokens[1 : option.start],
                                                               option.tokens[option.start :]))  # fmt: skip
    alike = tokenizer.encode_ordinary(context + continuation) == [*option.tokens[1:]]
    if alike and context and not context[-1].isspace() and len(tokenizer.encode_ordinary(context)) == option.start - 1:
        return context, continuation
    return None


def expected_of(task: CoreTask, scorer: GPTScorer, indices: Sequence[int], *, bos: bool = True) -> list[Expected]:
    """Score examples with nanochat's own evaluation; without `bos`, as it would without the token in front."""
    found = []
    groups = task.groups(scorer, indices)
    if not bos:
        groups = [[Option(option.tokens[1:], option.start - 1) for option in group] for group in groups]
    for index, group, scores in zip(indices, groups, scorer.score(groups), strict=True):
        logprobs = [-score.mean_nats * (len(one.tokens) - one.start) for one, score in zip(group, scores, strict=True)]
        found.append(Expected(index, logprobs, [score.is_greedy for score in scores], task.is_right(index, scores)))
    return found


@dataclasses.dataclass
class LmEvalRun:
    """What a run of lm-eval said."""

    code: int
    output: str
    samples: dict[str, list[dict]]
    accuracy: dict[str, float]

    def likelihoods(self, task: str) -> list[list[tuple[float, bool]]]:
        """By example and option."""
        return [
            [(float(logprob), is_greedy == "True") for logprob, is_greedy in sample["filtered_resps"]]
            for sample in self.samples[task]
        ]


def run_lm_eval(
    folder: Path, url: str, tasks: Sequence[str], *flags: str, kind: str = "local-completions", timeout_s: float = 120,
    **model_args: object,
) -> LmEvalRun:  # fmt: skip
    """Run `lm_eval` on a folder's tasks against an endpoint, with nothing of Hugging Face's in reach."""
    path = "chat/completions" if "chat" in kind else "completions"
    arguments = {"base_url": f"{url}/v1/{path}", "max_retries": 1, **model_args}
    out = folder / "out" / "-".join([kind, *map(str, model_args.values())]).replace("/", "_")
    names = ("no_proxy", "NO_PROXY")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
               "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", "--model", kind, "--tasks", ",".join(tasks), "--model_args",
         ",".join(f"{name}={value}" for name, value in arguments.items()), "--include_path", str(folder),
         "--output_path", str(out), "--log_samples", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s, cwd=folder,
        env=os.environ | offline | dict.fromkeys(names, "127.0.0.1"),
    )  # fmt: skip
    samples, accuracy = {}, {}
    for task in tasks if done.returncode == 0 else ():
        (path,) = out.glob(f"*/samples_{task}_*.jsonl")
        lines = map(json.loads, path.read_text("utf-8").splitlines())
        samples[task] = sorted(lines, key=lambda sample: sample["doc_id"])
        (results,) = out.glob("*/results_*.json")
        accuracy[task] = json.loads(results.read_text("utf-8"))["results"][task].get("acc,none")
    return LmEvalRun(done.returncode, done.stdout, samples, accuracy)
