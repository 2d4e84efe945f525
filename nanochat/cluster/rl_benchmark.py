"""What reinforcement learning learns in minutes, and how fast it is beside the way nanochat runs it.

The other way: one prompt's group at a time, every row decoded until the last one ends, and learner and sampler take
turns in one process. Engine, learner, optimiser and groups are the same on both sides, and the sides take turns, so
that their ratio is one machine's at one time. Samples of groups that are all alike count as sampled on both.

Source of the other way: karpathy/nanochat chat_rl.py and engine.py@92d63d4.
"""

import functools
import os
import statistics
import time
from dataclasses import replace
from typing import Any

from nanochat import storage
from nanochat.cluster.rl_job import practise, prepare_practice, share_machines
from nanochat.cluster.rollouts import RolloutPool, RolloutSpec
from nanochat.cluster.terminal import Terminal
from nanochat.cluster.trainer import TrainJob, rl_worker, run_on_ray, worker_context
from nanochat.config.cluster import ClusterConfig
from nanochat.config.presets import WORD_PROBLEMS
from nanochat.config.rl import RLConfig, RolloutsConfig
from nanochat.data.tokenizer import Tokenizer
from nanochat.inference.requests import Event
from nanochat.inference.rollouts import GroupSampler, packed_weights
from nanochat.model.gpt import GPT
from nanochat.run_context import RunContext
from nanochat.storage import RunFolder, StageFolder
from nanochat.tasks.task import Task
from nanochat.training.checkpoint import Checkpoint, load_parameters, named_checkpoint
from nanochat.training.hardware import choose_hardware, physical_cores
from nanochat.training.rl import RLInputs, improve, load_practice, resolve_rl
from nanochat.training.rollout_queue import Batch, LocalRollouts, RolloutSource

LOOP_STEPS, WARM_UP_STEPS = 7, 2
ROLLOUT_S = 15.0
ROUNDS = 3
CLUSTER = ClusterConfig(num_workers=1, cpus_per_worker=0.5)


def word_problems(num_steps: int, seed: int = 0) -> RLConfig:
    """Return what the demo practises, scored on more problems and never saved on the way."""
    return replace(WORD_PROBLEMS, num_steps=num_steps, seed=seed, held_out_problems=400, checkpoint_every=0)


def measure_learning(run_dir: str, seeds: int, num_steps: int, terminal: Terminal) -> dict[str, Any]:
    """Return the share of held-out problems that is right before and after, and the seconds, for each seed."""
    base = named_checkpoint(run_dir, "sft", terminal.line).folder
    before, after, seconds = [], [], []
    for seed in range(seeds):
        folder = RunFolder(storage.join(run_dir, "rl_benchmark", f"seed_{seed}"))
        storage.remove(folder.root)
        Tokenizer.load(RunFolder(run_dir).tokenizer).save(folder.tokenizer)
        start_s = time.monotonic()
        config = replace(word_problems(num_steps, seed), base=base)
        practise(folder.root, prepare_practice(folder.root, config, terminal), RolloutsConfig(), CLUSTER, terminal)
        seconds.append(time.monotonic() - start_s)
        scores = [record for record in storage.read_jsonl(folder.rl.metrics) if "held_out_n" in record]
        before.append(scores[0]["held_out_pass_at_1"])
        after.append(scores[-1]["held_out_pass_at_1"])
    points = [100 * (now - then) for then, now in zip(before, after, strict=True)]
    return {
        "rl_pass1_before": before, "rl_pass1_after": after, "rl_points": points,
        "rl_points_mean": statistics.mean(points), "rl_seconds": seconds,
    }  # fmt: skip


