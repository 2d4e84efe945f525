"""Bits per byte by hand, and the same whatever the batches and workers."""

import math

import numpy as np
import pytest
import torch

from nanochat.config.model import ModelConfig
from nanochat.evaluation.bits_per_byte import bits_per_byte, count_nats_and_bytes
from nanochat.model.gpt import GPT

# Ten tokens: BOS, eight that stand for 1 to 8 bytes, another special one.
TOKEN_BYTES = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 0], dtype=torch.int32)


class _Known:
    """A model whose loss of a token is that token's number plus a tenth of its position."""

    @staticmethod
    def token_losses(tokens_BT, targets_BT, document_BT=None):
        assert document_BT is None
        assert tokens_BT.shape == targets_BT.shape
        return targets_BT.float() + 0.1 * torch.arange(targets_BT.shape[1])


def test_a_tiny_text_by_hand():
    """Targets 3, BOS, 5 and 1, 9, 2: special tokens count neither nats nor bytes, first tokens are no targets."""
    rows = np.array([[0, 3, 0, 5], [4, 1, 9, 2]], dtype=np.uint16)
    nats, num_bytes = count_nats_and_bytes(_Known(), [rows], TOKEN_BYTES).tolist()
    assert num_bytes == 3 + 5 + 1 + 2
    assert nats == pytest.approx((3.0 + 5.2) + (1.0 + 2.2))
    assert bits_per_byte(nats, num_bytes) == pytest.approx(11.4 / math.log(2) / 11)


def test_a_guess_among_256_bytes_costs_eight_bits():
    assert bits_per_byte(10 * math.log(256), 10) == pytest.approx(8.0)
    assert bits_per_byte(5.0, 0) == math.inf


def random_model(**changes) -> GPT:
    model = GPT(ModelConfig(sequence_len=8, vocab_size=10, n_layer=3, n_head=2, n_kv_head=1, n_embd=32, **changes))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=draw).mul_(0.3)
    return model


def random_rows(rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 9, (rows, 9)).astype(np.uint16)


def batches(rows: np.ndarray, size: int, rank: int = 0, world_size: int = 1) -> list[np.ndarray]:
    """Cut rows as TokenShards.validation_batches does: equal batches, the last one filled with BOS, dealt in turn."""
    padding = np.zeros((-len(rows) % size, rows.shape[1]), rows.dtype)
    padded = np.concatenate([rows, padding])
    return [padded[lo : lo + size] for lo in range(0, len(padded), size)][rank::world_size]


@pytest.mark.parametrize("size", [2, 3, 7, 16])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_neither_batch_size_nor_workers_change_the_score(size, world_size):
    model, rows = random_model(), random_rows(13)
    expected = count_nats_and_bytes(model, [rows], TOKEN_BYTES)
    parts = [
        count_nats_and_bytes(model, batches(rows, size, rank, world_size), TOKEN_BYTES) for rank in range(world_size)
    ]
    total = sum(parts)
    assert total[1] == expected[1]
    assert total[0].item() == pytest.approx(expected[0].item(), rel=1e-6)


def test_with_bos_a_token_sees_its_own_document_only():
    """Two documents in a row score as each in a row of its own (padded with BOS)."""
    model = random_model()
    packed = np.array([[0, 3, 4, 5, 0, 6, 7, 8, 2]], dtype=np.uint16)
    alone = np.array([[0, 3, 4, 5, 0, 0, 0, 0, 0], [0, 6, 7, 8, 2, 0, 0, 0, 0]], dtype=np.uint16)
    hidden = count_nats_and_bytes(model, [packed], TOKEN_BYTES, bos=0)
    seen = count_nats_and_bytes(model, [packed], TOKEN_BYTES)
    apart = count_nats_and_bytes(model, [alone], TOKEN_BYTES, bos=0)
    assert hidden[1] == seen[1] == apart[1] == 35
    assert hidden[0].item() == pytest.approx(apart[0].item(), rel=1e-5)
    assert abs(hidden[0] - seen[0]) > 1e-3


def test_sums_are_kept_in_float64():
    """A thousand batches of which each adds less than float32 can see."""

    class Tiny:
        @staticmethod
        def token_losses(tokens_BT, targets_BT, document_BT=None):
            return torch.full(targets_BT.shape, 2.0**24 if targets_BT[0, 0] == 1 else 0.5)

    rows = np.full((1, 2), 2, np.uint16)
    first = np.full((1, 2), 1, np.uint16)
    totals = count_nats_and_bytes(Tiny(), [first, *[rows] * 1000], TOKEN_BYTES)
    assert totals.dtype == torch.float64
    assert totals.tolist() == [2.0**24 + 500, 1 + 2000]
