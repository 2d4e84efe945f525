"""The whole pretraining loop in this process: resume, stop, divergence, memory, scores, samples, learning."""

import contextlib
import gc
import json
import math
import threading
import uuid
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_pretraining import Run, tiny_config

from nanochat import storage
from nanochat.data.row_order import RowReader
from nanochat.errors import CheckpointError, TokenizerMismatchError, TrainingDivergedError
from nanochat.evaluation.bits_per_byte import count_nats_and_bytes
from nanochat.model.gpt import GPT
from nanochat.model.optimizer import MuonAdamW
from nanochat.storage import StageFolder
from nanochat.training import loop
from nanochat.training import pretrain as pretraining
from nanochat.training.checkpoint import Checkpoint, newest_checkpoint, steps_found
from nanochat.training.step import TrainingStep

EXACT = ("step", "loss", "lr_factor", "val_bpb", "samples")


class Killed(BaseException):
    """Stands for the end of a process."""


def kill_before_step(monkeypatch, step: int) -> None:
    """Let the loop die when it asks for the rows of a step, once."""
    local_stream = loop.local_stream

    def dying(reader, rows_per_step, first_step):
        for rows in local_stream(reader, rows_per_step, first_step):
            if rows.step == step:
                raise Killed
            yield rows

    monkeypatch.setattr(loop, "local_stream", dying)


def killed_run(run: Run, config, monkeypatch, step: int) -> None:
    with monkeypatch.context() as patch:
        kill_before_step(patch, step)
        with pytest.raises(Killed):
            run(config)
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


def numbers(run: Run) -> list[dict]:
    """What metrics.jsonl and samples.jsonl say, without times."""
    records = storage.read_jsonl(run.folder.metrics) + storage.read_jsonl(run.folder.samples)
    return [{name: record[name] for name in EXACT if name in record} for record in records]


def tensors_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    tensors = {}
    for name in storage.list_names(checkpoint.folder):
        if name.endswith(".safetensors"):
            with storage.open_read(storage.join(checkpoint.folder, name)) as file:
                tensors |= {f"{name}:{key}": value for key, value in load(file.read()).items()}
    return tensors


def row_ids(run: Run) -> dict[int, list[int]]:
    """Row ids by step; a step that was trained on twice must have had the same rows."""
    ids: dict[int, list[int]] = {}
    for record in storage.read_jsonl(storage.join(run.folder.root, "rows_00.jsonl")):
        assert ids.setdefault(record["step"], record["row_ids"]) == record["row_ids"]
    return ids


@pytest.mark.parametrize("where", ["local", "memory"])
def test_interrupted_and_resumed_equals_uninterrupted(new_run, monkeypatch, where):
    """Killed two steps after a checkpoint, and again right after one was handed to the writer."""
    whole = new_run("whole")
    expected = whole(tiny_config())
    resumed = new_run("resumed" if where == "local" else f"memory://{uuid.uuid4().hex}")
    killed_run(resumed, tiny_config(), monkeypatch, 5)
    assert newest_checkpoint(resumed.folder.checkpoints, pytest.fail) == 3
    assert {record["step"] for record in numbers(resumed)} == {0, 1, 2, 3, 4}
    killed_run(resumed, tiny_config(), monkeypatch, 9)
    actual = resumed(tiny_config())
    assert expected is not None
    assert actual is not None
    assert numbers(resumed) == numbers(whole)
    for name, tensor in tensors_of(expected).items():
        assert torch.equal(tensors_of(actual)[name], tensor), name
    assert row_ids(resumed) == row_ids(whole)
    assert sorted(row_ids(whole)) == list(range(12))
    assert steps_found(resumed.folder.checkpoints) == steps_found(whole.folder.checkpoints) == [6, 9, 12]


def test_a_finished_run_that_is_started_again_stays_as_it_is(new_run):
    run = new_run()
    checkpoint = run(tiny_config())
    before = numbers(run), tensors_of(checkpoint)
    again = run(tiny_config())
    assert again == checkpoint
    assert numbers(run) == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in tensors_of(again).items())


