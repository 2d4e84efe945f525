"""What is sampled, how likely it was, and by which policy: whoever samples it, also when weights change under it."""

import pytest
import torch

from nanochat.config.model import ModelConfig
from nanochat.config.rl import RLConfig
from nanochat.data.conversations import exchange
from nanochat.data.tokenizer import SPLIT_PATTERNS, Tokenizer
from nanochat.errors import ConfigError
from nanochat.inference.rollouts import Group, GroupSampler, ends_of, packed_weights, problem_of, with_reward
from nanochat.inference.tool_loop import tool_alone
from nanochat.model.gpt import GPT
from nanochat.model.loss import token_logprobs
from nanochat.tasks.task import ListedTask

TOKENIZER = Tokenizer([], SPLIT_PATTERNS["nanochat"])
MODEL = ModelConfig(
    sequence_len=160, vocab_size=TOKENIZER.vocab_size, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, smear=True
)
TASK = ListedTask("letters", "train", [exchange(f"{n} " + "x" * (n * 7 % 40), "y", number=n) for n in range(12)])


def policy(seed: int) -> GPT:
    model = GPT(MODEL)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=draw).mul_(0.3)
        for name in ("<|python_start|>", "<|python_end|>", "<|assistant_end|>"):  # said now and then
            model.lm_head.weight[TOKENIZER.special(name)] *= 2
    return model


def sampler(
    task=TASK, running: int = 16, device: str | torch.device = "cpu", own: torch.dtype = torch.float32, **changes
) -> GroupSampler:
    fields = {"task": "gsm8k", "samples_per_group": 4, "max_new_tokens": 60, "temperature": 0.8, "dtype": "float32"}
    config = RLConfig(**(fields | changes))
    return GroupSampler(
        config, TOKENIZER, task, MODEL, dtype=own, device=torch.device(device), running=running
    )  # fmt: skip


def run(source: GroupSampler, groups: list[int]) -> dict[int, Group]:
    for group in groups:
        source.add(group)
    done: dict[int, Group] = {}
    while len(done) < len(groups):
        done |= {group.id: group for group in source.step()}
    return done


def recomputed(model: GPT, group: Group, temperature: float) -> list[list[float]]:
    """Return each token's log probability by a forward over the whole row, as the learner has it."""
    found = []
    for sample in group.samples:
        row = torch.tensor([[*group.prompt, *sample.tokens]], device=model.lm_head.weight.device)
        with torch.no_grad():
            hidden_TC = model(row[:, :-1])[0, len(group.prompt) - 1 :]
            logprob_T, _ = token_logprobs(
                hidden_TC, model.lm_head.weight, row[0, len(group.prompt) :], vocab_size=MODEL.vocab_size,
                softcap=MODEL.logit_softcap, temperature=temperature, banned=tool_alone(TOKENIZER),
            )  # fmt: skip
        found.append(logprob_T.tolist())
    return found


def test_sampled_log_probabilities_are_those_that_the_learner_computes(device):
    """Within 1e-5 in float32; what the calculator said has none."""
    model, source = policy(0).to(device), sampler(device=device)
    source.load(0, packed_weights(model))
    groups = run(source, list(range(12))).values()
    forced = ended = 0
    for group in groups:
        for sample, expected in zip(group.samples, recomputed(model, group, 0.8), strict=True):
            assert len(sample.tokens) == len(sample.logprobs) == len(sample.is_forced) == len(sample.versions)
            for token, logprob, is_forced, other in zip(
                sample.tokens, sample.logprobs, sample.is_forced, expected, strict=True
            ):
                if is_forced:
                    assert logprob == 0.0
                    forced += 1
                else:
                    assert logprob == pytest.approx(other, abs=1e-5)
                    assert token not in tool_alone(TOKENIZER)
            assert (sample.tokens[-1] in ends_of(TOKENIZER)) == (not sample.is_truncated)
            ended += not sample.is_truncated
    assert forced > 20, "the calculator was called"
    assert 0 < ended < 48, "some end, some are cut off"


