import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from navit.evaluate.retrieval import retrieval_chance, retrieval_metrics

KS = (1, 2, 5)


def recall_by_definition(
    image: list[list[float]], text: list[list[float]], owner: list[int], names: list[str], k: int
) -> tuple[float, float]:
    """Plain twin: rank every query's entries one by one, wrong entries before equal right ones."""

    def found(scores: list[float], right: list[bool]) -> bool | None:
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], right[i]))
        return any(right[i] for i in order[:k])

    def dot(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    own = [{names[j] for j, o in enumerate(owner) if o == i} for i in range(len(image))]
    to_text = [
        found([dot(v, t) for t in text], [name in own[i] for name in names])
        for i, v in enumerate(image)
        if own[i]
    ]
    to_image = [
        found([dot(t, v) for v in image], [names[j] in captions for captions in own])
        for j, t in enumerate(text)
    ]
    return sum(to_text) / max(len(to_text), 1), sum(to_image) / max(len(to_image), 1)


@st.composite
def collections(
    draw: st.DrawFn,
) -> tuple[list[list[float]], list[list[float]], list[int], list[str]]:
    """Images, captions, owners and names with many ties, repeats and images without captions."""
    n, m, dim = draw(st.integers(1, 7)), draw(st.integers(0, 9)), draw(st.integers(1, 3))
    vector = st.lists(st.integers(-2, 2).map(float), min_size=dim, max_size=dim)
    return (
        draw(st.lists(vector, min_size=n, max_size=n)),
        draw(st.lists(vector, min_size=m, max_size=m)),
        draw(st.lists(st.integers(0, n - 1), min_size=m, max_size=m)),
        draw(st.lists(st.sampled_from("abcdef"), min_size=m, max_size=m)),
    )


def matrix(rows: list[list[float]], width: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(len(rows), width)


@settings(deadline=None, max_examples=150)
@given(data=collections(), chunk_size=st.integers(1, 8))
def test_recall_equals_its_definition_for_any_chunk_size(
    data: tuple[list[list[float]], list[list[float]], list[int], list[str]], chunk_size: int
) -> None:
    image, text, owner, names = data
    width = len(image[0])

    metrics = retrieval_metrics(
        matrix(image, width),
        matrix(text, width),
        torch.tensor(owner, dtype=torch.int64),
        names,
        ks=KS,
        chunk_size=chunk_size,
    )

    for k in KS:
        to_text, to_image = recall_by_definition(image, text, owner, names, k)
        assert metrics[f"image_to_text/recall@{k}"] == pytest.approx(to_text)
        assert metrics[f"text_to_image/recall@{k}"] == pytest.approx(to_image)


def test_three_pairs_by_hand() -> None:
    """Scores, image by row: [[.9, .8, .1], [.7, .2, .3], [0, 0, 1]].

    Image 0 finds text 0 first. Image 1 scores its own text lowest of three: rank 2. Image 2 finds
    its text first. Text 0: image 0 first. Text 1: image 0 (.8) before image 1 (.2): rank 1.
    Text 2: image 2 first.
    """
    text = torch.eye(3)
    image = torch.tensor([[0.9, 0.8, 0.1], [0.7, 0.2, 0.3], [0.0, 0.0, 1.0]])

    metrics = retrieval_metrics(image, text, torch.arange(3), ks=(1, 2, 3))

    assert metrics == {
        "image_to_text/recall@1": pytest.approx(2 / 3),
        "image_to_text/recall@2": pytest.approx(2 / 3),
        "image_to_text/recall@3": 1.0,
        "text_to_image/recall@1": pytest.approx(2 / 3),
        "text_to_image/recall@2": 1.0,
        "text_to_image/recall@3": 1.0,
    }


def test_identical_captions_and_a_tie_by_hand() -> None:
    """Two images called "cat" (texts 0 and 2) and a "dog"; rows of scores 001, 110 and 001.

    Image 0 scores text 2 highest, and it says "cat" too: a hit. Image 1 ("dog", text 1) ties with
    text 0 "cat": rank 1. Image 2 finds text 2. Text 0 "cat" scores the dog's image highest: rank 1.
    Text 1 "dog" finds its image. Text 2 "cat" finds images 0 and 2, both hits.
    """
    image = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])

    metrics = retrieval_metrics(image, text, torch.arange(3), ["cat", "dog", "cat"], ks=(1, 2))

    assert metrics == {
        "image_to_text/recall@1": pytest.approx(2 / 3),
        "image_to_text/recall@2": 1.0,
        "text_to_image/recall@1": pytest.approx(2 / 3),
        "text_to_image/recall@2": 1.0,
    }


@pytest.mark.parametrize("value", [1.0, 0.0, math.nan, math.inf])
def test_a_model_that_says_the_same_of_everything_scores_zero(value: float) -> None:
    vectors = torch.full((50, 8), value)

    metrics = retrieval_metrics(vectors, vectors, torch.arange(50))

    assert set(metrics.values()) == {0.0}


def test_one_broken_vector_costs_its_own_queries_alone() -> None:
    vectors = torch.eye(10)
    image = vectors.clone()
    image[3] = math.nan

    metrics = retrieval_metrics(image, vectors, torch.arange(10), ks=(1, 10))

    assert list(metrics.values()) == pytest.approx([0.9] * 4)