class UntilTheLastEnds(GroupSampler):
    """Samples groups whose rows go on after their ends, which is thrown away, until the group's last row has ended."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.real_ends, self.ends = self.ends, frozenset()
        self._ids: list[int] = []

    def add(self, group: int) -> None:
        """Begin to sample a group, the only one."""
        super().add(group)
        self._ids = list(self._places)

    def _take(self, event: Event) -> None:
        if event.id in self._places:
            is_end = event.token in self.real_ends and not event.is_forced
            super()._take(replace(event, finish_reason="stop") if is_end else event)

    def _finish(self, number: int) -> None:
        for id in self._ids:
            if self._loop is not None:
                self._loop.abort(id)
        super()._finish(number)


class OneGroupAtATime(LocalRollouts):
    """Samples a group and then the next."""

    def take(self) -> Batch:
        """Sample until the next batch is there."""
        while (batch := self.queue.batch()) is None:
            group = self.queue.admit()
            assert group is not None, "a batch that lacks a group admits one"
            self.sampler.add(group)
            while not (finished := self.sampler.step()):
                pass
            self.queue.finished(finished[0])
        return batch


def _turn_taking_worker(spec: RolloutSpec, base: Checkpoint, held_out: Task, job: TrainJob) -> None:
    """Learn as one worker that also samples, with all cores for whichever it does."""
    run = worker_context(job)
    assert isinstance(job.config, RLConfig), "the job's stage is reinforcement learning"
    tokenizer = Tokenizer.load(job.tokenizer_folder)
    source = OneGroupAtATime(job.config, _one_group_sampler(spec, run, tokenizer))
    improve(job.config, run, RLInputs(tokenizer, base, held_out, source, job.folder))


def _one_group_sampler(spec: RolloutSpec, run: RunContext, tokenizer: Tokenizer) -> GroupSampler:
    hardware = choose_hardware(spec.config, run)
    return UntilTheLastEnds(
        spec.config, tokenizer, load_practice(spec.config, spec.tasks_folder)[0], spec.model, dtype=hardware.dtype,
        device=hardware.device, running=spec.config.samples_per_group,
    )  # fmt: skip


def measure_throughput(run_dir: str, terminal: Terminal) -> dict[str, Any]:
    """Return samples per second of sampling alone and of the whole loop, each in both ways, medians of rounds."""
    base = named_checkpoint(run_dir, "sft", terminal.line)
    config = replace(word_problems(LOOP_STEPS), groups_per_step=8, held_out_problems=0)
    model = resolve_rl(config, base)[0].model
    learners, actors, gpus_each, use_gpu = share_machines(CLUSTER, RolloutsConfig(), terminal.line)
    folder = RunFolder(run_dir)
    spec = RolloutSpec(
        config=config, rollouts=RolloutsConfig(running=128, gpus_per_actor=gpus_each or None), actors=actors,
        model=model,
        tokenizer_folder=folder.tokenizer, tasks_folder=folder.tasks, working_folder=os.getcwd(), use_gpu=use_gpu,
        processes=learners + actors,
    )  # fmt: skip
    # Nobody learns: small batches without end, many of them under way, every one with all its groups.
    small = replace(config, num_steps=10**9, groups_per_step=4, max_staleness=9, dynamic_sampling=False)
    every_core = spec.actors if use_gpu else physical_cores()
    alone = replace(spec, config=small, actors=every_core, processes=every_core)
    held_out = load_practice(config, folder.tasks)[1][:1]
    workers = {"": functools.partial(rl_worker, spec, base, held_out),
               "_sequential": functools.partial(_turn_taking_worker, spec, base, held_out)}  # fmt: skip
    found: dict[str, list[float]] = {}
    shares: list[float] = []
    for number in range(ROUNDS):
        terminal.live(f"throughput: round {number + 1} of {ROUNDS}")
        for name, source in (("", _pool(alone, terminal)), ("_sequential", _taking_turns(alone))):
            found.setdefault(f"rollout_samples_per_s{name}", []).append(_sampled_per_s(source, alone, base))
        for name, worker in workers.items():
            stage = StageFolder(storage.join(folder.root, "rl_benchmark", f"loop{name}"))
            storage.remove(stage.root)
            job = TrainJob(
                config=config, tokenizer_folder=folder.tokenizer, folder=stage, use_gpu=use_gpu, worker=worker,
                workers=[learners], gpus_per_worker=gpus_each or 1.0,
            )  # fmt: skip
            run_on_ray(job, config.num_steps, CLUSTER, lambda: None)
            records = [one for one in storage.read_jsonl(stage.metrics) if "reward" in one][WARM_UP_STEPS:]
            rate = sum(one["samples"] for one in records) / sum(one["step_s"] for one in records)
            found.setdefault(f"rl_samples_per_s{name}", []).append(rate)
            shares += [one["zero_variance_share"] for one in records]
    results: dict[str, Any] = {name: statistics.median(values) for name, values in found.items()}
    for what in ("rollout", "rl"):
        each = zip(found[f"{what}_samples_per_s"], found[f"{what}_samples_per_s_sequential"], strict=True)
        results[f"{what}_ratio"] = statistics.median(ours / theirs for ours, theirs in each)
    return results | {"zero_variance_share": statistics.mean(shares)}


def _pool(spec: RolloutSpec, terminal: Terminal) -> RolloutSource:
    return RolloutPool(spec, terminal.line)


def _taking_turns(spec: RolloutSpec) -> RolloutSource:
    sampler = _one_group_sampler(spec, RunContext(use_gpu=spec.use_gpu), Tokenizer.load(spec.tokenizer_folder))
    return OneGroupAtATime(spec.config, sampler)


def _sampled_per_s(source: RolloutSource, spec: RolloutSpec, base: Checkpoint) -> float:
    """Take batches for nobody, all from the base model, and return the samples per second after a first batch."""
    policy = GPT(spec.model, choose_hardware(spec.config, RunContext(use_gpu=spec.use_gpu)).dtype)
    load_parameters(policy, base.model_tensors(), base.folder)
    weights = packed_weights(policy)
    source.begin(0, 0)
    source.publish(0, weights)
    source.take()
    samples, start_s = 0, time.perf_counter()
    while (elapsed_s := time.perf_counter() - start_s) < ROLLOUT_S:
        batch = source.take()
        samples += sum(len(group.samples) for group in batch.sampled)
        source.publish(batch.number + 1, weights)
    source.close()
    return samples / elapsed_s
