"""Reinforcement learning as a job: what is practised and by whom, and the run on the current Ray session."""

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from nanochat.cluster.jobs import named_model, watched
from nanochat.cluster.nodes import check_resources, on_nodes_for, resources, training_gpus
from nanochat.cluster.rollouts import RolloutSpec
from nanochat.cluster.session import start_ray
from nanochat.cluster.terminal import Terminal
from nanochat.cluster.trainer import TrainJob, check_workers, rl_worker, run_on_ray
from nanochat.config.cluster import ClusterConfig
from nanochat.config.rl import RLConfig, RolloutsConfig
from nanochat.data.tokenizer import Tokenizer
from nanochat.inference.rollouts import with_reward
from nanochat.inference.vllm_engine import check_vllm
from nanochat.provenance import begin_stage, check_stage
from nanochat.storage import RunFolder
from nanochat.tasks.registry import files_of, with_absolute_path
from nanochat.tasks.task import Excerpt, ListedTask, Task
from nanochat.training.checkpoint import Checkpoint, tokenizer_of
from nanochat.training.hardware import physical_cores
from nanochat.training.metrics import held_out_text, rl_progress_line
from nanochat.training.plan import Plan
from nanochat.training.rl import load_practice, resolve_rl


@dataclass(frozen=True)
class Practice:
    """What is practised, with all that can be wrong with it looked at."""

    config: RLConfig
    """With absolute paths."""
    base: Checkpoint
    files: list[str]
    task: Task
    held_out: Task
    plan: Plan
    inherited: dict[str, Any]


def prepare_practice(run_dir: str, config: RLConfig, terminal: Terminal) -> Practice:
    """Load and check what is practised; needs no Ray. Raises: what is wrong with it."""
    folder = RunFolder(run_dir)
    base = Checkpoint(str(named_model(run_dir, config.base or "sft", terminal.line).checkpoint))
    config = with_paths(config)
    files = practice_files(config)
    check_stage(folder.rl.root, {"rl": config}, files)
    plan, _, inherited = resolve_rl(config, base)
    terminal.live(f"loading {config.task}; what is not here yet is downloaded")
    task, held_out = load_practice(config, folder.tasks)
    if (of_base := tokenizer_of(run_dir, base.folder)) != folder.tokenizer:
        Tokenizer.load(of_base).save(folder.tokenizer)
        terminal.line(f"tokenizer  the base model's, from {of_base}")
    return Practice(config, base, files, task, held_out, plan, inherited)


def with_paths(config: RLConfig) -> RLConfig:
    """Return a config whose paths mean the same in every folder."""
    held_out = None if config.held_out is None else with_absolute_path(config.held_out)
    return replace(config, task=with_absolute_path(config.task), held_out=held_out)