def test_several_captions_of_an_image_are_all_hits() -> None:
    image = torch.eye(2)
    text = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])

    metrics = retrieval_metrics(image, text, torch.tensor([0, 0, 1]), ks=(1,))

    # Image 0's second caption is found; the first lies nearer to image 1, beside which it ties.
    assert metrics == {
        "image_to_text/recall@1": 0.5,
        "text_to_image/recall@1": pytest.approx(2 / 3),
    }


def test_two_images_with_two_and_three_captions_by_hand() -> None:
    """Scores, image by row: [[.9, .2, .8, .1, .3], [.75, .6, .5, .7, .3]]; texts 0, 1 | 2, 3, 4.

    Image 0: its text 0 (.9) is first of all. Image 1: its best is text 3 (.7), behind text 0 (.75):
    rank 1. Text 0 prefers image 0 (.9 to .75). Text 1 prefers image 1 (.6 to .2): rank 1. Text 2
    prefers image 0 (.8 to .5): rank 1. Text 3 prefers image 1. Text 4 scores both .3: the tie is no
    hit, rank 1.
    """
    image = torch.tensor([[0.9, 0.2, 0.8, 0.1, 0.3], [0.75, 0.6, 0.5, 0.7, 0.3]])

    metrics = retrieval_metrics(image, torch.eye(5), torch.tensor([0, 0, 1, 1, 1]), ks=(1, 2))

    assert metrics == {
        "image_to_text/recall@1": 0.5,
        "image_to_text/recall@2": 1.0,
        "text_to_image/recall@1": pytest.approx(2 / 5),
        "text_to_image/recall@2": 1.0,
    }


def test_a_caption_two_images_share_and_an_image_without_one_by_hand() -> None:
    """Image 0: "dog", "pet"; image 1: "pet", "cat"; image 2 has no caption and competes.

    Image 0 finds text 2 first, image 1's "pet", which is its own caption too. Image 1: both "pet"
    (.5) and "cat" (.5) are behind "dog" (.8): rank 1. "dog" (.1) is behind images 1 and 2: rank 2.
    "pet" of image 0 finds image 1 (.5), a hit, behind image 2 (.6): rank 1. "pet" of image 1 finds
    image 0 (.9). "cat" (.5) is behind image 2 (.95): rank 1.
    """
    image = torch.tensor([[0.1, 0.2, 0.9, 0.3], [0.8, 0.5, 0.4, 0.5], [0.7, 0.6, 0.1, 0.95]])

    metrics = retrieval_metrics(
        image, torch.eye(4), torch.tensor([0, 0, 1, 1]), ["dog", "pet", "pet", "cat"], ks=(1, 2, 3)
    )

    assert metrics == {
        "image_to_text/recall@1": 0.5,
        "image_to_text/recall@2": 1.0,
        "image_to_text/recall@3": 1.0,
        "text_to_image/recall@1": 0.25,
        "text_to_image/recall@2": 0.75,
        "text_to_image/recall@3": 1.0,
    }


def test_no_pairs_score_zero() -> None:
    metrics = retrieval_metrics(
        torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), []
    )

    assert metrics == dict.fromkeys(
        [f"{d}/recall@{k}" for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)], 0.0
    )


def test_half_precision_vectors_and_autocast_are_compared_in_float32() -> None:
    """1 and 1 + 2^-10 differ in float16; their products with 1 would tie in bfloat16."""
    image = torch.tensor([[1.0], [1 + 2**-10]], dtype=torch.float16)
    text = torch.tensor([[-1.0], [1.0]], dtype=torch.float16)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        metrics = retrieval_metrics(image, text, torch.arange(2), ks=(1,))

    assert metrics["text_to_image/recall@1"] == 1.0


def test_float64_vectors_are_compared_in_float64() -> None:
    image = torch.tensor([[1.0], [1 + 2**-40]], dtype=torch.float64)
    text = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)

    assert retrieval_metrics(image, text, torch.arange(2), ks=(1,))["text_to_image/recall@1"] == 1.0


@pytest.mark.parametrize(
    ("owner", "names", "message"),
    [
        ([0, 2], None, "image indices from 0 to 1"),
        ([0, -1], None, "image indices from 0 to 1"),
        ([0], None, "image_of_text"),  # the shape check names it first, where it is on
        ([0, 1], ["a"], "one caption per entry"),
    ],
)
def test_counts_that_disagree_are_named(
    owner: list[int], names: list[str] | None, message: str
) -> None:
    with pytest.raises(Exception, match=message):
        retrieval_metrics(torch.eye(2), torch.eye(2), torch.tensor(owner), names)


def test_chance_is_what_random_vectors_reach() -> None:
    names = ["a"] * 6 + [str(i) for i in range(14)]
    owner = torch.arange(20)
    generator = torch.Generator().manual_seed(0)
    runs = [
        retrieval_metrics(
            torch.randn(20, 16, generator=generator),
            torch.randn(20, 16, generator=generator),
            owner,
            names,
            ks=(1, 5, 30),
        )
        for _ in range(40)
    ]

    chance = retrieval_chance(20, owner, names, ks=(1, 5, 30))

    for name, expected in chance.items():
        assert sum(run[name] for run in runs) / len(runs) == pytest.approx(expected, abs=0.05)
    assert chance["image_to_text/recall@1"] == pytest.approx((6 * 6 + 14) / 400)
    assert chance["image_to_text/recall@30"] == 1.0


def test_chance_without_pairs_is_zero() -> None:
    assert set(retrieval_chance(0, torch.zeros(0, dtype=torch.int64)).values()) == {0.0}
