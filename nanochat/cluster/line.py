"""All stages in order, as one job. A stage says itself what is missing of it: what is complete starts no Ray, no node.

Data comes first, that of chat stages included, and asks for CPUs alone, so nodes with GPUs come when there is something
to train on; a stage's workers are gone when it ends, and with them what keeps its nodes.
"""

import time
from dataclasses import replace

from nanochat import storage
from nanochat.cluster.jobs import (
    evaluate_models,
    finetune_chat,
    pack_mixture,
    prepare_data,
    prepared_before,
    pretrain_base,
)
from nanochat.cluster.rl_job import practise, prepare_practice, with_paths
from nanochat.cluster.session import session
from nanochat.cluster.terminal import Terminal
from nanochat.cluster.usage import Usage
from nanochat.config.line import STAGES, LineConfig
from nanochat.config.serving import ServingConfig
from nanochat.evaluation.evaluate import Evaluator
from nanochat.pages.report import write_report
from nanochat.pages.walk import write_walk
from nanochat.run_context import RunContext
from nanochat.storage import RunFolder
from nanochat.training import plan as planning
from nanochat.training.checkpoint import STAGES as MODELS
from nanochat.training.rl import load_practice


def run_line(line: LineConfig, terminal: Terminal, is_check: bool = False) -> None:
    """Do the stages that are asked for and not complete, write the pages, then serve if that is asked for.

    With `is_check` it serves until one answer has come. Raises: what a stage raises.
    """
    start_s = time.monotonic()
    folder = RunFolder(line.run_dir)
    work = {"data": _data, "pretrain": _pretrain, "sft": _sft, "rl": _rl, "evaluate": _evaluate}
    usage = Usage(folder, line.prices())
    with session(line.cluster, line.run_dir):
        for stage in (name for name in STAGES if name in line.stages and name in work):
            with usage.of(stage):
                work[stage](line, terminal)
    terminal.line(f"report     {write_report(line.run_dir)}")
    terminal.line(f"walk       {write_walk(line.run_dir)}")
    terminal.line(f"done in {(time.monotonic() - start_s) / 60:.1f} minutes{usage.cost_text()}")
    if "serve" in line.stages:
        _serve(line, terminal, is_check)


def _data(line: LineConfig, terminal: Terminal) -> None:
    plan = planning.resolve(line.pretrain, line.tokenizer.vocab_size, line.shards.sequence_len)
    tokens = plan.num_steps * plan.tokens_per_step
    made_from = (line.corpus, line.tokenizer, line.shards, tokens)
    packed = prepared_before(line.run_dir, *made_from)
    if packed is None:
        prepare_data(line.run_dir, *made_from, line.cluster, terminal)
    else:
        terminal.line(f"shards     {packed.rows('train')} training rows, made before")
    _chat_data(line, terminal)


def _chat_data(line: LineConfig, terminal: Terminal) -> None:
    """Load and pack what later stages read; a stage that has begun, or begins from elsewhere, looks after itself."""
    folder = RunFolder(line.run_dir)
    if "sft" in line.stages and line.sft.base is None and not storage.exists(folder.sft.config):
        pack_mixture(line.run_dir, line.sft, line.shards.sequence_len, line.cluster, terminal)
    if "rl" in line.stages and not storage.exists(folder.rl.config):
        terminal.live("loading what is practised; what is not here yet is downloaded")
        load_practice(with_paths(line.rl), folder.tasks)
    if "evaluate" in line.stages and not storage.exists(folder.evaluation.root):
        terminal.live("loading what is scored; what is not here yet is downloaded")
        for scoring in (line.score_base, line.score_chat):
            _ = Evaluator(scoring, RunContext(), line.run_dir, []).tasks


def _pretrain(line: LineConfig, terminal: Terminal) -> None:
    pretrain_base(line.run_dir, line.pretrain, line.cluster, terminal)


def _sft(line: LineConfig, terminal: Terminal) -> None:
    finetune_chat(line.run_dir, line.sft, line.cluster, terminal)


def _rl(line: LineConfig, terminal: Terminal) -> None:
    practice = prepare_practice(line.run_dir, line.rl, terminal)
    cluster = line.cluster
    if line.rl_workers is not None:
        cluster = replace(cluster, num_workers=line.rl_workers, min_workers=None)
    practise(line.run_dir, practice, line.rollouts, cluster, terminal)


def _evaluate(line: LineConfig, terminal: Terminal) -> None:
    models = _trained(line)
    for scoring, names in ((line.score_base, models & {"pretrain"}), (line.score_chat, models - {"pretrain"})):
        if names:
            scoring = replace(scoring, models=tuple(sorted(names, reverse=True)))
            evaluate_models(line.run_dir, scoring, line.cluster, terminal)


def _trained(line: LineConfig) -> set[str]:
    """Return the stages that have a model."""
    folder = RunFolder(line.run_dir)
    return {name for name in MODELS if storage.exists(getattr(folder, name).checkpoints)}


def _serve(line: LineConfig, terminal: Terminal, is_check: bool) -> None:
    from nanochat.cluster.endpoint_session import free_or_any, run_endpoint

    models = tuple(name for name in reversed(MODELS) if name in _trained(line))
    # Not compiled: for a look at the models that is not worth the wait.
    serving = ServingConfig(run_dir=line.run_dir, models=models, port=line.port or free_or_any(8000), compile="off")
    run_endpoint(serving, line.replicas, line.cluster, terminal, is_check=is_check)
