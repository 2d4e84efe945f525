"""The other way of the benchmark: as slow as nanochat's loop, and with the same samples as ours."""

import pytest
import torch

from nanochat.cluster.rl_benchmark import OneGroupAtATime, UntilTheLastEnds
from nanochat.config.model import ModelConfig
from nanochat.config.rl import RLConfig
from nanochat.data.conversations import exchange
from nanochat.data.tokenizer import SPLIT_PATTERNS, Tokenizer
from nanochat.inference.rollouts import GroupSampler, packed_weights
from nanochat.model.gpt import GPT
from nanochat.tasks.task import ListedTask
from nanochat.training.rollout_queue import LocalRollouts

TOKENIZER = Tokenizer([], SPLIT_PATTERNS["nanochat"])
MODEL = ModelConfig(sequence_len=128, vocab_size=TOKENIZER.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
CONFIG = RLConfig(
    groups_per_step=3, samples_per_group=4, max_new_tokens=60, num_steps=2, max_staleness=0, tis_cap=None,
    dtype="float32", dynamic_sampling=False,
)  # fmt: skip


class OddLength(ListedTask):
    """Some replies are right."""

    @staticmethod
    def reward(conversation, reply):
        return float(len(reply) % 2)


def sampler(kind: type[GroupSampler]) -> GroupSampler:
    task = OddLength("letters", "train", [exchange(f"{n} " + "x" * n, "y") for n in range(9)])
    return kind(CONFIG, TOKENIZER, task, MODEL, dtype=torch.float32, device=torch.device("cpu"), running=4)


@pytest.fixture
def weights() -> bytes:
    """Of a policy that says the end now and then."""
    model = GPT(MODEL)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=draw).mul_(0.3)
        model.lm_head.weight[TOKENIZER.special("<|assistant_end|>")] *= 2
    return packed_weights(model)


def test_the_other_way_samples_the_same_and_decodes_more(weights):
    ours, theirs = LocalRollouts(CONFIG, sampler(GroupSampler)), OneGroupAtATime(CONFIG, sampler(UntilTheLastEnds))
    decoded = 0
    for source in (ours, theirs):
        source.begin(0, 0)
        source.publish(0, weights)
    loop = theirs.sampler._loop
    step, most = loop.step, []

    def counted():
        nonlocal decoded
        events = step()
        decoded += len(events)
        most.append(
            len({theirs.sampler._places[event.id][0] for event in events if event.id in theirs.sampler._places})
        )
        return events

    loop.step = counted
    mine, other = ours.take(), theirs.take()
    assert [group.id for group in mine.groups] == [group.id for group in other.groups] == [0, 1, 2]
    useful = 0
    for group, same in zip(mine.groups, other.groups, strict=True):
        for sample, copy in zip(group.samples, same.samples, strict=True):
            assert (sample.tokens, sample.reward, sample.finish_reason) == (
                copy.tokens,
                copy.reward,
                copy.finish_reason,
            )
            useful += len(sample.tokens)
    assert any(not sample.is_truncated for group in mine.groups for sample in group.samples)
    longest = sum(max(len(sample.tokens) for sample in group.samples) for group in mine.groups)
    assert useful < 4 * longest <= decoded + 4, "every row goes on until the last of its group has ended"
    assert max(most) == 1, "one group at a time"
