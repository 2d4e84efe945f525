"""A batch of groups to one update: rows of the samples that say something, micro-batches, the gradient, the optimiser.

Samples without an advantage have no gradient and are left out before the model runs; they count in what sums are
divided by. The others are sorted by length and padded at the end, where causal attention does not look.

Shapes: B rows, T positions, N trained tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.config.rl import RLConfig
from nanochat.inference.rollouts import Sample
from nanochat.model.gpt import GPT
from nanochat.model.loss import token_logprobs
from nanochat.model.optimizer import MuonAdamW, StepSchedule
from nanochat.training import policy_gradient
from nanochat.training.policy_gradient import BatchCounts, Tokens
from nanochat.training.rollout_queue import Batch

WIDTH_STEP = 32
"""Rows are padded to a multiple of this, so that few shapes come up."""


@dataclass(frozen=True)
class Row:
    """One sample to train on."""

    prompt: tuple[int, ...]
    sample: Sample
    advantage: float
    counts: bool = True
    """False for a row that is there only because every worker needs one."""

    @property
    def width(self) -> int:
        """Positions that the model computes."""
        return len(self.prompt) + len(self.sample.tokens) - 1


def rows_of(config: RLConfig, batch: Batch) -> tuple[list[Row], BatchCounts]:
    """Return the batch's rows with a gradient, the longest first, and the counts of all that may be trained on."""
    rewards_PG = torch.tensor([group.rewards for group in batch.groups], dtype=torch.float64)
    advantage_PG = policy_gradient.advantages(rewards_PG, config.advantage).tolist() if batch.groups else []
    rows, tokens = [], []
    for group, advantages in zip(batch.groups, advantage_PG, strict=True):
        for sample, advantage in zip(group.samples, advantages, strict=True):
            trained = len(sample.tokens) - sum(sample.is_forced)
            if not trained or (config.mask_truncated and sample.is_truncated):
                continue
            tokens.append(trained)
            if advantage != 0 or config.kl_beta > 0:
                rows.append(Row(group.prompt, sample, advantage))
    rows.sort(key=lambda row: -row.width)
    return rows, BatchCounts(sum(tokens), len(tokens))


