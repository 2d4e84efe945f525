"""Scores against one whole forward for each option: shared prefixes, company, ties, cropping, what is computed."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_core import gpt_forward, naive_scores, randomise

from nanochat.config.model import ModelConfig, stock
from nanochat.data.tokenizer import SPLIT_PATTERNS, Tokenizer
from nanochat.errors import CheckpointError, DataError
from nanochat.evaluation.scoring import GPTScorer, Option, common_prefix, cropped, cut_by_length
from nanochat.model.gpt import GPT

BYTES = Tokenizer([], SPLIT_PATTERNS["nanochat"])
VOCAB = BYTES.vocab_size
EVERYTHING = ModelConfig(
    sequence_len=48, vocab_size=VOCAB, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, window_pattern="SL", smear=True
)


@pytest.fixture(scope="module")
def model():
    """Every part on, short windows of 12 tokens; float64 up to the logits, so that only the last rounding differs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanochat.config.model.SHORT_WINDOW_MULTIPLE", 12)
        yield randomise(GPT(EVERYTHING, torch.float64)).double().eval()


def tokens(length: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def choices(prefix: int, ends: list[int], seed: int) -> list[Option]:
    """Options that share `prefix` tokens and are scored from there."""
    start = (BYTES.bos, *tokens(prefix - 1, seed))
    return [Option((*start, *tokens(end, seed * 100 + number)), prefix) for number, end in enumerate(ends)]


def schema(contexts: list[int], end: int, seed: int) -> list[Option]:
    """Options whose contexts differ and whose last `end` tokens are the same and are scored."""
    shared = tokens(end, seed)
    return [
        Option((BYTES.bos, *tokens(length, seed * 100 + number), *shared), length + 1)
        for number, length in enumerate(contexts)
    ]


def some_groups() -> list[list[Option]]:
    groups = [choices(5 + 7 * n % 31, [1 + (n + k) % 9 for k in range(2 + n % 4)], n) for n in range(9)]
    groups += [schema([3 + n, 9, 2 * n + 1], 4, 50 + n) for n in range(4)]
    groups += [choices(20 + n, [1, 1, 1, 1], 70 + n) for n in range(3)]  # letters
    groups += [choices(11 + 6 * n, [4], 80 + n) for n in range(4)]  # language modelling
    return groups


def naive(model: GPT, group: list[Option]) -> list[tuple[float, bool]]:
    return naive_scores(gpt_forward(model), [(option.tokens, option.start) for option in group])


def assert_naive(model: GPT, groups: list[list[Option]], scores, tolerance: float = 4e-6) -> None:
    for group, found in zip(groups, scores, strict=True):
        for score, (nats, greedy) in zip(found, naive(model, group), strict=True):
            assert score.mean_nats == pytest.approx(nats, abs=tolerance)
            assert score.is_greedy == greedy


@pytest.mark.parametrize("batch_tokens", [1, 60, 400, 10**6])
def test_scores_are_those_of_whole_sequences_in_any_company(model, batch_tokens):
    groups = some_groups()
    assert_naive(model, groups, GPTScorer(model, BYTES, batch_tokens).score(groups))


@settings(max_examples=40)
@given(data=st.data())
def test_any_options_of_any_group(model, data):
    """Options of any kinship: one begins another, equal tokens are scored from different places, all are equal."""
    stem = tokens(data.draw(st.integers(1, 12), label="stem"), 1)
    option = st.builds(
        lambda kept, end, start: Option(
            (whole := (BYTES.bos, *stem[:kept], *end)), max(1, min(start, len(whole) - 1))
        ),
        st.integers(1, len(stem)), st.lists(st.integers(0, 2), max_size=4), st.integers(1, 16),
    )  # fmt: skip
    groups = data.draw(st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=3), label="groups")
    batch_tokens = data.draw(st.sampled_from([1, 30, 1000]), label="batch_tokens")
    assert_naive(model, groups, GPTScorer(model, BYTES, batch_tokens).score(groups))