def test_what_a_run_writes(new_run, prepared):
    run = new_run()
    checkpoint = run(tiny_config())
    records = storage.read_jsonl(run.folder.metrics)
    losses = [record for record in records if "loss" in record]
    assert [record["step"] for record in losses] == list(range(12))
    assert [record["step"] for record in records if "val_bpb" in record] == [0, 4, 8, 12]
    assert [record["tokens"] for record in losses] == [256 * (step + 1) for step in range(12)]
    for record in losses:
        assert 0 <= record["data_wait_share"] < 1
        assert record["tokens_per_s"] == pytest.approx(256 / record["step_s"])
        assert record["training_s"] > 0
    samples = storage.read_jsonl(run.folder.samples)
    assert [record["step"] for record in samples] == [3, 6, 9, 12]
    assert all(tuple(record["samples"]) == pretraining.SAMPLE_PROMPTS for record in samples)
    state = checkpoint.state
    assert state["step"] == 12
    assert state["position"] == {"seed": 0, "next_step": 12, "rows_per_step": 8}
    assert state["tokenizer_hash"] == prepared.tokenizer.hash
    assert state["manifest_hash"] == prepared.shards.manifest_hash
    assert state["model"]["n_embd"] == 32
    order = RowReader(prepared.shards, "train", 0).order
    assert row_ids(run) == {step: order.locate(8 * step, 8).tolist() for step in range(12)}


def test_the_seed_decides_and_nothing_else_does(new_run):
    first, same, other = new_run("a"), new_run("b"), new_run("c")
    for run, seed in ((first, 0), (same, 0), (other, 1)):
        run(tiny_config(num_steps=3, seed=seed))
    assert numbers(first) == numbers(same)
    assert numbers(first) != numbers(other)


def test_a_node_that_will_be_taken_away_is_a_reason_to_save_twice(new_run):
    """Once as soon as it is known, once shortly before; the numbers stay."""
    whole, drained = new_run("whole"), new_run("drained")
    whole(tiny_config())
    left = iter([None, None, 90.0, 60.0, 21.0, 20.0, 9.0, -1.0])
    drained.seconds_left = lambda: next(left, -5.0)
    assert drained(tiny_config(checkpoint_every=0, keep_checkpoints=9)) is not None
    assert steps_found(drained.folder.checkpoints) == [3, 6, tiny_config().num_steps]
    notes = [one["note"] for one in storage.read_jsonl(drained.folder.notes) if "taken away" in one["note"]]
    assert notes == [f"a node will be taken away in {s} s: a checkpoint is written" for s in (90, 20)]
    assert numbers(drained) == numbers(whole)


def test_a_stop_file_ends_the_run_with_a_checkpoint_and_it_resumes(new_run, monkeypatch):
    whole, stopped = new_run("whole"), new_run("stopped")
    whole(tiny_config())
    monkeypatch.setattr(StageFolder, "stop_check_s", 0.0)
    run_step, calls = TrainingStep.run, []

    def stop_in_step_4(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            storage.write_json(stopped.folder.stop, "stop")
        return run_step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "run", stop_in_step_4)
        assert stopped(tiny_config(checkpoint_every=0)) is None
    assert steps_found(stopped.folder.checkpoints) == [5]
    storage.remove(stopped.folder.stop)
    assert stopped(tiny_config()) is not None
    assert numbers(stopped) == numbers(whole)


def poison_after(monkeypatch, updates: int) -> None:
    """Put a NaN into a weight when so many updates are done."""
    run_step, calls = TrainingStep.run, []

    def run(self, *arguments):
        result = run_step(self, *arguments)
        calls.append(1)
        if len(calls) == updates:
            with torch.no_grad():
                self.model.lm_head.weight[0, 0] = math.nan
        return result

    monkeypatch.setattr(TrainingStep, "run", run)


@pytest.mark.parametrize(("updates", "step", "good"), [(2, 2, None), (3, 3, None), (5, 5, 3), (6, 6, 3), (10, 10, 9)])
def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_last_good_checkpoint(
    new_run, monkeypatch, updates, step, good
):
    """After 3 and 6 updates a checkpoint would be written that holds the NaN: it is not."""
    run = new_run()
    poison_after(monkeypatch, updates)
    with pytest.raises(TrainingDivergedError) as raised:
        run(tiny_config(evaluate_every=0, sample_every=0))
    last = (
        "there is no checkpoint" if good is None else f"the last good one is {run.folder.checkpoints}/step_{good:06d}"
    )
    what = "parameters" if updates % 3 == 0 else "loss"
    assert str(raised.value).startswith(f"{what}=nan: not finite at step {step}; {last}. Lower matrix_lr")
    assert max(steps_found(run.folder.checkpoints), default=None) == good


def test_a_last_update_that_breaks_the_model_is_no_success(new_run, monkeypatch):
    run = new_run()
    poison_after(monkeypatch, 12)
    with pytest.raises(TrainingDivergedError, match=r"parameters=nan: not finite at step 12; .*step_000009\."):
        run(tiny_config())


