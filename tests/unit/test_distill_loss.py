"""Losses of distillation, against `torch.nn.functional.kl_div` on dense logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from navit.distill_loss import Divergence, contrastive_distillation, label_distillation

KL: list[Divergence] = ["forward", "reverse"]


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def dense(student: Tensor, teacher: Tensor, kl: Divergence) -> Tensor:
    """Sum of the rows' divergences of two softmaxes."""
    own, taught = student.log_softmax(-1), teacher.log_softmax(-1)
    given, wanted = (own, taught) if kl == "forward" else (taught, own)
    return F.kl_div(given, wanted, reduction="sum", log_target=True)


@pytest.mark.parametrize("kl", KL)
@settings(deadline=None, max_examples=15)
@given(count=st.integers(0, 5), classes=st.integers(1, 6), seed=st.integers(0, 99))
def test_classes_are_compared_by_their_distributions(
    kl: Divergence, count: int, classes: int, seed: int
) -> None:
    student, teacher = draw(count, classes, seed=seed), draw(count, classes, seed=seed + 1)
    student.requires_grad_()
    found = label_distillation(student, teacher, kl=kl, temperature=2.0)
    expected = 4 * dense(student / 2, teacher / 2, kl) / max(count, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    grads = [torch.autograd.grad(loss, student)[0] for loss in (found, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kl", KL)
def test_a_sigmoid_class_is_a_distribution_of_its_own(kl: Divergence) -> None:
    student, teacher = draw(4, 3, seed=0), draw(4, 3, seed=1)
    found = label_distillation(student, teacher, kl=kl, kind="sigmoid")
    both = [torch.stack([x, torch.zeros_like(x)], dim=-1) for x in (student, teacher)]
    torch.testing.assert_close(found, dense(both[0], both[1], kl) / 4, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kl", KL)
@settings(deadline=None, max_examples=15)
@given(count=st.integers(0, 5), seed=st.integers(0, 99))
def test_pairs_are_compared_by_both_softmaxes(kl: Divergence, count: int, seed: int) -> None:
    """The two models' spaces have different widths, and each its multiplier."""
    image, text = (draw(count, 4, seed=seed + n).requires_grad_() for n in (0, 1))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    taught = draw(count, 6, seed=seed + 2), draw(count, 6, seed=seed + 3), torch.tensor(2.0)
    found = contrastive_distillation(image, text, scale, *taught, kl=kl)
    own, wanted = scale * image @ text.T, 2 * taught[0] @ taught[1].T
    expected = (dense(own, wanted, kl) + dense(own.T, wanted.T, kl)) / 2 / max(count, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    grads = [torch.autograd.grad(loss, (image, text, scale)) for loss in (found, expected)]
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kl", KL)
def test_a_student_that_agrees_has_neither_loss_nor_gradient(kl: Divergence) -> None:
    logits = draw(5, 3, seed=0).requires_grad_()
    image, text = draw(5, 4, seed=1).requires_grad_(), draw(5, 4, seed=2).requires_grad_()
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    losses = [
        label_distillation(logits, logits, kl=kl),
        label_distillation(logits, logits, kl=kl, kind="sigmoid"),
        contrastive_distillation(image, text, scale, image, text, scale, kl=kl),
    ]
    for loss in losses:
        assert abs(float(loss.detach())) < 1e-12
    grads = torch.autograd.grad(sum(losses), (logits, image, text, scale))
    assert max(float(grad.abs().max()) for grad in grads) < 1e-12


def test_half_precision_is_compared_in_float32() -> None:
    student, teacher = draw(8, 50, seed=0), draw(8, 50, seed=1)
    exact = label_distillation(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        found = label_distillation(student.bfloat16(), teacher.bfloat16())
    assert found.dtype == torch.float32
    rounded = label_distillation(student.bfloat16().double(), teacher.bfloat16().double())
    torch.testing.assert_close(found.double(), rounded, rtol=1e-5, atol=0)
    assert abs(float(rounded - exact)) < 0.05


def test_answers_to_other_questions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"same images and classes; got \(2, 3\) and \(2, 4\)"):
        label_distillation(draw(2, 3, seed=0), draw(2, 4, seed=0))
    with pytest.raises(ValueError, match="temperature must be positive; got -1"):
        label_distillation(draw(2, 3, seed=0), draw(2, 3, seed=0), temperature=-1.0)
    pair, other = draw(2, 3, seed=0), draw(3, 3, seed=0)
    with pytest.raises(ValueError, match=r"same pairs; got \[2, 2, 3, 3\]"):
        contrastive_distillation(pair, pair, torch.ones(()), other, other, torch.ones(()))


@pytest.mark.parametrize("kl", KL)
@settings(deadline=None, max_examples=15)
@given(count=st.integers(1, 9), chunk_size=st.integers(1, 10), seed=st.integers(0, 99))
def test_the_size_of_a_tile_changes_nothing(
    kl: Divergence, count: int, chunk_size: int, seed: int
) -> None:
    image, text = (draw(count, 4, seed=seed + n).requires_grad_() for n in (0, 1))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    taught = draw(count, 6, seed=seed + 2), draw(count, 6, seed=seed + 3), torch.tensor(2.0)
    whole, tiled = (
        contrastive_distillation(image, text, scale, *taught, kl=kl, chunk_size=size)
        for size in (100, chunk_size)
    )
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-10)
    grads = [torch.autograd.grad(loss, (image, text, scale)) for loss in (whole, tiled)]
    for plain, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kl", KL)
def test_half_precision_vectors_at_a_scale_of_100_are_compared_in_float32(kl: Divergence) -> None:
    own = [F.normalize(draw(40, 8, seed=n), dim=1).bfloat16().requires_grad_() for n in (0, 1)]
    taught = [F.normalize(draw(40, 8, seed=n), dim=1).bfloat16() for n in (2, 3)]
    scale = torch.tensor(100.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = contrastive_distillation(*own, scale, *taught, scale, kl=kl, chunk_size=16)
    mine, theirs = (100 * x.double() @ y.double().T for x, y in (own, taught))
    expected = (dense(mine, theirs, kl) + dense(mine.T, theirs.T, kl)) / 80

    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert all(bool(x.isfinite().all()) for x in torch.autograd.grad(found, own))
