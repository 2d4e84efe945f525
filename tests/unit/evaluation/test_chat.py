"""Chat evaluation: replies are the task's to judge, letters are compared by probability, scores are counted by hand."""

import pytest
import torch

from nanochat.config.evaluation import EvaluationConfig
from nanochat.config.model import ModelConfig
from nanochat.data.conversations import Conversation, exchange, render_prompt
from nanochat.data.tokenizer import SPLIT_PATTERNS, Tokenizer
from nanochat.errors import ConfigError
from nanochat.evaluation.chat import Verdict, answer, judge, read_reply
from nanochat.evaluation.evaluate import chat_core, chat_score, score_table
from nanochat.inference.completions import Completion
from nanochat.inference.load import inference_copy
from nanochat.model.gpt import GPT
from nanochat.tasks.task import ListedTask

TOKENIZER = Tokenizer([], SPLIT_PATTERNS["nanochat"])
END = TOKENIZER.special("<|assistant_end|>")


def random_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> GPT:
    sizes = {"sequence_len": 96, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32, "smear": True}
    model = GPT(ModelConfig(vocab_size=TOKENIZER.vocab_size, **sizes), dtype)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=draw).mul_(0.3)
    return model


class Lengths(ListedTask):
    """A reply is right if it is at least as long as the number says."""

    @staticmethod
    def reward(conversation: Conversation, reply: str) -> float:
        return float(len(reply) >= conversation.facts["number"])


QUESTIONS = [exchange("x" * length + "?", "yes", number=length) for length in (1, 30, 4, 60, 11, 2, 25)]


def said_slowly(model: GPT, conversation: Conversation, limit: int) -> Completion:
    """The likeliest token again and again, the whole row through the model each time."""
    tokens, said = render_prompt(TOKENIZER, conversation), []
    while len(said) < limit and (not said or said[-1] not in (END, TOKENIZER.bos)):
        with torch.no_grad():
            said.append(int(model.logits(model(torch.tensor([[*tokens, *said]])))[0, -1].argmax()))
    return Completion(said, finish_reason="stop" if said[-1] in (END, TOKENIZER.bos) else "length")


def test_replies_do_not_depend_on_their_company_and_are_the_models():
    shown = set()
    for seed in range(3):
        model = random_model(seed)
        together = answer(model, TOKENIZER, QUESTIONS, max_new_tokens=12)
        assert together == [answer(model, TOKENIZER, [one], max_new_tokens=12)[0] for one in QUESTIONS]
        slowly = [said_slowly(model, one, 12) for one in QUESTIONS]
        assert not any(TOKENIZER.special("<|python_end|>") in one.tokens for one in slowly), "no call of the calculator"
        assert together == [read_reply(TOKENIZER, one) for one in slowly]
        shown |= {reply.shown for reply in together}
    assert len(shown) > 5


def test_a_prompt_that_leaves_no_room_gets_an_empty_reply_and_no_error():
    asked = [exchange("y" * 200, "x"), *QUESTIONS]
    replies = answer(random_model(1), TOKENIZER, asked, max_new_tokens=500)
    assert (replies[0].text, replies[0].shown) == ("", "")
    assert any(reply.shown for reply in replies[1:])
    assert answer(random_model(), TOKENIZER, [exchange("y" * 200, "x")])[0].text == ""


def test_the_task_judges_each_sample_of_each_problem():
    task, model = Lengths("lengths", "test", QUESTIONS), random_model()
    verdicts = judge(model, TOKENIZER, task, range(2, 6), max_new_tokens=8, samples=3, temperature=1.0, seed=7)
    assert [verdict.index for verdict in verdicts] == [2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5]
    assert len({verdict.reply for verdict in verdicts[:3]}) > 1, "samples draw from seeds of their own"
    again = judge(model, TOKENIZER, task, [3], max_new_tokens=8, samples=3, temperature=1.0, seed=7)
    assert again == verdicts[3:6], "whatever else is in the batch"
    assert judge(model, TOKENIZER, task, [3], max_new_tokens=8, samples=3, temperature=1.0, seed=8) != again
    assert all(verdict.question == QUESTIONS[verdict.index].messages[0].text for verdict in verdicts)
    assert not any(verdict.is_right for verdict in verdicts if verdict.index == 3), "eight bytes are not sixty"


def test_like_questions_draw_from_seeds_of_their_own():
    task = Lengths("lengths", "test", [QUESTIONS[1]] * 6)
    verdicts = judge(random_model(), TOKENIZER, task, range(6), max_new_tokens=8, temperature=1.0)
    assert len({verdict.reply for verdict in verdicts}) > 1


class Letters(ListedTask):
    kind = "choose"


def test_the_likeliest_letter_is_chosen_whatever_else_is_likelier():
    model = random_model()
    problems = []
    for length in (1, 40, 7, 3):
        letters = "ABCD"[: 2 + length % 3]
        prompt = render_prompt(TOKENIZER, exchange("q" * length, "A"))
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([prompt])))[0, -1]
        best = max(letters, key=lambda letter: float(logits[ord(letter)]))
        other = next(letter for letter in letters if letter != best)
        for right, expected in ((best, True), (other, False)):
            facts = {"letters": tuple(letters), "answer": right}
            problems.append((Conversation(exchange("q" * length, right).messages, facts), expected))
    task = Letters("letters", "test", [problem for problem, _ in problems])
    verdicts = judge(model, TOKENIZER, task, range(len(problems)))
    assert [verdict.is_right for verdict in verdicts] == [expected for _, expected in problems]


