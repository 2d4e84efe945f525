"""A sweep on Ray Tune: one trial, in one process, for each run that has not ended; Tune packs and restarts them.

The run directories alone say what has been done: an outcome.json ends a run, without one it goes on from its newest
checkpoint. Nothing of Tune's own is read again.
"""

import contextlib
import math
import os
import platform
import time
import traceback
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune

from nanochat import storage
from nanochat.cluster.environment import compile_cache
from nanochat.cluster.nodes import check_resources, on_nodes_for, resources
from nanochat.cluster.session import start_ray
from nanochat.cluster.terminal import Terminal, on_interrupt
from nanochat.cluster.trainer import fit_watched, is_retried
from nanochat.config.pretrain import PretrainConfig
from nanochat.config.sweep import Overrides, SweepConfig, expand, overridden
from nanochat.data.row_order import RowReader
from nanochat.data.token_shards import TokenShards
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import ConfigError, DataError, excerpt
from nanochat.model import scaling
from nanochat.pages.sweep import COLUMNS, Row, write_sweep
from nanochat.provenance import begin_stage, check_stage
from nanochat.run_context import RunContext
from nanochat.storage import RunFolder
from nanochat.training import plan as planning
from nanochat.training.checkpoint import newest_checkpoint
from nanochat.training.loop import TrainingInputs, local_stream
from nanochat.training.plan import Plan
from nanochat.training.pretrain import Pretraining


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One run of a sweep, planned."""

    name: str
    overrides: Overrides
    folder: RunFolder
    data: RunFolder
    config: PretrainConfig
    plan: Plan

    @property
    def flops(self) -> int:
        """What its horizon costs."""
        return self.plan.num_steps * self.plan.tokens_per_step * self.plan.flops_per_token

    @property
    def has_ended(self) -> bool:
        """Whether it is done, or failed in a way that another try would repeat."""
        return storage.exists(self.folder.outcome)


def plan_sweep(config: SweepConfig, base: PretrainConfig) -> list[SweepRun]:
    """Return all runs; none has been started, nothing is written.

    Raises: ConfigError naming the run and field of an override that cannot be, or of a folder with another run;
    DataError, TokenizerMismatchError if the shared data is not whole.
    """
    data = RunFolder(config.data_run_dir)
    shards, tokenizer = TokenShards.load(data.shards), Tokenizer.load(data.tokenizer)
    shards.check_tokenizer(tokenizer)
    runs = []
    for name, overrides in expand(config).items():
        given = overridden(name, base, overrides)
        sizes = tokenizer.vocab_size, shards.sequence_len
        try:
            for budget in overrides.keys() & {"tokens", "flops"}:
                given = planning.with_budget(given, *sizes, budget, overrides[budget])
            plan = planning.resolve(given, *sizes)
        except ConfigError as err:
            raise ConfigError(f"run={name}: {err}") from err
        run = SweepRun(
            name=name, overrides=overrides, folder=RunFolder(storage.join(config.run_dir, name)), data=data,
            config=given, plan=plan,
        )  # fmt: skip
        check_stage(run.folder.pretrain.root, {"pretrain": given})
        path = run.folder.pretrain.config
        if storage.exists(path) and storage.read_json(path)["resolved"]["shards"] != shards.manifest_hash:
            raise DataError(
                f"data_run_dir={config.data_run_dir}: {path} was made with other token shards. "
                "Put those back, or use another --run-dir."
            )
        runs.append(run)
    return runs


def run_sweep(config: SweepConfig, runs: list[SweepRun], terminal: Terminal) -> list[Row]:
    """Train what has not ended, then write table and page, whatever happens to single runs; returns the table's rows.

    Raises: ClusterError if no run has room; KeyboardInterrupt if it was asked to stop before the end.
    """
    due = sorted((run for run in runs if not run.has_ended), key=lambda run: -run.flops)  # the longest ones first
    terminal.line(f"sweep      {len(runs)} runs, {len(due)} of them to do; Ctrl-C leaves with checkpoints")
    story = _Story(due, terminal)

    def stop() -> None:
        terminal.line("stopping after this step, with checkpoints; press Ctrl-C again to leave at once")
        for run in due:
            with storage.atomic_write(run.folder.pretrain.stop) as file:
                file.write(b"stop\n")

    if due:
        start_ray()
        try:
            tuner = _tuner(config, due, len(runs), story)
            for run in due:
                _begin(run)
            with on_interrupt(stop):
                fit_watched(tuner, story.show)
        finally:
            storage.remove(_tune_storage(config))
    rows = [_row(run, story.lost.get(run.name)) for run in runs]
    for line in write_sweep(config.run_dir, rows):
        terminal.line(line)
    terminal.line(f"report     {RunFolder(config.run_dir).report}")
    if any(row["state"] == "stopped" for row in rows):
        terminal.line("stopped; run the same command to go on")
        raise KeyboardInterrupt
    return rows


def train_run(run: SweepRun, context: RunContext) -> None:
    """Train one run from its newest checkpoint, in this process; how it ended goes to its folder.

    Raises: what another try may help against.
    """
    stage = run.folder.pretrain
    if storage.exists(stage.stop) or run.has_ended:
        return
    try:
        loop = Pretraining(run.config, context, _inputs(run), run.overrides.get("training_s", math.inf))
        loop.train()
    except Exception as err:  # the edge of a run: its end is not the sweep's
        path = storage.join(stage.errors, f"{time.strftime('%Y%m%d-%H%M%S')}.txt")
        with contextlib.suppress(OSError), storage.atomic_write(path) as file:  # a full disk must not hide `err`
            file.write(traceback.format_exc().encode())
        if is_retried(err):
            raise
        storage.write_json(run.folder.outcome, {"state": "failed", "reason": f"{type(err).__name__}: {excerpt(err)}"})
        return
    if loop.is_over():
        outcome = {"steps": loop.saved_step, "val_bpb": loop.val_bpb, "trained_s": loop.clock.training_s}
        storage.write_json(run.folder.outcome, {"state": "done"} | outcome)


def _inputs(run: SweepRun) -> TrainingInputs:
    stage, shards = run.folder.pretrain, TokenShards.load(run.data.shards)
    step = newest_checkpoint(stage.checkpoints, passed_over=stage.note) or 0
    stage.note(f"process {os.getpid()} on {platform.node()} starts at step {step}")
    stream = local_stream(RowReader(shards, "train", run.config.seed), run.plan.rows_per_step, step)
    return TrainingInputs(Tokenizer.load(run.data.tokenizer), shards, stream, stage)


def _begin(run: SweepRun) -> None:
    """Make its folder a run directory, whose model can be evaluated and served; the shards stay where they are."""
    shards = TokenShards.load(run.data.shards)
    begin_stage(
        run.folder.pretrain.root, {"pretrain": run.config}, run.plan.as_json() | {"shards": shards.manifest_hash}
    )
    Tokenizer.load(run.data.tokenizer).save(run.folder.tokenizer)
    storage.remove(run.folder.pretrain.stop)


def _row(run: SweepRun, lost: str | None) -> Row:
    """Return a run's row; `lost` is why its last try did not come to an end."""
    outcome: Row = {"state": "stopped" if lost is None else "failed", "reason": lost or ""}
    if run.has_ended:
        outcome |= storage.read_json(run.folder.outcome)
    row: Row = dict.fromkeys(COLUMNS) | {"run": run.name, "overrides": run.overrides} | outcome
    row["parameters"] = scaling.scaling_parameters(run.plan.model)
    if row["steps"] is not None:
        row["trained_tokens"] = row["steps"] * run.plan.tokens_per_step
        row["trained_flops"] = float(row["trained_tokens"] * run.plan.flops_per_token)
    return row


