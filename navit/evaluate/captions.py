"""Captions of images, one or several each, and the retrieval metrics of both together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from navit.evaluate.prompts import EncodeTexts
from navit.evaluate.retrieval import retrieval_chance, retrieval_metrics


@dataclass(frozen=True)
class Captions:
    """The M captions of N images."""

    texts: tuple[str, ...]
    """The captions, those of an image together."""
    image_of_text: Int64[Tensor, " M"]
    """Which image each belongs to."""
    num_images: int
    """N."""

    @classmethod
    def of(cls, captions: Sequence[Sequence[str]]) -> "Captions":
        """Put the captions of every image in one row."""
        owners = [index for index, several in enumerate(captions) for _ in several]
        texts = tuple(text for several in captions for text in several)
        return cls(texts, torch.tensor(owners, dtype=torch.int64), len(captions))


def image_captions(
    texts: Sequence[str],
    keys: Sequence[str],
    metadata: Mapping[str, Mapping[str, Any]],
    *,
    lines: bool,
) -> list[tuple[str, ...]]:
    """List every image's captions.

    Args:
        texts: Its text as the batch had it; empty where there is none.
        keys: Key of each image.
        metadata: Json of the samples by key: a list under ``captions`` or ``caption`` replaces the
            text.
        lines: Whether every line of the text is a caption of its own.

    Returns:
        Captions without white space around them, none of them empty.
    """
    found = []
    for text, key in zip(texts, keys, strict=True):
        fields = metadata.get(key, {})
        lists = (fields.get(name) for name in ("captions", "caption"))
        listed = next((value for value in lists if isinstance(value, list)), None)
        if listed is not None:
            several = [str(item) for item in listed]
        else:
            several = text.splitlines() if lines else [text]
        found.append(tuple(caption for item in several if (caption := item.strip())))
    return found


def encode_unique(encode_texts: EncodeTexts, texts: Sequence[str]) -> Float[Tensor, "M D"]:
    """Encode texts, equal ones once: (M, D)."""
    number: dict[str, int] = {}
    rows = [number.setdefault(text, len(number)) for text in texts]
    return encode_texts(list(number))[rows]


def pair_metrics(
    image: Float[Tensor, "N D"], text: Float[Tensor, "M D"], captions: Captions
) -> dict[str, float]:
    """Recall of both directions, with what a random ranking reaches.

    Args:
        image: One vector of norm 1 per image; one without a caption is no query, but competes.
        text: One vector of norm 1 per caption.
        captions: The captions; equal ones are hits of one another.

    Returns:
        The keys of `navit.evaluate.retrieval.retrieval_metrics`, and the same with ``chance/``
        before them.
    """
    chance = retrieval_chance(captions.num_images, captions.image_of_text, captions.texts)
    return {
        **retrieval_metrics(image, text, captions.image_of_text, captions.texts),
        **{f"chance/{name}": value for name, value in chance.items()},
    }
