"""The stage of reinforcement learning in one process: it learns, resumes exactly, and refuses what cannot work."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_sft import TOKENIZER, prepare_base

from nanochat.config.rl import RLConfig, RolloutsConfig
from nanochat.data.conversations import exchange
from nanochat.errors import CheckpointError, ConfigError
from nanochat.inference.rollouts import Group, GroupSampler, Sample
from nanochat.run_context import RunContext
from nanochat.storage import StageFolder, read_jsonl
from nanochat.tasks.task import ListedTask
from nanochat.training.checkpoint import Checkpoint, step_folder, steps_found
from nanochat.training.policy_step import PolicyStep
from nanochat.training.rl import PolicyTraining, RLInputs, improve, load_practice, resolve_rl, rollout_figures
from nanochat.training.rollout_queue import Batch, LocalRollouts


class Letters(ListedTask):
    """Replies are worth the share of their first ten characters that are small letters."""

    @staticmethod
    def reward(conversation, reply):
        return sum(char.islower() and char.isascii() for char in reply[:10]) / 10


class Rare(ListedTask):
    """Of most problems all replies are alike, so that some updates have nothing to learn from."""

    @staticmethod
    def reward(conversation, reply):
        return float(conversation.facts["number"] % 11 == 0 and len(reply) % 2)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Checkpoint:
    return prepare_base(tmp_path_factory.mktemp("rl"))


def practise(base: Checkpoint, folder: Path, kind=Letters, seconds_left=lambda: None, **changes) -> Checkpoint | None:
    fields = {
        "task": "gsm8k", "num_steps": 6, "groups_per_step": 4, "samples_per_group": 4, "max_new_tokens": 10,
        "max_staleness": 0, "tis_cap": None, "dtype": "float32", "checkpoint_every": 2, "evaluate_every": 2,
        "held_out_problems": 6, "sample_every": 2, "keep_checkpoints": 9,
    }  # fmt: skip
    config = RLConfig(**(fields | changes))
    conversations = [exchange(f"{n} " + "x" * (n % 7), "y", number=n) for n in range(40)]
    model = resolve_rl(config, base)[0].model
    sampler = GroupSampler(
        config, TOKENIZER, kind("letters", "train", conversations[:30]), model, dtype=torch.float32,
        device=torch.device("cpu"), running=16,
    )  # fmt: skip
    held_out = kind("letters", "val", conversations[30:])
    inputs = RLInputs(TOKENIZER, base, held_out, LocalRollouts(config, sampler), StageFolder(str(folder)))
    return improve(config, RunContext(use_gpu=False, seconds_left=seconds_left), inputs)


def records(folder: Path, name: str) -> list[dict]:
    return [record for record in read_jsonl(str(folder / "metrics.jsonl")) if name in record]


def assert_same_weights(folder: Path, other: Path, step: int) -> None:
    mine, theirs = (Checkpoint(step_folder(f"{one}/checkpoints", step)).model_tensors() for one in (folder, other))
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


def test_rewards_rise(base, tmp_path, on_one_core):
    options = {"num_steps": 25, "groups_per_step": 8, "samples_per_group": 8, "first_lr_factor": 1.0}
    assert practise(base, tmp_path, warm_start=False, evaluate_every=0, **options) is not None
    rewards = [record["reward"] for record in records(tmp_path, "reward")]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.15
    scores = records(tmp_path, "held_out_reward")
    assert [score["step"] for score in scores] == [0, 25]
    assert [score["held_out_n"] for score in scores] == [6, 6]


@pytest.mark.parametrize("kind", [Letters, Rare])
def test_a_run_that_is_cut_off_ends_as_an_undisturbed_one(base, tmp_path, on_one_core, kind):
    """From any of its checkpoints: weights bit for bit, groups, records; also where updates had nothing to learn."""
    options = {"max_refill": 0.0, "num_steps": 8} if kind is Rare else {}
    last = options.get("num_steps", 6)
    assert practise(base, tmp_path / "whole", kind, **options) is not None
    groups = read_jsonl(str(tmp_path / "whole" / "groups.jsonl"))
    if kind is Rare:
        empty = [not record["trained"] for record in groups]
        assert set(empty) == {True, False}, "some updates are empty"
    for step in range(2, last + 1, 2):
        folder = tmp_path / f"from_{step}"
        shutil.copytree(tmp_path / "whole", folder)
        for later in range(step + 2, last + 1, 2):
            shutil.rmtree(step_folder(f"{folder}/checkpoints", later))
        assert practise(base, folder, kind, **options) is not None
        assert_same_weights(folder, tmp_path / "whole", last)
        assert read_jsonl(str(folder / "groups.jsonl")) == groups
        for name in ("reward", "held_out_pass_at_1"):
            both = [[(r["step"], r[name]) for r in records(one, name)] for one in (folder, tmp_path / "whole")]
            assert both[0] == both[1]
    notes = [record["note"] for record in read_jsonl(str(tmp_path / "from_2" / "notes.jsonl"))]
    assert any("trained nothing" in note for note in notes) == (kind is Rare)
    assert [note for note in notes if "starts at step" in note] == [
        "a worker group starts at step 0",
        "a worker group starts at step 2",
    ]


def test_a_stop_leaves_a_checkpoint_and_the_rest_follows(base, tmp_path, on_one_core):
    assert practise(base, tmp_path / "whole") is not None
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "stop").touch()
    assert practise(base, tmp_path / "cut") is None
    (tmp_path / "cut" / "stop").unlink()
    assert (tmp_path / "cut" / "checkpoints" / "step_000001").exists()
    assert practise(base, tmp_path / "cut") is not None
    assert_same_weights(tmp_path / "cut", tmp_path / "whole", 6)


def test_a_node_that_will_be_taken_away_is_a_reason_to_save_twice(base, tmp_path, on_one_core):
    """Once as soon as it is known, once shortly before."""
    left = iter([None, 90.0, 60.0, 20.0])
    assert practise(base, tmp_path, seconds_left=lambda: next(left, -5.0), checkpoint_every=0) is not None
    assert steps_found(str(tmp_path / "checkpoints")) == [2, 4, 6]


def test_what_is_written_down(base, tmp_path, on_one_core):
    assert practise(base, tmp_path, kl_beta=0.01, loss="ppo_clip") is not None
    record = records(tmp_path, "reward")[-1]
    for name in (
        "pass_at_1", "pass_at_2", "pass_at_4", "completion_tokens", "truncated_share", "zero_variance_share",
        "staleness", "staleness_max", "mismatch_kl", "entropy", "clipped_share", "learner_idle_share", "tokens_per_s",
        "samples_per_s", "sync_bytes", "sync_s", "lr_factor",
    ):  # fmt: skip
        assert isinstance(record[name], (int, float)), name
    assert record["reference_kl"] > 0
    assert record["pass_at_1"] <= record["pass_at_2"] <= record["pass_at_4"]
    samples = read_jsonl(str(tmp_path / "samples.jsonl"))
    assert [one["step"] for one in samples] == [0, 2, 4, 5]
    best, worst = samples[-1]["samples"]
    assert (best["which"], worst["which"]) == ("best", "worst")
    assert best["reward"] >= worst["reward"]


def test_figures_of_a_batch_by_hand():
    """Two groups to train on and one that was dropped; four samples each."""

    def group(number: int, rewards: list[float], version: int, truncated: int, tokens: int) -> Group:
        samples = [
            Sample(
                [1] * tokens, [False] * tokens, [0.0] * tokens, [version] * tokens,
                "length" if place < truncated else "stop", reward=reward,
            )
            for place, reward in enumerate(rewards)
        ]  # fmt: skip
        return Group(number, 0, "", (1,), version, samples, sampled_s=float(number))

    batch = Batch(
        5, [group(0, [1.0, 0.0, 0.0, 0.0], 5, 1, 3), group(1, [1.0, 1.0, 0.5, 2.0], 3, 0, 5)], 3,
        [group(2, [0.0, 0.0, 0.0, 0.0], 4, 2, 10)],
    )  # fmt: skip
    assert rollout_figures(batch) == pytest.approx({
        "reward": 5.5 / 12, "completion_tokens": 6.0, "truncated_share": 3 / 12, "zero_variance_share": 1 / 3,
        "staleness": 1.0, "staleness_max": 2.0, "sampled_s": 1.0,
        "pass_at_1": (1 / 4 + 3 / 4 + 0) / 3, "pass_at_2": (1 / 2 + 1 + 0) / 3, "pass_at_4": (1 + 1 + 0) / 3,
    })  # fmt: skip
    assert rollout_figures(Batch(0, [], 0, [])) == {}


def test_the_learning_rate_falls_to_zero_from_where_it_is_told_to(base, tmp_path, on_one_core):
    options = {"num_steps": 4, "evaluate_every": 0, "held_out_problems": 0, "first_lr_factor": 0.4}
    for fraction, expected in ((1.0, [0.4, 0.3, 0.2, 0.1]), (0.5, [0.4, 0.4, 0.4, 0.2])):
        folder = tmp_path / str(fraction)
        assert practise(base, folder, warmdown_fraction=fraction, **options) is not None
        assert [record["lr_factor"] for record in records(folder, "lr_factor")] == pytest.approx(expected)


def test_it_begins_with_the_moments_of_the_base_or_with_none(base, tmp_path, on_one_core):
    """A first update at a learning rate of 0 moves the moments alone."""
    moments = {}
    for is_warm in (True, False):
        end = practise(
            base, tmp_path / str(is_warm), num_steps=1, held_out_problems=0, warm_start=is_warm, first_lr_factor=0.0
        )
        assert end is not None
        assert end.state["updates"] == 1 + (base.state["updates"] if is_warm else 0)
        moments[is_warm] = tensors_of(end)
    before = tensors_of(base)
    name = next(name for name in before if "lm_head" in name and before[name].abs().max() > 0)
    kept, fresh = (moments[is_warm][name] for is_warm in (True, False))
    assert (kept - fresh).abs().max() > 0.1 * before[name].abs().max(), "what the base had is there still"


def tensors_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """All of its optimiser's state."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(Path(checkpoint.folder).glob("optimizer*.safetensors")):
        found |= load_file(file)
    return found