@pytest.mark.parametrize("running", [3, 64])
def test_a_group_is_the_same_in_any_company(running):
    source, other = sampler(), sampler(running=running)
    for one in (source, other):
        one.load(0, packed_weights(policy(0)))
    expected = run(source, [5])[5]
    found = run(other, [9, 2, 5, 0])[5]
    assert [sample.tokens for sample in found.samples] == [sample.tokens for sample in expected.samples]
    assert len({tuple(sample.tokens) for sample in found.samples}) == 4, "its samples differ"
    third = sampler(seed=1)
    third.load(0, packed_weights(policy(0)))
    assert run(third, [5])[5].samples[0].tokens != expected.samples[0].tokens


@pytest.mark.parametrize("learners", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16], ids=str)
def test_whoever_samples_computes_in_the_dtype_of_its_own_hardware(learners, own):
    """Also with weights that come later: of bfloat16 ones there may be packed copies."""
    source = sampler(own=own)
    policies = [policy(seed).to(learners).float() for seed in range(2)]
    for version, rounded in enumerate(policies):
        model = GPT(MODEL, learners)
        model.load_state_dict(rounded.state_dict())
        source.load(version, packed_weights(model))
        found = run(source, [5])[5]
        off = [
            torch.tensor(
                [
                    abs(logprob - expected)
                    for sample, row in zip(found.samples, recomputed(one, found, 0.8), strict=True)
                    for logprob, expected, forced in zip(sample.logprobs, row, sample.is_forced, strict=True)
                    if not forced
                ]
            ).mean()
            for one in policies
        ]
        assert off[version] < (1e-5 if own == torch.float32 else 0.05)
        assert off[1 - version] > 0.2, "it is not the other policy's"


def test_weights_that_change_while_it_samples_are_used_from_the_next_token_on(device):
    """Each token has the policy that said it; what comes after the change is by the new policy over all before it."""
    old, new = policy(0).to(device), policy(1).to(device)
    source = sampler(device=device, max_new_tokens=80)
    source.load(3, packed_weights(old))
    for group in range(3):
        source.add(group)
    done = [group for _ in range(8) for group in source.step()]
    source.load(4, packed_weights(new))
    while len(done) < 3:
        done += source.step()
    changed = 0
    for group in done:
        assert group.version == 3
        both = {3: recomputed(old, group, 0.8), 4: recomputed(new, group, 0.8)}
        for place, sample in enumerate(group.samples):
            assert sample.versions == sorted(sample.versions)
            changed += len(set(sample.versions)) == 2
            for token, (version, logprob) in enumerate(zip(sample.versions, sample.logprobs, strict=True)):
                if not sample.is_forced[token]:
                    assert logprob == pytest.approx(both[version][place][token], abs=1e-5)
    assert changed > 3
    assert source._engine is not None
    assert source._engine.pool.free == source._engine.pool.pages, "no page is lost"


def test_prompts_without_room_and_single_tokens():
    long = ListedTask("long", "train", [exchange("x" * 400, "y"), exchange("hi", "y")])
    source = sampler(long, max_new_tokens=1)
    source.load(0, packed_weights(policy(0)))
    groups = run(source, [0, 1])
    of_problem = {group.problem: group for group in groups.values()}
    assert [sample.tokens for sample in of_problem[0].samples] == [[]] * 4
    assert all(sample.is_truncated and sample.reward == 0.0 for sample in of_problem[0].samples)
    assert [len(sample.tokens) for sample in of_problem[1].samples] == [1] * 4


def test_groups_of_one_prompt_draw_by_themselves():
    source = sampler(ListedTask("one", "train", [exchange("hi", "y")]))
    source.load(0, packed_weights(policy(0)))
    groups = run(source, [0, 1, 2, 3])
    assert len({tuple(sample.tokens) for group in groups.values() for sample in group.samples}) == 16


def test_what_the_calculator_said_is_not_judged():
    """Text between the marks of a call, and of its result, is no part of the reply."""
    marks = {
        TOKENIZER.special(f"<|{name}|>"): name.endswith("start")
        for name in ("python_start", "python_end", "output_start", "output_end")
    }
    source = sampler()
    source.load(0, packed_weights(policy(0)))
    called = 0
    for group in run(source, list(range(12))).values():
        for sample in group.samples:
            said, is_inside = [[]], False
            for token in sample.tokens:
                if token in marks:
                    is_inside = marks[token]
                    said.append([])
                elif not is_inside and token < 256:  # the others are special
                    said[-1].append(token)
            if any(sample.is_forced):
                called += 1
                assert sample.text == "".join(map(TOKENIZER.decode, said))
                assert sample.shown != sample.text
    assert called > 5


