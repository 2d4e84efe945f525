"""A sequence cut into chunks in any way, in any company and any pages, has the logits of one whole forward."""

import random

import pytest
import torch

from nanochat.config.model import ModelConfig, stock
from nanochat.inference.paged_cache import PAGE_TOKENS, Chunk, FlatBatch, PagedKVCache, pages_for
from nanochat.model.gpt import GPT

CONFIG = ModelConfig(
    sequence_len=160, vocab_size=90, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, window_pattern="SL", smear=True
)


def randomise(model: GPT) -> None:
    """Draw every parameter so large that each part of the model shows in the output."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(generator=draw)
            if value.dim() == 1:
                value.mul_(0.3).add_(0.5)
            elif name == "lm_head.weight":
                value.mul_(6 * value.shape[1] ** -0.5)
            elif not name.startswith(("transformer.wte", "value_embeds")):
                value.mul_(value.shape[1] ** -0.5)


@pytest.fixture(scope="module")
def model():
    """Every part is on, all parameters are random, short windows see 40 tokens: more than a page, less than a row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanochat.config.model.SHORT_WINDOW_MULTIPLE", 40)
        made = GPT(CONFIG, torch.float64)
        assert set(CONFIG.windows) == {40, 160}
        randomise(made)
        yield made.double().eval()


def sequences(count: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [draw.choices(range(90), k=draw.randint(1, 160)) for _ in range(count)]


def whole(model, tokens):
    with torch.no_grad():
        return model.logits(model(torch.tensor([tokens])))[0]


def piecewise(
    model, tokens_of: list[list[int]], sizes: list[int], seed: int = 0, pause: float = 0.3
) -> list[torch.Tensor]:
    """Logits of sequences that are computed side by side, each in chunks of drawn sizes, on scattered pages."""
    draw = random.Random(seed)
    cache = PagedKVCache(model.config, 1 + sum(map(pages_for, map(len, tokens_of))), model.compute_dtype)
    free = list(range(1, cache.k_LGPSD.shape[2]))
    draw.shuffle(free)
    tables: list[list[int]] = [[] for _ in tokens_of]
    logits: list[list[torch.Tensor]] = [[] for _ in tokens_of]
    done = [0] * len(tokens_of)
    while any(end < len(tokens) for end, tokens in zip(done, tokens_of)):
        chunks, whose = [], []
        for number, tokens in enumerate(tokens_of):
            count = min(draw.choice(sizes), len(tokens) - done[number])
            if count == 0 or (chunks and draw.random() < pause):
                continue
            end = done[number] + count
            tables[number] += [free.pop() for _ in range(pages_for(end) - len(tables[number]))]
            previous = tokens[done[number] - 1] if done[number] else -1
            chunks.append(Chunk(tokens[done[number] : end], done[number], previous, tables[number]))
            whose.append(number)
        batch = cache.batch(chunks)
        with torch.no_grad():
            hidden_NC = model(batch.tokens_BT, cache=batch)[0]
        for number, part in zip(whose, model.logits(hidden_NC).split([len(chunk.tokens) for chunk in chunks])):
            logits[number].append(part)
            done[number] += len(part)
    return [torch.cat(parts) for parts in logits]


@pytest.mark.parametrize(
    "sizes", [[1], [2], [3], [7], [31], [32], [33], [64], [100], [160], [1, 1, 1, 5, 17, 33, 80], [1, 160]]
)
def test_any_cut_gives_the_logits_of_a_whole_forward(model, sizes):
    tokens_of = sequences(5, seed=sum(sizes))
    for got, tokens in zip(piecewise(model, tokens_of, sizes), tokens_of, strict=True):
        torch.testing.assert_close(got, whole(model, tokens), rtol=0, atol=1e-5)


def test_every_boundary_of_a_chunk(model):
    (tokens,) = [sequence for sequence in sequences(40, seed=3) if len(sequence) > 140][:1]
    expected = whole(model, tokens)
    for cut in range(1, len(tokens), 3):
        got = piecewise(model, [tokens[:cut] + tokens[cut:]], [cut])[0]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_stock_and_bfloat16():
    """Stated tolerance in bfloat16: 0.35 on logits up to 15."""
    for config, dtype, tolerance in ((stock(CONFIG), torch.float32, 1e-4), (CONFIG, torch.bfloat16, 0.35)):
        model = GPT(config, dtype)
        randomise(model)
        model.eval()
        tokens_of = sequences(4, seed=9)
        for got, tokens in zip(piecewise(model, tokens_of, [1, 1, 9, 40]), tokens_of, strict=True):
            assert (got - whole(model, tokens)).abs().max() < tolerance


def test_a_copied_page_is_a_page_of_ones_own(model):
    """Two sequences go on differently after the same half-full page."""
    stem, ends = sequences(9, seed=5)[0][:40], ([1, 2, 3], [4, 5, 6])
    cache = PagedKVCache(model.config, 9, model.compute_dtype)
    batch = cache.batch([Chunk(stem, 0, -1, [3, 5])])
    with torch.no_grad():
        model(batch.tokens_BT, cache=batch)
        cache.copy_pages([5, 5], [7, 8])
        batch = cache.batch([Chunk(end, 40, stem[-1], [3, page]) for end, page in zip(ends, (7, 8))])
        logits = model.logits(model(batch.tokens_BT, cache=batch))[0]
    for end, got in zip(ends, logits.split(3), strict=True):
        torch.testing.assert_close(got, whole(model, stem + end)[40:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("part", ["backout_lambda", "smear_lambda", "value_embeds.0.weight", "x0_lambdas"])
def test_each_part_of_the_model_shows_in_these_comparisons(model, part):
    """What the comparison would not see if it were missing from both sides."""
    tokens = sequences(40, seed=3)[1]
    expected = whole(model, tokens)
    parameter = dict(model.named_parameters())[part]
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.zero_()
        changed = whole(model, tokens)
        parameter.copy_(before)
    assert (changed - expected).abs().max() > 0.1


@pytest.mark.parametrize("fault", ["window", "previous", "slot", "position"])
def test_faults_of_the_cache_are_seen(model, monkeypatch, fault):
    tokens = next(sequence for sequence in sequences(40, seed=4) if len(sequence) > 140)
    expected = whole(model, tokens)
    made = FlatBatch.__init__

    def faulty(self, cache, chunks, rounded):
        if fault == "window":
            cache.windows = sorted({window - 1 for window in cache.config.windows})
        made(self, cache, chunks, rounded)
        if fault == "previous":
            self.previous_BT = self.previous_BT.clone()
            self.previous_BT[0, 0] = -1
        if fault == "position":
            self.position_BT = self.position_BT + (self.position_BT > 50)
        if fault == "slot":
            self._slot_N = self._slot_N ^ (self._slot_N % PAGE_TOKENS == 7).long()

    monkeypatch.setattr(FlatBatch, "__init__", faulty)
    if fault == "window":
        attend = FlatBatch.attend
        monkeypatch.setattr(FlatBatch, "attend", lambda self, *inputs: attend(self, *inputs[:-1], inputs[-1] - 1))
    got = piecewise(model, [tokens], [20])[0]
    assert (got - expected).abs().max() > 0.01
