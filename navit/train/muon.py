"""Muon for matrices of which each rank holds a part (FSDP2)."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor

from navit.train.parallel import local, sharded_like


def orthogonalize(
    update: Float[Tensor, "rows cols"],
    *,
    coefficients: tuple[float, float, float],
    steps: int,
    eps: float,
) -> Float[Tensor, "rows cols"]:
    """Bring all singular values of a matrix near 1, in bfloat16, by Newton-Schulz iterations.

    The same operations as in `torch.optim.Muon`, which keeps its own to itself.

    Args:
        update: The matrix.
        coefficients: Of X, (X X^T) X and (X X^T)^2 X in each iteration.
        steps: Iterations.
        eps: Least norm the matrix is divided by.

    Source: Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024).
    """
    a, b, c = coefficients
    is_tall = update.shape[0] > update.shape[1]
    x = update.bfloat16()
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.T if is_tall else x


class ShardedMuon(torch.optim.Muon):
    """`torch.optim.Muon` with the same update, bit by bit, for sharded matrices.

    Orthogonalising needs a whole matrix. Left to `DTensor`, each of its products sums its parts in
    another order, and in bfloat16 the update of one matrix then differs by per cents between one
    rank and three. Here the momentum stays sharded, each matrix's update is gathered, every rank
    orthogonalises it and keeps its part: what DDP computes, with one matrix whole at a time.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update all matrices; a collective."""
        assert closure is None, "no caller evaluates the loss again"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, self.state[parameter], group)

    def _update(self, parameter: DTensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        grad, momentum = local(parameter.grad), group["momentum"]  # type: ignore[arg-type]
        buffer = local(state["momentum_buffer"])
        buffer.lerp_(grad, 1 - momentum)
        update = grad.lerp(buffer, momentum)
        mesh, placements = parameter.device_mesh, parameter.placements
        shape, stride = parameter.shape, parameter.stride()
        sharded = DTensor.from_local(update, mesh, placements, shape=shape, stride=stride)
        whole = orthogonalize(
            sharded.full_tensor(),
            coefficients=group["ns_coefficients"],
            steps=group["ns_steps"],
            eps=group["eps"],
        )
        part = local(sharded_like(whole.contiguous(), parameter))
        weights = local(parameter)
        weights.mul_(1 - group["lr"] * group["weight_decay"])
        weights.add_(part, alpha=-group["lr"] * 0.2 * max(parameter.shape) ** 0.5)
