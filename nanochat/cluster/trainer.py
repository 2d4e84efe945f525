"""Pretraining under Ray Train: workers, restarts, and what the person at the terminal sees of them.

Which failures are tried again: the loss of a worker or node, and errors of the kinds that hardware, peers and storage
cause (RuntimeError, OSError). Everything else is the code's or the input's and ends the run at once.
"""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from nanochat import storage
from nanochat.cluster.stream import StreamSpec, slots_for, steps_of
from nanochat.config.cluster import ClusterConfig
from nanochat.config.pretrain import PretrainConfig
from nanochat.data.token_shards import TokenShards
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import ClusterError, NanochatError
from nanochat.run_context import RunContext
from nanochat.storage import StageFolder
from nanochat.training import plan as planning
from nanochat.training.checkpoint import Checkpoint, problem_with, step_folder
from nanochat.training.hardware import CPU_ALLOCATOR_ENVIRONMENT
from nanochat.training.pretrain import PretrainInputs, pretrain


def is_retried(error: BaseException) -> bool:
    """Tell whether another try may help: Ray's own errors (a worker or node is lost), RuntimeError, OSError."""
    return isinstance(error, (RuntimeError, OSError)) or type(error).__module__.startswith("ray.")


@dataclass(frozen=True, kw_only=True)
class PretrainJob:
    """All that a worker needs to train."""

    config: PretrainConfig
    tokenizer_folder: str
    spec: StreamSpec


class EndAtOnce(UserCallback):
    """Ends the run on an error that another try would repeat."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise the first exception that is not of a retried kind."""
        for rank in sorted(worker_exceptions):
            cause = first_cause(worker_exceptions[rank])
            if not is_retried(cause):
                raise cause


def first_cause(error: BaseException) -> BaseException:
    """Return the exception that a worker raised, out of what Ray wrapped around it."""
    while True:
        inner = getattr(error, "controller_failure", None) or getattr(error, "_base_exc", None)
        if inner is None and isinstance(error, ray.exceptions.RayTaskError):
            inner = error.cause
        failures = getattr(error, "worker_failures", None)
        if inner is None and failures:
            inner = (
                next((e for e in failures.values() if not is_retried(first_cause(e))), None) or failures[min(failures)]
            )
        if not isinstance(inner, BaseException) or inner is error:
            return error
        error = inner


def train_worker(job: PretrainJob) -> None:
    """Run pretraining as one worker of a Ray Train group."""
    run = worker_context()
    pretrain(job.config, run, inputs_of(job, run))


def worker_context() -> RunContext:
    """Return this worker's place in its group."""
    context = ray.train.get_context()
    return RunContext(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        local_world_size=context.get_local_world_size(),
    )


def inputs_of(job: PretrainJob, run: RunContext) -> PretrainInputs:
    """Return a worker's inputs, with its share of Ray Data's stream."""
    stream = steps_of(ray.train.get_dataset_shard("train"), job.spec.slots, run.world_size)
    return PretrainInputs(Tokenizer.load(job.tokenizer_folder), job.spec.shards, stream, job.spec.folder)


def pretrain_on_ray(
    config: PretrainConfig,
    cluster: ClusterConfig,
    shards: TokenShards,
    tokenizer_folder: str,
    folder: StageFolder,
    watch: Callable[[], None],
    worker: Callable[[PretrainJob], None] = train_worker,
) -> Checkpoint | None:
    """Train on the cluster until the horizon, or until `folder.stop` appears; returns the last checkpoint if reached.

    `watch` is called about five times a second on the calling thread while workers train. `worker` is what each
    worker runs: benchmarks and fault tests wrap it.
    Raises: what a worker raised if another try would repeat it, or after max_failures tries.
    """
    tokenizer = Tokenizer.load(tokenizer_folder)
    shards.check_tokenizer(tokenizer)
    plan = planning.resolve(config, tokenizer.vocab_size, shards.sequence_len)
    use_gpu = ray.cluster_resources().get("GPU", 0) > 0
    workers = cluster.num_workers or int(ray.cluster_resources().get("GPU", 0)) or 1
    check_resources(workers, cluster, use_gpu)
    least = cluster.min_workers or workers
    spec = StreamSpec(
        shards=shards, seed=config.seed, rows_per_step=plan.rows_per_step, num_steps=plan.num_steps,
        slots=slots_for(plan.rows_per_step, least, workers), folder=folder,
    )  # fmt: skip
    storage.remove(folder.stop)
    job = PretrainJob(config=config, tokenizer_folder=tokenizer_folder, spec=spec)
    trainer = _trainer(worker, job, cluster, workers, use_gpu)
    _fit(trainer, watch)
    last = step_folder(folder.checkpoints, plan.num_steps)
    return Checkpoint(last) if problem_with(last, verify=False) is None else None


def check_resources(workers: int, cluster: ClusterConfig, use_gpu: bool) -> None:
    """Raise ClusterError if the cluster can never hold the least number of workers (autoscaling ones may grow)."""
    have = ray.cluster_resources()
    least = cluster.min_workers or workers
    for kind, each in (("GPU", 1.0 if use_gpu else 0.0), ("CPU", cluster.cpus_per_worker)):
        if least * each > have.get(kind, 0) and not os.environ.get("RAY_AUTOSCALER"):
            raise ClusterError(
                f"num_workers={least}: needs {least * each:g} {kind}, the cluster has {have.get(kind, 0):g}. "
                "Ask for fewer workers, or lower cpus_per_worker."
            )


def _trainer(
    worker: Callable[[PretrainJob], None], job: PretrainJob, cluster: ClusterConfig, workers: int, use_gpu: bool
) -> TorchTrainer:
    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if use_gpu else {})
    environment = {} if use_gpu else dict(CPU_ALLOCATOR_ENVIRONMENT)
    environment["TORCHINDUCTOR_CACHE_DIR"] = os.environ.get("TORCHINDUCTOR_CACHE_DIR", compile_cache())
    options = ray.data.ExecutionOptions(preserve_order=True)
    return TorchTrainer(
        worker,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=(cluster.min_workers, workers) if cluster.min_workers else workers,
            use_gpu=use_gpu,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=f"pretrain-{time.time_ns()}",
            storage_path=_ray_storage(job.spec.folder),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            callbacks=[EndAtOnce()],
            worker_runtime_env={"env_vars": environment},
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        datasets={"train": job.spec.dataset_from_newest_checkpoint},
        dataset_config=ray.train.DataConfig(execution_options={"train": options}),
    )


def _ray_storage(folder: StageFolder) -> str:
    """Return where Ray Train keeps its own notes; nothing of them is read again."""
    path = storage.join(folder.root, "ray_train")
    return os.path.abspath(path) if storage.is_local(path) else path


def compile_cache() -> str:
    """Return the folder where compiled kernels are kept between runs."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return os.path.join(root, "nanochat", "torchinductor")


def _fit(trainer: TorchTrainer, watch: Callable[[], None]) -> None:
    """Run fit() in a thread, where Ray Train leaves SIGINT alone, and watch from this one."""
    outcome: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as err:  # carried to the caller's thread
            outcome.append(err)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.2)
        watch()
    if outcome:
        cause = first_cause(outcome[0])
        raise cause from (None if isinstance(cause, NanochatError) else outcome[0])