def verdict(index: int, is_right: bool) -> Verdict:
    return Verdict(index, f"q{index}", "a", "r", is_right)


def test_a_letter_is_chosen_once_whatever_samples_says():
    task = Letters("letters", "test", [exchange("q", "A")] * 4)
    score = chat_score(task, [verdict(index, index < 3) for index in range(4)], samples=2)
    assert (score["n"], score["accuracy"]) == (4, 0.75)
    assert score["stderr"] == pytest.approx((0.75 * 0.25 / 4) ** 0.5)


def test_scores_are_counted_as_by_hand():
    task = Lengths("lengths", "test", QUESTIONS)
    task.chance = 0.25
    rights = [(1, 1), (1, 0), (0, 0), (1, 0)]  # two samples of four problems
    verdicts = [verdict(index, bool(right)) for index, pair in enumerate(rights) for right in pair]
    score = chat_score(task, verdicts, samples=2)
    assert score["accuracy"] == 0.5
    assert score["n"] == 4
    assert score["stderr"] == pytest.approx(0.25)
    assert score["centered"] == pytest.approx((0.5 - 0.25) / 0.75)
    assert score["pass_at_1"] == pytest.approx((1 + 0.5 + 0 + 0.5) / 4)
    assert score["pass_at_2"] == pytest.approx(3 / 4)
    assert [one["index"] for one in score["examples"]["wrong"]] == [1, 2, 2, 3]
    assert "pass_at_1" not in chat_score(task, verdicts[:2], samples=1)


def test_chat_core_is_the_mean_of_centred_scores_and_says_how_many():
    settings = {"seed": 0}
    score = {"accuracy": 0.5, "n": 4, "stderr": 0.25, "chance": 0.25, "centered": 1 / 3, "settings": settings}
    assert chat_core({"arithmetic": score}, settings) is None
    found = chat_core({"gsm8k": score, "mmlu": score | {"accuracy": 0.25}, "arithmetic": score}, settings)
    assert found["title"] == "ChatCORE on 2 of 6 tasks"
    assert found["value"] == pytest.approx(1 / 6)
    variances = (0.5 * 0.5 / 4, 0.25 * 0.75 / 4)
    assert found["stderr"] == pytest.approx((sum(variances) / 0.75**2) ** 0.5 / 2)
    names = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval", "spelling")
    assert chat_core(dict.fromkeys(names, score), settings)["title"] == "ChatCORE"
    other = {"seed": 1}
    mixed = {"gsm8k": score, "mmlu": score | {"settings": other}, "arc_easy": score | {"settings": other}}
    assert chat_core(mixed, other)["title"] == "ChatCORE on 2 of 6 tasks"
    assert chat_core(mixed, {"seed": 2}) is None
    letters = {"mmlu": score | {"settings": {"seed": 0}}, "gsm8k": score | {"settings": {"seed": 0, "temperature": 1}}}
    assert chat_core(letters, {"seed": 0})["title"] == "ChatCORE on 2 of 6 tasks", "what both say agrees"


def test_the_table_has_n_and_error_of_every_score():
    score = {"accuracy": 0.5, "n": 4, "stderr": 0.25, "chance": 0.25, "centered": 1 / 3}
    core = {"title": "CORE on 1 of 22 tasks", "value": 0.125, "stderr": 0.0625, "table_version": "1", "tasks": {}}
    sft = {"chat": {"gsm8k": score | {"pass_at_2": 0.75}}, "core": core, "bits_per_byte": 1.5}
    lines = score_table({"pretrain": {"chat": {}}, "sft": sft})
    assert [line.split() for line in lines] == [
        ["chance", "pretrain", "sft"],
        ["gsm8k", "25.0%", "-", "50.0%", "+-", "25.0%", "(n=4)"],
        ["gsm8k", "pass", "at", "2", "-", "-", "75.0%", "(n=4)"],
        [*"CORE on 1 of 22 tasks, baselines 1".split(), "0.0%", "-", "0.1250", "+-", "0.0625"],
        ["bits", "per", "byte", "-", "-", "1.5000"],
    ]


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"samples": 4}, "samples=4: replies at temperature 0 are all the same"),
        ({"hf": "gpt2"}, "scored on CORE alone"),
        ({"max_per_task": 0}, "max_per_task=0: must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, rule):
    with pytest.raises(ConfigError, match=rule):
        EvaluationConfig(**changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_cast_once_compute_the_same_bits(dtype):
    model = random_model(dtype=dtype)
    copy = inference_copy(model)
    tokens_BT = torch.randint(0, 265, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(copy.logits(copy(tokens_BT)), model.logits(model(tokens_BT)))
    assert {parameter.dtype for parameter in copy.parameters()} == {dtype}
