import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from navit.evaluate.accuracy import accuracies, class_ranks, ranks_in_chunks
from navit.evaluate.retrieval import NOT_FOUND

ROWS = st.integers(1, 5).flatmap(
    lambda c: st.lists(
        st.tuples(st.lists(st.integers(-2, 2), min_size=c, max_size=c), st.integers(0, 6)),
        max_size=9,
    ).map(lambda rows: (c, rows))
)


@given(data=ROWS, chunk=st.integers(1, 4))
def test_a_rank_is_the_number_of_other_classes_at_least_as_good(
    data: tuple[int, list[tuple[list[int], int]]], chunk: int
) -> None:
    width, rows = data
    scores = torch.tensor([row for row, _ in rows], dtype=torch.float32).reshape(-1, width)
    classes = torch.tensor([own for _, own in rows], dtype=torch.int64)

    found = ranks_in_chunks(lambda part: scores[part], classes, chunk_size=chunk)

    assert found.tolist() == [
        sum(row[c] >= row[own] for c in range(width) if c != own) if own < width else NOT_FOUND
        for row, own in rows
    ]


def test_scores_that_are_not_finite_are_never_hits() -> None:
    scores = torch.tensor([[math.nan, 0.0], [math.inf, 0.0], [0.0, math.nan], [0.0, -math.inf]])

    ranks = class_ranks(scores, torch.tensor([0, 0, 0, 0]))

    assert ranks.tolist() == [NOT_FOUND, NOT_FOUND, 0, 0]


def test_recall_of_the_classes_by_hand() -> None:
    """Class 2: one of four images first. Class 5: its one image first. Mean (1/4 + 1) / 2."""
    found = accuracies(torch.tensor([0, 1, 2, 7, 0]), torch.tensor([2, 2, 2, 2, 5]), "x_")

    assert found == {
        "x_accuracy@1": pytest.approx(2 / 5),
        "x_accuracy@5": pytest.approx(4 / 5),
        "x_class_recall": pytest.approx((1 / 4 + 1) / 2),
    }


def test_without_images_everything_is_zero() -> None:
    none = torch.zeros(0, dtype=torch.int64)

    assert set(accuracies(none, none, "").values()) == {0.0}
