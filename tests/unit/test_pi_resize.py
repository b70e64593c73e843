"""PI-resize: the checks FlexiViT's section 3.4 allows, against dense pseudo-inverses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from navit.model.pi_resize import bilinear_matrix, patch_side, pi_buffer, pi_matrix, pi_resize

SIDES = st.integers(1, 20)
GRID = (8, 10, 12, 15, 16, 20, 24, 30, 32, 40, 48)
"""FlexiViT's patch sizes at 240 pixels, and its buffer's."""


def random_weight(side: int, width: int = 3) -> Tensor:
    return torch.randn(width, 3 * side**2, dtype=torch.float64)


def resize_patch(patch: Tensor, new: int) -> Tensor:
    """Enlarge or reduce a patch (side, side, 3) as torch does, without antialias."""
    image = patch.permute(2, 0, 1)[None]
    resized = F.interpolate(image, (new, new), mode="bilinear", align_corners=False)
    return resized[0].permute(1, 2, 0)


@settings(deadline=None)
@given(old=SIDES, new=SIDES)
def test_the_bilinear_matrix_is_torchs_resize(old: int, new: int) -> None:
    values = torch.randn(old, dtype=torch.float64)
    expected = F.interpolate(values[None, None], new, mode="linear", align_corners=False)[0, 0]
    np.testing.assert_allclose(bilinear_matrix(old, new) @ values.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("old", GRID)
def test_products_with_enlarged_patches_are_those_with_the_patches(old: int) -> None:
    weight, patch = random_weight(old), torch.rand(old, old, 3, dtype=torch.float64)
    for new in (side for side in GRID if side >= old):
        resized = pi_resize(weight, new)
        found = resized @ resize_patch(patch, new).flatten()
        torch.testing.assert_close(found, weight @ patch.flatten(), rtol=0, atol=1e-12 * old**2)


def test_half_the_size_is_exactly_four_times_the_resize() -> None:
    halved = bilinear_matrix(16, 8)
    np.testing.assert_allclose(pi_matrix(16, 8), 2 * halved, rtol=0, atol=1e-14)  # 2 x 2 = 4
    weight = random_weight(16, 1)
    expected = 4 * resize_patch(weight.view(16, 16, 3), 8).flatten()
    torch.testing.assert_close(pi_resize(weight, 8)[0], expected, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(old=st.integers(1, 7), new=st.integers(1, 7))
def test_it_is_the_pseudo_inverse_over_both_axes(old: int, new: int) -> None:
    """The reference has one dense matrix for the whole patch; what is left over is orthogonal."""
    weight = random_weight(old)
    axis = bilinear_matrix(old, new)
    both = np.kron(axis, axis)
    per_channel = weight.view(3, old * old, 3).numpy()
    expected = np.einsum("ab,dbc->dac", np.linalg.pinv(both.T), per_channel)
    found = pi_resize(weight, new).view(3, new * new, 3).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)
    residual = np.einsum("ab,dac->dbc", both, found) - per_channel
    np.testing.assert_allclose(np.einsum("ab,dbc->dac", both, residual), 0, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("old", "new"), [(8, 16), (8, 20), (16, 8), (15, 48), (32, 16)])
def test_a_constant_patch_keeps_its_token(old: int, new: int) -> None:
    weight = random_weight(old)
    token, resized = weight.sum(1), pi_resize(weight, new).sum(1)
    torch.testing.assert_close(resized, token, rtol=0, atol=1e-9)


@settings(deadline=None, max_examples=25)
@given(old=st.integers(1, 12), more=st.integers(0, 12))
def test_a_buffers_weights_are_resized_back_to_those_they_are_for(old: int, more: int) -> None:
    weight = random_weight(old)
    buffer = pi_buffer(weight, old + more)
    torch.testing.assert_close(pi_resize(buffer, old), weight, rtol=0, atol=1e-9)
    if more == 0:
        assert buffer is weight
    # The smallest of all that are: nothing of it is lost in the resize.
    back = torch.tensor(pi_matrix(old + more, old))
    dense = torch.kron(back, back)
    smallest = torch.linalg.pinv(dense)
    expected = torch.einsum("ab,dbc->dac", smallest, weight.view(3, old * old, 3))
    torch.testing.assert_close(buffer.view(3, -1, 3), expected, rtol=0, atol=1e-8)


def test_the_gradient_reaches_the_weights() -> None:
    weight = random_weight(6, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: pi_resize(w, 4), (weight,))
    assert torch.autograd.gradcheck(lambda w: pi_resize(w, 9), (weight,))


def test_what_inference_mode_keeps_can_be_trained_with() -> None:
    weight = random_weight(11, 2)
    with torch.inference_mode():
        pi_resize(weight, 7)
    pi_resize(weight.requires_grad_(), 7).sum().backward()


def test_half_precision_is_resized_in_float32_and_equal_sizes_are_left_alone() -> None:
    weight = random_weight(8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        resized = pi_resize(weight.float(), 16)
    torch.testing.assert_close(resized, pi_resize(weight.float(), 16), rtol=0, atol=0)
    assert pi_resize(weight, 12).dtype == torch.float32
    assert pi_resize(weight, 8) is weight


def test_what_is_no_square_patch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"3 \* side\*\*2 values; got 100"):
        patch_side(100)
