"""Keys and values of every layer to what the next tokens attend to: dense rows, each filled to its own length.

Every row has room for `capacity` tokens in one tensor per layer. A forward writes its T tokens after each row's own
length; `advance` then says how many of them were real. What lies beyond a row's length, such as the padding of a
shorter prompt, is never seen (queries see only positions up to their own) and the row's next tokens overwrite it.

Shapes: L layers, B rows, T tokens of this call, G KV heads, S slots, D head size, C width.
Not covered: paging; rows that share a prefix each hold a copy of it (`take`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nanochat.config.model import ModelConfig
from nanochat.errors import ConfigError


class KVCache:
    """A cache for `GPT.forward`: for every chunk of tokens call the model with it, without gradient, then `advance`.

    Prompts of different lengths go in one forward, padded on the right with any token; their logits are at each
    row's last real token. A row that has nothing to say in a call gets any token and advances by 0.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocate zeros for `rows` x `capacity` tokens; `dtype` is the model's compute dtype.

        Raises: ConfigError if rows or capacity are below 1.
        """
        for name, value in (("rows", rows), ("capacity", capacity)):
            if value < 1:
                raise ConfigError(f"{name}={value}: a cache needs at least 1.")
        self._config = config
        self.capacity = capacity
        self.lengths = [0] * rows
        """Tokens in each row, as `start_B`, but on the host: reading them waits for no device."""
        self.start_B = torch.zeros(rows, dtype=torch.int64, device=device)
        # Heads before slots: the products of attention then read keys and values in place.
        shape = (config.n_layer, rows, config.n_kv_head, capacity, config.head_dim)
        self._k_LBGSD = torch.zeros(shape, dtype=dtype, device=device)
        self._v_LBGSD = torch.zeros(shape, dtype=dtype, device=device)
        self._row_B1 = torch.arange(rows, device=device)[:, None]
        self._previous_BC = torch.zeros(rows, config.n_embd, dtype=dtype, device=device)
        self._embedding_BTC: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        """Tell whether no row holds a token, so that the next call's tokens see none but their own."""
        return not any(self.lengths)

    @torch.no_grad()
    def append(self, layer: int, k_BTGD: Tensor, v_BTGD: Tensor) -> tuple[Tensor, Tensor]:
        """Write T keys and values after each row's length; return the layer's k_BSGD and v_BSGD up to the last slot.

        Raises: ConfigError if a row has no room for T tokens, padding included.
        """
        end = max(self.lengths) + k_BTGD.shape[1]
        if end > self.capacity:
            row = self.lengths.index(max(self.lengths))
            raise ConfigError(
                f"capacity={self.capacity}: row {row} would hold {end} tokens, padding included. "
                "Make the cache larger or the prompt and completion shorter."
            )
        slot_BT = self.start_B[:, None] + torch.arange(k_BTGD.shape[1], device=self.start_B.device)
        self._k_LBGSD[layer].transpose(1, 2)[self._row_B1, slot_BT] = k_BTGD
        self._v_LBGSD[layer].transpose(1, 2)[self._row_B1, slot_BT] = v_BTGD
        return self._k_LBGSD[layer, :, :, :end].transpose(1, 2), self._v_LBGSD[layer, :, :, :end].transpose(1, 2)

    def swap_previous_embedding(self, embedding_BTC: Tensor) -> Tensor:
        """Take this call's embeddings, of which `advance` keeps each row's last real one; return those kept before."""
        self._embedding_BTC = embedding_BTC
        return self._previous_BC

    @torch.no_grad()
    def advance(self, counts: int | Sequence[int]) -> None:
        """Count the real tokens of the last forward, alike in all rows or row by row; 0 leaves a row as it is.

        Counts are host integers from 0 to T: the first `count` tokens of a row stay, the rest are forgotten.
        """
        counts_B = [counts] * len(self.lengths) if isinstance(counts, int) else list(counts)
        assert len(counts_B) == len(self.lengths), "one count a row"
        assert all(0 <= length + count <= self.capacity for length, count in zip(self.lengths, counts_B))
        self.lengths = [length + count for length, count in zip(self.lengths, counts_B)]
        moved_B = torch.tensor(counts_B, device=self.start_B.device)
        self.start_B = self.start_B + moved_B
        if self._embedding_BTC is not None:
            last_BC = self._embedding_BTC[self._row_B1[:, 0], (moved_B - 1).clamp(min=0)]
            self._previous_BC = torch.where((moved_B > 0)[:, None], last_BC, self._previous_BC)
            self._embedding_BTC = None

    @torch.no_grad()
    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Empty rows (all if none are named) for new prompts; values are cleared, since 0 times a stale NaN is NaN."""
        chosen = list(range(len(self.lengths))) if rows is None else list(rows)
        row_R = torch.tensor(chosen, dtype=torch.int64, device=self.start_B.device)
        for row in chosen:
            self.lengths[row] = 0
        self.start_B = self.start_B.index_fill(0, row_R, 0)
        self._previous_BC = self._previous_BC.index_fill(0, row_R, 0)
        self._v_LBGSD.index_fill_(1, row_R, 0)

    @torch.no_grad()
    def put(self, rows: Sequence[int], other: "KVCache") -> None:
        """Replace this cache's rows[i] by row i of another, whose rows all fit; the other is as after `advance`."""
        assert len(rows) == len(other.lengths), "one place for each row"
        assert max(other.lengths) <= self.capacity, "the rows fit"
        filled = max(other.lengths)
        row_R = torch.tensor(list(rows), device=self.start_B.device)
        for row, length in zip(rows, other.lengths):
            self.lengths[row] = length
        self.start_B = self.start_B.index_copy(0, row_R, other.start_B)
        self._previous_BC = self._previous_BC.index_copy(0, row_R, other._previous_BC)
        for layer in range(self._config.n_layer):
            self._k_LBGSD[layer, row_R, :, :filled] = other._k_LBGSD[layer, :, :, :filled]
            self._v_LBGSD[layer, row_R, :, :filled] = other._v_LBGSD[layer, :, :, :filled]

    @torch.no_grad()
    def take(self, rows: Sequence[int], capacity: int) -> "KVCache":
        """Return a new cache whose row i is a copy of this one's row rows[i], with room for `capacity` tokens.

        A row may be taken many times (a prompt with several continuations) or left out (a finished one). Call it after
        `advance`. Raises: ConfigError if no row is taken or one does not fit.
        """
        lengths = [self.lengths[row] for row in rows]
        filled = max(lengths, default=0)
        if filled > capacity:
            raise ConfigError(f"capacity={capacity}: a row to take holds {filled} tokens. Give room for more.")
        taken = KVCache(self._config, len(lengths), capacity, self._k_LBGSD.dtype, self._k_LBGSD.device)
        row_R = torch.tensor(list(rows), device=self.start_B.device)
        taken.lengths, taken.start_B = lengths, self.start_B[row_R]
        taken._previous_BC = self._previous_BC[row_R]
        for layer in range(self._config.n_layer):  # one at a time: the copy between is as large as what is indexed
            taken._k_LBGSD[layer, :, :, :filled] = self._k_LBGSD[layer, :, :, :filled][row_R]
            taken._v_LBGSD[layer, :, :, :filled] = self._v_LBGSD[layer, :, :, :filled][row_R]
        return taken
