"""Reinforcement learning of a tiny model on Ray: the run, its log of samples, and kills while it goes on."""

import json
import os
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from ray import cloudpickle

from nanochat.config.rl import RLConfig, RolloutsConfig
from nanochat.data.tokenizer import Tokenizer
from nanochat.storage import RunFolder, StageFolder, read_jsonl
from nanochat.training.checkpoint import Checkpoint

BACKEND: Any = os.environ.get("NANOCHAT_BACKEND", "native")
"""Who samples."""


def write_problems(folder: Path) -> Path:
    """Write a folder of conversations, 40 to practise on and 10 held out."""
    folder.mkdir()
    for split, count in (("train", 40), ("val", 10)):
        with open(folder / f"{split}.jsonl", "w") as file:
            for number in range(count):
                asked = {"role": "user", "content": f"{split[0]} {number} " + "x" * (number % 7)}
                file.write(json.dumps({"messages": [asked, {"role": "assistant", "content": "y"}]}) + "\n")
    return folder


HERE = str(Path(__file__).parent)
"""Where the rewards are."""


@dataclass
class TinyRL:
    """A run directory with a base model, and what is practised in it."""

    root: Path
    base: Checkpoint
    problems: Path

    def config(self, **changes: Any) -> RLConfig:
        fields = {
            "task": f"messages={self.problems}", "reward": "tiny_rewards:odd_length", "num_steps": 6,
            "groups_per_step": 4, "samples_per_group": 4, "max_new_tokens": 12, "max_staleness": 0, "tis_cap": None,
            "dtype": "float32", "checkpoint_every": 2, "evaluate_every": 0, "held_out_problems": 5, "sample_every": 1,
        }  # fmt: skip
        return RLConfig(**(fields | changes))

    def alone(self, config: RLConfig, folder: Path) -> Checkpoint | None:
        """Sample and learn in turns, in this process."""
        from nanochat.inference.rollouts import GroupSampler, with_reward
        from nanochat.run_context import RunContext
        from nanochat.training.hardware import choose_hardware
        from nanochat.training.rl import RLInputs, improve, load_practice, resolve_rl
        from nanochat.training.rollout_queue import LocalRollouts

        run = RunContext(use_gpu=False)
        hardware, tokenizer = choose_hardware(config, run), self.tokenizer
        practice = load_practice(config, str(self.root / "tasks"))
        task, held_out = (with_reward(one, config.reward, HERE) for one in practice)
        sampler = GroupSampler(
            config, tokenizer, task, resolve_rl(config, self.base)[0].model, dtype=hardware.dtype,
            device=hardware.device, running=8, backend=BACKEND,
        )  # fmt: skip
        recording = Recording(LocalRollouts(config, sampler), str(folder))
        return improve(config, run, RLInputs(tokenizer, self.base, held_out, recording, StageFolder(str(folder))))

    def on_ray(
        self, config: RLConfig, folder: Path, watch=lambda: None, *, actors: int = 2, workers: int = 1,
        max_failures: int = 30, **rollouts: Any,
    ) -> Checkpoint | None:  # fmt: skip
        """Run the same on Ray."""
        from nanochat.cluster.rollouts import RolloutSpec
        from nanochat.cluster.trainer import TrainJob, run_on_ray
        from nanochat.config.cluster import ClusterConfig
        from nanochat.training.rl import load_practice, resolve_rl

        spec = RolloutSpec(
            config=config, actors=actors,
            rollouts=RolloutsConfig(**({"running": 8, "cpus_per_actor": 0.25, "backend": BACKEND} | rollouts)),
            model=resolve_rl(config, self.base)[0].model,
            tokenizer_folder=RunFolder(str(self.root)).tokenizer, tasks_folder=str(self.root / "tasks"),
            working_folder=HERE,
            use_gpu=False,
            processes=4,
        )  # fmt: skip
        held_out = load_practice(config, str(self.root / "tasks"))[1]
        job = TrainJob(
            config=config, tokenizer_folder=spec.tokenizer_folder, folder=StageFolder(str(folder)), use_gpu=False,
            worker=recording_worker(spec, self.base, held_out), workers=[workers],
        )  # fmt: skip
        cluster = ClusterConfig(num_workers=workers, cpus_per_worker=0.25, max_failures=max_failures)
        return run_on_ray(job, config.num_steps, cluster, watch)

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(RunFolder(str(self.root)).tokenizer)


class Recording:
    """A source of rollouts that writes down each batch that it gives."""

    def __init__(self, inner: Any, folder: str) -> None:
        self.inner, self.folder = inner, folder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def take(self) -> Any:
        batch = self.inner.take()
        samples = {
            str(group.id): [
                [sample.tokens, sample.reward, sample.text, min(sample.versions, default=-1)]
                for sample in group.samples
            ]
            for group in batch.sampled
        }
        with open(f"{self.folder}/batches.jsonl", "a") as file:
            file.write(json.dumps({"step": batch.number, "samples": samples}) + "\n")
        return batch


def recording_worker(spec, base, held_out):
    """A worker as `rl_worker` whose batches are written down."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])

    def work(job):
        from nanochat.cluster import trainer

        pool = trainer.RolloutPool
        trainer.RolloutPool = lambda *arguments: Recording(pool(*arguments), job.folder.root)
        trainer.rl_worker(spec, base, held_out, job)

    return work


def batches(folder: Path) -> dict[int, dict[str, Any]]:
    """Samples of each step by their group, as the last attempt at the step had them."""
    return {record["step"]: record["samples"] for record in read_jsonl(f"{folder}/batches.jsonl")}


def check_log(folder: Path, steps: int) -> list[int]:
    """Every step is there once, and every group from 0 on is in exactly one; returns those that were trained."""
    records = read_jsonl(f"{folder}/groups.jsonl")
    assert [record["step"] for record in records] == list(range(steps))
    every = [group for record in records for group in sorted(record["trained"] + record["dropped"])]
    assert every == list(range(len(every))), "none is lost, none is there twice, and they come in order"
    return [group for record in records for group in record["trained"]]


def processes(title: str) -> list[psutil.Process]:
    """Ray's processes of a title, below this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith(title):
                found.append(process)
        except psutil.Error:
            continue
    return found


@dataclass
class Killer:
    """Kills processes of a title with SIGKILL, at moments drawn from a seed, while a run goes on."""

    title: str
    folder: Path
    kills: int
    seed: int = 0
    most_s: float = 2.0
    killed: list[int] = field(default_factory=list)
    due_s: float = 0.0
    lines: int = 0
    """Of the run's records at the last kill: between two kills there is progress."""

    def __call__(self) -> None:
        """Called a few times each second."""
        draw = random.Random(f"{self.seed} {len(self.killed)}")
        alive = [process for process in processes(self.title) if process.pid not in self.killed]
        if not alive or len(self.killed) >= self.kills or (not self.due_s and self._lines() <= self.lines):
            self.due_s = 0.0
            return
        if not self.due_s:
            self.due_s = time.monotonic() + draw.uniform(0, self.most_s)
        elif time.monotonic() > self.due_s:
            victim = draw.choice(alive)
            victim.kill()
            psutil.wait_procs([victim], timeout=10)
            self.killed.append(victim.pid)
            self.due_s, self.lines = 0.0, self._lines()

    def _lines(self) -> int:
        """Batches that were given to the learner, those that were given again counted."""
        path = self.folder / "batches.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0