def test_a_reply_may_fill_what_the_prompt_leaves_and_no_more():
    source, model = sampler(ListedTask("long", "train", [exchange("x" * 120, "y")]), max_new_tokens=159), policy(0)
    with torch.no_grad():
        for name in ("<|python_end|>", "<|assistant_end|>"):
            model.lm_head.weight[TOKENIZER.special(name)] = -model.lm_head.weight[TOKENIZER.special(name)]
    source.load(0, packed_weights(model))
    groups = run(source, list(range(12))).values()
    filled = [len(group.prompt) + len(sample.tokens) for group in groups for sample in group.samples]
    assert max(filled) == MODEL.sequence_len


def test_a_group_is_as_old_as_its_oldest_token():
    source = sampler()
    source.load(3, packed_weights(policy(0)))
    source.add(0)
    source.load(9, packed_weights(policy(0)))
    while not (done := source.step()):
        pass
    assert done[0].version == 9, "nothing was said by 3"


def test_every_problem_comes_once_an_epoch_in_an_order_of_its_own():
    epochs = [[problem_of(group, 12, seed=3) for group in range(first, first + 12)] for first in (0, 12)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 2
    assert epochs[0] != epochs[1]
    assert epochs[0] != [problem_of(group, 12, seed=4) for group in range(12)]


def test_rewards_of_ones_own(tmp_path):
    (tmp_path / "my_rewards.py").write_text(
        "def length(conversation, reply):\n    return len(reply)\n\n"
        "def bad(conversation, reply):\n    return float('inf')\n\nnone = 3\n\n"
        "def raises(conversation, reply):\n    return {}['key']\n\n"
        "def nothing(conversation, reply):\n    pass\n\n"
        "def error(conversation, reply):\n    return ValueError('x')\n\n"
        "def quits(conversation, reply):\n    raise SystemExit('enough')\n\n"
        "def hangs(conversation, reply):\n    import threading; threading.Event().wait(20)\n\n"
        "def of_one(reply):\n    return 1.0\n"
    )
    task = with_reward(ListedTask("letters", "train", TASK.conversations), "my_rewards:length", str(tmp_path))
    source = sampler(task)
    source.load(0, packed_weights(policy(0)))
    for sample in run(source, [0])[0].samples:
        assert sample.reward == len(sample.text)
    with pytest.raises(ConfigError, match=r"reward=my_rewards:absent: cannot be imported"):
        with_reward(task, "my_rewards:absent", str(tmp_path))
    for name in ("none", "of_one"):
        with pytest.raises(ConfigError, match=rf"reward=my_rewards:{name}: is no function of two"):
            with_reward(task, f"my_rewards:{name}", str(tmp_path))
    (tmp_path / "unclosed.py").write_text("def f(:\n")
    (tmp_path / "quitting.py").write_text("raise SystemExit(1)\n")
    for name, said in (
        ("unclosed:f", "cannot be imported .SyntaxError: .*unclosed.py, line 1"),
        ("quitting:f", "cannot be imported .SystemExit"),
        ("json:f", "cannot be imported from /.*json/__init__.py .AttributeError"),
    ):
        with pytest.raises(ConfigError, match=f"reward={name}: {said}"):
            with_reward(task, name, str(tmp_path))
    for name, said in (
        ("bad", r"returned inf, which is no finite number, for the reply '.*'\. Mend the function"),
        ("raises", r"raised KeyError: 'key' \(.*my_rewards.py:10\) for the reply '"),
        ("nothing", "returned None, which is no finite number"),
        ("error", "returned ValueError.* which is no finite number"),
        ("quits", "raised SystemExit: enough"),
        ("hangs", "has not returned for 0.2 s for the reply"),
    ):
        source = sampler(with_reward(task, f"my_rewards:{name}", str(tmp_path), 0.2))
        source.load(0, packed_weights(policy(0)))
        with pytest.raises(ConfigError, match=f"reward=my_rewards:{name}: {said}"):
            run(source, [0])
