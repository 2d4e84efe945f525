"""A batch to one update: the gradient is REINFORCE's by hand, and neither micro-batches nor workers change it."""

import copy
import math
import random
from types import SimpleNamespace

import pytest
import torch
import worker_group
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_step import random_model

from nanochat.config.pretrain import PretrainConfig
from nanochat.config.rl import RLConfig
from nanochat.inference.rollouts import Group, Sample
from nanochat.model.optimizer import MuonAdamW, StepSchedule
from nanochat.model.scaling import parameter_groups
from nanochat.training.plan import learning_rates
from nanochat.training.policy_step import FIGURES, PolicyStep, Row, micro_batches, padded, rows_of
from nanochat.training.rollout_queue import Batch

END, BANNED = 95, (3, 40)
SCHEDULE = StepSchedule(lr_factor=1.0, muon_momentum=0.9, muon_weight_decay=0.1)
SPLITS = (1, 64, 200, 10**6)
PLAIN = {"advantage": "mean", "loss": "reinforce", "tis_cap": None, "dynamic_sampling": False}


def model_of(seed: int = 0):
    """Every part is on; the epsilon is not the dtype's, so that float64 computes the same."""
    model = random_model(seed, sequence_len=64, smear=True, norm_eps=1e-6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.25)  # rounding has less to grow on
    return model


def sample_of(tokens, reward: float, forced=(), logprobs=None, truncated: bool = False) -> Sample:
    """`forced` are places; the log probabilities are 0 there, as rollouts have them."""
    is_forced = [place in forced for place in range(len(tokens))]
    logprobs = [0.0 if tool else -3.0 for tool in is_forced] if logprobs is None else logprobs
    return Sample(
        list(tokens), is_forced, logprobs, [0] * len(tokens), "length" if truncated else "stop", reward=reward
    )


def batch_of(*groups) -> Batch:
    """Groups of (prompt, sample, sample, ...)."""
    made = [Group(id, id, "", tuple(prompt), 0, samples) for id, (prompt, *samples) in enumerate(groups)]
    return Batch(0, made, len(made))


def random_batch(seed: int, groups: int = 4, samples: int = 3) -> Batch:
    """Long and short, forced tokens that are banned elsewhere, cut off ones, a group without variance, empty ones."""
    draw = random.Random(seed)
    drawn = [id for id in range(96) if id not in BANNED]
    made = []
    for number in range(groups):
        members = []
        for _ in range(samples):
            length, truncated = draw.choice([0, 1, 2, 7, 20, 38]), draw.random() < 0.3
            tokens = [draw.choice(drawn) for _ in range(length)]
            if tokens and not truncated:
                tokens[-1] = END
            first = draw.randint(1, 30)
            forced = [place for place in range(first, min(first + 3, length - 1))]
            for place in forced:
                tokens[place] = draw.choice(BANNED)
            logprobs = [0.0 if place in forced else draw.uniform(-7, -1) for place in range(length)]
            reward = 0.1 if number == 1 else draw.choice([0.0, 0.1, 0.7, 1.0])
            members.append(sample_of(tokens, reward, forced, logprobs, truncated))
        made.append(([draw.choice(drawn) for _ in range(draw.randint(1, 20))], *members))
    batch = batch_of(*made)
    assert len({len(sample.tokens) > 14 for group in batch.groups for sample in group.samples}) == 2
    return batch


def gradient(config: RLConfig, batch: Batch, most_tokens: int = 200, model=None, device="cpu"):
    """Gradients by name, as one float64 vector, and figures of one step that updates nothing."""
    model = model_of().to(device) if model is None else model
    optimizer = SimpleNamespace(rank=0, world_size=1, reduce_in_backward=lambda: None, step=lambda schedule: None)
    step = PolicyStep(
        config, model, optimizer, banned=BANNED, most_tokens=most_tokens, reference=lambda: model_of(5).to(device)
    )  # fmt: skip
    figures = step.run(batch, SCHEDULE)
    return flat({name: parameter.grad for name, parameter in model.named_parameters()}), figures


def flat(gradients) -> torch.Tensor:
    return torch.cat([gradients[name].double().flatten().cpu() for name in sorted(gradients)])


