"""Linear layers, which on a CPU in float32 run in oneDNN.

`torch.nn.functional.linear` asks MKL there. On the machine the figures come from (2 cores of an AMD
EPYC) oneDNN's product of (8,837, 384) by (384, 1,536) takes 0.85 of MKL's time, and with GELU in it
0.7 of what product and GELU take one after the other: the tokens of the hidden layer, the largest
tensor of a pass, are written once and in place.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Gelu = Literal["none", "tanh"]
"""`torch.nn.GELU`'s ``approximate``."""

# What inductor makes of a linear layer, since torch 2.0; there is no public name for it.
_pointwise: Any = None
if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
    _pointwise = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


class Linear(nn.Linear):
    """`torch.nn.Linear`, faster on a CPU: see the module."""

    def forward(self, x: Float[Tensor, "*rows K"]) -> Float[Tensor, "*rows M"]:
        """Return x W^T + b."""
        return linear(x, self.weight, self.bias)


def linear(
    x: Float[Tensor, "*rows K"],
    weight: Float[Tensor, "M K"],
    bias: Float[Tensor, " M"] | None = None,
) -> Float[Tensor, "*rows M"]:
    """Return x W^T + b, differentiable as often as one likes."""
    if not _runs_in_onednn(x, weight):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        out: Tensor = _pointwise(x, weight, bias, "none", [], "")
        return out
    out = _OneDnnLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


def linear_gelu(
    x: Float[Tensor, "*rows K"],
    weight: Float[Tensor, "M K"],
    bias: Float[Tensor, " M"] | None,
    approximate: Gelu,
) -> Float[Tensor, "*rows M"]:
    """Return gelu(x W^T + b); in one pass where no gradient is asked for."""
    if torch.is_grad_enabled() or not _runs_in_onednn(x, weight):
        return F.gelu(linear(x, weight, bias), approximate=approximate)
    out: Tensor = _pointwise(x, weight, bias, "gelu", [], approximate)
    return out


def _runs_in_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        _pointwise is not None
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        # Not in half precision, where torch asks oneDNN anyway; not for subclasses of Tensor, nor
        # where a compiler or a transform of functions looks at what is called.
        and not torch.is_autocast_enabled("cpu")
        and type(x) in (Tensor, nn.Parameter)
        and type(weight) in (Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


class _OneDnnLinear(torch.autograd.Function):
    """The product and the gradient of x in oneDNN; that of the weight is faster in MKL."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        out: Tensor = _pointwise(x, weight, bias, "none", [], "")
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            linear(grad, weight.t()) if needs_x else None,
            rows.t() @ x.flatten(0, -2) if needs_weight else None,
            rows.sum(0) if ctx.has_bias and needs_bias else None,
        )
