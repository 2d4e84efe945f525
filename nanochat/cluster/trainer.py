"""Stages that train under Ray Train: workers, restarts, and what the person at the terminal sees of them.

Which failures are tried again: the loss of a worker or node, and errors of the kinds that hardware, peers and storage
cause (RuntimeError, OSError). Everything else is the code's or the input's and ends the run at once.
"""

import contextlib
import os
import platform
import re
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
import ray.train
from ray._private.state import state
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.constants import DEFAULT_PREEMPTION_DEADLINE_S
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

from nanochat import storage
from nanochat.cluster.environment import compile_cache
from nanochat.cluster.nodes import check_resources, check_software, on_nodes_for, software, training_gpus
from nanochat.cluster.rollouts import RolloutPool, RolloutSpec
from nanochat.cluster.session import start_ray
from nanochat.cluster.stream import StreamSpec, allowed_workers, steps_of
from nanochat.cluster.terminal import with_story
from nanochat.config.cluster import ClusterConfig
from nanochat.config.pretrain import PretrainConfig
from nanochat.config.rl import RLConfig
from nanochat.config.sft import SftConfig
from nanochat.config.training import LearnerConfig, TrainingConfig
from nanochat.data.token_shards import TokenShards
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import ClusterError, NanochatError, excerpt
from nanochat.run_context import RunContext
from nanochat.storage import StageFolder
from nanochat.tasks.task import Task
from nanochat.training.checkpoint import Checkpoint, problem_with, step_folder
from nanochat.training.hardware import CPU_ALLOCATOR_ENVIRONMENT, GPU_ENVIRONMENT, physical_cores
from nanochat.training.loop import TrainingInputs
from nanochat.training.plan import Plan
from nanochat.training.pretrain import pretrain
from nanochat.training.rl import RLInputs, improve
from nanochat.training.sft import SftInputs, finetune

RESIZE_LOOK_S = 30.0
"""How often a run with fewer workers than it could have looks for more. A change starts all of them again."""


def is_retried(error: BaseException) -> bool:
    """Tell whether another try may help: Ray's own errors (a worker or node is lost), RuntimeError, OSError."""
    return isinstance(error, (RuntimeError, OSError)) or type(error).__module__.startswith("ray.")


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """All that a worker needs to train."""

    config: LearnerConfig
    tokenizer_folder: str
    folder: StageFolder
    use_gpu: bool
    worker: Callable[["TrainJob"], None]
    """What each worker runs: `pretrain_worker`, a partial `sft_worker`, or what benchmarks and tests put in place."""
    workers: list[int]
    """Worker counts that may run it, ascending."""
    spec: StreamSpec | None = None
    """Of a stage that trains on rows."""
    gpus_per_worker: float = 1.0
    software: Mapping[str, str] = field(default_factory=software)
    """The driver's, which all workers must have."""