def micro_batches(rows: Sequence[Row], most_tokens: int) -> list[list[Row]]:
    """Cut rows, the longest first, so that each part has at most so many positions with its padding, or one row."""
    parts = []
    while rows:
        count = max(1, most_tokens // padded(rows[0].width))
        parts.append(list(rows[:count]))
        rows = rows[count:]
    return parts


def padded(width: int) -> int:
    """Return how wide a row becomes."""
    return -(-width // WIDTH_STEP) * WIDTH_STEP


class Layout(NamedTuple):
    """A micro-batch as tensors."""

    input_BT: Tensor
    place_N: Tensor
    """Which of the B * T positions say a trained token."""
    token_N: Tensor
    tokens: Tokens
    counts_N: Tensor
    """0 at the tokens of rows that do not count."""


def laid_out(rows: Sequence[Row], device: torch.device) -> Layout:
    """Return rows as padded inputs and their trained tokens, row by row."""
    width = padded(rows[0].width)
    input_BT = torch.zeros(len(rows), width, dtype=torch.int64)
    places, tokens, rollout, sequence = [], [], [], []
    for number, row in enumerate(rows):
        ids = [*row.prompt, *row.sample.tokens]
        input_BT[number, : row.width] = torch.tensor(ids[:-1])
        first = number * width + len(row.prompt) - 1
        for place, (token, is_forced) in enumerate(zip(row.sample.tokens, row.sample.is_forced, strict=True)):
            if not is_forced:
                places.append(first + place)
                tokens.append(token)
                rollout.append(row.sample.logprobs[place])
                sequence.append(number)
    sequence_N = torch.tensor(sequence, device=device)
    advantage_S = torch.tensor([row.advantage for row in rows], device=device)
    counts_S = torch.tensor([float(row.counts) for row in rows], device=device)
    return Layout(
        input_BT.to(device), torch.tensor(places, device=device), torch.tensor(tokens, device=device),
        Tokens(torch.tensor(rollout, device=device), sequence_N, advantage_S), counts_S[sequence_N],
    )  # fmt: skip


FIGURES = ("loss", "entropy", "mismatch_kl", "clipped_share", "reference_kl", "trained_tokens", "learner_positions")
"""What a step reports: sums over tokens, of which the middle four become means."""


class PolicyStep:
    """One worker's share of updates; `banned` are ids that were never drawn."""

    def __init__(
        self, config: RLConfig, model: GPT, optimizer: MuonAdamW, *, banned: tuple[int, ...], most_tokens: int,
        reference: Callable[[], GPT],
    ) -> None:  # fmt: skip
        self.config, self.model, self.optimizer = config, model, optimizer
        self.banned, self.most_tokens = banned, most_tokens
        self.device = model.lm_head.weight.device
        self.reference = reference() if config.kl_beta > 0 else None

    def run(self, batch: Batch, schedule: StepSchedule) -> dict[str, float]:
        """Train on a batch, which every worker gets; returns figures, the same on all. No update without a gradient."""
        rows, counts = rows_of(self.config, batch)
        world_size = self.optimizer.world_size
        if not rows:
            return dict.fromkeys(FIGURES, 0.0)
        mine = rows[self.optimizer.rank :: world_size] or [replace(rows[-1], counts=False)]
        parts = micro_batches(mine, self.most_tokens)
        totals = torch.zeros(len(FIGURES), dtype=torch.float64, device=self.device)
        for number, part in enumerate(parts, start=1):
            if number == len(parts):
                self.optimizer.reduce_in_backward()
            totals += self.backward(part, counts)
        self.optimizer.step(schedule)
        if world_size > 1:
            dist.all_reduce(totals)
        figures = dict(zip(FIGURES, totals.tolist(), strict=True))
        for name in FIGURES[1:5]:
            figures[name] /= max(1.0, figures["trained_tokens"])
        return figures

    def backward(self, rows: Sequence[Row], counts: BatchCounts) -> Tensor:
        """Run forward and backward on one micro-batch; returns its share of the figures, float64."""
        layout = laid_out(rows, self.device)
        tokens = layout.tokens
        if self.reference is not None:
            with torch.no_grad():
                tokens = replace(tokens, reference_N=self._logprobs(self.reference, layout)[0])
        logprob_N, entropy_N = self._logprobs(self.model, layout)
        loss_N = policy_gradient.token_losses(self.config, logprob_N, tokens)
        weight_N = policy_gradient.token_weights(self.config, tokens, counts) * layout.counts_N
        loss = (loss_N * weight_N).sum()
        loss.backward()
        with torch.no_grad():
            reference_N = logprob_N if tokens.reference_N is None else tokens.reference_N
            of_tokens = (
                entropy_N,
                policy_gradient.kl_estimate(tokens.rollout_N, logprob_N),
                policy_gradient.clipped(self.config, logprob_N, tokens).float(),
                policy_gradient.kl_estimate(logprob_N, reference_N),
                torch.ones_like(logprob_N),
            )
            sums = [(of_token_N * layout.counts_N).sum() for of_token_N in of_tokens]
            positions = torch.tensor(float(layout.input_BT.numel()), device=self.device)
            return torch.stack([loss.detach(), *sums, positions]).double()

    def _logprobs(self, model: GPT, layout: Layout) -> tuple[Tensor, Tensor]:
        hidden_NC = model(layout.input_BT).flatten(0, 1)[layout.place_N]
        return token_logprobs(
            hidden_NC, model.lm_head.weight, layout.token_N, vocab_size=model.config.vocab_size,
            softcap=model.config.logit_softcap, temperature=self.config.temperature, banned=self.banned,
        )  # fmt: skip
