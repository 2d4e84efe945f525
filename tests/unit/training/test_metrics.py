"""Clock, records and the progress line."""

import sys

import pytest
import torch

from nanochat import storage
from nanochat.config.pretrain import PretrainConfig
from nanochat.errors import ConfigError
from nanochat.storage import StageFolder
from nanochat.training import metrics
from nanochat.training.hardware import Hardware
from nanochat.training.metrics import MetricsWriter, StepClock, progress_line, rl_progress_line
from nanochat.training.plan import resolve

PLAN = resolve(PretrainConfig(depth=1, global_batch_tokens=1024, num_steps=10), 300, 128)


@pytest.fixture
def clock(monkeypatch):
    """A StepClock whose time the test sets: clock.now_s."""
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock.now_s)
    StepClock.now_s = 100.0
    clock = StepClock.__new__(StepClock)
    clock.now_s = 100.0
    clock.__init__(PLAN, Hardware(torch.device("cpu"), torch.float32, "asked for"))
    yield clock
    del StepClock.now_s


def test_rates_are_of_the_steps_alone(clock):
    """Two steps of 2 s and 4 s, of which 0.6 s waiting for rows; 50 s of evaluation between them do not count."""
    clock.skip()
    clock.now_s += 2
    clock.step_done(None)
    clock.now_s += 0.4
    clock.count()
    clock.now_s += 0.6
    clock.rows_arrived()
    clock.now_s += 50
    clock.skip()
    clock.now_s += 3
    clock.step_done(None)
    record = clock.lap(4)
    assert record["step_s"] == pytest.approx(3)
    assert record["tokens"] == 5 * 1024
    assert record["tokens_per_s"] == pytest.approx(2048 / 6)
    assert record["flops_per_s"] == pytest.approx(2048 / 6 * PLAN.flops_per_token)
    assert record["mfu"] is None
    assert record["data_wait_s"] == pytest.approx(0.6)
    assert record["data_wait_share"] == pytest.approx(0.1)
    assert record["training_s"] == pytest.approx(6)
    assert record["eta_s"] == pytest.approx(5 * 3)
    clock.now_s += 1
    clock.step_done(None)
    record = clock.lap(5)
    assert record["step_s"] == pytest.approx(1)
    assert record["data_wait_share"] == 0
    assert record["training_s"] == pytest.approx(7)


def test_the_share_of_the_time_that_a_gpu_computed(clock):
    """Two steps of 2 s, of which the GPU was at work for 1.5 and 2 s; the next lap begins from nothing."""
    for device_s in (1.5, 2.0):
        clock.now_s += 2
        clock.step_done(device_s)
    assert clock.lap(1)["device_share"] == pytest.approx(3.5 / 4)
    clock.now_s += 1
    clock.step_done(None)
    assert clock.lap(2)["device_share"] is None


def test_a_look_is_due_after_its_seconds(clock):
    assert not clock.every(2.0)
    clock.now_s += 2.5
    assert clock.every(2.0)
    assert not clock.every(2.0)


def writer(folder: StageFolder, enabled: bool = True) -> MetricsWriter:
    return MetricsWriter(folder, enabled=enabled, wandb=False, config={})


def test_records_of_a_killed_attempt_are_dropped(tmp_path):
    folder = StageFolder(str(tmp_path))
    first = writer(folder)
    for step in range(6):
        first.write({"step": step, "loss": float(step)})
        first.write_samples(step, {"a": "b"})
    again = writer(folder)
    again.begin(4)
    again.write({"step": 4, "loss": 40.0})
    assert [record["loss"] for record in storage.read_jsonl(folder.metrics)] == [0, 1, 2, 3, 40]
    assert [record["step"] for record in storage.read_jsonl(folder.samples)] == [0, 1, 2, 3]
    again.begin(0)
    assert storage.read_jsonl(folder.metrics) == []