class OnFailure(UserCallback):
    """Notes why workers failed, and ends the run on an error that another try would repeat."""

    def __init__(self, folder: StageFolder) -> None:
        self.folder = folder

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise the first exception that is not of a retried kind."""
        causes = {rank: first_cause(worker_exceptions[rank]) for rank in sorted(worker_exceptions)}
        for rank, cause in causes.items():
            self.folder.note(f"worker {rank} failed: {_reason(cause)}")
        for cause in causes.values():
            if not is_retried(cause):
                raise cause


def _reason(cause: BaseException) -> str:
    """Return in one line what an exception says, and of a process that is gone which one it was."""
    message = str(cause).strip()
    gone = re.search(r"^\s*pid: (\d+)$.*^\s*ip: (\S+)$", message, re.MULTILINE | re.DOTALL)
    if isinstance(cause, ray.exceptions.ActorDiedError) and gone:
        return f"its process {gone[1]} on {gone[2]} is gone: killed, out of memory or crashed"
    return f"{type(cause).__name__}: {(message.splitlines() or [''])[0][:200]}"


class DividingScalingPolicy(ElasticScalingPolicy):
    """Ray's elastic policy, restricted to worker counts that divide the rows of a step.

    What Ray 2.60 reserves for a run minds neither labels nor that a node will be taken away: it would wait for workers
    that have no place. So nodes with the run's label count with all that they have, and nodes that drain not at all.
    """

    def __init__(self, scaling_config: ScalingConfig, allowed: list[int]) -> None:
        super().__init__(scaling_config)
        self.allowed = allowed

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        usable = reserved_resources
        if label := self.scaling_config.label_selector:
            nodes = (node for node in ray.nodes() if node["Alive"] and label.items() <= node["Labels"].items())
            usable = {node["NodeID"]: node["Resources"] for node in nodes}
        draining = state.get_draining_nodes()
        possible = super()._count_possible_workers(
            {node: amounts for node, amounts in usable.items() if node not in draining}
        )
        return max((workers for workers in self.allowed if workers <= possible), default=0)


class ElasticTorchTrainer(TorchTrainer):
    """Ray Train with the policy above; Ray 2.60 has no public place for one."""

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        allowed = self.train_loop_config.workers
        policy = DividingScalingPolicy(self.scaling_config, allowed)
        return super()._initialize_and_run_controller(**arguments | {"scaling_policy": policy})


def first_cause(error: BaseException) -> BaseException:
    """Return the exception that a worker raised, out of what Ray wrapped around it."""
    while True:
        attributes = ("controller_failure", "_base_exc", "health_check_failure")
        inner = next((getattr(error, name) for name in attributes if getattr(error, name, None)), None)
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


def pretrain_worker(job: "TrainJob") -> None:
    """Run pretraining as one worker of a Ray Train group."""
    run = worker_context(job)
    assert isinstance(job.config, PretrainConfig), "the job's stage is pretraining"
    pretrain(job.config, run, inputs_of(job, run))


def sft_worker(held_out: Sequence[Task], base: Checkpoint, job: "TrainJob") -> None:
    """Run fine-tuning as one worker of a Ray Train group."""
    run = worker_context(job)
    assert isinstance(job.config, SftConfig), "the job's stage is fine-tuning"
    inputs = inputs_of(job, run)
    read = SftInputs(inputs.tokenizer, inputs.shards, inputs.stream, inputs.folder, base, held_out)
    finetune(job.config, run, read)


def rl_worker(rollouts: RolloutSpec, base: Checkpoint, held_out: Task, job: "TrainJob") -> None:
    """Learn from rollouts as one worker of a Ray Train group; the first one has the actors."""
    run = worker_context(job)
    assert isinstance(job.config, RLConfig), "the job's stage is reinforcement learning"
    if not job.use_gpu:  # the learners have the cores that the actors leave
        cores = physical_cores()
        left = cores - rollouts.actors * max(1, cores // rollouts.processes)
        run = replace(run, local_world_size=cores // max(1, left // run.world_size))
    held_out = rollouts.judged(held_out)
    pool = RolloutPool(rollouts, job.folder.note) if run.rank == 0 else None
    improve(job.config, run, RLInputs(Tokenizer.load(job.tokenizer_folder), base, held_out, pool, job.folder))


def _work(job: TrainJob) -> None:
    """Run the job's worker; an exception is written to the run's errors before it leaves the process."""
    try:
        check_software(job.software, software(), platform.node())
        job.worker(job)
    except Exception as err:
        rank = ray.train.get_context().get_world_rank()
        path = storage.join(job.folder.errors, f"{time.strftime('%Y%m%d-%H%M%S')}_worker_{rank:02d}.txt")
        story = traceback.format_exc()
        with contextlib.suppress(OSError), storage.atomic_write(path) as file:  # a full disk must not hide `err`
            file.write(story.encode())
        raise with_story(first_cause(err), f"in worker {rank}", story, path) from None


def worker_context(job: TrainJob) -> RunContext:
    """Return this worker's place in its group."""
    context = ray.train.get_context()
    return RunContext(
        use_gpu=job.use_gpu,
        seconds_left=_seconds_left,
        gpu_share=job.gpus_per_worker,
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        local_world_size=context.get_local_world_size(),
    )


def _seconds_left() -> float | None:
    """Return how long this group's first node to be taken away has; None = none is, as far as this worker knows.

    Ray's public `get_preemption_info` is a barrier of all workers: too much for every step, where they agree anyway.
    """
    info = get_train_context().preemption_context.preemption_info
    if info is None:
        return None
    return DEFAULT_PREEMPTION_DEADLINE_S if info.deadline_ms is None else info.deadline_ms / 1000 - time.time()


def inputs_of(job: TrainJob, run: RunContext) -> TrainingInputs:
    """Return a worker's inputs, with its share of Ray Data's stream."""
    assert job.spec is not None, "the job's stage trains on rows"
    stream = steps_of(ray.train.get_dataset_shard("train"), job.spec.slots, run.world_size)
    return TrainingInputs(Tokenizer.load(job.tokenizer_folder), job.spec.shards, stream, job.folder)