def test_the_penalty_holds_on_to_the_base(base, tmp_path, on_one_core):
    """Before the first update there is nothing between the two; then there is more and more."""
    assert practise(base, tmp_path, kl_beta=0.01, first_lr_factor=1.0, warm_start=False) is not None
    distances = [record["reference_kl"] for record in records(tmp_path, "reference_kl")]
    assert distances[0] == pytest.approx(0.0, abs=1e-9)
    assert distances[-1] > max(1e-5, distances[1])


def test_the_model_that_the_penalty_holds_on_to_is_in_the_planned_memory(base, tmp_path, on_one_core):
    inputs = RLInputs(TOKENIZER, base, Letters("letters", "val", []), None, StageFolder(str(tmp_path)))
    configs = (RLConfig(max_new_tokens=10, dtype="float32", kl_beta=beta) for beta in (0.0, 0.01))
    alone, held = (PolicyTraining(config, RunContext(use_gpu=False), inputs).memory.weights for config in configs)
    assert held == 2 * alone


def test_without_memory_the_next_start_takes_less_at_once(base, tmp_path, on_one_core, monkeypatch):
    def lacks_memory(self, batch, schedule):
        raise torch.OutOfMemoryError("no")

    with monkeypatch.context() as patch:
        patch.setattr(PolicyStep, "run", lacks_memory)
        with pytest.raises(torch.OutOfMemoryError):
            practise(base, tmp_path)
    assert any("out of memory with 16 rows" in record["note"] for record in read_jsonl(str(tmp_path / "notes.jsonl")))
    assert practise(base, tmp_path) is not None


