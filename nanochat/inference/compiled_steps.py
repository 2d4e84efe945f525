"""A step of the engine compiled: attention and products with packed weights stay calls, all between them few kernels.

On a CPU a step is some hundred small operations, whose fixed costs outweigh what they compute. torch.compile makes one
kernel of what stands between two calls: 1.25 / 1.29 / 1.18 / 1.10 times as many tokens at 1 / 8 / 16 / 32 requests
(depth 4, bfloat16, 1 core, AMD EPYC, 2026-11-28). The calls are operators that a compiler does not look into: what they
need is found by the number of the steps, at run time, so weights may change in place.

Shapes: N tokens of a step, any number of them.
Source of the idea: vLLM, whose compiled graphs have attention as such an operator (docs/design/torch_compile).
Not covered: GPUs (decoding_graphs.py), logits and the choice of tokens. In bfloat16 fewer results are rounded.
"""

import functools
import itertools
import logging
import weakref

import torch
from torch import Tensor

from nanochat.errors import excerpt
from nanochat.inference.paged_cache import FlatBatch
from nanochat.model.gpt import GPT

log = logging.getLogger(__name__)
_COUNTER = itertools.count()
_ALIVE: "weakref.WeakValueDictionary[int, CompiledSteps]" = weakref.WeakValueDictionary()


class CompiledSteps:
    """The forward of one model over batches of a cache, compiled when it is first run; for CPUs."""

    def __init__(self, model: GPT) -> None:
        operators()
        self.model = model
        self.batch: FlatBatch | None = None
        self.is_compiled, self.has_run = True, False
        self.linears = model.fused_linears()
        number = next(_COUNTER)
        _ALIVE[number] = self
        for place, linear in enumerate(self.linears):
            if linear.packed is not None or linear.int8 is not None:
                linear.opaque = functools.partial(_multiply, number, place, linear.out_features)

        def forward(tokens_BT: Tensor, position_BT: Tensor, previous_BT: Tensor) -> Tensor:
            return model.forward(tokens_BT, cache=_Opaque(number, position_BT, previous_BT))

        # torch's stubs lack the last; without it the graphs of all models are looked at, and count towards one limit.
        self._forward = torch.compile(  # pyrefly: ignore[no-matching-overload]
            forward, dynamic=True, isolate_recompiles=True
        )

    def run(self, batch: FlatBatch) -> Tensor:
        """Return the hidden states of a step's tokens, (1, N, C).

        A single token is computed twice: torch makes a graph of its own for 1, which in bfloat16 rounds otherwise, so
        an answer would depend on its company.
        """
        self.batch = batch
        if not self.is_compiled:
            return self.model(batch.tokens_BT, cache=batch)
        N = batch.tokens_BT.shape[1]
        # Copies: of views the compiler would note where in one tensor they lie.
        tokens, position, previous = (
            one.repeat(1, 2) if N == 1 else one.clone()
            for one in (batch.tokens_BT, batch.position_BT, batch.previous_BT)
        )
        try:
            hidden_BTC = self._forward(tokens, position, previous)
        except Exception as err:  # compilers fail in many ways, each with a class of its own
            if self.has_run:
                raise
            log.warning("steps are not compiled: %s", excerpt(err), exc_info=True)
            self.is_compiled = False
            return self.model(batch.tokens_BT, cache=batch)
        self.has_run = True
        return hidden_BTC[:, :N]


class _Opaque:
    """A batch as the compiler sees it."""

    def __init__(self, number: int, position_BT: Tensor, previous_BT: Tensor) -> None:
        self.number, self.position_BT, self.previous_BT = number, position_BT, previous_BT

    def attend(self, layer: int, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, window: int) -> Tensor:
        return torch.ops.nanochat.attend(q_BTHD, k_BTGD, v_BTGD, self.number, layer, window)


def _multiply(number: int, place: int, out_features: int, input: Tensor) -> Tensor:
    return torch.ops.nanochat.multiply(input, number, place, out_features)


@functools.cache
def operators() -> torch.library.Library:
    """Make the two operators known to torch, once in a process."""
    library = torch.library.Library("nanochat", "DEF")
    library.define("attend(Tensor q, Tensor k, Tensor v, int number, int layer, int window) -> Tensor")
    library.define("multiply(Tensor input, int number, int place, int out_features) -> Tensor")

    def attend(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, number: int, layer: int, window: int) -> Tensor:
        batch = _ALIVE[number].batch
        assert batch is not None, "it is being run"
        N = batch.tokens_BT.shape[1]
        y_BTHD = batch.attend(layer, q_BTHD[:, :N], k_BTGD[:, :N], v_BTGD[:, :N], window)
        return y_BTHD.repeat(1, 2, 1, 1) if N < q_BTHD.shape[1] else y_BTHD.contiguous()

    def multiply(input: Tensor, number: int, place: int, out_features: int) -> Tensor:
        return _ALIVE[number].linears[place].product(input)

    def attended(q_BTHD: Tensor, *_: object) -> Tensor:
        return torch.empty_like(q_BTHD, memory_format=torch.contiguous_format)

    def multiplied(input: Tensor, number: int, place: int, out_features: int) -> Tensor:
        return input.new_empty((*input.shape[:-1], out_features))

    library.impl("attend", attend, "CPU")
    library.impl("multiply", multiply, "CPU")
    torch.library.register_fake("nanochat::attend", attended, lib=library)
    torch.library.register_fake("nanochat::multiply", multiplied, lib=library)
    return library