def logprobs_of(model, config: RLConfig, group: Group, sample: Sample):
    """Log probabilities and entropies of all tokens of a sample, which runs by itself."""
    ids = torch.tensor([[*group.prompt, *sample.tokens]])
    logits = model.logits(model(ids))[0, len(group.prompt) - 1 : -1].double() / config.temperature
    logits[:, BANNED] = -math.inf
    logprobs = logits.log_softmax(-1)
    entropies = -(logprobs.exp() * logprobs.masked_fill(logprobs == -math.inf, 0.0)).sum(-1)
    return logprobs[range(len(sample.tokens)), sample.tokens], entropies


def naive(config: RLConfig, batch: Batch):
    """Gradient and figures of REINFORCE with the mean as its baseline, token by token, in float64."""
    model, other = (copy.deepcopy(model_of(seed)).double() for seed in (0, 5))
    model.compute_dtype = other.compute_dtype = torch.float64
    loss, figures, kept = 0.0, dict.fromkeys(FIGURES, 0.0), []
    for group in batch.groups:
        rewards = [sample.reward for sample in group.samples]
        for sample in group.samples:
            advantage = 0.0 if len(set(rewards)) == 1 else sample.reward - sum(rewards) / len(rewards)
            if not all(sample.is_forced) and not (config.mask_truncated and sample.finish_reason == "length"):
                kept.append((group, sample, advantage, sample.is_forced.count(False)))
    for group, sample, advantage, length in kept:
        share = {
            "token_global": 1 / sum(length for *_, length in kept), "sequence_mean": 1 / (len(kept) * length),
            "constant": 1 / (config.groups_per_step * config.samples_per_group * config.max_new_tokens),
        }[config.aggregate]  # fmt: skip
        values, entropies = logprobs_of(model, config, group, sample)
        reference = logprobs_of(other, config, group, sample)[0].tolist()
        for place, value in enumerate(values):
            if sample.is_forced[place] or (advantage == 0 and not config.kl_beta):
                continue
            log_ratio = float(value.detach()) - sample.logprobs[place]
            weight = 1.0 if config.tis_cap is None else min(math.exp(log_ratio), config.tis_cap)
            k3 = torch.exp(reference[place] - value) - (reference[place] - value) - 1
            loss = loss + share * (config.kl_beta * k3 - weight * advantage * value)
            figures["reference_kl"] += float(k3.detach()) * (config.kl_beta > 0)
            figures["trained_tokens"] += 1
            figures["entropy"] += float(entropies[place].detach())
            figures["mismatch_kl"] += math.exp(log_ratio) - log_ratio - 1
            figures["clipped_share"] += config.tis_cap is not None and math.exp(log_ratio) > config.tis_cap
    loss.backward()
    for name in ("entropy", "mismatch_kl", "clipped_share", "reference_kl"):
        figures[name] /= figures["trained_tokens"]
    del figures["learner_positions"]
    figures["loss"] = float(loss.detach())
    return flat({name: parameter.grad for name, parameter in model.named_parameters()}), figures


