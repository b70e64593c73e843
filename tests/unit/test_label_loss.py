"""Classification losses against their formulas, written out."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from navit.label_loss import label_loss


def softmax_by_hand(logits: Tensor, targets: Tensor) -> float:
    total = 0.0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        norm = math.log(sum(map(math.exp, row)))
        total -= sum(t * (x - norm) for x, t in zip(row, target, strict=True))
    return total / len(logits)


def sigmoid_by_hand(logits: Tensor, targets: Tensor) -> float:
    total = 0.0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        for x, t in zip(row, target, strict=True):
            p = 1 / (1 + math.exp(-x))
            total -= t * math.log(p) + (1 - t) * math.log(1 - p)
    return total / len(logits)


BY_HAND = {"softmax": softmax_by_hand, "sigmoid": sigmoid_by_hand}


@pytest.mark.parametrize("kind", BY_HAND)
@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 6), classes=st.integers(1, 7), seed=st.integers(0, 99))
def test_the_loss_is_its_formula_for_indices_and_for_targets(
    kind: str, count: int, classes: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, classes, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, classes, (count,), generator=generator)
    one_hot = torch.nn.functional.one_hot(labels, classes)
    soft = torch.rand(count, classes, dtype=torch.float64, generator=generator)
    soft = soft / soft.sum(1, keepdim=True) if kind == "softmax" else soft

    by_index = label_loss(logits, labels, kind=kind).item()
    by_target = label_loss(logits, soft.float(), kind=kind).item()

    assert by_index == pytest.approx(BY_HAND[kind](logits, one_hot), abs=1e-9)
    assert by_target == pytest.approx(BY_HAND[kind](logits, soft.float().double()), abs=1e-6)


@pytest.mark.parametrize("kind", BY_HAND)
def test_half_precision_logits_are_summed_in_float32(kind: str) -> None:
    logits = torch.full((64, 1000), 3.0, dtype=torch.bfloat16)
    labels = torch.arange(64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = label_loss(logits, labels, kind=kind)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(label_loss(logits.double(), labels, kind=kind).item())


@pytest.mark.parametrize("kind", BY_HAND)
def test_no_image_gives_zero_connected_to_the_logits(kind: str) -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = label_loss(logits, torch.zeros(0, dtype=torch.int64), kind=kind)
    assert loss.item() == 0
    loss.backward()
    assert logits.grad is not None


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 5]), r"in \[0, 5\); got 5"),
        (torch.tensor([-1, 2]), r"in \[0, 5\); got -1"),
        (torch.zeros(2, 4), r"targets \(2, 5\); got \(2, 4\)"),
    ],
)
def test_labels_of_other_classes_are_refused(labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        label_loss(torch.zeros(2, 5), labels)