def test_stock_architecture_and_bfloat16():
    """Stated tolerance in bfloat16: 0.05 nats on means of about 15."""
    groups = some_groups()[::2]
    plain = randomise(GPT(stock(EVERYTHING))).eval()
    assert_naive(plain, groups, GPTScorer(plain, BYTES).score(groups), tolerance=1e-5)
    half = randomise(GPT(EVERYTHING, torch.bfloat16)).eval()
    for group, found in zip(groups, GPTScorer(half, BYTES).score(groups), strict=True):
        for score, (nats, _) in zip(found, naive(half, group), strict=True):
            assert score.mean_nats == pytest.approx(nats, abs=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_on_a_gpu(dtype):
    groups = some_groups()
    model = randomise(GPT(EVERYTHING)).eval()
    on_gpu = randomise(GPT(EVERYTHING, dtype)).eval().cuda()
    for group, found in zip(groups, GPTScorer(on_gpu, BYTES, 400).score(groups), strict=True):
        for score, (nats, _) in zip(found, naive(model, group), strict=True):
            assert score.mean_nats == pytest.approx(nats, abs=1e-2 if dtype == torch.float32 else 0.3)


def test_greedy_is_all_or_nothing(model):
    """A continuation grown by the model's own likeliest tokens, and the same with one of them exchanged."""
    grown = [BYTES.bos, *tokens(10, 3)]
    for _ in range(5):
        grown.append(int(gpt_forward(model)(grown)[-1].argmax()))
    likeliest = Option(tuple(grown), 11)
    wrong = [Option((*grown[:place], (grown[place] + 1) % VOCAB, *grown[place + 1 :]), 11) for place in range(11, 16)]
    scores = GPTScorer(model, BYTES).score([[likeliest], [Option(tuple(grown), 10)], *([option] for option in wrong)])
    assert [score.is_greedy for (score,) in scores] == [True] + [False] * 6
    letters = [Option((*grown[:11], letter), 11) for letter in (grown[11], (grown[11] + 1) % VOCAB)]
    assert [score.is_greedy for score in GPTScorer(model, BYTES).score([letters])[0]] == [True, False]


def test_equal_options_tie_exactly_and_are_scored_once(model, monkeypatch):
    first, second = choices(9, [4, 4], 5)
    alone = GPTScorer(model, BYTES).score([[first, second]])[0]
    rows = spied_rows(model, monkeypatch)
    scores = GPTScorer(model, BYTES).score([[second, first, first, second]])[0]
    assert scores[1] == scores[2]
    assert scores[0] == scores[3]
    assert [score.mean_nats for score in scores[:2]] == pytest.approx([alone[1].mean_nats, alone[0].mean_nats])
    assert rows["forward"] == [(1, 9), (1, 6)]


def test_a_model_that_computes_no_numbers_has_no_score():
    broken = randomise(GPT(EVERYTHING)).eval()
    with torch.no_grad():
        broken.lm_head.weight[5, 0] = float("nan")
    with pytest.raises(CheckpointError, match="nats=nan"):
        GPTScorer(broken, BYTES).score([choices(9, [2, 2], 5)])


def spied_rows(model: GPT, monkeypatch) -> dict[str, list[tuple[int, ...]]]:
    """Note the shapes of what goes through the layers and through the head."""
    shapes: dict[str, list[tuple[int, ...]]] = {"forward": [], "logits": []}
    for name in shapes:
        inner = getattr(model, name)

        def spy(x, *args, inner=inner, name=name, **kwargs):
            shapes[name].append(tuple(x.shape))
            return inner(x, *args, **kwargs)

        monkeypatch.setattr(model, name, spy)
    return shapes


def test_a_shared_prefix_runs_once_and_the_head_at_scored_places_only(model, monkeypatch):
    shapes = spied_rows(model, monkeypatch)
    GPTScorer(model, BYTES).score([choices(30, [3, 3, 4, 3], 1), choices(28, [4, 3], 2)])
    assert shapes["forward"] == [(1, 30 + 28), (1, 9 + 5)]  # the last token of an option is never an input
    assert shapes["logits"] == [(20, 32)]


def test_letters_need_no_second_forward(model, monkeypatch):
    shapes = spied_rows(model, monkeypatch)
    scores = GPTScorer(model, BYTES).score([choices(30, [1, 1, 1, 1], 1), choices(28, [1, 1], 2)])
    assert shapes["forward"] == [(1, 30 + 28)]
    assert shapes["logits"] == [(6, 32)]
    assert len({score.mean_nats for score in scores[0]}) == 4


def test_a_batch_keeps_to_its_tokens(model, monkeypatch):
    shapes = spied_rows(model, monkeypatch)
    GPTScorer(model, BYTES, 100).score([choices(20, [5, 5, 5], n) for n in range(9)])
    five, four = [5 * 20, 4 * 4, 4 * 4, 4 * 4, 3 * 4], [4 * 20, 4 * 4, 4 * 4, 4 * 4]  # an end counts as 20 + 4 tokens
    assert [shape[1] for shape in shapes["forward"]] == five + four


@given(lengths=st.lists(st.integers(1, 9), max_size=30), budget=st.integers(1, 40))
def test_runs_are_of_like_length_and_within_the_budget(lengths, budget):
    runs = list(cut_by_length(enumerate(lengths), lambda item: item[1], budget))
    assert sorted(item for run in runs for item in run) == list(enumerate(lengths))
    in_order = [length for run in runs for _, length in run]
    assert in_order == sorted(lengths, reverse=True)
    assert all(len(run) == 1 or len(run) * run[0][1] <= budget for run in runs)
    assert all((len(run) + 1) * run[0][1] > budget for run in runs[:-1])  # the next one did not fit


@given(st.lists(st.lists(st.integers(0, 1), max_size=6).map(tuple), min_size=1, max_size=5))
def test_common_prefix(sequences):
    expected = 0
    while all(len(sequence) > expected for sequence in sequences) and len({s[expected] for s in sequences}) == 1:
        expected += 1
    assert common_prefix(sequences) == expected


def test_nothing_gives_nothing(model):
    assert GPTScorer(model, BYTES).score([]) == []
    assert GPTScorer(model, BYTES).score([[], choices(3, [1], 1), []])[::2] == [[], []]


def test_cropping_by_hand():
    group = [Option((9, 1, 2, 3, 4, 5, 6), 5), Option((9, 1, 2, 3, 7), 4)]
    assert cropped(group, 7, 9) == group
    assert cropped(group, 5, 9) == [Option((9, 3, 4, 5, 6), 3), Option((9, 3, 7), 2)]
    assert cropped(group, 5, 8) == [Option((2, 3, 4, 5, 6), 3), Option((2, 3, 7), 2)]  # no BOS in front
    assert cropped(group, 4, 9) == [Option((9, 4, 5, 6), 2), Option((9, 7), 1)]
    with pytest.raises(DataError, match="max_tokens=3: an option has 4 tokens too many, of which only 3 are context"):
        cropped(group, 3, 9)


def test_long_options_lose_context_and_keep_bos(model):
    """Of rows of 48: 60 tokens shared and ends of up to 5."""
    long = choices(60, [2, 5, 3], 4)
    by_hand = [
        Option((BYTES.bos, *option.tokens[18:]), option.start - 17) for option in long
    ]  # fmt: skip
    assert max(len(option.tokens) for option in by_hand) == 48
    scorer = GPTScorer(model, BYTES)
    assert scorer.max_tokens == 48
    assert_naive(model, [by_hand], scorer.score([long]))
    with pytest.raises(DataError, match="max_tokens=48"):
        scorer.score([choices(3, [60, 4], 1)])


def test_the_mean_is_over_tokens(model):
    (option,) = choices(6, [3], 1)
    logits = gpt_forward(model)(list(option.tokens))
    nats = [float(torch.logsumexp(logits[t - 1], 0) - logits[t - 1, option.tokens[t]]) for t in (6, 7, 8)]
    (score,) = GPTScorer(model, BYTES).score([[option]])[0]
    assert score.mean_nats == pytest.approx(math.fsum(nats) / 3, abs=1e-5)