def practise(
    run_dir: str, practice: Practice, rollouts: RolloutsConfig, cluster: ClusterConfig, terminal: Terminal
) -> Checkpoint:
    """Improve the run's chat model on a task that has rewards, until the horizon. Resumes by itself.

    Raises: KeyboardInterrupt if it was asked to stop before, after a checkpoint.
    """
    folder, config, base = RunFolder(run_dir), practice.config, practice.base
    plan, inherited, task, held_out = practice.plan, practice.inherited, practice.task, practice.held_out
    if rollouts.backend == "vllm":
        check_vllm(plan.model)
    begin_stage(
        folder.rl.root, {"rl": config, "rollouts": rollouts},
        plan.as_json() | {"inherited": inherited, "base": base.folder, "base_sha256": base.weights_sha256},
        practice.files,
    )  # fmt: skip
    scored = min(config.held_out_problems, len(held_out))
    terminal.line(f"practice   {config.task}: {len(task):,} problems, {scored} of {len(held_out):,} held out")
    terminal.line(f"inherited  {', '.join(f'{name} {value:g}' for name, value in inherited.items())}")

    def train(watch: Callable[[], None]) -> Checkpoint | None:
        start_ray()
        workers, actors, gpus_each, use_gpu = share_machines(cluster, rollouts, terminal.line)
        terminal.line(
            f"rl         from {base.folder}: {config.num_steps} updates of {config.groups_per_step} groups of "
            f"{config.samples_per_group}, {workers} learning and {actors} sampling; Ctrl-C leaves with a checkpoint, "
            "the same command goes on"
        )
        spec = RolloutSpec(
            config=config, actors=actors,
            rollouts=replace(rollouts, gpus_per_actor=rollouts.gpus_per_actor or gpus_each or 1.0),
            model=plan.model, tokenizer_folder=folder.tokenizer, tasks_folder=folder.tasks, working_folder=os.getcwd(),
            use_gpu=use_gpu, processes=workers + actors, placement=on_nodes_for("rollouts", cluster),
        )  # fmt: skip
        job = TrainJob(
            config=config, tokenizer_folder=folder.tokenizer, folder=folder.rl, use_gpu=use_gpu,
            worker=functools.partial(rl_worker, spec, base, Excerpt(held_out, max(1, config.held_out_problems))),
            workers=list(range(cluster.min_workers or workers, workers + 1)), gpus_per_worker=gpus_each or 1.0,
        )  # fmt: skip
        return run_on_ray(job, config.num_steps, cluster, watch)

    tokenizer_hash = Tokenizer.load(folder.tokenizer).hash
    made_from = {"tokenizer_hash": tokenizer_hash, "stage": {"base_sha256": base.weights_sha256}}
    checkpoint, view = watched(
        folder.rl, config.num_steps, terminal, train, made_from, score="held_out_pass_at_1", line=rl_progress_line
    )
    right = f", {held_out_text(view.scored)} of held-out problems right" if view.scored else ""
    terminal.line(f"chat model {checkpoint.folder}{right}")
    if empty := checkpoint.state["loop"]["empty_steps"]:
        terminal.line(f"           {empty} of {config.num_steps} updates trained nothing: no group's rewards differed")
    return checkpoint


def practice_files(config: RLConfig) -> list[str]:
    """Return the files of one's own that decide what is practised: those of the tasks, and the reward's module.

    Raises: ConfigError if there is no such reward.
    """
    files = {file for text in (config.task, config.held_out or config.task) for file in files_of(text)}
    with_reward(ListedTask("", "", []), config.reward, os.getcwd())
    if config.reward is not None and (
        module := getattr(sys.modules[config.reward.partition(":")[0]], "__file__", None)
    ):
        files.add(module)
    return sorted(files)


def share_machines(
    cluster: ClusterConfig, rollouts: RolloutsConfig, note: Callable[[str], None]
) -> tuple[int, int, float, bool]:
    """Return how many processes learn, how many sample, the GPUs of each where they share one, and if on GPUs.

    Of several GPUs a quarter learns and the others sample, or each kind has the GPUs of its nodes; of one, both have a
    half; of this machine's cores half sample, one actor on each.
    Raises: ClusterError if the cluster cannot hold them.
    """
    gpus, use_gpu = training_gpus(cluster)
    gpus_each = 0.5 if use_gpu and gpus == 1 and not cluster.by_label else 0.0
    learners = cluster.num_workers or (max(1, gpus if cluster.by_label else gpus // 4) if use_gpu else 1)
    each = rollouts.gpus_per_actor or gpus_each or 1.0
    left = resources("rollouts", cluster).get("GPU", 0) if cluster.by_label else gpus - learners * (gpus_each or 1.0)
    actors = rollouts.actors or max(
        1, int(left / each) if use_gpu else min(physical_cores() // 2, physical_cores() - learners)
    )
    if use_gpu and rollouts.actors is None and left < each:
        note(f"actors={actors}: no GPU for sampling is there yet. Name --actors to have more.")
    sampling = [{"CPU": rollouts.cpus_per_actor, "GPU": each if use_gpu else 0.0}] * actors
    learning = [{"CPU": cluster.cpus_per_worker, "GPU": (gpus_each or 1.0) if use_gpu else 0.0}] * learners
    remedy = "Ask for fewer --actors, or lower --cpus-per-actor."
    if cluster.by_label:
        check_workers(learners, cluster, 1.0 if use_gpu else 0.0, note)
        check_resources(f"actors={actors}", sampling, "rollouts", cluster, remedy, note)
    else:
        asked = f"actors={actors}: with {learners} learning"
        check_resources(asked, learning + sampling, "train", cluster, remedy, note)
    return learners, actors, gpus_each, use_gpu
