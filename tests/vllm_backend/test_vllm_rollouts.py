"""Rollouts by vLLM are those of our own engine, token for token, also when weights change under them."""

import statistics
from dataclasses import replace

import pytest
import torch
from test_rollouts import MODEL as WITH_SMEAR
from test_rollouts import TASK, TOKENIZER, recomputed, run

from nanochat.config.rl import RLConfig
from nanochat.errors import ConfigError
from nanochat.inference import vllm_engine
from nanochat.inference.rollouts import GroupSampler, packed_weights
from nanochat.inference.vllm_engine import check_vllm
from nanochat.model.gpt import GPT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CLOSE = {"abs": 1e-5, "rel": 1e-5}
MODEL = replace(WITH_SMEAR, smear=False, n_head=2, n_kv_head=1, n_embd=64)


def policy(seed: int) -> GPT:
    model = GPT(MODEL)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=draw).mul_(0.2)
        for name in ("<|python_start|>", "<|python_end|>", "<|assistant_end|>"):  # said now and then
            model.lm_head.weight[TOKENIZER.special(name)] *= 3
    return model


def sampler(backend: str, dtype: torch.dtype = torch.float32) -> GroupSampler:
    config = RLConfig(task="gsm8k", samples_per_group=4, max_new_tokens=60, temperature=0.8, dtype="float32")
    return GroupSampler(
        config, TOKENIZER, TASK, MODEL, dtype=dtype, device=torch.device("cpu"), running=16, backend=backend
    )  # fmt: skip


def test_the_same_is_sampled_and_as_likely_as_the_learner_finds_it():
    model = policy(2)
    groups = {}
    for backend in ("native", "vllm"):
        source = sampler(backend)
        source.load(0, packed_weights(model))
        groups[backend] = run(source, list(range(8)))
    forced = ends = 0
    for number, group in groups["native"].items():
        other = groups["vllm"][number]
        assert [sample.tokens for sample in other.samples] == [sample.tokens for sample in group.samples]
        assert [sample.is_forced for sample in other.samples] == [sample.is_forced for sample in group.samples]
        assert [sample.finish_reason for sample in other.samples] == [one.finish_reason for one in group.samples]
        for sample, logprobs in zip(other.samples, recomputed(model, other, 0.8), strict=True):
            drawn = [(a, b) for a, b, is_forced in zip(sample.logprobs, logprobs, sample.is_forced) if not is_forced]
            assert [a for a, _ in drawn] == pytest.approx([b for _, b in drawn], **CLOSE)
            forced += sum(sample.is_forced)
            ends += sample.finish_reason == "stop"
    assert forced > 0
    assert ends > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_weights_change_in_the_middle_and_each_token_is_of_the_policy_that_it_names(dtype):
    source, policies = sampler("vllm", dtype), {0: policy(2), 1: policy(1)}
    source.load(0, packed_weights(policies[0]))
    for number in range(4):
        source.add(number)
    done = []
    for step in range(1000):
        if step == 12:
            source.load(1, packed_weights(policies[1]))
        done += source.step()
        if len(done) == 4:
            break
    mixed, apart = 0, []
    for group in done:
        by_policy = {version: recomputed(model, group, 0.8) for version, model in policies.items()}
        for number, sample in enumerate(group.samples):
            mixed += len(set(sample.versions)) == 2
            for place, (version, logprob, is_forced) in enumerate(
                zip(sample.versions, sample.logprobs, sample.is_forced, strict=True)
            ):
                if not is_forced:
                    apart += [abs(logprob - by_policy[of][number][place]) for of in (version, 1 - version)]
    assert mixed > 0
    if dtype == torch.float32:
        assert max(apart[::2]) < 1e-4
    assert statistics.mean(apart[::2]) < 0.1 * statistics.mean(apart[1::2]), "of the other policy they are far"


def test_head_sizes_are_those_of_vllms_cpu_attention():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert list(vllm_engine.HEAD_SIZES) == CPUAttentionBackend.get_supported_head_sizes()


def test_what_vllm_cannot_compute_is_refused():
    with pytest.raises(ConfigError, match=r"smear=True: .*native backend"):
        check_vllm(WITH_SMEAR)
    with pytest.raises(ConfigError, match=r"backend=vllm: has no attention for heads of 16 channels"):
        check_vllm(replace(MODEL, n_embd=32))
