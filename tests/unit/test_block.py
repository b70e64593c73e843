"""Parts of a block: the norm of queries and keys in the type that attention reads."""

import pytest
import torch
from torch import nn

from navit.model.block import same_type_norm


# torch keeps the statistics of a CPU's backward pass in half precision, so the mean stays small.
@pytest.mark.parametrize(
    ("device", "mean"), [("cpu", 0.5), pytest.param("cuda", 20.0, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_norm_in_half_precision_is_float32s_but_for_rounding(
    bias: bool, autocast: bool, device: str, mean: float
) -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(64, bias=bias)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0, 0.3)
    norm = norm.to(device)
    x = (torch.randn(50, 3, 64) + mean).bfloat16().to(device).requires_grad_()
    exact_x = x.detach().double().requires_grad_()

    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        found = same_type_norm(norm, x)
    exact = nn.functional.layer_norm(
        exact_x, (64,), *(None if p is None else p.double() for p in (norm.weight, norm.bias))
    )

    assert found.dtype == torch.bfloat16
    rounding = 2**-8
    torch.testing.assert_close(found.double(), exact, rtol=2 * rounding, atol=2 * rounding)
    weights = torch.randn_like(exact)
    ours = torch.autograd.grad(found, [x, *norm.parameters()], weights.bfloat16())
    theirs = torch.autograd.grad(exact, [exact_x, *norm.parameters()], weights)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.double() - b).norm() < 6 * rounding * b.norm()


def test_a_norm_in_float64_is_torchs() -> None:
    norm = nn.LayerNorm(8).double()
    nn.init.normal_(norm.weight)
    x = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(same_type_norm(norm, x), norm(x), rtol=0, atol=1e-15)