class _Story(tune.Callback):
    """Tells the terminal what becomes of the trials, and keeps why some were given up."""

    def __init__(self, due: list[SweepRun], terminal: Terminal) -> None:
        self.due, self.terminal = due, terminal
        self.running: set[int] = set()
        self.ended = 0
        self.lost: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Tune writes its callbacks down, without a terminal; that is never read."""
        return {}

    def show(self) -> None:
        """Show how many there are of each kind."""
        self.terminal.live(f"           {len(self.running)} running, {self.ended} of {len(self.due)} ended")

    def on_trial_start(self, trial: Any, **ray_tells: Any) -> None:
        """A process has been started."""
        self.running.add(trial.config["run"])
        self.terminal.line(f"start      {self.due[trial.config['run']].name}")

    def on_trial_complete(self, trial: Any, **ray_tells: Any) -> None:
        """A run has ended, well or not, or has been stopped."""
        run = self._leave(trial)
        row = _row(run, None)
        score = "" if row["val_bpb"] is None else f", {row['val_bpb']:.4f} bits per byte"
        self.ended += run.has_ended
        told = f": {row['reason']}" if row["reason"] else ""
        self.terminal.line(f"{row['state']:<10} {run.name}{score}{told}")

    def on_trial_recover(self, trial: Any, **ray_tells: Any) -> None:
        """A process was lost and will be started again."""
        self.terminal.line(f"again      {self._leave(trial).name}: {self._reason(trial)}")

    def on_trial_error(self, trial: Any, **ray_tells: Any) -> None:
        """The last try of a run was lost."""
        run = self._leave(trial)
        self.lost[run.name] = f"{self._reason(trial)}; the same command tries it again"
        self.terminal.line(f"failed     {run.name}: {self.lost[run.name]}")

    def _leave(self, trial: Any) -> SweepRun:
        self.running.discard(trial.config["run"])
        return self.due[trial.config["run"]]

    def _reason(self, trial: Any) -> str:
        with open(trial.error_file, encoding="utf-8") as file:  # on this machine; the trial's own getter knows it later
            return excerpt(file.read().rstrip().splitlines()[-1])


def _tuner(config: SweepConfig, due: list[SweepRun], all_runs: int, story: _Story) -> tune.Tuner:
    cluster = config.cluster
    gpus = config.gpus_per_run
    if gpus is None:
        gpus = 1.0 if resources("train", cluster).get("GPU") else 0.0
    needed = {"CPU": config.cpus_per_run} | ({"GPU": gpus} if gpus else {})
    asked = f"cpus_per_run={config.cpus_per_run:g}, gpus_per_run={gpus:g}"
    check_resources(asked, [needed], "train", cluster, "Ask for less.", story.terminal.line)

    def trial(chosen: dict[str, int]) -> None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", compile_cache())
        beside = max(1, min(all_runs, int(_cpus_of_this_node() / config.cpus_per_run)))  # also while fewer are at work
        train_run(due[chosen["run"]], RunContext(use_gpu=gpus > 0, gpu_share=gpus or 1.0, local_world_size=beside))

    place = {f"bundle_{name}": [value] for name, value in on_nodes_for("train", cluster).items()}
    return tune.Tuner(
        tune.with_resources(trial, tune.PlacementGroupFactory([needed], **place)),
        param_space={"run": tune.grid_search(list(range(len(due))))},
        run_config=tune.RunConfig(
            name=f"sweep-{time.time_ns()}", storage_path=_tune_storage(config), callbacks=[story], verbose=0,
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
        ),
    )  # fmt: skip


def _cpus_of_this_node() -> float:
    here = ray.get_runtime_context().get_node_id()
    return next(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["NodeID"] == here)


def _tune_storage(config: SweepConfig) -> str:
    """Return where Tune keeps its own notes while it runs; nothing of them is read."""
    return storage.join(RunFolder(config.run_dir).root, "ray_tune")