def train_on_ray(
    config: TrainingConfig,
    plan: Plan,
    cluster: ClusterConfig,
    shards: TokenShards,
    tokenizer_folder: str,
    folder: StageFolder,
    watch: Callable[[], None],
    worker: Callable[[TrainJob], None],
) -> Checkpoint | None:
    """Train on the cluster until the horizon, or until `folder.stop` appears; returns the last checkpoint if reached.

    `watch` is called about five times a second on the calling thread while workers train. `worker` is what each
    worker runs.
    Raises: what a worker raised if another try would repeat it, or after max_failures tries.
    """
    shards.check_tokenizer(Tokenizer.load(tokenizer_folder))
    start_ray()
    workers, use_gpu = workers_of(cluster, folder.note)
    spec = StreamSpec(
        shards=shards, seed=config.seed, rows_per_step=plan.rows_per_step, num_steps=plan.num_steps,
        workers=allowed_workers(plan.rows_per_step, cluster.min_workers or workers, workers), folder=folder,
    )  # fmt: skip
    job = TrainJob(
        config=config, tokenizer_folder=tokenizer_folder, folder=folder, use_gpu=use_gpu, worker=worker,
        workers=spec.workers, spec=spec,
    )  # fmt: skip
    return run_on_ray(job, plan.num_steps, cluster, watch)


def run_on_ray(job: TrainJob, num_steps: int, cluster: ClusterConfig, watch: Callable[[], None]) -> Checkpoint | None:
    """Run a job's workers, starting them again where that may help; see `train_on_ray`."""
    storage.remove(job.folder.stop)
    try:
        fit_watched(_trainer(job, cluster), watch)
    finally:
        storage.remove(job.folder.stop)
        storage.remove(_ray_storage(job.folder))
    last = step_folder(job.folder.checkpoints, num_steps)
    return Checkpoint(last) if problem_with(last, verify=False) is None else None


def workers_of(cluster: ClusterConfig, note: Callable[[str], None]) -> tuple[int, bool]:
    """Return how many workers train, and whether on GPUs. Raises: ClusterError as `check_workers`."""
    gpus, use_gpu = training_gpus(cluster)
    workers = cluster.num_workers or (gpus if use_gpu else 0) or 1
    check_workers(workers, cluster, 1.0 if use_gpu else 0.0, note)
    return workers, use_gpu


def check_workers(workers: int, cluster: ClusterConfig, gpus_each: float, note: Callable[[str], None]) -> None:
    """Raise ClusterError if the cluster has no room for the least number of workers and cannot grow so far."""
    least = cluster.min_workers or workers
    needed = [{"GPU": gpus_each, "CPU": cluster.cpus_per_worker}] * least
    remedy = "Ask for fewer --num-workers, or lower --cpus-per-worker."
    check_resources(f"num_workers={least}", needed, "train", cluster, remedy, note)


def _trainer(job: TrainJob, cluster: ClusterConfig) -> TorchTrainer:
    use_gpu, workers = job.use_gpu, job.workers[-1]
    resources_each = {"CPU": cluster.cpus_per_worker} | ({"GPU": job.gpus_per_worker} if use_gpu else {})
    environment = (GPU_ENVIRONMENT if use_gpu else CPU_ALLOCATOR_ENVIRONMENT) | {
        "TORCHINDUCTOR_CACHE_DIR": compile_cache()
    }
    environment = {name: os.environ.get(name, value) for name, value in environment.items()}
    options = ray.data.ExecutionOptions(preserve_order=True, **on_nodes_for("data", cluster))
    return (ElasticTorchTrainer if cluster.min_workers else TorchTrainer)(
        _work,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=(cluster.min_workers, workers) if cluster.min_workers else workers,
            use_gpu=use_gpu,
            resources_per_worker=resources_each,
            elastic_resize_monitor_interval_s=RESIZE_LOOK_S,
            **on_nodes_for("train", cluster),
        ),
        run_config=RunConfig(
            name=f"train-{time.time_ns()}",
            storage_path=_ray_storage(job.folder),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            callbacks=[OnFailure(job.folder)],
            worker_runtime_env={"env_vars": environment},
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        datasets={} if job.spec is None else {"train": job.spec.dataset_from_newest_checkpoint},
        dataset_config=ray.train.DataConfig(execution_options={"train": options}),
    )


def _ray_storage(folder: StageFolder) -> str:
    """Return where Ray Train keeps its own notes while it runs; nothing of them is read."""
    return storage.join(folder.root, "ray_train")


def fit_watched(trainer: Any, watch: Callable[[], None]) -> None:
    """Run fit() in a thread, where Ray Train and Tune leave SIGINT alone, and watch from this one.

    Raises: the first cause of what it raised; ClusterError if that is Ray's own loss, of workers too often or of what
    leads them.
    """
    outcome: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as err:  # carried to the caller's thread
            outcome.append(err)

    thread = threading.Thread(target=fit, name="ray-fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.2)
        watch()
    if outcome:
        cause = first_cause(outcome[0])
        if isinstance(cause, ray.exceptions.RayError):
            raise ClusterError(
                f"ray: a process of this run was lost ({excerpt(cause)}). Look into Ray's log for why; the same "
                "command goes on from the newest checkpoint."
            ) from outcome[0]
        raise cause from (None if isinstance(cause, NanochatError) else outcome[0])