def test_another_base_is_refused(base, tmp_path, on_one_core):
    assert practise(base, tmp_path / "run") is not None
    other = tmp_path / "other"
    shutil.copytree(base.folder, other)
    sums = (other / "checksums_00_of_01.json").read_text()
    (other / "checksums_00_of_01.json").write_text(sums.replace(base.weights_sha256, "0" * 64))
    with pytest.raises(CheckpointError, match="began from"):
        practise(Checkpoint(str(other)), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples_per_group": 1}, "samples_per_group=1: must be at least 2"),
        ({"temperature": 0.0}, "temperature=0.0: must be above 0, or all samples are the same"),
        ({"max_staleness": -1}, "max_staleness=-1: must be at least 0"),
        ({"reward": "rewards.py"}, "reward=rewards.py: must be MODULE:FUNCTION"),
        ({"clip_high": -0.1, "loss": "ppo_clip"}, "clip_high=-0.1: must be a number from 0 on"),
        ({"clip_high": 0.3}, "clip_low and clip_high: do nothing with loss=reinforce"),
        ({"clip_low": 1.5, "loss": "cispo"}, "clip_low=1.5: must be at most 1"),
        ({"tis_cap": 0.0}, "tis_cap=0: would weigh all tokens by nothing"),
        ({"first_lr_factor": 2.0}, r"first_lr_factor=2.0: must lie in \[0, 1\]"),
    ],
)
def test_values_that_break_a_rule_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        RLConfig(**changes)


