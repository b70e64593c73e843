import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from navit.evaluate.prompts import (
    DEFAULT_TEMPLATES,
    class_label,
    class_lists,
    class_vectors,
    evaluate_prompts,
    fill_template,
    prompt_accuracy,
)

WORDS = ("cat", "dog", "ant", "crab")


def encode_words(texts: list[str]) -> Tensor:
    """A text tower that knows which of `WORDS` a text ends with, and its length a little."""
    rows = [[float(t.endswith(w)) for w in WORDS] + [len(t) / 100] for t in texts]
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("template", "name", "prompt"),
    [
        ("a photo of a {}", "crab", "a photo of a crab"),
        ("a photo of a {}", "ant", "a photo of an ant"),
        ("a photo of an {}", "crab", "a photo of a crab"),
        ("A {}.", "accordion", "An accordion."),
        ("a {}", "euphonium", "a euphonium"),
        ("a {}", "umbrella", "an umbrella"),
        ("a {}", "unicycle", "a unicycle"),
        ("a {}", "hourglass", "an hourglass"),
        ("a {}", "Egyptian vase", "an Egyptian vase"),
        ("pizza {}", "ant", "pizza ant"),
        ("{}: a {}", "ant", "ant: an ant"),
        ("{}", r"a\1{0}", r"a\1{0}"),
        ("100% {x} {}", "ant", "100% {x} ant"),
        ("a photo of a {c}.", "ant", "a photo of a ant."),
        ("{c}: {}", "ant", "ant: {}"),
    ],
)
def test_a_template_takes_the_name_and_its_article(template: str, name: str, prompt: str) -> None:
    assert fill_template(template, name) == prompt


def test_a_template_without_a_place_for_the_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must hold \{\} or \{c\}"):
        fill_template("a photo", "ant")


def test_class_vectors_average_normalised_prompts() -> None:
    """Long vectors of one template must not outweigh short ones of another."""
    vectors = {"x cat": [8.0, 0.0], "y cat": [0.0, 0.5], "x dog": [0.0, 3.0], "y dog": [0.0, 1.0]}

    result = class_vectors(
        lambda texts: torch.tensor([vectors[t] for t in texts]), ["cat", "dog"], ["x {}", "y {}"]
    )

    half = math.sqrt(0.5)
    torch.testing.assert_close(result, torch.tensor([[half, half], [0.0, 1.0]]))


@pytest.mark.parametrize(("names", "templates"), [([], ["{}"]), (["cat"], [])])
def test_class_vectors_need_names_and_templates(names: list[str], templates: list[str]) -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        class_vectors(encode_words, names, templates)


@settings(deadline=None, max_examples=60)
@given(
    images=st.lists(st.lists(st.integers(-2, 2), min_size=2, max_size=2), min_size=0, max_size=6),
    classes=st.lists(st.lists(st.integers(-2, 2), min_size=2, max_size=2), min_size=1, max_size=7),
    data=st.data(),
)
def test_accuracy_counts_the_classes_at_least_as_near(
    images: list[list[int]], classes: list[list[int]], data: st.DataObject
) -> None:
    targets = data.draw(
        st.lists(st.integers(0, len(classes) - 1), min_size=len(images), max_size=len(images))
    )
    ranks = []
    for image, target in zip(images, targets, strict=True):
        scores = [image[0] * c[0] + image[1] * c[1] for c in classes]
        ranks.append(sum(s >= scores[target] for s in scores) - 1)

    result = prompt_accuracy(
        torch.tensor(images, dtype=torch.float32).reshape(-1, 2),
        torch.tensor(targets, dtype=torch.int64),
        torch.tensor(classes, dtype=torch.float32),
    )

    for k in (1, 5):
        expected = sum(rank < k for rank in ranks) / max(len(ranks), 1)
        assert result[f"prompt_accuracy@{k}"] == pytest.approx(expected)
    recalls = [
        sum(r < 1 for r, own in zip(ranks, targets, strict=True) if own == c) / targets.count(c)
        for c in set(targets)
    ]
    assert result["prompt_class_recall"] == pytest.approx(sum(recalls) / max(len(recalls), 1))


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_a_constant_or_broken_model_scores_zero(value: float) -> None:
    result = prompt_accuracy(
        torch.full((6, 4), value), torch.arange(6), torch.full((6, 4), value), ks=(1, 5)
    )

    assert set(result.values()) == {0.0}


def test_an_index_beyond_the_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="indices from 0 to 1"):
        prompt_accuracy(torch.eye(2), torch.tensor([0, 2]), torch.eye(2))


METADATA: dict[str, dict[str, Any]] = {
    "s.tar/0": {"set": "pets", "class_name": "cat"},
    "s.tar/1": {"set": "pets", "class_name": "dog"},
    "s.tar/2": {"set": "sea", "class_name": "crab"},
    "s.tar/3": {"set": "figures", "class_name": None},
    "s.tar/4": {"set": "sea", "class_name": "ant"},
    "s.tar/5": {"class_name": "cat"},
}


def test_each_set_is_scored_among_its_own_classes() -> None:
    """A dog looks like a cat; the figure and the key without metadata count nowhere."""
    keys = ["s.tar/0", "s.tar/1", "s.tar/2", "s.tar/3", "t.tar/0"]
    images = encode_words(["cat", "cat", "crab", "dog", "dog"])

    result = evaluate_prompts(images, keys, METADATA, encode_words)

    assert result == {
        "pets/prompt_accuracy@1": 0.5,
        "pets/prompt_accuracy@5": 1.0,
        "pets/prompt_class_recall": 0.5,
        "sea/prompt_accuracy@1": 1.0,
        "sea/prompt_accuracy@5": 1.0,
        "sea/prompt_class_recall": 1.0,
    }


def test_given_classes_replace_those_of_the_metadata() -> None:
    images = encode_words(["cat"])
    asked: list[str] = []

    def encode(texts: list[str]) -> Tensor:
        asked.extend(texts)
        return encode_words(texts)

    evaluate_prompts(
        images, ["s.tar/0"], METADATA, encode, templates=["a {}"], classes={"pets": ["cat", "ant"]}
    )

    assert asked == ["a cat", "an ant"]
    with pytest.raises(ValueError, match="an image of class 'cat'"):
        evaluate_prompts(images, ["s.tar/0"], METADATA, encode, classes={"pets": ["dog"]})


def test_without_classes_there_is_nothing_to_score() -> None:
    assert evaluate_prompts(torch.zeros(1, 3), ["s.tar/3"], METADATA, encode_words) == {}
    assert evaluate_prompts(torch.zeros(0, 3), [], {}, encode_words) == {}


def test_keys_must_name_every_vector() -> None:
    with pytest.raises(ValueError, match="must name every image vector"):
        evaluate_prompts(torch.zeros(2, 3), ["s.tar/0"], METADATA, encode_words)


def test_class_lists_are_sorted_and_by_set() -> None:
    assert class_lists(METADATA) == {
        "all": ("cat",),
        "pets": ("cat", "dog"),
        "sea": ("ant", "crab"),
    }
    assert class_label({"set": "x"}) is None


def test_default_templates_have_a_place_for_the_name() -> None:
    assert all("{}" in template for template in DEFAULT_TEMPLATES)
