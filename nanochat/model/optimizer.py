"""Gradients to new parameters: Muon for matrices, AdamW for the rest, sharded over workers.

Every parameter is cut into pieces, and every piece has one owner among the workers: a block matrix is one piece (Muon
needs it whole), a table or vector is cut by rows. During the last backward pass each gradient piece is summed onto its
owner as soon as it is complete; the owner alone holds the optimiser state of the piece, updates it and broadcasts the
result. That is ZeRO-2's communication, except that every worker keeps its own whole gradients until the step is done.
It overlaps the backward pass on the way in and the following updates on the way out. With one worker nothing is sent.

Shapes: K matrices of one shape, M rows, N columns.
Sources: Muon, K. Jordan 2024 (kellerjordan.github.io/posts/muon); Polar Express arXiv:2505.16932; variance reduction
arXiv:2510.05491 (NorMuon); cautious decay arXiv:2510.12402; ZeRO arXiv:1910.02054; recipe: nanochat optim.py@92d63d4.
Not covered: gradient clipping (the recipe has none), fp16 loss scaling.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Quintic coefficients of five iterations. Source: arXiv:2505.16932, table for l = 1e-3, safety 1.02."""

MUON_BETA2 = 0.9
ADAM_EPS = 1e-10


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that share an update rule; lr and weight decay are multiplied by the schedule at each step."""

    kind: str
    """adamw or muon."""
    names: tuple[str, ...]
    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.8, 0.95)


@dataclass(frozen=True, kw_only=True)
class StepSchedule:
    """What changes from step to step."""

    lr_factor: float
    muon_momentum: float
    muon_weight_decay: float


@dataclass(frozen=True)
class Piece:
    """Rows lo..hi of a parameter, and the worker that updates them."""

    name: str
    lo: int
    hi: int
    owner: int


def polar_express(x_KMN: Tensor) -> Tensor:
    """Return about the nearest semi-orthogonal matrices (U V^T of each SVD), in the input's dtype.

    Singular values of at least 1e-3 of the Frobenius norm end in [0.85, 1.15]; smaller ones are only raised.
    """
    x_KMN = x_KMN / (x_KMN.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-6)
    tall = x_KMN.shape[-2] > x_KMN.shape[-1]
    for a, b, c in POLAR_EXPRESS:
        gram = x_KMN.mT @ x_KMN if tall else x_KMN @ x_KMN.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        product = (x_KMN, polynomial) if tall else (polynomial, x_KMN)
        x_KMN = torch.baddbmm(x_KMN, *product, beta=a)
    return x_KMN


def muon_direction(
    gradient_KMN: Tensor, momentum_KMN: Tensor, second_moment: Tensor, momentum: float, dtype: torch.dtype
) -> Tensor:
    """Return the update directions of K matrices, float32; both state tensors are advanced in place.

    Nesterov momentum, rows scaled to their mean norm (arXiv:2603.28254), orthogonalised in `dtype`, Frobenius norm set
    to that of a semi-orthogonal matrix (arXiv:2602.21545), then scaled per neuron by a running second moment of shape
    (K, M, 1) if M >= N else (K, 1, N), with the norm kept (arXiv:2510.05491).
    """
    momentum_KMN.lerp_(gradient_KMN, 1 - momentum)
    x_KMN = gradient_KMN.lerp(momentum_KMN, momentum).to(dtype)
    rows, columns = x_KMN.shape[-2:]
    mean_row_norm = x_KMN.float().norm(dim=(-2, -1), keepdim=True) / rows**0.5
    row_norm = x_KMN.float().norm(dim=-1, keepdim=True).clamp_min(1e-6)
    x_KMN = polar_express(x_KMN * (mean_row_norm / row_norm).to(dtype)).float()
    x_KMN *= min(rows, columns) ** 0.5 / x_KMN.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-6)
    axis = -1 if rows >= columns else -2
    mean_square = x_KMN.square().mean(dim=axis, keepdim=True)
    second_moment.lerp_(mean_square, 1 - MUON_BETA2)
    scale = second_moment.clamp_min(1e-10).rsqrt()
    norm_before = mean_square.sum(dim=(-2, -1), keepdim=True).sqrt()
    norm_after = (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt().clamp_min(1e-10)
    return x_KMN * (scale * (norm_before / norm_after))


def cut_into_pieces(shapes: Mapping[str, torch.Size], groups: Iterable[ParameterGroup], world_size: int) -> list[Piece]:
    """Cut parameters into owned pieces: matrices whole, to the least loaded worker; others by rows.

    Deterministic: every worker computes the same list. A parameter of fewer rows than 64 per worker stays whole.
    """
    load = [0] * world_size
    pieces = []
    for group in groups:
        for name in group.names:
            rows = shapes[name][0]
            if group.kind == "muon" or rows < 64 * world_size:
                owner = load.index(min(load)) if group.kind == "muon" else 0
                load[owner] += shapes[name].numel() if group.kind == "muon" else 0
                pieces.append(Piece(name, 0, rows, owner))
                continue
            bounds = [rows * worker // world_size for worker in range(world_size + 1)]
            pieces += [Piece(name, bounds[worker], bounds[worker + 1], worker) for worker in range(world_size)]
    return pieces


class MuonAdamW:
    """The optimiser of one worker: it reduces every gradient piece, updates its own, and broadcasts them.

    Call `reduce_in_backward()` before the last backward pass of a step, then `step(schedule)`.
    """

    def __init__(
        self,
        named_parameters: Mapping[str, Tensor],
        groups: list[ParameterGroup],
        *,
        muon_dtype: torch.dtype,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.parameters = dict(named_parameters)
        self.groups = groups
        self.muon_dtype = muon_dtype
        self.rank, self.world_size = rank, world_size
        missing = set(self.parameters) ^ {name for group in groups for name in group.names}
        assert not missing, f"every parameter is in one group: {missing}"
        self.pieces = cut_into_pieces({name: p.shape for name, p in self.parameters.items()}, groups, world_size)
        self._pieces_of = {name: [piece for piece in self.pieces if piece.name == name] for name in self.parameters}
        self._build_adamw()
        self._build_muon()
        self._reducing = False
        self._pending: list[Any] = []
        for name, parameter in self.parameters.items():
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: self._reduce(name, p))

    def _owned(self, group: ParameterGroup) -> list[Piece]:
        return [piece for piece in self.pieces if piece.owner == self.rank and piece.name in group.names]

    def _build_adamw(self) -> None:
        """Give torch's fused AdamW the owned row slices as its parameters."""
        self._slices: dict[Piece, Tensor] = {}
        param_groups = []
        for group in self.groups:
            if group.kind != "adamw" or not (owned := self._owned(group)):
                continue
            for piece in owned:
                self._slices[piece] = self.parameters[piece.name].detach()[piece.lo : piece.hi]
            param_groups.append(
                {"params": [self._slices[piece] for piece in owned], "lr": group.lr, "base_lr": group.lr,
                 "betas": group.betas, "weight_decay": group.weight_decay}
            )  # fmt: skip
        self.adamw = torch.optim.AdamW(param_groups, eps=ADAM_EPS, fused=True) if param_groups else None
        for piece, rows in self._slices.items():
            assert self.adamw is not None
            self.adamw.state[rows] = {
                "step": torch.zeros((), dtype=torch.float32, device=rows.device if rows.is_cuda else "cpu"),
                "exp_avg": torch.zeros_like(rows),
                "exp_avg_sq": torch.zeros_like(rows),
            }
            assert piece.owner == self.rank

    def _build_muon(self) -> None:
        """Stack the owned matrices by shape."""
        self._stacks: list[tuple[ParameterGroup, list[Piece], Tensor, Tensor]] = []
        for group in self.groups:
            if group.kind != "muon":
                continue
            by_shape: dict[torch.Size, list[Piece]] = {}
            for piece in self._owned(group):
                by_shape.setdefault(self.parameters[piece.name].shape, []).append(piece)
            for (rows, columns), pieces in sorted(by_shape.items()):
                like = self.parameters[pieces[0].name]
                second_shape = (rows, 1) if rows >= columns else (1, columns)
                momentum_KMN = torch.zeros(len(pieces), rows, columns, device=like.device)
                self._stacks.append(
                    (group, pieces, momentum_KMN, torch.zeros(len(pieces), *second_shape, device=like.device))
                )

    def reduce_in_backward(self) -> None:
        """Send each gradient to its owner as soon as the coming backward pass has completed it."""
        self._reducing = self.world_size > 1

    def _reduce(self, name: str, parameter: Tensor) -> None:
        if not self._reducing:
            return
        assert parameter.grad is not None
        for piece in self._pieces_of[name]:
            self._pending.append(dist.reduce(parameter.grad[piece.lo : piece.hi], dst=piece.owner, async_op=True))

    @torch.no_grad()
    def step(self, schedule: StepSchedule) -> None:
        """Update all parameters on all workers and clear the gradients."""
        for work in self._pending:
            work.wait()
        self._reducing, self._pending = False, []
        updated: set[Piece] = set()
        for piece in self.pieces:  # every worker broadcasts in this order, its own pieces as soon as they are updated
            if piece.owner == self.rank and piece not in updated:
                updated |= self._update(piece, schedule)
            if self.world_size > 1:
                rows = self.parameters[piece.name].detach()[piece.lo : piece.hi]
                self._pending.append(dist.broadcast(rows, src=piece.owner, async_op=True))
        for work in self._pending:
            work.wait()
        self._pending = []
        for parameter in self.parameters.values():
            parameter.grad = None

    def _update(self, piece: Piece, schedule: StepSchedule) -> set[Piece]:
        """Update an owned piece and those that are updated with it; returns them all."""
        if piece in self._slices:
            return self._step_adamw(schedule)
        return self._step_muon(next(stack for stack in self._stacks if piece in stack[1]), schedule)

    def _step_adamw(self, schedule: StepSchedule) -> set[Piece]:
        assert self.adamw is not None
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * schedule.lr_factor
        for piece, rows in self._slices.items():
            gradient = self.parameters[piece.name].grad
            assert gradient is not None, f"{piece.name} has no gradient"
            rows.grad = gradient[piece.lo : piece.hi]
        self.adamw.step()
        for rows in self._slices.values():
            rows.grad = None
        return set(self._slices)

    def _step_muon(
        self, stack: tuple[ParameterGroup, list[Piece], Tensor, Tensor], schedule: StepSchedule
    ) -> set[Piece]:
        group, pieces, momentum_KMN, second_moment = stack
        parameters = [self.parameters[piece.name] for piece in pieces]
        gradient_KMN = torch.stack([parameter.grad for parameter in parameters])  # type: ignore[arg-type]
        direction_KMN = muon_direction(
            gradient_KMN, momentum_KMN, second_moment, schedule.muon_momentum, self.muon_dtype
        )
        rows, columns = direction_KMN.shape[-2:]
        lr = group.lr * schedule.lr_factor * max(1.0, rows / columns) ** 0.5
        parameter_KMN = torch.stack([parameter.detach() for parameter in parameters])
        decayed_KMN = parameter_KMN * ((direction_KMN * parameter_KMN) >= 0)
        parameter_KMN -= lr * direction_KMN + (lr * schedule.muon_weight_decay) * decayed_KMN
        for parameter, updated_MN in zip(parameters, parameter_KMN.unbind(), strict=True):
            parameter.copy_(updated_MN)
        return set(pieces)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return this worker's state as `PARAMETER/KIND/LO/HI` -> rows LO..HI of that parameter's state.

        Muon's factored second moment has 1 row where the parameter has more columns than rows: it stands under 0/1.
        """
        tensors = {}
        for piece, rows in self._slices.items():
            assert self.adamw is not None
            for kind in ("exp_avg", "exp_avg_sq"):
                tensors[f"{piece.name}/{kind}/{piece.lo}/{piece.hi}"] = self.adamw.state[rows][kind]
        for _, pieces, momentum_KMN, second_moment in self._stacks:
            for index, piece in enumerate(pieces):
                tensors[f"{piece.name}/momentum/0/{piece.hi}"] = momentum_KMN[index]
                tensors[f"{piece.name}/second_moment/0/{second_moment.shape[1]}"] = second_moment[index]
        return tensors

    def set_step(self, step: int) -> None:
        """Set the number of updates done, which Adam's bias correction needs."""
        if self.adamw is not None:
            for state in self.adamw.state.values():
                state["step"].fill_(step)