def difference(computed: torch.Tensor, expected: torch.Tensor) -> float:
    return float((computed - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({}, 1e-6),
        ({"temperature": 0.7}, 1e-6),
        ({"mask_truncated": True, "aggregate": "sequence_mean"}, 1e-6),
        ({"aggregate": "constant", "max_new_tokens": 40}, 1e-6),
        ({"tis_cap": 2.0, "temperature": 1.3}, 2e-6),
        ({"kl_beta": 0.3}, 5e-6),  # small differences of log probabilities
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_gradient_is_reinforce_by_hand(changes, tolerance, seed, device):
    config = RLConfig(**(PLAIN | changes))
    batch = random_batch(seed)
    expected, expected_figures = naive(config, batch)
    computed, figures = gradient(config, batch, device=device)
    assert difference(computed, expected) < tolerance
    assert figures.pop("learner_positions") > figures["trained_tokens"]
    assert figures == pytest.approx(expected_figures, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("count", [1, 2])
def test_the_end_token_is_trained_and_a_tools_is_not(count):
    """Of completions of one token it is the only one; of a tool's words no gradient comes."""
    config = RLConfig(**PLAIN)
    batch = batch_of(([1], sample_of([END], 1.0), sample_of([7, BANNED[0]][:count], 0.0, forced=(1,))))
    computed, figures = gradient(config, batch)
    assert figures["trained_tokens"] == 2
    assert difference(computed, naive(config, batch)[0]) < 1e-6
    only_end = batch_of(([1], sample_of([END], 1.0), sample_of([], 0.0)), ([2], sample_of([], 0.0), sample_of([], 1.0)))
    computed, figures = gradient(config, only_end)
    assert figures["trained_tokens"] == 1
    assert difference(computed, naive(config, only_end)[0]) < 1e-6


KNOBS = [
    {"loss": "reinforce", "aggregate": "token_global"},
    {"loss": "ppo_clip", "aggregate": "sequence_mean", "advantage": "std"},
    {"loss": "cispo", "aggregate": "constant", "advantage": "rloo", "mask_truncated": True},
    {"loss": "gspo", "aggregate": "sequence_mean", "kl_beta": 0.2},
]


@pytest.mark.parametrize("changes", KNOBS, ids=str)
def test_neither_gradient_nor_figures_depend_on_the_micro_batch(changes):
    config, batch = RLConfig(**changes), random_batch(2)
    rows, _ = rows_of(config, batch)
    assert len({len(micro_batches(rows, most)) for most in SPLITS}) >= 3
    (whole, figures), *others = (gradient(config, batch, most) for most in SPLITS)
    positions = figures.pop("learner_positions")
    assert whole.norm() > 0
    for cut, cut_figures in others:
        assert difference(cut, whole) < 3e-6
        assert cut_figures.pop("learner_positions") >= positions  # padding is all that may differ
        assert cut_figures == pytest.approx(figures, rel=1e-5, abs=1e-6)


def updated(config: RLConfig, batch: Batch, rank: int = 0, world_size: int = 1):
    """The optimiser, the parameters after one real update, and its figures."""
    model = model_of()
    parameters = dict(model.named_parameters())
    groups = parameter_groups(model.config, list(parameters), learning_rates(PretrainConfig()), 0.03)
    optimizer = MuonAdamW(parameters, groups, muon_dtype=torch.float32, rank=rank, world_size=world_size)
    step = PolicyStep(
        config, model, optimizer, banned=BANNED, most_tokens=128, reference=lambda: model_of(5)
    )  # fmt: skip
    figures = step.run(batch, SCHEDULE)
    return optimizer, {name: parameter.detach() for name, parameter in parameters.items()}, figures


LONE_ROW = batch_of(([1, 2], sample_of([9, 4, END], 1.0), sample_of([], 0.0)))


WORKERS_CASES = [(KNOBS[0], random_batch(3)), (KNOBS[1], random_batch(4)), (KNOBS[3], random_batch(5))]
WORKERS_CASES += [(KNOBS[0], LONE_ROW), (KNOBS[3], LONE_ROW)]


def update_as_worker(rank: int, world_size: int, folder: str):
    """Make one update of each case; write parameters and moments, return the figures."""
    figures = []
    for number, (changes, batch) in enumerate(WORKERS_CASES):
        optimizer, parameters, of_case = updated(RLConfig(**changes), batch, rank, world_size)
        save_file(parameters, f"{folder}/{number}_{rank}.safetensors")
        moments = {name: tensor.contiguous() for name, tensor in optimizer.state_tensors().items()}
        save_file(moments, f"{folder}/{number}_{rank}_moments.safetensors")
        figures.append(of_case)
    return figures


def test_two_workers_make_the_update_of_one(tmp_path):
    """After the first update the first moments are the gradients times a constant; Muon enlarges what differs."""
    assert len(rows_of(RLConfig(), LONE_ROW)[0]) == 1
    one = worker_group.run_group(1, tmp_path / "one", update_as_worker)[0]
    two = worker_group.run_group(2, tmp_path / "two", update_as_worker)
    assert two[0] == two[1]
    before = {name: parameter.detach() for name, parameter in model_of().named_parameters()}
    for number, (figures, expected) in enumerate(zip(two[0], one, strict=True)):
        assert figures["trained_tokens"] > 0
        assert figures | {"learner_positions": 0} == pytest.approx(expected | {"learner_positions": 0}, rel=1e-5)
        alone = load_file(tmp_path / f"one/{number}_0.safetensors")
        several = [load_file(tmp_path / f"two/{number}_{rank}.safetensors") for rank in range(2)]
        for name, parameter in alone.items():
            assert torch.equal(several[0][name], several[1][name])
            assert difference(several[0][name] - before[name], parameter - before[name]) < 2e-4, name
        moments = load_file(tmp_path / f"one/{number}_0_moments.safetensors")
        whole = {key.rsplit("/", 2)[0]: tensor for key, tensor in moments.items()}
        for rank in range(2):
            for key, tensor in load_file(tmp_path / f"two/{number}_{rank}_moments.safetensors").items():
                name, lo, hi = key.rsplit("/", 2)
                if name.endswith(("exp_avg", "momentum")):
                    part = whole[name][int(lo) : int(hi)]
                    assert (tensor - part).norm() <= 3e-6 * whole[name].norm(), key


NOTHING = {
    "no groups": ({}, batch_of()),
    "equal rewards": ({}, batch_of(([1, 2], sample_of([9, 4], 0.1), sample_of([5], 0.1), sample_of([END], 0.1)))),
    "all cut off": (
        {"mask_truncated": True, "kl_beta": 0.5},
        batch_of(([1, 2], sample_of([9, 4], 1.0, truncated=True), sample_of([5], 0.0, truncated=True))),
    ),
    "empty completions": ({"kl_beta": 0.5}, batch_of(([1, 2], sample_of([], 1.0), sample_of([], 0.0)))),
    "a tool's words alone": ({}, batch_of(([1], sample_of([3], 1.0, forced=(0,)), sample_of([], 0.0)))),
}


@pytest.mark.parametrize("case", NOTHING)
def test_without_anything_to_learn_from_there_is_no_update(case):
    changes, batch = NOTHING[case]
    for aggregate in ("token_global", "sequence_mean", "constant"):
        optimizer, parameters, figures = updated(RLConfig(aggregate=aggregate, **changes), batch)
        assert figures == dict.fromkeys(FIGURES, 0.0)
        assert all(torch.equal(parameter, parameters[name]) for name, parameter in model_of().named_parameters())
        assert not any(moment.any() for moment in optimizer.state_tensors().values())


@pytest.mark.parametrize("changes", [*KNOBS, {"advantage": "std", "aggregate": "constant"}], ids=str)
@pytest.mark.parametrize(
    "batch",
    [
        batch_of(([1], sample_of([END], 1.0), sample_of([7], 0.0)), ([2], sample_of([8], 0.1), sample_of([9], 0.1))),
        batch_of(([1], sample_of([END], 1.0), sample_of([], 0.0)), ([2, 3], sample_of([], 1.0), sample_of([5], 1.0))),
        batch_of(([1], sample_of([9], 1.0, truncated=True), sample_of([END], 1.0), sample_of([4, END], 0.0))),
    ],
    ids=["single tokens", "empty ones", "a cut off one"],
)
def test_degenerate_completions_give_an_update_without_nan(changes, batch):
    _, parameters, figures = updated(RLConfig(**changes), batch)
    assert all(map(math.isfinite, figures.values()))
    assert figures["trained_tokens"] > 0
    assert all(parameter.isfinite().all() for parameter in parameters.values())
    assert not torch.equal(parameters["lm_head.weight"], model_of().lm_head.weight)


def test_equal_rewards_still_feel_the_penalty():
    """Their gradient is that of the KL penalty alone, which cannot be 0 away from the reference."""
    batch = batch_of(([1, 2], sample_of([9, 4], 0.1), sample_of([5], 0.1), sample_of([END], 0.1)))
    config = RLConfig(**(PLAIN | {"kl_beta": 0.5}))
    computed, figures = gradient(config, batch)
    assert difference(computed, naive(config, batch)[0]) < 2e-5
    assert figures["loss"] == pytest.approx(0.5 * figures["reference_kl"])


@given(widths=st.lists(st.integers(1, 200), min_size=1, max_size=30), most=st.integers(1, 1000))
def test_micro_batches_hold_all_rows_in_order_and_no_more_than_they_may(widths, most):
    rows = [Row((1,), sample_of([2] * width, 0.0), 1.0) for width in sorted(widths, reverse=True)]
    parts = micro_batches(rows, most)
    assert [row for part in parts for row in part] == rows
    for part in parts:
        assert len(part) == 1 or len(part) * padded(max(row.width for row in part)) <= most
    assert [padded(width) for width in (1, 32, 33)] == [32, 32, 64]
