"""Reinforcement learning on a real Ray: exact with actors, exact through kills, and clear when nobody is left."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from ray import cloudpickle
from rl_run import HERE, Killer, TinyRL, batches, check_log, processes, write_problems
from test_pretraining import notes_of, wait_for

from nanochat.cluster import rl_benchmark
from nanochat.cluster.session import actor_map
from nanochat.cluster.terminal import Terminal
from nanochat.errors import ClusterError, ConfigError
from nanochat.storage import RunFolder, read_jsonl
from nanochat.training.checkpoint import Checkpoint, newest_of, step_folder

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ACTOR, LEARNER = "ray::RolloutActor", "ray::RayTrainWorker"


@pytest.fixture(scope="module")
def tiny(ray_session, tiny_base, tmp_path_factory) -> TinyRL:
    """A base model and problems to practise."""
    root = tmp_path_factory.mktemp("rl") / "run"
    shutil.copytree(tiny_base, root)
    return TinyRL(root, newest_of(RunFolder(str(root)).pretrain, print), write_problems(root / "problems"))


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """The run in one process that every other one with S = 0 equals."""
    folder = tmp_path_factory.mktemp("alone")
    assert tiny.alone(tiny.config(), folder) is not None
    return folder


def assert_same_end(folder, expected, step):
    """Weights and samples are those of the other run."""
    tensors, others = (
        Checkpoint(step_folder(f"{one}/checkpoints", step)).model_tensors() for one in (folder, expected)
    )
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
    assert batches(folder) == batches(expected)
    assert check_log(folder, step) == check_log(expected, step)


def test_actors_sample_what_one_process_does(tiny, alone, tmp_path):
    """S = 0, float32: sample for sample, and the weights bit for bit."""
    assert tiny.on_ray(tiny.config(), tmp_path) is not None
    assert_same_end(tmp_path, alone, 6)
    assert not processes(ACTOR), "they ended with the run"
    rows = [record for record in read_jsonl(f"{tmp_path}/metrics.jsonl") if "reward" in record]
    assert [row["staleness_max"] for row in rows] == [0] * 6
    assert all(row["sync_bytes"] > 0 and 0 <= row["rollout_idle_share"] <= 1 for row in rows)
    assert max(row["mismatch_kl"] for row in rows) < 1e-9


def test_code_that_a_model_wrote_runs_in_no_actor(tiny, tmp_path):
    """It ends well in the sandbox, as a rollout actor and one of evaluation call it; both of them live on."""
    config = tiny.config(reward="tiny_rewards:hostile_code", num_steps=1, groups_per_step=1, checkpoint_every=0)
    assert tiny.on_ray(config, tmp_path, actors=1) is not None
    (row,) = [record for record in read_jsonl(f"{tmp_path}/metrics.jsonl") if "reward" in record]
    assert (row["reward"], row["rollout_deaths"]) == (1.0, 0.0)
    from tiny_rewards import hostile_code

    cloudpickle.register_pickle_by_value(sys.modules["tiny_rewards"])
    asked = list(actor_map(1, 0.0)(lambda item: (hostile_code(None, ""), os.getpid()), range(2)))
    assert [reward for reward, _ in asked] == [1.0, 1.0]
    assert len({process for _, process in asked} - {os.getpid()}) == 1, "the same actor, elsewhere"


@pytest.mark.slow
def test_two_learners_learn_the_same(tiny, alone, tmp_path):
    assert tiny.on_ray(tiny.config(), tmp_path, workers=2) is not None
    assert batches(tmp_path)[0] == batches(alone)[0]
    tensors, others = (Checkpoint(step_folder(f"{one}/checkpoints", 2)).model_tensors() for one in (tmp_path, alone))
    for name, tensor in tensors.items():
        assert torch.allclose(tensor, others[name], atol=2e-5), name


@pytest.mark.slow
def test_sampling_goes_on_while_the_learner_learns_and_stays_within_the_bound(tiny, tmp_path):
    for staleness in (1, 3):
        folder = tmp_path / str(staleness)
        config = tiny.config(max_staleness=staleness, num_steps=12, tis_cap=2.0)
        assert tiny.on_ray(config, folder) is not None
        check_log(folder, 12)
        rows = [record for record in read_jsonl(f"{folder}/metrics.jsonl") if "reward" in record]
        assert max(row["staleness_max"] for row in rows) == staleness
        for step, groups in batches(folder).items():
            for samples in groups.values():
                assert all(step - staleness <= sample[3] <= step for sample in samples)


@pytest.mark.slow
def test_an_actor_that_is_killed_is_replaced_and_nothing_changes(tiny, tmp_path):
    config = tiny.config(num_steps=30, checkpoint_every=0)
    assert tiny.alone(config, tmp_path / "calm") is not None
    killer = Killer(ACTOR, tmp_path / "killed", kills=2)
    assert tiny.on_ray(config, tmp_path / "killed", killer) is not None
    assert len(killer.killed) == 2
    notes = notes_of(tmp_path / "killed")
    assert len([note for note in notes if note.startswith("a rollout actor died")]) == 2
    assert_same_end(tmp_path / "killed", tmp_path / "calm", 30)


@pytest.mark.slow
def test_a_learner_that_is_killed_begins_where_its_checkpoint_stands(tiny, tmp_path):
    config = tiny.config(num_steps=60, checkpoint_every=5)
    assert tiny.alone(config, tmp_path / "calm") is not None
    killer = Killer(LEARNER, tmp_path / "killed", kills=2)
    assert tiny.on_ray(config, tmp_path / "killed", killer) is not None
    assert len(killer.killed) == 2
    assert len([note for note in notes_of(tmp_path / "killed") if "starts at step" in note]) == 3
    wait_for(lambda: not processes(ACTOR), 20)  # its own, and those that it left behind
    assert_same_end(tmp_path / "killed", tmp_path / "calm", 60)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("title", [ACTOR, LEARNER])
def test_twenty_kills_change_nothing(tiny, tmp_path, title):
    config = tiny.config(num_steps=400, checkpoint_every=20)
    assert tiny.alone(config, tmp_path / "calm") is not None
    killer = Killer(title, tmp_path / "stormy", kills=20)
    assert tiny.on_ray(config, tmp_path / "stormy", killer) is not None
    assert len(killer.killed) == 20
    assert_same_end(tmp_path / "stormy", tmp_path / "calm", 400)


@pytest.mark.parametrize(
    ("reward", "error", "match"),
    [
        (
            "broken",
            ConfigError,
            r"reward=tiny_rewards:broken: raised KeyError: .* \(.*tiny_rewards.py:18\)",
        ),
        pytest.param("not_a_number", ConfigError, "rewards:not_a_number: returned nan", marks=pytest.mark.slow),
        pytest.param("deadly", ClusterError, "actors=2: 7 died one after the other", marks=pytest.mark.slow),
        pytest.param("absent", ConfigError, "tiny_rewards:absent: cannot be imported", marks=pytest.mark.slow),
    ],
)
def test_what_ends_a_run_is_said_and_not_tried_again(tiny, tmp_path, reward, error, match):
    config = tiny.config(reward=f"tiny_rewards:{reward}", held_out_problems=0)  # the learner judges those
    with pytest.raises(error, match=match):
        tiny.on_ray(config, tmp_path)
    starts = [note for note in notes_of(tmp_path) if "starts at step" in note] if reward != "absent" else [1]
    assert len(starts) == 1


@pytest.mark.slow
def test_nobody_to_sample_is_said_within_the_stated_time(tiny, tmp_path):
    """Actors for which the cluster has no room."""
    start_s = time.monotonic()
    with pytest.raises(ClusterError, match=r"timeout_s=4: no group was sampled for \d+ s: 0 of 2 actors have begun"):
        tiny.on_ray(tiny.config(), tmp_path, cpus_per_actor=64.0, timeout_s=4.0)
    assert time.monotonic() - start_s < 60


@pytest.mark.slow
def test_groups_that_are_all_alike_train_nothing_and_end(tiny, tmp_path):
    assert tiny.on_ray(tiny.config(reward="tiny_rewards:always_the_same", num_steps=2), tmp_path) is not None
    records = read_jsonl(f"{tmp_path}/groups.jsonl")
    assert [len(record["trained"]) for record in records] == [0, 0]
    assert [len(record["dropped"]) for record in records] == [16, 16], "four times the groups of an update, no more"
    weights = Checkpoint(step_folder(f"{tmp_path}/checkpoints", 2)).model_tensors()
    for name, tensor in tiny.base.model_tensors().items():
        assert torch.equal(tensor, weights[name])


@pytest.mark.long
def test_the_benchmark_measures_both_ways_and_what_is_learned(tiny, tmp_path, monkeypatch):
    """On a model that is never right: what is measured is there, not how much it is."""
    root = tmp_path / "run"
    shutil.copytree(tiny.root, root)
    shutil.copytree(root / "pretrain", root / "sft")
    (tmp_path / "gsm8k").mkdir()
    with open(tmp_path / "gsm8k" / "train.jsonl", "w") as file:
        file.writelines(json.dumps({"question": f"{n}?", "answer": f"#### {n}"}) + "\n" for n in range(40))
    config = tiny.config(task=f"gsm8k={tmp_path}/gsm8k", reward=None, samples_per_group=2, max_refill=0.0)
    monkeypatch.setattr(rl_benchmark, "word_problems", lambda num_steps, seed=0: replace(config, num_steps=num_steps))
    for name, value in (("ROUNDS", 1), ("ROLLOUT_S", 1.0), ("LOOP_STEPS", 3), ("WARM_UP_STEPS", 1)):
        monkeypatch.setattr(rl_benchmark, name, value)
    screen = Terminal(io.StringIO())
    monkeypatch.chdir(tmp_path)
    found = rl_benchmark.measure_throughput("run", screen)
    for what in ("rollout", "rl"):
        ours, theirs = found[f"{what}_samples_per_s"], found[f"{what}_samples_per_s_sequential"]
        assert ours > 0 < theirs
        assert found[f"{what}_ratio"] == pytest.approx(ours / theirs)
    assert found["zero_variance_share"] == 1.0
    learned = rl_benchmark.measure_learning("run", 2, 1, screen)
    assert learned["rl_pass1_before"] == learned["rl_pass1_after"] == learned["rl_points"] == [0.0, 0.0]
    assert min(learned["rl_seconds"]) > 0


def command(tiny, run_dir, num_steps):
    flags = f"--task messages={tiny.problems} --reward tiny_rewards:odd_length --base {tiny.base.folder}"
    more = f"--num-steps {num_steps} --groups-per-step 4 --samples-per-group 4 --max-new-tokens 12 --max-staleness 0"
    last = "--tis-cap None --dtype float32 --checkpoint-every 20 --held-out-problems 5 --actors 2 --running 8"
    return [sys.executable, f"{HERE}/../../ray_jobs/rl.py", "--run-dir", str(run_dir), "--cpus-per-worker", "0.5",
            *flags.split(), *more.split(), *last.split()]  # fmt: skip


def commanded(tiny, run_dir, num_steps):
    """Start the command line in the folder of the rewards."""
    return subprocess.Popen(
        command(tiny, run_dir, num_steps), stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=HERE
    )


@pytest.mark.parametrize(
    ("kills", "num_steps"),
    [
        pytest.param(2, 60, marks=pytest.mark.long),
        pytest.param(20, 900, marks=[pytest.mark.soak, pytest.mark.timeout(3600)]),
    ],
)
def test_the_driver_is_killed_and_the_same_command_goes_on(tiny, tmp_path, kills, num_steps):
    """And Ctrl-C leaves with a checkpoint; the end is that of a run that nobody disturbed."""
    run_dir = tmp_path / "run"
    metrics = run_dir / "rl" / "metrics.jsonl"

    def steps():
        return len([record for record in read_jsonl(str(metrics)) if "reward" in record]) if metrics.exists() else 0

    draw = random.Random(0)
    for number in range(kills):
        first = commanded(tiny, run_dir, num_steps)
        before = steps()
        wait_for(lambda before=before, first=first: steps() > before or first.poll() is not None, 90)
        time.sleep(draw.uniform(0, 1.5))
        first.send_signal(signal.SIGKILL if number else signal.SIGINT)
        _, said = first.communicate(timeout=60)
        assert first.returncode == (-9 if number else 130), said
    last = commanded(tiny, run_dir, num_steps)
    _, said = last.communicate(timeout=240)
    assert last.returncode == 0, said
    assert len(said.splitlines()) < 40, said
    config = replace(tiny.config(num_steps=num_steps, checkpoint_every=20), base=tiny.base.folder)
    assert tiny.alone(config, tmp_path / "calm") is not None
    ends = [Checkpoint(step_folder(f"{one}/checkpoints", num_steps)) for one in (run_dir / "rl", tmp_path / "calm")]
    tensors, others = (end.model_tensors() for end in ends)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
    assert check_log(run_dir / "rl", num_steps) == check_log(tmp_path / "calm", num_steps)
    assert json.loads((run_dir / "rl" / "config.json").read_text())["identity"]["rl.max_staleness"] == 0
