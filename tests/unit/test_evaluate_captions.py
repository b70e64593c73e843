import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from navit.evaluate.captions import Captions, encode_unique, image_captions, pair_metrics


def test_captions_are_the_text_its_lines_or_a_list_in_the_json() -> None:
    texts = ("a dog\n\n two dogs \r\n", "one", "", "left out")
    keys = ("k0", "k1", "k2", "k3")
    metadata = {
        "k0": {"caption": "a string in the json is not a list"},
        "k2": {"captions": [" first ", "", "second"]},
        "k3": {"caption": ["third"]},
    }

    assert image_captions(texts, keys, metadata, lines=True) == [
        ("a dog", "two dogs"),
        ("one",),
        ("first", "second"),
        ("third",),
    ]
    assert image_captions(texts[:2], keys[:2], metadata, lines=False) == [
        ("a dog\n\n two dogs",),
        ("one",),
    ]


@given(counts=st.lists(st.integers(0, 3), max_size=6))
def test_every_caption_belongs_to_its_image(counts: list[int]) -> None:
    given = [tuple(f"{i}.{j}" for j in range(count)) for i, count in enumerate(counts)]

    captions = Captions.of(given)

    assert captions.num_images == len(counts)
    pairs = zip(captions.texts, captions.image_of_text.tolist(), strict=True)
    assert all(text.startswith(f"{owner}.") for text, owner in pairs)
    assert len(captions.texts) == sum(counts)


@given(texts=st.lists(st.sampled_from("abcd"), min_size=1, max_size=9))
def test_equal_texts_are_encoded_once(texts: list[str]) -> None:
    asked: list[str] = []

    def encode(unique: list[str]) -> Tensor:
        asked.extend(unique)
        return torch.tensor([[float(ord(text))] for text in unique])

    assert encode_unique(encode, texts)[:, 0].tolist() == [float(ord(text)) for text in texts]
    assert len(asked) == len(set(texts))


def test_an_image_without_a_caption_competes_and_asks_nothing() -> None:
    """The caption of image 0 lies nearer to image 1, which has none."""
    image = torch.tensor([[1.0, 0.0], [0.6, 0.8]])

    metrics = pair_metrics(image, torch.tensor([[0.6, 0.8]]), Captions.of([("a dog",), ()]))

    assert metrics["image_to_text/recall@1"] == 1.0
    assert metrics["text_to_image/recall@1"] == 0.0
    assert metrics["chance/text_to_image/recall@1"] == 0.5
