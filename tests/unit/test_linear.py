"""Linear layers on the CPU: the oneDNN path against plain torch, in value and gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from navit.model import linear as module
from navit.model.linear import Linear, linear, linear_gelu

needs_onednn = pytest.mark.skipif(
    module._pointwise is None, reason="this build of torch has no oneDNN"
)


def draw(rows: int, inner: int, outer: int, *, bias: bool, seed: int) -> list[Tensor | None]:
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, inner), torch.randn(outer, inner)
    found = [x.requires_grad_(), weight.requires_grad_()]
    return [*found, torch.randn(outer).requires_grad_() if bias else None]


@needs_onednn
@given(
    rows=st.integers(1, 40),
    inner=st.integers(1, 70),
    outer=st.integers(1, 70),
    bias=st.booleans(),
    seed=st.integers(0, 999),
)
def test_value_and_gradients_are_those_of_plain_torch(
    rows: int, inner: int, outer: int, bias: bool, seed: int
) -> None:
    x, weight, b = draw(rows, inner, outer, bias=bias, seed=seed)
    assert x is not None
    assert weight is not None
    found, expected = linear(x, weight, b), F.linear(x, weight, b)
    assert "OneDnn" in type(found.grad_fn).__name__, "else nothing is compared"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    inputs = [tensor for tensor in (x, weight, b) if tensor is not None]
    weights = torch.randn_like(expected)
    pairs = zip(
        *(torch.autograd.grad(out, inputs, weights) for out in (found, expected)), strict=True
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@needs_onednn
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("bias", [False, True])
def test_gelu_in_the_product_is_gelu_after_it(approximate: module.Gelu, bias: bool) -> None:
    x, weight, b = draw(33, 20, 50, bias=bias, seed=0)
    assert x is not None
    assert weight is not None
    plain = F.gelu(F.linear(x, weight, b), approximate=approximate)
    trained = linear_gelu(x, weight, b, approximate)
    with torch.no_grad():
        fused = linear_gelu(x, weight, b, approximate)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(trained, plain, rtol=1e-5, atol=1e-5)


def test_the_layer_can_be_differentiated_twice() -> None:
    layer, x = Linear(6, 5), torch.randn(3, 6, requires_grad=True)

    def second(out: Tensor) -> tuple[Tensor, ...]:
        (first,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, layer.weight])

    for ours, theirs in zip(
        second(layer(x)), second(F.linear(x, *layer.parameters())), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_onednn_is_not_asked_takes_torchs_own_path() -> None:
    layer = Linear(6, 5)
    x = torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.double()(x.double()).dtype == torch.float64
    assert layer.float()(x[:0]).shape == (0, 5)
    mapped = torch.func.vmap(layer)(x.view(2, 2, 6))
    torch.testing.assert_close(mapped, F.linear(x, *layer.parameters()).view(2, 2, 5))
    frozen = [parameter.detach() for parameter in layer.parameters()]
    derivative = torch.func.jacrev(lambda y: linear(y, *frozen))(x[0])
    torch.testing.assert_close(derivative, frozen[0])