def test_the_loss_falls_on_text_that_can_be_learned(new_run):
    run = new_run()
    run(tiny_config(num_steps=30, evaluate_every=0, sample_every=0, checkpoint_every=0))
    losses = [record["loss"] for record in storage.read_jsonl(run.folder.metrics) if "loss" in record]
    assert losses[0] == pytest.approx(math.log(300), abs=0.1)
    assert np.mean(losses[-5:]) < 0.6 * losses[0]


def test_validation_counts_each_text_byte_once(new_run, prepared):
    """The last score of a run, by the slow way: the saved model on one row after the other."""
    run = new_run()
    checkpoint = run(tiny_config(num_steps=2, micro_batch_rows=3, evaluate_every=0, validation_tokens=10**6))
    score = storage.read_jsonl(run.folder.metrics)[-1]["val_bpb"]
    assert prepared.shards.rows("validation") % 4 != 0, "the last batch is filled up"
    model = GPT(pretraining.planning.resolve_model(tiny_config(), prepared.tokenizer.vocab_size, 32))
    model.load_state_dict(checkpoint.model_tensors())
    nats, text = 0.0, b""
    for shard in prepared.shards.split("validation"):
        for group in range(len(shard.group_sizes())):
            for row in prepared.shards.read_rows(shard, group).astype(np.int64):
                with torch.no_grad():
                    logits = model.logits(model(torch.from_numpy(row[None, :-1])))[0].double().log_softmax(-1)
                for position, token in enumerate(row[1:]):
                    if token < prepared.tokenizer.bos:
                        nats -= float(logits[position, token])
                        text += prepared.tokenizer.decode_bytes([int(token)])
    assert len(text) == sum(shard.text_bytes for shard in prepared.shards.split("validation"))
    assert score == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)


def test_document_masking_trains_and_validates_with_the_mask(new_run, prepared, monkeypatch):
    masks = []

    def count(model, batches, token_bytes_V, bos=None, supervised=None):
        masks.append(bos)
        return count_nats_and_bytes(model, batches, token_bytes_V, bos)

    monkeypatch.setattr(loop, "count_nats_and_bytes", count)
    config = tiny_config(num_steps=4, document_masking=True, evaluate_every=0)
    masked, plain = new_run("masked"), new_run("plain")
    masked(config)
    plain(replace(config, document_masking=False))
    assert losses_of(masked)[0] == losses_of(plain)[0]  # no projection is above zero yet
    assert losses_of(masked)[1:] != losses_of(plain)[1:]
    assert masks == [prepared.tokenizer.bos, None]


class _SmallMemory:
    """Lets a backward pass run out of memory above a number of rows, or without recomputing."""

    def __init__(self, monkeypatch, rows: int, needs_recompute: bool = False) -> None:
        self.sizes: list[int] = []
        backward = TrainingStep.backward

        def limited(step, rows_BT1, global_tokens):
            self.sizes.append(len(rows_BT1))
            if len(rows_BT1) > rows or (needs_recompute and not step.model.recompute):
                raise torch.OutOfMemoryError("out of memory")
            return backward(step, rows_BT1, global_tokens)

        monkeypatch.setattr(TrainingStep, "backward", limited)


def notes_of(run: Run) -> list[str]:
    return [record["note"] for record in storage.read_jsonl(run.folder.notes)]


def losses_of(run: Run) -> list[float]:
    return [record["loss"] for record in storage.read_jsonl(run.folder.metrics) if "loss" in record]


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_global_batch(new_run, monkeypatch):
    config = tiny_config(micro_batch_rows=8, num_steps=4, lr_batch_tokens=256)
    roomy, tight = new_run("roomy"), new_run("tight")
    roomy(config)
    memory = _SmallMemory(monkeypatch, rows=2)
    tight(config)
    assert memory.sizes == [8, 4, 2, 2] + [2] * 16
    assert notes_of(tight) == [
        "out of memory: the micro-batch is halved to 4 rows, the global batch stays",
        "out of memory: the micro-batch is halved to 2 rows, the global batch stays",
    ]
    assert losses_of(tight) == pytest.approx(losses_of(roomy), abs=1e-5)
    assert row_ids(tight) == row_ids(roomy)


def test_out_of_memory_with_one_row_recomputes_activations(new_run, monkeypatch):
    config = tiny_config(micro_batch_rows=2, num_steps=2, lr_batch_tokens=256)
    roomy, tight = new_run("roomy"), new_run("tight")
    roomy(config)
    memory = _SmallMemory(monkeypatch, rows=8, needs_recompute=True)
    tight(config)
    assert memory.sizes == [2, 1, 1, 1] + [1] * 16
    assert notes_of(tight)[-1] == "out of memory with one row: activations are recomputed from now on"
    assert losses_of(tight) == pytest.approx(losses_of(roomy), abs=1e-5)