@pytest.mark.parametrize("changes", [{"actors": 0}, {"running": 0}, {"timeout_s": 0.0}, {"cpus_per_actor": -1.0}])
def test_rollout_values_that_break_a_rule_are_named(changes):
    (name,) = changes
    with pytest.raises(ConfigError, match=f"{name}="):
        RolloutsConfig(**changes)


@pytest.mark.parametrize(
    ("task", "held_out", "message"),
    [
        ("arithmetic:two_step", "arithmetic:two_step", "held_out=arithmetic:two_step: is what is practised"),
        (
            "arithmetic:two_step_test",
            "arithmetic:two_step",
            "task=arithmetic:two_step_test: test splits are for scores",
        ),
        ("spelling:test", "spelling:val", "task=spelling:test: test splits are for scores alone"),
        ("arithmetik", None, "task=arithmetik: must be one of .* Did you mean arithmetic"),
        ("arithmetic:", None, "task=arithmetic:: must be NAME, NAME=PATH and then :SPLIT"),
        (
            "arithmetic",
            "arithmetic:nine_steps",
            "held_out=arithmetic:nine_steps: split=nine_steps: arithmetic has",
        ),
        ("arithmetic", "messages=FILE", r"held_out=messages=\S*chats.jsonl: split=val: \S* has train alone"),
        ("messages=FILE:dev", None, r"task=messages=\S*chats.jsonl:dev: split=dev: \S* has train alone"),
        ("arithmetic:two_stops", None, "task=arithmetic:two_stops: split=two_stops"),
        ("messages=FILE", "arithmetic:val", "task=messages=.*: has no right answers. Give a rule with --reward"),
    ],
)
def test_tasks_that_cannot_be_practised_are_named(tmp_path, task, held_out, message):
    (tmp_path / "chats.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    path = str(tmp_path / "chats.jsonl")
    config = RLConfig(task=task.replace("FILE", path), held_out=held_out and held_out.replace("FILE", path))
    with pytest.raises(ConfigError, match=message):
        load_practice(config, str(tmp_path))


def test_a_file_of_ones_own_without_held_out_problems_is_told_what_to_name(tmp_path):
    (tmp_path / "chats.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    config = RLConfig(task=f"messages={tmp_path}/chats.jsonl", reward="a:b")
    with pytest.raises(
        ConfigError, match=r"has train alone.* Or name what is held out with --held-out NAME=PATH:SPLIT"
    ):
        load_practice(config, str(tmp_path))


def test_replies_longer_than_what_the_model_reads_are_refused(base):
    longest = base.state["model"]["sequence_len"]
    resolve_rl(RLConfig(max_new_tokens=longest - 1), base)
    with pytest.raises(ConfigError, match=rf"max_new_tokens={longest}: the model reads {longest} tokens, prompt and"):
        resolve_rl(RLConfig(max_new_tokens=longest), base)


def test_the_held_out_problems_are_the_tasks_own_val_split(tmp_path):
    practice, held_out = load_practice(RLConfig(task="arithmetic"), str(tmp_path))
    assert (practice.split, held_out.split) == ("train", "val")
    practice, held_out = load_practice(
        RLConfig(task="arithmetic:two_step", held_out="arithmetic:two_step_test"), str(tmp_path)
    )
    assert (practice.split, held_out.split) == ("two_step", "two_step_test")