def test_only_the_first_worker_writes(tmp_path):
    folder = StageFolder(str(tmp_path))
    writer(folder).write({"step": 7})
    other = writer(folder, enabled=False)
    other.begin(0)
    other.write({"step": 1})
    other.write_samples(1, {})
    other.close()
    assert storage.list_names(str(tmp_path)) == ["metrics.jsonl"]
    assert [record["step"] for record in storage.read_jsonl(folder.metrics)] == [7]


def test_without_wandb_its_flag_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"wandb=True: the package is not installed. Run: pip install wandb"):
        MetricsWriter(StageFolder(str(tmp_path)), enabled=True, wandb=True, config={})


def test_wandb_gets_every_record_and_is_closed(tmp_path, monkeypatch):
    calls: list = []

    class _Wandb:
        Error = RuntimeError

        def init(self, **arguments):
            calls.append(("init", arguments))
            return self

        def log(self, values, step):
            calls.append(("log", values, step))

        def finish(self):
            calls.append(("finish",))

    monkeypatch.setitem(sys.modules, "wandb", _Wandb())
    logged = MetricsWriter(StageFolder(str(tmp_path)), enabled=True, wandb=True, config={"depth": 4})
    logged.write({"step": 3, "loss": 1.5})
    logged.close()
    assert calls[0][1]["config"] == {"depth": 4}
    assert calls[0][1]["resume"] == "allow"
    assert calls[1:] == [("log", {"loss": 1.5}, 3), ("finish",)]


def test_what_wandb_refuses_says_how_to_go_on(tmp_path, monkeypatch):
    class _Wandb:
        Error = RuntimeError

        def init(self, **arguments):
            raise RuntimeError("No API key configured.")

    monkeypatch.setitem(sys.modules, "wandb", _Wandb())
    with pytest.raises(ConfigError, match=r"wandb=True: No API key configured. Run `wandb login`, or set WANDB_MODE="):
        MetricsWriter(StageFolder(str(tmp_path)), enabled=True, wandb=True, config={})


RECORD = {"step": 41, "loss": 3.14159, "tokens_per_s": 12345.6, "flops_per_s": 4.56e11, "data_wait_share": 0.0123}


def test_the_progress_line():
    line = progress_line(RECORD | {"mfu": None, "eta_s": 125.4}, 300, {})
    assert line == "step    42/300  loss 3.142  val bpb -  12,346 tok/s, 456 GFLOP/s  data wait 1.2%  left 2:05"
    line = progress_line(RECORD | {"mfu": 0.456, "eta_s": 59.6}, 300, {"val_bpb": 1.98765})
    assert line == "step    42/300  loss 3.142  val bpb 1.988  12,346 tok/s, 45.6% MFU  data wait 1.2%  left 1:00"


def test_the_progress_line_of_an_update_says_how_it_goes():
    record = {
        "step": 4, "reward": 0.261, "pass_at_1": 0.26, "pass_at_8": 0.69, "completion_tokens": 49.1, "entropy": 0.131,
        "truncated_share": 0.02, "zero_variance_share": 0.3, "staleness": 1.0, "mismatch_kl": 0.0021, "eta_s": 65.4,
        "tokens_per_s": 1357.2, "learner_idle_share": 0.006, "rollout_idle_share": 0.53,
    }  # fmt: skip
    assert rl_progress_line(record, 12, {"held_out_pass_at_1": 0.395, "held_out_reward": 0.395}) == (
        "step     5/12  reward 0.261  pass@8 69%  held out 39.5%  49 tokens, 2% cut  alike 30%  stale 1.0  KL 2e-03  "
        "entropy 0.13  1,357 tok/s  idle 1% / 53%  left 1:05"
    )
    assert "held out -" in rl_progress_line(record, 12, {})
    shares = {"held_out_pass_at_1": 0.0, "held_out_reward": 0.4567}
    assert "held out 0.0% (reward 0.457)" in rl_progress_line(record, 12, shares)