def test_out_of_memory_when_nothing_is_left_to_do_is_raised(new_run, monkeypatch):
    _SmallMemory(monkeypatch, rows=0)
    with pytest.raises(torch.OutOfMemoryError):
        new_run()(tiny_config())


def test_out_of_memory_after_the_trial_leaves_a_smaller_micro_batch_to_the_next_start(new_run, monkeypatch):
    """The worst step may come after the trial: the run ends, and goes on from its checkpoint with half the rows."""
    config = tiny_config(micro_batch_rows=4, num_steps=4, lr_batch_tokens=256)
    roomy, tight = new_run("roomy"), new_run("tight")
    roomy(config)
    with monkeypatch.context() as patch:
        whole, calls = MuonAdamW.step, []

        def limited(optimizer, schedule):
            calls.append(1)
            if len(calls) == 4:
                raise torch.OutOfMemoryError("out of memory")
            return whole(optimizer, schedule)

        patch.setattr(MuonAdamW, "step", limited)
        with pytest.raises(torch.OutOfMemoryError):
            tight(config)
    assert "out of memory with 4 rows: the next start uses {'micro_batch_rows': 2" in notes_of(tight)[-1]
    sizes = []
    whole_backward = TrainingStep.backward
    monkeypatch.setattr(
        TrainingStep,
        "backward",
        lambda step, rows, global_tokens: sizes.append(len(rows)) or whole_backward(step, rows, global_tokens),
    )
    assert tight(config) is not None
    assert set(sizes) == {2}
    assert losses_of(tight) == pytest.approx(losses_of(roomy), abs=1e-5)


def test_a_checkpoint_of_other_shards_or_another_tokenizer_is_refused(new_run, prepared, monkeypatch):
    run = new_run()
    killed_run(run, tiny_config(), monkeypatch, 4)
    other = replace(prepared, shards=replace(prepared.shards, manifest_hash="0" * 64))
    with pytest.raises(CheckpointError, match=r"step_000003: was trained on other token shards .* Put those back"):
        Run(other, run.folder)(tiny_config())
    monkeypatch.setattr(prepared.tokenizer, "hash", "0" * 64)
    with pytest.raises(TokenizerMismatchError, match=r"step_000003: was trained with another tokenizer\. Put that"):
        run(tiny_config())


def test_a_damaged_checkpoint_is_passed_over_and_its_steps_are_done_again(new_run, monkeypatch):
    whole, damaged = new_run("whole"), new_run("damaged")
    whole(tiny_config())
    killed_run(damaged, tiny_config(), monkeypatch, 7)
    path = f"{damaged.folder.checkpoints}/step_000006/model.safetensors"
    with open(path, "r+b") as file:
        file.truncate(1000)
    assert damaged(tiny_config()) is not None
    assert any("step_000006 is passed over: model.safetensors is damaged" in line for line in damaged.said)
    assert numbers(damaged) == numbers(whole)


def test_a_metrics_line_cut_by_a_crash_is_not_grown_into(new_run, monkeypatch):
    whole, cut = new_run("whole"), new_run("cut")
    whole(tiny_config())
    killed_run(cut, tiny_config(), monkeypatch, 4)
    storage.remove(f"{cut.folder.checkpoints}/step_000003")  # so that it begins at step 0, before every record
    with open(cut.folder.metrics, "r+b") as file:
        file.truncate(20)
    assert cut(tiny_config()) is not None
    assert numbers(cut) == numbers(whole)


@pytest.mark.parametrize("fails", [False, True])
def test_the_garbage_collector_rests_during_training_and_works_again_after_it(new_run, monkeypatch, fails):
    run_step, enabled = TrainingStep.run, []

    def recorded(self, *arguments):
        enabled.append(gc.isenabled())
        if fails and len(enabled) == 3:
            raise Killed
        return run_step(self, *arguments)

    monkeypatch.setattr(TrainingStep, "run", recorded)
    with pytest.raises(Killed) if fails else contextlib.nullcontext():
        new_run()(tiny_config(num_steps=3))
    assert enabled == [True, False, False]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_every_metrics_line_is_strict_json(new_run):
    run = new_run()
    run(tiny_config(num_steps=2))
    for path in (run.folder.metrics, run.folder.samples):
        with open(path, encoding="utf-8") as file:
            for line in file:
                json.loads(line, parse_constant=lambda name: pytest.fail(name))
