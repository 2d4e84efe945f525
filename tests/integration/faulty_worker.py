"""A training worker that kills itself with SIGKILL, once, at chosen places; put in place of the real one by a test."""

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from ray import cloudpickle

from nanochat.cluster import trainer
from nanochat.training.checkpoint import CheckpointWriter
from nanochat.training.loop import TrainingLoop
from nanochat.training.step import TrainingStep


@dataclass(frozen=True)
class Kill:
    """Where one worker dies: `place` is step, write or after_save; `count` the how-manieth call in this process."""

    place: str
    rank: int
    count: int
    number: int = 0

    def marker(self, folder: Path) -> Path:
        """The file that says that it happened."""
        return folder / f"killed_{self.place}_{self.rank}_{self.number}"


def kill_once(kill: Kill, folder: Path, calls: list[int]) -> None:
    """Die at the given call, unless an earlier attempt already did."""
    calls.append(1)
    if len(calls) == kill.count and not kill.marker(folder).exists():
        kill.marker(folder).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def arm(kill: Kill, folder: Path) -> None:
    """Patch this worker process."""
    calls: list[int] = []
    if kill.place == "step":  # in the middle of a step: gradients made, nothing updated
        whole = TrainingStep.backward

        def backward(self, *arguments, **options):
            result = whole(self, *arguments, **options)
            kill_once(kill, folder, calls)
            return result

        TrainingStep.backward = backward
    elif kill.place == "write":  # during a checkpoint: this worker's tensors are written, its checksums are not
        import nanochat.training.checkpoint as checkpoint

        save_file = checkpoint._save_file

        def dying_save(path, tensors):
            save_file(path, tensors)
            kill_once(kill, folder, calls)

        checkpoint._save_file = dying_save
    elif kill.place == "after_save":  # a complete checkpoint was just written
        save, written = TrainingLoop._save, CheckpointWriter.wait

        def save_and_die(self, step):
            save(self, step)
            written(self.writer)
            kill_once(kill, folder, calls)

        TrainingLoop._save = save_and_die


def worker_with(kills: list[Kill], folder: Path, inner=trainer.pretrain_worker):
    """Return a worker that does as `inner` and dies at each of the places once, in their order."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file

    def train_worker(job):
        import ray.train

        rank = ray.train.get_context().get_world_rank()
        for kill in kills:
            if not kill.marker(folder).exists():
                if kill.rank == rank:
                    arm(kill, folder)
                break
        inner(job)

    return train_worker


def worker_whose_weights_turn_nan(step: int):
    """Return a stand-in for `trainer.pretrain_worker` in which a weight is NaN before the given step."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])

    def train_worker(job):
        whole, calls = TrainingStep.run, []

        def run(self, *arguments, **options):
            calls.append(1)
            if len(calls) == step + 1:
                self.model.lm_head.weight.data[0, 0] = float("nan")
            return whole(self, *arguments, **options)

        TrainingStep.run = run
        trainer.pretrain_worker(job)

    return train_worker
